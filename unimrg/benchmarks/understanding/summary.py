"""Numbers over several benchmarks: the five of the UniMRG paper, and both halves of CV-Bench."""

from __future__ import annotations

from collections.abc import Sequence

from unimrg.benchmarks.result import BenchmarkResult
from unimrg.benchmarks.understanding.registry import find

FIVE = {
    "MMBench_DEV_EN": "vanilla_all",
    "RealWorldQA": "overall",
    "MMVP": "average",
    "HallusionBench": "aAcc",
    "VSR-zeroshot": "acc",
}
"""The paper's benchmarks and the score that a public evaluation of its models averages."""


def in_percent(result: BenchmarkResult, score: str) -> float:
    """A score of a result, 0..100 whatever its unit."""
    return result.scores[score] * (100 if result.units[score] == "fraction" else 1)


def five_benchmarks(results: Sequence[BenchmarkResult], any_rows: bool = False) -> BenchmarkResult | None:
    """The five in percent and their plain mean; None where one is missing or isn't of the official rows.

    any_rows: don't look at the number of rows.
    """
    there = {result.benchmark: result for result in results}
    for name in FIVE:
        if name not in there or not (any_rows or there[name].counts["rows"] == find(name).rows):
            return None
    values = {name: in_percent(there[name], score) for name, score in FIVE.items()}
    values["average"] = sum(values.values()) / len(values)
    return BenchmarkResult(
        "five_benchmarks",
        values,
        "average",
        dict.fromkeys(values, "percent"),
        protocol={"scores": ", ".join(f"{name} {score}" for name, score in FIVE.items())},
    )


def cv_bench(results: Sequence[BenchmarkResult]) -> BenchmarkResult | None:
    """Half the 2D score, which is a mean over sources, and half the 3D score; None where one is missing."""
    there = {
        result.benchmark: result.scores["overall"] for result in results if "CV-Bench-" in result.benchmark
    }
    if len(there) < 2:
        return None
    values = {"overall": sum(there.values()) / 2, "2D": there["CV-Bench-2D"], "3D": there["CV-Bench-3D"]}
    return BenchmarkResult("CV-Bench", values, "overall", dict.fromkeys(values, "fraction"))
