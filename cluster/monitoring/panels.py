"""Panels and dashboards in Grafana's classic model: what `dashboards.py` is written in."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from unimrg.figures import BY_NAME

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24
HEIGHT = 8


@dataclass(frozen=True)
class Panel:
    """One picture. queries: (expression, legend) each; about: the figure whose help describes it, or a text.

    unit: one of Grafana's: s, percentunit, bytes, short, … width: of 24 columns.
    """

    title: str
    queries: Sequence[tuple[str, str]]
    about: str
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    low: float | None = 0
    high: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def place(self, x: int, y: int) -> dict[str, Any]:
        """As JSON, at a place of the grid."""
        figure = BY_NAME.get(self.about)
        text = figure.help if figure else self.about
        defaults: dict[str, Any] = {"unit": self.unit}
        defaults |= {} if self.low is None else {"min": self.low}
        defaults |= {} if self.high is None else {"max": self.high}
        return {
            "type": self.kind,
            "title": self.title,
            "description": text[:1].upper() + text[1:] + ".",
            "datasource": SOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": 4 if self.kind == "stat" else HEIGHT},
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": _options(self.kind) | self.options,
            "targets": [_target(number, query, self.kind) for number, query in enumerate(self.queries)],
        }


def _target(number: int, query: tuple[str, str], kind: str) -> dict[str, Any]:
    expression, legend = query
    target = {
        "refId": chr(ord("A") + number),
        "datasource": SOURCE,
        "expr": expression,
        "legendFormat": legend,
    }
    return target | ({"instant": True, "range": False} if kind in ("stat", "bargauge") else {})


def _options(kind: str) -> dict[str, Any]:
    latest = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    known: dict[str, dict[str, Any]] = {
        "timeseries": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "stat": {"reduceOptions": latest, "colorMode": "none", "graphMode": "none", "textMode": "auto"},
        "bargauge": {"reduceOptions": latest, "displayMode": "basic", "orientation": "horizontal"},
        "state-timeline": {"showValue": "never", "rowHeight": 0.8, "mergeValues": True},
    }
    return copy.deepcopy(known[kind])


@dataclass(frozen=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Variable:
    """A choice at the top: the values of a label of a metric. several: more than one at a time, or all."""

    name: str
    label: str
    metric: str
    several: bool = True

    def as_json(self) -> dict[str, Any]:
        query = f"label_values({self.metric}, {self.name})"
        every = {"includeAll": True, "allValue": ".*", "multi": True} if self.several else {"multi": False}
        return {
            "type": "query",
            "name": self.name,
            "label": self.label,
            "datasource": SOURCE,
            "definition": query,
            "query": {"query": query, "refId": self.name},
            "refresh": 2,
            "sort": 1,
            "current": {"text": "All", "value": "$__all"} if self.several else {},
            **every,
        }


def dashboard(
    uid: str,
    title: str,
    description: str,
    variables: Sequence[Variable],
    rows: Sequence[Row],
    annotations: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """A whole one. It has no id of its own, so that any Grafana can load it."""
    source = {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus"}
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["unimrg"],
        "schemaVersion": 39,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "links": [
            {
                "type": "dashboards",
                "title": "unimrg",
                "tags": ["unimrg"],
                "asDropdown": True,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "annotations": {"list": list(annotations)},
        "templating": {"list": [source, *(variable.as_json() for variable in variables)]},
        "panels": list(_grid(rows)),
    }


def _grid(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows under one another, the panels of each from left to right, in as many lines as they need."""
    placed: list[dict[str, Any]] = []
    y = 0
    for row in rows:
        heading = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        placed.append(
            {"type": "row", "title": row.title, "collapsed": False, "gridPos": heading, "panels": []}
        )
        x, y, height = 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, height = 0, y + height, 0
            placed.append(panel.place(x, y))
            x, height = x + panel.width, max(height, placed[-1]["gridPos"]["h"])
        y += height
    return placed
