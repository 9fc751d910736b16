"""Checkpoints: a training state as one atomic unit.

A checkpoint is a folder: the engine's files (every rank writes its own), `rng-<rank>.pt`, and
`state.json` (step, position, ranks, engine, config) by rank 0. It counts only when `COMPLETE` lies in it:
a list of all files and their sizes, written last.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unimrg.engine import Engine, world
from unimrg.errors import CheckpointError, first_line
from unimrg.storage import Store

COMPLETE = "COMPLETE"
STATE = "state.json"

ORDER = (
    "seed",
    *(f"data.{k}" for k in ("manifest", "manifests", "shares", "held_out_count", "shard_rows", "window")),
)
"""What the order of samples depends on (`data.order`), so that a position means the same."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands. step: optimiser steps done. position: the next sample of the epochs' order.

    ranks, batch_size: how it was run. config: the resolved configuration, without secrets.
    """

    step: int
    position: int
    ranks: int
    batch_size: int
    config: dict[str, Any]


def save_training(folder: Path, engine: Engine, progress: Progress) -> None:
    """Write this rank's share of a checkpoint into `folder`; every rank calls it with a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    engine.save(folder)
    rank, _ = world()
    torch.save(_rng_state(), folder / f"rng-{rank}.pt")
    if rank == 0:
        (folder / STATE).write_text(json.dumps(asdict(progress), indent=1))


def load_training(folder: Path, engine: Engine) -> Progress:
    """Restore this rank from a whole checkpoint folder.

    Raises CheckpointError when it was written by another number of ranks or can't be read.
    """
    progress = read_progress(folder)
    rank, ranks = world()
    if progress.ranks != ranks:
        raise CheckpointError(
            f"{folder} was written by {progress.ranks} workers and can't be continued by {ranks}; "
            f"set cluster.workers={progress.ranks}"
        )
    engine.load(folder)
    rng = folder / f"rng-{rank}.pt"
    try:
        _restore_rng(torch.load(rng, weights_only=True))
    except Exception as error:  # torch raises several kinds for a missing, damaged or foreign file
        raise CheckpointError(
            f"{rng} can't be read ({first_line(error)}); continue from another checkpoint"
        ) from error
    return progress


def check_same_order(progress: Progress, config: dict[str, Any]) -> None:
    """Raises CheckpointError when a position means another sample under `config` (plain) than it did."""
    for key in ORDER:
        there, here = (_lookup(values, key) for values in (progress.config, config))
        if there != here:
            raise CheckpointError(
                f"this run's checkpoints were made with {key}={there}, now it is {here}: samples would come "
                f"in another order; set it back, or start a new run under another name"
            )


def _lookup(values: dict[str, Any], key: str) -> Any:
    for name in key.split("."):
        values = values.get(name, {})
    return values


def read_progress(folder: Path) -> Progress:
    """`state.json` of a checkpoint folder."""
    try:
        return Progress(**json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder} holds no readable {STATE} ({error}); remove it and continue"
        ) from error


def stored_position(store: Store, name: str) -> int:
    """The position of a stored checkpoint. Raises CheckpointError, StorageError."""
    try:
        return int(json.loads(store.read_bytes(f"{name}/{STATE}"))["position"])
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{store.url}/{name} holds no readable {STATE}; remove it and continue"
        ) from error


def mark_complete(store: Store, name: str) -> None:
    """Write the list of a stored checkpoint's files and sizes, after all of them."""
    files = {entry.path: entry.size for entry in store.list(name, recursive=True) if not entry.is_folder}
    store.write_bytes(f"{name}/{COMPLETE}", json.dumps(files, indent=1).encode())


def is_complete(store: Store, name: str) -> bool:
    """Whether a stored checkpoint has its list and every file on it, in full."""
    try:
        listed = dict(json.loads(store.read_bytes(f"{name}/{COMPLETE}")))
    except (FileNotFoundError, ValueError, TypeError):
        return False
    there = {entry.path: entry.size for entry in store.list(name, recursive=True)}
    return all(there.get(path) == size for path, size in listed.items())


def _rng_state() -> dict[str, Any]:
    """All random states as tensors and plain values, loadable with `weights_only`."""
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [
            kind,
            [int(k) for k in keys],
            *(float(r) if isinstance(r, float) else int(r) for r in rest),
        ],
    }


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
