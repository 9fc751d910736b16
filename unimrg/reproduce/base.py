"""The model that all arms start from: small, but it answers what it sees and redraws it.

    python -m unimrg.reproduce.base outputs/base

Four phases: the picture's cells are named (colour, shape, column, row, by the words of answers); then come
questions, with "Where is red?" among them and naming rehearsed; then questions together with redrawing; then
with several drawings, asked for by name (`changes`). In the last two a linear guess at what is drawn is
trained beside, and dropped in the end, because a diffusion head that has learnt to do without the picture
hardly asks for it. The folder is one of `save_pretrained`, with its tokenizer and `base.json`, what was done
and how good it is. A phase that is finished is kept in it and not trained again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from unimrg.benchmarks.dense import psnr
from unimrg.benchmarks.scenes import lines, table
from unimrg.config import EngineConfig, FamilyConfig, TrainConfig
from unimrg.engine import Engine, make_engine
from unimrg.errors import ConfigError, UnimrgError
from unimrg.families import load_family
from unimrg.families.base import DrawOptions, Family
from unimrg.families.encoder import PictureEncoder
from unimrg.losses import combine
from unimrg.reproduce.changes import NAMES, asked_for, changed, prompt
from unimrg.reproduce.data import Example, chosen, examples, order, sample, stored
from unimrg.reproduce.models import RECIPES, Guess, Recipe
from unimrg.reproduce.scoring import score
from unimrg.reproduce.words import NAMES as WORDS
from unimrg.reproduce.words import ids_of
from unimrg.reproduce.world import COLUMNS, FAMILIES, ROWS
from unimrg.sample import Sample, Task
from unimrg.weights import load_strictly

BASE_SEED = 1  # of its pictures: arms draw others
SHARPNESS = 8.0  # factor on the cosines of naming
NOTHING, EMPTY = 1.0, 0.2  # score, and weight in the loss, of a cell that shows nothing
REPORT_EVERY = 50
TRAIN = TrainConfig(prompt_dropout=0.0)
DRAWN, TEMPERATURE = 32, 0.5  # held-out pictures that are redrawn, and how


@dataclass(frozen=True)
class BaseConfig:
    """The recipe. rates: peaks of the four phases. rehearsal: weight of naming beside questions.

    draw: weight of drawings; guess: of the linear guess at them, where the family has one.
    """

    family: str = "harmon"
    pictures: int = 4000
    naming_steps: int = 400
    question_steps: int = 700
    drawing_steps: int = 500
    listening_steps: int = 700
    naming_batch: int = 32
    batch: int = 16
    questions: int = 12
    rates: tuple[float, float, float, float] = (2e-3, 1.5e-3, 7e-4, 7e-4)
    rehearsal: float = 0.2
    draw: float = 0.5
    guess: float = 0.5
    test: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Phase:
    """tasks: trained beside naming. drawn: of `changes.NAMES`, what drawings are asked for."""

    steps: int
    tasks: tuple[Task, ...] = ()
    drawn: tuple[str, ...] = ()


def phases(config: BaseConfig) -> tuple[Phase, ...]:
    """In their order."""
    asking = Task.UNDERSTANDING
    return (
        Phase(config.naming_steps),
        Phase(config.question_steps, (asking,)),
        Phase(config.drawing_steps, (asking, Task.PIXEL), NAMES[:1]),
        # A changed picture takes the place of depth, since redrawing's target is always the picture itself.
        Phase(config.listening_steps, (asking, Task.DEPTH), NAMES),
    )


Naming = Callable[[Sequence[Example]], Tensor]


def make_base(config: BaseConfig, folder: Path, tell: Callable[[str], None] = print) -> None:
    """Train the base and write it into `folder`; its pictures stay in `folder`/data."""
    torch.set_num_threads(1)
    disable_progress_bar()
    _same_recipe(config, folder)
    family, recipe = load_family(config.family), RECIPES[config.family]
    model, tokenizer = recipe.build(config.seed)
    encoder = family.picture_encoder(FamilyConfig(name=config.family))
    data = {
        split: stored(
            folder / "data" / f"{split}.pickle", partial(examples, encoder, count, BASE_SEED, split)
        )
        for split, count in (("train", config.pictures), ("test", config.test))
    }
    seconds = 0.0
    for number, phase in enumerate(phases(config)):
        done = folder / "phases" / f"{number + 1}.safetensors"
        if not done.is_file():
            started = time.process_time()
            _train(config, number, phase, model, tokenizer, encoder, data["train"], tell)
            tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            save_file(tensors, done, {"cpu_seconds": str(time.process_time() - started)})
        load_strictly(model, load_file(done), str(done))
        with safe_open(done, "pt") as file:
            seconds += float(file.metadata()["cpu_seconds"])
    found = lines(*score(model, tokenizer, config.family, data["test"]))
    tell(table(found))
    result = {
        "config": asdict(config),
        "cpu_seconds": round(seconds, 1),
        "scores": {line.family: line.accuracy for line in found},
        "references": {line.family: line.best_reference for line in found},
        "redrawing": redrawing(config, model, tokenizer, data["train"], data["test"]),
    }
    save(model, tokenizer, folder, result)


def redrawing(
    config: BaseConfig, model: Family, tokenizer: Any, known: Sequence[Example], new: Sequence[Example]
) -> dict[str, float]:
    """Mean PSNR in dB of redrawn held-out pictures, and of the mean picture in their place."""
    processor = load_family(config.family).processor(model, tokenizer, TRAIN, (Task.PIXEL,), config.seed)
    pictures = [example.image for example in new[:DRAWN]]
    mean = np.mean([example.image for example in known], axis=0).round().astype(np.uint8)
    drawn = model.eval().draw(processor, pictures, Task.PIXEL, DrawOptions(temperature=TEMPERATURE))
    return {
        "psnr": float(np.mean([psnr(a, b) for a, b in zip(pictures, drawn, strict=True)])),
        "psnr_of_mean": float(np.mean([psnr(picture, mean) for picture in pictures])),
    }


def _same_recipe(config: BaseConfig, folder: Path) -> None:
    """Raises ConfigError where the folder holds phases of another recipe."""
    path, mine = folder / "phases" / "recipe.json", json.dumps(asdict(config), indent=1)
    if path.is_file() and path.read_text("utf-8") != mine:
        raise ConfigError(f"{folder} holds the phases of another recipe; choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(mine, "utf-8")


def _train(
    config: BaseConfig,
    number: int,
    phase: Phase,
    model: Family,
    tokenizer: Any,
    encoder: PictureEncoder,
    data: Sequence[Example],
    tell: Callable[[str], None],
) -> None:
    """Train a phase; `number` counts from 0."""
    family, recipe = load_family(config.family), RECIPES[config.family]
    settings = replace(
        TRAIN, batch_size=config.batch, steps=max(phase.steps, 1), learning_rate=config.rates[number]
    )
    make_batch = None
    if phase.tasks:
        make_batch = family.processor(model, tokenizer, settings, phase.tasks, config.seed, from_codes=True)
    guess = recipe.guess(model, len(phase.drawn)) if recipe.guess and phase.drawn else None
    lesson = Lesson(config, phase, _naming(model, recipe, tokenizer), make_batch, encoder, guess)
    engine = make_engine(model, settings, EngineConfig(name="torch"), torch.device("cpu"))
    for step, some in enumerate(_shown(config, data, phase, number)):
        said = lesson.step(engine, some, step)
        if (step + 1) % REPORT_EVERY == 0:
            tell(f"phase {number + 1}, step {step + 1} of {phase.steps}: {said}")


def _shown(config: BaseConfig, data: Sequence[Example], phase: Phase, number: int) -> Iterator[list[Example]]:
    """The examples of every step of a phase."""
    batch = config.batch if phase.tasks else config.naming_batch
    for numbers in order(len(data), phase.steps, batch, 3 * config.seed + number):
        yield [data[k] for k in numbers]


@dataclass
class Lesson:
    """A phase's step: naming, and beside it what `make_batch`, the phase's processor, makes of samples.

    encoder: of changed pictures. guess: trained beside the model where it draws.
    """

    config: BaseConfig
    phase: Phase
    name: Naming
    make_batch: Any
    encoder: PictureEncoder
    guess: Guess | None

    def __post_init__(self) -> None:
        if len(self.phase.drawn) > 1:
            self.make_batch.prompt_of = lambda sample, _, rng: prompt(self.kind(sample.position), rng)

    def kind(self, position: int) -> int:
        """Which of the phase's drawings the sample at `position` is asked for."""
        return asked_for(position, self.config.seed) if len(self.phase.drawn) > 1 else 0

    def step(self, engine: Engine, some: Sequence[Example], step: int) -> str:
        """One update; says what it cost."""
        engine.model.train()
        named = self.name(some)
        total, said = named, f"naming {float(named.detach()):.3f}"
        if self.make_batch is not None:
            losses, words = self._taught(engine, self.samples(some, step))
            total, said = losses + self.config.rehearsal * named, said + words
        engine.backward(total, True)
        engine.step()
        if self.guess is not None:
            self.guess.step()
        return said

    def _taught(self, engine: Engine, samples: Sequence[Sample]) -> tuple[Tensor, str]:
        """Loss of questions, drawings and the guess at them."""
        batch, draw = self.make_batch(samples), self.config.draw
        losses = engine.forward(batch, True)
        weights = {Task.UNDERSTANDING: 1.0, Task.PIXEL: draw, Task.DEPTH: draw}
        total = combine(losses, weights, batch.counts)
        said = {task.value: loss.mean for task, loss in losses.items() if loss.count}
        if self.guess is not None:
            said["guess"] = self.guess.loss(batch, [self.kind(sample.position) for sample in samples])
            total = total + self.config.guess * said["guess"]
        return total, "".join(f", {name} {float(loss.detach()):.3f}" for name, loss in said.items())

    def samples(self, some: Sequence[Example], step: int) -> list[Sample]:
        """Of a step: each example with some of its questions and what is to be drawn of it."""
        first = step * len(some)
        codes = [{"image": example.codes["image"]} for example in some]
        if Task.DEPTH in self.phase.tasks:
            kinds = [self.kind(first + k) for k in range(len(some))]
            drawn = changed(self.encoder, [example.image for example in some], kinds)
            codes = [one | {Task.DEPTH.value: picture} for one, picture in zip(codes, drawn, strict=True)]
        rngs = [np.random.default_rng([6, self.config.seed, first + k]) for k in range(len(some))]
        families = ("where", *FAMILIES)
        return [
            sample(example, first + k, chosen(example, rngs[k], self.config.questions, families), codes[k])
            for k, example in enumerate(some)
        ]


