"""Files of others that the benchmarks read, with messages that name the place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unimrg.errors import CheckpointError, DataError


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


UNUSED_WORDS = 16
"""Rows of a model's vocabulary that its tokenizer may lack."""


def load_tokenizer(folder: Path, words: int, purpose: str) -> Any:
    """The tokenizer beside the weights of a model with `words` words.

    Raises CheckpointError, also for one of far fewer: from a folder without a vocabulary the library makes an
    empty one.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        fits = 0 <= words - len(tokenizer) <= UNUSED_WORDS
        fault = "" if fits else f"{len(tokenizer)} words for {words}"
    except Exception as error:  # unknown classes, missing files, bad JSON: all mean the same here
        fault = type(error).__name__
    if fault:
        raise CheckpointError(f"{purpose} {folder}: no usable tokenizer ({fault}); fetch it with the weights")
    return tokenizer
