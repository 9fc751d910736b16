"""`unimrg.evaluate` without a cluster: scoring answers, pages, errors of one line, and asking itself."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import families
from unimrg import evaluate
from unimrg.benchmarks import scenes
from unimrg.benchmarks.evaluation import FILE, Evaluation
from unimrg.benchmarks.published import CONFIDENCE, published
from unimrg.benchmarks.result import BenchmarkResult
from unimrg.benchmarks.understanding import registry, tsv
from unimrg.benchmarks.understanding.asking import Settings, answered_rows, ask, to_table
from unimrg.benchmarks.understanding.extract import FAILED, MATCHERS
from unimrg.benchmarks.understanding.questions import read_questions
from unimrg.compose import run_command
from unimrg.config import EvaluateConfig
from unimrg.data.scenes import make_scenes
from unimrg.data.scenes.tables import tables
from unimrg.report.results import PAPER, results_page
from unimrg.storage import Store

FIXTURES = Path(__file__).parent / "benchmarks" / "fixtures"
UNDERSTANDING = FIXTURES / "understanding"


def run(*words: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = run_command(evaluate.main, "evaluate", EvaluateConfig, "", (), words)
    return status, out.getvalue(), err.getvalue()


def evaluated(out: Path, *words: str) -> dict[str, BenchmarkResult]:
    status, _, err = run(f"out={out}", *words)
    assert status == 0, err
    return {result.benchmark: result for result in Evaluation.read(Store.at(str(out))).results}


# -- answers that are there already --------------------------------------------------------------------------


def test_a_folder_of_answers_is_scored_whole(tmp_path: Path) -> None:
    results = evaluated(tmp_path, f"predictions={UNDERSTANDING / 'predictions'}")
    official = [benchmark for benchmark in registry.BENCHMARKS if benchmark.md5]
    assert set(results) == {benchmark.name for benchmark in official} | {"CV-Bench"}
    for benchmark in official:
        file = UNDERSTANDING / "predictions" / f"{benchmark.name}.tsv"
        expected = registry.score(benchmark, tsv.read_table(file.read_bytes(), str(file)), str(file))
        assert results[benchmark.name].scores == expected.scores
    page = (tmp_path / "results.html").read_text()
    assert "82.61*" in page and "Published by others" in page


@pytest.mark.parametrize("matcher", MATCHERS)
def test_the_rules_version_is_chosen_and_told(tmp_path: Path, matcher: str) -> None:
    words = (f"predictions={UNDERSTANDING / 'predictions'}", "benchmarks=[mmbench]", f"matcher={matcher}")
    (result,) = evaluated(tmp_path, *words).values()
    expected = json.loads((UNDERSTANDING / "expected" / "MMBench_DEV_EN.json").read_text())[matcher]
    assert result.scores["circular"] == pytest.approx(expected["scores"][0]["Overall"])
    assert result.protocol["matcher"] == matcher


@pytest.mark.parametrize("name", ["MMVP.tsv", "Harmon_MMVP.tsv", "answers.tsv"])
def test_a_single_file_of_any_name_is_scored(tmp_path: Path, name: str) -> None:
    shutil.copy(UNDERSTANDING / "predictions" / "MMVP.tsv", tmp_path / name)
    named = ("benchmarks=[MMVP]",) if name == "answers.tsv" else ()
    (result,) = evaluated(tmp_path / "out", f"predictions={tmp_path / name}", *named).values()
    assert result.scores["average"] == 0.75


def test_the_five_have_a_mean_when_all_rows_are_there(tmp_path: Path) -> None:
    """Answers to as many rows as the official files have; half of them right."""
    for name in ("MMBench_DEV_EN", "RealWorldQA", "MMVP", "HallusionBench", "VSR-zeroshot"):
        benchmark = registry.find(name)
        assert benchmark.rows
        rows: list[tsv.Row] = []
        for n in range(benchmark.rows):
            right = "A" if benchmark.is_choice else "Yes"
            said = right if n % 4 < 2 else "?"
            index = f"x_x_x_{n}_{n}_{n}" if name == "HallusionBench" else n
            more: tsv.Row = {"A": "x", "B": "y", "l2-category": "z"}
            rows.append({"index": index, "question": "What?", "answer": right, "prediction": said} | more)
        (tmp_path / f"{name}.tsv").write_bytes(tsv.write_table(rows))
    results = evaluated(tmp_path / "out", f"predictions={tmp_path}")
    assert results["five_benchmarks"].scores["average"] == pytest.approx(50, abs=0.1)
    assert "*" not in re.findall(r"<tbody>(.*?)</tbody>", (tmp_path / "out" / "results.html").read_text())[0]


# -- errors --------------------------------------------------------------------------------------------------


def test_every_mistake_costs_one_line(tmp_path: Path) -> None:
    answers, data = UNDERSTANDING / "predictions", UNDERSTANDING / "tsv"
    (tmp_path / "empty").mkdir()
    (tmp_path / "MMVP.tsv").write_bytes(b"")
    (tmp_path / "twice").mkdir()
    for name in ("a_MMVP.tsv", "b_MMVP.tsv"):
        shutil.copy(answers / "MMVP.tsv", tmp_path / "twice" / name)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / FILE).write_text("{")
    model = f"checkpoint={tmp_path / 'empty'}"
    mistakes = {
        (): "none given",
        (f"predictions={answers}", model): "checkpoint and predictions given",
        (model,): "data is empty",
        (f"predictions={answers}", "drawings=test.json"): "drawings needs a model that draws",
        (model, "drawings=test.json", "pictures=1"): "pictures",
        (model, "drawings=test.json", "teachers.depth.name=oracl"): "did you mean 'oracle'?",
        (model, "drawings=test.json"): "holds no readable config.json",
        (f"predictions={answers}", "benchmarks=[MMVPP]"): "unknown benchmark 'MMVPP'; did you mean 'MMVP'?",
        (f"predictions={answers}", "matcher=newest"): "matcher: unknown value 'newest'",
        (f"predictions={tmp_path / 'nowhere'}",): "does not exist; check the path",
        (f"predictions={tmp_path / 'empty'}",): "holds no answers",
        (f"predictions={tmp_path / 'MMVP.tsv'}",): "holds no rows",
        (f"predictions={tmp_path / 'twice'}",): "are all of MMVP; name one file",
        (f"predictions={UNDERSTANDING / 'README.md'}",): "add benchmarks=[NAME]",
        (f"predictions={data / 'MMVP.tsv'}",): "has no column 'prediction'",
        (f"predictions={tmp_path / 'twice'}", "benchmarks=[BLINK]"): "holds no answers named BLINK.tsv",
        (f"page=[{tmp_path / 'empty'}]",): f"holds no {FILE}",
        (f"page=[{tmp_path / 'damaged'}]",): "is damaged; run its evaluation again",
        (model, f"data={tmp_path / 'empty'}"): "holds no file of a known benchmark",
        (model, f"data={tmp_path}", "benchmarks=[VSR]"): "holds no vsr_zeroshot_dataset_yn_strict.tsv",
        (model, f"data={data}"): "holds no readable config.json",
        (f"checkpoint={tmp_path / 'gone'}", f"data={data}"): "does not exist",
        (f"predictions={answers}", "pool.batch_size=0"): "pool.batch_size",
        (f"predictions={answers}", "part_rows=0"): "part_rows",
    }
    for words, said in mistakes.items():
        status, out, err = run(f"out={tmp_path / 'out'}", *words)
        assert (status, out) == (2, "") and said in err and err.count("\n") == 1, (words, err)
    assert not (tmp_path / "out").exists()


def test_rows_that_don_t_fit_name_the_file(tmp_path: Path) -> None:
    lines = (UNDERSTANDING / "predictions" / "MMVP.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "MMVP.tsv").write_text("".join(lines[:-1]))
    status, _, err = run(f"predictions={tmp_path}", f"out={tmp_path / 'out'}")
    assert status == 2 and f"{tmp_path}/MMVP.tsv: MMVP's questions come in pairs, but there are 11" in err


# -- pages ---------------------------------------------------------------------------------------------------


class _Outline(HTMLParser):
    """Tags that are open, and everything that a page would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.loads += [tag] if tag in ("script", "link", "iframe") else []
        self.loads += [name for name, _ in attributes if name in ("src", "srcset") or name.startswith("on")]
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_several_evaluations_stand_side_by_side_on_a_page_that_loads_nothing(tmp_path: Path) -> None:
    words = [f"predictions={UNDERSTANDING / 'predictions'}"]
    evaluated(tmp_path / "a", *words, "name=the old one")
    evaluated(tmp_path / "b", *words, "name=<b>new</b>", "benchmarks=[MMBench,MMVP]", "matcher=legacy_2024")
    status, said, _ = run(f"page=[{tmp_path / 'a'},{tmp_path / 'b'}]", f"out={tmp_path / 'both'}")
    assert (status, said) == (0, f"{tmp_path}/both/results.html\n")
    page = (tmp_path / "both" / "results.html").read_text()
    outline = _Outline(page)
    assert not outline.open and not outline.loads
    ours = re.findall(r"<tbody>(.*?)</tbody>", page)[0]
    assert ours.count("<tr>") == 2 and "the old one" in ours and "&lt;b&gt;new" in ours
    assert "<b>57.14*</b>" in ours and "42.86*" in ours and "<b>42.86*</b>" not in ours


