"""Records survive crashes and resumes, sinks tell the same numbers, and the meter's arithmetic is right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unimrg.errors import StorageError
from unimrg.metrics import METRICS, JsonlSink, Meter, metric, parse_jsonl, read_jsonl


def test_every_metric_has_its_own_name_and_says_what_it_is() -> None:
    assert len({m.name for m in METRICS}) == len(METRICS)
    assert all(m.unit and m.description for m in METRICS)
    assert metric("loss/depth") is not None and metric("loss/nothing") is None
    found = metric("skipped/corrupt-image")
    assert found is not None and "corrupt-image" in found.description


def test_records_come_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path)
    records: list[dict[str, Any]] = [
        {"step": 1, "loss/pixel": math.nan, "loss/depth": None, "grad_norm": math.inf},
        {"step": 2, "loss/pixel": 0.5, "note": "NaN stays a word in text: \u00fc\n"},
    ]
    for record in records:
        sink.write(record)
        assert path.read_bytes().endswith(b"\n"), "visible at once"
    sink.close()
    first, second = read_jsonl(path)
    assert math.isnan(first["loss/pixel"]) and first["grad_norm"] == math.inf and first["loss/depth"] is None
    assert second == records[1]
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_numpy_values_are_written_as_numbers(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.write({"step": np.int64(3), "loss/total": np.float32(0.5), "grad_norm": np.float32("inf")})
    assert read_jsonl(sink.path) == [{"step": 3, "loss/total": 0.5, "grad_norm": math.inf}]


def test_a_resumed_run_has_one_record_a_step(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    for step in range(1, 8):
        sink.write({"step": step, "loss/total": float(step)})
    sink.close()
    resumed = JsonlSink(tmp_path / "m.jsonl")
    assert resumed.truncate_from(5) == 3
    assert resumed.truncate_from(5) == 0
    for step in range(5, 10):
        resumed.write({"step": step, "loss/total": -1.0})
    assert [r["step"] for r in read_jsonl(resumed.path)] == list(range(1, 10))
    assert list(tmp_path.iterdir()) == [resumed.path]


def test_a_torn_last_line_is_left_out_and_cut_before_the_next_record(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "loss/to\xc3')
    assert read_jsonl(path) == [{"step": 1}]
    JsonlSink(path).write({"step": 2})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_damage_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n[1, 2]\n{"step": 3}\n')
    with pytest.raises(StorageError, match="line 2"):
        read_jsonl(path)
    assert parse_jsonl(path.read_text()) == ([{"step": 1}, {"step": 3}], [2])


def test_meter_over_a_window() -> None:
    meter = Meter(total_steps=10, window=2, workers=2, peak=100e12)
    first = meter.step(1, started=100.0, ready=101.0, ended=104.0, samples=8, tokens=800, flops=160e12)
    assert first == {
        "samples_per_second": 2.0,
        "tokens_per_second": 200.0,
        "model_tflops": 20.0,
        "mfu": 0.2,
        "samples": 8,
        "tokens": 800,
        "model_flops": 160e12,
        "step_seconds": 4.0,
        "data_wait_seconds": 1.0,
        "data_wait_share": 0.25,
        "time_left_seconds": 36.0,
    }
    meter.step(2, started=104.0, ready=104.0, ended=106.0, samples=8)
    third = meter.step(3, started=108.0, ready=109.0, ended=110.0, samples=8)
    # Steps 2 and 3 only: 16 samples in 6 s, the 2 s pause between them included.
    assert third["samples_per_second"] == pytest.approx(16 / 6)
    assert third["data_wait_share"] == pytest.approx(1 / 6)
    assert third["time_left_seconds"] == pytest.approx(7 * 3)
    assert third["step_seconds"] == 2.0


def test_no_share_of_an_unknown_peak() -> None:
    values = Meter().step(1, started=0.0, ready=0.0, ended=2.0, samples=1, flops=3e12)
    assert values["model_tflops"] == 1.5 and values["mfu"] is None


def test_meter_without_an_end_or_without_time() -> None:
    values = Meter().step(1, started=5.0, ready=5.0, ended=5.0, samples=1)
    assert values["time_left_seconds"] is None and values["samples_per_second"] is None
    with pytest.raises(ValueError):
        Meter(window=0)
