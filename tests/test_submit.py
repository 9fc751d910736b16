"""`ray job submit -- python -m unimrg.train` to a cluster of three nodes that wants a token.

The cluster is that of `python -m cluster.local`: a head without CPUs, and two nodes that have room for one
training worker each. The tests share it in their order; the one that loses a node comes last.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster.local import State
from cluster.trainer import PAUSED
from tests.clusters import LIMIT, ROOT, started, until
from tests.tiny_harmon import micro, tokenizer
from unimrg.checkpoint import latest_checkpoint
from unimrg.data.scenes import SceneSettings, write
from unimrg.families.harmon.model import Harmon
from unimrg.metrics import read_jsonl
from unimrg.storage import Store

pytestmark = [pytest.mark.slow, pytest.mark.ray]

RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
QUICK = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15"}  # else it tries for a minute to be as many as before


@dataclass(frozen=True)
class Submitter:
    """Somebody at a terminal with a token, or without."""

    state: State
    token: str | None

    def ray(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
        environment |= {"RAY_AUTH_MODE": "token", "HOME": "/nonexistent"}  # no token of this machine's user
        environment |= {"RAY_AUTH_TOKEN": self.token} if self.token else {}
        command, *rest = words
        return subprocess.run(
            [*RAY, "job", command, "--address", self.state.address, *rest],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )

    def submit(
        self,
        name: str,
        *words: str,
        wait: bool = True,
        upload: bool = False,
        command: Sequence[str] = ("-m", "unimrg.train"),
    ) -> subprocess.CompletedProcess[str]:
        """upload: send the code along, as one does by default.

        Ray deletes it with the last job that uses it, and a job that comes at that moment misses it: so the
        others find the code where it lies.
        """
        runtime = json.dumps({"env_vars": QUICK | ({} if upload else {"PYTHONPATH": str(ROOT)})})
        options = [f"--submission-id={name}", f"--runtime-env-json={runtime}"]
        options += [*(["--working-dir=."] if upload else []), *([] if wait else ["--no-wait"])]
        return self.ray("submit", *options, "--", "python", *command, *words)

    def job(self, name: str) -> dict[str, Any]:
        """What the cluster says of a job: status, driver_exit_code, …"""
        found: dict[str, Any] = json.loads(self.get(f"/api/jobs/{name}"))
        return found

    def get(self, path: str) -> str:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        request = urllib.request.Request(self.state.address + path, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(answer.read().decode())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[State]:
    with started(tmp_path_factory.mktemp("cluster"), nodes=3) as state:
        yield state


@pytest.fixture(scope="module")
def submitter(cluster: State) -> Submitter:
    return Submitter(cluster, Path(cluster.token_file).read_text())


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A training of short steps on two workers, each of which takes more than half of a node."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    Harmon(micro()).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    write(Store.at(str(folder / "scenes")), SceneSettings(train=64, test=4, size=64, questions=3))
    return [
        f"family.weights={folder}/base",
        f"data.manifest={folder}/scenes/train.json",
        f"data.held_out={folder}/scenes/test.json",
        *("teachers=oracle", "labels.mode=off", "train.batch_size=4", "engine=torch", "engine.threads=1"),
        *("report.questions=4", "report.images=1", "report.draw_iterations=2"),
        *("cluster.workers=2", "cluster.cpus_per_worker=5"),
    ]


def records(folder: Path) -> list[dict[str, Any]]:
    return read_jsonl(folder / "metrics.jsonl")


def test_the_token_is_its_owner_s_alone(cluster: State) -> None:
    path = Path(cluster.token_file)
    assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0
    assert len(path.read_text()) == 64
    every = [process.cmdline() for process in cluster.running()]
    assert path.read_text() not in str(every)  # what everybody on the machine can see


@pytest.mark.parametrize("token", [None, "0" * 64])
def test_refused_without_the_token_and_with_a_wrong_one(
    cluster: State, submitter: Submitter, words: list[str], tmp_path: Path, token: str | None
) -> None:
    stranger = Submitter(cluster, token)
    done = stranger.submit("stranger", *words, f"storage_path={tmp_path}", "name=run")
    assert done.returncode != 0
    assert "token" in done.stdout + done.stderr
    for path in ("/api/jobs/", "/nodes?view=summary", "/api/cluster_status"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            stranger.get(path)
        assert refused.value.code in (401, 403)
    assert [job["submission_id"] for job in json.loads(submitter.get("/api/jobs/"))] == []
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_is_a_failed_job_that_says_why(submitter: Submitter) -> None:
    """The client's status is 1 for every failure; the command's own stands in the job."""
    done = submitter.submit("misspelt", "train.stepps=3")
    assert done.returncode == 1
    assert "did you mean" in done.stdout + done.stderr or "train.steps" in done.stdout + done.stderr
    job = submitter.job("misspelt")
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", 2)


def test_the_quick_start_trains_and_labels_as_a_job(submitter: Submitter, tmp_path: Path) -> None:
    """With everything on: scenes are made, teachers label beside it; the head has no CPU for any of it."""
    small = ["train.steps=3", "train.batch_size=4", "data.scenes.train=16", "data.scenes.test=4"]
    report = ["report.questions=4", "report.images=1", "report.draw_iterations=2"]
    place = [f"storage_path={tmp_path}", "name=job", "cluster.workers=2"]
    done = submitter.submit("quick", *small, *report, *place, upload=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [record["step"] for record in records(tmp_path / "job")] == [1, 2, 3]
    for name in ("model/model.safetensors", "report.html"):
        assert (tmp_path / "job" / name).is_file()
    assert list((tmp_path / "labels").rglob("*.parquet"))


def test_a_search_as_a_job(submitter: Submitter, words: list[str], tmp_path: Path) -> None:
    """Its trials start their own workers, on nodes that the head isn't one of."""
    options = ["search.trials=2", "search.repeats=1", "search.questions=4", "search.drawings=1"]
    more = ["name=job", f"storage_path={tmp_path}", "train.steps=3", "cluster.cpus_per_worker=0.5"]
    done = submitter.submit("search", *words, *more, *options, command=(str(ROOT / "tune" / "search.py"),))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in ("search.html", "trials.parquet", "best.yaml"):
        assert (tmp_path / "job" / name).is_file()
    assert "best.yaml" in done.stdout  # the closing line, among the job's logs


