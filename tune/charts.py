"""Charts of a search as inline SVG: parallel coordinates, fronts, courses, shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tune.analysis import Importance
from unimrg.report.charts import Axis
from unimrg.report.markup import Child, Html, el, short

WIDTH, HEIGHT = 1080, 330
TOP, BOTTOM, SIDE = 34, 34, 70
OFF_ROOM = 34
"""Below a logarithmic axis, for what is switched off."""

SERIES = ("understanding", "segmentation", "depth", "pixel", "plain", "lost", "gain")
"""Colour classes of the page, one for each strategy."""


@dataclass(frozen=True)
class Column:
    """One axis of the parallel coordinates: a value of each trial, None where it has none."""

    title: str
    values: Sequence[float | None]
    log: bool = False


def parallel(columns: Sequence[Column], classes: Sequence[str], names: Sequence[str]) -> Html:
    """A line for each trial through its values; those drawn last lie on top.

    classes: `trial top`, `trial best` or `trial` of each. names: of each, shown when it is pointed at.
    """
    gap = (WIDTH - 2 * SIDE) / max(len(columns) - 1, 1)
    places = [SIDE + gap * number for number in range(len(columns))]
    axes = [_vertical(column) for column in columns]
    parts: list[Child] = []
    for column, axis, x in zip(columns, axes, places, strict=True):
        parts.append(el("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM, class_="zero"))
        # The last title may be long: it ends at the edge, lest it be cut off there.
        last = len(columns) > 1 and column is columns[-1]
        place, anchor = (WIDTH - 4, "end") if last else (x, "middle")
        parts.append(el("text", column.title, x=place, y=18, class_=f"value {anchor}"))
        for tick in _few(axis):
            parts.append(el("text", short(tick, 2, pad=False), x=x - 7, y=axis(tick) + 4, class_="tick end"))
        if any(value == 0 for value in column.values) and column.log:
            parts.append(el("text", "off", x=x - 7, y=HEIGHT - BOTTOM + 4, class_="tick end"))
    for number, (kind, name) in enumerate(zip(classes, names, strict=True)):
        points = [
            f"{x:g},{_height(axis, column, column.values[number]):g}"
            for column, axis, x in zip(columns, axes, places, strict=True)
            if column.values[number] is not None
        ]
        if len(points) > 1:
            parts.append(el("polyline", el("title", name), points=" ".join(points), class_=kind))
    spoken = f"{len(names)} trials over {', '.join(column.title for column in columns)}"
    return el("svg", parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=spoken)


def _vertical(column: Column) -> Axis:
    values = [value for value in column.values if value is not None and not (column.log and value <= 0)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:
        low, high = (low / 2, high * 2) if column.log else (low - 0.5, high + 0.5)
    off = OFF_ROOM if column.log and any(value == 0 for value in column.values) else 0
    return Axis(low, high, HEIGHT - BOTTOM - off, TOP, log=column.log)


def _height(axis: Axis, column: Column, value: float | None) -> float:
    return HEIGHT - BOTTOM if column.log and value == 0 else axis(value or 0.0)


def _few(axis: Axis) -> list[float]:
    """Both ends and, where there is room, round values between."""
    room = 0.12 * abs(axis.first - axis.last)
    inner = [t for t in axis.ticks(4) if abs(axis(t) - axis.first) > room and abs(axis(t) - axis.last) > room]
    return [axis.low, *inner, axis.high]


@dataclass(frozen=True)
class Series:
    """Points of one name. steps: held from point to point, as what is known is."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    strong: bool = True
    steps: bool = False


def courses(series: Sequence[Series], x_title: str, y_title: str, labels: bool = True) -> Html:
    """Lines over a common pair of axes, their names at the ends of the strong ones."""
    points = [point for one in series for point in one.points]
    if not points:
        return el("p", "Nothing was recorded yet.", class_="empty")
    x, y = _axes(points)
    parts = _frame(x, y, x_title, y_title)
    for one in series:
        line = _stairs(one.points) if one.steps else list(one.points)
        text = " ".join(f"{x(a):g},{y(b):g}" for a, b in line)
        parts.append(el("polyline", points=text, class_=f"{'smooth' if one.strong else 'raw'} {one.colour}"))
        if len(one.points) == 1:
            parts.append(_dot(x, y, one.points[0], one.colour, one.name))
    if labels:
        parts += _end_labels([one for one in series if one.strong and one.points], x, y)
    spoken = f"{y_title} over {x_title}: {', '.join(one.name for one in series if one.strong)}"
    return el("svg", parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=spoken)


