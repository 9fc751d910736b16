"""Weights of others: fetched from wherever they lie, read without running their code, matched strictly.

    with localized(config.family, s3) as family:         # hub ids and URLs become local paths
        model, tokenizer = load_family(family.name).build(family, seed)

A knob of `FamilyConfig` names a local file or folder, a URL (`s3://`, `gs://`), a place on the Hugging Face
hub: `org/name`, or `hf://org/name[/file or folder][@revision]`, or, as `shipped:harmon`, the small model that
comes with the package. What is fetched is kept, once per machine and
whatever the number of processes: the hub's files in its own cache, those of object storage in
`$UNIMRG_CACHE` (`~/.cache/unimrg`), which may be deleted whenever nothing runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unimrg.config import FAMILIES, FamilyConfig
from unimrg.errors import CheckpointError, ConfigError, first_line
from unimrg.zero import find_zero, merge_zero

if TYPE_CHECKING:
    from unimrg.storage import Entry, S3Config, Store

log = logging.getLogger(__name__)

PLACES = ("weights", "language_weights", "diffusion_weights", "vision_weights", "vae_weights", "tokenizer")
"""The knobs of `FamilyConfig` that name files."""

# What is fetched from the hub. Pickles only where there are no safetensors, and never for a tokenizer.
DESCRIPTIONS = (".json", ".txt", ".model", ".jinja")
SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
WEIGHTS = (SAFETENSORS, *PICKLES)
HUB_SECONDS = 10.0  # for one answer about a repository

SHIPPED = "shipped:"  # begins the place of a model that comes with the package; the family's name follows

OURS = "_unimrg"  # ends `model_type` of the folders that we save

STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
"""Names under which libraries save a model's weights in a folder."""

TELLTALES = {
    "harmon": ("mar.encoder_blocks.", "mar.diffloss."),
    "showo": ("showo.",),
    "openuni": ("meta_queries", "connector.", "lmm."),
    "janus": ("gen_vision_model.", "gen_aligner.", "model.generation_embeddings."),
}
"""Family -> beginnings of names that only its published checkpoints have."""


# -- where they lie ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubPlace:
    """A repository of the hub. inside: a file or folder in it, "" for all. revision: "" for the newest."""

    repo: str
    inside: str = ""
    revision: str = ""

    @classmethod
    def parse(cls, text: str) -> HubPlace | None:
        """`hf://org/name[/inside][@revision]`, or `org/name[@revision]` where no such path exists; else None.

        Raises ConfigError for an address of the hub that is none.
        """
        name = r"[A-Za-z0-9][\w.-]*"
        found = re.fullmatch(rf"hf://({name}/{name})((?:/{name})*)/?(?:@([\w./-]+))?", text)
        if found is None and text.startswith("hf://"):
            raise ConfigError(
                f"{text!r} is no place on the hub; write hf://org/name, hf://org/name/file@revision"
            )
        if found is None and not Path(text).exists():
            found = re.fullmatch(rf"({name}/{name})()(?:@([\w./-]+))?", text)
        return cls(found[1], found[2].strip("/"), found[3] or "") if found else None

    @property
    def is_file(self) -> bool:
        return self.inside.endswith((*WEIGHTS, *DESCRIPTIONS))

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"hf://{'/'.join(filter(None, (self.repo, self.inside)))}{at}"


@contextlib.contextmanager
def localized(
    config: FamilyConfig, s3: S3Config, only_descriptions: bool = False, section: str = "family."
) -> Iterator[FamilyConfig]:
    """The same config with every place as a local path, fetched if need be; valid inside the block.

    only_descriptions: fetch what describes a model (json, tokenizers) and no weights. section: what stands
    before the knobs' names in messages.
    Raises CheckpointError when nothing is there or it is a model of another family, StorageError when object
    storage fails.
    """
    paths: dict[str, Any] = {
        key: str(fetch(f"{section}{key}", text, s3, only_descriptions)) for key, text in _places(config)
    }
    kind = model_type(paths.get("weights", "")).removesuffix(OURS)
    if kind in FAMILIES and kind != config.name:
        raise CheckpointError(
            f"{section}weights: {config.weights} is a model of {kind}; choose family={kind}"
        )
    yield dataclasses.replace(config, **paths)


def check_reachable(config: FamilyConfig, s3: S3Config, section: str = "family.") -> None:
    """Raise CheckpointError or StorageError when a place holds nothing; fetches no weights."""
    for key, text in _places(config):
        check_place(f"{section}{key}", text, s3)


