"""The loop over plain lists of batches, and runs that were interrupted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.engine_runs import BATCH, CPU, Group
from unimrg.config import TrainConfig
from unimrg.engine import gather
from unimrg.errors import DataError
from unimrg.flops import Flops
from unimrg.health import Health, LossSpike
from unimrg.loop import StepOutput, fit, global_counts, train_step
from unimrg.losses import TaskLoss
from unimrg.packing import Batch
from unimrg.pieces import Piece
from unimrg.plan import Plan
from unimrg.sample import Task

TEXT, PIXEL = Task.UNDERSTANDING, Task.PIXEL
WEIGHTS = dict.fromkeys(Task, 1.0)
RESUMED = ("torch", "zero2", "zero3")
READERS = [
    *((2, reader, writer) for reader, writer in (("zero3", "torch"), ("torch", "zero2"), ("zero1", "zero3"))),
    *((1, reader, writer) for reader, writer in (("torch", "zero3"), ("zero3", "zero2"))),
    *((3, reader, writer) for reader, writer in (("zero2", "torch"), ("zero3", "zero3"), ("torch", "zero2"))),
]
"""Number of ranks, engine and the engine of the checkpoint it goes on from, which two ranks wrote."""


class FakeModel:
    """A sample costs 30 FLOPs."""

    def flops(self, batch: Batch) -> dict[str, Flops]:
        return {"one": Flops(forward=10.0 * batch.samples), "other": Flops(backward=20.0 * batch.samples)}


class FakeEngine:
    """One number is the model; the loss of a term is that number, and it falls by 1 a step."""

    model: Any = FakeModel()
    device = CPU
    attention = "sdpa"
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

    replicated = True

    def pieces(self) -> list[Piece]:
        return []

    def updates(self) -> int:
        return self.steps_done

    def resume(self, steps_done: int, updates: int) -> None: ...

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
    assert output.flops == 120 and output.peak_memory > 2**26
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
    ("engine", "numbers"),
    [
        (FakeEngine(losses=(1.0, *[math.nan] * 4)), "the loss is nan and the gradient's norm 1 at step 4"),
        (FakeEngine(losses=(1.0, *[math.inf] * 4)), "the loss is inf and the gradient's norm 1 at step 4"),
        (FakeEngine(norm=math.nan), "the loss is 7 and the gradient's norm nan at step 3"),
    ],
)
def test_too_many_skipped_updates_in_a_row_stop_the_run(engine: FakeEngine, numbers: str) -> None:
    said = f"^{numbers}, the last of 3 such steps in a row; look at the samples a, b, or lower .*rate$"
    named = [[replace(micro, ids=("a", "b")) for micro in step] for step in steps(5)]
    with pytest.raises(DataError, match=said):
        fit(engine, named, WEIGHTS, 5, health=Health(TrainConfig(max_skipped=2)))


def test_a_skipped_update_is_told_and_forgotten() -> None:
    """Not in a row: the run goes on. Suspects are the samples of the step."""
    seen: list[StepOutput] = []
    engine = FakeEngine(losses=(1.0, math.nan, 1.0, math.nan, 1.0))
    named = [[replace(micro, ids=(f"s{number}",)) for micro in step] for number, step in enumerate(steps(5))]
    fit(engine, named, WEIGHTS, 5, observe=seen.append, health=Health(TrainConfig(max_skipped=1)))
    assert [output.wrong for output in seen] == ["", "skipped", "", "skipped", ""]
    assert [output.suspects for output in seen] == [(), ("s1",), (), ("s3",), ()]


def test_a_loss_that_jumps() -> None:
    """Three times the usual is a spike, and two in a row are reason to go back. It doesn't count as usual."""
    usual = (1.0, 1.2, 0.8, 1.1) * 6
    seen: list[StepOutput] = []
    health = Health(TrainConfig(spike=3.0, rollback_after=2))
    engine = FakeEngine(losses=(*usual, 4.0, 1.0, 4.0, 4.0, 1.0))
    with pytest.raises(LossSpike) as spike:
        fit(engine, steps(29), WEIGHTS, 29, observe=seen.append, health=health)
    assert (spike.value.step, spike.value.position) == (28, 56)
    assert [output.wrong for output in seen[24:]] == ["spike", "", "spike", "spike"]


