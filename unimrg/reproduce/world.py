"""The world of the reproduction: few and large things, each of a colour of its own, and short questions.

Same renderer as the scenes, so depth and outlines are exact. What is compared is asked in both orders, so
"yes" is right half of the time in every picture. One pair of each picture is placed on purpose: half of the
time its nearer object is higher in the picture than the farther one, and half of the time looks smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from unimrg.data.scenes.layout import Wishes, draw_camera, draw_light, place
from unimrg.data.scenes.render import paint, survey
from unimrg.data.scenes.text import YES_NO
from unimrg.data.scenes.world import COLOURS, MATERIALS, SHAPES, SIZES, SPLITS, Look, Rendering, World

FAMILIES = ("exist", "shape", "colour", "left", "closer", "larger")
SIDE = 64  # pixels of a picture's side
COLUMNS, ROWS = "01234567", "abcdefgh"  # names of the cells of a side
LEAST_SHARE, LEAST_WIDTH = 0.4, 0.12  # of every object: visible part, and width in picture widths
SIDE_GAP, HEIGHT_GAP, DEPTH_RATIO, SIZE_RATIO = 0.06, 0.02, 1.12, 1.3
TRIES = 6  # pictures tried before a new wish is drawn


@dataclass(frozen=True)
class Ask:
    """A question with a one-word answer.

    pair: questions with one number compare the same two things in both orders. cue: whether what is lower
    (closer) or looks larger (larger) misleads, None without a cue. shortcuts: as `benchmarks.scenes.Item`.
    """

    text: str
    answer: str
    options: tuple[str, ...]
    family: str
    pair: int
    cue: bool | None = None
    shortcuts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Picture:
    """A world as pixels, with what is known of it."""

    world: World
    drawn: Rendering

    @property
    def looks(self) -> tuple[Look, ...]:
        return tuple(thing.look for thing in self.world.things)

    @property
    def widths(self) -> np.ndarray:
        """Of every object, the longer side of its outline's box in picture widths."""
        return _widths(self.drawn)


def pictures(count: int, seed: int, split: str, start: int = 0) -> Iterator[Picture]:
    """`count` pictures from number `start` on, each a function of (seed, split, number)."""
    for number in range(start, start + count):
        yield picture(np.random.default_rng([7, seed, SPLITS.index(split), number]))


def picture(rng: np.random.Generator) -> Picture:
    """One picture of 3 or 4 objects, two of them placed on purpose."""
    while True:
        count = int(rng.integers(3, 5))
        higher, smaller = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
        for _ in range(TRIES):
            looks = [_look(rng, colour) for colour in rng.permutation(COLOURS)[:count].tolist()]
            looks[0] = replace(looks[0], size="small" if smaller else "large")
            looks[1] = replace(looks[1], size="large")
            camera, near = draw_camera(rng, count)
            things = place(rng, camera, near, looks, Wishes(nearer=((0, 1, higher),)))
            if things is None:
                continue
            order = rng.permutation(count)
            draft = survey(World(tuple(things[k] for k in order), camera, draw_light(rng)), SIDE)
            first, second = (_widths(draft.known)[order.tolist().index(k)] for k in (0, 1))
            if _clear(draft.known) and (first < second) == smaller:
                return Picture(draft.world, paint(draft))


def _look(rng: np.random.Generator, colour: str) -> Look:
    size, material = tuple(SIZES)[int(rng.integers(2))], MATERIALS[int(rng.integers(2))]
    return Look(colour, SHAPES[int(rng.integers(len(SHAPES)))], size, material)


def _clear(known: Rendering) -> bool:
    shares = known.visible / np.maximum(known.amodal, 1)
    return bool(shares.min() >= LEAST_SHARE and _widths(known).min() >= LEAST_WIDTH)


def _widths(known: Rendering) -> np.ndarray:
    return (known.boxes[:, 2:] - known.boxes[:, :2]).max(1) / known.ids.shape[0]


# -- questions -----------------------------------------------------------------------------------------------


def asks(shown: Picture, rng: np.random.Generator, families: Sequence[str] = FAMILIES) -> list[Ask]:
    """All questions of a picture in these families; `rng` chooses what is absent."""
    found: list[Ask] = []
    for family in families:
        first = found[-1].pair + 1 if found else 0
        found += [replace(ask, pair=ask.pair + first) for ask in MAKERS[family](shown, rng)]
    return found


def _exist(shown: Picture, rng: np.random.Generator) -> list[Ask]:
    """Two colours that are there, each with one that isn't."""
    there = [look.colour for look in shown.looks]
    absent = [colour for colour in COLOURS if colour not in there]
    pairs = zip(rng.permutation(there)[:2].tolist(), rng.permutation(absent)[:2].tolist(), strict=True)
    return [
        Ask(f"Is there {colour}?", answer, YES_NO, "exist", number)
        for number, both in enumerate(pairs)
        for colour, answer in zip(both, YES_NO, strict=True)
    ]


def _shape(shown: Picture, rng: np.random.Generator) -> list[Ask]:
    seen = {"presence": tuple(dict.fromkeys(look.shape for look in shown.looks))}
    return [
        Ask(f"What shape is {look.colour}?", look.shape, SHAPES, "shape", number, shortcuts=seen)
        for number, look in enumerate(shown.looks)
    ]


