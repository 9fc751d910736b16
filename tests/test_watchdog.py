"""A step that never ends: told with its stacks, and ended. Really, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import pytest

from unimrg.watchdog import HUNG, Watchdog


def run(program: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    code = "import sys, time\nfrom unimrg.watchdog import Watchdog\n" + textwrap.dedent(program)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)


def test_a_step_that_never_ends_is_told_and_ended() -> None:
    done = run("""
        dog = Watchdog(0.5, lambda what: print(what, flush=True))
        def stuck_in_a_collective():
            time.sleep(60)
        dog.alive()
        stuck_in_a_collective()
    """)
    assert done.returncode == HUNG
    assert "no step has ended for" in done.stdout and "in stuck_in_a_collective" in done.stdout


def test_a_process_that_lets_no_thread_run_is_ended_too() -> None:
    """A native call that keeps the interpreter locked: the stacks are on stderr."""
    done = run("""
        import ctypes
        dog = Watchdog(0.5, lambda what: print(what, flush=True))
        dog.alive()
        ctypes.PyDLL(None).sleep(60)
    """)
    assert done.returncode and "Timeout" in done.stderr and 'File "<string>"' in done.stderr


def test_who_works_or_waits_for_data_is_left_alone() -> None:
    told: list[str] = []
    dog = Watchdog(0.4, told.append, end=lambda status: told.append(str(status)))

    def slow_data() -> Iterator[int]:
        for number in range(2):
            time.sleep(0.9)
            yield number

    for _ in dog.resting(slow_data()):
        for _ in range(3):
            time.sleep(0.2)
            dog.alive()
    time.sleep(0.9)  # the data has ended
    dog.close()
    assert not told


@pytest.mark.parametrize("seconds", [0, 0.2])
def test_zero_is_never(seconds: float) -> None:
    told: list[str] = []
    dog = Watchdog(seconds, told.append, end=lambda status: told.append(str(status)))
    dog._awake = True
    time.sleep(0.6)
    dog.close()
    assert bool(told) == bool(seconds)
