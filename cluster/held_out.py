"""The held-out part of a run: which pictures and questions, and scoring them on the cluster."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from cluster.pipeline import image_side, open_manifest, open_sources
from cluster.teachers import make_teacher
from cluster.worker import MODEL, run_store
from unimrg.benchmarks.held_out import Question, ask, draw_all, score_drawings, write_pictures
from unimrg.config import FamilyConfig, RunConfig, from_plain, to_plain
from unimrg.data.order import split_held_out
from unimrg.data.stages import Fetch, Render, Teach
from unimrg.families import load_family
from unimrg.families.base import DrawOptions, Family
from unimrg.sample import IMAGE_TASKS, Sample
from unimrg.weights import localized


def compare(config: RunConfig, folder: Path, gpus: int) -> None:
    """Score the weights a run started from and those it ended with; writes `held_out/` into `folder`."""
    samples, questions = load_held_out(config)
    if not samples:
        return
    shown = [sample for sample in samples if sample.image is not None][: config.report.images]
    truth = {"image": [s.image for s in shown if s.image is not None]}
    for task in ("depth", "segmentation"):
        truth[task] = [s.targets[t] for s in shown for t in IMAGE_TASKS if t == task and t in s.targets]
    write_pictures(folder / "held_out" / "truth", truth)
    score = ray.remote(_score).options(num_gpus=min(gpus, 1), num_cpus=1)
    plain, shared = to_plain(config), ray.put((samples, questions))
    with ThreadPoolExecutor(2) as pool:
        runs = {when: pool.submit(ray.get, score.remote(plain, shared, when)) for when in ("before", "after")}
        for when, run in runs.items():
            result, drawings = run.result()
            place = folder / "held_out"
            (place / f"{when}.json").write_text(json.dumps(result, indent=1))
            write_pictures(place / when, {task.value: pictures for task, pictures in drawings.items()})


def load_held_out(config: RunConfig) -> tuple[list[Sample], list[Question]]:
    """Held-out samples in training geometry, and questions about them in the manifest's order.

    The pictures are taken first; entries that can't be read are left out.
    """
    url = config.data.held_out or config.data.places()[0]
    manifest = open_manifest(url, config.s3, group_by_image=False)
    indices = np.arange(len(manifest))
    if not config.data.held_out:
        grouped = open_manifest(url, config.s3, config.data.group_by_image)
        kept = split_held_out(len(grouped), config.split_seed, config.data.held_out_count)[1]
        names = set(grouped.rows(kept)["image"].to_pylist()) - {None}
        indices = np.array(
            [i for i, name in enumerate(manifest.rows(indices)["image"].to_pylist()) if name in names]
        )
    rows = manifest.rows(indices[: 8 * max(config.report.questions, config.report.images)])
    rows = rows.filter(pa.compute.is_valid(rows["image"]))
    firsts: dict[str, int] = {}
    for number, name in enumerate(rows["image"].to_pylist()):
        firsts.setdefault(name, number)
    wanted = rows.take(list(firsts.values()))
    samples = _prepare(config, wanted)
    return samples, _questions(
        config, rows.to_pylist(), samples, wanted["image"].to_pylist(), wanted["id"].to_pylist()
    )


def _prepare(config: RunConfig, rows: pa.Table) -> list[Sample]:
    """Fetch, label and render a few rows here, without a pipeline."""
    table = rows.append_column("position", pa.array(np.arange(len(rows))))
    sources = open_sources(config, config.data.held_out)
    table = Fetch(sources, config.data)(table)
    for name in ("depth", "segmentation"):
        if getattr(sources, name) not in ("", "none", "oracle", "stored"):
            # Only what is shown needs labels; teachers are slow without a GPU.
            teach = Teach(name, functools.partial(make_teacher, name, config.teachers))
            some = teach(table.slice(0, config.report.images))
            table = pa.concat_tables([some, table.slice(config.report.images)])
    table = Render(image_side(config), config.data.geometry)(table)
    return [Sample.from_row(row) for row in table.to_pylist() if not row["error"]]


def _questions(
    config: RunConfig, rows: list[dict[str, Any]], samples: list[Sample], images: list[str], ids: list[str]
) -> list[Question]:
    place = {sample.position: number for number, sample in enumerate(samples)}
    of_image = {image: place[k] for k, image in enumerate(images) if k in place}
    questions = []
    for row in rows:
        if row["error"] or row["image"] not in of_image:
            continue
        question, answer = json.loads(row["conversations"])[0][0]
        extras = {name: row.get(name) for name in ("family", "pair", "conflict")}
        questions.append(Question(row["id"], of_image[row["image"]], question, answer, **extras))
    return questions[: config.report.questions]


def _score(plain: dict[str, Any], shared: tuple[list[Sample], list[Question]], when: str) -> tuple[Any, Any]:
    """Runs in a Ray task: one model, all held-out pictures."""
    config = from_plain(plain)
    samples, questions = shared
    model, tokenizer = model_of(config, trained=when == "after")
    tasks = config.weights.active()
    processor = load_family(config.family.name).processor(model, tokenizer, config.train, tasks, config.seed)
    shown = [sample for sample in samples if sample.image is not None][: config.report.images]
    options = DrawOptions(iterations=config.report.draw_iterations, seed=config.seed)
    drawings = draw_all(model, processor, shown, tasks, options)
    result = {
        "questions": ask(model, processor, samples, questions, config.report.max_new_tokens),
        "drawings": score_drawings(shown, drawings),
    }
    return result, drawings


def model_of(config: RunConfig, trained: bool) -> tuple[Family, Any]:
    """The model a run started from, or the one it ended with, on this machine's device; and its tokenizer."""
    torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
    family, weights = load_family(config.family.name), config.family
    folder = Path(tempfile.mkdtemp(prefix="unimrg-score-"))
    try:
        if trained:
            run_store(config).download(MODEL, folder)
            weights = FamilyConfig(weights.name, weights.variant, str(folder))
        with localized(weights, config.s3.store()) as local:
            model, tokenizer = family.build(local, config.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval(), tokenizer
