"""The demo in a real browser: pictures in, names out; new masks, new predictions; what was enrolled outlives a restart.

Run: python -m pytest tests/test_demo_browser.py        (pip install -r requirements-demo.txt playwright; a Chromium)

Without gradio, playwright or a Chromium it is skipped, and says which is missing.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image

from models_detect import KIND, build_detector
from models_mae import build_mae
from models_vit import build_vit
from tests.conftest import ROOT
from util.data.manifest import read_manifest
from visualize.demo.weights import Calibration, Facts, write_weights

pytest.importorskip("gradio", reason="gradio is not installed: pip install -r requirements-demo.txt")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

PATIENCE = 240_000  # ms: cores may be shared with measurements
SHOTS = os.environ.get("DEMO_SCREENSHOTS")  # a folder: pictures of the page to look at


def chromium() -> str | None:
    """A Chromium of the system, None to try playwright's own."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        try:
            # the painting needs WebGL, here without a graphics card
            opened = play.chromium.launch(
                executable_path=chromium(),
                args=["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"],
            )
        except playwright.Error as error:
            pytest.skip(f"no Chromium can be started: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """Random networks: what is enrolled is found by its very picture. No face is found, pictures are taken whole."""
    folder = tmp_path_factory.mktemp("demo")
    torch.manual_seed(0)
    args = {"input_size": 32, "global_pool": True}
    facts = Facts(0.4, 0.999, Calibration(200.0, -199.0))
    encoder = build_vit("vit_nano_patch8", img_size=32).state_dict()
    write_weights(folder / "r.safetensors", encoder, {**args, "model": "vit_nano_patch8"}, facts)
    mae = build_mae("mae_vit_nano_patch8", 32).state_dict()
    write_weights(folder / "m.safetensors", mae, {**args, "model": "mae_vit_nano_patch8"}, Facts())
    args |= {"model": "vit_nano_patch16", "input_size": 64, "width": 64, "convs": 1, "train": "full", "seed": 0}
    detector = build_detector({**args, "init": None}).state_dict()
    write_weights(folder / "d.safetensors", detector, {**args, "kind": KIND}, Facts())
    return [
        "--ckpt", str(folder / "r.safetensors"), "--mae", str(folder / "m.safetensors"), "--device", "cpu",
        "--finder", f"detector:{folder / 'd.safetensors'}", "--gallery", str(folder / "gallery"),
        "--annotations", str(folder / "notes"), "--max_mb", "1", "--max_pixels", "4000000",
    ]  # fmt: skip


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """The demo in a process of its own."""

    def __init__(self, flags: list[str]):
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        command = [sys.executable, "-m", "visualize.demo", *flags, "--port", str(port)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in self.process.stdout:
            if self.url in line:
                break
        else:
            pytest.fail(f"the demo ended with status {self.process.wait()}")

    def stop(self) -> str:
        """End it; returns what it has printed."""
        self.process.terminate()
        return self.process.communicate(timeout=60)[0]


@pytest.fixture(scope="module")
def server(flags, browser):
    running = Server(flags)
    yield running
    printed = running.stop()
    assert "Traceback" not in printed, printed


@pytest.fixture
def page(server, browser):
    opened = visit(server, browser)
    yield opened
    opened.context.close()


def visit(server: Server, browser):
    """A page of the demo that has loaded; requests to other machines are refused and kept in `page.elsewhere`."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.elsewhere = []

    def route(request):
        page.elsewhere.append(request.request.url)
        request.abort()

    context.route(lambda url: not url.startswith((server.url, "data:", "blob:")), route)
    page.goto(server.url)
    page.locator("#recognise-go").wait_for()
    return page


def shot(page, name: str) -> None:
    """Keep a picture of the page where DEMO_SCREENSHOTS says so."""
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def says(page, where: str, text: str) -> None:
    """Wait until a tab's line holds a text."""
    playwright.expect(page.locator(f"#{where}-note")).to_contain_text(re.compile(text), timeout=PATIENCE)


def upload(page, where: str, *paths) -> None:
    page.locator(f"#{where} input[type=file]").first.set_input_files([str(path) for path in paths])


def turn_to(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Path]:
    """Three pictures of plain colours, and files that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    made = {}
    for name, colours in {"ruby": ("red", "white"), "jade": ("green", "black"), "onyx": ("black", "yellow")}.items():
        picture = Image.new("RGB", (160, 160), colours[0])
        picture.paste(colours[1], (40, 40, 120, 120))
        made[name] = folder / f"{name}.png"
        picture.save(made[name])
    made["broken"] = folder / "broken.png"
    made["broken"].write_bytes(made["ruby"].read_bytes()[:120])
    made["huge"] = folder / "huge.png"
    Image.new("L", (3000, 3000)).save(made["huge"])
    made["hostile"] = folder / "..%2f..%2fetc<b>&'.png"
    made["hostile"].write_bytes(made["jade"].read_bytes())
    return made


def enrol(page, name: str, path: Path) -> None:
    turn_to(page, "Enrol")
    page.locator("#enrol-name textarea, #enrol-name input").first.fill(name)
    upload(page, "enrol-files", path)
    page.locator("#enrol-files").get_by_text(path.name[:4]).first.wait_for()
    page.locator("#enrol-go").click()
    says(page, "enrol", "is enrolled with")


def test_what_is_enrolled_is_found_also_after_a_restart(flags, server, browser, pictures):
    name = "Ruby <i>&amp;"
    page = visit(server, browser)
    enrol(page, name, pictures["ruby"])
    enrol(page, "Jade", pictures["jade"])
    playwright.expect(page.locator("#enrol-people .card")).to_have_count(2, timeout=PATIENCE)
    shot(page, "enrol")
    find(page, pictures, name)
    shot(page, "recognise")
    assert not page.elsewhere, page.elsewhere
    page.context.close()

    again = Server(flags)
    page = visit(again, browser)
    find(page, pictures, name)
    turn_to(page, "Enrol")
    page.locator("#enrol-who input").click()
    page.get_by_role("option", name="Jade").click()
    page.locator("#enrol-remove").click()
    says(page, "enrol", "Jade is removed")
    playwright.expect(page.locator("#enrol-people .card")).to_have_count(1, timeout=PATIENCE)
    page.context.close()
    assert "Traceback" not in again.stop()


def find(page, pictures, name: str) -> None:
    """Upload a picture of somebody enrolled, then one of nobody: top characters with thumbnails, and who it is."""
    turn_to(page, "Recognise")
    upload(page, "recognise-upload", pictures["ruby"])
    says(page, "recognise", re.escape(f"the whole picture is taken: {name} ("))
    cards = page.locator("#recognise-rows .cards .card")
    playwright.expect(cards).to_have_count(2)
    assert cards.locator("b").all_inner_texts()[0] == name  # as text, not as markup
    assert cards.locator("span").all_inner_texts()[0] == "1.000"
    assert all(cards.locator("img").evaluate_all("images => images.map(image => image.naturalWidth > 0)"))


def test_a_stranger_is_unknown_and_odd_files_get_one_line(page, pictures):
    for name, text in (
        ("onyx", "unknown|nobody is enrolled yet"),
        ("broken", "cannot be read"),
        ("hostile", "the whole picture|nobody"),
        ("huge", "more than 4000000 pixels"),
        ("jade", "the whole picture|nobody"),
    ):
        before = page.locator("#recognise-upload").get_by_label("Remove Image")
        if before.count():
            before.click()
            says(page, "recognise", "no picture yet")
        upload(page, "recognise-upload", pictures[name])
        says(page, "recognise", text)
        if name == "broken":
            shot(page, "broken")


def source(page, number: int) -> str:
    return page.locator(f"#reconstruct-{number} img").first.get_attribute("src")


def changed(page, before: str) -> None:
    """Wait until the reconstruction is another picture."""
    playwright.expect(page.locator("#reconstruct-1 img").first).not_to_have_attribute("src", before, timeout=PATIENCE)


def test_the_slider_and_the_brush_make_new_reconstructions(page, pictures):
    turn_to(page, "Reconstruct")
    page.locator("#reconstruct-editor canvas").first.wait_for()
    upload(page, "reconstruct-editor", pictures["ruby"])
    says(page, "reconstruct", r"12 of 16 patches removed \(75%\)")
    page.locator("#reconstruct-1 img").first.wait_for()
    before = source(page, 1)
    page.locator("#reconstruct-ratio input[type=number]").fill("0.25")
    page.locator("#reconstruct-ratio input[type=number]").press("Enter")
    says(page, "reconstruct", r"4 of 16 patches removed \(25%\)")
    changed(page, before)
    shot(page, "reconstruct")

    page.locator("#reconstruct-strategy").get_by_text("paint your own").click()
    says(page, "reconstruct", "paint over what shall be removed")
    canvas = page.locator("#reconstruct-editor canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 30, y)
    page.mouse.down()
    page.mouse.move(x + 30, y, steps=12)
    page.mouse.up()
    says(page, "reconstruct", r"\d+ of 16 patches removed")
    shot(page, "paint")


def pick_example(page, number: int) -> None:
    page.locator(".gallery-item").locator("visible=true").nth(number).click()


def test_an_example_is_as_good_as_an_upload_and_limits_hold_after_it(page, pictures):
    """Gradio makes a component anew for a visitor who picks an example: it must still be ours."""
    pick_example(page, 2)
    says(page, "recognise", "face|nobody is enrolled yet")
    page.locator("#recognise-upload").get_by_label("Remove Image").click()
    says(page, "recognise", "no picture yet")
    for name, text in (("broken", "cannot be read"), ("huge", "more than 4000000 pixels")):
        upload(page, "recognise-upload", pictures[name])
        says(page, "recognise", text)
        page.locator("#recognise-upload").get_by_label("Remove Image").click()
        says(page, "recognise", "no picture yet")

    turn_to(page, "Reconstruct")
    page.locator("#reconstruct-editor canvas").first.wait_for()
    pick_example(page, 3)
    says(page, "reconstruct", r"12 of 16 patches removed \(75%\)")
    before = source(page, 1)
    pick_example(page, 4)
    changed(page, before)
    says(page, "reconstruct", r"12 of 16 patches removed \(75%\)")


def test_an_annotation_is_written(page, pictures, flags):
    turn_to(page, "Annotate")
    upload(page, "annotate-upload", pictures["onyx"])
    says(page, "annotate", "no faces found")
    page.locator("#annotate-add").click()
    says(page, "annotate", "click two opposite corners of the new face")
    picture = page.locator("#annotate-shown img").first
    box = picture.bounding_box()
    picture.click(position={"x": box["width"] * 0.25, "y": box["height"] * 0.25})
    says(page, "annotate", "now the opposite corner")
    picture.click(position={"x": box["width"] * 0.75, "y": box["height"] * 0.75})
    says(page, "annotate", "face 1 of 1")
    identity = page.locator("#annotate-identity input")
    identity.fill("Onyx")
    identity.press("Enter")
    says(page, "annotate", "face 1 of 1")
    page.locator("#annotate-save").click()
    says(page, "annotate", "1 face of images/.* written")
    shot(page, "annotate")
    row = read_manifest(flags[flags.index("--annotations") + 1]).row(0)
    assert row["identity"] == "Onyx" and row["box"] == pytest.approx([40, 40, 120, 120], abs=6)


def test_two_pictures_are_compared(page, pictures):
    turn_to(page, "Verify")
    upload(page, "verify-first", pictures["ruby"])
    page.locator("#verify-first img").first.wait_for()
    page.locator("#verify-go").click()
    says(page, "verify", "the second picture: there is no picture yet")
    upload(page, "verify-second", pictures["ruby"])
    page.locator("#verify-second img").first.wait_for()
    page.locator("#verify-go").click()
    says(page, "verify", r"same character: probability of the same 73\.1%")
    shot(page, "verify")


def test_no_file_of_this_machine_is_handed_out(server):
    for path in ("/gradio_api/file=/etc/passwd", "/gradio_api/file=../../etc/passwd", "/file=/etc/passwd"):
        try:
            answer = urllib.request.urlopen(server.url + path, timeout=60).read()
        except urllib.error.HTTPError as error:
            assert error.code in (403, 404)
        else:
            assert b"root:" not in answer


def test_a_large_request_is_refused(server):
    request = urllib.request.Request(f"{server.url}/gradio_api/upload", data=b"x" * 6_000_000, method="POST")
    with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError)) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert getattr(refused.value, "code", 413) == 413
    assert server.process.poll() is None
