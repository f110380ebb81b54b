"""Gradio's inputs within our limits, and its handlers with our messages. Imports gradio.

Gradio decodes what is uploaded by itself, at any size, and fails with a traceback where it cannot. Here an upload
reaches the tab as a path, and `pictures.open_upload` is the one place where it is decoded. Methods of single components
are replaced: a class of our own would make gradio write a .pyi file beside this one.
"""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import gradio as gr
from gradio.components.base import server
from gradio.data_classes import FileData
from gradio.exceptions import Error
from PIL import Image

from util.run.errors import UserError
from visualize.demo.pictures import Limits, note, open_upload

MOST_PAINTINGS = 64  # of all visitors that are waiting for their turn
SOURCES = ["upload", "clipboard"]


def picture_input(**options) -> gr.Image:
    """An uploaded or pasted picture; the tab gets the path of the file, which nobody has opened yet."""
    component = gr.Image(type="filepath", sources=SOURCES, buttons=[], **options)
    # gradio has checked before that the path lies in its own folder of uploads
    component.preprocess = lambda payload: None if payload is None else payload.path
    return component


def paint_input(limits: Limits, **options) -> gr.ImageEditor:
    """A picture that is painted over. The tab gets {"background", "layers"}: pictures, decoded within the limits.

    The background is RGB, a layer RGBA.
    """
    component = gr.ImageEditor(type="pil", sources=SOURCES, buttons=[], **options)
    keep = component.accept_blobs

    @server
    def accept_blobs(data: gr.components.image_editor.AcceptBlobs):
        # of many paintings that never have their turn, the oldest are forgotten
        while len(component.blob_storage) >= MOST_PAINTINGS:
            component.blob_storage.pop(next(iter(component.blob_storage)))
        return keep(data)

    component.accept_blobs = accept_blobs
    component.convert_and_format_image = lambda file, flatten_on_white=False: _decoded(file, limits, flatten_on_white)
    return component


def _decoded(file: FileData | bytes | None, limits: Limits, is_background: bool) -> Image.Image | None:
    if file is None:
        return None
    content = file if isinstance(file, bytes) else Path(file.path).read_bytes()
    try:
        picture = open_upload(content, limits)
    except UserError as error:
        raise Error(str(error), print_exception=False) from error
    if is_background:
        return picture
    with Image.open(BytesIO(content)) as layer:  # within the limits, as was just seen
        return layer.convert("RGBA")


def answered(fn: Callable[..., tuple], blank: tuple) -> Callable[..., tuple]:
    """A handler whose last output is a line for the visitor: a UserError becomes that line, beside `blank` outputs."""

    def call(*inputs):
        try:
            return fn(*inputs)
        except UserError as error:
            return (*blank, note(str(error), bad=True))

    return call
