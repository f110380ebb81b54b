"""The page: five tabs in one gradio.Blocks, and how it is served.

    from visualize.demo.app import serve
    serve()                                # a Hugging Face Space needs no more than these two lines, as its app.py

`build_app(models)` makes the page alone, for whoever serves it in his own way.
"""

import os
import socket
import tempfile
from pathlib import Path

from util.run.errors import UserError
from visualize.demo import enrol, examples, recognise, reconstruct, verify
from visualize.demo.gate import MOST_CONNECTIONS, STORE_BYTES, BodyLimit, Reception, StoreLimit, http_protocol
from visualize.demo.models import Models, Settings

# read when gradio is imported: no call home, no traces
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

LOOPBACK = ("127.0.0.1", "localhost")
TITLE = "AniMask: anime faces"
CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
FORM_BYTES = 100_000  # of a call without a file
SESSIONS = 100  # of visitors that are remembered; gradio would keep what it has shown to 10,000
WAITING = 200  # calls that wait for their turn; further ones are told so
FILES = 5  # of the largest size in one request: an enrolment sends its pictures together, a painting grows as PNG


def open_models(settings: Settings) -> Models:
    """The networks, and a gallery that is not empty when it is new.

    Characters of ToonFaces are enrolled for the demo's own recogniser only: another one is for other art.
    """
    models = Models(settings)
    if models.is_new and settings.ckpt is None and not settings.enrol:
        examples.fill_gallery(models)
    if settings.enrol:
        print(enrol.enrol_folder(models, settings.enrol))
    return models


def build_app(models: Models, example_paths: list[str]):
    """The page as a gradio.Blocks. UserError where gradio is not installed."""
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError(f"the demo needs gradio ({error}): pip install -r requirements-demo.txt") from error
    from visualize.demo import annotate_tab  # imports gradio

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(f"<h1>{TITLE}</h1>", elem_id="title")
        with gr.Tab("Recognise", id="recognise"):
            recognise.tab(models, example_paths)
        with gr.Tab("Enrol", id="enrol"):
            fresh, state = enrol.tab(models)
        with gr.Tab("Annotate", id="annotate"):
            annotate_tab.build(models)
        with gr.Tab("Reconstruct", id="reconstruct"):
            reconstruct.tab(models, example_paths)
        with gr.Tab("Verify", id="verify"):
            verify.tab(models)
        page.load(fresh, None, state, api_visibility="private", show_progress="hidden")
    page.state_session_capacity = SESSIONS  # what launch(), which is not called, would set
    return page.queue(max_size=WAITING)


def web_app(page, settings: Settings, host: str):
    """The ASGI application: the page behind our limits, with no call home, no history, no fonts from elsewhere.

    Gradio's own launch asks the page for an answer within seconds, and offers to share it with the world where none
    comes; on a busy machine none does.
    """
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from visualize.demo.inputs import uploads_alone

    web = FastAPI(openapi_url=None)
    web.add_middleware(Reception)
    web.add_middleware(StoreLimit, folder=Path(gr.utils.get_upload_folder()), most=STORE_BYTES)
    web.add_middleware(BodyLimit, most=FILES * settings.limits.max_bytes + FORM_BYTES)
    if host in LOOPBACK:  # a name that is made to point here does not make a strange site ours
        web.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))
    uploads_alone(page)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(
        web, page, path="/", theme=theme, css=CSS, max_file_size=settings.limits.max_bytes, footer_links=[],
        run_history=False, ssr_mode=False, show_error=False, enable_monitoring=False, mcp_server=False,
    )  # fmt: skip


def limit_pixels(settings: Settings) -> None:
    """Let no library of this process unpack more pixels than an upload may have (Pillow refuses twice its limit)."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = settings.limits.max_pixels // 2


def serve(settings: Settings | None = None, host: str | None = None, port: int | None = None) -> None:
    """Open everything and serve until interrupted.

    host, port: default to those that a Space sets in GRADIO_SERVER_NAME and GRADIO_SERVER_PORT, else to this machine
    alone and 7860. UserError where weights do not fit, or the port is taken.
    """
    settings = settings or Settings()
    host = host or os.environ.get("GRADIO_SERVER_NAME", LOOPBACK[0])
    port = port or int(os.environ.get("GRADIO_SERVER_PORT", 7860))
    limit_pixels(settings)
    models = open_models(settings)
    with tempfile.TemporaryDirectory(prefix="animask-") as own:
        # by default gradio keeps uploads where those of every other page of this user lie
        os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(own) / "uploads"))
        page = build_app(models, examples.write_examples(Path(own) / "examples"))
        _run(
            web_app(page, settings, host), host, port, f"{len(models.gallery.people)} characters in {settings.gallery}"
        )


def _run(web, host: str, port: int, line: str) -> None:
    import uvicorn

    try:
        door = socket.create_server((host, port))
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be served ({error.strerror}): give another --port or --host") from error
    print(f"the demo is at http://{host}:{port}, with {line}", flush=True)
    config = uvicorn.Config(
        web, log_level="warning", timeout_graceful_shutdown=2, http=http_protocol(), ws="none",
        limit_concurrency=MOST_CONNECTIONS,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[door])
