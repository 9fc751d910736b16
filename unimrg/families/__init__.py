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

from unimrg.config import FAMILIES
from unimrg.errors import CheckpointError

# `model_type` in config.json -> family; not the family's name, which transformers may use for its own.
MODEL_TYPES = {f"{name}_unimrg": name for name in FAMILIES}


def load_family(name: str) -> ModuleType:
    """The family's module. Raises KeyError for an unknown name (configs are checked before)."""
    return importlib.import_module(FAMILIES[name])


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
