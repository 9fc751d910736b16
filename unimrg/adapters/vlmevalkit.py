"""A trained model for VLMEvalKit (github.com/open-compass/VLMEvalKit). In its `vlmeval/config.py`:

    from unimrg.adapters.vlmevalkit import Unimrg
    supported_VLM["unimrg"] = partial(Unimrg, checkpoint="outputs/latest/model")

`Unimrg` is made when it is first asked for, with their `BaseModel` as its base where vlmeval is installed.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from unimrg.adapters import Asked, base_of
from unimrg.errors import DataError, SampleError

KINDS = ("text", "image")


class Model:
    """Their interface. A message's first picture is looked at; its texts are one question, a line each.

    max_new_tokens: of every answer; `unimrg.evaluate` takes 32 to 128, by benchmark.
    """

    INTERLEAVE = False
    is_api = False

    def __init__(self, checkpoint: str, device: str = "auto", max_new_tokens: int = 128) -> None:
        super().__init__()
        self.asked = Asked(checkpoint, device)
        self.max_new_tokens = max_new_tokens

    def use_custom_prompt(self, dataset: str) -> bool:
        """Never: prompts are the data set's."""
        return False

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """The answer. message: parts with `type` (text or image) and `value` (words, or a file's path).

        Raises DataError for another kind of part and for a picture that can't be read.
        """
        odd = next((part["type"] for part in message if part["type"] not in KINDS), None)
        if odd is not None:
            raise DataError(f"a message holds {odd!r}; this model takes {' and '.join(KINDS)} only")
        texts, paths = ([part["value"] for part in message if part["type"] == kind] for kind in KINDS)
        picture = read_picture(paths[0]) if paths else None
        return self.asked([picture], ["\n".join(texts)], self.max_new_tokens)[0]


def read_picture(path: str) -> np.ndarray:
    """uint8 [H, W, 3] of a local file, read as `unimrg.evaluate` reads pictures. Raises DataError."""
    from unimrg.benchmarks.understanding.questions import MAX_BYTES, MAX_PIXELS
    from unimrg.data.decode import decode_verbatim

    try:
        return decode_verbatim(Path(path.removeprefix("file://")).read_bytes(), MAX_BYTES, MAX_PIXELS)
    except (OSError, SampleError) as error:
        raise DataError(f"{path} can't be read as a picture ({error}); give the path of a file") from error


@cache
def _made() -> type:
    base = base_of("vlmeval.vlm.base", "BaseModel")
    return types.new_class("Unimrg", (Model, base), {}, lambda body: body.update(__module__=__name__))


def __getattr__(name: str) -> Any:
    if name == "Unimrg":
        return _made()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
