"""The Scenes tables among the other benchmarks: scores of marked answers, as fractions, beside chance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from unimrg.benchmarks.understanding.marks import Mark, Scores
from unimrg.benchmarks.understanding.tsv import Cell
from unimrg.data.scenes.shortcuts import SHORTCUTS
from unimrg.errors import DataError

if TYPE_CHECKING:
    from unimrg.benchmarks.scenes import Item, Line

COLUMNS = ("category", "pair", "scenes", "cue", *SHORTCUTS)

VALUES: Mapping[str, Callable[[Line], float]] = {
    "accuracy": lambda line: line.accuracy,
    "pairs": lambda line: line.pairs,
    "balanced": lambda line: line.balanced,
    "agrees": lambda line: line.agrees,
    "misleads": lambda line: line.misleads,
    "chance": lambda line: line.chance,
    "pair_chance": lambda line: line.pair_chance,
    "best_shortcut": lambda line: line.best_reference,
}


def scenes(marks: Sequence[Mark]) -> Scores:
    """What `unimrg.benchmarks.scenes` reports, of answers read by the official rules; by family too.

    pairs: both pictures of a pair right. agrees, misleads: accuracy by what the obvious cue does; balanced:
    their mean. best_shortcut: the better of chance and every shortcut. Raises DataError for rows of others.
    """
    # Not at the top: it needs torch, which scoring of answers does not.
    from unimrg.benchmarks.scenes import lines

    *families, every = lines([_item(mark) for mark in marks], [mark.right for mark in marks])
    values = {name: value(every) for name, value in VALUES.items()}
    groups = {name: {line.family: value(line) for line in families} for name, value in VALUES.items()}
    return Scores(values, "accuracy", dict.fromkeys(values, "fraction"), groups)


def _item(mark: Mark) -> Item:
    from unimrg.benchmarks.scenes import LETTERS, item_of

    cells = dict.fromkeys(LETTERS) | mark.row
    try:
        return item_of({name: _text(cell) for name, cell in cells.items()})
    except KeyError as error:
        raise DataError(
            f"row {mark.index}: {error} is not of the Scenes tables; is it another file?"
        ) from error


def _text(cell: Cell) -> str:
    """A cell as it was written: a column of numbers with gaps comes as 2.0."""
    whole = isinstance(cell, float) and cell.is_integer()
    return "" if cell is None else str(int(cell) if whole else cell)
