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
    outputs = []
    for group in plan.groups:
        queries, keys = group.query_index.shape[1], group.key_index.shape[1]
        out = scaled_dot_product_attention(
            _gather(query, group.query_index),
            _gather(key, group.key_index),
            _gather(value, group.key_index),
            attn_mask=_lower_right(queries, keys, query.device) if group.causal and queries < keys else None,
            is_causal=group.causal and queries == keys,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    packed = torch.cat(outputs)[plan.ungroup_index.to(query.device)]
    return packed.transpose(0, 1).unsqueeze(0)


def _gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[1, A, T, D] and [n, l] -> [n, A, l, D]."""
    picked = x[0].index_select(1, index.flatten().to(x.device))
    return picked.unflatten(1, index.shape).transpose(0, 1)


def _lower_right(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Causal mask whose last row sees every key: SDPA's own `is_causal` aligns at the top left."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


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
