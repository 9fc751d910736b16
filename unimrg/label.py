"""Run the teachers over a data set once and store what they say.

    python -m unimrg.label data=llava data.manifest=s3://bucket/mix.json teachers=depth_anything_sam \
        labels.store=s3://bucket/labels
    python -m unimrg.label --status labels.store=s3://bucket/labels

Train on them with the same `data`, `teachers` and `labels.store`. A second run does only what is missing.
"""

from __future__ import annotations

import sys

from unimrg.compose import run_command
from unimrg.config import LabelConfig
from unimrg.data.label_store import LabelStore, find_all
from unimrg.errors import DataError
from unimrg.storage import Store

STATUS = "--status"


def main(config: LabelConfig) -> int:
    """Hand the work to Ray."""
    from cluster.label_job import run

    return run(config)


def show_status(config: LabelConfig) -> int:
    """Print how far every store below `labels.store` is. Raises DataError when there is none."""
    place = config.labels.store or f"{config.storage_path.rstrip('/')}/labels"
    stores = find_all(Store.at(place, config.s3.store()))
    if not stores:
        raise DataError(f"no label store below {place}; name the folder given to labels.store")
    for store in stores:
        print("\n".join(describe(store)))
    return 0


def describe(store: LabelStore) -> list[str]:
    """Lines about a store: what it is, how far, how fast, how long yet, what was skipped and why."""
    status = store.status()
    share = status.rows_done / max(status.rows, 1)
    lines = [
        store.store.url,
        f"  teachers     depth {_who(store, 'depth')}, segmentation {_who(store, 'segmentation')}",
        f"  labels       {status.rows_done} of {status.rows} rows ({share:.1%}), "
        f"{status.parts_done} of {status.parts} parts",
    ]
    for name, parts in status.codes.items():
        lines.append(f"  codes        {parts} of {status.parts} parts by {name}")
    if status.rate is not None and status.idle is not None:
        lines.append(f"  rate         {status.rate:.1f} rows/s, last part written {_time(status.idle)} ago")
    if status.left:
        lines.append(f"  time left    {_time(status.left)} at that rate")
    total = sum(status.reasons.values())
    reasons = ", ".join(f"{reason} {count}" for reason, count in status.reasons.items())
    lines.append(f"  quarantined  {total} rows{': ' + reasons if reasons else ''}")
    return lines


def _who(store: LabelStore, name: str) -> str:
    identity = store.key["teachers"][name]
    weights = identity.get("weights", "")
    return f"{identity['name']} {weights[:12]}".strip()


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(
        run_command(
            show_status if STATUS in words else main,
            "label",
            LabelConfig,
            "Run the teachers over a data set once and store depth maps and region boundaries. "
            f"{STATUS} shows how far the stores below labels.store are.",
            [
                "python -m unimrg.label labels.store=labels",
                "python -m unimrg.label data=llava data.manifest=s3://bucket/mix.json "
                "teachers=depth_anything_sam labels.store=s3://bucket/labels",
                "python -m unimrg.label --status labels.store=s3://bucket/labels",
                "python -m unimrg.train data=llava data.manifest=s3://bucket/mix.json "
                "teachers=depth_anything_sam labels.store=s3://bucket/labels labels.mode=cached",
            ],
            [word for word in words if word != STATUS],
        )
    )
