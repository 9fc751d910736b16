"""The Scenes benchmark: its tables, its scores by hand, and blind answers at chance."""

from __future__ import annotations

import base64
import io
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unimrg.benchmarks import scenes as benchmark
from unimrg.benchmarks.scenes import Item, blind, gate, lines, read, right
from unimrg.data.scenes import FAMILIES, Question, Scene, make_scenes
from unimrg.data.scenes.__main__ import main as scenes_command
from unimrg.data.scenes.shortcuts import shortcuts
from unimrg.data.scenes.tables import LETTERS, NAMES, choices, question_rows, tables
from unimrg.errors import DataError


@cache
def scenes() -> tuple[Scene, ...]:
    return tuple(make_scenes(240, seed=6, split="test", size=48))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tables")
    for name, text in tables(scenes()).items():
        (place / name).write_text(text, "utf-8")
    return place


@pytest.fixture(scope="module", params=["yn", "mcq"])
def items(request: pytest.FixtureRequest, folder: Path) -> list[Item]:
    return read(folder / f"{NAMES[request.param]}.tsv")


def asked() -> list[tuple[Scene, Question]]:
    return [(scene, question) for scene in scenes() for question in scene.questions]


# The tables


def test_pandas_reads_the_tables_as_vlmevalkit_does(folder: Path) -> None:
    """Its defaults turn words like "None" into gaps and numbers with gaps into floats: none may be hit."""
    pandas = pytest.importorskip("pandas")
    pictures = {}
    for kind, name in NAMES.items():
        frame = pandas.read_csv(folder / f"{name}.tsv", sep="\t")
        strict = read(folder / f"{name}.tsv")
        assert frame["index"].is_unique and frame["index"].dtype.kind == "i"
        stored = dict(zip(frame["index"].astype(str), frame["image"].astype(str), strict=True))
        for row, item in zip(frame.to_dict("records"), strict, strict=True):
            shown = [row[letter] for letter in LETTERS if isinstance(row[letter], str)]
            assert (row["question"], row["category"]) == (item.text, item.family)
            assert tuple(shown or ("Yes", "No")) == item.options
            assert kind == ("mcq" if shown else "yn")
            picture = stored[str(row["index"])]
            pictures[item.index] = stored[picture] if len(picture) <= 64 else picture
    for index, (scene, _) in enumerate(asked()):
        raw = base64.b64decode(pictures[str(index)])
        assert (np.array(Image.open(io.BytesIO(raw))) == scene.rgb).all()


def test_rows_say_what_the_scenes_say() -> None:
    for (scene, question), (kind, row) in zip(asked(), question_rows(scenes()), strict=True):
        answer = row["answer"].lower() if kind == "yn" else row[row["answer"]]
        assert answer == question.answer
        assert row["question"] == question.text and row["category"] == question.family
        assert row["cue"] == {None: "", True: "misleads", False: "agrees"}[question.conflict]
        assert row["scenes"] == scene.id.rsplit("-", 1)[0]


def test_both_pictures_of_a_pair_show_one_text_and_different_answers(items: list[Item]) -> None:
    pairs: dict[str, list[Item]] = {}
    for item in items:
        pairs.setdefault(item.pair, []).append(item)
    for one, two in pairs.values():
        assert (one.text, one.options, one.scenes) == (two.text, two.options, two.scenes)
        assert one.answer != two.answer


def test_options_are_letters_of_which_each_is_right_as_often(folder: Path) -> None:
    items = read(folder / "Scenes_MCQ.tsv")
    for size in (2, 4):
        places = [item.options.index(item.answer) for item in items if len(item.options) == size]
        counts = np.bincount(places, minlength=size)
        expected = len(places) / size
        assert (np.abs(counts - expected) < 3 * math.sqrt(expected)).all(), counts
    assert {len(item.options) for item in items} == {2, 4}


def test_another_seed_shuffles_the_options_alike_in_both_pictures() -> None:
    many = [question for _, question in asked() if len(question.options) > 2]
    assert any(choices(question, 0) != choices(question, 1) for question in many)
    for question in many:
        assert set(question.answers) <= set(choices(question, 0)) <= set(question.options)


# Shortcuts


def test_shortcuts_are_right_exactly_where_the_cue_doesn_t_mislead() -> None:
    for scene, question in asked():
        left = shortcuts(scene, question)
        name = {"front": "height", "nearer": "height", "larger": "looks", "existence": "presence"}
        if question.family in name:
            said = left[name[question.family]]
            assert len(said) == 2 or (said == (question.answer,)) != question.conflict


