"""All trials, two at a time in plain processes; each is stored when it is done and never run again."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from unimrg.errors import CheckpointError, ConfigError
from unimrg.reproduce.config import ARMS, ReproduceConfig
from unimrg.reproduce.trial import SETS, data, run
from unimrg.storage import S3Config
from unimrg.weights import SHIPPED, fetch

BOOKKEEPING = ("name", "storage_path", "seeds", "arms", "workers", "device")
"""Knobs that may differ between a run and the one it goes on from."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One training to do. steps: 0 for the base."""

    arm: str
    seed: int
    steps: int


def base_folder(config: ReproduceConfig) -> Path:
    """Where the base lies. Raises ConfigError where there is none."""
    mend = "make one with `python -m unimrg.reproduce.base FOLDER` and give base=FOLDER"
    try:
        folder = fetch("base", config.base or f"{SHIPPED}{config.family}", S3Config())
    except (CheckpointError, ConfigError) as error:
        raise ConfigError(f"base: {error}; or {mend}") from error
    if not (folder / "config.json").is_file():
        raise ConfigError(f"base: there is no model in {folder}; {mend}")
    return folder


def results(config: ReproduceConfig, tell: Callable[[str], None] = print) -> list[Result]:
    """Every trial's result, arms in order and seeds within; those that are stored already are read.

    Raises ConfigError where the folder holds results of other settings, or where there is no such device.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: there is no CUDA device here; write device=cpu")
    folder, base = Path(config.storage_path) / config.name, base_folder(config)
    _same_settings(config, folder)
    for name in SETS:
        if getattr(config, name):
            data(config, base, folder, name)
    done: dict[tuple[str, int], Result] = {}
    # The matched control comes last: it needs the times of the others.
    for matched in (False, True):
        some = [
            Trial(arm, seed, _steps(config, arm, seed, done))
            for seed in range(config.seeds)
            for arm in config.arms
            if ARMS[arm].matched == matched and (ARMS[arm].trained or seed == 0)
        ]
        for trial, result in _finished(config, base, folder, some):
            done[trial.arm, trial.seed] = result
            words = f"headline {100 * result['headline']:.1f}, {result['cpu_seconds']:.0f} CPU seconds"
            tell(f"{trial.arm}, seed {trial.seed}: {words}")
    return [done[arm, seed] for arm in config.arms for seed in range(config.seeds) if (arm, seed) in done]


def _steps(config: ReproduceConfig, arm: str, seed: int, done: dict[tuple[str, int], Result]) -> int:
    if not ARMS[arm].trained:
        return 0
    if not ARMS[arm].matched:
        return config.steps
    ratio = done["unimrg", seed]["cpu_seconds"] / done["sft", seed]["cpu_seconds"]
    return max(1, round(config.steps * ratio))


def _same_settings(config: ReproduceConfig, folder: Path) -> None:
    path = folder / "config.json"
    mine = {key: value for key, value in asdict(config).items() if key not in BOOKKEEPING}
    if path.is_file() and (stored := json.loads(path.read_text("utf-8"))) != mine:
        other = ", ".join(key for key in mine if stored.get(key) != mine[key])
        raise ConfigError(f"name: {folder} holds trials with another {other}; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine, indent=1))


def _finished(
    config: ReproduceConfig, base: Path, folder: Path, trials: Sequence[Trial]
) -> Iterator[tuple[Trial, Result]]:
    """Each trial with its result: the stored ones first, then the others as they are done."""
    paths = {trial: folder / "trials" / f"{trial.arm}-{trial.seed}.json" for trial in trials}
    missing = [trial for trial, path in paths.items() if not path.is_file()]
    for trial, path in paths.items():
        if trial not in missing:
            yield trial, json.loads(path.read_text("utf-8"))
    if not missing:
        return
    # Spawned: a fork would copy torch's threads and locks.
    context = multiprocessing.get_context("spawn")
    workers = min(config.workers, len(missing))
    with ProcessPoolExecutor(workers, context, initializer=end_with_parent) as pool:
        waiting = {pool.submit(_run, config, base, folder, trial, paths[trial]): trial for trial in missing}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def end_with_parent() -> None:
    """In a worker: end when the command is killed, also in the middle of a trial, which nobody waits for."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="parent").start()


def _run(config: ReproduceConfig, base: Path, folder: Path, trial: Trial, path: Path) -> Result:
    """In a process of its own: run a trial and store it in one move."""
    result = run(config, base, folder, trial.arm, trial.seed, trial.steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(result))
    part.replace(path)
    return result
