"""The demo's gate and shelf: what is too large, too slow or broken off leaves nothing behind. And the load on it.

Run: python -m pytest tests/test_demo_gate.py
"""

import asyncio
import os
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import load_visitors
from scripts.load_visitors import REFUSED, VISITORS, Door, bomb, file_data, form, upload_head, who_comes
from util.data.images import BadImage, decode_image
from util.run.errors import UserError
from visualize.demo.annotate import Page
from visualize.demo.annotations import Draft
from visualize.demo.gate import BodyLimit, Patience, Reception, StoreLimit, http_protocol
from visualize.demo.models import Settings
from visualize.demo.pictures import Limits, open_upload
from visualize.demo.shelf import Shelf

HURRY = Patience(seconds=0.2, rate=1.0)  # with every byte it lasts a second longer
FORM = [(b"content-type", b"Multipart/form-data; boundary=x")]


def through_the_gate(pieces, headers=(), patience=HURRY, most=1000, answer_first=False):
    """Send pieces, (seconds before, message), through the gate; what the application got, and what it answered."""
    got, sent = [], []
    pieces = list(pieces)

    async def receive():
        seconds, message = pieces.pop(0)
        await asyncio.sleep(seconds)
        return message

    async def app(scope, receive, send):
        if answer_first:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        while pieces:
            got.append(await receive())
            if got[-1]["type"] == "http.disconnect":
                return
        if not answer_first:
            await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    gate = BodyLimit(app, most, patience)
    asyncio.run(gate({"type": "http", "headers": list(headers)}, receive, send))
    return got, sent


def piece(size: int, more: bool) -> dict:
    return {"type": "http.request", "body": b"x" * size, "more_body": more}


def test_a_body_that_comes_too_slowly_is_given_up():
    got, _ = through_the_gate([(0, piece(0, True)), (30, piece(1, False))])
    assert [message["type"] for message in got] == ["http.request", "http.disconnect"]


def test_a_large_body_may_take_its_time_and_a_whole_one_any_time():
    whole = [(0, piece(100, True)), (0.4, piece(1, False)), (0.4, {"type": "http.disconnect"})]
    got, sent = through_the_gate(whole[:2])
    assert [message["type"] for message in got] == ["http.request"] * 2 and sent[0]["headers"] == []
    got, _ = through_the_gate([(0, piece(1, False)), (1.5, {"type": "http.disconnect"})], patience=Patience(0.2, 1e9))
    assert len(got) == 2  # a visitor who waits for his answer is not hurried


def test_who_is_answered_before_he_has_finished_is_not_listened_to_any_more():
    _, sent = through_the_gate([(0, piece(10, True)), (0, piece(10, False))], answer_first=True)
    assert (b"connection", b"close") in sent[0]["headers"]


@pytest.mark.parametrize(
    "last, reason",
    [((30, piece(1, True)), "too long"), ((0, {"type": "http.disconnect"}), "has left"),
     ((0, piece(2000, True)), "maximum allowed size")],
)  # fmt: skip
def test_an_upload_that_is_broken_off_ends_in_the_error_after_which_gradio_cleans_up(last, reason):
    formparsers = pytest.importorskip("starlette.formparsers", reason="starlette comes with gradio")
    with pytest.raises(formparsers.MultiPartException) as error:
        through_the_gate([(0, piece(10, True)), last, (0, piece(1, False))], FORM)
    assert reason in error.value.message


@contextmanager
def served(app, **options):
    """A uvicorn in a thread; yields its port."""
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn comes with gradio: pip install -r requirements-demo.txt")
    door = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", **{"lifespan": "off", **options}))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
    thread.start()
    try:
        yield door.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(timeout=30)


