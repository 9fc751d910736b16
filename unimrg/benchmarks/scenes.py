"""The Scenes benchmark: per family accuracy, pairs, where the cue misleads, beside chance and shortcuts.

    python -m unimrg.data.scenes tables outputs/scenes --pairs 500
    python -m unimrg.benchmarks.scenes outputs/scenes/Scenes_YN.tsv            # what needs no model
    python -m unimrg.benchmarks.scenes outputs/scenes/Scenes_YN.tsv ANSWERS.tsv  # columns index, prediction

Every text is asked of two pictures with different answers, so no answer that ignores the picture can beat
chance: `gate` checks it. Accuracies are fractions, 0..1.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

import numpy as np

from unimrg.benchmarks.held_out import same_answer
from unimrg.benchmarks.intervals import Interval, paired_bootstrap
from unimrg.data.scenes.shortcuts import SHORTCUTS
from unimrg.data.scenes.tables import LETTERS
from unimrg.errors import DataError, UnimrgError

CONFIDENCE = 0.99  # of the gate


@dataclass(frozen=True)
class Item:
    """One question. options: the texts to choose from. scenes: the pair of scenes, what is drawn again.

    cue: whether the obvious cue misleads, None without one. shortcuts: the answers that each leaves open.
    """

    index: str
    text: str
    answer: str
    options: tuple[str, ...]
    family: str
    pair: str
    scenes: str
    cue: bool | None
    shortcuts: Mapping[str, tuple[str, ...]]

    @property
    def chance(self) -> float:
        return 1 / len(self.options)


def read(path: Path) -> list[Item]:
    """The questions of a table of `unimrg.data.scenes.tables`, without pictures.

    Raises DataError where a column is missing or an answer is none of the options.
    """
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [item_of(row) for row in csv.DictReader(file, delimiter="\t")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} can't be read ({error}); write it with `unimrg.data.scenes tables`"
        ) from error
    except KeyError as error:
        raise DataError(f"{path} has no column {error}; write it with `unimrg.data.scenes tables`") from error


def item_of(row: Mapping[str, str]) -> Item:
    """A row of a table. Raises DataError where no option is the answer, KeyError where a cell is missing."""
    lettered = {letter: row[letter] for letter in LETTERS if row[letter]}
    options = tuple(lettered.values()) or ("Yes", "No")
    answer = lettered.get(row["answer"], row["answer"])
    if answer not in options:
        raise DataError(f"question {row['index']}: the answer {answer!r} is none of {', '.join(options)}")
    return Item(
        index=row["index"],
        text=row["question"],
        answer=answer,
        options=options,
        family=row["category"],
        pair=row["pair"],
        scenes=row["scenes"],
        cue={"": None, "misleads": True, "agrees": False}[row["cue"]],
        shortcuts={name: tuple(row[name].split("|")) for name in SHORTCUTS if row[name]},
    )


def right(items: Sequence[Item], predictions: Mapping[str, str]) -> list[bool]:
    """Whether each prediction, by index, is the letter or the text of the answer; a missing one is wrong.

    Strict: nothing but the answer, without case and final full stop.
    """
    return [_is_right(item, predictions.get(item.index, "")) for item in items]


def _is_right(item: Item, prediction: str) -> bool:
    letter = LETTERS[item.options.index(item.answer)] if item.options != ("Yes", "No") else item.answer
    return same_answer(prediction, item.answer) or same_answer(prediction, letter)


# -- what is reported ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One family (or all). accuracy with its interval, by drawing pairs of scenes again.

    pairs: both pictures of a pair right, chance `pair_chance`. agrees, misleads: accuracy by what the cue
    does, NaN without one; balanced: their mean, the accuracy itself without one. references: accuracy of each
    shortcut. against: accuracy where what a shortcut leaves open is wrong.
    """

    family: str
    count: int
    chance: float
    accuracy: float
    interval: Interval
    pairs: float
    pair_chance: float
    agrees: float
    misleads: float
    references: Mapping[str, float]
    against: Mapping[str, float]

    @property
    def balanced(self) -> float:
        return self.accuracy if math.isnan(self.misleads) else (self.agrees + self.misleads) / 2

    @property
    def best_reference(self) -> float:
        """Of chance and the shortcuts."""
        return max(self.chance, *self.references.values(), 0.0)


def lines(items: Sequence[Item], correct: Sequence[bool], seed: int = 0) -> list[Line]:
    """One line per family in order of first appearance, and one for all, named "all"."""
    if len(items) != len(correct) or not items:
        raise ValueError(f"{len(items)} questions and {len(correct)} marks")
    rows = defaultdict(list)
    for item, mark in zip(items, correct, strict=True):
        rows[item.family].append((item, bool(mark)))
    every = [row for some in rows.values() for row in some]
    return [_line(name, some, seed) for name, some in [*rows.items(), ("all", every)]]


def _line(family: str, rows: Sequence[tuple[Item, bool]], seed: int) -> Line:
    items, marks = zip(*rows, strict=True)
    groups = [item.scenes for item in items]
    both: dict[str, list[bool]] = defaultdict(list)
    for item, mark in rows:
        both[item.pair].append(mark)
    whole = {pair: found for pair, found in both.items() if len(found) == 2}
    chances = {item.pair: item.chance**2 for item in items if item.pair in whole}
    return Line(
        family=family,
        count=len(rows),
        chance=_mean(item.chance for item in items),
        accuracy=_mean(marks),
        interval=paired_bootstrap(np.zeros(len(marks)), marks, groups, seed=seed),
        pairs=_mean(all(found) for found in whole.values()),
        pair_chance=_mean(chances.values()),
        agrees=_mean(mark for item, mark in rows if item.cue is False),
        misleads=_mean(mark for item, mark in rows if item.cue is True),
        references={name: _mean(_hit(item, name) for item in items) for name in _speaking(items)},
        against={
            name: _mean(mark for item, mark in rows if _hit(item, name) == 0) for name in _speaking(items)
        },
    )


