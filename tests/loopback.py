"""A stand-in for the hosts that weights and data sets come from, on the loopback interface.

    with serve(folder) as url:
        environment = {"HF_ENDPOINT": url, "ANIMASK_RELEASE_URL": f"{url}/mae"}

folder/mae/... is served as the released weights, folder/datasets/OWNER/NAME/... as a data set of the Hugging Face hub,
folder/models/OWNER/NAME/... as a model of it, folder/models/OWNER/NAME@REVISION/... as another revision of that. The
few questions that its library asks before it downloads or uploads are answered, all others with 404. What is uploaded
lands in the folder, and is served from then on.

`serve(folder, cut={"/path"})` breaks the first transfer of a path off in its middle; `serve(...).asked` lists requests.
"""

import base64
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


class Address(str):
    """The address of a server. asked: (method, path, Range header or "") of every request so far."""

    asked: list[tuple[str, str, str]]


@contextmanager
def serve(folder: Path, cut: set[str] | None = None) -> Iterator[Address]:
    """Serve a folder for as long as the context lasts; gives the address, http://127.0.0.1:PORT.

    cut: paths whose first transfer breaks off in its middle.
    """
    asked: list[tuple[str, str, str]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, folder, asked, set(cut or ())))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = Address(f"http://127.0.0.1:{server.server_address[1]}")
    address.asked = asked
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, asked: list, cut: set[str], *args):
        self.folder, self.asked, self.cut = folder, asked, cut
        super().__init__(*args)

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.asked.append((self.command, path, self.headers.get("Range") or ""))
        if found := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+?)(?:/revision/([^/]+))?", path):
            self._send_json(self._about(self._root(*found.groups()), found[2]))
        elif found := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)/tree/([^/]+)(/.*)?", path):
            self._send_json(self._tree(self._root(*found.groups()[:3]), (found[4] or "").strip("/")))
        elif found := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            self._send_json(self._paths(self._root(*found.groups()), body))
        elif found := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            root = self._root(found[1] or "models", found[2], found[3])
            self._send_file(root / found[4], commit_of(root), path)
        else:
            self._send_file(self.folder / path.strip("/"), COMMIT, path)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if not path.startswith("/api/") or "/paths-info/" in path:
            self.do_GET()
            return
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        body = b"".join(_chunks(self.rfile)) if chunked else self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.command, path, ""))
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            (self.folder / "models" / repo).mkdir(parents=True, exist_ok=True)
            self._send_json({"url": f"http://{self.headers['Host']}/{repo}", "id": repo, "name": repo})
        elif path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/branch/[^/]+", path):
            self._send_json({})
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/[^/]+", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self._send_json({"files": modes})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            self._commit(found[1], found[2], body)
        else:
            self._send_json(None)

    def _commit(self, repo: str, revision: str, body: bytes) -> None:
        """Write the files of a commit; one made for a revision that is not main makes that revision."""
        root = self.folder / "models" / (repo if revision == "main" else f"{repo}@{revision}")
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                place = root / line["value"]["path"]
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(base64.b64decode(line["value"]["content"]))
        url = f"http://{self.headers['Host']}/{repo}/commit/{commit_of(root)}"
        self._send_json({"success": True, "commitOid": commit_of(root), "commitUrl": url})

    def _root(self, kind: str, repo: str, revision: str | None) -> Path:
        """Where the files of a revision lie; COMMIT, main and revisions that nobody made are the same."""
        root = self.folder / kind / repo
        others = [root.with_name(f"{root.name}@{revision}"), *root.parent.glob(f"{root.name}@*")]
        return next((other for other in others if other.is_dir() and revision in _names_of(other)), root)

    def _about(self, root: Path, repo: str):
        files = _files(root)
        if files is None:
            return None
        names = [{"rfilename": name} for name in files]
        about = {"id": repo, "sha": commit_of(root), "private": False, "disabled": False, "gated": False}
        return about | {"siblings": names}

    def _tree(self, root: Path, under: str):
        if _files(root) is None or not (root / under).is_dir():
            return None
        everything = "recursive=true" in self.path.lower()
        found = (root / under).rglob("*") if everything else (root / under).iterdir()
        return [_entry(path.relative_to(root).as_posix(), path) for path in sorted(found)]

    def _paths(self, root: Path, body: bytes):
        files = _files(root)
        if files is None:
            return None
        asked = json.loads(body)["paths"] if body.startswith(b"{") else []
        return [_entry(name, files[name]) for name in asked if name in files]

    def _send_json(self, content) -> None:
        self._send(404 if content is None else 200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send_file(self, path: Path, commit: str, asked: str) -> None:
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_digest(path)}"', "Accept-Ranges": "bytes"}
        breaks = self.command == "GET" and asked in self.cut
        self.cut.discard(asked if breaks else "")
        self._send(200, path.read_bytes(), headers, breaks)

    def _send(self, status: int, body: bytes, headers: dict[str, str], breaks: bool = False) -> None:
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
            self.wfile.write(body[: len(body) // 2] if breaks else body)
        if breaks:
            self.close_connection = True

    def log_message(self, *_) -> None:
        """Tests are quiet."""


def commit_of(root: Path) -> str:
    """The commit of the files in a folder: COMMIT, or of OWNER/NAME@REVISION another one."""
    revision = root.name.partition("@")[2]
    return hashlib.sha1(revision.encode(), usedforsecurity=False).hexdigest() if revision else COMMIT


def _names_of(root: Path) -> tuple[str, str]:
    return root.name.partition("@")[2], commit_of(root)


def _files(root: Path) -> dict[str, Path] | None:
    if not root.is_dir():
        return None
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}


def _chunks(stream) -> Iterator[bytes]:
    """The body of a request that tells its length piece by piece."""
    while size := int(stream.readline().split(b";")[0], 16):
        yield stream.read(size)
        stream.readline()
    stream.readline()


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


def _entry(name: str, path: Path) -> dict:
    if path.is_dir():
        return {"type": "directory", "path": name, "size": 0, "oid": COMMIT}
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _digest(path)}
