"""Ask a model about a picture, or let it redraw it, draw its depth map or its region boundaries.

python -m unimrg.generate checkpoint=outputs/latest/model image=photo.jpg task=depth
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from unimrg.compose import run_command
from unimrg.config import DataConfig, GenerateConfig
from unimrg.errors import ConfigError, DataError, SampleError, StorageError
from unimrg.sample import Task

if TYPE_CHECKING:
    import numpy as np
    import torch

    from unimrg.storage import S3Config

DESCRIPTION = """Ask a trained model about a picture, or let it draw: the picture again (pixel), its depth map
(depth, bright = near) or its region boundaries (segmentation). The answer is printed; a drawing is written as
PNG, in the picture's proportions and at the resolution that the model works in."""
EXAMPLES = (
    "python -m unimrg.generate checkpoint=outputs/latest/model image=photo.jpg task=depth out=depth.png",
    'python -m unimrg.generate checkpoint=outputs/latest/model image=photo.jpg question="What is it?"',
)


def main(config: GenerateConfig) -> None:
    """Answer or draw. Raises an UnimrgError of one sentence for whatever can't be read."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from unimrg.families import load_trained
    from unimrg.weights import fetch

    disable_progress_bar()
    device = choose_device(config.device)
    s3 = config.s3.store()
    picture = read_picture(config.image, s3) if config.image else None
    with torch.inference_mode():
        model, processor, side = load_trained(
            fetch("checkpoint", config.checkpoint, s3), device, torch.float32
        )
        if picture is None:
            print(model.answer(processor, [None], [config.question], config.max_new_tokens)[0])
            return
        square, box = _square(picture, side)
        if config.question:
            print(model.answer(processor, [square], [config.question], config.max_new_tokens)[0])
            return
        options = _options(config)
        drawn = model.draw(processor, [square], Task(config.task), options)[0]
    print(_write(unsquare(drawn, box, picture.shape[:2]), config.out or f"{config.task}.png", s3))


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU where there is one. Raises ConfigError."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {name!r} is unknown; write auto, cpu, cuda or cuda:1") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"device: there is no {name} here ({count} CUDA devices); write device=cpu")
    return device


def read_picture(url: str, s3: S3Config) -> np.ndarray:
    """uint8 [H, W, 3] of a local file or an object. Raises StorageError or DataError."""
    from unimrg.data.decode import decode_image
    from unimrg.storage import Store

    limits = DataConfig()
    try:
        raw = Store.at(url, s3).read_bytes("")
        return decode_image(raw, limits.max_bytes, limits.max_pixels, limits.max_side)
    except FileNotFoundError as error:
        raise StorageError(f"image: {url} does not exist; check the path") from error
    except SampleError as error:
        raise DataError(f"image: {url} can't be used: {error}") from error


def unsquare(drawn: np.ndarray, box: tuple[int, int, int, int], shape: tuple[int, int]) -> np.ndarray:
    """The picture's part of a drawing [S, S, 3], its longer side S pixels, with the proportions of `shape`.

    box: left, top, right, bottom of what isn't padding; shape: height and width of the picture.
    """
    import numpy as np
    from PIL import Image

    left, top, right, bottom = box
    longest, side = max(shape), drawn.shape[0]
    height, width = (max(1, round(length * side / longest)) for length in shape)
    inside = Image.fromarray(np.ascontiguousarray(drawn[top:bottom, left:right]))
    return np.array(inside.resize((width, height), Image.Resampling.BICUBIC))


def _square(picture: np.ndarray, side: int) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    from unimrg.data.geometry import pad_square

    return pad_square(picture, side)


def _options(config: GenerateConfig) -> Any:
    from unimrg.families.base import DrawOptions

    return DrawOptions(config.iterations, config.guidance, config.temperature, config.seed)


def _write(picture: np.ndarray, url: str, s3: S3Config) -> str:
    """Store as PNG; returns the address."""
    from PIL import Image

    from unimrg.storage import Store

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    Store.at(url, s3).write_bytes("", buffer.getvalue())
    return url


if __name__ == "__main__":
    raise SystemExit(run_command(main, "generate", GenerateConfig, DESCRIPTION, EXAMPLES))