async def hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.mark.parametrize("head", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nX"])
def test_a_connection_that_does_not_say_what_it_wants_is_closed(head):
    pytest.importorskip("uvicorn", reason="uvicorn comes with gradio: pip install -r requirements-demo.txt")
    with served(hello, http=http_protocol(head_s=0.5)) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
            sock.sendall(head)
            said = b""
            while part := sock.recv(4096):
                said += part
        assert said.count(b"hello") == head.count(b"\r\n\r\n")


def test_what_was_stored_of_an_upload_that_breaks_off_is_deleted(tmp_path):
    route_utils = pytest.importorskip("gradio.route_utils", reason="gradio is not installed")
    from starlette.applications import Starlette
    from starlette.formparsers import MultiPartException
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    async def upload(request):
        try:  # as gradio's own route
            await route_utils.upload_fn(request, str(tmp_path), 1e6, None)
        except MultiPartException as error:
            return PlainTextResponse(error.message, status_code=400)
        return PlainTextResponse("stored")

    app = BodyLimit(Starlette(routes=[Route("/gradio_api/upload", upload, methods=["POST"])]), 1_000_000)
    body, kind = form(bytes(200_000), "x.png")
    with served(app) as port:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(upload_head(len(body), kind) + body[:100_000])
            _until(lambda: any(tmp_path.iterdir()))
        _until(lambda: not any(tmp_path.iterdir()))
        status, said = Door(port, 30).upload(bytes(1000))
        assert (status, said) == (200, b"stored") and len(list(tmp_path.rglob("*.png"))) == 1


def _until(holds, seconds: float = 30) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "it does not come to pass"
        time.sleep(0.02)


def test_room_is_made_by_the_oldest_uploads(tmp_path):
    for number in range(6):
        path = tmp_path / str(number) / "x.png"
        path.parent.mkdir()
        path.write_bytes(bytes(100))
        os.utime(path, (1000 - number, 1000 - number))
    seen = []

    async def app(scope, receive, send):
        seen.append(sum(1 for _ in tmp_path.rglob("*.png")))

    for most, path in ((600, "/gradio_api/upload"), (500, "/config"), (500, "/gradio_api/upload")):
        scope = {"type": "http", "method": "POST", "path": path}
        asyncio.run(StoreLimit(app, tmp_path, most)(scope, None, None))
    assert seen == [6, 6, 2] and {path.parent.name for path in tmp_path.rglob("*.png")} == {"0", "1"}


def test_a_picture_that_was_put_away_is_asked_for_again(tmp_path):
    with pytest.raises(UserError, match="no longer here: upload it again"):
        open_upload(str(tmp_path / "gone.png"), Limits())


def test_a_call_can_name_what_was_uploaded_and_nothing_else(tmp_path, monkeypatch):
    """A page that is mounted, not launched, would copy any file of the machine to where visitors can read it."""
    gr = pytest.importorskip("gradio", reason="gradio is not installed: pip install -r requirements-demo.txt")
    from visualize.demo.app import web_app
    from visualize.demo.inputs import picture_input

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    for name in ("ssrf_protected_download", "async_ssrf_protected_download"):  # so that they are put back
        monkeypatch.setattr(gr.processing_utils, name, getattr(gr.processing_utils, name))
    outside = tmp_path / "outside.png"
    Image.new("RGB", (8, 8)).save(outside)
    with gr.Blocks() as page:
        upload, go, line = picture_input(), gr.Button(elem_id="go"), gr.Textbox()
        go.click(lambda path: f"{Path(path).stat().st_size} bytes", upload, line)
    with served(web_app(page, Settings(), "127.0.0.1"), lifespan="on") as port:
        door = Door(port, 60)
        door.open()
        own = door.stored(outside.read_bytes())
        assert f"{outside.stat().st_size} bytes" in door.call("go", "click", [own], "a")[1]
        for number, path in enumerate((str(outside), "/etc/passwd", f"http://127.0.0.1:{port}/config")):
            assert door.call("go", "click", [file_data(path)], f"b{number}")[0] == REFUSED, path
        body = b'{"data": [], "fn_index": 99999, "session_hash": "x"}'  # gradio looks it up and breaks
        assert door.ask("POST", "/gradio_api/queue/join", body)[0] == 400
        assert door.ask("POST", "/gradio_api/process_recording", *form(b"x", "x.mp4"))[0] == 404
    assert not [path for path in (tmp_path / "uploads").rglob("*") if path.name in ("outside.png", "passwd", "config")]


@pytest.mark.parametrize("path, status", [
    ("/gradio_api/process_recording", 404), ("/gradio_api/proxy=http://x", 404), ("/gradio_api/vibe-edit", 404),
    ("/gradio_api/config", 404), ("/breaks", 404), ("/reset", 404), ("/config", 400), ("/gradio_api/file=x", 400),
])  # fmt: skip
def test_what_no_page_asks_for_is_refused(path, status, capsys):
    """The application answers every request by its own "500" and an exception, as Starlette does."""
    asked, sent = [], []

    async def app(scope, receive, send):
        asked.append(scope["path"])
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"Internal Server Error"})
        raise KeyError(99999)

    async def send(message):
        sent.append(message)

    asyncio.run(Reception(app)({"type": "http", "method": "POST", "path": path}, None, send))
    assert [message.get("status") for message in sent] == [status, None]
    assert asked == ([path] if status == 400 else [])
    said = capsys.readouterr().err
    assert said == (f"refused: POST {path!r} (KeyError)\n" if status == 400 else "")


