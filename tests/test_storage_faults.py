"""Storage through a proxy that breaks requests: what may pass is repeated and counted, the rest stops."""

from __future__ import annotations

import contextlib
import http.client
import os
import pickle
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faulty_s3 import PAGE, FaultyS3, Rule, faulty
from tests.s3 import S3Server
from unimrg import retries
from unimrg.errors import StorageError
from unimrg.storage import RETRY_REASONS, S3Config, Store, take_retries

# What each fault is counted as. An answer without a body can't be cut short: there the connection is lost.
TRANSIENT = {
    "500": {"server-error"},
    "502": {"server-error"},
    "503": {"slow-down"},
    "504": {"timeout"},
    "slow-down": {"slow-down"},
    "too-many": {"slow-down"},
    "reset": {"connection"},
    "lost-answer": {"connection"},
    "truncated": {"truncated", "connection"},
    "wrong-content": {"truncated"},
}
PERMANENT = {
    "expired": ("denied", "access denied .*expired"),
    "denied": ("denied", "access denied: .*AWS_ACCESS_KEY_ID"),
    "no-bucket": ("no-bucket", "there is no bucket s3://.* at http.*; check the name"),
}
# curl itself repeats a request on a connection that was used before and breaks without a byte of an answer.
HIDDEN = ("reset", "lost-answer", "truncated")
# These break each request in a different way; with the others, which are like them, the first will do.
THOROUGH = ("500", "lost-answer", "truncated", "wrong-content")
SMALL = b"ten bytes!"
LARGE = 11 << 20  # more than one request


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of the machine, hardly any wait, no retries left over."""
    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_CA_BUNDLE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr("unimrg.retries.WAIT_SECONDS", 0.002)
    take_retries()


@pytest.fixture(scope="module")
def running(s3_server: S3Server) -> Iterator[FaultyS3]:
    with faulty(s3_server) as proxy:
        yield proxy


@pytest.fixture
def proxy(running: FaultyS3) -> Iterator[FaultyS3]:
    running.rules, running.log = [], []
    yield running
    running.rules = []


def at(server: S3Server, path: Path) -> Store:
    keys = S3Config(server.endpoint, "", server.access_key, server.secret_key)
    return Store.at(server.url("faults" + str(path)), keys)


OBJECTS = {"a/small": SMALL, "a/page": bytes(len(PAGE) + 1), "a/deep/kilo": bytes(1000)}


def filled(store: Store) -> Store:
    for path, data in OBJECTS.items():
        store.write_bytes(path, data)
    return store


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    """The folder of a test on the server: named alike in every run, since the proxy draws by name."""
    return Path("/", *re.findall(r"\w+", request.node.name))


@pytest.fixture
def direct(s3_server: S3Server, folder: Path) -> Store:
    """The folder of a test, without the proxy; connected, with a few objects."""
    return filled(at(s3_server, folder))


@pytest.fixture(scope="module")
def unchanged(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a folder of objects for the calls that only look."""
    path = tmp_path_factory.mktemp("unchanged")
    filled(at(s3_server, path))
    return path


@pytest.fixture
def store(proxy: FaultyS3, folder: Path) -> Store:
    """The same folder, through the proxy."""
    return at(proxy.server, folder)


# Every call, what it should return, and what it should leave behind


def do_stat(store: Store, folder: Path) -> object:
    return [store.stat("a/small") is not None, store.size("a/page"), store.exists("a"), store.exists("none")]


def do_list(store: Store, folder: Path) -> object:
    names = [entry.path for entry in store.list("a", recursive=True)], [e.path for e in store.list("a")]
    return *names, store.list("none")


def do_read(store: Store, folder: Path) -> object:
    whole = [store.read_bytes(name) for name in ("a/small", "a/page", "a/deep/kilo")]
    return whole, store.read_bytes("a/small", 3), store.read_range("a/small", 4, 5)


def do_open(store: Store, folder: Path) -> object:
    with store.open_input("a/small") as file:
        file.seek(4)
        return file.read(5), file.read(), file.size()


def do_write(store: Store, folder: Path) -> object:
    store.write_bytes("b/new", b"n" * 500)
    return store.write_bytes("b/empty", b"")


