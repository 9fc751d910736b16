"""The adapters for VLMEvalKit and lmms-eval, by messages of the documented form: the model's own answers.

The harnesses can't be installed here; where a base class of theirs is needed, one with the documented methods
stands in for it.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.test_architecture import ROOT
from unimrg.adapters import lmms_eval, vlmevalkit
from unimrg.config import FamilyConfig
from unimrg.data.geometry import pad_square
from unimrg.errors import CheckpointError, DataError
from unimrg.families import load_family

QUESTIONS = ("Is the cube red?", "What is left of the sphere?", "How many cones are there?")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and three pictures of different shapes."""
    folder = tmp_path_factory.mktemp("adapters")
    model, tokenizer = load_family("harmon").build(FamilyConfig(), seed=1)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for n in range(3):
        pixels = np.random.default_rng(n).integers(0, 256, (40 + 9 * n, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    return folder


@pytest.fixture(scope="module")
def kit(work: Path) -> Any:
    return vlmevalkit.Unimrg(str(work / "model"), device="cpu", max_new_tokens=8)


@pytest.fixture(scope="module")
def expected(work: Path, kit: Any) -> list[str]:
    """`Family.answer`, one question at a time."""
    model, processor, side = kit.asked.model, kit.asked.processor, kit.asked.side
    squares = [pad_square(np.asarray(Image.open(work / f"{n}.png")), side)[0] for n in range(3)]
    found = [
        model.answer(processor, [square], [question], 8)[0]
        for square, question in zip(squares, QUESTIONS, strict=True)
    ]
    assert len(set(found)) == 3  # pictures and questions matter
    return found


# -- VLMEvalKit ----------------------------------------------------------------------------------------------


def text(words: str) -> dict[str, str]:
    return {"type": "text", "value": words}


def image(path: Path) -> dict[str, str]:
    return {"type": "image", "value": str(path)}


def test_vlmevalkit_gets_the_model_s_answers(work: Path, kit: Any, expected: list[str]) -> None:
    for n, question in enumerate(QUESTIONS):
        assert kit.generate_inner([image(work / f"{n}.png"), text(question)], dataset="MMVP") == expected[n]
    assert kit.use_custom_prompt("MMBench_DEV_EN") is False


def test_only_the_first_picture_counts_and_texts_are_lines(work: Path, kit: Any, expected: list[str]) -> None:
    several = [text("Is the cube"), image(work / "0.png"), text("red?"), image(work / "1.png")]
    one = [image(work / "0.png"), text("Is the cube\nred?")]
    assert kit.generate_inner(several) == kit.generate_inner(one)
    assert (
        kit.generate_inner([image(work / "0.png"), image(work / "1.png"), text(QUESTIONS[0])]) == expected[0]
    )
    assert isinstance(kit.generate_inner([text("Is the cube red?")]), str)


def test_what_can_t_be_asked_costs_a_sentence(work: Path, kit: Any, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes((work / "0.png").read_bytes()[:200])
    with pytest.raises(DataError, match=r"cut\.png can't be read as a picture"):
        kit.generate_inner([image(tmp_path / "cut.png"), text("?")])
    with pytest.raises(DataError, match=r"gone\.png can't be read as a picture"):
        kit.generate_inner([image(tmp_path / "gone.png"), text("?")])
    with pytest.raises(DataError, match="a message holds 'video'"):
        kit.generate_inner([{"type": "video", "value": "a.mp4"}, text("?")])
    with pytest.raises(CheckpointError, match="nothing"):
        vlmevalkit.Unimrg(str(tmp_path / "nothing"))


def test_the_base_class_is_theirs_where_it_is_installed(tmp_path: Path) -> None:
    """In a fresh process with packages that have the documented base classes."""
    (tmp_path / "vlmeval" / "vlm").mkdir(parents=True)
    (tmp_path / "vlmeval" / "vlm" / "base.py").write_text(
        "class BaseModel:\n    def generate(self, message, dataset=None):\n"
        "        return self.generate_inner(message, dataset)\n"
    )
    (tmp_path / "lmms_eval" / "api").mkdir(parents=True)
    (tmp_path / "lmms_eval" / "models").mkdir()
    (tmp_path / "lmms_eval" / "api" / "model.py").write_text(
        "import abc\nclass lmms(abc.ABC):\n    is_simple = True\n"
        + "".join(
            f"    @abc.abstractmethod\n    def {name}(self, requests): ...\n"
            for name in ("loglikelihood", "generate_until", "generate_until_multi_round")
        )
    )
    (tmp_path / "lmms_eval" / "models" / "registry_v2.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass ModelManifest:\n"
        "    model_id: str\n    chat_class_path: str\n"
    )
    script = """
import sys
from importlib import import_module
from unimrg.adapters import lmms_eval, vlmevalkit
assert not {"vlmeval", "lmms_eval"} & set(sys.modules)
from vlmeval.vlm.base import BaseModel
assert issubclass(vlmevalkit.Unimrg, BaseModel) and vlmevalkit.Unimrg is vlmevalkit.Unimrg
from lmms_eval.api.model import lmms as base
manifest = lmms_eval.manifest()
module, _, name = manifest.chat_class_path.rpartition(".")
found = getattr(import_module(module), name)
assert issubclass(found, base) and not found.__abstractmethods__ and found.is_simple is False
assert manifest.model_id == "unimrg" and found.__module__ == module
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# -- lmms-eval -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lmms(work: Path) -> Any:
    model = lmms_eval.Unimrg(checkpoint=str(work / "model"), device="cpu", batch_size=2)
    documents = [{"image": Image.open(work / f"{n}.png"), "question": q} for n, q in enumerate(QUESTIONS)]
    model.task_dict = {"mmvp": {"test": documents}}
    return model


def to_messages(document: dict[str, Any]) -> list[dict[str, Any]]:
    picture, words = (
        {"type": "image", "url": document["image"]},
        {"type": "text", "text": document["question"]},
    )
    return [{"role": "user", "content": [picture, words]}]


def request(number: int, tokens: int = 8, context: tuple[str, ...] = ()) -> SimpleNamespace:
    return SimpleNamespace(args=(*context, to_messages, {"max_new_tokens": tokens}, number, "mmvp", "test"))


def test_lmms_eval_gets_the_model_s_answers(lmms: Any, expected: list[str]) -> None:
    """With the arguments that are documented, and with the context before them that the harness sends."""
    assert lmms.generate_until([request(n) for n in range(3)]) == expected
    assert lmms.generate_until([request(n, context=("context",)) for n in (2, 0, 1)]) == [
        expected[n] for n in (2, 0, 1)
    ]


def test_every_request_has_its_own_longest_answer(lmms: Any, expected: list[str]) -> None:
    short, long = lmms.generate_until([request(0, tokens=1), request(0)])
    assert long == expected[0] and short != long and long.startswith(short)


def test_what_lmms_eval_can_t_have_is_told(lmms: Any) -> None:
    with pytest.raises(NotImplementedError, match="without likelihoods"):
        lmms.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one round"):
        lmms.generate_until_multi_round([])
    odd = [{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}]
    asked = SimpleNamespace(args=(lambda _: odd, {}, 0, "mmvp", "test"))
    with pytest.raises(DataError, match="'audio'"):
        lmms.generate_until([asked])


def test_the_entry_point_leads_to_the_manifest() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, name = groups["lmms_eval.models"]["unimrg"].partition(":")
    assert getattr(import_module(module), name) is lmms_eval.manifest
    for adapter in (lmms_eval, vlmevalkit):
        with pytest.raises(AttributeError, match="has no attribute 'Other'"):
            _ = adapter.Other
