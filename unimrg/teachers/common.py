"""What all teachers share: which pictures they take, how one failure stays one, how a map is stretched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from unimrg.errors import SampleError

T = TypeVar("T")

# A strip longer than this is scaled by the depth teacher to a multiple of the memory of a usual picture,
# or to a height of zero patches. Photographs and screenshots stay far below.
MAX_ASPECT = 16


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

    A fault of the accelerator itself goes through: it is no picture's fault, and every later one would fail.
    """
    from torch import AcceleratorError

    try:
        return label()
    except AcceleratorError:
        raise
    except SampleError as error:
        return error
    except (ArithmeticError, IndexError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        return SampleError("teacher-failed", f"{type(error).__name__}: {first}"[:300])


def stretch(values: np.ndarray) -> np.ndarray:
    """Finite floats [...] as uint8: smallest 0, largest 255, cut (not rounded) as Depth Anything V2 does.

    A constant map gives 0, also one that is constant but for the rounding of a resize.
    """
    low, high = values.min(), values.max()
    if high - low <= 16 * np.finfo(values.dtype).eps * max(abs(low), abs(high)):
        return np.zeros(values.shape, np.uint8)
    return ((values - low) / (high - low) * 255).astype(np.uint8)
