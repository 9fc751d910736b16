"""Hides passwords and keys in a configuration before it is shown: a report is meant to be passed on."""

from __future__ import annotations

import re

HIDDEN = "(hidden)"
# Names that end in one of these; `eos_token` or `tokens_per_batch` are no secrets.
_NAME = (
    r"(?:[\w.-]*[_.-])?(?:secret|passwo?r?d|credentials?|(?:api|access|private|secret|account)[_-]?key"
    r"|(?:access|api|auth|bearer|hf|hub|security|session)[_-]?token)|token"
)
_LINE = re.compile(
    rf"^(\s*(?:-\s+)*)(?:(?P<q>[\"'])(?:{_NAME})(?P=q)|(?:{_NAME}))\s*:(?=\s|$)", re.IGNORECASE
)
_INLINE = re.compile(
    rf"([{{,]\s*[\"']?(?:{_NAME})[\"']?\s*:\s*)(?!null\b)(\"[^\"]*\"|'[^']*'|[^,}}\n]+)", re.IGNORECASE
)
_IN_ADDRESS = re.compile(r"(://)[^/\s@]+@")
_NOTHING = ("", "null", "~", "''", '""')


def hide_secrets(config: str) -> str:
    """YAML text with the values of secret names, and names and passwords in addresses, replaced."""
    shown: list[str] = []
    below = -1  # indentation of the secret whose value goes on; -1: none
    for line in config.split("\n"):
        indent = len(line) - len(line.lstrip())
        if below >= 0 and (indent > below or not line.strip()):
            continue
        below = -1
        found = _LINE.match(line)
        if found:
            below = len(found.group(1))
            value = line[found.end() :].strip()
            line = line if value in _NOTHING[1:] else f"{line[: found.end()]} {HIDDEN}"
        shown.append(_IN_ADDRESS.sub(rf"\1{HIDDEN}@", _INLINE.sub(rf"\1{HIDDEN}", line)))
    return "\n".join(shown)
