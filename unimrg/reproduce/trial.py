"""One trial: an arm trained with a seed and scored on held-out pictures. A pure function of its arguments.

All arms of a seed see the same pictures and the same questions at the same steps, in the same order; what
differs is what is drawn beside them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from unimrg.benchmarks.scenes import Line, lines
from unimrg.config import EngineConfig, FamilyConfig, TrainConfig
from unimrg.engine import make_engine
from unimrg.families import load_family
from unimrg.families.base import Family
from unimrg.loop import StepOutput, fit
from unimrg.packing import Batch
from unimrg.reproduce.config import ARMS, Arm, ReproduceConfig
from unimrg.reproduce.data import Example, chosen, examples, order, sample, stored
from unimrg.reproduce.scoring import score
from unimrg.reproduce.world import FAMILIES
from unimrg.sample import Sample, Task

SEED = 2  # of the pictures: not the base's
TAIL = 25  # steps whose losses are kept as the last
SETS = {"pictures": ("train", 0), "extra_pictures": ("train", 1_000_000), "test": ("test", 0)}
"""Of each set of pictures its split and first number; they share none."""


def data(config: ReproduceConfig, base: Path, folder: Path, name: str) -> list[Example]:
    """One set of pictures (of `SETS`), from the folder of results or made first."""
    count = int(getattr(config, name))
    path = folder / "data" / f"{config.family}-{name}-{count}.pickle"
    return _data(config.family, str(base), str(path), name, count)


@cache
def _data(family: str, base: str, path: str, name: str, count: int) -> list[Example]:
    split, start = SETS[name]

    def make() -> Iterator[Example]:
        encoder = load_family(family).picture_encoder(FamilyConfig(name=family, weights=base))
        return examples(encoder, count, SEED, split, start)

    return stored(Path(path), make)


def run(
    config: ReproduceConfig, base: Path, folder: Path, name: str, seed: int, steps: int
) -> dict[str, Any]:
    """Train `steps` steps of an arm and score it; everything that is known of the trial, for JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    disable_progress_bar()
    arm, family = ARMS[name], load_family(config.family)
    settings = FamilyConfig(name=config.family, weights=str(base), grad_scale=config.grad_scale)
    model, tokenizer = family.build(settings, seed)
    model.set_grad_scale(config.grad_scale)
    model.to(config.device)
    started, outputs = time.process_time(), []
    if arm.trained:
        outputs = train(config, model, tokenizer, arm, seed, steps, base, folder)
    trained = time.process_time() - started
    items, marks = score(model, tokenizer, config.family, data(config, base, folder, "test"))
    found = lines(items, marks)
    return {
        "arm": name,
        "seed": seed,
        "steps": len(outputs),
        "cpu_seconds": trained,
        "losses": {"first": _losses(outputs[:1]), "last": _losses(outputs[-TAIL:])},
        "families": {line.family: _kept(line) for line in found},
        "headline": float(np.mean([line.balanced for line in found if line.family in FAMILIES])),
        "right": "".join(str(int(mark)) for mark in marks),
    }


def _kept(line: Line) -> dict[str, Any]:
    return asdict(line) | {"balanced": line.balanced, "reference": line.best_reference}


def _losses(outputs: Sequence[StepOutput]) -> dict[str, float]:
    tasks = outputs[0].losses if outputs else {}
    return {task.value: float(np.mean([output.losses[task] for output in outputs])) for task in tasks}


def train(
    config: ReproduceConfig,
    model: Family,
    tokenizer: Any,
    arm: Arm,
    seed: int,
    steps: int,
    base: Path,
    folder: Path,
) -> list[StepOutput]:
    """Train the model in place, by the project's own loop and engine."""
    settings = TrainConfig(
        steps=steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        prompt_dropout=0.0,
        checkpoint_every=0,
    )
    tasks = (Task.UNDERSTANDING, *arm.drawn)
    model.freeze([], tasks)
    engine = make_engine(model, settings, EngineConfig(name="torch"), torch.device(config.device))
    outputs: list[StepOutput] = []
    source = batches(config, model, tokenizer, arm, seed, steps, base, folder)
    model.train()
    fit(engine, source, config.weights(arm), steps, outputs.append)
    return outputs


def batches(
    config: ReproduceConfig,
    model: Family,
    tokenizer: Any,
    arm: Arm,
    seed: int,
    steps: int,
    base: Path,
    folder: Path,
) -> Iterator[list[Batch]]:
    """The micro-batches of every step: one, or a second one of drawings alone where not all are drawn."""
    family, settings = load_family(config.family), TrainConfig(prompt_dropout=0.0)
    own = data(config, base, folder, "pictures")
    extra = data(config, base, folder, "extra_pictures") if arm.drawn and config.extra_pictures else []
    draws = config.draws or config.batch_size
    apart = bool(arm.drawn) and (bool(extra) or draws < config.batch_size)

    def processor(*tasks: Task) -> Any:
        return family.processor(model, tokenizer, settings, tasks, seed, from_codes=True)

    ask = processor(Task.UNDERSTANDING, *(() if apart else arm.drawn))
    draw = processor(*arm.drawn) if apart else None
    more = order(len(extra), steps, draws, seed) if extra else None
    for step, numbers in enumerate(order(len(own), steps, config.batch_size, seed)):
        first = step * config.batch_size
        found = [ask([_sample(config, own[k], place, seed) for place, k in enumerate(numbers, first)])]
        if draw is not None:
            some = [extra[k] for k in next(more)] if more else [own[k] for k in numbers[:draws]]
            found.append(draw([sample(one, place, (), one.codes) for place, one in enumerate(some, first)]))
        yield [turned(batch) for batch in found] if arm.shuffled else found


def _sample(config: ReproduceConfig, example: Example, place: int, seed: int) -> Sample:
    """An example at a place of the order, with its questions and all that may be drawn of it."""
    questions = chosen(example, np.random.default_rng([8, seed, place]), config.questions, FAMILIES)
    return sample(example, place, questions, example.codes)


def turned(batch: Any) -> Any:
    """The batch with every drawing that of the next picture; masks and noise stay where they are."""
    sources = batch.target_source.clone()
    for task in batch.target_task.unique():
        places = (batch.target_task == task).nonzero().squeeze(1)
        sources[places] = batch.target_source[places.roll(1)]
    return replace(batch, target_source=sources)
