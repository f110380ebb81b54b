"""What stands between the network and Gradio: what may be asked, how large and how slow, and how much of it is kept.

Gradio has a limit for uploads alone, and uvicorn waits for a request that has begun as long as the visitor likes.
"""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

HEAD_S = 20.0  # that a connection may take to say what it wants
STORE_BYTES = 2_000_000_000  # of uploads that are kept
MOST_CONNECTIONS = 400  # at once; above, a request is answered by 503. Linux lets a process open 1,024 files
# what the page asks for; Gradio also has a cutter of videos, a proxy, and an editor of the program
_API = "/gradio_api/"
ADDRESSES = {"/", "/config", "/config/", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/pwa_icon"} | {
    _API + name
    for name in ("app_id", "cancel", "component_server", "component_server/", "info", "info/", "queue/data",
                 "queue/join", "reset", "reset/", "run/predict", "startup-events", "theme.css", "upload",
                 "upload_progress")
}  # fmt: skip
FOLDERS = ("/assets/", "/pwa_icon/", "/static/", "/svelte/", _API + "file=", _API + "heartbeat/")


class Reception:
    """ASGI middleware: lets through what the page asks for, and refuses where Gradio breaks on what a stranger asks.

    What fails inside a function of the page never comes here, Gradio tells the page of it. So an exception is a request
    that no page makes: status 400, and a line instead of a traceback. Whatever is no address of the page: 404.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if path not in ADDRESSES and not path.startswith(FOLDERS):
            return await _refuse(send, 404, b"there is nothing here")
        held: list[dict] = []  # a "500" that Gradio's server sends before it passes the exception on

        async def answer(message) -> None:
            if held or message.get("status") == 500:
                held.append(message)
            else:
                answer.begun = True
                await send(message)

        answer.begun = False
        try:
            await self.app(scope, receive, answer)
        except Exception as error:
            if answer.begun:
                raise
            print(f"refused: {scope['method']} {path[:100]!r} ({type(error).__name__})", file=sys.stderr, flush=True)
            return await _refuse(send, 400, b"no page asks for this")
        for message in held:
            await send(message)


@dataclass(frozen=True)
class Patience:
    """A body of n bytes may take `seconds` + n / `rate` (bytes/s): 20 MB at most 23 minutes, and 100 bytes one."""

    seconds: float = 60.0
    rate: float = 15_000.0


class BodyLimit:
    """ASGI middleware: a request of more than `most` bytes is refused with status 413, however it is sent.

    One that comes too slowly is dropped, and so is what has come of one whose sender has left.
    """

    def __init__(self, app, most: int, patience: Patience | None = None):
        self.app, self.most, self.patience = app, most, patience or Patience()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.most:
            return await _refuse(send, 413, b"the request is too large")
        body = _Body(receive, self.most, self.patience, headers.get(b"content-type", b""))

        async def answer(message) -> None:
            if message["type"] == "http.response.start" and not body.whole:
                # else the server would read on, and throw away what is still to come
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        return await self.app(scope, body.receive, answer)


class _Body:
    """The body of a request on its way. whole: whether all of it has come."""

    def __init__(self, receive: Callable[[], Awaitable[dict]], most: int, patience: Patience, kind: bytes):
        self._receive, self.most, self.patience = receive, most, patience
        self.is_form = kind.lower().startswith(b"multipart/form-data")
        self.seen, self.whole, self.started = 0, False, time.monotonic()

    async def receive(self) -> dict:
        """The next message for the application."""
        if self.whole:  # it waits for the visitor to leave, who may stay
            return await self._receive()
        left = self.started + self.patience.seconds + self.seen / self.patience.rate - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.0))
        except asyncio.TimeoutError:
            return self._broken_off("it takes too long")
        if message["type"] == "http.disconnect":
            return self._broken_off("the visitor has left")
        self.seen += len(message.get("body", b""))
        if self.seen > self.most:
            return self._broken_off("it is larger than the maximum allowed size")
        self.whole = not message.get("more_body", False)
        return message

    def _broken_off(self, reason: str) -> dict:
        if self.is_form:  # at this error alone Gradio deletes what it has stored of an upload
            from starlette.formparsers import MultiPartException

            raise MultiPartException(f"the upload is broken off: {reason}")
        return {"type": "http.disconnect"}


class StoreLimit:
    """ASGI middleware: where what was uploaded has more than `most` bytes, the oldest goes before the next comes.

    Gradio deletes what is an hour old, which at the pace of a fast line is any number of bytes.
    """

    def __init__(self, app, folder: Path, most: int):
        self.app, self.folder, self.most = app, folder, most

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith("/upload"):
            await asyncio.to_thread(make_room, self.folder, self.most)
        await self.app(scope, receive, send)


def make_room(folder: Path, most: int) -> None:
    """Where the files below a folder have more than `most` bytes, delete the oldest until they have half as many."""
    files = []
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # gradio deletes too
            status = path.lstat()
            if S_ISREG(status.st_mode):
                files.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in files)
    if total <= most:
        return
    for _, size, path in sorted(files):
        if total <= most // 2:
            break
        path.unlink(missing_ok=True)
        total -= size


async def _refuse(send, status: int, reason: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason})


def http_protocol(head_s: float = HEAD_S) -> type[asyncio.Protocol]:
    """Uvicorn's HTTP protocol, which closes a connection that has not sent the head of a request after `head_s` s.

    Also one that was answered, and has begun another request.
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    class Timed(AutoHTTPProtocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self._time()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._time()

        def connection_lost(self, exc) -> None:
            if self._timer:
                self._timer.cancel()
            super().connection_lost(exc)

        def _time(self) -> None:
            waits = self.cycle is None or self.cycle.response_complete
            if waits and self._timer is None:
                self._timer = self.loop.call_later(head_s, self._close)
            elif not waits and self._timer:
                self._timer.cancel()
                self._timer = None

        def _close(self) -> None:
            self._timer = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Timed
