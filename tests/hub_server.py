"""A hub on the loopback that speaks as much of the real one's protocol as huggingface_hub needs to list and fetch a model."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "bytedance-research/Lance"
LARGE = (".safetensors", ".pth")  # what the hub keeps as LFS


class Sent(NamedTuple):
    """One answered request for a file: its name, the Range header, and the bytes that went out."""

    name: str
    range: str | None
    size: int


@dataclass
class Hub:
    """The served tree, what was asked for, and what is to go wrong."""

    tree: Path
    url: str = ""
    sent: list[Sent] = field(default_factory=list)
    stall_after: dict[str, int] = field(default_factory=dict)  # bytes, then silence
    cut_after: dict[str, int] = field(default_factory=dict)  # bytes, then the connection is closed, once
    damaged: set[str] = field(default_factory=set)  # other bytes than those that are announced
    released: threading.Event = field(default_factory=threading.Event)

    def names(self) -> list[str]:
        return sorted(path.relative_to(self.tree).as_posix() for path in self.tree.rglob("*") if path.is_file())

    def info(self) -> dict[str, Any]:
        return {"id": REPOSITORY, "sha": COMMIT, "siblings": [self._sibling(name) for name in self.names()]}

    def _sibling(self, name: str) -> dict[str, Any]:
        content = (self.tree / name).read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        found = {"rfilename": name, "size": len(content), "blobId": blob}
        if name.endswith(LARGE):
            found["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 135}
        return found

    def content(self, name: str) -> bytes:
        content = (self.tree / name).read_bytes()
        return content[:-1] + bytes([content[-1] ^ 1]) if name in self.damaged else content


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path in (f"/api/models/{REPOSITORY}", f"/api/models/{REPOSITORY}/revision/main"):
            self._answer(200, json.dumps(self.hub.info()).encode(), {"Content-Type": "application/json"})
        elif match := re.fullmatch(f"/{REPOSITORY}/resolve/({COMMIT}|main)/(.+)", path):
            self._resolve(match[2])
        elif path.startswith("/cdn/") and path[5:] in self.hub.names():
            self._file(path[5:])
        else:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})

    do_HEAD = do_GET  # noqa: N815

    def _resolve(self, name: str) -> None:
        """Large files are redirected to where they are stored, as on the hub."""
        if name not in self.hub.names():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        elif name.endswith(LARGE):
            lfs = self.hub._sibling(name)["lfs"]
            linked = {"X-Linked-Etag": f'"{lfs["sha256"]}"', "X-Linked-Size": str(lfs["size"])}
            self._answer(302, b"", {"Location": f"{self.hub.url}/cdn/{name}", **linked})
        else:
            self._file(name)

    def _file(self, name: str) -> None:
        whole = self.hub.content(name)
        asked = self.headers.get("Range")
        begin = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        if begin >= len(whole):
            self._answer(416, b"", {"Content-Range": f"bytes */{len(whole)}"})
            return
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{len(whole) - 1}/{len(whole)}")
        self._headers(len(whole) - begin, {"ETag": f'"{hashlib.sha256(whole).hexdigest()}"', "Accept-Ranges": "bytes"})
        if self.command == "GET":
            self._body(name, asked, begin, whole)

    def _body(self, name: str, asked: str | None, begin: int, whole: bytes) -> None:
        stall, cut = self.hub.stall_after.pop(name, None), self.hub.cut_after.pop(name, None)
        end = min(end for end in (stall, cut, len(whole)) if end is not None)
        self.hub.sent.append(Sent(name, asked, end - begin))  # before the client can have all of it and go on
        self.wfile.write(whole[begin:end])
        self.wfile.flush()
        if stall is not None:
            self.hub.released.wait(60)
        if end < len(whole):
            self.close_connection = True

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        self._headers(len(body), headers)
        if self.command == "GET":
            self.wfile.write(body)

    def _headers(self, length: int, headers: dict[str, str]) -> None:
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def serve(tree: Path) -> Iterator[Hub]:
    """A running hub whose one repository holds the files of a folder."""
    hub = Hub(tree)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
