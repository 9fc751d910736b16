"""The models of the reproduction before any training, one small one for each family with a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from unimrg.families.base import Family
from unimrg.reproduce import harmon, janus
from unimrg.reproduce.data import Example


class Guess(Protocol):
    """Something trained beside a model: `step` is its own update."""

    def loss(self, batch: Any, kinds: Sequence[int]) -> Tensor:
        """Of the batch that the model has just seen; kinds: which of its kinds each drawing is."""

    def step(self) -> None: ...


@dataclass(frozen=True)
class Recipe:
    """How a family's small model is made, and where its picture's cells can be named.

    build: a seed to model and tokenizer. cells: model and pictures to states [B, L, H]. buffers: the same for
    what carries a picture's cells to a drawing, where they are to be named by place. guess: at so
    many kinds of drawings.
    """

    build: Callable[[int], tuple[Family, Any]]
    cells: Callable[[Any, Sequence[Example]], Tensor]
    buffers: Callable[[Any, Sequence[Example]], Tensor] | None = None
    guess: Callable[[Any, int], Guess] | None = None


RECIPES = {
    "harmon": Recipe(harmon.build, harmon.cells, harmon.buffers, harmon.Guess),
    "janus": Recipe(janus.build, janus.cells),
}
