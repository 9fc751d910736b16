"""Samples to batches: labels, cuts, masks, padding and the published recipe's rows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.tiny_harmon import micro, random_sample, tokenizer
from unimrg.families.harmon.processor import IGNORE, IMAGE_ID, HarmonBatch, HarmonProcessor
from unimrg.families.processor import Pictures
from unimrg.sample import IMAGE_TASKS, Sample, Task, Turn
from unimrg.tasks import UNCONDITIONAL

SIDE, CELLS, BUFFERS = 16, 16, 3
TURNS = (Turn("Can you see a red cone?", "yes"), Turn("How many blue objects are there?", "two"))


def process(samples: list[Sample], **options: object) -> HarmonBatch:
    return HarmonProcessor(micro(), tokenizer(), **{"seed": 5, **options})(samples)


def sample(position: int = 0, **options: object) -> Sample:
    return random_sample(np.random.default_rng(position), SIDE, position, **options)


def packed_ids(batch: HarmonBatch) -> torch.Tensor:
    """Token id at every packed position, -1 where a picture's embedding stands."""
    text = len(batch.images) * (CELLS + BUFFERS) + len(batch.hidden_index)
    place = batch.source_index - text
    return torch.where(place >= 0, batch.token_ids[place.clamp(min=0)], -1)


# -- text ----------------------------------------------------------------------------------------------------


def test_answers_are_predicted_and_nothing_else() -> None:
    batch = process([replace(sample(), conversations=(TURNS,))], tasks=(Task.UNDERSTANDING,))
    want = [id for turn in TURNS for id in tokenizer()(turn.answer + "<|im_end|>")["input_ids"]]
    assert batch.label_ids.tolist() == want
    assert batch.counts[Task.UNDERSTANDING] == len(want)
    # Every label stands right behind the position that predicts it.
    assert packed_ids(batch)[batch.label_index + 1].tolist() == want


@pytest.mark.parametrize("picture", [True, False])
def test_the_template_is_whole(picture: bool) -> None:
    one = replace(sample(picture=picture), conversations=(TURNS,))
    batch = process([one], tasks=(Task.UNDERSTANDING,))
    branch = packed_ids(batch)[: batch.tokens - (0 if picture else filler_tokens())]
    text = tokenizer().decode(branch[branch >= 0])
    newline = "\n" if picture else ""
    assert text == (
        f"<|im_start|>user\n{newline}{TURNS[0].question}<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        f"<|im_start|>user\n{TURNS[1].question}<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>"
    )


def filler_tokens() -> int:
    return process([], tasks=(Task.UNDERSTANDING,)).tokens


def test_pictures_stand_between_the_opening_and_the_text() -> None:
    """Cells first, buffers last, exactly once for all branches of a picture."""
    batch = process([sample(conversations=2)], tasks=(Task.UNDERSTANDING,))
    opening = len(tokenizer()("<|im_start|>user\n")["input_ids"])
    picture = batch.source_index[opening : opening + CELLS + BUFFERS].tolist()
    assert picture == [*range(BUFFERS, BUFFERS + CELLS), *range(BUFFERS)]
    assert (packed_ids(batch) == -1).sum() == CELLS + BUFFERS


def test_drawings_stand_behind_their_prompt() -> None:
    """Visible cells first, buffers last; what is read back has the buffers first."""
    batch = process([sample(conversations=0)], tasks=(Task.DEPTH,))
    (visible,) = batch.visible_lengths
    base = CELLS + BUFFERS
    tail = batch.source_index[batch.tokens - visible - BUFFERS :]
    assert tail.tolist()[:visible] == list(range(base + BUFFERS, base + BUFFERS + visible))
    assert batch.source_index[batch.hidden_index].tolist() == list(range(base, base + BUFFERS + visible))


