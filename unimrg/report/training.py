"""What happened while training: losses, speed, skipped samples, faults."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import Any

from unimrg.report.charts import WIDTH, Trace, line_chart
from unimrg.report.folder import Run
from unimrg.report.markup import (
    DASH,
    Child,
    Html,
    count,
    el,
    folded,
    number,
    percent,
    plural,
    seconds_of,
    section,
    short,
    table,
    when,
)
from unimrg.sample import Task

_SMALL = 380  # width of the charts that stand three in a row
ROWS = 20  # of a list shown before the rest is folded away
_RESTARTS = ("resume", "worker-failure")


@dataclass(frozen=True)
class _Plot:
    """One chart: the metric, its title, and how it is drawn. scale: factor on the stored values."""

    name: str
    title: str
    colour: str = "plain"
    floor: float | None = None
    ceiling: float | None = None
    width: int = WIDTH
    scale: float = 1.0


_LOSSES = tuple(_Plot(f"loss/{task.value}", task.value.capitalize(), task.value) for task in Task)
_OPTIMISER = (
    _Plot("loss/total", "Weighted total", width=_SMALL),
    _Plot("grad_norm", "Gradient norm", width=_SMALL),
    _Plot("learning_rate", "Learning rate", floor=0.0, width=_SMALL),
)
_SPEED = (
    _Plot("samples_per_second", "Samples per second, all workers", floor=0.0),
    _Plot("data_wait_share", "Share of time waiting for data, %", floor=0.0, ceiling=100.0, scale=100.0),
)


def restart_steps(run: Run) -> list[float]:
    """Steps at which the run failed or went on."""
    steps = {number(event.get("step")) for event in run.events if event.get("event") in _RESTARTS}
    return sorted(step for step in steps if step is not None)


def losses(run: Run) -> Html:
    """Four small charts, one for each task, and below them what the optimiser saw."""
    if not run.metrics:
        return section("Losses", el("p", "No step was recorded.", class_="empty"))
    note = (
        "Loss of each task over optimiser steps, before weights. Faint: every step; strong, and in figures: "
        "moving mean over a twentieth of them. Triangles: single values beyond the axis."
    )
    if restart_steps(run):
        note += " Dotted lines: a worker failed or the run was resumed."
    return section(
        "Losses",
        el("div", [_card(run, plot) for plot in _LOSSES], class_="charts"),
        el("div", [_card(run, plot) for plot in _OPTIMISER], class_="charts three"),
        note=note,
        id_="losses",
    )


def speed(run: Run) -> Html:
    """Throughput and the share of time spent waiting for data."""
    if not run.metrics:
        return section("Speed", el("p", "No step was recorded.", class_="empty"))
    return section(
        "Speed",
        el("div", [_card(run, plot) for plot in _SPEED], class_="charts"),
        note=_speed_note(run),
        id_="speed",
    )


def _speed_note(run: Run) -> str:
    parts = []
    for name, text in (
        ("samples_per_second", "samples/s"),
        ("tokens_per_second", "tokens/s"),
        ("step_seconds", "s per step"),
        ("model_tflops", "TFLOP/s per worker"),
    ):
        if (middle := median(run, name)) is not None:
            parts.append(f"{short(middle)} {text}")
    if (used := median(run, "mfu")) is not None:
        parts.append(f"{percent(used)} of what its device can do")
    if (waiting := median(run, "data_wait_share")) is not None:
        parts.append(f"{percent(waiting)} of the time waiting for data")
    return f"Medians: {', '.join(parts)}." if parts else "No speed was recorded."


def trace(run: Run, name: str, scale: float = 1.0) -> Trace:
    """The course of one metric over the run's steps."""
    values = [None if value is None else scale * value for value in run.column(name)]
    # A schedule is exact; smoothing would only bend it.
    return Trace.of([float(record["step"]) for record in run.metrics], values, name != "learning_rate")


def median(run: Run, name: str) -> float | None:
    """Middle value over all steps, None if there is no finite one."""
    values = trace(run, name).values
    return float(statistics.median(values.tolist())) if len(values) else None


def _card(run: Run, plot: _Plot) -> Html:
    course = trace(run, plot.name, plot.scale)
    ends = [course.start, course.end] if len(course.values) > 1 else [course.end] * len(course.values)
    change = el("b", " \u2192 ".join(short(end) for end in ends)) if ends else None
    heading = el("h3", el("span", class_=f"key {plot.colour}"), plot.title, change)
    if not len(course.values) and not len(course.broken):
        return el("figure", heading, el("p", "Not recorded in this run.", class_="empty"), class_="card")
    chart = line_chart(
        course,
        plot.title,
        colour=plot.colour,
        floor=plot.floor,
        ceiling=plot.ceiling,
        marks=restart_steps(run),
        width=plot.width,
    )
    return el("figure", heading, chart, _remark(course, len(run.metrics)), class_="card")


def _remark(course: Trace, steps: int) -> Html | None:
    """What the curve can't show: steps without the task, and values that were not finite."""
    parts = []
    measured = len(course.values) + len(course.broken)
    if 0 < measured < steps:
        parts.append(f"present in {count(measured)} of {plural(steps, 'step')}")
    if len(course.broken):
        first = f"first at step {count(course.broken[0])}"
        parts.append(f"\u00d7 NaN, infinite or beyond 1e100 in {plural(len(course.broken), 'step')}, {first}")
    return el("figcaption", "; ".join(parts) + ".") if parts else None


def skipped(run: Run) -> Html:
    """Skipped samples by reason, with a few of each."""
    reasons = run.skipped
    if not reasons:
        return section("Skipped samples", el("p", "None was recorded.", class_="empty"), id_="skipped")
    largest = max(reasons.values())
    rows: list[list[Child]] = []
    for reason, amount in reasons.items():
        bar = el("span", class_="bar", style=f"width:{100 * amount / largest:.1f}%")
        rows.append([el("code", reason), count(amount), bar, _examples(run, reason)])
    note = f"{plural(sum(reasons.values()), 'unusable sample')} left out, never replaced by another."
    return section(
        "Skipped samples", table(["Reason", "Count", "Share", "Examples"], rows), note=note, id_="skipped"
    )


def _examples(run: Run, reason: str) -> list[Child]:
    rows = [row for row in run.quarantine if str(row.get("reason")) == reason][:3]
    if not rows:
        return [DASH]
    return [el("div", el("code", str(row.get("id", DASH))), f" {_text(row.get('detail'))}") for row in rows]


def events(run: Run) -> Html:
    """Starts, faults and checkpoints in the order they happened."""
    if not run.events:
        return section("Events", el("p", "None was recorded.", class_="empty"), id_="events")
    head = ["Time (UTC)", "Step", "Event", "Detail"]
    rows: list[list[Child]] = [
        [
            when(event.get("timestamp")),
            DASH if (step := number(event.get("step"))) is None else count(step),
            el(
                "span",
                _text(event.get("event")),
                class_="event failed" if "fail" in str(event.get("event")) else "event",
            ),
            _text(event.get("detail")),
        ]
        for event in run.events
    ]
    rest = (
        folded(f"{plural(len(rows) - ROWS, 'more event')}", table(head, rows[ROWS:]))
        if len(rows) > ROWS
        else None
    )
    return section("Events", table(head, rows[:ROWS]), rest, id_="events")


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def duration(run: Run) -> float | None:
    """Seconds from the first to the last time stamp of records and events, pauses included."""
    stamps = [seconds_of(row.get("timestamp")) for row in (*run.events, *run.metrics)]
    known = [stamp for stamp in stamps if stamp is not None]
    return max(known) - min(known) if len(known) > 1 else None
