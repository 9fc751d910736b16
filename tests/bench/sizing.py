"""How many GPU hours labelling and training take: python -m tests.bench.sizing --pictures 1e6 --share 0.35

A model, not a measurement: floating-point operations over peak times the share of it that is reached.
Operations of training are counted by formula (`results/step_recipes_*_meta_*.json`, by tests/bench/step.py),
those of the teachers by torch's counter on the `meta` device. Peaks are data sheets'. The share is a guess.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    SamConfig,
    SamModel,
    SamVisionConfig,
)

from unimrg.hardware import PEAKS

RESULTS = Path(__file__).parent / "results"
POINTS, POINTS_PER_CALL = 32 * 32, 64  # of SAM's mask generator: unimrg.config.SamConfig's defaults
TRAINING_GPUS, TEACHER_GPUS = ("H100", "A100"), ("L40S", "A100")


def training() -> dict[str, float]:
    """Size -> TFLOP a picture of four tasks, forward and backward, frozen codes stored."""
    stored = [
        json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("step_recipes_*_meta_*.json"))
    ]
    return {run["preset"]: run["ours"]["tflop"] for run in stored}


def count(work: Callable[[], object]) -> float:
    """TFLOP of one call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def depth() -> float:
    """TFLOP a picture of Depth Anything V2 Large at 518 pixels."""
    backbone = Dinov2Config(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=518,
        patch_size=14,
        out_indices=[5, 12, 18, 24],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=1024,
        neck_hidden_sizes=[256, 512, 1024, 1024],
        fusion_hidden_size=256,
    )
    with torch.device("meta"):
        model = DepthAnythingForDepthEstimation(config).requires_grad_(False)
        return count(lambda: model(torch.zeros(1, 3, 518, 518)))


def segmentation() -> float:
    """TFLOP a picture of SAM ViT-H: encoded once, decoded for every point of the grid."""
    vision = SamVisionConfig(
        hidden_size=1280,
        num_hidden_layers=32,
        num_attention_heads=16,
        global_attn_indexes=[7, 15, 23, 31],
        mlp_dim=5120,
    )
    with torch.device("meta"):
        model = SamModel(SamConfig(vision_config=vision.to_dict())).requires_grad_(False)
        encode = count(lambda: model.vision_encoder(torch.zeros(1, 3, 1024, 1024)))
        points = {
            "input_points": torch.zeros(1, POINTS_PER_CALL, 1, 2),
            "input_labels": torch.ones(1, POINTS_PER_CALL, 1),
        }
        decode = count(lambda: model(image_embeddings=torch.zeros(1, 256, 64, 64), **points))
    return encode + decode * POINTS / POINTS_PER_CALL


def hours(tflop: float, peak: float, share: float, pictures: float) -> float:
    """GPU hours. peak: TFLOP/s."""
    return tflop * pictures / (peak * share) / 3600


def table(pictures: float, share: float) -> list[str]:
    """Lines of Markdown."""
    peaks = dict(PEAKS)
    lines = [
        "| what | TFLOP a picture | GPU | GPU hours | pictures a second and GPU |",
        "|---|---|---|---|---|",
    ]
    labelling = {"Depth Anything V2 Large": depth(), "SAM ViT-H, 32 x 32 points": segmentation()}
    rows = [(f"label: {name}", tflop, gpu) for name, tflop in labelling.items() for gpu in TEACHER_GPUS]
    rows += [(f"train: {name}", tflop, gpu) for name, tflop in training().items() for gpu in TRAINING_GPUS]
    for name, tflop, gpu in rows:
        rate = peaks[gpu] * share / tflop
        spent = hours(tflop, peaks[gpu], share, pictures)
        lines.append(f"| {name} | {tflop:.2f} | {gpu} | {spent:.1f} | {rate:.1f} |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pictures", type=float, default=1e6)
    parser.add_argument("--share", type=float, default=0.35, help="of the peak that is reached, 0..1")
    options = parser.parse_args()
    print("\n".join(table(options.pictures, options.share)))
