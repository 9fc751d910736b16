"""A trained model as one folder that `from_pretrained` loads, written file by file.

However the weights are spread over ranks, no process ever holds more of others' than one file's tensors.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils import logging as library

from unimrg.engine import Engine, world
from unimrg.lora import adapter_names, merged, save_adapter, sources
from unimrg.pieces import full_size

FILE_BYTES = 4 * 2**30
PATTERN = "model{suffix}.safetensors"


def save_model(engine: Engine, folder: Path, file_bytes: int = FILE_BYTES) -> None:
    """Write what `save_pretrained` would into rank 0's `folder`, by the model's own names; all ranks call it.

    Adapters are merged into their layers, and with a moving average that one's values are written. Files hold
    at most `file_bytes` of tensors, but at least one tensor each.
    """
    model, first = engine.model, world()[0] == 0
    made_of = sources(model)
    state = model.state_dict(keep_vars=True)
    # Of names that share a tensor, the files hold the one that the library keeps.
    shapes = {
        name: torch.empty(full_size(state[names[0]]), dtype=state[names[0]].dtype, device="meta")
        for name, names in made_of.items()
        if name not in model.all_tied_weights_keys
    }
    split = split_torch_state_dict_into_shards(shapes, filename_pattern=PATTERN, max_shard_size=file_bytes)
    if first:
        _save_descriptions(engine, folder)
    for file, names in split.filename_to_tensors.items():
        whole = engine.weights([source for name in names for source in made_of[name]])
        if first:
            plain = {name: tensor.contiguous() for name, tensor in merged(model, whole).items()}
            save_file(plain, folder / file, metadata={"format": "pt"})
    if first and split.is_sharded:
        numbers = sum(math.prod(tensor.shape) for tensor in shapes.values())
        about = {"total_parameters": numbers, **split.metadata}
        index = json.dumps({"metadata": about, "weight_map": split.tensor_to_filename}, indent=2)
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(index + "\n")


def save_adapters(engine: Engine, folder: Path) -> bool:
    """Write the adapters alone into rank 0's `folder`; every rank calls it.

    Returns whether there are any; nothing is written for a plain model.
    """
    names = adapter_names(engine.model)
    if names:
        state: dict[str, Tensor] = engine.weights(names)
        if world()[0] == 0:
            save_adapter(engine.model, state, folder)
    return bool(names)


def _save_descriptions(engine: Engine, folder: Path) -> None:
    """All that the library writes beside the weights."""
    shown = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        engine.model.save_pretrained(folder, state_dict={})
    finally:
        if shown:
            library.enable_progress_bar()
