"""Who answers questions about drawn pictures: a model of ours, or BLIP through transformers.

DPG-Bench's own judge is mPLUG (arXiv 2205.12005), which transformers lacks; its answers can be read from a
file (`dpg_files.read_answers`). Scores by different judges don't compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from unimrg.benchmarks.generation.files import load_tokenizer
from unimrg.data.geometry import pad_square
from unimrg.families.base import Family, Processor
from unimrg.teachers.weights import load_model, load_processor
from unimrg.weights import fetch

if TYPE_CHECKING:
    from unimrg.storage import S3Config

INSTRUCTION = "Answer yes or no."
MOST_WORDS = 25


def first_word(text: str) -> str:
    """The first word in lower case, without punctuation around it; empty without words."""
    words = text.split()
    return words[0].strip(".,;:!?*\"'()").casefold() if words else ""


class FamilyJudge:
    """A model of any family: pictures padded to its square, the question with `INSTRUCTION` behind it.

    side: of the square in pixels. What counts is the answer's first word.
    """

    def __init__(self, model: Family, processor: Processor, side: int) -> None:
        self.model, self.processor, self.side = model, processor, side

    def __call__(self, pictures: Sequence[np.ndarray], questions: Sequence[str]) -> list[str]:
        squares = [pad_square(picture, self.side)[0] for picture in pictures]
        asked = [f"{question} {INSTRUCTION}" for question in questions]
        return [first_word(text) for text in self.model.answer(self.processor, squares, asked, MOST_WORDS)]


class BlipJudge:
    """BLIP for question answering (arXiv 2201.12086), such as `Salesforce/blip-vqa-base`, greedily."""

    def __init__(self, folder: Any, device: torch.device) -> None:
        from transformers import BlipForQuestionAnswering

        self.model: Any = load_model(BlipForQuestionAnswering, folder, ("blip",), "judge").to(device)
        self.processor: Any = load_processor(folder, "judge")
        self.tokenizer = load_tokenizer(folder, self.model.config.text_config.vocab_size, "judge")
        self.device = device

    @classmethod
    def load(cls, place: str, s3: S3Config, device: torch.device) -> BlipJudge:
        """From wherever the user's weights lie. Raises CheckpointError or StorageError."""
        return cls(fetch("judge", place, s3), device)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray], questions: Sequence[str]) -> list[str]:
        shown = [Image.fromarray(picture) for picture in pictures]
        pixels = self.processor(images=shown, return_tensors="pt")["pixel_values"].to(self.device)
        asked = [question.lower() for question in questions]
        tokens = self.tokenizer(asked, padding=True, return_tensors="pt").to(self.device)
        out = self.model.generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=pixels,
            max_new_tokens=MOST_WORDS,
            do_sample=False,
            num_beams=1,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(out, skip_special_tokens=True)]
