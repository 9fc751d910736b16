"""What tests of attention share: the dense oracle, plans with everything in them, a plain varlen kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unimrg.attention import plan_attention
from unimrg.layouts import ModeGroup
from unimrg.packing import Layout, Stretch, pack
from unimrg.plan import Plan, Segment

CPU = torch.device("cpu")


def causal(prefix: int, *branches: int) -> Layout:
    """One of causal text alone."""
    return Layout((Stretch(prefix),), tuple((Stretch(branch),) for branch in branches))


PLANS: dict[str, Plan] = {
    "text only": pack([causal(0, 5), causal(0, 1)]).plan,
    "fewer queries than keys": pack([causal(40, 7, 1, 30)]).plan,
    "several pictures": pack([causal(9, 3, 4), causal(0, 6), causal(17, 2)]).plan,
    "full behind causal": pack(
        [
            Layout(
                (Stretch(5), Stretch(16, "full")),
                ((Stretch(3), Stretch(8, "full")), (Stretch(4),)),
            )
        ]
    ).plan,
    "single full queries": Plan(
        4, (Segment((0, 2), ((0, 2),), True), *(Segment((i, i + 1), ((0, 2),), False) for i in (2, 3)))
    ),
    "looking ahead": pack([Layout((), ((Stretch(6, "ahead"), Stretch(9)),))]).plan,
    "many blocks": pack(
        [
            Layout((Stretch(20), Stretch(260, "full")), ((Stretch(70),), (Stretch(5), Stretch(140, "full")))),
            causal(150, 33),
        ]
    ).plan,
}
HEADS = ((2, 2), (6, 2), (7, 1))


def dense_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None) -> Tensor:
    """The oracle: [1, A, T, D] by softmax over a mask of all pairs."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~plan.dense_mask().to(q.device), -torch.inf).softmax(-1) @ v


def drawn(plan: Plan, heads: tuple[int, int], width: int, dtype: torch.dtype) -> list[Tensor]:
    """Random query, key, value and weight of the output, laid out as models lay them out."""
    generator = torch.Generator().manual_seed(plan.length)

    def draw(count: int) -> Tensor:
        rows = torch.randn(1, plan.length, count, width, generator=generator, dtype=torch.float64)
        return rows.to(dtype).transpose(1, 2)

    return [draw(heads[0]), draw(heads[1]), draw(heads[1]), draw(heads[0])]


def assert_like_the_oracle(
    plan: Plan,
    heads: tuple[int, int],
    *,
    width: int = 8,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    tolerance: float = 1e-5,
    scale: float | None = None,
) -> None:
    """Output and gradients by the plan's backend, against the oracle in float64, relative to the largest."""
    *inputs, weight = drawn(plan, heads, width, dtype)
    mine = [x.to(device, copy=True).requires_grad_() for x in inputs]
    theirs = [x.double().requires_grad_() for x in inputs]
    out, want = plan_attention(*mine, plan, scale), dense_attention(*theirs, plan, scale)
    assert out.dtype == dtype and out.shape == want.shape
    got = [out, *torch.autograd.grad(out, mine, weight.to(device))]
    wanted = [want, *torch.autograd.grad(want, theirs, weight.double())]
    for name, a, b in zip(("output", "query", "key", "value"), got, wanted, strict=True):
        error, largest = (a.cpu().double() - b).abs().max().item(), b.abs().max().item()
        assert error <= tolerance * max(largest, 1.0), f"{name}: off by {error:.1e} of {largest:.1e}"


def assert_bottom_right(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Uniform attention over values that name their token: each row shows who was seen."""
    segments = (Segment((0, 3), ((0, 3),), True), Segment((3, 5), ((0, 3), (3, 5)), True))
    plan = Plan(5, segments).on(device, backend)
    value = torch.eye(5, 16, device=device, dtype=dtype)[None, None]
    nothing = torch.zeros(1, 1, 5, 16, device=device, dtype=dtype)
    seen = plan_attention(nothing, nothing, value, plan)[0, 0, :, :5].float().cpu()
    want = torch.ones(5, 5).tril()
    torch.testing.assert_close(seen, want / want.sum(1, keepdim=True), rtol=1e-2, atol=1e-2)


def varlen_reference(corner: str = "bottom right") -> Callable[..., Tensor]:
    """A variable-length kernel's contract in plain torch, sequence by sequence; `corner` of causal ones."""

    def kernel(query: Tensor, key: Tensor, value: Tensor, group: ModeGroup, scale: float) -> Tensor:
        assert query.shape[0] == group.cu_queries[-1] and key.shape[0] == group.cu_keys[-1]
        assert group.cu_queries.dtype == group.cu_keys.dtype == torch.int32
        outputs = []
        starts = zip(group.cu_queries.tolist(), group.cu_keys.tolist(), strict=True)
        ends = zip(group.cu_queries[1:].tolist(), group.cu_keys[1:].tolist(), strict=True)
        for (q0, k0), (q1, k1) in zip(starts, ends, strict=False):
            assert 0 < q1 - q0 <= group.longest_query and 0 < k1 - k0 <= group.longest_key
            q, k, v = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
            k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
            scores = q @ k.transpose(1, 2) * scale
            if group.causal:
                shift = k.shape[1] - q.shape[1] if corner == "bottom right" else 0
                scores = scores.masked_fill(~scores.new_ones(scores.shape[1:]).bool().tril(shift), -torch.inf)
            outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
        return torch.cat(outputs)

    return kernel
