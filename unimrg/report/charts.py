"""Charts as inline SVG: a curve over steps, and intervals on a line.

Colours and fonts come from the page's style sheet by class, so that a chart follows light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unimrg.benchmarks.intervals import Interval
from unimrg.report.markup import Child, Html, el, percent, short

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 66, 24, 30
_BUCKETS = 300  # a raw curve of more points is drawn as the range of each bucket
_LOG_FROM = 30.0  # ratio of largest to smallest from which the axis is logarithmic


@dataclass(frozen=True)
class Trace:
    """A measured value over steps: finite points, their smoothed course, and the other steps."""

    steps: np.ndarray
    values: np.ndarray
    smooth: np.ndarray
    reach: int
    broken: np.ndarray

    @classmethod
    def of(cls, steps: Sequence[float], values: Sequence[float | None], smooth: bool = True) -> Trace:
        """None values (not measured in that step) are left out; NaN and infinity are kept apart."""
        pairs = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
        step = np.array([s for s, _ in pairs], np.float64)
        # Above this a sum of squares or an axis would overflow; it counts as broken.
        value = np.array([v for _, v in pairs], np.float64)
        good = np.isfinite(value) & (np.abs(value) < 1e100)
        reach = len(value[good]) // 40 if smooth else 0
        return cls(step[good], value[good], _moving_mean(value[good], reach), reach, step[~good])

    @property
    def start(self) -> float | None:
        """Mean of the first `reach` + 1 values."""
        return float(self.smooth[0]) if len(self.smooth) else None

    @property
    def end(self) -> float | None:
        """Mean of the last `reach` + 1 values."""
        return float(self.smooth[-1]) if len(self.smooth) else None


def _moving_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean over up to `reach` neighbours on either side; the window is cut off at the ends."""
    if len(values) == 0:
        return values
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach, len(values) - 1)
    # Summing differences from one level keeps digits when values are large and nearly equal.
    level = float(np.median(values))
    sums = np.concatenate([[0.0], np.cumsum(values - level)])
    return level + (sums[high + 1] - sums[low]) / (high - low + 1)


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels; values outside are held at the edge."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        part = (value - low) / (high - low) if high > low else 0.5
        return round(self.first + part * (self.last - self.first), 1)

    def ticks(self, wanted: int = 5) -> list[float]:
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = max(1, len(powers) // wanted)
            found = [10.0**p for p in powers if p % every == 0]
            if len(powers) <= 3:
                found = [m * 10.0**p for p in powers for m in (1, 2, 5)]
            return [t for t in found if self.low <= t <= self.high]
        width = self.high - self.low
        if not width > 0:
            return [self.low]
        raw = width / wanted
        power = 10.0 ** math.floor(math.log10(raw))
        unit = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
        first = math.ceil(self.low / unit - 1e-9)
        return [k * unit for k in range(first, math.floor(self.high / unit + 1e-9) + 1)]


def _value_axis(trace: Trace, floor: float | None, ceiling: float | None) -> Axis:
    """Axis that shows the smoothed curve and nearly all of the raw one: rare spikes don't flatten it."""
    low, high = (float(v) for v in np.quantile(trace.values, (0.005, 0.995)))
    low, high = min(low, float(trace.smooth.min())), max(high, float(trace.smooth.max()))
    if floor is None and low > 1e-100 and high / low > _LOG_FROM:
        return Axis(low / 1.1, high * 1.1, HEIGHT - BOTTOM, TOP, log=True)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    bottom = low - room if floor is None else min(floor, low)
    # A loss close to nothing reads best against nothing.
    if floor is None and low >= 0 and bottom < 0.35 * high:
        bottom = 0.0
    return Axis(bottom, high + room if ceiling is None else ceiling, HEIGHT - BOTTOM, TOP)


def _raw_points(trace: Trace) -> list[tuple[float, float]]:
    """The raw curve; where points are too many, the lowest and highest value of each bucket."""
    count = len(trace.values)
    if count <= 2 * _BUCKETS:
        return list(zip(trace.steps.tolist(), trace.values.tolist(), strict=True))
    points: list[tuple[float, float]] = []
    for part in np.array_split(np.arange(count), _BUCKETS):
        ends = {int(part[trace.values[part].argmin()]), int(part[trace.values[part].argmax()])}
        points += [(float(trace.steps[k]), float(trace.values[k])) for k in sorted(ends)]
    return points


def line_chart(
    trace: Trace,
    label: str,
    *,
    colour: str,
    floor: float | None = None,
    ceiling: float | None = None,
    marks: Sequence[float] = (),
    width: int = WIDTH,
) -> Html:
    """Raw course faint, smoothed course strong, start and end value written; `marks` are steps of a restart.

    label: read out by screen readers. colour: class of the page's style sheet. floor, ceiling: fixed ends.
    width: in units of the picture; a chart shown small takes fewer, so that its text stays readable.
    """
    if len(trace.values) == 0:
        return el("p", "No finite value was recorded.", class_="empty")
    y = _value_axis(trace, floor, ceiling)
    every = np.concatenate([trace.steps, trace.broken])
    x = Axis(float(every.min()), float(every.max()), LEFT, width - RIGHT)
    raw = _raw_points(trace)
    keep = np.unique(np.linspace(0, len(trace.smooth) - 1, min(len(trace.smooth), 2 * _BUCKETS)).astype(int))
    smooth = [(float(trace.steps[k]), float(trace.smooth[k])) for k in keep]
    return el(
        "svg",
        _grid(x, y),
        [
            el("line", x1=x(m), x2=x(m), y1=TOP, y2=HEIGHT - BOTTOM, class_="mark")
            for m in marks
            if x.low <= m <= x.high
        ],
        _path(raw, x, y, f"raw {colour}"),
        _path(smooth, x, y, f"smooth {colour}"),
        _outliers(raw, x, y, colour),
        [
            el("text", "\u00d7", x=x(s), y=TOP - 4, class_="broken")
            for s in trace.broken[:: 1 + len(trace.broken) // 80]
        ],
        _ends(trace, x, y, colour),
        viewBox=f"0 0 {width} {HEIGHT}",
        role="img",
        aria_label=f"{label}: from {short(trace.start)} to {short(trace.end)}",
    )


def _path(points: list[tuple[float, float]], x: Axis, y: Axis, class_: str) -> Html | None:
    if len(points) < 2:
        return None
    return el("polyline", points=" ".join(f"{x(s):g},{y(v):g}" for s, v in points), class_=class_)


def _outliers(raw: list[tuple[float, float]], x: Axis, y: Axis, colour: str) -> list[Child]:
    """Small triangles at the edge for raw values beyond the axis."""
    found: list[Child] = []
    for s, v in raw:
        if v > y.high or v < y.low:
            edge, turn = (TOP, 1) if v > y.high else (HEIGHT - BOTTOM, -1)
            found.append(el("path", d=f"M{x(s):g} {edge}l4 {7 * turn}h-8z", class_=f"dot {colour}"))
    return found[:60]


def _grid(x: Axis, y: Axis) -> list[Child]:
    parts: list[Child] = []
    for tick in y.ticks():
        parts.append(el("line", x1=LEFT, x2=x.last, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(el("text", short(tick, pad=False), x=LEFT - 7, y=y(tick) + 4, class_="tick end"))
    ticks = [t for t in x.ticks() if float(t).is_integer()] or [x.low]
    for tick in ticks:
        parts.append(
            el("text", short(tick, 4, pad=False), x=x(tick), y=HEIGHT - BOTTOM + 17, class_="tick middle")
        )
    parts.append(el("text", "step", x=x.last + 22, y=HEIGHT - BOTTOM + 17, class_="tick"))
    return parts


def _ends(trace: Trace, x: Axis, y: Axis, colour: str) -> list[Child]:
    """Dots and values at both ends of the smoothed curve; one of each if they are the same point."""
    assert trace.start is not None and trace.end is not None
    right, high = x(float(trace.steps[-1])), y(trace.end)
    parts: list[Child] = [
        el("circle", cx=right, cy=high, r=3.5, class_=f"dot {colour}"),
        el("text", short(trace.end), x=right + 8, y=high + 4.5, class_="value"),
    ]
    if len(trace.values) > 1:
        left, height = x(float(trace.steps[0])), y(trace.start)
        parts.append(el("circle", cx=left, cy=height, r=3.5, class_=f"dot {colour}"))
        # Above the dot, or below it where the text would leave the picture.
        parts.append(
            el(
                "text",
                short(trace.start),
                x=left + 5,
                y=height - 8 if height > TOP + 6 else height + 18,
                class_="value",
            )
        )
    return parts


def interval_chart(rows: Sequence[tuple[str, float, Interval, str]]) -> Html:
    """Accuracies (0..1) with their intervals, one row each: (label, value, interval, colour class)."""
    height = 30 + 34 * len(rows)
    axis = Axis(0, 1, 70, WIDTH - 70)
    parts: list[Child] = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(el("line", x1=axis(tick), x2=axis(tick), y1=6, y2=height - 22, class_="grid"))
        parts.append(el("text", f"{100 * tick:.0f}", x=axis(tick), y=height - 6, class_="tick middle"))
    parts.append(el("text", "%", x=axis(1) + 24, y=height - 6, class_="tick middle"))
    for k, (label, value, interval, colour) in enumerate(rows):
        y = 24 + 34 * k
        parts.append(el("text", label, x=62, y=y + 5, class_="value end"))
        parts += _whisker(axis, value, interval, y, colour)
        parts.append(el("text", percent(value), x=WIDTH - 60, y=y + 5, class_="value"))
    spoken = "; ".join(f"{label} {percent(value)}" for label, value, _, _ in rows)
    return el("svg", parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=spoken)


def difference_chart(value: float, interval: Interval, reach: float, words: str, colour: str) -> Html:
    """One paired difference with its interval against zero, on an axis from -reach to +reach.

    words: read out by screen readers. colour: class of the style sheet: gain, lost or open.
    """
    axis = Axis(-reach, reach, 8, 192)
    zero = el("line", x1=axis(0), x2=axis(0), y1=1, y2=23, class_="zero")
    parts = _whisker(axis, value, interval, 12, colour)
    return el("svg", zero, parts, viewBox="0 0 200 24", class_="glyph", role="img", aria_label=words)


def _whisker(axis: Axis, value: float, interval: Interval, y: float, colour: str) -> list[Child]:
    low, high = axis(interval.low), axis(interval.high)
    return [
        el("line", x1=low, x2=high, y1=y, y2=y, class_=f"whisker {colour}"),
        [el("line", x1=end, x2=end, y1=y - 5, y2=y + 5, class_=f"whisker {colour}") for end in (low, high)],
        el("circle", cx=axis(value), cy=y, r=5, class_=f"dot {colour}"),
    ]
