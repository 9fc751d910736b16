"""What is OpenUni's own: its rows, its prompts, flow matching, freezing, and the published files."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.parity.qwen_tokenizer import QwenTokenizer
from tests.tiny_harmon import random_sample
from tests.tiny_openuni import make_processor, micro, random_model, tokenizer
from unimrg.config import FamilyConfig
from unimrg.errors import CheckpointError, ConfigError, MissingExtraError
from unimrg.families import openuni
from unimrg.families.openuni import checkpoint, libraries
from unimrg.families.openuni.checkpoint import DIFFUSION, FLAT, LANGUAGE, VAE
from unimrg.families.openuni.config import VARIANTS, DCAEConfig, OpenUniConfig, tiny
from unimrg.families.openuni.model import OpenUni, timesteps_at
from unimrg.families.openuni.processor import OpenUniBatch, OpenUniProcessor
from unimrg.losses import combine
from unimrg.sample import IMAGE_TASKS, Sample, Task, Turn

SIDE, QUERIES, PICTURE = 16, 5, 9
TURNS = (Turn("Can you see a red cone?", "yes"), Turn("How many blue objects are there?", "two"))


@pytest.fixture(scope="module")
def model() -> OpenUni:
    return random_model(micro())


def sample(position: int = 0, **options: object) -> Sample:
    return random_sample(np.random.default_rng(position), SIDE, position, **options)


def process(samples: list[Sample], tasks: tuple[Task, ...] = tuple(Task)) -> OpenUniBatch:
    return make_processor(micro(), tasks, 5)(samples)


# -- rows and prompts ----------------------------------------------------------------------------------------


def spoken(batch: OpenUniBatch) -> str:
    """The packed text; every embedding that is no text is `·`."""
    text = len(batch.images) * PICTURE + QUERIES
    ids = [int(batch.token_ids[place - text]) if place >= text else -1 for place in batch.source_index]
    words = ["·" if number < 0 else tokenizer().decode([number]) for number in ids]
    return "".join(words)


def test_the_template_is_whole() -> None:
    batch = process([replace(sample(), conversations=(TURNS,))], (Task.UNDERSTANDING,))
    assert spoken(batch) == (
        f"<|im_start|>user\n<img>{'·' * PICTURE}</img>\n"
        f"{TURNS[0].question}<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        f"<|im_start|>user\n{TURNS[1].question}<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>"
    )
    want = [id for turn in TURNS for id in tokenizer()(turn.answer + "<|im_end|>")["input_ids"]]
    assert batch.label_ids.tolist() == want
    assert batch.counts[Task.UNDERSTANDING] == len(want)


def test_drawings_share_the_picture_and_end_with_the_queries() -> None:
    batch = process([sample(conversations=1)])
    text = spoken(batch)
    assert text.count("<|im_start|>user\n") == 1
    assert text.count("<img>") == 1 + len(IMAGE_TASKS)
    assert text.count(f"<|im_start|>assistant\n<img>{'·' * QUERIES}") == len(IMAGE_TASKS)
    queries = batch.source_index[batch.query_index].view(len(IMAGE_TASKS), QUERIES)
    assert (queries == PICTURE + torch.arange(QUERIES)).all()
    # Positions of every branch go on behind the picture's row.
    first = batch.position_ids[batch.query_index].view(-1, QUERIES)
    assert (first.diff(dim=1) == 1).all()


def test_text_alone_has_no_picture() -> None:
    batch = process([replace(sample(picture=False), conversations=(TURNS[:1],))], (Task.UNDERSTANDING,))
    assert spoken(batch).startswith("<|im_start|>user\nCan you see a red cone?<|im_end|>")


def test_prompts_are_the_published_ids() -> None:
    """Tokenised apart from the picture they are what the whole prompt would be, in Qwen's vocabulary."""
    special = {"<img>": 151665, "</img>": 151666}

    class InternVLTokenizer(QwenTokenizer):
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            for token in special:
                before, found, after = text.partition(token)
                if found:
                    parts = [self(part, False)["input_ids"] if part else [] for part in (before, after)]
                    return {"input_ids": [*parts[0], special[token], *parts[1]]}
            return super().__call__(text, add_special_tokens)

    encode = InternVLTokenizer()
    processor = OpenUniProcessor(tiny(), encode)
    text = "Keep the image as it is."
    branch = processor.drawing_branch(text, 0, None)  # type: ignore[arg-type]
    whole = f"<|im_start|>user\n<img></img>\n{text}<|im_end|>\n<|im_start|>assistant\n<img>"
    assert [*branch.opening, *processor.close_ids, *branch.ids] == encode(whole, False)["input_ids"]
    assert branch.opening == (151644, 872, 198, 151665)
    without = processor.drawing_branch(text, None, None)  # type: ignore[arg-type]
    bare = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n<img>"
    assert list(without.ids) == encode(bare, False)["input_ids"]


