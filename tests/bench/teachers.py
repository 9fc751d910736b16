"""How many pictures a second the teachers label, beside the plain recipe in one run: prints one JSON line.

    python -m tests.bench.teachers
    python -m tests.bench.teachers --device cuda --depth depth-anything/Depth-Anything-V2-Large-hf \\
        --sam facebook/sam-vit-huge --sam2 facebook/sam2.1-hiera-large

The plain recipe labels one picture after the other in float32: transformers' depth pipeline, and the mask
generator of `tests/reference_sam.py`, which draws all masks of 64 points at full size. Ours runs as the
labelling job runs it, a list of pictures at a time. Times are medians of interleaved repetitions after one
that warms up (and compiles); a ratio is the median of the repetitions' own ratios, above 1 where ours is
faster; on a GPU the one of CPU time says little.

`tiny` is a model of a few thousand random weights. A published checkpoint that can't be fetched is replaced
by random weights of its size, and the line says so. Random weights answer with masks all over the picture:
their scores are shifted so that a third of the masks is sure, a threshold so that a tenth of those is drawn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from tests import tiny_teachers
from tests.bench import published_sizes
from tests.reference_sam import PlainSam
from unimrg.benchmarks.dense import boundary_scores
from unimrg.errors import CheckpointError
from unimrg.hardware import device_name
from unimrg.teachers.depth import DepthAnything
from unimrg.teachers.masks import stability
from unimrg.teachers.segmentation import SamBoundaries
from unimrg.teachers.weights import find_folder

Label = Callable[[list[np.ndarray]], Sequence[Any]]
ASPECTS = ((3, 4), (4, 3), (3, 4), (1, 1), (2, 3), (3, 4), (9, 16), (3, 4))  # height : width, COCO's mostly


def pictures(count: int, side: int) -> list[np.ndarray]:
    """Smooth colourful pictures of mixed aspects, their long side `side` pixels."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        aspect = ASPECTS[number % len(ASPECTS)]
        height, width = (side * part // max(aspect) for part in aspect)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3)).astype(np.uint8))
        found.append(np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)))
    return found


def folder_of(checkpoint: str, kind: str, scratch: Path) -> tuple[Path, str]:
    """Where the weights are, and what they are: tiny, published, or random of the published size."""
    target = scratch / kind
    if checkpoint == "tiny":
        return getattr(tiny_teachers, f"make_{kind}")(target), "tiny"
    try:
        return find_folder(checkpoint, kind), "published"
    except CheckpointError:
        published_sizes.MAKERS[checkpoint](target)
        return target, "random"


def depth(folder: Path, options: argparse.Namespace) -> tuple[Label, Label]:
    """Ours and the plain recipe."""
    from transformers import pipeline

    ours = DepthAnything(folder, options.device, options.dtype, batch_size=options.batch_size)
    plain = pipeline("depth-estimation", model=str(folder), device=options.device, dtype=torch.float32)
    return ours, lambda images: [np.asarray(plain(Image.fromarray(image))["depth"]) for image in images]


def segmentation(
    folder: Path, random: bool, images: list[np.ndarray], options: argparse.Namespace
) -> tuple[Label, Label, list[int]]:
    """Ours, the plain recipe, and where it notes how many masks it drew in each picture."""
    given: dict[str, Any] = {"points_per_side": options.points_per_side}
    if random:
        given |= settle_scores(folder, images[0], options)
    ours = SamBoundaries(
        folder,
        options.device,
        options.dtype,
        points_per_batch=options.points_per_batch,
        images_per_batch=options.images_per_batch,
        **given,
    )
    shared = ("pred_iou_thresh", "stability_score_thresh", "box_nms_thresh")
    rules = {key: getattr(ours.rules, key) for key in shared}
    plain = PlainSam(folder, options.device, points_per_side=options.points_per_side, **rules)
    masks: list[int] = []

    def recipe(images: list[np.ndarray]) -> list[np.ndarray]:
        labels = []
        for image in images:
            labels.append(plain(image))
            masks.append(plain.kept)
        return labels

    return ours, recipe, masks


