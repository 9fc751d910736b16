"""Trainings with the real engines in groups of processes, for test_engine.py and test_loop.py to look at.

A plan is a list of (function, arguments); every process of a group works through it and writes what it saw
to `<name>-rank<rank>.pt`. All groups run without a compiler within reach, as on a newcomer's machine.

python -m tests.engine_runs RANK RANKS FOLDER        reads FOLDER/plan.json
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from tests import families
from tests.tiny_harmon import micro, random_model, random_sample, tokenizer
from unimrg import engine as engines
from unimrg.balance import make_balancer
from unimrg.config import EngineConfig, FamilyConfig, LoraConfig, TrainConfig, WeightsConfig
from unimrg.consolidate import save_adapters, save_model
from unimrg.engine import (
    DeepSpeedEngine,
    Engine,
    TorchEngine,
    gather,
    import_deepspeed,
    make_engine,
    shard,
    world,
)
from unimrg.errors import DataError
from unimrg.families import load_family, vocabulary
from unimrg.families.base import Family, Processor
from unimrg.families.harmon import Harmon, HarmonProcessor
from unimrg.families.harmon.checkpoint import from_published
from unimrg.families.harmon.config import HarmonConfig
from unimrg.loop import StepOutput, fit, global_counts, train_step
from unimrg.lora import adapt, merged
from unimrg.losses import TaskLoss
from unimrg.packing import Batch
from unimrg.sample import IMAGE_TASKS, Sample
from unimrg.weights import load_folder

if TYPE_CHECKING:
    from unimrg.checkpoint import Progress

ENGINES = ("torch", "zero1", "zero2", "zero3")
ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SIDE, BATCH = 16, 8
WEIGHTS = WeightsConfig(understanding=1.0, pixel=0.5, depth=2.0, segmentation=0.25)
ONLY_ANSWERS = WeightsConfig(understanding=1.0, pixel=0.0, depth=0.0, segmentation=0.0)

PIXEL, DEPTH, SEGMENTATION = IMAGE_TASKS
TEXT: dict[str, Any] = {"picture": False}
SHAPES: tuple[tuple[dict[str, Any], ...], ...] = (
    (  # only text in the first half; in two micro-batches on two ranks one has one task, its neighbour four
        *(TEXT, TEXT | {"conversations": 3}, TEXT | {"turns": 2}, TEXT),
        *({}, {"conversations": 4}, {"tasks": (PIXEL,), "turns": 3}, {"conversations": 0}),
    ),
    (  # only drawings in the first half, and only questions about pictures behind them
        *({"conversations": 0, "tasks": (DEPTH,)}, {"conversations": 0, "tasks": (DEPTH, PIXEL)}),
        *({"conversations": 0, "valid": (2, 4, 16, 12)}, {"conversations": 0, "tasks": (SEGMENTATION,)}),
        *({"tasks": (), "conversations": 2}, {"tasks": ()}, {"tasks": (), "turns": 2}, {"tasks": ()}),
    ),
    (  # no segmentation anywhere
        *(TEXT, {"tasks": (DEPTH,)}, {"tasks": (PIXEL, DEPTH), "conversations": 2}, {"tasks": (PIXEL,)}),
        *({"tasks": (DEPTH,), "valid": (0, 3, 16, 13)}, TEXT, {"tasks": ()}, {"tasks": (PIXEL, DEPTH)}),
    ),
)


def samples(step: int) -> list[Sample]:
    """The global batch of a step (from 0): eight samples that differ in tasks and numbers of answers."""
    rng = np.random.default_rng(step)
    shapes = SHAPES[step % len(SHAPES)]
    return [random_sample(rng, SIDE, step * BATCH + n, **shape) for n, shape in enumerate(shapes)]


def batches(processor: Processor, first: int, last: int, accumulation: int) -> Iterator[list[Batch]]:
    """This rank's micro-batches of the steps `first`..`last`-1: a run of neighbours in the global batch."""
    rank, ranks = world()
    shares = ranks * accumulation
    for step in range(first, last):
        cuts = [share * BATCH // shares for share in range(shares + 1)]
        mine = range(rank * accumulation, (rank + 1) * accumulation)
        yield [processor(samples(step)[cuts[at] : cuts[at + 1]]) for at in mine]


def train_config(steps: int = 3, **changes: Any) -> TrainConfig:
    """eps damps AdamW, which otherwise turns rounding errors of gradients near zero into whole steps."""
    values = {"learning_rate": 1e-2, "warmup": 0.0, "weight_decay": 0.1, "clip": 0.5, "eps": 1e-4}
    return TrainConfig(steps=steps, batch_size=BATCH, **(values | changes))


def engine_config(name: str, precision: str = "float32", recompute: str = "auto") -> EngineConfig:
    common = {"precision": precision, "activation_checkpointing": recompute}
    if name == "torch":
        return EngineConfig(name="torch", **common)
    stage, _, offload = name.removeprefix("zero").partition("-")
    return EngineConfig("deepspeed", zero_stage=int(stage), offload=bool(offload), **common)


def make(
    name: str,
    train: TrainConfig,
    weights: WeightsConfig = WEIGHTS,
    precision: str = "float32",
    dropout: float = 0,
    lora: LoraConfig | None = None,
) -> tuple[Engine, HarmonProcessor]:
    """An engine around a fresh micro model with everything random, and its processor."""
    config = micro()
    config.mar.attn_dropout = config.mar.proj_dropout = dropout
    model = random_model(config)
    model.freeze([], weights.active())
    adapt(model, lora or LoraConfig(), weights.active(), seed=0)
    model.train()
    processor = HarmonProcessor(config, tokenizer(), weights.active())
    return make_engine(model, train, engine_config(name, precision), CPU), processor


def make_any(
    name: str,
    train: TrainConfig,
    family: str,
    from_codes: bool = False,
    recompute: str = "auto",
    precision: str = "float32",
) -> tuple[Engine, Processor]:
    """An engine around the micro model of any family, and its processor."""
    model = families.fresh_model(family)
    model.freeze([], WEIGHTS.active())
    model.train()
    processor = families.processor(family)
    processor.grey_codes = model.grey_codes() if from_codes else None
    return make_engine(model, train, engine_config(name, precision, recompute), CPU), processor


# -- what plans are made of ----------------------------------------------------------------------------------


def train(
    engine: str,
    accumulation: int = 1,
    understanding_only: bool = False,
    precision: str = "float32",
    export: str = "",
) -> dict[str, Any]:
    """Three steps; what every step reported, the weights after them and some insights."""
    weights = ONLY_ANSWERS if understanding_only else WEIGHTS
    made, processor = make(engine, train_config(accumulation=accumulation), weights, precision)
    seen: list[StepOutput] = []
    fit(made, batches(processor, 0, 3, accumulation), weights.by_task(), 3, observe=seen.append)
    whole = made.weights()
    if export:
        save_model(made, Path(export))
    return {
        "steps": [plain(output) for output in seen],
        "weights": whole,
        "frequencies": made.model.get_buffer("llm.model.rotary_emb.inv_freq").clone(),
    }


def train_balanced(engine: str, balance: str) -> dict[str, Any]:
    """Three steps with weights that move."""
    made, processor = make(engine, train_config())
    seen: list[StepOutput] = []
    balancer = make_balancer(balance, WEIGHTS.by_task(), 0.1)
    fit(made, batches(processor, 0, 3, 1), balancer, 3, observe=seen.append)
    return {"steps": [plain(output) for output in seen], "weights": made.weights()}


def train_any(
    engine: str,
    family: str,
    steps: int = 3,
    logits: int = vocabulary.LOGITS_AT_ONCE,
    recompute: str = "auto",
) -> dict[str, Any]:
    """A few steps of any family: what every step reported, and the weights after them.

    logits: elements of a head's output at one time; ranks with more rows than others take more chunks.
    """
    made, processor = make_any(engine, train_config(steps), family, recompute=recompute)
    seen: list[StepOutput] = []
    with patch.object(vocabulary, "LOGITS_AT_ONCE", logits):
        fit(made, batches(processor, 0, steps, 1), WEIGHTS.by_task(), steps, observe=seen.append)
    return {"steps": [plain(output) for output in seen], "weights": made.weights()}


def train_coded(engine: str, family: str) -> dict[str, Any]:
    """Three steps from frozen codes instead of pictures; some ranks have only text now and then."""
    made, processor = make_any(engine, train_config(), family, from_codes=True)
    encoder = families.fresh_model(family)
    stored = [[coded(sample, encoder) for sample in samples(step)] for step in range(3)]
    rank, ranks = world()
    mine = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    seen: list[StepOutput] = []
    fit(made, ([processor(step[mine])] for step in stored), WEIGHTS.by_task(), 3, observe=seen.append)
    return {"steps": [plain(output) for output in seen], "weights": made.weights()}


def codes_in_half(engine: str, family: str) -> dict[str, Any]:
    """The codes of sixteen pictures by a model in bfloat16 that has made a step, and its weights."""
    made, processor = make_any(engine, train_config(1), family, precision="bfloat16")
    fit(made, batches(processor, 0, 1, 1), WEIGHTS.by_task(), 1)
    rng = np.random.default_rng(0)
    pictures = [random_sample(rng, SIDE, n).image for n in range(16)]
    codes = [frozen(made.model, picture) for picture in pictures if picture is not None]
    return {"codes": torch.from_numpy(np.stack(codes)), "weights": made.weights()}


def coded(sample: Sample, model: Family) -> Sample:
    """The sample as a store of codes gives it: pixels only where the model looks at them."""
    if sample.image is None:
        return sample
    pictures = {"image": sample.image} | {task.value: target for task, target in sample.targets.items()}
    if sample.targets.get(PIXEL) is sample.image:
        del pictures["pixel"]
    codes = {name: frozen(model, picture) for name, picture in pictures.items()}
    image = sample.image if model.reads_pixels else None
    return Sample.from_row(replace(sample, image=image, targets={}, codes=codes).to_row())


def frozen(model: Family, picture: np.ndarray) -> np.ndarray:
    """A picture's codes, by the model as a whole."""
    codes = model.frozen_codes(torch.from_numpy(picture)[None].to(model.device_of_weights))[0].cpu()
    found: np.ndarray = codes.numpy()
    return found


def poisoned(engine: str, step: int = 2) -> dict[str, Any]:
    """Four steps; in one of them the last rank's loss isn't finite, though its gradient would be.

    Returns what was said of every step, and the weights after each.
    """
    made, processor = make(engine, train_config(4))
    rank, ranks = world()
    forward, seen, weights = made.forward, [], []

    def spoiled(batch: Batch, last: bool) -> dict[Any, TaskLoss]:
        losses = forward(batch, last)
        if made.steps_done == step and rank == ranks - 1:
            return {task: TaskLoss(loss.sum + math.inf, loss[1]) for task, loss in losses.items()}
        return losses

    def observe(output: StepOutput) -> None:
        seen.append(output)
        weights.append(made.weights())

    made.forward = spoiled  # type: ignore[method-assign]
    fit(made, batches(processor, 0, 4, 1), WEIGHTS.by_task(), 4, observe=observe)
    return {"steps": [plain(output) for output in seen], "weights": weights, "updates": made.updates()}


def pace(engine: str, steps: int = 6) -> dict[str, Any]:
    """Wall seconds per sample of whole optimiser steps of the tiny Harmon, as many samples on every rank."""
    module, family = load_family("harmon"), FamilyConfig()
    model, words = module.build(family, seed=0)
    model.freeze([], WEIGHTS.active())
    train = train_config(steps + 2)
    ready = module.processor(model, words, train, WEIGHTS.active(), 0)(
        [random_sample(np.random.default_rng(n), module.image_size(family), n) for n in range(4)]
    )
    made = make_engine(model.train(), train, engine_config(engine), CPU)
    took = []
    for _ in range(steps + 2):
        gather([0.0])
        started = time.perf_counter()
        train_step(made, [ready], WEIGHTS.by_task())
        took.append(time.perf_counter() - started)
    return {"seconds": statistics.median(took[2:]) / (4 * world()[1])}


COLLECTIVES = "all_reduce reduce reduce_scatter_tensor all_gather_into_tensor broadcast all_gather"
HANDED: Counter[str] = Counter()
"""Bytes handed to each collective, of the larger of what goes in and comes out."""


def count_collectives() -> None:
    """Have torch's collectives count; before DeepSpeed is imported, which keeps some of them."""

    def counting(name: str, whole: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            given = (*arguments, *named.values())
            sizes = [x.nbytes for x in given if isinstance(x, torch.Tensor)]
            HANDED[name] += max(sizes + [sum(t.nbytes for t in x) for x in given if isinstance(x, list)])
            return whole(*arguments, **named)

        return call

    for name in COLLECTIVES.split():
        setattr(dist, name, counting(name, getattr(dist, name)))


def traffic(engine: str) -> dict[str, Any]:
    """Bytes that one optimiser step of the micro model hands to each collective."""
    if not HANDED:
        count_collectives()
    made, processor = make(engine, train_config(3))
    if isinstance(made, TorchEngine) and made._parallel:
        made._parallel.register_comm_hook(None, _count_bucket)
    ready = list(batches(processor, 0, 3, 1))
    for step in ready[:2]:
        train_step(made, step, WEIGHTS.by_task())
    HANDED.clear()
    train_step(made, ready[2], WEIGHTS.by_task())
    found = {name: size for name, size in HANDED.items() if size > 1000}
    trained = [p for p in made.model.parameters() if p.requires_grad]
    return {"bytes": found, "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in trained)}


def _count_bucket(state: Any, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations
    """What DistributedDataParallel does by default, counted."""
    HANDED["all_reduce"] += bucket.buffer().nbytes
    work = dist.distributed_c10d._get_default_group().allreduce([bucket.buffer().div_(world()[1])])
    return work.get_future().then(lambda done: done.value()[0])


def decay(engine: str) -> dict[str, Any]:
    """One step in which every gradient is zero: weight decay alone."""
    made, processor = make(engine, train_config(1, learning_rate=0.1, weight_decay=0.5))
    nothing = Sample("nothing", position=0, conversations=())
    fit(made, [[processor([nothing])]], WEIGHTS.by_task(), 1)
    return {"weights": made.weights()}


def clipped(engine: str) -> dict[str, Any]:
    """One step of AdamW with an eps so large that the update is the clipped gradient itself."""
    made, processor = make(engine, train_config(1, learning_rate=1e4, eps=1e4, weight_decay=0.0))
    fit(made, batches(processor, 0, 1, 1), WEIGHTS.by_task(), 1)
    return {"weights": made.weights()}


def interrupted(
    engine: str, folder: str, stop_at: int = 0, resume: bool = False, family: str = "", dropout: float = 0.3
) -> dict[str, Any]:
    """Six steps, undisturbed, up to `stop_at` and saved, or resumed from what was saved.

    Of Harmon with dropout and a moving average, unless a family is named.
    """
    torch.manual_seed(world()[0])
    if family:
        made, processor = make_any(engine, train_config(6), family)
    else:
        made, processor = make(engine, train_config(6, ema=0.5), dropout=dropout)
    position = load(made, folder).position if resume else 0
    seen: list[StepOutput] = []

    def save(output: StepOutput) -> None:
        keep(made, folder, output)

    fit(
        made,
        batches(processor, position // BATCH, 6, 1),
        WEIGHTS.by_task(),
        stop_at or 6,
        observe=seen.append,
        save=save if stop_at else lambda output: None,
    )
    return {"steps": [plain(output) for output in seen], "weights": made.weights(), "position": position}


# Checkpoints are imported where they are used: their storage is not on a bare machine with a GPU.


def keep(engine: Engine, folder: str, output: StepOutput) -> None:
    """A checkpoint, written and complete before training goes on."""
    from unimrg.checkpoint import Progress, Saver
    from unimrg.storage import Store

    saver = Saver(Store.at(folder))
    saver.begin(engine, Progress(output.step, output.position, world()[1], {}, updates=engine.updates()))
    saver.finish(wait=True)


def load(engine: Engine, folder: str) -> Progress:
    """From the newest checkpoint in a folder."""
    from unimrg.checkpoint import latest_checkpoint, restore
    from unimrg.storage import Store

    store = Store.at(folder)
    return restore(store, latest_checkpoint(store), engine)


def train_adapters(engine: str, begin: str = "", save: str = "") -> dict[str, Any]:
    """Four steps with adapters, or those behind a checkpoint; what they reported, the state, and it merged.

    begin: a folder of checkpoints to go on from. save: where one is left behind the second step.
    """
    made, processor = make(engine, train_config(4), lora=LoraConfig(rank=2, alpha=4.0))
    first = load(made, begin).step if begin else 0
    seen: list[StepOutput] = []

    def at_step_2(output: StepOutput) -> None:
        if output.step == 2:
            keep(made, save, output)

    every = {"save": at_step_2, "save_every": 2} if save else {}
    fit(made, batches(processor, first, 4, 1), WEIGHTS.by_task(), 4, observe=seen.append, **every)
    weights = made.weights()
    plain_weights = merged(made.model, weights) if world()[0] == 0 else {}
    return {"steps": [plain(output) for output in seen], "weights": weights, "merged": plain_weights}


def consolidate(
    engine: str, folder: str, file_bytes: int, rank: int = 0, ema: float = 0.0, precision: str = "float32"
) -> dict[str, Any]:
    """Two steps, then the model written file by file; the whole of it, and what was asked for at one time.

    rank: of adapters.
    """
    made, processor = make(
        engine, train_config(2, ema=ema), precision=precision, lora=LoraConfig(rank=rank, alpha=4.0)
    )
    fit(made, batches(processor, 0, 2, 1), WEIGHTS.by_task(), 2)
    whole = made.weights()
    asked: list[int] = []
    weights = made.weights

    def counted(names: Collection[str]) -> dict[str, torch.Tensor]:
        part = weights(names)
        asked.append(sum(tensor.nbytes for tensor in part.values()))
        return part

    with patch.object(made, "weights", counted):
        save_model(made, Path(folder, "model"), file_bytes)
        adapted = save_adapters(made, Path(folder, "adapter"))
    return {"merged": merged(made.model, whole) if whole else {}, "asked": asked, "adapted": adapted}


def shard_stored(folder: str, published: bool) -> dict[str, Any]:
    """Load a stored model and cut it into the ranks' pieces; how far the process grew meanwhile, in bytes."""
    import_deepspeed(CPU)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    before, done = own_bytes(), threading.Event()
    seen = [before]

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    if published:
        files = f"{folder}/harmon.pth", f"{folder}/kl16.ckpt"
        model = from_published(HarmonConfig.from_pretrained(folder), *files, dtype=None)
    else:
        model = load_folder(Harmon, Path(folder), dtype=None)
    shard(model, settings, torch.float32, CPU)
    done.set()
    watcher.join()
    held = sum(parameter.ds_tensor.numel() for parameter in model.parameters())
    size = sum(parameter.ds_numel for parameter in model.parameters())
    # Only from where no piece is padding.
    starts = [p.ds_tensor[:64] for p in model.parameters() if p.ds_numel >= 64 * world()[1]]
    values = set(torch.cat(starts).tolist())
    return {"grown": max(seen) - before, "held": 4 * held, "size": 4 * size, "values": values}


def own_bytes() -> int:
    """Memory of this process without what it maps from files."""
    table = Path("/proc/self/status").read_text()
    return 1024 * int(table.partition("RssAnon:")[2].split()[0])


def leave_zero(engine: str, folder: str, precision: str) -> dict[str, Any]:
    """One step, then a checkpoint as DeepSpeed's own scripts write it; returns the weights."""
    made, processor = make(engine, train_config(1), precision=precision)
    assert isinstance(made, DeepSpeedEngine)
    fit(made, batches(processor, 0, 1, 1), WEIGHTS.by_task(), 1)
    made._engine.save_checkpoint(folder)
    return {"weights": made.weights()}


def talk() -> dict[str, Any]:
    """What ranks tell each other: numbers, counts, and that one of them has run out of data."""
    rank, ranks = world()
    made, processor = make("torch", train_config(2))
    counts = global_counts([processor(samples(0)[rank * BATCH // ranks :][: BATCH // ranks])])
    try:
        fit(made, list(batches(processor, 0, 2, 1))[: 2 - rank], WEIGHTS.by_task(), 2)
        reason = ""
    except DataError as error:
        reason = str(error)
    named = {str(task): count for task, count in counts.items()}
    return {"gathered": gather([rank + 0.5, 2.0**40]), "counts": named, "reason": reason}


def plain(output: StepOutput) -> dict[str, Any]:
    """Loadable without running code."""
    values = asdict(output)
    values["suspects"] = list(output.suspects)
    values["losses"] = {str(task): loss for task, loss in output.losses.items()}
    values["weights"] = {str(task): weight for task, weight in output.weights.items()}
    return values


# -- groups --------------------------------------------------------------------------------------------------


class Group:
    """Processes that work through a plan. start, then wait; `result` reads what a rank left."""

    def __init__(self, folder: Path, ranks: int, plan: dict[str, tuple[str, dict[str, Any]]]) -> None:
        folder.mkdir(parents=True)
        (folder / "empty").mkdir()
        (folder / "plan.json").write_text(json.dumps(plan))
        # Nothing on the path, not even `which`; no extension built earlier either.
        alone = {"PATH": str(folder / "empty"), "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
        clean = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "DS_ACCELERATOR")}
        self.folder = folder
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.engine_runs", str(rank), str(ranks), str(folder)],
                cwd=ROOT,
                env=clean | alone | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]

    def wait(self) -> Group:
        """Raises AssertionError with the output when a process failed."""
        try:
            self.said = [process.communicate(timeout=600)[0] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        assert not any(process.returncode for process in self.processes), "\n".join(self.said)
        return self

    def result(self, name: str, rank: int = 0) -> dict[str, Any]:
        return torch.load(self.folder / f"{name}-rank{rank}.pt", weights_only=True)


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=ranks)
    shard_everything()
    for name, (function, arguments) in json.loads((folder / "plan.json").read_text()).items():
        torch.save(globals()[function](**arguments), folder / f"{name}-rank{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def shard_everything() -> None:
    """Have ZeRO-3 shard small parameters too; by default it keeps whole what this model is made of."""
    config = DeepSpeedEngine._config

    def patched(self: DeepSpeedEngine, *arguments: Any) -> dict[str, Any]:
        values = config(self, *arguments)
        values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return values

    engines.DeepSpeedEngine._config = patched  # type: ignore[method-assign]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    # All is written. The groups that DeepSpeed keeps die with the interpreter; gloo's threads, where they
    # outlive what they use, abort the process then ("terminate called without an active exception").
    sys.stdout.flush()
    os._exit(0)
