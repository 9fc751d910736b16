"""The whole job on the real engines: Ray Train, Ray Data, DeepSpeed, a real S3 server, and real faults."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cluster.session import ray_session
from cluster.trainer import PAUSED, run
from tests.faulty_s3 import Rule, faulty
from tests.pipelines import s3_words
from tests.s3 import S3Server
from tests.tiny_harmon import micro, tokenizer
from tests.tiny_teachers import make_depth_anything, make_sam
from unimrg.compose import compose
from unimrg.config import RunConfig
from unimrg.data.scenes import SceneSettings, write
from unimrg.errors import UnimrgError
from unimrg.families.harmon.model import Harmon
from unimrg.metrics import read_jsonl
from unimrg.sample import Task
from unimrg.storage import S3Config, Store

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    """One Ray for all runs of this file."""
    with ray_session():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Harmon small enough for seconds, as a folder that a run starts from."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    Harmon(micro()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of procedural scenes in the LLaVA form."""
    folder = tmp_path_factory.mktemp("scenes")
    write(Store.at(str(folder)), SceneSettings(train=24, test=4, size=64, questions=3))
    return folder


def small(base: Path, scenes: Path) -> list[str]:
    """Overrides of a run of seconds."""
    return [
        "name=run",
        f"family.weights={base}",
        f"data.manifest={scenes}/train.json",
        f"data.held_out={scenes}/test.json",
        "teachers=oracle",
        "train.steps=6",
        "train.batch_size=4",
        "train.checkpoint_every=2",
        "data.unit=4",
        "engine.threads=1",
        "cluster.workers=1",
        "report.questions=4",
        "report.images=1",
        "report.draw_iterations=2",
        "report.max_new_tokens=2",
    ]


@pytest.fixture
def config(
    base: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunConfig]:
    """Makes the configuration of a small run from further overrides."""
    monkeypatch.chdir(tmp_path)

    def make(*overrides: str) -> RunConfig:
        return compose("train", [*small(base, scenes), *overrides], RunConfig)

    return make


def weights_digest(model: Path) -> str:
    """A digest of all weights of a stored model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(model / "model.safetensors").items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_two_workers_zero2_from_s3(
    config: Callable[..., RunConfig], scenes: Path, s3_server: S3Server, tmp_path: Path
) -> None:
    """Pictures from S3, two DeepSpeed ZeRO-2 workers, checkpoints and the model to S3, report here."""
    s3 = S3Config(s3_server.endpoint, s3_server.region, s3_server.access_key, s3_server.secret_key)
    Store.at(s3_server.url("data"), s3).upload(scenes, "scenes")
    folder = tmp_path / "outputs" / "run"
    environments: list[bytes] = []

    def look() -> None:
        environments.append(Path(f"/proc/{newest_worker(folder)}/environ").read_bytes())

    at_step(folder, 1, look)
    status = run(
        config(
            f"data.manifest={s3_server.url('data/scenes/train.json')}",
            f"data.held_out={s3_server.url('data/scenes/test.json')}",
            f"storage_path={s3_server.url('runs')}",
            f"s3.endpoint={s3.endpoint}",
            f"s3.region={s3.region}",
            f"s3.access_key={s3.access_key}",
            f"s3.secret_key={s3.secret_key}",
            "cluster.workers=2",
            "engine=zero2",
            "cluster.environment=['NCCL_SOCKET_IFNAME=eth7']",
        )
    )
    assert status == 0
    assert b"NCCL_SOCKET_IFNAME=eth7\0" in environments[0]
    steps = read_jsonl(folder / "metrics.jsonl")
    assert [record["step"] for record in steps] == list(range(1, 7))
    assert all(record[f"loss/{task}"] > 0 for record in steps for task in Task)
    assert (folder.parent / "latest").resolve() == folder.resolve()
    page = (folder / "report.html").read_text()
    assert s3.secret_key not in page and s3.secret_key not in (folder / "config.yaml").read_text()
    stored = Store.at(s3_server.url("runs/run"), s3)
    stored.download("model", tmp_path / "model")
    assert isinstance(Harmon.from_pretrained(tmp_path / "model"), Harmon)
    checkpoints = [e.path for e in stored.child("checkpoints").list() if e.path.startswith("step-")]
    assert sorted(checkpoints) == ["step-00000004-w2", "step-00000006-w2"]
    assert stored.exists("report/report.html")


@pytest.fixture(scope="module")
def undisturbed(base: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one worker that nothing happens to."""
    outputs = tmp_path_factory.mktemp("undisturbed")
    words = [*small(base, scenes), "report.enabled=false", "train.steps=8", f"storage_path={outputs}"]
    assert run(compose("train", words, RunConfig)) == 0
    return outputs / "run"


