"""The questions of a benchmark: rows of its table with the pictures they are about."""

from __future__ import annotations

import ast
import base64
import binascii
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unimrg.benchmarks.understanding.tsv import Cell, Row, read_table, require_columns
from unimrg.data.decode import decode_verbatim
from unimrg.errors import DataError, SampleError
from unimrg.storage import Store

IMAGE, IMAGE_PATH = "image", "image_path"
_REFERENCE = 64  # characters at most of a cell that names the row whose picture is shared
MAX_BYTES = 64 << 20
MAX_PIXELS = 178_956_970


@dataclass(frozen=True)
class Question:
    """One row. index: an integer, or text where the file has other ones.

    row: all cells but the pictures. pictures: base64 texts (`inline`), or paths relative to the file.
    """

    index: int | str
    row: Row
    pictures: tuple[str, ...]
    inline: bool = True


@dataclass(frozen=True)
class QuestionSet:
    """All questions of a file. sha256, md5: of the file. without_picture: rows left out for want of one."""

    questions: tuple[Question, ...]
    sha256: str
    md5: str
    without_picture: int


def read_questions(raw: bytes, name: str, strict: bool = False) -> QuestionSet:
    """Questions of the file `name` in its order. Raises DataError, one sentence, for what can't be used.

    Rows with an empty picture are left out, as the official tool does. strict: see `read_table`.
    """
    rows = read_table(raw, name, strict)
    require_columns(rows, ("index", "question"), name)
    inline = IMAGE in rows[0]
    if not inline and IMAGE_PATH not in rows[0]:
        raise DataError(
            f"{name} has neither a column 'image' nor 'image_path'; is it the file with pictures?"
        )
    column = IMAGE if inline else IMAGE_PATH
    indices = indices_of([row["index"] for row in rows], name)
    kept = [(index, row) for index, row in zip(indices, rows, strict=True) if row[column] is not None]
    if not kept:
        raise DataError(f"{name}: no row has a picture")
    cells = {str(index): str(row[column]) for index, row in kept}
    questions = [
        Question(
            index, {k: v for k, v in row.items() if k != IMAGE}, _pictures(index, cells, inline, name), inline
        )
        for index, row in kept
    ]
    digests = (hashlib.sha256(raw).hexdigest(), hashlib.md5(raw, usedforsecurity=False).hexdigest())
    return QuestionSet(tuple(questions), *digests, len(rows) - len(kept))


def indices_of(cells: Sequence[Cell], name: str) -> list[int | str]:
    """Integers where all are; raises DataError for empty and repeated ones."""
    if None in cells:
        raise DataError(f"{name}: row {cells.index(None) + 1} has no index; number the rows")
    texts = [str(cell) for cell in cells]
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise DataError(f"{name}: the index {twice} is there twice; every row needs its own")
    try:
        return [int(text) for text in texts]
    except ValueError:
        return list(texts)


def _pictures(index: int | str, cells: dict[str, str], inline: bool, name: str) -> tuple[str, ...]:
    cell = cells[str(index)]
    if inline and len(cell) <= _REFERENCE:
        if len(cells.get(cell, "")) <= _REFERENCE:
            raise DataError(f"{name}: row {index} shares the picture of row {cell}, which has none")
        cell = cells[cell]
    if not cell.startswith("["):
        return (cell,)
    try:
        listed = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise DataError(f"{name}: row {index} has a list of pictures that can't be read") from error
    if not listed or not all(isinstance(picture, str) for picture in listed):
        raise DataError(f"{name}: row {index} has a list of pictures that holds something else")
    return tuple(listed)


def decode_picture(question: Question, number: int, folder: Store) -> np.ndarray:
    """uint8 [H, W, 3] of a question's picture; `folder` is where paths start. Raises SampleError.

    Neither turned by EXIF nor laid over a ground where it is transparent: the official tool does neither.
    """
    picture = question.pictures[number]
    if question.inline:
        try:
            raw = base64.b64decode(picture)
        except (binascii.Error, ValueError) as error:
            raise SampleError("not-an-image", f"row {question.index}: {error}") from error
    else:
        raw = _read(picture, folder)
    return decode_verbatim(raw, MAX_BYTES, MAX_PIXELS)


def _read(path: str, folder: Store) -> bytes:
    if path.startswith("/") or ".." in path.split("/"):
        raise SampleError("path-outside-folder", path)
    try:
        return folder.read_bytes(path, MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise SampleError("missing-file", path) from error
