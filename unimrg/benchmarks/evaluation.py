"""The results of one checkpoint (or one set of answers) on several benchmarks, as they are stored."""

from __future__ import annotations

import json
from dataclasses import dataclass

from unimrg.benchmarks.result import BenchmarkResult
from unimrg.errors import DataError, StorageError
from unimrg.storage import Store

FILE = "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """name: what the row of a table is called. source: where the checkpoint, or the answers, lie."""

    name: str
    source: str
    results: tuple[BenchmarkResult, ...]

    def write(self, out: Store) -> None:
        """Into a folder. Raises StorageError."""
        plain = {
            "name": self.name,
            "source": self.source,
            "results": [json.loads(result.to_json()) for result in self.results],
        }
        out.write_bytes(FILE, json.dumps(plain, indent=1, ensure_ascii=False).encode())

    @classmethod
    def read(cls, out: Store) -> Evaluation:
        """Raises StorageError where there is none, DataError where it is damaged."""
        try:
            plain = json.loads(out.read_bytes(FILE))
            results = tuple(BenchmarkResult.from_json(json.dumps(result)) for result in plain["results"])
            return cls(str(plain["name"]), str(plain["source"]), results)
        except FileNotFoundError as error:
            raise StorageError(
                f"{out.url} holds no {FILE}; name the `out` folder of an earlier evaluation"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{out.url}/{FILE} is damaged; run its evaluation again") from error
