"""A model from our folder to the published layout of its family, and back, bit for bit.

python -m unimrg.export checkpoint=outputs/latest/model out=published
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from unimrg.compose import run_command
from unimrg.config import ExportConfig, FamilyConfig
from unimrg.errors import ConfigError

if TYPE_CHECKING:
    from unimrg.storage import Entry, Store

DESCRIPTION = """Write a trained model in the layout in which its family is published (layout=published: flat
safetensors, the picture autoencoder in a file of its own, the tokenizer beside them), or make our folder,
which training, evaluation and generation read, out of published files (layout=pretrained)."""
EXAMPLES = (
    "python -m unimrg.export checkpoint=outputs/latest/model out=published",
    "python -m unimrg.export layout=pretrained weights=harmon_1.5b.pth vae_weights=kl16.ckpt \\\n"
    "      tokenizer=Qwen2.5-1.5B-Instruct variant=harmon_1_5b out=s3://bucket/harmon_1_5b",
)
# What an export may consist of: `overwrite` deletes nothing else.
OURS = (".safetensors", ".json", ".txt", ".jinja")


def main(config: ExportConfig) -> None:
    """Convert, then upload. Raises an UnimrgError; `out` changes only when all is ready."""
    from transformers.utils.logging import disable_progress_bar

    from unimrg.storage import Store

    disable_progress_bar()
    store = Store.at(config.out, config.s3.store())
    replaced = _replaced(store, config.overwrite)
    for url in filter(None, (config.checkpoint, config.weights, config.vae_weights, config.tokenizer)):
        Store.at(url, config.s3.store()).check_readable()
    store.check_writable()
    with tempfile.TemporaryDirectory(prefix="unimrg-") as temporary:
        folder = Path(temporary)
        if config.layout == "published":
            _to_published(config, folder)
        else:
            _to_pretrained(config, folder)
        for entry in replaced:
            store.delete(entry.path)
        store.upload(folder, "")
    print(config.out)


def _replaced(store: Store, overwrite: bool) -> list[Entry]:
    """What lies in the folder and may be deleted. Raises ConfigError."""
    there = store.list(recursive=True)
    if there and not overwrite:
        raise ConfigError(f"out: {store.url} isn't empty; choose another folder or write overwrite=true")
    strange = [e.path for e in there if "/" in e.path or not e.path.endswith(OURS)]
    if strange:
        raise ConfigError(f"out: {store.url} holds {strange[0]}, which is no export; choose another folder")
    return there


def _to_published(config: ExportConfig, folder: Path) -> None:
    from unimrg.families import family_of, load_family
    from unimrg.storage import local_copy

    with local_copy(config.checkpoint, config.s3.store()) as source:
        name = family_of(source)
        family = load_family(name)
        model, tokenizer = family.build(FamilyConfig(name=name, weights=str(source)), seed=0)
        family.save_published(model, folder)
        tokenizer.save_pretrained(folder)


def _to_pretrained(config: ExportConfig, folder: Path) -> None:
    from unimrg.families import load_family
    from unimrg.storage import local_copy

    with ExitStack() as stack:

        def local(url: str) -> str:
            return str(stack.enter_context(local_copy(url, config.s3.store()))) if url else ""

        family = FamilyConfig(
            name=config.family,
            variant=config.variant,
            weights=local(config.weights),
            vae_weights=local(config.vae_weights),
            tokenizer=local(config.tokenizer or _beside(config)),
        )
        model, tokenizer = load_family(config.family).build(family, seed=0)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _beside(config: ExportConfig) -> str:
    """The folder of the weights, where it holds a tokenizer."""
    from unimrg.storage import Store

    parent = config.weights.rpartition("/")[0] or "."
    return parent if Store.at(parent, config.s3.store()).exists("tokenizer.json") else ""


if __name__ == "__main__":
    raise SystemExit(run_command(main, "export", ExportConfig, DESCRIPTION, EXAMPLES))
