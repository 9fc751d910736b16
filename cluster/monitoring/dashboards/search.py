"""Search: its trials and the best of them."""

from __future__ import annotations

from typing import Any

from cluster.monitoring.panels import Panel, Row, dashboard
from cluster.monitoring.queries import FIRING, NAMESPACE, SEARCH, TRIALS, latest, mean, speed, state


def search() -> dict[str, Any]:
    """A search and its trials."""
    whole = Row(
        "Search",
        [
            state(),
            Panel(
                "Trials",
                [(latest("unimrg_trials", "run, state"), "{{state}}")],
                "unimrg_trials",
                kind="bargauge",
            ),
            Panel(
                "Trials over time", [(latest("unimrg_trials", "run, state"), "{{state}}")], "unimrg_trials"
            ),
            Panel(
                "Best objective so far",
                [(latest("unimrg_best_objective"), "{{run}}")],
                "unimrg_best_objective",
                low=None,
            ),
            Panel(
                "Duration of a trial",
                [(mean("unimrg_trial_seconds"), "mean")],
                "unimrg_trial_seconds",
                "s",
                width=12,
            ),
            FIRING,
        ],
    )
    each = Row(
        "Trials at work",
        [
            state(TRIALS),
            Panel("Step", [(latest("unimrg_step", filter=TRIALS), "{{run}}")], "unimrg_step"),
            Panel(
                "Weighted loss",
                [(latest("unimrg_weighted_loss", filter=TRIALS), "{{run}}")],
                "unimrg_weighted_loss",
            ),
            Panel(
                "Samples",
                [(speed("unimrg_samples_total", filter=TRIALS), "{{run}}")],
                "unimrg_samples_total",
                "suffix:/s",
            ),
            Panel(
                "Weights of the tasks",
                [(latest("unimrg_task_weight", "run, task", TRIALS), "{{run}} {{task}}")],
                "unimrg_task_weight",
                width=12,
            ),
            Panel(
                "Losses",
                [(latest("unimrg_loss", "run, task", TRIALS), "{{run}} {{task}}")],
                "unimrg_loss",
                width=12,
            ),
        ],
    )
    return dashboard(
        "unimrg-search",
        "unimrg: search",
        "A search for the weights of the tasks, and its trials.",
        [NAMESPACE, SEARCH],
        [whole, each],
    )
