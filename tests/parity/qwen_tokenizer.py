"""Qwen2.5's byte-level BPE, offline: the vocabulary is the file that the package `dashscope` ships."""

from __future__ import annotations

import base64
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from unicodedata import normalize

import regex

INSTALL = "the Qwen vocabulary is missing: pip install --no-deps dashscope==2.0.2 (it is in the extra `dev`)"
SPECIAL_IDS = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
SPECIAL = regex.compile("(" + "|".join(map(regex.escape, SPECIAL_IDS)) + ")")
WORD = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


class QwenTokenizer:
    """Text to ids, as a processor calls it. Raises RuntimeError with the line that installs the file."""

    def __init__(self) -> None:
        spec = find_spec("dashscope")
        file = Path(spec.origin).parent / "resources" / "qwen.tiktoken" if spec and spec.origin else None
        if file is None or not file.exists():
            raise RuntimeError(INSTALL)
        lines = (line.split() for line in file.read_bytes().splitlines())
        self.ranks = {base64.b64decode(token): int(rank) for token, rank in lines}

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        ids: list[int] = []
        for piece in SPECIAL.split(normalize("NFC", text)):
            if piece in SPECIAL_IDS:
                ids.append(SPECIAL_IDS[piece])
            else:
                for word in WORD.findall(piece):
                    ids += self._merge(word.encode())
        return {"input_ids": ids}

    def _merge(self, word: bytes) -> list[int]:
        """Join the neighbours that make the lowest id until none make one."""
        parts = [bytes([byte]) for byte in word]
        while len(parts) > 1:
            joined = [self.ranks.get(a + b, 1 << 30) for a, b in pairwise(parts)]
            first = min(range(len(joined)), key=joined.__getitem__)
            if joined[first] == 1 << 30:
                break
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        return [self.ranks[part] for part in parts]
