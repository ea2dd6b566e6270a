"""A small Hugging Face hub on this machine: real sockets, the endpoints that huggingface_hub asks, and their faults."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories.

    repositories  hub id -> folder
    refused       hub id -> (status, the hub's error code)
    cut           (file's name, bytes): once, the connection ends after so many bytes
    requests      "METHOD path" of each request, with its range
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.repositories: dict[str, Path] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self.cut: tuple[str, int] | None = None
        self.always_cut = False
        self.requests: list[str] = []
        self.agents: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is part of the tests."""


class Requests(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        self.server.agents.append(self.headers.get("Authorization", ""))
        found = re.match(r"(?:/api/models)?/([^/]+/[^/]+)(.*)", path)
        hub_id, rest = (found[1], found[2]) if found else ("", "")
        if hub_id in self.server.refused:
            return self._refuse(*self.server.refused[hub_id])
        if hub_id not in self.server.repositories:
            return self._refuse(401, "RepoNotFound")
        folder = self.server.repositories[hub_id]
        if rest.startswith("/resolve/"):
            return self._file(folder / rest.split("/", 3)[3], body)
        files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if "/tree/" in rest:
            entries = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": tag(f)} for n, f in files.items()]
            return self._json(entries)
        siblings = [{"rfilename": name, "size": file.stat().st_size} for name, file in files.items()]
        return self._json({"id": hub_id, "sha": SHA, "siblings": siblings, "private": False, "tags": []})

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _file(self, path: Path, body: bool) -> None:
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        raw = path.read_bytes()
        start = int(re.findall(r"\d+", self.headers["Range"])[0]) if self.headers.get("Range") else 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{tag(path)}"')
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(raw) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(raw) - 1}/{len(raw)}")
        self.end_headers()
        if not body:
            return None
        cut = self.server.cut
        if cut is not None and path.name == cut[0]:
            self.server.cut = cut if self.server.always_cut else None
            self.wfile.write(raw[start : start + cut[1]])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return None
        self.wfile.write(raw[start:])
        return None


def tag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
