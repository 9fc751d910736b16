"""Files made to do harm: bombs, lies about sizes, offsets to nowhere. Each costs little and is told.

python -m tests.fuzz --count 10000      # the fuzzing of the last tests here, by hand
"""

from __future__ import annotations

import io
import json
import multiprocessing
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.fuzz import fuzz_apart, peak_bytes
from tests.packed import arrow, parquet, samples, table, talk, tar
from unimrg.data import manifest as manifest_module
from unimrg.data import pictures as pictures_module
from unimrg.data.decode import decode_image
from unimrg.data.manifest import build_index
from unimrg.data.pictures import Pictures
from unimrg.data.readers import find_shards, pages, read_entries
from unimrg.data.readers.source import Source
from unimrg.errors import DataError, SampleError
from unimrg.storage import Store

LIMIT = 1 << 20
SMALL = b"P6 2 2 255 " + bytes(12)
POOLS: list[pa.MemoryPool] = []  # for good: what they gave out may be freed whenever
TEXT = json.dumps(talk("q", "a"))
NOISE = np.random.default_rng(0).bytes(300_000)


def rows_of(folder: Path, name: str, content: bytes) -> list[dict[str, Any]]:
    (folder / name).write_bytes(content)
    built = build_index(Store.at(str(folder)), name, folder / ".index")
    return built.rows(range(len(built))).to_pylist()


def read(folder: Path, row: dict[str, Any]) -> bytes:
    return Pictures(Store.at(str(folder))).read(row["image"], row["place"], LIMIT)


@contextmanager
def arrow_memory(most: int) -> Iterator[None]:
    """Fails when Arrow holds more than `most` bytes at a time."""
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    POOLS.append(pool)
    pa.set_memory_pool(pool)
    try:
        yield
    finally:
        pa.set_memory_pool(usual)
    assert pool.max_memory() < most, f"{pool.max_memory()} bytes"


# Parquet


def bomb(packing: str) -> bytes:
    """16 MiB of zeros as one picture, in a file of kilobytes."""
    return parquet(table([b"fine", bytes(16 << 20)]), compression=packing, use_dictionary=False)


@pytest.mark.parametrize("packing", ["zstd", "gzip", "snappy", "brotli", "lz4"])
def test_packed_zeros_are_refused_unopened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    monkeypatch.setattr(pictures_module, "GROUP_BYTES", 8 << 20)
    raw = bomb(packing)
    assert len(raw) < 2 << 20
    with arrow_memory(4 << 20):
        rows = rows_of(tmp_path, "x.parquet", raw)
        for row in rows:
            with pytest.raises(SampleError, match="unpacks to 167772"):
                read(tmp_path, row)


def test_a_footer_that_lies_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures_module, "GROUP_BYTES", 8 << 20)
    raw = bomb("zstd")
    said = pa.parquet.read_metadata(io.BytesIO(raw)).row_group(0).column(1).total_uncompressed_size
    number = bytearray()
    for shift in range(0, 28, 7):
        number.append((said * 2 >> shift & 127) | (128 if shift < 21 else 0))
    assert raw.count(number) >= 1  # as Thrift spells it; now a 1 of the same length
    small = raw.replace(bytes(number), b"\x82\x80\x80\x00")
    assert pa.parquet.read_metadata(io.BytesIO(small)).row_group(0).column(1).total_uncompressed_size == 1
    with arrow_memory(4 << 20):
        rows = rows_of(tmp_path, "x.parquet", small)
        with pytest.raises(SampleError, match="unpacks to 167772"):
            read(tmp_path, rows[0])


def test_one_picture_named_twenty_thousand_times(tmp_path: Path) -> None:
    n = 20_000
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([NOISE]))
    talks = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([TEXT]))
    raw = parquet(pa.table({"image": column, "conversations": talks}))
    assert len(raw) < 1 << 20  # 6 GB when spelt out
    with arrow_memory(64 << 20):
        rows = rows_of(tmp_path, "x.parquet", raw)
        assert len(rows) == n and read(tmp_path, rows[n - 1]) == NOISE


def test_one_text_named_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps(talk("q", NOISE[:200_000].hex()))
    for column in (
        pa.DictionaryArray.from_arrays(pa.array(np.zeros(60, np.int32)), pa.array([text])),
        pa.array([talk("q", text)] * 60),
    ):
        raw = parquet(pa.table({"conversations": column}))
        with arrow_memory(120 << 20):
            assert len(rows_of(tmp_path, "x.parquet", raw)) == 60
        monkeypatch.setattr(manifest_module, "MOST_UNPACKED", 20)
        monkeypatch.setattr(manifest_module, "SMALL", 1 << 20)
        with pytest.raises(DataError, match="unpacks to more than 20 times its size"):
            rows_of(tmp_path, "y.parquet", raw)
        monkeypatch.undo()


