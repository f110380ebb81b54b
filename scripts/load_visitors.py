"""The visitors that scripts/load_demo.py sends to the demo: honest ones, clumsy ones, and those that mean harm.

Each is a function of a `Door` and a generator, makes its requests and says how it was served: ANSWERED, REFUSED (in
words, or by an end of the connection), or an AssertionError where it was neither or got what is not its own.
"""

import contextlib
import http.client
import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

ANSWERED, REFUSED = "answered", "refused"
HOST = "127.0.0.1"
DRIP_S = 0.5  # between the bytes of those who send slowly
BIG = 50_000_000  # bytes


@dataclass
class Door:
    """Where the server is, and what may not come out of it.

    patience: s until a visitor counts as not served. secrets: texts of files that are none of the demo's. outside:
    paths of such files, one of them a picture.
    """

    port: int
    patience: float
    secrets: tuple[bytes, ...] = ()
    outside: tuple[str, ...] = ()
    config: dict = field(default_factory=dict)

    def ask(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> tuple:
        """One request on a connection of its own: (status, body). It must not hold what is secret."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=self.patience)
        try:
            connection.request(method, path, body, {"Content-Type": kind} if body is not None else {})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        self.check(content)
        assert response.status < 500 or response.status == 503, f"status {response.status} of {method} {path[:80]}"
        return response.status, content

    def check(self, content: bytes) -> None:
        """AssertionError for what is nobody's business."""
        assert not any(secret in content for secret in self.secrets), "it gave away what lies outside its folders"
        assert b"Traceback" not in content, "it answered with a traceback"

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection((HOST, self.port), timeout=self.patience)

    def upload(self, content: bytes, name: str = "picture.png") -> tuple[int, bytes]:
        """Upload a file under a name, which is sent as it is."""
        return self.ask("POST", "/gradio_api/upload", *form(content, name))

    def stored(self, content: bytes, name: str = "picture.png") -> dict:
        """Upload a file that is allowed; returns what a call names it by."""
        status, body = self.upload(content, name)
        assert status == 200, f"an upload was answered by {status}"
        return file_data(json.loads(body)[0])

    def open(self) -> None:
        """Read what functions the page has."""
        self.config = json.loads(self.ask("GET", "/config")[1])

    def function(self, elem_id: str, event: str) -> int:
        """The number of the function that an event of a component calls."""
        ids = {part["id"] for part in self.config["components"] if part["props"].get("elem_id") == elem_id}
        for call in self.config["dependencies"]:
            if any(target in ids and name == event for target, name in call["targets"]):
                return call["id"]
        raise AssertionError(f"the page has no {event} of {elem_id}")

    def call(self, elem_id: str, event: str, data: list, session: str, wait: bool = True) -> tuple[str, str]:
        """Call a function as the page does: how it was served, and the answer as text."""
        body = {"data": data, "fn_index": self.function(elem_id, event), "session_hash": session}
        status, said = self.ask("POST", "/gradio_api/queue/join", json.dumps(body).encode())
        if status != 200:
            return REFUSED, said.decode(errors="replace")
        if not wait:
            return ANSWERED, ""
        message = self._listen(session)
        answer = json.dumps(message.get("output", {}))
        self.check(answer.encode())
        assert "Traceback" not in answer
        return (ANSWERED if message.get("success") else REFUSED), answer

    def _listen(self, session: str) -> dict:
        """The message by which a call ends."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=self.patience)
        ends = time.monotonic() + self.patience
        try:
            connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
            response = connection.getresponse()
            assert response.status == 200, f"status {response.status} of the answers' stream"
            while time.monotonic() < ends:
                line = response.readline()
                assert line, "the stream of answers ended without one"
                if line.startswith(b"data:"):
                    message = json.loads(line[5:])
                    if message["msg"] in ("process_completed", "unexpected_error"):
                        return message
        finally:
            connection.close()
        raise AssertionError(f"no answer within {self.patience:g} s")


def form(content: bytes, name: str) -> tuple[bytes, str]:
    """A multipart body with one file, and its content type."""
    head = f'--part\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return head.encode("utf-8", "surrogateescape") + content + b"\r\n--part--\r\n", FORM


FORM = "multipart/form-data; boundary=part"


def upload_head(length: int, kind: str) -> bytes:
    """The head of an upload whose body has so many bytes."""
    lines = ("POST /gradio_api/upload HTTP/1.1", f"Host: {HOST}", f"Content-Type: {kind}", f"Content-Length: {length}")
    return "\r\n".join((*lines, "", "")).encode()


def file_data(path: str) -> dict:
    """What a call names a file by."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def drawn(rng: np.random.Generator, kind: str = "PNG") -> bytes:
    """A small smooth picture."""
    side = int(rng.integers(48, 400))
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    written = io.BytesIO()
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(written, kind)
    return written.getvalue()


def session_of(rng: np.random.Generator) -> str:
    return rng.bytes(8).hex()


# honest


def recognises(door: Door, rng) -> str:
    """Who is in this picture?"""
    return _answered(door.call("recognise-go", "click", [door.stored(drawn(rng))], session_of(rng)))


def verifies(door: Door, rng) -> str:
    """Are these two the same?"""
    pair = [door.stored(drawn(rng, kind)) for kind in ("PNG", "JPEG")]
    return _answered(door.call("verify-go", "click", pair, session_of(rng)))


def enrols(door: Door, rng) -> str:
    """A character of two pictures, under a name that would be a path."""
    name = str(rng.choice(["Rei", "../../evil", "/etc/passwd", "a\x00b", "C:\\x", "..", "名前" * 20, "<script>"]))
    files = [door.stored(drawn(rng)), door.stored(drawn(rng))]
    return door.call("enrol-go", "click", [f"{name}{rng.integers(4)}", files], session_of(rng))[0]


def annotates(door: Door, rng) -> str:
    """The faces of a picture, to be corrected."""
    picture = door.stored(drawn(rng))
    return _answered(door.call("annotate-upload", "change", [None, picture], session_of(rng)))


def reconstructs(door: Door, rng) -> str:
    """What a masked autoencoder makes of it."""
    editor = {"background": door.stored(drawn(rng)), "layers": [], "composite": None, "id": None}
    inputs = [editor, "random", 0.75, int(rng.integers(1000))]
    return _answered(door.call("reconstruct-strategy", "change", inputs, session_of(rng)))


def visits(door: Door, rng) -> str:
    """The page, and what belongs to it."""
    for path in ("/", "/config", "/theme.css"):
        assert door.ask("GET", path)[0] == 200, path
    return ANSWERED


def _answered(served: tuple[str, str]) -> str:
    assert served[0] == ANSWERED, f"an honest call was refused: {served[1][:200]}"
    return ANSWERED


# wrong, large, and odd


def sends_no_picture(door: Door, rng) -> str:
    """Files of other types under the name of a picture."""
    kinds = [
        rng.bytes(5000), b"", b"MZ" + rng.bytes(500), b"<svg onload=alert(1)></svg>", b"%PDF-1.7 x", b"\x80\x04K\x01.",
        drawn(rng)[:-40], b"GIF89a" + rng.bytes(40), b"PK\x03\x04" + rng.bytes(99),
    ]  # fmt: skip
    served, said = door.call(
        "recognise-go", "click", [door.stored(kinds[int(rng.integers(len(kinds)))])], session_of(rng)
    )
    assert served == REFUSED or "cannot be read" in said or "no picture" in said, said[-200:]
    return REFUSED


def sends_a_bomb(door: Door, rng) -> str:
    """A small file of many pixels."""
    served, said = door.call("recognise-go", "click", [door.stored(bomb())], session_of(rng))
    assert served == REFUSED or "pixels" in said, said[-200:]
    return REFUSED


def bomb(side: int = 30_000) -> bytes:
    """A PNG of side x side grey pixels, one bit each, in some 100 kB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(bytes((1 + side // 8) * side), 9)
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def sends_too_much(door: Door, rng) -> str:
    """50 MB at once; the server may close the door while they are coming."""
    try:
        status, _ = door.upload(bytes(BIG))
    except (ConnectionError, TimeoutError):
        return REFUSED
    assert status in (400, 413), f"50 MB were answered by {status}"
    return REFUSED


def sends_too_much_in_pieces(door: Door, rng) -> str:
    """As many bytes without a word on how many they are."""
    body, kind = form(bytes(BIG), "x.png")
    connection = http.client.HTTPConnection(HOST, door.port, timeout=door.patience)
    try:
        pieces = (body[at : at + 65536] for at in range(0, len(body), 65536))
        connection.request("POST", "/gradio_api/upload", pieces, {"Content-Type": kind}, encode_chunked=True)
        status = connection.getresponse().status
    except (ConnectionError, TimeoutError, http.client.HTTPException):
        return REFUSED
    finally:
        connection.close()
    assert status in (400, 413), f"50 MB in pieces were answered by {status}"
    return REFUSED


def speaks_nonsense(door: Door, rng) -> str:
    """Calls that no page makes."""
    deep = b"[" * 50_000 + b"]" * 50_000
    unknown = b'{"data": [], "fn_index": 99999, "session_hash": "x"}'
    calls = [b"{", b"null", b'{"data": []}', unknown, deep, rng.bytes(300)]
    status, _ = door.ask("POST", "/gradio_api/queue/join", calls[int(rng.integers(len(calls)))])
    assert 400 <= status < 500 or status == 200, status
    status, _ = door.ask("POST", _elsewhere(rng), calls[int(rng.integers(len(calls)))])
    assert 400 <= status < 500 or status == 200, status
    kind = str(rng.choice(["text/plain", "multipart/form-data", "multipart/form-data; boundary=", FORM]))
    status, _ = door.ask("POST", "/gradio_api/upload", rng.bytes(200), kind)
    assert 400 <= status < 500 or status == 200, status
    lines = [b"\x16\x03\x01\x02\x00" + rng.bytes(60), b"GET / HTTP/9.9\r\n\r\n", b"A" * 100_000]
    with door.connect() as sock, contextlib.suppress(ConnectionError):
        sock.sendall(lines[int(rng.integers(len(lines)))] + b"\r\n\r\n")
        assert b"200 OK" not in sock.recv(4096)
    return REFUSED


def _elsewhere(rng: np.random.Generator) -> str:
    """An address that Gradio has, and this demo has no use for, or of which it makes no use this way."""
    names = ["process_recording", "vibe-edit", "proxy=http://127.0.0.1/", "run/predict", "call/x", "component_server",
             "cancel", "reset", "stream/x", "queue/data", "heartbeat/x", "upload_progress", "monitoring"]  # fmt: skip
    return f"/gradio_api/{names[int(rng.integers(len(names)))]}"


# paths


def tricks_by_name(door: Door, rng) -> str:
    """An upload whose name is a path; it is stored under its last part, or refused."""
    names = [
        "../../../evil.png", "..\\..\\evil.png", "/etc/evil.png", "....//evil.png", "%2e%2e%2fevil.png", "..", ".",
        "evil\x00.png", "CON", "x" * 5000 + ".png", "~/evil.png", "a/../../evil.png", "evil.png\r\nX: y",
        "\u202egnp.exe",
    ]  # fmt: skip
    status, body = door.upload(drawn(rng), names[int(rng.integers(len(names)))])
    if status != 200:
        assert 400 <= status < 500
        return REFUSED
    stored = json.loads(body)
    assert all(".." not in path.split("/") for path in stored), stored
    return ANSWERED


def reads_by_path(door: Door, rng) -> str:
    """Calls and addresses that name files of the machine."""
    page = f"http://{HOST}:{door.port}/config"
    paths = [*door.outside, "/etc/passwd", "../../etc/passwd", "/proc/self/environ", "file:///etc/passwd", page]
    path = str(rng.choice(paths))
    calls = [("enrol-go", "click", ["Rei", [file_data(path)]]), ("recognise-go", "click", [file_data(path)]),
             ("annotate-stored", "input", [None, path]),
             ("annotate-upload", "change", [None, file_data(path)])]  # fmt: skip
    elem_id, event, data = calls[int(rng.integers(len(calls)))]
    served, said = door.call(elem_id, event, data, session_of(rng))
    assert served == REFUSED, f"{elem_id} took {path}: {said[-200:]}"
    for way in ("file=", "file/", "static/../../"):
        status, content = door.ask("GET", f"/gradio_api/{way}{path.replace(' ', '%20')}")
        assert status >= 400 and b"root:" not in content, f"{way}{path} was answered by {status}"
    return REFUSED


# slow and broken


def leaves_half_way(door: Door, rng) -> str:
    """Half of an upload, then nobody."""
    body, kind = form(drawn(rng) * 20, "half.png")
    with door.connect() as sock:
        sock.sendall(upload_head(len(body), kind) + body[: len(body) // 2])
        if rng.random() < 0.5:  # not even a farewell
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return REFUSED


def leaves_before_the_answer(door: Door, rng) -> str:
    """A whole call, and nobody to hear the answer."""
    return door.call("recognise-go", "click", [door.stored(drawn(rng))], session_of(rng), wait=False)[0]


def says_nothing(door: Door, rng) -> str:
    """A connection, or the beginning of a request, and then one byte at a time."""
    with door.connect() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: "[: int(rng.integers(0, 34))])
        return _drips(sock, door.patience)


def dictates_an_upload(door: Door, rng) -> str:
    """An upload of which the body comes one byte at a time."""
    with door.connect() as sock:
        sock.sendall(upload_head(90_000, FORM) + form(b"", "slow.png")[0][:70])
        return _drips(sock, door.patience)


def _drips(sock: socket.socket, patience: float) -> str:
    """Send a byte at a time until the server has had enough."""
    ends = time.monotonic() + patience
    sock.settimeout(DRIP_S)
    while time.monotonic() < ends:
        try:
            sock.sendall(b"x")
            if not sock.recv(4096):
                return REFUSED
        except TimeoutError:
            continue
        except ConnectionError:
            return REFUSED
    raise AssertionError(f"a connection was kept open for {patience:g} s")


# out of 100 visitors
VISITORS: dict[Callable, int] = {
    recognises: 26, verifies: 8, enrols: 6, annotates: 8, reconstructs: 8, visits: 4, sends_no_picture: 8,
    sends_a_bomb: 2, sends_too_much: 2, sends_too_much_in_pieces: 2, speaks_nonsense: 5, tricks_by_name: 6,
    reads_by_path: 5, leaves_half_way: 4, leaves_before_the_answer: 2, says_nothing: 2, dictates_an_upload: 2,
}  # fmt: skip


def who_comes(requests: int, rng: np.random.Generator) -> list[Callable]:
    """So many visitors in a random order, each kind as often as VISITORS says and at least once."""
    share = requests / sum(VISITORS.values())
    counts = {visitor: max(1, round(count * share)) for visitor, count in VISITORS.items()}
    everyone = [visitor for visitor, count in counts.items() for _ in range(count)]
    everyone += [recognises] * (requests - len(everyone))
    return [everyone[i] for i in rng.permutation(len(everyone))][:requests] if requests else []