def check_place(key: str, text: str, s3: S3Config) -> None:
    """As `check_reachable`, for one place. key: the knob's name, for messages."""
    if hub := HubPlace.parse(text):
        _check_hub(key, hub)
    elif (store := _store(text, s3)).is_local:
        _check_local(key, text, store)
    else:
        store.check_readable()


def _places(config: FamilyConfig) -> list[tuple[str, str]]:
    return [(key, getattr(config, key)) for key in PLACES if getattr(config, key)]


def absolute(text: str, s3: S3Config) -> str:
    """A place as other processes, in folders of their own, understand it."""
    return text if text.startswith(SHIPPED) or HubPlace.parse(text) else _store(text, s3).url


def fetch(key: str, text: str, s3: S3Config, only_descriptions: bool = False) -> Path:
    """The local path of one place; as `localized` does for all. key: the knob's name, for messages."""
    if hub := HubPlace.parse(text):
        if only_descriptions and hub.is_file:
            return Path(text)
        return _from_hub(key, hub, only_descriptions)
    store = _store(text, s3)
    if not store.is_local:
        return _from_storage(store, s3, only_descriptions)
    _check_local(key, text, store)
    return Path(store.root)


def _store(text: str, s3: S3Config) -> Store:
    # Not at the top: models of local files are built where pyarrow is missing, too.
    from unimrg.storage import Store

    return Store.at(str(_shipped(text)) if text.startswith(SHIPPED) else text, s3)


def _shipped(text: str) -> Path:
    families = Path(__file__).parent / "families"
    known = {path.parent.parent.name: path for path in families.glob("*/assets/base")}
    if (found := known.get(text.removeprefix(SHIPPED))) is None:
        places = ", ".join(f"{SHIPPED}{name}" for name in sorted(known))
        raise ConfigError(f"{text!r} doesn't come with the package; there is {places}")
    return found


def _check_local(key: str, text: str, store: Store) -> None:
    if not Path(store.root).exists():
        raise CheckpointError(
            f"{key}: {text} does not exist; give a file or a folder that is there, a URL like s3://…, "
            "or a repository of the hub like org/name"
        )


def _from_storage(store: Store, s3: S3Config, only_descriptions: bool) -> Path:
    """A copy in the cache. Its name is that of the content, so a changed object is fetched again."""
    from filelock import FileLock

    store.check_readable()
    is_file = store.size("") is not None
    entries = [store.stat("")] if is_file else store.list(recursive=True)
    wanted = [e for e in entries if e and (not only_descriptions or e.path.endswith(DESCRIPTIONS))]
    described = json.dumps([store.url, [(e.path, e.size, e.mtime) for e in wanted]])
    digest = hashlib.sha256(described.encode()).hexdigest()[:32]
    target = _cache_folder() / digest / PurePosixPath(store.root).name
    target.parent.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target.parent}.lock"):
        if not target.exists():
            part = Path(f"{target.parent}.part")  # also what a killed process has left
            shutil.rmtree(part, ignore_errors=True)
            _download(store, s3, wanted, is_file, part / target.name)
            shutil.rmtree(target.parent, ignore_errors=True)
            os.replace(part, target.parent)
    return target


def _download(store: Store, s3: S3Config, wanted: list[Entry], is_file: bool, target: Path) -> None:
    target.parent.mkdir(parents=True)
    if is_file:
        _store(store.url.rpartition("/")[0], s3).download(target.name, target.parent)
        return
    target.mkdir()
    for entry in wanted:
        store.download(entry.path, target / PurePosixPath(entry.path).parent)


def _cache_folder() -> Path:
    return Path(os.environ.get("UNIMRG_CACHE") or "~/.cache/unimrg").expanduser() / "weights"


# -- the hub -------------------------------------------------------------------------------------------------


def _from_hub(key: str, place: HubPlace, only_descriptions: bool) -> Path:
    """Fetched into the hub's cache, which locks every file while it is written."""
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        if place.is_file:
            found = _snapshot(place, [place.inside])
        else:
            found = _snapshot(place, _inside(place, DESCRIPTIONS))
            if not only_descriptions and not key.endswith("tokenizer"):
                found = _snapshot(place, _inside(place, (SAFETENSORS,)))
                if not any(found.rglob(f"*{SAFETENSORS}")):
                    found = _snapshot(place, _inside(place, PICKLES))
    except Exception as error:  # the library's own kinds, those of its HTTP client, and OSError
        raise _not_had(key, place, error) from error
    if not found.exists():
        raise CheckpointError(f"{key}: {place} holds nothing of use; check the name")
    return found


def _inside(place: HubPlace, endings: tuple[str, ...]) -> list[str]:
    above = f"{place.inside}/" if place.inside else ""
    return [f"{above}*{ending}" for ending in endings]


