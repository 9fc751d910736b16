"""What is Show-o's own: its rows and masks, its image tokenizer, sampling, freezing, the published files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.parity.cases import BUNDLED
from tests.tiny_harmon import random_sample
from tests.tiny_showo import greedy, make_processor, micro, random_model, tokenizer
from unimrg.config import FamilyConfig, TrainConfig
from unimrg.errors import CheckpointError, ConfigError
from unimrg.families import showo
from unimrg.families.base import DrawOptions
from unimrg.families.processor import Pictures
from unimrg.families.showo import checkpoint
from unimrg.families.showo.config import SPECIAL_TOKENS, SYSTEM_PROMPT, VARIANTS, MagvitConfig, ShowoConfig
from unimrg.families.showo.magvit import SignQuantizer
from unimrg.families.showo.model import Showo
from unimrg.families.showo.pixels import shrink, to_pictures, to_pixels
from unimrg.families.showo.processor import ShowoBatch
from unimrg.families.showo.sampling import (
    UNKNOWN,
    Noise,
    fill_in,
    masked_after,
    masked_share,
    temperatures,
    training_mask,
)
from unimrg.losses import combine
from unimrg.sample import IMAGE_TASKS, Sample, Task, Turn
from unimrg.tasks import PROMPTS

SIDE, SOURCE, TARGET = 16, 4, 16
TURNS = (Turn("Can you see a red cone?", "yes"), Turn("How many blue objects are there?", "two"))
WEIGHTS = dict.fromkeys(Task, 1.0)


@lru_cache
def model(clip: bool = False) -> Showo:
    """Nobody changes it."""
    return random_model(micro(clip))


def sample(position: int = 0, **options: object) -> Sample:
    return random_sample(np.random.default_rng(position), SIDE, position, **options)  # type: ignore[arg-type]


def process(
    samples: list[Sample], tasks: tuple[Task, ...] = tuple(Task), clip: bool = False, **options: float
) -> ShowoBatch:
    return make_processor(micro(clip), tasks, 5, **options)(samples)


# -- sizes ---------------------------------------------------------------------------------------------------


def test_the_published_vocabulary() -> None:
    config = VARIANTS["showo_512"]()
    names = ("pad", "soi", "eoi", "t2i", "mmu")
    assert [config.special(name) for name in names] == [50295, 50296, 50297, 50300, 50301]
    assert (config.code_offset, config.mask_id, config.llm.vocab_size) == (50305, 58497, 58498)
    assert (config.source_tokens, config.target_tokens) == (256, 1024)
    assert VARIANTS["showo_256"]().source_tokens == 64
    assert config.magvit.stride == 16 and config.magvit.codes == 8192


def test_sizes_that_contradict_each_other_are_refused() -> None:
    config = micro()
    with pytest.raises(ValueError, match="vocab_size is 555"):
        ShowoConfig(magvit=MagvitConfig(code_bits=6), llm=config.llm, text_vocab=config.text_vocab)
    with pytest.raises(ValueError, match="levels differ"):
        MagvitConfig(encoder_blocks=(1, 2))
    with pytest.raises(ValueError, match="4-pixel cells"):
        _ = ShowoConfig(magvit=config.magvit, llm=config.llm, text_vocab=512, image_size=18).grid


@pytest.mark.parametrize("clip", [False, True])
def test_a_configuration_survives_its_file(clip: bool, tmp_path: Path) -> None:
    micro(clip).save_pretrained(tmp_path)
    loaded = ShowoConfig.from_pretrained(tmp_path)
    assert loaded.magvit == micro(clip).magvit and (loaded.clip is None) != clip
    assert loaded.to_dict() == micro(clip).to_dict() | {
        "transformers_version": loaded.to_dict()["transformers_version"]
    }


# -- rows ----------------------------------------------------------------------------------------------------


def spoken(batch: ShowoBatch, config: ShowoConfig) -> str:
    """The packed ids in words: special tokens by name, tokens of a picture `·`, of a target `?`."""
    source = len(batch.images) * config.source_tokens
    text = source + len(batch.target_source) * config.target_tokens
    words = []
    for place in batch.source_index.tolist():
        token = int(batch.token_ids[place - text]) if place >= text else -1
        special = token - config.text_vocab
        if token < 0:
            words.append("·" if place < source else "?")
        else:
            words.append(f"<{SPECIAL_TOKENS[special]}>" if special >= 0 else tokenizer().decode([token]))
    return "".join(words).replace("<|endoftext|>", "<end>")


def test_conversations_stand_behind_the_picture() -> None:
    batch = process([replace(sample(), conversations=(TURNS,))], (Task.UNDERSTANDING,))
    assert spoken(batch, micro()) == (
        f"<mmu><soi>{'·' * SOURCE}<eoi>USER: {TURNS[0].question} ASSISTANT: yes<end>"
        f"USER: {TURNS[1].question} ASSISTANT: two<end>"
    )
    want = [id for turn in TURNS for id in tokenizer()(f" {turn.answer}<|endoftext|>")["input_ids"]]
    assert batch.label_ids.tolist() == want
    # Every answer token is predicted where the one before it stands.
    assert torch.equal(batch.token_ids[batch.label_index + 1 - SOURCE], batch.label_ids)


def test_with_clip_a_system_prompt_comes_first() -> None:
    batch = process([replace(sample(), conversations=(TURNS[:1],))], (Task.UNDERSTANDING,), clip=True)
    assert spoken(batch, micro(True)).startswith(f"<mmu>A picture.<soi>{'·' * 9}<eoi>USER: Can")
    assert batch.clip_images.shape == (1, 12, 12, 3)
    assert VARIANTS["showo_w_clip_vit_256"]().system_prompt == SYSTEM_PROMPT


def test_text_alone_begins_with_the_end_token() -> None:
    alone = replace(sample(picture=False), conversations=(TURNS[:1],))
    batch = process([alone, sample()], (Task.UNDERSTANDING,))
    assert spoken(batch, micro()).startswith("<end>USER: Can you see a red cone? ASSISTANT: yes<end><mmu>")


def test_drawings_share_the_picture() -> None:
    text = spoken(process([sample(conversations=1)]), micro())
    assert text.count("<mmu>") == 1
    assert text.count(f"<end><soi>{'?' * TARGET}<eoi>") == len(IMAGE_TASKS)
    prompts = [part.rpartition("<end>")[2] for part in text.split("<end><soi>")[:-1]]
    for task, prompt in zip(IMAGE_TASKS, prompts, strict=True):
        assert prompt in PROMPTS[task]


def test_a_dropped_prompt_drops_the_picture_too() -> None:
    """That row is what guidance contrasts with; depth and boundaries are never dropped."""
    batch = process([sample(conversations=0)], IMAGE_TASKS, prompt_dropout=1.0)
    text = spoken(batch, micro())
    assert text.count(f"<t2i><end><end><soi>{'?' * TARGET}<eoi>") == 1
    assert text.count("<t2i>") == 1 and text.count("<mmu>") == 1
    losses = model()(batch)
    assert all(losses[task].count == batch.counts[task] > 0 for task in IMAGE_TASKS)


def dense(batch: ShowoBatch, places: Tensor | slice) -> Tensor:
    return batch.plan.dense_mask()[places][:, places]


def test_who_looks_at_whom() -> None:
    """A picture is one block; a target is one block that also sees everything before it."""
    batch = process([sample(conversations=0, tasks=(Task.DEPTH,))], (Task.DEPTH,))
    prefix, mask = SOURCE + 3, batch.plan.dense_mask()
    assert bool(mask[:prefix, :prefix].all()) and not mask[:prefix, prefix:].any()
    assert bool(mask[-TARGET - 2 :].all())
    prompt = slice(prefix, -TARGET - 2)
    assert torch.equal(mask[prompt, prompt], torch.ones_like(mask[prompt, prompt]).tril())
    assert bool(mask[prompt, :prefix].all()) and not mask[prompt, -TARGET - 2 :].any()


def test_with_clip_all_look_at_the_features_only() -> None:
    batch = process([replace(sample(), conversations=(TURNS[:1],))], (Task.UNDERSTANDING,), clip=True)
    before, features = len(make_processor(micro(True)).opening), 9
    want = torch.ones(batch.plan.length, batch.plan.length, dtype=torch.bool).tril()
    want[:, before : before + features] = True
    assert torch.equal(batch.plan.dense_mask(), want)


def test_long_conversations_are_cut_and_counted() -> None:
    long = replace(sample(), conversations=(TURNS * 20,))
    made = make_processor(micro(), (Task.UNDERSTANDING,))
    made.max_text_tokens = 60
    batch = made([long])
    assert batch.notes["truncated"] == 1
    assert batch.tokens == 60 + SOURCE  # the picture counts as one of the 60, its end as none


# -- targets -------------------------------------------------------------------------------------------------


def test_masks_are_a_function_of_the_sample_alone() -> None:
    first, second = sample(0), sample(1)
    together, alone = process([first, second]), process([second])
    assert torch.equal(together.target_masked[len(IMAGE_TASKS) :], alone.target_masked)
    assert together.noise_seeds[len(IMAGE_TASKS) :] == alone.noise_seeds


def test_padding_counts_in_no_image_loss() -> None:
    whole, clipped = (
        process([sample(conversations=0, valid=box)], IMAGE_TASKS) for box in ((0, 0, 16, 16), (0, 4, 16, 12))
    )
    assert torch.equal(whole.target_masked, clipped.target_masked)
    inside = whole.target_masked.view(-1, 4, 4)[:, 1:3].flatten(1).sum(1)
    assert [clipped.counts[task] for task in IMAGE_TASKS] == inside.tolist()
    rows = torch.zeros(len(IMAGE_TASKS) * TARGET, dtype=torch.bool)
    rows[clipped.loss_rows] = True
    assert not rows.view(-1, 4, 4)[:, [0, 3]].any()


@torch.no_grad()
def test_the_loss_is_at_the_masked_codes_of_the_target() -> None:
    """Computed again from dense logits: same positions, full vocabulary, the tokenizer's own codes."""
    batch, config = process([sample(conversations=0)], IMAGE_TASKS), micro()
    codes = model().target_codes(batch)
    pictures = torch.cat([batch.images, batch.extra_images])  # the redrawn one is the one that is read
    assert torch.equal(codes, model().magvit.encode(to_pixels(pictures)))
    logits = model().showo.lm_head(model().hidden(batch, codes)).log_softmax(-1)
    text = len(batch.images) * SOURCE
    for number, task in enumerate(IMAGE_TASKS):
        rows = range(text + number * TARGET, text + (number + 1) * TARGET)
        places = torch.tensor([batch.source_index.tolist().index(row) for row in rows])
        terms = -logits[places, config.code_offset + codes[number]][batch.target_masked[number]]
        loss = model()(batch)[task]
        torch.testing.assert_close(loss.sum, terms.sum(), rtol=1e-5, atol=0)
        assert loss.count == len(terms)


