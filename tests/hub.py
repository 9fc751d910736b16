"""A small Hugging Face hub on the loopback address: the few routes that fetching a snapshot takes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REVISIONS = {"main": "a" * 40, "old": "b" * 40}


@dataclass
class Hub:
    """Repositories (name -> revision -> path -> content), and how often each file was fetched."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    fetched: Counter[str] = field(default_factory=Counter)
    endpoint: str = ""

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> None:
        self.repos.setdefault(repo, {})[revision] = files


@contextlib.contextmanager
def run_hub() -> Iterator[Hub]:
    """Serve a hub in a thread."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Stay silent."""

    def _answer(self, body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if api else parts
        revisions = self.hub.repos.get(f"{owner}/{name}")
        if revisions is None:
            return self._send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        wanted = rest[1] if len(rest) > 1 else "main"
        revision = next((r for r in revisions if wanted in (r, REVISIONS[r])), None)
        if revision is None:
            return self._send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        files, commit = revisions[revision], REVISIONS[revision]
        if api and rest[:1] == ["tree"]:
            return self._json([self._entry(path, content) for path, content in files.items()], body)
        if api:
            siblings = [{"rfilename": path} for path in files]
            return self._json({"id": f"{owner}/{name}", "sha": commit, "siblings": siblings}, body)
        content = files.get("/".join(rest[2:]))
        if content is None:
            return self._send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
        if body:
            self.hub.fetched[f"{owner}/{name}/{'/'.join(rest[2:])}"] += 1
        tag = hashlib.sha1(content).hexdigest()
        return self._send(200, content, body, {"ETag": f'"{tag}"', "X-Repo-Commit": commit})

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": path}

    def _json(self, content: Any, body: bool) -> None:
        self._send(200, json.dumps(content).encode(), body, {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)
