"""kill -9 at any moment while checkpoints are written: what counts as one is whole, and the run goes on."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.s3 import S3Server
from tests.saving_run import make_run, state_of, train, undisturbed
from unimrg.checkpoint import checkpoints_in, is_complete, latest_checkpoint, restore, step_of
from unimrg.storage import S3Config, Store

States = dict[int, Tensor]
"""By step: all that was trained, kept in moments and averaged, one behind the other."""


def killed_runs(store: Store, folder: Path, ranks: Sequence[int], seed: int, longest: float) -> list[States]:
    """A run that is killed and started again with so many ranks each time; after each kill all checkpoints.

    longest: between its first new checkpoint and its death, seconds.
    """
    # Processes forked from one that has imported everything: they start at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.saving_run"])
    rng = random.Random(seed)
    engine = make_run()[0]
    seen: list[States] = []
    for life, size in enumerate(ranks):
        before = latest_checkpoint(store)
        meeting = str(folder / f"meeting-{life}")
        group = [context.Process(target=train, args=(store, rank, size, meeting)) for rank in range(size)]
        for process in group:
            process.start()
        try:
            wait_for_more(store, before, group)
            time.sleep(rng.uniform(0, longest))
            assert all(process.is_alive() for process in group)
            for process in rng.sample(group, size):
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                time.sleep(rng.uniform(0, 0.02))
        finally:
            for process in group:
                process.kill()
                process.join()
        found = {}
        for name in checkpoints_in(store):
            if is_complete(store, name):
                assert restore(store, name, engine).step == step_of(name)
                found[step_of(name)] = state_of(engine)
        seen.append(found)
    newest = [max(found, default=0) for found in seen]
    assert newest == sorted(newest) and newest[-1] > 0  # what was once complete is never lost
    return seen


def wait_for_more(store: Store, before: str, group: Sequence[BaseProcess]) -> None:
    """Until a checkpoint newer than `before` is begun."""
    end, last = time.monotonic() + 120, step_of(before) if before else 0
    while not any(step_of(name) > last for name in checkpoints_in(store)):
        assert time.monotonic() < end and all(process.is_alive() for process in group)
        time.sleep(0.005)


def test_killed_while_saving(tmp_path: Path) -> None:
    """Every checkpoint that counts holds, bit for bit, what the undisturbed run had at its step."""
    seen = killed_runs(Store.at(str(tmp_path / "checkpoints")), tmp_path, [1] * 8, seed=0, longest=0.4)
    expected = undisturbed(max(step for found in seen for step in found))
    for found in seen:
        assert all(torch.equal(state, expected[step]) for step, state in found.items())


@pytest.mark.slow
def test_thirty_kills_of_two_ranks_while_saving_to_object_storage(
    tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step has one state, however often it is done again."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    config = S3Config(s3_server.endpoint, s3_server.region, s3_server.access_key, s3_server.secret_key)
    store = Store.at(s3_server.url("killed/checkpoints"), config)
    states: States = {}
    for found in killed_runs(store, tmp_path, [2] * 30, seed=1, longest=1.0):
        for step, state in found.items():
            assert torch.equal(states.setdefault(step, state), state)


@pytest.mark.slow
def test_twenty_kills_with_other_numbers_of_ranks(tmp_path: Path) -> None:
    """One, two or three ranks in turn: to rounding what one rank has that nothing happens to."""
    rng = random.Random(2)
    ranks = [rng.choice([1, 2, 3]) for _ in range(20)]
    seen = killed_runs(Store.at(str(tmp_path / "checkpoints")), tmp_path, ranks, seed=2, longest=0.1)
    expected = undisturbed(max(step for found in seen for step in found))
    for found in seen:
        for step, state in found.items():
            error = (state - expected[step]).abs().max().item()
            assert error <= 1e-5 * expected[step].abs().max().item(), f"step {step} is off by {error}"