@torch.no_grad()
def test_masked_codes_are_not_seen() -> None:
    """Other codes under the mask change nothing, others beside it do."""
    batch = process([sample(conversations=0)])
    codes, bits = model().target_codes(batch), micro().magvit.codes
    embeds = model().embed(batch, codes)
    other = (codes + 1) % bits
    hidden = torch.where(batch.target_masked, other, codes)
    shown = torch.where(batch.target_masked, codes, other)
    assert torch.equal(model().embed(batch, hidden), embeds)
    assert not torch.equal(model().embed(batch, shown), embeds)


@torch.no_grad()
def test_a_picture_is_read_by_the_codes_of_its_smaller_copy() -> None:
    batch = process([sample()])
    averaged = to_pixels(batch.images).unflatten(3, (-1, 2)).mean(4).unflatten(2, (-1, 2)).mean(3)
    torch.testing.assert_close(shrink(to_pixels(batch.images), 8), averaged)
    ids = micro().code_offset + model().magvit.encode(averaged)
    want = model().showo.get_input_embeddings()(ids)
    assert torch.equal(model().embed_pictures(batch.images, batch.clip_images), want)


# -- the image tokenizer -------------------------------------------------------------------------------------


def test_codes_are_signs() -> None:
    quantizer = SignQuantizer(3)
    signs = torch.tensor([[-1.0, -1, -1], [-1, -1, 1], [1, -1, 0]]).T.view(1, 3, 1, 3)
    assert quantizer.codes(signs).tolist() == [[0, 1, 4]]
    back = quantizer.signs(torch.tensor([[5, 0]]), (1, 2))
    assert back.flatten(2)[0].T.tolist() == [[1, -1, 1], [-1, -1, -1]]
    latents = signs.clone().requires_grad_()
    through, losses = quantizer(latents)
    through.sum().backward()
    assert torch.equal(latents.grad, torch.ones_like(latents))  # type: ignore[arg-type]
    assert float(losses.commitment.detach()) == pytest.approx(1.25 / 9)


