"""How good the small teachers are on scenes they have never seen, and how fast."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch.nn import functional as F

from unimrg.benchmarks.dense import boundary_scores, depth_scores
from unimrg.config import SamConfig
from unimrg.errors import CheckpointError
from unimrg.hardware import device_name
from unimrg.teachers import Teacher
from unimrg.teachers.depth import DepthAnything
from unimrg.teachers.fit.scenes import Scenes
from unimrg.teachers.oracle import oracle_depth, oracle_segmentation
from unimrg.teachers.segmentation import SamBoundaries
from unimrg.teachers.weights import load_processor

FILE = "quality.json"
# Of `boundary_scores`, in diagonals: the project's own for small pictures, and that of Martin et al.
TOLERANCES = {"boundary_f": 0.03, "boundary_f_strict": 0.0075}

Quality = dict[str, float]


def depth_quality(folder: Path, scenes: Scenes) -> Quality:
    """abs_rel and delta1 against the exact depth; `exact_abs_rel` is what eight bits of the truth reach."""
    maps, speed = label(DepthAnything(folder, device="cpu"), scenes)
    scores = [depth_scores(found, depth) for found, depth in zip(maps, scenes.depth, strict=True)]
    exact = [depth_scores(oracle_depth(1 / depth), depth) for depth in scenes.depth]
    return {
        "abs_rel": mean(score.abs_rel for score in scores),
        "delta1": mean(score.delta1 for score in scores),
        "exact_abs_rel": mean(score.abs_rel for score in exact),
        "pictures_per_cpu_second": speed,
    }


def sam_quality(folder: Path, scenes: Scenes, settings: SamConfig) -> Quality:
    """Boundary F of the teacher's maps, and mean IoU of the masks for one point on each object.

    The point is the one farthest from the object's outline (arXiv 2304.02643, section 7.1); `mean_iou` is
    that of the mask the model trusts most, `mean_iou_best` that of the best of its three.
    """
    teacher = SamBoundaries(folder, device="cpu", **asdict(settings))
    maps, speed = label(teacher, scenes)
    truths = [oracle_segmentation(ids) > 0 for ids in scenes.ids]
    found: Quality = {}
    for name, tolerance in TOLERANCES.items():
        pairs = zip(maps, truths, strict=True)
        found[name] = mean(boundary_scores(drawn > 0, truth, tolerance).f for drawn, truth in pairs)
    trusted, best = object_ious(folder, scenes).mean(axis=0)
    return {
        "mean_iou": float(trusted),
        "mean_iou_best": float(best),
        **found,
        "pictures_per_cpu_second": speed,
    }


def label(teacher: Teacher, scenes: Scenes) -> tuple[list[np.ndarray], float]:
    """The teacher's maps, eight pictures a call, and how many it makes in a second of one core."""
    pictures = list(scenes.rgb)
    teacher(pictures[:8])  # the first call allocates
    began, maps = time.process_time(), []
    for start in range(0, len(pictures), 8):
        for found in teacher(pictures[start : start + 8]):
            if not isinstance(found, np.ndarray):
                raise found
            maps.append(found)
    return maps, len(maps) / (time.process_time() - began)


@torch.inference_mode()
def object_ious(folder: Path, scenes: Scenes) -> np.ndarray:
    """IoU with each object of all scenes: the most trusted mask's, the best one's; float64 [objects, 2]."""
    from transformers import SamModel

    model = SamModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    processor = load_processor(folder, "segmentation")
    square, side = model.config.vision_config.image_size, scenes.ids.shape[1]
    found = []
    for rgb, ids in zip(scenes.rgb, scenes.ids, strict=True):
        objects = [ids == k for k in np.unique(ids[ids > 0])]
        points = np.array([centre(mask) for mask in objects]) + 0.5
        prompts = torch.tensor(points * (square / side) - 0.5)[None, :, None].float()
        pixels = processor(images=[rgb], return_tensors="pt")["pixel_values"]
        answer = model(pixel_values=pixels, input_points=prompts, multimask_output=True)
        masks = F.interpolate(answer.pred_masks[0], ids.shape, mode="bilinear").numpy() > 0
        truth = np.stack(objects)[:, None]
        overlaps = (masks & truth).sum(axis=(2, 3)) / (masks | truth).sum(axis=(2, 3))
        trusted = overlaps[np.arange(len(overlaps)), answer.iou_scores[0].argmax(dim=1).numpy()]
        found.append(np.stack([trusted, overlaps.max(axis=1)], axis=1))
    return np.concatenate(found)


def centre(mask: np.ndarray) -> tuple[int, int]:
    """The pixel (x, y) of a bool mask [H, W] that is farthest from all outside it."""
    y, x = np.unravel_index(distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1].argmax(), mask.shape)
    return int(x), int(y)


def mean(values: Any) -> float:
    return float(np.mean(list(values)))


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Begins `quality.json` with how the weights were made."""
    (folder / FILE).write_text(json.dumps(facts, indent=1) + "\n")


def report(folder: Path, measure: Callable[[Path], Quality], unseen: int) -> str:
    """Measures what lies in the folder and writes it into its `quality.json`, whose text it gives."""
    if not (folder / FILE).exists():
        raise CheckpointError(f"{folder} holds no {FILE}; train a teacher into it first")
    made = json.loads((folder / FILE).read_text())
    measured = {
        "unseen_scenes": unseen,
        **{name: round(value, 4) for name, value in measure(folder).items()},
        "bytes": (folder / "model.safetensors").stat().st_size,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{device_name()}, one thread",
        "torch": torch.__version__,
    }
    write_facts(folder, {**made, "quality": measured})
    return (folder / FILE).read_text()
