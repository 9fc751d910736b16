"""Small labelling and training pipelines on a real Ray, with teachers whose pace and calls a test knows.

    python -m tests.pipelines lose-a-node DATA STORE LOG     labels on two nodes, of which one is killed

The teachers run in the product's own actors. They are the models that a configuration names, slowed down, or
arithmetic on pixels, which starts in no time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from PIL import Image

import cluster.teachers
from cluster import label_job
from cluster.labeler import Labeller, open_stores
from cluster.monitor import start_monitor
from cluster.pipeline import Ingest, Stored, image_side, share_of, uses_store
from cluster.prepare import make_absolute
from cluster.teachers import make_teacher as make_model
from cluster.teachers import settle_types
from tests.s3 import S3Server
from unimrg.compose import compose
from unimrg.config import LabelConfig, RunConfig, TeachersConfig, to_plain
from unimrg.data.label_store import find_all
from unimrg.errors import DataError, SampleError
from unimrg.storage import S3Config, Store
from unimrg.teachers import Teacher

# -- a data set ----------------------------------------------------------------------------------------------

BAD = {3: "missing-file", 17: "corrupt-image", 22: "malformed-conversation", 31: "teacher-failed"}
"""Which entries of `write_pictures` are unusable, and why; the last only to model teachers."""

TEXT = 9  # the entry without a picture


def write_pictures(folder: Path, count: int = 96, side: int = 40, maps: bool = True) -> Path:
    """A LLaVA data set of smooth noise; some entries are unusable (`BAD`). maps: with labels of its own."""
    rng = np.random.default_rng(0)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Noise."}]
    entries: list[dict[str, Any]] = []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        height, width = (2, side) if BAD.get(number) == "teacher-failed" else rng.integers(side // 2, side, 2)
        size, coarse = (int(width), int(height)), (6, 6)
        kinds = {"image": (256, 3), "depth": (256,), "masks": (3,)} if maps else {"image": (256, 3)}
        for name, (levels, *channels) in kinds.items():
            values = rng.integers(0, levels, (*coarse, *channels), np.uint8)
            how = Image.Resampling.NEAREST if name == "masks" else Image.Resampling.BICUBIC
            Image.fromarray(values).resize(size, how).save(folder / f"{name}-{number:03d}.png")
        names = {name: f"{name}-{number:03d}.png" for name in kinds}
        entries.append({"id": f"p{number}", **names, "conversations": turns})
    for number, reason in BAD.items():
        picture = folder / entries[number]["image"]
        if reason == "missing-file":
            picture.unlink()
        elif reason == "corrupt-image":
            picture.write_bytes(picture.read_bytes()[:-40])
        elif reason == "malformed-conversation":
            entries[number]["conversations"] = turns[:1]
    text = [{"from": "human", "value": "What is two and two?"}, {"from": "gpt", "value": "Four."}]
    entries[TEXT] = {"id": "text", "conversations": text}
    (folder / "train.json").write_text(json.dumps(entries))
    return folder


def s3_words(server: S3Server) -> list[str]:
    """What a command line says to reach a server."""
    names = ("endpoint", "region", "access_key", "secret_key")
    return [f"s3.{name}={getattr(server, name)}" for name in names]


def s3_config(server: S3Server) -> S3Config:
    return S3Config(server.endpoint, server.region, server.access_key, server.secret_key)


def words(data: str | Path, store: str | Path, *more: str) -> list[str]:
    """A command line: small units and parts, and the places of the data set and of its labels."""
    return [
        f"data.manifest={data}/train.json",
        f"labels.store={store}",
        "data.held_out_count=0",
        "data.unit=4",
        "data.shard_rows=16",
        "data.window=2",
        "data.max_bad_share=0.3",
        *more,
    ]


MODELS = (
    *("teachers.depth.name=depth_anything", "teachers.depth.checkpoint=arithmetic"),
    *("teachers.segmentation.name=sam", "teachers.segmentation.checkpoint=arithmetic"),
)
"""Teachers that need actors; what they do is up to `paced`."""


def store_files(url: str | Path, s3: S3Config | None = None) -> dict[str, bytes]:
    """Every file below a label store's root, by its path."""
    root = Store.at(str(url), s3 or S3Config())
    return {
        entry.path: root.read_bytes(entry.path) for entry in root.list(recursive=True) if not entry.is_folder
    }