def test_pictures_survive_pixels() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    # Published decoding cuts off, so rounding noise may cost one step.
    assert int((to_pictures(to_pixels(values)).int() - values.int()).abs().max()) <= 1


@torch.no_grad()
def test_half_precision_draws_and_learns() -> None:
    """As DeepSpeed makes it: weights halved, buffers not."""
    half = random_model(micro(True))
    for parameter in half.parameters():
        parameter.data = parameter.data.bfloat16()
    losses = half(process([sample(conversations=1)], clip=True))
    assert all(bool(loss.sum.isfinite()) for loss in losses.values())
    picture = sample().image
    assert picture is not None
    (drawn,) = half.draw(make_processor(micro(True)), [picture], Task.DEPTH, DrawOptions(3))
    assert drawn.std() > 0


# -- sampling ------------------------------------------------------------------------------------------------


def test_training_masks_two_thirds_on_average() -> None:
    rng = np.random.default_rng(0)
    shares = [
        training_mask(float(masked_share(rng.random())), rng.random(TARGET)).mean() for _ in range(2000)
    ]
    assert np.mean(shares) == pytest.approx(2 / np.pi, abs=0.02)
    assert training_mask(0.0, rng.random(TARGET)).sum() == 1
    assert training_mask(1.0, rng.random(TARGET)).all()


