"""Manifests in all three forms, what is wrong in them, and the index that is built from them."""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.s3 import S3Server
from unimrg.data import manifest as module
from unimrg.data.manifest import Manifest, build_index, pair_name, parse_entry
from unimrg.data.readers import text as text_module
from unimrg.data.readers.text import read_json, read_jsonl
from unimrg.errors import DataError, SampleError
from unimrg.sample import Turn, load_conversations
from unimrg.storage import S3Config, Store


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


ENTRIES: list[dict[str, Any]] = [
    {"id": "a", "image": "x/1.jpg", "conversations": talk("<image>\nWhat?", "A cat.", "Sure?", "Yes.")},
    {"id": 7, "conversations": talk("Hello", "Hi")},
    {"id": "c", "image": "x/2.jpg", "conversations": talk("Wer?\n<image>", "Ein Hund — ü 日本")},
    {"id": "d", "image": "./x//1.jpg", "conversations": talk("Again", "Twice"), "depth": "d/1.png"},
    {"conversations": talk("Hello", "Hi")},
]


def write(folder: Path, entries: list[Any], form: str) -> str:
    """The manifest's name; `form`: json, jsonl, parquet (conversations as JSON text) or structs."""
    name = f"data.{'parquet' if form == 'structs' else form}"
    path = folder / name
    if form == "json":
        path.write_text(json.dumps(entries, indent=1), "utf-8")
    elif form == "jsonl":
        path.write_text("".join(json.dumps(e, ensure_ascii=False) + "\r\n" for e in entries), "utf-8")
    else:
        keys = ("id", "image", "depth")
        rows = [{k: None if e.get(k) is None else str(e[k]) for k in keys} for e in entries]
        for row, entry in zip(rows, entries, strict=True):
            talks = entry["conversations"]
            row["conversations"] = json.dumps(talks) if form == "parquet" else talks
        pq.write_table(pa.Table.from_pylist(rows), path)
    return name


def index(folder: Path, entries: list[Any], form: str = "json", **options: Any) -> Manifest:
    name = write(folder, entries, form)
    return build_index(Store.at(str(folder)), name, folder / "index", **options)


def every(built: Manifest) -> list[dict[str, Any]]:
    return built.rows(range(len(built))).to_pylist()


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet", "structs"])
def test_forms(tmp_path: Path, form: str) -> None:
    rows = every(index(tmp_path, ENTRIES, form))
    assert [row["id"] for row in rows] == ["a", "7", "c", "4"]
    assert [row["image"] for row in rows] == ["x/1.jpg", None, "x/2.jpg", None]
    assert [row["depth"] for row in rows] == ["d/1.png", None, None, None]
    assert not any(row["error"] for row in rows)
    assert load_conversations(rows[0]["conversations"]) == (
        (Turn("What?", "A cat."), Turn("Sure?", "Yes.")),
        (Turn("Again", "Twice"),),
    )
    assert load_conversations(rows[2]["conversations"]) == ((Turn("Wer?", "Ein Hund — ü 日本"),),)


def test_one_row_each_without_grouping(tmp_path: Path) -> None:
    rows = every(index(tmp_path, ENTRIES, group_by_image=False))
    assert [row["id"] for row in rows] == ["a", "7", "c", "d", "4"]
    assert [row["image"] for row in rows] == ["x/1.jpg", None, "x/2.jpg", "x/1.jpg", None]


def test_evaluation_columns_only_where_present(tmp_path: Path) -> None:
    assert not {"family", "pair", "conflict"} & set(index(tmp_path, ENTRIES).schema.names)
    entries = [{**ENTRIES[0], "family": "depth", "pair": 3, "conflict": True}, ENTRIES[1]]
    built = index(tmp_path, entries, "jsonl", group_by_image=False)
    assert [(r["family"], r["pair"], r["conflict"]) for r in every(built)] == [
        ("depth", "3", True),
        (None, None, None),
    ]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("<image>\nWhat?", "What?"),
        ("What?\n<image>", "What?"),
        ("a\n<image>\nb", "a\nb"),
        ("a <image> b", "a  b"),
        ("<image><image>\nx", "x"),
        ("<image>", ""),
        ("no marker \n", "no marker \n"),
    ],
)
def test_image_markers(text: str, clean: str) -> None:
    row = parse_entry({"conversations": talk(text, "yes")}, 0)
    assert load_conversations(row["conversations"])[0][0].question == clean


