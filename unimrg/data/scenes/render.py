"""Draws a `World` by casting rays, in plain numpy float32.

One ray through the centre of every pixel gives depth, ids and masks, so these are exact. Pixels on an edge of
the picture get three more rays, so that outlines and shadows are smooth; the labels are never averaged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from unimrg.data.scenes.shapes import chosen, dot, hit, normal
from unimrg.data.scenes.world import BOUND, PALETTE, Rendering, Thing, World

EDGE = 0.1  # difference in display brightness between neighbours that asks for more rays
SUBPIXELS = np.array([[-0.3, -0.25], [0.35, -0.15], [-0.05, 0.4]], np.float32)  # with the centre: four rays
HAZE = (9.0, 35.0)  # depths between which the ground fades, world units
TILE = 1.0  # side of a ground tile, world units
LIFT = 4e-3  # shadow rays start this far above the surface, world units


@dataclass(frozen=True, eq=False)
class Body:
    """A thing with its frames. inward: world directions to the unit frame [3, 3]; outward: unit normals to
    the world [3, 3]; centre: [3, 1]; reach: radius of the bounding sphere in world units."""

    thing: Thing
    inward: np.ndarray
    outward: np.ndarray
    centre: np.ndarray
    reach: float

    @classmethod
    def of(cls, thing: Thing) -> Body:
        sin, cos = math.sin(thing.yaw), math.cos(thing.yaw)
        turn = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]], np.float32)
        reach = BOUND[thing.look.shape] * thing.look.scale
        inward = turn / np.float32(thing.look.scale)
        return cls(thing, inward, np.ascontiguousarray(turn.T), _column(thing.centre), reach)


@dataclass(frozen=True, eq=False)
class Trace:
    """What N rays met. t: float32 [N] depth; ids: uint8 [N]; alone: for each object the rays that would meet
    it if it were alone (indices)."""

    t: np.ndarray
    ids: np.ndarray
    alone: tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class Survey:
    """A picture before it is painted: everything known about it, with a black `known.rgb`."""

    world: World
    bodies: tuple[Body, ...]
    rays: np.ndarray
    trace: Trace
    known: Rendering


def render(world: World, side: int) -> Rendering:
    """The picture of a world, `side` pixels square."""
    return paint(survey(world, side))


def survey(world: World, side: int) -> Survey:
    """Depth, ids and masks of a picture; costs a small part of painting it."""
    bodies = tuple(Body.of(thing) for thing in world.things)
    rays = _rays(world, *_centres(side))
    trace = _trace(world, bodies, rays, side)
    known = Rendering(
        rgb=np.zeros((side, side, 3), np.uint8),
        depth=trace.t.reshape(side, side),
        ids=trace.ids.reshape(side, side),
        visible=np.bincount(trace.ids, minlength=len(bodies) + 1)[1:],
        amodal=np.array([index.size for index in trace.alone]),
        boxes=np.array([_box(index, side) for index in trace.alone]),
    )
    return Survey(world, bodies, rays, trace, known)


def paint(seen: Survey) -> Rendering:
    """The picture itself."""
    colour = _shade(seen.world, seen.bodies, seen.rays, seen.trace)
    _smooth(seen.world, seen.bodies, colour, seen.known.ids)
    rgb = (np.sqrt(np.clip(colour, 0, 1)) * 255 + 0.5).astype(np.uint8).T
    return replace(seen.known, rgb=np.ascontiguousarray(rgb).reshape(seen.known.rgb.shape))


def _centres(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres as fractions from the middle of the picture, x to the right and y up: float32 [S * S]."""
    line = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    return np.tile(line, side), np.repeat(-line, side)


