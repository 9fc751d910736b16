"""The report of whole, poor, broken and hostile run folders."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tests.fake_run import make_run, write_lines
from unimrg.errors import StorageError
from unimrg.report import write_report
from unimrg.report.charts import Trace, line_chart
from unimrg.report.comparison import Comparison
from unimrg.report.markup import el, escape, short, span


def page(folder: Path) -> tuple[str, ElementTree.Element]:
    """The page as text and as a tree; that it parses as XML means that nothing is left open or unescaped."""
    text = write_report(folder).read_text("utf-8")
    assert text.startswith("<!doctype html>\n")
    return text, ElementTree.fromstring(text.partition("\n")[2])


def words(tree: ElementTree.Element) -> str:
    return "".join(tree.itertext()).replace("\u00a0", " ")


def attributes(tree: ElementTree.Element, name: str) -> Iterator[str]:
    return (value for node in tree.iter() for key, value in node.items() if key == name)


def held_out(
    folder: Path, side: str, rows: list[dict[str, Any]], drawings: list[dict[str, Any]] | None = None
) -> None:
    (folder / "held_out").mkdir(parents=True, exist_ok=True)
    stored = {"questions": rows, "drawings": drawings or []}
    (folder / "held_out" / f"{side}.json").write_text(json.dumps(stored))


def judged(right: list[bool], **more: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"q{k}", "question": "?", "answer": "a", "prediction": "b", "correct": r, **more}
        for k, r in enumerate(right)
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "made-up", steps=200, images=3, side=64)


def test_a_whole_run(whole: Path) -> None:
    text, tree = page(whole)
    shown = words(tree)
    assert "Accuracy on 240 held-out questions rose from" in shown
    for part in (
        "Pairs",
        "Conflict subset",
        "occlusion",
        "corrupt-image",
        "worker-failure",
        "learning_rate: 1.0e-05",
    ):
        assert part in shown
    assert "python -m unimrg.train experiment=scenes seed=7" in shown
    assert text.count("data:image/png;base64,") == 3 * 9
    assert "finished" in shown and "220 more questions" in shown
    assert text == write_report(whole).read_text("utf-8"), "the same files give the same page"


def test_the_page_stands_alone_and_runs_nothing(whole: Path) -> None:
    text, tree = page(whole)
    assert all(
        link.startswith(("data:image/png", "#"))
        for name in ("src", "href")
        for link in attributes(tree, name)
    )
    assert "url(" not in text and "@import" not in text and "<script" not in text
    ids = list(attributes(tree, "id"))
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in attributes(tree, "href")} <= set(ids)


SECRETS = """\
tokenizer: qwen
tokens_per_batch: 4096
eos_token: </s>
api_key: abc1, abc
list:
  - hf_token: abc2
s3: {region: x, password: abc3, "secret": 'abc,4'}
store: s3://user:abc5@host/x
"secret_access_key": 'abc6'
private_key: |
  abc7

  abc
credentials:
  user: abc8
