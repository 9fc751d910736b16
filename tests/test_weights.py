"""Weights of others: every layout is read without running its code; what can't be used is one sentence."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests import families
from tests.bomb import Bomb
from tests.engine_runs import Group
from tests.published import PUBLISHED
from unimrg.config import FamilyConfig
from unimrg.errors import CheckpointError
from unimrg.families import load_family
from unimrg.families.harmon import build
from unimrg.families.tokenizer import TINY_FOLDER
from unimrg.storage import S3Config
from unimrg.weights import check_fits, load_folder, load_strictly, localized, read_state_dict
from unimrg.zero import find_zero, merge_zero

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.arange(3), "b": torch.ones(1).bfloat16()}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor] = STATE) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def refusal(path: Path) -> str:
    """What is said to an unusable checkpoint: one sentence that names it."""
    with pytest.raises(CheckpointError) as refused:
        read_state_dict(path)
    said = str(refused.value)
    assert str(path) in said and "\n" not in said and len(said) < 600 + len(str(path)), said
    return said


# -- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.pt", "a.bin", "a.ckpt"])
@pytest.mark.parametrize("old", [False, True])
def test_files(tmp_path: Path, name: str, old: bool) -> None:
    if name.endswith(".safetensors"):
        save_file(STATE, tmp_path / name)
    else:
        torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=not old)
    assert_same(read_state_dict(tmp_path / name))
    assert_same(read_state_dict(tmp_path))  # the only file of a folder


@pytest.mark.parametrize(
    "wrapped",
    [
        {"state_dict": STATE, "epoch": 3, "global_step": 5, "pytorch-lightning_version": "2.0.0"},
        {"model": STATE, "optimizer": {"state": {}}},
        {"module": STATE},
        {"state_dict": {"model": STATE}},
        {f"module.{name}": tensor for name, tensor in STATE.items()},
        {"state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in STATE.items()}},
    ],
)
def test_wrappings(tmp_path: Path, wrapped: Any) -> None:
    torch.save(wrapped, tmp_path / "a.pth")
    assert_same(read_state_dict(tmp_path / "a.pth"))


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, {"state_dict": {"a": 1}}, torch.zeros(3)])
def test_what_is_no_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pth")
    assert "is no state dict" in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"\x00" * 64, b"PK\x03\x04", b"\xff" * 7, b"<!DOCTYPE html><html>Not found</html>"],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert "can't be read safely" in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("kept", [0.2, 0.6, 0.99])
def test_truncated_files(tmp_path: Path, name: str, kept: float) -> None:
    path = tmp_path / name
    save_file(STATE, path) if path.suffix == ".safetensors" else torch.save(STATE, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    assert "can't be read safely" in refusal(path)


def test_a_pointer_of_git_lfs_is_told_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    assert "git lfs pull" in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("name", ["weights.pth", "pytorch_model.bin", "step1/mp_rank_00_model_states.pt"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(
    tmp_path: Path, name: str, new_format: bool
) -> None:
    trace, path = tmp_path / "trace", tmp_path / "folder" / name
    path.parent.mkdir(parents=True)
    bomb = {"state_dict": {"a": torch.zeros(1)}, "args": Bomb(trace)}
    if new_format:
        torch.save(bomb, path)
    else:
        path.write_bytes(pickle.dumps(bomb, protocol=2))
    for place in (path, tmp_path / "folder"):
        with pytest.raises(CheckpointError, match="can't be read safely"):
            read_state_dict(place)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace)))  # the bomb is real
    assert trace.exists()


def test_missing_weights(tmp_path: Path) -> None:
    assert "no weights at" in refusal(tmp_path / "no.pth")
    assert "give a file or a folder" in refusal(tmp_path)
    for name in ("one.pth", "two.pth"):
        torch.save(STATE, tmp_path / name)
    assert "it holds one.pth, two.pth: give one of them" in refusal(tmp_path)
    with pytest.raises(CheckpointError, match="no weights at /no/such"):
        build(FamilyConfig(weights="/no/such", vae_weights="/no/vae", tokenizer=str(TINY_FOLDER)), 0)


# -- shards --------------------------------------------------------------------------------------------------


def write_shards(folder: Path, stem: str, ending: str) -> dict[str, str]:
    """Two shards and their index, which is returned."""
    places = {}
    for number, names in enumerate((["a.weight", "b"], ["a.bias"]), 1):
        file = f"{stem}-0000{number}-of-00002{ending}"
        part = {name: STATE[name] for name in names}
        save_file(part, folder / file) if ending == ".safetensors" else torch.save(part, folder / file)
        places |= dict.fromkeys(names, file)
    write_index(folder / f"{stem}{ending}.index.json", places)
    return places


def write_index(path: Path, places: Any) -> None:
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "pytorch_model"])
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_folders(tmp_path: Path, stem: str, ending: str) -> None:
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    whole.mkdir()
    sharded.mkdir()
    path = whole / f"{stem}{ending}"
    save_file(STATE, path) if ending == ".safetensors" else torch.save(STATE, path)
    (whole / "config.json").write_text("{}")
    torch.save({"strange": torch.zeros(1)}, whole / "optimizer.pt")
    write_shards(sharded, stem, ending)
    for place in (whole, sharded, sharded / f"{stem}{ending}.index.json"):
        assert_same(read_state_dict(place))


def test_shards_that_don_t_fit_their_index(tmp_path: Path) -> None:
    places = write_shards(tmp_path, "model", ".safetensors")
    index, second = tmp_path / "model.safetensors.index.json", tmp_path / places["a.bias"]
    (tmp_path / "secret.safetensors").write_bytes(second.read_bytes())
    inside = tmp_path / "inside"
    inside.mkdir()
    refused: dict[str, Any] = {
        "model-00002-of-00002.safetensors lacks a.weight": places | {"a.weight": second.name},
        "model-00001-of-00002.safetensors lacks c": places | {"c": places["b"]},
        "lacks gone.safetensors, 1 of 3 shards": places | {"c": "gone.safetensors"},
        "names '../secret.safetensors', which isn't beside it": places | {"c": "../secret.safetensors"},
        "names '/etc/passwd', which isn't beside it": places | {"c": "/etc/passwd"},
        "names '..', which isn't beside it": places | {"c": ".."},
        "names 3, which isn't beside it": places | {"c": 3},
        "is no index of a sharded checkpoint": [1, 2],
    }
    for said, wrong in refused.items():
        write_index(index, wrong)
        with pytest.raises(CheckpointError) as error:
            read_state_dict(tmp_path)
        assert said in str(error.value), error.value
    for content in ("", "{}", "[]", "\xff"):
        index.write_text(content, "latin-1")
        assert "is no index" in refusal(index)


# -- matching ------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.llm = nn.Linear(3, 2)
        self.clip = nn.Linear(1, 1)


def test_every_key_must_fit(caplog: pytest.LogCaptureFixture) -> None:
    whole = {name: torch.ones_like(tensor) for name, tensor in Two().state_dict().items()}
    model = Two()
    load_strictly(model, whole, "file")
    assert all((tensor == 1).all() for tensor in model.state_dict().values())

    part = {name: tensor for name, tensor in whole.items() if name.startswith("llm.")}
    load_strictly(Two(), part, "file", absent=("clip.",))
    fresh = Two()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    wrong = part | {"llm.weight": torch.ones(2, 4), "surprise": torch.ones(1)}
    with pytest.raises(CheckpointError) as refused, caplog.at_level(logging.INFO, "unimrg.weights"):
        load_strictly(fresh, wrong, "the file")
    assert str(refused.value) == (
        "the file doesn't fit the model: 2 missing (clip.weight, clip.bias); 1 unexpected (surprise); "
        "1 wrongly shaped (llm.weight [2, 4] for [2, 3]); check family.variant"
    )
    assert [record.getMessage() for record in caplog.records] == [
        "the file: missing clip.weight",
        "the file: missing clip.bias",
        "the file: unexpected surprise",
        "the file: wrongly shaped llm.weight [2, 4] for [2, 3]",
    ]
    assert_same(fresh.state_dict(), before)


def test_the_family_of_the_names_is_suggested() -> None:
    with torch.device("meta"):
        model = Two()
    for name, family in (
        ("showo.model.x", "showo"),
        ("meta_queries", "openuni"),
        ("mar.diffloss.x", "harmon"),
    ):
        with pytest.raises(CheckpointError, match=f"are those of {family}: choose family={family}"):
            check_fits(model, {name: torch.ones(1)}, "file")


def test_adapters_apart_are_no_model() -> None:
    with pytest.raises(CheckpointError, match=r"it holds adapters apart: give model/ of its run"):
        check_fits(Two(), {"llm.lora_A.default.weight": torch.ones(1)}, "file")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of every family as published, and in `ours` as we save it."""
    folder = tmp_path_factory.mktemp("published")
    for name in families.NAMES:
        (folder / name).mkdir()
        load_family(name).save_published(families.shared_model(name), folder / name)
        families.shared_model(name).save_pretrained(folder / "ours" / name)
        families.processor(name).tokenizer.save_pretrained(folder / "tokenizers" / name)
    return folder


