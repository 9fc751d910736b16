"""The core trains where only torch and transformers are: everything around it is blocked here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

SCRIPT = """
import importlib, math, pkgutil, sys
from pathlib import Path

# What `python -m` runs, and the only module that imports Hydra.
COMMANDS = {"compose", "train", "label", "evaluate", "generate", "export", "__main__"}
BLOCKED = {"ray", "deepspeed", "hydra", "omegaconf", "boto3", "botocore", "diffusers", "peft", "accelerate"}
sys.modules.update(dict.fromkeys(BLOCKED))  # None: importing it raises, looking for it finds nothing

import numpy as np
import torch
import unimrg

torch.set_num_threads(1)
for module in pkgutil.walk_packages(unimrg.__path__, "unimrg."):
    if module.name.rpartition(".")[2] not in COMMANDS:
        importlib.import_module(module.name)

from tests.tiny_harmon import micro, random_model, random_sample, tokenizer
from unimrg.config import EngineConfig, TrainConfig, WeightsConfig
from unimrg.engine import make_engine
from unimrg.errors import UnimrgError
from unimrg.families.harmon import HarmonProcessor
from unimrg.loop import fit

model = random_model(micro()).train()
processor = HarmonProcessor(model.config, tokenizer())
rng = np.random.default_rng(0)
batches = [[processor([random_sample(rng, 16, position) for position in (0, 1)])]] * 2
train = TrainConfig(steps=2, batch_size=2, warmup=0.0, learning_rate=1e-3)
engine = make_engine(model, train, EngineConfig(name="torch"), torch.device("cpu"))
totals = []
fit(engine, batches, WeightsConfig().by_task(), 2, observe=lambda output: totals.append(output.total))
assert all(map(math.isfinite, totals)) and totals[1] < totals[0], totals
assert not BLOCKED & {name.partition(".")[0] for name, module in sys.modules.items() if module}

try:
    make_engine(model, train, EngineConfig(name="deepspeed"), torch.device("cpu"))
except UnimrgError as error:
    print(error)
"""


def test_the_core_trains_without_anything_around_it() -> None:
    """Every module of `unimrg` but the commands is imported; the engine that needs DeepSpeed says so."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "engine.name=deepspeed needs deepspeed: pip install deepspeed"
