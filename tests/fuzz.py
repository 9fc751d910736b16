"""Damaged pictures and manifests through the real functions, from manifest entry to decoded picture.

    python -m tests.fuzz --count 10000 --seed 1

An input is one damaged file: a picture that a sound manifest names, or a manifest (JSON, JSON lines, Parquet,
tar, Arrow) with sound pictures. Runs in a process of its own, so that a crash of a library is seen, and its
memory measured. Prints a report as JSON:

    rows = good + bad           every row has one outcome; reasons counts the bad ones
    refused                     manifests that can't be read as a whole: DataError
    crashes, unaccounted        what must not be: other exceptions; rows without an outcome, or lost
    grown_mib                   peak memory over that of sound inputs
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.packed import arrow, parquet, samples, table, talk, tar
from unimrg.data.decode import decode_image, decode_map, decode_masks
from unimrg.data.manifest import build_index
from unimrg.data.pictures import Pictures
from unimrg.errors import DataError, SampleError
from unimrg.storage import Store

MAX_BYTES, MAX_PIXELS, MAX_SIDE = 1 << 20, 4 << 20, 256
TOGETHER = 16  # damaged pictures that one manifest names
BATCHES = 0.09  # of manifests do: six of ten inputs are pictures
SECONDS = 900

PATHS = (
    "../x.jpg",
    "/etc/passwd",
    "https://host/x.jpg",
    "link.jpg",
    "pipe.jpg",
    "a\\b",
    "",
    "none.jpg",
    "\0",
)


def pictures() -> dict[str, bytes]:
    """One small picture of every kind that is read."""
    grid = np.add.outer(np.arange(30), np.arange(45))
    colour = Image.fromarray(np.stack([grid * 3, grid * 5 % 256, 255 - grid], axis=2).astype(np.uint8))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 45, 3), np.uint8))
    wide = Image.fromarray((grid * 800).astype(np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "jpeg": (colour, "JPEG", {}),
        "progressive": (noise, "JPEG", {"progressive": True, "exif": turned}),
        "cmyk": (colour.convert("CMYK"), "JPEG", {}),
        "png": (noise, "PNG", {"exif": turned}),
        "png16": (wide, "PNG", {}),
        "palette": (colour.quantize(16), "PNG", {"transparency": 3}),
        "apng": (colour, "PNG", {"save_all": True, "append_images": [noise]}),
        "alpha": (colour.convert("RGBA"), "PNG", {}),
        "bits": (colour.convert("1"), "PNG", {}),
        "webp": (colour, "WEBP", {}),
        "webp lossless": (noise, "WEBP", {"lossless": True}),
        "webp animated": (colour, "WEBP", {"save_all": True, "append_images": [noise]}),
        "gif": (colour, "GIF", {"save_all": True, "append_images": [noise]}),
        "bmp": (colour, "BMP", {}),
        "tiff": (colour, "TIFF", {}),
        "tiff lzw": (noise, "TIFF", {"compression": "tiff_lzw"}),
        "tiff deflate": (colour, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "tiff jpeg": (colour, "TIFF", {"compression": "jpeg"}),
        "tiff float": (Image.fromarray(grid.astype(np.float32) / 80), "TIFF", {}),
        "tiff fax": (colour.convert("1"), "TIFF", {"compression": "group4"}),
        "avif": (colour, "AVIF", {"speed": 10}),
        "ppm": (colour, "PPM", {}),
        "jpeg2000": (colour, "JPEG2000", {}),
    }
    found = {}
    for name, (image, form, options) in kinds.items():
        out = io.BytesIO()
        image.save(out, form, **options)
        found[name] = out.getvalue()
    return found


def manifests(files: list[str], raw: list[bytes]) -> dict[str, Callable[[], bytes]]:
    """A sound manifest of every form; the text forms name `files`, the others hold `raw`."""
    entries = [
        {"id": i, "image": name, "conversations": talk("<image>\nwhat? ü", f"this {i}")}
        for i, name in enumerate(files)
    ]
    return {
        "json": lambda: json.dumps(entries, indent=1, ensure_ascii=False).encode(),
        "jsonl": lambda: "\n".join(json.dumps(entry) for entry in entries).encode(),
        "snappy.parquet": lambda: parquet(table(raw), row_group_size=4),
        "plain.parquet": lambda: parquet(table(raw), use_dictionary=False, compression="none"),
        "zstd.parquet": lambda: parquet(table(raw), compression="zstd", data_page_version="2.0"),
        "tar": lambda: tar(samples(raw)),
        "arrow": lambda: arrow(table(raw), 4),
        "file.arrow": lambda: arrow(table(raw), 4, stream=False),
    }


def mutate(rng: random.Random, raw: bytes) -> bytes:
    """One to four kinds of damage; one input in twelve stays sound."""
    if rng.random() < 1 / 12:
        return raw
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        if not out:
            break
        at = rng.randrange(len(out))
        # Headers and footers are where it hurts.
        at = rng.choice((at, at, min(at, rng.randrange(200)), max(at, len(out) - 1 - rng.randrange(200))))
        at = min(at, len(out) - 1)
        size = min(len(out) - at, 1 << rng.randrange(10))
        kind = rng.randrange(8)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            del out[at : at + size]
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            out[at:at] = out[at : at + size] * rng.choice((1, 2, 50))
        elif kind == 5:
            number = rng.choice(
                (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
            )
            width = rng.choice((1, 2, 4, 8))
            value = number & ((1 << 8 * width) - 1)
            out[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))
        elif kind == 6:
            out[at : at + size] = bytes(size)
        else:
            other = rng.randrange(len(out))
            out[at : at + size] = out[other : other + size]
    return bytes(out)


class Fuzz:
    """Runs inputs in a folder and keeps what came of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.store = Store.at(str(folder))
        self.sound = pictures()
        self.reasons: Counter[str] = Counter()
        self.good = self.rows = self.refused = self.inputs = 0
        self.crashes: list[str] = []
        self.unaccounted: list[str] = []
        self.slowest = 0.0
        self.files = [f"{number}.img" for number in range(len(self.sound))]
        for name, raw in zip(self.files, self.sound.values(), strict=True):
            (folder / name).write_bytes(raw)
        self.forms = manifests(self.files, list(self.sound.values()))
        self.whole = {form: make() for form, make in self.forms.items()}
        (folder / "link.jpg").symlink_to("/etc/hostname")
        os.mkfifo(folder / "pipe.jpg")

    def sound_run(self) -> None:
        """Every form undamaged: nothing may be lost, and libraries are loaded before measuring."""
        for form, raw in self.whole.items():
            self.manifest(form, raw, "sound")
        assert self.good == self.rows == len(self.whole) * len(self.sound), self.reasons

    def run(self, count: int) -> None:
        while self.inputs < count:
            if self.rng.random() < BATCHES:
                self.pictures()
            else:
                form = self.rng.choice(list(self.forms))
                self.manifest(form, mutate(self.rng, self.whole[form]), f"{form} {self.inputs}")
                self.inputs += 1

    def pictures(self) -> None:
        """A sound manifest of damaged pictures and of paths that must not be followed."""
        names = []
        for number in range(TOGETHER):
            kind = self.rng.choice(list(self.sound))
            names.append(f"damaged-{number}.img")
            (self.folder / names[-1]).write_bytes(mutate(self.rng, self.sound[kind]))
        entries = [
            {"image": name, "conversations": talk("q", "a")}
            for name in [*names, self.rng.choice(PATHS), self.rng.choice(PATHS)]
        ]
        self.manifest("json", json.dumps(entries).encode(), f"pictures {self.inputs}", expected=len(entries))
        self.inputs += TOGETHER

    def manifest(self, form: str, raw: bytes, what: str, expected: int = 0) -> None:
        print(what, file=sys.stderr, flush=True)
        start = time.perf_counter()
        path = self.folder / f"manifest-{what.replace(' ', '-')}.{form}"
        path.write_bytes(raw)
        try:
            self.follow(path.name, form, raw, what, expected)
        except Exception:
            self.crashes.append(f"{what}: {traceback.format_exc()[-1500:]}")
        path.unlink()
        self.slowest = max(self.slowest, time.perf_counter() - start)

    def follow(self, name: str, form: str, raw: bytes, what: str, expected: int) -> None:
        try:
            built = build_index(self.store, name, self.folder / ".index", group_by_image=False)
        except DataError:
            self.refused += 1
            return
        rows = built.rows(range(len(built))).to_pylist()
        Path(built.path).unlink()
        reader = Pictures(self.store)
        outcomes = [self.outcome(reader, row) for row in rows]
        self.rows += len(rows)
        self.good += outcomes.count("")
        self.reasons.update(filter(None, outcomes))
        if not set(outcomes) <= {"", *SampleError.REASONS}:
            self.unaccounted.append(f"{what}: {outcomes}")
        if form == "jsonl":
            expected = sum(bool(line.strip()) for line in raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
        if expected and len(rows) != expected:
            self.unaccounted.append(f"{what}: {len(rows)} of {expected} rows")
        if (
            form not in ("json", "jsonl")
            and len(rows) < len(self.sound)
            and not any(r["error"] for r in rows)
        ):
            self.unaccounted.append(f"{what}: only {len(rows)} rows, and no reason why")

    def outcome(self, reader: Pictures, row: dict[str, Any]) -> str:
        """ "" for a usable row, else the reason why not."""
        if row["error"]:
            return str(row["error"]) if row["detail"] and row["conversations"] == "[]" else "no detail"
        if row["image"] is None:
            return ""
        try:
            raw = reader.read(row["image"], row["place"], MAX_BYTES)
            image = decode_image(raw, MAX_BYTES, MAX_PIXELS, MAX_SIDE)
        except SampleError as error:
            return error.reason if len(str(error)) < 1000 else "endless detail"
        for read_map in (decode_map, decode_masks):
            with contextlib.suppress(SampleError):
                read_map(raw, MAX_PIXELS)
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, image.shape
        assert 0 < max(image.shape) <= MAX_SIDE
        return ""

    def report(self) -> dict[str, Any]:
        return {
            "inputs": self.inputs,
            "rows": self.rows,
            "good": self.good,
            "bad": sum(self.reasons.values()),
            "reasons": dict(self.reasons.most_common()),
            "refused": self.refused,
            "crashes": self.crashes,
            "unaccounted": self.unaccounted,
            "slowest_seconds": round(self.slowest, 2),
        }


def fuzz_apart(count: int, seed: int) -> dict[str, Any]:
    """The report of a run in another process. Raises AssertionError when that process dies."""
    command = [sys.executable, "-m", "tests.fuzz", "--count", str(count), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, f"{command} died at {done.stderr[-3000:]}"
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def peak_bytes() -> int:
    """The most memory that this process had. Not `getrusage`: that counts what its parent had, too."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) << 10


def main() -> None:
    parser = argparse.ArgumentParser(description="Damaged inputs through the data pipeline.")
    parser.add_argument("--count", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # Pillow's, of damaged metadata
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        fuzz = Fuzz(Path(folder), options.seed)
        fuzz.sound_run()
        before = peak_bytes()
        fuzz.run(options.count)
        grown = (peak_bytes() - before) / 2**20
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"seed": options.seed, **fuzz.report(), "grown_mib": round(grown), "seconds": seconds}))


if __name__ == "__main__":
    main()
