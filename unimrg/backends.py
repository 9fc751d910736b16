"""Which attention backend runs here: chosen once, by device, type and what is installed, and proven first.

A candidate runs a small plan before it is taken, forward and backward: grouped heads, full segments, and
causal ones with fewer queries than keys, which must align at the bottom right. So a package built for another
GPU, or a version that aligns elsewhere, costs a line of explanation instead of a wrong model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from unimrg.attention import flash_function, flash_kernel, plan_attention
from unimrg.errors import ConfigError, MissingExtraError, first_line
from unimrg.plan import Plan, Segment

PREFERENCE = ("flash_attn", "varlen", "flex", "sdpa")
HALF = (torch.bfloat16, torch.float16)
TOLERANCE = 2e-2
MISSING = "isn't installed"
TRIAL = Plan(
    150,
    (
        Segment((0, 40), ((0, 40),), True),
        Segment((40, 73), ((0, 40), (40, 73)), True),
        Segment((73, 74), ((0, 40), (73, 74)), True),
        Segment((74, 110), ((0, 40), (74, 110)), False),
        Segment((110, 130), ((110, 130),), True),
        Segment((130, 150), ((110, 130), (130, 150)), False),
    ),
)
"""A plan with everything a backend must know."""


@dataclass(frozen=True)
class Choice:
    """A backend and, in a few words, why this one."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


@cache
def choose_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """The backend for `engine.attention=wanted` where attention computes in `dtype`.

    `auto`: on a GPU in half precision the first of `PREFERENCE` that works, elsewhere SDPA.
    Raises ConfigError or MissingExtraError when another is wanted and doesn't work here.
    """
    if wanted != "auto":
        _insist(wanted, device, dtype)
        source = f", from {_source(device)}" if wanted == "flash_attn" else ""
        return Choice(wanted, f"set by engine.attention{source}")
    if device.type != "cuda":
        return Choice("sdpa", f"the one for the {device.type.upper()}")
    if dtype not in HALF:
        return Choice("sdpa", f"the one for {_name(dtype)}")
    passed: list[str] = []
    for name in PREFERENCE[:-1]:
        if not (reason := obstacle(name, device, dtype)):
            return Choice(name, "; ".join(passed) or f"from {_source(device)}")
        passed.append(f"{name} {reason}")
    return Choice(PREFERENCE[-1], "; ".join(passed))


def _insist(name: str, device: torch.device, dtype: torch.dtype) -> None:
    reason = obstacle(name, device, dtype)
    if reason == MISSING:
        raise MissingExtraError("flash-attn", f"engine.attention={name}")
    if reason:
        raise ConfigError(f"engine.attention: {name} {reason}; use auto, which takes what works")


def obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a backend can't train on the device in `dtype`, as the end of a sentence; "" when it can."""
    if name == "sdpa":
        return ""
    if device.type != "cuda":
        return f"trains on CUDA GPUs only, not on the {device.type.upper()}"
    if name != "flex" and dtype not in HALF:
        return f"takes bfloat16 or float16, not {_name(dtype)}"
    if name == "flash_attn":
        try:
            flash_kernel(device)
        except ModuleNotFoundError:
            return MISSING
        except ImportError as error:
            return f"can't be loaded: {first_line(error)}"
    return trial(name, device, dtype)


def trial(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Run a backend on `TRIAL` beside SDPA in float32: what went wrong, or ""."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        drawn = torch.randn(1, count, TRIAL.length, 64, generator=generator)
        return drawn.to(device, dtype)

    inputs, weight = [draw(6), draw(2), draw(2)], draw(6)

    def run(backend: str, kind: torch.dtype) -> list[Tensor]:
        query, key, value = (x.to(kind, copy=True).requires_grad_() for x in inputs)
        out = plan_attention(query, key, value, TRIAL.on(device, backend))
        return [out, *torch.autograd.grad(out, (query, key, value), weight.to(kind))]

    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            pairs = zip(run(name, dtype), run("sdpa", torch.float32), strict=True)
            errors = [_distance(got.detach(), want.detach()) for got, want in pairs]
    except Exception as failure:  # kernels and compilers raise every kind
        return f"fails here: {first_line(failure)}"
    return next((f"is off by {error:.2g} here" for error in errors if not error <= TOLERANCE), "")


def _distance(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((got.float() - want).abs().max() / want.abs().max())


def _source(device: torch.device) -> str:
    """Which edition of FlashAttention it is."""
    return flash_function(torch.cuda.get_device_capability(device)[0]).__module__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
