"""Makes pairs of complementary pictures, each a pure function of (seed, split, number of the pair)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from unimrg.data.scenes.cast import draw_looks, draw_wishes
from unimrg.data.scenes.layout import draw_camera, draw_light, place
from unimrg.data.scenes.plan import Ask, Plan, draw_plan, draw_stakes
from unimrg.data.scenes.render import Survey, paint, survey
from unimrg.data.scenes.world import HELD_OUT, SPLITS, Question, Rendering, Scene, World

PLANS = 24  # sets of names tried before new stakes are drawn
PICTURES = 4  # pictures tried for one set of names

# What a finished picture must keep, see `_holds`.
LEAST_SHARE = 0.3  # visible part of every object
CLEAR_SHARE = 0.97
HIDDEN_SHARE = 0.85
LEAST_WIDTH = 0.1  # of an object, in picture widths
NEAREST_RATIO = 1.08
HEIGHT_GAP = 0.04
LOOKS_RATIO = 1.08


def make_scenes(
    n: int, seed: int = 0, split: str = "train", size: int = 128, questions: int = 6, start: int = 0
) -> Iterator[Scene]:
    """The first `n` scenes of a split, from pair `start` on; complementary pictures follow each other.

    size: side of the picture in pixels (32 or more). questions: 2 to 7 per scene.
    """
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)}, not {split!r}")
    if not 2 <= questions <= 7:
        raise ValueError(f"questions is 2 to 7, not {questions}")
    if size < 32:
        raise ValueError(f"size is at least 32 pixels, not {size}")
    for k in range(n):
        if k % 2 == 0:
            pair = make_pair(seed, split, start + k // 2, size, questions)
        yield pair[k % 2]


def make_pair(seed: int, split: str, index: int, size: int, questions: int) -> tuple[Scene, Scene]:
    """Two pictures with the same questions and different answers."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    while True:
        stakes = draw_stakes(rng, questions)
        for _ in range(PLANS):
            plan = draw_plan(rng, split, stakes)
            if plan is None:
                break
            scenes = _draw_pair(rng, plan, f"{split}-{seed}-{index:06d}", size)
            if scenes is not None:
                return scenes


def _draw_pair(rng: np.random.Generator, plan: Plan, name: str, size: int) -> tuple[Scene, Scene] | None:
    """Both pictures of a plan, or None when one of them does not keep what was promised."""
    drafts = []
    for picture in (0, 1):
        draft = _draft(rng, plan, picture, size)
        if draft is None:
            return None
        drafts.append(draft)
    first, second = (
        Scene(
            f"{name}-{picture}",
            draft.world,
            paint(draft),
            tuple(
                _question(plan, ask, picture, draft.world, f"{name}-q{k}") for k, ask in enumerate(plan.asks)
            ),
        )
        for picture, draft in enumerate(drafts)
    )
    return first, second


def _draft(rng: np.random.Generator, plan: Plan, picture: int, size: int) -> Survey | None:
    """A picture, not yet painted, that keeps what the plan promises."""
    for _ in range(PICTURES):
        looks = draw_looks(rng, plan, picture)
        if looks is None:
            return None
        camera, near = draw_camera(rng, plan.count)
        things = place(rng, camera, near, looks, draw_wishes(rng, plan, picture))
        if things is None:
            continue
        draft = survey(World(things, camera, draw_light(rng)), size)
        if keeps(plan, picture, draft.world, draft.known):
            return draft
    return None


def keeps(plan: Plan, picture: int, world: World, drawn: Rendering) -> bool:
    """Whether a picture shows what its questions are about, with the margins above."""
    widths = (drawn.boxes[:, 2:] - drawn.boxes[:, :2]).max(1) / drawn.ids.shape[0]
    shares = drawn.visible / np.maximum(drawn.amodal, 1)
    if shares.min() < LEAST_SHARE or widths.min() < LEAST_WIDTH:
        return False
    return all(_holds(ask, picture, world, drawn, shares, widths) for ask in plan.asks)


def _holds(
    ask: Ask, picture: int, world: World, drawn: Rendering, shares: np.ndarray, widths: np.ndarray
) -> bool:
    family, roles, true = ask.stake.family, ask.roles, bool(ask.stake.truths[picture])
    if family == "hidden":
        behind, other = roles if true or ask.stake.form == "yn" else roles[::-1]
        if ask.stake.form == "choice":
            return shares[behind] < HIDDEN_SHARE and shares[other] > CLEAR_SHARE
        return bool(shares[behind] < HIDDEN_SHARE if true else shares[behind] > CLEAR_SHARE)
    if ask.stake.misleading is None:
        return True
    first, second = roles if true else roles[::-1]
    misleading = ask.stake.misleading[picture]
    if family == "larger":
        looks = widths[first] / widths[second]
        return bool(looks < 1 / LOOKS_RATIO if misleading else looks > LOOKS_RATIO)
    y = [world.camera.project(world.things[k].centre)[1] for k in (first, second)]
    nearest = [drawn.depth[drawn.ids == k + 1].min() for k in (first, second)]
    higher = y[1] - y[0] if misleading else y[0] - y[1]
    return bool(higher > HEIGHT_GAP and nearest[1] > NEAREST_RATIO * nearest[0])


def _question(plan: Plan, ask: Ask, picture: int, world: World, pair: str) -> Question:
    pairs = [thing.look.pair for thing in world.things]
    asked = set(ask.roles)
    if ask.stake.family in ("existence", "count"):
        asked |= {k for k, p in enumerate(pairs) if {ask.target.colour, ask.target.shape} - {""} <= set(p)}
    named = {pairs[k] for k in asked} | {(ask.target.colour, ask.target.shape)}
    if ask.stake.family == "binding":
        named.add((ask.target.colour, plan.names[ask.roles[0]].shape))
    return Question(
        text=ask.text,
        answer=ask.answer(picture),
        answers=(ask.answer(0), ask.answer(1)),
        family=ask.stake.family,
        pair=pair,
        options=ask.options,
        conflict=_conflict(ask, picture, pairs),
        unseen=not HELD_OUT.isdisjoint(named),
        objects=tuple(k + 1 for k in sorted(asked)) if not ask.roles else tuple(k + 1 for k in ask.roles),
        sense=ask.stake.sense,
    )


def _conflict(ask: Ask, picture: int, pairs: list[tuple[str, str]]) -> bool | None:
    """Whether the cue misleads in this picture.

    front, nearer: lower in the picture is nearer. larger: what looks larger is larger. hidden: what touches
    another object is hidden. existence: what is named is there when its colour and its shape are.
    """
    true = bool(ask.stake.truths[picture])
    if ask.stake.family == "existence":
        colours, shapes = zip(*pairs, strict=True)
        return not true and ask.target.colour in colours and ask.target.shape in shapes
    if ask.stake.misleading is None:
        return None
    return ask.stake.misleading[picture] and not (ask.stake.family == "hidden" and true)
