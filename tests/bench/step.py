"""How long a training step takes: prints one JSON line.

    python -m tests.bench.step --family harmon --preset tiny --recipe both

`--recipe reference` is the published way to train on one picture's four tasks, `ours` the packed one
(`tests/bench/recipes.py`), `both` compares them in one process on the same weights and samples: seconds a
picture with its four tasks, model FLOPs by formula and with what is recomputed, the share of what the device
can do (MFU) where that is known, peak memory, and how many times as long the reference takes. The
optimiser's own step, the same in both, is left out. `--device meta` computes nothing and needs no weights: it
prints the FLOPs alone. `--no-recompute` keeps the reference's activations.

`--recipe passes` compares ways to do our own step: `packed` is one forward and backward pass over every task
of every sample, `separate` one pass a task, each with its own prefix (six conversations about one picture
still share it); `separate_rows` also gives every conversation its own prefix; `from_codes` is `packed` with
the pictures' frozen codes in place of their pixels. All give the same losses and gradients.

Times are medians of interleaved repetitions, on the clock and as CPU time of all threads (which busy cores
disturb less); a ratio is the median of the repetitions' own ratios, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers.utils.logging import disable_progress_bar

from tests.bench.presets import FROZEN, MIDDLE, build, presets
from tests.bench.recipes import REFERENCES, Pass, ours, packed_pass, processor, reference, with_codes
from tests.tiny_harmon import random_sample
from unimrg.config import FAMILIES
from unimrg.families.base import Family
from unimrg.flops import Flops
from unimrg.hardware import device_name, peak_flops
from unimrg.sample import IMAGE_TASKS, Sample, Task

TURNS = {"tiny": 2, MIDDLE: 4}
"""Longest conversation by default; at published sizes 16, two hundred tokens on average."""
BATCH = {"tiny": 8}
"""Pictures by default; otherwise 4, whose activations a GPU of 80 GB holds at published sizes."""


BLOCKS = {"mar_encoder", "mar_decoder", "head", "llm", "vision", "sana"}
"""Parts whose blocks are recomputed; they hold little else."""


@dataclass
class Way:
    """A way to do the step, and what its repetitions took: (clock, CPU) seconds, and peak bytes."""

    passes: Sequence[Pass]
    recompute: bool = False
    times: list[tuple[float, float]] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(one.tokens for one in self.passes)

    @property
    def flops(self) -> Flops:
        return sum((part for one in self.passes for part in one.parts.values()), Flops())

    @property
    def recomputed(self) -> float:
        """FLOPs of the second forward pass of the blocks that have a backward pass."""
        parts = [(name, part) for one in self.passes for name, part in one.parts.items()]
        return self.recompute * sum(part.forward for name, part in parts if name in BLOCKS and part.backward)

    def median(self, clock: int) -> float:
        return statistics.median(taken[clock] for taken in self.times)


def step(model: Family, way: Way) -> None:
    """Forward and backward over all passes, timed."""
    model.zero_grad()
    reset_peak(model.device)
    start = time.perf_counter(), time.process_time()
    with recomputing(model, way.recompute):
        for one in way.passes:
            one.loss().backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    way.times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    way.memory.append(peak(model.device))


@contextlib.contextmanager
def recomputing(model: Family, on: bool) -> Iterator[None]:
    """Blocks keep no activations; as in the published trainings they run again as a whole.

    torch's default today stops as soon as it has what the backward pass needs.
    """
    if not on:
        yield
        return
    model.prepare_blocks("full")
    with set_checkpoint_early_stop(False):
        yield
    model.prepare_blocks("none")


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # Linux alone can forget how large a process was
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Bytes since `reset_peak`: of torch's tensors on a GPU; else of the process, 0 where nobody knows.

    A process may keep what another way has freed: run one recipe alone to learn what it needs on a CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def measure(model: Family, ways: Mapping[str, Way], repetitions: int) -> None:
    """Fills the ways' times; the first round only warms up."""
    for _ in range(repetitions + 1):
        for way in ways.values():
            step(model, way)
    for way in ways.values():
        del way.times[0], way.memory[0]


def ratio(clock: int, over: Way, under: Way) -> dict[str, float]:
    each = [one[clock] / other[clock] for one, other in zip(over.times, under.times, strict=True)]
    found = {"median": statistics.median(each), "low": min(each), "high": max(each)}
    return {name: round(value, 3) for name, value in found.items()}


# -- the two recipes -----------------------------------------------------------------------------------------


def recipes(options: argparse.Namespace, model: Family, tokenizer: Any) -> dict[str, Any]:
    samples = talkative(options.batch_size, model.config.image_size, options.turns)
    ways = {}
    if options.recipe in ("reference", "both"):
        passes = reference(options.family, model, tokenizer, samples)
        ways["reference"] = Way(passes, recompute=options.recompute)
    if options.recipe in ("ours", "both"):
        ways["ours"] = Way(ours(options.family, model, tokenizer, samples))
    if options.device != "meta":
        measure(model, ways, options.repetitions)
    top = None if options.device == "meta" else peak_flops(model.device, options.peak_tflops)
    results: dict[str, Any] = {name: told(way, options.batch_size, top) for name, way in ways.items()}
    if len(ways) == 2:
        results |= compared(**ways)
    return results