def test_no_loss_is_a_spike_before_it_is_known_what_is_usual() -> None:
    health = Health(TrainConfig(spike=2.0))
    assert [health.judge(10.0 if step == 15 else 1.0, 1.0) for step in range(20)] == [""] * 20
    assert health.judge(10.0, 1.0) == "spike"


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
        exact: dict[str, Any] = {"dropout": 0.0}
        first["whole"] = ("interrupted", {"engine": "torch", "folder": "", **exact})
        others: dict[int, dict[str, Any]] = {ranks: {} for ranks in (1, 2, 3)}
        for name in RESUMED:
            given = {"engine": name, "folder": place(f"{name}-exact"), "stop_at": 3, **exact}
            first[f"{name}-exact"] = ("interrupted", given)
        for ranks, reader, writer in READERS:
            given = {"engine": reader, "folder": place(f"{writer}-exact"), "resume": True, **exact}
            others[ranks][f"{reader}-reads-{writer}"] = ("interrupted", given)
        for name in ("torch", "zero1", "zero2", "zero3"):
            others[2][f"{name}-poisoned"] = ("poisoned", {"engine": name})
        self.first = Group(folder / "first", 2, first).wait()
        started = {ranks: Group(folder / str(ranks), ranks, others[ranks]) for ranks in (1, 3)}
        self.second = Group(folder / "second", 2, second | others[2]).wait()
        self.readers = {2: self.second} | {ranks: group.wait() for ranks, group in started.items()}


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


@pytest.mark.parametrize(("ranks", "reader", "writer"), READERS)
def test_any_engine_and_number_of_workers_goes_on_from_any_other(
    runs: Runs, ranks: int, reader: str, writer: str
) -> None:
    """Weights, moments and the moving average (which is what `weights` are) are those of the whole run."""
    whole = runs.first.result("whole")
    rest = runs.readers[ranks].result(f"{reader}-reads-{writer}")
    assert rest["position"] == 3 * BATCH
    for resumed, undisturbed in zip(rest["steps"], whole["steps"][3:], strict=True):
        assert resumed["losses"] == pytest.approx(undisturbed["losses"], rel=1e-5)
        assert resumed["grad_norm"] == pytest.approx(undisturbed["grad_norm"], rel=1e-5)
    for key, tensor in whole["weights"].items():
        error = (rest["weights"][key] - tensor).abs().max().item()
        assert error <= 1e-6 + 1e-5 * tensor.abs().max().item(), f"{key} is off by {error}"


@pytest.mark.parametrize("name", ["torch", "zero1", "zero2", "zero3"])
def test_one_rank_s_infinite_loss_skips_the_update_everywhere(runs: Runs, name: str) -> None:
    """Its gradient alone would be finite. The weights stay, the samples of that rank are named."""
    result = runs.second.result(f"{name}-poisoned")
    assert [step["wrong"] for step in result["steps"]] == ["", "", "skipped", ""]
    assert [len(step["suspects"]) for step in result["steps"]] == [0, 0, BATCH // 2, 0]
    assert result["updates"] == 3
    _, before, after, later = result["weights"]
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert not all(torch.equal(later[key], tensor) for key, tensor in after.items())


def test_ranks_add_up_their_counts_and_stop_together(runs: Runs) -> None:
    mine, other = (runs.first.result("talk", rank) for rank in (0, 1))
    assert mine["gathered"] == other["gathered"] == [[0.5, 2.0**40], [1.5, 2.0**40]]
    assert mine["counts"] == other["counts"] and all(mine["counts"].values())
    assert mine["reason"] == "another worker gave up; its message says why"
    assert other["reason"].startswith("the data ended")


def test_saving_and_loading_is_silent(runs: Runs) -> None:
    said = [*runs.first.said, *(line for group in runs.readers.values() for line in group.said)]
    # DeepSpeed tells of the updates it skipped, on rank 0: one for each of its stages.
    told = [line for text in said for line in text.splitlines()]
    assert len(told) == 3 and all("OVERFLOW! Skipping step" in line for line in told)
