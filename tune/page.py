"""`search.html`: what was searched, what was found, and whether it holds; one file that loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from tune import charts
from tune.analysis import best, importance, pareto_front, so_far
from tune.charts import Column, Series, colour_of
from tune.objectives import OBJECTIVES
from tune.records import REPEATED, SEARCHED, Trial
from tune.verdict import ROLES, judge
from unimrg.report.markup import (
    Child,
    Html,
    document,
    el,
    folded,
    percent,
    plural,
    section,
    short,
    span,
    table,
)
from unimrg.report.style import STYLE

TITLES = {
    "weights.pixel": "pixel",
    "weights.depth": "depth",
    "weights.segmentation": "segmentation",
    "train.learning_rate": "learning rate",
    "family.grad_scale": "gradient scale",
}
TOP_SHARE = 3
"""One trial in so many is drawn strong."""

MORE_STYLE = """
svg .trial{fill:none;stroke:var(--soft);stroke-width:1;opacity:.35}
svg .trial.top{stroke:var(--understanding);stroke-width:1.6;opacity:.75}
svg .trial.best{stroke:var(--depth);stroke-width:3.6;opacity:1}
.card+.card,.card+.scroll{margin-top:16px}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0 0}.series{display:inline-flex;gap:6px}
"""


@dataclass(frozen=True)
class Search:
    """What the page shows. same: roles of the repeats that are another role's configuration."""

    title: str
    config: dict[str, Any]
    objectives: list[str]
    trials: list[Trial]
    running: bool
    same: dict[str, str]
    command: str

    @property
    def searched(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.phase == SEARCHED]

    @property
    def done(self) -> list[Trial]:
        return [trial for trial in self.searched if trial.state == "done"]

    @property
    def strategies(self) -> list[str]:
        return list(self.config["search"]["strategies"])

    @property
    def best(self) -> Trial | None:
        return best(self.trials, self.objectives[0])

    def of(self, strategy: str) -> list[Trial]:
        """A strategy's trials, and the start that all have in common."""
        return [trial for trial in self.searched if trial.strategy in (strategy, "start")]

    def value(self, trial: Trial, key: str) -> float | None:
        """Of a searched key: the trial's, or that of the search's own configuration."""
        value: Any = self.config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        found = trial.changes.get(key, value)
        return float(found) if isinstance(found, int | float) else None

    @property
    def keys(self) -> list[str]:
        """The keys that any trial changed, those of the space in the order of the config."""
        changed = {key for trial in self.trials for key in trial.changes}
        return [key for key in TITLES if key in changed]


def search_page(**facts: Any) -> str:
    """The whole page. Arguments: those of `Search`."""
    search = Search(**facts)
    parts: list[Child] = [
        _comparison(search),
        _strategies(search),
        _parallel(search),
        _front(search),
        _importance(search),
        _courses(search),
        _curves(search),
        _trials(search),
        _configuration(search),
        _reproduce(search),
    ]
    title = f"{search.title} \u00b7 search \u00b7 unimrg"
    footer = el("footer", "Made by unimrg from the search\u2019s records; it loads nothing from a network.")
    return document(title, STYLE + MORE_STYLE, _header(search), el("main", parts), footer)


# -- what was found ------------------------------------------------------------------------------------------


def _header(search: Search) -> Html:
    notices = []
    if search.running:
        notices.append("The search is still running; this page is written again as trials finish.")
    failed = [trial for trial in search.trials if trial.state == "failed"]
    if failed:
        notices.append(f"{plural(len(failed), 'trial')} failed; the table of trials says why.")
    return el(
        "header",
        el("p", "unimrg search", class_="eyebrow"),
        el("h1", search.title),
        el("p", _sentence(search), class_="outcome open"),
        _facts(search),
        el("ul", [el("li", notice) for notice in notices], class_="notices") if notices else None,
    )


def _sentence(search: Search) -> str:
    found, objective = search.best, search.objectives[0]
    if found is None:
        return "No trial is finished yet." if search.running else "No trial was finished: nothing was found."
    unit = OBJECTIVES[objective].unit
    value = f"{OBJECTIVES[objective].title} {_value(objective, found)}{' ' * bool(unit)}{unit}"
    value += " on the validation pictures"
    if found.strategy == "start":
        return f"Nothing did better than the configuration the search began with: {value}."
    return f"The best trial is {found.id} ({_changes(found)}): {value}."


def _facts(search: Search) -> Html:
    steps = sum(trial.steps for trial in search.trials)
    seconds = sum(trial.seconds for trial in search.trials)
    states = [trial.state for trial in search.searched]
    rows = (
        ("Trials", str(len(search.searched)), f"{states.count('stopped')} stopped early"),
        ("Repeats", str(len(search.trials) - len(search.searched)), "with fresh seeds"),
        ("Steps", f"{steps:,}", "of all trainings"),
        ("Time", span(seconds), "of all trials, added"),
    )
    return el(
        "dl",
        [el("div", el("dt", name), el("dd", value, el("small", note))) for name, value, note in rows],
        class_="facts",
    )


