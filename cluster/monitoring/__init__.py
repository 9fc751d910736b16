"""Monitoring: alert rules and dashboards over the figures of `unimrg/figures.py`, and a local Prometheus."""

from pathlib import Path

RULES = Path(__file__).with_name("rules.yaml")

PORT = 9464
"""Where the rest looks for a run: metrics.port of its command line, on the head."""
