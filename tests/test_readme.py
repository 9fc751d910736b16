"""README.md can't drift from the tree: every path of its layout exists, every module is in it."""

from __future__ import annotations

import re
from pathlib import Path

from tests.test_architecture import PACKAGES, ROOT

# Two spaces of indentation a level, the name, at least two spaces, one clause of description.
LINE = re.compile(r"^(?P<indent>(?:  )*)(?P<name>\S+)(?:\s{2,}(?P<clause>\S.*))?$")


def layout() -> dict[Path, str]:
    """Path -> description, of the fenced block under the heading "## Layout"."""
    _, heading, section = (ROOT / "README.md").read_text("utf-8").partition("\n## Layout\n")
    tree = section.partition("\n## ")[0].split("```")
    assert heading and len(tree) >= 3, 'README.md needs a fenced tree under the heading "## Layout"'
    found: dict[Path, str] = {}
    folders: list[str] = []
    for line in tree[1].splitlines():
        if not line.strip():
            continue
        match = LINE.match(line)
        assert match, f"not a line of a tree (indentation by two, name, two spaces, description): {line!r}"
        depth = len(match["indent"]) // 2
        assert depth <= len(folders), f"indented below nothing: {line!r}"
        folders[depth:] = [match["name"]] if match["name"].endswith("/") else []
        path = Path(*folders[:depth], match["name"])
        assert path not in found, f"listed twice: {path}"
        found[path] = match["clause"] or ""
    return found


def test_every_path_of_the_layout_exists() -> None:
    paths = layout()
    wrong = [str(path) for path in paths if not (ROOT / path).exists()]
    assert not wrong, f"README.md lists what isn't there: {', '.join(wrong)}"


def test_every_module_is_in_the_layout() -> None:
    modules = {
        path.relative_to(ROOT)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"  # the line of its folder speaks for it
    }
    missing = sorted(str(path) for path in modules - layout().keys())
    assert not missing, f"the layout in README.md lacks: {', '.join(missing)}"


def test_every_line_of_the_layout_says_what_it_is() -> None:
    silent = [str(path) for path, clause in layout().items() if not clause]
    assert not silent, f"in README.md's layout without a description: {', '.join(silent)}"
