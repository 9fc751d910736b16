"""What a shortcut would answer: cues that often go with the truth but are not it.

A benchmark that prints chance alone makes a shortcut look like sight. Each cue here needs to see something
(a height in the picture, a size, a colour), but not what is asked for.
"""

from __future__ import annotations

import re

import numpy as np

from unimrg.data.scenes.world import COLOURS, SHAPES, Question, Scene

SHORTCUTS = ("height", "looks", "presence")
"""height: what is lower in the picture is nearer. looks: what looks larger is larger, and nearer.

presence: what is named or asked for is there if its words fit anything in the picture: an object with that
colour and one with that shape (existence), the claimed colour anywhere (binding), any visible colour or shape
(colour, shape), an object whose outline's box meets another's (hidden).
"""

Answers = tuple[str, ...]


def shortcuts(scene: Scene, question: Question) -> dict[str, Answers]:
    """By shortcut, the answers it leaves open, to choose from evenly; one that says nothing is missing."""
    found = {
        "height": _by_height(scene, question),
        "looks": _by_looks(scene, question),
        "presence": _by_presence(scene, question),
    }
    return {name: answers for name, answers in found.items() if answers}


def _say(question: Question, truth: bool) -> Answers:
    """The answer when the relation of the text (before its sense) holds or doesn't."""
    return (question.options[0] if truth == question.sense else question.options[1],)


def _by_height(scene: Scene, question: Question) -> Answers:
    if question.family not in ("front", "nearer"):
        return ()
    camera, things = scene.world.camera, scene.world.things
    first, second = (camera.project(things[k - 1].centre)[1] for k in question.objects)
    return _say(question, first > second)


def _by_looks(scene: Scene, question: Question) -> Answers:
    boxes = scene.rendering.boxes
    widths = (boxes[:, 2:] - boxes[:, :2]).max(1)
    if question.family in ("front", "nearer", "larger"):
        first, second = (widths[k - 1] for k in question.objects)
        return question.options if first == second else _say(question, bool(first > second))
    if question.family == "size":
        middle, mine = float(np.median(widths)), float(widths[question.objects[0] - 1])
        return question.options if mine == middle else (question.options[int(mine > middle)],)
    return ()


def _by_presence(scene: Scene, question: Question) -> Answers:
    looks = [thing.look for thing in scene.world.things]
    colours, shapes = {look.colour for look in looks}, {look.shape for look in looks}
    words = set(re.findall("[a-z]+", question.text.lower()))
    if question.family == "existence":
        return _say(question, words & set(COLOURS) <= colours and words & set(SHAPES) <= shapes)
    if question.family == "binding":
        return _say(question, words & set(COLOURS) <= colours)
    if question.family in ("colour", "shape"):
        seen = colours if question.family == "colour" else shapes
        return tuple(option for option in question.options if option in seen)
    if question.family == "hidden":
        touched = [_touched(scene.rendering.boxes, k - 1) for k in question.objects]
        if len(touched) == 1:
            return _say(question, touched[0])
        return question.options if touched[0] == touched[1] else _say(question, touched[0])
    return ()


def _touched(boxes: np.ndarray, index: int) -> bool:
    """Whether the box of an object meets another's."""
    left, top, right, bottom = boxes[index]
    others = np.delete(boxes, index, axis=0)
    meets = (others[:, 0] < right) & (others[:, 2] > left) & (others[:, 1] < bottom) & (others[:, 3] > top)
    return bool(meets.any())
