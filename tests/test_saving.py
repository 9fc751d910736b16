"""kill -9 at any moment while checkpoints are written: what counts as one is whole, and the run goes on."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.engine_runs import make, train_config
from tests.s3 import S3Server
from tests.saving_run import STEPS, state_digest, train, undisturbed
from unimrg.checkpoint import checkpoints_in, is_complete, latest_checkpoint, restore, step_of
from unimrg.storage import S3Config, Store


def killed_runs(
    store: Store, folder: Path, ranks: int, kills: int, seed: int, longest: float
) -> list[dict[int, str]]:
    """A run that is killed and started again; after each kill the digests of all complete checkpoints.

    longest: between its first new checkpoint and its death, seconds.
    """
    # Processes forked from one that has imported everything: they start at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.saving_run"])
    rng = random.Random(seed)
    engine, _ = make("torch", train_config(STEPS, ema=0.5))
    seen: list[dict[int, str]] = []
    for kill in range(kills):
        before = latest_checkpoint(store)
        meeting = str(folder / f"meeting-{kill}")
        group = [context.Process(target=train, args=(store, rank, ranks, meeting)) for rank in range(ranks)]
        for process in group:
            process.start()
        try:
            wait_for_more(store, before, group)
            time.sleep(rng.uniform(0, longest))
            for process in rng.sample(group, ranks):
                assert process.pid is not None and process.is_alive()
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
                found[step_of(name)] = state_digest(engine)
        seen.append(found)
    return seen


def wait_for_more(store: Store, before: str, group: list[multiprocessing.Process]) -> None:
    """Until a checkpoint newer than `before` is begun."""
    end = time.monotonic() + 120
    while not any(name > before for name in checkpoints_in(store)):
        assert time.monotonic() < end and all(process.is_alive() for process in group)
        time.sleep(0.005)


def check(seen: list[dict[int, str]], ranks: int) -> None:
    """Every checkpoint holds exactly what the undisturbed run had at its step, and none is ever lost."""
    last = max(step for found in seen for step in found)
    if ranks == 1:
        expected = undisturbed(last)
        for found in seen:
            assert all(expected[step] == digest for step, digest in found.items())
    newest = [max(found, default=0) for found in seen]
    assert newest == sorted(newest) and newest[-1] > 0
    steps: dict[int, set[str]] = {}
    for found in seen:
        for step, digest in found.items():
            steps.setdefault(step, set()).add(digest)
    assert all(len(digests) == 1 for digests in steps.values())


def test_killed_while_saving(tmp_path: Path) -> None:
    store = Store.at(str(tmp_path / "checkpoints"))
    check(killed_runs(store, tmp_path, ranks=1, kills=8, seed=0, longest=0.4), ranks=1)


@pytest.mark.slow
def test_thirty_kills_of_two_ranks_while_saving_to_object_storage(
    tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    config = S3Config(s3_server.endpoint, s3_server.region, s3_server.access_key, s3_server.secret_key)
    store = Store.at(s3_server.url("killed/checkpoints"), config)
    check(killed_runs(store, tmp_path, ranks=2, kills=30, seed=1, longest=1.0), ranks=2)
