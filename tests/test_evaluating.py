"""`unimrg.evaluate` on a real Ray: answers stored as they come, resumed after kill -9, a model at a time."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import psutil
import pytest
import torch

from cluster.evaluation import checkpoint_digest
from cluster.session import ray_session
from tests.pipelines import s3_config, s3_words
from tests.s3 import S3Server
from tests.test_evaluate import UNDERSTANDING, questions
from unimrg import evaluate
from unimrg.benchmarks.evaluation import Evaluation
from unimrg.compose import run_command
from unimrg.config import EvaluateConfig, FamilyConfig
from unimrg.families import load_family
from unimrg.storage import Store

pytestmark = [pytest.mark.slow, pytest.mark.ray]

ROOT = Path(__file__).parents[1]
ROWS = 33


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    """One Ray for all evaluations of this file."""
    with ray_session():
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models, `model` and `other`, and questions in `data`."""
    folder = tmp_path_factory.mktemp("work")
    for seed, name in enumerate(("model", "other")):
        model, tokenizer = load_family("harmon").build(FamilyConfig(), seed=seed)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "data").mkdir()
    (folder / "data" / "VSR-zeroshot.tsv").write_bytes(questions(ROWS))
    (folder / "data" / "MMVP.tsv").write_bytes((UNDERSTANDING / "tsv" / "MMVP.tsv").read_bytes())
    return folder


def words(work: Path, out: Path | str, *more: str, model: str = "model") -> list[str]:
    return [
        f"data={work / 'data'}",
        f"checkpoint={work / model}",
        f"out={out}",
        "benchmarks=[VSR-zeroshot]",
        "max_new_tokens=4",
        "part_rows=4",
        "pool.batch_size=3",
        *more,
    ]


def run(*command: str) -> str:
    """What the command prints; it must succeed."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = run_command(evaluate.main, "evaluate", EvaluateConfig, "", (), command)
    assert status == 0, err.getvalue()
    return out.getvalue()


def parts(out: Path) -> dict[Path, int]:
    """Every stored part and when it was written."""
    return {path: path.stat().st_mtime_ns for path in out.glob("answers/*/part-*.parquet")}


def predictions(out: Path, name: str = "VSR-zeroshot") -> str:
    return (out / "predictions" / f"{name}.tsv").read_text()


@pytest.fixture(scope="module")
def undisturbed(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    said = run(*words(work, out))
    assert said.startswith(f"{ROWS} of {ROWS} questions to ask")
    return out


def test_what_is_answered_is_not_asked_again(work: Path, undisturbed: Path) -> None:
    before = parts(undisturbed)
    assert len(before) == -(-ROWS // 4)
    assert run(*words(work, undisturbed, "pool.batch_size=1")).startswith(f"0 of {ROWS} questions to ask")
    assert parts(undisturbed) == before
    lost = sorted(before)[2]
    lost.unlink()
    assert run(*words(work, undisturbed)).startswith(f"4 of {ROWS} questions to ask")
    assert {path: when for path, when in parts(undisturbed).items() if path != lost} == {
        path: when for path, when in before.items() if path != lost
    }


def test_damaged_pictures_are_wrong_and_counted(undisturbed: Path) -> None:
    (result,) = Evaluation.read(Store.at(str(undisturbed))).results
    assert result.counts["rows"] == ROWS and result.counts["unanswered: corrupt-image"] == 4
    assert "corrupt-image" in (undisturbed / "results.html").read_text()


@pytest.mark.parametrize("batch", [1, 32])
def test_batches_and_parts_change_no_answer(
    work: Path, undisturbed: Path, batch: int, tmp_path: Path
) -> None:
    run(*words(work, tmp_path, f"pool.batch_size={batch}", "part_rows=32"))
    assert predictions(tmp_path) == predictions(undisturbed)


def test_another_checkpoint_is_asked_anew(work: Path, undisturbed: Path) -> None:
    kept, said = predictions(undisturbed), parts(undisturbed)
    out = run(*words(work, undisturbed, model="other"))
    assert out.startswith(f"{ROWS} of {ROWS} questions to ask")
    assert predictions(undisturbed) != kept and len(parts(undisturbed)) == 2 * len(said)
    run(*words(work, undisturbed))
    assert predictions(undisturbed) == kept


def test_the_digest_is_of_the_content(work: Path, tmp_path: Path) -> None:
    model, tokenizer = load_family("harmon").build(FamilyConfig(), seed=0)
    for folder in (tmp_path / "same", tmp_path / "changed"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1
    assert checkpoint_digest(tmp_path / "same") == checkpoint_digest(work / "model")
    assert checkpoint_digest(tmp_path / "changed") != checkpoint_digest(work / "model")


def test_a_checkpoint_that_can_t_be_loaded_costs_one_line(work: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    for file in (work / "model").iterdir():
        (tmp_path / "broken" / file.name).write_bytes(
            file.read_bytes()[:2000] if "safe" in file.name else file.read_bytes()
        )
    err = io.StringIO()
    command = [*words(work, tmp_path / "out"), f"checkpoint={tmp_path / 'broken'}"]
    with redirect_stdout(io.StringIO()), redirect_stderr(err):
        status = run_command(evaluate.main, "evaluate", EvaluateConfig, "", (), command)
    assert status == 2 and "can't be loaded" in err.getvalue() and err.getvalue().count("\n") == 1


def test_killed_and_started_again_it_asks_only_what_is_missing(
    work: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """SIGKILL of the command itself while answers come in."""
    slow = ("part_rows=1", "pool.batch_size=1")
    command = [sys.executable, "-m", "unimrg.evaluate", *words(work, tmp_path, *slow)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(parts(tmp_path)) < 3:
        assert first.poll() is None
        time.sleep(0.01)
    family = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    _, alive = psutil.wait_procs(family, timeout=180)  # Ray's agents wait a minute for an answer first
    assert not alive, [process.cmdline() for process in alive]
    done = parts(tmp_path)
    assert 3 <= len(done) < ROWS
    again = run(*words(work, tmp_path, *slow))
    assert again.startswith(f"{ROWS - len(done)} of {ROWS} questions to ask")
    assert {path: when for path, when in parts(tmp_path).items() if path in done} == done
    assert predictions(tmp_path) == predictions(undisturbed)


def test_everything_may_lie_in_a_bucket(work: Path, undisturbed: Path, s3_server: S3Server) -> None:
    bucket = Store.at(s3_server.url(), s3_config(s3_server))
    bucket.upload(work / "data", "evaluating/data")
    bucket.upload(work / "model", "evaluating/model")
    said = run(
        *words(work, s3_server.url("evaluating/out")),
        f"data={s3_server.url('evaluating/data')}",
        f"checkpoint={s3_server.url('evaluating/model')}",
        *s3_words(s3_server),
    )
    assert said.startswith(f"{ROWS} of {ROWS} questions to ask")
    stored = bucket.read_bytes("evaluating/out/predictions/VSR-zeroshot.tsv").decode()
    assert stored == predictions(undisturbed)
    assert bucket.exists("evaluating/out/results.html")


def test_scoring_the_written_answers_again_changes_nothing(work: Path, tmp_path: Path) -> None:
    run(*words(work, tmp_path, "benchmarks=[MMVP,VSR]"))
    run(f"predictions={tmp_path / 'predictions'}", f"out={tmp_path / 'again'}")
    first, again = (Evaluation.read(Store.at(str(out))) for out in (tmp_path, tmp_path / "again"))
    assert [result.scores for result in first.results] == [result.scores for result in again.results]
