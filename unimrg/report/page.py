"""Puts the parts together into one self-contained page."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from unimrg.errors import StorageError
from unimrg.report import drawings, questions, training
from unimrg.report.comparison import bracket, compare
from unimrg.report.folder import Run, load
from unimrg.report.markup import (
    DASH,
    Child,
    Html,
    count,
    document,
    el,
    folded,
    join,
    number,
    percent,
    plural,
    section,
    short,
    span,
)
from unimrg.report.secrets import hide_secrets
from unimrg.report.style import STYLE


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder from its stored files alone; gives back the path.

    The page depends on nothing but those files: the same files give the same bytes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StorageError(f"{folder} is not a folder; name the folder of a run, e.g. outputs/first")
    page = folder / "report.html"
    temporary = page.with_name("report.html.part")
    temporary.write_text(_page(load(folder)), encoding="utf-8")
    os.replace(temporary, page)
    return page


def _page(run: Run) -> str:
    parts: list[Child] = [
        questions.accuracy(run),
        training.losses(run),
        drawings.pictures(run),
        drawings.scores(run),
        questions.answers(run),
        training.speed(run),
        training.skipped(run),
        training.events(run),
        _configuration(run),
        _reproduce(run),
    ]
    title = f"{run.name} \u00b7 unimrg"
    return document(title, STYLE, _header(run), _contents(), el("main", parts), _footer())


def _header(run: Run) -> Html:
    notices = (
        el("ul", [el("li", notice) for notice in run.notices], class_="notices") if run.notices else None
    )
    return el(
        "header",
        el("p", "unimrg run", class_="eyebrow"),
        el("h1", run.name),
        questions.outcome(run),
        el("dl", _facts(run), class_="facts"),
        notices,
    )


def _facts(run: Run) -> list[Child]:
    facts: list[tuple[str, str, str]] = []
    if (result := compare(run.questions)) is not None:
        facts.append(
            ("Accuracy before", percent(result.before), f"{result.right_before} of {count(result.count)}")
        )
        facts.append(
            ("Accuracy after", percent(result.after), f"{result.right_after} of {count(result.count)}")
        )
        difference = percent(result.difference, sign=True)
        facts.append(("Points gained", difference, bracket(result.interval, sign=True)))
    facts.append(_state(run))
    facts.append(("Duration", span(training.duration(run)), "pauses included"))
    speed = training.median(run, "samples_per_second")
    facts.append(("Samples/s", short(speed), "median"))
    lost = sum(run.skipped.values())
    facts.append(("Skipped", count(lost), "samples"))
    faults = sum("fail" in str(event.get("event")) for event in run.events)
    resumed = sum(event.get("event") == "resume" for event in run.events)
    facts.append(("Faults", count(faults), plural(resumed, "restart") if resumed else ""))
    return [
        el("div", el("dt", name), el("dd", value, el("small", words) if words else None))
        for name, value, words in facts
    ]


def _state(run: Run) -> tuple[str, str, str]:
    """Steps done, and whether the run came to its end."""
    steps = number(run.metrics[-1]["step"]) if run.metrics else None
    done = DASH if steps is None else count(steps)
    if run.finished:
        return ("Steps", done, "finished")
    left = number(run.metrics[-1].get("time_left_seconds")) if run.metrics else None
    words = f"not finished, {span(left)} left" if left is not None and 0 < left < 1e12 else "not finished"
    return ("Steps", done, words if run.metrics or run.events else "nothing recorded")


def _contents() -> Html:
    names = ("losses", "drawings", "questions", "speed", "skipped", "events", "configuration", "reproduce")
    return el(
        "nav",
        el("ul", [el("li", el("a", name.capitalize(), href=f"#{name}")) for name in names]),
        aria_label="Parts",
    )


def _configuration(run: Run) -> Html:
    if run.config is None:
        return section(
            "Configuration", el("p", "No config.yaml was stored.", class_="empty"), id_="configuration"
        )
    text = hide_secrets(run.config)
    lines = plural(text.rstrip().count("\n") + 1, "line")
    return section("Configuration", folded(f"config.yaml, {lines}", el("pre", text)), id_="configuration")


def _reproduce(run: Run) -> Html:
    """The commands that made the run and this page."""
    folder = shlex.quote(f"outputs/{run.name}")
    started = next((e.get("detail") for e in run.events if e.get("event") == "start"), None)
    stored = started.get("command") if isinstance(started, dict) else None
    command = stored if isinstance(stored, str) else f"python -m unimrg.train --config {folder}/config.yaml"
    note = "The configuration holds the seed: the same data and software give the same order of samples."
    return section(
        "Reproduce",
        el("pre", f"{command}\npython -m unimrg.report {folder}"),
        note=note
        if run.config is not None
        else "Without config.yaml the run can\u2019t be repeated exactly.",
        id_="reproduce",
    )


def _footer() -> Html:
    return join(
        el(
            "footer",
            "Made by unimrg from the files of the run\u2019s folder; it loads nothing from a network.",
        )
    )