def _snapshot(place: HubPlace, patterns: list[str], local: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        place.repo, revision=place.revision or None, allow_patterns=patterns, local_files_only=local
    )
    return Path(folder, place.inside)


def _check_hub(key: str, place: HubPlace) -> None:
    """Ask the hub for its list of files; where it doesn't answer, what was fetched before is enough."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        said = HfApi().model_info(place.repo, revision=place.revision or None, timeout=HUB_SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:  # also those for which one must log in
        raise _not_had(key, place, error) from error
    except Exception as error:  # no network, of whatever kind
        try:
            kept = _snapshot(place, [place.inside] if place.is_file else _inside(place, DESCRIPTIONS), True)
        except Exception:
            raise _not_had(key, place, error) from error
        if not kept.exists():
            raise _not_had(key, place, error) from error
        return
    names = [file.rfilename for file in said.siblings or []]
    if not any(f"{name}/".startswith(f"{place.inside}/".lstrip("/")) for name in names):
        raise CheckpointError(f"{key}: {place} does not exist; the repository holds {', '.join(names[:5])}")


def _not_had(key: str, place: HubPlace, error: Exception) -> CheckpointError:
    """One sentence for whatever the hub's library raises."""
    return CheckpointError(
        f"{key}: {place} is no file or folder here, and the hub doesn't give it "
        f"({type(error).__name__}: {first_line(error)[:200]}); check the name and the network, log in with "
        "`hf auth login` where it is private, or give a local folder"
    )


