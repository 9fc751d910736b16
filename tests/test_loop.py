"""The loop over plain lists of batches, and runs that were interrupted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.engine_runs import BATCH, CPU, Group
from unimrg.engine import gather
from unimrg.errors import DataError
from unimrg.loop import StepOutput, fit, global_counts, train_step
from unimrg.losses import TaskLoss
from unimrg.packing import Batch
from unimrg.plan import Plan
from unimrg.sample import Task

TEXT, PIXEL = Task.UNDERSTANDING, Task.PIXEL
WEIGHTS = dict.fromkeys(Task, 1.0)
RESUMED = ("torch", "zero2", "zero3")


class FakeEngine:
    """One number is the model; the loss of a term is that number, and it falls by 1 a step."""

    model: Any = None
    device = CPU
    ranks = 1

    def __init__(self, steps_done: int = 0, losses: tuple[float, ...] = (), norm: float = 1.0) -> None:
        self.steps_done = steps_done
        self.losses = losses
        self.norm = norm
        self.calls: list[str] = []

    def forward(self, batch: Batch, last: bool) -> dict[Task, TaskLoss]:
        self.calls.append(f"forward{'*' if last else ''}")
        term = self.losses[self.steps_done] if self.losses else 9.0 - self.steps_done
        return {task: TaskLoss(torch.tensor(term * count), count) for task, count in batch.counts.items()}

    def backward(self, total: Tensor, last: bool) -> None:
        self.calls.append(f"backward{'*' if last else ''} {total.item():g}")

    def step(self) -> float:
        self.calls.append("step")
        self.steps_done += 1
        return self.norm

    def learning_rate(self) -> float:
        return 0.1 * self.steps_done

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def weights(self) -> dict[str, Tensor]:
        return {}


def batch(position: int = 0, samples: int = 2, truncated: int = 0, **counts: int) -> Batch:
    return Batch(
        plan=Plan(0, ()),
        counts={Task(task): count for task, count in (counts or {"understanding": 4}).items()},
        samples=samples,
        tokens=10 * samples,
        next_position=position + samples,
        notes={"truncated": truncated},
    )


def steps(number: int) -> list[list[Batch]]:
    return [[batch(2 * step)] for step in range(number)]


# -- one process, a fake engine ------------------------------------------------------------------------------


def test_accumulated_micro_batches_share_one_update() -> None:
    """Each brings its own sum over the counts of both; only the last one of a step is told so."""
    engine = FakeEngine()
    sums, norm, counts = train_step(
        engine, [batch(understanding=3), batch(understanding=1, pixel=2)], WEIGHTS
    )
    # 27 / 4 / 2 and (9 / 4 + 18 / 2) / 2: two tasks in the whole step, also for the batch that has only one
    assert engine.calls == ["forward", "backward 3.375", "forward*", "backward* 5.625", "step"]
    assert {task: float(value) for task, value in sums.items()} == {TEXT: 36, PIXEL: 18}
    assert (norm, counts[TEXT], counts[PIXEL], counts[Task.DEPTH]) == (1.0, 4, 2, 0)


def test_what_a_step_tells() -> None:
    seen: list[StepOutput] = []
    micro = [batch(6, samples=2, understanding=3, pixel=1), batch(4, truncated=1, understanding=1)]
    fit(FakeEngine(losses=(2.0,)), [micro], {**WEIGHTS, TEXT: 3.0}, 1, observe=seen.append)
    (output,) = seen
    assert output.losses == {TEXT: 2.0, PIXEL: 2.0} and output.total == 2.0
    assert (output.step, output.position, output.samples, output.tokens) == (1, 8, 4, 40)
    assert (output.grad_norm, output.learning_rate, output.truncated) == (1.0, 0.1, 1)
    assert output.started <= output.ready <= output.ended


def test_observe_comes_before_save_and_save_at_the_end_too() -> None:
    calls: list[str] = []
    fit(
        FakeEngine(),
        steps(5),
        WEIGHTS,
        5,
        observe=lambda output: calls.append(f"see {output.step}"),
        save=lambda output: calls.append(f"save {output.step}"),
        save_every=2,
    )
    assert calls == ["see 1", "see 2", "save 2", "see 3", "see 4", "save 4", "see 5", "save 5"]


def test_without_an_interval_only_the_last_step_is_saved() -> None:
    saved: list[int] = []
    fit(FakeEngine(), steps(3), WEIGHTS, 3, save=lambda output: saved.append(output.step))
    assert saved == [3]


def test_steps_of_a_resumed_engine_count_and_no_batch_is_wasted() -> None:
    engine, source = FakeEngine(steps_done=3), iter(steps(5))
    fit(engine, source, WEIGHTS, 5)
    assert engine.steps_done == 5 and len(list(source)) == 3
    fit(engine, source, WEIGHTS, 5)
    assert engine.steps_done == 5


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (FakeEngine(losses=(1.0, math.nan)), "the loss is nan at step 2; lower train.learning_rate"),
        (FakeEngine(losses=(math.inf,)), "the loss is inf at step 1; lower train.learning_rate"),
        (FakeEngine(norm=math.nan), "the gradient's norm is nan at step 1; lower train.learning_rate"),
    ],
)
def test_numbers_that_are_none_stop_the_run_before_they_are_saved(engine: FakeEngine, said: str) -> None:
    saved: list[int] = []
    with pytest.raises(DataError, match=f"^{said}$"):
        fit(engine, steps(2), WEIGHTS, 2, save=lambda output: saved.append(output.step))
    assert not saved


def test_data_that_ends_too_early() -> None:
    engine = FakeEngine()
    with pytest.raises(DataError, match="the data ended"):
        fit(engine, steps(2), WEIGHTS, 3)
    assert engine.steps_done == 2


def test_a_reason_to_stop_is_raised_before_the_next_step() -> None:
    engine = FakeEngine()
    with pytest.raises(DataError, match=r"^too many bad samples$"):
        fit(engine, steps(3), WEIGHTS, 3, stop=lambda: "too many bad samples" if engine.steps_done else "")
    assert engine.steps_done == 1


def test_nothing_to_learn_is_no_error() -> None:
    seen: list[StepOutput] = []
    fit(FakeEngine(), [[batch(understanding=0)]], WEIGHTS, 1, observe=seen.append)
    assert seen[0].losses == {} and seen[0].total == 0.0


def test_alone_there_is_nobody_to_ask() -> None:
    assert gather([1.5, 2]) == [[1.5, 2]]
    counts = global_counts([batch(understanding=3), batch(understanding=1, depth=7)])
    assert counts == {TEXT: 4, PIXEL: 0, Task.DEPTH: 7, Task.SEGMENTATION: 0}


# -- two processes, the real engines -------------------------------------------------------------------------


class Runs:
    """What the groups left: `whole` and `half` by one, `rest` by new processes, and one process alone."""

    ROLES: ClassVar = ("whole", "half", "rest")

    def __init__(self, folder: Path) -> None:
        def place(name: str) -> str:
            return str(folder / f"checkpoint-{name}")

        first: dict[str, Any] = {"talk": ("talk", {})}
        second: dict[str, Any] = {}
        for name in RESUMED:
            first[f"{name}-whole"] = ("interrupted", {"engine": name, "folder": place(name)})
            first[f"{name}-half"] = ("interrupted", {"engine": name, "folder": place(name), "stop_at": 3})
            second[f"{name}-rest"] = ("interrupted", {"engine": name, "folder": place(name), "resume": True})
        for reader, writer in (("zero2", "torch"), ("torch", "zero2"), ("zero3", "zero2")):
            second[f"{reader}-reads-{writer}"] = ("refused", {"engine": reader, "folder": place(writer)})
        alone = {"reads": ("refused", {"engine": "zero2", "folder": place("zero2")})}
        self.first = Group(folder / "first", 2, first).wait()
        third = Group(folder / "alone", 1, alone)
        self.second = Group(folder / "second", 2, second).wait()
        self.alone = third.wait()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    yield Runs(tmp_path_factory.mktemp("loop"))


@pytest.mark.parametrize("name", RESUMED)
def test_an_interrupted_run_ends_bit_for_bit_like_an_undisturbed_one(runs: Runs, name: str) -> None:
    """With dropout, so that the random state counts; in new processes, from the ranks' merged folders."""
    whole, half = runs.first.result(f"{name}-whole"), runs.first.result(f"{name}-half")
    rest = runs.second.result(f"{name}-rest")
    assert rest["position"] == 3 * BATCH
    for resumed, undisturbed in zip(half["steps"] + rest["steps"], whole["steps"], strict=True):
        for key in ("step", "losses", "total", "grad_norm", "learning_rate", "position", "samples"):
            assert resumed[key] == undisturbed[key], (resumed["step"], key)
    assert rest["weights"].keys() == whole["weights"].keys()
    for key, tensor in whole["weights"].items():
        assert torch.equal(rest["weights"][key], tensor), key


