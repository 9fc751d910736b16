"""What must hold of reading and marking whatever a file or a model says; and files that are broken."""

from __future__ import annotations

import base64
import csv
import io
import json
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unimrg.benchmarks.understanding import extract, prompts, registry, tsv, yes_no
from unimrg.benchmarks.understanding.questions import decode_picture, read_questions
from unimrg.errors import ConfigError, DataError, MissingExtraError, SampleError
from unimrg.storage import Store

# A busy machine is no fault.
unhurried = settings(deadline=None)

WORDS = [*"ABCZa.,(*", "yes", "no", "No", "answer is", "not", "1,000", "\n", " "]
ANSWERS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(WORDS), max_size=12).map("".join))
TEXTS = st.text(string.ascii_letters + "0 ", min_size=1, max_size=8)
OPTIONS = st.lists(TEXTS, min_size=1, max_size=6).map(
    lambda texts: dict(zip(string.ascii_uppercase, texts, strict=False))
)
MATCHERS = st.sampled_from(list(extract.MATCHERS.values()))


# -- extraction ----------------------------------------------------------------------------------------------


@unhurried
@given(ANSWERS, OPTIONS, MATCHERS)
def test_whatever_a_model_says_names_an_option_or_none(
    answer: str, options: dict[str, str], matcher: extract.Matcher
) -> None:
    assert extract.find_option(answer, options, matcher) in {*options, extract.NOT_FOUND, None}
    assert extract.yes_or_no(answer) in ("Yes", "No", extract.UNKNOWN)
    assert yes_no.pope_says(answer) in ("Yes", "No")


@unhurried
@given(OPTIONS, MATCHERS, st.data())
def test_a_bare_letter_is_understood_in_any_dress(
    options: dict[str, str], matcher: extract.Matcher, data: st.DataObject
) -> None:
    letter = data.draw(st.sampled_from(sorted(options)))
    dress = data.draw(st.sampled_from(["{}", "{}.", "({})", "**{}**", " {}\n", "Answer: {}", "[{}]!"]))
    assert extract.find_option(dress.format(letter), options, matcher) == letter


@unhurried
@given(ANSWERS, OPTIONS)
def test_what_the_paper_s_rule_reads_by_letter_the_older_and_the_newer_read_alike(
    answer: str, options: dict[str, str]
) -> None:
    older, paper, newer = (extract.MATCHERS[n] for n in ("legacy_2024", "paper_era_2025_08", "head_2026_06"))
    said = extract.find_letter(answer, options, paper)
    if said is not None:
        assert extract.find_letter(answer, options, older) == said
        assert extract.find_letter(answer, options, newer) == said
    text = extract.find_text(answer, options, paper)
    if text is not None:
        assert extract.find_text(answer, options, older) == text


@unhurried
@given(ANSWERS, OPTIONS, MATCHERS)
def test_letters_don_t_depend_on_the_order_of_the_options(
    answer: str, options: dict[str, str], matcher: extract.Matcher
) -> None:
    turned = dict(reversed(list(options.items())))
    assert extract.find_option(answer, options, matcher) == extract.find_option(answer, turned, matcher)


@unhurried
@given(st.sampled_from(["yes", "no"]), st.text("bdfghjkl \n", max_size=20))
def test_one_word_of_two_decides(word: str, around: str) -> None:
    assert extract.yes_or_no(f"{around} {word} {around}") == word.capitalize()
    assert extract.yes_or_no(f"{around} yes {around} no") == extract.UNKNOWN


# -- tables --------------------------------------------------------------------------------------------------

KINDS = (
    "|NA|None|nan|null|n/a|1|007| 2|3.5|1e3|.5|5.|True|false|TRUE|x|inf|-Inf|+4|1_0|0x10|１|nan |1 2|1e400|e5"
    '|"q|q"q|True |a\tb|99999999999999999|2.50|0.1|-1|-1.#IND|é|a\nb'
)
CELLS = st.sampled_from(KINDS.split("|"))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(CELLS, min_size=2, max_size=2), min_size=1, max_size=6))
def test_tables_are_read_as_pandas_reads_them(cells: list[list[str]]) -> None:
    pandas = pytest.importorskip("pandas")
    raw = written([["index", "a", "b"], *([f"k{n}", *line] for n, line in enumerate(cells))])
    frame = pandas.read_csv(io.BytesIO(raw), sep="\t")
    for name in ("a", "b"):
        expected = [None if pandas.isna(value) else str(value) for value in frame[name]]
        found = [row[name] for row in tsv.read_table(raw, "x.tsv")]
        assert [None if value is None else str(value) for value in found] == expected


@unhurried
@given(st.lists(st.lists(CELLS, min_size=2, max_size=2), min_size=1, max_size=6))
def test_a_strict_reader_changes_nothing(cells: list[list[str]]) -> None:
    raw = written([["a", "b"], *cells, ["end", "end"]])
    rows = tsv.read_table(raw, "x.tsv", strict=True)
    assert [[row["a"] or "", row["b"] or ""] for row in rows] == [*cells, ["end", "end"]]
    assert tsv.read_table(tsv.write_table(rows), "x.tsv", strict=True) == rows


