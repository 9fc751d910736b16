"""DPG-Bench against what the official scripts make of stored answers, and its files, judges and rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.families import SIDE, processor, shared_model
from tests.tiny_judges import WORDS, make_blip, make_clip
from unimrg.benchmarks.generation import dpg, dpg_files
from unimrg.benchmarks.generation.dpg import Answers, Question
from unimrg.benchmarks.generation.judges import BlipJudge, FamilyJudge, first_word
from unimrg.errors import CheckpointError, DataError
from unimrg.families.base import DrawOptions
from unimrg.storage import S3Config

HEAD = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language"
)
CASES = [
    ("grid_ella", "official", "grid"),
    ("single_files_reca", "official", "separate"),
    ("single_files_all_rows", "all", "separate"),
]


@pytest.fixture(scope="module")
def folder(evaluation_dir: Path) -> Path:
    return evaluation_dir / "dpg_bench"


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    return dpg_files.read_answers(folder / "answers.json")


# -- against the official scripts ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rows", "layout"), CASES)
def test_scores_agree(folder: Path, answers: Answers, name: str, rows: str, layout: str) -> None:
    want = json.loads((folder / "expected.json").read_text())[name]
    got = dpg.score(dpg.read_questions(folder / "dpg_mini.csv", rows), answers, layout)
    assert got.scores["overall"] == pytest.approx(want["score"], rel=1e-9)
    assert got.groups["broad"] == pytest.approx(want["L1"], rel=1e-9)
    assert got.groups["detailed"] == pytest.approx(want["L2"], rel=1e-9)
    failed = {"grid_ella": 4, "single_files_reca": len(want.get("failed", ())), "single_files_all_rows": 0}
    assert got.counts["pictures whose questions lack a parent"] == failed[name]


@pytest.mark.parametrize(("name", "rows", "layout"), CASES)
def test_every_picture_s_score_agrees(
    folder: Path, answers: Answers, name: str, rows: str, layout: str
) -> None:
    want = json.loads((folder / "expected.json").read_text())[name]
    scores = dpg.picture_scores(dpg.read_questions(folder / "dpg_mini.csv", rows), answers)
    compared = 0
    for item, pictures in scores.items():
        values = [value for value in pictures.values() if value is not None]
        if layout == "grid":
            stored = want["images"].get(f"{item}.png", {"crops": []})
            assert values == pytest.approx(stored["crops"], rel=1e-9)
            assert bool(values) != (f"{item}.png" in want["failed"])
            compared += bool(values)
            continue
        for number, value in pictures.items():
            if value is None:
                assert f"{item}_{number}.png" in want["failed"]
                continue
            stored = want["images"][f"{item}_{number}.png"]
            assert value == pytest.approx(stored["mean"] if isinstance(stored, dict) else stored, rel=1e-9)
            compared += 1
    assert compared == len(want["images"])


# -- rules ---------------------------------------------------------------------------------------------------

parents = st.lists(st.integers(1, 8), max_size=3)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Question], dict[int, str]]:
    """Questions whose parents stand in front of them, and an answer to each."""
    count = draw(st.integers(1, 8))
    questions = [
        Question("a", n, tuple(p for p in draw(parents) if p < n), "entity - whole", "?", "p")
        for n in range(1, count + 1)
    ]
    given_answers = {n: draw(st.sampled_from(["yes", "no", "Yes", "yes."])) for n in range(1, count + 1)}
    return questions, given_answers


@settings(deadline=None)
@given(graphs())
def test_a_question_holds_if_all_above_it_do(case: tuple[list[Question], dict[int, str]]) -> None:
    questions, said = case

    def holds(number: int) -> bool:
        above = next(q.parents for q in questions if q.number == number)
        return said[number] == "yes" and all(holds(parent) for parent in above)

    want = sum(holds(question.number) for question in questions) / len(questions)
    got = dpg.crop_score(questions, said)
    assert got is not None and got == pytest.approx(want) and 0 <= got <= 1
    assert got <= sum(text == "yes" for text in said.values()) / len(said)


@settings(deadline=None)
@given(graphs(), st.data())
def test_a_better_answer_never_costs(
    case: tuple[list[Question], dict[int, str]], data: st.DataObject
) -> None:
    questions, said = case
    number = data.draw(st.sampled_from(sorted(said)))
    before, after = dpg.crop_score(questions, said), dpg.crop_score(questions, said | {number: "yes"})
    assert before is not None and after is not None and after >= before


@settings(deadline=None)
@given(st.permutations(["whoops5", "7", "stanford9", "diffusiondb3"]))
def test_the_order_of_items_doesn_t_matter(order: list[str]) -> None:
    questions = {item: [Question(item, 1, (), "entity - whole", "?", "p")] for item in order}
    said = {item: {0: {1: "yes" if item < "s" else "no"}} for item in order}
    got = dpg.score(questions, said)
    assert got.scores["overall"] == 50 and got.groups["broad"] == {"entity": 50}


def test_answers_that_don_t_belong_or_lack_are_refused(folder: Path, answers: Answers) -> None:
    questions = dpg.read_questions(folder / "dpg_mini.csv")
    with pytest.raises(DataError, match="answers about mars"):
        dpg.score(questions, {"mars": {0: {1: "yes"}}})
    with pytest.raises(DataError, match="picture 2 of 7: question 6 has no answer"):
        dpg.score(questions, {"7": {2: {}}})
    with pytest.raises(DataError, match="no picture"):
        dpg.score(questions, {})
    got = dpg.score(questions, {"7": answers["7"]})
    assert (got.counts["items"], got.counts["items without pictures"]) == (1, 6)


# -- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "lacks the column item_id"),
        ("item_id,text\n1,2", "lacks the column proposition_id"),
        (HEAD, "holds no questions"),
        (
            f"{HEAD}\na,p,,one,0,,,entity - whole (x),q?",
            "line 2: proposition_id and dependency must be numbers",
        ),
        (f"{HEAD}\na,p,,1,,,,entity - whole (x),q?", "must be numbers"),
        (f"{HEAD}\na,p,,1,0,,,entity - whole (x),q?\na,p", "line 3"),
        (f"{HEAD}\na,p,,1,0,,,,q?", "mustn't be empty"),
    ],
)
def test_what_is_no_question_file_is_refused_in_a_sentence(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "dpg.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=words) as raised:
        dpg.read_questions(path)
    assert str(path) in str(raised.value)


def test_prompts_come_as_a_folder_or_as_one_file(tmp_path: Path) -> None:
    texts = tmp_path / "prompts"
    texts.mkdir()
    for item, text in (("b2", "Two dogs.\n"), ("a1", "A cat.")):
        (texts / f"{item}.txt").write_text(text)
    whole = tmp_path / "prompts.json"
    whole.write_text(json.dumps({"b2.txt": "Two dogs.", "a1.txt": "A cat."}))
    want = {"a1": "A cat.", "b2": "Two dogs."}
    assert dpg_files.read_prompts(texts) == dpg_files.read_prompts(whole) == want


@pytest.mark.parametrize(
    ("text", "words"),
    [("[1]", "must map"), ("{", "no JSON"), ("{}", "no prompts"), ('{"a": " "}', "a is empty")],
)
def test_what_holds_no_prompts_is_refused_in_a_sentence(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(DataError, match=words):
        dpg_files.read_prompts(tmp_path / "prompts.json")
    with pytest.raises(DataError, match="does not exist"):
        dpg_files.read_prompts(tmp_path / "none.json")
    with pytest.raises(DataError, match="holds no prompts"):
        (tmp_path / "empty").mkdir()
        dpg_files.read_prompts(tmp_path / "empty")


def test_both_layouts_hold_the_same_pictures(tmp_path: Path) -> None:
    model, using = shared_model("openuni"), processor("openuni")
    prompts, options = {"a1": "a cat", "b_2": "two dogs"}, DrawOptions(iterations=2)
    single, grids = tmp_path / "single", tmp_path / "grids"
    assert dpg_files.draw(model, using, prompts, single, options) == 8
    assert dpg_files.draw(model, using, prompts, single, options) == 0
    assert dpg_files.write_grids(single, grids) == 2
    asked = ["a1", "b_2", "missing"]
    one, other = (
        dict(dpg_files.read(place, asked, layout))
        for place, layout in ((single, "separate"), (grids, "grid"))
    )
    assert list(one) == list(other) == ["a1", "b_2"]
    for item, pictures in one.items():
        assert sorted(pictures) == [0, 1, 2, 3] == sorted(other[item])
        assert all(np.array_equal(picture, other[item][k]) for k, picture in pictures.items())
        assert len({picture.tobytes() for picture in pictures.values()}) == 4
    with pytest.raises(DataError, match="holds no grid pictures"):
        list(dpg_files.read(single, asked, "grid"))
    (single / "a1_3.png").unlink()
    with pytest.raises(DataError, match=r"a1_3.png"):
        dpg_files.write_grids(single, grids)


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}', '{"a": {"x": {}}}', '{"a": {"0": []}}'])
def test_what_holds_no_answers_is_refused_in_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "answers.json").write_text(text)
    with pytest.raises(DataError, match="holds no answers"):
        dpg_files.read_answers(tmp_path / "answers.json")


# -- judges --------------------------------------------------------------------------------------------------

QUESTIONS = {
    "a1": [
        Question("a1", 1, (), "entity - whole", "Is there a cat?", "a cat"),
        Question("a1", 2, (1,), "attribute - color", "Is a red yes?", "a cat"),
    ]
}


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> BlipJudge:
    return BlipJudge(make_blip(tmp_path_factory.mktemp("blip")), torch.device("cpu"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpg")
    model, using = shared_model("openuni"), processor("openuni")
    dpg_files.draw(model, using, {"a1": "a cat"}, folder, DrawOptions(iterations=2))
    return folder


def family_judge() -> FamilyJudge:
    return FamilyJudge(shared_model("harmon"), processor("harmon"), SIDE)


@pytest.mark.parametrize("kind", ["blip", "family"])
def test_a_judge_says_the_same_alone_and_in_a_batch(
    kind: str, blip: BlipJudge, drawn: Path, tmp_path: Path
) -> None:
    judge = blip if kind == "blip" else family_judge()
    said = dpg_files.ask(drawn, QUESTIONS, judge)
    pictures = dict(dpg_files.read(drawn, ["a1"], "separate"))["a1"]
    for number, picture in pictures.items():
        for question in QUESTIONS["a1"]:
            assert [said["a1"][number][question.number]] == judge([picture], [question.text])
    dpg_files.write_answers(tmp_path / "answers.json", said)
    again = dpg_files.read_answers(tmp_path / "answers.json")
    assert again == said
    assert 0 <= dpg.score(QUESTIONS, again).scores["overall"] <= 100


def test_blip_answers_in_its_words_about_what_it_sees(blip: BlipJudge) -> None:
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 256, (6, 20, 30, 3), np.uint8))
    said = blip(pictures, ["IS THERE A RED?"] * 6)
    assert said == blip(pictures, ["is there a red?"] * 6)
    assert {word for text in said for word in text.split()} <= set(WORDS) and any(said)
    assert len(set(said)) > 1


def test_a_judge_that_is_none_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"judge: .* does not exist"):
        BlipJudge.load(str(tmp_path / "nowhere"), S3Config(), torch.device("cpu"))
    with pytest.raises(CheckpointError, match="type 'clip'"):
        BlipJudge.load(str(make_clip(tmp_path)), S3Config(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Yes, there is.", "yes"),
        (" **No**", "no"),
        ("yes", "yes"),
        ("", ""),
        ("I see a yes", "i"),
        ("YES.", "yes"),
    ],
)
def test_the_first_word_is_the_answer(text: str, want: Any) -> None:
    assert first_word(text) == want
