"""Low-rank adapters (LoRA, arXiv 2106.09685) on a family's linear layers, by the library PEFT.

An adapted layer computes W x + (alpha / rank) B A x with W frozen, A random and B zero at the start, so that
training begins exactly at the model as it was. The part of the family (`PARTS`) that a layer belongs to is
frozen but for its adapters; other parts stay as `freeze` left them. A training's checkpoints hold weights and
adapters apart; `merged` turns such a state into that of the plain model, under its published names.
"""

from __future__ import annotations

import copy
import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unimrg.config import LoraConfig, suggest
from unimrg.errors import ConfigError, MissingExtraError
from unimrg.families.base import Family
from unimrg.sample import IMAGE_TASKS, Task

ADAPTER = "default"
BASE, DOWN, UP = "base_layer", f"lora_A.{ADAPTER}.weight", f"lora_B.{ADAPTER}.weight"


def adapt(model: Family, config: LoraConfig, tasks: Sequence[Task], seed: int) -> None:
    """Put adapters on the layers that `config` names and freeze the parts they belong to; nothing at rank 0.

    Call it after `freeze`, with the same tasks: parts that these don't use get no adapters. The adapters are
    a function of the seed.
    Raises ConfigError for names that fit nothing, MissingExtraError without PEFT.
    """
    if not config.rank:
        return
    part_of = {id(parameter): part for part, parameter in model.named_parts()}
    trained = {id(p): p.requires_grad for p in model.parameters()}
    layers = _layers(model, config, tasks, part_of)
    adapted = {part_of[id(layer.weight)] for layer in layers.values()}
    kept = _kept(model, config, adapted, part_of)
    _inject(model, config, sorted(layers), seed)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            inside = part_of.get(id(parameter)) in adapted
            parameter.requires_grad_(trained[id(parameter)] and (not inside or id(parameter) in kept))
    model.train(model.training)  # frozen parts are as in use


def _layers(
    model: Family, config: LoraConfig, tasks: Sequence[Task], part_of: Mapping[int, str]
) -> dict[str, nn.Linear]:
    """The layers to adapt, by their names. Raises ConfigError for a target that fits none."""
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and part_of.get(id(module.weight)) in model.PARTS
    }
    targets = config.targets or model.LORA_TARGETS
    if not targets:
        raise ConfigError(
            "family.lora.targets is empty and the family names none; give it, like [q_proj,v_proj]"
        )
    chosen: dict[str, nn.Linear] = {}
    for target in targets:
        fitting = {name: module for name, module in linear.items() if _fits(name, target)}
        if not fitting:
            ends = {name.rpartition(".")[2] for name in linear} - {str(n) for n in range(100)}
            raise ConfigError(
                f"family.lora.targets: no linear layer is named {target!r}{suggest(target, ends)}"
            )
        chosen |= fitting
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    tied = [name for name, module in chosen.items() if names[id(module.weight)] > 1]
    if tied:
        raise ConfigError(
            f"family.lora.targets: {tied[0]} shares its weight with another layer; leave it out"
        )
    unused = () if set(tasks) & set(IMAGE_TASKS) else model.drawing_parts
    return {name: module for name, module in chosen.items() if part_of[id(module.weight)] not in unused}


def _fits(name: str, target: str) -> bool:
    """`target` is the whole name, its end after a dot, or a pattern like `llm.*.q_proj`."""
    return name == target or name.endswith(f".{target}") or fnmatch.fnmatchcase(name, target)


def _kept(model: Family, config: LoraConfig, adapted: set[str], part_of: Mapping[int, str]) -> set[int]:
    """Parameters inside the adapted parts that `also_train` names. Raises ConfigError for a word in none."""
    inside = {name: p for name, p in model.named_parameters() if part_of.get(id(p)) in adapted}
    for word in config.also_train:
        if not any(word in name for name in inside):
            parts = ", ".join(sorted(adapted))
            raise ConfigError(
                f"family.lora.also_train: {word!r} is in no name of {parts}; check the spelling"
            )
    return {id(p) for name, p in inside.items() if any(word in name for word in config.also_train)}


def _inject(model: Family, config: LoraConfig, names: list[str], seed: int) -> None:
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("peft", f"family.lora.rank={config.rank}") from error
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=names
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model, ADAPTER)


def sources(model: Family) -> dict[str, tuple[str, ...]]:
    """Every name of the plain model's state, and those of `model`'s from which `merged` makes it.

    The first one has the plain tensor's shape and type.
    """
    made_of: dict[str, tuple[str, ...]] = {}
    for name in model.state_dict(keep_vars=True):
        layer, base, kind = name.partition(f".{BASE}.")
        if base:
            adapters = (f"{layer}.{DOWN}", f"{layer}.{UP}") if kind == "weight" else ()
            made_of[f"{layer}.{kind}"] = (name, *adapters)
        elif not _is_adapter(name):
            made_of[name] = (name,)
    return made_of


def adapter_names(model: Family) -> list[str]:
    """The names of the adapters in the model's state; none of a plain model's."""
    return [name for name in model.state_dict(keep_vars=True) if _is_adapter(name)]


def _is_adapter(name: str) -> bool:
    return name.endswith((f".{DOWN}", f".{UP}"))


def merged(model: Family, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` of an adapted model as that of the plain one: W + (alpha / rank) B A under the plain names.

    Sums are formed in float32 and rounded once to the weight's type. A plain model's state stays as it is. A
    part of the state is enough where it has all `sources` of what is wanted.
    """
    settings = _settings(model)
    if settings is None:
        return dict(state)
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, base, kind = name.partition(f".{BASE}.")
        if base and kind == "weight":
            change = state[f"{layer}.{UP}"].float() @ state[f"{layer}.{DOWN}"].float()
            scaled = tensor.float() + change * (settings.lora_alpha / settings.r)
            plain[f"{layer}.{kind}"] = scaled.to(tensor.dtype)
        elif base:
            plain[f"{layer}.{kind}"] = tensor
        elif not _is_adapter(name):
            plain[name] = tensor
    return plain


def save_adapter(model: Family, state: Mapping[str, Tensor], folder: Path) -> bool:
    """Write the adapters alone in PEFT's format (adapter_model.safetensors, adapter_config.json).

    `peft.PeftModel.from_pretrained` puts them on the model that the training began with; whatever else was
    trained isn't in it. Returns whether the model has adapters; nothing is written for a plain one.
    """
    settings = _settings(model)
    if settings is None:
        return False
    from safetensors.torch import save_file

    adapters = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor.contiguous()
        for name, tensor in state.items()
        if _is_adapter(name)
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapters, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = copy.copy(settings)
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
    return True


def _settings(model: Family) -> Any | None:
    """PEFT's settings, which it keeps on the model."""
    return getattr(model, "peft_config", {}).get(ADAPTER)
