"""A server with the part of the hub's protocol that downloads need."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest

COMMIT, OTHER = "a" * 40, "b" * 40
LARGE = 1000  # files of more bytes are in LFS on this server


def git_sha1(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def digest_of(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest() if len(body) > LARGE else git_sha1(body)


class Hub(http.server.BaseHTTPRequestHandler):
    """The repo org/name.

    Attributes:
        files: path -> content.
        commit: commit of every branch.
        fault: "STATUS CODE" of every answer, or None.
        got: requested files.
        asked: requests for the listing.
        ranges: Range headers.
        damage: file -> number of times that it is sent with wrong bytes.
        pause: seconds before a large file is sent.
        lie: changes the listing before it is sent.
        etag: the ETag of every file; None: its digest.
        more: bytes to send after each file, without end if None.
    """

    files: ClassVar[dict[str, str | bytes]] = {}
    commit = COMMIT
    fault: str | None = None
    got: ClassVar[list[str]] = []
    asked: ClassVar[list[str]] = []
    ranges: ClassVar[list[str]] = []
    damage: ClassVar[dict[str, int]] = {}
    pause = 0.0
    lie: ClassVar[Callable[[dict[str, Any]], None] | None] = None
    etag: str | None = None
    more: bytes | None = b""
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.fault:
            status, code = self.fault.split()
            self.reply(int(status), b"{}", {"X-Error-Code": code, "X-Error-Message": code})
        elif path.startswith("/api/models/org/name"):
            self.asked.append(path)
            info = {"id": "org/name", "sha": self.commit, "siblings": self.listing()}
            if type(self).lie is not None:
                type(self).lie(info)  # type: ignore[misc]
            self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif path.startswith("/org/name/resolve/"):
            revision, _, file = path.removeprefix("/org/name/resolve/").partition("/")
            assert revision == self.commit
            self.send_file(file)
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def body(self, file: str) -> bytes:
        content = self.files[file]
        return content if isinstance(content, bytes) else content.encode()

    def listing(self) -> list[dict[str, Any]]:
        entries = []
        for name in self.files:
            body = self.body(name)
            entry: dict[str, Any] = {"rfilename": name, "size": len(body), "blobId": git_sha1(body)}
            if len(body) > LARGE:
                entry["lfs"] = {"sha256": digest_of(body), "size": len(body), "pointerSize": 1}
            entries.append(entry)
        return entries

    def send_file(self, file: str) -> None:
        body = self.body(file)
        headers = {"ETag": f'"{self.etag or digest_of(body)}"', "X-Repo-Commit": self.commit}
        if self.command == "HEAD":
            self.reply(200, body, headers)
            return
        self.got.append(file)
        if self.damage.get(file, 0) > 0:
            self.damage[file] -= 1
            body = bytes(reversed(body))
        if len(body) > LARGE:
            time.sleep(self.pause)
        if self.more is None:
            self.send_without_end(body, headers)
            return
        body += self.more
        if wanted := self.headers.get("Range"):
            self.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            span = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.reply(206, body[start:], headers | {"Content-Range": span})
        else:
            self.reply(200, body, headers)

    def send_without_end(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for key, value in {**headers, "Connection": "close"}.items():
            self.send_header(key, value)
        self.end_headers()
        self.close_connection = True
        try:
            self.wfile.write(body)
            for _ in range(100):  # 100 MB
                self.wfile.write(bytes(1 << 20))
        except OSError:
            pass  # the other side has had enough

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serve(files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """Run the server. The environment names it as the hub."""
    lists: dict[str, Any] = {"got": [], "asked": [], "ranges": [], "damage": {}}
    handler = type("Handler", (Hub,), {"files": files, **lists})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setenv("HF_TOKEN", "")
        # Read once, when it was first imported: by then the tests' environment said offline.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield handler
        running.shutdown()
        thread.join()
