"""What is Janus-Pro's own: its rows, its prompts, its codes, freezing, and the published files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import JanusForConditionalGeneration

from tests.tiny_harmon import random_sample
from tests.tiny_janus import make_processor, micro, random_model, tokenizer
from unimrg.benchmarks.dense import psnr
from unimrg.compose import compose
from unimrg.config import FamilyConfig, RunConfig, TrainConfig
from unimrg.errors import CheckpointError, ConfigError
from unimrg.families import janus
from unimrg.families.base import DrawOptions
from unimrg.families.janus import checkpoint
from unimrg.families.janus.config import VARIANTS, JanusFamilyConfig, tiny
from unimrg.families.janus.generate import sample_codes
from unimrg.families.janus.model import Janus
from unimrg.families.janus.processor import JanusBatch
from unimrg.losses import combine
from unimrg.sample import IMAGE_TASKS, Sample, Task, Turn
from unimrg.weights import read_state_dict

SIDE, PICTURE, CODES = 16, 16, 16
TURNS = (Turn("Can you see a red cone?", "yes"), Turn("How many blue objects are there?", "two"))
BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


@pytest.fixture(scope="module")
def model() -> Janus:
    return random_model(micro())


def sample(position: int = 0, **options: Any) -> Sample:
    return random_sample(np.random.default_rng(position), SIDE, position, **options)


def pictures(count: int) -> list[np.ndarray]:
    return [image for n in range(count) if (image := sample(n).image) is not None]


def process(samples: list[Sample], tasks: tuple[Task, ...] = tuple(Task)) -> JanusBatch:
    return make_processor(micro(), tasks, 5)(samples)


# -- rows and prompts ----------------------------------------------------------------------------------------


def spoken(batch: JanusBatch) -> str:
    """The packed text; an embedding of a picture is `·`, one of a code `+`."""
    pictures = len(batch.images) * PICTURE
    text = pictures + len(batch.target_source) * (CODES - 1)

    def word(place: int) -> str:
        if place >= text:
            return str(tokenizer().decode([int(batch.token_ids[place - text])]))
        return "+" if place >= pictures else "·"

    return "".join(word(int(place)) for place in batch.source_index)


def test_the_template_is_whole() -> None:
    batch = process([replace(sample(), conversations=(TURNS,))], (Task.UNDERSTANDING,))
    assert spoken(batch) == (
        f"{BEGIN}<|User|>: <begin_of_image>{'·' * PICTURE}<end_of_image>\n"
        f"{TURNS[0].question}\n\n<|Assistant|>: yes{END}"
        f"<|User|>: {TURNS[1].question}\n\n<|Assistant|>: two{END}"
    )
    want = [id for turn in TURNS for id in tokenizer()(f" {turn.answer}{END}")["input_ids"]]
    assert batch.label_ids.tolist() == want
    assert batch.counts[Task.UNDERSTANDING] == len(want)


def test_drawings_share_the_picture_and_follow_its_opening() -> None:
    batch = process([sample(conversations=1)])
    text = spoken(batch)
    assert text.count(BEGIN) == 1
    assert text.count(f"<begin_of_image>{'·' * PICTURE}<end_of_image>") == 1
    assert text.count(f"\n\n<|Assistant|>:<begin_of_image>{'+' * (CODES - 1)}") == len(IMAGE_TASKS)
    # The first code is predicted by the opening, every other one by the code before it.
    predicts = batch.source_index[batch.code_index].view(len(IMAGE_TASKS), CODES)
    first = PICTURE + (CODES - 1) * torch.arange(len(IMAGE_TASKS))
    assert torch.equal(predicts[:, 1:], first[:, None] + torch.arange(CODES - 1))
    opening = batch.token_ids[predicts[:, 0] - PICTURE - (CODES - 1) * len(IMAGE_TASKS)]
    assert (opening == micro().open_image_id).all()
    assert torch.equal(batch.cell_rows, torch.arange(len(IMAGE_TASKS) * CODES))


def test_text_alone_has_no_picture() -> None:
    batch = process([replace(sample(picture=False), conversations=(TURNS[:1],))], (Task.UNDERSTANDING,))
    assert spoken(batch).startswith(f"{BEGIN}<|User|>: Can you see a red cone?\n\n<|Assistant|>: yes{END}")


def test_padding_counts_in_no_image_loss() -> None:
    batch = process([sample(valid=(0, 4, SIDE, 12))])
    inside = torch.arange(4, 12)
    assert torch.equal(batch.cell_rows.view(-1, 8), inside + CODES * torch.arange(len(IMAGE_TASKS))[:, None])
    assert batch.counts[Task.DEPTH] == 8


def test_the_tiny_tokenizer_gets_the_special_tokens() -> None:
    config = tiny()
    text = config.get_text_config()
    ids = tokenizer().convert_tokens_to_ids(
        [BEGIN, END, "<｜▁pad▁｜>", "<image_placeholder>", "<begin_of_image>"]
    )
    assert ids[:3] == [text.bos_token_id, text.eos_token_id, text.pad_token_id]
    assert ids[3:] == [config.janus.image_token_id, config.open_image_id]
    assert len(tokenizer()) == text.vocab_size


# -- codes ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_codes_survive_the_way_through_pixels(model: Janus) -> None:
    """Not those of a random tokenizer, but their shapes and ranges."""
    codes = model.encode_pictures(torch.from_numpy(np.stack(pictures(3))))
    assert codes.shape == (3, CODES) and codes.dtype == torch.long
    assert codes.min() >= 0 and codes.max() < model.config.janus.vq_config.num_embeddings
    drawn = model.decode_pictures(codes)
    assert drawn.shape == (3, SIDE, SIDE, 3) and drawn.dtype == torch.uint8


@torch.no_grad()
def test_fresh_tiny_weights_can_learn() -> None:
    """Words, pictures and codes are about equally large, and the picture tokenizer is a trained one."""
    fresh, _ = janus.build(FamilyConfig(name="janus"), 0)
    core = fresh.janus.model
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 255 - ramp[None]), axis=-1)
    codes = fresh.encode_pictures(torch.from_numpy(picture)[None])
    inputs = (core.language_model.embed_tokens.weight, fresh.embed_codes(codes))
    sizes = [float(x.square().mean().sqrt()) for x in inputs]
    assert 1 / 5 < sizes[1] / sizes[0] < 5
    assert psnr(picture, fresh.decode_pictures(codes)[0].numpy()) > 18


@torch.no_grad()
def test_guidance_and_temperature(model: Janus) -> None:
    """Guidance of one is the conditional drawing alone; a cold one is the likeliest."""
    embeds = torch.randn(4, 7, 32)

    def codes(rows: torch.Tensor, guidance: float, temperature: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return sample_codes(model, rows, CODES, guidance, temperature, generator)

    plain = codes(embeds[:2], 1.0, 1.0)
    assert torch.equal(codes(embeds, 1.0 + 1e-7, 1.0), plain)
    assert not torch.equal(codes(embeds, 3.0, 1.0), plain)
    assert torch.equal(codes(embeds[:2], 1.0, 1e-6), codes(embeds[:2], 1.0, 0.0))


def test_pictures_of_a_call_do_not_see_each_other(model: Janus) -> None:
    using = make_processor(micro(), tuple(Task), 5)
    options = DrawOptions(temperature=0.0)
    together = model.draw(using, pictures(3), Task.PIXEL, options)
    alone = [model.draw(using, [picture], Task.PIXEL, options)[0] for picture in pictures(3)]
    assert all(np.array_equal(one, other) for one, other in zip(together, alone, strict=True))


# -- freezing ------------------------------------------------------------------------------------------------


def trained(model: Janus) -> set[str]:
    return {part for part, parameter in model.named_parts() if parameter.requires_grad}


def test_parts_can_be_frozen() -> None:
    model = random_model(micro())
    assert trained(model) == set(Janus.PARTS)
    model.freeze(["vision", "aligner"], list(Task))
    assert trained(model) == {"llm", "generation"}
    with pytest.raises(ConfigError, match="no part named 'head'; parts are vision, aligner"):
        model.freeze(["head"], list(Task))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tasks", [tuple(Task), (Task.UNDERSTANDING,), (Task.DEPTH,)])
def test_everything_trained_gets_a_gradient(tasks: tuple[Task, ...], tied: bool) -> None:
    """Otherwise several workers would wait for each other."""
    model = random_model(micro(tied)).train()
    model.freeze([], tasks)
    batch = process([sample(conversations=1)], tasks)
    combine(model(batch), dict.fromkeys(Task, 1.0), batch.counts).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert ("generation" in trained(model)) == (Task.DEPTH in tasks)


# -- weights -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(model: Janus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    janus.save_published(model, folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def micro_is_a_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "micro", micro)


def load(weights: Path, variant: str = "micro") -> Janus:
    config = FamilyConfig(
        name="janus",
        variant=variant,
        weights=str(weights),
        tokenizer=str(weights) if weights.is_dir() else "",
    )
    return checkpoint.from_published(checkpoint.sizes(config), weights)


def assert_same(got: Janus, want: Janus) -> None:
    state = want.state_dict()
    assert got.state_dict().keys() == state.keys()
    assert not [name for name, tensor in got.state_dict().items() if not torch.equal(tensor, state[name])]


@pytest.mark.parametrize("inside", [".", "model.safetensors", "original", "original/model.safetensors"])
def test_published_and_back(model: Janus, published: Path, inside: str) -> None:
    """Only transformers' folder describes itself; the others are of a variant."""
    got = load(published / inside, "tiny" if inside == "." else "micro")
    assert_same(got, model)
    assert not got.config.janus.tie_word_embeddings


def test_the_original_file_brings_more(model: Janus, tmp_path: Path) -> None:
    """As published: one pickle, with SigLIP's pooling head and the usage of codes."""
    state = checkpoint.to_original(model.janus.state_dict())
    state["vision_model.vision_tower.attn_pool.latent"] = torch.zeros(1, 1, 16)
    state["gen_vision_model.quantize.codebook_used"] = torch.zeros(65536)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same(load(tmp_path), model)


def test_shards_are_read_and_written(model: Janus, tmp_path: Path) -> None:
    model.janus.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(load(tmp_path, ""), model)


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    model = random_model(micro(tied=True))
    janus.save_published(model, tmp_path)
    got = load(tmp_path)
    assert_same(got, model)
    assert got.janus.lm_head.weight is got.janus.get_input_embeddings().weight
    theirs = JanusForConditionalGeneration.from_pretrained(tmp_path)
    assert theirs.lm_head.weight is theirs.get_input_embeddings().weight


def test_build_from_everything(model: Janus, published: Path, tmp_path: Path) -> None:
    """From our folder and from a published one, with the tokenizer beside the weights."""
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    for folder in (tmp_path, published):
        config = FamilyConfig(name="janus", variant="", weights=str(folder))
        assert janus.image_size(config) == SIDE
        got, ids = janus.build(config, 0)
        assert_same(got, model)
        assert ids.convert_tokens_to_ids("<begin_of_image>") == micro().open_image_id


