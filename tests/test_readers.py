"""Pictures inside of tars, Parquet and Arrow files: every row leads to its own picture."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.packed import arrow, parquet, samples, save_to_disk, table, talk, tar
from tests.s3 import S3Server
from unimrg import retries
from unimrg.config import DataConfig
from unimrg.data import pictures as pictures_module
from unimrg.data.manifest import Manifest, build_index
from unimrg.data.pictures import Pictures
from unimrg.data.readers import find_shards
from unimrg.data.stages import Fetch, Sources
from unimrg.errors import DataError, SampleError, StorageError
from unimrg.sample import load_conversations
from unimrg.storage import S3Config, Store


def encode(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


RNG = np.random.default_rng(0)
PICTURES = [RNG.bytes(int(n)) for n in RNG.integers(1, 3000, 30)]
LIMIT = 1 << 20


def index(folder: Path, manifest: str, **options: Any) -> Manifest:
    return build_index(Store.at(str(folder)), manifest, folder / ".index", **options)


def every(built: Manifest) -> list[dict[str, Any]]:
    return built.rows(range(len(built))).to_pylist()


def write(folder: Path, form: str) -> str:
    """PICTURES in two files of a form; the name for data.manifest."""
    halves = (PICTURES[:13], 0), (PICTURES[13:], 13)
    if form == "tars":
        for number, half in enumerate(halves):
            (folder / f"shard-{number:03}.tar").write_bytes(tar(samples(*half)))
        return "shard-{000..001}.tar"
    if form == "parquet":
        (folder / "hub" / "data").mkdir(parents=True)
        for number, half in enumerate(halves):
            (folder / "hub" / "data" / f"train-{number}.parquet").write_bytes(
                parquet(table(*half), row_group_size=5)
            )
        return "hub"
    stream = form == "save_to_disk"
    save_to_disk(folder / "saved", [arrow(table(*half), 5, stream) for half in halves])
    return "saved" if stream else "saved/*.arrow"


FORMS = ["tars", "parquet", "save_to_disk", "arrow files"]


@pytest.mark.parametrize("form", FORMS)
def test_every_row_leads_to_its_picture(tmp_path: Path, form: str) -> None:
    rows = every(index(tmp_path, write(tmp_path, form)))
    check_rows(rows, Pictures(Store.at(str(tmp_path))))


def check_rows(rows: list[dict[str, Any]], pictures: Pictures) -> None:
    assert [row["error"] for row in rows] == [None] * len(PICTURES)
    assert len({row["image"] for row in rows}) == len({row["id"] for row in rows}) == len(PICTURES)
    for number, row in enumerate(rows):
        assert load_conversations(row["conversations"])[0][0].answer == f"a{number}"
        assert pictures.read(row["image"], row["place"], LIMIT) == PICTURES[number]
        with pytest.raises(SampleError, match="too-large"):
            pictures.read(row["image"], row["place"], len(PICTURES[number]) - 1)


@pytest.mark.parametrize("form", FORMS)
def test_from_object_storage(s3_server: S3Server, tmp_path: Path, form: str) -> None:
    s3 = S3Config(s3_server.endpoint, "", s3_server.access_key, s3_server.secret_key)
    store = Store.at(s3_server.url(f"readers/{form.replace(' ', '-')}"), s3)
    name = write(tmp_path, form)
    store.upload(tmp_path, "")
    built = build_index(store, name, tmp_path / ".index")
    pictures = pickle.loads(pickle.dumps(Pictures(store)))
    rows = every(built)
    check_rows(rows, pictures)
    path = rows[0]["image"].rsplit("/", 1)[0]
    store.delete(path)
    with pytest.raises(SampleError, match="missing-file"):
        Pictures(store).read(rows[0]["image"], rows[0]["place"], LIMIT)


def test_through_the_first_stage(tmp_path: Path) -> None:
    """From all forms the same pixels, and a reason for each that has none."""
    images = [RNG.integers(0, 256, (20 + i, 30, 3), np.uint8) for i in range(6)]
    raws = [encode(image) for image in images]
    raws[3] = raws[3][:100]
    raws[4] = b"<html>"
    (tmp_path / "x.tar").write_bytes(tar(samples(raws, suffix="png")))
    (tmp_path / "x.parquet").write_bytes(parquet(table(raws)))
    (tmp_path / "x.arrow").write_bytes(arrow(table(raws)))
    for name in ("x.tar", "x.parquet", "x.arrow"):
        built = index(tmp_path, name)
        rows = built.rows(range(6)).append_column("position", pa.array(range(6)))
        fetched = Fetch(Sources(Store.at(str(tmp_path))), DataConfig())(rows).to_pylist()
        reasons = [row["error"] for row in fetched]
        assert reasons == [None, None, None, "corrupt-image", "not-an-image", None]
        for row, image in zip(fetched, images, strict=True):
            assert row["error"] or row["image"] == image.tobytes()


# Tars


def test_members_of_a_sample(tmp_path: Path) -> None:
    good = json.dumps({"id": 7, "image": "original/path.png", "conversations": talk("q", "a")}).encode()
    members = [
        ("a/0001.JPG", b"one"),
        ("a/0001.json", good),
        ("a/0001.cls", b"9"),
        ("b/0001.json", json.dumps(talk("list", "only")).encode()),  # another folder, another sample
        ("b/0001.seg.png", b"not the picture"),
        ("b/0001.png", b"two"),
        ("c.txt", b" a caption\n"),
        ("c.webp", b"three"),
        ("d.json", json.dumps({"conversations": talk("text", "only")}).encode()),
        ("README", b"?"),
    ]
    (tmp_path / "x.tar").write_bytes(tar(members))
    rows = every(index(tmp_path, "x.tar"))
    assert [row["error"] for row in rows] == [None] * 4
    assert [row["id"] for row in rows] == ["7", "x.tar/b/0001", "x.tar/c", "x.tar/d"]
    assert [row["image"] for row in rows] == ["x.tar/a/0001.JPG", "x.tar/b/0001.png", "x.tar/c.webp", None]
    talks = [load_conversations(row["conversations"])[0][0] for row in rows]
    assert [(t.question, t.answer) for t in talks[1:]] == [
        ("list", "only"),
        ("Describe the image.", "a caption"),
        ("text", "only"),
    ]
    pictures = Pictures(Store.at(str(tmp_path)))
    found = [pictures.read(row["image"], row["place"], LIMIT) for row in rows[:3]]
    assert found == [b"one", b"two", b"three"]


@pytest.mark.parametrize(
    ("members", "reasons", "detail"),
    [
        ([("0.jpg", b"x")], ["malformed-conversation"], "neither .json nor .txt"),
        ([("0.jpg", b"x"), ("0.png", b"y"), ("0.txt", b"c")], ["malformed-conversation"], "2 pictures"),
        ([("0.json", b'{"image": "0.jpg"}')], ["malformed-conversation"], "no picture beside it"),
        ([("0.jpg", b"x"), ("0.json", b"{")], ["malformed-conversation"], "broken JSON"),
        ([("0.jpg", b"x"), ("0.json", b"\xff")], ["malformed-conversation"], "not UTF-8"),
        ([("0.jpg", b"x"), ("0.json", b"[" * 100_000)], ["malformed-conversation"], "broken JSON"),
        ([("0.jpg", b"x"), ("0.json", b"3")], ["malformed-conversation"], "must be an object"),
        ([("../0.jpg", b"x"), ("../0.txt", b"c")], [None], ""),  # only a name: it stays below the tar's
        ([("../../0.jpg", b"x"), ("../../0.txt", b"c")], ["path-outside-folder"], "climbs"),
        ([("0.jpg", b"x"), ("0.txt", b"c")] * 2, [None, "unreadable-file"], "names two pictures"),
    ],
)
def test_bad_samples(
    tmp_path: Path, members: list[tuple[str, bytes]], reasons: list[str | None], detail: str
) -> None:
    good = [("good.jpg", b"x"), ("good.txt", b"c")]
    (tmp_path / "x.tar").write_bytes(tar([*members, *good]))
    rows = every(index(tmp_path, "x.tar"))
    assert sorted(str(row["error"]) for row in rows) == sorted(map(str, [*reasons, None]))
    assert any(detail in (row["detail"] or "") for row in rows)


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind in (
            ("0.jpg", tarfile.SYMTYPE),
            ("1.json", tarfile.LNKTYPE),
            ("2.jpg", tarfile.FIFOTYPE),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "/etc/passwd"
            archive.addfile(link)
            text = tarfile.TarInfo(f"{name[0]}.txt")
            archive.addfile(text)
    (tmp_path / "x.tar").write_bytes(out.getvalue())
    with tarfile.open(tmp_path / "x.tar", "a") as archive:
        for name, content in (("3.jpg", b"x"), ("3.txt", b"c")):
            member = tarfile.TarInfo(name)
            member.size = 1
            archive.addfile(member, io.BytesIO(content))
    rows = every(index(tmp_path, "x.tar"))
    assert [row["error"] for row in rows] == [*["malformed-conversation"] * 3, None]
    assert all("link" in row["detail"] for row in rows[:3])


def test_a_damaged_shard_is_told_and_the_next_one_read(tmp_path: Path) -> None:
    whole = tar(samples(PICTURES[:10]))
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        fourth = archive.getmembers()[6].offset
    bad_header = whole[:fourth] + b"?" * 512 + whole[fourth + 512 :]
    for damaged, lost in (
        (whole[: fourth + 100], ["unreadable-file"]),
        (bad_header, ["unreadable-file"]),
        (whole[: fourth + 700], ["malformed-conversation", "unreadable-file"]),  # inside of a picture
    ):
        (tmp_path / "s-0.tar").write_bytes(damaged)
        (tmp_path / "s-1.tar").write_bytes(tar(samples(PICTURES[10:], 10)))
        rows = every(index(tmp_path, "s-*.tar"))
        bad = [row for row in rows if row["error"]]
        assert [row["error"] for row in bad] == lost
        assert "s-0.tar: the tar " in bad[-1]["detail"]
        assert len(rows) - len(bad) == 23
    (tmp_path / "s-0.tar").write_bytes(whole[:100])
    with pytest.raises(DataError, match=r"s-0.tar: the tar breaks at byte 0"):
        index(tmp_path, "s-0.tar")


def test_tars_need_no_memory_for_their_length(tmp_path: Path) -> None:
    """Neither members nor pictures pile up: a sparse file stands for pictures of 64 MiB."""
    with open(tmp_path / "x.tar", "wb") as out:
        for number in range(40):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = 64 << 20
            out.write(member.tobuf())
            out.seek(member.size, os.SEEK_CUR)
            out.write(tar([(f"{number}.txt", b"c")])[:1024])
        out.write(bytes(1024))
    import tracemalloc

    tracemalloc.start()
    try:
        assert len(index(tmp_path, "x.tar")) == 40
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


# Names


def test_patterns(tmp_path: Path) -> None:
    store = Store.at(str(tmp_path))
    for number in range(8, 12):
        (tmp_path / f"s-{number:02}.tar").write_bytes(tar(samples(PICTURES[:1])))
    paths = [shard.path for shard in find_shards(store, "s-{08..11}.tar")]
    assert paths == ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]
    assert [shard.path for shard in find_shards(store, "s-0*.tar")] == paths[:2]
    with pytest.raises(DataError, match=r"s-12.tar is missing"):
        find_shards(store, "s-{08..12}.tar")
    for wrong in ("s-{9..8}.tar", "s-{0..99999999}.tar"):
        with pytest.raises(DataError, match="no range"):
            find_shards(store, wrong)
    with pytest.raises(DataError, match="no file matches"):
        find_shards(store, "none-*.tar")
    first = index(tmp_path, "s-*.tar")
    (tmp_path / "s-12.tar").write_bytes(tar(samples(PICTURES[:1])))
    assert len(index(tmp_path, "s-*.tar")) == len(first) + 1  # a new shard is a new index


def test_folders(tmp_path: Path) -> None:
    store = Store.at(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"neither Parquet files nor a state\.json"):
        find_shards(store, "empty")
    save_to_disk(tmp_path / "both" / "train", [arrow(table(PICTURES[:2]))])
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match="several data sets; name one: train"):
        find_shards(store, "both")
    assert len(index(tmp_path, "both/train")) == 2
    assert len(build_index(store.child("both/train"), "", tmp_path / ".index")) == 2  # "folder/"
    for state in ("[", "[]", '{"_data_files": [{"filename": "../x"}]}', '{"_data_files": []}', "[" * 10**5):
        (tmp_path / "both" / "train" / "state.json").write_text(state)
        with pytest.raises(DataError, match=r"state.json"):
            find_shards(store, "both/train")


# Tables


@pytest.mark.parametrize("statistics", [True, False])
def test_pictures_by_path_beside_pictures_by_bytes(tmp_path: Path, statistics: bool) -> None:
    (tmp_path / "1.jpg").write_bytes(b"outside")
    mixed = table([PICTURES[0], None, PICTURES[2]])
    (tmp_path / "mixed.parquet").write_bytes(parquet(mixed, write_statistics=statistics))
    (tmp_path / "paths.parquet").write_bytes(parquet(table([None] * 3), write_statistics=statistics))
    (tmp_path / "mixed.arrow").write_bytes(arrow(mixed))
    pictures = Pictures(Store.at(str(tmp_path)))
    for name in ("mixed.parquet", "mixed.arrow"):
        rows = every(index(tmp_path, name))
        assert [row["image"] for row in rows] == [f"{name}/0", "1.jpg", f"{name}/2"]
        found = [pictures.read(row["image"], row["place"], LIMIT) for row in rows]
        assert found == [PICTURES[0], b"outside", PICTURES[2]]
    rows = every(index(tmp_path, "paths.parquet"))
    assert [(row["image"], row["place"]) for row in rows] == [(f"{i}.jpg", None) for i in range(3)]


def test_kinds_of_columns(tmp_path: Path) -> None:
    talks = [json.dumps(talk("q", "a"))] * 3
    kinds = {
        "bytes": pa.array(PICTURES[:3]),
        "large": pa.array(PICTURES[:3], pa.large_binary()),
        "bare": pa.array([{"bytes": p} for p in PICTURES[:3]]),
        "same": pa.array([PICTURES[0]] * 3),
    }
    pictures = Pictures(Store.at(str(tmp_path)))
    for name, column in kinds.items():
        content = pa.table(
            {"image": column, "conversations": talks, "id": [1, 2, None], "pair": [0.5, 1.5, 2.5]}
        )
        (tmp_path / f"{name}.parquet").write_bytes(parquet(content))
        (tmp_path / f"{name}.arrow").write_bytes(arrow(content))
        for form in ("parquet", "arrow"):
            rows = every(index(tmp_path, f"{name}.{form}"))
            assert [(row["id"], row["pair"]) for row in rows] == [("1", "0.5"), ("2", "1.5"), ("2", "2.5")]
            expected = [PICTURES[0]] * 3 if name == "same" else PICTURES[:3]
            assert [pictures.read(r["image"], r["place"], LIMIT) for r in rows] == expected
    for wrong in (pa.array([[b"a", b"b"]] * 3), pa.array([1, 2, 3])):
        (tmp_path / "w.parquet").write_bytes(parquet(pa.table({"image": wrong, "conversations": talks})))
        with pytest.raises(DataError, match="use a path, bytes or"):
            index(tmp_path, "w.parquet")


def test_neighbouring_rows_cost_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(parquet(table(PICTURES), row_group_size=10))
    rows = every(index(tmp_path, "x.parquet"))
    reads: list[int] = []
    gate = threading.Barrier(1)
    read = Pictures._read_group

    def counted(self: Pictures, path: str, number: int) -> pa.ChunkedArray:
        gate.wait()
        reads.append(number)
        return read(self, path, number)

    monkeypatch.setattr(Pictures, "_read_group", counted)
    pictures = Pictures(Store.at(str(tmp_path)))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: pictures.read(row["image"], row["place"], LIMIT), rows))
    assert found == PICTURES and sorted(reads) == [0, 1, 2]
    monkeypatch.setattr(pictures_module, "HELD_BYTES", 0)
    fresh = Pictures(Store.at(str(tmp_path)))
    for row in rows[::5]:
        fresh.read(row["image"], row["place"], LIMIT)
    assert len(fresh._groups) == 1


def test_places_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(parquet(table(PICTURES[:3])))
    (tmp_path / "paths.parquet").write_bytes(parquet(table([None])))
    (tmp_path / "x.bin").write_bytes(b"0123456789")
    pictures = Pictures(Store.at("elsewhere"))
    assert pictures.read("n", f"{tmp_path}/x.bin@2+3", LIMIT) == b"234"
    for place, reason in (
        ("x.bin@8+3", "unreadable-file"),
        ("x.bin@99+3", "unreadable-file"),
        ("x.bin@2", "unreadable-file"),
        ("", "unreadable-file"),
        ("none@0+1", "missing-file"),
        ("none#0", "missing-file"),
        ("x.bin@0+999999999", "too-large"),
        ("x.bin#0", "unreadable-file"),
        ("x.parquet#3", "unreadable-file"),
        ("paths.parquet#0", "missing-file"),
    ):
        with pytest.raises(SampleError) as caught:
            pictures.read("n", f"{tmp_path}/{place}", LIMIT)
        assert caught.value.reason == reason, place


def test_an_index_that_leads_out_of_its_dictionary(tmp_path: Path) -> None:
    """Three pictures, many times, are a dictionary and indices of two bits, of which 3 means nothing."""
    raw = bytearray(parquet(table(PICTURES[:3] * 8), compression="none"))
    group = pq.ParquetFile(io.BytesIO(raw)).metadata.row_group(0)
    columns = (group.column(number) for number in range(group.num_columns))
    (column,) = (one for one in columns if one.path_in_schema == "image.bytes")
    raw[column.dictionary_page_offset + column.total_compressed_size - 1] = 0xFF
    (tmp_path / "x.parquet").write_bytes(raw)
    rows = every(index(tmp_path, "x.parquet"))
    pictures = Pictures(Store.at(str(tmp_path)))
    for row in rows:
        with pytest.raises(SampleError) as caught:
            pictures.read(row["image"], row["place"], LIMIT)
        assert caught.value.reason == "unreadable-file"


def test_an_entry_cant_name_a_place(tmp_path: Path) -> None:
    """Places are of the readers alone: those of an entry would lead out of the images folder."""
    entry = {"image": "a.jpg", "place": "/etc/passwd@0+9", "conversations": talk("q", "a")}
    (tmp_path / "x.json").write_text(json.dumps([entry]))
    (tmp_path / "x.parquet").write_bytes(parquet(pa.Table.from_pylist([entry])))
    (tmp_path / "x.tar").write_bytes(tar([("0.jpg", b"x"), ("0.json", json.dumps(entry).encode())]))
    assert [every(index(tmp_path, name))[0]["place"] for name in ("x.json", "x.parquet")] == [None, None]
    assert every(index(tmp_path, "x.tar"))[0]["place"].startswith(f"{tmp_path}/x.tar@")


def test_shards_need_not_lie_with_the_images(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    rows = every(index(tmp_path / "shards", write(tmp_path / "shards", "tars")))
    check_rows(rows, Pictures(Store.at(str(tmp_path / "images"))))


def test_a_failing_store_is_not_the_pictures_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "ATTEMPTS", 1)
    store = Store.at("s3://bucket/x", S3Config("http://127.0.0.1:9", "", "key", "secret"))
    for place in (None, f"{store.url}/a.tar@0+1", f"{store.url}/a.parquet#0"):
        with pytest.raises(StorageError):
            Pictures(store).read("a.jpg", place, LIMIT)


# Files on the local disk


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "in").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (images / "in" / "a.jpg").write_bytes(b"fine")
    (images / "inside.jpg").symlink_to("in/a.jpg")
    (images / "outside.jpg").symlink_to(tmp_path / "secret.jpg")
    (images / "folder").symlink_to(tmp_path)
    (images / "loop.jpg").symlink_to("loop.jpg")
    (images / "dangling.jpg").symlink_to("none.jpg")
    os.mkfifo(images / "pipe.jpg")
    linked = tmp_path / "linked"
    linked.symlink_to(images)  # the folder itself may be a link
    for folder in (images, linked):
        pictures = Pictures(Store.at(str(folder)))
        assert pictures.read("in/a.jpg", None, LIMIT) == pictures.read("inside.jpg", None, LIMIT) == b"fine"
        for name, reason in (
            ("outside.jpg", "path-outside-folder"),
            ("folder/secret.jpg", "path-outside-folder"),
            ("../secret.jpg", "path-outside-folder"),
            ("loop.jpg", "unreadable-file"),
            ("dangling.jpg", "missing-file"),
            ("pipe.jpg", "unreadable-file"),
            ("in", "unreadable-file"),
            ("none.jpg", "missing-file"),
            ("in/a.jpg/b.jpg", "unreadable-file"),
            ("n" * 300, "unreadable-file"),
        ):
            with pytest.raises(SampleError) as caught:
                pictures.read(name, None, LIMIT)
            assert caught.value.reason == reason, (name, caught.value)
