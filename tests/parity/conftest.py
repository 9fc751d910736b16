"""Golden numbers for the parity tests; `--parity-dir DIR` reads them from DIR/<family>/<case>/ instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parity.cases import BUNDLED, Case, load_case


@pytest.fixture(scope="session")
def parity_dir(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--parity-dir") or BUNDLED)


@pytest.fixture(scope="session")
def harmon_case(parity_dir: Path) -> Callable[[str], Case]:
    return lambda name: load_case(parity_dir / "harmon" / name)
