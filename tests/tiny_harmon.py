"""What the model's tests share: a Harmon of thousands of parameters, a tokenizer for it, random samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config

from unimrg.families.harmon.config import HarmonConfig, MARConfig, VAEConfig
from unimrg.families.harmon.generate import _embed
from unimrg.families.harmon.model import Harmon
from unimrg.families.harmon.processor import CLOSE, END, IMAGE_ID, OPEN, HarmonProcessor
from unimrg.families.tokenizer import train_tokenizer
from unimrg.sample import IMAGE_TASKS, Sample, Task, Turn
from unimrg.tasks import PROMPTS, UNCONDITIONAL

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("cube", "sphere", "cone", "cylinder", "torus")
QUESTIONS = (
    "What colour is the {shape}?",
    "How many {colour} objects are there?",
    "Is the {colour} {shape} to the left of the {other}?",
    "Which is closer to the camera, the {shape} or the {other}?",
    "Can you see a {colour} {shape}?",
)


def question(rng: np.random.Generator) -> Turn:
    """A short question of the embedded data set's kind, and an answer."""
    text = str(rng.choice(QUESTIONS)).format(
        colour=rng.choice(COLOURS), shape=rng.choice(SHAPES), other=rng.choice(SHAPES)
    )
    return Turn(text, str(rng.choice(("yes", "no", "two", *COLOURS))))


@lru_cache
def tokenizer() -> Any:
    """A byte-level BPE that knows the questions and the prompts by the word."""
    rng = np.random.default_rng(0)
    turns = [question(rng) for _ in range(300)]
    prompts = [prompt for choices in PROMPTS.values() for prompt in choices]
    template = ["user\nassistant\n"] * 10
    questions = [f"{turn.question}\n{turn.answer}" for turn in turns]
    return train_tokenizer([*questions, *prompts, UNCONDITIONAL, *template])


def micro() -> HarmonConfig:
    """The smallest Harmon with every part: 16-pixel pictures as 4 x 4 latent tokens."""
    vae = VAEConfig(
        base_width=4,
        multipliers=(1, 1, 2),
        blocks_per_level=1,
        latent_channels=4,
        norm_groups=2,
        encoder_attention_levels=(2,),
        scale=1.0,
    )
    mar = MARConfig(
        grid=(2, 2),  # the tables are interpolated to 4 x 4
        latent_channels=4,
        encoder_width=16,
        encoder_depth=2,
        encoder_heads=2,
        decoder_width=24,
        decoder_depth=1,
        decoder_heads=2,
        buffer_size=3,
        class_num=2,
        attn_dropout=0.0,
        proj_dropout=0.0,
        head_depth=1,
        head_width=16,
        sampling_steps=4,
    )
    llm = Qwen2Config(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return HarmonConfig(vae=vae, mar=mar, llm=llm, image_size=16)


def random_model(config: HarmonConfig, seed: int = 0) -> Harmon:
    """Every parameter random, also those that start at zero, so that gradients flow everywhere."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = Harmon(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(noise * 0.1 + float("norm" in name or "ln" in name) * name.endswith("weight"))
    return model


def random_sample(
    rng: np.random.Generator,
    side: int,
    position: int = 0,
    conversations: int = 1,
    turns: int = 1,
    tasks: tuple[Task, ...] = IMAGE_TASKS,
    picture: bool = True,
    valid: tuple[int, int, int, int] | None = None,
) -> Sample:
    """A noisy picture with drawings (or neither), and that many conversations about it."""

    def noise() -> np.ndarray:
        return rng.integers(0, 256, (side, side, 3), np.uint8)

    image = noise() if picture else None
    targets = {task: image if task is Task.PIXEL else noise() for task in tasks} if image is not None else {}
    return Sample(
        id=f"sample-{position}",
        position=position,
        conversations=tuple(tuple(question(rng) for _ in range(turns)) for _ in range(conversations)),
        image=image,
        targets={task: target for task, target in targets.items() if target is not None},
        valid=valid or (0, 0, side, side),
    )


def make_processor(config: HarmonConfig, tasks: Sequence[Task], seed: int) -> HarmonProcessor:
    return HarmonProcessor(config, tokenizer(), tasks, seed)


@torch.no_grad()
def greedy(
    model: Harmon, processor: HarmonProcessor, image: np.ndarray | None, question: str, steps: int
) -> str:
    """The whole sequence again for every token; no cache, no padding, no batch."""
    encode = processor.encode
    if image is None:
        ids = encode(OPEN + question + CLOSE)
    else:
        ids = [*processor.open_ids, IMAGE_ID, *encode("\n" + question + CLOSE)]
    embeds, answer = _embed(model, ids, image), []
    for _ in range(steps):
        chosen = int(model.llm(inputs_embeds=embeds[None], use_cache=False).logits[0, -1].argmax())
        if chosen == encode(END)[0]:
            break
        answer.append(chosen)
        embeds = torch.cat([embeds, model.llm.get_input_embeddings()(torch.tensor([chosen]))])
    return str(processor.tokenizer.decode(answer, skip_special_tokens=True)).strip()
