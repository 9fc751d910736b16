"""Questions put to a model, and its answers stored in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from unimrg.benchmarks.understanding.extract import FAILED
from unimrg.benchmarks.understanding.marks import ERROR
from unimrg.benchmarks.understanding.prompts import asked, first_picture
from unimrg.benchmarks.understanding.questions import Question, decode_picture
from unimrg.benchmarks.understanding.registry import Benchmark, find
from unimrg.benchmarks.understanding.tsv import Row
from unimrg.data.geometry import pad_square
from unimrg.data.label_store import Parts, digest
from unimrg.data.prefetch import prefetch
from unimrg.errors import SampleError
from unimrg.storage import Store

ANSWERS = pa.schema(
    [
        ("row", pa.int64()),  # of the questions
        ("answer", pa.string()),  # null where it couldn't be asked
        ("error", pa.string()),  # null, or one of SampleError.REASONS
    ]
)


@dataclass(frozen=True)
class Settings:
    """All that an answer depends on, beside the software and the machine.

    checkpoint, questions: digests. instruction: behind multiple-choice prompts. dtype: of the weights.
    part_rows: questions of a part.
    """

    benchmark: str
    checkpoint: str
    questions: str
    instruction: str
    strict: bool
    max_new_tokens: int
    dtype: str
    part_rows: int

    @property
    def folder(self) -> str:
        """Where the answers lie in an evaluation's folder."""
        return f"answers/{self.benchmark}-{digest(asdict(self))}"

    def parts(self, out: Store) -> Parts:
        return Parts(out.child(self.folder), ANSWERS)


@dataclass(frozen=True)
class Reply:
    """What came of a question: an answer, or the reason why it couldn't be asked."""

    answer: str | None
    error: str | None = None


def ask(
    model: Any,
    processor: Any,
    side: int,
    questions: Sequence[Question],
    settings: Settings,
    folder: Store,
    batch: int,
) -> list[Reply]:
    """Greedy answers to all questions, `batch` at a time; the next batch's pictures are decoded meanwhile.

    model, processor: of a family. side: of its picture. folder: where paths of pictures start.
    A model sees one picture: of several the first, padded to a square with grey.
    """
    benchmark = find(settings.benchmark)
    replies: dict[int, Reply] = {}

    def batches() -> Iterator[list[tuple[int, np.ndarray | None, str]]]:
        ready = []
        for number, question in enumerate(questions):
            try:
                ready.append((number, *_prompt(benchmark, question, settings.instruction, folder, side)))
            except SampleError as error:
                replies[number] = Reply(None, error.reason)
            if len(ready) == batch:
                yield ready
                ready = []
        if ready:
            yield ready

    for numbered in prefetch(batches(), depth=1):
        numbers, pictures, texts = zip(*numbered, strict=True)
        answers = model.answer(processor, pictures, texts, settings.max_new_tokens)
        replies.update(zip(numbers, map(Reply, answers), strict=True))
    return [replies[number] for number in range(len(questions))]


def _prompt(
    benchmark: Benchmark, question: Question, instruction: str, folder: Store, side: int
) -> tuple[np.ndarray | None, str]:
    message = benchmark.message(question)
    number = first_picture(message)
    picture = None if number is None else pad_square(decode_picture(question, number, folder), side)[0]
    return picture, asked(message) + (instruction if benchmark.is_choice else "")


def to_table(first: int, replies: Sequence[Reply]) -> pa.Table:
    """A part whose first question is number `first`."""
    rows = [{"row": first + n, **asdict(reply)} for n, reply in enumerate(replies)]
    return pa.Table.from_pylist(rows, schema=ANSWERS)


def answered_rows(questions: Sequence[Question], parts: Parts) -> list[Row]:
    """The rows of the question file with `prediction` and `error`, from all parts, which must be there.

    Raises DataError for a damaged part.
    """
    replies = [reply for number in sorted(parts.done()) for reply in parts.read(number).to_pylist()]
    return [
        {**question.row, "prediction": FAILED if reply["error"] else reply["answer"], ERROR: reply["error"]}
        for question, reply in zip(questions, replies, strict=True)
    ]
