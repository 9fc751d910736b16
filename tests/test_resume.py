"""The order of training samples: a function of the seed and the position, whatever dies, however many read.

Training is the product's whole pipeline without a model: consumers in the place of the training workers take
their shares in lockstep, and go on from the position that a checkpoint would hold.
"""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from cluster.labeler import open_stores
from cluster.pipeline import open_manifest, open_order
from cluster.session import ray_session, root_cause
from tests.pipelines import (
    BAD,
    MODELS,
    Pace,
    Step,
    Training,
    command,
    label,
    parts_done,
    training,
    words,
    write_pictures,
)
from unimrg.config import RunConfig
from unimrg.errors import DataError
from unimrg.metrics import read_jsonl

pytestmark = pytest.mark.ray

ROWS, BATCH, STEPS = 96, 8, 16  # a little more than an epoch
SMALL = (f"train.batch_size={BATCH}", f"train.steps={STEPS}")


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    """One Ray for all pipelines of this file."""
    with ray_session():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), ROWS)


def expected_positions(config: RunConfig, bad: dict[int, str]) -> list[list[int]]:
    """What the order itself says: usable positions, a batch at a time."""
    manifests = [open_manifest(url, config.s3, True) for url in config.data.places()]
    rows = open_order(config, manifests)(0, 4 * STEPS * BATCH).row.tolist()
    usable = [position for position, row in enumerate(rows) if row not in bad]
    return [usable[at : at + BATCH] for at in range(0, STEPS * BATCH, BATCH)]


def positions(steps: list[Step]) -> list[list[int]]:
    return [[position for position, _ in step] for step in steps]


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Step]]:
    """A folder with all labels, and what one worker gets of them that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert label(*words(data, folder / "labels", *MODELS)) == 0
    return folder, training(data, folder, *SMALL).run(0, STEPS, workers=1)


def test_the_order_is_a_function_of_the_seed(data: Path, undisturbed: tuple[Path, list[Step]]) -> None:
    folder, steps = undisturbed
    assert positions(steps) == expected_positions(command(data, folder, *SMALL), BAD)
    other = expected_positions(command(data, folder, *SMALL, "seed=1"), BAD)
    assert positions(steps) != other


def test_streaming_and_cached_give_the_same_batches(
    data: Path, undisturbed: tuple[Path, list[Step]], tmp_path: Path
) -> None:
    """Pixel for pixel; and streaming begins to train when the first window of parts is labelled."""
    pace = Pace(0.02, steady=False, gate=str(tmp_path / "gate"), free=48)
    streaming = training(data, tmp_path, *SMALL, pace=pace)
    first = streaming.run(0, 1, workers=2)
    assert parts_done(tmp_path / "labels") <= 3
    (tmp_path / "gate").touch()
    assert [*first, *streaming.run(first[0][-1][0] + 1, STEPS - 1, workers=2)] == undisturbed[1]
    streaming.kill()


@pytest.mark.slow
def test_workers_that_can_t_share_a_batch_equally_get_the_same_samples(
    data: Path, undisturbed: tuple[Path, list[Step]]
) -> None:
    """8 samples on 3 and on 5 workers, in the order of the list; some have fewer, and one of 5 has none.

    And again: pipelines that died lately leave room for those that follow.
    """
    folder, steps = undisturbed
    for workers in (3, 5, 3):
        assert training(data, folder, *SMALL).run(0, 4, workers) == steps[:4]


def test_cached_needs_labels(data: Path, undisturbed: tuple[Path, list[Step]], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no labels by these teachers.*run unimrg\.label"):
        training(data, tmp_path, *SMALL)


def test_what_stops_the_labels_stops_the_training_with_one_sentence(data: Path, tmp_path: Path) -> None:
    """A part that is gone from the store, and teachers that can't go on."""
    assert label(*words(data, tmp_path / "labels", *MODELS)) == 0
    for part in (tmp_path / "labels").rglob("labels/part-000003.parquet"):
        part.unlink()
    for pace, sentence in (
        (None, r"part 3 is not in .*; run unimrg\.label with the same settings"),
        (Pace(broken=True), "labelling stopped: the lamp of the teacher is broken"),
    ):
        started = training(data, tmp_path, *SMALL, pace=pace)
        with pytest.raises(DataError) as caught:
            started.run(0, STEPS, workers=2)
        started.kill()  # the error's frames hold it, and with it the labeller and its teachers
        assert re.fullmatch(sentence + "[^\n]*", str(root_cause(caught.value)))


