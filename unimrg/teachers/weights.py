"""From a checkpoint's name to a model on a device, with every failure in one sentence."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unimrg.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SETTINGS = ("*config.json", "*.index.json")
ASSETS = Path(__file__).parent / "assets"
TINY = {"depth": ASSETS / "depth_tiny", "segmentation": ASSETS / "sam_tiny"}  # made by unimrg.teachers.fit
PROCESSOR_KEYS = (
    *("do_resize", "size", "resample", "keep_aspect_ratio", "ensure_multiple_of", "do_pad", "pad_size"),
    *("size_divisor", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)


def choose_device(device: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"teacher device {device!r} is unknown; use auto, cpu, cuda or cuda:<n>") from error


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on the GPU and float32 elsewhere."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"teacher dtype {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def find_folder(checkpoint: str | Path, purpose: str) -> Path:
    """The folder of a checkpoint: `tiny` is the small teacher of that purpose that comes with the package.

    A hub id (`owner/name`) is fetched first, safetensors where it has them.
    """
    if str(checkpoint) == "tiny":
        return TINY[purpose]
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(checkpoint)):
        raise CheckpointError(f"{purpose} checkpoint {checkpoint}: no such folder; give a folder or a hub id")
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(str(checkpoint), allow_patterns=[*SETTINGS, "*.safetensors"]))
        if not weight_files(found):
            found = Path(snapshot_download(str(checkpoint), allow_patterns=[*SETTINGS, "*.bin"]))
    except Exception as error:  # besides OSError and ValueError, whatever the hub's transport raises
        raise CheckpointError(
            f"{purpose} checkpoint {checkpoint}: no such folder, and the hub gave {type(error).__name__}; "
            "give a folder, or a hub id that is reachable or already in the cache"
        ) from error
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, sorted: safetensors, or torch pickles where there is none."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def digest(folder: Path) -> str:
    """sha256 over the contents of the weight files in order; with one file, what `sha256sum` prints."""
    total = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                total.update(block)
    return total.hexdigest()


def model_type(folder: Path, purpose: str) -> str | None:
    """The `model_type` that config.json names."""
    try:
        found: str | None = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{purpose} checkpoint {folder}: config.json is missing or unreadable; save the model again"
        ) from error
    return found


def load_model(model_class: Any, folder: Path, types: tuple[str, ...], purpose: str) -> PreTrainedModel:
    """The model in float32 on the CPU, in evaluation mode, every weight read from the folder.

    types: one of them config.json must name as its `model_type`. Pickles are read with torch's weights-only
    reader, which runs no code from the file.
    """
    where, family = f"{purpose} checkpoint {folder}", types[0]
    found = model_type(folder, purpose)
    if found not in types:
        raise CheckpointError(f"{where}: holds a model of type {found!r}; give one of type {family!r}")
    files = weight_files(folder)
    if not files:
        raise CheckpointError(f"{where}: holds no *.safetensors; save the model again as safetensors")
    try:
        model, report = model_class.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=files[0].suffix == ".safetensors",
            weights_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # each file format has its own errors; all mean: not readable as this model
        raise CheckpointError(
            f"{where}: {files[0].name} can't be read as {family} ({type(error).__name__}); "
            "save the model again as safetensors"
        ) from error
    # The library fills missing weights with noise and only warns. A mask token is used in pre-training alone.
    missing = sorted(key for key in report["missing_keys"] if not key.endswith("mask_token"))
    if missing:
        raise CheckpointError(f"{where}: lacks {len(missing)} weights such as {missing[0]}; fetch it again")
    return model.eval().requires_grad_(False)


def load_processor(folder: Path, purpose: str) -> BaseImageProcessor:
    """The checkpoint's image processor, always Pillow's: the same labels with and without torchvision."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    except Exception as error:  # unknown class names, missing files, bad JSON: all mean the same here
        raise CheckpointError(_no_processor(folder, purpose, error)) from error


def _no_processor(folder: Path, purpose: str, error: Exception) -> str:
    return (
        f"{purpose} checkpoint {folder}: no usable image processor ({type(error).__name__}); "
        "put the published preprocessor_config.json beside the weights"
    )


def processor_settings(processor: BaseImageProcessor) -> dict[str, Any]:
    """What the processor does to a picture, as plain JSON values."""
    settings = json.loads(processor.to_json_string())
    return {key: settings[key] for key in PROCESSOR_KEYS if settings.get(key) is not None}


def stored_settings(folder: Path, purpose: str) -> dict[str, Any]:
    """What the folder's processor file says that a processor does, whether or not its class can be loaded."""
    from transformers import BaseImageProcessor

    try:
        found, _ = BaseImageProcessor.get_image_processor_dict(folder, local_files_only=True)
    except Exception as error:  # missing files and bad JSON mean the same here
        raise CheckpointError(_no_processor(folder, purpose, error)) from error
    return {key: found[key] for key in PROCESSOR_KEYS if found.get(key) is not None}
