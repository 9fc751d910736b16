"""One actor on the driver's node that keeps what a run tells: metrics, events, skipped samples.

It outlives the training workers, so a restart loses nothing: records of steps that are done again are
dropped, and a skipped sample is written once, whoever meets it how often.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import ray

from cluster.session import on_this_node
from unimrg.metrics import JsonlSink, PrometheusTextSink, read_jsonl
from unimrg.storage import RETRY_REASONS

COUNTED = {
    "skipped-step": "skipped_steps",
    "spike": "loss_spikes",
    "rollback": "rollbacks",
    "resume": "restarts",
    "hang": "hangs",
}
"""Events that are metrics too, and their names there."""


class Verdict(NamedTuple):
    """stop: why training should give up, or "". pause: should it save and end?"""

    stop: str = ""
    pause: bool = False


class Monitor:
    """Writes metrics.jsonl, events.jsonl, quarantine.jsonl and metrics.prom of a run folder."""

    def __init__(self, folder: str, command: str, max_bad_share: float, min_checked: int) -> None:
        self.folder = Path(folder)
        self.command = command
        self.max_bad_share = max_bad_share
        self.min_checked = min_checked
        self.metrics = JsonlSink(self.folder / "metrics.jsonl")
        self.textfile = PrometheusTextSink(self.folder / "metrics.prom")
        self.events = JsonlSink(self.folder / "events.jsonl")
        self.quarantine = JsonlSink(self.folder / "quarantine.jsonl")
        self.bad: dict[int, str] = {
            row["position"]: row["reason"] for row in read_jsonl(self.folder / "quarantine.jsonl")
        }
        self.checked: set[tuple[int, int]] = set()
        self.counts: Counter[str] = Counter(row["event"] for row in read_jsonl(self.folder / "events.jsonl"))
        self.paused = False
        self.latest: dict[str, Any] = {}
        self.step = 0
        self.retries: Counter[str] = Counter(dict.fromkeys(RETRY_REASONS, 0))
        self.labelled_rows: Counter[str] = Counter()

    def write(self, record: dict[str, Any]) -> Verdict:
        """Store a step's record; returns what training should do."""
        self.latest = record | self.skipped() | self.data()
        self.step = int(record["step"])
        self.metrics.write(self.latest)
        self.textfile.write(self.latest)
        return Verdict(self.verdict(), self.paused)

    def pause(self, why: str) -> None:
        """Have training save and end before its last step."""
        if not self.paused:
            self.paused = True
            self.event("pause", why)

    def event(self, event: str, detail: Any = "", step: int | None = None) -> None:
        """Store a fault, a restart, a checkpoint."""
        self.counts[event] += 1
        at = self.step if step is None else step
        self.events.write({"timestamp": time.time(), "step": at, "event": event, "detail": detail})

    def start(self, step: int, pids: list[int]) -> None:
        """Worker processes `pids` begin after `step` optimiser steps; later records will come again."""
        self.metrics.truncate_from(step + 1)
        detail = {"pids": pids, "command": self.command}
        self.event("resume" if self.counts["start"] else "start", detail, step)

    def go_back(self, step: int, detail: str) -> None:
        """Training goes on behind `step`, an earlier one; the records after it will come again."""
        self.metrics.truncate_from(step + 1)
        self.event("rollback", detail, step)

    def audit(self, first: int, stop: int, bad: list[dict[str, Any]]) -> None:
        """Positions first..stop-1 were prepared; `bad` of them are quarantined."""
        self.checked.add((first, stop))
        for row in bad:
            if row["position"] not in self.bad:
                self.bad[row["position"]] = row["reason"]
                self.quarantine.write(row)

    def skipped(self) -> dict[str, int]:
        """Counts for the metrics: `skipped` and `skipped/<reason>`."""
        reasons = Counter(self.bad.values())
        return {"skipped": len(self.bad)} | {f"skipped/{reason}": n for reason, n in reasons.items()}

    def labelled(self, rows: int, kind: str) -> None:
        """A part of the label store was written; kind: labels or codes."""
        self.labelled_rows[kind] += rows

    def retried(self, retries: dict[str, int]) -> None:
        """A process of the run made so many storage requests again, by reason."""
        self.retries.update(retries)

    def data(self) -> dict[str, int]:
        """Counts for the metrics: storage requests made again, rows labelled and encoded, events."""
        counts = {f"retries/{reason}": n for reason, n in self.retries.items()}
        counts |= {f"labelled/{kind}": n for kind, n in self.labelled_rows.items()}
        return counts | {name: self.counts[event] for event, name in COUNTED.items()}

    def verdict(self) -> str:
        """Why the run should stop, or ""."""
        checked = sum(stop - first for first, stop in self.checked)
        if checked < self.min_checked or len(self.bad) <= self.max_bad_share * checked:
            return ""
        worst, count = Counter(self.bad.values()).most_common(1)[0]
        return (
            f"{len(self.bad)} of {checked} samples are unusable, mostly {worst} ({count}); see "
            f"{self.folder / 'quarantine.jsonl'}, mend the data or raise "
            f"data.max_bad_share ({self.max_bad_share:g})"
        )

    def snapshot(self) -> dict[str, Any]:
        """The latest record, for the progress display."""
        return self.latest


def start_monitor(folder: Path, command: str, max_bad_share: float, min_checked: int) -> Any:
    """A handle to a new monitor on this node."""
    actor = ray.remote(Monitor).options(num_cpus=0, scheduling_strategy=on_this_node())
    return actor.remote(str(folder), command, max_bad_share, min_checked)
