"""Files that start a cluster elsewhere: what Ray's launcher says to aws.yaml, and what slurm.sh does."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.trainer import PAUSED
from tests.k8s.agreement import ray_version
from unimrg import __version__

ROOT = Path(__file__).parents[1]
AWS, SLURM = ROOT / "cluster" / "aws.yaml", ROOT / "cluster" / "slurm.sh"
FAKES = {
    # Runs what it is told to run, here.
    "srun": 'echo "srun $*" >> "$LOG"; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'echo "scontrol $*" >> "$LOG"; if [[ $1 == show ]]; then printf "one\\ntwo\\nthree\\n"; fi',
    "hostname": "echo 10.0.0.1 172.17.0.1",
    "ray": """echo "ray $* token=${#RAY_AUTH_TOKEN} mode=$RAY_AUTH_MODE" >> "$LOG"
        if [[ $1 == list ]]; then for ((i = 0; i < UP; i++)); do echo '"node_id": "x"'; done; exit 0; fi
        trap 'echo "ray ended" >> "$LOG"; exit 0' TERM; while :; do sleep 0.1; done""",
    "python": """echo "python $* address=$RAY_ADDRESS" >> "$LOG"
        trap 'echo saved >> "$LOG"; exit 75' TERM; [[ $STATUS == wait ]] || exit "$STATUS"
        while :; do sleep 0.1; done""",
}


def launcher_takes(config: dict[str, Any]) -> None:
    """Raises what Ray raises for a file that it can't use."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))


def test_ray_s_launcher_takes_the_file_for_aws() -> None:
    config = yaml.safe_load(AWS.read_text("utf-8"))
    launcher_takes(config)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert types["trainer"]["min_workers"] == types["trainer"]["max_workers"]
    assert config["docker"]["image"].endswith(f":{__version__}-ray{ray_version()}-cuda")
    commands = config["head_start_ray_commands"][1], config["worker_start_ray_commands"][1]
    assert all("RAY_AUTH_MODE=token" in command for command in commands)
    assert "--dashboard-host=127.0.0.1" in commands[0]
    for kind in types.values():
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in kind["node_config"]["BlockDeviceMappings"])


def node_type(name: str, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["available_node_types"][name].update(changes)


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "misspelt": (lambda c: c.update(max_worker=3), "max_worker"),
    "no provider": (lambda c: c.pop("provider"), "provider"),
    "word as number": (lambda c: c.update(max_workers="eight"), "eight"),
    "field of a node type": (node_type("trainer", spot=True), "spot"),
    "label that is no text": (node_type("trainer", labels={"pool": 1}), "is not of type 'string'"),
    "head that isn't": (lambda c: c.update(head_node_type="heads"), "head_node_type"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused(name: str) -> None:
    change, said = BROKEN[name]
    config = yaml.safe_load(AWS.read_text("utf-8"))
    change(config)
    with pytest.raises(Exception) as refused:
        launcher_takes(config)
    assert said in str(refused.value)


@pytest.mark.parametrize("script", ["cluster/slurm.sh", ".ci/run", "tests/bench/gpu.sh"])
def test_shell_scripts_are_sound(script: str) -> None:
    """By shellcheck; SC2329 doesn't see that a trap or a name in "$@" calls a function."""
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [str(shellcheck), "--exclude=SC2329", str(ROOT / script)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def start(folder: Path, status: str, up: int = 3) -> tuple[subprocess.Popen[str], Path]:
    """The script as SLURM would run it, with what it calls replaced; and the log of those calls."""
    for name, body in FAKES.items():
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "LOG": str(folder / "log"),
        "STATUS": status,
        "UP": str(up),
        "RAY_POLL_SECONDS": "0.01",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "n[1-3]",
    }
    words = ["name=a run", "storage_path=/scratch"]
    running = subprocess.Popen(
        ["bash", str(SLURM), *words],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return running, folder / "log"


def test_slurm_starts_every_node_with_one_token_and_then_the_run(tmp_path: Path) -> None:
    running, log = start(tmp_path, status="0")
    assert running.wait(60) == 0
    text = log.read_text()
    assert text.count("ray start --head --block --node-ip-address=10.0.0.1 --port=6379") == 2  # srun, ray
    others = re.findall(r"srun .*--nodelist=(\w+) ray start --block --address=10.0.0.1:6379", text)
    assert sorted(others) == ["three", "two"]
    assert set(re.findall(r"token=(\d+) mode=(\w+)", text)) == {("64", "token")}
    assert "python -m unimrg.train name=a run storage_path=/scratch address=10.0.0.1:6379" in text
    assert text.count("ray ended") == 3 and "requeue" not in text


def test_slurm_hands_the_signal_on_and_queues_again_when_it_has_saved(tmp_path: Path) -> None:
    running, log = start(tmp_path, status="wait")
    while "python -m" not in (log.read_text() if log.exists() else ""):
        assert running.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)  # until the fake has set its trap
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait(60) == PAUSED
    text = log.read_text()
    assert text.index("saved") < text.index("scontrol requeue 17")


def test_slurm_queues_no_failure_again(tmp_path: Path) -> None:
    running, log = start(tmp_path, status="2")
    assert running.wait(60) == 2
    assert "requeue" not in log.read_text()


def test_slurm_gives_up_on_nodes_that_don_t_come(tmp_path: Path) -> None:
    running, log = start(tmp_path, status="0", up=2)
    assert running.wait(120) == 1
    assert "only 2 of 3 nodes have come" in (running.stderr.read() if running.stderr else "")
    assert "python" not in log.read_text() and log.read_text().count("ray ended") == 3
