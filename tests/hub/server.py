"""A stand-in for the hub: enough of its protocol to download a model, and ways to fail."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`repos` maps names to files. `lfs_above` bytes make a file a large one, addressed by its SHA-256."""

    def __init__(self, lfs_above: int = 1000) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.lfs_above = lfs_above
        self.break_after: int | None = None
        """Bytes of large files after which the connection breaks and everything is answered with 503."""
        self.fail_with: int | None = None
        """An HTTP status to answer everything with."""
        self.requests: list[tuple[str, str, str | None]] = []
        """(method, path, Range) of each."""
        self.sent: dict[str, int] = {}
        """Bytes of bodies by file name."""
        self.authorizations: set[str | None] = set()
        self.ignores_ranges = False
        self.store: str | None = None
        """Where large files are said to be, as the hub sends one elsewhere for them; `store_url` is this server
        by another name."""
        self.store_authorizations: set[str | None] = set()
        self.lock = threading.Lock()
        self.url = self.store_url = ""

    def add(self, name: str, files: dict[str, bytes]) -> None:
        self.repos[name] = files

    @contextmanager
    def serving(self) -> Iterator[Hub]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        self.store_url = f"http://localhost:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def is_large(self, content: bytes) -> bool:
        return len(content) > self.lfs_above

    def etag(self, content: bytes) -> str:
        if self.is_large(content):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            with hub.lock:
                hub.requests.append((self.command, self.path, self.headers.get("Range")))
                hub.authorizations.add(self.headers.get("Authorization"))
            if hub.fail_with is not None:
                return self._error(hub.fail_with, None)
            path = self.path.split("?")[0]
            stored = path.startswith("/stored/")
            if stored:
                hub.store_authorizations.add(self.headers.get("Authorization"))
                path = path.removeprefix("/stored")
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            match = api or file
            if match is None or match.group(1) not in hub.repos:
                return self._error(404 if hub.authorizations - {None} else 401, "RepoNotFound")
            name = match.group(1)
            if name in hub.gated and not (api and api.group(2) != "tree"):
                return self._error(401, "GatedRepo")
            revision = match.group(3) if api else match.group(2)
            if revision not in (None, "main", COMMIT):
                return self._error(404, "RevisionNotFound")
            if api:
                return self._json(self._tree(name) if api.group(2) == "tree" else self._info(name))
            assert file is not None
            content = hub.repos[name].get(file.group(3))
            if content is None:
                return self._error(404, "EntryNotFound")
            return self._file(file.group(3), content, with_body, stored)

        def _info(self, name: str) -> dict[str, Any]:
            siblings = []
            for path, content in hub.repos[name].items():
                entry: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": hub.etag(content)}
                if hub.is_large(content):
                    entry["lfs"] = {"sha256": hub.etag(content), "size": len(content), "pointerSize": 130}
                siblings.append(entry)
            gated = "manual" if name in hub.gated else False
            return {"id": name, "modelId": name, "sha": COMMIT, "private": False, "gated": gated,
                    "siblings": siblings, "tags": [], "downloads": 0}  # fmt: skip

        def _tree(self, name: str) -> list[dict[str, Any]]:
            files = []
            for path, content in hub.repos[name].items():
                entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
                entry["oid"] = hub.etag(content)[:40]
                if hub.is_large(content):
                    entry["lfs"] = {"oid": hub.etag(content), "size": len(content), "pointerSize": 130}
                files.append(entry)
            return files

        def _file(self, path: str, content: bytes, with_body: bool, stored: bool) -> None:
            start = 0
            end = len(content)
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if hub.store and hub.is_large(content) and not stored:
                self.send_response(302)
                self.send_header("Location", f"{hub.store}/stored{self.path}")
                end = 0
            elif wanted and with_body and not hub.ignores_ranges:
                start = int(wanted.group(1))
                end = min(int(wanted.group(2) or end) + bool(wanted.group(2)), end)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(end - start))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{hub.etag(content)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if hub.is_large(content):
                self.send_header("X-Linked-Etag", f'"{hub.etag(content)}"')
                self.send_header("X-Linked-Size", str(len(content)))
            self.end_headers()
            if not with_body:
                return
            for at in range(start, end, 16384):
                piece = content[at : min(at + 16384, end)]
                with hub.lock:
                    hub.sent[path] = hub.sent.get(path, 0) + len(piece)
                    broken = hub.break_after is not None and sum(hub.sent.values()) > hub.break_after
                if broken and hub.is_large(content):
                    hub.fail_with = 503
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.close()
                    return
                self.wfile.write(piece)

        def _json(self, value: Any) -> None:
            self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _error(self, status: int, code: str | None) -> None:
            headers = {"X-Error-Code": code, "X-Error-Message": "no"} if code else {}
            self._reply(status, b"{}", headers)

        def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler
