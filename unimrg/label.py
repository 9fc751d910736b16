"""Run the teachers over a data set once and store what they say.

    python -m unimrg.label data=llava data.manifest=s3://bucket/mix.json teachers=depth_anything_sam out=s3://bucket/labels

Train with them by `teachers=stored teachers.stored=s3://bucket/labels`.
"""

from __future__ import annotations

import sys

from unimrg.compose import run_command
from unimrg.config import LabelConfig


def main(config: LabelConfig) -> int:
    """Hand the work to Ray."""
    from cluster.labeler import run

    return run(config)


if __name__ == "__main__":
    sys.exit(
        run_command(
            main,
            "label",
            LabelConfig,
            "Run the teachers over a data set once and store depth maps and region boundaries.",
            [
                "python -m unimrg.label out=labels",
                "python -m unimrg.label data=llava data.manifest=s3://bucket/mix.json out=s3://bucket/labels "
                "teachers=depth_anything_sam",
                "python -m unimrg.train data=llava data.manifest=s3://bucket/mix.json teachers=stored "
                "teachers.stored=s3://bucket/labels",
            ],
        )
    )
