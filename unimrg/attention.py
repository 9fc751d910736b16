"""Runs a plan: attention of packed sequences, the same numbers from every backend.

Registered with transformers under the name `unimrg`, so that a library model (Qwen2, Phi) takes the plan as
a keyword of its forward: `model(inputs_embeds=…, attention_mask=NO_MASK, position_ids=…, plan=plan)`.
The plan names the backend that runs it; `unimrg.backends` chooses one. Without a plan the same name is the
library's own SDPA attention: cached decoding needs nothing of ours.

flash_attn: the package flash-attn (arXiv 2307.08691), its third or fourth edition where installed.
varlen: the FlashAttention inside torch. flex: torch's FlexAttention, compiled. sdpa: batched SDPA.

Legend: B batch (1 when packed), A heads, T tokens, D head dimension, N rows gathered for one call.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from unimrg.layouts import Gathered, ModeGroup, ShapeGroup
from unimrg.plan import Plan

IMPLEMENTATION = "unimrg"
NO_MASK: dict[str, None] = {"full_attention": None}
"""Pass as `attention_mask` beside a plan: the model then builds no mask of its own."""

MULTIPLES = {"flash_attn": 8, "varlen": 8, "flex": 16}
"""Kernels take head dimensions that are multiples of this; others are padded with zeros."""

FLASH_MODULES = {
    9: ("flash_attn_interface", "flash_attn", "flash_attn.cute"),
    10: ("flash_attn.cute", "flash_attn"),
    11: ("flash_attn.cute", "flash_attn"),
}
"""By compute capability, where FlashAttention's editions 3, 2 and 4 keep their kernel, the fastest first."""

# (query [N, A, D], key and value [N', A or fewer, D], what they are, scale) -> [N, A, D]
Kernel = Callable[[Tensor, Tensor, Tensor, ModeGroup, float], Tensor]


def plan_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float | None = None
) -> Tensor:
    """Attention over one packed sequence by the plan's backend.

    query: [1, A, T, D]; key and value: [1, A or fewer, T, D] (grouped-query heads are not repeated).
    Returns [1, A, T, D]. Raises ValueError if the sequence isn't the plan's.
    """
    if query.shape[0] != 1 or query.shape[2] != plan.length:
        raise ValueError(f"plan of {plan.length} tokens doesn't fit queries of shape {tuple(query.shape)}")
    kind, width = query.device.type, query.shape[3]
    scale = width**-0.5 if scale is None else scale
    # Autocast knows torch's SDPA, but no other kernel.
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    missing = -width % MULTIPLES.get(plan.attention, 1)
    if missing:
        query, key, value = (pad(x, (0, missing)) for x in (query, key, value))
    layout = plan.layout(query.device)
    if plan.attention == "flex":
        out = _flex(query, key, value, layout, scale)
    else:
        out = _gathered(query, key, value, layout, _of_group(plan.attention, query.device), scale)
    return out[..., :width] if missing else out


def _of_group(name: str, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Any, float], Tensor]:
    """What attends inside one group of a gathered layout."""
    if name == "sdpa":
        return _sdpa
    return varlen_kernel() if name == "varlen" else flash_kernel(device)


def _gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Gathered[Any],
    attend: Callable[[Tensor, Tensor, Tensor, Any, float], Tensor],
    scale: float,
) -> Tensor:
    """Gather all rows, attend group by group, put the results back into the packed order."""
    query_rows, key_rows = ([group.rows[i] for group in layout.groups] for i in (0, 1))
    # One gather for all groups: each of its own would fill a gradient of the whole sequence.
    queries = _rows(query, layout.query_index).split(query_rows)
    keys = _rows(key, layout.key_index).split(key_rows)
    values = _rows(value, layout.key_index).split(key_rows)
    outputs = [
        attend(q, k, v, group, scale)
        for group, q, k, v in zip(layout.groups, queries, keys, values, strict=True)
    ]
    packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if layout.packed_index is not None:
        packed = packed.index_select(0, layout.packed_index)
    return packed.transpose(0, 1).unsqueeze(0)


def _rows(x: Tensor, index: Tensor | None) -> Tensor:
    """[1, A, T, D] to [N, A, D]; None takes all rows as they are."""
    rows = x.squeeze(0).transpose(0, 1)
    return rows if index is None else rows.index_select(0, index)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, group: ShapeGroup, scale: float) -> Tensor:
    """Segments of one shape as a batch."""
    q, k, v = (x.unflatten(0, (group.count, -1)).transpose(1, 2) for x in (query, key, value))
    out = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=group.mask,
        is_causal=group.causal and group.mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).flatten(0, 1)


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
    """The mask says all, so nothing is gathered."""
    return flex_kernel(query.device.type)(
        query,
        key,
        value,
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        # The kernel for short queries is one for decoding, and refuses some numbers of heads.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )


@cache
def flex_kernel(kind: str) -> Any:
    """FlexAttention compiled for any length; on the CPU, where it has no backward pass, unfused."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if kind == "cpu" else torch.compile(flex_attention, dynamic=True)


@cache
def varlen_kernel() -> Kernel:
    """The FlashAttention of this torch: causal is aligned at the bottom right."""
    from torch.nn.attention.varlen import varlen_attn

    # The kernel has always taken fewer key heads; later torch wants to be told.
    known = inspect.signature(varlen_attn).parameters
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}

    def kernel(query: Tensor, key: Tensor, value: Tensor, group: ModeGroup, scale: float) -> Tensor:
        out = varlen_attn(
            query,
            key,
            value,
            group.cu_queries,
            group.cu_keys,
            group.longest_query,
            group.longest_key,
            scale=scale,
            window_size=(-1, 0) if group.causal else (-1, -1),
            **grouped,
        )
        assert isinstance(out, Tensor)  # no log-sum-exp was asked for
        return out

    return kernel


@cache
def flash_kernel(device: torch.device) -> Kernel:
    """The best installed edition of FlashAttention: causal is aligned at the bottom right since 2.1.

    Raises what `flash_function` raises.
    """
    function = flash_function(torch.cuda.get_device_capability(device)[0])

    def kernel(query: Tensor, key: Tensor, value: Tensor, group: ModeGroup, scale: float) -> Tensor:
        out = function(
            query,
            key,
            value,
            cu_seqlens_q=group.cu_queries,
            cu_seqlens_k=group.cu_keys,
            max_seqlen_q=group.longest_query,
            max_seqlen_k=group.longest_key,
            softmax_scale=scale,
            causal=group.causal,
        )
        return out[0] if isinstance(out, tuple) else out  # some editions add the log-sum-exp

    return kernel


def flash_function(capability: int) -> Callable[..., Any]:
    """`flash_attn_varlen_func` of the edition for GPUs of that compute capability (its first number).

    Raises ImportError when none can be loaded, ModuleNotFoundError when none is installed.
    """
    failure: ImportError = ModuleNotFoundError("flash-attn isn't installed")
    for name in FLASH_MODULES.get(capability, ("flash_attn",)):
        try:
            # The fourth edition alone leaves `flash_attn` without a kernel of its own.
            if function := getattr(importlib.import_module(name), "flash_attn_varlen_func", None):
                return function
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                failure = ImportError(f"{name} lacks {error.name}")
        except ImportError as error:
            failure = error
    raise failure


@torch.compiler.disable  # a compiled block would be compiled again for every other plan
def _transformers_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    plan: Plan | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The signature transformers expects; returns [B, T, A, D]."""
    if plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return plan_attention(query, key, value, plan, scaling).transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, _transformers_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
