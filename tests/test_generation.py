"""Using a Harmon: cached decoding is plain decoding, batches don't matter, seeds decide, files keep all."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny_harmon import micro, random_model, random_sample, tokenizer
from unimrg.families.base import DrawOptions
from unimrg.families.harmon.generate import _embed
from unimrg.families.harmon.model import Harmon
from unimrg.families.harmon.processor import CLOSE, END, IMAGE_ID, OPEN, HarmonProcessor
from unimrg.sample import Task

SIDE = 16
QUESTIONS = ["Can you see a red cone?", "How many blue objects are there, and where are they?", "Hm?"]
STEPS = 12


@lru_cache
def model() -> Harmon:
    return random_model(micro())


@lru_cache
def processor() -> HarmonProcessor:
    return HarmonProcessor(micro(), tokenizer())


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(11)
    return [random_sample(rng, SIDE).image for _ in range(count)]


@torch.no_grad()
def greedy(image: np.ndarray | None, question: str) -> str:
    """The whole sequence again for every token; no cache, no padding, no batch."""
    encode = processor().encode
    if image is None:
        ids = encode(OPEN + question + CLOSE)
    else:
        ids = [*processor().open_ids, IMAGE_ID, *encode("\n" + question + CLOSE)]
    embeds, answer = _embed(model(), ids, image), []
    for _ in range(STEPS):
        chosen = int(model().llm(inputs_embeds=embeds[None], use_cache=False).logits[0, -1].argmax())
        if chosen == encode(END)[0]:
            break
        answer.append(chosen)
        embeds = torch.cat([embeds, model().llm.get_input_embeddings()(torch.tensor([chosen]))])
    return str(tokenizer().decode(answer, skip_special_tokens=True)).strip()


def test_cached_answers_are_uncached_greedy_answers() -> None:
    """Also in one batch of pictures, text alone and different lengths: an answer depends on its row only."""
    images = [pictures(1)[0], None, pictures(2)[1]]
    want = [greedy(image, question) for image, question in zip(images, QUESTIONS, strict=True)]
    assert any(want)
    assert model().answer(processor(), images, QUESTIONS, STEPS) == want
    alone = [model().answer(processor(), [i], [q], STEPS)[0] for i, q in zip(images, QUESTIONS, strict=True)]
    assert alone == want


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_drawing_is_decided_by_its_seed(guidance: float) -> None:
    def draw(seed: int) -> np.ndarray:
        options = DrawOptions(iterations=3, guidance=guidance, seed=seed)
        return np.stack(model().draw(processor(), pictures(2), Task.DEPTH, options))

    first = draw(1)
    assert first.shape == (2, SIDE, SIDE, 3) and first.dtype == np.uint8
    assert np.array_equal(first, draw(1))
    assert not np.array_equal(first, draw(2))
    assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize("iterations", [0, 1, 100])
def test_any_number_of_iterations_draws_every_cell(iterations: int) -> None:
    (drawn,) = model().draw(
        processor(), pictures(1), Task.PIXEL, DrawOptions(iterations=iterations, temperature=0.0)
    )
    assert drawn.std() > 0


@torch.no_grad()
def test_files_keep_every_bit(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    loaded = Harmon.from_pretrained(tmp_path).eval()
    ours, theirs = model().state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded.llm.lm_head.weight is loaded.llm.get_input_embeddings().weight
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model(), loaded)]
    assert trained[0] == trained[1] and not any(name.startswith("vae.") for name in trained[0])
    assert loaded.config.to_dict()["mar"] == model().config.to_dict()["mar"]
    batch = processor()([random_sample(np.random.default_rng(0), SIDE)])
    before, after = model()(batch), loaded(batch)
    assert all(torch.equal(before[task].sum, after[task].sum) for task in before)
    assert loaded.answer(processor(), [None], QUESTIONS[:1], STEPS) == [greedy(None, QUESTIONS[0])]


@torch.no_grad()
def test_large_files_are_split_and_read_back(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = Harmon.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model().state_dict().items())


def test_training_mode_leaves_the_autoencoder_alone() -> None:
    trained = random_model(micro()).train()
    assert trained.mar.training and trained.llm.training and not trained.vae.training


def test_gradient_checkpointing_changes_nothing() -> None:
    batch = processor()([random_sample(np.random.default_rng(0), SIDE)])

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        trained = random_model(micro()).train()
        if checkpointing:
            trained.gradient_checkpointing_enable()
            assert trained.llm.model.layers[0].gradient_checkpointing and trained.mar.gradient_checkpointing
        torch.stack([loss.sum for loss in trained(batch).values()]).sum().backward()
        return {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-6)
