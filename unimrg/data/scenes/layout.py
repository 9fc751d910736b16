"""Puts objects where the questions want them.

A place is drawn in the picture: x, y of the centre (picture fractions) and depth, and so the height above
ground. That makes left/right, near/far, high/low in the picture and apparent size independent of each other,
and a wish a plain comparison with a margin. Candidates are drawn by the hundred and filtered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from unimrg.data.scenes.world import REST, Camera, Light, Look, Thing

CANDIDATES = 144
RESTARTS = 4
# Margins of the compared quantities, in picture fractions or as ratios; the checks in `questions` are laxer.
SIDE_GAP = 0.09
HEIGHT_GAP = 0.06
DEPTH_RATIO = 1.22
LOOKS_RATIO = 1.2
SPAN = 2.5  # farthest over nearest depth


@dataclass(frozen=True)
class Wishes:
    """What the places must fulfil; objects are indices.

    left: (a, b), a is left of b.
    nearer: (a, b, misleading), a is nearer than b; misleading: although a is higher in the picture.
    larger: (a, b, misleading), a is the truly larger; misleading: although b looks larger.
    hides: (a, b), a stands in front of b and hides a part of it.
    clear: objects that nothing may touch in the picture, except the partner in `hides` behind it.
    """

    left: tuple[tuple[int, int], ...] = ()
    nearer: tuple[tuple[int, int, bool], ...] = ()
    larger: tuple[tuple[int, int, bool], ...] = ()
    hides: tuple[tuple[int, int], ...] = ()
    clear: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Spots:
    """Candidate places [K] or one place (scalars): x, y from the picture's middle (y up), and depth.

    radius: apparent half extent in picture fractions; scale: true half extent in world units.
    """

    x: np.ndarray
    y: np.ndarray
    depth: np.ndarray
    radius: np.ndarray
    scale: float

    def pick(self, k: int) -> Spots:
        return Spots(self.x[k], self.y[k], self.depth[k], self.radius[k], self.scale)


def draw_camera(rng: np.random.Generator, count: int) -> tuple[Camera, float]:
    """A camera for `count` objects, and the nearest depth at which objects may stand."""
    focal = rng.uniform(1.15, 1.45)
    near = focal * (2.45 + 0.1 * max(count - 3, 0)) * rng.uniform(0.95, 1.1)
    pitch = math.radians(rng.uniform(15, 30))
    middle = near * 1.45
    height = 0.65 + middle * (math.sin(pitch) + rng.uniform(0.04, 0.11) * math.cos(pitch))
    return Camera(height, pitch, focal), near


def draw_light(rng: np.random.Generator) -> Light:
    """A sun from above, left or right and rather behind the camera; a neutral, slightly tinted ground."""
    turn, rise = rng.uniform(-1.9, 1.9), math.radians(rng.uniform(48, 72))
    towards = (math.cos(rise) * math.sin(turn), math.sin(rise), -math.cos(rise) * math.cos(turn))
    grey, warm = rng.uniform(0.24, 0.36), rng.uniform(-0.02, 0.02)
    haze = rng.uniform(0.62, 0.8)
    return Light(
        towards=towards,
        sun=rng.uniform(0.62, 0.8),
        ambient=rng.uniform(0.42, 0.55),
        ground=(grey + warm, grey, grey - warm),
        sky=(haze * 0.92, haze, haze * rng.uniform(1.0, 1.12)),
    )


def place(
    rng: np.random.Generator, camera: Camera, near: float, looks: list[Look], wishes: Wishes
) -> tuple[Thing, ...] | None:
    """Places for all objects, or None when the wishes could not be met."""
    order, hidden = _order(len(looks), wishes), {b: a for a, b in wishes.hides}
    for _ in range(RESTARTS):
        spots: dict[int, Spots] = {}
        for i in order:
            some = _candidates(rng, camera, looks[i], *_range(near, i, wishes), _lift(rng, i, wishes))
            if i in hidden and hidden[i] in spots:
                some = _around(rng, camera, looks[i], some, spots[hidden[i]])
            good = np.flatnonzero(_fits(i, some, spots, wishes, camera.focal))
            if not good.size:
                break
            spots[i] = some.pick(int(good[0]))
        else:
            return tuple(_thing(rng, camera, looks[i], spots[i]) for i in range(len(looks)))
    return None


def _order(count: int, wishes: Wishes) -> list[int]:
    """Objects that must stand in a relation first, partner after partner."""
    pairs = [*wishes.hides, *(w[:2] for w in wishes.larger), *(w[:2] for w in wishes.nearer), *wishes.left]
    first = dict.fromkeys(i for pair in pairs for i in pair)
    return [*first, *(i for i in range(count) if i not in first)]


def _range(near: float, i: int, wishes: Wishes) -> tuple[float, float]:
    """Depths in which object i may stand, so that its partner still finds a place."""
    far = near * SPAN
    for a, b, _ in wishes.nearer:
        if i in (a, b):
            return (near, far / 1.5) if i == a else (near * 1.35, far)
    for a, b, misleading in wishes.larger:
        if misleading and i in (a, b):
            return (near * 2.0, far) if i == a else (near, near * 1.2)
    for a, b in wishes.hides:
        if i in (a, b):
            return (near, far / 1.4) if i == a else (near * 1.2, far)
    return near, far


def _lift(rng: np.random.Generator, i: int, wishes: Wishes) -> float:
    """How likely a candidate floats. Of two compared depths the higher one floats, be it near or far, so that
    floating says nothing about the answer."""
    for a, b, misleading in wishes.nearer:
        if i in (a, b):
            return 0.85 if (i == a) == misleading else 0.1
    return 0.35


def _heights(camera: Camera, world: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Picture y (from the middle, up) of points `world` units above ground at a depth."""
    sin, cos = math.sin(camera.pitch), math.cos(camera.pitch)
    return camera.focal * ((world - camera.height) / depth + sin) / cos