def test_padding_counts_in_no_image_loss(model: OpenUni) -> None:
    """The mean is over the cells of the picture: other targets in the padding don't change it."""
    clipped = sample(valid=(0, 4, SIDE, 12))
    batch = process([clipped])
    weight = batch.cell_weight.view(-1, 4, 4)
    assert torch.equal(weight[:, 1:3], torch.full((len(IMAGE_TASKS), 2, 4), 1 / 8))
    assert not weight[:, [0, 3]].any()
    assert batch.counts[Task.DEPTH] == 1
    flow = model.flow(
        torch.zeros(3, 4, 4, 4), torch.zeros(3, QUERIES, 20), torch.full((3,), 500.0), torch.ones(3, 4, 4, 4)
    )
    inside = flow.error.unflatten(1, (4, 4))[:, 1:3].flatten(1).mean(1)
    torch.testing.assert_close((flow.error * batch.cell_weight).sum(1), inside)


def test_a_picture_without_a_whole_cell_counts_nowhere() -> None:
    batch = process([sample(valid=(0, 0, SIDE, 1))])
    assert not batch.cell_weight.any()
    assert [batch.counts[task] for task in IMAGE_TASKS] == [0, 0, 0]


# -- flow matching -------------------------------------------------------------------------------------------


def test_timesteps_descend_from_1000_to_1() -> None:
    shares = torch.tensor([0.0, 0.0009, 0.5, 0.9995, 0.99999994])
    assert timesteps_at(shares).tolist() == [1000.0, 1000.0, 500.0, 1.0, 1.0]


def test_noise_is_a_function_of_the_seed_alone(model: OpenUni) -> None:
    first, second = sample(0), sample(1)
    alone, together = process([second]), process([first, second])
    for one, other in zip(model.draw_noise(alone), model.draw_noise(together), strict=True):
        assert torch.equal(one, other[len(IMAGE_TASKS) :])


def test_the_target_leads_from_the_picture_to_noise(model: OpenUni) -> None:
    """At timestep 1000 SANA sees noise alone, and a velocity of `noise - latents` has no error."""
    latents, noise = torch.randn(2, 1, 4, 4, 4)
    flow = model.flow(latents, torch.zeros(1, QUERIES, 20), torch.tensor([1000.0]), noise)
    torch.testing.assert_close(flow.noisy, noise)
    want = (flow.velocity - (noise - latents)).square().mean((1, 2, 3))
    torch.testing.assert_close(flow.error.mean(1), want)


@torch.no_grad()
def test_shifted_latents_decode_as_before(model: OpenUni) -> None:
    config = micro()
    config.vae.shift = (0.5, -0.25, 2.0, 0.0)
    shifted = random_model(config)
    pixels = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    got, want = shifted.encode_pixels(pixels), model.encode_pixels(pixels)
    mean = torch.tensor(config.vae.shift).view(-1, 1, 1) * config.vae.scale
    torch.testing.assert_close(got, want - mean)
    torch.testing.assert_close(shifted.decode_pixels(got), model.decode_pixels(want))
    with pytest.raises(ValueError, match="2 numbers to shift 4 latent channels by"):
        DCAEConfig(latent_channels=4, shift=(1.0, 2.0))


def test_fresh_weights_are_a_function_of_the_seed() -> None:
    """And predict no velocity at first."""
    config = FamilyConfig(name="openuni", variant="tiny")
    (one, ids), (same, _), (other, _) = (openuni.build(config, seed) for seed in (0, 0, 1))
    assert_same(one, same)
    assert not torch.equal(one.meta_queries, other.meta_queries)
    assert len(ids) <= one.config.text.vocab_size
    noisy, when = torch.randn(1, 16, 8, 8), torch.tensor([500.0])
    with torch.no_grad():
        assert not one.velocity(noisy, torch.randn(1, 32, 192), when).any()


