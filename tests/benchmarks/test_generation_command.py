"""`python -m unimrg.benchmarks.generation`, with tiny models, from drawing to the stored evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.families import processor, shared_model
from tests.tiny_judges import make_blip, make_clip, make_mask2former
from unimrg.benchmarks.evaluation import Evaluation
from unimrg.benchmarks.generation.__main__ import main
from unimrg.storage import Store


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    shared_model("openuni").save_pretrained(folder)
    processor("openuni").tokenizer.save_pretrained(folder)
    return str(folder)


def test_geneval_from_prompts_to_a_result(
    model: str, evaluation_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = (evaluation_dir / "geneval" / "evaluation_metadata.jsonl").read_text().splitlines()
    prompts.write_text("\n".join(lines[::200]))
    out = tmp_path / "geneval"
    draw = ["draw", "geneval", str(out), "--prompts", str(prompts), "--checkpoint", model]
    draw += ["--count", "2", "--iterations", "2", "--device", "cpu"]
    assert main(draw) == 0 and "drew 6 pictures of 3 prompts" in capsys.readouterr().out
    assert main(draw) == 0 and "drew 0 pictures" in capsys.readouterr().out
    eyes = ["--detector", str(make_mask2former(tmp_path / "detector"))]
    eyes += ["--clip", str(make_clip(tmp_path / "clip"))]
    assert main(["score", "geneval", str(out), *eyes]) == 0
    stored = Evaluation.read(Store.at(str(out))).results[0]
    assert stored.counts["pictures"] == 6 and stored.counts["prompts without pictures"] == 0
    said = capsys.readouterr().out
    assert "GenEval overall: " in said and "  single_object: " in said
    assert main(["score", "geneval", str(out / "results.jsonl")]) == 0
    assert Evaluation.read(Store.at(str(out))).results[0].scores == stored.scores
    assert main(["score", "geneval", str(out)]) == 2
    assert "--detector and --clip" in capsys.readouterr().err


def test_dpg_from_prompts_to_a_result(
    model: str, evaluation_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"7.txt": "a prompt", "whoops5.txt": "another"}))
    questions = ["--questions", str(evaluation_dir / "dpg_bench" / "dpg_mini.csv")]
    out = tmp_path / "dpg"
    draw = ["draw", "dpg", str(out), "--prompts", str(prompts), "--checkpoint", model, "--iterations", "2"]
    assert main(draw) == 0 and "drew 8 pictures of 2 prompts" in capsys.readouterr().out
    for judge in (str(make_blip(tmp_path / "blip")), model):
        assert main(["score", "dpg", str(out), *questions, "--judge", judge]) == 0
        stored = Evaluation.read(Store.at(str(out))).results[0]
        assert (stored.counts["pictures"], stored.counts["items without pictures"]) == (8, 5)
        assert main(["score", "dpg", str(out / "answers.json"), *questions]) == 0
        assert Evaluation.read(Store.at(str(out))).results[0].scores == stored.scores
    assert main(["score", "dpg", str(out), *questions]) == 2
    assert main(["score", "dpg", str(out)]) == 2
    said = capsys.readouterr().err
    assert "--judge" in said and "--questions" in said and len(said.splitlines()) == 2


def test_answers_of_others_are_scored(
    evaluation_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, answers = evaluation_dir / "dpg_bench", tmp_path / "answers.json"
    answers.write_bytes((folder / "answers.json").read_bytes())
    command = ["score", "dpg", str(answers), "--questions", str(folder / "dpg_mini.csv")]
    assert main([*command, "--rows", "official", "--layout", "grid"]) == 0
    assert "DPG-Bench overall: 35.59 percent" in capsys.readouterr().out
    assert main(command) == 0
    assert "DPG-Bench overall: 40.71 percent" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        ["draw", "geneval", "x", "--prompts", "nowhere.jsonl", "--checkpoint", "nowhere"],
        ["draw", "dpg", "x", "--prompts", "nowhere.json", "--checkpoint", "nowhere"],
        ["draw", "dpg", "x", "--prompts", "nowhere.json", "--checkpoint", "nowhere", "--count", "0"],
        ["score", "geneval", "nowhere.jsonl"],
        ["score", "dpg", "nowhere.json", "--questions", "nowhere.csv"],
    ],
)
def test_what_is_missing_costs_one_sentence(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and len(said.splitlines()) == 1
