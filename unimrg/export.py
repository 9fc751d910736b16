"""A model from our folder to the published layout of its family, and back, bit for bit.

python -m unimrg.export checkpoint=outputs/latest/model out=published
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from unimrg.compose import run_command
from unimrg.config import ExportConfig, FamilyConfig
from unimrg.errors import ConfigError

if TYPE_CHECKING:
    from unimrg.storage import Entry, Store

DESCRIPTION = """Write a trained model in the layout in which its family is published (layout=published:
files under the published names, the picture autoencoder apart, the tokenizer beside them), or make our
folder, which training, evaluation and generation read, out of published files (layout=pretrained). Any
place may be local, in object storage or on the Hugging Face hub."""
EXAMPLES = (
    "python -m unimrg.export checkpoint=outputs/latest/model out=published",
    "python -m unimrg.export layout=pretrained weights=harmon_1.5b.pth vae_weights=kl16.ckpt \\\n"
    "      tokenizer=Qwen/Qwen2.5-1.5B-Instruct variant=harmon_1_5b out=s3://bucket/harmon_1_5b",
)
# What an export may consist of: `overwrite` deletes nothing else.
OURS = (".safetensors", ".pth", ".bin", ".json", ".txt", ".model", ".jinja")


def main(config: ExportConfig) -> None:
    """Convert, then upload. Raises an UnimrgError; `out` changes only when all is ready."""
    from transformers.utils.logging import disable_progress_bar

    from unimrg.storage import Store
    from unimrg.weights import check_place, check_reachable

    disable_progress_bar()
    s3 = config.s3.store()
    store = Store.at(config.out, s3)
    replaced = _replaced(store, config.overwrite)
    if config.layout == "published":
        check_place("checkpoint", config.checkpoint, s3)
    else:
        check_reachable(_source(config), s3, section="")
    store.check_writable()
    with tempfile.TemporaryDirectory(prefix="unimrg-") as temporary:
        folder = Path(temporary)
        if config.layout == "published":
            _to_published(config, folder)
        else:
            _to_pretrained(config, folder)
        _check_same_folders(store, replaced, folder)
        for entry in replaced:
            store.delete(entry.path)
        store.upload(folder, "")
    print(config.out)


def _to_published(config: ExportConfig, folder: Path) -> None:
    from unimrg.families import family_of, load_family
    from unimrg.weights import fetch

    source = fetch("checkpoint", config.checkpoint, config.s3.store())
    name = family_of(source)
    family = load_family(name)
    model, tokenizer = family.build(FamilyConfig(name, weights=str(source)), seed=0)
    family.save_published(model, folder)
    tokenizer.save_pretrained(folder)


def _to_pretrained(config: ExportConfig, folder: Path) -> None:
    from unimrg.families import load_family
    from unimrg.weights import localized

    with localized(_source(config), config.s3.store(), section="") as source:
        model, tokenizer = load_family(source.name).build(source, seed=0)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _source(config: ExportConfig) -> FamilyConfig:
    """The published files, as a run would name them."""
    return FamilyConfig(
        name=config.family,
        variant=config.variant,
        weights=config.weights,
        language_weights=config.language_weights,
        diffusion_weights=config.diffusion_weights,
        vision_weights=config.vision_weights,
        vae_weights=config.vae_weights,
        tokenizer=config.tokenizer or _beside(config),
    )


def _replaced(store: Store, overwrite: bool) -> list[Entry]:
    """What lies in the folder and may be deleted. Raises ConfigError."""
    there = store.list(recursive=True)
    if there and not overwrite:
        raise ConfigError(f"out: {store.url} isn't empty; choose another folder or write overwrite=true")
    strange = [e.path for e in there if not e.path.endswith(OURS)]
    if strange:
        raise ConfigError(f"out: {store.url} holds {strange[0]}, which is no export; choose another folder")
    return there


def _check_same_folders(store: Store, replaced: list[Entry], folder: Path) -> None:
    """Raise ConfigError when something lies in a folder that the new export doesn't have."""
    for entry in replaced:
        above = entry.path.rpartition("/")[0]
        if above and not (folder / above).is_dir():
            raise ConfigError(
                f"out: {store.url} holds {entry.path}, which is no export; choose another folder"
            )


def _beside(config: ExportConfig) -> str:
    """The folder of a file of weights, where it holds a tokenizer."""
    from unimrg.storage import Store
    from unimrg.weights import HubPlace

    if not config.weights or HubPlace.parse(config.weights):
        return ""
    parent = config.weights.rpartition("/")[0] or "."
    return parent if Store.at(parent, config.s3.store()).exists("tokenizer.json") else ""


if __name__ == "__main__":
    raise SystemExit(run_command(main, "export", ExportConfig, DESCRIPTION, EXAMPLES))
