"""What is measured of every step: the list of names, the file that stores them, and the timing arithmetic.

A value of None means "not measured in this step" (the task was not in the batch); NaN and infinity mean
"measured, and it was bad" and are kept as such. What Prometheus is shown is in `unimrg/figures.py`.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimrg.errors import StorageError
from unimrg.sample import Task

SKIPPED = "skipped/"  # followed by a reason from SampleError.REASONS


@dataclass(frozen=True)
class Metric:
    """One measured value of a step: its key in a record, its unit, and what it is."""

    name: str
    unit: str
    description: str


METRICS: tuple[Metric, ...] = (
    Metric("step", "steps", "optimiser steps done"),
    Metric("position", "samples", "place in the order of samples; a resumed run goes on from here"),
    *(
        Metric(
            f"loss/{task.value}",
            "nats" if task is Task.UNDERSTANDING else "the family's image loss",
            f"mean loss of the {task.value} task over the global batch, before weights",
        )
        for task in Task
    ),
    Metric("loss/total", "weighted mean", "the loss that is trained: weighted mean over tasks present"),
    *(
        Metric(f"weight/{task.value}", "weight", f"weight of the {task.value} task, where weights move")
        for task in Task
    ),
    Metric("grad_norm", "l2 norm", "norm of all gradients before clipping"),
    Metric("learning_rate", "per step", "learning rate of the step"),
    Metric("samples", "samples", "samples of all workers in the step"),
    Metric("tokens", "tokens", "tokens of all workers in the step"),
    Metric("model_flops", "FLOP", "matrix multiplications of the model in the step, on all workers"),
    Metric("samples_per_second", "samples/s", "samples of all workers per second of wall time"),
    Metric("tokens_per_second", "tokens/s", "tokens of all workers per second of wall time"),
    Metric("step_seconds", "s", "duration of the step, waiting for data included"),
    Metric("data_wait_seconds", "s", "part of the step that rank 0 waited for a batch"),
    Metric("data_wait_share", "0..1", "part of the wall time spent waiting for a batch"),
    Metric("checkpoint_seconds", "s", "time for which training stood still to save the last checkpoint"),
    Metric("checkpoint_step", "steps", "optimiser steps in the last checkpoint"),
    Metric("skipped_steps", "steps", "updates left out because loss or gradient was not finite"),
    Metric("loss_spikes", "steps", "steps whose loss jumped"),
    Metric("rollbacks", "times", "returns to an earlier checkpoint"),
    Metric("restarts", "times", "times that training was taken up again"),
    Metric("hangs", "times", "workers ended because a step took too long"),
    Metric("workers", "processes", "training processes"),
    Metric(
        "model_tflops",
        "TFLOP/s per worker",
        "matrix multiplications of the model per second of wall time, none counted twice if recomputed",
    ),
    Metric("mfu", "0..1", "model_tflops as a part of what the worker's device could do at best"),
    Metric(
        "peak_memory_bytes",
        "bytes",
        "most that a worker has needed so far: on its GPU, or of its process without one",
    ),
    Metric("skipped", "samples", "unusable samples so far"),
    Metric("time_left_seconds", "s", "expected time until the last step"),
    Metric("timestamp", "s since 1970", "when the step ended"),
)

_BY_NAME = {metric.name: metric for metric in METRICS}


def metric(name: str) -> Metric | None:
    """The metric of that record key, `skipped/<reason>` included; None if there is none of that name."""
    if name.startswith(SKIPPED):
        return Metric(name, "samples", f"samples skipped so far: {name.removeprefix(SKIPPED)}")
    return _BY_NAME.get(name)


# --- JSON lines ---------------------------------------------------------------------------------------------

# JSON has no word for these; strings as in the JSON mapping of protocol buffers, restored by `read_jsonl`.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _plain(value: Any) -> Any:
    """Value as strict JSON: numpy and torch scalars become numbers, floats not finite become words."""
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _restored(record: dict[str, Any]) -> dict[str, Any]:
    for name, value in record.items():
        if isinstance(value, str) and value in _NOT_FINITE and metric(name) is not None:
            record[name] = _NOT_FINITE[value]
    return record


def parse_jsonl(text: str) -> tuple[list[dict[str, Any]], list[int]]:
    """Records of a JSON-lines text, and the numbers (from 1) of the lines that hold no JSON object."""
    records: list[dict[str, Any]] = []
    bad: list[int] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(_restored(record))
        else:
            bad.append(number)
    return records, bad


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """All records of a file; [] if there is none. A last line torn by a crash is left out.

    A bad line anywhere else is damage that must not pass unseen: StorageError.
    """
    path = Path(path)
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    records, bad = parse_jsonl(text)
    torn = text.count("\n") + 1 if text and not text.endswith("\n") else 0
    if damaged := [number for number in bad if number != torn]:
        raise StorageError(f"{path}: line {damaged[0]} is not a JSON object; mend or delete the line")
    return records


class JsonlSink:
    """One JSON object per line of a local file; each line is one write, so readers see whole lines."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_torn_tail()
        self._file = self.path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        line = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n"
        self._file.write(line.encode("utf-8", "replace"))

    def truncate_from(self, step: int) -> int:
        """Drop the records with `step` or more (a resumed run writes them again); says how many."""
        records = read_jsonl(self.path)
        kept = [record for record in records if "step" not in record or record["step"] < step]
        if len(kept) == len(records):
            return 0
        self._file.close()
        lines = (json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n" for record in kept)
        temporary = self.path.with_name(self.path.name + ".part")
        temporary.write_bytes("".join(lines).encode("utf-8", "replace"))
        os.replace(temporary, self.path)
        self._file = self.path.open("ab", buffering=0)
        return len(records) - len(kept)

    def close(self) -> None:
        self._file.close()

    def _drop_torn_tail(self) -> None:
        """Cut what a crash left behind the last newline; the next record would otherwise be glued to it."""
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)