def test_conversations_as_columns() -> None:
    row = parse_entry({"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}, 0)
    assert load_conversations(row["conversations"]) == ((Turn("q", "a"),),)


@pytest.mark.parametrize(
    ("entry", "detail"),
    [
        ({"conversations": {"from": ["human", "gpt"], "value": ["q"]}}, "text 'value'"),
        ({"conversations": {"from": "human", "value": "q"}}, "must be a list"),
        ("text", "must be an object"),
        ({}, "must be a list"),
        ({"conversations": []}, "at least one"),
        ({"conversations": talk("q")}, "needs an answer"),
        ({"conversations": talk("q", "  ")}, "answer is empty"),
        ({"conversations": talk("q", "<image>")}, "answer is empty"),
        ({"conversations": [*talk("q", "a"), *talk("q", "a")][1:3]}, "expected human"),
        ({"conversations": [{"from": "system", "value": "x"}, *talk("q")]}, "from 'system'"),
        ({"conversations": [{"from": ["human"], "value": "x"}, *talk("q")]}, "expected human"),
        ({"conversations": [{"from": "human"}, {"from": "gpt", "value": 3}]}, "text 'value'"),
        ({"conversations": "[{"}, "conversations: "),
        ({"conversations": talk("q", "a\ud800")}, "half a Unicode"),
        ({"image": ["a", "b"], "conversations": talk("q", "a")}, "'image' must be one path"),
        ({"depth": 3, "conversations": talk("q", "a")}, "'depth' must be one path"),
        ({"id": "\ud800", "conversations": None}, "must be a list"),
        ({"id": "i" * 2000, "conversations": talk("q", "a")}, "'id' has more than 1024"),
        ({"conversations": talk("q", "a" * (1 << 20))}, "has 1048577 characters"),
    ],
)
def test_malformed_entries_become_rows(entry: Any, detail: str) -> None:
    row = parse_entry(entry, 5)
    assert row["error"] == "malformed-conversation"
    assert detail in row["detail"]
    assert row["conversations"] == "[]"
    pa.RecordBatch.from_pylist([row], module.SCHEMA)  # Arrow can hold it


def test_bad_entries_stay_in_place_and_alone(tmp_path: Path) -> None:
    bad = {"id": "bad", "image": "x/1.jpg", "conversations": talk("q")}
    climbing = {"id": "out", "image": "../secret.jpg", "conversations": talk("q", "a")}
    rows = every(index(tmp_path, [ENTRIES[0], bad, climbing, ENTRIES[3]]))
    assert [(row["id"], row["error"]) for row in rows] == [
        ("a", None),
        ("bad", "malformed-conversation"),
        ("out", "path-outside-folder"),
    ]
    assert len(load_conversations(rows[0]["conversations"])) == 2


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "..",
        "../x",
        "a/../../x",
        "/etc/passwd",
        "//host/x",
        "C:\\x",
        "c:/x",
        "a\\..\\..\\x",
        "..\\x",
        "http://host/x.jpg",
        "file:///etc/passwd",
        "data:image/png;base64,xx",
        "s3://b/k",
        "a\0b",
        "a\nb",
        "\ud800",
        "a" * 2000,
    ],
)
def test_paths_outside_the_folder(path: str) -> None:
    with pytest.raises(SampleError) as caught:
        pair_name(path)
    assert caught.value.reason == "path-outside-folder"


@pytest.mark.parametrize(
    ("path", "tidy"),
    [
        ("a/b.jpg", "a/b.jpg"),
        ("./a//b.jpg", "a/b.jpg"),
        ("a/../b", "b"),
        ("..a/b..", "..a/b.."),
        ("ü 日.png",) * 2,
    ],
)
def test_paths_inside_the_folder(path: str, tidy: str) -> None:
    assert pair_name(path) == tidy


@given(st.lists(st.sampled_from(["..", ".", "", "a", "b c", "..."]), max_size=8).map("/".join))
def test_no_path_climbs_out(path: str) -> None:
    try:
        name = pair_name(path)
    except SampleError:
        return
    assert Path("/data/set", name).resolve(strict=False).is_relative_to("/data/set")
    assert ".." not in name.split("/") and pair_name(name) == name


