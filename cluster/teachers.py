"""Teachers and frozen encoders on the cluster: how they are built, who they are, where they run."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import ray
from ray.data import ActorPoolStrategy, Dataset

from unimrg.config import LabelConfig, PoolConfig, RunConfig, TeachersConfig
from unimrg.data.label_store import dataset_key
from unimrg.data.manifest import Manifest
from unimrg.data.stages import MAPS, Encode, PictureEncoder, Teach
from unimrg.teachers import Teacher

CPU_ACTOR = 0.5
"""Logical CPUs of an actor that has no GPU: a laptop holds two teachers, an encoder and a worker."""

TASKS_PER_ACTOR = 2
"""Units that wait at an actor while it works, so that it never waits for the next one."""


def make_teacher(name: str, config: TeachersConfig) -> Teacher:
    """The teacher of a later stage; loads its weights."""
    teacher = getattr(config, name)
    if teacher.name == "depth_anything":
        from unimrg.teachers.depth import DepthAnything

        return DepthAnything(teacher.checkpoint, dtype=teacher.dtype, batch_size=teacher.batch_size)
    from unimrg.teachers.segmentation import SamBoundaries

    sam = config.sam
    return SamBoundaries(
        teacher.checkpoint,
        dtype=teacher.dtype,
        points_per_side=sam.points_per_side,
        points_per_batch=sam.points_per_batch,
        images_per_batch=sam.images_per_batch,
        pred_iou_thresh=sam.pred_iou_thresh,
        stability_score_thresh=sam.stability_score_thresh,
        box_nms_thresh=sam.box_nms_thresh,
        family=teacher.name,
    )


def make_encoder(config: RunConfig) -> PictureEncoder:
    """The frozen picture encoder of a run's family."""
    import torch

    from unimrg.families import load_family
    from unimrg.weights import localized

    dtype = getattr(torch, config.labels.encoder.dtype)
    with localized(config.family, config.s3.store()) as local:
        encoder: PictureEncoder = load_family(local.name).picture_encoder(local, dtype=dtype)
    return encoder


def settle_types(config: RunConfig | LabelConfig, gpus: int) -> None:
    """Number types that depend on the cluster: labels must say which one they were made with."""
    auto = "bfloat16" if gpus else "float32"
    for pool in (config.teachers.depth, config.teachers.segmentation, config.labels.encoder):
        pool.dtype = auto if pool.dtype == "auto" else pool.dtype


def identify(config: RunConfig) -> dict[str, Any]:
    """Who the two teachers are; loads their weights."""
    return {name: _identity(name, config.teachers) for name in MAPS}


def _identity(name: str, config: TeachersConfig) -> dict[str, Any]:
    teacher = getattr(config, name)
    if teacher.is_model:
        return make_teacher(name, config).identity
    return {"name": teacher.name, "version": 1, "folder": config.stored if teacher.name == "stored" else ""}


def label_key(config: RunConfig, url: str, images: str, manifest: Manifest) -> dict[str, Any]:
    """Key of a label store without the teachers' identities: the data set and what was asked for."""
    teachers = config.teachers
    asked: dict[str, Any] = {
        name: [
            getattr(teachers, name).name,
            getattr(teachers, name).checkpoint,
            getattr(teachers, name).dtype,
        ]
        for name in MAPS
    }
    if teachers.segmentation.is_model:
        asked["sam"] = dataclasses.asdict(teachers.sam)
        for name in ("points_per_batch", "images_per_batch"):  # memory against speed
            del asked["sam"][name]
    asked["stored"] = teachers.stored
    data = config.data
    return {
        "dataset": dataset_key("-".join(url.rsplit("/", 2)[1:]), images, manifest),
        "asked": asked,
        "limits": {"max_bytes": data.max_bytes, "max_pixels": data.max_pixels, "max_side": data.max_side},
        "shard_rows": data.shard_rows,
    }


def gpus_of_teachers(config: RunConfig, gpus: int) -> int:
    """Whole GPUs that labelling needs at least, beside training."""
    pools: list[PoolConfig] = [t for n in MAPS if (t := getattr(config.teachers, n)).is_model]
    pools += [config.labels.encoder] if config.labels.codes else []
    return math.ceil(sum(pool.min_actors * gpus_of_actor(pool, gpus) for pool in pools)) if gpus else 0


def gpus_of_actor(pool: PoolConfig, gpus: int) -> float:
    """What one actor takes of a cluster with so many GPUs."""
    return pool.gpus if pool.gpus >= 0 else float(min(gpus, 1))


def add_teachers(dataset: Dataset, config: RunConfig) -> Dataset:
    """The model teachers that the config names, each as a pool of actors; units keep their size."""
    for name in MAPS:
        teacher = getattr(config.teachers, name)
        if teacher.is_model:
            make = functools.partial(make_teacher, name, config.teachers)
            dataset = add_actors(
                dataset, Teach, (name, make), teacher, config.data.unit, config.cluster.workers
            )
    return dataset


def add_encoder(dataset: Dataset, config: RunConfig) -> Dataset:
    """The family's frozen picture encoder as a pool of actors."""
    pool = config.labels.encoder
    make: Callable[[], PictureEncoder] = functools.partial(make_encoder, config)
    arguments = (make, config.data.geometry, pool.batch_size)
    return add_actors(dataset, Encode, arguments, pool, config.data.unit, config.cluster.workers)


def add_actors(
    dataset: Dataset, stage: type, arguments: tuple[Any, ...], pool: PoolConfig, unit: int, trainers: int
) -> Dataset:
    """A stage as a pool of actors that grows and shrinks with its work, where the pool's options want it."""
    gpus_there = int(ray.cluster_resources().get("GPU", 0))
    gpus = gpus_of_actor(pool, gpus_there)
    room = int((gpus_there - trainers) // gpus) if gpus else 1
    options: dict[str, Any] = {}
    if pool.accelerator_type:
        options["accelerator_type"] = pool.accelerator_type
    if pool.node_labels:
        options["label_selector"] = dict(label.split("=", 1) for label in pool.node_labels)
    return dataset.map_batches(
        stage,
        fn_constructor_args=arguments,
        batch_format="pyarrow",
        # The whole unit: what a teacher says may depend on its neighbours in a batch by a rounding error, and
        # a part that is labelled again must come out the same.
        batch_size=unit,
        compute=ActorPoolStrategy(
            min_size=pool.min_actors,
            max_size=max(pool.max_actors or room, pool.min_actors),
            max_tasks_in_flight_per_actor=TASKS_PER_ACTOR,
        ),
        num_gpus=gpus,
        num_cpus=1 if gpus else CPU_ACTOR,
        **options,
    )
