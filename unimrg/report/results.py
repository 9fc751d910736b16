"""`results.html`: checkpoints side by side on benchmarks, beside what others published."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from unimrg.benchmarks.dense.drawings import TASKS as DRAWINGS
from unimrg.benchmarks.evaluation import Evaluation
from unimrg.benchmarks.published import CONFIDENCE, Published, published
from unimrg.benchmarks.result import BenchmarkResult
from unimrg.benchmarks.understanding.registry import BENCHMARKS
from unimrg.report.beside import beside_chance
from unimrg.report.markup import (
    DASH,
    MINUS,
    NBSP,
    Child,
    Html,
    count,
    document,
    el,
    folded,
    plural,
    section,
    short,
    table,
)
from unimrg.report.style import STYLE

MORE_STYLE = """
.results th:nth-child(n+2),.results td:nth-child(n+2){text-align:right}
.results tbody+tbody td{color:var(--soft)}
.results .group td{padding-top:16px;color:var(--ink);font-weight:600;text-align:left}
.results td:first-child{min-width:200px;font-weight:600}
.results tbody+tbody tr:not(.group) td:first-child,.results td:first-child small{font-weight:400}
.results th small{display:block;font-weight:400}
.scroll+h3{margin-top:24px}
"""


class Column(NamedTuple):
    """A score in the table. title: its benchmark; metric: which of its scores."""

    benchmark: str
    score: str
    title: str
    metric: str

    @property
    def key(self) -> str:
        return f"{self.benchmark} {self.score}"


PAPER = (
    Column("MMBench_DEV_EN", "circular", "MMBench", "circular"),
    Column("MMBench_DEV_EN", "vanilla_all", "MMBench", "all rows"),
    Column("MMVP", "average", "MMVP", "questions"),
    Column("MMVP", "pairs", "MMVP", "pairs"),
    Column("HallusionBench", "aAcc", "Hallusion", "aAcc"),
    Column("HallusionBench", "fAcc", "Hallusion", "fAcc"),
    Column("HallusionBench", "qAcc", "Hallusion", "qAcc"),
    Column("RealWorldQA", "overall", "RealWorldQA", "accuracy"),
    Column("VSR-zeroshot", "acc", "VSR", "accuracy"),
    Column("five_benchmarks", "average", "Five", "mean"),
    Column("GenEval", "overall", "GenEval", "overall"),
    Column("DPG-Bench", "overall", "DPG-Bench", "overall"),
)
"""What the paper's tables show, and what its scores may be taken for."""

SCENES = tuple(
    Column(name, score, name, metric)
    for name in ("Scenes_YN", "Scenes_MCQ")
    for score, metric in (
        ("accuracy", "accuracy"),
        ("chance", "chance"),
        ("pairs", "pairs"),
        ("misleads", "cue misleads"),
    )
)
"""Ours. All others are shown by their headline."""

SIZES = ("rows", "prompts", "items", "pictures")
"""Counts of what a result was scored on, the first that it has."""

OFFICIAL = {benchmark.name: benchmark.rows for benchmark in BENCHMARKS} | {"GenEval": 553, "DPG-Bench": 1065}
"""How many of them the official files have, where that is known."""


def results_page(evaluations: Sequence[Evaluation]) -> str:
    """The page: the paper's benchmarks in one table, others in a second, as far as any model has them."""
    header = el(
        "header",
        el("p", "unimrg evaluation", class_="eyebrow"),
        el("h1", "Benchmarks"),
        el("p", _amounts(evaluations)),
    )
    paper, others = _columns(evaluations)
    parts: list[Child] = [
        _scores("Results", evaluations, paper) if paper else None,
        _scores("More benchmarks" if paper else "Results", evaluations, others) if others else None,
        beside_chance(evaluations),
        _protocol(evaluations),
        _groups(evaluations),
        _sources([*paper, *others]),
    ]
    footer = el("footer", "Made by unimrg from stored results; it loads nothing from a network.")
    return document("Benchmarks \u00b7 unimrg", STYLE + MORE_STYLE, header, el("main", parts), footer)


def _amounts(evaluations: Sequence[Evaluation]) -> str:
    """How much was scored, in words."""
    results = [result for evaluation in evaluations for result in evaluation.results]
    words = [plural(len(evaluations), "model")]
    for name, noun in (("rows", "answer"), ("pictures", "drawing")):
        total = sum(result.counts.get(name, 0) for result in results)
        words += [plural(total, noun)] if total else []
    return f"{', '.join(words)}."


