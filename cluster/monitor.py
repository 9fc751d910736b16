"""One actor on the driver's node that keeps what a run tells: metrics, events, skipped samples.

It outlives the training workers, so a restart loses nothing: records of steps that are done again are
dropped, and a skipped sample is written once, whoever meets it how often. With every checkpoint its files are
copied to the run's storage, where a run that goes on elsewhere finds them. It also counts, from its own start
on, for Prometheus (`unimrg.figures`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ray

from cluster.exporter import Outlet
from cluster.session import on_this_node
from unimrg.figures import Figures
from unimrg.metrics import JsonlSink, parse_jsonl, read_jsonl
from unimrg.storage import RETRY_REASONS, Store

TOLD = ("metrics.jsonl", "events.jsonl", "quarantine.jsonl")
_, EVENTS, QUARANTINE = TOLD
"""Its files in the run's folder."""

COUNTED = {
    "skipped-step": "skipped_steps",
    "spike": "loss_spikes",
    "rollback": "rollbacks",
    "resume": "restarts",
    "hang": "hangs",
}
"""Events that are metrics too, and their names there."""

FIGURES_OF_EVENTS = {
    "skipped-step": "unimrg_skipped_steps_total",
    "spike": "unimrg_loss_spikes_total",
    "rollback": "unimrg_rollbacks_total",
    "hang": "unimrg_hangs_total",
    "preemption": "unimrg_preemption_notices_total",
    "warning": "unimrg_warnings_total",
    "failure": "unimrg_failures_total",
    "checkpoint": "unimrg_checkpoints_total",
}
"""Events that Prometheus is shown, and the counters that they raise."""


@dataclass(frozen=True)
class Show:
    """How Prometheus is shown a run. name: in the label `run`; steps: planned; weights: of the tasks."""

    name: str
    outlet: Outlet = field(default_factory=Outlet)
    steps: int = 0
    weights: dict[str, float] = field(default_factory=dict)


class Verdict(NamedTuple):
    """stop: why training should give up, or "". pause: should it save and end?"""

    stop: str = ""
    pause: bool = False