def test_an_answer_that_has_begun_is_broken_off_and_an_own_500_passes():
    sent = []

    async def send(message):
        sent.append(message["type"])

    async def breaks(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise OSError("gone")

    async def says_500(scope, receive, send):
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"said by the page"})

    scope = {"type": "http", "method": "GET", "path": "/config"}
    with pytest.raises(OSError):
        asyncio.run(Reception(breaks)(scope, None, send))
    asyncio.run(Reception(says_500)(scope, None, send))
    assert sent == ["http.response.start", "http.response.start", "http.response.body"]


# the shelf


def page(width: int) -> Page:
    return Page(Draft(Image.new("RGB", (width, 10)), ()))


def test_the_shelf_holds_the_latest_pages_within_its_budget():
    shelf = Shelf(most_pixels=1000, most_pages=3)
    keys = [shelf.put(page(40)) for _ in range(2)]
    assert len(set(keys)) == 2 and shelf.get(keys[0]).draft.picture.width == 40  # and so it is the later one
    third = shelf.put(page(30))
    assert shelf.get(keys[1]) is None and shelf.get(keys[0]) and shelf.get(third)
    assert shelf.put(page(31), third) == third and shelf.get(third).draft.picture.width == 31
    large = shelf.put(page(500))
    assert shelf.get(large) and shelf.get(third) is None and shelf.get(None) is None
    many = [shelf.put(page(1)) for _ in range(9)]
    assert sum(shelf.get(key) is not None for key in many) == 3


# the load


def test_who_comes_is_as_often_as_was_said_and_each_kind_at_least_once():
    many = who_comes(1000, np.random.default_rng(0))
    assert (
        Counter(many) == {visitor: 10 * share for visitor, share in VISITORS.items()} and sum(VISITORS.values()) == 100
    )
    few = who_comes(50, np.random.default_rng(0))
    assert len(few) == 50 and set(few) == set(VISITORS)


def test_the_bomb_is_small_and_unpacks_to_900_million_pixels():
    content = bomb()
    assert len(content) < 200_000
    with pytest.raises(BadImage, match="pixels"):
        decode_image(content)


def test_a_visitor_notices_what_is_wrong(tmp_path):
    """A server that gives a file of the machine away, fails, or keeps slow visitors is told of."""

    async def bad(scope, receive, send):
        fails = scope["path"] == "/fails"
        await send({"type": "http.response.start", "status": 500 if fails else 200, "headers": []})
        await send({"type": "http.response.body", "body": b"the secret"})

    with served(bad) as port:
        door = Door(port, 1.0, secrets=(b"secret",))
        with pytest.raises(AssertionError, match="gave away"):
            door.ask("GET", "/")
        with pytest.raises(AssertionError, match="status 500"):
            Door(port, 1.0).ask("GET", "/fails")
        with pytest.raises(AssertionError, match="kept open"):
            load_visitors.dictates_an_upload(Door(port, 1.0), np.random.default_rng(0))
    with served(hello, http=http_protocol(head_s=0.3)) as port:
        assert load_visitors.says_nothing(Door(port, 30.0), np.random.default_rng(0)) == REFUSED


@pytest.mark.slow
def test_the_demo_bears_a_thousand_visitors(import_script, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -r requirements-demo.txt")
    weights = Path("visualize/demo/weights")
    if not (weights / "recogniser.safetensors").is_file():
        pytest.skip("the demo's own weights are not there: run scripts/make_demo_weights.py")
    with pytest.raises(SystemExit) as end:
        import_script("scripts/load_demo.py").main(["--out", str(tmp_path / "load.json")])
    assert end.value.code == 0, (tmp_path / "load.json").read_text()
