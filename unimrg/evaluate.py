"""Score a checkpoint on benchmarks, or answers that are there already; put results side by side.

    python -m unimrg.evaluate benchmarks=[MMVP,VSR-zeroshot] data=benchmarks checkpoint=outputs/latest/model
    python -m unimrg.evaluate drawings=outputs/scenes/test.json checkpoint=outputs/latest/model
    python -m unimrg.evaluate predictions=answers
    python -m unimrg.evaluate page=[outputs/base,outputs/trained] out=outputs/both

Answers and drawings are stored in parts as they come, so an interrupted evaluation goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from unimrg.benchmarks.evaluation import Evaluation
from unimrg.benchmarks.result import BenchmarkResult
from unimrg.benchmarks.understanding.files import answer_files
from unimrg.benchmarks.understanding.registry import Benchmark, find, score
from unimrg.benchmarks.understanding.summary import cv_bench, five_benchmarks
from unimrg.benchmarks.understanding.tsv import read_table, write_table
from unimrg.compose import run_command
from unimrg.config import EvaluateConfig
from unimrg.report.results import results_page
from unimrg.storage import Store

DESCRIPTION = """Score a checkpoint on understanding benchmarks in VLMEvalKit's files, and on its drawings of
held-out pictures; or score answers that are there already. Answers are read by the official rules without a
judge. Writes answers, drawings, evaluation.json and results.html into `out`; `page` puts several such folders
side by side. Interrupted, it goes on where it stopped."""
EXAMPLES = (
    "python -m unimrg.evaluate benchmarks=[MMVP,VSR-zeroshot] data=s3://bucket/benchmarks \\\n"
    "      checkpoint=outputs/latest/model out=outputs/trained",
    "python -m unimrg.evaluate drawings=outputs/scenes/test.json checkpoint=outputs/latest/model",
    "python -m unimrg.evaluate predictions=Harmon_MMVP.xlsx",
    "python -m unimrg.evaluate page=[outputs/base,outputs/trained] out=outputs/both",
)
PAGE, SHEET = "results.html", "drawings.png"


def main(config: EvaluateConfig) -> None:
    """Ask, score, write the page. Raises an UnimrgError of one sentence for whatever can't be used."""
    s3 = config.s3.store()
    out = Store.at(config.out, s3)
    wanted = list(dict.fromkeys(find(name) for name in config.benchmarks))
    if config.page:
        evaluations = [Evaluation.read(Store.at(folder, s3)) for folder in config.page]
    else:
        evaluations = [_evaluate(config, wanted, out)]
    out.write_bytes(PAGE, results_page(evaluations).encode())
    print(f"{out.url}/{PAGE}")


def _evaluate(config: EvaluateConfig, wanted: Sequence[Benchmark], out: Store) -> Evaluation:
    """All results, stored and printed."""
    results = [] if config.checkpoint else _score_answers(config, wanted, out)
    if config.data and config.checkpoint:
        results += _score_checkpoint(config, wanted, out)
    if config.drawings:
        results += _score_drawings(config, out)
    summaries = [summary for summary in (five_benchmarks(results), cv_bench(results)) if summary is not None]
    source = config.checkpoint or config.predictions
    evaluation = Evaluation(config.name or source, source, (*results, *summaries))
    evaluation.write(out)
    for result in evaluation.results:
        print(_line(result))
    return evaluation


def _score_checkpoint(
    config: EvaluateConfig, wanted: Sequence[Benchmark], out: Store
) -> list[BenchmarkResult]:
    """Answers are scored from the files that are written, so that scoring those again changes nothing."""
    from cluster.evaluation import answer_all

    results = []
    for answered in answer_all(config, wanted):
        settings = answered.settings
        benchmark = find(settings.benchmark)
        file = f"predictions/{benchmark.name}.tsv"
        raw = write_table(answered.rows)
        out.write_bytes(file, raw)
        official = answered.asked.md5 == benchmark.md5
        protocol = (
            ({"questions": f"{'the official' if official else 'another'} file"} if benchmark.md5 else {})
            | {
                "pictures": "the first of each question, padded to a square",
                "max_new_tokens": str(settings.max_new_tokens),
                "precision": settings.dtype,
                "checkpoint": settings.checkpoint[:16],
            }
            | ({"instruction": settings.instruction} if settings.instruction else {})
        )
        result = _score(config, benchmark, raw, f"{out.url}/{file}", protocol)
        counts = {"questions without a picture, left out": answered.asked.without_picture}
        results.append(replace(result, counts=result.counts | counts))
    return results


def _score_drawings(config: EvaluateConfig, out: Store) -> list[BenchmarkResult]:
    """Also writes a sheet of the first pictures."""
    from cluster.drawings import draw_all
    from unimrg.benchmarks.dense.drawing import score as score_drawn
    from unimrg.benchmarks.dense.drawing import sheet

    done = draw_all(config)
    out.write_bytes(SHEET, sheet(done.subjects, done.drawings))
    print(f"{out.url}/{SHEET}")
    teachers = config.teachers
    protocol = {
        "pictures": "the first of the data set, padded to a square",
        "targets": f"depth by {teachers.depth.name}, boundaries by {teachers.segmentation.name}",
        "steps": str(done.settings.iterations or "the family's own"),
        "precision": done.settings.dtype,
        "drawn together": str(done.settings.batch),
        "checkpoint": done.settings.checkpoint[:16],
    }
    results = score_drawn(done.subjects, done.drawings, protocol)
    return [replace(result, counts=result.counts | done.skipped) for result in results]


def _score_answers(config: EvaluateConfig, wanted: Sequence[Benchmark], out: Store) -> list[BenchmarkResult]:
    files = answer_files(config.predictions, config.s3.store(), wanted)
    return [_score(config, find(name), file.read(), file.url, {}) for name, file in files.items()]


def _score(
    config: EvaluateConfig, benchmark: Benchmark, raw: bytes, file: str, protocol: dict[str, str]
) -> BenchmarkResult:
    result = score(benchmark, read_table(raw, file, config.strict), file, config.matcher)
    reading = {"tables": "as they stand" if config.strict else "as pandas reads them"}
    return replace(result, protocol=result.protocol | reading | protocol)


def _line(result: BenchmarkResult) -> str:
    """A result for the terminal."""
    scores = "  ".join(f"{name} {value:.4g}" for name, value in result.scores.items())
    missed = result.counts.get("not extracted")
    return f"{result.benchmark:16} {scores}" + (f"  ({missed} not extracted)" if missed else "")


if __name__ == "__main__":
    raise SystemExit(run_command(main, "evaluate", EvaluateConfig, DESCRIPTION, EXAMPLES))
