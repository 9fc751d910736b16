"""The model that all arms start from: small, but it answers what it sees and redraws it.

    python -m unimrg.reproduce.base outputs/base

Three phases: the picture's cells are named (colour, shape, column, row, by the words of answers); then come
questions, with "Where is red?" among them and naming rehearsed; then questions together with redrawing. There
a linear guess at what is drawn is trained beside, and dropped in the end, because a diffusion head that has
learnt to do without the picture hardly asks for it. The
folder is one of `save_pretrained`, with its tokenizer and `base.json`, what was done and how good it is. A
phase that is finished is kept in it and not trained again.
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
from unimrg.losses import combine
from unimrg.reproduce.data import Example, chosen, examples, order, sample, stored
from unimrg.reproduce.models import RECIPES, Guess, Recipe
from unimrg.reproduce.scoring import score
from unimrg.reproduce.words import NAMES, ids_of
from unimrg.reproduce.world import COLUMNS, FAMILIES, ROWS
from unimrg.sample import Sample, Task
from unimrg.weights import load_strictly

BASE_SEED = 1  # of its pictures: arms draw others
SHARPNESS = 8.0  # factor on the cosines of naming
NOTHING, EMPTY = 1.0, 0.2  # score, and weight in the loss, of a cell that shows nothing
REPORT_EVERY = 50
DRAWN, TEMPERATURE = 32, 0.5  # held-out pictures that are redrawn, and how


@dataclass(frozen=True)
class BaseConfig:
    """The recipe. rates: peaks of the three phases. rehearsal: weight of naming beside questions.

    pixel: weight of redrawing; guess: of the linear guess at it, where the family has one.
    """

    family: str = "harmon"
    pictures: int = 4000
    naming_steps: int = 400
    question_steps: int = 700
    drawing_steps: int = 1000
    naming_batch: int = 32
    batch: int = 16
    questions: int = 12
    rates: tuple[float, float, float] = (2e-3, 1.5e-3, 7e-4)
    rehearsal: float = 0.2
    pixel: float = 0.5
    guess: float = 0.5
    test: int = 200
    seed: int = 0


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
    started = time.process_time()
    name = _naming(model, recipe, tokenizer)
    train = TrainConfig(batch_size=config.batch, learning_rate=config.rates[0], prompt_dropout=0.0)
    phases = (
        (config.naming_steps, ()),
        (config.question_steps, (Task.UNDERSTANDING,)),
        (config.drawing_steps, (Task.UNDERSTANDING, Task.PIXEL)),
    )
    for number, (steps, tasks) in enumerate(phases):
        settings = replace(train, steps=max(steps, 1), learning_rate=config.rates[number])
        make_batch = family.processor(model, tokenizer, settings, tasks, config.seed, from_codes=True)
        done = folder / "phases" / f"{number + 1}.safetensors"
        if done.is_file():
            load_strictly(model, load_file(done), str(done))
            continue
        engine = make_engine(model, settings, EngineConfig(name="torch"), torch.device("cpu"))
        guess = recipe.guess(model) if recipe.guess and Task.PIXEL in tasks else None
        for step, some in enumerate(_shown(config, data["train"], steps, bool(tasks), number)):
            said = _step(engine, make_batch if tasks else None, name, guess, config, some, step)
            if (step + 1) % REPORT_EVERY == 0:
                tell(f"phase {number + 1}, step {step + 1} of {steps}: {said}")
        save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, done)
    found = lines(*score(model, tokenizer, config.family, data["test"]))
    tell(table(found))
    result = {
        "config": asdict(config),
        "cpu_seconds": round(time.process_time() - started, 1),
        "scores": {line.family: line.accuracy for line in found},
        "references": {line.family: line.best_reference for line in found},
        "redrawing": redrawing(config, model, tokenizer, data["train"], data["test"]),
    }
    save(model, tokenizer, folder, result)


def redrawing(
    config: BaseConfig, model: Family, tokenizer: Any, known: Sequence[Example], new: Sequence[Example]
) -> dict[str, float]:
    """Mean PSNR in dB of redrawn held-out pictures, and of the mean picture in their place."""
    settings = TrainConfig(prompt_dropout=0.0)
    processor = load_family(config.family).processor(model, tokenizer, settings, (Task.PIXEL,), config.seed)
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


def _shown(
    config: BaseConfig, data: Sequence[Example], steps: int, asks: bool, phase: int
) -> Iterator[list[Example]]:
    """The examples of every step of a phase."""
    batch = config.batch if asks else config.naming_batch
    for numbers in order(len(data), steps, batch, config.seed * len(config.rates) + phase):
        yield [data[k] for k in numbers]


def _step(
    engine: Engine,
    make_batch: Any,
    name: Naming,
    guess: Guess | None,
    config: BaseConfig,
    some: Sequence[Example],
    step: int,
) -> str:
    """One update: naming alone without `make_batch`, else what its processor trains, and naming rehearsed."""
    engine.model.train()
    total, said = torch.zeros(()), ""
    if make_batch is not None:
        batch = make_batch(_asked(config, some, step))
        losses = engine.forward(batch, True)
        total = combine(losses, {Task.UNDERSTANDING: 1.0, Task.PIXEL: config.pixel}, batch.counts)
        said = "".join(
            f", {task} {float(loss.mean.detach()):.3f}" for task, loss in losses.items() if loss.count
        )
        if guess is not None:
            guessed = guess.loss(batch)
            total = total + config.guess * guessed
            said += f", guess {float(guessed.detach()):.3f}"
    named = name(some)
    engine.backward(total + (1.0 if make_batch is None else config.rehearsal) * named, True)
    engine.step()
    if guess is not None:
        guess.step()
    return f"naming {float(named.detach()):.3f}{said}"


def _asked(config: BaseConfig, some: Sequence[Example], step: int) -> list[Sample]:
    families, first = ("where", *FAMILIES), step * len(some)
    rngs = [np.random.default_rng([6, config.seed, first + k]) for k in range(len(some))]
    return [
        sample(
            example,
            first + k,
            chosen(example, rngs[k], config.questions, families),
            {"image": example.codes["image"]},
        )
        for k, example in enumerate(some)
    ]


# -- naming --------------------------------------------------------------------------------------------------


def _naming(model: Family, recipe: Recipe, tokenizer: Any) -> Naming:
    """Cross-entropy of the names of cells against the words' embeddings: colour, shape, column and row."""
    words = [torch.tensor(ids_of(tokenizer, some)) for some in NAMES]
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
