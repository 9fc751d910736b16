"""The shape of the house, drawn from the source: imports point one way, and the core runs without Ray.

When one of these tests fails, the message names the module and the import. A new module of `unimrg/` gets its
place in `LAYERS`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("unimrg", "cluster", "tune")

# A module may import from its own layer and from those above it in this list, never from one below.
LAYERS = (
    {"errors", "sample"},
    {"failures", "retries", "storage", "config", "transfer"},
    {
        "tasks",
        "plan",
        "attention",
        "backends",
        "layouts",
        "packing",
        "data",
        "teachers",
        "families",
        "losses",
        "balance",
        "pieces",
        "engine",
        "checkpoint",
        "consolidate",
        "health",
        "watchdog",
        "lora",
        "figures",
        "memory",
        "metrics",
        "schedule",
        "flops",
        "hardware",
        "weights",
        "zero",
    },
    {"loop", "benchmarks", "report", "adapters", "teachers.fit", "reproduce"},
    {"compose", "usage"},
    {"train", "label", "evaluate", "generate", "export", "reproduce.__main__"},
)
COMMANDS = {f"unimrg.{name}" for name in LAYERS[-1]}

# The core must import where these are missing; the commands and compose.py may need them.
OUTER = {"ray", "deepspeed", "hydra", "omegaconf"}
BLOCKED = (*sorted(OUTER), "boto3")


@dataclass(frozen=True)
class Import:
    """One imported name, fully qualified (`unimrg.data.scenes`, `unimrg.sample.Task`, `ray`).

    lazy: inside a function. typing: under `if TYPE_CHECKING`. Neither runs when the module is imported.
    """

    name: str
    line: int
    lazy: bool
    typing: bool

    @property
    def at_import(self) -> bool:
        return not (self.lazy or self.typing)


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, for every module of the three packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> tuple[Import, ...]:
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return tuple(_walk(ast.parse(path.read_text("utf-8"), str(path)), package, lazy=False, typing=False))


def _walk(node: ast.AST, package: str, lazy: bool, typing: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, lazy, typing)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = package.split(".")
            kept = parents[: len(parents) - node.level + 1]
            base = ".".join([*kept, base] if base else kept)
        for alias in node.names:
            yield Import(f"{base}.{alias.name}", node.lineno, lazy, typing)
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        for child in node.body:
            yield from _walk(child, package, lazy, typing=True)
        for child in node.orelse:
            yield from _walk(child, package, lazy, typing)
    else:
        inner = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from _walk(child, package, inner, typing)


def target(name: str) -> str | None:
    """The module of ours that importing `name` loads: `unimrg.sample.Task` -> `unimrg.sample`."""
    while name:
        if name in modules():
            return name
        name = name.rpartition(".")[0]
    return None


def layer(module: str) -> int | None:
    """The place of a module of unimrg in `LAYERS`; the package itself is at the top, None is unknown."""
    parts = module.split(".")[1:]
    if not parts:
        return 0
    longest_first = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((i for name in longest_first for i, names in enumerate(LAYERS) if name in names), None)


def ours(module: str) -> list[tuple[Import, str]]:
    """What `module` imports from the three packages, with the module that each import loads."""
    return [(item, found) for item in imports(module) if (found := target(item.name)) is not None]


def where(module: str, item: Import) -> str:
    return f"{modules()[module].relative_to(ROOT)}:{item.line} imports {item.name}"


def assert_none(broken: list[str], rule: str) -> None:
    assert not broken, rule + ":\n  " + "\n  ".join(broken)


def test_every_module_opens_with_a_docstring() -> None:
    bare = [
        str(path.relative_to(ROOT))
        for path in modules().values()
        if not ast.get_docstring(ast.parse(path.read_text("utf-8"), str(path)))
    ]
    assert_none(bare, "a module says in its first line what it is")


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        module: {found for item, found in ours(module) if item.at_import} - {module} for module in modules()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


def test_packages_point_one_way() -> None:
    broken = []
    for module in modules():
        for item, found in ours(module):
            here, there = (PACKAGES.index(name.split(".")[0]) for name in (module, found))
            if there > here and not (module in COMMANDS and item.lazy):
                broken.append(where(module, item))
    assert_none(broken, "unimrg <- cluster <- tune, except inside functions of unimrg's commands")


def test_every_module_has_a_layer() -> None:
    unknown = [m for m in modules() if m.startswith("unimrg.") and layer(m) is None]
    assert_none(unknown, "give the module its place in LAYERS of tests/test_architecture.py")


def test_layers_point_one_way() -> None:
    broken = []
    for module in modules():
        here = layer(module) if module.split(".")[0] == "unimrg" else None
        if here is None:
            continue
        for item, found in ours(module):
            there = layer(found) if found.split(".")[0] == "unimrg" else None
            if there is not None and there > here:
                broken.append(where(module, item))
    assert_none(broken, "a module imports from its own layer or a deeper one (LAYERS)")


def test_commands_don_t_import_each_other() -> None:
    broken = [
        where(module, item)
        for module in modules()
        for item, found in ours(module)
        if found in COMMANDS and found != module and module.startswith("unimrg.")
    ]
    assert_none(broken, "what two commands share belongs in a module below them")


def is_command(module: str) -> bool:
    """A module of cluster/ or tune/ is a command when it ends in a `__main__` guard."""
    return module in COMMANDS or '__name__ == "__main__"' in modules()[module].read_text("utf-8")


def test_only_commands_compose() -> None:
    broken = [
        where(module, item)
        for module in modules()
        for item, found in ours(module)
        if found == "unimrg.compose" and not is_command(module)
    ]
    assert_none(broken, "configurations are composed by commands and handed on as dataclasses")


def test_outer_libraries_stay_out_of_the_core() -> None:
    broken = [
        where(module, item)
        for module in modules()
        for item in imports(module)
        if module.startswith("unimrg")
        and module != "unimrg.compose"
        and item.at_import
        and item.name.split(".")[0] in OUTER
    ]
    assert_none(broken, "ray, deepspeed, hydra and omegaconf are imported inside functions, when needed")


def test_core_imports_without_the_outer_libraries() -> None:
    core = [m for m in modules() if m.startswith("unimrg") and m not in COMMANDS | {"unimrg.compose"}]
    script = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({BLOCKED!r}))  # None: importing it raises, looking for it finds nothing
failed = []
for name in {core!r}:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed.append(f"{{name}}: {{type(error).__name__}}: {{error}}")
sys.exit("\\n  ".join(failed) or None)  # an empty word would count as failure
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    blocked = ", ".join(BLOCKED)
    assert done.returncode == 0, f"without {blocked} these don't import:\n  {done.stderr.strip()}"


def test_the_tests_see_what_they_judge() -> None:
    """The walker itself: lazy, type-only and relative imports are told apart."""
    source = """
import ray
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from unimrg.loop import fit
try:
    from . import sample
except ImportError:
    from ..cluster import trainer
def train():
    import deepspeed.ops
"""
    found = {i.name: (i.lazy, i.typing) for i in _walk(ast.parse(source), "unimrg.data", False, False)}
    assert found == {
        "ray": (False, False),
        "typing.TYPE_CHECKING": (False, False),
        "unimrg.loop.fit": (False, True),
        "unimrg.data.sample": (False, False),
        "unimrg.cluster.trainer": (False, False),
        "deepspeed.ops": (True, False),
    }
