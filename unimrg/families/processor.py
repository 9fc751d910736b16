"""From samples to a packed batch: the walk that all families share.

One sample is one row: the prefix holds the picture, every conversation and every drawing is a branch behind
it. Prompts stand after the picture and are tokenised on their own, so the prefix is the same for all tasks
and is computed once. A family says what its prefix, its texts and its targets are.

Every random draw is a function of the seed, the sample's position and the task, so that a sample is masked
the same way in any batch on any number of workers.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from unimrg.errors import DataError
from unimrg.families.encoder import grey, plain
from unimrg.families.rows import IGNORE, Assembled, Block, PackedBatch, Row, Text, assemble
from unimrg.sample import IMAGE_TASKS, PICTURES, Conversation, Sample, Task, Turn
from unimrg.tasks import choose_prompt

TEXTS = 4096
"""Texts whose ids are kept: prompts and short answers come again and again."""


@dataclass(frozen=True)
class Target:
    """A picture to draw: its pixels (`source` into the conditions, or -1 - n for the extra picture n)."""

    task: Task
    source: int
    seed: int


TargetT = TypeVar("TargetT", bound=Target)
BatchT = TypeVar("BatchT", bound=PackedBatch)


@dataclass(frozen=True)
class Branch(Generic[TargetT]):
    """What follows a prefix: text ids, the id to predict at each of them (or IGNORE), perhaps a drawing.

    opening: the ids in front of the picture. image: its number; None for text alone, and then the whole text
    is in `ids`.
    """

    opening: tuple[int, ...]
    image: int | None
    ids: Sequence[int]
    labels: Sequence[int]
    target: TargetT | None = None
    weight: float = 1.0


@dataclass
class Pictures:
    """The pictures of a batch: conditions first, extra targets behind them; their codes, if known."""

    images: list[np.ndarray] = field(default_factory=list)
    extra: list[np.ndarray] = field(default_factory=list)
    codes: list[np.ndarray] = field(default_factory=list)
    extra_codes: list[np.ndarray] = field(default_factory=list)

    def add(self, pixels: np.ndarray, codes: Sequence[np.ndarray] = ()) -> int:
        """A condition; returns its number."""
        self.images.append(pixels)
        self.codes += codes
        return len(self.images) - 1

    def add_extra(self, pixels: np.ndarray, codes: Sequence[np.ndarray] = ()) -> int:
        """An extra target; returns its number as `Target.source`."""
        self.extra.append(pixels)
        self.extra_codes += codes
        return -len(self.extra)


@dataclass(frozen=True)
class Layouted(Generic[TargetT]):
    """Branches laid out: the indices, the targets in packed order with their weights, the common fields."""

    assembled: Assembled
    targets: list[TargetT]
    weights: list[float]
    common: dict[str, Any]


@functools.lru_cache(TEXTS)
def _encoded(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


class PackedProcessor(ABC, Generic[TargetT, BatchT]):
    """Turns `Sample`s into a family's batch.

    tasks: the tasks to train on; others are left out of the batch. max_text_tokens: longer conversations are
    cut at the right and counted in `Batch.notes`. prompt_dropout: share of unconditional redrawing prompts.
    grey_codes: codes of the grey picture (`Family.grey_codes`) if batches are made from `Sample.codes`, None
    if from pixels. Ranks must agree, also where a batch has no picture. prompt_of: sample, task and generator
    to a drawing's prompt; to be set where something is asked for that `tasks.PROMPTS` has no words for.
    """

    config: Any

    def __init__(
        self,
        side: int,
        tokenizer: Any,
        tasks: Sequence[Task] = tuple(Task),
        seed: int = 0,
        max_text_tokens: int = 1472,
        prompt_dropout: float = 0.1,
        grey_codes: np.ndarray | None = None,
    ) -> None:
        self.side = side
        self.tokenizer = tokenizer
        self.tasks = tuple(tasks)
        self.seed = seed
        self.max_text_tokens = max_text_tokens
        self.prompt_dropout = prompt_dropout
        self.grey_codes = grey_codes
        self.prompt_of = self._paraphrase

    def __call__(self, samples: Sequence[Sample]) -> BatchT:
        """Pack samples, each one row.

        Raises DataError for a sample without pixels where pixels are read, or without fitting codes where
        codes are.
        """
        pictures, branches, notes = Pictures(), [], {"truncated": 0}
        for sample in samples:
            branches += self.branches(sample, pictures, notes)
        if self._lacks_a_module(branches):
            branches += self._filler(pictures)
        next_position = 1 + max((s.position for s in samples), default=-1)
        batch = self.assemble(branches, pictures, len(samples), next_position, notes)
        return replace(batch, ids=tuple(sample.id for sample in samples))

    # -- what a family says ----------------------------------------------------------------------------------

    @abstractmethod
    def conversation_branch(self, conversation: Conversation, image: int | None) -> Branch[TargetT]:
        """A conversation about a picture, or without one."""

    @abstractmethod
    def drawing_branch(self, text: str, image: int, target: TargetT) -> Branch[TargetT]:
        """The prompt `text` of a drawing, up to its target."""

    @abstractmethod
    def make_target(self, task: Task, source: int, sample: Sample, rng: np.random.Generator) -> TargetT:
        """What is to be drawn, with every random draw its loss needs."""

    @abstractmethod
    def prefix(self, opening: tuple[int, ...], image: int) -> tuple[Block, ...]:
        """Everything up to and including the picture."""

    @abstractmethod
    def drawing(self, number: int, target: TargetT, first: int) -> tuple[Block, ...]:
        """The tokens of target `number` behind its prompt; its rows in the tables begin at `first`."""

    @abstractmethod
    def target_rows(self, target: TargetT) -> int:
        """Rows that a target takes in the tables; 0 where all targets share theirs."""

    @abstractmethod
    def tables(self, pictures: Pictures, targets: Sequence[TargetT]) -> Mapping[str, int]:
        """Rows of every table, in the order in which the model concatenates them."""

    @abstractmethod
    def finish(self, layouted: Layouted[TargetT]) -> BatchT:
        """The family's batch: `layouted.common`, `counts`, and fields of its own."""

    # -- text ------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids without any the tokenizer would add."""
        return list(_encoded(self.tokenizer, text))

    # -- samples to branches ---------------------------------------------------------------------------------

    def branches(self, sample: Sample, pictures: Pictures, notes: dict[str, int]) -> list[Branch[TargetT]]:
        """All branches of a sample; its pictures are added to `pictures`, cut texts counted in `notes`."""
        image = self.add_condition(sample, "image", pictures) if sample.has_image else None
        branches = []
        if Task.UNDERSTANDING in self.tasks:
            answers = [self._cut(self.conversation_branch(c, image), notes) for c in sample.conversations]
            branches += [b for b in answers if any(label != IGNORE for label in b.labels)]
        if image is not None:
            branches += [self.draw_branch(sample, task, image, pictures) for task in self.drawings(sample)]
        return branches

    def drawings(self, sample: Sample) -> list[Task]:
        """The tasks to draw for a sample."""
        return [task for task in sample.drawn if task in self.tasks]

    def add_condition(self, sample: Sample, name: str, pictures: Pictures) -> int:
        """Number, among the conditions, of a sample's picture `name` (of `PICTURES`)."""
        reads_pixels = self.grey_codes is None or self.config.reads_pixels
        return pictures.add(*self._picture(sample, name, reads_pixels))

    def draw_branch(self, sample: Sample, task: Task, image: int, pictures: Pictures) -> Branch[TargetT]:
        """A drawing of a sample from condition `image`."""
        rng = np.random.default_rng((self.seed, sample.position, IMAGE_TASKS.index(task)))
        text = self.prompt_of(sample, task, rng)
        source = image
        if task is not Task.PIXEL:
            source = pictures.add_extra(*self._picture(sample, task.value, self.grey_codes is None))
        return self.drawing_branch(text, image, self.make_target(task, source, sample, rng))

    def _paraphrase(self, sample: Sample, task: Task, rng: np.random.Generator) -> str:
        return choose_prompt(task, rng, self.prompt_dropout)

    def _picture(self, sample: Sample, name: str, needs_pixels: bool) -> tuple[np.ndarray, list[np.ndarray]]:
        """Pixels of a sample's picture, of side 0 if they aren't needed, and its codes if they are."""
        pixels = sample.image if name == "image" else sample.targets.get(Task(name))
        if needs_pixels and pixels is None:
            raise DataError(
                f"sample {sample.id} has only codes of its {name}, where the model reads pixels; "
                "keep the pixels beside the codes, or make the processor with from_codes=True"
            )
        if not needs_pixels or pixels is None:
            pixels = np.zeros((0, 0, 3), np.uint8)
        if self.grey_codes is None:
            return pixels, []
        codes = sample.codes.get(name, sample.codes.get("image") if name == Task.PIXEL else None)
        if codes is None:
            raise DataError(
                f"sample {sample.id} lacks the codes of its {name}; store them, or train from pixels"
            )
        codes = plain(codes)
        if codes.shape != self.grey_codes.shape or codes.dtype.kind != self.grey_codes.dtype.kind:
            raise DataError(
                f"sample {sample.id} has codes {codes.dtype} {list(codes.shape)}, the model "
                f"{self.grey_codes.dtype} {list(self.grey_codes.shape)}; store those of this family and size"
            )
        return pixels, [codes]

    def _cut(self, branch: Branch[TargetT], notes: dict[str, int]) -> Branch[TargetT]:
        """At most `max_text_tokens`, of which a picture counts as one."""
        room = max(0, self.max_text_tokens - len(branch.opening) - (branch.image is not None))
        if len(branch.ids) <= room:
            return branch
        notes["truncated"] += 1
        return replace(branch, ids=branch.ids[:room], labels=branch.labels[:room])

    def valid_cells(self, sample: Sample, grid: tuple[int, int]) -> np.ndarray:
        """bool [rows * columns]: cells whose centre lies in the picture, not in its padding."""
        left, top, right, bottom = sample.valid
        y, x = ((np.arange(cells) + 0.5) * self.side / cells for cells in grid)
        rows, columns = (y > top) & (y < bottom), (x > left) & (x < right)
        return (rows[:, None] & columns[None, :]).reshape(-1)

    # -- every module in every batch -------------------------------------------------------------------------

    def _lacks_a_module(self, branches: list[Branch[TargetT]]) -> bool:
        """Whether a trained module would not run: sharded optimisers and ranks in step need all of them."""
        draws = any(task in self.tasks for task in IMAGE_TASKS)
        return (
            not branches
            or all(branch.image is None for branch in branches)
            or (draws and all(branch.target is None for branch in branches))
            or (Task.UNDERSTANDING in self.tasks and all(branch.target is not None for branch in branches))
        )

    def _filler(self, pictures: Pictures) -> list[Branch[TargetT]]:
        """One grey picture whose losses weigh nothing."""
        image = len(pictures.images)
        fillers = self.branches(self.grey_sample(), pictures, {})
        if Task.UNDERSTANDING in self.tasks:  # not cut, however short texts may be
            fillers.append(self.conversation_branch((Turn("?", "."),), image))
        return [replace(filler, weight=0.0) for filler in fillers]

    def grey_sample(self) -> Sample:
        """A picture of nothing and as many drawings, as pixels and as codes."""
        picture = grey(self.side)
        return Sample(
            id="grey",
            position=0,
            conversations=(),
            image=picture,
            targets=dict.fromkeys(IMAGE_TASKS, picture),
            valid=(0, 0, self.side, self.side),
            codes={} if self.grey_codes is None else dict.fromkeys(PICTURES, self.grey_codes),
        )

    # -- branches to a batch ---------------------------------------------------------------------------------

    def assemble(
        self,
        branches: Sequence[Branch[TargetT]],
        pictures: Pictures,
        samples: int,
        next_position: int,
        notes: dict[str, int] | None = None,
    ) -> BatchT:
        """Lay branches out behind their prefixes and build every index the model needs."""
        shared: dict[tuple[tuple[int, ...], int | None, int], list[Branch[TargetT]]] = {}
        for number, branch in enumerate(branches):
            # Text-only branches have nothing to share: each is a row of its own.
            alone = number if branch.image is None else -1
            shared.setdefault((branch.opening, branch.image, alone), []).append(branch)
        rows, first = [], 0
        drawn: list[tuple[TargetT, float]] = []
        for (opening, image, _), same in shared.items():
            laid = []
            for branch in same:
                blocks: tuple[Block, ...] = (Block((Text(branch.ids, branch.labels, branch.weight),)),)
                if branch.target is not None:
                    blocks += self.drawing(len(drawn), branch.target, first)
                    first += self.target_rows(branch.target)
                    drawn.append((branch.target, branch.weight))
                laid.append(blocks)
            rows.append(Row(() if image is None else self.prefix(opening, image), laid))
        targets = [target for target, _ in drawn]
        assembled = assemble(rows, self.tables(pictures, targets))
        common = self._common(assembled, drawn, pictures)
        common |= {"samples": samples, "next_position": next_position, "notes": notes or {}}
        return self.finish(Layouted(assembled, targets, [weight for _, weight in drawn], common))

    def _common(
        self, assembled: Assembled, drawn: Sequence[tuple[Target, float]], pictures: Pictures
    ) -> dict[str, Any]:
        """The fields of `PackedBatch` but for `counts` of the drawings."""
        extra, codes = len(pictures.images), [*pictures.codes, *pictures.extra_codes]
        sources = [t.source if t.source >= 0 else extra - t.source - 1 for t, _ in drawn]
        tasks = [IMAGE_TASKS.index(target.task) for target, _ in drawn]
        indices = {name: value for name, value in vars(assembled).items() if name != "places"}
        return indices | {
            "tokens": assembled.plan.length,
            "images": self._stack(pictures.images),
            "extra_images": self._stack(pictures.extra),
            "codes": torch.from_numpy(np.stack(codes)) if codes else None,
            "target_source": torch.tensor(sources, dtype=torch.long),
            "target_task": torch.tensor(tasks, dtype=torch.long),
            "target_weight": torch.tensor([weight for _, weight in drawn], dtype=torch.float32),
            "noise_seeds": tuple(target.seed for target, _ in drawn),
        }

    def _stack(self, pictures: list[np.ndarray]) -> torch.Tensor:
        if not pictures:
            return torch.zeros(0, self.side, self.side, 3, dtype=torch.uint8)
        return torch.from_numpy(np.stack(pictures))
