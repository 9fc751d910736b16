"""A step that never ends is told, with what every thread was doing, and then ended with its process.

Waiting for data is no step: whoever makes the data knows better whether it is late.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

HUNG = 86
"""Exit status of a process that its watchdog ended."""


class Watchdog:
    """Ends this process when nobody has called `alive` for `seconds` while it was awake; 0 = never.

    tell: is given the stacks of all threads before. Where not even a thread of Python gets to run (a native
    call that keeps the interpreter locked), the stacks go to stderr half as long again later.
    """

    def __init__(self, seconds: float, tell: Callable[[str], None], end: Callable[[int], None] = os._exit):
        self._seconds, self._tell, self._end = seconds, tell, end
        self._heard = time.monotonic()
        self._awake = False
        self._worker = threading.get_ident()
        self._closed = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def alive(self) -> None:
        """Something was done."""
        self._awake, self._heard, self._worker = True, time.monotonic(), threading.get_ident()
        if self._seconds:
            faulthandler.dump_traceback_later(1.5 * self._seconds, exit=True)

    def rest(self) -> None:
        """Nothing is expected until the next `alive`."""
        self._awake = False
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        self.rest()
        self._closed.set()

    def resting(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; waiting for each is rest."""
        source = iter(items)
        while True:
            self.rest()
            try:
                item = next(source)
            except StopIteration:
                return
            self.alive()
            yield item

    def _watch(self) -> None:
        while not self._closed.wait(min(self._seconds / 4, 5.0)):
            silent = time.monotonic() - self._heard
            if self._awake and silent > self._seconds:
                self._tell(f"no step has ended for {silent:.0f} s\n{stacks(self._worker)}")
                self._end(HUNG)
                return


def stacks(last: int) -> str:
    """What every thread of this process is doing, the innermost call last; thread `last` at the end."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] == last)
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames
    )
