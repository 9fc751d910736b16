"""Commands of the scenes.

python -m unimrg.data.scenes write URL [--train N --test N --size S --questions Q --seed K --workers W]
python -m unimrg.data.scenes bench [--scenes N --size S]        scenes per second of one core
python -m unimrg.data.scenes sheet FILE.png [--split test]      a contact sheet with questions
python -m unimrg.data.scenes tables FOLDER [--pairs N]          held-out questions as VLMEvalKit's tables
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from unimrg.data.scenes.make import make_scenes
from unimrg.data.scenes.tables import tables
from unimrg.data.scenes.world import SPLITS, Scene
from unimrg.data.scenes.write import SceneSettings, pack, write
from unimrg.errors import UnimrgError
from unimrg.storage import S3Config, Store

TILE, LINE = 256, 24  # pixels of the contact sheet


def main(argv: list[str] | None = None) -> int:
    """Runs a command; 0, or 2 when something can be mended by the user."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except UnimrgError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m unimrg.data.scenes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True)
    default = SceneSettings()
    one = commands.add_parser("write", help="write a LLaVA data set to a folder, s3:// or gs://")
    one.add_argument("url")
    for name in ("train", "test", "size", "questions", "seed"):
        one.add_argument(f"--{name}", type=int, default=getattr(default, name))
    one.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    one.add_argument("--endpoint", default="", help="of an S3-compatible store; default AWS_ENDPOINT_URL")
    one.set_defaults(run=_write)
    two = commands.add_parser("bench", help="scenes per second of one core")
    two.add_argument("--scenes", type=int, default=200)
    two.add_argument("--size", type=int, default=default.size)
    two.set_defaults(run=_bench)
    three = commands.add_parser("sheet", help="a contact sheet with questions")
    three.add_argument("file")
    three.add_argument("--split", choices=SPLITS, default="test")
    three.add_argument("--scenes", type=int, default=18)
    three.add_argument("--seed", type=int, default=0)
    three.set_defaults(run=_sheet)
    four = commands.add_parser("tables", help="held-out questions as Scenes_YN.tsv and Scenes_MCQ.tsv")
    four.add_argument("folder", type=Path)
    four.add_argument("--pairs", type=int, default=500, help="of scenes; six questions each scene")
    four.add_argument("--size", type=int, default=default.size)
    four.add_argument("--seed", type=int, default=0)
    four.set_defaults(run=_tables)
    return parser


def _write(args: argparse.Namespace) -> None:
    settings = SceneSettings(args.train, args.test, args.size, args.questions, args.seed)
    store = Store.at(args.url, S3Config(endpoint=args.endpoint))
    fresh = write(store, settings, args.workers)
    scenes = settings.train + settings.test
    what = f"{scenes} scenes, {scenes * settings.questions} questions"
    print(f"{'wrote' if fresh else 'already complete:'} {what} at {args.url}")


def _bench(args: argparse.Namespace) -> None:
    list(make_scenes(4, size=args.size))  # first calls load code
    clocks = [time.process_time()]
    scenes = list(make_scenes(args.scenes, size=args.size))
    clocks.append(time.process_time())
    pack(scenes)
    clocks.append(time.process_time())
    made, packed = np.diff(clocks)
    questions = sum(len(scene.questions) for scene in scenes)
    print(
        f"{len(scenes) / made:.1f} scenes/s, {questions / made:.0f} questions/s at {args.size} px (CPU time)"
    )
    print(f"{len(scenes) / (made + packed):.1f} scenes/s with PNG encoding")


def _sheet(args: argparse.Namespace) -> None:
    tiles = [_tile(scene) for scene in make_scenes(args.scenes, seed=args.seed, split=args.split)]
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % 6)
    rows = [np.concatenate(tiles[k : k + 6], axis=1) for k in range(0, len(tiles), 6)]
    Image.fromarray(np.concatenate(rows)).save(args.file)


def _tables(args: argparse.Namespace) -> None:
    scenes = make_scenes(2 * args.pairs, seed=args.seed, split="test", size=args.size)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, text in tables(scenes, args.seed).items():
        (args.folder / name).write_text(text, "utf-8")
        print(f"{args.folder / name}: {len(text.splitlines()) - 1} questions")


def _tile(scene: Scene) -> np.ndarray:
    page = Image.new("RGB", (TILE, TILE + LINE * len(scene.questions) + 4), "white")
    page.paste(Image.fromarray(scene.rgb).resize((TILE, TILE), Image.Resampling.NEAREST))
    pen = ImageDraw.Draw(page)
    for k, question in enumerate(scene.questions):
        top = TILE + 2 + LINE * k
        pen.text((2, top), question.text[:50], fill="black")
        mark = {None: "", True: "  (cue misleads)", False: "  (cue is right)"}[question.conflict]
        pen.text((12, top + LINE // 2 - 1), f"{question.answer}  [{question.family}]{mark}", fill="darkgreen")
    return np.array(page)


if __name__ == "__main__":
    sys.exit(main())
