"""What Prometheus is shown: the table is sound, figures count exactly, and the pitfalls stay shut."""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from unimrg.figures import BY_NAME, COUNTER, FIGURES, GAUGE, HISTOGRAM, JUDGED, OTHER, Figures
from unimrg.metrics import METRICS

DERIVED = {
    "samples_per_second": "rate(unimrg_samples_total)",
    "tokens_per_second": "rate(unimrg_tokens_total)",
    "model_tflops": "rate(unimrg_model_flops_total)",
    "data_wait_share": "rate(unimrg_data_wait_seconds_total)",
    "checkpoint_seconds": "unimrg_checkpoint_stall_seconds, told with every checkpoint",
    "checkpoint_step": "unimrg_checkpoint_step, told with every checkpoint",
    "skipped": "unimrg_quarantined_samples_total",
    "skipped_steps": "unimrg_skipped_steps_total, from the event",
    "loss_spikes": "unimrg_loss_spikes_total, from the event",
    "rollbacks": "unimrg_rollbacks_total, from the event",
    "restarts": "unimrg_restarts_total, from the event",
    "hangs": "unimrg_hangs_total, from the event",
}
"""Values of a record that reach Prometheus in another form."""


def samples(figures: Figures) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, labels without `run`) -> value."""
    return {
        (s.name, tuple(sorted((k, v) for k, v in s.labels.items() if k != "run"))): s.value
        for family in figures.collect()
        for s in family.samples
    }


def value(figures: Figures, name: str, **labels: str) -> float | None:
    return samples(figures).get((name, tuple(sorted(labels.items()))))


def test_names_follow_the_conventions_of_prometheus() -> None:
    """Base units in names, `_total` on counters alone, one label beside `run` at most, closed lists."""
    assert len(BY_NAME) == len(FIGURES)
    for figure in FIGURES:
        assert re.fullmatch(r"unimrg_[a-z_]+", figure.name), figure.name
        assert figure.name.endswith("_total") == (figure.kind == COUNTER), figure.name
        assert not re.search(r"_(ms|mb|gb|percent|count|sum|bucket|created)$", figure.name), figure.name
        assert figure.help and figure.group and not figure.help.endswith("."), figure.name
        assert bool(figure.label) == bool(figure.values) and len(figure.values) <= 20, figure.name
        assert (figure.kind == HISTOGRAM) == bool(figure.buckets), figure.name
        assert figure.kind != HISTOGRAM or not figure.label, "a histogram of many labels is many series"


def test_every_value_of_a_record_reaches_prometheus() -> None:
    """By a figure that it feeds, or in another form, named here; nothing is fed by what isn't there."""
    fed = {key for figure in FIGURES for key, _ in figure.fed_by()}
    names = {metric.name for metric in METRICS}
    assert names - fed - set(DERIVED) == set()
    assert fed - names == set()
    assert not fed & set(DERIVED)


def test_counters_are_there_from_the_start_with_every_value_of_their_label() -> None:
    """Else the first event would be a birth, which `increase` doesn't see. Gauges wait for a value."""
    found = samples(Figures("first"))
    for figure in FIGURES:
        series = [key for key in found if key[0] == figure.name]
        if figure.kind == COUNTER:
            assert {dict(labels).get(figure.label, "") for _, labels in series} == set(figure.values or [""])
            assert all(found[key] == 0 for key in series), figure.name
        elif figure.kind == GAUGE:
            assert not series, figure.name
        else:
            assert found[(f"{figure.name}_sum", ())] == 0 and found[(f"{figure.name}_count", ())] == 0


def test_a_record_feeds_gauges_counters_and_histograms() -> None:
    figures = Figures("first")
    record: dict[str, Any] = {
        "step": 7,
        "loss/depth": 0.5,
        "loss/pixel": None,
        "samples": 4,
        "step_seconds": 0.3,
    }
    assert figures.take(record) and figures.take(record | {"step": 8, "step_seconds": 1.5})
    assert value(figures, "unimrg_step") == 8
    assert value(figures, "unimrg_loss", task="depth") == 0.5
    assert value(figures, "unimrg_loss", task="pixel") is None
    assert value(figures, "unimrg_samples_total") == 8
    assert value(figures, "unimrg_step_seconds_sum") == pytest.approx(1.8)
    assert value(figures, "unimrg_step_seconds_bucket", le="0.5") == 1


@given(st.lists(st.floats(0.001, 1000), max_size=30))
def test_sums_of_histograms_are_exact(seconds: list[float]) -> None:
    """Ray's own are rebuilt from the middles of buckets."""
    figures = Figures("first")
    for duration in seconds:
        figures.take({"step_seconds": duration})
    assert value(figures, "unimrg_step_seconds_sum") == pytest.approx(math.fsum(seconds))
    assert value(figures, "unimrg_step_seconds_count") == len(seconds)


def test_what_is_not_finite_is_counted_and_leaves_gauges_alone() -> None:
    figures = Figures("first")
    figures.take({"loss/depth": 0.5, "grad_norm": 2.0, "samples": 4})
    assert not figures.take({"loss/depth": math.nan, "grad_norm": math.inf, "samples": 4})
    assert (
        value(figures, "unimrg_loss", task="depth") == 0.5 and value(figures, "unimrg_gradient_norm") == 2.0
    )
    assert value(figures, "unimrg_nonfinite_values_total", value="loss/depth") == 1
    assert value(figures, "unimrg_nonfinite_values_total", value="grad_norm") == 1
    assert sum(value(figures, "unimrg_nonfinite_values_total", value=key) or 0 for key in JUDGED) == 2
    assert all(math.isfinite(number) for number in samples(figures).values())


def test_labels_stay_bounded() -> None:
    figures = Figures("first")
    for number in range(50):
        figures.add("unimrg_quarantined_samples_total", label=f"/secret/path/{number}")
    assert value(figures, "unimrg_quarantined_samples_total", reason=OTHER) == 50
    assert not any("secret" in str(key) for key in samples(figures))


def test_the_text_file_is_prometheus_own_format(tmp_path: Path) -> None:
    figures = Figures('a "run"')
    figures.take({"step": 2, "loss/depth": 2.0})
    figures.write_text(tmp_path / "metrics.prom")
    families = {f.name: f for f in text_string_to_metric_families((tmp_path / "metrics.prom").read_text())}
    assert families["unimrg_steps"].type == "counter" and families["unimrg_step_seconds"].type == "histogram"
    assert families["unimrg_loss"].samples[0].labels == {"run": 'a "run"', "task": "depth"}
    assert not any(name.endswith("_created") for name in families)


def test_families_travel_between_processes() -> None:
    figures = Figures("first")
    before = samples(figures)
    assert [f.name for f in pickle.loads(pickle.dumps(list(figures.collect())))] == [
        f.name for f in figures.collect()
    ]
    assert samples(figures) == before