# -- naming --------------------------------------------------------------------------------------------------


def _naming(model: Family, recipe: Recipe, tokenizer: Any) -> Naming:
    """Cross-entropy of the names of cells against the words' embeddings: colour, shape, column and row."""
    words = [torch.tensor(ids_of(tokenizer, some)) for some in WORDS]
    places = torch.arange(len(COLUMNS) * len(ROWS))

    def loss(some: Sequence[Example]) -> Tensor:
        names = torch.from_numpy(np.stack([example.names for example in some]))
        cells = F.normalize(recipe.cells(model, some), dim=-1) * SHARPNESS
        known = [model.get_input_embeddings()(ids) for ids in words]
        parts = [_named(cells @ F.normalize(one, dim=-1).T, names[:, k]) for k, one in enumerate(known)]
        if recipe.buffers is not None:
            buffers = F.normalize(recipe.buffers(model, some), dim=-1) * SHARPNESS
            for one, label in zip(known[2:], (places % len(COLUMNS), places // len(COLUMNS)), strict=True):
                scores = buffers @ F.normalize(one, dim=-1).T
                parts.append(_named(scores, label.expand(len(buffers), -1)))
        return torch.stack(parts).sum()

    return loss


def _named(scores: Tensor, names: Tensor) -> Tensor:
    """scores: [B, L, N] of N names. names: [B, L], N where there is nothing to name, which counts less."""
    count = scores.shape[-1]
    scores = torch.cat([scores, torch.full_like(scores[..., :1], NOTHING)], -1)
    weight = torch.where(names == count, EMPTY, 1.0)
    terms = F.cross_entropy(scores.flatten(0, 1), names.flatten(), reduction="none")
    return (terms * weight.flatten()).sum() / weight.sum()


# -- the folder ----------------------------------------------------------------------------------------------


def save(model: Family, tokenizer: Any, folder: Path, result: dict[str, Any]) -> None:
    """Weights in half precision: a few megabytes that ship with the package."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(folder)
    model.to(torch.float32)
    tokenizer.save_pretrained(folder)
    (folder / "base.json").write_text(json.dumps(result, indent=1))


def main(argv: list[str] | None = None) -> int:
    """Trains a base; steps and pictures can be given."""
    parser = argparse.ArgumentParser(prog="python -m unimrg.reproduce.base", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path)
    plain = {f.name: f.default for f in fields(BaseConfig) if not isinstance(f.default, tuple)}
    for name, value in plain.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = vars(parser.parse_args(argv))
    folder = args.pop("folder")
    try:
        make_base(BaseConfig(**args), folder)
    except UnimrgError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
