"""Cross-entropy over a large vocabulary without all of its logits at once.

A row's logits, their float32 copy and their gradient take 10 to 16 bytes for every word of the vocabulary,
more than the row's way through the whole model leaves behind. Rows are therefore taken in chunks whose
logits are computed again in the backward pass; few rows are one chunk, and nothing is computed twice.

Shape suffixes: A rows, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**26
"""Elements of a chunk's logits: 256 MiB in float32, and rows enough to keep a GPU's matrix units busy."""


def token_losses(head: nn.Linear, hidden_AH: Tensor, wanted_A: Tensor) -> Tensor:
    """-log softmax(head(hidden))[wanted] of every row, [A] float32.

    head: a linear layer, perhaps with adapters. All chunks lie within one call of it: engines that shard
    parameters gather them around every call of a module, and all ranks must make equally many. A head with
    parts of its own (adapters) gets all rows at once for the same reason.
    """
    logits = head.forward
    whole = bool(list(head.children()))
    rows = max(1, len(hidden_AH) if whole else LOGITS_AT_ONCE // head.out_features)

    def losses(hidden: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(logits(hidden).float(), wanted, reduction="none")

    def chunked(hidden: Tensor, wanted: Tensor) -> Tensor:
        if len(hidden) <= rows:
            return losses(hidden, wanted)
        chunks = zip(hidden.split(rows), wanted.split(rows), strict=True)
        return torch.cat([checkpoint(losses, *chunk, use_reentrant=False) for chunk in chunks])

    with _forward(head, chunked):
        losses_A: Tensor = head(hidden_AH, wanted_A)
    return losses_A


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, calls of the module run `forward` between its hooks."""
    attributes = vars(module)
    own = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield
    finally:
        del attributes["forward"]
        if own is not None:
            attributes["forward"] = own