def _comparison(search: Search) -> Html:
    """The best against the default and against tuned equal weights, on pictures no search has seen."""
    repeats = [trial for trial in search.trials if trial.phase == REPEATED]
    lines: list[Child] = []
    roles = [role for role in ROLES if role == "default" or "equal" in search.strategies]
    for role in roles:
        lines.append(el("p", _judgement(search, repeats, role)))
    rows: list[list[Child]] = []
    for role in ("best", *roles):
        own = search.same.get(role, role)
        for trial in repeats:
            if trial.strategy == own and own == role:
                right = [answer["correct"] for answer in trial.answers]
                cell = percent(sum(right) / len(right)) if right else "\u2013"
                others = " · ".join(
                    f"{OBJECTIVES[name].title} {_value(name, trial)}"
                    for name in trial.values
                    if name != "accuracy"
                )
                rows.append([role, str(trial.seed), cell, trial.state, others])
    shown = (
        folded("every repeat", table(["Configuration", "Seed", "Accuracy", "State", "Also measured"], rows))
        if rows
        else None
    )
    note = (
        "Each configuration was trained again with the same fresh seeds and asked about pictures that the "
        "search has not seen. The interval counts the seeds and the questions, and is rather too wide than "
        "too narrow."
    )
    return section("Does it hold?", lines, shown, note=note, id_="comparison")


def _judgement(search: Search, repeats: Sequence[Trial], role: str) -> str:
    if search.best is None or (search.running and not repeats):
        return f"The best against {ROLES[role]}: not judged yet."
    return judge(repeats, search.same, role, search.objectives[0])


def _strategies(search: Search) -> Html:
    rows: list[list[Child]] = []
    for name in search.strategies:
        mine = search.of(name)
        top = best(mine, search.objectives[0])
        states = [trial.state for trial in mine]
        rows.append(
            [
                name,
                str(len(mine)),
                f"{sum(trial.steps for trial in mine):,}",
                f"{states.count('stopped')} / {states.count('failed')}",
                *(_value(objective, top) for objective in search.objectives),
                _changes(top),
            ]
        )
    head = ["Strategy", "Trials", "Steps", "Stopped / failed"]
    head += [f"Best: {_title(name)}" for name in search.objectives] + ["With"]
    note = "Each has the same budget and begins with the search\u2019s own configuration."
    return section("Strategies", el("div", table(head, rows), class_="scroll"), note=note, id_="strategies")


# -- charts --------------------------------------------------------------------------------------------------


