"""Commands of the text-to-image benchmarks: draw their pictures with a model, score pictures and verdicts.

python -m unimrg.benchmarks.generation draw geneval PICTURES --prompts evaluation_metadata.jsonl --checkpoint outputs/latest/model
python -m unimrg.benchmarks.generation score geneval PICTURES --detector PLACE --clip PLACE
python -m unimrg.benchmarks.generation score geneval results.jsonl
python -m unimrg.benchmarks.generation draw dpg PICTURES --prompts prompts.json --checkpoint outputs/latest/model
python -m unimrg.benchmarks.generation score dpg PICTURES --questions dpg_bench.csv --judge PLACE
python -m unimrg.benchmarks.generation score dpg answers.json --questions dpg_bench.csv

A place is a folder, a URL or a repository of the hub. Drawing goes on where it stopped. Scoring writes verdicts
(results.jsonl, answers.json) and evaluation.json beside the pictures, which `unimrg.evaluate page=[...]` shows.
"""  # noqa: E501

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unimrg.benchmarks.evaluation import Evaluation
from unimrg.benchmarks.generation import dpg, dpg_files, geneval, geneval_files
from unimrg.benchmarks.result import BenchmarkResult
from unimrg.errors import ConfigError, UnimrgError
from unimrg.families import MODEL_TYPES, load_trained
from unimrg.families.base import DrawOptions
from unimrg.storage import S3Config, Store
from unimrg.teachers.weights import choose_device, choose_dtype
from unimrg.weights import fetch, model_type

if TYPE_CHECKING:
    from unimrg.benchmarks.generation.dpg_files import Judge

BENCHMARKS = ("geneval", "dpg")


def main(argv: list[str] | None = None) -> int:
    """Runs a command; 0, or 2 when something can be mended by the user."""
    from transformers.utils.logging import disable_progress_bar

    args = _parser().parse_args(argv)
    disable_progress_bar()
    try:
        args.run(args)
        return 0
    except UnimrgError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m unimrg.benchmarks.generation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True)
    draw = commands.add_parser("draw", help="draw the pictures of a benchmark")
    score = commands.add_parser("score", help="score pictures, or verdicts that are there already")
    for command in (draw, score):
        command.add_argument("benchmark", choices=BENCHMARKS)
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    draw.add_argument("pictures", type=Path, help="folder for the pictures")
    draw.add_argument("--prompts", required=True, help="the official prompts, a file or (DPG) a folder")
    draw.add_argument("--checkpoint", required=True, help="a trained model: model/ of a run")
    draw.add_argument("--count", type=int, default=4, help="pictures a prompt (GenEval)")
    draw.add_argument("--batch-size", type=int, default=4, help="pictures drawn together")
    draw.add_argument("--iterations", type=int, default=0, help="of the sampler; 0 = the family's own")
    draw.add_argument("--guidance", type=float, default=0.0, help="1 = off; 0 = the family's own")
    draw.add_argument("--seed", type=int, default=0, help="set again for every prompt")
    draw.set_defaults(run=_draw)
    score.add_argument("source", type=Path, help="folder of pictures, results.jsonl or answers.json")
    score.add_argument("--detector", default="", help="GenEval: place of a Mask2Former of COCO's instances")
    score.add_argument("--clip", default="", help="GenEval: place of a CLIP")
    score.add_argument("--questions", default="", help="DPG: the official question file")
    score.add_argument(
        "--judge", default="", help="DPG: place of a BLIP for questions, or of a model of ours"
    )
    score.add_argument("--layout", choices=dpg.LAYOUTS, default="separate", help="DPG: of the pictures")
    score.add_argument("--rows", choices=dpg.ROWS, default="all", help="DPG: official skips the first one")
    score.add_argument("--name", default="", help="of the row on a page of results")
    score.set_defaults(run=_score)
    return parser


def _draw(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    options = DrawOptions(args.iterations, args.guidance, seed=args.seed)
    if min(args.count, args.batch_size) < 1 or min(args.iterations, args.guidance) < 0:
        raise ConfigError(
            "--count and --batch-size must be at least 1, --iterations and --guidance at least 0"
        )
    read: Any = geneval.read_prompts if args.benchmark == "geneval" else dpg_files.read_prompts
    prompts = read(args.prompts)
    folder = fetch("--checkpoint", args.checkpoint, S3Config())
    model, using, _ = load_trained(folder, device, choose_dtype("auto", device))
    with torch.inference_mode():
        if args.benchmark == "geneval":
            drawn = geneval_files.draw(
                model, using, prompts, args.pictures, options, args.count, args.batch_size
            )
        else:
            drawn = dpg_files.draw(model, using, prompts, args.pictures, options, args.batch_size)
    print(f"drew {drawn} pictures of {len(prompts)} prompts at {args.pictures}")


def _score(args: argparse.Namespace) -> None:
    result = _score_geneval(args) if args.benchmark == "geneval" else _score_dpg(args)
    folder = args.source if args.source.is_dir() else args.source.parent
    source = str(args.source)
    Evaluation(args.name or source, source, (result,)).write(Store.at(str(folder)))
    for name, value in result.scores.items():
        print(f"{result.benchmark} {name}: {value:.5g} {result.units[name]}")
        for group, share in result.groups.get(name, {}).items():
            print(f"  {group}: {share:.5g}")
    print(", ".join(f"{count} {what}" for what, count in result.counts.items()))


def _score_geneval(args: argparse.Namespace) -> BenchmarkResult:
    if not args.source.is_dir():
        return geneval.score(geneval.read_results(args.source), {"verdicts": "from a file"})
    if not (args.detector and args.clip):
        raise ConfigError("pictures of GenEval need --detector and --clip; or give a results.jsonl")
    from unimrg.benchmarks.generation.detector import load_eyes

    prompts = [prompt for prompt, _ in geneval_files.read(args.source)]
    detector, classifier = load_eyes(args.detector, args.clip, S3Config(), choose_device(args.device))
    rows = list(geneval_files.judge_folder(args.source, detector, classifier))
    (args.source / "results.jsonl").write_text("".join(row.to_line() + "\n" for row in rows), "utf-8")
    return geneval.score(rows, {"detector": args.detector, "colours": args.clip}, prompts)


def _score_dpg(args: argparse.Namespace) -> BenchmarkResult:
    if not args.questions:
        raise ConfigError("DPG-Bench needs --questions, its official question file")
    questions = dpg.read_questions(args.questions, args.rows)
    protocol = {"rows": args.rows, "judge": args.judge or "answers from a file"}
    if args.source.is_dir():
        if not args.judge:
            raise ConfigError("pictures of DPG-Bench need --judge; or give the answers of one as a file")
        answers = dpg_files.ask(args.source, questions, _judge(args), args.layout)
        dpg_files.write_answers(args.source / "answers.json", answers)
    else:
        answers = dpg_files.read_answers(args.source)
    return dpg.score(questions, answers, args.layout, protocol)


def _judge(args: argparse.Namespace) -> Judge:
    from unimrg.benchmarks.generation.judges import BlipJudge, FamilyJudge

    device = choose_device(args.device)
    folder = fetch("--judge", args.judge, S3Config())
    if model_type(folder) in MODEL_TYPES:
        return FamilyJudge(*load_trained(folder, device, choose_dtype("auto", device)))
    return BlipJudge(folder, device)


if __name__ == "__main__":
    sys.exit(main())