def test_stopping_a_job_saves_first(submitter: Submitter, words: list[str], tmp_path: Path) -> None:
    """`ray job stop` sends SIGTERM; the same command goes on from what was saved."""
    run = tmp_path / "run"
    more = ["name=run", f"storage_path={tmp_path}", "train.steps=100000", "train.checkpoint_every=0"]
    assert submitter.submit("stopped", *words, *more, wait=False).returncode == 0
    until(lambda: len(records(run)) > 10, "ten steps")
    stopped = submitter.ray("stop", "stopped")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    job = submitter.job("stopped")
    assert job["status"] == "STOPPED"
    log = submitter.ray("logs", "stopped").stdout
    last = records(run)[-1]["step"]
    assert f"saved at step {last} and stopped as told" in log
    assert str(last) in str(latest_checkpoint(Store.at(str(run / "checkpoints"))))
    again = submitter.submit(
        "again", *words, "name=run", f"storage_path={tmp_path}", f"train.steps={last + 5}"
    )
    assert again.returncode == 0, again.stdout[-3000:]
    assert [record["step"] for record in records(run)] == list(range(1, last + 6))
    (resumed,) = (event for event in read_jsonl(run / "events.jsonl") if event["event"] == "resume")
    assert resumed["step"] == last


def test_trains_on_two_nodes_and_survives_the_loss_of_one(
    cluster: State, submitter: Submitter, words: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = ["name=run", f"storage_path={tmp_path}", "train.steps=300", "train.checkpoint_every=10"]
    more += ["cluster.min_workers=1", "cluster.resize_seconds=5"]
    assert submitter.submit("lost", *words, *more, wait=False).returncode == 0
    until(lambda: len(records(run)) > 12, "twelve steps")
    (begun,) = (event for event in read_jsonl(run / "events.jsonl") if event["event"] == "start")
    raylets = [psutil.Process(pid).ppid() for pid in begun["detail"]["pids"]]
    nodes = [[process.pid for process in node] for node in cluster.nodes]
    assert sorted(at for raylet in raylets for at, node in enumerate(nodes) if raylet in node) == [1, 2]
    os.kill(raylets[1], signal.SIGKILL)  # its workers go with it
    until(lambda: submitter.job("lost")["status"] not in ("PENDING", "RUNNING"), "the end of the run")
    job = submitter.job("lost")
    log = submitter.ray("logs", "lost").stdout
    assert (job["status"], job["driver_exit_code"]) == ("SUCCEEDED", 0), log[-3000:]
    seen = records(run)
    assert [record["step"] for record in seen] == list(range(1, 301))
    assert {record["workers"] for record in seen[:10]} == {2} and seen[-1]["workers"] == 1
    assert "done in" in log and str(run) in log
    assert (run / "model" / "model.safetensors").is_file() and (run / "report.html").is_file()


def test_what_a_pause_is_called() -> None:
    """Schedulers are told by this number: EX_TEMPFAIL."""
    assert PAUSED == os.EX_TEMPFAIL
