"""`ray job submit -- python -m unimrg.train` against a running Ray cluster with a dashboard."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.s3 import free_port

pytestmark = [pytest.mark.slow, pytest.mark.ray]

ROOT = Path(__file__).parents[1]
RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]


@contextlib.contextmanager
def running_cluster() -> Iterator[str]:
    """A head node with ports and a folder of its own; yields its dashboard, stops what it started."""
    # Ray's sockets have names of their own below this folder, and a socket's path may not be long.
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    dashboard = free_port()
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [
        *("start", "--head", "--num-cpus=4", f"--temp-dir={folder}", f"--port={free_port()}"),
        *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"),
        *("--min-worker-port=21000", "--max-worker-port=21999"),
    ]
    try:
        subprocess.run([*RAY, *command], check=True, env=environment, capture_output=True)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        started = [p for p in psutil.process_iter(["cmdline"]) if folder in " ".join(p.info["cmdline"] or ())]
        for process in started:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(started, timeout=10)
        shutil.rmtree(folder, ignore_errors=True)


SHORT = (
    *("train.steps=3", "train.batch_size=4", "data.scenes.train=16", "data.scenes.test=8"),
    *("report.images=1", "report.draw_iterations=2", "name=job"),
)


def submit(address: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit` from the project's folder, to its end."""
    job = [*RAY, "job", "submit", "--address", address, "--working-dir", ".", "--"]
    return subprocess.run(
        [*job, sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
    )


def test_submitted_job_trains(tmp_path: Path) -> None:
    words = (*SHORT, "report.questions=4", f"storage_path={tmp_path}")
    with running_cluster() as address:
        done = submit(address, "-m", "unimrg.train", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "job" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert (tmp_path / "job" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "job" / "report.html").is_file()


def test_submitted_search_searches(tmp_path: Path) -> None:
    options = ("search.trials=2", "search.repeats=1", "search.questions=4", "search.drawings=1")
    with running_cluster() as address:
        done = submit(address, "tune/search.py", *SHORT, *options, f"storage_path={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    left = {path.name for path in (tmp_path / "job").iterdir()}
    assert {"search.html", "trials.parquet", "best.yaml"} <= left
    assert "best.yaml" in done.stdout  # the closing table, among the job's logs