def at_step(folder: Path, step: int, do: Callable[[], None]) -> None:
    """Call `do` from a thread as soon as the metrics tell of that step."""
    metrics = folder / "metrics.jsonl"

    def watch() -> None:
        while not metrics.exists() or len(read_jsonl(metrics)) < step:
            time.sleep(0.02)
        do()

    threading.Thread(target=watch, daemon=True).start()


def newest_worker(folder: Path) -> int:
    """Process id of rank 0 in the worker group that began last."""
    begun = [e for e in read_jsonl(folder / "events.jsonl") if e["event"] in ("start", "resume")]
    return int(begun[-1]["detail"]["pids"][0])


def test_killed_worker_recovers_exactly(
    config: Callable[..., RunConfig], undisturbed: Path, tmp_path: Path
) -> None:
    """kill -9 of a worker in mid-run: it goes on from the last checkpoint and ends with the same weights."""
    folder = tmp_path / "outputs" / "run"
    at_step(folder, 3, lambda: os.kill(newest_worker(folder), signal.SIGKILL))
    assert run(config("report.enabled=false", "train.steps=8")) == 0
    events = [e["event"] for e in read_jsonl(folder / "events.jsonl")]
    assert events.count("resume") == 1, events
    records = read_jsonl(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert records[-1]["restarts"] == 1 and records[-1]["checkpoint_seconds"] > 0
    assert weights_digest(folder / "model") == weights_digest(undisturbed / "model")


def test_a_run_that_is_told_to_end_saves_and_goes_on_later(
    config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """SIGTERM: it saves, says how to go on, and ends with status 75. The same command goes on from there,
    also behind checkpoints that are deleted by then."""
    folder = tmp_path / "outputs" / "run"
    words = ("report.enabled=false", "train.checkpoint_every=1", "labels.mode=off")
    at_step(folder, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(config(*words, "train.steps=1000")) == PAUSED == 75
    paused = len(read_jsonl(folder / "metrics.jsonl"))
    assert 5 <= paused < 1000 and not (folder / "model").exists()
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert kept == [f"step-{step:08d}-w1" for step in (paused - 1, paused)]
    assert run(config(*words, f"train.steps={paused + 3}")) == 0
    events = read_jsonl(folder / "events.jsonl")
    assert [e["step"] for e in events if e["event"] == "resume"] == [paused]
    records = read_jsonl(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, paused + 4))
    assert [record["position"] for record in records] == [4 * record["step"] for record in records]


@pytest.mark.slow
def test_a_run_goes_on_on_another_machine(
    config: Callable[..., RunConfig], s3_server: S3Server, tmp_path: Path
) -> None:
    """With its checkpoints in S3 and a disk that knows nothing of it, or too little, no record is missing."""
    folder, old = tmp_path / "outputs" / "run", tmp_path / "old"
    place = (f"storage_path={s3_server.url('moving')}", *s3_words(s3_server))

    def go_on(steps: int) -> list[int]:
        words = ("report.enabled=false", "labels.mode=off", f"train.steps={steps}")
        assert run(config(*place, *words)) == 0
        events = read_jsonl(folder / "events.jsonl")
        assert [e["step"] for e in events if e["event"] in ("start", "resume")] == list(range(0, steps, 2))
        return [record["step"] for record in read_jsonl(folder / "metrics.jsonl")]

    assert go_on(2) == [1, 2]
    folder.rename(old)
    assert go_on(4) == [1, 2, 3, 4]
    shutil.rmtree(folder)
    old.rename(folder)
    assert go_on(6) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_some_workers_equal_one(
    workers: int, config: Callable[..., RunConfig], undisturbed: Path, tmp_path: Path
) -> None:
    """The same batches and losses through the whole pipeline, also where workers can't share them equally."""
    words = (f"cluster.workers={workers}", "report.enabled=false", "train.steps=8", "engine=zero1")
    assert run(config(*words)) == 0
    one, two = (
        read_jsonl(folder / "metrics.jsonl") for folder in (undisturbed, tmp_path / "outputs" / "run")
    )
    for a, b in zip(one, two, strict=True):
        assert a["position"] == b["position"]
        for task in Task:
            assert a[f"loss/{task}"] == pytest.approx(b[f"loss/{task}"], rel=1e-4)


def test_cached_labels_and_codes_train_as_streamed_ones(
    config: Callable[..., RunConfig], undisturbed: Path, tmp_path: Path
) -> None:
    """The same weights to the last bit from what the first run left in its label store."""
    store = undisturbed.parent / "labels"
    assert list(store.glob("*/*/codes/*/part-*.parquet"))
    words = ["labels.mode=cached", f"labels.store={store}", "report.enabled=false", "train.steps=8"]
    assert run(config(*words)) == 0
    assert weights_digest(tmp_path / "outputs" / "run" / "model") == weights_digest(undisturbed / "model")


def test_faults_of_storage_cost_retries_and_nothing_else(
    config: Callable[..., RunConfig], undisturbed: Path, scenes: Path, s3_server: S3Server, tmp_path: Path
) -> None:
    """Two reads of the data set in five fail: the weights are the same, and the metrics tell of it."""
    s3 = S3Config(s3_server.endpoint, s3_server.region, s3_server.access_key, s3_server.secret_key)
    Store.at(s3_server.url("broken"), s3).upload(scenes, "scenes")
    with faulty(s3_server) as proxy:
        proxy.rules = [
            Rule(fault, "GET", "scenes/", share=0.2, seed=seed) for seed, fault in enumerate(("503", "500"))
        ]
        places = ("data.manifest", "train"), ("data.held_out", "test")
        words = [f"{key}={s3_server.url(f'broken/scenes/{name}.json')}" for key, name in places]
        words += s3_words(proxy.server)
        assert run(config(*words, "report.enabled=false", "train.steps=8")) == 0
        broken = proxy.count()
    folder = tmp_path / "outputs" / "run"
    counted = read_jsonl(folder / "metrics.jsonl")[-1]
    retries = sum(counted[f"retries/{reason}"] for reason in ("slow-down", "server-error"))
    assert broken / 2 < retries <= broken  # those of the driver and after the last step are nobody's
    assert weights_digest(folder / "model") == weights_digest(undisturbed / "model")


def photos(folder: Path) -> None:
    """A LLaVA data set of the photographs in scikit-image's wheel, one with its true disparity map."""
    from PIL import Image
    from skimage import data

    names = ("astronaut", "coffee", "chelsea", "rocket")
    entries: list[dict[str, Any]] = []
    (folder / "photos").mkdir(parents=True)
    pictures = {name: getattr(data, name)() for name in names}
    pictures["motorcycle"], _, disparity = data.stereo_motorcycle()
    np.save(folder / "photos" / "motorcycle-disparity.npy", disparity.astype(np.float32))
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / "photos" / f"{name}.jpg")
        turns = [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": f"A {name}."},
            {"from": "human", "value": "Is it a photograph?"},
            {"from": "gpt", "value": "Yes."},
        ]
        entries.append({"id": name, "image": f"photos/{name}.jpg", "conversations": turns})
    entries.append(
        {"id": "again", "image": "photos/coffee.jpg", "conversations": entries[1]["conversations"][:2]}
    )
    text = [{"from": "human", "value": "What is two and two?"}, {"from": "gpt", "value": "Four."}]
    entries.append({"id": "text", "conversations": text})
    (folder / "mix.json").write_text(json.dumps(entries))


def test_photographs_with_model_teachers(
    config: Callable[..., RunConfig], s3_server: S3Server, tmp_path: Path
) -> None:
    """Real photographs from a bucket, Depth Anything and SAM actors from local checkpoint folders."""
    s3 = S3Config(s3_server.endpoint, s3_server.region, s3_server.access_key, s3_server.secret_key)
    photos(tmp_path / "set")
    Store.at(s3_server.url("real"), s3).upload(tmp_path / "set", "photos")
    status = run(
        config(
            f"data.manifest={s3_server.url('real/photos/mix.json')}",
            "data.held_out=''",
            "data.held_out_count=1",
            "data.max_side=128",
            f"s3.endpoint={s3.endpoint}",
            f"s3.region={s3.region}",
            f"s3.access_key={s3.access_key}",
            f"s3.secret_key={s3.secret_key}",
            "teachers=depth_anything_sam",
            f"teachers.depth.checkpoint={make_depth_anything(tmp_path / 'depth')}",
            f"teachers.segmentation.checkpoint={make_sam(tmp_path / 'sam')}",
            "teachers.sam.points_per_side=4",
            "teachers.sam.pred_iou_thresh=0",
            "teachers.sam.stability_score_thresh=0",
            "train.steps=3",
        )
    )
    assert status == 0
    folder = tmp_path / "outputs" / "run"
    steps = read_jsonl(folder / "metrics.jsonl")
    assert len(steps) == 3 and steps[-1]["skipped"] == 0
    assert all(steps[-1][f"loss/{task}"] > 0 for task in Task)
    assert (folder / "held_out" / "after" / "0" / "depth.png").is_file()


def spoil(folder: Path) -> dict[str, str]:
    """Damage a copy of the scenes in every way a data set can be damaged; id -> expected reason."""
    entries = json.loads((folder / "train.json").read_text())
    images = sorted({entry["image"] for entry in entries})
    (folder / images[0]).write_bytes(b"")
    (folder / images[1]).write_bytes((folder / images[1]).read_bytes()[:200])
    (folder / images[2]).write_bytes(b"<html>not found</html>")
    (folder / images[3]).unlink()
    (folder / images[4]).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(3 << 20))
    reasons = dict(
        zip(
            images, ("empty-file", "corrupt-image", "not-an-image", "missing-file", "too-large"), strict=False
        )
    )
    turns = entries[0]["conversations"]
    entries.append({"id": "climbs", "image": "../../etc/passwd", "conversations": turns})
    entries.append(
        {"id": "silent", "image": images[5], "conversations": [{"from": "human", "value": "Hello?"}]}
    )
    (folder / "train.json").write_text(json.dumps(entries))
    first = {image: next(e["id"] for e in entries if e["image"] == image) for image in reasons}
    return {first[image]: reason for image, reason in reasons.items()} | {
        "climbs": "path-outside-folder",
        "silent": "malformed-conversation",
    }