def test_guidance_of_one_is_the_conditional_drawing(model: OpenUni) -> None:
    from unimrg.families.openuni.generate import guided_velocity

    latents, conditions = torch.randn(2, 4, 4, 4), torch.randn(4, QUERIES, 20)
    when = torch.tensor(500.0)
    with torch.no_grad():
        plain = guided_velocity(model, latents, conditions[2:], when, 1.0)
        nearly = guided_velocity(model, latents, conditions, when, 1.0 + 1e-6)
        twice = guided_velocity(model, latents, conditions, when, 2.0)
        without = guided_velocity(model, latents, conditions[:2], when, 1.0)
    torch.testing.assert_close(nearly, plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(twice, 2 * plain - without, atol=1e-4, rtol=1e-4)


# -- freezing ------------------------------------------------------------------------------------------------


def trained(model: OpenUni) -> set[str]:
    return {part for part, parameter in model.named_parts() if parameter.requires_grad}


def test_parts_can_be_frozen() -> None:
    model = random_model(micro())
    assert trained(model) == set(OpenUni.PARTS)
    model.freeze(["vision", "mlp1"], list(Task))
    assert trained(model) == set(OpenUni.PARTS) - {"vision", "mlp1"}
    with pytest.raises(ConfigError, match="no part named 'head'; parts are vision, mlp1"):
        model.freeze(["head"], list(Task))


def test_what_the_tasks_do_not_use_is_frozen() -> None:
    model = random_model(micro())
    model.freeze([], [Task.UNDERSTANDING])
    assert trained(model) == {"vision", "mlp1", "llm"}
    model = random_model(micro())
    model.freeze([], [Task.DEPTH])
    assert not model.lmm.lm_head.weight.requires_grad
    assert trained(model) == set(OpenUni.PARTS)


@pytest.mark.parametrize("tasks", [tuple(Task), (Task.UNDERSTANDING,), (Task.DEPTH,)])
def test_everything_trained_gets_a_gradient(tasks: tuple[Task, ...]) -> None:
    """Otherwise several workers would wait for each other."""
    model = random_model(micro()).train()
    model.freeze([], tasks)
    batch = process([sample(conversations=1)], tasks)
    combine(model(batch), dict.fromkeys(Task, 1.0), batch.counts).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


# -- weights -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(model: OpenUni, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    openuni.save_published(model, folder)
    return folder


@pytest.fixture(autouse=True)
def micro_is_a_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "micro", micro)


def config_of(folder: Path, **changes: str) -> FamilyConfig:
    paths = {
        "weights": str(folder / FLAT),
        "language_weights": str(folder / LANGUAGE),
        "vae_weights": str(folder / VAE),
    }
    return FamilyConfig(name="openuni", variant="micro", **(paths | changes))


def load(config: FamilyConfig, seed: int = 1) -> OpenUni:
    return checkpoint.from_published(checkpoint.sizes(config), config, seed)


def assert_same(got: OpenUni, want: OpenUni, parts: tuple[str, ...] = ("",)) -> None:
    state = want.state_dict()
    for name, tensor in got.state_dict().items():
        assert not name.startswith(parts) or torch.equal(tensor, state[name]), name


def test_published_and_back(model: OpenUni, published: Path) -> None:
    assert_same(load(config_of(published)), model)