@torch.inference_mode()
def settle_scores(folder: Path, image: np.ndarray, options: argparse.Namespace) -> dict[str, float]:
    """Shifts the predicted IoUs so that a third is sure; gives thresholds that a tenth of those passes."""
    teacher = SamBoundaries(folder, options.device, "float32", points_per_side=8, compile=False)
    sam, sure = teacher.sam, teacher.sam.pred_iou_thresh
    pixels, geometry = teacher._prepare(image)
    features = sam.encode(pixels[None])
    head = sam.model.mask_decoder.iou_prediction_head
    scores = sam.answer(features, sam.points(8, geometry)[None]).scores
    raw, goal = (
        (torch.logit(scores), float(np.log(sure / (1 - sure)))) if head.sigmoid_output else (scores, sure)
    )
    head.proj_out.weight *= 0.05 / raw.std()
    head.proj_out.bias *= 0.05 / raw.std()
    head.proj_out.bias += goal - (raw * 0.05 / raw.std()).quantile(2 / 3)
    answers = sam.answer(features, sam.points(8, geometry)[None])
    chosen = (answers.scores > sure).any(dim=2).nonzero()
    logits = sam.draw(features, answers, chosen)[answers.scores[chosen[:, 0], chosen[:, 1]] > sure]
    scored = torch.cat([stability(full, 0.0, 1.0) for full in teacher._full_size(logits, geometry)])
    sam.model.float().save_pretrained(folder)
    return {"stability_score_thresh": float(scored.nan_to_num(0).quantile(0.9)), "box_nms_thresh": 1.0}


def measure(
    ours: Label, plain: Label, images: list[np.ndarray], repetitions: int
) -> tuple[dict[str, Any], Any, Any]:
    """Pictures a second of both, and their labels."""
    ways = {"ours": ours, "plain": plain}
    labels = {way: label(images) for way, label in ways.items()}  # warms up
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(repetitions):
        for way, label in ways.items():
            start = time.perf_counter(), time.process_time()
            label(images)
            taken[way].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    found: dict[str, Any] = {
        "images_per_second": {
            way: round(len(images) / statistics.median(t for t, _ in taken[way]), 3) for way in ways
        }
    }
    for clock, name in enumerate(("ratio", "cpu_ratio")):
        pairs = zip(taken["plain"], taken["ours"], strict=True)
        found[name] = round(statistics.median(slow[clock] / fast[clock] for slow, fast in pairs), 3)
    return found, labels["ours"], labels["plain"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--depth", default="tiny", help="tiny, a hub id, a folder, or none")
    parser.add_argument("--sam", default="tiny", help="tiny, a hub id, a folder, or none")
    parser.add_argument("--sam2", default="tiny", help="tiny, a hub id, a folder, or none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="of ours: auto, float32, bfloat16, float16")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--side", type=int, default=160, help="of the pictures, the long one, in pixels")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures in one pass of the depth model")
    parser.add_argument("--points-per-side", type=int, default=16)
    parser.add_argument("--points-per-batch", type=int, default=64)
    parser.add_argument("--images-per-batch", type=int, default=4, help="pictures encoded at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    images = pictures(options.images, options.side)
    results: dict[str, Any] = {}
    with TemporaryDirectory() as scratch:
        if options.depth != "none":
            folder, weights = folder_of(options.depth, "depth_anything", Path(scratch))
            speed, ours, plain = measure(*depth(folder, options), images, options.repetitions)
            error = np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(ours, plain, strict=True)])
            results["depth"] = speed | {"weights": weights, "mean_difference_of_255": round(float(error), 3)}
        for kind in ("sam", "sam2"):
            if getattr(options, kind) != "none":
                folder, weights = folder_of(getattr(options, kind), kind, Path(scratch))
                teacher, recipe, masks = segmentation(folder, weights != "published", images, options)
                speed, ours, plain = measure(teacher, recipe, images, options.repetitions)
                scores = [boundary_scores(a > 0, b > 0, 0.003).f for a, b in zip(ours, plain, strict=True)]
                agreement = {
                    "boundary_f": round(float(np.mean(scores)), 4),
                    "masks_a_picture": float(np.mean(masks)),
                }
                results[kind] = speed | {"weights": weights} | agreement
    device = device_name(options.device)
    about = {"torch": torch.__version__, "hardware": device, "date": date.today().isoformat()}
    print(json.dumps(vars(options) | {"results": results} | about))


if __name__ == "__main__":
    main()
