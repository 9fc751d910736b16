"""Tokenizers: a published one from its folder, or the tiny byte-level one that comes with the package.

    python -m unimrg.families.tokenizer      # trains the tiny one again, from the embedded data set

Any text can be written in the tiny vocabulary (it falls back to bytes); answers of the `scenes` and most
words of their questions are single tokens. Its special tokens are those of Qwen2.5.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from unimrg.config import FamilyConfig
from unimrg.errors import CheckpointError, ConfigError, first_line

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# How often `tiny_texts` repeats: enough that every answer is one token and a prompt's word seldom three.
PROMPT_COUNT, ANSWER_COUNT = 40, 5
TINY_FOLDER = Path(__file__).parent / "assets" / "tiny_tokenizer"


def load_tokenizer(folder: str | Path = TINY_FOLDER, required: Sequence[str] = SPECIAL_TOKENS[1:]) -> Any:
    """A fast tokenizer from a folder with tokenizer.json.

    Raises CheckpointError if it can't be read or lacks one of the `required` special tokens.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds, also plain Exception
        raise CheckpointError(
            f"no tokenizer in {folder} ({first_line(error)}); "
            "give family.tokenizer a folder with tokenizer.json"
        ) from error
    missing = [token for token in required if token not in tokenizer.get_vocab()]
    if missing:
        raise CheckpointError(
            f"the tokenizer in {folder} lacks {', '.join(missing)}: it belongs to another family of models"
        )
    return tokenizer


def tiny_tokenizer(extra: Sequence[str] = ()) -> Any:
    """The tokenizer that comes with the package, with `extra` special tokens behind its 512 ids."""
    tokenizer = load_tokenizer(TINY_FOLDER)
    tokenizer.add_special_tokens({"additional_special_tokens": [SPECIAL_TOKENS[1], *extra]})
    return tokenizer


def tokenizer_for(
    config: FamilyConfig, required: Sequence[str], named: str, tiny_extra: Sequence[str] = ()
) -> Any:
    """The tokenizer that the config names, else the one beside the weights, else the tiny variant's.

    named: whose tokenizer.json is meant, for the message. Raises ConfigError when there is none.
    """
    if config.tokenizer:
        return load_tokenizer(config.tokenizer, required)
    if config.weights and (Path(config.weights) / "tokenizer.json").is_file():
        return load_tokenizer(config.weights, required)
    if config.variant == "tiny" and not config.weights:
        return tiny_tokenizer(tiny_extra)
    wanting = config.weights or config.variant
    raise ConfigError(f"family.tokenizer is empty; {wanting} needs a folder with {named}'s tokenizer.json")


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
