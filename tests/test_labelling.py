"""Labelling through faults: whatever dies, fails or vanishes on the way, the label store ends up the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.session import ray_session
from tests.bench.backpressure import measure
from tests.faulty_s3 import Rule, faulty
from tests.pipelines import (
    BAD,
    MODELS,
    Pace,
    label,
    parts_done,
    s3_config,
    s3_words,
    seen,
    store_files,
    words,
    write_pictures,
)
from tests.s3 import S3Server
from tests.tiny_teachers import make_depth_anything, make_sam
from unimrg.compose import compose
from unimrg.config import LabelConfig
from unimrg.data.label_store import find_all
from unimrg.errors import StorageError, UnimrgError
from unimrg.label import show_status
from unimrg.storage import Store

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[1]
ROWS = 96
SOUND = ROWS - len(BAD) - 1  # pictures that both teachers label


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    """One Ray for all labelling of this file."""
    with ray_session():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), ROWS)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The label store's files when nothing happens."""
    store = tmp_path_factory.mktemp("undisturbed")
    assert label(*words(data, store, *MODELS)) == 0
    return store_files(store)


def of_kind(files: dict[str, bytes], folder: str) -> dict[str, bytes]:
    return {path: content for path, content in files.items() if f"/{folder}/" in path}


def test_the_store_holds_every_row_and_says_what_is_wrong(undisturbed: dict[str, bytes]) -> None:
    assert len(of_kind(undisturbed, "labels")) == ROWS // 16
    lines = b"".join(of_kind(undisturbed, "quarantine").values()).decode().splitlines()
    assert {row["row"]: row["reason"] for row in map(json.loads, lines)} == BAD


def kill_teachers(log: Path, after: dict[str, list[int]], killed: list[int]) -> None:
    """kill -9 of whoever works on that teacher's n-th picture, for each n."""
    while any(after.values()):
        work = seen(log)
        for name, counts in after.items():
            mine = [pid for who, pid, _ in work if who == name]
            if counts and len(mine) >= counts[0]:
                counts.pop(0)
                killed.append(mine[-1])
                os.kill(mine[-1], signal.SIGKILL)
        time.sleep(0.01)


def killing(log: Path, **after: list[int]) -> list[int]:
    """Kills teachers in the background; returns the list that their pids will be in."""
    killed: list[int] = []
    threading.Thread(target=kill_teachers, args=(log, after, killed), daemon=True).start()
    return killed