@pytest.mark.parametrize("packing", ["none", "snappy", "gzip", "lz4"])
def test_texts_stream_through_memory(tmp_path: Path, packing: str) -> None:
    """20 MB of texts in one row group, of which a dictionary names some."""
    texts = [NOISE[i : i + 2000].hex() for i in range(5000)]
    content = pa.table({"conversations": [talk("q", text) for text in texts]})
    raw = parquet(content, compression=packing, data_page_size=1 << 17)
    column = pa.parquet.read_metadata(io.BytesIO(raw)).row_group(0).column(1)
    (tmp_path / "x.parquet").write_bytes(raw)
    store = Store.at(str(tmp_path))
    source = Source(store, "x.parquet", 1 << 30)
    assert 4000 <= pages.check_pages(source, column, 1 << 30, 1 << 30) < 100 << 20
    with arrow_memory(14 << 20):
        entries = read_entries(store, find_shards(store, "x.parquet"))
        assert [entry["conversations"][1]["value"] for entry in entries] == texts


def test_lists_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Millions of messages in one row take a few bytes in Parquet and gigabytes as Python objects."""
    n = 2_000_000
    messages = pa.StructArray.from_arrays([pa.array(["gpt"] * n).dictionary_encode()], ["from"])
    row = pa.ListArray.from_arrays(pa.array([0, n], pa.int32()), messages)
    good = pa.ListArray.from_arrays(pa.array([0, 2], pa.int32()), messages.slice(0, 2))
    raw = parquet(pa.table({"conversations": pa.chunked_array([row, good])}))
    assert len(raw) < 1 << 20
    rows = rows_of(tmp_path, "x.parquet", raw)
    assert [row["error"] for row in rows] == ["malformed-conversation"] * 2
    assert "more than 64 MiB" in rows[0]["detail"] and "message 0" in rows[1]["detail"]
    monkeypatch.setattr(pages, "MOST_VALUES", 1 << 20)
    with pytest.raises(DataError, match=r"200000. values or more"):
        rows_of(tmp_path, "y.parquet", raw)


def test_values_that_grow_by_prefix(tmp_path: Path) -> None:
    content = pa.table({"conversations": [TEXT], "image": [b"picture"]})
    encodings = {"conversations": "PLAIN", "image": "DELTA_BYTE_ARRAY"}
    raw = parquet(content, use_dictionary=False, column_encoding=encodings)
    (row,) = rows_of(tmp_path, "x.parquet", raw)
    with pytest.raises(SampleError, match="DELTA_BYTE_ARRAY"):
        read(tmp_path, row)
    for version in ("1.0", "2.0"):
        encodings = {"conversations": "DELTA_BYTE_ARRAY", "image": "PLAIN"}
        raw = parquet(content, use_dictionary=False, column_encoding=encodings, data_page_version=version)
        with pytest.raises(DataError, match="DELTA_BYTE_ARRAY"):
            rows_of(tmp_path, "y.parquet", raw)


@pytest.mark.parametrize(
    "options",
    [
        {"data_page_version": "2.0"},
        {"write_page_checksum": True},
        {"data_page_size": 100},
        {"version": "1.0"},
    ],
)
def test_page_headers_of_every_kind_are_understood(tmp_path: Path, options: dict[str, Any]) -> None:
    pictures = [NOISE[i * 99 : i * 199] for i in range(1, 50)]
    for dictionary in (True, False):
        raw = parquet(table(pictures), use_dictionary=dictionary, row_group_size=20, **options)
        name = f"{dictionary}.parquet"
        rows = rows_of(tmp_path, name, raw)
        assert [read(tmp_path, row) for row in rows] == pictures


def test_rows_that_are_only_claimed(tmp_path: Path) -> None:
    raw = parquet(pa.table({"conversations": pa.nulls(500_000, pa.string())}))
    assert len(raw) < 100_000
    with pytest.raises(DataError, match="claims 500000 rows in"):
        rows_of(tmp_path, "x.parquet", raw)
    raw = parquet(table([b"x"]))
    for length in (len(raw) - 4, 1 << 31, 0):
        broken = raw[:-8] + struct.pack("<I", length) + b"PAR1"
        with pytest.raises(DataError, match="footer"):
            rows_of(tmp_path, "x.parquet", broken)


def test_a_broken_row_group_costs_itself(tmp_path: Path) -> None:
    content = table([NOISE[:1000]] * 30)
    raw = bytearray(parquet(content, row_group_size=10, compression="zstd"))
    column = pa.parquet.read_metadata(io.BytesIO(raw)).row_group(1).column(4)
    start = column.dictionary_page_offset
    raw[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    rows = rows_of(tmp_path, "x.parquet", bytes(raw))
    assert len(rows) == 21
    (bad,) = (row for row in rows if row["error"])
    assert bad["error"] == "unreadable-file" and "rows 10 to 19, in row group 1" in bad["detail"]


def test_what_is_broken_is_remembered_without_its_bytes(tmp_path: Path) -> None:
    pictures = [bytes([i]) * 4000 for i in range(50)]
    raw = bytearray(parquet(table(pictures), compression="none", use_dictionary=False))
    column = pa.parquet.read_metadata(io.BytesIO(raw)).row_group(0).column(1)
    raw[column.data_page_offset : column.data_page_offset + 20] = b"\xff" * 20
    rows = rows_of(tmp_path, "x.parquet", bytes(raw))
    reader = Pictures(Store.at(str(tmp_path)))
    for row in rows:
        with pytest.raises(SampleError, match="row group 0"):
            reader.read(row["image"], row["place"], LIMIT)
    (held,) = reader._groups.values()
    assert isinstance(held.result(), str)


def test_text_that_is_none(tmp_path: Path) -> None:
    talks = pa.array([TEXT.encode(), TEXT.replace("a", "\xff").encode("latin-1"), TEXT.encode()])
    damaged = pa.StringArray.from_buffers(3, talks.buffers()[1], talks.buffers()[2])
    for name, raw in (
        ("x.parquet", parquet(pa.table({"conversations": damaged}))),
        ("y.parquet", parquet(pa.table({"conversations": damaged}), use_dictionary=False)),
    ):
        rows = rows_of(tmp_path, name, raw)
        assert [row["error"] for row in rows] == [None, "malformed-conversation", None]
    with pytest.raises(DataError, match="UTF8"):
        rows_of(tmp_path, "x.arrow", arrow(pa.table({"conversations": damaged})))


# Arrow


@pytest.mark.parametrize("packing", ["lz4", "zstd"])
def test_packed_batches_are_refused_unopened(tmp_path: Path, packing: str) -> None:
    raw = arrow(table([bytes(16 << 20)]), compression=packing)
    assert len(raw) < 1 << 20
    with arrow_memory(4 << 20), pytest.raises(DataError, match="compressed"):
        rows_of(tmp_path, "x.arrow", raw)


def test_an_arrow_file_that_stops(tmp_path: Path) -> None:
    content = table([NOISE[:1000]] * 30)
    raw = arrow(content, 10)
    for cut in (8, 20, 500, 12_000):  # the end mark, inside of a batch, two batches
        rows = rows_of(tmp_path, f"{cut}.arrow", raw[:-cut])
        assert rows[-1]["error"] == "unreadable-file" and not any(row["error"] for row in rows[:-1])
        assert len(rows) == (31 if cut == 8 else 11 if cut == 12_000 else 21)


def test_a_stream_without_its_schema(tmp_path: Path) -> None:
    """Found by the fuzz: pyarrow crashes when it reads another message as a schema."""
    content = table([NOISE[:1000]])
    raw = arrow(content)
    with pytest.raises(DataError, match="not with a schema"):
        rows_of(tmp_path, "x.arrow", raw[len(content.schema.serialize()) :])


def test_offsets_to_nowhere(tmp_path: Path) -> None:
    talks = [talk("q", "a")] * 3
    image = pa.array([b"aaaa", b"bbbb", b"cccc"])
    raw = arrow(pa.table({"image": image, "conversations": talks}))
    offsets = struct.pack("<4i", 0, 4, 8, 12)
    assert raw.count(offsets) == 1
    for wrong in ((0, 4, 8, 1 << 30), (0, 1 << 30, 8, 12), (-4, 0, 4, 8), (8, 4, 0, 12)):
        with pytest.raises(DataError, match="batch before byte"):
            rows_of(tmp_path, "x.arrow", raw.replace(offsets, struct.pack("<4i", *wrong)))
    (row, *_) = rows_of(tmp_path, "y.arrow", raw)
    assert read(tmp_path, row) == b"aaaa"


def test_dictionaries_and_rows_of_nothing(tmp_path: Path) -> None:
    coded = pa.table({"conversations": pa.array([TEXT]).dictionary_encode()})
    with pytest.raises(DataError, match="dictionary"):
        rows_of(tmp_path, "x.arrow", arrow(coded))
    with pytest.raises(DataError, match="1000000 rows in"):
        rows_of(tmp_path, "x.arrow", arrow(pa.table({"conversations": pa.nulls(1_000_000)}), 1_000_000))


# Text


def test_nesting_and_lengths_without_end(tmp_path: Path) -> None:
    deep = '{"a":' * 100_000
    lines = [
        json.dumps({"conversations": talk("q", "a")}),
        deep,
        "[" * 100_000 + "]" * 100_000,
        json.dumps({"conversations": "[" * 50_000}),
        json.dumps({"conversations": talk("q", "a" * (2 << 20))}),
        json.dumps({"id": "i" * (1 << 20), "conversations": talk("q", "a")}),
        '{"x": ' + "9" * 100_000 + "}",
        '{"pair": ' + "[" * 500 + "]" * 500 + ', "conversations": 0}',
        '{"conversations": 1e999}',
        '"\\ud800"',
    ]
    rows = rows_of(tmp_path, "x.jsonl", "\n".join(lines).encode())
    assert [row["error"] for row in rows] == [None, *["malformed-conversation"] * (len(lines) - 1)]
    assert all(len(row["detail"] or "") <= 500 for row in rows)


def test_a_header_of_a_tar_that_claims_gigabytes(tmp_path: Path) -> None:
    """An extended header is read as a whole: this one has 1 GiB, of holes."""
    import tarfile

    member = tarfile.TarInfo("././@PaxHeader")
    member.type, member.size = tarfile.XHDTYPE, 1 << 30
    good = tar(samples([b"x"]))[:2048]
    with open(tmp_path / "x.tar", "wb") as out:
        out.write(good + member.tobuf(tarfile.USTAR_FORMAT))
        out.seek(1 << 30, 1)
        out.write(tar([]))
    built = build_index(Store.at(str(tmp_path)), "x.tar", tmp_path / ".index")
    rows = built.rows(range(len(built))).to_pylist()
    assert [row["error"] for row in rows] == [None, "unreadable-file"]
    assert "belong together" in rows[1]["detail"]


# Pictures


def grown(raws: list[bytes]) -> list[int]:
    """Peak memory of decoding each, in bytes; in a process that does nothing else."""
    decode_image(SMALL, 1 << 30, 1 << 30, 512)  # what the library holds once
    found = []
    for raw in raws:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again (proc_pid_clear_refs(5))
        before = peak_bytes()
        decode_image(raw, 1 << 30, 1 << 30, 512)
        found.append(peak_bytes() - before)
    return found


def test_large_pictures_take_a_few_bytes_a_pixel() -> None:
    """9 million pixels of zeros, in files of kilobytes."""
    side = 3000
    images = {
        "RGB": (Image.new("RGB", (side, side)), "PNG", 9),
        "RGBA": (Image.new("RGBA", (side, side), (1, 2, 3, 4)), "PNG", 13),
        "16 bits": (Image.fromarray(np.zeros((side, side), np.uint16)), "PNG", 9),
        "palette": (Image.new("P", (side, side)), "GIF", 10),
        "CMYK": (Image.new("CMYK", (side, side)), "JPEG", 13),
    }
    raws = []
    for image, form, _ in images.values():
        out = io.BytesIO()
        image.save(out, form)
        raws.append(out.getvalue())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        costs = pool.apply(grown, (raws,))
    for (name, (_, _, most)), cost in zip(images.items(), costs, strict=True):
        assert 1 < cost / side**2 < most, f"{name}: {cost / side**2:.1f} bytes a pixel"


# Fuzzing


def test_mutated_inputs() -> None:
    check(fuzz_apart(count=1500, seed=20260101))


@pytest.mark.slow
def test_ten_thousand_mutated_inputs() -> None:
    check(fuzz_apart(count=12_000, seed=20260102))


def check(report: dict[str, Any]) -> None:
    print(report)
    assert report["crashes"] == []
    assert report["unaccounted"] == []
    assert report["grown_mib"] < 100
    assert report["slowest_seconds"] < 10
    # The mutations reach every part: many inputs survive, many fail, for many reasons.
    assert report["good"] > 0.1 * report["rows"] and report["bad"] > 0.1 * report["rows"]
    assert len(report["reasons"]) >= 6
