"""Trainings on clusters whose nodes come and go.

python -m tests.elastic_runs SCENARIO STORAGE [key=value ...]


The head holds the driver and the data; every other node has room for exactly one training worker.
Prints one JSON line about what was done.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from cluster.trainer import run
from tests.pipelines import kill_node
from unimrg.compose import compose
from unimrg.config import RunConfig
from unimrg.metrics import read_jsonl

MEMORY = 128 << 20
NODE_CPUS = 8
ENVIRONMENT = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",  # else it tries for a minute to be as many as before
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
LIMIT = 240.0


class Nodes:
    """A cluster whose nodes for training workers can be added and taken away."""

    def __init__(self, workers: int) -> None:
        head = {"num_cpus": 4, "object_store_memory": MEMORY, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.add() for _ in range(workers)]
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="error")

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=NODE_CPUS, object_store_memory=MEMORY)

    def stop(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


def records(folder: Path) -> list[dict[str, Any]]:
    return read_jsonl(folder / "metrics.jsonl")


def until(folder: Path, true: Callable[[list[dict[str, Any]]], bool], alive: threading.Thread) -> None:
    """Wait until something holds of the metrics."""
    end = time.monotonic() + LIMIT
    while not true(records(folder)):
        assert alive.is_alive(), "the run ended too early"
        assert time.monotonic() < end, records(folder)[-1:]
        time.sleep(0.1)


def shrink_and_grow(nodes: Nodes, folder: Path, training: threading.Thread) -> None:
    """A node is lost: the run goes on with one worker. Another comes: it grows back to two."""
    until(folder, lambda seen: len(seen) > 12, training)
    kill_node(nodes.nodes[1])
    until(folder, lambda seen: seen[-1]["workers"] == 1, training)
    nodes.add()
    until(folder, lambda seen: seen[-1]["workers"] == 2, training)


def drain(nodes: Nodes, folder: Path, training: threading.Thread) -> None:
    """A node is about to be taken away: what is there is saved before it goes, in the middle of nowhere."""
    until(folder, lambda seen: len(seen) > 12, training)
    words = f"""drain-node --address {nodes.cluster.address} --node-id {nodes.nodes[1].node_id}
        --reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot --deadline-remaining-seconds 20"""
    command = [sys.executable, "-m", "ray.scripts.scripts", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    nodes.add()


SCENARIOS = {"shrink-and-grow": shrink_and_grow, "drain": drain}


def main(scenario: str, storage: str, words: list[str]) -> None:
    nodes = Nodes(2)
    config = compose("train", [f"storage_path={storage}", "name=run", *words], RunConfig)
    outcome: list[int | BaseException] = []

    def work() -> None:
        try:
            outcome.append(run(config))
        except BaseException as error:
            outcome.append(error)

    training = threading.Thread(target=work)
    training.start()
    SCENARIOS[scenario](nodes, Path(storage) / "run", training)
    training.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    print(json.dumps({"status": outcome[0]}), flush=True)
    nodes.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