def test_killed_teachers_change_nothing(data: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """kill -9 of actors of both teachers, twice each, in mid-labelling."""
    log = tmp_path / "log"
    killed = killing(log, depth=[10, 60], segmentation=[25, 50])
    assert label(*words(data, tmp_path / "labels", *MODELS), pace=Pace(0.02, False, str(log))) == 0
    assert len(set(killed)) == 4
    assert not any(psutil.pid_exists(pid) for pid in killed)
    assert store_files(tmp_path / "labels") == undisturbed


def random_models(folder: Path) -> list[str]:
    """Overrides for a tiny Depth Anything and a tiny SAM with random weights."""
    depth, sam = make_depth_anything(folder / "depth"), make_sam(folder / "sam")
    return [
        *("teachers=depth_anything_sam", "teachers.sam.points_per_side=4"),
        *("teachers.sam.pred_iou_thresh=0", "teachers.sam.stability_score_thresh=0"),
        *(f"teachers.depth.checkpoint={depth}", f"teachers.segmentation.checkpoint={sam}"),
    ]


@pytest.mark.slow
def test_killed_models_change_nothing(data: Path, tmp_path: Path) -> None:
    """The same with Depth Anything and SAM, two actors each."""
    models = random_models(tmp_path)
    models += ["teachers.depth.min_actors=2", "teachers.segmentation.min_actors=2"]
    log = tmp_path / "log"
    pace = Pace(0.05, False, str(log), models=True)
    assert label(*words(data, tmp_path / "calm", *models), pace=Pace(models=True)) == 0
    killed = killing(log, depth=[10, 60], segmentation=[25, 50])
    assert label(*words(data, tmp_path / "killed", *models), pace=pace) == 0
    assert len(set(killed)) == 4
    assert store_files(tmp_path / "killed") == store_files(tmp_path / "calm")


@pytest.mark.slow
def test_a_lost_node_changes_nothing(data: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """kill -9 of every process of the node that the teachers run on; a new node comes up and they go on."""
    log, store = tmp_path / "log", tmp_path / "labels"
    done = subprocess.run(
        [sys.executable, "-m", "tests.pipelines", "lose-a-node", str(data), str(store), str(log)],
        cwd=ROOT,
        env=os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (told,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))  # Ray talks too
    assert 1 <= told["parts_before"] < ROWS // 16, told
    assert told["before"] >= 2 and told["after"] >= 2, told  # both teachers ran on both nodes
    assert store_files(store) == undisturbed


# -- only what is missing ------------------------------------------------------------------------------------


def test_a_second_run_does_only_what_is_missing(
    data: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """No teacher sees a picture twice, and a lost part is made again from its own pictures alone."""
    log, store = tmp_path / "log", tmp_path / "labels"
    command = words(data, store, *MODELS)
    assert label(*command, pace=Pace(log=str(log))) == 0
    calls = Counter((name, picture) for name, _, picture in seen(log))
    assert set(calls.values()) == {1} and len(calls) >= 2 * SOUND
    assert label(*command, pace=Pace(log=str(log))) == 0
    assert len(seen(log)) == calls.total()
    (found,) = find_all(Store.at(str(store)))
    found.labels.store.delete("part-000002.parquet")
    assert label(*command, pace=Pace(log=str(log))) == 0
    assert len(seen(log)) == calls.total() + 2 * 16
    assert store_files(store) == undisturbed


@pytest.mark.slow
def test_an_interrupted_command_goes_on(data: Path, tmp_path: Path) -> None:
    """SIGKILL of `unimrg.label` itself: no process stays, and the next one makes what is missing."""
    models = random_models(tmp_path)
    assert label(*words(data, tmp_path / "calm", *models), pace=Pace(models=True)) == 0
    store = tmp_path / "killed"
    command = [sys.executable, "-m", "unimrg.label", *words(data, store, *models)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while parts_done(store) < 2:
        assert first.poll() is None
        time.sleep(0.02)
    family = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    _, alive = psutil.wait_procs(family, timeout=180)  # Ray's agents wait a minute for an answer first
    assert not alive, [process.cmdline() for process in alive]
    done = {path: path.stat().st_mtime_ns for path in store.rglob("part-*.parquet")}
    assert 2 <= len(done) < ROWS // 16
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert store_files(store) == store_files(tmp_path / "calm")


# -- object storage ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(data: Path, s3_server: S3Server) -> S3Server:
    """The pictures in a bucket, below `pictures/`."""
    Store.at(s3_server.url(), s3_config(s3_server)).upload(data, "pictures")
    return s3_server


def in_bucket(server: S3Server, store: str, *more: str) -> list[str]:
    return words(server.url("pictures"), server.url(store), *MODELS, *s3_words(server), *more)


MIX = [
    Rule(fault, key="pictures/|labels-", share=0.03, seed=seed)
    for seed, fault in enumerate(("500", "503", "slow-down", "reset", "truncated"))
]


def test_faults_of_storage_change_nothing(bucket: S3Server, undisturbed: dict[str, bytes]) -> None:
    """One request in seven is refused, dropped or cut short, on its way to the pictures and the labels."""
    assert label(*in_bucket(bucket, "labels-calm")) == 0
    with faulty(bucket) as proxy:
        proxy.rules = [Rule(r.fault, key=r.key, share=r.share, seed=r.seed) for r in MIX]
        assert label(*in_bucket(proxy.server, "labels-faulty")) == 0
        broken, asked = proxy.count(), len(proxy.log)
    assert 0.08 < broken / asked < 0.25, (broken, asked)
    calm = store_files(bucket.url("labels-calm"), s3_config(bucket))
    assert store_files(bucket.url("labels-faulty"), s3_config(bucket)) == calm
    # The same as from a disk, but for the details of what is wrong, which name the place.
    stored, local = of_kind(calm, "labels"), of_kind(undisturbed, "labels")
    sound = [f"part-{part:06d}.parquet" for part in set(range(ROWS // 16)) - {row // 16 for row in BAD}]
    assert len(sound) == 4
    for name in sound:
        ((a,), (b,)) = ([v for k, v in files.items() if k.endswith(name)] for files in (stored, local))
        assert a == b


def test_a_picture_that_vanishes_is_quarantined_and_counted(
    bucket: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was there when the store began to be read; the next request for it finds nothing."""
    direct = Store.at(bucket.url("pictures"), s3_config(bucket))
    picture = direct.read_bytes("image-040.png")
    with faulty(bucket) as proxy:
        hook = lambda: direct.delete("image-040.png")  # noqa: E731
        proxy.rules = [Rule("pass", key=r"image-040\.png", times=1, hook=hook)]
        try:
            assert label(*in_bucket(proxy.server, "labels-vanished")) == 0
        finally:
            direct.write_bytes("image-040.png", picture)
    words = [f"labels.store={bucket.url('labels-vanished')}", *s3_words(bucket)]
    capsys.readouterr()
    assert show_status(compose("label", words, LabelConfig)) == 0
    said = capsys.readouterr().out
    assert f"{ROWS} of {ROWS} rows" in said and f"quarantined  {len(BAD) + 1} rows" in said
    assert "missing-file 2" in said
    (store,) = find_all(Store.at(bucket.url("labels-vanished"), s3_config(bucket)))
    gone = {row["id"]: row["reason"] for row in store.quarantined()}
    assert gone["p40"] == "missing-file" and len(gone) == len(BAD) + 1


@pytest.mark.parametrize(
    ("fault", "key", "skip", "message"),
    [
        ("expired", "", 0, "credentials|expired"),
        ("no-bucket", "", 0, "bucket"),
        ("expired", "", 80, "credentials|expired"),  # in the midst of labelling, inside Ray's tasks
    ],
)
def test_what_only_people_can_mend_stops_with_one_sentence(
    fault: str, key: str, skip: int, message: str, bucket: S3Server
) -> None:
    with faulty(bucket) as proxy:
        proxy.rules = [Rule(fault, key=key, skip=skip)]
        with pytest.raises(UnimrgError, match=message) as caught:
            label(*in_bucket(proxy.server, f"labels-{fault}-{skip}"))
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 400, sentence
    assert "Traceback" not in sentence and "ray" not in sentence.replace("array", ""), sentence
    assert isinstance(caught.value, StorageError)


# -- memory --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "trainer"), [(0.1, 0.01), (0.01, 0.1)])
def test_memory_is_bounded_whichever_side_is_slower(teacher: float, trainer: float, tmp_path: Path) -> None:
    """The object store holds a small part of what passes it, and no process grows from half to half."""
    pictures = write_pictures(tmp_path / "data", 320, 512, maps=False)
    found = measure(pictures, tmp_path / "run", teacher, trainer, samples=304)
    assert found["volume_mib"] > 400
    assert found["object_store_mib"]["peak"] < found["volume_mib"] / 2, found
    assert found["spilled_mib"] == 0, found
    for kind in ("labeller", "ingest", "teachers"):  # readers start only when labels are there
        heap = found["heap_mib"][kind]
        assert heap["second half"] < heap["first half"] + 100, (kind, heap)
    assert found["heap_mib"]["reader"]["peak"] < 400, found
