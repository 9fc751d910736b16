"""Runs a plan: attention of packed sequences, the same numbers from every backend.

Registered with transformers under the name `unimrg`, so that a library model (Qwen2, Phi) takes the plan as
a keyword of its forward: `model(inputs_embeds=…, attention_mask=NO_MASK, position_ids=…, plan=plan)`.
Without a plan the same name is the library's own SDPA attention: cached decoding needs nothing of ours.

Legend: B batch (1 when packed), A heads, T tokens, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from unimrg.plan import Plan

IMPLEMENTATION = "unimrg"
NO_MASK: dict[str, None] = {"full_attention": None}
"""Pass as `attention_mask` beside a plan: the model then builds no mask of its own."""


def plan_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, scale: float | None = None
) -> torch.Tensor:
    """Attention over one packed sequence by SDPA, segments of one shape together.

    query: [1, A, T, D]; key and value: [1, A or fewer, T, D] (grouped-query heads are not repeated).
    Returns [1, A, T, D]. Raises ValueError if the sequence isn't the plan's.
    """
    if query.shape[0] != 1 or query.shape[2] != plan.length:
        raise ValueError(f"plan of {plan.length} tokens doesn't fit queries of shape {tuple(query.shape)}")
    gathered = plan.gathered(query.device)
    # One gather for all groups: each of its own would fill a gradient of the whole sequence.
    query_rows = [group.count * group.queries for group in gathered.groups]
    queries = _rows(query, gathered.query_index).split(query_rows)
    key_rows = [group.count * group.keys for group in gathered.groups]
    keys = _rows(key, gathered.key_index).split(key_rows)
    values = _rows(value, gathered.key_index).split(key_rows)
    outputs = []
    for group, q, k, v in zip(gathered.groups, queries, keys, values, strict=True):
        q, k, v = (x.unflatten(0, (group.count, -1)).transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=group.mask,
            is_causal=group.causal and group.mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    packed = torch.cat(outputs).index_select(0, gathered.packed_index)
    return packed.transpose(0, 1).unsqueeze(0)


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[1, A, T, D] to [N, A, D]."""
    return x.squeeze(0).transpose(0, 1).index_select(0, index)


def _transformers_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    plan: Plan | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The signature transformers expects; returns [B, T, A, D]."""
    if plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return plan_attention(query, key, value, plan, scaling).transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, _transformers_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
