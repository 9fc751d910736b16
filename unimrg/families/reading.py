"""The last block of a language model, run only where somebody reads it.

Heads read few rows of a packed pass: those that predict a token or become a drawing. The others' keys and
values are needed in the last block too, but not what follows attention there, nor the final norm. The block
stays the library's and attention sees all rows; what comes behind it gets those that are read.

Shape suffixes: T packed tokens, R rows that are read, H width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def read_rows_of(layer: nn.Module, behind: Sequence[str]) -> None:
    """Teach a decoder layer, with a norm `input_layernorm` in front, the keyword `rows`.

    With rows (int64 [R]) it takes [1, T, H] and returns [1, R, H]. behind: names of the submodules that take
    all rows otherwise, though nothing but their own row matters to each.
    """
    kind = type(layer)
    layer.__class__ = type(kind.__name__, (ReadsRows, kind), {"behind": tuple(behind)})


class ReadsRows(nn.Module):
    """In front of a decoder layer's own class."""

    behind: tuple[str, ...]

    def forward(self, hidden_1TH: Tensor, *args: Any, rows: Tensor | None = None, **kwargs: Any) -> Tensor:
        if rows is None:
            whole: Tensor = super().forward(hidden_1TH, *args, **kwargs)
            return whole
        with self._narrowed(hidden_1TH, rows):
            # As residual stream they are the block's input; its norm is given the whole.
            read: Tensor = super().forward(hidden_1TH.index_select(1, rows), *args, **kwargs)
            return read

    @contextmanager
    def _narrowed(self, hidden_1TH: Tensor, rows: Tensor) -> Iterator[None]:
        def whole(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (hidden_1TH, *args[1:])

        def read(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].index_select(1, rows), *args[1:])

        # In front of other hooks: engines follow gradients through what a module really takes.
        handles = [self.get_submodule("input_layernorm").register_forward_pre_hook(whole, prepend=True)]
        for name in self.behind:
            handles.append(self.get_submodule(name).register_forward_pre_hook(read, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def spread(read_RH: Tensor, rows: Tensor | None, tokens: int) -> Tensor:
    """Rows at their places in [T, H], zeros elsewhere; without rows all are there already."""
    if rows is None:
        return read_RH
    return read_RH.new_zeros(tokens, read_RH.shape[1]).index_copy(0, rows, read_RH)
