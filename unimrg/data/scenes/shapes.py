"""Where a ray meets a shape, and which way the surface looks there.

Unit shapes, centred at the origin, y up. Rays are `origin + t * direction`, both float32 [3, N] (an origin
may be [3, 1]); directions need not have length one. `hit` gives float32 [N], the first t > 0, inf for a miss.
Origins lie outside the shape or on its surface.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

HALF_CUBE = 0.8
CYLINDER = (0.8, 0.9)  # radius, half height
CONE_SLOPE = 0.5  # radius lost per unit of height: radius 1 at y = -1, apex at y = 1
TORUS = (0.7, 0.3)  # the ring stands upright in the x-y plane
NEAR = 1e-3
MARCH_STEPS = 18

Hit = Callable[[np.ndarray, np.ndarray], np.ndarray]


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products over the first axis, [3, N] -> [N]; several times faster than `(a * b).sum(0)`."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def chosen(mask: np.ndarray) -> np.ndarray:
    """Indices where the mask [N] is true; `flatnonzero` without its overhead, which counts here."""
    return mask.nonzero()[0]


def _roots(a: np.ndarray, half_b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both solutions of a t² + 2 half_b t + c = 0; nan where there is none."""
    root = np.sqrt(half_b * half_b - a * c)
    return (-half_b - root) / a, (-half_b + root) / a


def _first(*times: np.ndarray) -> np.ndarray:
    """The smallest t beyond the start; nan counts as a miss."""
    best = np.full(times[0].shape, np.inf, np.float32)
    for t in times:
        np.minimum(best, np.where(t > NEAR, t, np.inf), out=best)
    return best


def _sphere(o: np.ndarray, d: np.ndarray) -> np.ndarray:
    return _first(_roots(dot(d, d), dot(o, d), dot(o, o) - 1)[0])


def _cube(o: np.ndarray, d: np.ndarray) -> np.ndarray:
    inverse = 1 / d
    middle, half = -o * inverse, HALF_CUBE * np.abs(inverse)
    enter, leave = (middle - half).max(0), (middle + half).min(0)
    return np.where((enter < leave) & (enter > NEAR), enter, np.inf).astype(np.float32)


def _cylinder(o: np.ndarray, d: np.ndarray) -> np.ndarray:
    radius, half = CYLINDER
    a = d[0] * d[0] + d[2] * d[2]
    near, far = _roots(a, o[0] * d[0] + o[2] * d[2], o[0] * o[0] + o[2] * o[2] - radius * radius)
    inverse = 1 / d[1]
    middle, reach = -o[1] * inverse, half * np.abs(inverse)
    enter, leave = np.maximum(near, middle - reach), np.minimum(far, middle + reach)
    return np.where((enter < leave) & (enter > NEAR), enter, np.inf).astype(np.float32)


def _cone(o: np.ndarray, d: np.ndarray) -> np.ndarray:
    k = CONE_SLOPE * CONE_SLOPE
    above = 1 - o[1]
    a = d[0] * d[0] + d[2] * d[2] - k * d[1] * d[1]
    half_b = o[0] * d[0] + o[2] * d[2] + k * above * d[1]
    near, far = _roots(a, half_b, o[0] * o[0] + o[2] * o[2] - k * above * above)
    sides = [np.where(np.abs(o[1] + t * d[1]) <= 1, t, np.inf) for t in (near, far)]
    base = (-1 - o[1]) / d[1]
    x, z = o[0] + base * d[0], o[2] + base * d[2]
    return _first(*sides, np.where(x * x + z * z <= 1, base, np.inf))


def _torus(o: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Sphere tracing inside the bounding cylinder's slab and sphere."""
    ring, tube = TORUS
    found = np.full(d.shape[1], np.inf, np.float32)
    near, far = _roots(dot(d, d), dot(o, d), dot(o, o) - 1)
    inverse = 1 / d[2]
    middle, reach = -o[2] * inverse, tube * np.abs(inverse)
    enter = np.maximum(np.maximum(near, middle - reach), NEAR)
    leave = np.minimum(far, middle + reach)
    live = chosen(enter < leave)
    if not live.size:
        return found
    t, leave = enter[live], leave[live] + NEAR
    ray, start = d[:, live], o[:, live] if o.shape[1] > 1 else o
    speed = 1 / np.sqrt(dot(ray, ray))
    for step in range(1, MARCH_STEPS + 1):
        x, y, z = start[0] + t * ray[0], start[1] + t * ray[1], start[2] + t * ray[2]
        across = np.sqrt(x * x + y * y) - ring
        gap = np.sqrt(across * across + z * z) - tube
        # Longer steps near the surface: a little too far is mended by the next step, which goes back.
        t = t + gap * speed * np.where(gap < 0.08, np.float32(1.5), np.float32(1))
        if step % 3 == 0:  # keep only the rays that neither left nor arrived
            last = step == MARCH_STEPS
            done = (np.abs(gap) < (4e-3 if last else 3e-4)) & (t < leave)
            found[live[done]] = t[done]
            going = chosen(~done & (t < leave))
            if not going.size:
                break
            live, t, leave, speed, ray = live[going], t[going], leave[going], speed[going], ray[:, going]
            start = start[:, going] if o.shape[1] > 1 else start
    found[found < 2 * NEAR] = np.inf
    return found


HITS: dict[str, Hit] = {
    "sphere": _sphere,
    "cube": _cube,
    "cylinder": _cylinder,
    "cone": _cone,
    "torus": _torus,
}


def hit(shape: str, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """First t > 0 at which each ray meets the unit shape, inf for a miss: float32 [N]."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return HITS[shape](origin, direction)


def normal(shape: str, p: np.ndarray) -> np.ndarray:
    """Outward unit normals at surface points `p`, float32 [3, N] -> [3, N]."""
    if shape == "sphere":
        n = p.copy()
    elif shape == "cube":
        n = np.where(np.abs(p) == np.abs(p).max(0), np.sign(p), 0)
    elif shape == "cylinder":
        cap = np.abs(p[1]) > CYLINDER[1] - 1e-3
        n = np.stack([np.where(cap, 0, p[0]), np.where(cap, np.sign(p[1]), 0), np.where(cap, 0, p[2])])
    elif shape == "cone":
        base = p[1] < -1 + 1e-3
        rise = CONE_SLOPE * np.sqrt(p[0] * p[0] + p[2] * p[2])
        n = np.stack([np.where(base, 0, p[0]), np.where(base, -1, rise), np.where(base, 0, p[2])])
    else:
        keep = 1 - TORUS[0] / np.maximum(np.sqrt(p[0] * p[0] + p[1] * p[1]), 1e-6)
        n = np.stack([p[0] * keep, p[1] * keep, p[2]])
    length = np.sqrt(dot(n, n))
    return (n / np.maximum(length, 1e-6)).astype(np.float32)
