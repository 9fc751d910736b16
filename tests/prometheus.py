"""Prometheus' own programs in tests: Debian's package `prometheus` has both."""

from __future__ import annotations

import shutil

import pytest

INSTALL = "apt-get install --no-install-recommends prometheus"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason=f"no promtool: {INSTALL}")
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason=f"no prometheus: {INSTALL}")