def test_the_schedule_descends_and_temperatures_vanish() -> None:
    left = [masked_after(step, 8, 256) for step in range(8)]
    assert left == sorted(left, reverse=True) and left[-1] == 1
    assert temperatures(1.0, 4) == [0.75, 0.375, 0.09375, 0.0]


def test_known_codes_stay_and_the_least_trusted_are_masked_again() -> None:
    logits = torch.zeros(1, 4, 3)
    logits[0, :, 1] = torch.tensor([4.0, 1.0, 2.0, 3.0])
    codes = torch.tensor([[UNKNOWN, UNKNOWN, 2, UNKNOWN]])
    quiet = Noise(torch.ones(1, 4, 3), torch.full((1, 4), 0.5))
    filled = fill_in(logits, codes, left=2, temperature=0.0, noise=quiet)
    assert filled.drawn.tolist() == [[1, 1, 2, 1]]
    assert filled.codes.tolist() == [[1, UNKNOWN, 2, UNKNOWN]]
    assert fill_in(logits, codes, left=9, temperature=0.0, noise=quiet).codes.tolist() == [
        [1, UNKNOWN, 2, UNKNOWN]
    ]


# -- with CLIP, what the registry tests for all families -----------------------------------------------------


def test_packed_is_separate_with_clip() -> None:
    """One pass over shared prefixes has the losses and gradients of a pass for every branch."""
    samples = [sample(position, conversations=2) for position in range(2)]
    made, pictures, branches = make_processor(micro(True), seed=3), Pictures(), []
    for one in samples:
        branches += made.branches(one, pictures, {"truncated": 0})
    packed = made.assemble(branches, pictures, 2, 0)
    singles = [made.assemble([branch], pictures, 1, 0) for branch in branches]
    got, want = (gradients(batches) for batches in ([packed], singles))
    assert got.keys() == want.keys() == {n for n, p in model(True).named_parameters() if p.requires_grad}
    for name, tensor in want.items():
        assert float(tensor.abs().max()) > 0
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()))


def gradients(batches: list[ShowoBatch]) -> dict[str, Tensor]:
    counts = {task: sum(batch.counts[task] for batch in batches) for task in Task}
    model(True).zero_grad()
    for batch in batches:
        combine(model(True)(batch), WEIGHTS, counts).backward()
    return {name: p.grad.clone() for name, p in model(True).named_parameters() if p.grad is not None}


