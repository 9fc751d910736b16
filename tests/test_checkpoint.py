"""Published files and folders are loaded in full or refused; a training state comes back exactly, or not."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.bomb import Bomb
from tests.tiny_harmon import micro, random_model, random_sample, tokenizer
from unimrg.checkpoint import (
    COMPLETE,
    Progress,
    Saver,
    check_same_order,
    checkpoints_in,
    is_complete,
    latest_checkpoint,
    mark_complete,
    read_progress,
    restore,
    retire,
    step_name,
    step_of,
)
from unimrg.config import DataConfig, EngineConfig, FamilyConfig, RunConfig, TrainConfig, redacted, to_plain
from unimrg.engine import Engine, make_engine
from unimrg.errors import CheckpointError, ConfigError, StorageError
from unimrg.families.harmon import build
from unimrg.families.harmon.checkpoint import VAE, WEIGHTS, from_folder, from_published, save_published
from unimrg.families.harmon.config import tiny
from unimrg.families.harmon.model import Harmon
from unimrg.families.harmon.processor import HarmonProcessor
from unimrg.losses import combine
from unimrg.pieces import Piece, share
from unimrg.sample import Task
from unimrg.storage import Store

TIED = "llm.lm_head.weight"
PROGRESS = Progress(step=2, position=4, ranks=1, config={"seed": 0}, updates=2)


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


def engine_at_step_0(ema: float = 0.0) -> Engine:
    train = TrainConfig(steps=6, batch_size=2, learning_rate=1e-2, ema=ema)
    return make_engine(random_model(micro()), train, EngineConfig(name="torch"), torch.device("cpu"))


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


def save(store: Store, engine: Engine, progress: Progress = PROGRESS) -> str:
    """A complete checkpoint; returns its name."""
    saver = Saver(store)
    saver.begin(engine, progress)
    assert saver.finish(wait=True) == progress
    return step_name(progress.step, 1)


def test_a_resumed_run_is_the_undisturbed_run(tmp_path: Path) -> None:
    store = Store.at(str(tmp_path))
    seed_everything(1)
    engine = engine_at_step_0()
    engine.model.train()
    advance(engine, 2)
    name = save(store, engine)
    expected = [*advance(engine, 3), random.gauss(0, 1), np.random.normal(), float(torch.randn(()))]

    seed_everything(2)
    resumed = engine_at_step_0()
    for piece in resumed.pieces():
        piece.values["weight"].add_(1)
    resumed.model.train()
    assert restore(store, name, resumed) == PROGRESS
    assert (resumed.steps_done, resumed.updates()) == (2, 2)
    found = [*advance(resumed, 3), random.gauss(0, 1), np.random.normal(), float(torch.randn(()))]
    assert found == expected
    assert same(resumed.model, engine.model)


class SlowStore:
    """A store whose large writes wait for leave."""

    def __init__(self, store: Store, release: threading.Event) -> None:
        self._store, self._release = store, release

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write_pieces(self, *arguments: Any) -> None:
        assert self._release.wait(60)
        self._store.write_pieces(*arguments)


def test_what_is_written_is_what_was_there_when_it_began(tmp_path: Path) -> None:
    """Training goes on while a thread writes; it doesn't show in the checkpoint."""
    store, engine = Store.at(str(tmp_path)), engine_at_step_0()
    advance(engine, 2)
    before = {piece.name: piece.values["weight"].clone() for piece in engine.pieces()}
    release = threading.Event()
    saver = Saver(SlowStore(store, release))  # type: ignore[arg-type]
    saver.begin(engine, PROGRESS)
    assert saver.finish() is None and not is_complete(store, step_name(2, 1))
    advance(engine, 1)
    release.set()
    assert saver.finish(wait=True) == PROGRESS
    assert saver.finish() is None  # told once
    restore(store, step_name(2, 1), engine)
    assert all(torch.equal(piece.values["weight"], before[piece.name]) for piece in engine.pieces())


def test_a_checkpoint_that_can_t_be_written_is_told(tmp_path: Path) -> None:
    """In the thread that trains; what is there is no checkpoint."""
    store, engine = Store.at(str(tmp_path)), engine_at_step_0()
    (tmp_path / step_name(2, 1)).write_text("a file where the folder should be")
    saver = Saver(store)
    with pytest.raises(StorageError):
        saver.begin(engine, PROGRESS)
        saver.finish(wait=True)
    assert latest_checkpoint(store) == ""


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    """In whichever file, of whichever tensor, and one that is missing."""
    store, engine = Store.at(str(tmp_path)), engine_at_step_0()
    advance(engine, 1)
    name = save(store, engine)
    rng = np.random.default_rng(0)
    for file in (f"{name}/part-00000.safetensors", f"{name}/state.json"):
        path = tmp_path / file
        content = path.read_bytes()
        for at in [0, 9, len(content) - 1, *rng.integers(0, len(content), 20).tolist()]:
            path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
            with pytest.raises(CheckpointError, match=r"damaged|can't be read|no readable"):
                restore(store, name, engine)
        path.write_bytes(content[:-1])
        assert not is_complete(store, name)
        path.write_bytes(content)
    restore(store, name, engine)
    (tmp_path / name / "part-00000.safetensors").unlink()
    assert not is_complete(store, name) and latest_checkpoint(store) == ""


def test_another_model_s_checkpoint_is_refused(tmp_path: Path) -> None:
    store, engine = Store.at(str(tmp_path)), engine_at_step_0()
    for parameter in engine.model.llm.parameters():
        parameter.requires_grad_(False)
    name = save(store, engine)
    with pytest.raises(CheckpointError, match=r"is trained now but is not in the checkpoint; set family.fr"):
        restore(store, name, engine_at_step_0())