def test_long_conversations_are_cut_and_counted() -> None:
    long = replace(sample(), conversations=((TURNS[0], TURNS[1], *TURNS * 5), TURNS[:1]))
    whole = process([long], tasks=(Task.UNDERSTANDING,))
    assert whole.notes["truncated"] == 0
    cut = process([long], tasks=(Task.UNDERSTANDING,), max_text_tokens=40)
    assert cut.notes["truncated"] == 1
    assert cut.tokens < whole.tokens and cut.counts[Task.UNDERSTANDING] < whole.counts[Task.UNDERSTANDING]
    branches = cut.plan.segments[1:]
    opening = len(tokenizer()("<|im_start|>user\n")["input_ids"])
    assert branches[0].query_length + opening + 1 == 40  # the placeholder counts as one


def test_a_conversation_cut_before_its_first_answer_is_left_out() -> None:
    """What is left is filler, which weighs nothing."""
    batch = process([sample()], tasks=(Task.UNDERSTANDING,), max_text_tokens=5)
    assert batch.notes["truncated"] == 1
    assert batch.counts[Task.UNDERSTANDING] == 0 and not batch.label_weight.any()


# -- masks ---------------------------------------------------------------------------------------------------


def masks_by_position(batch: HarmonBatch, positions: list[int]) -> dict[int, list[tuple[int, ...]]]:
    """Visible cells of the three drawings of every sample, in the batch's order."""
    cells = [tuple(part.tolist()) for part in batch.visible_cells.split(list(batch.visible_lengths))]
    return {position: cells[3 * row : 3 * row + 3] for row, position in enumerate(positions)}


def test_masks_depend_on_seed_and_position_alone() -> None:
    positions = [3, 8, 1]
    first = process([sample(p) for p in positions])
    second = process([sample(p) for p in positions[::-1]])
    alone = process([sample(8)])
    masks = masks_by_position(first, positions)
    assert masks == masks_by_position(second, positions[::-1])
    assert masks[8] == masks_by_position(alone, [8])[8]
    assert set(first.noise_seeds) == set(second.noise_seeds) and len(set(first.noise_seeds)) == 9
    assert masks_by_position(process([sample(8)], seed=6), [8])[8] != masks[8]


def test_mask_ratios_are_those_of_the_recipe() -> None:
    """A normal around 1 with deviation 0.25, cut to [0.7, 1]: its mean is 0.867."""
    make = HarmonProcessor(micro(), tokenizer())
    rng = np.random.default_rng(0)
    shares = [make._draw_mask(rng).mean() for _ in range(2000)]
    assert min(shares) >= 0.7 and max(shares) <= 1
    # Rounding up to whole cells adds half a cell on average.
    assert np.mean(shares) == pytest.approx(0.867 + 0.5 / CELLS, abs=0.01)


