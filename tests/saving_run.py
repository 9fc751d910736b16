"""Steps with a real engine and a checkpoint behind each, until somebody kills the process."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from tests.engine_runs import WEIGHTS, batches, make, train_config
from unimrg.checkpoint import Progress, Saver, latest_checkpoint, restore, retire
from unimrg.engine import Engine, world
from unimrg.loop import StepOutput, fit
from unimrg.storage import Store

STEPS = 1000


def train(store: Store, rank: int, ranks: int, meeting: str, steps: int = STEPS) -> None:
    """From the newest checkpoint on, until `steps` are done. meeting: a file by which the ranks meet."""
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=ranks)
    engine, processor = make("torch", train_config(STEPS, ema=0.5))
    name = latest_checkpoint(store)
    first = restore(store, name, engine).step if name else 0
    saver = Saver(store)

    def save(output: StepOutput) -> None:
        progress = Progress(output.step, output.position, world()[1], {}, updates=engine.updates())
        saver.begin(engine, progress)  # waits for the one before
        if world()[0] == 0:
            retire(store, last=2, best=0)

    fit(engine, batches(processor, first, steps, 1), WEIGHTS.by_task(), steps, save=save, save_every=1)
    saver.finish(wait=True)


def undisturbed(steps: int) -> list[str]:
    """Digests of what one rank of a run holds behind every step, the one before the first included."""
    engine, processor = make("torch", train_config(STEPS, ema=0.5))
    found = [state_digest(engine)]
    fit(
        engine,
        batches(processor, 0, steps, 1),
        WEIGHTS.by_task(),
        steps,
        observe=lambda output: found.append(state_digest(engine)),
    )
    return found


def state_digest(engine: Engine) -> str:
    """Of weights, moments and moving averages."""
    digest = hashlib.sha256()
    for piece in engine.pieces():
        for value in piece.values.values():
            digest.update(value.numpy().tobytes())
    return digest.hexdigest()
