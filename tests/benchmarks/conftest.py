"""Golden values of the benchmarks; `--parity-dir DIR` reads them from DIR/evaluation or DIR itself."""

from __future__ import annotations

from pathlib import Path

import pytest

BUNDLED = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def evaluation_dir(request: pytest.FixtureRequest) -> Path:
    """The folder that holds understanding/, geneval/, dpg_bench/, dense/ and published/."""
    given = request.config.getoption("--parity-dir")
    if not given:
        return BUNDLED
    inner = Path(given) / "evaluation"
    return inner if inner.is_dir() else Path(given)
