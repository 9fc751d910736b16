"""A run's figures for Prometheus: names, kinds, labels and help in one table, and what counts them.

`docs/metrics.md` is made from `FIGURES`, and so are the dashboards' panels. Three rules keep figures honest:
a counter is there from the start, at 0, with every value its label can have, so that the first event is a
rise and not a birth; a gauge stays at its last finite value, since one NaN would spoil every average over
it, and what isn't finite is counted; a label's values are a closed list.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, write_to_textfile
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from unimrg.errors import SampleError
from unimrg.failures import RETRY_REASONS
from unimrg.sample import Task

RUN = "run"
OTHER = "other"
"""What a label says of a value that isn't in its list."""

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

STATES = ("starting", "training", "scoring", "labelling", "searching", "done", "paused", "failed")
ENDED = ("done", "paused", "failed")
CAUSES = ("failure", "hang", "preemption", "resize", "command")
TASKS = tuple(task.value for task in Task)
JUDGED = (*(f"loss/{task}" for task in TASKS), "loss/total", "grad_norm")
"""Values of a step that must be finite."""

STEP_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
LONG_BUCKETS = (0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
TRIAL_BUCKETS = (10.0, 30.0, 60.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 21600.0, 86400.0)


@dataclass(frozen=True)
class Figure:
    """One family of series. All have the label `run`; `label` is the other one, with all its `values`.

    source: the key of a step's record (`metrics.METRICS`) that feeds it, `<source>/<value>` where it has a
    label: a gauge is set to it, a counter raised by it, a histogram observes it. "" where an event does.
    """

    name: str
    kind: str
    help: str
    label: str = ""
    values: tuple[str, ...] = ()
    source: str = ""
    buckets: tuple[float, ...] = ()
    group: str = ""

    def fed_by(self) -> Iterator[tuple[str, str]]:
        """(key of a record, value of the label) of everything that feeds it from records."""
        if self.source and self.label:
            yield from ((f"{self.source}/{value}", value) for value in self.values)
        elif self.source:
            yield self.source, ""


def _of(group: str, *figures: Figure) -> tuple[Figure, ...]:
    return tuple(Figure(**{**vars(figure), "group": group}) for figure in figures)


FIGURES: tuple[Figure, ...] = (
    *_of(
        "Progress",
        Figure(
            "unimrg_run_state",
            GAUGE,
            "1 for the state the run is in, 0 for the others; starting lasts until the workers are asked for",
            "state",
            STATES,
        ),
        Figure(
            "unimrg_step",
            GAUGE,
            "optimiser steps in the model, those before a resume included",
            source="step",
        ),
        Figure("unimrg_planned_steps", GAUGE, "optimiser steps after which the run ends"),
        Figure("unimrg_steps_total", COUNTER, "optimiser steps made, those made again included"),
        Figure(
            "unimrg_last_step_timestamp_seconds",
            GAUGE,
            "when the last step ended, seconds since 1970",
            source="timestamp",
        ),
        Figure(
            "unimrg_position_samples",
            GAUGE,
            "place in the order of samples; a resumed run goes on from here",
            source="position",
        ),
        Figure("unimrg_time_left_seconds", GAUGE, "expected until the last step", source="time_left_seconds"),
        Figure("unimrg_workers", GAUGE, "training processes", source="workers"),
        Figure(
            "unimrg_restarts_total",
            COUNTER,
            "times the workers began again, by cause: a failure, a hang that was ended, a node taken away "
            "after a notice, more or fewer workers, or the command given again for the same run",
            "cause",
            CAUSES,
        ),
        Figure("unimrg_hangs_total", COUNTER, "workers ended because a step took too long"),
        Figure("unimrg_preemption_notices_total", COUNTER, "notices that a node will be taken away"),
        Figure("unimrg_warnings_total", COUNTER, "warnings in events.jsonl"),
        Figure("unimrg_failures_total", COUNTER, "failures in events.jsonl: of training or of labelling"),
    ),
    *_of(
        "Speed",
        Figure(
            "unimrg_step_seconds",
            HISTOGRAM,
            "duration of a step, waiting for data included",
            source="step_seconds",
            buckets=STEP_BUCKETS,
        ),
        Figure(
            "unimrg_data_wait_seconds_total",
            COUNTER,
            "time of the steps that rank 0 spent waiting for a batch",
            source="data_wait_seconds",
        ),
        Figure(
            "unimrg_productive_seconds_total",
            COUNTER,
            "time of the steps that brought the run forward: neither waiting, nor made again, nor with a "
            "number that wasn't finite",
        ),
        Figure("unimrg_samples_total", COUNTER, "samples of all workers trained on", source="samples"),
        Figure("unimrg_tokens_total", COUNTER, "tokens of all workers trained on", source="tokens"),
        Figure(
            "unimrg_model_flops_total",
            COUNTER,
            "matrix multiplications of the model on all workers by formula, none twice if recomputed, FLOP",
            source="model_flops",
        ),
        Figure(
            "unimrg_mfu_ratio",
            GAUGE,
            "model FLOP/s of the last 50 steps as a part of what the workers' devices could do at best; "
            "missing where that isn't known (engine.peak_tflops)",
            source="mfu",
        ),
        Figure(
            "unimrg_peak_memory_bytes",
            GAUGE,
            "most that a worker has needed so far: on its GPU, or of its process without one",
            source="peak_memory_bytes",
        ),
    ),
    *_of(
        "Learning",
        Figure(
            "unimrg_loss",
            GAUGE,
            "mean loss of each task over the global batch, before weights; last finite value",
            "task",
            TASKS,
            "loss",
        ),
        Figure(
            "unimrg_weighted_loss",
            GAUGE,
            "the loss that is trained: weighted mean over the tasks present; last finite value",
            source="loss/total",
        ),
        Figure("unimrg_task_weight", GAUGE, "weight of each task in the loss", "task", TASKS, "weight"),
        Figure("unimrg_learning_rate", GAUGE, "learning rate of the step", source="learning_rate"),
        Figure(
            "unimrg_gradient_norm",
            GAUGE,
            "norm of all gradients before clipping; last finite value",
            source="grad_norm",
        ),
        Figure("unimrg_nonfinite_steps_total", COUNTER, "steps with a loss or gradient that isn't finite"),
        Figure(
            "unimrg_nonfinite_values_total",
            COUNTER,
            "values that weren't finite, by their name in metrics.jsonl",
            "value",
            JUDGED,
        ),
        Figure(
            "unimrg_skipped_steps_total", COUNTER, "updates left out because loss or gradient was not finite"
        ),
        Figure("unimrg_loss_spikes_total", COUNTER, "steps whose loss jumped (train.spike)"),
        Figure("unimrg_rollbacks_total", COUNTER, "returns to an earlier checkpoint after spikes"),
    ),
    *_of(
        "Checkpoints",
        Figure("unimrg_checkpoints_total", COUNTER, "checkpoints that all workers have written"),
        Figure("unimrg_checkpoint_step", GAUGE, "optimiser steps in the last checkpoint"),
        Figure(
            "unimrg_checkpoint_timestamp_seconds",
            GAUGE,
            "when the last checkpoint was complete, seconds since 1970; before the first: when training "
            "began",
        ),
        Figure(
            "unimrg_checkpoint_stall_seconds",
            HISTOGRAM,
            "time for which training stood still to save a checkpoint",
            buckets=LONG_BUCKETS,
        ),
        Figure(
            "unimrg_checkpoint_write_seconds",
            HISTOGRAM,
            "time from the beginning of a checkpoint until it was complete, most of it while training "
            "goes on",
            buckets=LONG_BUCKETS,
        ),
    ),
    *_of(
        "Data and labels",
        Figure(
            "unimrg_checked_samples_total", COUNTER, "samples prepared for training, unusable ones included"
        ),
        Figure(
            "unimrg_quarantined_samples_total",
            COUNTER,
            "samples that couldn't be used, by reason",
            "reason",
            SampleError.REASONS,
        ),
        Figure(
            "unimrg_labelled_rows_total",
            COUNTER,
            "rows written to the label store: labels by the teachers, codes by the frozen encoder",
            "kind",
            ("labels", "codes"),
        ),
        Figure(
            "unimrg_unlabelled_rows_total",
            COUNTER,
            "rows that couldn't be labelled, by reason",
            "reason",
            SampleError.REASONS,
        ),
        Figure(
            "unimrg_storage_retries_total",
            COUNTER,
            "requests to object storage made again, by reason",
            "reason",
            RETRY_REASONS,
        ),
    ),
    *_of(
        "Search",
        Figure(
            "unimrg_trials",
            GAUGE,
            "trials of a search by state",
            "state",
            ("running", "done", "stopped", "failed"),
        ),
        Figure(
            "unimrg_best_objective",
            GAUGE,
            "the first objective of the best trial so far, in the objective's own unit",
        ),
        Figure("unimrg_trial_seconds", HISTOGRAM, "duration of a finished trial", buckets=TRIAL_BUCKETS),
    ),
)

BY_NAME = {figure.name: figure for figure in FIGURES}
_KINDS: dict[str, Any] = {COUNTER: Counter, GAUGE: Gauge, HISTOGRAM: Histogram}


class Figures(Collector):
    """The figures of one run. Names and label values are those of `FIGURES`."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._registry = CollectorRegistry()
        self._made = {figure.name: self._make(figure) for figure in FIGURES}

    def _make(self, figure: Figure) -> Any:
        labels = (RUN, figure.label) if figure.label else (RUN,)
        options: Any = {"buckets": figure.buckets} if figure.kind == HISTOGRAM else {}
        made = _KINDS[figure.kind](figure.name, figure.help, labels, registry=self._registry, **options)
        if figure.kind != GAUGE:
            for value in figure.values or ("",):
                made.labels(self.run, *([value] if figure.label else ()))
        return made

    def set(self, name: str, value: float, label: str = "") -> None:
        """A gauge; a value that isn't finite leaves it as it is."""
        if math.isfinite(value):
            self._child(name, label).set(value)

    def add(self, name: str, amount: float = 1, label: str = "") -> None:
        """Raise a counter; an amount that isn't finite or positive leaves it as it is."""
        if math.isfinite(amount) and amount > 0:
            self._child(name, label).inc(amount)

    def observe(self, name: str, value: float) -> None:
        """One more value of a histogram."""
        if math.isfinite(value):
            self._child(name, "").observe(value)

    def take(self, record: Mapping[str, Any]) -> bool:
        """Everything a step's record feeds; whether all of it was finite. None is "not measured"."""
        for figure in FIGURES:
            for key, label in figure.fed_by():
                if record.get(key) is not None:
                    self._feed(figure, float(record[key]), label)
        bad = [key for key in JUDGED if record.get(key) is not None and not math.isfinite(record[key])]
        for key in bad:
            self.add("unimrg_nonfinite_values_total", label=key)
        return not bad

    def _feed(self, figure: Figure, value: float, label: str) -> None:
        if figure.kind == GAUGE:
            self.set(figure.name, value, label)
        elif figure.kind == COUNTER:
            self.add(figure.name, value, label)
        else:
            self.observe(figure.name, value)

    def _child(self, name: str, label: str) -> Any:
        figure = BY_NAME[name]
        if not figure.label:
            return self._made[name].labels(self.run)
        return self._made[name].labels(self.run, label if label in figure.values else OTHER)

    def collect(self) -> Iterator[Family]:
        """Families with their samples, as of now; plain values that can be sent to another process."""
        for family in self._registry.collect():
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
            if family.samples:
                yield family

    def write_text(self, path: Path | str) -> None:
        """The same as a text file for node_exporter's textfile collector, replaced as a whole (`*.prom`)."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        write_to_textfile(str(path), registry)
