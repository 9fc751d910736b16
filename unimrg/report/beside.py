"""Scores of drawings on the page of results: a table a task, with chance beside what checkpoints drew."""

from __future__ import annotations

import math
from collections.abc import Sequence

from unimrg.benchmarks.dense.drawings import TASKS
from unimrg.benchmarks.evaluation import Evaluation
from unimrg.benchmarks.result import BenchmarkResult
from unimrg.report.markup import DASH, NBSP, Child, Html, el, section, short, table

LOWER = {"mae", "lpips", "inverted", "abs_rel", "adapted_rand_error", "variation_of_information"}
"""Scores of which less is better; none is better in chance."""

ACRONYMS = {"psnr", "ssim", "mae", "lpips", "ods", "ois"}
TITLES = {"redraw": "Redrawing", "depth": "Depth", "segmentation": "Boundaries and regions"}
BESIDE = {
    "constant": "chance: one value everywhere",
    "mean": "chance: mean of the other targets",
    "shuffled": "chance: target of another picture",
    "input": "the picture itself",
    "autoencoder": "the family\u2019s autoencoder: the ceiling",
}

Line = tuple[str, dict[str, float]]


def beside_chance(evaluations: Sequence[Evaluation]) -> Html | None:
    """The section, or None where nothing was drawn."""
    parts: list[Child] = []
    for name in TASKS:
        found = [(e.name, result) for e in evaluations for result in e.results if result.benchmark == name]
        if found:
            parts += [el("h3", TITLES[name]), _table(found)]
    note = "What the same scorer gives to maps that know nothing of the picture stands below each model. "
    note += "\u2193: less is better."
    return section("Drawings beside chance", parts, note=note, id_="drawings") if parts else None


def _table(found: Sequence[tuple[str, BenchmarkResult]]) -> Html:
    first = found[0][1]
    names = list(first.scores)
    drawn: list[Line] = [(name, result.scores) for name, result in found]
    heads = ["", *(_head(name) for name in names)]
    rows: list[list[Child]] = []
    for number, (label, values) in enumerate([*drawn, *_others(found)]):
        cells = [_value(values.get(name, math.nan), first.units[name]) for name in names]
        mine = number < len(drawn)
        rows.append([el("b", label) if mine else label, *(el("b", cell) if mine else cell for cell in cells)])
    return table(heads, rows, class_="numbers")


def _others(found: Sequence[tuple[str, BenchmarkResult]]) -> list[Line]:
    """What stands beside, once where it is the same for all models, else with the model's name."""
    lines: list[Line] = []
    for other in dict.fromkeys(
        part for _, result in found for group in result.groups.values() for part in group
    ):
        of_each = {name: _of(result, other) for name, result in found}
        same = all(_equal(values, next(iter(of_each.values()))) for values in of_each.values())
        label = BESIDE.get(other, other)
        named = (
            {label: next(iter(of_each.values()))}
            if same
            else {f"{label}, {n}": v for n, v in of_each.items()}
        )
        lines += named.items()
    return lines


def _of(result: BenchmarkResult, other: str) -> dict[str, float]:
    return {name: result.groups.get(name, {}).get(other, math.nan) for name in result.scores}


def _equal(some: dict[str, float], others: dict[str, float]) -> bool:
    """Whether two lines print alike, NaN or not."""
    return {name: str(value) for name, value in some.items()} == {
        name: str(value) for name, value in others.items()
    }


def _head(score: str) -> str:
    name = score.upper() if score in ACRONYMS else score.replace("_", " ").replace("iou", "IoU")
    return name + (f"{NBSP}\u2193" if score in LOWER else "")


def _value(value: float, unit: str) -> str:
    if math.isnan(value):
        return DASH
    return (
        f"{100 * value:.1f}{NBSP}%"
        if unit == "fraction"
        else short(value) + (f"{NBSP}dB" if unit == "dB" else "")
    )