def _rays(world: World, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Directions float32 [3, N] whose component along the camera's axis is 1, so that t is the depth."""
    camera = world.camera
    sin, cos = np.float32(math.sin(camera.pitch)), np.float32(math.cos(camera.pitch))
    right, up = x / np.float32(camera.focal), y / np.float32(camera.focal)
    return np.stack([right, up * cos - sin, up * sin + cos])


def _column(point: tuple[float, float, float]) -> np.ndarray:
    return np.array(point, np.float32)[:, None]


def _trace(world: World, bodies: tuple[Body, ...], rays: np.ndarray, side: int = 0) -> Trace:
    """What the rays meet. side: the rays are those of a whole picture of this side, 0 for any rays."""
    with np.errstate(divide="ignore"):
        t = np.where(rays[1] < -1e-4, np.float32(-world.camera.height) / rays[1], np.float32(np.inf))
    ids = np.zeros(t.shape, np.uint8)
    alone = []
    eye = _column((0.0, world.camera.height, 0.0))
    for k, body in enumerate(bodies):
        near = _window(world, body, side) if side else _within(eye, rays, body)
        found = hit(body.thing.look.shape, body.inward @ (eye - body.centre), body.inward @ rays[:, near])
        met = chosen(np.isfinite(found))
        near, found = near[met], found[met]
        alone.append(near)
        ahead = chosen(found < t[near])
        front = near[ahead]
        t[front] = found[ahead]
        ids[front] = k + 1
    return Trace(t, ids, tuple(alone))


def _window(world: World, body: Body, side: int) -> np.ndarray:
    """Indices of the pixels in a square that holds the object's bounding sphere."""
    x, y, depth = world.camera.project(body.thing.centre)
    # The outline of a sphere off the axis is stretched; 1.15 covers it at the focal lengths used.
    half = 1.15 * world.camera.focal * body.reach / (depth - body.reach) if depth > 1.1 * body.reach else 2.0
    left, right = (min(max(int(v * side), 0), side) for v in (x - half, x + half + 1 / side))
    top, bottom = (min(max(int(v * side), 0), side) for v in (y - half, y + half + 1 / side))
    return (np.arange(top, bottom)[:, None] * side + np.arange(left, right)).ravel()


def _within(eye: np.ndarray, rays: np.ndarray, body: Body) -> np.ndarray:
    """Indices of the rays from `eye` [3, 1] that meet the object's bounding sphere."""
    to = body.centre - eye
    along = to[:, 0] @ rays
    least = float(dot(to, to)[0]) - body.reach**2
    return chosen((along > 0) & (least * dot(rays, rays) <= along * along))


def _shade(world: World, bodies: tuple[Body, ...], rays: np.ndarray, trace: Trace) -> np.ndarray:
    """Linear RGB, float32 [3, N]."""
    t = np.minimum(trace.t, np.float32(1e3))  # the sky has no place; haze covers what is this far
    points = rays * t
    points[1] += np.float32(world.camera.height)
    lit = _lit(world, bodies, points, trace.ids)
    # Ground everywhere, then the objects over it: cheaper than picking out the pixels of the ground.
    colour = _ground(world, bodies, rays, points, t, lit)
    for k, body in enumerate(bodies):
        mine = chosen(trace.ids == k + 1)
        if mine.size:
            colour[:, mine] = _surface(world, body, rays[:, mine], points[:, mine], lit[mine])
    return colour


def _ground(
    world: World,
    bodies: tuple[Body, ...],
    rays: np.ndarray,
    points: np.ndarray,
    t: np.ndarray,
    lit: np.ndarray,
) -> np.ndarray:
    """Tiled ground with shadows, fading into the sky: linear RGB [3, N]."""
    light = world.light
    shade = 1 - 0.1 * _checks(points, 40 / t) * np.clip(1.5 - t / 14, 0, 1)
    bright = light.ambient * _openness(bodies, points) + light.sun * light.towards[1] * lit
    out = _column(light.ground) * (shade * bright)
    hazy = chosen(t > HAZE[0])
    haze = np.minimum((t[hazy] - HAZE[0]) / (HAZE[1] - HAZE[0]), 1)
    out[:, hazy] += (_sky(world, rays[:, hazy]) - out[:, hazy]) * haze
    return out


def _surface(world: World, body: Body, rays: np.ndarray, points: np.ndarray, lit: np.ndarray) -> np.ndarray:
    """Surface of one object: linear RGB [3, N]."""
    light, look = world.light, body.thing.look
    normals = body.outward @ normal(look.shape, body.inward @ (points - body.centre))
    facing = np.maximum(dot(normals, _column(light.towards)), 0) * lit
    tint = _column(PALETTE[look.colour]) ** 2 / np.float32(255**2)
    if look.material == "metal":
        return _metal(world, points, rays, normals, tint, facing)
    return tint * (light.ambient * (0.72 + 0.28 * normals[1]) + light.sun * facing)


def _sky(world: World, directions: np.ndarray) -> np.ndarray:
    """Linear RGB of the sky in the given directions, [3, N]."""
    length = np.sqrt(dot(directions, directions))
    rise = np.clip(directions[1] / length, 0, 1)
    return _column(world.light.sky) * (1 - 0.45 * rise)


def _checks(points: np.ndarray, sharpness: np.ndarray | float) -> np.ndarray:
    """-1 and 1 on the ground's tiles, with soft borders: [N]."""
    step = np.float32(math.pi / TILE)
    return np.clip(np.sin(points[0] * step) * np.sin(points[2] * step) * sharpness, -1, 1)


def _lit(world: World, bodies: tuple[Body, ...], points: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """1 where the sun is seen, 0 in shadow: float32 [N]. Sides turned away from the sun are not looked at."""
    sun = world.light.towards
    # Seen from the sun every object is within a disc: two coordinates across the light find the candidates.
    flat = math.hypot(sun[0], sun[1])
    side = (sun[1] / flat, -sun[0] / flat, 0.0)
    up = (side[1] * sun[2], -side[0] * sun[2], side[0] * sun[1] - side[1] * sun[0])
    frame = np.array([side, up, sun], np.float32)
    across, along, height = frame @ points
    direction = _column(sun)
    lit = np.ones(points.shape[1], np.float32)
    for k, body in enumerate(bodies):
        u, v, w = (float(value) for value in frame @ body.centre[:, 0])
        near = chosen((across - u) ** 2 + (along - v) ** 2 < body.reach**2)
        casts = (height[near] < w + body.reach) & (lit[near] > 0)
        if body.thing.look.shape != "torus":  # the others are convex: they don't shade themselves
            casts &= ids[near] != k + 1
        near = near[casts]
        if near.size:
            start = body.inward @ (points[:, near] + (direction * LIFT - body.centre))
            towards = np.repeat(body.inward @ direction, near.size, axis=1)
            lit[near[np.isfinite(hit(body.thing.look.shape, start, towards))]] = 0
    return lit


def _openness(bodies: tuple[Body, ...], points: np.ndarray) -> np.ndarray:
    """Soft contact shadows: how much sky the ground sees past the objects (as spheres), 0..1, [N]."""
    x, z = points[0], points[2]
    free = np.ones(points.shape[1], np.float32)
    for body in bodies:
        cx, cy, cz = body.thing.centre
        size = body.thing.look.scale
        square = (x - cx) ** 2 + (z - cz) ** 2 + cy * cy
        free *= 1 - np.minimum(1.2 * cy * size**3 / (square * square), 0.8)
    return free


def _metal(
    world: World, points: np.ndarray, view: np.ndarray, normals: np.ndarray, tint: np.ndarray, lit: np.ndarray
) -> np.ndarray:
    """Coloured mirror of a plain studio (tiled floor, horizon, sky) with a highlight of the sun: [3, N]."""
    view = view / np.sqrt(dot(view, view))
    mirror = view - 2 * dot(view, normals) * normals
    rise = mirror[1]
    # A studio in three steps: dark floor, bright band above the horizon, mid sky; and upright light strips,
    # so that flat faces show a reflection too.
    studio = 0.16 + 0.95 / (1 + np.exp(-9 * (rise - 0.08))) - 0.45 / (1 + np.exp(-7 * (rise - 0.62)))
    studio *= 1 + 0.4 * np.sin(4.5 * mirror[0] + 2.5 * mirror[2])
    path = points[1] / np.maximum(-mirror[1], 0.05)
    fade = np.where(rise < 0, 0.3 / (1 + 0.25 * path * path), 0).astype(np.float32)
    studio *= 1 + fade * _checks(points + mirror * path, 4.0)
    gleam = np.maximum(dot(mirror, _column(world.light.towards)), 0) ** 40 * (lit > 0)
    rim = (1 + np.minimum(dot(view, normals), 0)) ** 4
    body = tint * (studio + 0.3 * world.light.sun * lit)
    return body + 1.6 * gleam + 0.35 * rim * studio


def _smooth(world: World, bodies: tuple[Body, ...], colour: np.ndarray, ids: np.ndarray) -> None:
    """Replaces the pixels of `colour` [3, S * S] on edges by the mean of four rays, in place."""
    side = ids.shape[0]
    bright = np.sqrt(np.clip(colour, 0, 1)).sum(0).reshape(side, side) / 3
    edge = np.zeros((side, side), bool)
    for axis in (0, 1):
        step = (np.abs(np.diff(bright, axis=axis)) > EDGE) | (np.diff(ids, axis=axis) != 0)
        low = (slice(None, -1), slice(None)) if axis == 0 else (slice(None), slice(None, -1))
        high = (slice(1, None), slice(None)) if axis == 0 else (slice(None), slice(1, None))
        edge[low] |= step
        edge[high] |= step
    row, col = np.nonzero(edge)
    if not row.size:
        return
    x = (col[:, None] + np.float32(0.5) + SUBPIXELS[:, 0]) / np.float32(side) - np.float32(0.5)
    y = np.float32(0.5) - (row[:, None] + np.float32(0.5) + SUBPIXELS[:, 1]) / np.float32(side)
    rays = _rays(world, x.ravel(), y.ravel())
    fine = np.clip(_shade(world, bodies, rays, _trace(world, bodies, rays)), 0, 1)
    pixels = row * side + col
    total = np.clip(colour[:, pixels], 0, 1) + fine.reshape(3, -1, len(SUBPIXELS)).sum(2)
    colour[:, pixels] = total / (len(SUBPIXELS) + 1)


def _box(index: np.ndarray, side: int) -> tuple[int, int, int, int]:
    if not index.size:
        return (0, 0, 0, 0)
    row, col = np.divmod(index, side)
    return (int(col.min()), int(row.min()), int(col.max()) + 1, int(row.max()) + 1)