def test_a_moving_average_that_begins_later_begins_with_the_weights(tmp_path: Path) -> None:
    store = Store.at(str(tmp_path))
    engine = engine_at_step_0()
    advance(engine, 2)
    averaged = engine_at_step_0(ema=0.9)
    restore(store, save(store, engine), averaged)
    for piece in averaged.pieces():
        assert torch.equal(piece.values["average"], piece.values["weight"])


def test_a_moving_average_is_the_sum_it_should_be() -> None:
    """a_k = d a_(k-1) + (1 - d) w_k, from the weights at the start; it is what is exported."""
    engine = engine_at_step_0(ema=0.75)
    average = {piece.name: piece.values["weight"].double() for piece in engine.pieces()}
    for _ in range(4):
        advance(engine, 1)
        for piece in engine.pieces():
            average[piece.name] = 0.75 * average[piece.name] + 0.25 * piece.values["weight"].double()
    exported = engine.weights()
    for piece in engine.pieces():
        torch.testing.assert_close(
            piece.values["average"].double(), average[piece.name], rtol=1e-5, atol=1e-6
        )
        assert torch.equal(exported[piece.name].flatten(), piece.values["average"])
        assert not torch.equal(piece.values["average"], piece.values["weight"])


def test_states_that_say_nothing(tmp_path: Path) -> None:
    store = Store.at(str(tmp_path))
    for content in (b"", b"[]", b"{}", b'{"step": 1}', b"\xff"):
        store.write_bytes("step-1/state.json", content)
        with pytest.raises(CheckpointError, match=r"no readable state\.json"):
            read_progress(store, "step-1")


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8), ranks=st.integers(1, 9))
def test_shares_of_what_all_hold_are_the_whole(lengths: list[int], ranks: int) -> None:
    """Each number is in exactly one share, in order, and shares are equally large."""
    pieces = [
        Piece(f"p{number}", 3, {"weight": torch.arange(float(length)) + 100 * number})
        for number, length in enumerate(lengths)
    ]
    shares = [share(pieces, rank, ranks) for rank in range(ranks)]
    joined = [value for part in shares for piece in part for value in piece.values["weight"].tolist()]
    assert joined == [value for piece in pieces for value in piece.values["weight"].tolist()]
    sizes = [sum(piece.length for piece in part) for part in shares]
    assert max(sizes) - min(sizes) <= 1
    for piece in (piece for part in shares for piece in part):
        assert piece.start == 3 + piece.values["weight"][0].item() % 100


def test_what_stays(tmp_path: Path) -> None:
    """The newest, the best of the others, and what is being written; nothing that was never finished."""
    store, engine = Store.at(str(tmp_path)), engine_at_step_0()
    for step, loss in ((1, 0.5), (2, 3.0), (3, None), (4, 0.7), (5, 2.0), (6, 1.0)):
        save(store, engine, Progress(step, step, 1, {}, loss=loss))
    (tmp_path / step_name(2, 1) / COMPLETE).unlink()
    (tmp_path / step_name(7, 1)).mkdir()
    (tmp_path / step_name(7, 1) / "part-00000.safetensors").write_bytes(b"half")
    retire(store, last=2, best=1)
    assert [step_of(name) for name in checkpoints_in(store)] == [1, 5, 6, 7]
    retire(store, last=1, best=0)
    assert [step_of(name) for name in checkpoints_in(store)] == [6, 7]
    assert latest_checkpoint(store) == step_name(6, 1)


def test_a_position_means_the_same_sample() -> None:
    """What changes the order of samples is refused; what doesn't may change between restarts."""
    config = RunConfig(data=DataConfig(manifest="a.json"))
    progress = Progress(2, 4, ranks=1, config=redacted(config))
    config.train.steps, config.data.unit, config.data.ahead = 999, 8, 64
    check_same_order(progress, to_plain(config))
    config.data.window = 2
    with pytest.raises(CheckpointError, match=r"made with data.window=16, now it is 2.*under another name"):
        check_same_order(progress, to_plain(config))


def test_complete_means_every_file_in_full(tmp_path: Path) -> None:
    store = Store.at(str(tmp_path))
    name = save(store, engine_at_step_0())
    listed = json.loads(store.read_bytes(f"{name}/{COMPLETE}"))
    assert set(listed) == {f"{name}/state.json", f"{name}/part-00000.safetensors"}
    for path, file in listed.items():
        assert file["size"] == (tmp_path / path).stat().st_size
    state = tmp_path / name / "state.json"
    content = state.read_bytes()
    state.write_bytes(content[:-1])
    assert not is_complete(store, name)
    state.write_bytes(content)
    assert is_complete(store, name)
    for torn in (b"", b"{", b"[1]", b"null", b"{}", b'{"a": 1}'):
        store.write_bytes(f"{name}/{COMPLETE}", torn)
        assert not is_complete(store, name)


def test_parts_are_safetensors(tmp_path: Path) -> None:
    """Any tool that knows the format reads them."""
    engine = engine_at_step_0()
    name = save(Store.at(str(tmp_path)), engine)
    part = load_file(tmp_path / name / "part-00000.safetensors")
    for piece in engine.pieces():
        assert torch.equal(part[f"weight/0/{piece.name}"], piece.values["weight"])


def test_a_part_without_its_fellow_is_no_checkpoint(tmp_path: Path) -> None:
    store = Store.at(str(tmp_path))
    name = save(store, engine_at_step_0())
    state = {"step": 2, "position": 4, "ranks": 2, "config": {}}
    store.write_bytes(f"{name}/state.json", json.dumps(state).encode())
    with pytest.raises(CheckpointError, match=r"part-00001\.safetensors is missing right after"):
        mark_complete(store, name)
