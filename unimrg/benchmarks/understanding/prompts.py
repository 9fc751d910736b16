"""What a model is asked, word for word as VLMEvalKit asks it."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from unimrg.benchmarks.understanding.questions import Question
from unimrg.benchmarks.understanding.tsv import Row, text_of

Message = tuple[str | int, ...]
"""Texts, and the numbers of the pictures that stand between them."""

SELECT = "Please select the correct answer from the options above. \n"
_MARK = re.compile(r"<image (\d+)>")


def options_of(row: Row) -> dict[str, str]:
    """Capital letter -> text, of the options that a row has."""
    return {letter: str(row[letter]) for letter in string.ascii_uppercase if row.get(letter) is not None}


def choice(question: Question) -> Message:
    """A multiple-choice question, behind its pictures; without options the question alone."""
    return (*range(len(question.pictures)), _choice_text(question.row))


def interleaved(question: Question) -> Message:
    """The same with every picture where the text names it as `<image 1>`; behind all if it names none.

    A mark that belongs to no picture stays text.
    """
    text = _choice_text(question.row)
    pieces: list[str | int] = []
    at = 0
    for mark in _MARK.finditer(text):
        number = int(mark[1]) - 1
        if 0 <= number < len(question.pictures):
            pieces += [text[at : mark.start()], number]
            at = mark.end()
    pieces.append(text[at:])
    return tuple(piece for piece in pieces if piece != "") if at else choice(question)


def plain(question: Question) -> Message:
    """The question as it stands, behind its pictures."""
    return (*range(len(question.pictures)), text_of(question.row["question"]))


def own(question: Question) -> Message:
    """The prompt that the data set brings along in a column of its own."""
    return (*range(len(question.pictures)), text_of(question.row["prompt"]))


def asked(message: Message) -> str:
    """The words of a message for a model that looks at one picture: texts, a line each."""
    return "\n".join(piece for piece in message if isinstance(piece, str))


def first_picture(message: Message) -> int | None:
    """The picture that such a model looks at; None where there is none."""
    return next((piece for piece in message if isinstance(piece, int)), None)


def _choice_text(row: Row) -> str:
    lines: Sequence[str] = [
        *([f"Hint: {row['hint']}"] if row.get("hint") is not None else []),
        f"Question: {text_of(row['question'])}",
    ]
    options = options_of(row)
    if options:
        lines = [*lines, "Options:", *(f"{letter}. {text}" for letter, text in options.items()), SELECT]
        return "\n".join(lines)
    return "\n".join(lines) + "\n"
