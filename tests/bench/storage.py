"""What the checks and retries of `unimrg/storage.py` cost where nothing fails: prints one JSON line.

    python -m tests.bench.storage

`store` is our door, `pyarrow` the same calls on pyarrow's file system with its own three attempts, both at
the same S3 server on the loopback address. Medians of interleaved repetitions, in milliseconds on the clock;
a ratio is the median of the repetitions' own ratios.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.fs as pafs

from tests.s3 import S3Server, run_s3_server
from unimrg.storage import CHECKSUM_DEFAULTS, CHUNK_BYTES, S3Config, Store, take_retries

SMALL, LARGE = 100_000, 64 << 20
REPETITIONS = {"stat": 200, "read": 200, "write": 60, "list": 60, "download": 8}


def plain(server: S3Server) -> pafs.FileSystem:
    os.environ.update(CHECKSUM_DEFAULTS)
    return pafs.S3FileSystem(
        access_key=server.access_key,
        secret_key=server.secret_key,
        region=server.region,
        scheme="http",
        endpoint_override=server.endpoint.removeprefix("http://"),
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=3),
        allow_delayed_open=True,
    )


def calls(server: S3Server, folder: Path) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Name -> the call through the store, and through pyarrow."""
    store = Store.at(server.url("b"), S3Config(server.endpoint, "", server.access_key, server.secret_key))
    bare, root, data = plain(server), store.root, os.urandom(SMALL)
    for number in range(100):
        store.write_bytes(f"many/{number}", b"x")
    store.write_bytes("small", data)
    store.write_bytes("large", os.urandom(LARGE))

    def read() -> bytes:
        with bare.open_input_file(f"{root}/small") as source:
            return bytes(source.read())

    def write() -> None:
        with bare.open_output_stream(f"{root}/new") as sink:
            sink.write(data)
        assert bare.get_file_info(f"{root}/new").size == SMALL

    def download() -> None:
        bare.get_file_info(f"{root}/large")
        with bare.open_input_file(f"{root}/large") as source, open(folder / "bare", "wb") as target:
            while piece := source.read(CHUNK_BYTES):
                target.write(piece)
            os.fsync(target.fileno())

    many = pafs.FileSelector(f"{root}/many")
    return {
        "stat": (lambda: store.stat("small"), lambda: bare.get_file_info(f"{root}/small")),
        "read": (lambda: store.read_bytes("small"), read),
        "write": (lambda: store.write_bytes("new", data), write),
        "list": (lambda: store.list("many"), lambda: bare.get_file_info(many)),
        "download": (lambda: store.download("large", folder), download),
    }


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    found: dict[str, object] = {"date": date.today().isoformat(), "machine": platform.machine()}
    with run_s3_server() as server, TemporaryDirectory() as folder:
        for name, pair in calls(server, Path(folder)).items():
            for call in pair:
                call()
            times = [(timed(pair[0]), timed(pair[1])) for _ in range(REPETITIONS[name])]
            ours, bare = (statistics.median(column) for column in zip(*times, strict=True))
            ratio = statistics.median(a / b for a, b in times)
            found[name] = {"store": round(ours, 2), "pyarrow": round(bare, 2), "ratio": round(ratio, 2)}
    print(json.dumps(found | {"retries": sum(take_retries().values())}))


if __name__ == "__main__":
    main()
