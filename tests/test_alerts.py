"""Every alert fires when it should, in these words, and else stays silent: Prometheus itself evaluates it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.monitoring import RULES
from tests.prometheus import needs_promtool, promtool

GROUPS = yaml.safe_load(RULES.read_text())["groups"]
ALERTS = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}


@dataclass(frozen=True)
class Case:
    """A situation and what an alert makes of it.

    series: values a minute apart in promtool's notation, `a+bxn` rising, `_` missing, `stale` ended.
    at: like 25m. labels, summary, description: of the alert that fires; none of a case that stays silent.
    """

    alert: str
    what: str
    series: dict[str, str]
    at: str
    labels: dict[str, str] = field(default_factory=dict)
    summary: str = ""
    description: str = ""

    def test(self) -> dict[str, Any]:
        """The same for promtool."""
        rule = ALERTS[self.alert]
        fired = {
            "exp_labels": rule["labels"] | self.labels,
            "exp_annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": rule["annotations"]["runbook_url"],
            },
        }
        return {
            "name": f"{self.alert}: {self.what}",
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in self.series.items()],
            "alert_rule_test": [
                {
                    "eval_time": self.at,
                    "alertname": self.alert,
                    "exp_alerts": [fired] if self.summary else [],
                }
            ],
        }


def state(now: str, values: str, run: str = "first", **labels: str) -> dict[str, str]:
    """A series of `unimrg_run_state`."""
    names = {"run": run, "state": now, **labels}
    inside = ",".join(f'{key}="{value}"' for key, value in names.items())
    return {f"unimrg_run_state{{{inside}}}": values}


def job(status: str, values: str) -> dict[str, str]:
    """A series of the KubeRay operator."""
    labels = f'namespace="unimrg",name="train",deployment_status="{status}"'
    return {f"kuberay_job_deployment_status{{{labels}}}": values}


FIRST = {"run": "first"}
TRAINS = state("training", "1x400")
STEP_SUM, STEP_COUNT = 'unimrg_step_seconds_sum{run="first"}', 'unimrg_step_seconds_count{run="first"}'
STEPS = 'unimrg_steps_total{run="first"}'
NONFINITE = 'unimrg_nonfinite_steps_total{run="first"}'
WAIT = 'unimrg_data_wait_seconds_total{run="first"}'
LOSS = 'unimrg_loss{run="first",task="depth"}'
SAVED = 'unimrg_checkpoint_timestamp_seconds{run="first"}'
CHECKED, BAD = (
    'unimrg_checked_samples_total{run="first"}',
    'unimrg_quarantined_samples_total{run="first",reason="too-large"}',
)
LABELLED, UNLABELLED = (
    'unimrg_labelled_rows_total{run="first",kind="labels"}',
    'unimrg_unlabelled_rows_total{run="first",reason="teacher-failed"}',
)
RETRIES = 'unimrg_storage_retries_total{run="first",reason="timeout"}'
GPU = 'ray_node_gpus_utilization{ray_io_cluster="c",ip="10.0.0.7",GpuIndex="0"}'
HEAD = '{IsHeadNode="true",ray_io_cluster="c",ip="10.0.0.1"}'


def trials(**states: str) -> dict[str, str]:
    return {f'unimrg_trials{{run="first",state="{name}"}}': values for name, values in states.items()}


CASES = (
    # -- a run -----------------------------------------------------------------------------------------------
    Case(
        "UnimrgRunFailed",
        "it failed, and its exporter has left since",
        state("training", "1x5 0x2 stale") | state("failed", "0x5 1x2 stale"),
        "12m",
        FIRST,
        "Run first has failed",
        "The command ended with an error after its own restarts were used up. It doesn't come back by "
        "itself.",
    ),
    Case("UnimrgRunFailed", "it ended well", state("failed", "0x20") | state("done", "0x10 1x10"), "15m"),
    Case("UnimrgRunFailed", "a trial of a search failed", state("failed", "1x20", "s/tpe-001"), "15m"),
    Case("UnimrgRunFailed", "it failed long ago", state("failed", "1x5 stale"), "25m"),
    Case(
        "UnimrgRunVanished",
        "its driver was killed",
        state("training", "1x10 stale") | state("done", "0x10 stale"),
        "25m",
        FIRST,
        "Run first has vanished",
        "Its figures can't be read for 10 minutes, and it hadn't said that it ends. Its driver was probably "
        "killed.",
    ),
    Case("UnimrgRunVanished", "gone for a moment", state("training", "1x10 stale"), "19m"),
    Case(
        "UnimrgRunVanished",
        "it said that it was done, and left",
        state("training", "1x10 0x2 stale") | state("done", "0x10 1x2 stale"),
        "30m",
    ),
    Case(
        "UnimrgRunVanished",
        "it goes on in another pod",
        state("training", "1x10 stale", pod="a") | state("training", "_x15 1x40", pod="b"),
        "30m",
    ),
    Case("UnimrgRunVanished", "a trial has ended", state("training", "1x10 stale", "s/tpe-001"), "25m"),
    Case(
        "UnimrgRunStalled",
        "no step for a while",
        TRAINS | {STEPS: "0+10x20 200x60"},
        "42m",
        FIRST,
        "Run first makes no progress",
        "It is in training, but no step has ended for 20 minutes.",
    ),
    Case("UnimrgRunStalled", "slow, but it goes on", TRAINS | {STEPS: "0x7 1x7 2x7 3x7 4x7 5x7 6x7"}, "42m"),
    Case("UnimrgRunStalled", "building the model takes 15 minutes", TRAINS | {STEPS: "0x15 1+10x40"}, "19m"),
    Case("UnimrgRunStalled", "training is over", state("scoring", "1x60") | {STEPS: "200x60"}, "42m"),
    Case(
        "UnimrgRunRestarting",
        "its workers fail twice in an hour, once by hanging",
        {
            'unimrg_restarts_total{run="first",cause="failure"}': "0x10 1x60",
            'unimrg_restarts_total{run="first",cause="hang"}': "0x25 1x60",
        },
        "35m",
        FIRST,
        "Run first restarts again and again",
        "Its workers failed or hung 2 times within an hour.",
    ),
    Case(
        "UnimrgRunRestarting",
        "one failure",
        {'unimrg_restarts_total{run="first",cause="failure"}': "0x9 1x60"},
        "35m",
    ),
    Case(
        "UnimrgRunRestarting",
        "the command is given again, nodes come",
        {
            'unimrg_restarts_total{run="first",cause="command"}': "0x5 1x5 2x60",
            'unimrg_restarts_total{run="first",cause="resize"}': "0x5 1x5 2x60",
        },
        "35m",
    ),
    Case(
        "UnimrgStepTimeRegression",
        "steps take twice as long, although there was a pause before",
        {
            STEP_SUM: "0+60x30 1800x30 1800+60x60 5400+120x60",
            STEP_COUNT: "0+60x30 1800x30 1800+60x60 5400+60x60",
        },
        "145m",
        FIRST,
        "Steps of first take longer than before",
        "A step takes 2s, over 1.3 times its mean of the hours before.",
    ),
    Case("UnimrgStepTimeRegression", "as ever", {STEP_SUM: "0+60x180", STEP_COUNT: "0+60x180"}, "145m"),
    Case(
        "UnimrgStepTimeRegression",
        "slow for five minutes",
        {STEP_SUM: "0+60x120 7200+120x5 7800+60x60", STEP_COUNT: "0+60x185"},
        "128m",
    ),
    Case(
        "UnimrgNonFiniteSteps",
        "one more",
        {NONFINITE: "0x20 1x40"},
        "24m",
        FIRST,
        "Run first has steps that aren't finite",
        "A loss or a gradient was NaN or infinite within 10 minutes; those updates were skipped.",
    ),
    Case(
        "UnimrgNonFiniteSteps",
        "the counter is born at 1",
        {NONFINITE: "_x20 1x40"},
        "24m",
        FIRST,
        "Run first has steps that aren't finite",
        "A loss or a gradient was NaN or infinite within 10 minutes; those updates were skipped.",
    ),
    Case("UnimrgNonFiniteSteps", "none", {NONFINITE: "0x60"}, "5m"),
    Case("UnimrgNonFiniteSteps", "long ago", {NONFINITE: "1x60"}, "40m"),
    Case("UnimrgNonFiniteSteps", "the exporter began anew", {NONFINITE: "3x20 0x40"}, "24m"),
    Case(
        "UnimrgLossSpike",
        "it stays four times as high",
        {LOSS: "0.5x80 2x40"},
        "93m",
        FIRST | {"task": "depth"},
        "The depth loss of first has jumped",
        "It is 2, over twice its mean of the hour before.",
    ),
    Case("UnimrgLossSpike", "a single value", {LOSS: "0.5x80 2 0.5x40"}, "84m"),
    Case("UnimrgLossSpike", "it falls, as it should", {LOSS: "3-0.025x100"}, "90m"),
    Case("UnimrgLossSpike", "no hour before yet", {LOSS: "4x60"}, "8m"),
    Case(
        "UnimrgDataStarvation",
        "half the time",
        {WAIT: "0+30x60", STEP_SUM: "0+60x60"},
        "20m",
        FIRST,
        "Run first waits for data",
        "50% of the time of its steps is waiting for a batch.",
    ),
    Case("UnimrgDataStarvation", "a little", {WAIT: "0+6x60", STEP_SUM: "0+60x60"}, "20m"),
    Case("UnimrgDataStarvation", "no steps at all", {WAIT: "30x60", STEP_SUM: "60x60"}, "20m"),
    Case(
        "UnimrgCheckpointStale",
        "none for 70 minutes, and its gauge is gone since",
        TRAINS | {SAVED: "0x50 stale"},
        "70m",
        FIRST,
        "The last checkpoint of first is old",
        "It was complete 1h 10m 0s ago: so much would be lost now.",
    ),
    Case("UnimrgCheckpointStale", "half an hour old", TRAINS | {SAVED: "0x40 2400x60"}, "70m"),
    Case("UnimrgCheckpointStale", "the run is over", state("done", "1x90") | {SAVED: "0x90"}, "70m"),
    Case(
        "UnimrgCheckpointStale",
        "another pod has saved since",
        TRAINS
        | {'unimrg_checkpoint_timestamp_seconds{run="first",pod="a"}': "0x30 stale"}
        | {'unimrg_checkpoint_timestamp_seconds{run="first",pod="b"}': "_x35 2100x60"},
        "70m",
    ),
    Case(
        "UnimrgQuarantineRate",
        "two of a hundred",
        {CHECKED: "0+100x90", BAD: "0+2x90"},
        "45m",
        FIRST,
        "Run first can't use many of its samples",
        "2% of the samples of the last 30 minutes were quarantined.",
    ),
    Case("UnimrgQuarantineRate", "five of a thousand", {CHECKED: "0+1000x90", BAD: "0+5x90"}, "45m"),
    Case("UnimrgQuarantineRate", "nothing is prepared", {CHECKED: "500x90", BAD: "9x90"}, "45m"),
    Case(
        "UnimrgLabelQuarantineRate",
        "four of a hundred",
        {LABELLED: "0+100x90", UNLABELLED: "0+4x90"},
        "45m",
        FIRST,
        "first can't label many of its rows",
        "4% of the rows of the last 30 minutes could not be labelled.",
    ),
    Case("UnimrgLabelQuarantineRate", "none", {LABELLED: "0+100x90", UNLABELLED: "0x90"}, "45m"),
    Case(
        "UnimrgStorageErrors",
        "twelve retries a minute",
        {RETRIES: "0+12x60"},
        "30m",
        FIRST,
        "Object storage fails first again and again",
        "0.20 requests a second had to be made again.",
    ),
    Case("UnimrgStorageErrors", "three retries a minute", {RETRIES: "0+3x60"}, "30m"),
    Case("UnimrgStorageErrors", "a minute's outage", {RETRIES: "0x10 20x60"}, "24m"),
    Case(
        "UnimrgTrialsFailing",
        "three of four",
        state("searching", "1x60") | trials(failed="0x5 3x60", done="0x5 1x60", stopped="0x60"),
        "15m",
        FIRST,
        "Most trials of the search first fail",
        "75% of its finished trials have failed.",
    ),
    Case(
        "UnimrgTrialsFailing",
        "the only one",
        state("searching", "1x60") | trials(failed="1x60", done="0x60"),
        "15m",
    ),
    Case(
        "UnimrgTrialsFailing",
        "one of four",
        state("searching", "1x60") | trials(failed="1x60", done="3x60"),
        "15m",
    ),
    # -- a cluster -------------------------------------------------------------------------------------------
    Case(
        "UnimrgGpuIdle",
        "3 % while a run trains",
        state("training", "1x60", ray_io_cluster="c") | {GPU: "3x60"},
        "40m",
        {"ray_io_cluster": "c", "ip": "10.0.0.7"},
        "GPUs of node 10.0.0.7 are idle while a run trains",
        "Their mean utilisation of the last 15 minutes is 3 %.",
    ),
    Case("UnimrgGpuIdle", "busy", state("training", "1x60", ray_io_cluster="c") | {GPU: "93x60"}, "40m"),
    Case(
        "UnimrgGpuIdle", "no run trains", state("scoring", "1x60", ray_io_cluster="c") | {GPU: "3x60"}, "40m"
    ),
    Case(
        "UnimrgGpuIdle",
        "another cluster's",
        state("training", "1x60", ray_io_cluster="d") | {GPU: "3x60"},
        "40m",
    ),
    Case(
        "UnimrgGpuXid",
        "Xid 79",
        {'DCGM_FI_DEV_XID_ERRORS{Hostname="n",gpu="3"}': "0x5 79x5"},
        "8m",
        {"Hostname": "n", "gpu": "3"},
        "GPU 3 of n reports an error",
        "The driver logged Xid 79.",
    ),
    Case("UnimrgGpuXid", "none", {'DCGM_FI_DEV_XID_ERRORS{Hostname="n",gpu="3"}': "0x20"}, "8m"),
    Case(
        "UnimrgNodeLost",
        "one of two",
        {
            'ray_cluster_active_nodes{ray_io_cluster="c",node_type="a"}': "1x60",
            'ray_cluster_active_nodes{ray_io_cluster="c",node_type="b"}': "1x20 stale",
        },
        "24m",
        {"ray_io_cluster": "c"},
        "A Ray cluster has lost a node",
        "1 nodes are left, fewer than within the last 15 minutes.",
    ),
    Case(
        "UnimrgNodeLost",
        "one more, and a gauge that misses a scrape",
        {
            'ray_cluster_active_nodes{ray_io_cluster="c",node_type="a"}': "1x20 _x2 1x60",
            'ray_cluster_active_nodes{ray_io_cluster="c",node_type="b"}': "_x15 1x60",
        },
        "23m",
    ),
    Case(
        "UnimrgObjectSpill",
        "20 GB",
        {'ray_object_store_memory{Location="SPILLED",ray_io_cluster="c",NodeAddress="a"}': "2e10x60"},
        "15m",
        {"ray_io_cluster": "c"},
        "Ray's object store spills to disk",
        "18.63GiB of objects lie on disks.",
    ),
    Case(
        "UnimrgObjectSpill",
        "in memory",
        {
            'ray_object_store_memory{Location="SPILLED",ray_io_cluster="c"}': "1e9x60",
            'ray_object_store_memory{Location="MMAP_SHM",ray_io_cluster="c"}': "9e10x60",
        },
        "15m",
    ),
    Case(
        "UnimrgHeadMemory",
        "90 %",
        {f"ray_node_mem_used{HEAD}": "9e9x60", f"ray_node_mem_total{HEAD}": "1e10x60"},
        "15m",
        {"ray_io_cluster": "c", "ip": "10.0.0.1"},
        "The head of a Ray cluster runs out of memory",
        "90% of it is used. When the head dies, the run does.",
    ),
    Case(
        "UnimrgHeadMemory",
        "70 %, and a worker that is full",
        {
            f"ray_node_mem_used{HEAD}": "7e9x60",
            f"ray_node_mem_total{HEAD}": "1e10x60",
            'ray_node_mem_used{IsHeadNode="false",ray_io_cluster="c",ip="10.0.0.2"}': "99e8x60",
            'ray_node_mem_total{IsHeadNode="false",ray_io_cluster="c",ip="10.0.0.2"}': "1e10x60",
        },
        "15m",
    ),
    Case(
        "UnimrgTargetDown",
        "no answer",
        {'up{job="unimrg-ray",instance="10.0.0.2:8080"}': "1x5 0x60"},
        "25m",
        {"job": "unimrg-ray", "instance": "10.0.0.2:8080"},
        "unimrg-ray can't be read at 10.0.0.2:8080",
        "Prometheus finds the target, but gets no answer from it.",
    ),
    Case("UnimrgTargetDown", "another's", {'up{job="node",instance="10.0.0.2:9100"}': "0x60"}, "25m"),
    Case("UnimrgTargetDown", "for a moment", {'up{job="unimrg-ray",instance="a"}': "1x5 0x10 1x60"}, "25m"),
    # -- the operator ----------------------------------------------------------------------------------------
    Case(
        "UnimrgJobFailed",
        "failed",
        job("Failed", "0x5 1x5"),
        "8m",
        {"namespace": "unimrg", "name": "train"},
        "RayJob train has failed",
        "The operator has given it up: no retry is left, or its manifest isn't valid.",
    ),
    Case("UnimrgJobFailed", "running", job("Running", "1x20"), "8m"),
    Case(
        "UnimrgJobNotStarting",
        "an image that can't be pulled",
        job("Initializing", "1x60"),
        "50m",
        {"namespace": "unimrg", "name": "train"},
        "RayJob train doesn't start",
        "It has waited for its pods for 45 minutes.",
    ),
    Case(
        "UnimrgJobNotStarting",
        "half an hour, then it runs",
        job("Initializing", "1x30 0x60") | job("Running", "0x30 1x60"),
        "50m",
    ),
)


@needs_promtool
@pytest.mark.parametrize("group", ["unimrg-run", "unimrg-cluster", "unimrg-kuberay"])
def test_alerts(group: str, tmp_path: Path) -> None:
    """In Prometheus' own evaluation: what fires, with its words, and what doesn't."""
    (mine,) = ({rule.get("alert") for rule in g["rules"]} for g in GROUPS if g["name"] == group)
    tests = [case.test() for case in CASES if case.alert in mine]
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    promtool("test", "rules", str(file))


def test_every_alert_has_a_case_where_it_fires_and_one_where_not() -> None:
    fires = {case.alert for case in CASES if case.summary}
    silent = {case.alert for case in CASES if not case.summary}
    assert fires == silent == set(ALERTS)
