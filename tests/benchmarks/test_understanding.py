"""Prompts, extraction and scores against what the official classes made of the same files."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unimrg.benchmarks.result import BenchmarkResult
from unimrg.benchmarks.understanding import extract, registry, summary, yes_no
from unimrg.benchmarks.understanding.prompts import choice
from unimrg.benchmarks.understanding.questions import Question, decode_picture, read_questions
from unimrg.benchmarks.understanding.registry import BENCHMARKS, Benchmark
from unimrg.benchmarks.understanding.tsv import Row, read_table
from unimrg.storage import Store

OFFICIAL = [benchmark for benchmark in BENCHMARKS if benchmark.md5]
NAMES = [benchmark.name for benchmark in OFFICIAL]
CHOICES = [benchmark.name for benchmark in OFFICIAL if benchmark.is_choice]
YES_NO = [benchmark.name for benchmark in OFFICIAL if not benchmark.is_choice]

# The quirks are no benchmark; they are asked and marked like RealWorldQA.
QUIRKS = "TSV_quirks"

# Name of the official column -> ours, where they differ.
OURS = {
    "MMVP": {"Average": "average", "Overall": "pairs"},
    "VSR-zeroshot": {"f1_score": "f1"},
    "POPE": {"Overall": "f1"},
}


@pytest.fixture(scope="session")
def understanding(evaluation_dir: Path) -> Path:
    return evaluation_dir / "understanding"


def stored(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text("utf-8"))


def answers(folder: Path, name: str) -> list[Row]:
    return read_table((folder / "predictions" / f"{name}.tsv").read_bytes(), f"{name}.tsv")


def benchmark_of(name: str) -> Benchmark:
    return registry.find("RealWorldQA" if name == QUIRKS else name)


def score(folder: Path, name: str, matcher: str = extract.DEFAULT_MATCHER) -> BenchmarkResult:
    return registry.score(benchmark_of(name), answers(folder, name), name, matcher)


def same(found: float, expected: float | None) -> bool:
    if expected is None:
        return math.isnan(found)
    return found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("matcher", extract.MATCHERS)
def test_every_answer_of_the_list_is_read_as_officially(understanding: Path, matcher: str) -> None:
    rules = extract.MATCHERS[matcher]
    for case in stored(understanding, "can_infer_cases.json"):
        said, options = case["prediction"], case["choices"]
        found = {
            "option": extract.find_letter(said, options, rules) or False,
            "text": extract.find_text(said, options, rules) or False,
            "final": extract.find_option(said, options, rules) or False,
        }
        assert found == case["expected"][matcher], said


def test_every_yes_and_no_of_the_list_is_read_as_officially(understanding: Path) -> None:
    for case in stored(understanding, "yes_no_cases.json"):
        assert extract.yes_or_no(case["prediction"]) == case["expected"], case["prediction"]


@pytest.mark.parametrize("name", [*NAMES, QUIRKS])
def test_prompts_and_pictures_are_the_official_ones(understanding: Path, name: str) -> None:
    questions = read_questions((understanding / "tsv" / f"{name}.tsv").read_bytes(), name).questions
    message = choice if name == QUIRKS else benchmark_of(name).message
    folder = Store.at(str(understanding))
    found = [
        {"index": q.index, "messages": [shown(q, piece, folder) for piece in message(q)]} for q in questions
    ]
    assert found == [
        {
            "index": e["index"],
            "messages": [{k: v for k, v in m.items() if k != "file"} for m in e["messages"]],
        }
        for e in stored(understanding, f"prompts/{name}.json")
    ]


def shown(question: Question, piece: str | int, folder: Store) -> dict[str, Any]:
    if isinstance(piece, str):
        return {"type": "text", "value": piece}
    pixels = decode_picture(question, piece, folder)
    digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
    return {"type": "image", "shape": list(pixels.shape), "rgb_sha256": digest[:16]}


@pytest.mark.parametrize("matcher", extract.MATCHERS)
@pytest.mark.parametrize("name", [*CHOICES, QUIRKS])
def test_choices_are_marked_and_scored_as_officially(understanding: Path, name: str, matcher: str) -> None:
    expected = stored(understanding, f"expected/{name}.json")[matcher]
    marks = registry.mark(benchmark_of(name), answers(understanding, name), name, matcher)
    assert [
        {"index": m.index, "extracted": m.said, "gold": m.gold, "hit": int(m.right)} for m in marks
    ] == expected["rows"]
    result = score(understanding, name, matcher)
    for table in expected.get("scores_vanilla_and_circular", expected["scores"]):
        split = table.pop("split", None)
        main = (
            split.removesuffix("_dev")
            if name == "MMBench_DEV_EN"
            else split
            if name == "MMMU_DEV_VAL"
            else None
        )
        for column, value in table.items():
            assert same(value_of(result, name, main, column), value), (split, column)


def value_of(result: BenchmarkResult, name: str, main: str | None, column: str) -> float:
    """A cell of the official table, in our result."""
    column = OURS.get(name, {}).get(column, column)
    if column in result.scores:
        return result.scores[column]
    main = main or result.headline
    return result.scores[main] if column == "Overall" else result.groups[main][column]


def test_a_circular_question_needs_all_its_rotations(understanding: Path) -> None:
    for matcher in extract.MATCHERS:
        expected = stored(understanding, "expected/MMBench_DEV_EN.json")[matcher]["circular_groups"]
        result = score(understanding, "MMBench_DEV_EN", matcher)
        assert result.scores["circular"] == pytest.approx(sum(expected.values()) / len(expected))


@pytest.mark.parametrize("name", YES_NO)
def test_yes_and_no_are_marked_and_scored_as_officially(understanding: Path, name: str) -> None:
    expected = stored(understanding, f"expected/{name}.json")
    marks = registry.mark(benchmark_of(name), answers(understanding, name), name)
    assert [
        {"index": m.index, "extracted": m.said, "answer": m.gold, "score": m.right} for m in marks
    ] == expected["rows"]
    result = score(understanding, name)
    for table in expected["scores"]:
        split = table.pop("split", "Overall")
        for column, value in table.items():
            column = OURS.get(name, {}).get(column, column)
            found = result.scores[column] if split == "Overall" else result.groups[column][split]
            assert same(found, value), (split, column)


def test_pope_s_own_scorer(understanding: Path) -> None:
    folder = understanding / "pope_official"
    said, labels = (
        [json.loads(line) for line in (folder / f"{n}.jsonl").open()] for n in ("answers", "labels")
    )
    expected = stored(folder, "expected.json")
    texts = [answer["answer"] for answer in said]
    assert [yes_no.pope_says(text).lower() for text in texts] == expected["parsed"]
    found = yes_no.pope_own(texts, [label["label"].capitalize() for label in labels])
    assert found.both_yes == expected["TP"] and found.said_yes - found.both_yes == expected["FP"]
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=1e-6)


@pytest.mark.parametrize("matcher", extract.MATCHERS)
def test_the_five_benchmarks_and_their_mean(understanding: Path, matcher: str) -> None:
    expected = stored(understanding, "five_benchmark_summary.json")[matcher]
    results = [score(understanding, name, matcher) for name in summary.FIVE]
    found = summary.five_benchmarks(results, any_rows=True)
    assert found is not None
    for name, value in (expected["scores"] | {"average": expected["average"]}).items():
        assert found.scores[name] == pytest.approx(value, rel=1e-6), name
    there = {result.benchmark: result for result in results}
    assert summary.in_percent(there["MMBench_DEV_EN"], "circular") == pytest.approx(
        expected["mmbench_circular"]
    )
    assert summary.in_percent(there["MMVP"], "pairs") == pytest.approx(expected["mmvp_pair"])
    assert summary.five_benchmarks(results) is None  # not the official rows
    assert summary.five_benchmarks(results[1:], any_rows=True) is None


def test_cv_bench_is_half_2d_and_half_3d(understanding: Path) -> None:
    two, three = score(understanding, "CV-Bench-2D"), score(understanding, "CV-Bench-3D")
    both = summary.cv_bench([two, three])
    assert both is not None
    assert both.scores["overall"] == (two.scores["overall"] + three.scores["overall"]) / 2
    assert summary.cv_bench([two]) is None
