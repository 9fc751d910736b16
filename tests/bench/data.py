"""Samples a second from object storage to packed batches, ours against two others: prints one JSON line.

    python -m tests.bench.data                   # from a real S3 server on this machine
    python -m tests.bench.data --storage local
    python -m tests.bench.data --size 128        # as small as the tiny models' pictures, where work besides
                                                 # decoding shows most

cached_codes    the label store with codes of the frozen picture encoder: no pixels are needed
cached_pixels   the label store with pictures and maps
raw_images      three files a sample (picture, depth map, boundaries), as without a label store
webdataset      a torch DataLoader with two workers over tars of the same files, 256 samples each
read_images     `ray.data.read_images` on the pictures; a `map_batches` fetches the maps and renders

All see the same scenes, shuffled, and do the same after reading: decode, render to the training square, pack
for the tiny Harmon with `HarmonProcessor`. The DataLoader packs in its workers, as is usual there; the others
where a training worker would. Ours reads a data set in windows of shards and keeps the parts of two windows;
a window is a quarter of the data here, so that every part is read again in every epoch.

Rates are of the time between two batches far from start and end; starting is told apart (`start_seconds`,
with the imports and Ray's own start). Rounds are interleaved, figures are medians over them and ratios the
medians of the rounds' own. `cpu_ms` is CPU time a sample of all processes of a pipeline, which other work on
the machine disturbs least; `storage_cpu_ms` is the S3 server's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import ray
import torch
from PIL import Image

from cluster.labeler import open_stores
from cluster.monitor import start_monitor
from cluster.pipeline import Ingest, Stored, open_manifest
from cluster.prepare import make_absolute
from cluster.session import ray_session
from cluster.teachers import settle_types
from tests.s3 import run_s3_server
from unimrg.compose import compose
from unimrg.config import RunConfig, S3Options, to_plain
from unimrg.data.geometry import render_sample
from unimrg.data.prefetch import prefetch
from unimrg.data.stages import MAPS, SAMPLES, stored_name
from unimrg.families import load_family
from unimrg.hardware import device_name
from unimrg.packing import Batch
from unimrg.sample import Labels, Record, Sample, load_conversations
from unimrg.storage import Store

OURS = ("cached_codes", "cached_pixels", "raw_images")
OTHERS = ("webdataset", "read_images")
SHARD_ROWS = 256
WORKERS = 2
SHUFFLED = 512  # samples in WebDataset's shuffle buffer: two shards, as many as a window of ours
WARM_BATCHES = 16
THREADS = 8


@dataclass(frozen=True)
class Job:
    """What one measurement needs. root: URL of everything that was prepared; server: the S3 server's pid."""

    root: str
    batch_size: int
    samples: int
    shards: int
    server: int | None

    @property
    def store(self) -> Store:
        return Store.at(self.root)

    @property
    def needed(self) -> int:
        """Samples that a pipeline must be able to give, the end left out of what is measured."""
        return 2 * self.samples + 2 * WARM_BATCHES * self.batch_size

    def config(self, *words: str, teachers: str = "oracle") -> RunConfig:
        """A training run on the prepared data."""
        config = compose(
            "train",
            [
                "data=llava",
                f"teachers={teachers}",
                f"data.manifest={self.root}/train.json",
                "data.held_out_count=0",
                f"data.shard_rows={SHARD_ROWS}",
                f"data.window={self.shards // 4}",
                f"labels.store={self.root}/labels",
                f"train.batch_size={self.batch_size}",
                *words,
            ],
            RunConfig,
        )
        make_absolute(config)
        settle_types(config, gpus=0)
        return config


# -- the same samples in every form --------------------------------------------------------------------------


