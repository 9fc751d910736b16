"""Using any family: cached decoding is plain decoding, batches don't matter, seeds decide, files keep all."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.families import NAMES, SIDE, fresh_model, processor, shared_model, tiny
from tests.tiny_harmon import random_sample
from unimrg.config import FamilyConfig
from unimrg.families import family_of, load_family
from unimrg.families.base import DrawOptions
from unimrg.sample import Task

QUESTIONS = ["Can you see a red cone?", "How many blue objects are there, and where are they?", "Hm?"]
STEPS = 12
# What save_pretrained itself adds to a configuration.
WRITTEN = ("_name_or_path", "architectures", "dtype", "transformers_version")


@lru_cache
def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(11)
    return [random_sample(rng, SIDE).image for _ in range(count)]


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what saving adds to it."""
    return {
        key: sizes(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in WRITTEN
    }


def batch(name: str) -> Any:
    return processor(name)([random_sample(np.random.default_rng(0), SIDE)])


@pytest.mark.parametrize("name", NAMES)
def test_cached_answers_are_uncached_greedy_answers(name: str) -> None:
    """Also in one batch of pictures, text alone and different lengths: an answer depends on its row only."""
    model, using = shared_model(name), processor(name)
    images = [pictures(1)[0], None, pictures(2)[1]]
    want = [
        tiny(name).greedy(model, using, image, question, STEPS)
        for image, question in zip(images, QUESTIONS, strict=True)
    ]
    assert any(want)
    assert model.answer(using, images, QUESTIONS, STEPS) == want
    alone = [model.answer(using, [i], [q], STEPS)[0] for i, q in zip(images, QUESTIONS, strict=True)]
    assert alone == want


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_drawing_is_decided_by_its_seed(name: str, guidance: float) -> None:
    def draw(seed: int) -> np.ndarray:
        options = DrawOptions(iterations=3, guidance=guidance, seed=seed)
        return np.stack(shared_model(name).draw(processor(name), pictures(2), Task.DEPTH, options))

    first = draw(1)
    assert first.shape == (2, SIDE, SIDE, 3) and first.dtype == np.uint8
    assert np.array_equal(first, draw(1))
    assert not np.array_equal(first, draw(2))
    assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_drawing_from_text_is_decided_by_text_and_seed(name: str, guidance: float) -> None:
    """And not by the other texts of a call, whose lengths differ."""
    texts = ["a red cone", "two blue cubes", "a small green ball behind a large yellow cylinder"]

    def draw(texts: list[str], seed: int) -> np.ndarray:
        options = DrawOptions(iterations=3, guidance=guidance, seed=seed)
        return np.stack(shared_model(name).draw_text(processor(name), texts, options))

    first = draw(texts[:2], 1)
    assert first.shape == (2, SIDE, SIDE, 3) and first.dtype == np.uint8
    assert np.array_equal(first, draw(texts[:2], 1))
    assert not np.array_equal(first, draw(texts[:2], 2))
    longer, other = draw([texts[0], texts[2]], 1), draw([texts[1], texts[2]], 1)
    assert np.abs(first[0].astype(int) - longer[0]).max() <= 1
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("iterations", [0, 1, 100])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_iterations_draws_something(name: str, iterations: int) -> None:
    options = DrawOptions(iterations=iterations, temperature=0.0)
    (drawn,) = shared_model(name).draw(processor(name), pictures(1), Task.PIXEL, options)
    assert drawn.std() > 0
    (drawn,) = shared_model(name).draw_text(processor(name), ["a red cone"], options)
    assert drawn.std() > 0


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_files_keep_every_bit(name: str, shard: str, tmp_path: Path) -> None:
    model, using = shared_model(name), processor(name)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    using.tokenizer.save_pretrained(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "60KB")
    assert family_of(tmp_path) == name
    loaded, _ = load_family(name).build(FamilyConfig(name=name, weights=str(tmp_path)), seed=0)
    loaded.eval()
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)]
    assert trained[0] == trained[1]
    assert sizes(loaded.config.to_dict()) == sizes(model.config.to_dict())
    before, after = model(batch(name)), loaded(batch(name))
    assert all(torch.equal(before[task].sum, after[task].sum) for task in before)
    want = tiny(name).greedy(model, using, None, QUESTIONS[0], STEPS)
    assert loaded.answer(using, [None], QUESTIONS[:1], STEPS) == [want]


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    shared_model("harmon").save_pretrained(tmp_path)
    loaded = type(shared_model("harmon")).from_pretrained(tmp_path)
    assert loaded.llm.lm_head.weight is loaded.llm.get_input_embeddings().weight


@pytest.mark.parametrize("name", NAMES)
def test_what_encodes_the_targets_is_never_trained(name: str) -> None:
    """It neither learns nor leaves evaluation mode; every other part does."""
    trained = fresh_model(name).train()
    frozen = {key.partition(".")[0] for key, p in trained.named_parameters() if not p.requires_grad}
    asleep = [part for part in trained.modules() if not any(module.training for module in part.modules())]
    assert asleep and trained.training
    assert frozen and not any(p.requires_grad for part in asleep for p in part.parameters())
