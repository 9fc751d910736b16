"""DeepSpeed's ZeRO checkpoints (arXiv 1910.02054) merged into one state dict, without running their code.

Their files are pickles that name a few of DeepSpeed's classes. Those are read as the inert stand-ins below,
so that neither DeepSpeed nor anything else in the files is imported or called. A checkpoint is a folder with

    latest                                                  the name of the folder beside it that counts
    <tag>/mp_rank_00_model_states.pt                        stages 0..2: the module, in training precision
    <tag>/zero_pp_rank_<r>_mp_rank_00_model_states.pt       stage 3: rank r's pieces of what is frozen
    <tag>/[bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt    rank r's pieces of the float32 weights
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unimrg.errors import CheckpointError, first_line

MODEL, OPTIMIZER = "_model_states.pt", "_optim_states.pt"
LATEST = "latest"
KNOWN = re.compile(rf"(?:bf16_|fp16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)(?:{MODEL}|{OPTIMIZER})")
REMEDY = "run the zero_to_fp32.py beside it where you trust it, and give what that writes"


class _Inert:
    """Stands for an object of another library: takes whatever it is given and keeps nothing."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


STAND_INS: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
]


def find_zero(folder: Path) -> Path | None:
    """The folder with a checkpoint's files: named by `latest`, `folder` itself, or the only one inside.

    None when there is no such checkpoint. Raises CheckpointError when `latest` doesn't lead to one.
    """
    latest = folder / LATEST
    if latest.is_file():
        tag = latest.read_text("utf-8", errors="replace").strip()
        if tag != Path(tag).name or not _holds_states(folder / tag):
            raise CheckpointError(f"{latest} names {tag[:80]!r}, which is no checkpoint in {folder}")
        return folder / tag
    if _holds_states(folder):
        return folder
    inside = [child for child in sorted(folder.iterdir()) if _holds_states(child)]
    return inside[0] if len(inside) == 1 else None


def _holds_states(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob(f"*{MODEL}"))


def merge_zero(folder: Path) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of a checkpoint of stage 0, 1, 2 or 3; floats are float32.

    folder: where the files lie, as `find_zero` says. A name that shares its tensor with another one is left
    out where the files don't say with which (stage 3).
    Raises CheckpointError: a piece is missing or damaged, experts or parallel layers, code in a pickle.
    """
    models, optimizers = _pieces(folder, MODEL), _pieces(folder, OPTIMIZER)
    try:
        if not optimizers:
            return _floats(_whole(models))
        return _merge(models, optimizers)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} can't be merged: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} can't be merged ({type(error).__name__}: {first_line(error)}); {REMEDY}"
        ) from error


def _pieces(folder: Path, ending: str) -> list[Path]:
    """Files of one kind in the order of their ranks."""
    found = {}
    for path in folder.glob(f"*{ending}"):
        name = KNOWN.fullmatch(path.name)
        if name is None or int(name[2]):
            raise CheckpointError(
                f"{path} belongs to experts or to parallel layers, which aren't merged; {REMEDY}"
            )
        found[int(name[1] or 0)] = path
    return [found[rank] for rank in sorted(found)]


def _load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises several kinds; all mean an unusable file
        raise CheckpointError(f"{path.name} can't be read safely ({first_line(error)}); {REMEDY}") from error


def _whole(models: Sequence[Path]) -> Mapping[str, Tensor]:
    """The module of stage 0, and of a folder whose optimiser files were deleted."""
    state = _load(models[0])["module"]
    if len(models) > 1 or any(not tensor.numel() for tensor in state.values()):
        raise CheckpointError("its weights are in optimiser files, and there are none; bring those too")
    return state


def _merge(models: Sequence[Path], optimizers: Sequence[Path]) -> dict[str, Tensor]:
    pieces = [_load(path)["optimizer_state_dict"] for path in optimizers]
    stage, count = pieces[0]["zero_stage"], pieces[0]["partition_count"]
    ranks = max(count) if isinstance(count, list) else count
    if len(pieces) != ranks or (stage == 3 and len(models) != ranks):
        raise CheckpointError(f"it was written by {ranks} processes, and not all of their files are there")
    headers = [_load(path) for path in models]
    shapes = headers[0]["param_shapes"]
    if stage == 3:
        buffers = headers[0]["buffer_names"]
        state = {name: headers[0]["module"][name] for name in buffers}
        state |= _join_frozen(headers)
        state |= _join_stage_3([torch.cat(list(piece["fp32_flat_groups"])) for piece in pieces], shapes)
    else:
        state = dict(headers[0]["module"])
        for number, group in enumerate(shapes):
            flats = [piece["single_partition_of_fp32_groups"][number] for piece in pieces]
            padding = pieces[0].get("param_alignment_paddings")
            state |= _join_stage_2(flats, group, padding[number] if padding else [0] * len(group))
    for name, other in headers[0].get("shared_params", {}).items():
        if other in state:
            state[name] = state[other]
    return _floats(state)


def _join_stage_2(
    flats: Sequence[Tensor], shapes: Mapping[str, torch.Size], padding: Sequence[int]
) -> dict[str, Tensor]:
    """One group of stages 1 and 2: parameters one behind the other, cut equally for the ranks."""
    flat = torch.cat(list(flats))
    state, at = {}, 0
    for (name, shape), gap in zip(shapes.items(), padding, strict=True):
        state[name] = flat.narrow(0, at, math.prod(shape)).view(shape)
        at += math.prod(shape) + gap
    unit = 2 * len(flats)  # the end is padded to a multiple of this
    if math.ceil(at / unit) != math.ceil(len(flat) / unit):
        raise CheckpointError(f"its pieces hold {len(flat)} numbers where {at} are wanted; it is damaged")
    return state


def _join_stage_3(flats: Sequence[Tensor], groups: Sequence[Mapping[str, torch.Size]]) -> dict[str, Tensor]:
    """Stage 3: every parameter is cut into equal pieces, the last one padded."""
    state, at = {}, 0
    for name, shape in (pair for group in groups for pair in group.items()):
        length = math.ceil(math.prod(shape) / len(flats))
        state[name] = _joined([flat.narrow(0, at, length) for flat in flats], shape)
        at += length
    if any(len(flat) != at for flat in flats):
        raise CheckpointError(f"its pieces hold {len(flats[0])} numbers where {at} are wanted; it is damaged")
    return state


def _join_frozen(headers: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """What isn't trained lies, cut like the rest, in the model files of stage 3."""
    return {
        name: _joined([header["frozen_param_fragments"][name] for header in headers], shape)
        for name, shape in (headers[0].get("frozen_param_shapes") or {}).items()
    }


def _joined(pieces: Sequence[Tensor], shape: torch.Size) -> Tensor:
    return torch.cat(list(pieces))[: math.prod(shape)].view(shape)


def _floats(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In float32, keeping integers and the sharing of tensors."""
    done = {id(t): t.float() if t.is_floating_point() else t for t in state.values()}
    return {name: done[id(tensor)] for name, tensor in state.items()}