def _parallel(search: Search) -> Html:
    objective = search.objectives[0]
    order = sorted(search.done, key=lambda t: OBJECTIVES[objective].sign * t.values[objective])
    if not order:
        return section("All trials at once", _nothing(), id_="parallel")
    columns = [
        Column(TITLES[key], [search.value(trial, key) for trial in order], log=True) for key in search.keys
    ]
    columns += [
        Column(OBJECTIVES[name].title, [trial.values.get(name) for trial in order])
        for name in search.objectives
    ]
    top = len(order) - max(1, len(order) // TOP_SHARE)
    classes = ["trial best" if t is search.best else "trial top" if k >= top else "trial"
               for k, t in enumerate(order)]  # fmt: skip
    names = [f"{trial.id}: {_changes(trial)}, {_value(objective, trial)}" for trial in order]
    note = (
        "A line for each finished trial, weights on logarithmic axes; thick: the best, coloured: the best "
        "third, faint: the others."
    )
    chart = charts.parallel(columns, classes, names)
    return section("All trials at once", el("div", chart, class_="card"), note=note, id_="parallel")


def _front(search: Search) -> Html | None:
    if len(search.objectives) < 2:
        return None
    first, second = search.objectives[:2]
    series = [
        Series(f"{t.id}: {_changes(t)}", [(t.values[first], t.values[second])],
               colour_of(search.strategies, t.strategy))
        for t in search.done
    ]  # fmt: skip
    front = pareto_front(search.trials, search.objectives)
    rows: list[list[Child]] = [
        [trial.id, *(_value(name, trial) for name in search.objectives), _changes(trial)] for trial in front
    ]
    line = pareto_front(search.trials, search.objectives[:2])
    chart = charts.scatter(
        series, [(t.values[first], t.values[second]) for t in line], _title(first), _title(second)
    )
    listed = table(["Trial", *(_title(name) for name in search.objectives), "With"], rows)
    return section(
        "Pareto front",
        el("div", chart, charts.legend(search.strategies), class_="card"),
        el("div", listed, class_="scroll"),
        note="No other trial is better in one of the objectives without being worse in another.",
        id_="front",
    )


def _importance(search: Search) -> Html:
    cards: list[Child] = []
    known = {trial.id: {key: search.value(trial, key) for key in search.keys} for trial in search.done}
    filled = [
        replace(trial, changes={key: value for key, value in known[trial.id].items() if value is not None})
        for trial in search.done
    ]
    for objective in search.objectives:
        found = importance(filled, objective, search.keys)
        if found:
            chart = charts.shares(found, TITLES)
            cards.append(el("figure", el("figcaption", _title(objective)), chart, class_="card"))
    body: Child = cards or el(
        "p", "Too few trials changed all of the weights to say which of them mattered.", class_="empty"
    )
    note = (
        "Share of the explained variance, with its 95 % interval over resampled trials. Intervals as wide as "
        "the axis mean that the trials can\u2019t tell."
    )
    return section("What mattered", body, note=note, id_="importance")


def _courses(search: Search) -> Html:
    objective = search.objectives[0]
    series = [
        Series(name, so_far(search.of(name), objective), colour_of(search.strategies, name), steps=True)
        for name in search.strategies
    ]
    chart = charts.courses([one for one in series if one.points], "steps", f"best {_title(objective)}")
    return section("Best so far", el("div", chart, class_="card"), id_="courses")


def _curves(search: Search) -> Html:
    """The understanding loss of all trials, smoothed by what their records hold."""
    name = "loss/understanding"
    series = []
    for trial in sorted(search.searched, key=lambda t: t is search.best):
        points = [(row["step"], row[name]) for row in trial.losses if row.get(name) is not None]
        colour = "depth" if trial is search.best else colour_of(search.strategies, trial.strategy)
        series.append(Series(trial.id, _smooth(points), colour, strong=trial is search.best))
    chart = charts.courses([one for one in series if one.points], "step", "loss of understanding")
    note = "Training loss of understanding, a moving mean over a tenth of each course; thick: the best trial."
    body = el("div", chart, charts.legend(search.strategies), class_="card")
    return section("Learning curves", body, note=note, id_="curves")


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    reach = max(1, len(points) // 20)
    found = []
    for number, (step, _) in enumerate(points):
        near = [value for _, value in points[max(0, number - reach) : number + reach + 1]]
        found.append((step, sum(near) / len(near)))
    return found


# -- tables --------------------------------------------------------------------------------------------------


def _trials(search: Search) -> Html:
    rows: list[list[Child]] = []
    for trial in search.searched:
        values: list[Child] = [_value(name, trial) for name in search.objectives]
        rows.append(
            [trial.id, *(short(search.value(trial, key)) for key in search.keys), *values,
             trial.state, str(trial.steps), span(trial.seconds)]
        )  # fmt: skip
    head = ["Trial", *(TITLES[key] for key in search.keys)]
    head += [_title(name) for name in search.objectives] + ["State", "Steps", "Time"]
    body: Child = el("div", table(head, rows, class_="numbers"), class_="scroll") if rows else _nothing()
    failed = [el("li", f"{trial.id}: {trial.error}") for trial in search.trials if trial.error]
    why = el("ul", failed, class_="notices") if failed else None
    return section("Trials", body, why, id_="trials")


def _configuration(search: Search) -> Html:
    text = yaml.safe_dump(search.config, sort_keys=False, allow_unicode=True)
    lines = plural(text.rstrip().count("\n") + 1, "line")
    return section("Configuration", folded(f"of the search, {lines}", el("pre", text)), id_="configuration")


def _reproduce(search: Search) -> Html:
    note = "best.yaml holds every key in which the best trial, if it held, differs from an ordinary run."
    return section("Train with the best", el("pre", search.command), note=note, id_="reproduce")


def _nothing() -> Html:
    return el("p", "No trial is finished yet.", class_="empty")


def _title(objective: str) -> str:
    unit = OBJECTIVES[objective].unit
    return OBJECTIVES[objective].title + (f", {unit}" if unit else "")


def _value(objective: str, trial: Trial | None) -> str:
    value = None if trial is None else trial.values.get(objective)
    if value is None:
        return "\u2013"
    if objective in ("accuracy", "pair_accuracy", "depth_delta1"):
        return percent(value)
    return short(value)


def _changes(trial: Trial | None) -> str:
    """What it changed, in words."""
    if trial is None:
        return "\u2013"
    words = []
    for key, value in trial.changes.items():
        name = TITLES.get(key, key.rpartition(".")[2])
        shown = "off" if value == 0 else short(value) if isinstance(value, int | float) else str(value)
        words.append(f"{name} {shown}")
    return ", ".join(words) or "as configured"
