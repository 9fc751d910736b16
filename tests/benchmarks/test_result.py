"""The outcome of a benchmark: what it insists on, and that it survives being stored."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimrg.benchmarks.result import UNITS, BenchmarkResult

PLAIN = BenchmarkResult(
    "MMVP", {"average": 0.5, "pairs": 0.25}, "average", dict.fromkeys(("average", "pairs"), "fraction")
)
names = st.text(min_size=1, max_size=8)
values = st.dictionaries(names, st.floats(allow_infinity=False), min_size=1, max_size=4)


@settings(deadline=None)
@given(values, st.data())
def test_a_stored_result_comes_back_the_same(scores: dict[str, float], data: st.DataObject) -> None:
    result = BenchmarkResult(
        "any",
        scores,
        data.draw(st.sampled_from(sorted(scores))),
        {name: data.draw(st.sampled_from(UNITS)) for name in scores},
        data.draw(st.dictionaries(st.sampled_from(sorted(scores)), values, max_size=2)),
        data.draw(st.dictionaries(names, names, max_size=2)),
        data.draw(st.dictionaries(names, st.integers(0, 10**6), max_size=2)),
    )
    again = BenchmarkResult.from_json(result.to_json())
    assert repr(again) == repr(result)  # NaN equals itself only so
    assert again.to_json() == result.to_json()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"headline": "overall"}, "headline"),
        ({"units": {"average": "fraction"}}, "unit"),
        ({"units": {"average": "fraction", "pairs": "points"}}, "unit"),
        ({"groups": {"overall": {"a": 1.0}}}, "groups"),
    ],
)
def test_what_belongs_to_no_score_is_refused(change: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        dataclasses.replace(PLAIN, **change)


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"benchmark": "MMVP"})])
def test_what_is_no_result_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        BenchmarkResult.from_json(text)
