"""YAML of `configs/` and `key=value` words to checked dataclasses, and the process edge of every command.

    config = compose("train", ["family=harmon_1_5b", "train.steps=1000"], RunConfig)

The only module that knows Hydra. Its defaults lists choose the files and merge them onto the dataclasses;
writing folders, changing logging and its way of reporting errors are not used. A YAML names its dataclass
first in `defaults`, and may be nested into another one (`- train@run`): then `family=…` still works.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from unimrg.config import redacted, suggest
from unimrg.errors import ConfigError, UnimrgError, first_line
from unimrg.usage import usage

T = TypeVar("T")

EXPERIMENT = "experiment"
"""The word that names a YAML file of keys, which are set before those on the command line."""

KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
OVERRIDE = re.compile(r"(?P<mark>~|\+{0,2})(?P<key>[^=]*)(?:=(?P<value>.*))?", re.DOTALL)


def config_folder() -> Path:
    """The YAML files: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def compose(config_name: str, overrides: Sequence[str], schema: type[T]) -> T:
    """`configs/<config_name>.yaml` with `overrides`, as plain dataclasses, checked.

    overrides: `group=option`, `key=value`, or `experiment=FILE`, a YAML of keys that replaces what the groups
    say and is replaced by what the other words say. The value of a text key is taken literally, commas and
    all, but for `${oc.env:NAME}`, quotes around it, and `null` (empty). Raises ConfigError, one sentence, for
    whatever is unknown, misspelt or unusable.
    """
    config = _to_dataclass(_merge(config_name, overrides, schema), schema, overrides)
    check = getattr(config, "check", None)
    if check is not None:
        check()
    return config


def run_command(
    main: Callable[[T], int | None],
    config_name: str,
    schema: type[T],
    description: str,
    examples: Sequence[str],
    arguments: Sequence[str] | None = None,
) -> int:
    """The process edge of a command; returns its exit status.

    Shows `--help` or `--cfg`, else composes and calls `main`. An UnimrgError becomes one line on stderr and
    status 2, Ctrl-C status 130; anything else is a mistake of ours and keeps its traceback.

        if __name__ == "__main__":
            raise SystemExit(run_command(main, "train", RunConfig, __doc__, EXAMPLES))
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = {word for word in words if word in ("-h", "--help", "--cfg")}
    overrides = [word for word in words if word not in flags]
    try:
        if flags - {"--cfg"}:
            values = _merge(config_name, overrides, schema)
            _show(usage(_program(main), description, examples, _options(config_name), schema, values) + "\n")
            return 0
        config = compose(config_name, overrides, schema)
        if flags:
            _show(yaml.safe_dump(redacted(config), sort_keys=False, allow_unicode=True))
            return 0
        return main(config) or 0
    except UnimrgError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _show(text: str) -> None:
    """Print; a reader that has seen enough, like `head`, isn't an error."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        # Else the interpreter complains when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _program(main: Callable[..., Any]) -> str:
    name = main.__module__
    if name == "__main__":
        spec = sys.modules["__main__"].__spec__
        name = name if spec is None else spec.name.removesuffix(".__main__")
    return f"python -m {name}"


# -- merging -------------------------------------------------------------------------------------------------


def _merge(config_name: str, overrides: Sequence[str], schema: type) -> DictConfig:
    """The merged configuration, typed by `schema`, unchecked and perhaps with missing values."""
    _register(schema)
    experiment, overrides = _experiment(overrides, dict(_keys(schema)))
    choices, values = _Words(config_name, schema).read(overrides)
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            merged = hydra_compose(config_name, choices)
        # Not left to Hydra: it would take a key for a group wherever a folder has the same name.
        for key, value in [*experiment, *values]:
            OmegaConf.update(merged, key, value)
        return merged
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise _explain(error, schema, overrides) from error


@functools.cache
def _register(schema: type) -> None:
    """Make the dataclass, and all that it is made of, known to Hydra under their names."""
    for kind in _schemas(schema):
        ConfigStore.instance().store(kind.__name__, kind)
    OmegaConf.register_new_resolver("needed", _needed, replace=True)