def test_a_checkpoint_of_another_engine_is_named(runs: Runs) -> None:
    for reader, writer in (("zero2", "torch"), ("torch", "zero2"), ("zero3", "zero2")):
        said = runs.second.result(f"{reader}-reads-{writer}", rank=1)
        assert said["kind"] == "CheckpointError"
        assert said["message"].endswith(f"was written by another engine; continue it with engine={writer}")


def test_a_checkpoint_of_another_number_of_workers_is_named(runs: Runs) -> None:
    said = runs.alone.result("reads")
    assert said["kind"] == "CheckpointError"
    assert "by 2 workers and can't be continued by 1; set cluster.workers=2" in said["message"]
    assert "\n" not in said["message"]


def test_ranks_add_up_their_counts_and_stop_together(runs: Runs) -> None:
    mine, other = (runs.first.result("talk", rank) for rank in (0, 1))
    assert mine["gathered"] == other["gathered"] == [[0.5, 2.0**40], [1.5, 2.0**40]]
    assert mine["counts"] == other["counts"] and all(mine["counts"].values())
    assert mine["reason"] == "another worker gave up; its message says why"
    assert other["reason"].startswith("the data ended")


def test_saving_and_loading_is_silent(runs: Runs) -> None:
    said = [*runs.first.said, *runs.second.said, *runs.alone.said]
    assert said == [""] * 5
