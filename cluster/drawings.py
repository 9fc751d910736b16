"""Held-out pictures drawn by a checkpoint, a batch an actor, for `unimrg.evaluate`.

    manifest ─► one task: pictures, targets, what is truly there ─► batches ─► actors: draw ─► store

A part is one batch. It is visible only when it is complete, so a second run draws only what isn't stored.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from tqdm import tqdm

from cluster.evaluation import Model, checkpoint_digest, load_model, no_idle, settled
from cluster.pipeline import open_manifest, set_context, split_url
from cluster.session import gpus_of_cluster, ray_session, root_cause
from cluster.teachers import add_actors, make_teacher
from unimrg.benchmarks.dense.drawing import Settings, draw, read
from unimrg.benchmarks.dense.subjects import Subject, read_subjects
from unimrg.config import DataConfig, EvaluateConfig
from unimrg.data.label_store import Parts
from unimrg.data.pictures import Pictures
from unimrg.data.stages import MAPS, Fetch, Render, Sources, Teach
from unimrg.errors import DataError, UnimrgError
from unimrg.families import side_of
from unimrg.storage import Store
from unimrg.weights import absolute, fetch


@dataclass(frozen=True)
class Drawn:
    """subjects: the pictures. drawings: by name, in their order. skipped: pictures left out, by reason."""

    settings: Settings
    subjects: list[Subject]
    drawings: dict[str, list[np.ndarray]]
    skipped: dict[str, int]


def draw_all(config: EvaluateConfig) -> Drawn:
    """Draw what isn't stored yet below `config.out`. Raises UnimrgError of one sentence."""
    s3 = config.s3.store()
    folder = fetch("checkpoint", config.checkpoint, s3)
    side = side_of(folder)
    out = Store.at(config.out, s3)
    out.check_writable()
    digest = checkpoint_digest(folder)
    with ray_session() as logs:
        gpus = gpus_of_cluster()
        pool = settled(config.pool, gpus)
        model = Model(absolute(config.checkpoint, s3), s3, pool)
        try:
            subjects, skipped = _subjects(config, side, gpus)
            shown = [one.sample.image for one in subjects if one.sample.image is not None]
            names = hashlib.sha256(b"".join(picture.tobytes() for picture in shown)).hexdigest()
            settings = Settings(digest, names, config.draw_iterations, pool.dtype, pool.batch_size)
            parts = settings.parts(out)
            _run(shown, settings, parts, model, logs)
        except UnimrgError as error:
            raise root_cause(error) from None
    return Drawn(settings, subjects, read(parts), skipped)


def _subjects(config: EvaluateConfig, side: int, gpus: int) -> tuple[list[Subject], dict[str, int]]:
    models = any(getattr(config.teachers, name).is_model for name in MAPS)
    task = ray.remote(prepare).options(num_gpus=min(gpus, 1) if models else 0, num_cpus=1)
    subjects, skipped = ray.get(task.remote(config, side))
    if not subjects:
        reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "it names none"
        raise DataError(f"drawings: no picture of {config.drawings} can be used ({reasons})")
    return subjects, skipped


def prepare(config: EvaluateConfig, side: int) -> tuple[list[Subject], dict[str, int]]:
    """The first pictures of the manifest with their targets; runs in a Ray task, which may have a GPU."""
    manifest = open_manifest(config.drawings, config.s3, group_by_image=True)
    rows = manifest.rows(np.arange(min(len(manifest), config.pictures)))
    images = Store.at(split_url(config.drawings)[0], config.s3.store())
    teachers, limits = config.teachers, DataConfig()
    stored = Store.at(teachers.stored, config.s3.store()) if teachers.stored else None
    depth, lines = (getattr(teachers, name).name.replace("none", "") for name in MAPS)
    fetch = Fetch(Sources(images, depth, lines, stored), limits)
    teach = [
        Teach(name, functools.partial(make_teacher, name, teachers))
        for name in MAPS
        if getattr(teachers, name).is_model
    ]
    return read_subjects(rows, [fetch, *teach, Render(side, limits.geometry)], Pictures(images), side)


def _run(pictures: Sequence[np.ndarray], settings: Settings, parts: Parts, model: Model, logs: str) -> None:
    size = settings.batch
    lacking = sorted(set(range(-(-len(pictures) // size))) - parts.done())
    left = sum(len(pictures[part * size : (part + 1) * size]) for part in lacking)
    print(f"{left} of {len(pictures)} pictures to draw from; Ray's logs: {logs}", flush=True)
    if not lacking:
        return
    set_context(DataConfig())
    raw = [picture.tobytes() for picture in pictures]
    items = [{"part": part, "pictures": raw[part * size : (part + 1) * size]} for part in lacking]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    pool = no_idle(model.pool, len(items))
    drawing = add_actors(dataset, Draw, (settings, parts, model), pool, unit=1, trainers=0)
    with tqdm(total=len(pictures), initial=len(pictures) - left, unit="picture", disable=None) as bar:
        for batch in drawing.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            bar.update(sum(batch["drawn"].to_pylist()))


class Draw:
    """An actor that draws batches and stores them."""

    def __init__(self, settings: Settings, parts: Parts, model: Model) -> None:
        self.settings, self.parts, self.model = settings, parts, model

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any, int]:
        """Model, processor and side of a picture. Loaded late: Ray hides what goes wrong in a constructor."""
        return load_model(self.model)

    def __call__(self, table: pa.Table) -> pa.Table:
        ((part, raw),) = ((item["part"], item["pictures"]) for item in table.to_pylist())
        model, processor, side = self.loaded
        pictures = [np.frombuffer(one, np.uint8).reshape(side, side, 3).copy() for one in raw]
        self.parts.write(part, draw(model, processor, pictures, part * self.settings.batch, self.settings))
        return pa.table({"drawn": [len(pictures)]})