def _needed(example: str) -> None:
    """`${needed:'s3://…'}` in a YAML: the user must give this one. (`???` doesn't replace a default.)"""
    raise ValueError(f"a value is needed, like {example}")


def _to_dataclass(values: DictConfig, schema: type[T], overrides: Sequence[str]) -> T:
    try:
        return typing.cast(T, OmegaConf.to_object(values))
    except OmegaConfBaseException as error:
        raise _explain(error, schema, overrides) from error


class _Words:
    """Reads the words of a command line before Hydra does, to say what is wrong in the user's terms."""

    def __init__(self, config_name: str, schema: type) -> None:
        self.keys = dict(_keys(schema))
        self.groups = _groups(config_name)

    def read(self, words: Sequence[str]) -> tuple[list[str], list[tuple[str, Any]]]:
        """Choices in groups, as Hydra wants them, the last of each group; and (key, value) in order."""
        chosen: dict[str, str] = {}
        values = []
        for word in words:
            key, value = self._split(word)
            if key in self.groups:
                chosen[key] = self._choice(key, value)
            else:
                values.append((key, self._value(key, value)))
        return [f"{self.groups[group]}={option}" for group, option in chosen.items()], values

    def _split(self, word: str) -> tuple[str, str]:
        """(key, value) of a word; the key is known."""
        found = OVERRIDE.fullmatch(word)
        assert found is not None  # every part of the pattern may be empty
        mark, key, value = found["mark"], found["key"].strip(), found["value"]
        if word.startswith("-"):
            plain = word.lstrip("-")
            hint = f"write {plain}" if "=" in plain else "write key=value, or --help"
            raise ConfigError(f"unknown option {word!r}; {hint}")
        if mark == "~":
            raise ConfigError(f"{word!r}: no key can be removed; give {key or 'it'} another value")
        if not key:
            raise ConfigError(f"{word!r} is not of the form key=value; --help lists all keys")
        if key not in self.keys and key not in self.groups:
            raise ConfigError(f"unknown key {key!r}{self._similar(key)}")
        if value is None:
            raise ConfigError(f"{key!r} has no value; write {key}=…")
        if mark == "+":
            raise ConfigError(f"{word!r}: the key exists already; write {key}={value}")
        return key, value

    def _similar(self, key: str) -> str:
        """What the user may have meant: a key, a group, or a key of that name in some section."""
        choices = [*self.keys, *self.groups]
        close = difflib.get_close_matches(key, choices, n=1, cutoff=0.75)
        close = close or [c for c in choices if c.rpartition(".")[2] == key.rpartition(".")[2]]
        close = close or difflib.get_close_matches(key, choices, n=1, cutoff=0.6)
        return f"; did you mean {close[0]!r}?" if close else "; --help lists all keys"

    def _choice(self, group: str, option: str) -> str:
        options = _files(group)
        if option not in options:
            raise ConfigError(f"{group}={option}: unknown{suggest(option, options)}")
        return option

    def _value(self, key: str, value: str) -> Any:
        kind = self.keys[key]
        if dataclasses.is_dataclass(kind) and not value.startswith("{"):
            first = dataclasses.fields(kind)[0].name
            raise ConfigError(f"{key}={value}: {key} is a section; set its keys, like {key}.{first}=…")
        if kind is not str:
            return _parsed(key, value)
        if value == "null":
            return ""
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        return value[1:-1] if quoted else value


