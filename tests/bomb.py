"""A pickle that runs code when it is loaded carelessly."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Bomb:
    """Loaded by `pickle` it writes the file `trace`."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.trace, "ran")
