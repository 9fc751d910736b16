"""What the terminal shows while a run trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from unimrg.sample import Task

POLL_SECONDS = 0.5


class Progress:
    """Shows the latest record until closed. `every`: steps between two plain lines."""

    def __init__(self, latest: Callable[[], dict[str, Any]], steps: int, every: int) -> None:
        self._latest, self._steps, self._every = latest, steps, every
        self._bar = tqdm(total=steps, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None
        self._shown = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="progress")

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self._show()
        if self._bar is not None:
            self._bar.close()

    def _run(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            self._show()

    def _show(self) -> None:
        record = self._latest()
        step = int(record.get("step", 0))
        if not step or step == self._shown:
            return
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str(describe(record))
        elif step - self._shown >= self._every or step == self._steps or step < self._shown:
            print(f"step {step}/{self._steps}  {describe(record)}", flush=True)
        else:
            return
        self._shown = step


def describe(record: dict[str, Any]) -> str:
    """Losses of the four tasks, speed, time left and skipped samples in one line."""
    parts = [
        f"{task} {record[f'loss/{task}']:.3f}" for task in Task if record.get(f"loss/{task}") is not None
    ]
    if record.get("samples_per_second"):
        parts.append(f"{record['samples_per_second']:.1f} samples/s")
    if record.get("time_left_seconds") is not None:
        parts.append(f"{_clock(record['time_left_seconds'])} left")
    if record.get("skipped"):
        parts.append(f"{record['skipped']} skipped")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
