"""The benchmarks by name: their files, what is asked, how it is marked and scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unimrg.benchmarks.result import BenchmarkResult
from unimrg.benchmarks.understanding import choices, prompts, yes_no
from unimrg.benchmarks.understanding.extract import DEFAULT_MATCHER, MATCHERS
from unimrg.benchmarks.understanding.marks import (
    Mark,
    Marker,
    Scores,
    count,
    mark_open,
    mark_options,
    mark_yes_or_no,
)
from unimrg.benchmarks.understanding.prompts import Message
from unimrg.benchmarks.understanding.questions import Question, indices_of
from unimrg.benchmarks.understanding.scenes import COLUMNS as SCENES_COLUMNS
from unimrg.benchmarks.understanding.scenes import scenes
from unimrg.benchmarks.understanding.tsv import Row, require_columns
from unimrg.config import suggest
from unimrg.errors import ConfigError, DataError

SHORT, MEDIUM, LONG = 32, 64, 128
"""Tokens of an answer: a word, a letter and its option, a number with its way."""

_SITE = "https://opencompass.openxlab.space/utils/VLMEval/"
_OURS = "`python -m unimrg.data.scenes tables FOLDER`"


@dataclass(frozen=True)
class Benchmark:
    """One set of questions.

    rows, md5: of the official file, for saying whether a file is that one; "" where there is none. files:
    names it is known by, without `.tsv`. source: where a user gets it. columns: that scoring needs beside
    index, question, answer and prediction. max_new_tokens: of an answer, by default.
    """

    name: str
    rows: int | None
    md5: str
    message: Callable[[Question], Message]
    mark: Marker
    score: Callable[[Sequence[Mark]], Scores]
    aliases: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    source: str = ""
    columns: tuple[str, ...] = ()
    max_new_tokens: int = MEDIUM

    @property
    def is_choice(self) -> bool:
        return self.mark is not mark_yes_or_no

    @property
    def known_files(self) -> tuple[str, ...]:
        """Beginnings of the names of its files, the likeliest first."""
        return (self.name, *self.files)


BENCHMARKS = (
    Benchmark(
        "MMBench_DEV_EN",
        4329,
        "b6caf1133a01c6bb705cf753bb527ed8",
        prompts.choice,
        mark_options,
        choices.mmbench,
        aliases=("MMBench", "MMB"),
        source="https://opencompass.openxlab.space/utils/benchmarks/MMBench/MMBench_DEV_EN.tsv",
    ),
    Benchmark(
        "MMVP",
        300,
        "8cb732b141a0cba5b42159df2839e557",
        prompts.choice,
        mark_options,
        choices.mmvp,
        source=f"{_SITE}MMVP.tsv",
    ),
    Benchmark(
        "RealWorldQA",
        765,
        "4de008f55dc4fd008ca9e15321dc44b7",
        prompts.choice,
        mark_options,
        choices.overall,
        aliases=("RWQA",),
        source=f"{_SITE}RealWorldQA.tsv",
    ),
    Benchmark(
        "HallusionBench",
        951,
        "0c23ac0dc9ef46832d7a24504f2a0c7c",
        prompts.plain,
        mark_yes_or_no,
        yes_no.hallusion_bench,
        aliases=("Hallusion", "Hallu"),
        source=f"{_SITE}HallusionBench.tsv",
        columns=("l2-category",),
        max_new_tokens=SHORT,
    ),
    Benchmark(
        "VSR-zeroshot",
        1222,
        "5ff5e49908ac1cfad35c60b92b001aeb",
        prompts.plain,
        mark_yes_or_no,
        yes_no.vsr,
        aliases=("VSR",),
        files=("vsr_zeroshot_dataset_yn_strict",),
        source="https://huggingface.co/datasets/ignoreandfly/vsr_zeroshot_tsv",
        max_new_tokens=SHORT,
    ),
    Benchmark(
        "POPE",
        None,
        "c12f5acb142f2ef1f85a26ba2fbe41d5",
        prompts.plain,
        mark_yes_or_no,
        yes_no.pope,
        source=f"{_SITE}POPE.tsv",
        columns=("category",),
        max_new_tokens=SHORT,
    ),
    Benchmark(
        "BLINK",
        None,
        "d5e8af148b10ac69f535ff7b23f3f989",
        prompts.choice,
        mark_options,
        choices.overall,
        source=f"{_SITE}BLINK.tsv",
    ),
    Benchmark(
        "CV-Bench-2D",
        None,
        "a7cff4cc2857cc237ee2b89e62bccb2d",
        prompts.own,
        mark_options,
        choices.cv_bench_2d,
        source=f"{_SITE}CV-Bench-2D.tsv",
        columns=("prompt", "source"),
    ),
    Benchmark(
        "CV-Bench-3D",
        None,
        "bb94c0d568d652d15b60e001ac40a170",
        prompts.own,
        mark_options,
        choices.overall,
        source=f"{_SITE}CV-Bench-3D.tsv",
        columns=("prompt",),
    ),
    Benchmark(
        "MMMU_DEV_VAL",
        None,
        "585e8ad75e73f75dcad265dfd0417d64",
        prompts.interleaved,
        mark_open,
        choices.by_split,
        aliases=("MMMU",),
        source=f"{_SITE}MMMU_DEV_VAL.tsv",
        columns=("split",),
        max_new_tokens=LONG,
    ),
    Benchmark(
        "Scenes_YN",
        None,
        "",
        prompts.plain,
        mark_yes_or_no,
        scenes,
        source=_OURS,
        columns=SCENES_COLUMNS,
        max_new_tokens=SHORT,
    ),
    Benchmark(
        "Scenes_MCQ",
        None,
        "",
        prompts.choice,
        mark_options,
        scenes,
        source=_OURS,
        columns=SCENES_COLUMNS,
    ),
)


def find(name: str) -> Benchmark:
    """The benchmark of a name or alias; case, `-` and `_` don't matter. Raises ConfigError."""
    known = {
        _plain(alias): benchmark for benchmark in BENCHMARKS for alias in (benchmark.name, *benchmark.aliases)
    }
    if _plain(name) not in known:
        words = [alias for benchmark in BENCHMARKS for alias in (benchmark.name, *benchmark.aliases)]
        raise ConfigError(f"benchmarks: unknown benchmark {name!r}{suggest(name, words)}")
    return known[_plain(name)]


def score(
    benchmark: Benchmark, rows: Sequence[Row], file: str, matcher: str = DEFAULT_MATCHER
) -> BenchmarkResult:
    """What a table of answers is worth.

    rows: the question file's columns without pictures, and `prediction`; `error` where a row couldn't be
    asked, which is wrong whatever else it says. file: where they come from, for messages.
    Raises DataError for columns and rows that aren't the benchmark's.
    """
    marks = mark(benchmark, rows, file, matcher)
    try:
        found = benchmark.score(marks)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    return BenchmarkResult(
        benchmark.name,
        found.values,
        found.headline,
        found.units,
        found.groups,
        protocol={"matcher": matcher, "judge": "none"},
        counts=count(marks),
    )


def mark(benchmark: Benchmark, rows: Sequence[Row], file: str, matcher: str = DEFAULT_MATCHER) -> list[Mark]:
    """Every answer marked, in order. Raises DataError as `score` does."""
    require_columns(rows, ("index", "question", "answer", "prediction", *benchmark.columns), file)
    try:
        return benchmark.mark(rows, indices_of([row["index"] for row in rows], file), MATCHERS[matcher])
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
