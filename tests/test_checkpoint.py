"""Published files and folders are loaded in full or refused; a training state comes back exactly, or not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bomb import Bomb
from tests.tiny_harmon import micro, random_model, random_sample, tokenizer
from unimrg.checkpoint import (
    COMPLETE,
    Progress,
    check_same_order,
    is_complete,
    load_training,
    mark_complete,
    read_progress,
    save_training,
)
from unimrg.config import DataConfig, EngineConfig, FamilyConfig, RunConfig, TrainConfig, redacted, to_plain
from unimrg.engine import Engine, make_engine
from unimrg.errors import CheckpointError, ConfigError
from unimrg.families.harmon import build
from unimrg.families.harmon.checkpoint import VAE, WEIGHTS, from_folder, from_published, save_published
from unimrg.families.harmon.config import tiny
from unimrg.families.harmon.model import Harmon
from unimrg.families.harmon.processor import HarmonProcessor
from unimrg.losses import combine
from unimrg.sample import Task
from unimrg.storage import Store

TIED = "llm.lm_head.weight"
PROGRESS = Progress(step=2, position=4, ranks=1, batch_size=2, config={"seed": 0})


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> Harmon:
    return random_model(micro())


@pytest.fixture
def published(model: Harmon, tmp_path: Path) -> Path:
    save_published(model, tmp_path)
    return tmp_path


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


# -- published files -----------------------------------------------------------------------------------------


def test_published_and_back(model: Harmon, published: Path) -> None:
    state = load_file(published / WEIGHTS)
    assert TIED not in state and not any(name.startswith("vae.") for name in state)
    assert "mar.class_emb.weight" in state
    assert same(from_published(micro(), published / WEIGHTS, published / VAE), model)


@pytest.mark.parametrize(
    "wrapper", ["plain", "state_dict", "model", "module", "prefix", "both", "tied", "losses"]
)
def test_published_files_in_every_wrapping(model: Harmon, published: Path, wrapper: str) -> None:
    """As frameworks save them: wrapped, prefixed, with tied weights, with the autoencoder's losses."""
    state: dict[str, Any] = load_file(published / WEIGHTS)
    vae: dict[str, Any] = {"model": load_file(published / VAE)}
    if wrapper in ("prefix", "both"):
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    if wrapper in ("state_dict", "model", "module", "both"):
        state = {"state_dict" if wrapper == "both" else wrapper: state, "epoch": 3}
    if wrapper == "tied":
        state[TIED] = state["llm.model.embed_tokens.weight"]
    if wrapper == "losses":
        vae = {f"vae.{name}": tensor for name, tensor in vae["model"].items()}
        vae["loss.logvar"] = torch.zeros(1)
    torch.save(state, published / "harmon.pth")
    torch.save(vae, published / "kl16.ckpt")
    assert same(from_published(micro(), published / "harmon.pth", published / "kl16.ckpt"), model)


def test_the_wrong_variant_lists_keys_before_anything_is_built(published: Path) -> None:
    config = FamilyConfig(
        variant="harmon_0_5b",
        weights=str(published / WEIGHTS),
        vae_weights=str(published / VAE),
        tokenizer=str(tokenizer_folder(published)),
    )
    with pytest.raises(CheckpointError) as refused:
        build(config, 0)
    said = str(refused.value)
    assert "missing (" in said and "wrongly shaped (" in said and "check family.variant" in said
    assert "\n" not in said and len(said) < 700


def test_every_key_is_accounted_for(published: Path) -> None:
    state = load_file(published / WEIGHTS)
    extra = published / "extra.safetensors"
    save_file(state | {"llm.surprise": torch.zeros(2)}, extra)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(llm\.surprise\)"):
        from_published(micro(), extra, published / VAE)
    del state["mar.mask_token"]
    save_file(state, extra)
    with pytest.raises(CheckpointError, match=r"1 missing \(mar\.mask_token\)"):
        from_published(micro(), extra, published / VAE)
    with pytest.raises(CheckpointError, match=r"missing \(vae\."):
        from_published(micro(), published / WEIGHTS, extra)
    save_file({k: v for k, v in load_file(published / WEIGHTS).items() if "embed_tokens" not in k}, extra)
    with pytest.raises(CheckpointError, match="2 missing"):
        from_published(micro(), extra, published / VAE)


def tokenizer_folder(folder: Path) -> Path:
    tokenizer().save_pretrained(folder)
    return folder


def test_what_published_weights_need_besides(published: Path) -> None:
    weights = str(published / WEIGHTS)
    with pytest.raises(ConfigError, match=r"family\.tokenizer is empty; .* needs a folder with Qwen2\.5"):
        build(FamilyConfig(weights=weights), 0)
    folder = str(tokenizer_folder(published))
    with pytest.raises(ConfigError, match=r"family\.vae_weights is empty"):
        build(FamilyConfig(weights=weights, tokenizer=folder), 0)
    with pytest.raises(ConfigError, match=r"family\.variant: unknown value 'tny'; did you mean 'tiny'"):
        build(FamilyConfig(variant="tny", tokenizer=folder), 0)


# -- folders -------------------------------------------------------------------------------------------------