# Reading piece by piece

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.lists(JSON, max_size=6), st.integers(1, 9), st.sampled_from([None, 1]), st.booleans())
@settings(deadline=None, max_examples=40)
def test_json_in_pieces_of_any_size(entries: list[Any], chunk: int, indent: int | None, ascii: bool) -> None:
    raw = json.dumps(entries, indent=indent, ensure_ascii=ascii).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "CHUNK_BYTES", chunk)
        assert list(read_json(io.BytesIO(raw), "m")) == entries
        lines = "".join(json.dumps(e, ensure_ascii=ascii) + "\n" for e in entries).encode()
        assert list(read_jsonl(io.BytesIO(lines))) == entries


@pytest.mark.parametrize(
    ("raw", "byte"),
    [
        (b'[{"a": 1}, {"a" 2}]', 16),
        (b'[{"a": 1}', 9),
        (b'[{"a": 1} {"a": 2}]', 10),
        (b'[{"a": 1}] more', 11),
        ('[{"ü": 1}, nix]'.encode(), 12),
        (b'[{"a": "open]', 7),
        (b"[" * 100_000, 1),
        (b"[" + b"9" * 10_000 + b"]", 1),
    ],
)
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_broken_json_names_the_byte(
    raw: bytes, byte: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "CHUNK_BYTES", chunk)
    with pytest.raises(DataError, match=f"^the/file.json: broken JSON at byte {byte}: "):
        list(read_json(io.BytesIO(raw), "the/file.json"))


def test_bytes_that_are_no_text_cost_one_entry(tmp_path: Path) -> None:
    raw = json.dumps([ENTRIES[0], {**ENTRIES[1], "id": "BAD"}, ENTRIES[2]], ensure_ascii=False).encode()
    for damaged in (raw.replace(b"Hello", b"Hel\xfflo"), raw.replace(b"Hello", b"Hel\xc3o")):
        (tmp_path / "m.json").write_bytes(damaged)
        rows = every(build_index(Store.at(str(tmp_path)), "m.json", tmp_path / "index"))
        assert [row["error"] for row in rows] == [None, "malformed-conversation", None]
        assert "not UTF-8" in rows[1]["detail"]
    (tmp_path / "m.json").write_bytes(raw.replace(b'"x/2.jpg"', b'"x/\xff.jpg"'))
    rows = every(build_index(Store.at(str(tmp_path)), "m.json", tmp_path / "index"))
    assert rows[2]["error"] == "path-outside-folder"


def test_a_line_without_end_costs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "LONGEST_ENTRY", 40)
    good, long = b'{"a": 1}\n', b'{"b": "' + b"x" * 200 + b'"}\n'
    for chunk in (1, 7, 64, 1000):
        monkeypatch.setattr(text_module, "CHUNK_BYTES", chunk)
        for lines in ([good, long, good], [long, good, long], [good, long[:-1]]):
            found = list(read_jsonl(io.BytesIO(b"".join(lines))))
            assert [entry == {"a": 1} for entry in found] == [line == good for line in lines]
            offsets = [sum(map(len, lines[:i])) for i in range(len(lines))]
            for entry, offset, line in zip(found, offsets, lines, strict=True):
                assert line == good or f"at byte {offset}," in str(entry)


def test_a_mistake_is_found_without_reading_on() -> None:
    class Endless(io.RawIOBase):
        total = 0

        def read(self, size: int = -1) -> bytes:
            self.total += size
            assert self.total < 64 << 20, "reads the whole file for one mistake"
            return (b'[{"a" 2}, ' + b" " * size)[:size] if self.total == size else b" " * size

    with pytest.raises(DataError, match="byte 6"):
        list(read_json(Endless(), "m"))