def _columns(evaluations: Sequence[Evaluation]) -> tuple[list[Column], list[Column]]:
    """Those of the paper's tables that there is a result for, and those of other results but drawings."""
    there = {result.benchmark: result for evaluation in evaluations for result in evaluation.results}
    paper, ours = ([c for c in known if c.benchmark in there] for known in (PAPER, SCENES))
    named = {column.benchmark for column in (*paper, *ours)} | set(DRAWINGS)
    others = [Column(name, r.headline, name, r.headline) for name, r in there.items() if name not in named]
    return paper, ours + others


def _scores(title: str, evaluations: Sequence[Evaluation], columns: Sequence[Column]) -> Html:
    best = {column: _best(evaluations, column) for column in columns}
    ours = [
        [_named(evaluation), *(_ours(evaluation, column, best[column]) for column in columns)]
        for evaluation in evaluations
    ]
    theirs: list[list[Child]] = [
        [
            [f"{entry.model}, {entry.variant}", el("small", CONFIDENCE[entry.confidence])],
            *(_said(entry, column) or DASH for column in columns),
        ]
        for entry in _published(columns)
    ]
    heads = ["", *([column.title, el("small", column.metric)] for column in columns)]
    names = ["", *(f"{column.title} {column.metric}" for column in columns)]
    bodies = [el("tbody", [_row(names, row) for row in ours])]
    if theirs:
        words = "Published by others, not measured here"
        group = el("tr", el("td", words, colspan=len(names)), class_="group")
        bodies.append(el("tbody", group, [_row(names, row) for row in theirs]))
    top = el("thead", el("tr", [el("th", head, scope="col") for head in heads]))
    whole = el("div", el("table", top, bodies, class_="numbers results"), class_="scroll")
    return section(title, whole, note=_note(ours, theirs), id_=title.split()[0].lower())


def _note(ours: Sequence[Sequence[Child]], theirs: Sequence[Sequence[Child]]) -> str:
    """What the marks in a table mean, of those that it has."""
    shown = str([row[1:] for row in (*ours, *theirs)])
    notes = {
        "<b>": "The best of several is bold.",
        "*": "* Not the official number of questions, so not comparable with published scores.",
        "(?)": "(?) Which of its scores it is isn\u2019t stated.",
        "+": "+ Only the gain over the base is known.",
    }
    said = [words for mark, words in notes.items() if mark in shown]
    if theirs:
        said.append(
            "Published numbers come from other code, prompts and judges: a difference to them says little."
        )
    return " ".join(["Percent; higher is better.", *said])


def _published(columns: Sequence[Column]) -> list[Published]:
    return [entry for entry in published() if any(_said(entry, column) for column in columns)]


def _named(evaluation: Evaluation) -> Child:
    other = evaluation.source != evaluation.name
    return [evaluation.name, el("small", evaluation.source) if other else None]


def _row(names: Sequence[str], cells: Sequence[Child]) -> Html:
    return el("tr", [el("td", cell, data_label=name) for name, cell in zip(names, cells, strict=True)])


def _find(evaluation: Evaluation, benchmark: str) -> BenchmarkResult | None:
    return next((result for result in evaluation.results if result.benchmark == benchmark), None)


def _best(evaluations: Sequence[Evaluation], column: Column) -> float:
    """The highest of several; infinity where there is nothing to choose."""
    results = [_find(evaluation, column.benchmark) for evaluation in evaluations]
    values = [r.scores[column.score] for r in results if r and column.score in r.scores]
    return max(values) if len(set(values)) > 1 else math.inf


def _ours(evaluation: Evaluation, column: Column, best: float) -> Child:
    result = _find(evaluation, column.benchmark)
    if result is None or column.score not in result.scores:
        return DASH
    value = result.scores[column.score]
    text = _value(result, value, column.score) + ("" if _whole(result) else "*")
    return el("b", text) if value == best else text


def _size(result: BenchmarkResult) -> tuple[str, int] | None:
    """What a result was scored on, and how many of them."""
    return next(((name, result.counts[name]) for name in SIZES if name in result.counts), None)


def _whole(result: BenchmarkResult) -> bool:
    """Whether as much was scored as the official file has, as far as is known."""
    size = _size(result)
    return size is None or OFFICIAL.get(result.benchmark) in (None, size[1])


def _value(result: BenchmarkResult, value: float, score: str) -> str:
    """A number as people read it: percent with two decimals, as the paper prints them; else three digits."""
    unit = result.units[score]
    if math.isnan(value):
        return DASH
    if unit in ("percent", "fraction"):
        return f"{value * (100 if unit == 'fraction' else 1):.2f}"
    return short(value) + (f"{NBSP}dB" if unit == "dB" else "")


