"""A proxy in front of a real S3 server that breaks answers on purpose, by rule.

    with faulty(s3_server) as proxy:
        proxy.rules = [Rule("reset", method="PUT", key="notes/", times=2)]
        Store.at(proxy.server.url("x"), ...)          # the same keys, another endpoint
        assert proxy.count("reset") == 2

Everything else passes byte by byte: the `Host` header too, which is part of a signed request. Bodies are held
in memory, one request at a time per connection, any number of connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.s3 import S3Server

HEAD_LIMIT = 1 << 20
TRICKLES = 20
PAGE = b"<!DOCTYPE html><html><head><title>Log in</title></head><body>Welcome to the network.</body></html>"

# Answers given without asking the server: status, reason, S3 error code.
REFUSALS = {
    "500": (500, "Internal Server Error", "InternalError"),
    "502": (502, "Bad Gateway", ""),
    "503": (503, "Service Unavailable", "ServiceUnavailable"),
    "504": (504, "Gateway Timeout", ""),
    "slow-down": (503, "Slow Down", "SlowDown"),
    "too-many": (429, "Too Many Requests", "TooManyRequests"),
    "request-timeout": (400, "Bad Request", "RequestTimeout"),
    "expired": (400, "Bad Request", "ExpiredToken"),
    "denied": (403, "Forbidden", "AccessDenied"),
    "no-bucket": (404, "Not Found", "NoSuchBucket"),
}
FAULTS = (
    *REFUSALS,
    "pass",  # nothing but the hook
    "reset",  # RST before the server hears of the request
    "lost-answer",  # the server does it, then RST
    "truncated",  # the whole length promised, half of it sent
    "wrong-content",  # 200 and a page of HTML
    "wrong-bytes",  # the right length, other bytes
    "slow",  # the answer trickles over `seconds`
    "silent",  # no answer for `seconds`, then RST
)


@dataclass
class Rule:
    """Which requests to break and how; the first rule that fires wins.

    method, key: regular expressions; the first for the whole method, the second searched in the unquoted
    `/bucket/key?query`. Of the matching requests the first `skip` pass, then a `share` of at most `times`
    breaks, the same ones whenever the same requests come with the same `seed`. hook: called, in a thread,
    before the request is handled.
    """

    fault: str
    method: str = ""
    key: str = ""
    skip: int = 0
    times: int | None = None
    share: float = 1.0
    seed: int = 0
    seconds: float = 1.0
    hook: Callable[[], object] | None = None
    matched: int = field(default=0, init=False)
    fired: int = field(default=0, init=False)
    _seen: Counter[tuple[str, str]] = field(default_factory=Counter, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.fault not in FAULTS:
            raise ValueError(f"unknown fault {self.fault!r}")

    def fires(self, method: str, target: str) -> bool:
        if not re.fullmatch(self.method or ".*", method) or not re.search(self.key, target):
            return False
        self.matched += 1
        if self.matched <= self.skip or (self.times is not None and self.fired >= self.times):
            return False
        # Drawn from the request itself and how often it came, so that the order among threads is no matter.
        path = target.partition("?")[0]
        self._seen[method, path] += 1
        name = f"{self.seed} {method} {path} {self._seen[method, path]}"
        if random.Random(name).random() >= self.share:
            return False
        self.fired += 1
        return True


@dataclass(frozen=True)
class Seen:
    """One request that came through. target: unquoted `/bucket/key?query`; fault: "" when it passed."""

    method: str
    target: str
    fault: str


class FaultyS3:
    """server: how to reach the S3 server through here. log: every request. errors: the proxy's own."""

    def __init__(self, upstream: S3Server) -> None:
        where = urlsplit(upstream.endpoint)
        self._upstream = (where.hostname or "", where.port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.server = replace(upstream, endpoint=f"http://127.0.0.1:{self._listener.getsockname()[1]}")
        self.rules: list[Rule] = []
        self.log: list[Seen] = []
        self.errors: list[BaseException] = []

    def count(self, fault: str | None = None) -> int:
        """How often it broke a request in this way; None: in any way."""
        return sum(bool(s.fault) if fault is None else s.fault == fault for s in self.log)

    async def serve(self, stopping: asyncio.Event) -> None:
        tasks: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                await _Connection(self, reader, writer).run()
            except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass  # the client went away, or the proxy is stopping
            except Exception as error:
                self.errors.append(error)
            finally:
                tasks.discard(task)
                writer.close()

        server = await asyncio.start_server(connected, sock=self._listener, limit=HEAD_LIMIT)
        await stopping.wait()
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def choose(self, method: str, target: str) -> Rule | None:
        rule = next((rule for rule in self.rules if rule.fires(method, target)), None)
        self.log.append(Seen(method, target, rule.fault if rule else ""))
        return rule

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self._upstream, limit=HEAD_LIMIT)


@contextlib.contextmanager
def faulty(upstream: S3Server) -> Iterator[FaultyS3]:
    """A running proxy without rules. Raises what went wrong inside it, at the end."""
    proxy = FaultyS3(upstream)
    loop = asyncio.new_event_loop()
    stopping = asyncio.Event()
    thread = threading.Thread(target=_run, args=(loop, proxy.serve(stopping)), daemon=True, name="faulty-s3")
    thread.start()
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join()
    if proxy.errors:
        raise proxy.errors[0]


