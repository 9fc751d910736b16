"""Prometheus' own programs in tests: Debian's package `prometheus` has both."""

from __future__ import annotations

import shutil
import subprocess

import pytest

INSTALL = "apt-get install --no-install-recommends prometheus"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason=f"no promtool: {INSTALL}")
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason=f"no prometheus: {INSTALL}")


def promtool(*words: str) -> None:
    """Fails with what promtool says if it isn't content."""
    done = subprocess.run(["promtool", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
