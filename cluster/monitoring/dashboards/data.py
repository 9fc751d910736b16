"""Data and labels: from object storage to the step, and from the teachers to the label store."""

from __future__ import annotations

from typing import Any

from cluster.monitoring.panels import Panel, Row, dashboard
from cluster.monitoring.queries import NAMESPACE, RUN, RUNS, latest, share, speed


def data() -> dict[str, Any]:
    """From object storage to the step, and into the label store."""
    samples = Row(
        "Samples",
        [
            Panel(
                "Prepared",
                [(speed("unimrg_checked_samples_total"), "{{run}}")],
                "unimrg_checked_samples_total",
                "suffix:/s",
            ),
            Panel(
                "Trained on",
                [(speed("unimrg_samples_total"), "{{run}}")],
                "unimrg_samples_total",
                "suffix:/s",
            ),
            Panel(
                "Waiting for data",
                [(share("unimrg_data_wait_seconds_total", "unimrg_step_seconds_sum"), "{{run}}")],
                "part of the time of the steps that is waiting for a batch",
                "percentunit",
                high=1,
            ),
            Panel("Position", [(latest("unimrg_position_samples"), "{{run}}")], "unimrg_position_samples"),
            Panel(
                "Quarantined",
                [(f"{latest('unimrg_quarantined_samples_total', 'run, reason')} > 0", "{{run}} {{reason}}")],
                "unimrg_quarantined_samples_total",
            ),
            Panel(
                "Quarantined share of the last 30 minutes",
                [(f"unimrg:quarantine:ratio30m{RUNS}", "{{run}}")],
                "unusable samples as a part of those prepared; above data.max_bad_share the run stops",
                "percentunit",
            ),
        ],
    )
    labels = Row(
        "Labels",
        [
            Panel(
                "Labelled",
                [(speed("unimrg_labelled_rows_total", "run, kind"), "{{run}} {{kind}}")],
                "unimrg_labelled_rows_total",
                "suffix:/s",
            ),
            Panel(
                "Labelled so far",
                [(latest("unimrg_labelled_rows_total", "run, kind"), "{{run}} {{kind}}")],
                "unimrg_labelled_rows_total",
            ),
            Panel(
                "Could not be labelled",
                [(f"{latest('unimrg_unlabelled_rows_total', 'run, reason')} > 0", "{{run}} {{reason}}")],
                "unimrg_unlabelled_rows_total",
            ),
        ],
    )
    storage = Row(
        "Object storage",
        [
            Panel(
                "Requests made again",
                [(speed("unimrg_storage_retries_total", "run, reason"), "{{run}} {{reason}}")],
                "unimrg_storage_retries_total",
                "reqps",
                width=24,
            ),
        ],
    )
    pipeline = Row(
        "Ray Data",
        [
            Panel(
                "Rows of each stage",
                [("sum by (operator) (deriv(ray_data_output_rows[1m]))", "{{operator}}")],
                "rows that each stage of the pipelines gives out, a second",
                "suffix:/s",
            ),
            Panel(
                "Blocks that wait before each stage",
                [("sum by (operator) (ray_data_operator_queued_blocks)", "{{operator}}")],
                "the stage before which they pile up is the slow one",
            ),
            Panel(
                "Actors",
                [
                    ("sum by (operator) (ray_data_num_alive_actors) > 0", "{{operator}} alive"),
                    ("sum by (operator) (ray_data_num_pending_actors) > 0", "{{operator}} wait for room"),
                ],
                "teachers, encoders and readers at work, and those that the cluster has no room for",
            ),
            Panel(
                "CPUs in use",
                [("sum by (operator) (ray_data_cpu_usage_cores)", "{{operator}}")],
                "logical CPUs that each stage holds",
            ),
            Panel(
                "GPUs in use",
                [("sum by (operator) (ray_data_gpu_usage_cores)", "{{operator}}")],
                "GPUs that each stage holds",
            ),
            Panel(
                "Spilled",
                [("sum by (dataset) (ray_data_spilled_bytes)", "{{dataset}}")],
                "blocks of the pipelines that had to go to disk",
                "bytes",
            ),
        ],
    )
    return dashboard(
        "unimrg-data",
        "unimrg: data and labels",
        "From object storage to the step, and from the teachers to the label store.",
        [NAMESPACE, RUN],
        [samples, labels, storage, pipeline],
    )