# -- reading -------------------------------------------------------------------------------------------------


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name, on the CPU; large files are mapped, not read.

    path: a file (.safetensors, or a pickle of plain tensors: .pth, .pt, .bin, .ckpt), the index of a sharded
    checkpoint (.index.json), or a folder with one of these or with a DeepSpeed ZeRO checkpoint. Wrappers
    `state_dict`, `model` and `module`, and `module.` and `_orig_mod.` before every name, are taken off.
    Raises CheckpointError: nothing there, damaged, incomplete, no state dict, or a pickle that wants to run
    code; nothing of it runs.
    """
    path = Path(path)
    if path.is_dir():
        raw = _read_folder(path)
    elif not path.is_file():
        raise CheckpointError(f"no weights at {path}; give a file or a folder of save_pretrained")
    elif path.name.endswith(".index.json"):
        raw = _read_shards(path)
    else:
        raw = _read_file(path)
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(raw, dict) and isinstance(raw.get(wrapper), dict):
            raw = raw[wrapper]
    if not isinstance(raw, dict) or not raw or not all(isinstance(v, Tensor) for v in raw.values()):
        raise CheckpointError(f"{path} is no state dict; it must map names to tensors")
    return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", str(name)): tensor for name, tensor in raw.items()}


def _read_file(path: Path) -> Any:
    try:
        with open(path, "rb") as source:
            if source.read(24).startswith(b"version https://git-lfs"):
                raise CheckpointError(
                    f"{path} only points to a file in Git LFS; fetch it with `git lfs pull`"
                )
        if path.suffix == SAFETENSORS:
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except CheckpointError:
        raise
    except Exception as error:  # each library has its own kinds; all mean an unusable file
        raise CheckpointError(
            f"{path} can't be read safely ({first_line(error)}); only safetensors, or pickles of plain "
            "tensors, are loaded: convert it where you trust it"
        ) from error


def _read_folder(folder: Path) -> Any:
    for stem in STEMS:
        for ending in (SAFETENSORS, ".bin"):
            if (file := folder / f"{stem}{ending}").is_file():
                return _read_file(file)
            if (index := folder / f"{stem}{ending}.index.json").is_file():
                return _read_shards(index)
    if zero := find_zero(folder):
        return merge_zero(zero)
    files = sorted(file for file in folder.iterdir() if file.suffix in WEIGHTS)
    if len(files) == 1:
        return _read_file(files[0])
    names = ", ".join(file.name for file in files[:5])
    raise CheckpointError(
        f"no weights at {folder}; "
        + (f"it holds {names}: give one of them" if files else "give a file or a folder of save_pretrained")
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    """All shards of an index. Raises CheckpointError unless every name lies in the shard that it names."""
    try:
        places: dict[str, str] = dict(json.loads(index.read_text("utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of a sharded checkpoint; fetch it again") from error
    shards = sorted(set(places.values()), key=str)
    for shard in shards:
        if not isinstance(shard, str) or shard != PurePosixPath(shard).name or shard == "..":
            raise CheckpointError(
                f"{index} names {shard!r}, which isn't beside it; fetch the checkpoint again"
            )
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise CheckpointError(
            f"{index.parent} lacks {absent[0]}, {len(absent)} of {len(shards)} shards of {index.name}; "
            "fetch the missing ones"
        )
    state: dict[str, Tensor] = {}
    for shard in shards:
        tensors = _read_file(index.parent / shard)
        lost = [name for name, place in places.items() if place == shard and name not in tensors]
        if lost:
            raise CheckpointError(f"{index.parent / shard} lacks {lost[0]}, which {index.name} says is in it")
        state |= tensors
    return state


def model_type(weights: str | Path) -> str:
    """What config.json of a folder of weights says it is; "" for files, and for folders without one.

    Raises CheckpointError for a config.json that can't be read.
    """
    path = Path(weights) / "config.json"
    if not str(weights) or not path.is_file():
        return ""
    try:
        return str(json.loads(path.read_text("utf-8")).get("model_type", ""))
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} can't be read ({first_line(error)}); fetch it again") from error


def load_folder(kind: Any, folder: Path, dtype: torch.dtype | None = torch.float32, **options: Any) -> Any:
    """A model of class `kind` from a folder of its `save_pretrained`, every key accounted for.

    dtype: None leaves weights as they are stored; else they become that. Float32 is what training adds small
    updates to, which bfloat16 would round away. Weights that needn't change are mapped, not read. options:
    of `from_pretrained`. Raises CheckpointError when a key is missing, unexpected or misshapen, or a file is
    missing, damaged or a pickle.
    """
    try:
        model, found = kind.from_pretrained(
            folder,
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
            dtype=dtype or stored_precision(read_state_dict(folder)),
            **options,
        )
    except Exception as error:  # transformers and safetensors raise many kinds; all mean an unusable folder
        raise CheckpointError(
            f"{folder} can't be loaded ({first_line(error)}); give a folder of save_pretrained"
        ) from error
    wrong = [
        _shortened(sorted(map(str, found[key])), key.partition("_")[0])
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if found[key]
    ]
    if wrong:
        raise CheckpointError(f"{folder} doesn't fit the model: {'; '.join(wrong)}; save or fetch it again")
    return model


def load_state(
    kind: Any, config: Any, state: dict[str, Tensor], dtype: torch.dtype | None = torch.float32
) -> Any:
    """A model of class `kind` with the tensors of `state`, which has all of them; dtype as in `load_folder`.

    By the library: it draws no weights first, which takes minutes, and copies only what changes.
    """
    model = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype or stored_precision(state)
    )
    model._weight_conversions = None  # else it would be saved by these names, and not as any other is
    return model


def stored_precision(state: Mapping[str, Tensor]) -> torch.dtype:
    """What all floating tensors are stored in; float32, which holds every one of them, where they differ."""
    kinds = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    return kinds.pop() if len(kinds) == 1 else torch.float32


# -- matching ------------------------------------------------------------------------------------------------


def load_strictly(
    module: torch.nn.Module, state: Mapping[str, Tensor], source: str, absent: tuple[str, ...] = ()
) -> None:
    """Load every key; names starting with one of `absent` may be missing.

    Raises CheckpointError listing missing, unexpected and wrongly shaped keys; then nothing was loaded.
    """
    check_fits(module, state, source, absent)
    module.load_state_dict(state, strict=not absent)


def check_fits(
    module: torch.nn.Module, state: Mapping[str, Tensor], source: str, absent: tuple[str, ...] = ()
) -> None:
    """What `load_strictly` checks, without loading: `module` may lie on the meta device.

    The message counts and shows the first of each kind; all of them go to the log, at level INFO.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state and not name.startswith(absent)]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} {list(state[name].shape)} for {list(own[name].shape)}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "wrongly shaped": shapes}
    for kind, names in kinds.items():
        for name in names:
            log.info("%s: %s %s", source, kind, name)
    problems = [_shortened(names, kind) for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError(f"{source} doesn't fit the model: {'; '.join(problems)}; {_advice(own, state)}")


def _shortened(names: list[str], kind: str) -> str:
    return f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def _advice(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What may have been meant: a run's merged model, or another family whose names these are."""

    def those_of(names: Mapping[str, Tensor], beginnings: tuple[str, ...]) -> bool:
        return any(name.startswith(beginnings) for name in names)

    if any(".lora_A." in name for name in state):
        return "it holds adapters apart: give model/ of its run, where they are merged"
    for family, beginnings in TELLTALES.items():
        if those_of(state, beginnings) and not those_of(own, beginnings):
            return f"the names are those of {family}: choose family={family}, or the right file"
    return "check family.variant"
