"""Words that find what they name, in a tiny model, before any training.

With the library's initialisation such a model never learns to look up a word of the question in the picture:
attention starts even, and nothing pulls it anywhere. Here the words of questions (" red") start as a rotation
of the words that name cells ("red"), the queries of one layer undo that rotation, and its keys share their
weights. So a question's "red" attends to whatever looks like the name "red", which `base` teaches the
picture's cells to be; it doesn't attend to itself. (Queries and keys that share weights: Trockman and Kolter,
arXiv 2305.09828.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unimrg.data.scenes.world import COLOURS, SHAPES
from unimrg.reproduce.world import COLUMNS, ROWS

NAMES = (COLOURS, SHAPES, tuple(COLUMNS), tuple(ROWS))
"""The words for what a cell shows: colour, shape, column and row."""

SHARPNESS = 2.0  # factor on the queries of the layer that looks
APART = 0.7  # how much of its own a column's name has, beside its place in the order
EMBEDDING, POSITION = 0.1, 0.5  # standard deviations of word embeddings and of positions in the picture


def words_find_cells(embedding: nn.Embedding, query: nn.Linear, key: nn.Linear, tokenizer: Any) -> None:
    """Start the words and a layer's queries as the module's head says."""
    width = embedding.embedding_dim
    with torch.no_grad():
        for words in NAMES[2:]:
            embedding.weight[ids_of(tokenizer, words)] = EMBEDDING * _in_order(len(words), width)
        turn = rotation(width)
        for words in NAMES[:2]:
            answers = embedding.weight[ids_of(tokenizer, words)]
            embedding.weight[ids_of(tokenizer, [f" {word}" for word in words])] = answers @ turn.T
        query.weight.copy_(SHARPNESS * key.weight @ turn.T)


def rotation(width: int) -> Tensor:
    """A random rotation [width, width], the same every time: names of buffers are turned by it, too."""
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(width)))[0]


def _in_order(count: int, width: int) -> Tensor:
    """[count, width] of unit variance along half a circle, so that which comes first is read off a line."""
    plane = torch.linalg.qr(torch.randn(width, 2))[0]
    turn = torch.linspace(0, math.pi, count)
    own = nn.functional.normalize(torch.randn(count, width), dim=-1)
    rows = torch.stack([turn.cos(), turn.sin()], 1) @ plane.T + APART * own
    return nn.functional.normalize(rows, dim=-1) * math.sqrt(width)


def ids_of(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """One id of each word: all are single tokens of the tiny tokenizer."""
    found = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    return [one for (one,) in found]