@unhurried
@given(st.lists(st.text(), min_size=1, max_size=4))
def test_whatever_a_model_says_can_be_stored(answers: list[str]) -> None:
    rows: list[tsv.Row] = [{"index": str(n), "prediction": said or None} for n, said in enumerate(answers)]
    assert tsv.read_table(tsv.write_table(rows), "x.tsv", strict=True) == rows


@unhurried
@given(st.binary(max_size=200))
def test_bytes_that_are_no_table_cost_one_sentence(raw: bytes) -> None:
    for name in ("x.tsv", "x.json"):
        try:
            rows = tsv.read_table(raw, name)
        except DataError as error:
            assert name in str(error)
        else:
            assert rows


def written(lines: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(lines)
    return text.getvalue().encode()


def test_the_same_answers_score_the_same_as_tabs_json_and_workbook(evaluation_dir: Path) -> None:
    benchmark = registry.find("MMVP")
    raw = (evaluation_dir / "understanding" / "predictions" / "MMVP.tsv").read_bytes()
    rows = tsv.read_table(raw, "MMVP.tsv")
    expected = registry.score(benchmark, rows, "MMVP.tsv")
    as_json = tsv.read_table(json.dumps(rows).encode(), "MMVP.json")
    assert registry.score(benchmark, as_json, "MMVP.json") == expected
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for line in [list(rows[0]), *(list(row.values()) for row in rows)]:
        book.active.append(line)
    buffer = io.BytesIO()
    book.save(buffer)
    as_book = tsv.read_table(buffer.getvalue(), "MMVP.xlsx")
    assert registry.score(benchmark, as_book, "MMVP.xlsx") == expected


def test_a_workbook_without_openpyxl_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(MissingExtraError, match="pip install openpyxl"):
        tsv.read_table(b"PK", "MMVP.xlsx")


def test_scoring_needs_no_pandas(evaluation_dir: Path) -> None:
    script = f"""
import sys
sys.modules["pandas"] = None
from pathlib import Path
from unimrg.benchmarks.understanding import registry, tsv
raw = Path({str(evaluation_dir)!r}, "understanding/predictions/MMVP.tsv").read_bytes()
print(registry.score(registry.find("mmvp"), tsv.read_table(raw, "MMVP.tsv"), "MMVP.tsv").scores["average"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.75"


# -- questions -----------------------------------------------------------------------------------------------


def png(size: tuple[int, int] = (6, 4), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 200).save(buffer, "PNG")
    return buffer.getvalue()


def noise() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def table(*rows: dict[str, str]) -> bytes:
    return tsv.write_table([dict(row) for row in rows])


def row(index: int | str, image: str = "", **more: str) -> dict[str, str]:
    image = image or base64.b64encode(png()).decode()
    return {
        "index": str(index),
        "image": image,
        "question": "What?",
        "answer": "A",
        "A": "x",
        "B": "y",
    } | more


def test_pictures_are_shared_listed_or_lie_beside_the_file(tmp_path: Path) -> None:
    picture = base64.b64encode(png()).decode()
    found = read_questions(
        table(row(7), row(8, "7"), row(9, repr([picture, picture])), row(10, "nan")), "x.tsv"
    )
    assert [question.index for question in found.questions] == [7, 8, 9]
    assert [len(question.pictures) for question in found.questions] == [1, 1, 2]
    assert found.questions[0].pictures == found.questions[1].pictures
    assert found.without_picture == 1
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png((3, 2)))
    lines = [{"index": "1", "image_path": "pictures/a.png", "question": "What?"}]
    beside = read_questions(tsv.write_table(lines), "x.tsv").questions[0]
    assert decode_picture(beside, 0, Store.at(str(tmp_path))).shape == (2, 3, 3)


def test_transparent_and_indexed_pictures_become_rgb_as_they_are() -> None:
    pixels = np.full((2, 2, 4), (10, 20, 30, 0), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG")
    raw = table(
        row(1, base64.b64encode(buffer.getvalue()).decode()), row(2, base64.b64encode(png(mode="P")).decode())
    )
    seen = [decode_picture(q, 0, Store.at(".")) for q in read_questions(raw, "x.tsv").questions]
    assert seen[0].tolist() == [[[10, 20, 30]] * 2] * 2
    assert seen[1].shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        ("A" * 81, "not-an-image"),  # no base64
        ("QUJD" * 30, "not-an-image"),
        (base64.b64encode(noise()[:3000]).decode(), "corrupt-image"),
    ],
)
def test_pictures_that_can_t_be_decoded_say_why(picture: str, reason: str) -> None:
    question = read_questions(table(row(1, picture)), "x.tsv").questions[0]
    with pytest.raises(SampleError) as caught:
        decode_picture(question, 0, Store.at("."))
    assert caught.value.reason == reason


@pytest.mark.parametrize("path", ["/etc/hostname", "../x.png", "a/../../x.png"])
def test_paths_stay_in_their_folder(path: str, tmp_path: Path) -> None:
    raw = tsv.write_table([{"index": "1", "image_path": path, "question": "What?"}])
    question = read_questions(raw, "x.tsv").questions[0]
    with pytest.raises(SampleError, match="path-outside-folder"):
        decode_picture(question, 0, Store.at(str(tmp_path)))


def test_a_missing_picture_is_a_reason(tmp_path: Path) -> None:
    raw = tsv.write_table([{"index": "1", "image_path": "x.png", "question": "What?"}])
    with pytest.raises(SampleError, match="missing-file"):
        decode_picture(read_questions(raw, "x.tsv").questions[0], 0, Store.at(str(tmp_path)))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "holds no rows"),
        (b"index\tquestion\timage\n", "holds no rows"),
        (b"\xff\xfe\x00", "can't be read"),
        (b"index\tquestion\n1\tWhat?\n", "neither a column 'image'"),
        (b"id\tquestion\n1\tWhat?\n", "no column 'index'"),
        (b"index\tquestion\timage\n1\tWhat?\tx\ty\n", "line 2: 4 cells under 3 columns"),
        (b"index\tindex\n1\t2\n", "'index' is there twice"),
        (b"index\tquestion\timage\n\tWhat?\txyz\n", "row 1 has no index"),
        (table(row(1), row(1)), "index 1 is there twice"),
        (table(row(1, "nan"), row(2, "")).replace(base64.b64encode(png()), b"NA"), "no row has a picture"),
        (table(row(1), row(2, "5")), "row 2 shares the picture of row 5"),
        (table(row(1, "[" + "1" * 80)), "list of pictures that can't be read"),
        (table(row(1, "[" + "1, " * 80 + "1]")), "holds something else"),
    ],
)
def test_a_broken_file_of_questions_costs_one_sentence(raw: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_questions(raw, "data/x.tsv")
    assert "data/x.tsv" in str(caught.value) and "\n" not in str(caught.value)


def answered(*rows: dict[str, str], drop: str = "") -> list[tsv.Row]:
    return [{k: v for k, v in ({"prediction": "A"} | r).items() if k not in ("image", drop)} for r in rows]


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("MMVP", answered(row(1), row(2), drop="prediction"), "no column 'prediction'"),
        ("MMVP", answered(row(1)), "come in pairs"),
        ("MMVP", answered(row(1), row(2, question="Else?")), "are no pair"),
        ("MMBench", answered(row("a")), "indices are integers"),
        ("RealWorldQA", answered(row(1, answer="x")), "a letter of an option is needed"),
        ("VSR", answered(row(1)), "Yes or No is needed"),
        ("HallusionBench", answered(row(1, answer="Yes")), "no column 'l2-category'"),
        ("HallusionBench", answered(row("a_b", answer="Yes", **{"l2-category": "x"})), "no set, figure"),
        ("MMMU", answered(row(1, split="dev")), "'validation'"),
        ("CV-Bench-2D", answered(row(1, prompt="What?", source="")), "no row says its source"),
    ],
)
def test_answers_to_something_else_cost_one_sentence(name: str, rows: list[tsv.Row], words: str) -> None:
    for line in rows:
        line.update({k: None for k, v in line.items() if v == ""})
    with pytest.raises(DataError, match=words) as caught:
        registry.score(registry.find(name), rows, "p.tsv")
    assert "p.tsv" in str(caught.value)


def test_rows_that_couldn_t_be_asked_are_wrong_and_counted() -> None:
    rows = answered(row(1), row(2), row(3, error="corrupt-image"), row(4, error="corrupt-image"))
    for line in rows:
        line.setdefault("error", None)
    result = registry.score(registry.find("MMVP"), rows, "p.tsv")
    assert result.scores == {"average": 0.5, "pairs": 0.5}
    assert result.counts == {"rows": 4, "not extracted": 2, "unanswered: corrupt-image": 2}


# -- names ---------------------------------------------------------------------------------------------------


SPELT = {
    "MMBench": "MMBench_DEV_EN",
    "mmvp": "MMVP",
    "vsr_zeroshot": "VSR-zeroshot",
    "VSR": "VSR-zeroshot",
    "cvbench2d": "CV-Bench-2D",
    "mmmu": "MMMU_DEV_VAL",
    "RWQA": "RealWorldQA",
}


@pytest.mark.parametrize(("name", "found"), SPELT.items())
def test_names_are_found_however_they_are_written(name: str, found: str) -> None:
    assert registry.find(name).name == found


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'HallusionBench'"):
        registry.find("HalucinationBench")
    with pytest.raises(ConfigError, match="choose from"):
        registry.find("qqqq")


def test_a_picture_is_looked_at_once_and_texts_are_lines() -> None:
    picture = base64.b64encode(png()).decode()
    raw = table(row(1, repr([picture, picture]), question="See <image 2> and <image 1> and <image 3>."))
    message = prompts.interleaved(read_questions(raw, "x.tsv").questions[0])
    assert prompts.first_picture(message) == 1
    assert prompts.asked(message).startswith("Question: See \n and \n and <image 3>.\nOptions:")
    assert prompts.first_picture(("only words",)) is None
