"""A trained model for lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval), registered by an entry point:

    lmms-eval --model unimrg --model_args checkpoint=outputs/latest/model --tasks mmvp --batch_size 16

`Unimrg` is made when it is first asked for, with their `lmms` as its base where lmms-eval is installed.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np

from unimrg.adapters import Asked, base_of
from unimrg.errors import DataError

MAX_NEW_TOKENS = 128  # of tasks that don't say
KINDS = ("text", "image")


class Model:
    """Their interface of chat models. The first picture is looked at; texts are one question, a line each.

    Answers are greedy and end where the model ends them: of a task's generation settings only
    `max_new_tokens` counts.
    """

    is_simple = False
    task_dict: dict[str, Any]
    """Task -> split -> documents; the harness fills it."""

    def __init__(self, checkpoint: str, device: str = "auto", batch_size: int = 1) -> None:
        super().__init__()
        self.asked = Asked(checkpoint, device)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer per request. `args` of one: ..., doc_to_messages, settings, document, task, split.

        Raises DataError for messages with anything but texts and pictures.
        """
        answers: list[str] = []
        asked = [self._read(request) for request in requests]
        for max_new_tokens, found in groupby(asked, key=lambda one: one[2]):
            some = list(found)
            for start in range(0, len(some), self.batch_size):
                pictures, questions, _ = zip(*some[start : start + self.batch_size], strict=True)
                answers += self.asked(pictures, questions, max_new_tokens)
        return answers

    def _read(self, request: Any) -> tuple[np.ndarray | None, str, int]:
        """Picture, question and longest answer of a request."""
        *_, doc_to_messages, settings, number, task, split = request.args
        parts = list(_parts(doc_to_messages(self.task_dict[task][split][number])))
        texts = [part["text"] for part in parts if part["type"] == "text"]
        pictures = [part["url"] for part in parts if part["type"] == "image"]
        picture = np.array(pictures[0].convert("RGB")) if pictures else None
        return picture, "\n".join(texts), int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not to be had. Raises NotImplementedError."""
        raise NotImplementedError("unimrg answers in words, without likelihoods; take tasks that generate")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not to be had. Raises NotImplementedError."""
        raise NotImplementedError("unimrg answers single questions; take tasks of one round")


def _parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for message in messages:
        for part in message["content"]:
            if part["type"] not in KINDS:
                raise DataError(f"a message holds {part['type']!r}; this model takes text and image only")
            yield part


def manifest() -> Any:
    """What lmms-eval's registry asks of a plugin."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="unimrg", chat_class_path=f"{__name__}.Unimrg")


@cache
def _made() -> type:
    base = base_of("lmms_eval.api.model", "lmms")
    return types.new_class("Unimrg", (Model, base), {}, lambda body: body.update(__module__=__name__))


def __getattr__(name: str) -> Any:
    if name == "Unimrg":
        return _made()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
