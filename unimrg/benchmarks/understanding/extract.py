"""Which option, or which of yes and no, an answer in free words means: VLMEvalKit's rules without a judge.

The official rules changed twice, and the same answers score differently under each version, so every
result names the one it was scored by. They are reproduced with their oddities.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

NOT_FOUND = "Z"
"""The letter of an answer that names no option: always wrong."""

UNKNOWN = "Unknown"
"""What an answer is that says neither yes nor no, or both: always wrong."""

FAILED = "Failed to obtain answer via API."
"""What the official tool stores where a model gave no answer."""


@dataclass(frozen=True)
class Matcher:
    """One version of the rules.

    late: a letter counts only among the last four words, and the text of an option only in an answer no
    longer than twice all options. phrase: `answer is B` counts wherever it stands.
    """

    name: str
    late: bool
    phrase: bool


MATCHERS = {
    matcher.name: matcher
    for matcher in (
        Matcher("legacy_2024", late=False, phrase=False),  # until 2025-08-03
        Matcher("paper_era_2025_08", late=True, phrase=False),  # 2025-08-04 to 2026-06-16
        Matcher("head_2026_06", late=True, phrase=True),  # from 2026-06-17
    )
}
DEFAULT_MATCHER = "paper_era_2025_08"

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_TO_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4
_PHRASE = re.compile(r"answer is \**([A-D])", re.IGNORECASE)

# For yes and no, in this order.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER = re.compile(r"\d,\d")
_LONE_STOP = re.compile(r"(?<!\d)\.(?!\d)")
_STOPS_REMOVED = 32  # more stay, as in the official code


def find_letter(answer: str, options: Mapping[str, str], matcher: Matcher) -> str | None:
    """The option that an answer names by its letter, NOT_FOUND where it refuses, None where it names none.

    options: capital letter -> text, of the options that are there.
    """
    if "Failed to obtain answer via API" in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return NOT_FOUND
    words = answer.translate(_TO_SPACES).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and (not matcher.late or words.index(named[0]) >= len(words) - _LAST_WORDS):
        return named[0]
    if not named and NOT_FOUND in words:
        return NOT_FOUND
    if matcher.phrase and (found := _PHRASE.search(answer)) and found[1].upper() in options:
        return found[1].upper()
    return None


def find_text(answer: str, options: Mapping[str, str], matcher: Matcher) -> str | None:
    """The option whose text, and no other's, is part of the answer, without case; or None."""
    answer = answer.lower()
    if matcher.late and len(answer) > 2 * sum(len(text) for text in options.values()):
        return None
    found = [letter for letter, text in options.items() if text.lower() in answer]
    return found[0] if len(found) == 1 else None


def find_option(answer: str, options: Mapping[str, str], matcher: Matcher) -> str | None:
    """By letter, else by text; None where neither finds anything."""
    return find_letter(answer, options, matcher) or find_text(answer, options, matcher)


def yes_or_no(answer: str) -> str:
    """`Yes`, `No` or UNKNOWN."""
    words = _plain(answer.lower()).split()
    if ("yes" in words) == ("no" in words):
        return UNKNOWN
    return "Yes" if "yes" in words else "No"


def _plain(text: str) -> str:
    """Without most punctuation: a mark that touches a space goes, another becomes one."""
    has_number = _NUMBER.search(text) is not None
    plain = text
    for mark in _PUNCTUATION:
        gone = has_number or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if gone else " ")
    return _LONE_STOP.sub("", plain, count=_STOPS_REMOVED)