def test_padding_counts_in_no_image_loss() -> None:
    batch = process([sample(conversations=0, valid=(0, 4, 16, 12))], tasks=(Task.DEPTH,))
    rows = set((batch.loss_rows // 4).tolist())
    assert rows <= {1, 2}
    visible = set(batch.visible_cells.tolist())
    assert sorted(batch.loss_rows.tolist()) == [cell for cell in range(4, 12) if cell not in visible]
    assert batch.counts[Task.DEPTH] == len(batch.loss_rows) * 4


# -- tasks ---------------------------------------------------------------------------------------------------


def test_a_drawing_of_the_picture_itself_is_encoded_once() -> None:
    batch = process([sample(), sample(1)])
    assert len(batch.images) == 2 and len(batch.extra_images) == 4
    assert batch.target_source.tolist() == [0, 2, 3, 1, 4, 5]
    assert sorted(batch.row_task.unique().tolist()) == [0, 1, 2]


@pytest.mark.parametrize("task", list(Task))
def test_only_the_tasks_trained_are_in_the_batch(task: Task) -> None:
    batch = process([sample(conversations=2)], tasks=(task,))
    assert {name for name, count in batch.counts.items() if count} == {task}
    assert len(batch.plan.segments) == (3 if task is Task.UNDERSTANDING else 2)


def test_sizes_are_reported() -> None:
    batch = process([sample(4), sample(2)])
    assert (batch.samples, batch.next_position) == (2, 5)
    assert batch.tokens == batch.plan.length == len(batch.source_index) == len(batch.position_ids)


def test_an_empty_batch_is_filler() -> None:
    batch = process([])
    assert (batch.samples, batch.next_position) == (0, 0)
    assert not any(batch.counts.values()) and len(batch.images) == 1 and len(batch.visible_lengths) == 3


# -- the published recipe ------------------------------------------------------------------------------------


def test_published_rows_have_prefixes_of_their_own() -> None:
    """Questions see the padded picture, drawings the squashed one."""
    squashed = random_sample(np.random.default_rng(7), SIDE).image
    assert squashed is not None
    one = sample(conversations=2)
    one = replace(one, targets={**one.targets, Task.PIXEL: squashed})
    batch = process([one], published=True, prompt_dropout=0.0)
    assert torch.equal(batch.images[0], torch.from_numpy(one.image))
    assert torch.equal(batch.images[1], torch.from_numpy(squashed))
    assert batch.target_source.tolist() == [1, 2, 3]
    prefixes = [segment for segment in batch.plan.segments if len(segment.keys) == 1]
    assert len(prefixes) == 2


def test_published_prompts_carry_the_slips() -> None:
    make = HarmonProcessor(micro(), tokenizer(), published=True)
    encode = make.encode
    assert len(make.open_ids) == 3
    assert make.prompt(Task.DEPTH, "x") == [
        *encode("<|im_start|>user\n\n")[:3],
        IMAGE_ID,
        *encode("<|im_start|>user\n\nx<|im_end|>\n<|im_start|>assistant\n")[3:],
    ]
    assert make.prompt(Task.PIXEL, "x") == [
        *make.open_ids,
        IMAGE_ID,
        *encode("\\nx<|im_end|>\n<|im_start|>assistant\n"),
    ]
    assert make.prompt(Task.PIXEL, UNCONDITIONAL)[4:] == encode(
        f"{UNCONDITIONAL}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(make.prompt(Task.PIXEL, "x" * 500)) == 128


def test_published_text_only_samples_get_a_grey_picture() -> None:
    text = replace(sample(picture=False), conversations=(TURNS, TURNS))
    batch = process([text], published=True, tasks=(Task.UNDERSTANDING,))
    assert len(batch.images) == 1 and bool((batch.images == 127).all())
    assert process([text], tasks=(Task.UNDERSTANDING,)).counts == batch.counts


def test_prompts_are_tokenised_apart_from_the_picture() -> None:
    """Outside the published recipe all tasks share the ids before the picture: that is what they share."""
    make, pictures = HarmonProcessor(micro(), tokenizer()), Pictures()
    branches = make.branches(sample(conversations=2), pictures, {"truncated": 0})
    assert {branch.opening for branch in branches} == {make.open_ids}
    assert [branch.image for branch in branches] == [0] * 5
    assert all(label == IGNORE for branch in branches[2:] for label in branch.labels)


def test_prompt_dropout_drops_the_text_only() -> None:
    make = HarmonProcessor(micro(), tokenizer(), prompt_dropout=1.0)
    branches = make.branches(sample(conversations=0), Pictures(), {"truncated": 0})
    want = make.prompt(Task.PIXEL, UNCONDITIONAL)[len(make.open_ids) + 1 :]
    assert list(branches[0].ids) == want and branches[0].image == 0
    assert all(list(branch.ids) != want for branch in branches[1:])


def test_grid_is_that_of_the_picture() -> None:
    make = HarmonProcessor(micro(), tokenizer())
    assert make.grid == (4, 4) and math.prod(make.grid) == CELLS
    assert [task.value for task in IMAGE_TASKS] == ["pixel", "depth", "segmentation"]
