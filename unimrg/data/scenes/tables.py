"""Questions about held-out scenes as two tables of VLMEvalKit's format: yes/no, and multiple choice.

Columns `index`, `image`, `question`, `A` to `D`, `answer`, `category` are VLMEvalKit's; a picture is stored
once, its other rows hold the index of that one. The others are ours: `pair` (the same text asked of the
complementary picture), `scenes` (both pictures of a pair of scenes), `cue` ("agrees" or "misleads" where the
family has an obvious cue), `unseen` ("yes" where a combination was never trained on), and per shortcut the
answers it leaves open, with "|" between them.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable, Iterator

import numpy as np

from unimrg.data.scenes.shortcuts import SHORTCUTS, shortcuts
from unimrg.data.scenes.text import YES_NO
from unimrg.data.scenes.world import Question, Scene
from unimrg.data.scenes.write import png

NAMES = {"yn": "Scenes_YN", "mcq": "Scenes_MCQ"}
LETTERS = ("A", "B", "C", "D")
COLUMNS = (
    *("index", "image", "question", *LETTERS, "answer", "category"),
    *("pair", "scenes", "cue", "unseen", *SHORTCUTS),
)

Row = dict[str, str]


def tables(scenes: Iterable[Scene], seed: int = 0) -> dict[str, str]:
    """File name -> text of both tables. seed: of the order of the options."""
    rows: dict[str, list[Row]] = {kind: [] for kind in NAMES}
    for kind, row in question_rows(scenes, seed):
        rows[kind].append(row)
    return {f"{NAMES[kind]}.tsv": _text(found) for kind, found in rows.items()}


def question_rows(scenes: Iterable[Scene], seed: int = 0) -> Iterator[tuple[str, Row]]:
    """("yn" or "mcq", row) of every question; indices count up from 0 in both together."""
    index = 0
    for scene in scenes:
        picture = base64.b64encode(png(scene.rgb)).decode()
        first: dict[str, str] = {}
        for question in scene.questions:
            kind = "yn" if question.options == YES_NO else "mcq"
            shown = first.setdefault(kind, str(index))
            row = {"index": str(index), "image": picture if shown == str(index) else shown}
            yield kind, row | _asked(question, seed) | _known(scene, question, seed)
            index += 1


def _asked(question: Question, seed: int) -> Row:
    if question.options == YES_NO:
        return {"question": question.text, "answer": question.answer.capitalize()}
    shown = choices(question, seed)
    letters = dict(zip(LETTERS, shown, strict=False))
    answer = LETTERS[shown.index(question.answer)]
    return {"question": question.text, "answer": answer, **letters}


def choices(question: Question, seed: int) -> tuple[str, ...]:
    """Two to four options in the order in which they are lettered, the same in both pictures of a pair.

    Of more than four answers the two of the pair and two others are shown, so the text tells nothing.
    """
    number, text = question.pair.rsplit("-", 2)[-2:]
    rng = np.random.default_rng([seed, int(number), int(text.removeprefix("q"))])
    shown = list(question.options)
    if len(shown) > len(LETTERS):
        others = [option for option in shown if option not in question.answers]
        shown = [*question.answers, *rng.permutation(others)[: len(LETTERS) - 2].tolist()]
    return tuple(str(shown[k]) for k in rng.permutation(len(shown)))


def _known(scene: Scene, question: Question, seed: int) -> Row:
    known = {
        "category": question.family,
        "pair": question.pair,
        "scenes": question.pair.rsplit("-", 1)[0],
        "cue": {None: "", True: "misleads", False: "agrees"}[question.conflict],
        "unseen": "yes" if question.unseen else "no",
    }
    yes_no = question.options == YES_NO
    shown = YES_NO if yes_no else choices(question, seed)
    for name, left in shortcuts(scene, question).items():
        known[name] = "|".join(
            answer.capitalize() if yes_no else answer for answer in left if answer in shown
        )
    return known


def _text(rows: Iterable[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, restval="", delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
