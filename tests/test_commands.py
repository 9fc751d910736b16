"""`generate` and `export` run on a tiny checkpoint; errors are one line, with exit status 2."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.published import PUBLISHED
from tests.s3 import S3Server
from unimrg import export, generate
from unimrg.compose import run_command
from unimrg.config import FAMILIES, ExportConfig, FamilyConfig, GenerateConfig
from unimrg.errors import CheckpointError
from unimrg.families import family_of, load_family
from unimrg.storage import S3Config, Store

ROOT = Path(__file__).resolve().parent.parent
COMMANDS: dict[str, tuple[Callable[..., None], type]] = {
    "generate": (generate.main, GenerateConfig),
    "export": (export.main, ExportConfig),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model in `model` and a landscape picture, `photo.jpg`."""
    folder = tmp_path_factory.mktemp("work")
    model, tokenizer = load_family("harmon").build(FamilyConfig(), seed=0)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    return folder


def run(name: str, *words: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command in this process."""
    main, schema = COMMANDS[name]
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = run_command(main, name, schema, "", (), words)
    return status, out.getvalue(), err.getvalue()


def draw(work: Path, out: Path, *words: str) -> np.ndarray:
    status, said, err = run(
        "generate",
        f"checkpoint={work / 'model'}",
        f"image={work / 'photo.jpg'}",
        f"out={out}",
        "iterations=2",
        "task=depth",
        *words,
    )
    assert (status, said) == (0, f"{out}\n"), err
    return np.array(Image.open(out))


def test_a_drawing_has_the_proportions_of_the_picture(work: Path, tmp_path: Path) -> None:
    drawing = draw(work, tmp_path / "new" / "depth.png")
    assert drawing.shape == (38, 64, 3) and drawing.dtype == np.uint8
    again = draw(work, tmp_path / "again.png")
    other = draw(work, tmp_path / "other.png", "seed=1")
    assert np.array_equal(drawing, again) and not np.array_equal(drawing, other)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (7, 7), (1, 400), (400, 1)])
def test_the_padding_is_cut_away(shape: tuple[int, int]) -> None:
    """A drawing that is red where the picture is and green where the padding is comes back red."""
    from unimrg.data.geometry import pad_square

    red = np.zeros((*shape, 3), np.uint8)
    red[..., 0] = 255
    square, (left, top, right, bottom) = pad_square(red, 64)
    drawn = np.zeros_like(square)
    drawn[..., 1] = 255
    drawn[top:bottom, left:right] = (255, 0, 0)
    out = generate.unsquare(drawn, (left, top, right, bottom), shape)
    assert (out == (255, 0, 0)).all() and max(out.shape) == 64
    assert out.shape[0] == max(1, round(64 * shape[0] / max(shape)))


def test_a_question_is_answered_with_and_without_a_picture(work: Path) -> None:
    words = [f"checkpoint={work / 'model'}", "question=What, exactly, is (in) it?", "max_new_tokens=3"]
    status, said, err = run("generate", *words, f"image={work / 'photo.jpg'}")
    assert status == 0 and said.count("\n") >= 1, err
    assert run("generate", *words)[0] == 0


def test_no_family_is_forgotten() -> None:
    assert PUBLISHED.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_export_there_and_back_is_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, published, back = (tmp_path / part for part in ("model", "published", "back"))
    fresh, tokenizer = load_family(name).build(FamilyConfig(name), seed=0)
    fresh.save_pretrained(model)
    tokenizer.save_pretrained(model)
    assert run("export", f"checkpoint={model}", f"out={published}") == (0, f"{published}\n", "")
    assert all((published / part).exists() for part in PUBLISHED[name].values())
    parts = [f"{knob}={published / part}" for knob, part in PUBLISHED[name].items()]
    words = ["layout=pretrained", f"family={name}", "variant=tiny", *parts, f"out={back}"]
    status, _, err = run("export", *words)
    assert status == 0, err
    files = sorted(path.name for path in model.iterdir())
    assert sorted(path.name for path in back.iterdir()) == files
    for file in set(files) - {"config.json"}:  # may tell what the weights were made with
        assert (back / file).read_bytes() == (model / file).read_bytes(), file
    assert family_of(back) == name
    assert run("export", f"checkpoint={model}", f"out={published}", "overwrite=true")[0] == 0


def test_export_doesn_t_overwrite(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.safetensors").write_text("x")
    words = ("export", f"checkpoint={work / 'model'}", f"out={out}")
    status, _, err = run(*words)
    assert status == 2 and "isn't empty" in err and (out / "stale.safetensors").exists()
    (out / "thesis.tex").write_text("years of work")
    status, _, err = run(*words, "overwrite=true")
    assert status == 2 and "holds thesis.tex" in err and (out / "stale.safetensors").exists()
    (out / "thesis.tex").unlink()
    (out / "other").mkdir()
    (out / "other" / "model.safetensors").write_text("another model")
    status, _, err = run(*words, "overwrite=true")
    assert status == 2 and "holds other/model.safetensors" in err and (out / "stale.safetensors").exists()
    shutil.rmtree(out / "other")
    assert run(*words, "overwrite=true")[0] == 0
    assert not (out / "stale.safetensors").exists() and (out / "harmon.safetensors").exists()


def test_a_failed_export_leaves_what_was_there(work: Path, tmp_path: Path) -> None:
    (tmp_path / "old.safetensors").write_text("x")
    status, _, err = run("export", "checkpoint=/no/such", f"out={tmp_path}", "overwrite=true")
    assert status == 2 and "/no/such" in err
    assert [p.name for p in tmp_path.iterdir()] == ["old.safetensors"]


def test_everything_may_lie_in_a_bucket(work: Path, s3_server: S3Server) -> None:
    url = f"s3://{s3_server.bucket}/commands"
    keys = {key: getattr(s3_server, key) for key in ("endpoint", "access_key", "secret_key")}
    store = Store.at(url, S3Config(**keys))
    store.upload(work / "model", "model")
    store.write_bytes("photo.jpg", (work / "photo.jpg").read_bytes())
    s3 = [f"s3.{key}={value}" for key, value in keys.items()]
    words = (f"checkpoint={url}/model", f"image={url}/photo.jpg", f"out={url}/pixel.png", "iterations=1")
    assert run("generate", *words, "task=pixel", *s3)[0] == 0
    assert Image.open(io.BytesIO(store.read_bytes("pixel.png"))).size == (64, 38)
    assert run("export", f"checkpoint={url}/model", f"out={url}/published", *s3)[0] == 0
    parts = (f"weights={url}/published/harmon.safetensors", f"vae_weights={url}/published/vae.safetensors")
    status, _, err = run("export", "layout=pretrained", "variant=tiny", *parts, f"out={url}/back", *s3)
    assert status == 0, err
    assert store.read_bytes("back/model.safetensors") == (work / "model" / "model.safetensors").read_bytes()


def test_what_can_t_be_used_is_one_sentence(work: Path, tmp_path: Path) -> None:
    model, photo = f"checkpoint={work / 'model'}", f"image={work / 'photo.jpg'}"
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    empty = tmp_path / "empty"
    empty.mkdir()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text(json.dumps({"model_type": "llama"}))
    bare = tmp_path / "bare"
    shutil.copytree(work / "model", bare)
    (bare / "tokenizer.json").unlink()
    refused = {
        ("generate", model, photo): "task, question: neither is given",
        ("generate", model, "image=/no/such.jpg", "task=depth"): "image: /no/such.jpg does not exist",
        ("generate", model, f"image={text}", "task=depth"): "not-an-image",
        ("generate", model, f"image={tmp_path}", "task=depth"): "can't read",
        ("generate", "checkpoint=/no/such", photo, "task=depth"): "checkpoint: /no/such does not exist",
        ("generate", f"checkpoint={empty}", photo, "task=depth"): "no readable config.json",
        ("generate", f"checkpoint={foreign}", photo, "task=depth"): "model_type 'llama' is none of",
        ("generate", f"checkpoint={bare}", photo, "task=depth"): "tokenizer.json",
        ("generate", model, photo, "task=depth", "device=quantum"): "device: 'quantum' is unknown",
        ("generate", model, photo, "task=depth", "device=cuda:99"): "there is no cuda:99 here",
        ("export", model): "out is empty",
        ("export", model, f"out={text}"): "a file stands where",
        (
            "export",
            "layout=pretrained",
            "weights=/no/a",
            "vae_weights=/no/b",
            "out=x",
        ): "weights: /no/a does not exist",
    }
    for words, said in refused.items():
        status, out, err = run(*words)
        assert (status, out) == (2, "") and err.startswith("error: "), (words, err)
        assert said in err and err.count("\n") == 1, (words, err)


def test_the_family_is_read_from_the_folder(work: Path, tmp_path: Path) -> None:
    assert family_of(work / "model") == "harmon"
    for content in ("[]", "{}", "{", '"harmon_unimrg"'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match="no readable config"):
            family_of(tmp_path)


@pytest.mark.parametrize(
    ("words", "status", "out", "err"),
    [
        (["generate", "--help"], 0, "examples:", ""),
        (["export", "-h"], 0, "layout=published", ""),
        (["generate", "task=paint"], 2, "", "error: task: unknown value 'paint'; choose from"),
        (["export", "checkpoint"], 2, "", "error: 'checkpoint' has no value; write checkpoint="),
    ],
)
def test_as_processes(words: list[str], status: int, out: str, err: str, tmp_path: Path) -> None:
    """From another folder, as an installed package would be used."""
    done = subprocess.run(
        [sys.executable, "-m", f"unimrg.{words[0]}", *words[1:]],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status and out in done.stdout, done.stderr
    assert err in done.stderr if err else not done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []
    if status == 0:
        assert f"usage: python -m unimrg.{words[0]} " in done.stdout
