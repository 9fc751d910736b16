"""The exporter: what a scrape reads over HTTP, of several runs, while they run and after they ended."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

import cluster.exporter
from cluster.exporter import Exporter, exporting
from cluster.monitor import Monitor, Show
from cluster.session import ray_session
from tests.s3 import free_port
from unimrg.compose import compose
from unimrg.config import MetricsConfig, RunConfig
from unimrg.errors import ConfigError
from unimrg.figures import STATES, Figures


def scrape(port: int) -> dict[str, Family]:
    """Families by name, read as Prometheus would; ports of the loopback address."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families), "each family once"
    return {family.name: family for family in families}


def states(families: dict[str, Family]) -> dict[str, str]:
    """run -> the state it is in; each run is in exactly one."""
    found: dict[str, list[str]] = {}
    for sample in families["unimrg_run_state"].samples:
        found.setdefault(sample.labels["run"], []).extend([sample.labels["state"]] * int(sample.value))
    assert all(len(now) == 1 for now in found.values())
    return {run: now[0] for run, now in found.items()}


@pytest.fixture
def exporter() -> Iterator[tuple[Exporter, int]]:
    made, port = Exporter(), free_port()
    assert made.serve(port, "127.0.0.1") == ""
    yield made, port
    made.close()


class Direct:
    """An outlet without Ray between."""

    def __init__(self, exporter: Exporter) -> None:
        self.exporter = exporter

    def enter(self, run: str, state: str) -> None:
        self.exporter.enter(run, state)

    def show(self, run: str, families: Iterator[Family]) -> None:
        self.exporter.show(run, list(families))


def test_runs_are_told_apart_by_their_name(exporter: tuple[Exporter, int]) -> None:
    """A search has one exporter for all its trials."""
    made, port = exporter
    for number, run in enumerate(("search/tpe-000", "search/tpe-001")):
        figures = Figures(run)
        figures.take({"step": number + 5, "loss/depth": 0.5})
        made.show(run, list(figures.collect()))
        made.enter(run, STATES[1])
    families = scrape(port)
    steps = {sample.labels["run"]: sample.value for sample in families["unimrg_step"].samples}
    assert steps == {"search/tpe-000": 5, "search/tpe-001": 6}
    assert states(families) == dict.fromkeys(steps, "training")
    assert scrape(port)["unimrg_step"].samples == families["unimrg_step"].samples, "gauges stay"