def _colour(shown: Picture, rng: np.random.Generator) -> list[Ask]:
    shapes = [look.shape for look in shown.looks]
    seen = {"presence": tuple(look.colour for look in shown.looks)}
    return [
        Ask(f"What colour is the {look.shape}?", look.colour, COLOURS, "colour", number, shortcuts=seen)
        for number, look in enumerate(shown.looks)
        if shapes.count(look.shape) == 1
    ]


def _where(shown: Picture, rng: np.random.Generator) -> list[Ask]:
    """Column and row, like "3f", of the middle of what is seen: for pre-training only."""
    found = []
    for number, look in enumerate(shown.looks):
        rows, columns = np.nonzero(shown.drawn.ids == number + 1)
        column, row = (int(axis.mean() * len(COLUMNS) // SIDE) for axis in (columns, rows))
        answer = COLUMNS[column] + ROWS[row]
        found.append(Ask(f"Where is {look.colour}?", answer, (), "where", number))
    return found


def _compare(
    family: str, text: str, relation: Callable[[Picture, int, int], tuple[bool, dict[str, bool]] | None]
) -> Callable[[Picture, np.random.Generator], list[Ask]]:
    """Both orders of every two things between which the relation is clear."""

    def maker(shown: Picture, rng: np.random.Generator) -> list[Ask]:
        found: list[Ask] = []
        for a in range(len(shown.looks)):
            for b in range(a):
                if (told := relation(shown, a, b)) is not None:
                    found += _both_orders(family, text, shown, (a, b), told, len(found) // 2)
        return found

    return maker


def _both_orders(
    family: str,
    text: str,
    shown: Picture,
    things: tuple[int, int],
    told: tuple[bool, dict[str, bool]],
    number: int,
) -> list[Ask]:
    """told: whether the first thing stands in the relation to the second, and what each shortcut says."""
    truth, said = told
    cue = next(iter(said.values())) != truth if said else None
    found = []
    for turned, (one, two) in enumerate((things, things[::-1])):
        words = text.format(a=shown.looks[one].colour, b=shown.looks[two].colour)
        left = {name: (YES_NO[says == bool(turned)],) for name, says in said.items()}
        found.append(Ask(words, YES_NO[truth == bool(turned)], YES_NO, family, number, cue, left))
    return found


def _left(shown: Picture, a: int, b: int) -> tuple[bool, dict[str, bool]] | None:
    first, second = (shown.world.camera.project(shown.world.things[k].centre)[0] for k in (a, b))
    return (first < second, {}) if abs(first - second) > SIDE_GAP else None


def _closer(shown: Picture, a: int, b: int) -> tuple[bool, dict[str, bool]] | None:
    """The first shortcut is the cue."""
    (_, ya, za), (_, yb, zb) = (shown.world.camera.project(shown.world.things[k].centre) for k in (a, b))
    nearest = [float(shown.drawn.depth[shown.drawn.ids == k + 1].min()) for k in (a, b)]
    agree = (nearest[0] < nearest[1]) == (za < zb)
    if not agree or max(za / zb, zb / za) < DEPTH_RATIO or abs(ya - yb) < HEIGHT_GAP:
        return None
    return za < zb, {"height": ya > yb, "looks": bool(shown.widths[a] > shown.widths[b])}


def _larger(shown: Picture, a: int, b: int) -> tuple[bool, dict[str, bool]] | None:
    ratio = shown.looks[a].scale / shown.looks[b].scale
    if max(ratio, 1 / ratio) < SIZE_RATIO:
        return None
    return ratio > 1, {"looks": bool(shown.widths[a] > shown.widths[b])}


MAKERS: dict[str, Callable[[Picture, np.random.Generator], list[Ask]]] = {
    "exist": _exist,
    "shape": _shape,
    "colour": _colour,
    "where": _where,
    "left": _compare("left", "Is {a} left of {b}?", _left),
    "closer": _compare("closer", "Is {a} closer than {b}?", _closer),
    "larger": _compare("larger", "Is {a} larger than {b}?", _larger),
}


# -- naming --------------------------------------------------------------------------------------------------


def names(shown: Picture) -> np.ndarray:
    """int64 [4, L]: which colour, shape, column and row each cell shows; one more than there are is nothing.

    A cell shows the object with most of its pixels if those are at least a third.
    """
    grid, ids = len(COLUMNS), shown.drawn.ids
    cells = ids.reshape(grid, SIDE // grid, grid, SIDE // grid).swapaxes(1, 2).reshape(grid * grid, -1)
    counts = np.stack([(cells == k + 1).sum(1) for k in range(len(shown.looks))], 1)
    owner = np.where(counts.max(1) * 3 >= cells.shape[1], counts.argmax(1), len(shown.looks))
    colours = [*(COLOURS.index(look.colour) for look in shown.looks), len(COLOURS)]
    shapes = [*(SHAPES.index(look.shape) for look in shown.looks), len(SHAPES)]
    row, column = np.divmod(np.arange(grid * grid), grid)
    return np.stack([np.array(colours)[owner], np.array(shapes)[owner], column, row])