def prepare(job: Job, scenes: int, size: int) -> None:
    """Scenes and labels by the commands a user has; files and tars of the same labels for the others."""
    _command(
        "unimrg.data.scenes", "write", job.root, "--train", str(scenes), "--test", "2", "--size", str(size)
    )
    words = ["data=llava", f"data.manifest={job.root}/train.json", f"labels.store={job.root}/labels"]
    words += ["teachers=oracle", "labels.codes=true", f"data.shard_rows={SHARD_ROWS}"]
    _command("unimrg.label", *words)
    config = job.config("labels.mode=cached")
    (stored,) = open_stores(config, wait=False)
    rows = open_manifest(config.data.manifest, S3Options(), True).rows(np.arange(scenes)).to_pylist()
    for part in range(job.shards):
        labels = stored.labels.labels.read(part).to_pylist()
        _write_shard(job, part, [rows[found["row"]] | {"files": found} for found in labels])


def _command(module: str, *words: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"python -m {module} failed: {done.stderr[-800:]}")


def _write_shard(job: Job, part: int, rows: list[dict[str, Any]]) -> None:
    """One tar for WebDataset, and every map as a file of its own."""
    buffer, single = io.BytesIO(), {}
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, row in enumerate(rows):
            found = row["files"]
            text = json.dumps({"id": row["id"], "conversations": row["conversations"]}).encode()
            members = {
                "png": found["image"],
                "depth.png": found["depth"],
                "segmentation.png": found["segmentation"],
                "json": text,
            }
            for ending, data in members.items():
                info = tarfile.TarInfo(f"{part:04d}{number:04d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            single |= {f"maps/{name}/{stored_name(row['image'])}": found[name] for name in MAPS}
    job.store.write_bytes(_tar_name(part), buffer.getvalue())
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda item: job.store.write_bytes(*item), single.items()))


def _tar_name(part: int) -> str:
    return f"tars/{part:06d}.tar"


# -- what is measured ----------------------------------------------------------------------------------------


def make_processor(from_codes: bool = False) -> Any:
    """The tiny Harmon's processor, and the side of its pictures."""
    config = compose("train", [], RunConfig)
    family = load_family(config.family.name)
    model, tokenizer = family.build(config.family, seed=0)
    return family.processor(model, tokenizer, config.train, config.weights.active(), 0, from_codes=from_codes)


def ours(job: Job, variant: str) -> Iterator[Batch]:
    """The pipeline of a training run, without the training."""
    coded = variant == "cached_codes"
    if variant == "raw_images":
        config = job.config("labels.mode=off", f"teachers.stored={job.root}/maps", teachers="stored")
    else:
        config = job.config("labels.mode=cached")
    processor = make_processor(coded)
    with ray_session(), tempfile.TemporaryDirectory() as folder:
        stored = None if variant == "raw_images" else open_stores(config, wait=False)
        if variant == "cached_pixels":
            stored = [Stored(one.labels) for one in stored or ()]
        monitor = start_monitor(folder, "", config.data.max_bad_share, config.data.min_checked)
        actor = ray.remote(Ingest).options(num_cpus=0, max_concurrency=64)
        ingest = actor.remote(to_plain(config), monitor, None, stored)
        yield from _streamed(job, ingest, processor)


def _streamed(job: Job, ingest: Any, processor: Any) -> Iterator[Batch]:
    ray.get(ingest.split.remote(ingest, 0, job.needed, 1, processor.side))
    tables = ray.get(ingest.shard.remote(0)).iter_batches(
        batch_size=job.batch_size, batch_format="pyarrow", drop_last=True, prefetch_batches=2
    )
    for batch in prefetch(_packed(tables, processor)):
        ingest.trained.remote(batch.next_position)
        yield batch


def _packed(tables: Iterable[pa.Table], processor: Any) -> Iterator[Batch]:
    for table in tables:
        yield processor([Sample.from_row(row) for row in table.to_pylist()])


