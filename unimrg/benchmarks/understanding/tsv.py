"""Tables of questions and answers, read as the official tool reads them, or strictly.

VLMEvalKit reads its files with pandas' defaults, which change what a model is asked and how it is scored:
option texts like `None` or `NA` vanish, a column of numbers with a gap shows `4` as `4.0`, and `007` may
become `7`. `read_table` does the same by rules of its own, because pandas is no dependency; `strict` leaves
every text as it stands, for data of one's own.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from unimrg.errors import DataError, MissingExtraError, first_line

Cell = str | int | float | bool | None
Row = dict[str, Cell]

ABSENT = {"", "#N/A", "#N/A N/A", "#NA", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
ABSENT |= {"-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"}
"""Cells that pandas 2 takes for empty."""

_INTEGER = re.compile(r"\s*[+-]?\d{1,4000}\s*", re.ASCII)  # Python reads no longer ones
_NUMBER = re.compile(
    r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*|\s*[+-]?(inf|infinity)\s*", re.ASCII | re.IGNORECASE
)
_BOOLEANS = {"True": True, "TRUE": True, "true": True, "False": False, "FALSE": False, "false": False}
_LONGEST_CELL = 1 << 30  # pictures are cells

ENDINGS = (".tsv", ".json", ".xlsx")
"""Of files with answers."""


def read_table(raw: bytes, name: str, strict: bool = False) -> list[Row]:
    """The rows of a file with a head line, None where a cell is empty.

    raw: the bytes of `name`, its ending says how they are read: .xlsx, .json (a list of objects), else tabs.
    Raises DataError, one sentence, for what isn't such a table or holds no rows.
    """
    reader = _workbook if name.endswith(".xlsx") else _objects if name.endswith(".json") else _tabs
    try:
        head, lines = reader(raw, name)
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise DataError(f"{name} can't be read as a table: {first_line(error)}") from error
    if not head or not lines:
        raise DataError(f"{name} holds no rows; it may have been cut short or never filled")
    twice = [column for column in head if head.count(column) > 1]
    if twice:
        raise DataError(f"{name}: the column {twice[0]!r} is there twice; rename one")
    columns = {column: column_of([line[at] for line in lines], strict) for at, column in enumerate(head)}
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def write_table(rows: Sequence[Row]) -> bytes:
    """Rows of one set of columns as tab-separated text that `read_table` takes."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text,
        list(rows[0]),
        delimiter="\t",
        lineterminator="\n",
        quoting=csv.QUOTE_NONNUMERIC,  # left to itself it puts no quotes around a carriage return
    )
    writer.writeheader()
    writer.writerows(rows)
    # A lone surrogate can't be stored.
    return text.getvalue().encode("utf-8", "replace")


def text_of(cell: Cell) -> str:
    """A cell as the official tool puts it into a text; an empty one is `nan`."""
    return "nan" if cell is None else str(cell)


def require_columns(rows: Sequence[Row], columns: Sequence[str], name: str) -> None:
    """Raise DataError unless the rows of the file `name` have all columns."""
    missing = [column for column in columns if column not in rows[0]]
    if missing:
        there = ", ".join(list(rows[0])[:12])
        raise DataError(f"{name} has no column {missing[0]!r}, only {there}; is it the file meant?")


def column_of(texts: Sequence[str], strict: bool) -> list[Cell]:
    """The cells of a column, of one type where all of them allow it: integers, numbers, booleans, else text.

    As pandas has it, integers of more than 64 bits aside, of which its versions think differently.
    """
    if strict:
        return [text or None for text in texts]
    there = [text for text in texts if text not in ABSENT]
    kind = _kind(there)
    if kind is int and len(there) < len(texts):
        kind = float  # pandas has no integer column with gaps
    return [None if text in ABSENT else _BOOLEANS[text] if kind is bool else kind(text) for text in texts]


def _kind(texts: Sequence[str]) -> Callable[[str], Cell]:
    if texts and all(_INTEGER.fullmatch(text) for text in texts):
        return int
    if texts and all(_NUMBER.fullmatch(text) for text in texts):
        return float
    return bool if texts and all(text in _BOOLEANS for text in texts) else str


def _tabs(raw: bytes, name: str) -> tuple[list[str], list[list[str]]]:
    text = raw.decode("utf-8-sig")
    if csv.field_size_limit() < _LONGEST_CELL:
        csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
    head: list[str] = next(reader, [])
    lines = []
    for line in reader:
        if not line:
            continue
        if len(line) > len(head):
            raise DataError(
                f"{name}, line {reader.line_num}: {len(line)} cells under {len(head)} columns; a tab or a "
                "quotation mark is astray"
            )
        lines.append(line + [""] * (len(head) - len(line)))
    return head, lines


def _objects(raw: bytes, name: str) -> tuple[list[str], list[list[str]]]:
    """A list of objects; a key that only some have is empty in the others."""
    entries = json.loads(raw)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{name} is no JSON list of objects, one per question")
    head = list(dict.fromkeys(key for entry in entries for key in entry))
    return head, [[_as_text(entry.get(key)) for key in head] for entry in entries]


def _workbook(raw: bytes, name: str) -> tuple[list[str], list[list[str]]]:
    try:
        import openpyxl
    except ImportError as error:
        raise MissingExtraError("openpyxl", f"reading {name}") from error
    try:
        sheet = openpyxl.load_workbook(io.BytesIO(raw), read_only=True, data_only=True).worksheets[0]
        lines = [[_as_text(cell) for cell in line] for line in sheet.iter_rows(values_only=True)]
    except Exception as error:  # zip, XML and openpyxl's own kinds
        raise DataError(f"{name} can't be read as a workbook: {first_line(error)}") from error
    lines = [line for line in lines if any(line)]
    return (lines[0], lines[1:]) if lines else ([], [])


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if whole else str(value)
