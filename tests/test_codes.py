"""Frozen codes in place of pictures change nothing but the time: the same losses and the same gradients.

Every family is trained on the same samples twice: from pixels, and from what its frozen encoder said of them,
where that encoder must not be called any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from tests import families, tiny_harmon, tiny_showo
from tests.engine_runs import WEIGHTS, Group, coded, frozen
from tests.families import NAMES, SIDE
from tests.tiny_harmon import random_sample
from unimrg.config import FamilyConfig, TrainConfig
from unimrg.errors import CheckpointError, ConfigError, DataError
from unimrg.families import load_family
from unimrg.families.base import Family
from unimrg.families.encoder import PictureEncoder, grey, plain
from unimrg.families.harmon.processor import HarmonProcessor
from unimrg.families.processor import PackedProcessor
from unimrg.families.rows import PackedBatch
from unimrg.losses import combine
from unimrg.sample import BFLOAT16, IMAGE_TASKS, PICTURES, Sample, Task

CLIP = "showo with CLIP"
MODELS = (*NAMES, CLIP)
FROZEN = {
    "harmon": "vae",
    "showo": "magvit",
    CLIP: "magvit",
    "openuni": "vae",
    "janus": "janus.model.vqmodel",
}
READ_PIXELS = {"harmon": False, "showo": False, CLIP: True, "openuni": True, "janus": True}
CONTINUOUS = ("harmon", "openuni")
PIXEL, DEPTH, SEGMENTATION = IMAGE_TASKS
SHAPES: dict[str, tuple[dict[str, Any], ...]] = {
    "mixed": (
        {"conversations": 2},
        {"picture": False, "turns": 2},
        {"tasks": (PIXEL, DEPTH), "conversations": 0, "valid": (2, 4, 16, 12)},
        {"tasks": (PIXEL, SEGMENTATION)},
    ),
    "text only": ({"picture": False}, {"picture": False, "conversations": 3}),
    "no questions": ({"tasks": (PIXEL, DEPTH), "conversations": 0},),
}


@lru_cache
def model_of(name: str) -> Family:
    model: Family
    if name == CLIP:
        model = tiny_showo.random_model(tiny_showo.micro(clip=True))
    else:
        model = families.fresh_model(name)
    return model.train()


def processor_of(
    name: str, from_codes: bool, tasks: tuple[Task, ...] = tuple(Task)
) -> PackedProcessor[Any, Any]:
    made: PackedProcessor[Any, Any]
    if name == CLIP:
        made = tiny_showo.make_processor(tiny_showo.micro(clip=True), tasks, seed=3)
    else:
        made = families.processor(name, tasks)
    made.grey_codes = model_of(name).grey_codes() if from_codes else None
    return made


def samples_of(shape: str, seed: int = 5) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [random_sample(rng, SIDE, position, **made) for position, made in enumerate(SHAPES[shape])]


@contextmanager
def counted_calls(module: nn.Module) -> Iterator[list[str]]:
    """Every call of `module`, or of a layer inside it."""
    calls: list[str] = []

    def note(kind: nn.Module, *_: Any) -> None:
        calls.append(type(kind).__name__)

    hooks = [layer.register_forward_pre_hook(note) for layer in module.modules()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def learnt(model: Family, batch: PackedBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums of the losses by task, and every gradient of their weighted total."""
    model.zero_grad()
    torch.manual_seed(0)
    losses = model(batch)
    combine(losses, WEIGHTS.by_task(), batch.counts).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {task.value: loss.sum.detach() for task, loss in losses.items()}, gradients


# -- training ------------------------------------------------------------------------------------------------


