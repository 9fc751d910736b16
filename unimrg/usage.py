"""What `--help` prints: the command in a paragraph, examples, groups, and every key with its meaning."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LONGEST_LABEL = 34
WIDTHS = (80, 110)


def usage(
    program: str,
    description: str,
    examples: Sequence[str],
    groups: Mapping[str, Mapping[str, str]],
    schema: type,
    values: Mapping[str, Any],
) -> str:
    """The whole help text.

    groups: group -> option -> what it is. values: nested, shown beside the keys; explanations come from the
    `help` of the fields of `schema` and from its docstrings.
    """
    width = min(max(shutil.get_terminal_size((100, 24)).columns, WIDTHS[0]), WIDTHS[1])
    words = ("[group=option] " if groups else "") + "[experiment=FILE.yaml] [key=value] ..."
    lines = [*textwrap.wrap(" ".join(description.split()), width), "", f"usage: {program} {words}"]
    lines += ["", *_row("  -h, --help", "show this; with groups and keys, what they lead to", width)]
    lines += _row("  --cfg", "print the resulting configuration as YAML and stop", width)
    lines += ["", "examples:", *(f"  {example}" for example in examples)]
    if groups:
        lines += ["", "groups, files of configs/ that set several keys:"]
        for group, options in groups.items():
            for option, what in options.items():
                lines += _row(f"  {group}={option}", what, width)
    lines += ["", "keys, with their values here:", *_section(schema, values, "", width)]
    return "\n".join(lines)


def _section(schema: type, values: Mapping[str, Any], path: str, width: int) -> Iterator[str]:
    """The plain keys of a section, then its sections."""
    hints = typing.get_type_hints(schema)
    fields = dataclasses.fields(schema)
    nested = [field.name for field in fields if dataclasses.is_dataclass(hints[field.name])]
    if path:
        yield ""
        yield f"  {path[:-1]}: {(schema.__doc__ or '').partition(chr(10))[0]}"
    for field in fields:
        if field.name not in nested:
            label = f"  {path}{field.name}={_shown(field.name, values)}"
            yield from _row(label, field.metadata.get("help", ""), width)
    for name in nested:
        yield from _section(hints[name], values[name], f"{path}{name}.", width)


def _shown(name: str, values: Mapping[str, Any]) -> str:
    """The value as one would write it on the command line; `???` (to be given) as it stands in the file."""
    try:
        value = values[name]
    except Exception:  # a value that must be given, or an environment variable that isn't set
        return "???"
    if name in ("access_key", "secret_key") and value:
        return "(redacted)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value
    return str(value).replace(" ", "").replace("'", "")


def _row(label: str, text: str, width: int) -> list[str]:
    """Label and text in two columns; a long label stands alone."""
    lines = textwrap.wrap(text, width - LONGEST_LABEL - 2) or [""]
    gap = " " * (LONGEST_LABEL + 2)
    if len(label) > LONGEST_LABEL:
        return [label, *(gap + line for line in lines)]
    return [f"{label:{LONGEST_LABEL}}  {lines[0]}".rstrip(), *(gap + line for line in lines[1:])]
