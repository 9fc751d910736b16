"""Rules, dashboards, pages and manifests: current, sound, and of nothing that isn't exported."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.monitoring import PORT, RULES, server
from cluster.monitoring.__main__ import main, write
from cluster.monitoring.dashboards import all_dashboards
from cluster.monitoring.documents import documents
from cluster.monitoring.server import (
    NO_PROMETHEUS,
    Setup,
    grafana_settings,
    prometheus_settings,
    write_settings,
)
from tests.k8s.render import kubectl
from tests.prometheus import needs_prometheus, needs_promtool, promtool
from tests.s3 import free_port
from tests.test_architecture import ROOT
from unimrg.figures import FIGURES, HISTOGRAM

RAY = ROOT / "tests/golden/ray_2_60_metrics.txt"
OTHERS = {
    "up": "Prometheus itself",
    "ALERTS": "Prometheus itself",
    "kuberay_job_deployment_status": "the KubeRay operator v1.7",
    "DCGM_FI_DEV_XID_ERRORS": "dcgm-exporter",
}
"""Metrics of others that rules and dashboards use, and whose they are."""

MONITORING = ROOT / "k8s/monitoring"
GROUPS = yaml.safe_load(RULES.read_text())["groups"]
ALERTS = [rule for group in GROUPS for rule in group["rules"] if "alert" in rule]


def rules() -> Iterator[tuple[str, str]]:
    """(name, expression) of every rule."""
    for group in GROUPS:
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"]


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    """(dashboard and title, panel) of all but the headings."""
    for board in all_dashboards():
        for panel in board["panels"]:
            if panel["type"] != "row":
                yield f"{board['uid']}: {panel['title']}", panel


def queries() -> Iterator[tuple[str, str]]:
    """(dashboard and title, expression), those of annotations and variables included."""
    for name, panel in panels():
        yield from ((name, target["expr"]) for target in panel["targets"])
    for board in all_dashboards():
        for annotation in board["annotations"]["list"]:
            yield f"{board['uid']}: {annotation['name']}", annotation["expr"]
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                metric = re.fullmatch(r"label_values\((\w+), \w+\)", variable["definition"])
                assert metric
                yield f"{board['uid']}: ${variable['name']}", metric[1]


def metrics_in(expression: str) -> set[str]:
    """Names of metrics: words that are no function, no label, no number and not in a string."""
    bare = re.sub(r'"[^"]*"|\b[0-9][\w.]*', "", expression)
    bare = re.sub(r"\b(by|on|without|ignoring|group_left)\s*\([^)]*\)", "", bare)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    words = set(re.findall(r"[A-Za-z_:][\w:]*(?!\w*\s*\()", bare))
    functions = set(re.findall(r"([A-Za-z_]\w*)\s*\(", bare))
    keywords = {"and", "or", "unless", "offset", "bool", "by", "on", "sum", "max", "avg"}
    return {word for word in words - functions - keywords if not re.fullmatch(r"[mhdse]", word)}


def exported() -> set[str]:
    """Every name that a scrape of a run shows."""
    suffixes = ("_bucket", "_sum", "_count")
    histograms = {f.name + suffix for f in FIGURES if f.kind == HISTOGRAM for suffix in suffixes}
    return histograms | {f.name for f in FIGURES if f.kind != HISTOGRAM}


def of_ray() -> set[str]:
    return {line.split()[0] for line in RAY.read_text().splitlines() if not line.startswith("#")}


def test_files_made_from_the_tables_are_current() -> None:
    stale = [
        str(path.relative_to(ROOT)) for path, text in documents(ROOT).items() if path.read_text() != text
    ]
    assert not stale, f"run python -m cluster.monitoring --write; it changes {', '.join(stale)}"
    made = {path for path in documents(ROOT) if path.parent.name == "dashboards"}
    assert made == set((MONITORING / "dashboards").iterdir())


def test_writing_changes_only_what_is_not_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/metrics.md", tmp_path / "docs")
    assert write(tmp_path) == 0
    assert "metrics.md" not in capsys.readouterr().out
    assert write(tmp_path) == 0 and capsys.readouterr().out == ""
    page = tmp_path / "docs/metrics.md"
    page.write_text(page.read_text().replace("| `unimrg_step` |", "| `unimrg_old` |"))
    write(tmp_path)
    assert capsys.readouterr().out == "docs/metrics.md\n" and "unimrg_old" not in page.read_text()


def test_what_rules_and_dashboards_name_is_exported() -> None:
    recorded = {name for name, _ in rules() if ":" in name}
    known = exported() | of_ray() | set(OTHERS) | recorded
    unknown = [(where, metrics_in(expr) - known) for where, expr in [*rules(), *queries()]]
    assert not [(where, names) for where, names in unknown if names]
    tried = 'max by (a) (x{b="c d"}) == 1 unless on (a) rate(y_total[5m] offset 1h) > 2e10'
    assert metrics_in(tried) == {"x", "y_total"}


def test_every_figure_of_a_run_is_on_a_dashboard() -> None:
    """Or it is counted for nothing."""
    shown = set().union(*(metrics_in(expr) for _, expr in [*queries(), *rules()]))
    missing = [f.name for f in FIGURES if not {f.name, f"{f.name}_sum"} & shown]
    assert not missing


def test_every_alert_says_what_it_means_and_what_to_do() -> None:
    page = (ROOT / "docs/alerts.md").read_text()
    anchors = {heading.lower(): heading for heading in re.findall(r"^## (\w+)$", page, re.M)}
    assert sorted(anchors.values()) == sorted(rule["alert"] for rule in ALERTS)
    for rule in ALERTS:
        path, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert (ROOT / path).is_file() and anchors.get(anchor) == rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning") and rule["labels"]["team"] == "unimrg"
        assert rule["annotations"]["summary"] and rule["annotations"]["description"].endswith(".")
        section = page.partition(f"## {rule['alert']}\n")[2].partition("\n## ")[0]
        assert section.strip().startswith(f"{rule['labels']['severity']}. "), rule["alert"]
        assert section.count("\n- ") >= 1, f"what to do about {rule['alert']}?"


@needs_promtool
def test_prometheus_understands_every_rule() -> None:
    promtool("check", "rules", str(RULES))


@needs_promtool
def test_prometheus_understands_every_query(tmp_path: Path) -> None:
    """As recording rules, with the variables filled in."""
    file = tmp_path / "queries.yaml"
    made = [{"record": f"q:{n}", "expr": filled(expr)} for n, (_, expr) in enumerate(queries())]
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": made}]}))
    promtool("check", "rules", str(file))


def filled(expression: str) -> str:
    return re.sub(r"\$(namespace|run|ray_io_cluster)", "x", expression.replace("$__rate_interval", "5m"))


def test_dashboards_load_into_any_grafana() -> None:
    """No id of their own, no data source of their own, fixed uids, and everything says what it is."""
    boards = all_dashboards()
    assert len({board["uid"] for board in boards}) == len(boards) == 4
    for board in boards:
        assert board["schemaVersion"] == 39 and "id" not in board and board["editable"] is False
        source, *variables = board["templating"]["list"]
        assert source["type"] == "datasource" and source["query"] == "prometheus"
        given = {variable["name"] for variable in board["templating"]["list"]}
        text = json.dumps(board)
        assert set(re.findall(r"\$\{?([a-z_]+)", text)) - {"__rate_interval", "__all"} == given
        assert set(re.findall(r'"uid": "([^"]*)"', text)) == {"${datasource}", board["uid"]}
        assert all(variable["datasource"]["uid"] == "${datasource}" for variable in variables)
    for name, panel in panels():
        assert len(panel["description"]) > 15 and panel["fieldConfig"]["defaults"]["unit"], name
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"]), name
        letters = [target["refId"] for target in panel["targets"]]
        assert letters == sorted(set(letters)), name
        assert all(target["legendFormat"] for target in panel["targets"]), name


def test_panels_fill_the_grid_without_covering_each_other() -> None:
    for board in all_dashboards():
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            at = panel["gridPos"]
            cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
            assert not cells & taken, panel["title"]
            assert at["x"] + at["w"] <= 24, panel["title"]
            taken |= cells


def test_rates_are_of_counters_and_values_of_gauges() -> None:
    kinds = {f.name: f.kind for f in FIGURES}
    for where, expr in [*queries(), *rules()]:
        for name in re.findall(r"(?:rate|increase)\((\w+)", expr):
            assert kinds.get(name) in (None, "counter"), (where, name)


# -- manifests -----------------------------------------------------------------------------------------------


def test_manifests_say_the_same_ports_and_jobs() -> None:
    monitors = list(yaml.safe_load_all((MONITORING / "podmonitors.yaml").read_text()))
    jobs = {
        relabel["replacement"]: monitor["metadata"]["name"]
        for monitor in monitors
        for endpoint in monitor["spec"]["podMetricsEndpoints"]
        for relabel in endpoint["relabelings"]
        if relabel["targetLabel"] == "job"
    }
    local = prometheus_settings(Setup(["a:1"], "f", Path("x"), 1, 2))["scrape_configs"]
    assert set(jobs) == {job["job_name"] for job in local} == {"unimrg-run", "unimrg-ray"}
    for monitor in monitors:
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert endpoint["interval"] == "10s", "Ray drops a gauge after 20 s"
    addresses = [r.get("replacement") for r in monitors[0]["spec"]["podMetricsEndpoints"][0]["relabelings"]]
    assert f"$1:{PORT}" in addresses and f"[$1]:{PORT}" in addresses
    rule = yaml.safe_load((MONITORING / "rules.yaml").read_text())
    assert rule["kind"] == "PrometheusRule" and rule["spec"]["groups"] == GROUPS


def test_kustomize_builds() -> None:
    done = subprocess.run(
        [kubectl(), "kustomize", str(MONITORING)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = list(yaml.safe_load_all(done.stdout))
    boards = [item for item in found if item["kind"] == "ConfigMap"]
    assert len(boards) == 4 and all(b["metadata"]["labels"]["grafana_dashboard"] == "1" for b in boards)
    assert {name for b in boards for name in b["data"]} == {f"{b['uid']}.json" for b in all_dashboards()}
    assert all(len(json.dumps(board)) < 256 << 10 for board in boards), "kubectl apply refuses larger ones"
    assert {item["metadata"]["namespace"] for item in found} == {"monitoring"}


# -- on one machine ------------------------------------------------------------------------------------------


@needs_promtool
def test_settings_of_a_local_prometheus_and_grafana(tmp_path: Path) -> None:
    setup = Setup(["127.0.0.1:9464", "head:9464"], str(tmp_path / "ray.json"), tmp_path / "watch", 9090, 3000)
    settings = write_settings(setup)
    promtool("check", "config", str(settings))
    boards = tmp_path / "watch/grafana/dashboards"
    assert {path.stem for path in boards.iterdir()} == {board["uid"] for board in all_dashboards()}
    found = grafana_settings(setup, boards)
    assert found["datasources"]["datasources"][0]["url"] == "http://127.0.0.1:9090"
    for kind, content in found.items():
        assert (
            yaml.safe_load((tmp_path / f"watch/grafana/provisioning/{kind}/unimrg.yaml").read_text())
            == content
        )


def test_a_missing_prometheus_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--folder", str(tmp_path / "watch")]) == 2
    assert capsys.readouterr().err == f"error: {NO_PROMETHEUS}\n" and "apt-get install" in NO_PROMETHEUS


@needs_prometheus
def test_a_taken_port_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    with server.prometheus(Setup([], str(tmp_path / "ray.json"), tmp_path / "first", port, 0)):
        assert main(["--folder", str(tmp_path / "second"), "--port", str(port)]) == 2
    assert re.fullmatch(rf"error: port {port} is taken .*--port 9091\n", capsys.readouterr().err)
