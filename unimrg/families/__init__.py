"""Model families: one folder each, imported when chosen.

A family's module offers `build(config, seed, dtype) -> (Family, tokenizer)`, `processor(...)`,
`image_size(config)`, `picture_encoder(config)` and `save_published(model, folder)`; see `families.base` for
what a family answers.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from unimrg.config import FAMILIES, FamilyConfig, TrainConfig
from unimrg.errors import CheckpointError
from unimrg.sample import Task

if TYPE_CHECKING:
    import torch

# `model_type` in config.json -> family; not the family's name, which transformers may use for its own.
MODEL_TYPES = {f"{name}_unimrg": name for name in FAMILIES}


def load_family(name: str) -> ModuleType:
    """The family's module. Raises KeyError for an unknown name (configs are checked before)."""
    return importlib.import_module(FAMILIES[name])


def load_trained(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any, int]:
    """A model from a folder of `save_pretrained`, its processor, and the side of its picture in pixels.

    Raises CheckpointError.
    """
    name = family_of(folder)
    family = load_family(name)
    config = FamilyConfig(name=name, weights=str(folder))
    model, tokenizer = family.build(config, 0, dtype)
    model.eval().to(device)
    return model, family.processor(model, tokenizer, TrainConfig(), tuple(Task), 0), family.image_size(config)


def side_of(folder: Path) -> int:
    """Side in pixels of the pictures of a folder of `save_pretrained`. Raises CheckpointError."""
    name = family_of(folder)
    return int(load_family(name).image_size(FamilyConfig(name=name, weights=str(folder))))


def family_of(folder: Path) -> str:
    """The family of a folder of `save_pretrained`, by its config.json.

    Raises CheckpointError when there is none, or when it belongs to another kind of model.
    """
    path = folder / "config.json"
    try:
        kind = json.loads(path.read_text("utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} holds no readable config.json; give a folder of save_pretrained, like model/ of a run"
        ) from error
    if kind not in MODEL_TYPES:
        raise CheckpointError(f"{path}: model_type {kind!r} is none of {', '.join(MODEL_TYPES)}")
    return MODEL_TYPES[kind]
