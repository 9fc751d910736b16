"""Text files of the benchmarks, line by line, with messages that name the place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unimrg.errors import DataError


def read_text(path: str | Path) -> str:
    """The text of a file, without a byte-order mark. Raises DataError where there is none."""
    try:
        return Path(path).read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read as text ({error}); fetch it again") from error


def read_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """Place (`FILE, line 3`) and text of every line that isn't blank. Raises DataError, also without any."""
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path} is empty; fetch it again")
    return ((f"{path}, line {number}", line) for number, line in lines)
