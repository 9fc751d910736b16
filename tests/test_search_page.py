"""`search.html`: whole, self-contained, and honest in every state of a search."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from tests.search_trials import repeated, searched
from tune.config import SearchConfig
from tune.page import search_page
from tune.records import Trial
from unimrg.config import to_plain

VOID = {"meta", "img", "br", "path", "line", "circle", "rect", "polyline"}


def page(trials: list[Trial], objectives: tuple[str, ...] = ("accuracy",), **facts: Any) -> str:
    config = SearchConfig()
    config.search.objectives = list(objectives)
    given: dict[str, Any] = {
        "title": "a <search>",
        "config": to_plain(config),
        "objectives": list(objectives),
        "trials": trials,
        "running": False,
        "same": {},
        "command": "python -m unimrg.train experiment=best.yaml",
    }
    return search_page(**given | facts)


class Balanced(HTMLParser):
    """Complains about elements that aren't closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


REPEATS = [*repeated("best", [0.5, 0.52, 0.49]), *repeated("default", [0.5, 0.5, 0.5])]
STATES: dict[str, tuple[list[Trial], dict[str, Any]]] = {
    "empty": ([], {"running": True}),
    "one": (searched(0), {"running": True}),
    "searched": (searched(8), {}),
    "whole": ([*searched(30), *searched(5, strategy="equal")[1:], *REPEATS], {"same": {"equal": "default"}}),
}


@pytest.mark.parametrize("objectives", [("accuracy",), ("accuracy", "pixel_psnr")])
@pytest.mark.parametrize("state", STATES)
def test_every_state_is_a_whole_page(state: str, objectives: tuple[str, ...]) -> None:
    trials, facts = STATES[state]
    text = page(trials, objectives, **facts)
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert not re.search(r"(?:src|href)=.(?!#)|url\(|<script|@import", text)
    assert "a &lt;search&gt;" in text
    assert all(trial.id in text for trial in trials if trial.phase == "search")
    assert all(str(trial.seed) in text for trial in trials)
    assert ("still running" in text) == facts.get("running", False)
    assert ("Pareto front" in text) == (len(objectives) > 1)


def test_what_is_not_significant_is_said() -> None:
    text = page([*searched(30), *REPEATS], same={"equal": "default"})
    assert text.count("not significant: either may be the better one") == 2
    sure = [*repeated("best", [0.8, 0.8, 0.8]), *repeated("default", [0.4, 0.4, 0.4])]
    text = page([*searched(30), *sure], same={"equal": "default"})
    assert "significantly better" in text
    assert "not significant" not in text


def test_nothing_found_is_said() -> None:
    assert "Nothing did better than the configuration the search began with" in page(searched(0))
    assert "nothing did better" in page(searched(0), same={"best": "default", "equal": "default"})


def test_failed_trials_are_told_with_their_reason() -> None:
    trials = searched(3)
    trials[2].state, trials[2].values, trials[2].error = "failed", {}, "the loss is <nan>"
    text = page(trials)
    assert re.search(r"1\strial failed", text)
    assert "tpe-002: the loss is &lt;nan&gt;" in text
    every = [Trial("start", "start", "search", 0, 0, {}, "failed", 0, 1.0, error="no disk")]
    assert "No trial was finished" in page(every)
