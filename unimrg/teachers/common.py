"""What all teachers share: which pictures they take, how one failure stays one, how a map is stretched."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch import AcceleratorError, Tensor, nn

from unimrg.errors import SampleError

T = TypeVar("T")
Item = TypeVar("Item")

# A strip longer than this is scaled by the depth teacher to a multiple of the memory of a usual picture,
# or to a height of zero patches. Photographs and screenshots stay far below.
MAX_ASPECT = 16

# Shapes are compiled as they are, never as dynamic ones: what runs, and how it rounds, mustn't depend on
# earlier pictures. Above the limit torch would go on without a word, uncompiled; full batches stay below it.
COMPILATION: dict[str, Any] = {"dynamic": False, "recompile_limit": 64}


def check_picture(image: Any) -> None:
    """Raises a `SampleError` for all but uint8 [H, W, 3] of at least 2 x 2 pixels that is no long strip."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        found = getattr(image, "dtype", type(image).__name__)
        raise SampleError("teacher-failed", f"expected a uint8 array, found {found}")
    if image.ndim != 3 or image.shape[2] != 3:
        raise SampleError("teacher-failed", f"expected a shape [H, W, 3], found {list(image.shape)}")
    height, width = image.shape[:2]
    if min(height, width) < 2:
        raise SampleError("teacher-failed", f"{width}x{height} pixels hold no structure to label")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise SampleError("teacher-failed", f"{width}x{height} is a longer strip than 1:{MAX_ASPECT}")


def attempt(label: Callable[[], T]) -> T | SampleError:
    """`label()`, or its failure as a `SampleError`: one picture must not cost the batch.

    Faults of the accelerator and of the compiler go through: they are no picture's, and every later one would
    fail.
    """
    try:
        return label()
    except _no_pictures_faults():
        raise
    except SampleError as error:
        return error
    except (ArithmeticError, IndexError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        return SampleError("teacher-failed", f"{type(error).__name__}: {first}"[:300])


def _no_pictures_faults() -> tuple[type[BaseException], ...]:
    """What the accelerator raises, and torch.compile if loaded: loading it to ask takes a second."""
    compiler = sys.modules.get("torch._dynamo.exc")
    return (AcceleratorError, compiler.TorchDynamoException) if compiler else (AcceleratorError,)


def in_batches(
    label: Callable[[list[Item]], Sequence[T | SampleError]], items: list[Item], size: int
) -> list[T | SampleError]:
    """`label` of `size` items at a time; if a batch fails, each on its own, so that one culprit is found."""
    results: list[T | SampleError] = []
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        found = attempt(lambda batch=batch: list(label(batch)))  # type: ignore[misc]
        if not isinstance(found, SampleError):
            results += found
        elif len(batch) == 1:
            results.append(found)
        else:
            results += in_batches(label, batch, 1)
    return results


def compile_layers(layers: nn.ModuleList, wanted: bool | None, device: torch.device) -> bool:
    """Compiles each layer of an encoder in place, if wanted (None: on a GPU); says whether it did.

    Layers rather than the whole: equal layers share their code, so it takes a fraction of the time.
    """
    if wanted is None:
        wanted = device.type == "cuda"
    if wanted:
        for layer in layers:
            layer.compile(**COMPILATION)
    return wanted


def only_full_compiled(compiled: bool, full: bool) -> AbstractContextManager[Any]:
    """Runs compiled layers as written unless the batch is full: not every size is worth compiling."""
    if compiled and not full:
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()


def stretch(values: np.ndarray) -> np.ndarray:
    """Finite floats [...] as uint8: smallest 0, largest 255, cut (not rounded) as Depth Anything V2 does.

    A constant map gives 0, also one that is constant but for the rounding of a resize.
    """
    return stretch_tensor(torch.from_numpy(np.ascontiguousarray(values))).numpy()


def stretch_tensor(values: Tensor) -> Tensor:
    """`stretch` on any device, without waiting for it."""
    low, high = values.aminmax()
    flat = high - low <= 16 * torch.finfo(values.dtype).eps * torch.maximum(low.abs(), high.abs())
    scaled = (values - low) / (high - low) * 255
    return torch.where(flat, 0.0, scaled).to(torch.uint8)