def check_equal(name: str, model: Family, pixels: PackedBatch, codes: PackedBatch) -> None:
    """The same counts, losses and gradients, without a call of the frozen encoder."""
    assert pixels.codes is None and codes.codes is not None
    assert codes.counts == pixels.counts and codes.noise_seeds == pixels.noise_seeds
    part = model.get_submodule(FROZEN[name])
    with counted_calls(part) as calls:
        want = learnt(model, pixels)
    assert calls
    with counted_calls(part) as calls:
        got = learnt(model, codes)
    assert not calls
    for mine, reference in zip(got, want, strict=True):
        assert mine.keys() == reference.keys()
        for key, value in reference.items():
            tolerance = 1e-5 * float(value.abs().max()) + 1e-7 if name in CONTINUOUS else 0.0
            error = float((mine[key] - value).abs().max())
            assert error <= tolerance, f"{key} is off by {error}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_losses_and_gradients(name: str, shape: str) -> None:
    """Bit for bit where the encoder gives integers, else to the rounding of its batches."""
    model, samples = model_of(name), samples_of(shape)
    pixels = processor_of(name, False)(samples)
    codes = processor_of(name, True)([coded(sample, model) for sample in samples])
    check_equal(name, model, pixels, codes)
    assert codes.images.numel() == (pixels.images.numel() if READ_PIXELS[name] else 0)
    assert codes.extra_images.numel() == 0 and len(codes.extra_images) == len(pixels.extra_images)


