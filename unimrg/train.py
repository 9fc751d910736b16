"""Post-train a unified multimodal model on understanding, pixel, depth and segmentation.

python -m unimrg.train                                   # the tiny model on procedural scenes
python -m unimrg.train data.manifest=s3://bucket/mix.json train.steps=1000
"""

from __future__ import annotations

import sys

from unimrg.compose import run_command
from unimrg.config import RunConfig


def main(config: RunConfig) -> int:
    """Hand the run to Ray."""
    from cluster.trainer import run

    return run(config)


if __name__ == "__main__":
    sys.exit(
        run_command(
            main,
            "train",
            RunConfig,
            "Post-train a unified multimodal model on four tasks: understanding, pixel, depth, segmentation.",
            [
                "python -m unimrg.train",
                "python -m unimrg.train train.steps=1000 weights.depth=0.5",
                "python -m unimrg.train data=llava data.manifest=s3://bucket/mix.json "
                "storage_path=s3://bucket/runs name=first",
            ],
        )
    )