def read_images(job: Job, variant: str) -> Iterator[Batch]:
    """Plain Ray Data."""
    processor = make_processor()
    rows = open_manifest(f"{job.root}/train.json", S3Options(), True)
    entries = rows.rows(np.arange(len(rows))).select(["id", "image", "conversations"]).to_pylist()
    prefix = job.store.root
    rng = np.random.default_rng(0)
    epochs = -(-job.needed // len(entries))
    paths = [f"{prefix}/{entries[n]['image']}" for _ in range(epochs) for n in rng.permutation(len(entries))]
    with ray_session():
        drawn = _Drawn(job, {f"{prefix}/{entry['image']}": entry for entry in entries}, processor.side)
        tables = (
            ray.data.read_images(paths, filesystem=job.store.filesystem(), include_paths=True, mode="RGB")
            .map_batches(drawn, batch_size=job.batch_size)
            .iter_batches(
                batch_size=job.batch_size, batch_format="pyarrow", drop_last=True, prefetch_batches=2
            )
        )
        yield from prefetch(_packed(tables, processor))


class _Drawn:
    """Pictures of `read_images` to samples, with maps fetched by as many threads as ours has."""

    def __init__(self, job: Job, entries: dict[str, dict[str, Any]], side: int) -> None:
        self.store = job.store.child("maps")
        self.entries = entries
        self.side = side

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        with ThreadPoolExecutor(THREADS) as pool:
            rows = pool.map(self._row, batch["path"], batch["image"])
            return pa.Table.from_pylist(list(rows), schema=SAMPLES)

    def _row(self, path: str, image: np.ndarray) -> dict[str, Any]:
        entry = self.entries[path]
        filesystem = self.store.filesystem()
        maps = []
        for name in MAPS:
            place = f"{self.store.root}/{name}/{stored_name(entry['image'])}"
            with filesystem.open_input_stream(place) as file:
                maps.append(_grey(file.read()))
        record = Record(entry["id"], load_conversations(entry["conversations"]), image)
        return render_sample(record, Labels(*maps), 0, self.side).to_row()


def _grey(raw: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(raw)).convert("L"))


def webdataset(job: Job, variant: str) -> Iterator[Batch]:
    """A DataLoader over tars. Its workers are spawned: S3's client doesn't survive a fork."""
    wds = _webdataset()
    names = [f"{'s3' if job.server else 'file'}://{job.store.root}/{_tar_name(n)}" for n in range(job.shards)]
    processor = make_processor()
    dataset = (
        wds.WebDataset(names, shardshuffle=len(names), seed=0)
        .repeat()
        .shuffle(SHUFFLED)
        .map(_Rendered(processor.side))
        .batched(job.batch_size, collation_fn=processor)
    )
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        num_workers=WORKERS,
        worker_init_fn=_open_by_pyarrow,
        multiprocessing_context="spawn",
    )
    yield from loader


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError:
        raise SystemExit("WebDataset is missing, which only this needs: pip install webdataset") from None
    return webdataset


def _open_by_pyarrow(worker: int) -> None:
    """Let WebDataset read s3:// in the process, a tar in one request: faster than its pipes to programs."""
    from webdataset.gopen import gopen_schemes

    def open_s3(url: str, *_: Any, **__: Any) -> Any:
        store = Store.at(url)
        return store.filesystem().open_input_stream(store.root, buffer_size=16 << 20)

    gopen_schemes["s3"] = open_s3


