"""What the pipeline serves, without a cluster: rows of mixed sources, how far ahead, what it waits for."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.labeler import Job, join_place, parts_in_order, split_place, unit_rows
from cluster.pipeline import Ingest, Stored, open_order, pick, samples_needed, uses_store
from cluster.prepare import make_absolute
from unimrg.compose import compose
from unimrg.config import RunConfig, to_plain
from unimrg.data.label_store import LABELS, LabelStore
from unimrg.data.manifest import build_index
from unimrg.data.order import split_held_out
from unimrg.data.stages import PADDING, Sources
from unimrg.errors import DataError
from unimrg.storage import Store, take_retries


@pytest.fixture(autouse=True)
def no_retries_left() -> None:
    """Whatever this process had to ask storage for again before, nobody listens here."""
    take_retries()


def manifest(folder: Path, name: str, count: int, images: bool = True) -> str:
    """A data set of `count` entries; its path."""
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": f"A {name}."}]
    picture = {"image": f"{name}-{{}}.png"} if images else {}
    entries = [
        {"id": f"{name}{n}", **{k: v.format(n) for k, v in picture.items()}, "conversations": turns}
        for n in range(count)
    ]
    (folder / f"{name}.json").write_text(json.dumps(entries))
    return f"{folder}/{name}.json"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Indices go here, not to the user's home."""
    monkeypatch.setattr("cluster.pipeline.INDEX_FOLDER", tmp_path / "index")
    return tmp_path


def config(*words: str) -> RunConfig:
    return compose(
        "train", ["data=llava", "data.unit=4", "data.shard_rows=8", "data.window=2", *words], RunConfig
    )


def test_rows_of_several_sources_come_in_the_order_of_the_list(index: Path) -> None:
    """Sources may differ in their columns; each row comes with its own conversation and source."""
    places = [manifest(index, "a", 40), manifest(index, "b", 25, images=False)]
    settings = config(
        f"data.manifests=[{','.join(places)}]", "data.shares=[3,1]", "data.manifest=", "data.held_out_count=5"
    )
    ingest = Ingest(to_plain(settings), None, None, None)
    rows = ingest.rows(7, 307).to_pylist()
    assert [row["position"] for row in rows] == list(range(7, 307))
    source, row = open_order(settings, ingest.manifests)(7, 307)
    assert [(r["source"], r["row"]) for r in rows] == list(zip(source.tolist(), row.tolist(), strict=True))
    for r in rows:
        name = "ab"[r["source"]]
        assert r["id"] == f"{name}{r['row']}" and f"A {name}." in r["conversations"]
        assert (r["image"] is None) == (name == "b")
    assert 0.7 < np.mean(source == 0) < 0.8
    held_out = set(split_held_out(40, settings.seed, 5)[1].tolist())
    assert not held_out & {r["row"] for r in rows if r["source"] == 0}


def test_readers_are_held_back_until_training_is_near(index: Path) -> None:
    settings = config(f"data.manifest={manifest(index, 'a', 40)}", "data.ahead=10")
    ingest = Ingest(to_plain(settings), None, None, None)
    passed: list[int] = []

    def reader() -> None:
        for position in range(0, 40, 4):
            ingest.release(position)
            passed.append(position)

    thread = threading.Thread(target=reader, daemon=True)
    thread.start()

    def settled(expected: int) -> bool:
        deadline = time.monotonic() + 5
        while passed[-1:] != [expected] and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        return passed[-1] == expected

    assert settled(8)
    ingest.trained(7)
    assert settled(16)
    ingest.skipped([9, 10, 3, 9])  # 3 lies behind already; 9 is told of twice
    assert settled(16)  # 7 + 10 + 2 = 19 is not yet 20
    ingest.skipped([11])
    assert settled(16)
    ingest.skipped([12])
    assert settled(20)
    ingest.trained(20)  # the skipped ones lie behind now
    assert settled(28)
    ingest.trained(100)
    thread.join(5)
    assert passed == list(range(0, 40, 4))


class Failed:
    """A labeller that gave up."""

    class failure:
        @staticmethod
        def remote() -> str:
            return "labelling stopped: no such file"


@pytest.fixture
def stored(index: Path) -> tuple[RunConfig, Stored]:
    settings = config(f"data.manifest={manifest(index, 'a', 20)}", "data.held_out_count=0")
    key = {
        "dataset": {"name": "a", "rows": 20},
        "teachers": {name: {"name": "oracle"} for name in ("depth", "segmentation")},
        "asked": {},
        "limits": {},
        "shard_rows": 8,
    }
    return settings, Stored(LabelStore.create(Store.at(str(index / "labels")), key))


