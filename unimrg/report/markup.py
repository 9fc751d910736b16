"""HTML that can't be broken by what it shows: elements escape every child that is not already `Html`.

Also the words for numbers: percent, differences, durations, times.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

_VOID = frozenset({"meta", "img", "br", "col", "input", "path", "line", "circle", "rect", "polyline"})
# What HTML forbids: control characters except tab and newline.
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
NBSP, MINUS, DASH = "\u00a0", "\u2212", "\u2013"


class Html(str):
    """Text that is HTML already."""


Child = str | int | Sequence["Child"] | None


def escape(text: object) -> str:
    """Any text made safe for HTML, in quotes too; lone surrogates and control characters become visible."""
    clean = str(text).encode("utf-8", "replace").decode("utf-8")
    return html.escape(_FORBIDDEN.sub("\ufffd", clean), quote=True)


def join(*children: Child) -> Html:
    """Children one after the other; lists are laid flat, None is nothing."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, (list, tuple)):
            parts.append(join(*child))
        elif child is not None:
            parts.append(child if isinstance(child, Html) else escape(child))
    return Html("".join(parts))


def el(name: str, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """One element. `class_` means class, `aria_label` aria-label; None and False leave an attribute out."""
    written = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written += f" {key}" if value is True else f' {key}="{escape(value)}"'
    if name in _VOID:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def number(value: Any) -> float | None:
    """Value as float, NaN and infinity included; None for anything that is no number."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def short(value: float | None, digits: int = 3, pad: bool = True) -> str:
    """A number for people: three digits, k/M/G above 10,000, powers of ten far out.

    pad: keep zeros at the end (0.200), as figures in a column want; ticks of an axis do not.
    """
    if value is None:
        return DASH
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return ("" if value > 0 else MINUS) + "\u221e"
    size = abs(value)
    form = f"#.{digits}g" if pad and value else f".{digits}g"
    if size >= 1e15 or 0 < size < 1e-4:
        mantissa, _, power = f"{value:.{digits - 2}e}".partition("e")
        text = f"{mantissa.removesuffix('.0')}e{int(power)}"
    elif size >= 1e4:
        suffix, unit = next((s, u) for s, u in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)) if size >= u)
        text = (f"{value / unit:{form}}" if size / unit < 999.5 else f"{value / unit:.0f}") + suffix
    else:
        text = f"{value:,.0f}" if size >= 100 else f"{value:{form}}".rstrip(".")
    return text.replace("-", MINUS)


def count(value: float) -> str:
    """A whole number with separators."""
    return f"{int(value):,}" if math.isfinite(value) and abs(value) < 1e15 else short(value)


def plural(amount: int, noun: str) -> str:
    return f"{count(amount)}{NBSP}{noun}" + ("" if amount == 1 else "s")


def percent(share: float, sign: bool = False) -> str:
    """A fraction as percent with one decimal."""
    text = f"{100 * share:+.1f}" if sign else f"{100 * share:.1f}"
    return text.replace("-", MINUS) + (f"{NBSP}%" if not sign else "")


def span(seconds: float | None) -> str:
    """A duration in its two largest units."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return DASH
    if seconds < 60:
        return f"{seconds:.3g}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{count(days)}{NBSP}d {hours}{NBSP}h"
    return f"{hours}{NBSP}h {minutes}{NBSP}min" if hours else f"{minutes}{NBSP}min {rest}{NBSP}s"


def when(timestamp: Any) -> str:
    """Seconds since 1970, or any text, as a time in UTC."""
    seconds = number(timestamp)
    if seconds is None:
        return str(timestamp) if timestamp is not None else DASH
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return DASH


def seconds_of(timestamp: Any) -> float | None:
    """Seconds since 1970 of a number or an ISO 8601 text; None if it is neither."""
    seconds = number(timestamp)
    if seconds is None and isinstance(timestamp, str):
        try:
            moment = datetime.fromisoformat(timestamp)
        except ValueError:
            return None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return seconds if seconds is not None and math.isfinite(seconds) else None


def section(title: str, *children: Child, note: Child = None, id_: str | None = None) -> Html:
    """A part of the page with its heading and, small, what it shows."""
    return el("section", el("h2", title), el("p", note, class_="note") if note else None, *children, id=id_)


def table(head: list[str], rows: list[list[Child]], *, class_: str = "") -> Html:
    """A table that becomes a stack of cards on a narrow screen: each cell knows its column's name."""
    body = [
        el("tr", [el("td", cell, data_label=name) for name, cell in zip(head, row, strict=True)])
        for row in rows
    ]
    top = el("thead", el("tr", [el("th", name, scope="col") for name in head]))
    return el("div", el("table", top, el("tbody", body), class_=class_ or None), class_="scroll")


def document(title: str, style: str, *body: Child) -> str:
    """A whole page that loads nothing and runs nothing."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        # Even if something slipped through, the page could load nothing and run nothing.
        el(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; img-src data:; style-src 'unsafe-inline'",
        ),
        el("title", title),
        el("style", Html(style)),
    )
    return "<!doctype html>\n" + el("html", head, el("body", *body), lang="en") + "\n"


def folded(summary: str, *children: Child) -> Html:
    return el("details", el("summary", summary), *children)
