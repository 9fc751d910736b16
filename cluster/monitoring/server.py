"""A Prometheus of one's own, and a Grafana where there is one, set up for a run and for a Ray cluster."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.monitoring import RULES
from cluster.monitoring.dashboards import all_dashboards
from unimrg.errors import UnimrgError

HOST = "127.0.0.1"
READY_SECONDS = 30.0
STOP_SECONDS = 10.0
RAY_DISCOVERY = "/tmp/ray/prom_metrics_service_discovery.json"
NO_PROMETHEUS = (
    "prometheus is not on PATH: apt-get install --no-install-recommends prometheus, or the program from "
    "https://prometheus.io/download"
)


@dataclass(frozen=True)
class Setup:
    """What to watch and where to listen. runs: host:port of exporters (metrics.port); ray: a Ray cluster's
    service discovery file; folder: for settings and data; interval: seconds between two scrapes."""

    runs: Sequence[str]
    ray: str
    folder: Path
    port: int
    grafana_port: int
    interval: int = 5


def write_settings(setup: Setup) -> Path:
    """Everything both programs read, below the folder; returns Prometheus' own file."""
    setup.folder.mkdir(parents=True, exist_ok=True)
    settings = setup.folder / "prometheus.yml"
    settings.write_text(yaml.safe_dump(prometheus_settings(setup), sort_keys=False))
    grafana = setup.folder / "grafana"
    boards = grafana / "dashboards"
    boards.mkdir(parents=True, exist_ok=True)
    for board in all_dashboards():
        (boards / f"{board['uid']}.json").write_text(json.dumps(board, indent=1))
    for kind, content in grafana_settings(setup, boards.absolute()).items():
        folder = grafana / "provisioning" / kind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "unimrg.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return settings


def prometheus_settings(setup: Setup) -> dict[str, Any]:
    """What Prometheus scrapes and which rules it follows."""
    return {
        "global": {"scrape_interval": f"{setup.interval}s", "evaluation_interval": "15s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {"job_name": "unimrg-run", "static_configs": [{"targets": list(setup.runs)}]},
            {
                "job_name": "unimrg-ray",
                "file_sd_configs": [{"files": [setup.ray]}],
                # Ray's file has a label `job` of its own.
                "relabel_configs": [{"target_label": "job", "replacement": "unimrg-ray"}],
            },
        ],
    }


def grafana_settings(setup: Setup, boards: Path) -> dict[str, dict[str, Any]]:
    """Its data source and where its dashboards lie, by the folder of `provisioning/` they go to."""
    source = {
        "name": "Prometheus",
        "type": "prometheus",
        "access": "proxy",
        "url": f"http://{HOST}:{setup.port}",
        "isDefault": True,
        "jsonData": {"timeInterval": f"{setup.interval}s", "httpMethod": "POST"},
    }
    provider = {"name": "unimrg", "folder": "unimrg", "type": "file", "options": {"path": str(boards)}}
    return {
        "datasources": {"apiVersion": 1, "datasources": [source]},
        "dashboards": {"apiVersion": 1, "providers": [provider]},
    }


@contextlib.contextmanager
def prometheus(setup: Setup) -> Iterator[subprocess.Popen[bytes]]:
    """Prometheus until the end of the block, ready to answer. Raises UnimrgError."""
    program = shutil.which("prometheus")
    if program is None:
        raise UnimrgError(NO_PROMETHEUS)
    command = [
        program,
        f"--config.file={write_settings(setup)}",
        f"--storage.tsdb.path={setup.folder / 'data'}",
        f"--web.listen-address={HOST}:{setup.port}",
    ]
    log = setup.folder / "prometheus.log"
    _check_free(setup.port)
    with _running(command, log, dict(os.environ)) as process:
        deadline = time.monotonic() + READY_SECONDS
        while not _ready(setup.port):
            if process.poll() is not None or time.monotonic() > deadline:
                last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
                raise UnimrgError(f"prometheus doesn't run: {last[:400]}")
            time.sleep(0.1)
        yield process


def _check_free(port: int) -> None:
    """Raises UnimrgError. Debian's package starts a Prometheus of its own on 9090."""
    try:
        with socket.create_server((HOST, port)):
            pass
    except OSError as error:
        raise UnimrgError(f"port {port} is taken ({error.strerror}); give another: --port 9091") from error


def _ready(port: int) -> bool:
    url = f"http://{HOST}:{port}/-/ready"
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
        return bool(answer.status == 200)
    return False


@contextlib.contextmanager
def grafana(setup: Setup) -> Iterator[subprocess.Popen[bytes] | None]:
    """Grafana with the dashboards until the end of the block; None where it isn't installed."""
    program = shutil.which("grafana") or shutil.which("grafana-server")
    if program is None:
        yield None
        return
    folder = (setup.folder / "grafana").absolute()
    packaged = Path("/usr/share/grafana")
    home = packaged if packaged.is_dir() else Path(program).resolve().parent.parent
    command = [program, *(["server"] if Path(program).name == "grafana" else []), f"--homepath={home}"]
    environment = {
        "GF_PATHS_PROVISIONING": str(folder / "provisioning"),
        "GF_PATHS_DATA": str(folder / "data"),
        "GF_PATHS_LOGS": str(folder / "logs"),
        "GF_SERVER_HTTP_ADDR": HOST,
        "GF_SERVER_HTTP_PORT": str(setup.grafana_port),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",  # it listens on this machine only
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
    }
    with _running(command, setup.folder / "grafana.log", os.environ | environment) as process:
        yield process


@contextlib.contextmanager
def _running(
    command: Sequence[str], log: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
