"""`results.html`: checkpoints side by side on benchmarks, beside what others published."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from unimrg.benchmarks.evaluation import Evaluation
from unimrg.benchmarks.published import CONFIDENCE, Published, published
from unimrg.benchmarks.result import BenchmarkResult
from unimrg.benchmarks.understanding.registry import BENCHMARKS
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
)
"""What the paper's table shows, and what its scores may be taken for. Others are shown by their headline."""


def results_page(evaluations: Sequence[Evaluation]) -> str:
    """The page: the paper's benchmarks in one table, others in a second, as far as any model has them."""
    rows = sum(result.counts.get("rows", 0) for evaluation in evaluations for result in evaluation.results)
    header = el(
        "header",
        el("p", "unimrg evaluation", class_="eyebrow"),
        el("h1", "Benchmarks"),
        el("p", f"{plural(len(evaluations), 'model')}, {plural(rows, 'answer')} scored without a judge."),
    )
    paper, others = _columns(evaluations)
    parts: list[Child] = [
        _scores("Results", evaluations, paper) if paper else None,
        _scores("More benchmarks" if paper else "Results", evaluations, others) if others else None,
        _protocol(evaluations),
        _groups(evaluations),
        _sources([*paper, *others]),
    ]
    footer = el("footer", "Made by unimrg from stored results; it loads nothing from a network.")
    return document("Benchmarks \u00b7 unimrg", STYLE + MORE_STYLE, header, el("main", parts), footer)


def _columns(evaluations: Sequence[Evaluation]) -> tuple[list[Column], list[Column]]:
    """Those of the paper's table that there is a result for, and the headlines of all other results."""
    there = {result.benchmark: result for evaluation in evaluations for result in evaluation.results}
    paper = [column for column in PAPER if column.benchmark in there]
    named = {column.benchmark for column in paper}
    others = [Column(name, r.headline, name, r.headline) for name, r in there.items() if name not in named]
    return paper, others


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
        "*": "* Not the official number of rows, so not comparable with published scores.",
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
    """The highest of several; infinity where there is nothing to compare."""
    results = [_find(evaluation, column.benchmark) for evaluation in evaluations]
    values = [r.scores[column.score] for r in results if r and column.score in r.scores]
    return max(values) if len(values) > 1 else math.inf


def _ours(evaluation: Evaluation, column: Column, best: float) -> Child:
    result = _find(evaluation, column.benchmark)
    if result is None or column.score not in result.scores:
        return DASH
    value = result.scores[column.score]
    text = _value(result, value, column.score) + ("" if _whole(result) else "*")
    return el("b", text) if value == best else text


def _official(result: BenchmarkResult) -> int | None:
    """Rows of the official file, where they are known."""
    return {benchmark.name: benchmark.rows for benchmark in BENCHMARKS}.get(result.benchmark)


def _whole(result: BenchmarkResult) -> bool:
    """Whether as many rows were scored as the official file has, as far as is known."""
    return _official(result) in (None, result.counts.get("rows"))


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
    note = (
        "An answer in which nothing could be found counts as wrong, and so does a question that "
        "couldn\u2019t be asked because its picture is damaged."
    )
    parts = [_protocol_of(evaluation) for evaluation in evaluations]
    return section("Protocol", parts, note=note, id_="protocol")


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
        counts = {name: count(n) for name, n in result.counts.items() if n and name != "rows"}
        rows.append([result.benchmark, _rows_of(result), _listed(counts) or DASH, _listed(rest) or DASH])
    names = ["benchmark", "rows", "counted", "differs"]
    if all(row[-1] == DASH for row in rows):
        names, rows = names[:-1], [row[:-1] for row in rows]
    return [el("h3", evaluation.name), el("p", _listed(shared), class_="note"), table(names, rows)]


def _rows_of(result: BenchmarkResult) -> str:
    rows = result.counts.get("rows")
    official = _official(result)
    if rows is None:
        return DASH
    return count(rows) if official in (None, rows) else f"{count(rows)} of {count(official)}"


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in values.items())


def _groups(evaluations: Sequence[Evaluation]) -> Html | None:
    """Every score by category, a benchmark in a fold."""
    there = {
        result.benchmark: None for evaluation in evaluations for result in evaluation.results if result.groups
    }
    folds = [folded(benchmark, _groups_of(evaluations, benchmark)) for benchmark in there]
    return section("By category", folds, id_="categories") if folds else None


def _groups_of(evaluations: Sequence[Evaluation], benchmark: str) -> list[Child]:
    found = [(evaluation.name, _find(evaluation, benchmark)) for evaluation in evaluations]
    results = [(name, result) for name, result in found if result is not None]
    names = ["", *(name for name, _ in results)]
    tables: list[Child] = []
    for score in {score: None for _, result in results for score in result.groups}:
        parts = {part: None for _, result in results for part in result.groups.get(score, {})}
        rows: list[list[Child]] = [
            [part, *(_part(result, score, part) for _, result in results)] for part in parts
        ]
        tables += [el("h3", score), table(names, rows, class_="numbers")]
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
