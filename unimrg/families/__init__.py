"""Model families: one folder each, imported when chosen.

A family's module offers `build(config, tasks) -> (Family, tokenizer)`, `processor(...)`, `save(...)`; see
`families.base` for what a family answers.
"""

from __future__ import annotations

import importlib
from types import ModuleType

FAMILIES = {"harmon": "unimrg.families.harmon"}


def load_family(name: str) -> ModuleType:
    """The family's module. Raises KeyError for an unknown name (configs are checked before)."""
    return importlib.import_module(FAMILIES[name])
