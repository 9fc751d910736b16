"""Teachers: plain callables that turn pictures into label maps.

    depth.DepthAnything           relative inverse depth, bright = near
    segmentation.SamBoundaries    region boundaries, 255 on 0
    oracle                        the same two maps from what a data set brings along

A teacher reads its weights when it is built and works when it is called; who builds it, and where, is not
its concern. Importing this package costs nothing: the model library is imported by the constructors.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np

from unimrg.errors import SampleError


@runtime_checkable
class Teacher(Protocol):
    """Maps pictures to label maps.

    identity: plain JSON values {name, version, weights, settings}: everything the labels depend on and
    nothing else (not the device, not the batch size), so that equal identities mean equal labels.
    """

    identity: dict[str, Any]

    def __call__(self, images: list[np.ndarray]) -> list[np.ndarray | SampleError]:
        """One uint8 map [H, W] per uint8 picture [H, W, 3], in order; sizes may differ.

        A picture that can't be labelled gives a `SampleError("teacher-failed", ...)` in its place.
        """
        ...
