"""Storage on a real disk and a real S3 server: what is written comes back, failures say what to do."""

from __future__ import annotations

import os
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.s3 import S3Server, free_port
from unimrg.errors import StorageError
from unimrg.storage import S3Config, Store, aws_environment


@pytest.fixture(autouse=True)
def no_aws_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the machine must not leak in; nothing may ask for the role of the machine."""
    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_CA_BUNDLE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def config(server: S3Server) -> S3Config:
    return S3Config(server.endpoint, "", server.access_key, server.secret_key)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind; every test has a place of its own."""
    if request.param == "local":
        return Store.at(str(tmp_path / "store"))
    server: S3Server = request.getfixturevalue("s3_server")
    return Store.at(server.url(f"storage/{tmp_path.name}"), config(server))


def test_round_trip(store: Store) -> None:
    for size in (0, 1, 70_000, 11 << 20):  # the last is a multipart upload
        data = os.urandom(size)
        store.write_bytes(f"deep/er/{size}.bin", data)
        assert store.read_bytes(f"deep/er/{size}.bin") == data
        assert store.read_bytes(f"deep/er/{size}.bin", limit=5) == data[:5]
        assert store.size(f"deep/er/{size}.bin") == size
    store.write_bytes("deep/er/1.bin", b"replaced")
    assert store.read_bytes("deep/er/1.bin") == b"replaced"
    with store.child("deep").open_input("er/1.bin") as file:
        file.seek(2)
        assert file.read(3) == b"pla"


def test_names_with_odd_characters(store: Store) -> None:
    for name in ("a b.txt", "ü/日本.txt", "100%.txt", "a+b&c=d?e#f.txt"):
        store.write_bytes(name, name.encode())
        assert store.read_bytes(name) == name.encode()
    assert len(store.list(recursive=True)) == 4


def test_missing_object(store: Store) -> None:
    store.write_bytes("there", b"x")
    assert not store.exists("nowhere/at/all")
    assert store.size("nowhere") is None
    for read in (store.read_bytes, store.open_input):
        with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
            read("nowhere")
    with pytest.raises(FileNotFoundError):
        store.download("nowhere", "unused")


def test_list(store: Store) -> None:
    for path in ("b/2", "b/1", "a", "b/c/3"):
        store.write_bytes(path, b"xx")
    assert [(e.path, e.size, e.is_folder) for e in store.list()] == [("a", 2, False), ("b", None, True)]
    assert [e.path for e in store.list("b")] == ["b/1", "b/2", "b/c"]
    assert [e.path for e in store.list("b", recursive=True)] == ["b/1", "b/2", "b/c/3"]
    assert [e.path for e in store.child("b").list(recursive=True)] == ["1", "2", "c/3"]
    assert store.list("nowhere") == []
    assert store.list()[0].mtime == pytest.approx(time.time(), abs=300)


def test_upload_and_download(store: Store, tmp_path: Path) -> None:
    files = {"model/weights.bin": os.urandom(6 << 20), "model/empty": b"", "state.json": b"{}"}
    for name, data in files.items():
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    store.upload(tmp_path / "out", "step-1")
    assert [e.path for e in store.list(recursive=True)] == sorted(f"step-1/{name}" for name in files)
    store.download("step-1", tmp_path / "back")
    assert {n: (tmp_path / "back" / n).read_bytes() for n in files} == files
    store.download("step-1/model/empty", tmp_path / "one")
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["empty"]
    with pytest.raises(StorageError, match="no such folder"):
        store.upload(tmp_path / "gone", "step-2")


def test_delete(store: Store) -> None:
    for path in ("keep", "drop/1", "drop/deep/2", "one"):
        store.write_bytes(path, b"x")
    store.delete("drop")
    store.delete("one")
    store.delete("never-there")
    assert not store.exists("drop")
    assert [e.path for e in store.list(recursive=True)] == ["keep"]


def test_checks_pass_and_leave_nothing(store: Store) -> None:
    store.write_bytes("data", b"x")
    store.check_readable()
    store.check_writable()
    assert [e.path for e in store.list()] == ["data"]


def test_check_readable_names_the_missing_folder(store: Store) -> None:
    with pytest.raises(StorageError, match=r"there is nothing at .*absent; check the spelling"):
        store.child("absent").check_readable()


def test_pickle(store: Store) -> None:
    store.write_bytes("x", b"1")  # connected
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store
    assert copy.read_bytes("x") == b"1"


@pytest.mark.parametrize("path", ["..", "../x", "a/../../x", "a/.."])
def test_paths_stay_inside(store: Store, path: str) -> None:
    for use in (store.read_bytes, store.exists, store.child, store.delete, store.list):
        with pytest.raises(StorageError, match="leaves its folder"):
            use(path)


# Addresses