# -- teachers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """How the teachers of a test work.

    seconds: for a picture; steady: always as long, else anything between nothing and twice that. log: a file
    that gets a line for every picture, when it is begun. models: label by the models that the configuration
    names, else by arithmetic. gate: a file that they wait for after `free` pictures each. broken: they can't.
    """

    seconds: float = 0.0
    steady: bool = True
    log: str = ""
    models: bool = False
    gate: str = ""
    free: int = 0
    broken: bool = False


class Arithmetic:
    """Depth is brightness; boundaries are where it crosses the middle."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.identity: dict[str, Any] = {"name": f"arithmetic-{name}", "version": 1}

    def __call__(self, images: list[np.ndarray]) -> list[np.ndarray | SampleError]:
        return [self._label(image) for image in images]

    def _label(self, image: np.ndarray) -> np.ndarray | SampleError:
        if min(image.shape[:2]) < 4:
            return SampleError("teacher-failed", "too low")
        grey = image.mean(2)
        if self.name == "depth":
            return grey.astype(np.uint8)
        above = grey > np.median(grey)
        lines = np.zeros(above.shape, bool)
        lines[1:] |= above[1:] != above[:-1]
        lines[:, 1:] |= above[:, 1:] != above[:, :-1]
        return lines.astype(np.uint8) * 255


