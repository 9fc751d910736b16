"""The drawings of held-out images, before and after, as pictures and as scores."""

from __future__ import annotations

import base64
import io
import math
import statistics
from pathlib import Path

from PIL import Image

from unimrg.benchmarks.intervals import paired_bootstrap
from unimrg.report.charts import difference_chart
from unimrg.report.comparison import FEW
from unimrg.report.folder import Row, Run
from unimrg.report.markup import DASH, NBSP, Child, Html, el, folded, number, plural, section, short, table

SHOWN, MOST = 6, 48  # pictures shown at once, and pictures kept in the page at all
_SIDE = 256  # larger pictures are embedded at this side; the originals stay in the folder
_COLUMNS = ("pixel", "depth", "segmentation")

# Score: (label, unit, 1 if higher is better, -1 if lower is). Unknown names are shown as they are.
_SCORES = {
    "pixel_psnr": ("PSNR", "dB", 1),
    "depth_psnr": ("PSNR", "dB", 1),
    "segmentation_psnr": ("PSNR", "dB", 1),
    "pixel_ssim": ("SSIM", "", 1),
    "depth_absrel": ("AbsRel", "", -1),
    "depth_delta1": ("\u03b41", "", 1),
    "segmentation_f": ("boundary F", "", 1),
    "segmentation_f1": ("boundary F", "", 1),
    "segmentation_boundary_f": ("boundary F", "", 1),
}


def pictures(run: Run) -> Html:
    """One grid for each held-out image: truth, before and after, by redraw, depth and segmentation."""
    folder = run.path / "held_out"
    numbers = sorted(
        {
            int(path.name)
            for side in ("truth", "before", "after")
            for path in (folder / side).glob("*")
            if path.is_dir() and path.name.isascii() and path.name.isdigit()
        }
    )
    if not numbers:
        return section(
            "Drawings", el("p", "No held-out pictures were stored.", class_="empty"), id_="drawings"
        )
    scenes = [_scene(run, k) for k in numbers[:MOST]]
    note = (
        "Held-out images. Truth: the image and its labels. Before and after: what the model draws when "
        f"shown the image. Pictures wider than {_SIDE} pixels are reduced here; originals are in held_out/."
    )
    rest = scenes[SHOWN:]
    more = folded(f"{plural(len(rest), 'more image')}", el("div", rest, class_="scenes")) if rest else None
    left_out = (
        el("p", f"{plural(len(numbers) - MOST, 'image')} not shown here.", class_="note")
        if numbers[MOST:]
        else None
    )
    return section(
        "Drawings", el("div", scenes[:SHOWN], class_="scenes"), more, left_out, note=note, id_="drawings"
    )


def _scene(run: Run, k: int) -> Html:
    cells: list[Child] = [el("span"), [el("b", name.capitalize()) for name in _COLUMNS]]
    for side in ("truth", "before", "after"):
        cells.append(el("i", side.capitalize()))
        for column in _COLUMNS:
            file = "image" if side == "truth" and column == "pixel" else column
            path = run.path / "held_out" / side / str(k) / f"{file}.png"
            scores = _scores_of(run.drawings.get(side, {}).get(k, {}), column)
            cells.append(el("div", _picture(path, f"image {k}, {side}, {column}"), scores))
    return el("figure", el("figcaption", f"Image {k}"), el("div", cells, class_="scene"), class_="card")


def _picture(path: Path, words: str) -> Html:
    """The picture as a data address, or a box that says why there is none."""
    if not path.is_file():
        return el("span", "not drawn", class_="missing")
    try:
        data, side = _embedded(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return el("span", "unreadable", class_="missing")
    kind = "crisp" if side <= 96 else None
    return el("img", src=f"data:image/png;base64,{base64.b64encode(data).decode()}", alt=words, class_=kind)


def _embedded(path: Path) -> tuple[bytes, int]:
    """Bytes of a PNG no wider or higher than `_SIDE`, and its larger side."""
    with Image.open(path) as picture:
        picture.load()
        small = picture if picture.mode in ("L", "RGB", "RGBA", "P") else picture.convert("RGB")
        if max(small.size) > _SIDE:
            small = small.convert("L" if small.mode == "L" else "RGB")
            small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        # Written anew, so that the page holds pixels and no metadata of the file.
        out = io.BytesIO()
        small.save(out, "PNG", optimize=True)
        return out.getvalue(), max(small.size)


def _scores_of(row: Row, column: str) -> Child:
    parts: list[Child] = []
    for key, value in row.items():
        score = number(value)
        if key.startswith(f"{column}_") and score is not None:
            label, unit, _ = _score(key)
            parts.append(el("small", f"{label} {short(score)}{unit and ' ' + unit}"))
    return parts


def _score(key: str) -> tuple[str, str, int]:
    return _SCORES.get(key, (key.partition("_")[2] or key, "", 0))


def scores(run: Run) -> Html | None:
    """Mean of every drawing score over the images scored both times, with the paired difference."""
    before, after = run.drawings.get("before", {}), run.drawings.get("after", {})
    names = list(
        dict.fromkeys(key for row in (*before.values(), *after.values()) for key in row if key != "k")
    )
    rows = [row for name in names if (row := _score_row(name, before, after)) is not None]
    if not rows:
        return None
    note = (
        "Means over held-out images; intervals: 95\u00a0%, paired bootstrap over images. "
        f"Below {FEW} images such an interval is too narrow: read it as a hint."
    )
    head = ["Score", "Images", "Before", "After", "Difference", "Interval", "against 0"]
    return section("Scores of the drawings", table(head, rows, class_="numbers"), note=note, id_="scores")


def _score_row(name: str, before: dict[int, Row], after: dict[int, Row]) -> list[Child] | None:
    pairs = [
        (was, now)
        for k in sorted(before.keys() & after.keys())
        if (was := number(before[k].get(name))) is not None
        and (now := number(after[k].get(name))) is not None
    ]
    finite = [
        (was, now)
        for was, now in pairs
        if math.isfinite(was) and math.isfinite(now) and abs(was) + abs(now) < 1e100
    ]
    if not finite:
        return None
    first, second = [was for was, _ in finite], [now for _, now in finite]
    mean_before, mean_after = statistics.fmean(first), statistics.fmean(second)
    label, unit, better = _score(name)
    direction = {1: "higher is better", -1: "lower is better", 0: ""}[better]
    title: Child = [
        el("b", f"{name.partition('_')[0].capitalize()} {label}"),
        el("small", direction) if direction else None,
    ]
    left_out = f" ({len(pairs) - len(finite)} not finite)" if len(finite) < len(pairs) else ""
    unit = unit and f" {unit}"
    row: list[Child] = [
        title,
        f"{len(finite)}{left_out}",
        f"{short(mean_before)}{unit}",
        f"{short(mean_after)}{unit}",
    ]
    difference = mean_after - mean_before
    if len(finite) < 2:
        return [*row, _signed(difference), DASH, DASH]
    interval = paired_bootstrap(first, second)
    words = f"{_signed(difference)}, {_signed(interval.low)} to {_signed(interval.high)}"
    reach = 1.1 * max(abs(interval.low), abs(interval.high), abs(difference)) or 1.0
    side = 1 if interval.low > 0 else -1 if interval.high < 0 else 0
    # With few images the interval is known to be too narrow, so nothing is coloured as sure.
    colour = "open" if len(finite) < FEW else {1: "gain", -1: "lost", 0: "open"}[side * better]
    glyph = difference_chart(difference, interval, reach, words, colour)
    return [*row, _signed(difference), f"[{_signed(interval.low)},{NBSP}{_signed(interval.high)}]", glyph]


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + short(value)