def test_missing_parts_of_a_cached_store_are_an_error(stored: tuple[RunConfig, Stored]) -> None:
    settings, one = stored
    ingest = Ingest(to_plain(settings), None, None, [one])
    one.labels.labels.write(1, LABELS.empty_table())
    ingest.wait_for([(0, 1)])
    with pytest.raises(
        DataError, match=r"part 2 is not in .*/labels; run unimrg.label with the same settings"
    ):
        ingest.wait_for([(0, 1), (0, 2)])


def test_whoever_waits_for_a_dead_labeller_hears_why(
    stored: tuple[RunConfig, Stored], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, one = stored
    monkeypatch.setattr("ray.get", lambda value: value)
    ingest = Ingest(to_plain(settings), None, Failed(), [one])
    with pytest.raises(DataError, match="labelling stopped: no such file"):
        ingest.wait_for([(0, 0)])


def test_waiting_ends_when_the_part_is_there(stored: tuple[RunConfig, Stored], monkeypatch: Any) -> None:
    settings, one = stored
    monkeypatch.setattr(Ingest, "_check_labeller", lambda *place: None)
    ingest = Ingest(to_plain(settings), None, object(), [one])
    waiting = threading.Thread(target=ingest.wait_for, args=([(0, 0)],), daemon=True)
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive()
    one.labels.labels.write(0, LABELS.empty_table())
    waiting.join(5)
    assert not waiting.is_alive()


def test_parts_are_labelled_in_the_order_of_need(stored: tuple[RunConfig, Stored], index: Path) -> None:
    settings, one = stored
    job = Job(
        build_index(Store.at(str(index)), "a.json", index / "index"),
        Sources(Store.at(str(index))),
        one.labels,
    )
    order = open_order(settings, [job.manifest])
    places = parts_in_order(order, [job], 0, 10_000)
    assert sorted(places) == [(0, 0), (0, 1), (0, 2)]
    seen = dict.fromkeys((order(0, 40).row // 8).tolist())
    first_window = list(seen)[:2]
    assert {part for _, part in places[:2]} == set(first_window)
    assert parts_in_order(order, [job], 0, 3)[:1] == places[:1]


def test_units_of_a_part_are_filled_up(stored: tuple[RunConfig, Stored], index: Path) -> None:
    rows = unit_rows(build_index(Store.at(str(index)), "a.json", index / "index"), 3, 2, 16, 24).to_pylist()
    assert [row["error"] for row in rows] == [None] * 4 + [PADDING] * 4
    assert {split_place(row["part"]) for row in rows} == {(3, 2)} and {row["source"] for row in rows} == {3}
    assert [row["position"] for row in rows] == list(range(16, 24))
    assert split_place(join_place(5, 123_456)) == (5, 123_456)


def test_rows_are_picked_out_of_many_tables() -> None:
    rng = np.random.default_rng(0)
    tables = [pa.table({"value": rng.integers(0, 99, n), "raw": [bytes([n])] * n}) for n in (3, 5, 2)]
    table, row = np.array([2, 0, 0, 1, 2, 1, 0]), np.array([1, 2, 0, 4, 0, 4, 2])
    picked = pick(tables, table, row)
    assert picked.to_pylist() == [tables[t].to_pylist()[r] for t, r in zip(table, row, strict=True)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], True),
        (["labels.codes=false"], True),
        (["teachers=oracle"], True),
        (["teachers=oracle", "labels.codes=false"], False),  # the data set's own maps need no store
        (["teachers=oracle", "labels.mode=off"], False),
        (["weights=understanding_only"], False),
        (["teachers=depth_anything_sam", "labels.codes=false"], True),
        (["teachers=depth_anything_sam", "weights=understanding_only"], False),
        (["teachers=depth_anything_sam", "weights.segmentation=0", "labels.codes=false"], True),
        (["teachers=oracle", "data.group_by_image=false"], False),
    ],
)
def test_when_a_store_is_used(words: list[str], expected: bool) -> None:
    assert uses_store(compose("train", words, RunConfig)) == expected


def test_enough_is_prepared_for_the_samples_that_may_be_lost() -> None:
    settings = config("data.manifest=a.json", "data.max_bad_share=0.2")
    assert samples_needed(settings, 1000) >= 1000 / 0.8 + settings.data.min_checked


def test_a_teacher_without_a_checkpoint_keeps_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty path is not the folder that the command runs in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "depth").mkdir()
    settings = config("data.manifest=a.json", "teachers=oracle", "teachers.depth.checkpoint=depth")
    make_absolute(settings)
    assert settings.teachers.depth.checkpoint == str(tmp_path / "depth")
    assert settings.teachers.segmentation.checkpoint == ""
    assert settings.data.manifest == str(tmp_path / "a.json")
