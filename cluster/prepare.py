"""Before a run: paths made absolute, the embedded data set written, everything checkable checked."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from cluster.pipeline import images_of, open_manifest, split_url
from unimrg.config import RunConfig
from unimrg.errors import ConfigError, DataError
from unimrg.storage import Store
from unimrg.weights import PLACES, absolute, check_reachable

TINY = "tiny"  # the word by which checkpoints of the package's own small teachers are asked for


def make_absolute(config: RunConfig) -> None:
    """Local paths as this process sees them: workers run in folders of their own."""
    s3 = config.s3.store()
    config.labels.store = config.labels.store or f"{config.storage_path.rstrip('/')}/labels"
    places = (config.data, "images"), (config.teachers, "stored"), (config.labels, "store")
    for part, key in ((config, "storage_path"), *places):
        if place := getattr(part, key):
            setattr(part, key, Store.at(place, s3).url)
    for key in PLACES:
        if place := getattr(config.family, key):
            setattr(config.family, key, absolute(place, s3))

    def whole(url: str) -> str:
        folder, name = split_url(url)
        return f"{Store.at(folder, s3).url}/{name}" if url else ""

    config.data.manifest, config.data.held_out = whole(config.data.manifest), whole(config.data.held_out)
    config.data.manifests = [whole(url) for url in config.data.manifests]
    for teacher in (config.teachers.depth, config.teachers.segmentation):
        if teacher.checkpoint and Path(teacher.checkpoint).is_dir():  # anything else is a hub id
            teacher.checkpoint = str(Path(teacher.checkpoint).absolute())


def prepare_data(config: RunConfig) -> None:
    """Write the embedded data set where none is named, and point the config at it."""
    if config.data.manifest or config.data.manifests:
        _check_teachers(config)
        return
    from unimrg.data.scenes.write import SceneSettings, write

    scenes = config.data.scenes
    settings = SceneSettings(**dataclasses.asdict(scenes))
    # The settings are in the name: another data set never stands in the way.
    name = f"scenes-{scenes.train}-{scenes.test}-{scenes.size}px-{scenes.questions}q-seed{scenes.seed}"
    root = Store.at(config.storage_path, config.s3.store()).child(name)
    if write(root, settings, workers=os.cpu_count() or 1):
        print(f"made {scenes.train} + {scenes.test} scenes in {root.url}", flush=True)
    config.data.images = root.url
    config.data.manifest = f"{root.url}/train.json"
    config.data.held_out = f"{root.url}/test.json"


def _check_teachers(config: RunConfig) -> None:
    """Raises ConfigError for teachers that have seen nothing but the embedded scenes."""
    for name, checkpoint in (
        ("depth", config.teachers.depth.checkpoint),
        ("segmentation", config.teachers.segmentation.checkpoint),
    ):
        if checkpoint == TINY:
            raise ConfigError(
                f"teachers.{name}.checkpoint is `{TINY}`, which knows only the embedded scenes; for other "
                "pictures choose teachers=depth_anything_sam, or teachers=oracle if the data set has labels"
            )


def check_data(config: RunConfig) -> None:
    """Stop before training when the manifest or the image folder can't be read.

    Raises DataError or StorageError with one sentence.
    """
    for url in filter(None, (*config.data.places(), config.data.held_out)):
        if not len(open_manifest(url, config.s3, config.data.group_by_image)):
            raise DataError(f"{url} has no entries")
        images_of(config, url).check_readable()


def check_weights(config: RunConfig) -> None:
    """Stop before anything is started when files of the model aren't there; fetches none.

    Raises CheckpointError or StorageError.
    """
    check_reachable(config.family, config.s3.store())