def do_upload(store: Store, folder: Path) -> object:
    (folder / "out" / "deep").mkdir(parents=True, exist_ok=True)
    (folder / "out" / "one").write_bytes(b"1" * 1000)
    (folder / "out" / "deep" / "two").write_bytes(b"22")
    return store.upload(folder / "out", "b")


def do_download(store: Store, folder: Path) -> object:
    store.download("a", folder / "in")
    files = sorted(path for path in (folder / "in").rglob("*") if path.is_file())
    return [(path.name, path.read_bytes()) for path in files]


def do_delete(store: Store, folder: Path) -> object:
    return store.delete("a/deep")


CALLS: dict[str, Callable[[Store, Path], object]] = {
    name.removeprefix("do_"): call for name, call in list(globals().items()) if name.startswith("do_")
}


def content(store: Store) -> dict[str, bytes]:
    return {entry.path: store.read_bytes(entry.path) for entry in store.list(recursive=True)}


@pytest.mark.parametrize("fault", TRANSIENT)
@pytest.mark.parametrize("name", CALLS)
def test_transient_faults_pass_and_are_counted(
    proxy: FaultyS3, s3_server: S3Server, unchanged: Path, tmp_path: Path, name: str, fault: str
) -> None:
    """The requests of each call fail, one after the other; what changes something starts afresh each time."""
    call, changes = CALLS[name], name in ("write", "upload", "delete")

    def run(name: str) -> tuple[object, dict[str, bytes]]:
        place = tmp_path / name if changes else unchanged
        if call is do_delete:
            at(s3_server, place).write_bytes("a/deep/kilo", bytes(1000))
        proxy.log.clear()
        proxy.rules = rules
        result = call(at(proxy.server, place), tmp_path / name)
        proxy.rules = []
        return result, content(at(s3_server, place)) if changes else {}

    rules: list[Rule] = []
    expected = run("unbroken")
    requests, broken, counted = len(proxy.log), 0, set()
    for number in range(0, requests, (2 if name == "delete" else 1) if fault in THOROUGH else requests):
        rules = [Rule(fault, skip=number, times=2 if fault in HIDDEN else 1)]
        assert run(f"broken-{number}") == expected
        broken += proxy.count(fault)
        counted |= {reason for reason, count in take_retries().items() if count}
    assert broken > 0
    # The text of an error can be longer than the bytes asked for, which is all that pyarrow says then.
    assert counted & TRANSIENT[fault] and counted <= TRANSIENT[fault] | {"truncated"}