class _Rendered:
    """The bytes of a sample in a tar to a `Sample`."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.count = 0

    def __call__(self, found: dict[str, bytes]) -> Sample:
        entry = json.loads(found["json"])
        image = np.asarray(Image.open(io.BytesIO(found["png"])).convert("RGB"))
        labels = Labels(*(_grey(found[f"{name}.png"]) for name in MAPS))
        self.count += 1
        record = Record(entry["id"], load_conversations(entry["conversations"]), image)
        return render_sample(record, labels, self.count, self.side)


VARIANTS: dict[str, Callable[[Job, str], Iterator[Batch]]] = dict.fromkeys(OURS, ours) | {
    "webdataset": webdataset,
    "read_images": read_images,
}


# -- measuring -----------------------------------------------------------------------------------------------


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of a process, of those below it, and of those below it that have ended."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(one.cpu_times()[:4])  # user, system, and both of children that ended
    return total


def measure(variant: str, job: Job, answer: Connection) -> None:
    """Run in a process of its own, whose tree is the variant's."""
    began = time.perf_counter()
    torch.set_num_threads(1)
    batches = VARIANTS[variant](job, variant)
    next(batches)
    started = time.perf_counter() - began
    for _ in range(WARM_BATCHES):
        next(batches)
    here, server = psutil.Process(), psutil.Process(job.server) if job.server else None
    before = time.perf_counter(), cpu_seconds(here), cpu_seconds(server) if server else 0.0
    seen = 0
    while seen < job.samples:
        seen += next(batches).samples
    after = time.perf_counter(), cpu_seconds(here), cpu_seconds(server) if server else 0.0
    wall, cpu, storage = (b - a for a, b in zip(before, after, strict=True))
    answer.send(
        {
            "samples_per_second": seen / wall,
            "cpu_ms": 1000 * cpu / seen,
            "storage_cpu_ms": 1000 * storage / seen,
            "start_seconds": started,
        }
    )
    batches.close()


def run_apart(variant: str, job: Job) -> dict[str, float]:
    """`measure` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(variant, job, sender))
    process.start()
    sender.close()
    try:
        found: dict[str, float] = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{variant} ended without a result") from None
    process.join()
    return found


def summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians over the rounds, and ratios of our rates to the others'."""
    variants = list(rounds[0])
    names = list(rounds[0][variants[0]])

    def median(values: Iterable[float]) -> float:
        return round(statistics.median(values), 3)

    figures = {name: {v: median(one[v][name] for one in rounds) for v in variants} for name in names}

    def ratios(name: str, sign: int) -> dict[str, float]:
        pairs = [(a, b) for a in OURS for b in OTHERS if a in variants and b in variants]
        return {
            f"{a} / {b}": median((one[a][name] / one[b][name]) ** sign for one in rounds) for a, b in pairs
        }

    return figures | {"ratio": ratios("samples_per_second", 1), "cpu_ratio": ratios("cpu_ms", -1)}


@contextlib.contextmanager
def storage(kind: str) -> Iterator[tuple[str, int | None]]:
    """A place for the data: URL, and the pid of its server if there is one."""
    if kind == "local":
        with tempfile.TemporaryDirectory(prefix="unimrg-bench-") as folder:
            yield folder, None
        return
    with run_s3_server("unimrg-bench") as server:
        os.environ.update(server.env)
        (gateway,) = psutil.Process().children()
        yield server.url("data"), gateway.pid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--storage", default="s3", choices=("s3", "local"))
    parser.add_argument("--scenes", type=int, default=1024, help=f"in all, a multiple of {4 * SHARD_ROWS}")
    parser.add_argument("--size", type=int, default=384, help="side of the pictures, pixels")
    parser.add_argument("--samples", type=int, default=1536, help="measured of each variant and round")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=[*OURS, *OTHERS], choices=[*OURS, *OTHERS])
    options = parser.parse_args()
    if options.scenes % (4 * SHARD_ROWS):
        parser.error(f"--scenes: {options.scenes} is no multiple of {4 * SHARD_ROWS}")
    if "webdataset" in options.variants:
        _webdataset()
    rounds = []
    with storage(options.storage) as (root, server):
        job = Job(root, options.batch_size, options.samples, options.scenes // SHARD_ROWS, server)
        prepare(job, options.scenes, options.size)
        for _ in range(options.rounds):
            rounds.append({})
            for variant in options.variants:
                rounds[-1][variant] = run_apart(variant, job)
                print(variant, json.dumps(rounds[-1][variant]), file=sys.stderr, flush=True)
    about = {"cores": os.cpu_count(), "device": device_name(), "date": date.today().isoformat()}
    print(json.dumps(vars(options) | summary(rounds) | about))


if __name__ == "__main__":
    from tests.bench import data  # Ray's workers find what they run by its module, which is not __main__

    data.main()