def _candidates(
    rng: np.random.Generator, camera: Camera, look: Look, low: float, high: float, lift: float
) -> Spots:
    depth = np.exp(rng.uniform(math.log(low), math.log(high), CANDIDATES))
    above = np.where(rng.random(CANDIDATES) < lift, rng.uniform(0.3, 2.2, CANDIDATES), 0)
    y = _heights(camera, REST[look.shape] * look.scale + above, depth)
    x = rng.uniform(-0.46, 0.46, CANDIDATES)
    return Spots(x, y, depth, camera.focal * look.scale / depth, look.scale)


def _around(rng: np.random.Generator, camera: Camera, look: Look, some: Spots, other: Spots) -> Spots:
    """Candidates moved beside `other`, so that enough of them overlap it in the picture."""
    x = other.x + rng.uniform(-1, 1, some.x.size) * (some.radius + other.radius)
    return Spots(x, some.y, some.depth, some.radius, some.scale)


def _fits(i: int, new: Spots, placed: dict[int, Spots], wishes: Wishes, focal: float) -> np.ndarray:
    """Which candidates lie in the picture, keep clear of the others and fulfil the wishes: bool [K]."""
    good = (np.abs(new.x) + 1.15 * new.radius < 0.49) & (np.abs(new.y) + 1.15 * new.radius < 0.49)
    for j, old in placed.items():
        apart = np.hypot(new.x - old.x, new.y - old.y) / (new.radius + old.radius)
        lateral = (new.x * new.depth - old.x * old.depth) / focal
        upward = (new.y * new.depth - old.y * old.depth) / focal
        solid = np.sqrt(lateral**2 + upward**2 + (new.depth - old.depth) ** 2)
        good &= solid > 1.22 * (new.scale + old.scale)
        if (i, j) in wishes.hides or (j, i) in wishes.hides:
            front, behind = (new, old) if (i, j) in wishes.hides else (old, new)
            good &= (apart > 0.45) & (apart < 0.82) & (front.depth * 1.12 < behind.depth)
        else:
            good &= apart > (1.12 if i in wishes.clear or j in wishes.clear else 0.78)
    return good & _related(i, new, placed, wishes)


def _related(i: int, new: Spots, placed: dict[int, Spots], wishes: Wishes) -> np.ndarray:
    good = np.ones(new.x.shape, bool)
    for a, b in wishes.left:
        if (pair := _pair(i, a, b, new, placed)) is not None:
            good &= pair[1].x - pair[0].x > SIDE_GAP
    for a, b, misleading in wishes.nearer:
        if (pair := _pair(i, a, b, new, placed)) is not None:
            one, two = pair
            # Centres and nearest points, so that every reading of "nearer" agrees.
            good &= (two.depth > DEPTH_RATIO * one.depth) & (
                two.depth - two.scale > 1.12 * (one.depth - 0.3 * one.scale)
            )
            good &= (one.y - two.y > HEIGHT_GAP) if misleading else (two.y - one.y > HEIGHT_GAP)
    for a, b, misleading in wishes.larger:
        if (pair := _pair(i, a, b, new, placed)) is not None:
            ratio = pair[0].radius / pair[1].radius
            good &= (ratio < 1 / LOOKS_RATIO) if misleading else (ratio > LOOKS_RATIO)
    return good


def _pair(i: int, a: int, b: int, new: Spots, placed: dict[int, Spots]) -> tuple[Spots, Spots] | None:
    """The spots of a and b when one of them is the new object and the other is placed."""
    if i == a and b in placed:
        return new, placed[b]
    if i == b and a in placed:
        return placed[a], new
    return None


def _thing(rng: np.random.Generator, camera: Camera, look: Look, spot: Spots) -> Thing:
    centre = camera.unproject(0.5 + float(spot.x), 0.5 - float(spot.y), float(spot.depth))
    # A ring seen edge-on looks like a bar: it turns at most 40 degrees away from the viewer.
    facing = math.atan2(centre[0], centre[2])
    yaw = facing + rng.uniform(-0.7, 0.7) if look.shape == "torus" else rng.uniform(-math.pi, math.pi)
    return Thing(look, centre, yaw)
