"""Scenes in memory: what the small teachers learn from and are measured on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unimrg.data.scenes import make_scenes

SIDE = 128  # of the scenes, pixels


@dataclass(frozen=True, eq=False)
class Scenes:
    """N pictures of side S.

    rgb: uint8 [N, S, S, 3]. depth: float32 [N, S, S], inf in the sky. ids: uint8 [N, S, S], 0 = no object.
    """

    rgb: np.ndarray
    depth: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.rgb)

    def pick(self, rng: np.random.Generator, count: int) -> Scenes:
        """`count` of them at random, half of them mirrored."""
        chosen = rng.integers(0, len(self), count)
        ways = rng.choice((1, -1), count)
        return Scenes(
            *(
                np.stack([part[k][:, ::way] for k, way in zip(chosen, ways, strict=True)])
                for part in (self.rgb, self.depth, self.ids)
            )
        )


def render(count: int, seed: int, split: str) -> Scenes:
    """The first `count` scenes of a seed and a split, about 70 a second."""
    scenes = list(make_scenes(count, seed=seed, split=split, size=SIDE, questions=2))
    return Scenes(
        np.stack([scene.rgb for scene in scenes]),
        np.stack([scene.depth for scene in scenes]),
        np.stack([scene.ids for scene in scenes]),
    )
