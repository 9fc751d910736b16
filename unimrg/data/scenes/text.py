"""How questions are worded.

Each form of a family has two or three templates with a sense: False asks for the opposite relation, so the
truth of the relation is turned over in the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

FAMILIES = (
    "existence",
    "colour",
    "shape",
    "size",
    "material",
    "binding",
    "count",
    "side",
    "front",
    "nearer",
    "hidden",
    "larger",
)
YES_NO = ("yes", "no")

# (family, form) -> (template, sense). {a} and {b} are objects ("red cube", "cone", "blue object"), {c} is a
# colour, {p} a plural ("cubes", "red objects").
TEMPLATES: dict[tuple[str, str], tuple[tuple[str, bool], ...]] = {
    ("existence", "yn"): (
        ("Is there a {a} in the image?", True),
        ("Does the image show a {a}?", True),
        ("Can you see a {a}?", True),
    ),
    ("colour", "open"): (
        ("What colour is the {a}?", True),
        ("What is the colour of the {a}?", True),
        ("Which colour does the {a} have?", True),
    ),
    ("shape", "open"): (
        ("What shape is the {a}?", True),
        ("What is the shape of the {a}?", True),
        ("Which shape does the {a} have?", True),
    ),
    ("size", "open"): (
        ("What size is the {a}, small or large?", True),
        ("Is the {a} small or large?", True),
    ),
    ("material", "open"): (
        ("Is the {a} matte or metal?", True),
        ("What is the {a} made of, matte or metal?", True),
    ),
    ("binding", "yn"): (
        ("Is the {a} {c}?", True),
        ("Is the colour of the {a} {c}?", True),
    ),
    ("count", "open"): (
        ("How many {p} are there?", True),
        ("How many {p} does the image show?", True),
        ("What is the number of {p}?", True),
    ),
    ("side", "yn"): (
        ("Is the {a} to the left of the {b}?", True),
        ("Is the {a} to the right of the {b}?", False),
    ),
    ("side", "choice"): (
        ("Is the {a} left or right of the {b}?", True),
        ("On which side of the {b} is the {a}, left or right?", True),
    ),
    ("front", "yn"): (
        ("Is the {a} in front of the {b}?", True),
        ("Is the {a} behind the {b}?", False),
    ),
    ("front", "choice"): (
        ("Is the {a} in front of or behind the {b}? Answer front or behind.", True),
        ("Where is the {a} as seen from the {b}, front or behind?", True),
    ),
    ("nearer", "yn"): (
        ("Is the {a} closer to the camera than the {b}?", True),
        ("Is the {a} farther from the camera than the {b}?", False),
    ),
    ("nearer", "choice"): (
        ("Which is closer to the camera, the {a} or the {b}?", True),
        ("Which is farther from the camera, the {a} or the {b}?", False),
    ),
    ("hidden", "yn"): (
        ("Is the {a} partly hidden by another object?", True),
        ("Does another object cover a part of the {a}?", True),
        ("Is the {a} fully visible?", False),
    ),
    ("hidden", "choice"): (
        ("Which is partly hidden, the {a} or the {b}?", True),
        ("Which is fully visible, the {a} or the {b}?", False),
    ),
    ("larger", "yn"): (
        ("Is the {a} really larger than the {b}?", True),
        ("Is the {a} really smaller than the {b}?", False),
    ),
    ("larger", "choice"): (
        ("Which is really larger, the {a} or the {b}?", True),
        ("Which is really smaller, the {a} or the {b}?", False),
    ),
}
PLURALS = {"cube": "cubes", "sphere": "spheres", "cylinder": "cylinders", "cone": "cones", "torus": "tori"}


@dataclass(frozen=True)
class Name:
    """How a question calls an object. A missing part is not named; what is left is unique in the picture."""

    colour: str = ""
    shape: str = ""

    @cached_property
    def kind(self) -> str:
        """Which part is named: full, shape or colour."""
        return "full" if self.colour and self.shape else "shape" if self.shape else "colour"

    def __str__(self) -> str:
        return " ".join(filter(None, (self.colour, self.shape or "object")))

    @property
    def word(self) -> str:
        """The one word that answers "which"."""
        return self.shape or self.colour
