"""Steps with a real engine and a checkpoint behind each, until somebody kills the process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tests.engine_runs import WEIGHTS, batches, make, train_config
from unimrg.checkpoint import Progress, Saver, latest_checkpoint, restore, retire
from unimrg.engine import Engine, world
from unimrg.families.base import Processor
from unimrg.loop import StepOutput, fit
from unimrg.storage import Store

STEPS = 1000


def make_run() -> tuple[Engine, Processor]:
    return make("torch", train_config(STEPS, ema=0.5, learning_rate=1e-3))


def train(store: Store, rank: int, ranks: int, meeting: str, steps: int = STEPS) -> None:
    """From the newest checkpoint on, until `steps` are done. meeting: a file by which the ranks meet."""
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=ranks)
    engine, processor = make_run()
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


def undisturbed(steps: int) -> list[Tensor]:
    """What a run of one rank holds behind every step, and before the first."""
    engine, processor = make_run()
    found = [state_of(engine)]
    fit(
        engine,
        batches(processor, 0, steps, 1),
        WEIGHTS.by_task(),
        steps,
        observe=lambda output: found.append(state_of(engine)),
    )
    return found


def state_of(engine: Engine) -> Tensor:
    """Weights, moments and moving averages, one behind the other."""
    return torch.cat([value for piece in engine.pieces() for value in piece.values.values()])