def test_cached_answers_are_uncached_with_clip() -> None:
    images, questions = [sample().image, None], ["Can you see a red cone?", "Hm?"]
    made = make_processor(micro(True))
    pairs = zip(images, questions, strict=True)
    want = [greedy(model(True), made, image, question, 8) for image, question in pairs]
    assert model(True).answer(made, images, questions, 8) == want


def test_drawing_with_clip() -> None:
    picture = sample().image
    assert picture is not None
    (drawn,) = model(True).draw(make_processor(micro(True)), [picture], Task.PIXEL, DrawOptions(3))
    assert drawn.shape == (SIDE, SIDE, 3) and drawn.dtype == np.uint8


def test_a_folder_keeps_every_bit_with_clip(tmp_path: Path) -> None:
    model(True).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded, _ = showo.build(FamilyConfig(name="showo", weights=str(tmp_path)), 0)
    ours, theirs = model(True).state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(p.requires_grad for p in [*loaded.magvit.parameters(), *loaded.clip.parameters()])
    assert showo.image_size(FamilyConfig(name="showo", weights=str(tmp_path))) == SIDE


# -- freezing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "left"), [([], {"showo", "mm_projector"}), (["llm"], {"mm_projector"})])
def test_parts_can_be_frozen(parts: list[str], left: set[str]) -> None:
    frozen = random_model(micro(True)).train()
    frozen.freeze(parts, tuple(Task))
    assert {name.partition(".")[0] for name, p in frozen.named_parameters() if p.requires_grad} == left
    with pytest.raises(ConfigError, match="no part named 'clip'; parts are llm, projector"):
        frozen.freeze(["clip"], tuple(Task))


def test_only_biases_escape_weight_decay() -> None:
    decayed, free = model(True).parameter_groups(0.1)
    names = {id(p): name for name, p in model(True).named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert all("bias" in names[id(p)] for p in free["params"])
    assert "showo.model.final_layernorm.weight" in {names[id(p)] for p in decayed["params"]}
    assert len(decayed["params"]) + len(free["params"]) == sum(
        p.requires_grad for p in model(True).parameters()
    )


# -- published files -----------------------------------------------------------------------------------------


@pytest.fixture
def as_variant(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], str]:
    """The micro sizes under the name of a variant."""

    def named(clip: bool) -> str:
        monkeypatch.setitem(VARIANTS, "micro", lambda: micro(clip))
        return "micro"

    return named


def published(folder: Path, variant: str, clip: bool) -> FamilyConfig:
    showo.save_published(model(clip), folder)
    tokenizer().save_pretrained(folder)
    vision = str(folder / checkpoint.CLIP) if clip else ""
    return FamilyConfig(
        name="showo",
        variant=variant,
        weights=str(folder),
        vae_weights=str(folder / checkpoint.MAGVIT),
        vision_weights=vision,
    )


@pytest.mark.parametrize("clip", [False, True])
def test_published_files_keep_every_bit(
    as_variant: Callable[[bool], str], clip: bool, tmp_path: Path
) -> None:
    config = published(tmp_path, as_variant(clip), clip)
    own = load_file(tmp_path / checkpoint.WEIGHTS)
    assert {name.partition(".")[0] for name in own} == ({"showo", "mm_projector"} if clip else {"showo"})
    loaded, _ = showo.build(config, 0)
    assert all(
        torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model(clip).state_dict().items()
    )
    batch = process([sample(conversations=1)], clip=clip)
    losses, same = loaded.eval()(batch), model(clip)(batch)
    assert all(torch.equal(losses[task].sum, same[task].sum) for task in Task)
    assert not any(p.requires_grad for p in loaded.magvit.parameters())
    described = json.loads((tmp_path / "config.json").read_text())
    assert described == {
        "_class_name": "Showo",
        "w_clip_vit": clip,
        "vocab_size": 555,
        "llm_vocab_size": 512,
        "llm_model_path": "microsoft/phi-1_5",
        "codebook_size": 32,
        "num_vq_tokens": 16,
        "load_from_showo": True,
        "mask_token_id": 554,
    }


