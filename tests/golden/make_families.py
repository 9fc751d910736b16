"""Golden numbers of every family's training, for test_families.py.

    python -m tests.golden.make_families [FAMILY ...]        writes tests/golden/families/<family>.json

To be run again only when the training is meant to change; say in the commit why it does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.engine_runs import CPU, WEIGHTS, batches, engine_config, train_config
from tests.families import NAMES, fresh_model, processor
from unimrg.engine import make_engine
from unimrg.loop import StepOutput, fit
from unimrg.losses import combine
from unimrg.sample import Task

FOLDER = Path(__file__).parent / "families"
CURVE = 20


def first_step(name: str) -> dict[str, Any]:
    """Mean losses, norms of all gradients, lengths of all parameters after one step of AdamW."""
    model = fresh_model(name).train()
    engine = make_engine(model, train_config(1), engine_config("torch"), CPU)
    (batch,) = next(batches(processor(name), 1, 2, 1))
    losses = model(batch)
    combine(losses, WEIGHTS.by_task(), batch.counts).backward()
    norms = {key: float(p.grad.norm()) for key, p in model.named_parameters() if p.grad is not None}
    engine.step()
    return {
        "losses": {task.value: float(losses[task].mean.detach()) for task in Task},
        "gradient_norms": norms,
        "parameters": {key: float(p.detach().norm()) for key, p in model.named_parameters()},
    }


def curve(name: str) -> list[dict[str, float]]:
    """Losses of twenty steps over the engines' hard batches, where tasks are missing now and then."""
    model = fresh_model(name).train()
    train = train_config(CURVE, learning_rate=2e-3)
    engine = make_engine(model, train, engine_config("torch"), CPU)
    seen: list[StepOutput] = []
    fit(engine, batches(processor(name), 0, CURVE, 1), WEIGHTS.by_task(), CURVE, observe=seen.append)
    return [{task.value: loss for task, loss in o.losses.items()} | {"total": o.total} for o in seen]


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name in names or NAMES:
        numbers = {"first_step": first_step(name), "curve": curve(name)}
        (FOLDER / f"{name}.json").write_text(json.dumps(rounded(numbers), indent=1) + "\n")


def rounded(value: Any) -> Any:
    """Seven digits are all that float32 has."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.7g}")


if __name__ == "__main__":
    main(sys.argv[1:])
