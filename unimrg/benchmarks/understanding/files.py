"""Which file of a folder belongs to which benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unimrg.benchmarks.understanding.registry import BENCHMARKS, Benchmark
from unimrg.benchmarks.understanding.tsv import ENDINGS
from unimrg.errors import DataError, StorageError
from unimrg.storage import S3Config, Store


@dataclass(frozen=True)
class File:
    """One file and the folder that it, and pictures beside it, lie in."""

    folder: Store
    name: str

    @property
    def url(self) -> str:
        return f"{self.folder.url}/{self.name}"

    def read(self) -> bytes:
        """Raises StorageError, also when the file is gone."""
        try:
            return self.folder.read_bytes(self.name)
        except FileNotFoundError as error:
            raise StorageError(f"{self.url} does not exist; check the path") from error


def question_files(place: str, s3: S3Config, wanted: Sequence[Benchmark]) -> dict[str, File]:
    """Benchmark name -> the file of its questions in a folder or bucket; of all there when none is wanted.

    Raises DataError when a wanted one, or every one, is missing; StorageError.
    """
    folder = Store.at(place, s3)
    names = _files_in(folder, (".tsv",))
    found = {}
    for benchmark in wanted or BENCHMARKS:
        fitting = [f"{known}.tsv" for known in benchmark.known_files if f"{known}.tsv" in names]
        if fitting:
            found[benchmark.name] = File(folder, fitting[0])
        elif wanted:
            file = benchmark.known_files[-1]
            raise DataError(f"data: {folder.url} holds no {file}.tsv; it can be had from {benchmark.source}")
    if not found:
        example = BENCHMARKS[0].name
        raise DataError(f"data: {folder.url} holds no file of a known benchmark, like {example}.tsv")
    return found


def answer_files(place: str, s3: S3Config, wanted: Sequence[Benchmark]) -> dict[str, File]:
    """Benchmark name -> the file of answers to it: NAME or MODEL_NAME with one of ENDINGS; or `place` itself.

    Raises DataError when one is missing, or there twice, or unclear; StorageError.
    """
    folder = Store.at(place, s3)
    there = folder.stat()
    if there is None:
        raise StorageError(f"predictions: {place} does not exist; check the path")
    if not there.is_folder:
        above, _, name = folder.url.rpartition("/")
        return {_of_file(name, wanted).name: File(folder.beside(above), name)}
    names = _files_in(folder, ENDINGS)
    found = {}
    for benchmark in wanted or BENCHMARKS:
        fitting = [name for name in names if _belongs(name, benchmark)]
        if len(fitting) > 1:
            both = " and ".join(fitting)
            raise DataError(f"predictions: {both} in {folder.url} are all of {benchmark.name}; name one file")
        if fitting:
            found[benchmark.name] = File(folder, fitting[0])
        elif wanted:
            raise DataError(f"predictions: {folder.url} holds no answers named {benchmark.name}.tsv")
    if not found:
        raise DataError(f"predictions: {folder.url} holds no answers, named like {BENCHMARKS[0].name}.tsv")
    return found


def _files_in(folder: Store, endings: tuple[str, ...]) -> list[str]:
    return [entry.path for entry in folder.list() if not entry.is_folder and entry.path.endswith(endings)]


def _of_file(name: str, wanted: Sequence[Benchmark]) -> Benchmark:
    fitting = [benchmark for benchmark in wanted or BENCHMARKS if _belongs(name, benchmark)]
    if len(wanted) == 1:
        return wanted[0]
    if len(fitting) != 1:
        raise DataError(f"predictions: {name} doesn't say of what; add benchmarks=[NAME]")
    return fitting[0]


def _belongs(name: str, benchmark: Benchmark) -> bool:
    stem = name.rpartition(".")[0]
    return any(stem == known or stem.endswith(f"_{known}") for known in benchmark.known_files)
