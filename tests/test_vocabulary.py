"""Cross-entropy in chunks is cross-entropy: values, gradients, hooks; and it takes less memory."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.families import NAMES, shared_model
from tests.memory import Tally, held
from tests.test_sync import batch_of
from unimrg.families import vocabulary
from unimrg.families.vocabulary import token_losses
from unimrg.sample import Task

WIDTH, WORDS = 8, 40


def plain(head: nn.Module, hidden: Tensor, wanted: Tensor) -> Tensor:
    return cross_entropy(head(hidden).float(), wanted, reduction="none")


def draw(rows: int, bias: bool = True) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A head, states, words, and what each row weighs."""
    generator = torch.Generator().manual_seed(rows)
    head = nn.Linear(WIDTH, WORDS, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(rows, WIDTH, generator=generator).requires_grad_()
    wanted = torch.randint(WORDS, (rows,), generator=generator)
    return head, hidden, wanted, torch.rand(rows, generator=generator)


def outcome(
    losses: Callable[[nn.Linear, Tensor, Tensor], Tensor], head: nn.Linear, hidden: Tensor, *rest: Tensor
) -> list[Tensor]:
    """Losses, and the gradients of the states and of everything trained in the head."""
    wanted, weight = rest
    terms = losses(head, hidden, wanted)
    trained = [p for p in head.parameters() if p.requires_grad]
    return [terms.detach(), *torch.autograd.grad((terms * weight).sum(), [hidden, *trained])]


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 30), at_once=st.integers(1, 12), bias=st.booleans(), mixed=st.booleans())
def test_chunks_are_the_whole(rows: int, at_once: int, bias: bool, mixed: bool) -> None:
    """Also under autocast, where logits are bfloat16 and their losses float32."""
    given = draw(rows, bias)
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        patch.setattr(vocabulary, "LOGITS_AT_ONCE", at_once * WORDS)
        got = outcome(token_losses, *given)
        want = outcome(plain, *given)
    assert got[0].dtype == torch.float32
    for mine, reference in zip(got, want, strict=True):
        # In bfloat16 a weight's gradient is rounded chunk by chunk.
        torch.testing.assert_close(
            mine, reference, rtol=0.05 if mixed else 1e-5, atol=0.05 if mixed else 1e-6
        )


def test_adapted_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter's layers are modules of their own: they run once, on all rows, on every rank."""
    head, *given = draw(20)
    model = nn.ModuleDict({"head": head})
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["head"]), model)
    nn.init.normal_(model["head"].lora_B["default"].weight)
    calls: list[int] = []
    model["head"].lora_A["default"].register_forward_hook(lambda module, args, out: calls.append(len(out)))
    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 3 * WORDS)
    got = outcome(token_losses, model["head"], *given)
    assert calls == [20] and len(got) == 4
    torch.testing.assert_close(got, outcome(plain, model["head"], *given))


def test_hooks_see_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that shard parameters gather them in hooks, of the forward and of the backward pass."""
    head, *given = draw(20)
    calls: list[str] = []
    head.register_forward_pre_hook(lambda module, args: calls.append(f"forward of {len(args[0])}"))
    head.register_full_backward_hook(lambda module, inputs, outputs: calls.append("backward"))
    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 3 * WORDS)
    outcome(token_losses, head, *given)
    assert calls == ["forward of 20", "backward"]


def test_the_head_stays_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, wanted, _ = draw(4)
    with pytest.raises(ValueError, match="batch_size"):
        token_losses(head, hidden, wanted[:3])
    assert "forward" not in vars(head) and head(hidden).shape == (4, WORDS)
    with torch.no_grad():
        torch.testing.assert_close(token_losses(head, hidden, wanted), plain(head, hidden, wanted))


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, the logits and what the loss makes of them; in chunks nothing as large as they ever exists."""
    rows, at_once = 120, 10
    given = draw(rows)
    with Tally() as whole:
        outcome(plain, *given)
    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", at_once * WORDS)
    with Tally() as chunked:
        outcome(token_losses, *given)
    assert whole.largest == rows * WORDS and chunked.largest < rows * WORDS / 3
    # Two copies in float32 at the least, of the logits and of their gradient.
    assert whole.peak > 2 * rows * WORDS * 4 and chunked.peak < whole.peak / 2

    def loss(losses: Callable[[nn.Linear, Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: (losses(*given[:3]) * given[3]).sum()

    left = held(loss(token_losses))
    assert held(loss(plain)) > rows * WORDS * 4 > 4 * left


def test_few_rows_are_computed_once() -> None:
    head, *given = draw(20)
    with Tally() as once:
        outcome(token_losses, head, *given)
    with Tally() as plainly:
        outcome(plain, head, *given)
    assert once.peak == plainly.peak


@pytest.mark.parametrize("name", NAMES)
def test_families(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of texts and of codes both go in chunks."""
    batch, model = batch_of(name, from_codes=False), shared_model(name)
    want = model(batch)
    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 2000)
    got = model(batch)
    for task, loss in want.items():
        torch.testing.assert_close(got[task].sum, loss.sum, rtol=1e-5, atol=1e-5)
    assert set(want) == set(Task)
