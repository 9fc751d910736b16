"""Formulas against torch's counter: every family, tiny and at published sizes, whatever is trained."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import families
from tests.counting import counted, rectangles
from tests.engine_runs import coded
from tests.tiny_harmon import random_sample
from tests.tiny_showo import micro
from tests.tiny_showo import random_model as random_showo
from unimrg.config import LoraConfig
from unimrg.families.base import Family
from unimrg.families.harmon.config import harmon_1_5b
from unimrg.families.harmon.flops import Sizes, count
from unimrg.families.harmon.model import Harmon
from unimrg.flops import Flops
from unimrg.lora import adapt
from unimrg.losses import combine
from unimrg.packing import Batch
from unimrg.sample import IMAGE_TASKS, Sample, Task

META = torch.device("meta")
WITHIN = 0.02
SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"conversations": 3},
    {"turns": 4},
    {"picture": False},
    {"picture": False, "conversations": 2, "turns": 2},
    {"conversations": 0},
    {"conversations": 0, "tasks": (Task.DEPTH,)},
    {"tasks": ()},
    {"tasks": (Task.PIXEL, Task.SEGMENTATION), "turns": 2},
    {"valid": (2, 4, 16, 12)},
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def total(parts: dict[str, Flops]) -> Flops:
    return sum(parts.values(), Flops())


def check(model: Family, batch: Batch) -> None:
    """The formula within 2 % of the counter, forward and backward."""
    model.zero_grad()

    def loss() -> Tensor:
        return combine(model(batch), dict.fromkeys(Task, 1.0), batch.counts)

    seen, told = counted(loss), total(model.flops(rectangles(batch)))
    assert told.forward == pytest.approx(seen.forward, rel=WITHIN)
    assert told.backward == pytest.approx(seen.backward, rel=WITHIN)


def samples(shapes: list[dict[str, Any]]) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [random_sample(rng, families.SIDE, n, **shape) for n, shape in enumerate(shapes)]


@pytest.mark.parametrize("name", families.NAMES)
def test_formulas_agree_with_the_counter(name: str) -> None:
    """Any mix of tasks, any parts frozen, pixels or stored codes."""
    model = families.fresh_model(name).train()
    encoder = families.shared_model(name)

    @settings(max_examples=6, deadline=None, derandomize=True, database=None)
    @given(
        shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3),
        frozen=st.sets(st.sampled_from(model.PARTS), max_size=2),
        from_codes=st.booleans(),
    )
    def compare(shapes: list[dict[str, Any]], frozen: set[str], from_codes: bool) -> None:
        model.requires_grad_(True).train()
        model.freeze(sorted(frozen), tuple(Task))
        processor = families.processor(name)
        given_samples = samples(shapes)
        if from_codes:
            processor.grey_codes = encoder.grey_codes()
            given_samples = [coded(sample, encoder) for sample in given_samples]
        check(model, processor(given_samples))

    compare()


def test_a_picture_read_by_clip() -> None:
    module = families.tiny("showo")
    model = random_showo(micro(clip=True)).train()
    processor = module.make_processor(micro(clip=True))
    check(model, processor(samples([{}, {"conversations": 2}])))


def deep_showo() -> Family:
    """Without any other trained part, the formula is off by a part of the first block: one of many here."""
    config = micro()
    config.llm.num_hidden_layers = 16
    return random_showo(config).train()


@pytest.mark.parametrize("name", families.NAMES)
def test_low_rank_adapters(name: str) -> None:
    pytest.importorskip("peft")
    model = deep_showo() if name == "showo" else families.fresh_model(name).train()
    plain = total(model.flops(families.processor(name)(samples([{}]))))
    model.freeze([], tuple(Task))
    adapt(model, LoraConfig(rank=2), tuple(Task), seed=0)
    check(model, families.processor(name)(samples([{}, {"turns": 3}])))
    adapted = total(model.flops(families.processor(name)(samples([{}]))))
    assert adapted.forward > plain.forward and adapted.backward < plain.backward


@pytest.mark.parametrize("name", families.NAMES)
def test_what_is_not_asked_costs_nothing(name: str) -> None:
    """Codes spare the frozen encoder, and only pairs that attend to each other count."""
    model = families.shared_model(name)
    (one,) = samples([{"turns": 3}])
    batch = families.processor(name)([one])
    coding = next(iter(model.flops(batch)))  # the first part is the frozen encoder
    assert model.flops(batch)[coding].forward > 0 == model.flops(batch)[coding].backward
    processor = families.processor(name)
    processor.grey_codes = model.grey_codes()
    assert model.flops(processor([coded(one, model)]))[coding] == Flops()
    spared = rectangles(batch).plan.attended_pairs - batch.plan.attended_pairs
    text = model.config.get_text_config()
    saved = total(model.flops(rectangles(batch))).forward - total(model.flops(batch)).forward
    assert spared > 0 and saved == 4 * spared * text.hidden_size * text.num_hidden_layers


# -- published sizes, without weights ------------------------------------------------------------------------

PUBLISHED = (
    pytest.param("harmon", "harmon_1_5b", marks=pytest.mark.slow),
    pytest.param("showo", "showo_512", marks=pytest.mark.slow),
    pytest.param("showo", "showo_w_clip_vit_512", marks=pytest.mark.slow),
    pytest.param("openuni", "openuni_l_512", marks=pytest.mark.slow),
    pytest.param("janus", "janus_pro_1b", marks=pytest.mark.slow),
)


def published(name: str, variant: str) -> Any:
    return importlib.import_module(f"unimrg.families.{name}.config").VARIANTS[variant]()


def without_weights(name: str, config: Any) -> tuple[Family, Batch]:
    """The model on the meta device, where nothing can be read, and a batch of one picture with all tasks."""
    with META:
        model = type(families.shared_model(name))(config).train()
    processor = families.tiny(name).make_processor(config, tuple(Task), 0)
    sample = random_sample(np.random.default_rng(0), processor.side, turns=6)
    return model, processor([sample])


def test_the_published_geometry_of_harmon(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 pixels and the widths of Harmon-1.5B, two blocks of each kind."""
    config = published("harmon", "harmon_1_5b")
    config.llm.num_hidden_layers = config.mar.encoder_depth = config.mar.decoder_depth = 2
    config.mar.head_depth = 2
    model, batch = without_weights("harmon", config)
    noise = drawn(model, batch)
    monkeypatch.setattr(model, "draw_noise", lambda batch: noise)
    check(model, batch.to(META))


