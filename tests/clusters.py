"""`python -m cluster.local` as a user starts and ends it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster.local import State

ROOT = Path(__file__).parents[1]
LIMIT = 500.0


def until(true: Callable[[], Any], what: str) -> Any:
    """The first value that isn't false."""
    end = time.monotonic() + LIMIT
    while not (value := true()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.2)
    return value


@contextlib.contextmanager
def started(logs: Path, nodes: int, environment: dict[str, str] | None = None) -> Iterator[State]:
    """A cluster in a folder with a short name, since sockets lie below it; ended by its own command."""
    folder = Path(tempfile.mkdtemp(prefix="u", dir="/tmp"))
    command = [sys.executable, "-m", "cluster.local", f"--folder={folder}"]
    log = logs / "log"
    with log.open("w") as output:
        owner = subprocess.Popen(
            [*command, f"--nodes={nodes}"],
            cwd=ROOT,
            env=os.environ | (environment or {}),
            stdout=output,
            stderr=output,
        )
    try:
        until(lambda: "takes it down" in log.read_text() or owner.poll() is not None, "the cluster")
        assert owner.poll() is None, log.read_text()
        state = State.read(folder)
        assert state is not None
        yield state
        stopped = subprocess.run([*command, "--stop"], cwd=ROOT, capture_output=True, text=True)
        assert stopped.returncode == 0 and owner.wait(30) == 0, stopped.stdout + stopped.stderr
        assert state.running() == []
    finally:
        subprocess.run([*command, "--stop"], cwd=ROOT, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)
