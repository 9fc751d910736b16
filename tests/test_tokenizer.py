"""The tiny tokenizer: made again it is the same, knows its words, and can write any text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimrg.data.scenes.plan import draw_plan, draw_stakes
from unimrg.errors import CheckpointError
from unimrg.families.harmon.config import tiny
from unimrg.families.tokenizer import (
    SPECIAL_TOKENS,
    TINY_FOLDER,
    load_tokenizer,
    tiny_texts,
    train_tokenizer,
)
from unimrg.tasks import PROMPTS

TOKENIZER = load_tokenizer()


def count(text: str) -> int:
    return len(TOKENIZER(text, add_special_tokens=False).input_ids)


def test_training_again_gives_the_asset(tmp_path: Path) -> None:
    train_tokenizer(tiny_texts()).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in TINY_FOLDER.iterdir()}
    for path in tmp_path.iterdir():
        assert path.read_text() == (TINY_FOLDER / path.name).read_text(), (
            "the texts changed: python -m unimrg.families.tokenizer"
        )


def test_it_is_small_and_fits_the_tiny_model() -> None:
    assert len(TOKENIZER) <= tiny().llm.vocab_size == 512
    assert sum(path.stat().st_size for path in TINY_FOLDER.iterdir()) < 60_000


def test_special_tokens_are_one_token_each() -> None:
    for token in SPECIAL_TOKENS:
        assert count(token) == 1
    assert TOKENIZER.eos_token == "<|im_end|>" and TOKENIZER.pad_token == "<|endoftext|>"
    ids = TOKENIZER("<|im_start|>yes<|im_end|>").input_ids
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "yes"


def test_questions_and_answers_are_short() -> None:
    rng = np.random.default_rng(3)
    asks = []
    while len(asks) < 400:
        plan = draw_plan(rng, "test", draw_stakes(rng, 6))
        asks += plan.asks if plan is not None else []
    for ask in asks:
        assert count(ask.text) <= 2 * len(ask.text.split()) + 3, ask.text
        for picture in (0, 1):
            assert count(ask.answer(picture)) == 1, ask.answer(picture)
    words = sum(len(ask.text.split()) + 1 for ask in asks)  # the question mark is one more
    assert sum(count(ask.text) for ask in asks) < 1.3 * words


def test_prompts_are_bearable() -> None:
    for prompts in PROMPTS.values():
        assert count(prompts[0]) <= 10
        assert max(count(prompt) for prompt in prompts) <= 45


@given(st.text(st.characters(blacklist_categories=["Cs"]), max_size=60))
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer in"):
        load_tokenizer("no-such-owner/no-such-model")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="no tokenizer in"):
        load_tokenizer(tmp_path)


def test_a_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    foreign = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])), eos_token="a")
    foreign.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks <\|im_start\|>, <\|im_end\|>"):
        load_tokenizer(tmp_path)