def test_bad_samples_cost_themselves_only(
    config: Callable[..., RunConfig], scenes: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(scenes, tmp_path / "spoiled")
    expected = spoil(tmp_path / "spoiled")
    overrides = [
        f"data.manifest={tmp_path}/spoiled/train.json",
        "data.max_bytes=2097152",
        "report.enabled=false",
    ]
    assert run(config(*overrides, "data.max_bad_share=0.5", "train.steps=8")) == 0
    quarantine = read_jsonl(tmp_path / "outputs" / "run" / "quarantine.jsonl")
    assert {row["id"]: row["reason"] for row in quarantine} == expected
    last = read_jsonl(tmp_path / "outputs" / "run" / "metrics.jsonl")[-1]
    assert last["skipped"] >= len(expected) and last["skipped/too-large"] >= 1

    with pytest.raises(UnimrgError, match=r"samples are unusable.*raise data.max_bad_share"):
        run(
            config(
                *overrides, "name=strict", "data.max_bad_share=0.01", "data.min_checked=8", "train.steps=50"
            )
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.manifest=s3://{bucket}x/train.json"], "bucket"),
        (["data.manifest=s3://{bucket}/none/train.json"], "does not exist"),
        (
            ["s3.secret_key=wrong", "data.manifest=s3://{bucket}/train.json"],
            "denied|credential|signature|SIGNATURE",
        ),
        (["data.images=/nowhere/at/all"], "nowhere"),
        (["teachers=tiny"], "knows only the embedded scenes; for other pictures choose teachers="),
        (["family.weights=/nowhere/a.safetensors", "family.vae_weights=/nowhere/b.ckpt"], "nowhere"),
        (["storage_path=/proc/nothing"], "proc"),
    ],
)
def test_wrong_settings_stop_before_training(
    overrides: list[str], message: str, config: Callable[..., RunConfig], s3_server: S3Server, tmp_path: Path
) -> None:
    s3 = [
        f"s3.endpoint={s3_server.endpoint}",
        f"s3.region={s3_server.region}",
        f"s3.access_key={s3_server.access_key}",
        f"s3.secret_key={s3_server.secret_key}",
    ]
    chosen = [override.format(bucket=s3_server.bucket) for override in overrides]
    with pytest.raises(UnimrgError, match=message) as caught:
        run(config(*s3, *chosen))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "outputs").glob("*/metrics.jsonl"))
