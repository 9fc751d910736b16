"""How much memory labelling beside training takes, whichever of the two is slower: prints JSON.

    python -m tests.bench.backpressure --pictures 480 --side 512

The product's pipeline on a local Ray: pictures to decoded arrays, two teachers in actors, the label store,
samples, a consumer in the place of training. Teachers and consumer wait as long for each picture as a case
says; `volume` is what the pipelines put into Ray's object store in total, and would hold if nothing held them
back. Memory is sampled: the object store's use as Ray counts it, and of each kind of process, over all
processes of that kind, what is resident (`rss`) and what of it is the process's own (`heap`; the rest is
shared: the object store and libraries). `first half` and `second half` tell growth from a level.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from cluster.session import OBJECT_STORE_BYTES, ray_session
from tests.pipelines import Pace, training, write_pictures

SECONDS = 0.25  # between two samples
MIB = 1 << 20
BATCH = 8

CASES = {"teachers 10 times slower": (10, 1), "equal": (3, 3), "teachers 10 times faster": (1, 10)}
"""Time for a picture of each teacher and of training, in units of --seconds."""

KINDS = {
    "labeller": r"ray::\w*Labeller",
    "ingest": r"ray::Ingest",
    "teachers": r"ray::MapWorker.*Teach",
    "reader": r"ray::MapWorker.*_ReadStored",
    "split": r"ray::SplitCoordinator",
    "consumer": r"ray::Consumer",
    "desk": r"ray::_Desk",
    "monitor": r"ray::Monitor",
}
TASKS = "tasks"
"""Titles of Ray's processes; all others run tasks (prepare, keep, write) in turns, or are idle."""


class Memory:
    """Samples of the object store's use and of the processes', one list entry each."""

    def __init__(self) -> None:
        self.store: list[int] = []
        self.processes: list[dict[str, tuple[int, int]]] = []
        self.created = self.spilled = 0  # bytes, since Ray was started

    def sample(self) -> None:
        """Look at everything once."""
        state = get_state_from_address(ray.get_runtime_context().gcs_address)
        stats = get_memory_info_reply(state).store_stats
        self.store.append(
            stats.object_store_bytes_used + stats.spilled_bytes_total - stats.restored_bytes_total
        )
        self.created = stats.cumulative_created_bytes
        sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                title, memory = " ".join(process.cmdline()), process.memory_info()
                if title.startswith("ray::"):
                    kind = next((k for k, pattern in KINDS.items() if re.match(pattern, title)), TASKS)
                    sums[kind][0] += memory.rss
                    sums[kind][1] += memory.rss - memory.shared
        self.processes.append({kind: (rss, heap) for kind, (rss, heap) in sums.items()})


@contextlib.contextmanager
def sampled() -> Iterator[Memory]:
    """Memory sampled in a thread."""
    memory, stop = Memory(), threading.Event()
    memory.sample()  # in this thread, so that what can't be measured is an error

    def work() -> None:
        while not stop.wait(SECONDS):
            memory.sample()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        stop.set()
        thread.join()


def measure(data: Path, folder: Path, teacher: float, trainer: float, samples: int) -> dict[str, Any]:
    """A training with labelling beside it; seconds a picture of each teacher and of training."""
    steps = samples // BATCH
    words = [f"train.batch_size={BATCH}", f"train.steps={steps}", "data.unit=16", "data.shard_rows=64"]
    began = time.monotonic()
    with sampled() as memory:
        job = training(data, folder, *words, pace=Pace(teacher, steady=False))
        memory.sample()
        created, spilled = memory.created, memory.spilled
        done = job.run(0, steps, workers=1, pause=trainer * BATCH)
        seconds = time.monotonic() - began
        memory.sample()
    reason = ray.get(job.labeller.failure.remote())
    assert len(done) == steps and not reason, reason
    job.kill()
    kinds = [*KINDS, TASKS]
    return {
        "seconds": round(seconds, 1),
        "samples": samples,
        "volume_mib": round((memory.created - created) / MIB),
        "spilled_mib": round((memory.spilled - spilled) / MIB),
        "object_store_mib": peaks(memory.store),
        "heap_mib": {k: peaks([found.get(k, (0, 0))[1] for found in memory.processes]) for k in kinds},
        "rss_mib": {k: peaks([found.get(k, (0, 0))[0] for found in memory.processes]) for k in kinds},
    }


def peaks(values: list[int]) -> dict[str, float]:
    """Peaks in MiB: of all, of the first half, of the second."""
    half = len(values) // 2
    parts = {"peak": values, "first half": values[:half], "second half": values[half:]}
    return {name: round(max(part, default=0) / MIB, 1) for name, part in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="memory of labelling beside training")
    parser.add_argument("--pictures", type=int, default=480)
    parser.add_argument("--side", type=int, default=512, help="longest side of a picture, pixels")
    parser.add_argument("--seconds", type=float, default=0.02, help="for a picture, of what is fast")
    options = parser.parse_args()
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "python": platform.python_version(),
        "ray": ray.__version__,
        "object_store_limit_mib": OBJECT_STORE_BYTES / MIB,
        "options": vars(options),
        "cases": {},
    }
    with TemporaryDirectory() as folder:
        data = write_pictures(Path(folder) / "data", options.pictures, options.side, maps=False)
        with ray_session():
            for name, (teacher, trainer) in CASES.items():
                record["cases"][name] = measure(
                    data,
                    Path(folder) / name.replace(" ", "-"),
                    teacher * options.seconds,
                    trainer * options.seconds,
                    (options.pictures - 8) // BATCH * BATCH,
                )
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