def test_a_broken_line_is_one_bad_entry(tmp_path: Path) -> None:
    good = json.dumps(ENTRIES[0])
    (tmp_path / "m.jsonl").write_text(f"{good}\n\n{{broken\n{good}\n" + '{"cut": ', "utf-8")
    rows = every(build_index(Store.at(str(tmp_path)), "m.jsonl", tmp_path / "i", group_by_image=False))
    assert [row["error"] for row in rows] == [None, "malformed-conversation", None, "malformed-conversation"]
    assert rows[1]["detail"].startswith(f"line 3: broken JSON at byte {len(good) + 3}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither"),
        (b"<html>", "neither"),
        (b"[]", "holds no entries"),
        (b"{\n}", "broken JSON at byte"),
        (b"PAR1 but not really", "no footer"),
        (b"\x1f\x8b", "unpack it"),
        (b"\xff\xfe[\0]\0", "neither"),
    ],
)
def test_unusable_manifests(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        build_index(Store.at(str(tmp_path)), "m.json", tmp_path / "index")
    assert str(tmp_path / "m.json") in str(caught.value)
    assert list((tmp_path / "index").iterdir()) == []


def test_missing_manifest_and_missing_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        build_index(Store.at(str(tmp_path)), "no.json", tmp_path / "index")
    pq.write_table(pa.table({"image": ["a"]}), tmp_path / "m.parquet")
    with pytest.raises(DataError, match="no column 'conversations', only image"):
        build_index(Store.at(str(tmp_path)), "m.parquet", tmp_path / "index")


# The index


def many(n: int, images: int) -> list[dict[str, Any]]:
    return [
        {"id": i, "image": f"{i * 7919 % images}.jpg", "conversations": talk(f"q{i}", f"a{i}")}
        for i in range(n)
    ]


def test_random_access_over_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", 16)
    built = index(tmp_path, many(100, 10**9))
    assert len(built) == 100 and len(list(built.iter_batches())) == 7
    wanted = np.random.default_rng(0).integers(0, 100, 200)
    assert built.rows(wanted)["id"].to_pylist() == [str(i) for i in wanted]
    assert built.rows([]).num_rows == 0
    for outside in ([100], [-1]):
        with pytest.raises(IndexError):
            built.rows(outside)
    copy = pickle.loads(pickle.dumps(built))
    assert copy == built and copy.rows([3])["id"].to_pylist() == ["3"]
    assert len(pickle.dumps(built)) < 1000


def test_grouping_over_batches_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", 7)
    rows = every(index(tmp_path, many(100, 9)))
    assert [row["id"] for row in rows] == [str(i) for i in range(9)]
    for row in rows:
        talks = load_conversations(row["conversations"])
        ids = [int(turns[0].question[1:]) for turns in talks]
        assert ids == [i for i in range(100) if f"{i * 7919 % 9}.jpg" == row["image"]]


def test_equal_hashes_of_different_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_hash", lambda text: 1)
    rows = every(index(tmp_path, many(30, 3)))
    assert sorted(row["image"] for row in rows) == ["0.jpg", "1.jpg", "2.jpg"]
    assert sum(len(load_conversations(row["conversations"])) for row in rows) == 30


def test_many_talks_about_one_picture_become_several_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST_ROW", 100)
    rows = every(index(tmp_path, many(100, 1)))
    assert len(rows) > 5 and {row["image"] for row in rows} == {"0.jpg"}
    assert all(len(row["conversations"]) < 300 for row in rows)
    talks = [talk for row in rows for talk in load_conversations(row["conversations"])]
    assert [talk[0].question for talk in talks] == [f"q{i}" for i in range(100)]


def test_rebuilt_only_when_the_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = index(tmp_path, ENTRIES)
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_entries", lambda *_: pytest.fail("read again"))
        assert build_index(Store.at(str(tmp_path)), "data.json", tmp_path / "index") == first
    second = index(tmp_path, ENTRIES[:2])
    assert second.path != first.path and (len(first), len(second)) == (4, 2)
    assert sorted(p.suffix for p in (tmp_path / "index").iterdir()) == [".arrow", ".arrow"]


def _build_and_count(folder: str) -> int:
    return len(build_index(Store.at(folder), "data.json", Path(folder, "index")))


def test_two_processes_at_once(tmp_path: Path) -> None:
    write(tmp_path, many(2000, 500), "json")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_build_and_count, [str(tmp_path)] * 4, chunksize=1) == [500] * 4
    assert len(list((tmp_path / "index").iterdir())) == 1


def test_from_object_storage(s3_server: S3Server, tmp_path: Path) -> None:
    s3 = S3Config(s3_server.endpoint, "", s3_server.access_key, s3_server.secret_key)
    store = Store.at(s3_server.url("manifest"), s3)
    store.upload(_folder_with(tmp_path), "")
    for name in ("data.json", "data.jsonl", "data.parquet"):
        assert len(build_index(store, name, tmp_path / "index")) == 4
    with pytest.raises(DataError, match=r"s3://.*/manifest/none.json does not exist"):
        build_index(store, "none.json", tmp_path / "index")


def _folder_with(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for form in ("json", "jsonl", "parquet"):
        write(folder, ENTRIES, form)
    return folder
