"""Tokenizers: a published one from its folder, or the tiny byte-level one that comes with the package.

    python -m unimrg.families.harmon.tokenizer      # trains the tiny one again, from the embedded data set

Any text can be written in the tiny vocabulary (it falls back to bytes); answers of the `scenes` and most
words of their questions are single tokens. Its special tokens are those of Qwen2.5.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from unimrg.errors import CheckpointError, first_line

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# How often `tiny_texts` repeats: enough that every answer is one token and a prompt's word seldom three.
PROMPT_COUNT, ANSWER_COUNT = 40, 5
TINY_FOLDER = Path(__file__).parent / "assets" / "tiny_tokenizer"


def load_tokenizer(folder: str | Path = TINY_FOLDER) -> Any:
    """A fast tokenizer from a folder with tokenizer.json. Raises CheckpointError if it can't be read."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds, also plain Exception
        raise CheckpointError(
            f"no tokenizer in {folder} ({first_line(error)}); "
            "give family.tokenizer a folder with tokenizer.json"
        ) from error
    missing = [token for token in SPECIAL_TOKENS[1:] if token not in tokenizer.get_vocab()]
    if missing:
        raise CheckpointError(
            f"the tokenizer in {folder} lacks {', '.join(missing)}: it isn't a Qwen2.5 tokenizer"
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> Any:
    """A byte-level BPE of at most `vocab_size` entries, special tokens included; repeatable."""
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
        pad_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[2],
        additional_special_tokens=[SPECIAL_TOKENS[1]],
    )


def tiny_texts() -> Iterator[str]:
    """What the tiny tokenizer is trained on: the prompts, and every wording of the `scenes` with every name.

    Prompts and answers stand for themselves; the chat's roles are there since they are in every turn.
    """
    from unimrg.data.scenes.text import PLURALS, TEMPLATES, YES_NO, Name
    from unimrg.data.scenes.world import COLOURS, COUNTS, MATERIALS, SHAPES, SIZES
    from unimrg.tasks import PROMPTS, UNCONDITIONAL

    names = [
        str(Name(colour, shape)) for colour in ("", *COLOURS) for shape in ("", *SHAPES) if colour or shape
    ]
    plurals = [
        " ".join(filter(None, (colour, plural)))
        for colour in ("", *COLOURS)
        for plural in ("objects", *PLURALS.values())
    ]
    answers = (*YES_NO, *COLOURS, *SHAPES, *SIZES, *MATERIALS, *COUNTS, "left", "right", "front", "behind")
    for templates in TEMPLATES.values():
        for (template, _), number in itertools.product(templates, range(len(names))):
            yield "user\n" + template.format(
                a=names[number],
                b=names[number * 7 % len(names)],
                c=COLOURS[number % len(COLOURS)],
                p=plurals[number % len(plurals)],
            )
            yield "assistant\n"
            yield from itertools.repeat(answers[number % len(answers)], ANSWER_COUNT)
    for prompt in (UNCONDITIONAL, *itertools.chain.from_iterable(PROMPTS.values())):
        yield from itertools.repeat(prompt, PROMPT_COUNT)


def main() -> None:
    """Train the tiny tokenizer and put it into the package."""
    train_tokenizer(tiny_texts()).save_pretrained(str(TINY_FOLDER))


if __name__ == "__main__":
    main()
