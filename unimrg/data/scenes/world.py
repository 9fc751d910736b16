"""The nouns of the scenes: what things look like, where they stand, what is asked about them.

World axes: x to the right, y up (ground at 0), z ahead; one unit is about one large object. The camera stands
at (0, height, 0), looks along z and is pitched down. Depth is the distance along the camera's axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

SHAPES = ("cube", "sphere", "cylinder", "cone", "torus")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SIZES = {"small": 0.5, "large": 0.8}  # half extent, in world units
MATERIALS = ("matte", "metal")
COUNTS = ("0", "1", "2", "3", "4")
SPLITS = ("train", "test")

PALETTE = {  # sRGB
    "red": (214, 28, 34),
    "orange": (255, 122, 0),
    "yellow": (250, 218, 20),
    "green": (24, 140, 48),
    "cyan": (40, 205, 215),
    "blue": (32, 66, 214),
    "purple": (140, 42, 176),
    "white": (245, 245, 245),
}

# Every unit shape has its centre at the origin; REST is how far below the centre it ends, BOUND the radius of
# the smallest sphere around it.
REST = {"cube": 0.8, "sphere": 1.0, "cylinder": 0.9, "cone": 1.0, "torus": 1.0}
BOUND = {"cube": 1.386, "sphere": 1.0, "cylinder": 1.205, "cone": 1.415, "torus": 1.0}

# Colour-shape pairs that never occur in a training picture or in a training question. Each colour is held out
# with one shape, each shape with one or two colours.
HELD_OUT = frozenset(
    {
        ("red", "torus"),
        ("orange", "cube"),
        ("yellow", "sphere"),
        ("green", "cone"),
        ("cyan", "cylinder"),
        ("blue", "cube"),
        ("purple", "sphere"),
        ("white", "cone"),
    }
)

Point = tuple[float, float, float]


@dataclass(frozen=True)
class Look:
    """Everything about an object but its place."""

    colour: str
    shape: str
    size: str
    material: str

    @property
    def scale(self) -> float:
        """Half extent in world units."""
        return SIZES[self.size]

    @property
    def pair(self) -> tuple[str, str]:
        return (self.colour, self.shape)


@dataclass(frozen=True)
class Thing:
    """An object: centre in world units, yaw in radians around the vertical."""

    look: Look
    centre: Point
    yaw: float


@dataclass(frozen=True)
class Camera:
    """height in world units, pitch in radians (down is positive), focal in picture widths."""

    height: float
    pitch: float
    focal: float

    def axes(self) -> np.ndarray:
        """float64 [3, 3]: rows are right, up and forward in world axes."""
        sin, cos = math.sin(self.pitch), math.cos(self.pitch)
        return np.array([[1.0, 0.0, 0.0], [0.0, cos, sin], [0.0, -sin, cos]])

    def project(self, point: Point) -> Point:
        """World point -> (x, y, depth): picture fractions from the top left corner, and world units."""
        right, up, depth = (float(v) for v in self.axes() @ (np.array(point) - (0.0, self.height, 0.0)))
        return (0.5 + self.focal * right / depth, 0.5 - self.focal * up / depth, depth)

    def unproject(self, x: float, y: float, depth: float) -> Point:
        """Inverse of `project`."""
        local = np.array([(x - 0.5) / self.focal, (0.5 - y) / self.focal, 1.0]) * depth
        world = local @ self.axes() + (0.0, self.height, 0.0)
        return (float(world[0]), float(world[1]), float(world[2]))


@dataclass(frozen=True)
class Light:
    """towards: unit vector to the sun; sun, ambient: strengths in linear light; ground, sky: linear RGB."""

    towards: Point
    sun: float
    ambient: float
    ground: Point
    sky: Point


@dataclass(frozen=True)
class World:
    """All that a picture is drawn from."""

    things: tuple[Thing, ...]
    camera: Camera
    light: Light


@dataclass(frozen=True)
class Question:
    """A question with a one-word answer.

    family: one of `FAMILIES`. pair: the same text asked of the complementary picture has the same pair id.
    answers: of both pictures of the pair. options: the admissible answers, in a fixed order; chance is
    1 / len(options).
    conflict: whether the obvious cue misleads (see `questions.py`); None where the family has no such cue.
    unseen: whether an object asked about has a held-out combination of colour and shape.
    objects: instance ids (from 1) of the objects asked about.
    sense: False where the text asks for the opposite relation (right of, behind, farther, smaller).
    """

    text: str
    answer: str
    answers: tuple[str, str]
    family: str
    pair: str
    options: tuple[str, ...]
    conflict: bool | None
    unseen: bool
    objects: tuple[int, ...]
    sense: bool = True


@dataclass(frozen=True, eq=False)
class Rendering:
    """A picture and what is exactly known about it; side S pixels, N objects.

    rgb: uint8 [S, S, 3]. depth: float32 [S, S], along the camera's axis, inf where there is only sky.
    ids: uint8 [S, S], 0 = ground or sky, k = object k - 1.
    visible, amodal: int [N], pixels of each object that are seen, and that would be seen if it were alone.
    boxes: int [N, 4], left, top, right, bottom (exclusive) of the amodal mask.
    """

    rgb: np.ndarray
    depth: np.ndarray
    ids: np.ndarray
    visible: np.ndarray
    amodal: np.ndarray
    boxes: np.ndarray

    def share(self, index: int) -> float:
        """Visible share of object `index` (from 0)."""
        return float(self.visible[index]) / max(float(self.amodal[index]), 1.0)


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture with its questions. rgb uint8 [S, S, 3], depth float32 [S, S], ids uint8 [S, S]."""

    id: str
    world: World
    rendering: Rendering
    questions: tuple[Question, ...]

    @property
    def rgb(self) -> np.ndarray:
        return self.rendering.rgb

    @property
    def depth(self) -> np.ndarray:
        return self.rendering.depth

    @property
    def ids(self) -> np.ndarray:
        return self.rendering.ids


@cache
def seen_pairs(split: str) -> tuple[tuple[str, str], ...]:
    """The colour-shape pairs that may occur in a split: all in `test`, all but HELD_OUT in `train`."""
    every = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
    return every if split == "test" else tuple(pair for pair in every if pair not in HELD_OUT)
