"""Knobs of a search: those of an ordinary run, and the group `search` beside them."""

from __future__ import annotations

from dataclasses import dataclass, field

from tune.objectives import OBJECTIVES
from unimrg.config import RunConfig, knob, require, require_choice
from unimrg.errors import ConfigError

SEARCHING = ("tpe", "nsga2", "random", "grid", "asha")
"""Strategies that look for weights."""

BASELINES = ("equal", "uncertainty", "gradnorm", "famo")
"""Strategies that don't: the budget goes into the learning rate. All but the first balance in training."""


@dataclass
class SpaceConfig:
    """What is searched: [low, high] of each, on a logarithmic scale; [] = stays as the run's config says."""

    pixel: list[float] = field(
        default_factory=lambda: [0.05, 5.0], metadata={"help": "of weights.pixel, understanding being 1"}
    )
    depth: list[float] = field(
        default_factory=lambda: [0.05, 5.0], metadata={"help": "of weights.depth, understanding being 1"}
    )
    segmentation: list[float] = field(
        default_factory=lambda: [0.05, 5.0], metadata={"help": "of weights.segmentation, as the others"}
    )
    switches: bool = knob(False, "also whether each of these tasks is trained at all")
    learning_rate: list[float] = field(
        default_factory=list, metadata={"help": "of train.learning_rate, like [3e-4,3e-3]"}
    )
    grad_scale: list[float] = field(
        default_factory=list, metadata={"help": "of family.grad_scale, like [0.03,1]"}
    )
    levels: int = knob(3, "values of each that a grid tries")

    RANGES = ("pixel", "depth", "segmentation", "learning_rate", "grad_scale")

    def check(self) -> None:
        for name in self.RANGES:
            key, span = f"search.space.{name}", getattr(self, name)
            if not span:
                continue
            if len(span) != 2 or not span[0] < span[1]:
                raise ConfigError(f"{key}: {span!r} is no range; write [low,high], like [0.1,10]")
            require(key, span[0], 0, above=True)
        if self.grad_scale:
            require("search.space.grad_scale", self.grad_scale[1], 0, 1)
        if not any(getattr(self, name) for name in self.RANGES):
            raise ConfigError(
                "search.space is empty, so there is nothing to search; give a range, like "
                "search.space.depth=[0.1,10]"
            )
        require("search.space.levels", self.levels, 2)


@dataclass
class SearchOptions:
    """How to search, on what budget, and what counts."""

    strategies: list[str] = field(
        default_factory=lambda: ["tpe", "equal"],
        metadata={
            "help": "compared on equal budgets: of tpe, nsga2, random, grid, asha; and of equal, which keeps "
            "all weights equal and tunes the learning rate instead, uncertainty, gradnorm and famo, which "
            "do so and balance in training (weights.balance)"
        },
    )
    trials: int = knob(6, "budget of each strategy, in trainings of full length")
    objectives: list[str] = field(
        default_factory=lambda: ["accuracy"],
        metadata={
            "help": "what counts, measured on validation pictures; several give a Pareto front: "
            + ", ".join(OBJECTIVES)
        },
    )
    space: SpaceConfig = field(default_factory=SpaceConfig)
    rate_span: float = knob(4.0, "of equal: learning rates up to so many times lower and higher")
    reduction: int = knob(3, "of asha: one in so many goes on behind a rung")
    rungs: list[float] = field(
        default_factory=lambda: [0.25, 0.5],
        metadata={"help": "of asha: shares of the steps after which trials are compared"},
    )
    concurrent: int = knob(
        0,
        "trials at once, fewer where these have no room; 0 = as GPUs allow, two without",
    )
    validation: float = knob(
        0.5, "share of the held-out pictures that the search may see; the rest judges its outcome, 0..1"
    )
    questions: int = knob(400, "asked at most about the pictures of either part")
    drawings: int = knob(8, "pictures of either part that are drawn and scored; 0 = none")
    repeats: int = knob(5, "fresh seeds that the best, the default and the tuned equal weights are run with")
    max_failures: int = knob(1, "times that a trial is tried again from its last checkpoint")
    resume: bool = knob(False, "go on with the search of this name")

    def check(self) -> None:
        self.space.check()
        _require_words("search.strategies", self.strategies, (*SEARCHING, *BASELINES))
        _require_words("search.objectives", self.objectives, OBJECTIVES)
        several = len(self.objectives) > 1
        if several and "asha" in self.strategies:
            raise ConfigError(
                "search.strategies: asha compares by one objective, but search.objectives has "
                f"{len(self.objectives)}; leave one of them out"
            )
        for key in ("trials", "reduction"):
            require(f"search.{key}", getattr(self, key), 2)
        require("search.rate_span", self.rate_span, 1, above=True)
        for share in self.rungs:
            require("search.rungs", share, 0, 1, above=True)
        if sorted(set(self.rungs)) != list(self.rungs) or (not self.rungs and "asha" in self.strategies):
            raise ConfigError(f"search.rungs: {self.rungs!r} must be rising shares, like [0.25,0.5]")
        for key in ("concurrent", "questions", "drawings", "max_failures", "repeats"):
            require(f"search.{key}", getattr(self, key), 0)
        require("search.validation", self.validation, 0.05, 0.95)
        if not self.questions and not self.drawings:
            raise ConfigError("search.questions and search.drawings are both 0, so nothing is measured")


def _require_words(key: str, words: list[str], choices: object) -> None:
    """Some of `choices`, each once."""
    if not words:
        raise ConfigError(f"{key} is empty; give at least one of {', '.join(choices)}")  # type: ignore[arg-type]
    for word in words:
        require_choice(key, word, choices)  # type: ignore[arg-type]
    if len(set(words)) < len(words):
        raise ConfigError(f"{key}: {words!r} names one twice")


@dataclass
class SearchConfig(RunConfig):
    """A search: every trial is the run that the other keys describe, with what the search changes."""

    search: SearchOptions = field(default_factory=SearchOptions)

    def check(self) -> None:
        super().check()
        self.search.check()
        for name in ("pixel", "depth", "segmentation"):
            if getattr(self.search.space, name) and not getattr(self.weights, name):
                raise ConfigError(
                    f"search.space.{name} has a range but weights.{name} is 0; set the weight above 0, or "
                    f"search.space.{name}=[]"
                )