# --- timing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Timed:
    started: float
    waited: float
    ended: float
    samples: int
    tokens: int
    flops: float


class Meter:
    """Speed, waiting share and time left over the last `window` steps.

    workers: among which FLOPs are divided. peak: what a worker's device could do at best, FLOP/s; None where
    that is unknown, and then there is no `mfu`.

    Times are values of `time.perf_counter()` in seconds, read by the caller; nothing here looks at a clock.
    The window's wall time runs from its first start to its last end, so pauses between steps (checkpoints,
    evaluation) count too.
    """

    def __init__(
        self,
        total_steps: int | None = None,
        window: int = 50,
        workers: int = 1,
        peak: float | None = None,
    ) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1 step, not {window}")
        self.total_steps = total_steps
        self.workers, self.peak = workers, peak
        self._steps: deque[_Timed] = deque(maxlen=window)

    def step(
        self,
        step: int,
        *,
        started: float,
        ready: float,
        ended: float,
        samples: int,
        tokens: int = 0,
        flops: float = 0.0,
    ) -> dict[str, float | None]:
        """Values for the record of the step just done.

        step: optimiser steps done, this one included. started: the batch was asked for; ready: it was there;
        ended: the update was done. samples, tokens, flops: of all workers in this step.
        """
        self._steps.append(_Timed(started, ready - started, ended, samples, tokens, flops))
        wall = ended - self._steps[0].started
        speed = _ratio(sum(s.flops for s in self._steps) / self.workers, wall)
        left = None if self.total_steps is None else max(0, self.total_steps - step)
        return {
            "samples_per_second": _ratio(sum(s.samples for s in self._steps), wall),
            "tokens_per_second": _ratio(sum(s.tokens for s in self._steps), wall),
            "model_tflops": None if speed is None else speed / 1e12,
            "mfu": None if speed is None or self.peak is None else speed / self.peak,
            "samples": samples,
            "tokens": tokens,
            "model_flops": flops,
            "step_seconds": ended - started,
            "data_wait_seconds": ready - started,
            "data_wait_share": _ratio(sum(s.waited for s in self._steps), wall),
            "time_left_seconds": None if left is None else left * wall / len(self._steps),
        }


def _ratio(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds > 0 else None
