"""The image and its context, read without building them: there may be no Docker where the tests run."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.k8s.agreement import ray_version
from unimrg import __version__

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY|AKIA[0-9A-Z]{12}|hf_[A-Za-z0-9]{20}", re.I)


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) of a Dockerfile: comments out, continued lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [
        (word.upper(), rest.strip())
        for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


def problems(text: str) -> Iterator[str]:
    """What must not be in the image's recipe."""
    found = instructions(text)
    arguments = dict(rest.partition("=")[::2] for word, rest in found if word == "ARG")
    stages: list[str] = []
    for word, rest in found:
        if word == "FROM":
            yield from _base(rest, arguments, stages)
        if word == "ADD":
            yield "ADD fetches and unpacks: use COPY"
        if word in ("ARG", "ENV") and SECRET.search(rest):
            yield f"a secret stays in the image's history: {rest}"
        if word == "COPY":
            yield from _copy(rest, stages)
        if word == "RUN" and re.search(r"(curl|wget)[^|;&]*\|\s*(ba)?sh", rest):
            yield "runs a script from the network"
        for options in re.findall(r"pip install([^;&]*)", rest if word == "RUN" else ""):
            if not re.search(r"--(constraint|no-deps)\b", options):
                yield f"installs what constraints.txt doesn't pin: {options}"
    users = [rest for word, rest in found if word == "USER"]
    last_from = max(at for at, (word, _) in enumerate(found) if word == "FROM")
    if not users or found.index(("USER", users[-1])) < last_from:
        yield "runs as root"
    elif not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        yield f"the user is {users[-1]}, not a number other than root's"


def _base(rest: str, arguments: dict[str, str], stages: list[str]) -> Iterator[str]:
    image, _, name = rest.partition(" AS ")
    image = re.sub(r"\$\{(\w+)\}", lambda match: arguments.get(match[1], ""), image)
    if image not in stages and not re.search(r":\d+\.\d+\.\d+-|@sha256:", image):
        yield f"the base isn't pinned to a version: {image}"
    stages.append(name)


def _copy(rest: str, stages: list[str]) -> Iterator[str]:
    *sources, _ = shlex.split(rest)
    if sources[0].startswith("--from="):
        if sources[0].removeprefix("--from=") not in stages:
            yield f"copies from an unknown stage: {rest}"
        return
    for source in sources:
        if source in (".", "./"):
            yield "copies everything that lies about"
        elif not (ROOT / source).exists():
            yield f"copies {source}, which isn't there"
        elif ignored(source):
            yield f"copies {source}, which .dockerignore keeps out"


def ignored(path: str) -> bool:
    """Does .dockerignore keep a path out? The last line that fits it or a folder above it decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        pattern, keep = line.lstrip("!"), line.startswith("!")
        above = [str(p) for p in (Path(path), *Path(path).parents) if str(p) != "."]
        patterns = {pattern, pattern.removeprefix("**/")}
        if line and not line.startswith("#") and any(fnmatch(p, q) for p in above for q in patterns):
            out = not keep
    return out


def test_the_image_s_recipe_holds() -> None:
    assert list(problems(DOCKERFILE.read_text("utf-8"))) == []


BROKEN: dict[str, tuple[Callable[[str], str], str]] = {
    "latest": (lambda t: t.replace("PYTHON=3.11.14-slim-bookworm", "PYTHON=latest"), "isn't pinned"),
    "no tag": (lambda t: t.replace("python:${PYTHON} AS run", "python AS run"), "isn't pinned"),
    "root": (lambda t: t.replace("USER 1000:1000\n", ""), "runs as root"),
    "root by name": (lambda t: t.replace("USER 1000:1000", "USER unimrg"), "not a number"),
    "root by number": (lambda t: t.replace("USER 1000:1000", "USER 0:0"), "not a number"),
    "user of the other stage": (
        lambda t: t.replace("USER 1000:1000\n", "").replace("SHELL", "USER 1000:1000\nSHELL"),
        "runs as root",
    ),
    "secret": (lambda t: t.replace("ARG VARIANT", "ARG HF_TOKEN=x\nARG VARIANT"), "in the image's history"),
    "all of it": (lambda t: t.replace("COPY unimrg unimrg", "COPY . ."), "everything"),
    "missing file": (lambda t: t.replace("COPY tune tune", "COPY tuning tune"), "isn't there"),
    "ignored file": (lambda t: t.replace("COPY tune tune", "COPY tests tests"), "keeps out"),
    "unpinned": (lambda t: t.replace("--constraint constraints.txt torch", "torch"), "doesn't pin"),
    "script of the network": (lambda t: t + "RUN curl https://x.org/i | sh\n", "runs a script"),
    "download": (lambda t: t + "ADD https://x.org/i /i\n", "use COPY"),
    "unknown stage": (lambda t: t.replace("--from=build", "--from=builder"), "unknown stage"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_recipe_is_told(name: str) -> None:
    change, said = BROKEN[name]
    text = DOCKERFILE.read_text("utf-8")
    assert change(text) != text
    assert any(said in problem for problem in problems(change(text)))


def test_what_a_build_needs_is_copied() -> None:
    """Beside the code, what pyproject.toml names; and nothing that tells secrets."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    copied = " ".join(rest for word, rest in instructions(DOCKERFILE.read_text("utf-8")) if word == "COPY")
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    for name in (project["project"]["readme"], *project["project"]["license-files"], *wheel):
        assert re.search(rf"(?<!\S){re.escape(name)}(?!\S)", copied), name
    for name in (".git/config", ".env", "cluster/.env", "outputs/first/config.yaml", "tests/conftest.py"):
        assert ignored(name), name
    assert not ignored("unimrg/teachers/weights.py") and not ignored("configs/train.yaml")


def test_the_tags_are_those_of_this_release() -> None:
    tags = re.findall(r"unimrg:(\S+)-(?:cpu|cuda)", DOCKERFILE.read_text("utf-8"))
    assert set(tags) == {f"{__version__}-ray{ray_version()}"}
