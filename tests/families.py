"""Every family as the registry-driven tests see it: a model of thousands of parameters and its processor.

A family adds itself with a module `tests/tiny_<name>.py` that offers `micro()` (the smallest config with
every part, 16-pixel pictures), `random_model(config)` (every parameter random, so that gradients flow
everywhere), `make_processor(config, tasks, seed)` and `greedy(model, processor, image, question, steps)` (an
answer by running the whole sequence again for every token).
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType
from typing import Any

from unimrg.config import FAMILIES
from unimrg.families.base import Family
from unimrg.families.processor import PackedProcessor
from unimrg.sample import Task

NAMES = tuple(FAMILIES)
SIDE = 16


def tiny(name: str) -> ModuleType:
    return importlib.import_module(f"tests.tiny_{name}")


def fresh_model(name: str) -> Family:
    """The micro model, the same at every call."""
    module = tiny(name)
    model: Family = module.random_model(module.micro())
    return model


@lru_cache
def shared_model(name: str) -> Family:
    """A `fresh_model` that nobody changes."""
    return fresh_model(name)


def processor(name: str, tasks: tuple[Task, ...] = tuple(Task), seed: int = 3) -> PackedProcessor[Any, Any]:
    module = tiny(name)
    made: PackedProcessor[Any, Any] = module.make_processor(module.micro(), tasks, seed)
    return made
