"""Writes scenes as an ordinary LLaVA data set, to a folder or to object storage.

    train.json, test.json   one entry per question: id, image, conversations, and our optional keys
    images/<id>.png         8-bit RGB
    depth/<id>.png          16-bit grey, inverse depth: proportional to 1 / z, 65535 = nearest point, 0 = sky
    masks/<id>.png          8-bit grey, instance ids, 0 = ground and sky
    scenes.json             the settings it was made with

Optional keys of an entry: depth, masks (relative paths like `image`), family, pair, options, conflict, unseen
(see `world.Question`). `train.json` is written last: where it exists, the data set is complete.
"""

from __future__ import annotations

import io
import json
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from unimrg.data.scenes.make import make_scenes
from unimrg.data.scenes.world import SPLITS, Scene
from unimrg.errors import ConfigError, DataError

VERSION = 1  # of the generator: raise it when the same settings give other pictures or questions
CHUNK = 32  # scenes made and stored together


class Sink(Protocol):
    """The part of a `Store` that is needed here; paths are relative, with forward slashes."""

    def write_bytes(self, path: str, data: bytes) -> None: ...

    def read_bytes(self, path: str) -> bytes: ...

    def exists(self, path: str) -> bool: ...


@dataclass(frozen=True)
class SceneSettings:
    """What a data set of scenes is made of; the same settings always give the same bytes.

    train, test: scenes per split, even numbers (complementary pictures come in pairs). size: pixels of a
    side. questions: per scene.
    """

    train: int = 2000
    test: int = 500
    size: int = 128
    questions: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        for name in SPLITS:
            number = getattr(self, name)
            if number < 0 or number % 2:
                raise ConfigError(f"scenes: {name} is an even number of scenes, not {number}")
        if not 32 <= self.size <= 1024:
            raise ConfigError(f"scenes: size is 32 to 1024 pixels, not {self.size}")
        if not 2 <= self.questions <= 7:
            raise ConfigError(f"scenes: questions is 2 to 7 per scene, not {self.questions}")
        if self.seed < 0:
            raise ConfigError(f"scenes: seed is 0 or more, not {self.seed}")

    def to_json(self) -> bytes:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1).encode()


@dataclass(frozen=True)
class Job:
    """Scenes that are made together: `count` scenes of a split from pair `start` on."""

    settings: SceneSettings
    split: str
    start: int
    count: int


Files = dict[str, bytes]
Entry = dict[str, Any]


def write(store: Sink, settings: SceneSettings = SceneSettings(), workers: int = 1, threads: int = 8) -> bool:
    """Writes the data set below the root of `store`; False when it is already there, complete.

    workers: processes that make scenes. threads: files stored at the same time.
    Raises `DataError` where another data set of scenes lies already.
    """
    if store.exists("train.json"):
        if store.exists("scenes.json") and store.read_bytes("scenes.json") == settings.to_json():
            return False
        raise DataError(
            "another data set lies here already (train.json, with other settings in scenes.json): "
            "choose an empty location or delete it"
        )
    entries: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    jobs = [
        Job(settings, split, start // 2, min(CHUNK, getattr(settings, split) - start))
        for split in SPLITS
        for start in range(0, getattr(settings, split), CHUNK)
    ]
    with ThreadPoolExecutor(threads) as pool:
        for job, (found, files) in zip(jobs, _made(jobs, workers), strict=True):
            entries[job.split] += found
            # Waits for every file, so that a failure stops the run and no more than one chunk is in memory.
            list(pool.map(lambda item: store.write_bytes(*item), files.items()))
    store.write_bytes("scenes.json", settings.to_json())
    for split in reversed(SPLITS):
        store.write_bytes(f"{split}.json", json.dumps(entries[split], indent=1).encode())
    return True


def _made(jobs: list[Job], workers: int) -> Iterator[tuple[list[Entry], Files]]:
    if workers <= 1:
        yield from map(_make, jobs)
        return
    # Processes are spawned: the caller may hold threads and locks that a fork would copy.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_make, jobs)


def _make(job: Job) -> tuple[list[Entry], Files]:
    s = job.settings
    return pack(make_scenes(job.count, s.seed, job.split, s.size, s.questions, job.start))


def pack(scenes: Iterable[Scene]) -> tuple[list[Entry], Files]:
    """Manifest entries and files (relative path -> PNG) of some scenes."""
    entries: list[Entry] = []
    files: Files = {}
    for scene in scenes:
        paths = {kind: f"{kind}/{scene.id}.png" for kind in ("images", "depth", "masks")}
        files[paths["images"]] = png(scene.rgb)
        files[paths["depth"]] = png(inverse_depth(scene.depth))
        files[paths["masks"]] = png(scene.ids)
        entries += (_entry(scene, k, paths) for k in range(len(scene.questions)))
    return entries, files


def _entry(scene: Scene, k: int, paths: dict[str, str]) -> Entry:
    question = scene.questions[k]
    return {
        "id": f"{scene.id}-q{k}",
        "image": paths["images"],
        "conversations": [
            {"from": "human", "value": f"<image>\n{question.text}"},
            {"from": "gpt", "value": question.answer},
        ],
        "depth": paths["depth"],
        "masks": paths["masks"],
        "family": question.family,
        "pair": question.pair,
        "options": list(question.options),
        "conflict": question.conflict,
        "unseen": question.unseen,
    }


def inverse_depth(depth: np.ndarray) -> np.ndarray:
    """Depth float32 [S, S] (inf allowed) -> uint16 [S, S], 65535 * nearest / depth."""
    return np.round(65535 * (depth.min() / depth.astype(np.float64))).astype(np.uint16)


def png(array: np.ndarray) -> bytes:
    """uint8 [H, W, 3], uint8 [H, W] or uint16 [H, W] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()