def test_runs_that_ended_are_forgotten_after_a_while(
    exporter: tuple[Exporter, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, port = exporter
    for run, state in (("over", "done"), ("again", "failed"), ("going", "training")):
        made.show(run, list(Figures(run).collect()))
        made.enter(run, state)
    made.enter("again", "training")
    assert set(states(scrape(port))) == {"over", "again", "going"}
    monkeypatch.setattr(cluster.exporter, "KEEP_SECONDS", 0.0)
    assert set(states(scrape(port))) == {"again", "going"}
    assert {s.labels["run"] for s in scrape(port)["unimrg_steps"].samples} == {"again", "going"}


def test_it_stays_until_the_last_state_was_read(exporter: tuple[Exporter, int]) -> None:
    made, port = exporter
    made.enter("run", "training")
    began = time.monotonic()
    made.leave()
    assert time.monotonic() - began < 1, "nobody ever read it"
    scrape(port)
    made.enter("run", "failed")
    waiting = threading.Thread(target=made.leave)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    assert states(scrape(port)) == {"run": "failed"}
    waiting.join(5)
    assert not waiting.is_alive()


def test_what_a_monitor_hears_is_what_a_scrape_reads(exporter: tuple[Exporter, int], tmp_path: Path) -> None:
    made, port = exporter

    def value(name: str, **labels: str) -> float:
        wanted = (name, {"run": "first", **labels})
        read = [sample for family in scrape(port).values() for sample in family.samples]
        (found,) = (sample.value for sample in read if (sample.name, sample.labels) == wanted)
        return float(found)

    show = Show("first", Direct(made), 100, {"depth": 0.5})  # type: ignore[arg-type]
    monitor = Monitor(str(tmp_path), "", 0.5, 10, show)
    monitor.start(0, [1, 2])
    assert value("unimrg_planned_steps") == 100 and value("unimrg_task_weight", task="depth") == 0.5
    assert value("unimrg_restarts_total", cause="failure") == 0

    record = {"timestamp": 5.0, "step_seconds": 2.0, "data_wait_seconds": 0.5, "loss/total": 1.0}
    monitor.write(record | {"step": 1})
    monitor.event("skipped-step")
    monitor.write(record | {"step": 2, "loss/total": float("nan")})
    assert value("unimrg_steps_total") == 2 and value("unimrg_productive_seconds_total") == 1.5
    assert value("unimrg_nonfinite_steps_total") == value("unimrg_skipped_steps_total") == 1
    monitor.checkpoint("step-00000002-w2", 2, 0.2, 3.0)
    assert value("unimrg_checkpoint_step") == 2 and value("unimrg_checkpoints_total") == 1
    assert value("unimrg_checkpoint_write_seconds_sum") == 3.0

    bad = [{"position": 3, "reason": "too-large"}]
    monitor.audit(0, 8, bad)
    monitor.audit(0, 8, bad)  # again, after a restart
    assert value("unimrg_checked_samples_total") == 8
    assert value("unimrg_quarantined_samples_total", reason="too-large") == 1
    monitor.labelled(64, "labels", {"teacher-failed": 2})
    monitor.retried({"timeout": 3})
    monitor.event("hang")
    assert value("unimrg_labelled_rows_total", kind="labels") == 64
    assert value("unimrg_unlabelled_rows_total", reason="teacher-failed") == 2
    assert value("unimrg_storage_retries_total", reason="timeout") == 3

    for pids, cause in (([1, 2], "hang"), ([1], "failure"), ([1, 2], "resize")):
        monitor.start(0, pids)
        assert value("unimrg_restarts_total", cause=cause) == 1, cause
    monitor.write(record | {"step": 1})  # made again: work, but no progress
    assert value("unimrg_steps_total") == 3 and value("unimrg_productive_seconds_total") == 1.5
    again = Monitor(str(tmp_path), "", 0.5, 10, show)
    again.start(2, [1, 2])
    assert value("unimrg_restarts_total", cause="command") == 1
    assert value("unimrg_quarantined_samples_total", reason="too-large") == 0, "it counts from its own start"


@pytest.mark.parametrize("words", [["metrics.port=70000"], ["metrics.port=1", "metrics.address=head"]])
def test_wrong_settings_are_told(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.(port|address)"):
        compose("train", words, RunConfig)


@pytest.mark.ray
def test_it_lives_on_the_head_for_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in Ray; a taken port is one sentence; an error that comes through is a failed run."""
    port = free_port()
    config = MetricsConfig(port=port)
    with ray_session():
        with pytest.raises(RuntimeError), exporting(config, "run") as outlet:
            outlet.show("run", Figures("run").collect())
            until(lambda: "unimrg_steps" in scrape(port))
            assert states(scrape(port)) == {"run": "starting"}
            reader = Reader(port)
            raise RuntimeError
        assert reader.last() == {"run": "failed"}
        until(lambda: not listening(port))
        monkeypatch.setattr(cluster.exporter, "PORT_SECONDS", 0.0)
        taken = pytest.raises(ConfigError, match=rf"{port}.*another run")
        with socket.create_server(("127.0.0.1", port)), taken, exporting(config, "second"):
            pass
        with exporting(MetricsConfig(), "quiet") as outlet:
            outlet.enter("quiet", "training")
            outlet.show("quiet", Figures("quiet").collect())


class Reader:
    """A scrape every tenth of a second, until the exporter is gone."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.read: list[dict[str, str]] = []
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while True:
            time.sleep(0.1)
            try:
                self.read.append(states(scrape(self.port)))
            except OSError:
                return

    def last(self) -> dict[str, str]:
        self.thread.join(30)
        return self.read[-1]


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)