def test_damaged_weights_are_named(model: Janus, published: Path, tmp_path: Path) -> None:
    state = read_state_dict(published / "original")

    def broken(state: dict[str, torch.Tensor]) -> Path:
        torch.save(state, tmp_path / "changed.pth")
        return tmp_path / "changed.pth"

    without = {name: tensor for name, tensor in state.items() if name != "gen_embed.weight"}
    with pytest.raises(CheckpointError, match=r"1 missing \(model.generation_embeddings.weight\)"):
        load(broken(without))
    with pytest.raises(CheckpointError, match=r"1 unexpected \(stray\)"):
        load(broken(state | {"stray": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"doesn't fit the model: .*check family.variant"):
        load(broken(dict(state)), "tiny")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json can't be read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FamilyConfig(variant="janus_pro_2b"), "family.variant"),
        (FamilyConfig(variant="janus_pro_1b"), "needs a folder with Janus-Pro's tokenizer.json"),
        (FamilyConfig(dropout=0.1), "Janus-Pro has no dropout"),
        (FamilyConfig(vae_weights="vq.pth"), "Janus-Pro's weights hold its picture tokenizer"),
    ],
)
def test_what_does_not_fit_is_refused(config: FamilyConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        janus.build(config, 0)


def test_no_published_prompts(model: Janus) -> None:
    with pytest.raises(ConfigError, match=r"train\.published_prompts"):
        janus.processor(model, tokenizer(), TrainConfig(published_prompts=True), list(Task), 0)


def test_configurations_survive_json() -> None:
    for make in VARIANTS.values():
        config = make()
        again = JanusFamilyConfig.from_dict(config.to_dict())
        assert again.to_dict() == config.to_dict()
        assert again.grid == config.grid


def test_pictures_must_be_made_of_codes() -> None:
    settings = micro().janus.to_dict()
    settings["vision_config"]["image_size"] = 18
    with pytest.raises(ValueError, match="a picture of 18 pixels isn't made of 4-pixel codes"):
        JanusFamilyConfig(janus=settings)


@pytest.mark.parametrize(("variant", "width"), [("janus_pro_1b", 2048), ("janus_pro_7b", 4096)])
def test_presets(variant: str, width: int) -> None:
    config = compose("train", [f"family={variant}"], RunConfig)
    assert (config.family.name, config.train.learning_rate, config.train.weight_decay) == ("janus", 1e-5, 0.0)
    assert janus.image_size(config.family) == 384
    assert checkpoint.sizes(config.family).get_text_config().hidden_size == width
