"""What a monitor was told, on the disk of the driver's machine and beside the checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.monitor import TOLD, Monitor, fetch_told
from tests.pipelines import s3_config
from tests.s3 import S3Server
from unimrg.metrics import read_jsonl
from unimrg.storage import Store


def monitor(folder: Path) -> Monitor:
    return Monitor(str(folder), "", 0.5, 10)


def keep(made: Monitor, store: Store) -> None:
    """What a worker does before a checkpoint exists."""
    for name, content in made.told(whole=True).items():
        store.write_bytes(name, content)


@pytest.mark.parametrize("old", [False, True])
def test_told_things_follow_a_run_to_another_machine(old: bool, s3_server: S3Server, tmp_path: Path) -> None:
    """Whose disk has nothing of the run yet, or (old) only what it had before another machine took over."""
    store = Store.at(s3_server.url(f"told-{old}"), s3_config(s3_server))
    here, there = tmp_path / "here", tmp_path / "there"
    fetch_told(store, here)
    assert not here.exists(), "there is nothing in the storage yet"
    first = monitor(here)
    first.start(0, [1])
    first.write({"step": 1})
    if old:
        keep(first, store)
        fetch_told(store, there)
    first.write({"step": 2})
    first.audit(0, 4, [{"position": 3, "reason": "too-large"}])
    first.event("checkpoint")
    keep(first, store)

    fetch_told(store, there)
    assert all((there / name).read_bytes() == (here / name).read_bytes() for name in TOLD)
    second = monitor(there)
    second.start(2, [1])
    second.write({"step": 3})
    assert [row["step"] for row in read_jsonl(there / "metrics.jsonl")] == [1, 2, 3]
    assert [row["event"] for row in read_jsonl(there / "events.jsonl")] == ["start", "checkpoint", "resume"]
    assert second.bad == {3: "too-large"}

    before = (there / "metrics.jsonl").read_bytes()
    fetch_told(store, there)
    assert (there / "metrics.jsonl").read_bytes() == before, "newer than what the storage has"