def talkative(number: int, side: int, turns: int) -> list[Sample]:
    """Pictures with all drawings and a conversation of one to `turns` turns."""
    rng = np.random.default_rng(0)
    return [random_sample(rng, side, position, turns=1 + position % turns) for position in range(number)]


def told(way: Way, pictures: int, top: float | None) -> dict[str, Any]:
    """What one way took for a picture. top: FLOP/s of the device at best."""
    parts: dict[str, float] = {}
    for one in way.passes:
        for name, part in one.parts.items():
            parts[name] = parts.get(name, 0) + part.total / pictures / 1e12
    found: dict[str, Any] = {
        "tokens": round(way.tokens / pictures, 1),
        "tflop": significant(way.flops.total / pictures / 1e12),
        "tflop_recomputed": significant(way.recomputed / pictures / 1e12),
        "tflop_by_part": {name: significant(value) for name, value in parts.items()},
    }
    if way.times:
        seconds, cpu = way.median(0), way.median(1)
        found |= {
            "seconds": significant(seconds / pictures),
            "cpu_seconds": significant(cpu / pictures),
            "tflops": significant(way.flops.total / seconds / 1e12),
            "mfu": top and significant(way.flops.total / seconds / top),
            "peak_memory_bytes": max(way.memory),
        }
    return found


def compared(reference: Way, ours: Way) -> dict[str, Any]:
    """How many times as much the reference takes; FLOPs with what it recomputes."""
    flops = (reference.flops.total + reference.recomputed) / (ours.flops.total + ours.recomputed)
    found: dict[str, Any] = {"flop_ratio": round(flops, 3)}
    if ours.times:
        found |= {"ratio": ratio(0, reference, ours), "cpu_ratio": ratio(1, reference, ours)}
    return found


def significant(value: float) -> float:
    return float(f"{value:.4g}")


# -- ways to do our own step ---------------------------------------------------------------------------------


def passes(options: argparse.Namespace, model: Family, tokenizer: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    samples = [
        random_sample(rng, model.config.image_size, position, options.conversations)
        for position in range(options.batch_size)
    ]
    ways = our_ways(options.family, model, tokenizer, samples)
    measure(model, ways, options.repetitions)
    others = [name for name in ways if name != "packed"]
    return {
        "seconds": {name: round(way.median(0), 4) for name, way in ways.items()},
        "cpu_seconds": {name: round(way.median(1), 4) for name, way in ways.items()},
        "ratio": {name: ratio(0, ways[name], ways["packed"]) for name in others},
        "cpu_ratio": {name: ratio(1, ways[name], ways["packed"]) for name in others},
        "tokens": {name: way.tokens for name, way in ways.items()},
    }


def our_ways(family: str, model: Family, tokenizer: Any, samples: Sequence[Sample]) -> dict[str, Way]:
    def way(*given: tuple[Sequence[Sample], Sequence[Task]], codes: bool = False) -> Way:
        batches = [
            processor(family, model, tokenizer, tasks, codes)(some).to(model.device) for some, tasks in given
        ]
        counts = {task: sum(batch.counts[task] for batch in batches) for task in Task}
        return Way([packed_pass(model, batch, counts) for batch in batches])

    rows = [replace(s, conversations=(c,)) for s in samples for c in s.conversations]
    drawings = [(samples, (task,)) for task in IMAGE_TASKS]
    return {
        "packed": way((samples, tuple(Task))),
        "separate": way((samples, (Task.UNDERSTANDING,)), *drawings),
        "separate_rows": way((rows, (Task.UNDERSTANDING,)), *drawings),
        "from_codes": way(([with_codes(sample, model) for sample in samples], tuple(Task)), codes=True),
    }


# -- the command ---------------------------------------------------------------------------------------------


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--family", default="harmon", choices=FAMILIES)
    parser.add_argument("--preset", default="tiny", help="size: tiny, 100m, or one of configs/family/")
    parser.add_argument("--recipe", default="both", choices=("reference", "ours", "both", "passes"))
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or meta: count FLOPs alone")
    parser.add_argument("--batch-size", type=int, default=0, help="pictures; 0 = by the preset")
    parser.add_argument("--turns", type=int, default=0, help="of the longest conversation; 0 = by the preset")
    parser.add_argument("--conversations", type=int, default=6, help="of `passes`, about each picture")
    parser.add_argument("--recompute", default=True, action=argparse.BooleanOptionalAction)
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the device; 0 = by its name")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args(words)
    if options.preset not in presets(options.family):
        parser.error(f"--preset: {options.family} has {', '.join(presets(options.family))}")
    if options.recipe != "passes" and options.family not in REFERENCES:
        parser.error(f"no training of all tasks is published for {options.family}: use --recipe passes")
    if options.recipe == "passes" and options.device == "meta":
        parser.error("--device meta counts the FLOPs of recipes; choose one")
    options.batch_size = options.batch_size or BATCH.get(options.preset, 4)
    options.turns = options.turns or TURNS.get(options.preset, 16)
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = build(options.family, options.preset, torch.device(options.device))
    if options.device == "cuda":
        model.to(torch.bfloat16)
    if options.recipe == "passes":
        results = passes(options, model, tokenizer)
    else:
        model.freeze(FROZEN.get(options.family, ()), tuple(Task))
        results = recipes(options, model, tokenizer)
    about = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "device": device_name(options.device),
        "date": date.today().isoformat(),
    }
    return vars(options) | results | about


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    print(json.dumps(run(options)))


if __name__ == "__main__":
    main()
