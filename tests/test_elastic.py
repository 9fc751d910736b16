"""Nodes and workers that go, come back, freeze: the run goes on, with exactly the samples it should have."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.session import ray_session
from cluster.trainer import run
from tests.elastic_runs import ENVIRONMENT, NODE_CPUS
from tests.tiny_harmon import micro, tokenizer
from unimrg.compose import compose
from unimrg.config import RunConfig
from unimrg.data.scenes import SceneSettings, write
from unimrg.errors import UnimrgError
from unimrg.families.harmon.model import Harmon
from unimrg.metrics import read_jsonl
from unimrg.sample import Task
from unimrg.storage import Store

pytestmark = [pytest.mark.slow, pytest.mark.ray]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A training of many short steps on 64 scenes."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    Harmon(micro()).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    write(Store.at(str(folder / "scenes")), SceneSettings(train=64, test=4, size=64, questions=3))
    return [
        f"family.weights={folder}/base",
        f"data.manifest={folder}/scenes/train.json",
        f"data.held_out={folder}/scenes/test.json",
        "teachers=oracle",
        "labels.mode=off",
        "train.batch_size=4",
        "engine=torch",
        "engine.threads=1",
        "report.enabled=false",
    ]


@pytest.fixture(scope="module")
def expected(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """The records of an undisturbed run of one worker, by step."""
    storage = tmp_path_factory.mktemp("undisturbed")
    with ray_session():
        more = ["train.steps=700", "train.checkpoint_every=0", "name=run", f"storage_path={storage}"]
        assert run(compose("train", [*words, *more], RunConfig)) == 0
    return {record["step"]: record for record in read_jsonl(storage / "run" / "metrics.jsonl")}


def play(scenario: str, storage: Path, words: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run a scenario in a process of its own; returns records and events."""
    elastic = [f"cluster.cpus_per_worker={NODE_CPUS}", "cluster.workers=2", "train.steps=700"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.elastic_runs", scenario, str(storage), *words, *elastic],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = storage / "run"
    return read_jsonl(folder / "metrics.jsonl"), read_jsonl(folder / "events.jsonl")


def assert_undisturbed(records: list[dict[str, Any]], expected: dict[int, dict[str, Any]]) -> None:
    """Every step once, with the samples and the losses that it should have had."""
    assert [record["step"] for record in records] == sorted(expected)
    for record in records:
        wanted = expected[record["step"]]
        assert record["position"] == wanted["position"]
        if record["step"] <= 200:  # later on, rounding of other sums has grown
            for task in Task:
                assert record[f"loss/{task}"] == pytest.approx(wanted[f"loss/{task}"], rel=1e-3, abs=1e-4)


def test_a_lost_node_costs_a_worker_and_a_new_one_brings_it_back(
    words: list[str], expected: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    """kill -9 of a whole node: on with one worker from the last checkpoint; a node is added: two again."""
    more = ["cluster.min_workers=1", "cluster.resize_seconds=5", "train.checkpoint_every=10"]
    records, events = play("shrink-and-grow", tmp_path, [*words, *more])
    assert_undisturbed(records, expected)
    sizes = [record["workers"] for record in records]
    assert [size for at, size in enumerate(sizes) if at == 0 or size != sizes[at - 1]] == [2, 1, 2]
    assert [event["event"] for event in events].count("resume") == 2


def test_what_a_node_is_told_before_it_goes_is_saved(
    words: list[str], expected: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    """A preemption notice: a checkpoint that no interval asked for, and the run goes on from it."""
    records, events = play("drain", tmp_path, [*words, "train.checkpoint_every=0"])
    assert_undisturbed(records, expected)
    kinds = [event["event"] for event in events]
    assert kinds.count("preemption") == 1 and kinds.count("resume") == 1
    (notice,) = (event for event in events if event["event"] == "preemption")
    (resumed,) = (event for event in events if event["event"] == "resume")
    assert resumed["step"] == notice["step"] > 0


def test_a_frozen_worker_is_told_and_replaced(words: list[str], tmp_path: Path) -> None:
    """SIGSTOP of one of two workers: the other one says where it waits, and the group starts anew."""
    folder = tmp_path / "run"
    stopped: list[int] = []

    def freeze() -> None:
        while len(read_jsonl(folder / "metrics.jsonl")) < 15:
            time.sleep(0.05)
        (begun,) = (e for e in read_jsonl(folder / "events.jsonl") if e["event"] == "start")
        stopped.append(begun["detail"]["pids"][1])
        os.kill(stopped[0], signal.SIGSTOP)

    more = ["train.steps=60", "train.checkpoint_every=5", "cluster.workers=2", "cluster.hang_seconds=10"]
    with ray_session():
        threading.Thread(target=freeze, daemon=True).start()
        config = compose("train", [*words, *more, "name=run", f"storage_path={tmp_path}"], RunConfig)
        assert run(config) == 0
    (hang,) = (e for e in read_jsonl(folder / "events.jsonl") if e["event"] == "hang")
    assert hang["detail"]["rank"] == 0 and "in fit" in hang["detail"]["stacks"]
    assert [record["step"] for record in read_jsonl(folder / "metrics.jsonl")] == list(range(1, 61))
    assert read_jsonl(folder / "metrics.jsonl")[-1]["hangs"] == 1


def test_a_loss_that_keeps_jumping_brings_back_earlier_weights_and_in_the_end_stops(
    words: list[str], tmp_path: Path
) -> None:
    """A learning rate that rises until the loss explodes, again and again, each time with other samples."""
    more = ["train.steps=400", "train.learning_rate=4", "train.warmup=1", "train.checkpoint_every=10"]
    more += ["train.spike=1.5", "train.rollback_after=2", "name=run", f"storage_path={tmp_path}"]
    with ray_session(), pytest.raises(UnimrgError, match=r"kept jumping up to step \d+, after 3 rollbacks; "):
        run(compose("train", [*words, *more], RunConfig))
    events = read_jsonl(tmp_path / "run" / "events.jsonl")
    rollbacks = [event for event in events if event["event"] == "rollback"]
    assert len(rollbacks) == 3
    for event in rollbacks:
        back, behind = re.search(
            r"back to step-0*(\d+)-w1, on with the samples from (\d+)", event["detail"]
        ).groups()
        assert event["step"] == int(back) and int(behind) > int(back) * 4
    spikes = [event["step"] for event in events if event["event"] == "spike"]
    assert len(spikes) >= 8
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert records[-1]["rollbacks"] == 3
    positions = [record["position"] for record in records]
    assert positions == sorted(set(positions)) and positions[-1] > 4 * len(positions)