token: abc9
password: null
after: 1
"""


def test_secrets_of_the_configuration_are_hidden(whole: Path, tmp_path: Path) -> None:
    config = SECRETS
    (tmp_path / "config.yaml").write_text(config)
    shown = words(page(tmp_path)[1])
    assert "abc" not in shown
    assert shown.count("(hidden)") == 9
    for kept in (
        "tokenizer: qwen",
        "tokens_per_batch: 4096",
        "eos_token: </s>",
        "password: null",
        "after: 1",
    ):
        assert kept in shown
    assert "AKIA" not in words(page(whole)[1])


def test_an_empty_folder(tmp_path: Path) -> None:
    shown = words(page(tmp_path)[1])
    assert (
        "says nothing about accuracy" in shown
        and "No step was recorded" in shown
        and "nothing recorded" in shown
    )
    with pytest.raises(StorageError, match="not a folder"):
        write_report(tmp_path / "none")


def test_an_interrupted_run_with_answers_from_before_only(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(whole, folder)
    (folder / "held_out" / "after.json").unlink()
    shutil.rmtree(folder / "held_out" / "after")
    events = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    (folder / "events.jsonl").write_text("".join(events[:-1]))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 201, "loss/to')
    shown = words(page(folder)[1])
    assert "no answers from after it" in shown
    assert "not finished" in shown and "not drawn" in shown and "unreadable lines" in shown


def test_one_step_only(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss/understanding": 2.5, "loss/pixel": None}])
    _text, tree = page(tmp_path)
    assert "2.50" in words(tree) and "Not recorded in this run" in words(tree)
    assert "\u2192" not in words(tree)


def test_losses_that_are_not_finite_or_huge(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "step": k,
            "loss/understanding": 10.0 ** (k % 290),
            "loss/pixel": 1e300,
            "loss/depth": math.nan,
            "skipped": 1e30,
        }
        for k in range(1, 400)
    ]
    rows[40] |= {
        "loss/understanding": "NaN",
        "loss/segmentation": math.inf,
        "grad_norm": -1e-300,
        "timestamp": 1e300,
    }
    rows[41] |= {
        "loss/segmentation": 10**400,
        "grad_norm": 5e-324,
        "time_left_seconds": math.inf,
        "skipped/x": math.nan,
    }
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_lines(tmp_path / "events.jsonl", [{"event": "resume", "step": math.nan, "timestamp": -1e30}, {}])
    _text, tree = page(tmp_path)
    assert "NaN, infinite or beyond 1e100 in 399 steps, first at step 1" in words(tree)
    for name in ("points", "cx", "cy", "x1", "y1", "x", "y"):
        assert not any("nan" in value or "inf" in value for value in attributes(tree, name))


def test_thousands_of_steps_stay_small_and_repeated_steps_count_once(tmp_path: Path) -> None:
    rows = [{"step": k, "loss/depth": 1 / k, "loss/pixel": 1.0} for k in [*range(1, 20_001), *range(5, 9)]]
    write_lines(tmp_path / "metrics.jsonl", rows)
    text, tree = page(tmp_path)
    assert len(text) < 250_000
    assert "4 records of repeated or missing steps" in words(tree)


HOSTILE = "<script>alert(1)</script> \" ' & \ud800 \x00 \u202e </pre> {x} " + "w" * 500


def test_hostile_text_is_shown_and_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "<b>run & co"
    row = {
        "id": HOSTILE,
        "question": HOSTILE,
        "answer": HOSTILE,
        "prediction": HOSTILE,
        "family": HOSTILE,
        "pair": HOSTILE,
    }
    for side in ("before", "after"):
        held_out(folder, side, [row | {"correct": side == "after"}] * 3, [{"k": 0, HOSTILE: 1.0}, {"k": "x"}])
    write_lines(folder / "quarantine.jsonl", [{"reason": HOSTILE, "id": HOSTILE, "detail": {"a": HOSTILE}}])
    write_lines(folder / "events.jsonl", [{"event": HOSTILE, "detail": HOSTILE, "timestamp": HOSTILE}])
    (folder / "config.yaml").write_bytes(HOSTILE.encode("utf-8", "surrogatepass") + b"\xff\xfe")
    text, tree = page(folder)
    assert "<script" not in text
    assert words(tree).count("<script>alert(1)</script>") > 15


def test_damaged_held_out_files(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    (folder / "held_out" / "before.json").write_text("{")
    (folder / "held_out" / "after.json").write_text(
        json.dumps({"questions": [1, None, {}], "drawings": {"k": 1}})
    )
    (folder / "held_out" / "truth" / "0" / "depth.png").write_bytes(b"no picture")
    (folder / "held_out" / "truth" / "1" / "image.png").write_bytes(
        (folder / "held_out/truth/1/image.png").read_bytes()[:200]
    )
    shown = words(page(folder)[1])
    assert shown.count("unreadable") == 2 and "before.json is not a JSON object" in shown


def test_large_pictures_are_reduced(tmp_path: Path) -> None:
    place = tmp_path / "held_out" / "after" / "12"
    place.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    Image.fromarray(noise).save(place / "pixel.png")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(place / "depth.png")
    text, tree = page(tmp_path)
    assert "Image 12" in words(tree) and text.count("data:image/png") == 2
    assert len(text) < 400_000


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ([False] * 60 + [True] * 60, [True] * 120, "rose from"),
        ([True] * 120, [False] * 60 + [True] * 60, "fell from"),
        ([True, False] * 60, [False, True] * 60, "can\u2019t be told"),
        ([False] * 3, [True] * 3, "can\u2019t be told"),  # the bootstrap alone would claim [+100, +100]
        ([True] * 9, [True] * 9, "can\u2019t be told"),
    ],
)
def test_the_outcome_claims_no_more_than_the_interval_allows(
    tmp_path: Path, before: list[bool], after: list[bool], said: str
) -> None:
    held_out(tmp_path, "before", judged(before))
    held_out(tmp_path, "after", judged(after))
    shown = words(page(tmp_path)[1])
    assert said in shown
    assert ("too narrow" in shown) == (len(before) < 20)


def test_questions_are_matched_by_id_and_single_ones_left_out(tmp_path: Path) -> None:
    held_out(tmp_path, "before", judged([True, False, True]))
    held_out(tmp_path, "after", [*reversed(judged([True, True])), {"id": "new", "correct": None}])
    shown = words(page(tmp_path)[1])
    assert "on 2 held-out questions" in shown and "from 50.0 %" in shown and "to 100.0 %" in shown
    assert "2 questions judged on one side only" in shown and "not judged" not in shown


def test_answers_of_one_pair_hang_together() -> None:
    was, now = [True, True, False, False] * 30, [True, True, True, True] * 20 + [False] * 40
    alone = Comparison.of(was, now, range(120))
    together = Comparison.of(was, now, [k // 4 for k in range(120)])
    assert together.difference == alone.difference and together.interval != alone.interval


def test_many_pictures_and_questions_are_folded(tmp_path: Path) -> None:
    make_run(tmp_path / "many", steps=5, questions=2100, images=8, side=16)
    shown = words(page(tmp_path / "many")[1])
    assert "2 more images" in shown and "1,980 more questions" in shown and "100 questions not shown" in shown


def test_the_command_prints_the_path(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "unimrg.report"]
    done = subprocess.run([*run, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'report.html'}\n"
    failed = subprocess.run([*run, str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and failed.stderr.startswith("error: ")


def test_elements_escape_what_is_not_html() -> None:
    assert el("p", "<", el("b", "&"), None, [1, ["x"]], title='"', hidden=False) == (
        '<p title="&quot;">&lt;<b>&amp;</b>1x</p>'
    )
    assert escape("\ud800\x00\x1b") == "?\ufffd\ufffd"


def test_numbers_for_people() -> None:
    assert [short(v) for v in (0.0, 0.5, 11.0, 1234.0, 56_789.0, 999_999.0, 3.2e9, 1.5e-7, -2.0)] == [
        "0", "0.500", "11.0", "1,234", "56.8k", "1000k", "3.20G", "1.5e\u22127", "\u22122.00",
    ]  # fmt: skip
    assert [short(v) for v in (None, math.nan, math.inf, 1e300)] == ["\u2013", "NaN", "\u221e", "1e300"]
    assert [span(s).replace("\u00a0", " ") for s in (0.5, 61, 7200, 90_000)] == [
        "0.5 s",
        "1 min 1 s",
        "2 h 0 min",
        "1 d 1 h",
    ]


def test_charts_of_odd_courses() -> None:
    for values in (
        [3.0],
        [1.0, 1.0],
        [0.0, 0.0, 0.0],
        [-1e99, 1e99],
        [1e-90, 1e90],
        [math.nan, 2.0],
        [5e-324, 1.0],
    ):
        chart = line_chart(Trace.of(range(len(values)), values), "odd", colour="plain")
        tree = ElementTree.fromstring(chart)
        assert tree.get("role") == "img" and any(node.tag == "circle" for node in tree)
    assert "No finite value" in line_chart(Trace.of([1], [math.inf]), "none", colour="plain")
