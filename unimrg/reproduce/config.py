"""Knobs of the reproduction, and what each arm of it trains on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from unimrg.config import knob, require, require_choice
from unimrg.errors import ConfigError
from unimrg.sample import IMAGE_TASKS, Task

FAMILIES = ("harmon", "janus")
"""Families with a recipe for a base (`models.RECIPES`)."""


@dataclass(frozen=True)
class Arm:
    """What one arm trains. drawn: the drawings beside questions. said: in a sentence, for tables.

    shuffled: every drawing is that of another picture. matched: trains as many steps more as the time of
    UniMRG allows. trained: False for the base.
    """

    said: str
    drawn: tuple[Task, ...] = ()
    shuffled: bool = False
    matched: bool = False
    trained: bool = True


ARMS: Mapping[str, Arm] = {
    "base": Arm("the model all arms start from", trained=False),
    "sft": Arm("understanding only"),
    "pixel": Arm("understanding and redrawing (RecA)", (Task.PIXEL,)),
    "depth": Arm("understanding and depth", (Task.DEPTH,)),
    "segmentation": Arm("understanding and boundaries", (Task.SEGMENTATION,)),
    "unimrg": Arm("all four tasks", IMAGE_TASKS),
    "shuffled": Arm("control: UniMRG with drawings of other pictures", IMAGE_TASKS, shuffled=True),
    "sft_longer": Arm("control: understanding only, for UniMRG's time", matched=True),
}


@dataclass
class ReproduceConfig:
    """Equal questions, equal steps, many seeds. Ablations are other weights, grad_scale or pictures."""

    name: str = knob("reproduce", "folder of the results below storage_path; finished trials are kept there")
    storage_path: str = knob("outputs", "folder of all results")
    family: str = knob("harmon", "architecture: " + ", ".join(FAMILIES))
    base: str = knob("", "folder of `unimrg.reproduce.base`; empty = the one that comes with the package")
    seeds: int = knob(3, "trainings of each arm; the seed is the unit of evidence")
    arms: list[str] = field(
        default_factory=lambda: list(ARMS), metadata={"help": "to compare: " + ", ".join(ARMS)}
    )
    pictures: int = knob(4000, "with questions, that arms train on; few = scarce questions")
    extra_pictures: int = knob(
        0, "without questions, and then only these are drawn; 0 = those with questions"
    )
    test: int = knob(350, "held-out pictures, about 19 questions each")
    steps: int = knob(300, "optimiser steps of an arm")
    batch_size: int = knob(16, "pictures per step")
    draws: int = knob(
        0, "pictures per step that are drawn, of those with questions or the extra ones; 0 = all"
    )
    questions: int = knob(10, "per picture and step")
    learning_rate: float = knob(3e-4, "peak, after the warm-up")
    pixel: float = knob(1.0, "weight of redrawing, understanding being 1")
    depth: float = knob(1.0, "weight of depth")
    segmentation: float = knob(1.0, "weight of boundaries")
    grad_scale: float = knob(
        -1.0, "factor on the gradient from looked-at pictures, 0..1; -1 = the base's own"
    )
    workers: int = knob(2, "processes of one thread each")
    device: str = knob("cpu", "cpu, or cuda: all workers share one GPU")

    def check(self) -> None:
        require_choice("family", self.family, FAMILIES)
        require_choice("device", self.device, ("cpu", "cuda"))
        for arm in self.arms:
            require_choice("arms", arm, ARMS)
        if len(set(self.arms)) < len(self.arms) or not self.arms:
            raise ConfigError(f"arms: {self.arms!r} must name at least one arm, and each once")
        missing = {"sft", "unimrg"} - set(self.arms) if "sft_longer" in self.arms else set()
        if missing:
            raise ConfigError(f"arms: sft_longer takes its time from {' and '.join(sorted(missing))}; add it")
        for key in ("seeds", "pictures", "test", "steps", "batch_size", "questions", "workers"):
            require(key, getattr(self, key), 1)
        require("extra_pictures", self.extra_pictures, 0)
        require("draws", self.draws, 0, self.batch_size)
        for key in ("pictures", "extra_pictures"):
            if 0 < getattr(self, key) < self.batch_size:
                raise ConfigError(f"{key}: {getattr(self, key)} don't fill a batch of {self.batch_size}")
        if "shuffled" in self.arms:  # another picture of the batch is drawn
            require("batch_size", self.batch_size, 2)
            require("draws", self.draws or self.batch_size, 2)
        require("learning_rate", self.learning_rate, 0, above=True)
        for task in IMAGE_TASKS:
            require(task.value, getattr(self, task.value), 0, above=True)
        if self.grad_scale != -1:
            require("grad_scale", self.grad_scale, 0, 1)

    def weights(self, arm: Arm) -> dict[Task, float]:
        """Of the tasks of an arm."""
        return {Task.UNDERSTANDING: 1.0} | {task: float(getattr(self, task.value)) for task in arm.drawn}
