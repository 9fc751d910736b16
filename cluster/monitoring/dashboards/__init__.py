"""The four dashboards. Descriptions of run-level panels come from the table of `unimrg/figures.py`."""

from __future__ import annotations

from typing import Any

from cluster.monitoring.dashboards.data import data
from cluster.monitoring.dashboards.nodes import cluster
from cluster.monitoring.dashboards.search import search
from cluster.monitoring.dashboards.training import training


def all_dashboards() -> list[dict[str, Any]]:
    """Every one of them, as JSON for Grafana."""
    return [training(), data(), search(), cluster()]
