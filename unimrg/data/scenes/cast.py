"""From the plan of a pair to one of its pictures: looks of the objects and wishes for their places."""

from __future__ import annotations

import numpy as np

from unimrg.data.scenes.layout import Wishes
from unimrg.data.scenes.plan import Ask, Plan
from unimrg.data.scenes.text import Name
from unimrg.data.scenes.world import MATERIALS, SIZES, Look, seen_pairs

Pair = tuple[str, str]


def draw_looks(rng: np.random.Generator, plan: Plan, picture: int) -> list[Look] | None:
    """Looks of all objects of picture 0 or 1, named ones first; None when they can't be chosen."""
    allowed = seen_pairs(plan.split)
    pairs: list[Pair] = []
    for k in range(len(plan.names)):
        if (pair := _choose(rng, _role_pairs(plan, picture, k, allowed))) is None:
            return None
        pairs.append(pair)
    fillers = _filler_wants(rng, plan, picture)
    for want in fillers:
        if (pair := _choose(rng, _filler_pairs(plan, picture, want, allowed))) is None:
            return None
        pairs.append(pair)
    sizes = _sizes(rng, plan, picture)
    materials = [MATERIALS[int(k)] for k in rng.integers(2, size=plan.count)]
    if (ask := plan.ask("material")) is not None:
        materials[ask.roles[0]] = str(ask.stake.truths[picture])
    return [
        Look(colour, shape, size, material)
        for (colour, shape), size, material in zip(pairs, sizes, materials, strict=True)
    ]


def draw_wishes(rng: np.random.Generator, plan: Plan, picture: int) -> Wishes:
    """What the places in picture 0 or 1 must fulfil."""
    left, nearer, larger, hides, clear = [], [], [], [], set()
    for ask in plan.asks:
        family = ask.stake.family
        if family == "side":
            left.append(_ordered(ask, picture))
        elif family in ("front", "nearer"):
            nearer.append((*_ordered(ask, picture), _misleads(ask, picture)))
        elif family == "larger":
            larger.append((*_ordered(ask, picture), _misleads(ask, picture)))
        elif family == "hidden":
            behind, front = _ordered(ask, picture)
            # Asked with yes/no and not hidden, half of the objects still touch another one, being in front.
            if ask.stake.form == "choice" or ask.stake.truths[picture] or _misleads(ask, picture):
                hides.append((front, behind))
                clear.add(front)
            else:
                clear.add(ask.roles[0])
    return Wishes(tuple(left), tuple(nearer), tuple(larger), tuple(hides), frozenset(clear))


def _ordered(ask: Ask, picture: int) -> tuple[int, int]:
    """The two objects, that one first of which the relation is true."""
    a, b = ask.roles
    return (a, b) if ask.stake.truths[picture] else (b, a)


def _misleads(ask: Ask, picture: int) -> bool:
    return ask.stake.misleading is not None and ask.stake.misleading[picture]


def _choose(rng: np.random.Generator, pairs: list[Pair]) -> Pair | None:
    return pairs[int(rng.integers(len(pairs)))] if pairs else None


def _role_pairs(plan: Plan, picture: int, k: int, allowed: tuple[Pair, ...]) -> list[Pair]:
    """What the named object k may look like."""
    name = plan.names[k]
    colours: set[str] | None = {name.colour} if name.colour else None
    shapes: set[str] | None = {name.shape} if name.shape else None
    claim = plan.ask("binding")
    if claim is not None and claim.roles[0] == k and claim.stake.truths[picture]:
        colours = {claim.target.colour}
    for family in ("colour", "shape"):
        ask = plan.ask(family)
        if ask is not None and ask.roles[0] == k:
            answer = {str(ask.stake.truths[picture])}
            colours, shapes = (answer, shapes) if family == "colour" else (colours, answer)
    good = [
        (c, s)
        for c, s in allowed
        if (colours is None or c in colours)
        and (shapes is None or s in shapes)
        and (name.colour != "" or c not in plan.alone_colours)
        and (name.shape != "" or s not in plan.alone_shapes)
    ]
    if claim is not None and claim.roles[0] == k and not claim.stake.truths[picture]:
        good = [pair for pair in good if pair[0] != claim.target.colour]
    full = {(n.colour, n.shape) for n in plan.names if n.kind == "full"} - {(name.colour, name.shape)}
    return [pair for pair in good if pair not in full and not _counted(plan, pair)]


def _counted(plan: Plan, pair: Pair) -> bool:
    ask = plan.ask("count")
    return ask is not None and ask.target.word in pair


def _filler_wants(rng: np.random.Generator, plan: Plan, picture: int) -> list[tuple[Name, bool]]:
    """For each unnamed object what it must be (an empty part is free), and whether it counts."""
    wants = [(Name(), False)] * (plan.count - len(plan.names))
    if (ask := plan.ask("count")) is not None:
        number = int(str(ask.stake.truths[picture]))
        wants[:number] = [(ask.target, True)] * number
    place = 0
    if (ask := plan.ask("existence")) is not None:
        target, near = ask.target, [Name(colour=ask.target.colour), Name(shape=ask.target.shape)]
        turn = int(rng.integers(2))
        # A picture without the object has its colour or its shape, or both, on others (adversarial).
        wants[0] = (target, False) if ask.stake.truths[picture] else (near[turn], False)
        place = 1
        if len(wants) > 1 + (plan.ask("binding") is not None) and rng.random() < 0.7:
            wants[1] = (near[1 - turn], False)
            place = 2
    claim = plan.ask("binding")
    # The claimed colour is there when the claim is wrong, and half of the time when it is right.
    if claim is not None and (not claim.stake.truths[picture] or rng.random() < 0.5):
        want, counts = wants[min(place, len(wants) - 1)]
        wants[min(place, len(wants) - 1)] = (Name(claim.target.colour, want.shape), counts)
    return wants


def _filler_pairs(plan: Plan, picture: int, want: tuple[Name, bool], allowed: tuple[Pair, ...]) -> list[Pair]:
    name, counts = want
    full = {(n.colour, n.shape) for n in plan.names if n.kind == "full"}
    if (ask := plan.ask("existence")) is not None and (name != ask.target):
        full.add((ask.target.colour, ask.target.shape))
    return [
        (c, s)
        for c, s in allowed
        if name.colour in ("", c)
        and name.shape in ("", s)
        and c not in plan.alone_colours
        and s not in plan.alone_shapes
        and (c, s) not in full
        and (counts or not _counted(plan, (c, s)))
    ]


def _sizes(rng: np.random.Generator, plan: Plan, picture: int) -> list[str]:
    small, large = tuple(SIZES)
    sizes = [(small, large)[int(k)] for k in rng.integers(2, size=plan.count)]
    fixed: set[int] = set()
    if (ask := plan.ask("larger")) is not None:
        a, b = _ordered(ask, picture)
        sizes[a], sizes[b] = large, small
        fixed |= {a, b}
    if (ask := plan.ask("size")) is not None:
        k = ask.roles[0]
        sizes[k] = str(ask.stake.truths[picture])
        others = [j for j in range(plan.count) if j != k]
        if all(sizes[j] == sizes[k] for j in others):  # something to compare with
            sizes[others[int(rng.integers(len(others)))]] = small if sizes[k] == large else large
    return sizes
