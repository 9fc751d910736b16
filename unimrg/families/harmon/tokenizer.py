"""Tokenizers: a published one from its folder, or the tiny byte-level one that comes with the package.

    python -m unimrg.families.harmon.tokenizer      # trains the tiny one again, from the embedded data set

Any text can be written in the tiny vocabulary (it falls back to bytes); words of the `scenes` questions are
single tokens. Its special tokens and its template are those of Qwen2.5.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unimrg.errors import CheckpointError

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TINY_FOLDER = Path(__file__).parent / "assets" / "tiny_tokenizer"


def load_tokenizer(folder: str | Path = TINY_FOLDER) -> Any:
    """A fast tokenizer from a folder with tokenizer.json. Raises CheckpointError if it can't be read."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no tokenizer in {folder} ({str(error).splitlines()[0]}); give family.tokenizer a folder with tokenizer.json"
        ) from error
    missing = [token for token in SPECIAL_TOKENS[1:] if token not in tokenizer.get_vocab()]
    if missing:
        raise CheckpointError(f"the tokenizer in {folder} lacks {', '.join(missing)}: it isn't a Qwen2.5 tokenizer")
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> Any:
    """A byte-level BPE of at most `vocab_size` entries, special tokens included."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
