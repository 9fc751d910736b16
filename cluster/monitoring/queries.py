"""Queries that panels share: how a gauge, a counter and a histogram of `unimrg/figures.py` are read."""

from __future__ import annotations

from cluster.monitoring.panels import Panel, Variable

RUNS = '{namespace=~"$namespace", run=~"$run"}'
TRIALS = '{namespace=~"$namespace", run=~"$run/.+"}'
CLUSTERS = '{namespace=~"$namespace", ray_io_cluster=~"$ray_io_cluster"}'

NAMESPACE = Variable("namespace", "Namespace", "unimrg_run_state")
RUN = Variable("run", "Run", "unimrg_run_state")
SEARCH = Variable("run", "Search", "unimrg_trials", several=False)
CLUSTER_NAMESPACE = Variable("namespace", "Namespace", "ray_node_mem_total")
CLUSTER = Variable("ray_io_cluster", "Cluster", "ray_node_mem_total")

FIRING = Panel(
    "Firing alerts",
    [
        (
            'sum by (alertname, severity) (ALERTS{alertname=~"Unimrg.+", alertstate="firing"})',
            "{{severity}}: {{alertname}}",
        )
    ],
    "alerts of cluster/monitoring/rules.yaml that fire now; docs/alerts.md says what to do",
    kind="bargauge",
)


def latest(name: str, by: str = "run", filter: str = RUNS) -> str:
    """A gauge."""
    return f"max by ({by}) ({name}{filter})"


def speed(name: str, by: str = "run", filter: str = RUNS) -> str:
    """How fast a counter rises, a second."""
    return f"sum by ({by}) (rate({name}{filter}[$__rate_interval]))"


def share(part: str, whole: str, by: str = "run", filter: str = RUNS) -> str:
    """How much of a counter's rise another one makes; nothing where there is none."""
    return f"{speed(part, by, filter)} / ({speed(whole, by, filter)} > 0)"


def mean(name: str) -> str:
    """Of all values that a histogram has seen: exact, for what happens seldom."""
    return f"{latest(f'{name}_sum')} / ({latest(f'{name}_count')} > 0)"


def quantile(q: float, name: str, filter: str = RUNS) -> str:
    """Of a histogram."""
    return f"histogram_quantile({q}, {speed(f'{name}_bucket', 'run, le', filter)})"


def age(name: str, filter: str = RUNS) -> str:
    """Seconds since a time that a gauge holds."""
    return f"time() - {latest(name, filter=filter)}"


def happened(name: str, by: str = "run", filter: str = RUNS) -> str:
    """How often in the last hour."""
    return f"sum by ({by}) (increase({name}{filter}[1h]))"


def state(filter: str = RUNS) -> Panel:
    """Which state every run is in."""
    return Panel(
        "State",
        [(f"max by (run, state) (unimrg_run_state{filter}) == 1", "{{run}}: {{state}}")],
        "unimrg_run_state",
        kind="state-timeline",
        width=24,
        low=None,
    )
