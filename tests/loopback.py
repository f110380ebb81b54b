"""A stand-in for the hosts that weights and data sets come from, on the loopback interface.

    with serve(folder) as url:
        environment = {"HF_ENDPOINT": url, "ANIMASK_RELEASE_URL": f"{url}/mae"}

folder/mae/... is served as the released weights, folder/datasets/OWNER/NAME/... as a data set of the Hugging Face hub:
the few questions that its library asks before it downloads are answered, all others with 404.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder for as long as the context lasts; gives the address, http://127.0.0.1:PORT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, folder))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, *args):
        self.folder = folder
        super().__init__(*args)

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            self._send_json(self._about(found[1]))
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+(/.*)?", path):
            self._send_json(self._tree(found[1], (found[2] or "").strip("/")))
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/[^/]+", path):
            self._send_json(self._paths(found[1], body))
        elif found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._send_file(self.folder / "datasets" / found[1] / found[2])
        else:
            self._send_file(self.folder / path.strip("/"))

    do_HEAD = do_POST = do_GET

    def _files(self, repo: str) -> dict[str, Path] | None:
        root = self.folder / "datasets" / repo
        if not root.is_dir():
            return None
        return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}

    def _about(self, repo: str):
        files = self._files(repo)
        if files is None:
            return None
        names = [{"rfilename": name} for name in files]
        return {"id": repo, "sha": COMMIT, "private": False, "disabled": False, "gated": False, "siblings": names}

    def _tree(self, repo: str, under: str):
        root = self.folder / "datasets" / repo
        if self._files(repo) is None or not (root / under).is_dir():
            return None
        everything = "recursive=true" in self.path.lower()
        found = (root / under).rglob("*") if everything else (root / under).iterdir()
        return [_entry(path.relative_to(root).as_posix(), path) for path in sorted(found)]

    def _paths(self, repo: str, body: bytes):
        files = self._files(repo)
        if files is None:
            return None
        asked = json.loads(body)["paths"] if body.startswith(b"{") else []
        return [_entry(name, files[name]) for name in asked if name in files]

    def _send_json(self, content) -> None:
        self._send(404 if content is None else 200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send_file(self, path: Path) -> None:
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        self._send(200, path.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(path)}"'})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if status == 200 and span:
            first, last = int(span[1]), int(span[2] or len(body) - 1)
            headers = headers | {"Content-Range": f"bytes {first}-{min(last, len(body) - 1)}/{len(body)}"}
            status, body = 206, body[first : last + 1]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Tests are quiet."""


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


def _entry(name: str, path: Path) -> dict:
    if path.is_dir():
        return {"type": "directory", "path": name, "size": 0, "oid": COMMIT}
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _digest(path)}