@pytest.mark.parametrize("fault", PERMANENT)
@pytest.mark.parametrize("name", CALLS)
def test_permanent_faults_stop_at_once(
    proxy: FaultyS3, direct: Store, store: Store, tmp_path: Path, name: str, fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also when it starts in the middle of a run, after calls that worked."""
    monkeypatch.setattr("unimrg.storage.BUCKET_SECONDS", 0.0)
    CALLS[name](store, tmp_path / "unbroken")
    kind, message = PERMANENT[fault]
    proxy.log.clear()
    proxy.rules = [Rule(fault)]
    with pytest.raises(StorageError, match=message) as caught:
        CALLS[name](store, tmp_path / "broken")
    assert caught.value.kind == kind
    assert "\n" not in str(caught.value)
    assert sum(take_retries().values()) == 0
    assert proxy.count(fault) <= 16, "it goes on asking"


def test_a_small_read_that_is_refused_says_why(proxy: FaultyS3, direct: Store, store: Store) -> None:
    """The text of the refusal is longer than the object, so pyarrow hides it: the object is opened again."""
    proxy.rules = [Rule("expired", skip=1)]
    with pytest.raises(StorageError, match=r"access denied") as caught:
        store.read_bytes("a/small")
    assert caught.value.kind == "denied"


@pytest.mark.parametrize("name", CALLS)
def test_what_does_not_pass_is_given_up(
    proxy: FaultyS3, direct: Store, store: Store, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unimrg.storage.SDK_ATTEMPTS", 2)
    monkeypatch.setattr("unimrg.retries.ATTEMPTS", 3)
    proxy.rules = [Rule("503")]
    why = "at http.*: the store asks to slow down or is out of service .AWS Error.*; start again when it is"
    spent = r" well [(]given up after \d+ s and 3 of 3 attempts[)]$"
    with pytest.raises(StorageError, match=why + spent) as caught:
        CALLS[name](store, tmp_path / "broken")
    assert caught.value.kind == pickle.loads(pickle.dumps(caught.value)).kind == "transient"
    if name != "upload":  # its threads each try
        assert take_retries() == {reason: 2 * (reason == "slow-down") for reason in RETRY_REASONS}


@pytest.mark.parametrize("fault", ["500", "truncated", "wrong-content"])
def test_large_objects(
    proxy: FaultyS3, direct: Store, store: Store, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several requests each way. The SDK repeats those of an upload first."""
    monkeypatch.setattr("unimrg.storage.SDK_ATTEMPTS", 2)  # its waits are seconds
    data = random.Random(fault).randbytes(LARGE)
    store.exists()
    proxy.rules = [Rule(fault, method="POST|PUT", times=2), Rule(fault, method="GET", times=2)]
    store.write_bytes("large", data)
    assert direct.read_bytes("large") == data
    assert store.read_bytes("large") == data
    store.download("large", tmp_path / "in")
    assert (tmp_path / "in" / "large").read_bytes() == data
    assert proxy.count(fault) == 4
    assert [e.path for e in direct.list()] == ["a", "large"]


@pytest.mark.parametrize("fault", ["lost-answer", "wrong-content"])
def test_the_last_word_of_a_large_upload(proxy: FaultyS3, direct: Store, store: Store, fault: str) -> None:
    """Completing it fails, or is done and not answered: it is written again, over an older one."""
    direct.write_bytes("large", b"old")
    data = random.Random(fault).randbytes(LARGE)
    proxy.rules = [Rule(fault, method="POST", key=r"\?uploadId=", times=2)]
    store.write_bytes("large", data)
    assert direct.read_bytes("large") == data
    assert proxy.count(fault) == 2


def test_deleted_between_list_and_read(proxy: FaultyS3, direct: Store, store: Store, tmp_path: Path) -> None:
    listed = [entry.path for entry in store.list("a", recursive=True)]
    direct.delete("a/small")
    assert "a/small" in listed
    with pytest.raises(FileNotFoundError, match="a/small does not exist"):
        store.read_bytes("a/small")


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_deleted_while_its_folder_is_copied(
    proxy: FaultyS3, direct: Store, store: Store, tmp_path: Path, method: str
) -> None:
    proxy.rules = [Rule("pass", method, "kilo$", times=1, hook=partial(direct.delete, "a/deep/kilo"))]
    with pytest.raises(StorageError, match="kilo does not exist any more: it was deleted while its folder"):
        store.download("a", tmp_path / "in")
    assert take_retries() == dict.fromkeys(RETRY_REASONS, 0)


def test_deleted_after_it_was_opened(proxy: FaultyS3, direct: Store, store: Store) -> None:
    for read in (store.read_bytes, lambda path: store.open_input(path).read()):
        direct.write_bytes("gone", bytes(3000))
        proxy.rules = [Rule("pass", "GET", "gone$", times=1, hook=partial(direct.delete, "gone"))]
        with pytest.raises(FileNotFoundError, match="gone does not exist"):
            read("gone")


def test_open_files_repeat_their_reads(proxy: FaultyS3, direct: Store, store: Store) -> None:
    data = os.urandom(50_000)
    direct.write_bytes("file", data)
    proxy.rules = [Rule(fault, "GET", times=2) for fault in ("500", "reset", "truncated", "wrong-content")]
    with store.open_input("file") as file:
        assert file.size() == len(data)
        pieces = [file.read(10_000) for _ in range(6)]
        file.seek(-5, 2)
        assert b"".join(pieces) == data and file.read() == data[-5:] and file.read(1) == b""
    counted = take_retries()  # wrong content has to come twice to be noticed
    assert (counted["server-error"], counted["truncated"]) == (2, 3) and counted["connection"] >= 1
    proxy.rules = [Rule("denied", "GET|HEAD")]
    with pytest.raises(StorageError, match="access denied") as caught:
        store.open_input("file")
    assert caught.value.kind == "denied"


def test_parquet_through_faults(proxy: FaultyS3, direct: Store, store: Store) -> None:
    """pyarrow reads our file in several threads, and hands our errors on as they are."""
    columns = {name: np.random.default_rng(1).integers(0, 1 << 40, 20_000) for name in "abc"}
    pq.write_table(pa.table(columns), sink := pa.BufferOutputStream(), row_group_size=4000)
    direct.write_bytes("table.parquet", sink.getvalue().to_pybytes())
    faults = ("500", "slow-down", "truncated", "504")  # a reset is now and then repeated by the SDK
    proxy.rules = [Rule(fault, "GET", times=1) for fault in faults]
    with store.open_input("table.parquet") as file:
        read = pq.ParquetFile(file, pre_buffer=True).read()
    assert read.equals(pa.table(columns))
    assert [proxy.count(fault) for fault in faults] == [1] * len(faults)
    assert sum(take_retries().values()) == len(faults)
    proxy.rules = [Rule("denied", skip=2)]
    file = store.open_input("table.parquet")
    with pytest.raises(StorageError, match="access denied") as caught:
        pq.ParquetFile(file).read()
    assert caught.value.kind == "denied"


def test_an_outage_passes(
    proxy: FaultyS3, direct: Store, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request gets through for a while, at any of several threads."""
    monkeypatch.setattr("unimrg.retries.WAIT_SECONDS", 0.1)
    store.exists()
    proxy.rules = [Rule("reset")]
    over = threading.Timer(0.5, proxy.rules.clear)
    over.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: store.write_bytes(f"o/{number}", bytes(number)), range(8)))
    over.join()
    assert content(direct.child("o")) == {str(number): bytes(number) for number in range(8)}
    assert take_retries()["connection"] > 4


def test_ranges(proxy: FaultyS3, direct: Store, store: Store) -> None:
    data = os.urandom(3000)
    direct.write_bytes("range", data)
    proxy.rules = [Rule("truncated", "GET", times=3)]
    for offset, length in ((0, 10), (2990, 100), (1000, 2000), (3000, 5), (9999, 1), (2999, None), (0, 0)):
        end = None if length is None else offset + length
        assert store.read_range("range", offset, length) == data[offset:end]
    assert take_retries()["truncated"] == 3


def test_every_last_byte_can_be_read(proxy: FaultyS3, direct: Store, store: Store) -> None:
    """A short answer is noticed by its last byte, so none of them may look like one."""
    for last in (0x00, 0x58, 0xA7, 0xFF):
        direct.write_bytes("last", b"x" * 99 + bytes([last]))
        assert store.read_bytes("last")[-1] == last
    assert sum(take_retries().values()) == 0


def test_silence_is_a_timeout(
    proxy: FaultyS3, direct: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unimrg.storage.REQUEST_SECONDS", 1.0)
    store = at(proxy.server, folder)
    proxy.rules = [Rule("silent", "GET", times=1, seconds=2.0), Rule("slow", "GET", seconds=2.0)]
    assert store.read_bytes("a/deep/kilo") == bytes(1000)  # slow is no fault as long as something comes
    assert take_retries()["timeout"] == 1
    assert (proxy.count("silent"), proxy.count("slow")) == (1, 1)


def test_other_libraries_are_served_by_the_sdk(proxy: FaultyS3, direct: Store, store: Store) -> None:
    proxy.rules = [Rule("503", times=1)]
    assert store.filesystem().get_file_info(f"{store.root}/a/small").size == len(SMALL)
    assert proxy.count("503") == 1


def test_threads_count_each_retry_once(proxy: FaultyS3, direct: Store, store: Store) -> None:
    store.read_bytes("a/small")
    # A read is two requests, lost if each of its eight tries meets a fault: rare at this share.
    proxy.rules = [Rule("500", share=0.05, seed=2)]
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda _: store.read_bytes("a/page"), range(200)))
    assert set(read) == {bytes(len(PAGE) + 1)}
    assert sum(take_retries().values()) == proxy.count("500") > 5


def test_a_retry_waits_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "WAIT_SECONDS", 0.5)
    bounds: list[float] = []
    waits: list[float] = []

    class Upper:
        def uniform(self, low: float, high: float) -> float:
            assert low == 0
            bounds.append(high)
            return high

    monkeypatch.setattr(retries, "_jitter", Upper())
    monkeypatch.setattr(time, "sleep", waits.append)
    calls: list[int] = []

    def fails() -> None:
        calls.append(1)
        raise OSError("AWS Error SLOW_DOWN during PutObject operation: Slow Down")

    with pytest.raises(OSError, match="SLOW_DOWN"):
        retries.retrying(fails)
    assert bounds == [0.5, 1, 2, 4, 8, 15, 15, 15]
    assert waits == bounds[:-1] and len(calls) == retries.ATTEMPTS
    waits.clear()
    monkeypatch.setattr(retries, "RETRY_SECONDS", 3.0)
    with pytest.raises(OSError):
        retries.retrying(fails)
    assert waits == [0.5, 1, 2]  # no time passed meanwhile, but the next wait would be too long


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_is_lost_or_doubled(
    proxy: FaultyS3, direct: Store, store: Store, tmp_path: Path, seed: int
) -> None:
    """Random work of four threads with every fifth request broken in some way, checked without the proxy."""
    direct.delete("a")
    draw = random.Random(seed)
    share = 1 - 0.8 ** (1 / len(TRANSIENT))
    proxy.rules = [Rule(fault, share=share, seed=seed * 100 + i) for i, fault in enumerate(TRANSIENT)]
    sizes = [draw.choice((0, 1, len(PAGE) + 1, 5000, 200_000)) for _ in range(24)]
    files = {f"{number % 3}/{number}": draw.randbytes(size) for number, size in enumerate(sizes)}
    old = [path for path in files if draw.random() < 0.3]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda path: store.write_bytes(path, b"old"), old))
        list(pool.map(lambda path: store.write_bytes(path, files[path]), files))
    assert content(direct) == files
    assert [(e.path, e.size) for e in store.list(recursive=True)] == sorted(
        (p, len(d)) for p, d in files.items()
    )
    with ThreadPoolExecutor(4) as pool:
        assert dict(zip(files, pool.map(store.read_bytes, files), strict=True)) == files
    store.download("", tmp_path / "in")
    assert {path: (tmp_path / "in" / path).read_bytes() for path in files} == files
    store.upload(tmp_path / "in", "again")
    assert content(direct.child("again")) == files
    store.delete("0")
    left = {path: data for path, data in files.items() if not path.startswith("0/")}
    assert content(direct) == left | {f"again/{path}": data for path, data in files.items()}
    broken, counted = proxy.count(), take_retries()
    assert 0.1 < broken / len(proxy.log) < 0.3
    assert all(counted[reason] for reason in RETRY_REASONS), counted


# The proxy itself


def test_the_proxy_passes_bytes_as_they_are(proxy: FaultyS3, direct: Store, store: Store) -> None:
    data = os.urandom(1 << 20)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.write_bytes(f"p/{number}", data[number:]), range(8)))
        read = list(pool.map(lambda number: store.read_bytes(f"p/{number}"), range(8)))
    assert read == [data[number:] for number in range(8)]
    assert proxy.count() == 0


def test_the_proxy_keeps_to_the_framing(proxy: FaultyS3) -> None:
    """Chunked bodies and `Expect`, on one connection; what passes is refused for want of a signature."""
    host = proxy.server.endpoint.removeprefix("http://")
    proxy.rules = [Rule("wrong-content", "PUT", "broken")]
    with contextlib.closing(http.client.HTTPConnection(host, timeout=10)) as connection:
        connection.connect()
        first = connection.sock
        for name, status in {"broken": 200, "broken/again": 200, "passed": 411}.items():
            pieces = iter([b"abc", b"\r\n0\r\n\r\n", bytes(range(256))])
            headers: dict[str, Any] = {"Expect": "100-continue", "Transfer-Encoding": "chunked"}
            connection.request("PUT", f"/bucket/{name}", pieces, headers, encode_chunked=True)
            assert connection.sock is first
            answer = connection.getresponse()
            text = answer.read()
            assert answer.status == status and (text == PAGE) == (status == 200)
    assert [seen.target for seen in proxy.log] == ["/bucket/broken", "/bucket/broken/again", "/bucket/passed"]


def test_the_proxy_breaks_the_same_requests_again() -> None:
    def fired(seed: int) -> list[bool]:
        rule = Rule("500", "GET", "^/b/", skip=2, share=0.5, seed=seed)
        return [rule.fires("GET", f"/b/{n % 7}") for n in range(60)] + [rule.fires("PUT", "/b/1")]

    assert fired(1) == fired(1) != fired(2)
    assert 15 < sum(fired(1)) < 45 and not any(fired(1)[:2]) and not fired(1)[-1]