@pytest.mark.parametrize(
    ("name", "other"), [(name, other) for name in families.NAMES for other in families.NAMES if name != other]
)
def test_the_weights_of_another_family(published: Path, name: str, other: str) -> None:
    """Refused in one sentence, before a model is made."""

    def config(weights: Path) -> FamilyConfig:
        own = {knob: str(published / name / part) for knob, part in PUBLISHED[name].items()}
        tokenizer = str(published / "tokenizers" / name)
        return FamilyConfig(name, **(own | {"weights": str(weights), "tokenizer": tokenizer}))

    with pytest.raises(CheckpointError) as refused:
        load_family(name).build(config(published / other / PUBLISHED[other]["weights"]), 0)
    said = str(refused.value)
    assert f"the names are those of {other}" in said or "give a file of" in said, said
    assert "\n" not in said
    ours = config(published / "ours" / other)
    with (
        pytest.raises(CheckpointError, match=f"is a model of {other}; choose family={other}"),
        localized(ours, S3Config()),
    ):
        pass


# -- DeepSpeed -----------------------------------------------------------------------------------------------

RUNS = [(2, "float32"), (3, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16")]


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Group:
    """Two processes train a step with every stage and leave a checkpoint, in float32 and in bfloat16."""
    folder = tmp_path_factory.mktemp("zero") / "two"
    plan: dict[str, Any] = {}
    for stage, precision in RUNS:
        name = f"zero{stage}-{precision}"
        values = {"engine": f"zero{stage}", "folder": str(folder / name), "precision": precision}
        plan[name] = ("leave_zero", values)
    return Group(folder, 2, plan).wait()


@pytest.mark.parametrize(("stage", "precision"), RUNS)
def test_zero_checkpoints_are_merged(zero: Group, stage: int, precision: str) -> None:
    """In float32: what is merged has more digits than what was trained with in bfloat16, and rounds to it."""
    name = f"zero{stage}-{precision}"
    expected = zero.result(name)["weights"]
    for place in (zero.folder / name, zero.folder / name / "global_step1"):
        found = read_state_dict(place)
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        assert_same({name: tensor.to(expected[name].dtype) for name, tensor in found.items()}, expected)
    rounded = [torch.equal(tensor, tensor.bfloat16().float()) for tensor in found.values()]
    assert not all(rounded)


def copied(source: Path, target: Path) -> Path:
    """The files of a checkpoint, linked."""
    (target / "global_step1").mkdir(parents=True)
    for file in (source / "global_step1").iterdir():
        (target / "global_step1" / file.name).hardlink_to(file)
    return target


def test_our_own_checkpoint_and_a_lone_model_file(zero: Group, tmp_path: Path) -> None:
    folder = copied(zero.folder / "zero2-float32", tmp_path / "ours")  # no `latest`: the only folder inside
    (folder / "state.json").write_text("{}")
    expected = zero.result("zero2-float32")["weights"]
    assert_same(read_state_dict(folder), expected)
    model = folder / "global_step1" / "mp_rank_00_model_states.pt"
    assert_same(read_state_dict(model), expected)
    for file in folder.rglob("*_optim_states.pt"):
        file.unlink()
    assert_same(read_state_dict(folder), expected)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_checkpoints_that_can_t_be_merged(zero: Group, tmp_path: Path, stage: int) -> None:
    def broken(name: str) -> tuple[Path, list[Path]]:
        folder = copied(zero.folder / f"zero{stage}-float32", tmp_path / name) / "global_step1"
        return folder, sorted(folder.glob("*_optim_states.pt"))

    folder, optimizers = broken("lost")
    optimizers[1].unlink()
    assert "written by 2 processes, and not all of their files are there" in refusal(folder)
    folder, optimizers = broken("torn")
    whole = optimizers[1].read_bytes()
    optimizers[1].unlink()
    optimizers[1].write_bytes(whole[:-100])
    assert "can't be read safely" in refusal(folder)
    folder, optimizers = broken("parallel")
    optimizers[1].rename(folder / "zero_pp_rank_0_mp_rank_01_optim_states.pt")
    with pytest.raises(CheckpointError, match="parallel layers"):
        merge_zero(folder)
    folder, optimizers = broken("strange")
    optimizers[0].unlink()
    torch.save({"optimizer_state_dict": {"zero_stage": 9}}, optimizers[0])
    assert "can't be merged" in refusal(folder)
    folder, optimizers = broken("bomb")
    trace = tmp_path / "trace"
    optimizers[1].unlink()
    torch.save({"optimizer_state_dict": {"loss_scaler": Bomb(trace)}}, optimizers[1])
    assert "can't be read safely" in refusal(folder) and not trace.exists()
    if stage == 3:
        folder, optimizers = broken("bare")
        for file in optimizers:
            file.unlink()
        assert "bring those too" in refusal(folder)


@pytest.mark.parametrize("name", families.NAMES)
def test_folders_in_bfloat16_are_loaded_in_float32(name: str, tmp_path: Path) -> None:
    """As training needs it: bfloat16 would round its updates away."""
    model = families.fresh_model(name).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load_folder(type(model), tmp_path)
    expected = model.state_dict()
    for key, tensor in loaded.state_dict().items():
        assert tensor.dtype == (torch.float32 if tensor.is_floating_point() else expected[key].dtype)
        assert torch.equal(tensor.to(expected[key].dtype), expected[key])


@pytest.mark.parametrize("name", families.NAMES)
def test_folders_in_bfloat16_may_stay_as_they_are_stored(name: str, tmp_path: Path) -> None:
    """But for what isn't stored: tables computed when the model is made keep all their digits."""
    model = families.fresh_model(name)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    stored = model.state_dict()
    loaded = load_folder(type(model), tmp_path, dtype=None)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.to(stored[key].dtype), stored[key])
    exact = dict(load_folder(type(model), tmp_path).named_buffers())
    for key, tensor in loaded.named_buffers():
        assert torch.equal(tensor.to(exact[key].dtype), exact[key])


def test_latest_must_lead_to_a_checkpoint(zero: Group, tmp_path: Path) -> None:
    folder = copied(zero.folder / "zero2-float32", tmp_path / "one")
    for tag in ("global_step2", "../../etc", "", "/etc", "."):
        (folder / "latest").write_text(tag)
        with pytest.raises(CheckpointError, match="which is no checkpoint"):
            read_state_dict(folder)
    assert find_zero(zero.folder / "empty") is None