class Paced:
    """A teacher that takes its time and notes what it is asked: `name pid picture`."""

    def __init__(self, pace: Pace, name: str, teacher: Teacher) -> None:
        self.pace, self.name, self.teacher = pace, name, teacher
        self.identity = teacher.identity
        self.count = 0

    def __call__(self, images: list[np.ndarray]) -> list[np.ndarray | SampleError]:
        if self.pace.broken:
            raise DataError("the lamp of the teacher is broken")
        self.count += len(images)
        while self.pace.gate and self.count > self.pace.free and not Path(self.pace.gate).exists():
            time.sleep(0.05)
        for image in images:
            if self.pace.log:
                self._note(hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest())
            factor = 1.0 if self.pace.steady else random.SystemRandom().uniform(0, 2)
            time.sleep(self.pace.seconds * factor)
        return self.teacher(images)

    def _note(self, picture: str) -> None:
        log = os.open(self.pace.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(log, f"{self.name} {os.getpid()} {picture}\n".encode())
        os.close(log)


def make_paced(pace: Pace, name: str, config: TeachersConfig) -> Paced:
    """What `cluster.teachers.make_teacher` is replaced by."""
    return Paced(pace, name, make_model(name, config) if pace.models else Arithmetic(name))


@contextlib.contextmanager
def paced(pace: Pace) -> Iterator[None]:
    """Pipelines that this process builds get teachers of that pace."""
    cluster.teachers.make_teacher = functools.partial(make_paced, pace)  # type: ignore[assignment]
    try:
        yield
    finally:
        cluster.teachers.make_teacher = make_model


class PacedLabeller(Labeller):
    """The product's actor with teachers of some pace."""

    def __init__(self, plain: dict[str, Any], monitor: Any, pace: Pace) -> None:
        super().__init__(plain, monitor)
        cluster.teachers.make_teacher = functools.partial(make_paced, pace)  # type: ignore[assignment]


def seen(log: Path) -> list[tuple[str, int, str]]:
    """(teacher, pid, picture) of every picture that was begun, in order."""
    if not log.exists():
        return []
    found = [line.split() for line in log.read_text().splitlines()]
    return [(name, int(pid), picture) for name, pid, picture in found]


# -- labelling -----------------------------------------------------------------------------------------------


def label(*overrides: str, pace: Pace | None = None) -> int:
    """`unimrg.label` in this process."""
    with paced(pace or Pace()):
        return label_job.run(compose("label", overrides, LabelConfig))


def parts_done(url: str | Path, s3: S3Config | None = None) -> int:
    """Parts with labels, over all stores below a root."""
    root = Store.at(str(url), s3 or S3Config())
    return sum(len(store.labels.done()) for store in find_all(root))


# -- training without a model --------------------------------------------------------------------------------


class Consumer:
    """One rank of a training that takes batches and does nothing with them."""

    def __init__(self, ingest: Any, rank: int, batch: int) -> None:
        shard = ray.get(ingest.shard.remote(rank))
        self.tables = iter(
            shard.iter_batches(batch_size=batch, batch_format="pyarrow", drop_last=True, prefetch_batches=2)
        )

    def step(self) -> list[tuple[int, str]]:
        """Positions of this rank's next samples, and digests of all they hold."""
        rows = next(self.tables).to_pylist()
        return [(row["position"], _digest(row)) for row in rows if row["id"] is not None]


def _digest(row: dict[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest()


Step = list[tuple[int, str]]
STEP_SECONDS = 900.0  # a pipeline that gives nothing for so long never will


@dataclass(frozen=True)
class Training:
    """What a pipeline needs beside its position. stored, labeller: as in `cluster.trainer`."""

    config: RunConfig
    monitor: Any
    stored: list[Stored] | None
    labeller: Any = None

    def kill(self) -> None:
        """kill -9 of what outlives a group of workers."""
        for actor in filter(None, (self.labeller, self.monitor)):
            ray.kill(actor)

    def run(
        self, start: int, steps: int, workers: int, killed: bool = False, pause: float = 0.0
    ) -> list[Step]:
        """So many global batches from a position on, each in the order of its ranks.

        killed: the next one is asked for and everything is killed before it came. pause: the time between
        two steps, on average, seconds.
        """
        config, size = self.config, self.config.train.batch_size
        ingest = (
            ray.remote(Ingest)
            .options(num_cpus=0, max_concurrency=64)
            .remote(to_plain(config), self.monitor, self.labeller, self.stored)
        )
        rest = config.train.steps * size
        ray.get(ingest.split.remote(ingest, start, rest, workers, image_side(config)))
        actor = ray.remote(Consumer).options(num_cpus=0)
        ranks = [actor.remote(ingest, rank, share_of(size, workers)) for rank in range(workers)]
        done: list[Step] = []
        try:
            for _ in range(steps):
                shares = ray.get([rank.step.remote() for rank in ranks], timeout=STEP_SECONDS)
                done.append([sample for share in shares for sample in share])
                ingest.trained.remote(max(position for position, _ in done[-1]) + 1)
                time.sleep(random.uniform(0, 2 * pause))
            if killed:
                for rank in ranks:
                    rank.step.remote()
                time.sleep(random.uniform(0, 0.2))
        finally:
            for member in (*ranks, ingest):
                ray.kill(member)
        return done


def command(data: Path, folder: Path, *more: str) -> RunConfig:
    """The configuration of a run whose labels lie in `folder`/labels."""
    chosen = ["labels.codes=false", f"storage_path={folder}", *MODELS, *more]
    config = compose("train", words(data, folder / "labels", *chosen), RunConfig)
    make_absolute(config)
    settle_types(config, 0)
    return config


def training(data: Path, folder: Path, *more: str, pace: Pace | None = None, start: int = 0) -> Training:
    """A training from what is stored; with a pace, one that labels beside, from position `start` on."""
    mode = "cached" if pace is None else "streaming"
    config = command(data, folder, f"labels.mode={mode}", *more)
    monitor = start_monitor(folder, "a test", config.data.max_bad_share, config.data.min_checked)
    if not uses_store(config):
        return Training(config, monitor, None)
    with paced(Pace()):
        stored = open_stores(config, wait=pace is not None)
    if pace is None:
        return Training(config, monitor, stored)
    labeller = ray.remote(PacedLabeller).options(num_cpus=0).remote(to_plain(config), monitor, pace)
    samples = config.train.steps * config.train.batch_size
    ray.get(labeller.start.remote(stored, start, samples))
    return Training(config, monitor, stored, labeller)


# -- a cluster of two nodes ----------------------------------------------------------------------------------


def lose_a_node(data: str, store: str, log: str) -> None:
    """Label on two nodes; the one that holds the teachers dies in the middle, and another takes its place."""
    from ray.cluster_utils import Cluster

    room = {"num_cpus": 4, "object_store_memory": 128 << 20}
    nodes = Cluster(initialize_head=True, head_node_args=room | {"include_dashboard": False})
    second = nodes.add_node(**room, labels={"pool": "teacher"})
    ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
    pool = [f"teachers.{name}.node_labels=['pool=teacher']" for name in ("depth", "segmentation")]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            label(*words(data, store, *MODELS, *pool), pace=Pace(0.1, log=log))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive() and (parts_done(store) < 1 or len(seen(Path(log))) < 40):
        time.sleep(0.05)
    before = parts_done(store)
    teachers = {pid for _, pid, _ in seen(Path(log))}
    kill_node(second)
    nodes.add_node(**room, labels={"pool": "teacher"})
    thread.join()
    if failures:
        raise failures[0]
    survivors = {pid for _, pid, _ in seen(Path(log))} - teachers
    print(json.dumps({"parts_before": before, "before": len(teachers), "after": len(survivors)}), flush=True)
    ray.shutdown()
    nodes.shutdown()


def kill_node(node: Any) -> None:
    """kill -9 of a node's raylet and of everything it started, at once, as when the machine loses power."""
    for infos in node.all_processes.values():
        for info in infos:
            process = psutil.Process(info.process.pid)
            for one in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(signal.SIGKILL)


def main(arguments: Sequence[str]) -> None:
    assert arguments[0] == "lose-a-node"
    lose_a_node(*arguments[1:])


if __name__ == "__main__":
    # By its name, so that other processes find what is pickled by reference.
    from tests import pipelines

    pipelines.main(sys.argv[1:])
