"""Searches as users start them: the command, Ray, real trainings; killed, resumed, on clusters, on S3."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from tests.pipelines import kill_node
from tests.s3 import S3Server, free_port
from tests.tiny_harmon import micro, tokenizer
from unimrg.compose import compose
from unimrg.config import RunConfig
from unimrg.data.scenes import SceneSettings, write
from unimrg.families.harmon.model import Harmon
from unimrg.metrics import read_jsonl
from unimrg.storage import S3Config, Store

pytestmark = [pytest.mark.slow, pytest.mark.ray]

ROOT = Path(__file__).parents[1]
LIMIT = 900.0
TIMES = ("seconds", "samples_per_second")
MEMORY = 128 << 20


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A search of eight trainings of seconds; what it finds depends on every one of them."""
    base, scenes = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("scenes")
    torch.manual_seed(0)
    Harmon(micro()).save_pretrained(base)
    tokenizer().save_pretrained(base)
    write(Store.at(str(scenes)), SceneSettings(train=24, test=8, size=64, questions=3))
    return [
        "name=search",
        f"family.weights={base}",
        f"data.manifest={scenes}/train.json",
        f"data.held_out={scenes}/test.json",
        "teachers=oracle",
        *("train.steps=6", "train.batch_size=4", "train.checkpoint_every=2", "data.unit=4"),
        *("engine.threads=1", "report.draw_iterations=2", "report.max_new_tokens=2"),
        *("search.strategies=[tpe,equal]", "search.trials=3", "search.repeats=1", "search.concurrent=2"),
        *("search.questions=8", "search.drawings=1", "search.objectives=[answer_loss]"),
    ]


class Search:
    """`python tune/search.py` as a process of its own."""

    def __init__(self, folder: Path, *words: str, address: str = "") -> None:
        self.folder = folder / "outputs" / "search"
        self.log = folder / f"log-{time.monotonic_ns()}"
        environment = os.environ | ({"RAY_ADDRESS": address} if address else {})
        with self.log.open("w") as log:
            self.process = psutil.Popen(
                [sys.executable, str(ROOT / "tune" / "search.py"), *words],
                cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def end(self) -> int:
        """Its exit status."""
        return int(self.process.wait(LIMIT))

    def until(self, true: Callable[[], Any]) -> Any:
        """What `true` answers as soon as that is something."""
        end = time.monotonic() + LIMIT
        while not (found := true()):
            assert self.process.is_running() and self.process.status() != "zombie", self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)
        return found

    def kill(self) -> None:
        """kill -9 of the driver; what it started follows by itself."""
        # Ray's agents look only now and then whether their node is still there, and hold nothing.
        family = [p for p in self.process.children(recursive=True) if not p.name().endswith("Agent")]
        self.process.kill()
        self.process.wait(LIMIT)
        _, left = psutil.wait_procs(family, timeout=60)
        assert not left, left

    def worker(self, trial: str, step: int) -> int:
        """Process id of the trial's training worker, as soon as it has made that step."""
        run = self.folder / "runs" / trial

        def there() -> int:
            metrics = run / "metrics.jsonl"
            if not metrics.exists() or len(read_jsonl(metrics)) < step:
                return 0
            begun = [e for e in read_jsonl(run / "events.jsonl") if e["event"] in ("start", "resume")]
            return int(begun[-1]["detail"]["pids"][0])

        return int(self.until(there))


def records(store: Store) -> dict[str, bytes]:
    """The finished trials as they are stored."""
    there = store.list("trials") if store.exists("trials") else ()
    return {entry.path: store.read_bytes(entry.path) for entry in there if entry.path.endswith(".json")}


def table(store: Store) -> list[dict[str, Any]]:
    """Everything known of the finished trials, losses and answers too, but how long things took."""
    rows = [json.loads(content) for _, content in sorted(records(store).items())]
    for row in rows:
        for part in (row, row["values"], *row["curve"]):
            for name in TIMES:
                part.pop(name, None)
    return rows