def test_sana_may_come_from_a_folder_of_its_own(
    model: OpenUni, published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first stage's file leaves it out; the log says what came from where."""
    flat = torch.load(published / FLAT, weights_only=True)
    first = {name: tensor for name, tensor in flat.items() if not name.startswith("transformer.")}
    torch.save({"state_dict": first}, tmp_path / "first.pth")
    config = config_of(published, weights=str(tmp_path / "first.pth"))
    with pytest.raises(
        ConfigError, match=r"family.diffusion_weights is empty, and .* doesn't hold transformer"
    ):
        load(config)
    config = replace(config, diffusion_weights=str(published))  # a pipeline's folder has it one deeper
    with caplog.at_level(logging.INFO, "unimrg.families.openuni"):
        assert_same(load(config), model)
    assert f"transformer from {published}" in caplog.messages
    assert f"meta_queries from {tmp_path / 'first.pth'}" in caplog.messages


def test_without_its_own_file_the_first_stage_begins(model: OpenUni, published: Path) -> None:
    config = config_of(published, weights="", diffusion_weights=str(published / DIFFUSION))
    one, other = load(config, 1), load(config, 2)
    assert_same(one, model, ("lmm.", "transformer.", "vae."))
    assert not torch.equal(one.meta_queries, other.meta_queries)
    assert torch.equal(one.meta_queries, load(config, 1).meta_queries)


def test_layouts_of_the_language_model(model: OpenUni, published: Path, tmp_path: Path) -> None:
    """Transformers' own folder, and the names that its older versions wrote."""
    model.lmm.save_pretrained(tmp_path / "new")
    older = {}
    for name, tensor in model.lmm.state_dict().items():
        for new, old in (
            ("model.language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
        ):
            name = name.replace(new, old) if name.startswith(new) else name
        older[name.removeprefix("model.")] = tensor
    torch.save(older, tmp_path / "older.bin")
    for path in (tmp_path / "new", tmp_path / "older.bin"):
        assert_same(load(config_of(published, language_weights=str(path))), model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"language_weights": ""},
            "family.language_weights is empty, and .* give the folder or file of InternVL3",
        ),
        ({"vae_weights": ""}, "family.vae_weights is empty, and .* give the folder or file of DC-AE"),
        ({"variant": "tiny"}, "doesn't fit the model: .* missing"),
    ],
)
def test_what_is_missing_is_named(published: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=message):
        load(replace(config_of(published), **changes))


def test_damaged_parts_are_named(published: Path, tmp_path: Path) -> None:
    flat = torch.load(published / FLAT, weights_only=True)

    def saved(state: dict[str, Tensor]) -> FamilyConfig:
        torch.save(state, tmp_path / "changed.pth")
        return config_of(published, weights=str(tmp_path / "changed.pth"))

    without = {name: tensor for name, tensor in flat.items() if name != "projector.bias"}
    with pytest.raises(CheckpointError, match=r"1 missing \(projector.bias\)"):
        load(saved(without))
    with pytest.raises(CheckpointError, match="lacks connector"):
        load(saved({name: tensor for name, tensor in flat.items() if not name.startswith("connector.")}))
    with pytest.raises(CheckpointError, match=r"1 unexpected \(stray\)"):
        load(saved(flat | {"stray": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"^stray is no parameter"):
        load(saved(flat | {"lmm.stray": torch.zeros(1)}))


def test_a_folder_keeps_every_bit(model: OpenUni, tmp_path: Path) -> None:
    """Also the tables that are in no file."""
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    config = FamilyConfig(name="openuni", variant="", weights=str(tmp_path))
    assert openuni.image_size(config) == SIDE
    got, ids = openuni.build(config, 0)
    assert_same(got, model)
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in got.named_buffers())
    assert ids("<img>", add_special_tokens=False)["input_ids"] == [512]


def test_configurations_survive_json() -> None:
    for make in VARIANTS.values():
        config = make()
        again = OpenUniConfig.from_dict(config.to_dict())
        assert again.to_dict() == config.to_dict()
        assert (again.vae, again.sana, again.connector) == (config.vae, config.sana, config.connector)


def test_sizes_that_do_not_fit_each_other() -> None:
    config = micro()
    with pytest.raises(ValueError, match="captions differ: 20 and 21"):
        OpenUniConfig(
            lmm=config.lmm, connector=config.connector, vae=config.vae, sana={"caption_channels": 21}
        )
    with pytest.raises(ValueError, match="17 x 16 pixels isn't made of 4-pixel cells"):
        config.grid_of(17, 16)


def test_dropout_is_refused() -> None:
    with pytest.raises(ConfigError, match="OpenUni has no dropout"):
        openuni.build(FamilyConfig(name="openuni", dropout=0.1), 0)


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(libraries.importlib, "import_module", blocked)
    with pytest.raises(MissingExtraError, match=r"pip install 'unimrg\[openuni\]'"):
        OpenUni(micro())
