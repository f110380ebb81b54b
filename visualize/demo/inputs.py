"""Gradio's inputs within our limits, and its handlers with our messages. Imports gradio.

Gradio decodes what is uploaded by itself, at any size, and fails with a traceback where it cannot. Here an upload
reaches the tab as a path, and `pictures.open_upload` is the one place where it is decoded. These are classes, because
gradio makes a component anew for a visitor who picks an example.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO

import gradio as gr
from gradio import component_meta, processing_utils
from gradio.components.base import server
from gradio.data_classes import FileData
from gradio.exceptions import Error
from PIL import Image

from util.data.images import FORMATS
from util.run.errors import UserError
from visualize.demo.pictures import Limits, note, open_upload

MOST_PAINTINGS = 64  # of all visitors that are waiting for their turn
SOURCES = ["upload", "clipboard"]


def uploads_alone(page: gr.Blocks) -> None:
    """Let the calls of a page name files that were uploaded, and no other file or address.

    Gradio checks this of a page that was launched; for one that is mounted it would copy any file of this machine, or
    fetch any address, to where visitors can read it.
    """
    page.has_launched = True

    def refuse(address: str, *args, **options):
        raise Error("an address is no upload: send the file", print_exception=False)

    async def refuse_later(address: str, *args, **options):
        refuse(address)

    processing_utils.ssrf_protected_download = refuse
    processing_utils.async_ssrf_protected_download = refuse_later


@contextmanager
def _no_stubs() -> Iterator[None]:
    """Keep gradio from writing a .pyi file beside this one for each class that is made."""
    kept = component_meta.create_or_modify_pyi
    component_meta.create_or_modify_pyi = lambda *_: None
    try:
        yield
    finally:
        component_meta.create_or_modify_pyi = kept


with _no_stubs():

    class PictureInput(gr.Image):
        """See `picture_input`."""

        is_template = True  # to the page it is a gr.Image

        def preprocess(self, payload):
            """The path: gradio has checked before that it lies in its own folder of uploads (see `uploads_alone`)."""
            return None if payload is None else payload.path


def picture_input(**options) -> gr.Image:
    """An uploaded or pasted picture; the tab gets the path of the file, which nobody has opened yet."""
    return PictureInput(type="filepath", sources=SOURCES, buttons=[], **options)


def paint_input(limits: Limits, **options) -> gr.ImageEditor:
    """A picture that is painted over. The tab gets {"background", "layers"}: pictures, decoded within the limits.

    The background is RGB, a layer RGBA.
    """
    with _no_stubs():

        class PaintInput(gr.ImageEditor):  # gradio asks the constructor for its options: limits cannot be one
            is_template = True

            @server
            def accept_blobs(self, data: gr.components.image_editor.AcceptBlobs):
                # of many paintings that never have their turn, the oldest are forgotten
                while len(self.blob_storage) >= MOST_PAINTINGS:
                    self.blob_storage.pop(next(iter(self.blob_storage)))
                return super().accept_blobs(data)

            def convert_and_format_image(self, file, flatten_on_white=False):
                return _decoded(file, limits, is_background=flatten_on_white)

    return PaintInput(type="pil", sources=SOURCES, buttons=[], **options)


def _decoded(file: FileData | bytes | None, limits: Limits, is_background: bool) -> Image.Image | None:
    if file is None:
        return None
    try:
        picture = open_upload(file if isinstance(file, bytes) else file.path, limits)
    except UserError as error:
        raise Error(str(error), print_exception=False) from error
    if is_background:
        return picture
    source = BytesIO(file) if isinstance(file, bytes) else file.path
    with Image.open(source, formats=FORMATS) as layer:  # within the limits, as was just seen
        return layer.convert("RGBA")


def answered(fn: Callable[..., tuple], blank: tuple) -> Callable[..., tuple]:
    """A handler whose last output is a line for the visitor: a UserError becomes that line, beside `blank` outputs."""

    def call(*inputs):
        try:
            return fn(*inputs)
        except UserError as error:
            return (*blank, note(str(error), bad=True))

    return call