def _said(entry: Published, column: Column) -> str:
    """What others published of a column, or ""."""
    if column.key in entry.scores:
        return f"{entry.scores[column.key]:.2f}"
    if column.key in entry.gains:
        return f"{entry.gains[column.key]:+.2f}".replace("-", MINUS)
    unnamed = entry.scores.get(column.benchmark)
    first = next((known.score for known in PAPER if known.benchmark == column.benchmark), column.score)
    return f"{unnamed:.2f}{NBSP}(?)" if unnamed is not None and column.score == first else ""


def _protocol(evaluations: Sequence[Evaluation]) -> Html:
    """How every number came about, and what was out of the ordinary."""
    asked = any("rows" in result.counts for evaluation in evaluations for result in evaluation.results)
    note = (
        "An answer in which nothing could be found counts as wrong, and so does a question that "
        "couldn\u2019t be asked because its picture is damaged."
    )
    parts = [_protocol_of(evaluation) for evaluation in evaluations]
    return section("Protocol", parts, note=note if asked else None, id_="protocol")


def _protocol_of(evaluation: Evaluation) -> list[Child]:
    """What holds for all results in a line, then a table of what differs and was counted."""
    scored = [result for result in evaluation.results if result.protocol]
    shared = {
        name: value
        for name, value in (scored[0].protocol.items() if scored else ())
        if all(result.protocol.get(name) == value for result in scored)
    }
    rows: list[list[Child]] = []
    for result in scored:
        rest = {name: value for name, value in result.protocol.items() if name not in shared}
        size = _size(result)
        counts = {name: count(n) for name, n in result.counts.items() if n and (name, n) != size}
        rows.append([result.benchmark, _amount(result), _listed(counts) or DASH, _listed(rest) or DASH])
    names = ["benchmark", "scored on", "counted", "differs"]
    if all(row[-1] == DASH for row in rows):
        names, rows = names[:-1], [row[:-1] for row in rows]
    return [el("h3", evaluation.name), el("p", _listed(shared), class_="note"), table(names, rows)]


def _amount(result: BenchmarkResult) -> str:
    size = _size(result)
    if size is None:
        return DASH
    name, amount = size
    official = OFFICIAL.get(result.benchmark)
    noun = name.removesuffix("s") if amount == 1 and official in (None, amount) else name
    return f"{count(amount)}{'' if official in (None, amount) else f' of {count(official or 0)}'} {noun}"


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in values.items())


def _groups(evaluations: Sequence[Evaluation]) -> Html | None:
    """Every score by category, a benchmark in a fold."""
    there = {
        result.benchmark: None
        for evaluation in evaluations
        for result in evaluation.results
        if result.groups and result.benchmark not in DRAWINGS
    }
    folds = [folded(benchmark, _groups_of(evaluations, benchmark)) for benchmark in there]
    return section("By category", folds, id_="categories") if folds else None


def _groups_of(evaluations: Sequence[Evaluation], benchmark: str) -> list[Child]:
    """One table with a column a score, or with several models a table a score."""
    found = [(evaluation.name, _find(evaluation, benchmark)) for evaluation in evaluations]
    results = [(name, result) for name, result in found if result is not None]
    scores = list({score: None for _, result in results for score in result.groups})
    parts = list({part: None for _, r in results for score in scores for part in r.groups.get(score, {})})
    if len(results) == 1:
        ((_, result),) = results
        rows: list[list[Child]] = [[p, *(_part(result, score, p) for score in scores)] for p in parts]
        return [table(["", *(score.replace("_", " ") for score in scores)], rows, class_="numbers")]
    tables: list[Child] = []
    for score in scores:
        mine = [part for part in parts if any(part in r.groups.get(score, {}) for _, r in results)]
        rows = [[part, *(_part(result, score, part) for _, result in results)] for part in mine]
        names = ["", *(name for name, _ in results)]
        tables += [el("h3", score.replace("_", " ")), table(names, rows, class_="numbers")]
    return tables


def _part(result: BenchmarkResult, score: str, part: str) -> str:
    return _value(result, result.groups.get(score, {}).get(part, math.nan), score)


def _sources(columns: Sequence[Column]) -> Html | None:
    entries = _published(columns)
    if not entries:
        return None
    rows: list[list[Child]] = [
        [
            f"{entry.model}, {entry.variant}",
            CONFIDENCE[entry.confidence],
            [entry.source, el("small", entry.note or None)],
        ]
        for entry in entries
    ]
    return section(
        "Sources of the published numbers", table(["model", "who says so", "where"], rows), id_="sources"
    )