def scatter(series: Sequence[Series], front: Sequence[tuple[float, float]], x: str, y: str) -> Html:
    """Points of each series, and the front as a line."""
    points = [point for one in series for point in one.points]
    if not points:
        return el("p", "No trial is finished.", class_="empty")
    across, up = _axes(points)
    parts = _frame(across, up, x, y)
    line = " ".join(f"{across(a):g},{up(b):g}" for a, b in sorted(front))
    parts.append(el("polyline", points=line, class_="smooth gain"))
    for one in series:
        parts += [_dot(across, up, point, one.colour, one.name) for point in one.points]
    return el("svg", parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{y} against {x}")


def shares(found: Sequence[Importance], titles: dict[str, str]) -> Html:
    """A bar's end and its interval for each key, on 0..100 %."""
    height = 30 + 34 * len(found)
    axis = Axis(0, 1, 190, WIDTH - 90)
    parts: list[Child] = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(el("line", x1=axis(tick), x2=axis(tick), y1=6, y2=height - 22, class_="grid"))
        words = f"{100 * tick:.0f}" + (" %" if tick == 1 else "")
        parts.append(el("text", words, x=axis(tick), y=height - 6, class_="tick middle"))
    for number, one in enumerate(found):
        y = 22 + 34 * number
        low, high = axis(max(one.interval.low, 0)), axis(one.interval.high)
        parts.append(el("text", titles.get(one.key, one.key), x=180, y=y + 5, class_="end"))
        parts.append(el("line", x1=low, x2=high, y1=y, y2=y, class_="whisker understanding"))
        parts.append(el("circle", cx=axis(one.share), cy=y, r=5, class_="dot understanding"))
        parts.append(el("text", f"{100 * one.share:.0f} %", x=WIDTH - 80, y=y + 5, class_="value"))
    spoken = "; ".join(f"{titles.get(one.key, one.key)} {100 * one.share:.0f} %" for one in found)
    return el("svg", parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=spoken)


def legend(names: Sequence[str]) -> Html:
    """What the colours of the strategies mean."""
    items = [
        el("span", el("span", class_=f"key {colour_of(names, name)}"), f" {name}", class_="series")
        for name in names
    ]
    return el("p", items, class_="note legend")


def colour_of(names: Sequence[str], name: str) -> str:
    """The colour class of a strategy; that of no strategy is `open`."""
    return SERIES[list(names).index(name) % len(SERIES)] if name in names else "open"


def _axes(points: Sequence[tuple[float, float]]) -> tuple[Axis, Axis]:
    xs, ys = [a for a, _ in points], [b for _, b in points]
    room = 0.06 * (max(ys) - min(ys)) or 0.05 * abs(max(ys)) or 1.0
    wide = 0.03 * (max(xs) - min(xs)) or 0.05 * abs(max(xs)) or 1.0
    x = Axis(min(xs) - wide, max(xs) + wide, SIDE, WIDTH - 120)
    return x, Axis(min(ys) - room, max(ys) + room, HEIGHT - BOTTOM, TOP)


def _frame(x: Axis, y: Axis, x_title: str, y_title: str) -> list[Child]:
    parts: list[Child] = [el("text", y_title, x=SIDE, y=16, class_="tick")]
    for tick in y.ticks():
        parts.append(el("line", x1=SIDE, x2=x.last, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(el("text", short(tick, pad=False), x=SIDE - 7, y=y(tick) + 4, class_="tick end"))
    for tick in x.ticks():
        parts.append(
            el("text", short(tick, 4, pad=False), x=x(tick), y=HEIGHT - BOTTOM + 18, class_="tick middle")
        )
    parts.append(el("text", x_title, x=x.last + 10, y=HEIGHT - BOTTOM + 18, class_="tick"))
    return parts


def _dot(x: Axis, y: Axis, point: tuple[float, float], colour: str, name: str) -> Html:
    return el(
        "g", el("title", name), el("circle", cx=x(point[0]), cy=y(point[1]), r=5, class_=f"dot {colour}")
    )


def _stairs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    line: list[tuple[float, float]] = []
    for a, b in points:
        if line:
            line.append((a, line[-1][1]))
        line.append((a, b))
    return line


def _end_labels(series: Sequence[Series], x: Axis, y: Axis) -> list[Child]:
    """Names beside the ends, moved apart where they would overlap."""
    parts: list[Child] = []
    last = -math.inf
    for one in sorted(series, key=lambda one: y(one.points[-1][1])):
        height = max(y(one.points[-1][1]) + 4, last + 15)
        last = height
        parts.append(el("text", one.name, x=x.last + 6, y=height, class_="value"))
        parts.append(_dot(x, y, one.points[-1], one.colour, one.name))
    return parts
