"""A real Prometheus reads a real run: every query of the dashboards answers, and the run's end is told."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster.exporter import Exporter
from cluster.monitor import Show
from cluster.monitoring import server
from cluster.monitoring.dashboards import all_dashboards
from cluster.monitoring.server import Setup
from tests.prometheus import needs_prometheus
from tests.s3 import free_port
from tests.test_architecture import ROOT
from tests.test_exporter import Direct, states
from tests.test_exporter import scrape as scraped
from tests.tiny_harmon import micro, tokenizer
from tune.campaign import Campaign
from tune.config import SearchConfig
from tune.records import Trial
from tune.told import tell
from unimrg.compose import compose
from unimrg.data.scenes import SceneSettings, write
from unimrg.families.harmon.model import Harmon
from unimrg.figures import Figures
from unimrg.storage import Store

pytestmark = needs_prometheus

LIMIT = 240.0


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[tuple[int, Callable[[str], list[dict[str, Any]]]]]:
    """The port an exporter is expected at, and a function that asks Prometheus."""
    port, asked = free_port(), free_port()
    setup = Setup([f"127.0.0.1:{port}"], str(tmp_path / "ray.json"), tmp_path / "watch", asked, 0, interval=1)

    def ask(query: str) -> list[dict[str, Any]]:
        words = urllib.parse.urlencode({"query": query})
        with urllib.request.urlopen(f"http://127.0.0.1:{asked}/api/v1/query?{words}", timeout=10) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return found

    with server.prometheus(setup):
        yield port, ask


def run_level(uids: tuple[str, ...], **variables: str) -> list[tuple[str, str]]:
    """(panel, query) of dashboards, without Ray's and the alerts; those that hide what is 0 don't here."""
    found = []
    for board in all_dashboards():
        for panel in board["panels"] if board["uid"] in uids else ():
            for target in panel.get("targets", ()):
                query = target["expr"].replace("$__rate_interval", "30s").removesuffix(" > 0")
                for name, value in variables.items():
                    query = query.replace(f"${name}", value)
                if "ray_" not in query and "ALERTS" not in query:
                    found.append((f"{board['uid']}: {panel['title']}", query))
    return found


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.5)


class Run:
    """`python -m unimrg.train` as a process of its own."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = psutil.Popen(
                [sys.executable, "-m", "unimrg.train", *words],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def alive(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return True

    def kill(self) -> None:
        """What it started follows by itself."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process.kill()
            self.process.wait(30)


@pytest.mark.slow
@pytest.mark.ray
def test_every_query_about_a_run_answers_while_it_trains(
    prometheus: tuple[int, Callable[[str], list[dict[str, Any]]]], tmp_path: Path
) -> None:
    port, ask = prometheus
    torch.manual_seed(0)
    Harmon(micro()).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    write(Store.at(str(tmp_path / "scenes")), SceneSettings(train=24, test=4, size=64, questions=3))
    next((tmp_path / "scenes").rglob("*.png")).write_bytes(b"")  # one sample for the quarantine
    run = Run(
        tmp_path,
        [
            *("name=first", f"family.weights={tmp_path}/base", "teachers=oracle", f"metrics.port={port}"),
            *(f"data.manifest={tmp_path}/scenes/train.json", f"data.held_out={tmp_path}/scenes/test.json"),
            *("train.steps=2000", "train.batch_size=4", "train.checkpoint_every=10", "data.unit=4"),
            *("data.max_bad_share=0.5", "engine.threads=1", "engine.peak_tflops=0.01", "cluster.workers=1"),
        ],
    )
    try:
        until(lambda: run.alive() and value(ask("unimrg_checkpoints_total")) >= 1, "a first checkpoint")
        wanted = run_level(("unimrg-training", "unimrg-data"), run="first", namespace="")
        assert len(wanted) > 40
        silent = set(wanted)

        def all_answer() -> bool:
            silent.difference_update([one for one in silent if any(map(finite, ask(one[1])))])
            return run.alive() and not silent

        # Two scrapes make a rate; recorded rules are evaluated every 15 s.
        with contextlib.suppress(TimeoutError):
            until(all_answer, "every query answers")
        assert not silent
        (loss,) = ask('unimrg_loss{task="depth"}')
        assert loss["metric"].items() >= {"run": "first", "job": "unimrg-run"}.items()
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(LIMIT) == 75, run.log.read_text()
        (last,) = ask('last_over_time(unimrg_run_state{state="paused"}[2m])')
        assert float(last["value"][1]) == 1, "the exporter waits until its last state was read"
    finally:
        run.kill()


def value(rows: list[dict[str, Any]]) -> float:
    return float(rows[0]["value"][1]) if rows else 0.0


def finite(row: dict[str, Any]) -> bool:
    return row["value"][1] not in ("NaN", "+Inf", "-Inf")


def test_every_query_about_a_search_answers(
    prometheus: tuple[int, Callable[[str], list[dict[str, Any]]]],
) -> None:
    """The figures of a search and of a trial of it, made as its driver and its monitors make them."""
    port, ask = prometheus
    exporter = Exporter()
    assert exporter.serve(port, "127.0.0.1") == ""
    try:
        outlet: Any = Direct(exporter)
        outlet.enter("s", "searching")
        outlet.enter("s/tpe-001", "training")
        campaign = Campaign(
            compose("search", ["name=s", "search.objectives=[accuracy]"], SearchConfig), lag=1
        )
        job = campaign.next()
        assert job is not None
        campaign.tell(
            Trial(job.id, job.strategy, job.phase, 0, 0, {}, "done", 6, 30.0, values={"accuracy": 0.25})
        )
        tell(Show("s", outlet), campaign, running=2)
        trial = Figures("s/tpe-001")
        for step in range(1, 60):
            trial.take(
                {"step": step, "loss/total": 0.5, "loss/depth": 0.5, "weight/depth": 2.0, "samples": 4}
            )
            outlet.show("s/tpe-001", trial.collect())
            if step > 3 and not silent_queries(ask):
                break
            time.sleep(1)
        assert not silent_queries(ask)
        assert value(ask('unimrg_trials{state="running"}')) == 2
        assert value(ask("unimrg_best_objective")) == 0.25
        assert states(scraped(port)) == {"s": "searching", "s/tpe-001": "training"}
    finally:
        exporter.close()


def silent_queries(ask: Callable[[str], list[dict[str, Any]]]) -> list[tuple[str, str]]:
    wanted = run_level(("unimrg-search",), run="s", namespace="")
    return [(name, query) for name, query in wanted if not any(finite(row) for row in ask(query))]
