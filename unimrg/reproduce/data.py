"""Pictures of the reproduction with their drawings as a family's codes, kept in memory and on disk.

What a frozen picture encoder says of a picture, its depth map and its boundaries is computed once, so that a
training step touches no autoencoder. Depth and boundaries are exact, by the project's own oracle teacher.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unimrg.benchmarks.scenes import Item
from unimrg.data.geometry import render_sample
from unimrg.families.encoder import PictureEncoder
from unimrg.reproduce.world import FAMILIES, MAKERS, Ask, Picture, asks, names, pictures
from unimrg.sample import Labels, Record, Sample, Task, Turn
from unimrg.teachers.oracle import oracle_depth, oracle_segmentation

ENCODED = 64  # pictures encoded at once


@dataclass(frozen=True, eq=False)
class Example:
    """One picture. codes: by name (of `PICTURES`) but `pixel`. names: see `world.names`."""

    number: int
    image: np.ndarray
    codes: dict[str, np.ndarray]
    asks: tuple[Ask, ...]
    names: np.ndarray


def examples(encoder: PictureEncoder, count: int, seed: int, split: str, start: int = 0) -> Iterator[Example]:
    """Pictures `start` to `start + count` of a split, encoded."""
    for first in range(start, start + count, ENCODED):
        some = list(pictures(min(ENCODED, start + count - first), seed, split, first))
        samples = [_drawn(shown) for shown in some]
        kinds = {"image": [shown.drawn.rgb for shown in some]}
        kinds |= {task: [s.targets[task] for s in samples] for task in (Task.DEPTH, Task.SEGMENTATION)}
        codes = {name: encoder(np.stack(found)) for name, found in kinds.items()}
        for k, shown in enumerate(some):
            number = first + k
            yield Example(
                number,
                shown.drawn.rgb,
                {str(name): found[k] for name, found in codes.items()},
                tuple(asks(shown, np.random.default_rng([3, seed, number]), tuple(MAKERS))),
                names(shown),
            )


def _drawn(shown: Picture) -> Sample:
    """The picture with its drawings in training geometry."""
    depth = oracle_depth(1 / shown.drawn.depth)
    lines = oracle_segmentation(shown.drawn.ids)
    record = Record("", (), shown.drawn.rgb)
    return render_sample(record, Labels(depth, lines), 0, shown.drawn.rgb.shape[0])


def stored(path: Path, make: Callable[[], Iterable[Example]]) -> list[Example]:
    """The examples of a file that we wrote, made first where there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_bytes(pickle.dumps(list(make()), protocol=5))
        part.replace(path)
    found: list[Example] = pickle.loads(path.read_bytes())
    return found


# -- to train on ---------------------------------------------------------------------------------------------


def order(count: int, steps: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Which examples each step sees: shuffled epochs of whole batches, a function of the seed.

    batch: at most `count`, so that no step sees an example twice; what is left of an epoch is left out.
    """
    rng = np.random.default_rng([5, seed])
    waiting: list[int] = []
    for _ in range(steps):
        if len(waiting) < batch:
            waiting = rng.permutation(count).tolist()
        yield waiting[:batch]
        waiting = waiting[batch:]


def sample(example: Example, position: int, questions: Sequence[Ask], codes: dict[str, np.ndarray]) -> Sample:
    """An example with some of its questions, each a branch of its own, and what is drawn of it."""
    side = example.image.shape[0]
    turns = tuple((Turn(ask.text, ask.answer),) for ask in questions)
    return Sample(
        str(example.number),
        position,
        turns,
        image=example.image,
        valid=(0, 0, side, side),
        codes=codes,
    )


def chosen(example: Example, rng: np.random.Generator, number: int, families: Sequence[str]) -> list[Ask]:
    """`number` questions of an example, families in turn."""
    by_family = [[ask for ask in example.asks if ask.family == family] for family in families]
    by_family = [found for found in by_family if found]
    return [
        found[int(rng.integers(len(found)))]
        for found in (by_family[k % len(by_family)] for k in range(number))
    ]


# -- to be asked about ---------------------------------------------------------------------------------------


def asked(example: Example, families: Sequence[str] = FAMILIES, pairs: int = 2) -> list[Ask]:
    """The questions that are scored: of comparisons `pairs` a family in both orders, misleading first."""
    found: list[Ask] = []
    for family in families:
        some = [ask for ask in example.asks if ask.family == family]
        numbers = sorted(dict.fromkeys(ask.pair for ask in some if ask.cue))
        numbers += [pair for pair in dict.fromkeys(ask.pair for ask in some) if pair not in numbers]
        found += [ask for ask in some if ask.pair in numbers[:pairs]]
    return found


def item(example: Example, ask: Ask) -> Item:
    """A question as the Scenes benchmark scores it."""
    return Item(
        index=f"{example.number}-{ask.pair}-{ask.text}",
        text=ask.text,
        answer=ask.answer,
        options=ask.options,
        family=ask.family,
        pair=f"{example.number}-{ask.pair}",
        scenes=str(example.number),
        cue=ask.cue,
        shortcuts=ask.shortcuts,
    )
