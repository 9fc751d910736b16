"""A made-up run's folder for looking at the report: `python tests/fake_run.py outputs/made-up`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {"red": (205, 60, 50), "green": (60, 150, 80), "blue": (60, 90, 190), "yellow": (220, 180, 60)}
KINDS = {
    "counting": "Are there more {first} balls than {second} ones?",
    "in front": "Is the {first} ball in front of the {second} ball?",
    "left of": "Is the {first} ball left of the {second} ball?",
    "nearer": "Which is nearer to the camera: is it the {first} ball rather than the {second} one?",
    "occlusion": "Is the {first} ball partly hidden by the {second} ball?",
}


def make_run(
    folder: Path, steps: int = 600, questions: int = 240, images: int = 5, side: int = 96, seed: int = 0
) -> Path:
    """Write every file a run leaves behind, with a resumed fault, bad samples and a model that got better."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    write_lines(folder / "metrics.jsonl", [step_record(k, steps, generator) for k in range(1, steps + 1)])
    write_lines(folder / "events.jsonl", events(steps))
    write_lines(folder / "quarantine.jsonl", quarantine())
    drawings = write_pictures(folder / "held_out", images, side, generator)
    for name, quality in (("before", 0.55), ("after", 0.68)):
        asked = ask(
            questions, quality, np.random.default_rng(seed + 1), np.random.default_rng(seed + len(name))
        )
        stored = {"questions": asked, "drawings": drawings[name]}
        (folder / "held_out" / f"{name}.json").write_text(json.dumps(stored))
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def step_record(step: int, steps: int, generator: np.random.Generator) -> dict[str, Any]:
    part = step / steps
    start = {"understanding": 2.9, "pixel": 0.92, "depth": 1.05, "segmentation": 0.81}
    low = {"understanding": 0.62, "pixel": 0.51, "depth": 0.33, "segmentation": 0.36}
    losses = {
        t: low[t] + (start[t] - low[t]) * np.exp(-5 * part) * generator.lognormal(0, 0.16) for t in start
    }
    slow = 0.35 if 0.6 < part < 0.66 else 0.03
    record: dict[str, Any] = {"step": step, "epoch": round(part * 2, 4), "position": step * 128}
    record |= {f"loss/{task}": float(loss * generator.lognormal(0, 0.08)) for task, loss in losses.items()}
    record["loss/total"] = float(np.mean(list(losses.values())))
    if step % 4 == 0:
        record["loss/segmentation"] = None
    speed = float(412 * (1 - slow) * generator.normal(1, 0.03))
    return record | {
        "grad_norm": float(3 * np.exp(-3 * part) * generator.lognormal(0, 0.3) + 0.4),
        "learning_rate": 1e-5 * min(1.0, step / 50) * float(0.5 + 0.5 * np.cos(np.pi * part)),
        "samples_per_second": speed,
        "tokens_per_second": speed * 1180,
        "step_seconds": 128 / speed,
        "model_tflops": speed * 0.4,
        "mfu": speed * 0.4 / 312,
        "data_wait_share": float(np.clip(slow + generator.normal(0, 0.01), 0, 1)),
        "skipped": int(part * 23),
        "skipped/corrupt-image": int(part * 14),
        "skipped/missing-file": int(part * 6),
        "skipped/teacher-failed": int(part * 3),
        "time_left_seconds": (steps - step) * 128 / speed,
        "timestamp": 1_790_000_000 + step * 0.33 + (40 if step > steps // 2 else 0),
    }


def events(steps: int) -> list[dict[str, Any]]:
    half, start = steps // 2, 1_790_000_000
    rows = [
        (0, 0, "start", {"command": "python -m unimrg.train experiment=scenes seed=7", "workers": 8}),
        (60, half - 20, "checkpoint", f"checkpoints/{half - 20}"),
        (70, half, "worker-failure", "worker 3 was preempted; 7 of 8 left"),
        (100, half, "resume", f"from step {half - 20} with 8 workers"),
        (steps * 0.33 + 40, steps, "checkpoint", f"checkpoints/{steps}"),
        (steps * 0.33 + 41, steps, "finish", f"{steps} steps"),
    ]
    return [{"timestamp": start + t, "step": s, "event": e, "detail": d} for t, s, e, d in rows]


def quarantine() -> list[dict[str, Any]]:
    reasons = ["corrupt-image"] * 14 + ["missing-file"] * 6 + ["teacher-failed"] * 3
    details = {
        "corrupt-image": "image file is truncated (48 bytes not processed)",
        "missing-file": "no object at images/000421.jpg",
        "teacher-failed": "depth: out of memory at 4096 x 4096",
    }
    return [
        {"id": f"scene-{17 * k:05d}", "position": 977 * k, "reason": r, "detail": details[r]}
        for k, r in enumerate(reasons)
    ]


def ask(
    amount: int, quality: float, scenes: np.random.Generator, luck: np.random.Generator
) -> list[dict[str, Any]]:
    """Yes/no questions in pairs with opposite answers; `scenes` draws the questions, `luck` the answers."""
    rows = []
    for k in range(amount):
        kind = list(KINDS)[k // 2 % len(KINDS)]
        first, second = scenes.choice(list(COLOURS), 2, replace=False)
        answer = "Yes" if k % 2 == 0 else "No"
        right = bool(luck.random() < quality)
        rows.append(
            {
                "id": f"q{k:04d}",
                "question": KINDS[kind].format(first=first, second=second),
                "answer": answer,
                "prediction": answer if right else {"Yes": "No", "No": "Yes"}[answer],
                "correct": right,
                "family": kind,
                "pair": f"p{k // 2:04d}",
                "conflict": bool(scenes.random() < 0.3),
            }
        )
    return rows


def write_pictures(
    folder: Path, images: int, side: int, generator: np.random.Generator
) -> dict[str, list[dict[str, Any]]]:
    """Truth, a poor drawing and a good one of each scene; gives back the scores of both."""
    rows: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
    for k in range(images):
        truth = scene(side, generator)
        save(folder / "truth" / str(k), truth)
        for name, noise, psnr in (("before", 70.0, 14.2), ("after", 14.0, 23.8)):
            drawn = {
                t: np.clip(p + generator.normal(0, noise, p.shape), 0, 255).astype(np.uint8)
                for t, p in truth.items()
            }
            drawn["pixel"] = drawn.pop("image")
            save(folder / name / str(k), drawn)
            wobble = generator.normal(0, 0.02)
            scores = {
                "pixel_psnr": psnr + 40 * wobble,
                "pixel_ssim": 0.3 + psnr / 50 + wobble,
                "depth_absrel": 3 / psnr + wobble,
            }
            rows[name].append(
                {"k": k, **scores, "depth_delta1": psnr / 26 + wobble, "segmentation_f": psnr / 30 + wobble}
            )
    return rows


def save(folder: Path, pictures: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.png")


def scene(side: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Balls on a floor: RGB, inverse depth and boundaries."""
    down, right = np.mgrid[0:side, 0:side] / side
    depth = np.clip((down - 0.35) * 1.6, 0, 1)
    floor = np.where(down > 0.35, 165 - 40 * down, 205 + 60 * down)
    image = np.repeat(floor[..., None], 3, 2)
    owner = (down > 0.35).astype(int)
    for k in np.argsort(near := generator.uniform(0.35, 0.85, 4)):
        radius, middle = 0.22 * near[k], generator.uniform(0.15, 0.85)
        across = ((right - middle) ** 2 + (down - near[k]) ** 2) / radius**2
        inside = across < 1
        light = 0.45 + 0.55 * np.sqrt(np.clip(1 - across, 0, 1)) * np.clip(
            1.2 - (right - middle) - (down - near[k]), 0, 1.2
        )
        image[inside] = (np.array(list(COLOURS.values())[k]) * light[..., None])[inside]
        depth[inside] = near[k] + 0.15 * np.sqrt(1 - across[inside])
        owner[inside] = k + 2
    edge = np.zeros((side, side), bool)
    edge[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    edge[1:] |= owner[1:] != owner[:-1]
    grey = (np.clip(depth, 0, 1) * 255).astype(np.uint8)
    return {
        "image": np.clip(image, 0, 255).astype(np.uint8),
        "depth": grey,
        "segmentation": (edge * 255).astype(np.uint8),
    }


CONFIG = """\
family:
  name: harmon
  variant: tiny
data:
  source: s3://scenes/train
  access_key: AKIA-NOT-A-REAL-ONE
optimiser:
  learning_rate: 1.0e-05
  weight_decay: 0.02
weights: {understanding: 1.0, pixel: 1.0, depth: 1.0, segmentation: 1.0}
steps: 600
seed: 7
"""

if __name__ == "__main__":
    print(make_run(Path(sys.argv[1])))
