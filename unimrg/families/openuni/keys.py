"""InternVL3's parameter names: the original layout and that of transformers, both ways.

The two differ in names, and in one shape: the original vision tower keeps query, key and value projections in
one matrix, one below the other. A name that neither layout has is an error, so no tensor is lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unimrg.errors import CheckpointError

LAYERS = ("vision_model.encoder.layers.", "model.vision_tower.encoder.layer.")
# (original, transformers): beginnings of names ...
BEGINNINGS = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("mlp1.0.", "model.multi_modal_projector.layer_norm."),
    ("mlp1.1.", "model.multi_modal_projector.linear_1."),
    ("mlp1.3.", "model.multi_modal_projector.linear_2."),
    ("vision_model.embeddings.class_embedding", "model.vision_tower.embeddings.cls_token"),
    ("vision_model.embeddings.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
    (
        "vision_model.embeddings.patch_embedding.",
        "model.vision_tower.embeddings.patch_embeddings.projection.",
    ),
    LAYERS,
)
# ... and what follows the number of a layer of the vision tower.
IN_LAYER = (
    ("attn.qkv.", "attention.qkv."),
    ("attn.proj.", "attention.projection_layer."),
    ("attn.q_norm.", "attention.q_norm."),
    ("attn.k_norm.", "attention.k_norm."),
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("ls1", "lambda_1"),
    ("ls2", "lambda_2"),
    ("mlp.", "mlp."),
)
JOINED, SEPARATE = "attention.qkv.", tuple(f"attention.{part}_proj." for part in "qkv")
# Beginnings in files that older versions of transformers wrote.
OLDER = (("vision_tower.", "model.vision_tower."), ("multi_modal_projector.", "model.multi_modal_projector."))


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """InternVL3's state dict in transformers' layout, from that (of any version) or from the original one.

    `lmm.` in front of all names is taken off. Raises CheckpointError for a name that no layout has.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix("lmm.")
        renamed = name if name.startswith(("model.", "lm_head.")) else _rename(name, 0)
        if JOINED in renamed:
            for part, rows in zip(SEPARATE, tensor.chunk(3), strict=True):
                ours[renamed.replace(JOINED, part)] = rows
        else:
            ours[renamed] = tensor
    return ours


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' layout as the original one, without `lmm.`. Raises CheckpointError for unknown names."""
    original: dict[str, Tensor] = {}
    for name, tensor in state.items():
        part = next((part for part in SEPARATE if name.startswith(LAYERS[1]) and part in name), None)
        if part is None:
            original[_rename(name, 1)] = tensor
        elif part == SEPARATE[0]:
            rows = [state[name.replace(part, other)] for other in SEPARATE]
            original[_rename(name.replace(part, JOINED), 1)] = torch.cat(rows)
    return original


def _rename(name: str, source: int) -> str:
    """`name` of the layout `source` (0 original, 1 transformers') in the other one."""
    renamed = _swap(name, BEGINNINGS if source else (*BEGINNINGS, *OLDER), source)
    layers = LAYERS[1 - source]
    if not renamed.startswith(layers) or name.startswith(OLDER[0][0]):
        return renamed
    number, _, rest = renamed.removeprefix(layers).partition(".")
    return f"{layers}{number}.{_swap(rest, IN_LAYER, source)}"


def _swap(name: str, pairs: Sequence[tuple[str, str]], source: int) -> str:
    """`name` with its beginning replaced."""
    for pair in pairs:
        if name.startswith(pair[source]):
            return pair[1 - source] + name.removeprefix(pair[source])
    raise CheckpointError(f"{name} is no parameter of InternVL3; give the files of InternVL3-1B or -2B")
