"""The results as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from unimrg.report.markup import Child, Html, el, folded, percent, section, table
from unimrg.report.style import STYLE
from unimrg.reproduce.analysis import HEADLINE, Estimate, Result, difference, looking, of, outcome
from unimrg.reproduce.analysis import table as rows_of
from unimrg.reproduce.config import ARMS, ReproduceConfig

TITLE = "Does drawing help seeing?"


def write_page(path: Path, config: ReproduceConfig, results: Sequence[Result], command: str) -> None:
    """Write the page; it loads nothing and runs nothing."""
    parts = [
        _levels(config, results),
        _differences(config, results, "sft", "understanding only, the same questions and steps"),
        _differences(config, results, "shuffled", "the control that draws other pictures"),
        _differences(config, results, "base", "before any of this"),
        _drawings(config, results),
        _settings(config, command),
    ]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        el(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; img-src data:; style-src 'unsafe-inline'",
        ),
        el("title", f"{TITLE} \u00b7 unimrg"),
        el("style", Html(STYLE)),
    )
    top = el(
        "header",
        el("p", "unimrg reproduction", class_="eyebrow"),
        el("h1", TITLE),
        el("p", outcome(results), class_="outcome"),
        el("p", looking(results)),
    )
    body = el("body", top, el("main", [part for part in parts if part is not None]))
    path.write_text("<!doctype html>\n" + el("html", head, body, lang="en") + "\n", "utf-8")


def _levels(config: ReproduceConfig, results: Sequence[Result]) -> Html:
    rows: list[list[Child]] = [list(row) for row in rows_of(results, config.arms)]
    note = (
        "Accuracy in percent, mean over seeds. Where a cue may mislead, the mean of the questions where it "
        "does and where it doesn\u2019t; headline: mean over families. Best shortcut: what a model reaches "
        "that sees the cue alone, on all questions."
    )
    said = [el("li", el("b", arm), f": {ARMS[arm].said}") for arm in config.arms if of(results, arm)]
    return section(
        "Arms", table([str(cell) for cell in rows[0]], rows[1:]), el("ul", said), note=note, id_="arms"
    )


def _differences(config: ReproduceConfig, results: Sequence[Result], other: str, words: str) -> Html | None:
    """Every arm minus one of them, by family."""
    if not of(results, other):
        return None
    families = [HEADLINE, *(name for name in results[0]["families"] if name != "all")]
    rows: list[list[Child]] = []
    for arm in config.arms:
        found = [difference(results, arm, other, family) for family in families]
        if found[0] is not None:
            rows.append([arm, *(_told(one) for one in found if one is not None)])
    note = (
        f"Points more than {other} ({words}): mean of the paired differences over seeds, with 95 % intervals "
        "by Student\u2019s t. Bold: the interval leaves zero out. Many are looked at, uncorrected."
    )
    return section(f"Against {other}", table(["arm", *families], rows), note=note, id_=f"against-{other}")


def _told(found: Estimate) -> Child:
    value = percent(found.mean, sign=True)
    if found.seeds < 2:
        return value
    ends = f"{percent(found.interval.low, sign=True)} to {percent(found.interval.high, sign=True)}"
    return [el("b", value) if found.clear else value, " ", el("small", ends)]


def _drawings(config: ReproduceConfig, results: Sequence[Result]) -> Html | None:
    """Losses at the first steps and at the last."""
    rows: list[list[Child]] = []
    for arm in config.arms:
        trials = list(of(results, arm).values())
        if ARMS[arm].trained and trials:
            tasks = trials[0]["losses"]["last"]
            rows += [
                [arm, task, *(_mean_loss(trials, when, task) for when in ("first", "last"))] for task in tasks
            ]
    return section(
        "Losses", folded("First step and last steps", table(["arm", "task", "first", "last"], rows))
    )


def _mean_loss(trials: Sequence[Result], when: str, task: str) -> str:
    values = [trial["losses"][when][task] for trial in trials]
    return f"{sum(values) / len(values):.3f}"


def _settings(config: ReproduceConfig, command: str) -> Html:
    said = "\n".join(f"{key}: {value}" for key, value in asdict(config).items())
    return section("Settings", el("pre", command), folded("All values", el("pre", said)), id_="settings")