def _experiment(words: Sequence[str], keys: dict[str, Any]) -> tuple[list[tuple[str, Any]], list[str]]:
    """(key, value) of the YAML file that `experiment=FILE` names, and the other words."""
    given = [word for word in words if word.lstrip("+").startswith(f"{EXPERIMENT}=")]
    if not given:
        return [], list(words)
    file = Path(given[-1].partition("=")[2])
    try:
        content = yaml.safe_load(file.read_text("utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{EXPERIMENT}={file} can't be read ({first_line(error)}); give a YAML file of keys"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{EXPERIMENT}={file} holds no keys; write lines like `weights: {{depth: 0.5}}`")
    values = list(_flat(content))
    for key, _ in values:
        if key not in keys or dataclasses.is_dataclass(keys[key]):
            raise ConfigError(f"{EXPERIMENT}={file}: unknown key {key!r}{suggest(key, keys)}")
    return values, [word for word in words if word not in given]


def _flat(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested sections."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _parsed(key: str, value: str) -> Any:
    """What Hydra's grammar makes of `value`: numbers, true, null, [lists], {sections}."""
    word = f"{key}={value}"
    try:
        read = OverridesParser.create().parse_override(word)
    except HydraException as error:
        raise ConfigError(
            f"{word}: the value can't be read; put quotes around it, or close a bracket"
        ) from error
    if read.is_sweep_override():
        raise ConfigError(f"{word}: one value is wanted; a list is written [a,b]")
    return read.value()


def _keys(schema: type, before: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every field, sections included."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        yield before + field.name, kind
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from _keys(kind, f"{before}{field.name}.")


def _schemas(schema: type) -> set[type]:
    """The dataclass and all that it is made of."""
    kinds = [schema, *(kind for _, kind in _keys(schema))]
    return {kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)}


# -- the folder ----------------------------------------------------------------------------------------------


def _files(group: str) -> list[str]:
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


def _defaults(config_name: str) -> list[Any]:
    path = config_folder() / f"{config_name}.yaml"
    try:
        return (yaml.safe_load(path.read_text("utf-8")) or {}).get("defaults", [])
    except OSError as error:
        raise ConfigError(f"no {path.name} in {path.parent}; the installation is incomplete") from error
    except (yaml.YAMLError, AttributeError) as error:
        raise ConfigError(f"{path} is no YAML mapping; mend or restore the file") from error


def _groups(config_name: str, package: str = "") -> dict[str, str]:
    """Group -> the name under which Hydra lets it be chosen, also in files nested by `name@package`."""
    found: dict[str, str] = {}
    for entry in _defaults(config_name):
        if isinstance(entry, str):
            name, at, inner = entry.partition("@")
            if at:
                found |= _groups(name, f"{package}.{inner}".strip("."))
            continue
        group, at, inner = next(iter(entry)).partition("@")
        if inner == "_here_":
            found[group] = f"{group}@{package or '_global_'}"
        elif package or at:
            found[group] = f"{group}@{package}.{inner or group}".replace("@.", "@")
        else:
            found[group] = group
    return found


def _options(config_name: str) -> dict[str, dict[str, str]]:
    """Group -> option -> the first comment line of its file."""
    folder = config_folder()
    return {
        group: {
            option: (folder / group / f"{option}.yaml").read_text("utf-8").partition("\n")[0].lstrip("# ")
            for option in _files(group)
        }
        for group in _groups(config_name)
    }


# -- errors --------------------------------------------------------------------------------------------------


def _explain(error: BaseException, schema: type, overrides: Sequence[str]) -> ConfigError:
    """One sentence for what Hydra, OmegaConf or the YAML reader say in many."""
    file = re.match(r"In '([^']*)'", str(error)) if isinstance(error, HydraException) else None
    where = f"{file[1]}.yaml: " if file else ""
    while isinstance(error, HydraException) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__ or error
    said = first_line(error)
    key = re.sub(r"\[\d+\].*", "", str(getattr(error, "full_key", None) or ""))
    keys = dict(_keys(schema))
    if not key:
        return ConfigError(f"{where}the configuration can't be read: {said}")
    if isinstance(error, InterpolationResolutionError):
        why = said.rpartition(" raised while resolving interpolation: ")[2].strip('"')
        return ConfigError(f"{where}{key}: {why}")
    if key not in keys:
        return ConfigError(f"{where}unknown key {key!r}{suggest(key, keys)}")
    given = dict(word.lstrip("+").split("=", 1) for word in overrides if "=" in word).get(key)
    found = re.search(r"[Vv]alue '(.*?)'(?= of type| for field|$)", said)
    value = repr(given) if given is not None else repr(found[1]) if found else "the value"
    return ConfigError(f"{where}{key}: {value} is not {_wanted(keys[key])}")


def _wanted(kind: Any) -> str:
    if typing.get_origin(kind) is list:
        return "a list of numbers, like [1,2]" if typing.get_args(kind) == (float,) else "a list, like [a,b]"
    return KINDS.get(kind, "a section")