def test_addresses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Store.at("data/x").url == str(tmp_path / "data/x")
    assert Store.at("~/x").url == str(tmp_path / "home/x")
    assert Store.at("file:///a%20b/c").url == "/a b/c"
    assert Store.at("./a/../b").url == str(tmp_path / "b")
    s3 = Store.at("s3://bucket/some//prefix/")
    assert (s3.url, s3.root, s3.is_local) == ("s3://bucket/some/prefix", "bucket/some/prefix", False)
    assert s3.child("x/y").url == "s3://bucket/some/prefix/x/y"
    assert Store.at("gs://bucket").url == "gs://bucket"
    for store in (s3, Store.at("data")):
        assert Store.at(store.url) == store


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "empty"),
        ("s3://", "no bucket"),
        ("s3:///prefix", "no bucket"),
        ("ftp://host/x", "unknown"),
        ("file://data/x", "three slashes"),
        ("s3://bucket/a/../b", "without '..'"),
    ],
)
def test_bad_addresses(url: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        Store.at(url)


def test_keys_are_never_shown(s3_server: S3Server) -> None:
    with pytest.raises(StorageError) as caught:
        Store.at("s3://KEY:SECRET@bucket/x")
    assert "SECRET" not in str(caught.value) and "KEY" not in str(caught.value)
    wrong = S3Config(s3_server.endpoint, "", "AKIDWRONG", "SECRETWRONG")
    with pytest.raises(StorageError) as caught:
        Store.at(s3_server.url(), wrong).check_readable()
    store = Store.at(s3_server.url(), wrong)
    assert "WRONG" not in f"{caught.value} {wrong!r} {store!r} {store.url}"


# Settings


def test_settings_from_the_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    store = Store.at(s3_server.url("from-environment"))
    store.write_bytes("x", b"1")
    assert store.read_bytes("x") == b"1"


def test_environment_for_workers(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert aws_environment(S3Config()) == {}
    given = aws_environment(config(s3_server))
    assert given["AWS_ENDPOINT_URL"] == s3_server.endpoint
    assert given["AWS_REQUEST_CHECKSUM_CALCULATION"] == "when_required"
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    Store.at(s3_server.url("worker")).check_writable()
    assert aws_environment(S3Config(region="eu-north-1"))["AWS_DEFAULT_REGION"] == "eu-north-1"


@pytest.mark.parametrize("s3", [S3Config("ftp://x"), S3Config("http://"), S3Config("http://h:1/path")])
def test_endpoints_that_are_none(s3: S3Config) -> None:
    with pytest.raises(StorageError, match="is no address"):
        Store.at("s3://bucket", s3).exists()


def test_half_a_pair_of_keys() -> None:
    with pytest.raises(StorageError, match="go together"):
        Store.at("s3://bucket", S3Config("http://127.0.0.1:1", access_key="a")).exists()


# Failures: one sentence, within seconds


def calls(store: Store) -> dict[str, object]:
    return {
        "check_readable": store.check_readable,
        "check_writable": store.check_writable,
        "list": store.list,
        "read": lambda: store.read_bytes("x"),
        "write": lambda: store.write_bytes("x", b"1"),
        "delete": lambda: store.delete("x"),
    }


def assert_each_says(store: Store, message: str, seconds: float, names: tuple[str, ...] = ()) -> None:
    for name, call in calls(store).items():
        if names and name not in names:
            continue
        start = time.monotonic()
        with pytest.raises(StorageError, match=message) as caught:
            call()  # type: ignore[operator]
        assert "\n" not in str(caught.value), name
        assert time.monotonic() - start < seconds, name


def test_missing_bucket(s3_server: S3Server) -> None:
    store = Store.at("s3://no-such-bucket/x", config(s3_server))
    assert_each_says(store, "there is no bucket s3://no-such-bucket at http.*; check the name", 5)


@pytest.mark.parametrize("wrong", ["access", "secret", "none"])
def test_wrong_keys(s3_server: S3Server, wrong: str) -> None:
    keys = {
        "access": ("AKIDUNKNOWN", s3_server.secret_key),
        "secret": (s3_server.access_key, "not-the-secret"),
        "none": ("", ""),
    }[wrong]
    store = Store.at(s3_server.url("x"), S3Config(s3_server.endpoint, "", *keys))
    assert_each_says(store, "access denied: .* AWS_ACCESS_KEY_ID .* ~/.aws", 5)


def test_connection_refused() -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    store = Store.at("s3://bucket/x", S3Config(endpoint, "", "a", "b"))
    assert_each_says(
        store, f"connection refused at {endpoint}; check the endpoint", 10, ("check_readable", "write")
    )


def test_tls_on_a_plain_port(s3_server: S3Server) -> None:
    store = Store.at("s3://bucket/x", S3Config(s3_server.endpoint.replace("http:", "https:"), "", "a", "b"))
    assert_each_says(store, "TLS does not work", 10, ("check_readable",))


def test_silent_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unimrg.storage.REQUEST_SECONDS", 1.0)
    monkeypatch.setattr("unimrg.retries.ATTEMPTS", 1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        store = Store.at("s3://bucket/x", S3Config(endpoint, "", "a", "b"))
        assert_each_says(store, "no answer in time", 10, ("check_readable",))


class _LosesWrites(BaseHTTPRequestHandler):
    """Says yes to every upload and keeps half of it; refuses to start a multipart upload."""

    protocol_version = "HTTP/1.1"
    kept: dict[str, int]

    def do_PUT(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(size)
        self.kept[self.path] = size // 2
        self._answer(200)

    def do_HEAD(self) -> None:
        self._answer(200 if self.path in self.kept else 404, self.kept.get(self.path, 0))

    def do_GET(self) -> None:
        self._answer(404)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(403)

    def do_DELETE(self) -> None:
        self._answer(204)

    def _answer(self, status: int, length: int = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("Last-Modified", self.date_time_string())
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def lossy(tmp_path: Path) -> Iterator[Store]:
    handler = type("Handler", (_LosesWrites,), {"kept": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Store.at("s3://bucket/x", S3Config(f"http://127.0.0.1:{server.server_port}", "", "a", "b"))
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_lost_bytes_are_noticed(lossy: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pyarrow.fs.copy_files` would call both of these a success."""
    monkeypatch.setattr("unimrg.retries.WAIT_SECONDS", 0.01)
    with pytest.raises(StorageError, match="holds 50 of 100 bytes; the store lost data"):
        lossy.write_bytes("note", b"x" * 100)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights").write_bytes(bytes(100))
    (tmp_path / "out" / "large").write_bytes(bytes(11 << 20))
    with pytest.raises(StorageError):
        lossy.upload(tmp_path / "out", "step-1")


def test_refused_upload_raises(s3_server: S3Server, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    (tmp_path / "b").write_bytes(bytes(11 << 20))
    wrong = S3Config(s3_server.endpoint, "", s3_server.access_key, "not-the-secret")
    with pytest.raises(StorageError, match="access denied"):
        Store.at(s3_server.url("x"), wrong).upload(tmp_path, "step-1")


def test_a_refused_write_leaves_the_old_content(s3_server: S3Server) -> None:
    store = Store.at(s3_server.url("kept"), config(s3_server))
    store.write_bytes("x", b"old")
    wrong = S3Config(s3_server.endpoint, "", s3_server.access_key, "not-the-secret")
    with pytest.raises(StorageError, match="access denied"):
        Store.at(store.url, wrong).write_bytes("x", b"new")
    assert store.read_bytes("x") == b"old"


@pytest.mark.parametrize("size", [100, 11 << 20])
def test_a_failing_source_leaves_no_half_object(store: Store, size: int) -> None:
    def source() -> Iterator[bytes]:
        yield bytes(size)
        raise OSError(5, "Input/output error")

    with pytest.raises(StorageError, match=r"can't write .*/x"):
        store._put("x", source, 2 * size)
    assert not store.exists("x")


def test_local_failures(tmp_path: Path) -> None:
    store = Store.at(str(tmp_path))
    store.write_bytes("file", b"x")
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        store.write_bytes("file/below", b"x")
    with pytest.raises(StorageError, match="directory"):
        store.read_bytes("")
    with pytest.raises(StorageError, match="refusing to delete all"):
        Store.at("/").delete("")
    with pytest.raises(StorageError, match="can't read"):
        store.read_bytes("nul\0character")
    with pytest.raises(StorageError, match="can't write"):
        Store.at("/proc/never").check_writable()
    with pytest.raises(StorageError, match="refusing to delete all"):
        Store.at("s3://bucket").delete("")


def test_a_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.at(str(tmp_path))
    store.write_bytes("x", b"old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        store.write_bytes("x", b"new and longer")
    assert store.read_bytes("x") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_concurrent_writers(store: Store) -> None:
    """Readers see one of the writes, whole."""
    data = [bytes([i]) * 50_000 for i in range(4)]
    threads = [threading.Thread(target=store.write_bytes, args=("x", block)) for block in data]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.read_bytes("x") in data


def test_listing_a_folder_that_is_being_made_never_fails(tmp_path: Path) -> None:
    """Somebody looks for the first checkpoint of a run that is about to write it."""
    store, folder = Store.at(str(tmp_path)), tmp_path / "soon"
    ended = threading.Event()

    def make_and_remove() -> None:
        while not ended.is_set():
            folder.mkdir()
            folder.rmdir()

    maker = threading.Thread(target=make_and_remove)
    maker.start()
    try:
        for _ in range(3000):
            assert store.list("soon") == []
    finally:
        ended.set()
        maker.join()
