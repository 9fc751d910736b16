"""Training: how runs learn, how fast, and what would be lost now."""

from __future__ import annotations

from typing import Any

from cluster.monitoring.panels import SOURCE, Panel, Row, dashboard
from cluster.monitoring.queries import (
    NAMESPACE,
    RUN,
    RUNS,
    age,
    happened,
    latest,
    mean,
    quantile,
    share,
    speed,
    state,
)


def training() -> dict[str, Any]:
    """How a run learns, how fast, and how safe it is."""
    restarts = {
        "name": "Restarts",
        "enable": True,
        "iconColor": "red",
        "datasource": SOURCE,
        "expr": f"sum by (run, cause) (increase(unimrg_restarts_total{RUNS}[1m])) > 0",
        "step": "60s",
        "titleFormat": "{{run}} began again: {{cause}}",
    }
    now = Row(
        "Now",
        [
            state(),
            Panel(
                "Done",
                [(f"{latest('unimrg_step')} / {latest('unimrg_planned_steps')}", "{{run}}")],
                "steps made of the steps planned",
                "percentunit",
                "stat",
                4,
            ),
            Panel(
                "Step",
                [(latest("unimrg_step"), "{{run}}"), (latest("unimrg_checkpoint_step"), "{{run}} saved")],
                "optimiser steps in the model, and in its last checkpoint",
                kind="stat",
                width=4,
            ),
            Panel(
                "Time left",
                [(latest("unimrg_time_left_seconds"), "{{run}}")],
                "unimrg_time_left_seconds",
                "s",
                "stat",
                4,
            ),
            Panel("Workers", [(latest("unimrg_workers"), "{{run}}")], "unimrg_workers", kind="stat", width=4),
            Panel(
                "Last step",
                [(age("unimrg_last_step_timestamp_seconds"), "{{run}}")],
                "time since the last step ended",
                "s",
                "stat",
                4,
            ),
            Panel(
                "Last checkpoint",
                [(age("unimrg_checkpoint_timestamp_seconds"), "{{run}}")],
                "time since the last checkpoint was complete: what would be lost now",
                "s",
                "stat",
                4,
            ),
        ],
    )
    learning = Row(
        "Learning",
        [
            Panel(
                "Losses", [(latest("unimrg_loss", "run, task"), "{{run}} {{task}}")], "unimrg_loss", width=12
            ),
            Panel(
                "Weighted loss",
                [(latest("unimrg_weighted_loss"), "{{run}}")],
                "unimrg_weighted_loss",
                width=12,
            ),
            Panel("Gradient norm", [(latest("unimrg_gradient_norm"), "{{run}}")], "unimrg_gradient_norm"),
            Panel(
                "Learning rate", [(latest("unimrg_learning_rate"), "{{run}}")], "unimrg_learning_rate", "sci"
            ),
            Panel(
                "Weights of the tasks",
                [(latest("unimrg_task_weight", "run, task"), "{{run}} {{task}}")],
                "unimrg_task_weight",
            ),
            Panel(
                "Steps that went wrong, of the last hour",
                [
                    (happened("unimrg_nonfinite_steps_total"), "{{run}} not finite"),
                    (happened("unimrg_skipped_steps_total"), "{{run}} skipped"),
                    (happened("unimrg_loss_spikes_total"), "{{run}} spike"),
                    (happened("unimrg_rollbacks_total"), "{{run}} rollback"),
                ],
                "steps that weren't finite, updates that were skipped for it, losses that jumped, returns to "
                "an earlier checkpoint",
                width=12,
            ),
            Panel(
                "Values that weren't finite, of the last hour",
                [(f"{happened('unimrg_nonfinite_values_total', 'run, value')} > 0", "{{run}} {{value}}")],
                "unimrg_nonfinite_values_total",
                width=12,
            ),
        ],
    )
    fast = Row(
        "Speed",
        [
            Panel(
                "Step time",
                [
                    (share("unimrg_step_seconds_sum", "unimrg_step_seconds_count"), "{{run}} mean"),
                    (quantile(0.95, "unimrg_step_seconds"), "{{run}} 95 %"),
                ],
                "unimrg_step_seconds",
                "s",
            ),
            Panel(
                "Waiting for data",
                [(share("unimrg_data_wait_seconds_total", "unimrg_step_seconds_sum"), "{{run}}")],
                "part of the time of the steps that is waiting for a batch",
                "percentunit",
                high=1,
            ),
            Panel(
                "Goodput of the last hour",
                [(f"unimrg:goodput:ratio1h{RUNS}", "{{run}}")],
                "time of the steps that brought the run forward, as a part of the time that passed",
                "percentunit",
                high=1,
            ),
            Panel(
                "Samples", [(speed("unimrg_samples_total"), "{{run}}")], "unimrg_samples_total", "suffix:/s"
            ),
            Panel("Tokens", [(speed("unimrg_tokens_total"), "{{run}}")], "unimrg_tokens_total", "suffix:/s"),
            Panel(
                "Model FLOP/s of a worker",
                [(f"{speed('unimrg_model_flops_total')} / {latest('unimrg_workers')}", "{{run}}")],
                "unimrg_model_flops_total",
                "flops",
            ),
            Panel(
                "MFU", [(latest("unimrg_mfu_ratio"), "{{run}}")], "unimrg_mfu_ratio", "percentunit", high=1
            ),
            Panel(
                "Peak memory of a worker",
                [(latest("unimrg_peak_memory_bytes"), "{{run}}")],
                "unimrg_peak_memory_bytes",
                "bytes",
            ),
            Panel("Workers", [(latest("unimrg_workers"), "{{run}}")], "unimrg_workers"),
        ],
    )
    safe = Row(
        "Checkpoints and restarts",
        [
            Panel(
                "Age of the last checkpoint",
                [(age("unimrg_checkpoint_timestamp_seconds"), "{{run}}")],
                "unimrg_checkpoint_timestamp_seconds",
                "s",
            ),
            Panel(
                "Checkpoint, from begin to complete",
                [
                    (mean("unimrg_checkpoint_write_seconds"), "{{run}} written in"),
                    (mean("unimrg_checkpoint_stall_seconds"), "{{run}} stood still for"),
                ],
                "how long a checkpoint took, and for how long training stood still for it",
                "s",
            ),
            Panel(
                "Checkpoints of the last hour",
                [(happened("unimrg_checkpoints_total"), "{{run}}")],
                "unimrg_checkpoints_total",
            ),
            Panel(
                "Restarts of the last hour",
                [(f"{happened('unimrg_restarts_total', 'run, cause')} > 0", "{{run}} {{cause}}")],
                "unimrg_restarts_total",
                width=12,
            ),
            Panel(
                "Faults of the last hour",
                [
                    (happened("unimrg_hangs_total"), "{{run}} hang"),
                    (happened("unimrg_preemption_notices_total"), "{{run}} preemption notice"),
                    (happened("unimrg_failures_total"), "{{run}} failure"),
                    (happened("unimrg_warnings_total"), "{{run}} warning"),
                ],
                "steps that took too long, notices that a node will go, and what events.jsonl warns of",
                width=12,
            ),
        ],
    )
    return dashboard(
        "unimrg-training",
        "unimrg: training",
        "How runs learn, how fast, and how much would be lost now.",
        [NAMESPACE, RUN],
        [now, learning, fast, safe],
        [restarts],
    )