def test_labels_of_the_data_set_are_the_same_with_and_without_a_store(data: Path, tmp_path: Path) -> None:
    """labels.mode=off reads what the store was made of."""
    oracle = (*MODELS, *(f"teachers.{name}.name=oracle" for name in ("depth", "segmentation")))
    assert label(*words(data, tmp_path / "labels", *oracle)) == 0
    off = training(data, tmp_path, *SMALL, *oracle, "labels.mode=off")
    assert off.stored is None
    stored = open_stores(off.config, wait=False)
    from_store = Training(off.config, off.monitor, stored).run(0, 14, workers=1)
    assert off.run(0, 14, workers=1) == from_store


def disturbed(make: Callable[[int], Training], chance: random.Random) -> tuple[list[Step], list[int]]:
    """A training that is killed twice, anywhere, and goes on with one or two workers, in turn.

    make: the command at a position. Either the workers and their pipeline die, or everything does.
    """
    steps: list[Step] = []
    workers, used = chance.choice([1, 2]), []
    every = chance.randint(1, 3)  # steps between checkpoints
    command = make(0)
    for end in [*sorted(chance.sample(range(STEPS), 2)), STEPS]:
        position = steps[-1][-1][0] + 1 if steps else 0
        if steps and chance.random() < 0.5:
            command.kill()
            command = make(position)
        steps += command.run(position, end - len(steps), workers, killed=end < STEPS, pause=0.05)
        if end < STEPS:
            del steps[len(steps) // every * every :]  # what no checkpoint has is done again
        used.append(workers)
        workers = 3 - workers
    assert ray.get(command.labeller.failure.remote()) == ""
    command.kill()
    return steps, used


def check_disturbed(data: Path, folder: Path, seed: int, *more: str) -> list[Step]:
    """Labels are made beside training by teachers of random speed; some are there when it is resumed."""
    chance = random.Random(seed)
    more = (*SMALL, f"data.readers={chance.choice([1, 2])}", *more)

    def make(position: int) -> Training:
        return training(data, folder, *more, pace=Pace(0.02, steady=False), start=position)

    steps, used = disturbed(make, chance)
    assert set(used) == {1, 2}
    taken = positions(steps)
    assert taken == expected_positions(command(data, folder, *more), BAD)
    quarantined = [row["position"] for row in read_jsonl(folder / "quarantine.jsonl")]
    assert len(quarantined) == len(set(quarantined))
    assert set(range(taken[-1][-1])) - {position for step in taken for position in step} <= set(quarantined)
    assert_nothing_stays()
    return steps


def assert_nothing_stays() -> None:
    """What was killed took its readers, teachers and iterators along."""
    deadline = time.monotonic() + 60
    while left := [
        name for name in titles() if re.match(r"ray::(SplitCoord|MapWorker|_MapActor|_Read)", name)
    ]:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def titles() -> list[str]:
    """What the processes of this Ray call themselves."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found.append(" ".join(process.cmdline()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_and_resumed_with_other_workers(
    seed: int, data: Path, undisturbed: tuple[Path, list[Step]], tmp_path: Path
) -> None:
    assert check_disturbed(data, tmp_path, seed) == undisturbed[1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 10))
def test_killed_and_resumed_in_other_orders(seed: int, data: Path, tmp_path: Path) -> None:
    check_disturbed(data, tmp_path, seed, f"seed={seed}")
