"""The annotation tab's form and its events; what they do is in `visualize.demo.annotate`. Imports gradio."""

from collections.abc import Callable

import gradio as gr

from util.run.errors import UserError
from visualize.demo import annotate
from visualize.demo.annotations import FIELDS
from visualize.demo.inputs import picture_input
from visualize.demo.models import Models
from visualize.demo.pictures import note
from visualize.demo.shelf import Shelf

OPTIONS = {"api_visibility": "private", "show_progress": "minimal"}


def build(models: Models) -> None:
    """The tab, inside a gradio.Blocks."""
    state, shelf = gr.State(None, time_to_live=3600), Shelf()  # the key of a page on the shelf; s
    with gr.Row():
        with gr.Column(scale=3):
            shown = gr.Image(
                label="click two opposite corners to set the box of the chosen face", interactive=False, format="png",
                buttons=[], elem_id="annotate-shown",
            )  # fmt: skip
            line = gr.HTML(note("upload a picture, or open one of the folder"), elem_id="annotate-note")
        with gr.Column(scale=2):
            upload = picture_input(label="new picture", height=180, elem_id="annotate-upload")
            stored = gr.Dropdown(
                annotate.listed(models), value=None, label="or one of the folder", elem_id="annotate-stored"
            )
            face = gr.Radio([], label="face", elem_id="annotate-face")
            with gr.Row():
                more = gr.Button("Add a face", size="sm", elem_id="annotate-add")
                less = gr.Button("Remove this face", size="sm", elem_id="annotate-less")
            values = [
                gr.Dropdown([], label=name, allow_custom_value=True, elem_id=f"annotate-{name}", min_width=150)
                for name in FIELDS[:1]
            ]
            with gr.Row():
                values += [
                    gr.Dropdown(
                        list(annotate.CHOICES[name]), label=name, allow_custom_value=True, min_width=100, value=None,
                        elem_id=f"annotate-{name}",
                    )
                    for name in FIELDS[1:]
                ]  # fmt: skip
            with gr.Row():
                corners = [gr.Number(label=name, min_width=70, elem_id=f"annotate-{name}") for name in annotate.CORNERS]
            keep = gr.Button("Save", variant="primary", elem_id="annotate-save")
    outputs = [state, shown, face, *values, *corners, line]

    def show(key: str | None, page: annotate.Page, text: str) -> tuple:
        identity, *others = annotate.fields(page)
        numbers = [(str(number + 1), number) for number in range(len(page.draft.labels))]
        return (
            shelf.put(page, key), annotate.draw(page),
            gr.Radio(numbers, value=page.chosen if page.chosen >= 0 else None),
            gr.Dropdown(annotate.known_names(models, page), value=identity), *others, note(text),
        )  # fmt: skip

    def on(fn: Callable) -> Callable:
        """A handler of (page, inputs ...) -> (page, line); a UserError leaves the page as it is."""

        def call(key, *inputs):
            try:
                return show(key, *fn(shelf.get(key), *inputs))
            except UserError as error:
                return (key, *[gr.skip()] * (len(outputs) - 2), note(str(error), bad=True))

        return call

    def need(page: annotate.Page | None) -> annotate.Page:
        if page is None:
            raise UserError("there is no picture, or no longer: upload one, or open one of the folder")
        return page

    def hint(page: annotate.Page) -> str:
        return f"face {page.chosen + 1} of {len(page.draft.labels)}" if page.label else "no face is chosen"

    def turned(page: annotate.Page) -> tuple[annotate.Page, str]:
        return page, hint(page)

    def changed(page, *inputs):
        box = inputs[len(FIELDS) :]
        given = dict(zip(FIELDS, (text or "" for text in inputs), strict=False))
        if None not in box:
            given["box"] = box if list(box) != annotate.fields(need(page))[len(FIELDS) :] else page.label.box
        return turned(annotate.change(need(page), **given))

    def clicked(key, event: gr.SelectData):
        try:
            page = need(shelf.get(key))
            scale = annotate.scale_of(page)
            page = annotate.click(page, *(value * scale for value in event.index))
            return show(key, page, "now the opposite corner" if page.corner else hint(page))
        except UserError as error:
            return (key, *[gr.skip()] * (len(outputs) - 2), note(str(error), bad=True))

    upload.change(on(lambda page, path: annotate.open_new(models, path) if path else turned(need(page))),
                  [state, upload], outputs, **OPTIONS)  # fmt: skip
    stored.input(on(lambda page, name: annotate.open_stored(models, name)), [state, stored], outputs, **OPTIONS)
    face.input(on(lambda page, number: turned(annotate.choose(need(page), number))), [state, face], outputs, **OPTIONS)
    more.click(on(lambda page: (annotate.add(need(page)), "click two opposite corners of the new face")),
               [state], outputs, **OPTIONS)  # fmt: skip
    less.click(on(lambda page: turned(annotate.remove(need(page)))), [state], outputs, **OPTIONS)
    shown.select(clicked, [state], outputs, **OPTIONS)
    for field in (*values, *corners):
        event = field.input if field in values else field.submit
        event(on(changed), [state, *values, *corners], outputs, **OPTIONS)
    saving = keep.click(on(lambda page: annotate.save(models, need(page))), [state], outputs, **OPTIONS)
    saving.then(lambda: gr.Dropdown(annotate.listed(models)), None, stored, **OPTIONS)