@pytest.mark.parametrize(("name", "variant"), PUBLISHED)
def test_published_sizes(name: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = without_weights(name, published(name, variant))
    if name in ("showo", "janus"):  # their tokenizers can't run on the meta device
        pictures = len(batch.images) + len(batch.extra_images)
        batch = replace(batch, codes=torch.zeros(pictures, 2048, dtype=torch.long))
    if name == "janus":
        batch = replace(batch, codes=batch.codes[:, :576])
    if name in ("harmon", "openuni"):  # nor can a random generator
        noise = drawn(model, batch)
        monkeypatch.setattr(model, "draw_noise", lambda batch: noise)
    check(model, batch.to(META))


def drawn(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Of the shapes of `draw_noise`."""
    if isinstance(model, Harmon):
        rows = model.config.mar.diffusion_batch_mul, len(batch.loss_rows)
        noise = torch.zeros(*rows, model.config.mar.token_width, device=META)
        return torch.zeros(rows, dtype=torch.long, device=META), noise
    targets = len(batch.noise_seeds)
    noise = torch.zeros(targets, model.config.vae.latent_channels, *model.grid, device=META)
    return torch.zeros(targets, device=META), noise


def test_the_published_recipe_of_harmon() -> None:
    """One picture's four tasks as published, one pass each: 107.5 TFLOP with full recomputation.

    200 tokens of text beside the picture's 1088 and the three before it, with logits; instructions of 50 and
    25; on average 135 visible cells; every cell in the head, four times; attention in whole rectangles.
    """
    with META:
        model = Harmon(harmon_1_5b()).train()
    passes = {
        "understanding": (1, (), 3 + 1088 + 200, 200),
        "pixel": (1, (135,), 3 + 1088 + 50 + 199, 0),
        "depth": (2, (135,), 3 + 1088 + 25 + 199, 0),
        "segmentation": (2, (135,), 3 + 1088 + 25 + 199, 0),
    }
    costs = {}
    for name, (encoded, visible, tokens, answers) in passes.items():
        rows = 4 * 1024 * len(visible)
        sizes = Sizes(encoded, 1, visible, tokens, tokens**2, answers, rows, rows, rows)
        costs[name] = count(model, sizes)
    forward = {name: total(parts).forward / 1e9 for name, parts in costs.items()}
    wanted = {"understanding": 5310, "pixel": 7700, "depth": 8190, "segmentation": 8190}
    assert forward == pytest.approx(wanted, rel=0.01)
    again = sum(part.forward for parts in costs.values() for part in parts.values() if part.backward)
    whole = sum(total(parts).total for parts in costs.values()) + again
    assert whole / 1e12 == pytest.approx(107.5, rel=0.01)
    parts = {name: part.forward / 1e9 for name, part in costs["depth"].items()}
    assert parts["vae"] == pytest.approx(2 * 556, rel=0.002)
    assert parts["mar_encoder"] == pytest.approx(977 + 161, rel=0.002)
    assert parts["mar_decoder"] == pytest.approx(977, rel=0.002)
    assert parts["head"] == pytest.approx(1238, rel=0.002)
    assert set(IMAGE_TASKS) <= set(costs)