def parquet(path: Path) -> list[dict[str, Any]]:
    """The table that a search leaves, but how long things took."""
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return [{key: row[key] for key in row if not key.endswith(TIMES)} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that nothing happens to."""
    search = Search(tmp_path_factory.mktemp("undisturbed"), *words)
    assert search.end() == 0, search.log.read_text()
    return search.folder


def same(folder: Path, undisturbed: Path) -> None:
    """Two searches ended alike."""
    assert table(Store.at(str(folder))) == table(Store.at(str(undisturbed)))
    assert parquet(folder / "trials.parquet") == parquet(undisturbed / "trials.parquet")
    assert (folder / "best.yaml").read_text() == (undisturbed / "best.yaml").read_text()


def test_what_a_search_leaves(undisturbed: Path, words: list[str]) -> None:
    """Records, table, page and a config that a run reads; of models only the best one's repeats."""
    rows = table(Store.at(str(undisturbed)))
    searched = [row for row in rows if row["phase"] == "search"]
    assert [row["id"] for row in searched] == ["equal-001", "equal-002", "start", "tpe-001", "tpe-002"]
    assert all(row["state"] == "done" and row["steps"] == 6 for row in rows)
    assert {row["id"] for row in parquet(undisturbed / "trials.parquet")} == {row["id"] for row in rows}
    best = min(searched, key=lambda row: float(row["values"]["answer_loss"]))
    found = compose("train", [f"experiment={undisturbed / 'best.yaml'}"], RunConfig)
    for key, value in best["changes"].items():
        section, name = key.split(".")
        assert getattr(getattr(found, section), name) == value
    models = {path.parent.name for path in undisturbed.glob("runs/*/model")}
    assert models <= {"best-seed-0"} and not list(undisturbed.glob("runs/*/checkpoints"))
    stored = yaml.safe_load((undisturbed / "runs" / "tpe-001" / "config.yaml").read_text())
    changes = next(row["changes"] for row in rows if row["id"] == "tpe-001")
    assert {key: stored["weights"][key.split(".")[1]] for key in changes} == changes
    assert "</html>" in (undisturbed / "search.html").read_text()
    (said,) = (path.read_text() for path in undisturbed.parents[1].glob("log-*"))
    assert "ray.kill" not in said and "worker processes have been started" not in said


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_killed_driver_goes_on_where_it_was(
    words: list[str], undisturbed: Path, tmp_path: Path, s3_server: S3Server, kind: str
) -> None:
    """kill -9 of the driver with three trials done: resumed, none of them is run again, same table."""
    store = Store.at(str(tmp_path / "outputs" / "search"))
    if kind == "s3":
        s3 = S3Config(s3_server.endpoint, s3_server.region, s3_server.access_key, s3_server.secret_key)
        store = Store.at(s3_server.url("searches/search"), s3)
        keys = ("endpoint", "region", "access_key", "secret_key")
        place = [f"storage_path={s3_server.url('searches')}", *(f"s3.{k}={getattr(s3, k)}" for k in keys)]
        words = [*words, *place]
    search = Search(tmp_path, *words)
    search.until(lambda: len(records(store)) >= 3)
    search.kill()
    before = records(store)
    assert 3 <= len(before) < 8
    again = Search(tmp_path, *words)
    assert again.end() == 2 and "search.resume=true" in again.log.read_text()
    resumed = Search(tmp_path, *words, "search.resume=true")
    assert resumed.end() == 0, resumed.log.read_text()
    assert f"resumed: {len(before)} trials are finished already" in resumed.log.read_text()
    after = records(store)
    assert {name: after[name] for name in before} == before
    assert table(store) == table(Store.at(str(undisturbed)))
    folder = search.folder
    assert parquet(folder / "trials.parquet") == parquet(undisturbed / "trials.parquet")
    if kind == "s3":
        assert store.read_bytes("trials.parquet") == (folder / "trials.parquet").read_bytes()
        assert store.exists("runs/tpe-001/metrics.jsonl")
        assert store.exists("search.html") and store.exists("best.yaml")


def test_told_to_end(words: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """SIGTERM: one sentence and a status that says so; resumed, the same table."""
    search = Search(tmp_path, *words)
    search.worker("tpe-001", 1)
    search.process.terminate()
    assert search.end() == 75
    assert search.log.read_text().endswith("run again with name=search search.resume=true to go on\n")
    resumed = Search(tmp_path, *words, "search.resume=true")
    assert resumed.end() == 0, resumed.log.read_text()
    same(search.folder, undisturbed)


def test_killed_worker_and_killed_trial(words: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """kill -9 of a training worker, and of a trial's own process: both go on from their checkpoints."""
    search = Search(tmp_path, *words)
    os.kill(search.worker("tpe-001", 3), signal.SIGKILL)
    search.worker("equal-002", 3)
    trials = [p for p in search.process.children(recursive=True) if is_trial(p)]
    assert trials
    for process in trials:
        process.kill()
    assert search.end() == 0, search.log.read_text()
    same(search.folder, undisturbed)
    for trial in ("tpe-001", "equal-002"):
        events = [e["event"] for e in read_jsonl(search.folder / "runs" / trial / "events.jsonl")]
        assert "resume" in events, (trial, events)


def is_trial(process: psutil.Process) -> bool:
    """Does it run one of Ray Tune's trials?"""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any("run_trial" in word or "ImplicitFunc" in word for word in process.cmdline())
    return False


@contextlib.contextmanager
def nodes(**head: Any) -> Iterator[Any]:
    """A cluster on this machine, of a head to which nodes can be added."""
    from ray.cluster_utils import Cluster

    room = {"object_store_memory": MEMORY, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=room | head)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def test_lost_node(words: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """kill -9 of a node with the workers of trials on it: they go on elsewhere, same table."""
    room = {"num_cpus": 8, "object_store_memory": MEMORY}
    with nodes(num_cpus=2) as cluster:
        lost = cluster.add_node(**room)
        search = Search(tmp_path, *words, address=cluster.address)
        raylet = psutil.Process(lost.all_processes["raylet"][0].process.pid)

        def on_it() -> bool:
            pids = {child.pid for child in raylet.children(recursive=True)}
            events = [read_jsonl(path) for path in search.folder.glob("runs/*/events.jsonl")]
            begun = {
                pid for one in events for e in one if e["event"] == "start" for pid in e["detail"]["pids"]
            }
            return bool(begun & pids)

        search.until(on_it)
        cluster.add_node(**room)
        kill_node(lost)
        assert search.end() == 0, search.log.read_text()
        same(search.folder, undisturbed)


def test_fewer_resources_than_trials_want(words: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """Four trials at once where two CPUs are: as many run as have room for their data too, none for ever."""
    with nodes(num_cpus=2) as cluster:
        search = Search(tmp_path, *words, "search.concurrent=4", address=cluster.address)
        assert search.end() == 0, search.log.read_text()
        more = Search(tmp_path, *words, "name=more", "cluster.workers=4", address=cluster.address)
        assert more.end() == 2 and "a trial needs" in more.log.read_text(), more.log.read_text()
    found = {row["id"]: row for row in table(Store.at(str(search.folder)))}
    start = next(row for row in table(Store.at(str(undisturbed))) if row["id"] == "start")
    assert found["start"] == start


def test_balancing_strategies(words: list[str], tmp_path: Path) -> None:
    """Uncertainty weighting, GradNorm and FAMO beside equal weights, on equal budgets."""
    names = ["equal", "uncertainty", "gradnorm", "famo"]
    options = (f"search.strategies=[{','.join(names)}]", "search.trials=2", "search.repeats=0")
    search = Search(tmp_path, *words, *options)
    assert search.end() == 0, search.log.read_text()
    rows = {row["id"]: row for row in table(Store.at(str(search.folder)))}
    for name in names[1:]:
        mine = [row for row in rows.values() if row["strategy"] == name]
        assert [row["changes"]["weights.balance"] for row in mine] == [name, name]
        assert all(row["state"] == "done" for row in mine)
        steps = read_jsonl(search.folder / "runs" / mine[0]["id"] / "metrics.jsonl")
        assert steps[0]["weight/depth"] != steps[-1]["weight/depth"]
    losses = [row["values"]["answer_loss"] for row in rows.values()]
    assert len(set(losses)) == len(losses)
    assert all(name in (search.folder / "search.html").read_text() for name in names)


def test_storage_that_does_not_answer(words: list[str], tmp_path: Path) -> None:
    """One sentence, before anything is started."""
    place = ("storage_path=s3://bucket/runs", f"s3.endpoint=http://127.0.0.1:{free_port()}")
    search = Search(tmp_path, *words, *place, "s3.access_key=a", "s3.secret_key=b", "s3.region=us-east-1")
    assert search.end() == 2
    lines = search.log.read_text().splitlines()
    assert len(lines) == 1 and "s3://bucket/runs" in lines[0], lines