def _run(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> None:
    try:
        loop.run_until_complete(work)
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


class _Connection:
    """One client and, once it asks for something that passes, one connection to the server."""

    def __init__(self, proxy: FaultyS3, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.proxy, self.reader, self.writer = proxy, reader, writer
        self.server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self) -> None:
        try:
            while await self._exchange():
                pass
        finally:
            self._hang_up()

    async def _exchange(self) -> bool:
        """Handle one request; False when the connection ends with it."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if not error.partial:
                return False
            raise
        method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        if _field(head, b"expect").lower() == b"100-continue":
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = re.sub(rb"(?i)\r\nexpect:[^\r]*", b"", head)
        body = await _body(self.reader, head)
        rule = self.proxy.choose(method, unquote(target))
        if rule and rule.hook:
            await asyncio.get_running_loop().run_in_executor(None, rule.hook)
        alive = await (self._break(rule, method, head, body) if rule else self._pass(method, head, body))
        return alive and _field(head, b"connection").lower() != b"close"

    async def _pass(self, method: str, head: bytes, body: bytes) -> bool:
        answer, content = await self._ask(method, head, body)
        await self._send(answer + content)
        return _field(answer, b"connection").lower() != b"close"

    async def _break(self, rule: Rule, method: str, head: bytes, body: bytes) -> bool:
        fault = rule.fault
        if fault in REFUSALS:
            await self._send(_refusal(fault, method))
            return True
        if fault == "wrong-content":
            page = b"" if method == "HEAD" else PAGE
            await self._send(_head(200, "OK", "text/html", len(PAGE)) + page)
            return True
        if fault in ("reset", "silent"):
            await asyncio.sleep(rule.seconds if fault == "silent" else 0)
            return self._reset()
        if fault == "pass":
            return await self._pass(method, head, body)
        answer, content = await self._ask(method, head, body)
        if fault == "lost-answer":
            return self._reset()
        if fault == "truncated":  # an answer without a body doesn't come at all
            await self._send(answer + content[: len(content) // 2] if content else b"")
            return False
        if fault == "slow":
            await self._trickle(answer + content, rule.seconds)
        else:
            await self._send(answer + _other_bytes(answer, content))
        return True

    async def _ask(self, method: str, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        """The server's answer: head and body, as they came."""
        reused = self.server is not None
        reader, writer = self.server = self.server or await self.proxy.connect()
        try:
            writer.write(head + body)
            await writer.drain()
            answer = await reader.readuntil(b"\r\n\r\n")
            while answer.split(b" ", 2)[1].startswith(b"1"):
                answer = await reader.readuntil(b"\r\n\r\n")
        except (ConnectionError, asyncio.IncompleteReadError):
            self._hang_up()
            if not reused:
                raise
            return await self._ask(method, head, body)  # it was closed while idle
        status = int(answer.split(b" ", 2)[1])
        bare = method == "HEAD" or status in (204, 304)
        content = b"" if bare else await _body(reader, answer)
        if _field(answer, b"connection").lower() == b"close":
            self._hang_up()
        return answer, content

    async def _send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def _trickle(self, data: bytes, seconds: float) -> None:
        step = max(1, -(-len(data) // TRICKLES))
        for start in range(0, len(data), step):
            await self._send(data[start : start + step])
            await asyncio.sleep(seconds / TRICKLES)

    def _reset(self) -> bool:
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        return False

    def _hang_up(self) -> None:
        if self.server is not None:
            self.server[1].close()
            self.server = None


def _field(head: bytes, name: bytes) -> bytes:
    """The value of a header, "" when it is missing. name: in small letters."""
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip()
    return b""


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """The body that belongs to a head, with the framing it came in."""
    if _field(head, b"transfer-encoding").lower() != b"chunked":
        return await reader.readexactly(int(_field(head, b"content-length") or 0))
    parts: list[bytes] = []
    while True:
        line = await reader.readuntil(b"\r\n")
        parts.append(line)
        size = int(line.split(b";")[0], 16)
        if size:
            parts.append(await reader.readexactly(size + 2))
            continue
        while line != b"\r\n":  # trailers
            line = await reader.readuntil(b"\r\n")
            parts.append(line)
        return b"".join(parts)


def _refusal(fault: str, method: str) -> bytes:
    status, reason, code = REFUSALS[fault]
    if not code:  # a gateway on the way, which knows nothing of S3
        kind, text = "text/html", f"<html><body><h1>{status} {reason}</h1></body></html>"
    else:
        kind = "application/xml"
        text = '<?xml version="1.0" encoding="UTF-8"?>\n<Error>'
        text += f"<Code>{code}</Code><Message>{reason}</Message><RequestId>0123ABCD</RequestId></Error>"
    # As S3 does: the answer to HEAD has no body, so it names no code.
    content = b"" if method == "HEAD" else text.encode()
    return _head(status, reason, kind, len(content)) + content


def _head(status: int, reason: str, kind: str, length: int) -> bytes:
    return f"HTTP/1.1 {status} {reason}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n".encode()


def _other_bytes(answer: bytes, content: bytes) -> bytes:
    if _field(answer, b"transfer-encoding"):
        raise ValueError("wrong-bytes is for answers with a Content-Length; narrow the rule to objects")
    return bytes(byte ^ 0xFF for byte in content)
