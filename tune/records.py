"""What is kept of every trial: small JSON files in the search's folder, from which all else is made.

<storage_path>/<name>/search.json          the search's config, as it was begun
                      trials/<id>.json     one finished trial
                      runs/<id>/           its run: config, metrics, checkpoints, model
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from unimrg.storage import Store

SEARCHED, REPEATED = "search", "repeat"


@dataclass
class Trial:
    """One finished training and what it scored.

    id: like `tpe-003`, or `best-seed-1`: the name of its run. strategy: who proposed it; `start` is the
    search's own configuration, which every strategy begins with. phase: `search` (scored on the validation
    pictures) or `repeat` (scored on the test pictures, with a fresh seed). number: of the proposal, from 0.
    changes: dotted keys of the run's config and the values that the trial gave them.
    state: `done`, `stopped` (by asha, before the end) or `failed`. steps: optimiser steps it made.
    values: of `tune.objectives.OBJECTIVES`, those that were measured; none of a failed trial.
    curve: {"step": …, and `values` then}, where it was scored: at rungs and at the end.
    losses: at most 200 records of training: {"step", "loss/total", "loss/<task>", …}.
    answers: of each question {"id", "picture", "correct"}. error: why it failed, one sentence.
    """

    id: str
    strategy: str
    phase: str
    number: int
    seed: int
    changes: dict[str, Any]
    state: str
    steps: int
    seconds: float
    values: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    losses: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""


class Records:
    """The finished trials of one search."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def write(self, trial: Trial) -> None:
        """Keep a finished trial; there is either the whole file or none."""
        self.store.write_bytes(f"trials/{trial.id}.json", json.dumps(dataclasses.asdict(trial)).encode())

    def read_one(self, name: str) -> Trial | None:
        """The finished trial of that id."""
        path = f"trials/{name}.json"
        return Trial(**json.loads(self.store.read_bytes(path))) if self.store.exists(path) else None

    def read(self) -> dict[str, Trial]:
        """All finished trials by id."""
        return {trial.id: trial for trial in self._all()}

    def _all(self) -> Iterator[Trial]:
        if self.store.exists("trials"):
            for entry in self.store.list("trials"):
                if entry.path.endswith(".json"):
                    yield Trial(**json.loads(self.store.read_bytes(entry.path)))
