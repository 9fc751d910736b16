"""`results.html`: checkpoints side by side on benchmarks, beside what others published."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
.results tbody+tbody tr:not(.group) td:first-child{font-weight:400}
.results td small{font-weight:400;white-space:normal}
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


KNOWN = (
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
    """The page. A column for every benchmark that one of them has; the first column names the row."""
    columns = _columns(evaluations)
    rows = sum(result.counts.get("rows", 0) for evaluation in evaluations for result in evaluation.results)
    header = el(
        "header",
        el("p", "unimrg evaluation", class_="eyebrow"),
        el("h1", "Benchmarks"),
        el("p", f"{plural(len(evaluations), 'model')}, {plural(rows, 'answer')} scored without a judge."),
    )
    theirs = [entry for entry in published() if any(_said(entry, column) for column in columns)]
    parts: list[Child] = [
        _scores(evaluations, columns, theirs),
        _protocol(evaluations),
        _groups(evaluations),
        _sources(theirs),
    ]
    footer = el("footer", "Made by unimrg from stored results; it loads nothing from a network.")
    return document("Benchmarks \u00b7 unimrg", STYLE + MORE_STYLE, header, el("main", parts), footer)


def _columns(evaluations: Sequence[Evaluation]) -> list[Column]:
    there = {result.benchmark: result for evaluation in evaluations for result in evaluation.results}
    known = [column for column in KNOWN if column.benchmark in there]
    named = {column.benchmark for column in known}
    others = [Column(name, r.headline, name, r.headline) for name, r in there.items() if name not in named]
    return known + others


def _scores(
    evaluations: Sequence[Evaluation], columns: Sequence[Column], theirs: Sequence[Published]
) -> Html:
    best = {column: _best(evaluations, column) for column in columns}
    ours = [
        [evaluation.name, *(_ours(evaluation, column, best[column]) for column in columns)]
        for evaluation in evaluations
    ]
    others: list[list[Child]] = [
        [
            [f"{entry.model}, {entry.variant}", el("small", CONFIDENCE[entry.confidence])],
            *(_said(entry, column) or DASH for column in columns),
        ]
        for entry in theirs
    ]
    heads = ["", *([column.title, el("small", f" {column.metric}")] for column in columns)]
    names = ["", *(f"{column.title} {column.metric}" for column in columns)]
    top = el("thead", el("tr", [el("th", head, scope="col") for head in heads]))
    bodies = [el("tbody", [_row(names, row) for row in ours])]
    if others:
        group = el(
            "tr", el("td", "Published by others, not measured here", colspan=len(names)), class_="group"
        )
        bodies.append(el("tbody", group, [_row(names, row) for row in others]))
    note = (
        "Percent, higher is better; the best of several is bold. Published numbers come from other code, "
        "prompts and judges: a difference to them says little. (?): which score it is isn\u2019t stated. "
        "+: only the gain over the base is known."
    )
    whole = el("div", el("table", top, bodies, class_="numbers results"), class_="scroll")
    return section("Results", whole, note=note, id_="results")


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
    text = _value(result, result.scores[column.score])
    official = {benchmark.name: benchmark.rows for benchmark in BENCHMARKS}.get(result.benchmark)
    rows = result.counts.get("rows")
    few = (
        el("small", f"{count(rows)} of {count(official)} rows")
        if rows and official and rows != official
        else None
    )
    return [el("b", text) if result.scores[column.score] == best else text, few]


def _value(result: BenchmarkResult, value: float, score: str = "") -> str:
    """A number as people read it: percent with two decimals, as the paper prints them; else three digits."""
    unit = result.units[score or result.headline]
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
    first = next((known.score for known in KNOWN if known.benchmark == column.benchmark), column.score)
    return f"{unnamed:.2f}{NBSP}(?)" if unnamed is not None and column.score == first else ""


def _protocol(evaluations: Sequence[Evaluation]) -> Html:
    """How every number came about, and what was out of the ordinary."""
    rows: list[list[Child]] = []
    for evaluation in evaluations:
        for result in evaluation.results:
            counts = ", ".join(f"{name} {count(n)}" for name, n in result.counts.items() if n)
            protocol = ", ".join(f"{name}: {value}" for name, value in result.protocol.items())
            rows.append([evaluation.name, result.benchmark, counts or DASH, protocol or DASH])
    note = (
        "An answer in which nothing could be found counts as wrong, and so does a question that "
        "couldn\u2019t be asked because its picture is damaged."
    )
    return section(
        "Protocol", table(["model", "benchmark", "counts", "how"], rows), note=note, id_="protocol"
    )


def _groups(evaluations: Sequence[Evaluation]) -> Html | None:
    """Every score by category, folded away."""
    names = [evaluation.name for evaluation in evaluations]
    folds: list[Child] = []
    keys = {
        (result.benchmark, score): None
        for evaluation in evaluations
        for result in evaluation.results
        for score in result.groups
    }
    for benchmark, score in keys:
        results = [_find(evaluation, benchmark) for evaluation in evaluations]
        parts = {part: None for result in results if result for part in result.groups.get(score, {})}
        rows: list[list[Child]] = [
            [part, *(_part(result, score, part) for result in results)] for part in parts
        ]
        folds.append(folded(f"{benchmark}, {score}", table([score, *names], rows, class_="numbers")))
    return section("By category", folds, id_="categories") if folds else None


def _part(result: BenchmarkResult | None, score: str, part: str) -> str:
    value = result.groups.get(score, {}).get(part, math.nan) if result else math.nan
    return DASH if result is None or math.isnan(value) else _value(result, value, score)


def _sources(entries: Sequence[Published]) -> Html | None:
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