def _speaking(items: Sequence[Item]) -> list[str]:
    """The shortcuts that say something about one of the questions; about others they guess."""
    return [name for name in SHORTCUTS if any(name in item.shortcuts for item in items)]


def _hit(item: Item, shortcut: str) -> float:
    left = item.shortcuts.get(shortcut, item.options)
    return (item.answer in left) / len(left)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return float(np.mean(found)) if found else math.nan


# -- blind answers -------------------------------------------------------------------------------------------


def blind(items: Sequence[Item]) -> dict[str, list[str]]:
    """The answers of baselines that see no picture.

    majority and words learn from the other half of the pairs of scenes: the commonest answer of the family,
    and naive Bayes on the words and pairs of words of the text.
    """
    return {
        "majority": _learnt(items, lambda item: ()),
        "longest option": [max(item.options, key=len) for item in items],
        "first option": [item.options[0] for item in items],
        "bag of words": _learnt(items, _features),
    }


def gate(items: Sequence[Item], answers: Sequence[str], confidence: float = CONFIDENCE) -> list[str]:
    """What is wrong with a set that these blind answers were given to; nothing if every family is at chance.

    A family fails outside the binomial interval around chance (normal approximation).
    """
    found = []
    for family in dict.fromkeys(item.family for item in items):
        some = [(item, said) for item, said in zip(items, answers, strict=True) if item.family == family]
        chance = np.array([item.chance for item, _ in some])
        hits = sum(said == item.answer for item, said in some)
        spread = (
            NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(float((chance * (1 - chance)).sum())) + 0.5
        )
        if abs(hits - chance.sum()) > spread:
            share, mean = hits / len(some), chance.mean()
            found.append(f"{family}: {share:.1%} of {len(some)}, chance is {mean:.1%}")
    return found


def _learnt(items: Sequence[Item], features: Callable[[Item], Iterable[str]]) -> list[str]:
    """Naive Bayes with these features, trained on the other half; options keep their order in a tie."""
    names = sorted({item.scenes for item in items})
    half = {name: k % 2 for k, name in enumerate(names)}
    models = [_count([item for item in items if half[item.scenes] != side], features) for side in (0, 1)]
    return [_best(item, features(item), models[half[item.scenes]]) for item in items]


Counts = dict[str, tuple[Counter[str], dict[str, Counter[str]]]]


def _count(items: Iterable[Item], features: Callable[[Item], Iterable[str]]) -> Counts:
    """By family: how often each answer is given, and with which features."""
    counts: Counts = {}
    for item in items:
        prior, given = counts.setdefault(item.family, (Counter(), defaultdict(Counter)))
        prior[item.answer] += 1
        given[item.answer].update(features(item))
    return counts


def _best(item: Item, features: Iterable[str], counts: Counts) -> str:
    prior, given = counts.get(item.family, (Counter(), {}))
    words = list(features)

    def score(option: str) -> float:
        seen, known = prior[option], given.get(option, Counter())
        return math.log(seen + 1) + sum(math.log((known[word] + 0.5) / (seen + 1)) for word in words)

    return max(item.options, key=score)


def _features(item: Item) -> set[str]:
    words = item.text.lower().rstrip("?").replace(",", "").split()
    return {*words, *(f"{a} {b}" for a, b in pairwise(words)), f"length {len(words)}"}


# -- the command ---------------------------------------------------------------------------------------------


def table(found: Sequence[Line], answered: bool = True) -> str:
    """The lines as text, in percent. answered: whether there are answers beside the references."""
    names = [name for name in SHORTCUTS if any(name in line.references for line in found)]
    head = ["family", "n", "chance", *names]
    if answered:
        head += ["accuracy", "95 %", "pairs", "(chance)", "agrees", "misleads", "balanced"]
        head += [f"not {name}" for name in names]
    rows = [head]
    for line in found:
        row = [line.family, str(line.count), _percent(line.chance)]
        row += [_percent(line.references.get(name, math.nan)) for name in names]
        if answered:
            ends = f"{_percent(line.interval.low)}..{_percent(line.interval.high)}"
            row += [_percent(line.accuracy), ends, _percent(line.pairs), _percent(line.pair_chance)]
            row += [_percent(line.agrees), _percent(line.misleads), _percent(line.balanced)]
            row += [_percent(line.against.get(name, math.nan)) for name in names]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if k == 0 else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def main(argv: list[str] | None = None) -> int:
    """Prints a table; 0, 1 when the set fails its gate, 2 when something can be mended by the user."""
    parser = argparse.ArgumentParser(prog="python -m unimrg.benchmarks.scenes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("table", type=Path, help="Scenes_YN.tsv or Scenes_MCQ.tsv")
    parser.add_argument("answers", type=Path, nargs="?", help="tab-separated, with index and prediction")
    args = parser.parse_args(argv)
    try:
        items = read(args.table)
        predictions = _predictions(args.answers) if args.answers else {}
    except UnimrgError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(lines(items, right(items, predictions)), args.answers is not None))
    failed = {name: wrong for name, said in blind(items).items() if (wrong := gate(items, said))}
    for name, wrong in failed.items():
        print(f"{name} is not at chance: {'; '.join(wrong)}")
    return 1 if failed else 0


def _predictions(path: Path) -> dict[str, str]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {row["index"]: row["prediction"] or "" for row in csv.DictReader(file, delimiter="\t")}
    except (OSError, UnicodeDecodeError, KeyError) as error:
        raise DataError(f"{path} needs columns index and prediction, separated by tabs ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
