"""Trains a small teacher on scenes, measures it on others, and writes both: 15 minutes of a core or less.

python -m unimrg.teachers.fit depth --out unimrg/teachers/assets/depth_tiny
python -m unimrg.teachers.fit sam --out unimrg/teachers/assets/sam_tiny
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from unimrg.errors import ConfigError, UnimrgError
from unimrg.teachers.fit import depth, sam
from unimrg.teachers.fit.quality import Quality, depth_quality, report, sam_quality, write_facts
from unimrg.teachers.fit.scenes import Scenes, render
from unimrg.teachers.fit.training import Loss, load, train

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

# Added to the seed for the scenes to train on and to measure on; the default job's scenes are of seed 0.
TRAINED, UNSEEN = 1, 1000


@dataclass(frozen=True)
class Recipe:
    """All that differs between the two: their parts, their measure, and how long they train."""

    make_model: Callable[[], PreTrainedModel]
    make_processor: Callable[[], BaseImageProcessor]
    loss: Loss
    measure: Callable[[Path, Scenes], Quality]
    steps: int


RECIPES = {
    "depth": Recipe(depth.make_model, depth.make_processor, depth.loss, depth_quality, 1600),
    "sam": Recipe(
        sam.make_model, sam.make_processor, sam.loss, partial(sam_quality, settings=sam.SETTINGS), 1800
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 0, or 2 when something can be mended by the user."""
    words = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(words, argparse.Namespace(words=words))
    try:
        print(fit(args))
        return 0
    except UnimrgError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def fit(args: argparse.Namespace) -> str:
    """Trains, stores and measures a teacher; the text of its `quality.json`."""
    recipe: Recipe = RECIPES[args.teacher]
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # the masks' gradients hold numbers so small that they cost tenfold
    if not args.measure:
        write_facts(args.out, make(recipe, args))
    unseen = render(args.unseen, args.seed + UNSEEN, "test")
    return report(args.out, lambda folder: recipe.measure(folder, unseen), len(unseen))


def make(recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """Trains and stores a teacher; what made it."""
    steps = recipe.steps if args.steps is None else args.steps
    for name, count in (("scenes", args.scenes), ("steps", steps), ("batch", args.batch)):
        if count < 1:
            raise ConfigError(f"--{name} is {count}; give 1 or more")
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model, processor = recipe.make_model(), recipe.make_processor()
    if args.start:
        load(model, args.start)
    scenes = render(args.scenes, args.seed + TRAINED, "train")
    train(model, processor, recipe.loss, scenes, steps, args.batch, args.rate, rng, args.out)
    return {
        "teacher": args.teacher,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "training": {"scenes": len(scenes), "steps": steps, "batch": args.batch, "rate": args.rate},
        "command": shlex.join(["python", "-m", "unimrg.teachers.fit", *args.words]),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m unimrg.teachers.fit", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("teacher", choices=RECIPES)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and quality.json")
    parser.add_argument("--scenes", type=int, default=5000, help="to train on")
    parser.add_argument("--steps", type=int, help="of training; default: the recipe's own")
    parser.add_argument("--batch", type=int, default=8, help="scenes per step")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--unseen", type=int, default=200, help="scenes to measure on")
    parser.add_argument("--start", type=Path, help="folder of weights to go on from")
    parser.add_argument("--measure", action="store_true", help="don't train; measure what --out holds")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and scenes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
