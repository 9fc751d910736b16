"""How long a training step takes, packed and in separate passes: prints one JSON line.

    python -m tests.bench.step --family showo --threads 1

`packed` is one forward and backward pass over every task of every sample. `separate` does the same work as
one pass a task, each with its own prefix (six conversations about one picture still share it);
`separate_rows` also gives every conversation its own prefix, as one row a conversation would. All three give
the same losses and gradients. `from_codes` is `packed` with the pictures' frozen codes in place of their
pixels, as a label store holds them. Times are medians of interleaved repetitions, on the clock and as CPU
time of all threads (which busy cores disturb less); a ratio is the median of the repetitions' own ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from tests.engine_runs import coded
from tests.tiny_harmon import random_sample
from unimrg.config import FAMILIES, FamilyConfig, TrainConfig
from unimrg.families import load_family
from unimrg.families.base import Family
from unimrg.losses import combine
from unimrg.packing import Batch
from unimrg.sample import IMAGE_TASKS, Sample, Task

Ways = dict[str, list[Batch]]


def build(name: str, variant: str) -> tuple[Family, Any, int]:
    """Fresh weights of that size, the tiny tokenizer, and the side of the picture."""
    module, config = load_family(name), FamilyConfig(name=name)
    model, tokenizer = module.build(config, seed=0)
    if variant == "tiny":
        return model, tokenizer, module.image_size(config)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        config = FamilyConfig(name=name, variant=variant, tokenizer=folder)
        return *module.build(config, seed=0), module.image_size(config)


def passes(name: str, model: Family, tokenizer: Any, samples: Sequence[Sample]) -> Ways:
    """The batches of each way to do the step."""

    def batch(given: Sequence[Sample], *tasks: Task, codes: bool = False) -> Batch:
        processor = load_family(name).processor(model, tokenizer, TrainConfig(), tasks, 0, from_codes=codes)
        made: Batch = processor(given)
        return made.to(model.device)

    rows = [replace(s, conversations=(c,)) for s in samples for c in s.conversations]
    drawings = [batch(samples, task) for task in IMAGE_TASKS]
    return {
        "packed": [batch(samples, *Task)],
        "separate": [batch(samples, Task.UNDERSTANDING), *drawings],
        "separate_rows": [batch(rows, Task.UNDERSTANDING), *drawings],
        "from_codes": [batch([coded(sample, model) for sample in samples], *Task, codes=True)],
    }


def step(model: Family, batches: Sequence[Batch]) -> tuple[float, float]:
    """Seconds of forward and backward over all batches: on the clock, and of CPU time."""
    counts = {task: sum(b.counts[task] for b in batches) for task in Task}
    model.zero_grad()
    start = time.perf_counter(), time.process_time()
    for batch in batches:
        combine(model(batch), dict.fromkeys(Task, 1.0), counts).backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def measure(model: Family, ways: Ways, repetitions: int) -> dict[str, object]:
    for batches in ways.values():  # warms up
        step(model, batches)
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(repetitions):
        for way, batches in ways.items():
            taken[way].append(step(model, batches))

    def median(clock: int, way: str) -> float:
        return round(statistics.median(times[clock] for times in taken[way]), 4)

    def ratio(clock: int, way: str) -> float:
        pairs = zip(taken[way], taken["packed"], strict=True)
        return round(statistics.median(other[clock] / packed[clock] for other, packed in pairs), 3)

    others = [way for way in ways if way != "packed"]
    return {
        "seconds": {way: median(0, way) for way in ways},
        "cpu_seconds": {way: median(1, way) for way in ways},
        "ratio": {way: ratio(0, way) for way in others},
        "cpu_ratio": {way: ratio(1, way) for way in others},
        "tokens": {way: sum(b.tokens for b in batches) for way, batches in ways.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--family", default="harmon", choices=FAMILIES)
    parser.add_argument("--variant", default="tiny", help="size of the family (configs/family/)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--conversations", type=int, default=6, help="of one short turn, about each picture")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    rng = np.random.default_rng(0)
    model, tokenizer, side = build(options.family, options.variant)
    model.to(options.device).train()
    samples = [
        random_sample(rng, side, position, options.conversations) for position in range(options.batch_size)
    ]
    ways = passes(options.family, model, tokenizer, samples)
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else cpu_name()
    about = {"torch": torch.__version__, "device": device, "date": date.today().isoformat()}
    print(json.dumps(vars(options) | measure(model, ways, options.repetitions) | about))


if __name__ == "__main__":
    main()
