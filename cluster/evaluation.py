"""Benchmarks' questions answered by a checkpoint, on all GPUs of the cluster or by two processes of a laptop.

    number of a part ─► an actor: its questions from the desk ─► decode ─► the family's `answer` ─► store

A part is visible only when it is complete, and its content depends on its questions and the settings in its
folder's name alone: whatever dies in between, a second run asks only what isn't stored.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import Dataset
from tqdm import tqdm

from cluster.pipeline import set_context
from cluster.session import gpus_of_cluster, on_this_node, ray_session, root_cause
from cluster.teachers import add_actors
from unimrg.benchmarks.understanding.asking import Settings, answered_rows, ask, to_table
from unimrg.benchmarks.understanding.files import File, question_files
from unimrg.benchmarks.understanding.questions import Question, QuestionSet, read_questions
from unimrg.benchmarks.understanding.registry import Benchmark, find
from unimrg.benchmarks.understanding.tsv import Row
from unimrg.config import DataConfig, EvaluateConfig, PoolConfig
from unimrg.data.label_store import Parts
from unimrg.errors import UnimrgError
from unimrg.families import family_of, load_trained
from unimrg.storage import S3Config, Store
from unimrg.weights import absolute, fetch

CPU_ACTORS = 2
"""Actors where there is no GPU: each holds the whole model in memory."""

DESCRIPTIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Job:
    """One benchmark to ask. asked: its questions without their pictures."""

    settings: Settings
    file: File
    asked: QuestionSet
    parts: Parts

    def questions_of(self, part: int) -> Sequence[Question]:
        return _slice(self.asked.questions, part, self.settings)

    def lacking(self) -> list[int]:
        """Numbers of the parts that aren't stored."""
        count = -(-len(self.asked.questions) // self.settings.part_rows)
        return sorted(set(range(count)) - self.parts.done())


@dataclass(frozen=True)
class Answered:
    """A benchmark's rows with `prediction` and `error`, and what they were made of."""

    settings: Settings
    asked: QuestionSet
    rows: list[Row]


@dataclass(frozen=True)
class Model:
    """What the actors load, from where, and how many of them."""

    checkpoint: str
    s3: S3Config
    pool: PoolConfig


def load_model(model: Model) -> tuple[Any, Any, int]:
    """What an actor works with: model, processor and side of a picture, on its GPU where it has one."""
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // model.pool.max_actors))
    folder = fetch("checkpoint", model.checkpoint, model.s3)
    device = torch.device("cuda" if on_gpu else "cpu")
    return load_trained(folder, device, getattr(torch, model.pool.dtype))


def answer_all(config: EvaluateConfig, wanted: Sequence[Benchmark]) -> list[Answered]:
    """Ask what isn't stored yet below `config.out`; all answers of the benchmarks wanted, in their order.

    Raises UnimrgError of one sentence for files and checkpoints that can't be used, before anything is asked.
    """
    s3 = config.s3.store()
    files = question_files(config.data, s3, wanted)
    folder = fetch("checkpoint", config.checkpoint, s3)
    family_of(folder)  # else the first to say that there is no model would be an actor
    Store.at(config.out, s3).check_writable()
    digest = checkpoint_digest(folder)
    with ray_session() as logs:
        pool = settled(config.pool, gpus_of_cluster())
        jobs = [open_job(config, find(name), file, digest, pool.dtype) for name, file in files.items()]
        _run(jobs, Model(absolute(config.checkpoint, s3), s3, pool), logs)
    return [Answered(j.settings, j.asked, answered_rows(j.asked.questions, j.parts)) for j in jobs]


def settled(pool: PoolConfig, gpus: int) -> PoolConfig:
    """The pool with all that depends on the cluster put in."""
    dtype = ("bfloat16" if gpus else "float32") if pool.dtype == "auto" else pool.dtype
    if gpus:
        return replace(pool, dtype=dtype)
    actors = pool.max_actors or max(CPU_ACTORS, pool.min_actors)
    return replace(pool, dtype=dtype, min_actors=actors, max_actors=actors)


def checkpoint_digest(folder: Path) -> str:
    """sha256 over the contents of a model's weights and of the files that say how to use them."""
    total = hashlib.sha256()
    files = [*sorted(folder.glob("*.safetensors")), *(folder / name for name in DESCRIPTIONS)]
    for path in files:
        if path.is_file():
            total.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    total.update(block)
    return total.hexdigest()


def open_job(config: EvaluateConfig, benchmark: Benchmark, file: File, checkpoint: str, dtype: str) -> Job:
    """What there is to ask of a benchmark, and where its answers go. Raises DataError, StorageError."""
    asked = read_questions(file.read(), file.url, config.strict)
    settings = Settings(
        benchmark.name,
        checkpoint,
        asked.sha256,
        config.instruction if benchmark.is_choice else "",
        config.strict,
        config.max_new_tokens or benchmark.max_new_tokens,
        dtype,
        config.part_rows,
    )
    # The desk has the pictures; here they would only take memory.
    bare = tuple(replace(question, pictures=()) for question in asked.questions)
    parts = settings.parts(Store.at(config.out, config.s3.store()))
    return Job(settings, file, replace(asked, questions=bare), parts)


def _run(jobs: Sequence[Job], model: Model, logs: str) -> None:
    lacking = [(number, part) for number, job in enumerate(jobs) for part in job.lacking()]
    total = sum(len(job.asked.questions) for job in jobs)
    left = sum(len(jobs[number].questions_of(part)) for number, part in lacking)
    print(f"{left} of {total} questions to ask; Ray's logs: {logs}", flush=True)
    if not lacking:
        return
    try:
        with tqdm(total=total, initial=total - left, unit="question", disable=None) as bar:
            answering = _answering(jobs, lacking, model)
            for batch in answering.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                bar.update(sum(batch["asked"].to_pylist()))
    except UnimrgError as error:
        raise root_cause(error) from None


def _answering(jobs: Sequence[Job], lacking: Sequence[tuple[int, int]], model: Model) -> Dataset:
    set_context(DataConfig())
    desk = ray.remote(_Desk).options(num_cpus=0, max_concurrency=16, scheduling_strategy=on_this_node())
    places = [(job.settings, job.file.folder, job.parts) for job in jobs]
    arguments = (places, desk.remote([(job.settings, job.file) for job in jobs]), model)
    items = [{"job": number, "part": part} for number, part in lacking]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    return add_actors(dataset, Ask, arguments, no_idle(model.pool, len(items)), unit=1, trainers=0)


def no_idle(pool: PoolConfig, parts: int) -> PoolConfig:
    """No more actors than parts; 0 stays what the cluster has room for."""
    return replace(pool, min_actors=min(pool.min_actors, parts), max_actors=min(pool.max_actors, parts))


def _slice(questions: Sequence[Question], part: int, settings: Settings) -> Sequence[Question]:
    return questions[part * settings.part_rows : (part + 1) * settings.part_rows]


class _Desk:
    """Hands out questions with their pictures; the files are read on the driver's node, once."""

    def __init__(self, files: Sequence[tuple[Settings, File]]) -> None:
        self.sets = [read_questions(file.read(), file.url, s.strict).questions for s, file in files]
        self.settings = [settings for settings, _ in files]

    def questions(self, job: int, part: int) -> Sequence[Question]:
        return _slice(self.sets[job], part, self.settings[job])


class Ask:
    """An actor that answers parts and stores them.

    places: of every job the settings, the folder where paths of pictures start, and the store of its parts.
    """

    def __init__(self, places: Sequence[tuple[Settings, Store, Parts]], desk: Any, model: Model) -> None:
        self.places, self.desk, self.model = list(places), desk, model

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any, int]:
        """Model, processor and side of a picture. Loaded late: Ray hides what goes wrong in a constructor."""
        return load_model(self.model)

    def __call__(self, table: pa.Table) -> pa.Table:
        ((number, part),) = ((item["job"], item["part"]) for item in table.to_pylist())
        settings, folder, parts = self.places[number]
        questions = ray.get(self.desk.questions.remote(number, part))
        replies = ask(*self.loaded, questions, settings, folder, self.model.pool.batch_size)
        parts.write(part, to_table(part * settings.part_rows, replies))
        return pa.table({"asked": [len(questions)]})