def test_naming_any_visible_colour_beats_chance_and_not_the_truth(folder: Path) -> None:
    items = [item for item in read(folder / "Scenes_MCQ.tsv") if item.family == "colour"]
    assert all(item.answer in item.shortcuts["presence"] for item in items)
    (line, _) = lines(items, [True] * len(items))
    assert 0.3 < line.references["presence"] < 0.8


# Scores


def made(family: str, pair: int, answer: str, cue: bool | None = None, **shortcut: str) -> Item:
    left = {name: (said,) for name, said in shortcut.items()}
    return Item(f"{pair}{answer}", "?", answer, ("Yes", "No"), family, f"p{pair}", f"s{pair}", cue, left)


def test_scores_by_hand() -> None:
    items = [
        made("front", 0, "Yes", cue=True, height="No"),
        made("front", 0, "No", cue=False, height="No"),
        made("front", 1, "Yes", cue=False, height="Yes"),
        made("front", 1, "No", cue=True, height="Yes"),
        made("side", 2, "Yes"),
        made("side", 2, "No"),
    ]
    front, side, every = lines(items, [True, True, False, True, True, False])
    assert (front.count, side.count, every.count) == (4, 2, 6)
    assert front.accuracy == 0.75 and front.pairs == 0.5 and front.pair_chance == 0.25
    assert (front.agrees, front.misleads, front.balanced) == (0.5, 1.0, 0.75)
    assert front.references == {"height": 0.5} and front.against == {"height": 1.0}
    assert front.best_reference == 0.5 and side.best_reference == 0.5
    assert math.isnan(side.misleads) and side.balanced == side.accuracy == 0.5 and side.pairs == 0
    assert every.pairs == pytest.approx(1 / 3) and every.references["height"] == 0.5
    # Each pair of scenes is drawn whole: with one pair there is nothing to vary.
    assert (side.interval.low, side.interval.high) == (0.5, 0.5)
    assert front.interval.low == 0.5 and front.interval.high == 1.0


def test_always_yes_is_at_chance_and_never_right_twice(folder: Path) -> None:
    items = read(folder / "Scenes_YN.tsv")
    for line in lines(items, right(items, {item.index: "yes." for item in items})):
        assert line.accuracy == 0.5 and line.pairs == 0


def test_answers_are_marked_by_letter_or_text_and_strictly(folder: Path) -> None:
    items = read(folder / "Scenes_MCQ.tsv")[:40]
    letters = {item.index: LETTERS[item.options.index(item.answer)] for item in items}
    assert all(right(items, letters)) and all(right(items, {item.index: item.answer for item in items}))
    assert not any(right(items, {index: f"I think {letter}" for index, letter in letters.items()}))
    assert not any(right(items, {}))


# Blind answers


@pytest.mark.parametrize("name", ["majority", "longest option", "first option", "bag of words"])
def test_blind_answers_are_at_chance(items: list[Item], name: str) -> None:
    assert gate(items, blind(items)[name]) == []


def test_the_gate_sees_a_text_that_tells_and_a_model_that_sees(items: list[Item]) -> None:
    told = [made("side", k, "Yes" if k % 3 else "No") for k in range(300)]
    assert gate(told, blind(told)["majority"])
    assert len(gate(items, [item.answer for item in items])) == len({item.family for item in items})


# The commands


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scenes_command(["tables", str(tmp_path), "--pairs", "12", "--size", "32"]) == 0
    answers = tmp_path / "answers.tsv"
    names = set()
    for kind in NAMES.values():
        path = tmp_path / f"{kind}.tsv"
        items = read(path)
        answers.write_text(
            "index\tprediction\n" + "".join(f"{item.index}\t{item.answer}\n" for item in items)
        )
        capsys.readouterr()
        benchmark.main([str(path), str(answers)])
        printed = capsys.readouterr().out
        found = [line.split()[0] for line in printed.splitlines() if "is not at chance" not in line]
        assert found[0] == "family" and found[-1] == "all"
        assert printed.splitlines()[len(found) - 1].split()[4:] != []
        names |= set(found)
    assert set(FAMILIES) <= names
    assert benchmark.main([str(tmp_path / "none.tsv")]) == 2
    assert "can't be read" in capsys.readouterr().err


def test_a_table_without_our_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.tsv"
    path.write_text("index\timage\tquestion\tanswer\n0\tx\tIs it?\tYes\n")
    with pytest.raises(DataError, match="no column"):
        read(path)