def test_clip_may_come_with_its_text_tower(as_variant: Callable[[bool], str], tmp_path: Path) -> None:
    config = published(tmp_path, as_variant(True), True)
    path = tmp_path / checkpoint.CLIP / "model.safetensors"
    extra = {
        "logit_scale": torch.ones(1),
        "text_model.x": torch.ones(2),
        "visual_projection.weight": torch.ones(2),
    }
    positions = {"vision_model.embeddings.position_ids": torch.arange(10).unsqueeze(0)}
    save_file(load_file(path) | extra | positions, path)
    loaded, _ = showo.build(config, 0)
    assert torch.equal(loaded.clip.post_layernorm.weight, model(True).clip.post_layernorm.weight)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vae_weights": ""}, "vae_weights is empty"),
        ({"vision_weights": ""}, "vision_weights is empty"),
        ({"dropout": 0.1}, "no dropout"),
        ({"variant": "huge"}, "unknown value 'huge'"),
    ],
)
def test_what_is_missing_is_said(
    as_variant: Callable[[bool], str], change: dict[str, object], says: str, tmp_path: Path
) -> None:
    config = published(tmp_path, as_variant(True), True)
    with pytest.raises(ConfigError, match=says):
        showo.build(replace(config, **change), 0)  # type: ignore[arg-type]


def test_a_needless_clip_is_refused(as_variant: Callable[[bool], str], tmp_path: Path) -> None:
    config = published(tmp_path, as_variant(False), False)
    with pytest.raises(ConfigError, match="reads no picture by CLIP"):
        showo.build(replace(config, vision_weights=str(tmp_path)), 0)


def test_every_published_key_is_accounted_for(as_variant: Callable[[bool], str], tmp_path: Path) -> None:
    config = published(tmp_path, as_variant(True), True)
    path = tmp_path / checkpoint.WEIGHTS
    state = load_file(path)
    lost = state.pop("mm_projector.2.bias")
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(mm_projector.2.bias\)"):
        showo.build(config, 0)
    save_file(state | {"mm_projector.2.bias": lost, "showo.more": lost.clone()}, path)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(showo.more\)"):
        showo.build(config, 0)


@pytest.mark.parametrize("name", ["showo_256", "showo_512", "showo_w_clip_vit_256", "showo_w_clip_vit_512"])
def test_published_key_lists_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and shapes of the published files, on the meta device; CLIP's as the library has them."""
    sizes = VARIANTS[name]()
    with torch.device("meta"):
        whole = Showo(sizes)
        files = {part: listed(part) for part in (name.rpartition("_")[0], "magvitv2")}
        clip = {
            f"vision_model.{n.removeprefix('clip.')}": t
            for n, t in whole.state_dict().items()
            if n.startswith("clip.")
        }
    states = {"own": files[name.rpartition("_")[0]], "magvit": files["magvitv2"], "clip": clip}
    monkeypatch.setattr(checkpoint, "read_state_dict", lambda path: dict(states[path]))
    vision = "clip" if sizes.clip is not None else ""
    config = FamilyConfig(
        name="showo", variant=name, weights="own", vae_weights="magvit", vision_weights=vision
    )
    checkpoint.check_fits(whole, checkpoint.published_state(sizes, config), name)
    assert checkpoint.published_config(sizes)["num_vq_tokens"] == sizes.target_tokens


def listed(name: str) -> dict[str, Tensor]:
    shapes = json.loads((BUNDLED / "showo" / "keys" / f"{name}.json").read_text())
    return {key: torch.empty(shape) for key, shape in shapes.items()}


def test_another_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "tiny", lambda: micro_with_end(5))
    with pytest.raises(
        CheckpointError, match=r"512 ids and <.endoftext.> is 0, Show-o needs at most 512 and 5"
    ):
        showo.build(FamilyConfig(name="showo"), 0)


def micro_with_end(end: int) -> ShowoConfig:
    config = micro()
    config.text_end = end
    return config


def test_no_published_prompts() -> None:
    train = TrainConfig(published_prompts=True)
    with pytest.raises(ConfigError, match="published_prompts"):
        showo.processor(model(), tokenizer(), train, tuple(Task), 0)
    made = showo.processor(model(), tokenizer(), TrainConfig(prompt_dropout=0.3), tuple(Task), 7)
    assert (made.seed, made.prompt_dropout, made.max_text_tokens) == (7, 0.3, 1472)