def test_published_numbers_are_those_that_were_found(evaluation_numbers: set[float]) -> None:
    """Every one of them stands in the collected file, perhaps as a fraction or as the value less the gain."""
    for entry in published():
        assert entry.confidence in CONFIDENCE and entry.source
        for name, value in (entry.scores | entry.gains).items():
            assert any(abs(value - found) < 1e-6 for found in evaluation_numbers), (entry, name)


@pytest.fixture(scope="module")
def evaluation_numbers() -> set[float]:
    text = (FIXTURES / "published" / "scores.json").read_text()
    found = {float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", text)}
    return found | {round(100 * number, 6) for number in found}


def test_published_numbers_have_columns() -> None:
    known = {column.key for column in PAPER} | {benchmark.name for benchmark in registry.BENCHMARKS}
    names = {name for entry in published() for name in entry.scores | entry.gains}
    assert not names - known


def test_a_result_of_any_benchmark_gets_a_column() -> None:
    result = BenchmarkResult("redraw", {"psnr": 21.5}, "psnr", {"psnr": "dB"})
    nothing = BenchmarkResult("VSR-zeroshot", {"acc": float("nan")}, "acc", {"acc": "percent"})
    page = results_page([Evaluation("m", "m", (result, nothing))])
    assert "21.5\u00a0dB" in page and "NaN" not in page


def test_generation_stands_in_the_paper_s_table_and_is_counted_in_its_own_units() -> None:
    score = {"overall": 0.7239}, "overall", {"overall": "fraction"}
    counts = {"pictures": 6636, "prompts": 553}
    whole = BenchmarkResult("GenEval", *score, protocol={"detector": "x"}, counts=counts)
    part = BenchmarkResult(
        "GenEval", *score, protocol={"detector": "x"}, counts={"pictures": 8, "prompts": 2}
    )
    page = results_page([Evaluation("whole", "a", (whole,)), Evaluation("part", "b", (part,))])
    assert "2\u00a0models, 6,644\u00a0drawings." in page and "0\u00a0answers" not in page
    ours = re.findall(r"<tbody>(.*?)</tbody>", page)[0]
    assert ">72.39<" in ours and ">72.39*<" in ours and "Published by others" in page
    assert "553 prompts" in page and "2 of 553 prompts" in page and "pictures: 6,636" in page


# -- Scenes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answered_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers to both tables: always Yes, and the right letter for two families."""
    folder = tmp_path_factory.mktemp("scenes")
    for name, text in tables(make_scenes(60, seed=6, split="test", size=32)).items():
        asked = read_questions(text.encode(), name).questions
        known = {str(q.row["category"]) for q in asked if q.row["category"] in ("colour", "count")}
        said = {
            q.index: q.row["answer"]
            if q.row["category"] in known
            else "Yes"
            if name.endswith("YN.tsv")
            else "A"
            for q in asked
        }
        rows: list[tsv.Row] = [{**q.row, "prediction": said[q.index]} for q in asked]
        (folder / name).write_bytes(tsv.write_table(rows))
    return folder


def test_scenes_are_scored_by_family_beside_chance(answered_scenes: Path, tmp_path: Path) -> None:
    results = evaluated(tmp_path, f"predictions={answered_scenes}")
    assert set(results) == {"Scenes_YN", "Scenes_MCQ"}
    yes, letters = results["Scenes_YN"], results["Scenes_MCQ"]
    assert (yes.scores["accuracy"], yes.scores["pairs"], yes.scores["chance"]) == (0.5, 0.0, 0.5)
    assert yes.headline == "accuracy" and yes.scores["pair_chance"] == 0.25
    assert letters.groups["accuracy"]["colour"] == letters.groups["pairs"]["colour"] == 1
    assert letters.groups["chance"]["colour"] == 0.25 and letters.groups["accuracy"]["count"] == 1
    page = (tmp_path / "results.html").read_text()
    assert "cue misleads" in page and "the official file" not in page and "colour" in page


def test_scenes_are_scored_as_by_their_own_command(answered_scenes: Path, tmp_path: Path) -> None:
    for name, result in evaluated(tmp_path, f"predictions={answered_scenes}").items():
        text = (answered_scenes / f"{name}.tsv").read_text()
        (tmp_path / "table.tsv").write_text(text)
        items = scenes.read(tmp_path / "table.tsv")
        said = {str(row["index"]): str(row["prediction"]) for row in tsv.read_table(text.encode(), "x.tsv")}
        *families, every = scenes.lines(items, scenes.right(items, said))
        assert result.scores["accuracy"] == every.accuracy
        for line in families:
            for score in ("accuracy", "pairs", "balanced", "misleads"):
                found, expected = result.groups[score][line.family], getattr(line, score)
                assert found == pytest.approx(expected, nan_ok=True)


def test_other_tables_are_no_scenes(answered_scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "Scenes_YN.tsv").write_text(
        (answered_scenes / "Scenes_YN.tsv").read_text().replace("misleads", "leads")
    )
    status, _, err = run(f"predictions={tmp_path}", f"out={tmp_path / 'out'}")
    assert status == 2 and "'leads' is not of the Scenes tables" in err


# -- asking --------------------------------------------------------------------------------------------------


def settings(name: str, tokens: int = 4, instruction: str = "") -> Settings:
    return Settings(name, "model", "questions", instruction, False, tokens, "float32", 64)


def noise(number: int) -> str:
    pixels = np.random.default_rng(number).integers(0, 256, (12 + number % 9, 20, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def questions(count: int = 33) -> bytes:
    """Of different lengths; every eighth picture is damaged."""
    rows: list[tsv.Row] = []
    for n in range(count):
        image = noise(n) if n % 8 != 3 else base64.b64encode(base64.b64decode(noise(n))[:100]).decode()
        words = " ".join(["red", "cube", "left"] * (1 + n % 5))
        rows.append({"index": n, "image": image, "question": f"Is the {words}?", "answer": "Yes"})
    return tsv.write_table(rows)


@pytest.mark.parametrize("name", families.NAMES)
def test_the_batch_size_changes_no_answer(name: str) -> None:
    model, processor = families.shared_model(name), families.processor(name)
    asked = read_questions(questions(), "x.tsv").questions
    here = Store.at(".")
    replies = {
        batch: ask(model, processor, families.SIDE, asked, settings("VSR-zeroshot"), here, batch)
        for batch in (1, 7, 32)
    }
    assert replies[1] == replies[7] == replies[32]
    errors = [n for n, reply in enumerate(replies[1]) if reply.error]
    assert errors == [3, 11, 19, 27] and {replies[1][n].error for n in errors} == {"corrupt-image"}
    assert len({reply.answer for reply in replies[1]}) > 4  # answers depend on what is asked


class _Echo:
    """A model that repeats what it is asked."""

    def answer(self, processor: object, pictures: list, texts: list, tokens: int) -> list[str]:
        assert all(picture.shape == (16, 16, 3) for picture in pictures)
        return list(texts)


def test_an_instruction_follows_multiple_choice_alone() -> None:
    raw = (UNDERSTANDING / "tsv" / "MMVP.tsv").read_bytes()
    asked = read_questions(raw, "MMVP.tsv").questions[:1]
    for name, ending in (("MMVP", "options above. \nOnly the letter."), ("VSR-zeroshot", "open or closed?")):
        (reply,) = ask(
            _Echo(), None, 16, asked, settings(name, instruction="Only the letter."), Store.at("."), 4
        )
        assert reply.answer is not None and reply.answer.endswith(ending)


def test_answers_depend_on_all_that_is_set(tmp_path: Path) -> None:
    base = settings("MMVP")
    folders = {base.folder, settings("MMVP", tokens=7).folder, settings("MMVP", instruction="x").folder}
    for change in ("checkpoint", "questions", "dtype"):
        folders.add(Settings(**{**base.__dict__, change: "other"}).folder)
    assert len(folders) == 6


def test_stored_answers_are_written_as_the_official_tool_writes_them(tmp_path: Path) -> None:
    asked = read_questions(questions(8), "x.tsv").questions
    replies = ask(_Echo(), None, 16, asked, settings("VSR-zeroshot"), Store.at("."), 3)
    parts = settings("VSR-zeroshot").parts(Store.at(str(tmp_path)))
    for number in (1, 0):
        parts.write(number, to_table(4 * number, replies[4 * number : 4 * number + 4]))
    rows = answered_rows(asked, parts)
    assert [row["prediction"] for row in rows] == [
        FAILED if n == 3 else f"{question.row['question']}" for n, question in enumerate(asked)
    ]
    again = tsv.read_table(tsv.write_table(rows), "x.tsv")
    assert again == rows and "image" not in again[0]
    assert registry.score(registry.find("VSR"), again, "x.tsv").counts["unanswered: corrupt-image"] == 1
