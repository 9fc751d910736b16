"""What a step costs as it grows: prints one JSON line.

    python -m tests.bench.scaling --family harmon

- `branches`: CPU seconds of forward and backward per picture with 1, 2, 4 and 8 questions about it (medians
  of interleaved repetitions, tiny preset), and the share of their variance that a straight line explains.
- `workers`: seconds per sample on one process and on two, each with one thread and as many samples.
- `traffic`: bytes that two real processes handed to each collective in one optimiser step, by engine, and
  the same in parameters of four bytes.
- `model`: *a model, not a measurement*. The communication of a step on 8 to 512 GPUs from the counted
  traffic, scaled to Harmon-1.5B in bfloat16, and the share of one GPU's speed that stays: compute is
  `--tflop` a picture at `--mfu` of `--peak`; collectives are rings whose slowest link is `--inside` in a node
  of 8 and `--between` nodes; the lower share if nothing overlaps with computing, the higher one if all does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.engine_runs import Group
from tests.tiny_harmon import random_sample
from unimrg.config import FAMILIES, FamilyConfig, TrainConfig
from unimrg.families import load_family
from unimrg.hardware import device_name
from unimrg.losses import combine
from unimrg.sample import Task

BRANCHES = (1, 2, 4, 8)
ENGINES = ("torch", "zero1", "zero2", "zero3")
GPUS = (8, 16, 32, 64, 128, 256, 512)
NODE = 8
TRAINED = 1.36e9
"""Trained parameters of Harmon-1.5B."""


def branch_seconds(family: str, pictures: int, repetitions: int) -> dict[str, Any]:
    """CPU seconds a picture by the number of its branches, each a question."""
    torch.set_num_threads(1)
    module, config = load_family(family), FamilyConfig(name=family)
    model, tokenizer = module.build(config, seed=0)
    process = module.processor(model.train(), tokenizer, TrainConfig(), (Task.UNDERSTANDING,), 0)
    side, rng = module.image_size(config), np.random.default_rng(0)
    samples = [random_sample(rng, side, n, conversations=8, tasks=()) for n in range(pictures)]
    batches = {
        count: process([replace(one, conversations=one.conversations[:count]) for one in samples])
        for count in BRANCHES
    }
    taken: dict[int, list[float]] = {count: [] for count in BRANCHES}
    for repetition in range(repetitions + 1):
        for count, batch in batches.items():
            started = time.process_time()
            combine(model(batch), dict.fromkeys(Task, 1.0), batch.counts).backward()
            model.zero_grad()
            if repetition:  # the first one warms up
                taken[count].append((time.process_time() - started) / pictures)
    seconds = {count: statistics.median(times) for count, times in taken.items()}
    return {"seconds": {k: round(v, 5) for k, v in seconds.items()}, "r_squared": round(straight(seconds), 4)}


def straight(seconds: dict[int, float]) -> float:
    """Share of the variance that a straight line through the points explains."""
    x, y = np.array(list(seconds)), np.array(list(seconds.values()))
    left = y - np.polyval(np.polyfit(x, y, 1), x)
    return float(1 - left.var() / y.var())


def group_figures() -> dict[str, Any]:
    """Speed of one process and of two, and the traffic of two by engine."""
    with tempfile.TemporaryDirectory() as folder:
        pace = {"pace": ("pace", {"engine": "torch"})}
        traffic = {name: ("traffic", {"engine": name}) for name in ENGINES}
        alone = Group(Path(folder) / "one", 1, dict(pace)).wait()
        two = Group(Path(folder) / "two", 2, {**pace, **traffic}).wait()
        per_sample = {"1": alone.result("pace")["seconds"], "2": two.result("pace")["seconds"]}
        counted = {name: two.result(name) for name in ENGINES}
    return {
        "workers": {
            "seconds_per_sample": {k: round(v, 5) for k, v in per_sample.items()},
            "speedup": round(per_sample["1"] / per_sample["2"], 3),
        },
        "traffic": {
            name: {
                "bytes": found["bytes"],
                "per_parameter": {
                    kind: round(size / 4 / found["parameters"], 3) for kind, size in found["bytes"].items()
                },
            }
            for name, found in counted.items()
        },
    }


def predicted(traffic: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step on many GPUs, and the share of the speed of one that stays; see the module."""
    compute = options.pictures_per_gpu * options.tflop / (options.peak * options.mfu)
    found: dict[str, Any] = {"compute_seconds": round(compute, 4)}
    for engine, counted in traffic.items():
        rows = {}
        for gpus in GPUS:
            link = options.inside if gpus <= NODE else options.between
            ring = (gpus - 1) / gpus
            passes = {"all_reduce": 2.0}  # reduce-scatter and all-gather in one
            sent = sum(
                size * passes.get(kind, 1.0) * ring * 2 * TRAINED  # two bytes a number
                for kind, size in counted["per_parameter"].items()
            )
            seconds = sent / (link * 1e9)
            worst, best = compute / (compute + seconds), compute / max(compute, seconds)
            rows[str(gpus)] = {"seconds": round(seconds, 4), "efficiency": [round(worst, 3), round(best, 3)]}
        found[engine] = rows
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--family", default="harmon", choices=FAMILIES)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--tflop", type=float, default=38.8, help="of the model, a picture with four tasks")
    parser.add_argument("--pictures-per-gpu", type=int, default=4, help="in one optimiser step")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of a GPU, dense bfloat16")
    parser.add_argument("--mfu", type=float, default=0.45, help="assumed, not measured")
    parser.add_argument("--inside", type=float, default=360.0, help="GB/s of a ring inside a node of 8")
    parser.add_argument("--between", type=float, default=45.0, help="GB/s per GPU between nodes (400 Gbit/s)")
    options = parser.parse_args()
    figures = group_figures()
    result = {
        "branches": branch_seconds(options.family, options.pictures, options.repetitions),
        **figures,
        "model": predicted(figures["traffic"], options),
    }
    about = {"torch": torch.__version__, "device": device_name("cpu"), "date": date.today().isoformat()}
    print(json.dumps(vars(options) | result | about))


if __name__ == "__main__":
    main()
