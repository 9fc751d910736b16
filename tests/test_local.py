"""`python -m cluster.local` without Ray: what it keeps in mind, and that it ends nothing but its own.

With Ray: tests/test_submit.py and tests/test_tls.py.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import STATE, Process, State, local_cluster, main, make_token, stop
from unimrg.errors import UnimrgError


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """In the place of an owner, two processes of its nodes, and a stranger."""
    started = [subprocess.Popen(["sleep", "60"]) for _ in range(4)]
    yield started
    for process in started:
        process.kill()
        process.wait()


def state_of(sleepers: list[subprocess.Popen[bytes]]) -> State:
    owner, *nodes = (Process.of(process.pid) for process in sleepers[:3])
    return State("http://127.0.0.1:1", "127.0.0.1:2", "/token", owner, [[node] for node in nodes])


def test_a_state_is_read_as_it_was_written(sleepers: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    assert State.read(tmp_path) is None
    state = state_of(sleepers)
    state.write(tmp_path)
    assert State.read(tmp_path) == state
    assert [process.pid for process in state.running()] == [process.pid for process in sleepers[:3]]


def test_a_later_process_of_the_same_number_isn_t_it(sleepers: list[subprocess.Popen[bytes]]) -> None:
    here = Process.of(sleepers[0].pid)
    assert here.find() is not None
    assert dataclasses.replace(here, started=here.started - 1).find() is None
    sleepers[0].kill()
    sleepers[0].wait()
    assert here.find() is None


@pytest.mark.parametrize("owner_lives", [True, False])
def test_stopping_ends_what_was_started_and_nothing_else(
    sleepers: list[subprocess.Popen[bytes]], tmp_path: Path, owner_lives: bool
) -> None:
    state_of(sleepers).write(tmp_path)
    if not owner_lives:  # killed, so that it couldn't clean up
        sleepers[0].kill()
        sleepers[0].wait()
    assert stop(tmp_path, patience=5)
    assert all(process.wait(5) is not None for process in sleepers[:3])
    assert sleepers[3].poll() is None
    assert not (tmp_path / STATE).exists() and not stop(tmp_path)


def test_one_cluster_a_folder(sleepers: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    state_of(sleepers).write(tmp_path)
    with pytest.raises(UnimrgError, match="already; end it first"), local_cluster(tmp_path, 2, 1):
        pass
    assert sleepers[0].poll() is None


def test_a_token_is_fresh_and_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        first = make_token(tmp_path).read_text()
        path = make_token(tmp_path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_text()) == 64 and path.read_text() != first


def test_words_that_make_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--nodes=1"])
    assert ended.value.code == 2 and "2 or more" in capsys.readouterr().err
    assert main(["--stop", f"--folder={tmp_path}"]) == 1
    assert "no cluster runs" in capsys.readouterr().out