def test_folders_that_can_t_be_loaded(model: Harmon, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="can't be loaded"):
        from_folder(tmp_path / "missing")
    model.save_pretrained(tmp_path)
    assert same(from_folder(tmp_path), model)
    assert from_folder(tmp_path, dropout=0.25).config.mar.attn_dropout == 0.25
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="can't be loaded"):
        from_folder(tmp_path)
    state = load_tensors(whole, tmp_path)
    state["surprise"] = torch.zeros(1)
    del state["mar.mask_token"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing \(mar\.mask_token\); 1 unexpected \(surprise\)"):
        from_folder(tmp_path)
    weights.unlink()
    torch.save({"a": Bomb(tmp_path / "trace")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="can't be loaded"):
        from_folder(tmp_path)
    assert not (tmp_path / "trace").exists()


def load_tensors(raw: bytes, folder: Path) -> dict[str, torch.Tensor]:
    (folder / "whole.bin").write_bytes(raw)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "whole.bin").items()}
    (folder / "whole.bin").unlink()
    return tensors


def test_fresh_weights_are_a_function_of_the_seed() -> None:
    models = [build(FamilyConfig(), seed)[0] for seed in (0, 0, 1)]
    assert same(models[0], models[1]) and not same(models[0], models[2])
    assert same(models[0].vae, models[2].vae)  # the autoencoder is a trained one
    assert models[0].config.image_size == tiny().image_size


# -- training state ------------------------------------------------------------------------------------------


def engine_at_step_0(seed: int = 0) -> Engine:
    train = TrainConfig(steps=6, batch_size=2, learning_rate=1e-2)
    return make_engine(random_model(micro(), seed), train, EngineConfig(name="torch"), torch.device("cpu"))


def advance(engine: Engine, steps: int) -> list[float]:
    """Steps whose data comes from the global generators, as dropout's masks would; returns the losses."""
    losses = []
    processor = HarmonProcessor(micro(), tokenizer(), tuple(Task), 0)
    for _ in range(steps):
        rng = np.random.default_rng(
            np.random.randint(1 << 30) + random.randrange(99) + int(torch.rand(()) * 99)
        )
        batch = processor([random_sample(rng, 16, position=i) for i in range(2)])
        total = combine(engine.forward(batch, True), dict.fromkeys(Task, 1.0), batch.counts, 1)
        engine.backward(total, True)
        engine.step()
        losses.append(float(total.detach()))
    return losses


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    random.gauss(0, 1)  # leaves a second number behind, part of the state
    np.random.normal()


def test_a_resumed_run_is_the_undisturbed_run(tmp_path: Path) -> None:
    seed_everything(1)
    engine = engine_at_step_0()
    engine.model.train()
    advance(engine, 2)
    save_training(tmp_path / "step-2", engine, PROGRESS)
    expected = [*advance(engine, 3), random.gauss(0, 1), np.random.normal(), float(torch.randn(()))]

    seed_everything(2)
    resumed = engine_at_step_0(seed=5)
    resumed.model.train()
    assert load_training(tmp_path / "step-2", resumed) == PROGRESS
    assert resumed.steps_done == 2
    found = [*advance(resumed, 3), random.gauss(0, 1), np.random.normal(), float(torch.randn(()))]
    assert found == expected
    assert same(resumed.model, engine.model)


def test_training_states_that_can_t_be_used(tmp_path: Path) -> None:
    engine = engine_at_step_0()
    folder = tmp_path / "step-2"
    with pytest.raises(CheckpointError, match=r"holds no readable state\.json"):
        load_training(folder, engine)
    save_training(folder, engine, PROGRESS)
    (folder / "rng-0.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"rng-0\.pt can't be read"):
        load_training(folder, engine)
    whole = (folder / "torch.pt").read_bytes()
    (folder / "torch.pt").write_bytes(whole[:1000])
    with pytest.raises(CheckpointError, match=r"torch\.pt can't be read"):
        load_training(folder, engine)
    (folder / "torch.pt").unlink()
    with pytest.raises(CheckpointError, match="written by another engine"):
        load_training(folder, engine)
    save_training(folder, engine, Progress(2, 4, ranks=3, batch_size=6, config={}))
    with pytest.raises(CheckpointError, match=r"written by 3 workers .* set cluster\.workers=3"):
        load_training(folder, engine)
    for content in ("", "[]", "{}", '{"step": 1}'):
        (folder / "state.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"no readable state\.json"):
            read_progress(folder)


def test_a_position_means_the_same_sample() -> None:
    """What changes the order of samples is refused; what doesn't may change between restarts."""
    config = RunConfig(data=DataConfig(manifest="a.json"))
    progress = Progress(2, 4, ranks=1, batch_size=4, config=redacted(config))
    config.train.steps, config.data.unit, config.data.ahead = 999, 8, 64
    check_same_order(progress, to_plain(config))
    config.data.window = 2
    with pytest.raises(CheckpointError, match=r"made with data.window=16, now it is 2.*under another name"):
        check_same_order(progress, to_plain(config))


def test_complete_means_every_file_in_full(tmp_path: Path) -> None:
    store = Store.at(str(tmp_path))
    assert not is_complete(store, "step-1")
    store.write_bytes("step-1/state.json", b"{}")
    store.write_bytes("step-1/deep/model.pt", b"12345")
    assert not is_complete(store, "step-1")
    mark_complete(store, "step-1")
    assert is_complete(store, "step-1")
    listed = json.loads(store.read_bytes(f"step-1/{COMPLETE}"))
    assert listed == {"step-1/deep/model.pt": 5, "step-1/state.json": 2}
    (tmp_path / "step-1/deep/model.pt").write_bytes(b"1234")
    assert not is_complete(store, "step-1")
    (tmp_path / "step-1/deep/model.pt").write_bytes(b"54321")
    assert is_complete(store, "step-1")
    (tmp_path / "step-1/deep/model.pt").unlink()
    assert not is_complete(store, "step-1")
    for torn in (b"", b"{", b"[1]", b"null"):
        store.write_bytes(f"step-1/{COMPLETE}", torn)
        assert not is_complete(store, "step-1")