class Monitor:
    """Writes metrics.jsonl, events.jsonl, quarantine.jsonl and metrics.prom of a run folder."""

    def __init__(
        self, folder: str, command: str, max_bad_share: float, min_checked: int, show: Show | None = None
    ) -> None:
        self.folder = Path(folder)
        self.shown = show or Show(self.folder.name)
        self.figures = Figures(self.shown.name)
        self.command = command
        self.max_bad_share = max_bad_share
        self.min_checked = min_checked
        self.metrics, self.events, self.quarantine = (JsonlSink(self.folder / name) for name in TOLD)
        self.bad: dict[int, str] = {
            row["position"]: row["reason"] for row in read_jsonl(self.folder / QUARANTINE)
        }
        self.checked: set[tuple[int, int]] = set()
        self.counts: Counter[str] = Counter(row["event"] for row in read_jsonl(self.folder / EVENTS))
        self.paused = False
        self.latest: dict[str, Any] = {}
        self.step = 0
        self.retries: Counter[str] = Counter(dict.fromkeys(RETRY_REASONS, 0))
        self.labelled_rows: Counter[str] = Counter()
        self.farthest = 0
        self.workers = 0
        self.cause = ""
        for task, weight in self.shown.weights.items():
            self.figures.set("unimrg_task_weight", weight, task)
        if self.shown.steps:
            self.figures.set("unimrg_planned_steps", self.shown.steps)
        self._show()

    def write(self, record: dict[str, Any]) -> Verdict:
        """Store a step's record; returns what training should do."""
        self.latest = record | self.skipped() | self.data()
        self.step = int(record["step"])
        self.metrics.write(self.latest)
        self._count(self.latest)
        self.figures.write_text(self.folder / "metrics.prom")
        return Verdict(self.verdict(), self.paused)

    def _count(self, record: dict[str, Any]) -> None:
        """A step's part of the figures."""
        finite = self.figures.take(record)
        self.figures.add("unimrg_steps_total")
        if not finite:
            self.figures.add("unimrg_nonfinite_steps_total")
        elif self.step > self.farthest:
            busy = (record.get("step_seconds") or 0.0) - (record.get("data_wait_seconds") or 0.0)
            self.figures.add("unimrg_productive_seconds_total", busy)
        self.farthest = max(self.farthest, self.step)
        self._show()

    def _show(self) -> None:
        self.shown.outlet.show(self.shown.name, self.figures.collect())

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
        if event in FIGURES_OF_EVENTS:
            self.figures.add(FIGURES_OF_EVENTS[event])
        if event in ("hang", "preemption"):
            self.cause = event
        self._show()

    def start(self, step: int, pids: list[int]) -> None:
        """Worker processes `pids` begin after `step` optimiser steps; later records will come again."""
        self.metrics.truncate_from(step + 1)
        detail = {"pids": pids, "command": self.command}
        if self.workers:
            resized = "resize" if len(pids) > self.workers else ""
            self.figures.add("unimrg_restarts_total", label=self.cause or resized or "failure")
        else:
            if self.counts["start"]:
                self.figures.add("unimrg_restarts_total", label="command")
            self.figures.set("unimrg_checkpoint_timestamp_seconds", time.time())
            self.farthest = step
        self.workers, self.cause = len(pids), ""
        self.event("resume" if self.counts["start"] else "start", detail, step)

    def checkpoint(self, name: str, step: int, stalled: float, seconds: float) -> None:
        """A checkpoint is complete; training stood still for `stalled` of the `seconds` it took."""
        self.figures.set("unimrg_checkpoint_step", step)
        self.figures.set("unimrg_checkpoint_timestamp_seconds", time.time())
        self.figures.observe("unimrg_checkpoint_stall_seconds", stalled)
        self.figures.observe("unimrg_checkpoint_write_seconds", seconds)
        self.event("checkpoint", name, step)

    def go_back(self, step: int, detail: str) -> None:
        """Training goes on behind `step`, an earlier one; the records after it will come again."""
        self.metrics.truncate_from(step + 1)
        self.event("rollback", detail, step)

    def audit(self, first: int, stop: int, bad: list[dict[str, Any]]) -> None:
        """Positions first..stop-1 were prepared; `bad` of them are quarantined."""
        if (first, stop) not in self.checked:
            self.checked.add((first, stop))
            self.figures.add("unimrg_checked_samples_total", stop - first)
        for row in bad:
            if row["position"] not in self.bad:
                self.bad[row["position"]] = row["reason"]
                self.quarantine.write(row)
                self.figures.add("unimrg_quarantined_samples_total", label=row["reason"])
        self._show()

    def skipped(self) -> dict[str, int]:
        """Counts for the metrics: `skipped` and `skipped/<reason>`."""
        reasons = Counter(self.bad.values())
        return {"skipped": len(self.bad)} | {f"skipped/{reason}": n for reason, n in reasons.items()}

    def labelled(self, rows: int, kind: str, reasons: dict[str, int] | None = None) -> None:
        """A part of the label store was written; kind: labels or codes; reasons: of its unusable rows."""
        self.labelled_rows[kind] += rows
        count_labelled(self.figures, rows, kind, reasons or {})
        self._show()

    def retried(self, retries: dict[str, int]) -> None:
        """A process of the run made so many storage requests again, by reason."""
        self.retries.update(retries)
        count_retries(self.figures, retries)

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
            f"{self.folder / QUARANTINE}, mend the data or raise "
            f"data.max_bad_share ({self.max_bad_share:g})"
        )

    def told(self, whole: bool) -> dict[str, bytes]:
        """Once this answers, all that was told before is on disk here. whole: answer with the files."""
        return {name: (self.folder / name).read_bytes() for name in TOLD} if whole else {}

    def snapshot(self) -> dict[str, Any]:
        """The latest record, for the progress display."""
        return self.latest


def count_labelled(figures: Figures, rows: int, kind: str, reasons: Mapping[str, int]) -> None:
    """A part of the label store was written, in figures."""
    figures.add("unimrg_labelled_rows_total", rows, kind)
    for reason, count in reasons.items():
        figures.add("unimrg_unlabelled_rows_total", count, reason)


def count_retries(figures: Figures, retries: Mapping[str, int]) -> None:
    """Storage requests made again, by reason, in figures."""
    for reason, count in retries.items():
        figures.add("unimrg_storage_retries_total", count, reason)


def fetch_told(store: Store, folder: Path) -> None:
    """Copy a monitor's files from a run's storage, where they say more than those in its local folder.

    They do when this machine hasn't had the run yet, or when another one has taken it further since.
    """
    if store.is_local or not store.exists(EVENTS):
        return
    events, _ = parse_jsonl(store.read_bytes(EVENTS).decode("utf-8", "replace"))
    here = read_jsonl(folder / EVENTS)
    if events and (not here or events[-1]["timestamp"] > here[-1]["timestamp"]):
        folder.mkdir(parents=True, exist_ok=True)
        for name in TOLD:
            (folder / name).write_bytes(store.read_bytes(name))


def start_monitor(
    folder: Path, command: str, max_bad_share: float, min_checked: int, show: Show | None = None
) -> Any:
    """A handle to a new monitor on this node. show: how Prometheus is shown the run; None = not at all."""
    actor = ray.remote(Monitor).options(num_cpus=0, scheduling_strategy=on_this_node())
    return actor.remote(str(folder), command, max_bad_share, min_checked, show)
