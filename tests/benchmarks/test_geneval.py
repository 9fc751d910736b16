"""GenEval against what the official scripts make of stored detections, and its rules on random boxes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimrg.benchmarks.generation import geneval
from unimrg.benchmarks.generation.geneval import Prompt, Row
from unimrg.errors import DataError


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(evaluation_dir: Path) -> Path:
    return evaluation_dir / "geneval"


def prompt(plain: dict[str, Any]) -> Prompt:
    return Prompt.parse(json.dumps(plain), "here")


def comparable(reason: str) -> list[list[str]]:
    """The order of two relations that both hold depends on string hashing in the official script."""
    return [
        sorted(line.split(" and ")) if "target" not in line else sorted(line.split())
        for line in reason.split("\n")
    ]


def unasked(name: str, number: int) -> str:
    raise AssertionError("colours are asked for only where a clause names one")


# -- against the official scripts ----------------------------------------------------------------------------


def test_prompts_are_read(folder: Path) -> None:
    prompts = geneval.read_prompts(folder / "evaluation_metadata.jsonl")
    counts = {tag: sum(p.tag == tag for p in prompts) for tag in geneval.TAGS}
    assert counts == dict(zip(geneval.TAGS, (80, 99, 80, 94, 100, 100), strict=True))
    assert all(clause.color in (None, *geneval.COLORS) for p in prompts for clause in p.include)
    assert [json.loads(p.line) for p in prompts] == lines(folder / "evaluation_metadata.jsonl")


def test_verdicts_agree(folder: Path) -> None:
    cases = lines(folder / "evaluate_cases.jsonl")
    for case in cases:
        colors = case["colors"]
        ask = (lambda name, number, colors=colors: colors[name][number]) if colors else unasked
        got = geneval.judge(prompt(case["metadata"]), case["details"], ask)
        assert got.correct == case["correct"], case
        assert comparable(got.reason) == comparable(case["reason"]), case
    assert len(cases) == 120


def test_relations_and_overlaps_agree(folder: Path) -> None:
    for case in lines(folder / "relation_iou_cases.jsonl"):
        assert geneval.relations(case["a"], case["b"]) == set(case["relations"]), case
        assert geneval.overlap(case["a"], case["b"]) == pytest.approx(case["iou"], rel=1e-9), case


def test_filtered_detections_agree(folder: Path) -> None:
    for case in lines(folder / "raw_detection_cases.jsonl"):
        asked = prompt(case["metadata"])
        found = {}
        for name, boxes in case["raw_boxes"].items():
            numbers = geneval.kept(boxes, asked.tag, case["max_overlap"])
            if numbers:
                found[name] = [boxes[number] for number in numbers]
        assert found == case["details"]
        got = geneval.judge(asked, found, lambda name, number, case=case: case["colors_by_rank"][number])
        assert (got.correct, comparable(got.reason)) == (case["correct"], comparable(case["reason"]))


def test_real_rows_get_their_recorded_verdicts(folder: Path) -> None:
    """Colours are taken from the recorded reason, which names those that were wrong."""
    for row in geneval.read_results(folder / "real_results_sample.jsonl"):
        asked = Prompt.parse(row.metadata, row.filename)
        colors = {clause.name: clause.color for clause in asked.include}
        for line in row.reason.split("\n"):
            if " found 0 " in line:
                name = next(c.name for c in asked.include if f" {c.color} {c.name}>=" in line)
                colors[name] = line.rpartition(" ")[2]
        got = geneval.judge(asked, row.details, lambda name, _, colors=colors: str(colors[name]))
        assert (got.correct, comparable(got.reason)) == (row.correct, comparable(row.reason))
        assert Row.parse(row.to_line(), "") == row


@pytest.mark.parametrize("name", ["synthetic_results.jsonl", "real_results_sample.jsonl"])
def test_summaries_agree(folder: Path, name: str) -> None:
    want = json.loads((folder / "summary_expected.json").read_text())[name]
    got = geneval.score(geneval.read_results(folder / name))
    tags = {tag: right / total for tag, (right, total) in want["tags"].items()}
    assert got.scores["overall"] == pytest.approx(want["overall"], abs=5e-6)
    assert got.scores["pictures"] == pytest.approx(100 * want["images_correct"] / want["total_images"])
    assert got.scores["prompts"] == pytest.approx(100 * want["prompts_any_correct"] / want["total_prompts"])
    assert got.groups["overall"] == pytest.approx(tags)
    assert (got.counts["pictures"], got.counts["prompts"]) == (want["total_images"], want["total_prompts"])
    for tag, (_, total) in want["tags"].items():
        assert got.counts[f"pictures of {tag}"] == total


def test_scores_are_named_by_tag_not_by_order(folder: Path) -> None:
    """A table whose columns follow the first appearance of the tags is mislabelled."""
    rows = geneval.read_results(folder / "synthetic_results.jsonl")
    want = geneval.score(rows)
    assert list(want.groups["overall"]) == list(geneval.TAGS)
    random.Random(3).shuffle(rows)
    again = geneval.score(rows)
    assert again.to_json() == want.to_json()


# -- what must hold for any boxes ----------------------------------------------------------------------------

sides = st.tuples(*[st.integers(0, 200)] * 4)
boxes = sides.map(lambda s: (float(s[0]), float(s[1]), float(s[0] + s[2]), float(s[1] + s[3]), 0.5))
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@settings(deadline=None)
@given(boxes, boxes, st.integers(-50, 50))
def test_relations_are_opposite_from_the_other_side(a: Any, b: Any, shift: int) -> None:
    got = geneval.relations(a, b)
    assert geneval.relations(b, a) == {OPPOSITE[name] for name in got}
    assert len(got) <= 2 and not {"left of", "right of"} <= got and not {"above", "below"} <= got
    moved = [tuple(x + shift for x in box[:4]) for box in (a, b)]
    assert geneval.relations(*moved) == got
    transposed = [(box[1], box[0], box[3], box[2]) for box in (a, b)]
    swap = {"left of": "above", "right of": "below", "above": "left of", "below": "right of"}
    assert geneval.relations(*transposed) == {swap[name] for name in got}


@settings(deadline=None)
@given(boxes, boxes)
def test_overlap_is_symmetric_and_bounded(a: Any, b: Any) -> None:
    assert 0 <= geneval.overlap(a, b) == geneval.overlap(b, a) <= 1
    assert geneval.overlap(a, a) == 1


scored = st.lists(st.tuples(boxes, st.floats(0, 1)).map(lambda pair: (*pair[0][:4], pair[1])), max_size=30)


@settings(deadline=None)
@given(scored, st.sampled_from(geneval.TAGS), st.sampled_from([0.3, 0.7, 1.0]))
def test_what_counts_is_sure_sorted_and_apart(found: Any, tag: str, most: float) -> None:
    numbers = geneval.kept(found, tag, most)
    scores = [found[number][4] for number in numbers]
    assert scores == sorted(scores, reverse=True) and len(set(numbers)) == len(numbers) <= 16
    assert all(value > (0.9 if tag == "counting" else 0.3) for value in scores)
    if most < 1:
        pairs = [(a, b) for a in numbers for b in numbers if a < b]
        assert all(geneval.overlap(found[a], found[b]) < most for a, b in pairs)
    more_wanted = geneval.kept(found, "counting", 1.0)
    assert set(more_wanted) <= set(geneval.kept(found, "position", 1.0))


@settings(max_examples=50, deadline=None)
@given(st.lists(boxes, max_size=5), st.lists(boxes, max_size=5), st.sampled_from(geneval.RELATIONS))
def test_position_is_what_its_words_say(dogs: Any, cats: Any, relation: str) -> None:
    asked = prompt(
        {
            "tag": "position",
            "prompt": "p",
            "include": [
                {"class": "dog", "count": 1},
                {"class": "cat", "count": 1, "position": [relation, 0]},
            ],
        }
    )
    got = geneval.judge(asked, {"dog": dogs, "cat": cats, "bird": dogs}, unasked)
    assert got.correct == bool(dogs and cats and relation in geneval.relations(cats[0], dogs[0]))
    assert got.correct == (not got.reason)


# -- what is no file of GenEval ------------------------------------------------------------------------------

GOOD = {"tag": "counting", "prompt": "p", "include": [{"class": "dog", "count": 2}]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("{", "line 1: no prompt"),
        ("[1]", "line 1: no prompt"),
        (json.dumps(GOOD) + "\n\nnothing", "line 3: no prompt"),
        (json.dumps(GOOD | {"include": [{"class": "dog"}]}), "lacks 'count'"),
        (json.dumps(GOOD | {"include": [{"class": "dog", "count": 0}]}), "count 0"),
        (json.dumps(GOOD | {"include": [{"class": "a", "count": 1, "position": ["near", 0]}]}), "position"),
        (json.dumps(GOOD | {"include": [{"class": "a", "count": 1, "position": ["above", 0]}]}), "position"),
        (json.dumps({"tag": "x", "include": []}), "lacks 'prompt'"),
    ],
)
def test_what_is_no_prompt_is_refused_in_a_sentence(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=words) as raised:
        geneval.read_prompts(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


ROW = {"filename": "f", "tag": "t", "prompt": "p", "correct": True, "reason": "", "metadata": "{}"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "line 1: no result"),
        (json.dumps(ROW | {"correct": "yes"}), "correct is 'yes'"),
        (json.dumps({"tag": "t", "correct": True}), "lacks 'filename'"),
        (json.dumps(ROW | {"details": "{"}), "no result"),
    ],
)
def test_what_is_no_result_is_refused_in_a_sentence(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(DataError, match=words):
        geneval.read_results(tmp_path / "results.jsonl")
    with pytest.raises(DataError, match="does not exist"):
        geneval.read_results(tmp_path / "other.jsonl")
    with pytest.raises(DataError, match="no results"):
        geneval.score([])
