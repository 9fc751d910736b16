"""The text side: what a pair of pictures is asked, before either picture exists.

A pair has one list of texts and two pictures. Every text has a different answer in each, and half of the
yes/no questions of each picture are answered yes. Where a cue (see `Ask.misleading`) is tied to the answer it
misleads in exactly one of the two pictures, so the cue alone is right half of the time.

What decides the answers (the `Stakes`) is drawn once; names are then drawn, and redrawn, until they fit, so a
hard picture never changes the odds of an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from unimrg.data.scenes.text import FAMILIES, PLURALS, TEMPLATES, YES_NO, Name
from unimrg.data.scenes.world import COLOURS, COUNTS, MATERIALS, SHAPES, SIZES, seen_pairs

NAME_TRIES = 80
# Families that fix the depths of two objects: each takes a pair of its own.
DEPTH_FAMILIES = ("front", "nearer", "hidden", "larger")
CUED = ("front", "nearer", "larger")
FLEXIBLE = ("side", *DEPTH_FAMILIES)  # have a yes/no form and a choice form
WHICH = ("nearer", "hidden", "larger")  # their choice form is answered with a name
FLAT_FAMILIES = tuple(f for f in FAMILIES if f != "count" and f not in DEPTH_FAMILIES)
VALUES = {"colour": COLOURS, "shape": SHAPES, "size": tuple(SIZES), "material": MATERIALS, "count": COUNTS}
COUNTING = 0.3  # share of the pairs that count; counting crowds the picture


@dataclass(frozen=True)
class Stake:
    """A family and form with what is true in picture 0 and 1.

    truths: for relations and yes/no families bool (before the template's sense), else the answer itself.
    misleading: whether the cue misleads in each picture, None without a cue.
    """

    family: str
    form: str
    sense: bool
    template: str
    truths: tuple[bool, bool] | tuple[str, str]
    misleading: tuple[bool, bool] | None


@dataclass(frozen=True)
class Stakes:
    """All that decides answers; `roles` is the number of named objects."""

    stakes: tuple[Stake, ...]
    roles: int
    extra: int

    def has(self, *families: str) -> bool:
        return any(stake.family in families for stake in self.stakes)


@dataclass(frozen=True)
class Ask:
    """A stake with its text. roles: the named objects, in the order of the text.

    target: what existence and counting are about, what binding claims; else an empty name.
    """

    stake: Stake
    text: str
    roles: tuple[int, ...]
    options: tuple[str, ...]
    target: Name

    def answer(self, picture: int) -> str:
        """The answer in picture 0 or 1."""
        truth = self.stake.truths[picture]
        if isinstance(truth, str):
            return truth
        yes = truth == self.stake.sense
        return self.options[0] if yes else self.options[1]


@dataclass(frozen=True)
class Plan:
    """Names of the first objects and the questions; both pictures have `count` objects."""

    split: str
    names: tuple[Name, ...]
    asks: tuple[Ask, ...]
    count: int

    def ask(self, family: str) -> Ask | None:
        return next((ask for ask in self.asks if ask.stake.family == family), None)

    @cached_property
    def alone_shapes(self) -> frozenset[str]:
        """Shapes that occur once in each picture."""
        return frozenset(name.shape for name in self.names if name.kind == "shape")

    @cached_property
    def alone_colours(self) -> frozenset[str]:
        return frozenset(name.colour for name in self.names if name.kind == "colour")


def draw_stakes(rng: np.random.Generator, questions: int) -> Stakes:
    """Families, forms and truths for a pair of pictures with `questions` texts."""
    while True:
        counting = bool(rng.random() < COUNTING)
        roles = 2 if counting else int(rng.choice([2, 3, 4], p=[0.15, 0.35, 0.5]))
        chosen = _families(rng, questions, roles, counting)
        forms = _forms(rng, chosen, roles)
        if forms is not None:
            break
    extra = int(rng.choice(3, p=[0.55, 0.35, 0.1]))
    yes_no = [family for family in chosen if forms[family] == "yn"]
    yes = dict(zip(yes_no, rng.permutation(np.arange(len(yes_no)) % 2 == 0).tolist(), strict=True))
    return Stakes(
        tuple(_stake(rng, family, forms[family], yes.get(family)) for family in chosen), roles, extra
    )


def _families(rng: np.random.Generator, questions: int, roles: int, counting: bool) -> list[str]:
    """Different families that can be asked of one picture with `roles` named objects."""
    deep = min(2 if roles >= 4 else 1, questions // 2)
    # Counting may take any number from 0 to 4, so nothing else may decide what the unnamed objects are.
    others = [f for f in FLAT_FAMILIES if not (counting and f == "existence")]
    while True:
        chosen = ["count"] * counting + [
            DEPTH_FAMILIES[k] for k in rng.permutation(len(DEPTH_FAMILIES))[:deep]
        ]
        chosen += [others[k] for k in rng.permutation(len(others))[: questions - len(chosen)]]
        if sum(family in ("colour", "binding", "shape") for family in chosen) > roles:
            continue
        if counting and {"colour", "binding"} <= set(chosen):
            continue
        if roles == 2 and {"larger", "size"} <= set(chosen):
            continue  # the compared sizes would give the other answer away
        return [chosen[k] for k in rng.permutation(questions)]


def _forms(rng: np.random.Generator, chosen: list[str], roles: int) -> dict[str, str] | None:
    """A form for each family with an even number of yes/no questions; None if there is no such choice."""
    forms = {}
    # With one object called by its shape and the other by its colour, "which" has no one-word answer.
    unlike = roles == 2 and "shape" in chosen and not {"colour", "binding"}.isdisjoint(chosen)
    for family in chosen:
        options = [form for name, form in TEMPLATES if name == family]
        if unlike and family in WHICH:
            options = ["yn"]
        forms[family] = options[int(rng.integers(len(options)))]
    if sum(form == "yn" for form in forms.values()) % 2:
        flexible = [family for family in chosen if family in FLEXIBLE and not (unlike and family in WHICH)]
        if not flexible:
            return None
        turned = flexible[int(rng.integers(len(flexible)))]
        forms[turned] = "choice" if forms[turned] == "yn" else "yn"
    return forms


def _stake(rng: np.random.Generator, family: str, form: str, yes: bool | None) -> Stake:
    templates = TEMPLATES[family, form]
    template, sense = templates[int(rng.integers(len(templates)))]
    truths: tuple[bool, bool] | tuple[str, str]
    if family in VALUES:
        first, second = rng.choice(len(VALUES[family]), 2, replace=False)
        truths = (VALUES[family][first], VALUES[family][second])
    else:
        true = bool(rng.random() < 0.5) if yes is None else yes == sense
        truths = (true, not true)
    misleads = bool(rng.random() < 0.5)
    cued = family in CUED or (family == "hidden" and form == "yn")
    return Stake(family, form, sense, template, truths, (misleads, not misleads) if cued else None)


def draw_plan(rng: np.random.Generator, split: str, stakes: Stakes) -> Plan | None:
    """Names and texts for the stakes, or None when no consistent names were found."""
    for _ in range(NAME_TRIES):
        kinds, slots = _slots(rng, stakes)
        if not _one_word(stakes, kinds, slots):
            continue
        names = _names(rng, kinds)
        targets = _targets(rng, split, stakes, names, slots)
        if targets is None:
            continue
        asks = tuple(_ask(stake, names, slots[stake.family], targets) for stake in stakes.stakes)
        plan = Plan(split, names, asks, _count(stakes))
        if _consistent(plan):
            return plan
    return None


def _count(stakes: Stakes) -> int:
    """Objects of both pictures: it must not depend on the answers."""
    if stakes.has("count"):
        return min(stakes.roles + 4 + (stakes.extra > 1), 7)
    needed = stakes.roles + stakes.has("existence") + stakes.has("binding")
    return max(needed + (stakes.extra if needed < 5 else 0), 3)


def _slots(rng: np.random.Generator, stakes: Stakes) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """What kind of name each role gets, and which roles each family asks about."""
    kinds: list[str] = []
    slots: dict[str, tuple[int, ...]] = {"existence": (), "count": ()}
    for family, kind in (("colour", "shape"), ("binding", "shape"), ("shape", "colour")):
        if stakes.has(family):
            slots[family] = (len(kinds),)
            kinds.append(kind)
    fixed = len(kinds)
    while len(kinds) < stakes.roles:
        kinds.append(("shape", "colour", "full")[int(rng.integers(3))])
    order = rng.permutation(stakes.roles).tolist()
    deep = [stake.family for stake in stakes.stakes if stake.family in DEPTH_FAMILIES]
    for k, family in enumerate(deep):
        slots[family] = (order[2 * k], order[2 * k + 1])
    _name_alike(rng, stakes, kinds, slots, fixed)
    slots["side"] = tuple(rng.permutation(stakes.roles)[:2].tolist())
    slots["material"] = (int(rng.integers(stakes.roles)),)
    free = [k for k in range(stakes.roles) if k not in slots.get("larger", ())]
    slots["size"] = (free[int(rng.integers(len(free)))],) if free else ()
    return kinds, slots


def _one_word(stakes: Stakes, kinds: list[str], slots: dict[str, tuple[int, ...]]) -> bool:
    """Whether both objects of every "which" are called by shape, or both by colour."""
    asked = [slots[s.family] for s in stakes.stakes if s.form == "choice" and s.family in WHICH]
    return all(kinds[a] == kinds[b] for a, b in asked)


def _name_alike(
    rng: np.random.Generator, stakes: Stakes, kinds: list[str], slots: dict[str, tuple[int, ...]], fixed: int
) -> None:
    """Lets "which" be answered in one word, both by shape or both by colour; the first `fixed` kinds stay."""
    for stake in stakes.stakes:
        if stake.form == "choice" and stake.family in WHICH:
            pair = slots[stake.family]
            settled = [kinds[k] for k in pair if k < fixed]
            kind = settled[0] if settled else ("shape", "colour")[int(rng.integers(2))]
            for k in pair:
                kinds[k] = kinds[k] if k < fixed else kind


def _names(rng: np.random.Generator, kinds: list[str]) -> tuple[Name, ...]:
    """Names of the given kinds, no two of which could mean the same object."""
    shapes, colours = rng.permutation(SHAPES).tolist(), rng.permutation(COLOURS).tolist()
    alone = {kind: [shapes, colours][kind == "colour"] for kind in ("shape", "colour")}
    names: list[Name] = []
    for kind in kinds:
        if kind == "shape":
            names.append(Name(shape=alone["shape"].pop()))
        elif kind == "colour":
            names.append(Name(colour=alone["colour"].pop()))
        else:
            names.append(Name("?", "?"))
    for k, name in enumerate(names):
        if name.colour == "?":  # what is left after the unique ones are taken
            names[k] = Name(colours[int(rng.integers(len(colours)))], shapes[int(rng.integers(len(shapes)))])
    return tuple(names)


def _targets(
    rng: np.random.Generator,
    split: str,
    stakes: Stakes,
    names: tuple[Name, ...],
    slots: dict[str, tuple[int, ...]],
) -> dict[str, Name] | None:
    """What existence, binding and counting are about."""
    shapes = [s for s in SHAPES if all(s != name.shape for name in names if name.kind == "shape")]
    colours = [c for c in COLOURS if all(c != name.colour for name in names if name.kind == "colour")]
    if not shapes or not colours:
        return None
    colour, shape = (str(rng.choice(values)) for values in (colours, shapes))
    claim = str(rng.choice(colours))
    targets = {"existence": Name(colour, shape), "binding": Name(colour=claim)}
    by_shape = stakes.has("binding") or bool(rng.random() < 0.5)
    targets["count"] = Name(shape=shape) if by_shape else Name(colour=colour)
    return targets


def _ask(stake: Stake, names: tuple[Name, ...], roles: tuple[int, ...], targets: dict[str, Name]) -> Ask:
    target = targets.get(stake.family, Name())
    called = [str(names[k]) for k in roles] or [str(target)]
    plural = PLURALS[target.shape] if target.shape else f"{target.colour} objects"
    text = stake.template.format(a=called[0], b=called[-1], c=target.colour, p=plural)
    text = text.replace(" a orange", " an orange")
    return Ask(stake, text, roles, _options(stake, names, roles), target)


def _options(stake: Stake, names: tuple[Name, ...], roles: tuple[int, ...]) -> tuple[str, ...]:
    """Admissible answers; of two, the first is the one when the truth and the template's sense agree."""
    if stake.family in VALUES:
        return VALUES[stake.family]
    if stake.form == "yn":
        return YES_NO
    if stake.family == "side":
        return ("left", "right")
    if stake.family == "front":
        return ("front", "behind")
    return tuple(names[k].word for k in roles)


def _consistent(plan: Plan) -> bool:
    """Whether the names leave both pictures possible, in this split."""
    seen = set(seen_pairs(plan.split))
    full = [(name.colour, name.shape) for name in plan.names if name.kind == "full"]
    if len(set(full)) < len(full) or not seen.issuperset(full):
        return False
    for ask in plan.asks:
        stake, first = ask.stake, plan.names[ask.roles[0]] if ask.roles else Name()
        if stake.family == "colour":
            pairs = {(str(c), first.shape) for c in stake.truths}
            if not seen.issuperset(pairs) or plan.alone_colours & set(stake.truths):
                return False
        if stake.family == "shape":
            pairs = {(first.colour, str(s)) for s in stake.truths}
            if not seen.issuperset(pairs) or plan.alone_shapes & set(stake.truths):
                return False
        if stake.family == "binding" and (ask.target.colour, first.shape) not in seen:
            return False
        if stake.family == "existence":
            wanted = (ask.target.colour, ask.target.shape)
            if wanted in full or wanted not in seen:
                return False
        if stake.family == "count" and not _countable(plan, ask):
            return False
    return True


def _countable(plan: Plan, ask: Ask) -> bool:
    """Counted objects are never named ones, so that every number from 0 is possible."""
    taken = {name.shape for name in plan.names} | {name.colour for name in plan.names}
    for family in ("colour", "shape"):
        if (other := plan.ask(family)) is not None:
            taken |= {str(truth) for truth in other.stake.truths}
    if (other := plan.ask("binding")) is not None:
        taken.add(other.target.colour)
    return ask.target.word not in taken