@pytest.mark.parametrize("name", MODELS)
def test_some_tasks_alone(name: str) -> None:
    model, samples = model_of(name), samples_of("mixed")
    for tasks in ((Task.UNDERSTANDING,), (PIXEL,), (Task.UNDERSTANDING, DEPTH)):
        pixels = processor_of(name, False, tasks)(samples)
        codes = processor_of(name, True, tasks)([coded(sample, model) for sample in samples])
        torch.testing.assert_close(learnt(model, codes), learnt(model, pixels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prompts", [False, True])
def test_published_geometry(prompts: bool) -> None:
    """Where a question sees another picture than a redrawing, which has codes of its own.

    With the published prompts a text-only sample sees the grey picture.
    """
    model, (one, text, two, three) = model_of("harmon"), samples_of("mixed")
    squashed = samples_of("mixed", seed=6)[0].image
    assert squashed is not None
    samples = [replace(one, targets={**one.targets, PIXEL: squashed}), text, two, three]
    stored = [coded(sample, model) for sample in samples]
    assert set(stored[0].codes) == set(PICTURES) and "pixel" not in stored[2].codes

    def processor(codes: np.ndarray | None) -> HarmonProcessor:
        config, tokenizer = tiny_harmon.micro(), tiny_harmon.tokenizer()
        return HarmonProcessor(config, tokenizer, published=prompts, grey_codes=codes)

    pixels, codes = processor(None)(samples), processor(model.grey_codes())(stored)
    check_equal("harmon", model, pixels, codes)
    assert codes.codes is not None
    shown = torch.from_numpy(plain(stored[0].codes["pixel"]))
    assert any(torch.equal(row, shown) for row in codes.codes) == prompts


@pytest.mark.parametrize("name", CONTINUOUS)
def test_bfloat16(name: str, tmp_path: Path) -> None:
    """Latents of an encoder in bfloat16 are those that a model in bfloat16 makes; they are stored as bits."""
    model = families.fresh_model(name)
    model.save_pretrained(tmp_path)
    model.to(torch.bfloat16)
    encoder = load_family(name).picture_encoder(
        FamilyConfig(name=name, weights=str(tmp_path)), torch.bfloat16
    )
    pictures = noise(3)
    codes = encoder(pictures)
    assert codes.dtype == BFLOAT16 and encoder.identity["dtype"] == "bfloat16"
    inside = model.frozen_codes(torch.from_numpy(pictures)).bfloat16()
    assert torch.equal(torch.from_numpy(plain(codes)).bfloat16(), inside)

    sample = random_sample(np.random.default_rng(1), SIDE, tasks=(PIXEL,))
    assert sample.image is not None
    (bits,) = encoder(sample.image[None])
    stored = Sample.from_row(replace(sample, targets={}, codes={"image": bits}).to_row())
    assert stored.codes["image"].dtype == BFLOAT16
    batch = processor_of(name, True)([stored])
    assert batch.codes is not None and batch.codes.dtype == torch.float32
    assert torch.equal(model.codes_of(batch), torch.from_numpy(plain(bits))[None].bfloat16())


@pytest.mark.parametrize("name", [name for name in MODELS if name not in CONTINUOUS])
def test_integers_do_not_depend_on_autocast(name: str) -> None:
    """What is to be predicted is the same in a training in half precision."""
    model, samples = model_of(name), samples_of("mixed")
    pixels = processor_of(name, False)(samples)
    codes = processor_of(name, True)([coded(sample, model) for sample in samples])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want, got = model(pixels), model(codes)
    assert got.keys() == want.keys() and all(torch.equal(got[task].sum, want[task].sum) for task in want)


@pytest.mark.parametrize("name", NAMES)
def test_the_families_own_processors(name: str) -> None:
    """`from_codes` gives the processor the model's own codes of a grey picture."""
    model, tokenizer = model_of(name), families.tiny(name).tokenizer()
    family = load_family(name)
    made = family.processor(model, tokenizer, TrainConfig(), tuple(Task), 3, from_codes=True)
    assert np.array_equal(made.grey_codes, frozen(model, grey(SIDE)))
    assert made([]).codes is not None  # only the filler
    assert family.processor(model, tokenizer, TrainConfig(), tuple(Task), 3)([]).codes is None


@pytest.mark.slow
def test_ranks_stay_in_step(tmp_path: Path) -> None:
    """Two workers with everything sharded, of which one has only text at times, are as one worker.

    A sharded engine gathers the frozen encoder's weights in every call of it: were one rank to make a call
    that the other doesn't make, both would wait for ever.
    """
    plans = {
        engine: {name: ("train_coded", {"engine": engine, "family": name}) for name in NAMES}
        for engine in ("torch", "zero3")
    }
    alone, two = Group(tmp_path / "alone", 1, plans["torch"]), Group(tmp_path / "two", 2, plans["zero3"])
    alone.wait(), two.wait()
    for name in NAMES:
        want, got = alone.result(name), two.result(name)
        for mine, reference in zip(got["steps"], want["steps"], strict=True):
            assert mine["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        for key, tensor in want["weights"].items():
            torch.testing.assert_close(
                got["weights"][key], tensor, rtol=1e-5, atol=1e-5, msg=f"{name}: {key}"
            )


def test_half_precision_flips_no_code(tmp_path: Path) -> None:
    """DeepSpeed rounds all weights but those of tokenizers, which stay whole on every rank."""
    plan = {
        f"{name}-{engine}": ("codes_in_half", {"engine": engine, "family": name})
        for name in ("showo", "janus")
        for engine in ("zero2", "zero3")
    }
    group = Group(tmp_path / "group", 2, plan).wait()
    for run in plan:
        name = run.split("-")[0]
        exact = families.fresh_model(name)
        rng = np.random.default_rng(0)
        pictures = [random_sample(rng, SIDE, n).image for n in range(16)]
        want = np.stack([frozen(exact, picture) for picture in pictures if picture is not None])
        for rank in (0, 1):
            assert np.array_equal(group.result(run, rank)["codes"].numpy(), want)
        for key, tensor in group.result(run)["weights"].items():
            kept = key.startswith(type(exact).EXACT)
            assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), key


# -- samples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.dtype(np.float32), BFLOAT16, np.dtype(np.uint8), np.dtype(np.uint16)])
def test_rows(kind: np.dtype[Any]) -> None:
    """Through Arrow and back, bit for bit, beside samples without codes."""
    rng = np.random.default_rng(0)

    def some() -> np.ndarray:
        raw: np.ndarray = rng.integers(0, 256, (4, 3, kind.itemsize), np.uint8).view(kind)[..., 0]
        return raw

    text = random_sample(rng, SIDE, picture=False)
    samples = [
        Sample("a", 0, (), codes={name: some() for name in PICTURES}, valid=(0, 2, SIDE, 9)),
        replace(random_sample(rng, SIDE, 1, tasks=()), codes={"image": some(), "depth": some()}),
        random_sample(rng, SIDE, 2),
        text,
    ]
    rows = pa.Table.from_pylist([sample.to_row() for sample in samples]).to_pylist()
    for row, sample in zip(rows, samples, strict=True):
        again = Sample.from_row(row)
        assert again.to_row() == sample.to_row()
        assert again.codes.keys() == sample.codes.keys()
        for name, codes in sample.codes.items():
            assert again.codes[name].dtype == kind and again.codes[name].shape == (4, 3)
            assert again.codes[name].tobytes() == codes.tobytes()
    assert [sample.has_image for sample in samples] == [True, True, True, False]
    assert [sample.drawn for sample in samples] == [IMAGE_TASKS, (PIXEL, DEPTH), IMAGE_TASKS, ()]


def test_rows_from_before_there_were_codes() -> None:
    sample = random_sample(np.random.default_rng(0), SIDE)
    row = {name: value for name, value in sample.to_row().items() if "codes" not in name}
    assert Sample.from_row(row).to_row() == sample.to_row()


def test_what_samples_lack() -> None:
    model, (sample, *_) = model_of("openuni"), samples_of("mixed")
    whole = coded(sample, model)
    assert whole.image is not None
    pixels, codes = processor_of("openuni", False), processor_of("openuni", True)
    for processor, lacking, message in (
        (codes, sample, "sample-0 lacks the codes of its image"),
        (codes, replace(whole, image=None), "sample-0 has only codes of its image"),
        (
            codes,
            replace(whole, targets=sample.targets, codes={"image": whole.codes["image"]}),
            "of its depth",
        ),
        (
            codes,
            replace(whole, codes={"image": np.zeros(7, np.uint16)}),
            r"int64 \[7\], the model float32 \[",
        ),
        (pixels, whole, "sample-0 has only codes of its depth"),
        (pixels, replace(whole, image=None), "from_codes=True"),
    ):
        with pytest.raises(DataError, match=message):
            processor([lacking])
    assert pixels([replace(whole, targets=sample.targets)]).codes is None  # with both, as asked


# -- the encoder alone ---------------------------------------------------------------------------------------


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(9).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def published(name: str, folder: Path) -> list[FamilyConfig]:
    """Ways to name an export's files."""
    at = {key: str(folder / key) for key in ("vae", "magvitv2", "internvl3", "transformer", "original")}
    if name == "harmon":
        files = [("harmon.safetensors", "vae.safetensors")]
        return [FamilyConfig(name, weights=str(folder / w), vae_weights=str(folder / v)) for w, v in files]
    if name == "showo":
        return [FamilyConfig(name, weights=str(folder), vae_weights=at["magvitv2"])]
    if name == "janus":
        return [FamilyConfig(name, weights=str(folder)), FamilyConfig(name, weights=at["original"])]
    parts = {"language_weights": at["internvl3"], "diffusion_weights": at["transformer"]}
    whole = FamilyConfig(name, weights=str(folder / "openuni.pth"), vae_weights=at["vae"], **parts)
    return [whole, replace(whole, weights="")]


@pytest.mark.parametrize("name", NAMES)
def test_alone_as_inside(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder of ours and from published files, by one identity, and without building the model."""
    family = load_family(name)
    monkeypatch.setitem(family.checkpoint.VARIANTS, "tiny", families.tiny(name).micro)
    model = families.fresh_model(name)
    ours, export = tmp_path / "ours", tmp_path / "export"
    export.mkdir()
    model.save_pretrained(ours)
    family.save_published(model, export)
    pictures = noise(5)
    want = model.frozen_codes(torch.from_numpy(pictures)).numpy()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the whole model is built")

    monkeypatch.setattr(Family, "__init__", refuse)
    encoders = [
        family.picture_encoder(config)
        for config in (FamilyConfig(name, weights=str(ours)), *published(name, export))
    ]
    for encoder in encoders:
        assert np.array_equal(plain(encoder(pictures)), want)
        assert encoder.identity == encoders[0].identity
        assert (encoder.side, encoder.reads_pixels) == (SIDE, READ_PIXELS[name])
    assert encoders[0].identity["family"] == name and len(encoders[0].identity["sha256"]) == 64


@pytest.mark.parametrize("name", NAMES)
def test_the_tiny_ones(name: str) -> None:
    """The encoder of the package's own assets is that of the default job; integers as small as they fit."""
    config = FamilyConfig(name)
    encoder = load_family(name).picture_encoder(config)
    pictures = np.random.default_rng(2).integers(0, 256, (3, encoder.side, encoder.side, 3), np.uint8)
    model, _ = load_family(name).build(config, 0)
    codes = encoder(pictures)
    assert codes.dtype == (np.float32 if name in CONTINUOUS else np.uint16)
    assert np.array_equal(plain(codes), model.frozen_codes(torch.from_numpy(pictures)).numpy())
    alone = np.concatenate([encoder(picture[None]) for picture in pictures])
    np.testing.assert_allclose(plain(alone), plain(codes), rtol=1e-5, atol=1e-5 if name in CONTINUOUS else 0)


def test_with_clip_there_are_no_codes_to_read(tmp_path: Path) -> None:
    model = model_of(CLIP)
    model.save_pretrained(tmp_path)
    encoder = load_family("showo").picture_encoder(FamilyConfig("showo", weights=str(tmp_path)))
    assert encoder.reads_pixels and encoder.identity["settings"]["source_size"] is None
    assert encoder(noise(1)).shape == (1, model.config.target_tokens)
    assert processor_of("showo", True)([]).codes.shape[1] == model.config.target_tokens * 5 // 4


def test_identity_is_what_the_codes_depend_on() -> None:
    """One bit of one weight, a setting, the type: another identity. Anything else: the same."""
    vae = model_of("harmon").get_submodule("vae")

    def identity(module: nn.Module, dtype: torch.dtype = torch.float32, **settings: Any) -> dict[str, Any]:
        return PictureEncoder(settings, module, module, SIDE, False, dtype=dtype).identity

    first = identity(vae, scale=1.0)
    assert identity(vae, scale=1.0) == first
    assert identity(vae, scale=2.0) != first
    assert identity(families.fresh_model("harmon").get_submodule("vae"), scale=1.0) == first
    assert identity(families.fresh_model("harmon").get_submodule("vae"), torch.bfloat16, scale=1.0) != first
    other = families.fresh_model("harmon").get_submodule("vae")
    with torch.no_grad():
        weight = other.get_parameter("quant_conv.bias")
        weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))
    assert identity(other, scale=1.0)["sha256"] != first["sha256"]


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            FamilyConfig("harmon", variant="harmon_0_5b"),
            ConfigError,
            r"family\.weights is empty: harmon_0_5b",
        ),
        (FamilyConfig("showo", variant="showo_256"), ConfigError, r"family\.weights is empty: showo_256"),
        (
            FamilyConfig("openuni", variant="openuni_b_512"),
            ConfigError,
            r"family\.weights is empty: openuni_b",
        ),
        (
            FamilyConfig("janus", variant="janus_pro_1b"),
            ConfigError,
            r"family\.weights is empty: janus_pro_1b",
        ),
        (FamilyConfig("harmon", weights="x.pth"), ConfigError, r"family\.vae_weights is empty"),
        (FamilyConfig("showo", weights="x.pth"), ConfigError, r"family\.vae_weights is empty"),
        (FamilyConfig("openuni", language_weights="x"), ConfigError, r"family\.vae_weights is empty"),
        (FamilyConfig("janus", weights="absent"), CheckpointError, "no weights at absent"),
        (
            FamilyConfig("harmon", weights="x.pth", vae_weights="absent"),
            CheckpointError,
            "no weights at absent",
        ),
    ],
)
def test_no_encoder_to_load(config: FamilyConfig, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_family(config.name).picture_encoder(config)


def test_pictures_of_another_size() -> None:
    encoder = load_family("harmon").picture_encoder(FamilyConfig("harmon"))
    for wrong in (noise(1), np.zeros((2, encoder.side, encoder.side, 3), np.float32)):
        with pytest.raises(ValueError, match=r"not uint8 \[B, 64, 64, 3\]"):
            encoder(wrong)
