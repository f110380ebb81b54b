"""Enrol a character from a few pictures, see who is enrolled, forget one, set the threshold."""

from collections.abc import Sequence

from util.run.errors import UserError
from visualize.demo.models import Models, Seen
from visualize.demo.pictures import card, cards, note, open_upload

MOST = 20  # pictures at once


def enrol(models: Models, name: str, uploads: Sequence[str] | None) -> tuple[list[Seen], int]:
    """Add a character's pictures to the gallery; returns what was enrolled of each, and how many it has now.

    Of a picture with several faces the surest is taken. All or none: UserError where one cannot be read.
    """
    if not (name or "").strip():
        raise UserError("the character has no name yet: type one")
    if not uploads:
        raise UserError("there are no pictures yet: add one to five of the character")
    if len(uploads) > MOST:
        raise UserError(f"{len(uploads)} pictures at once are too many: at most {MOST}")
    seen = []
    for number, upload in enumerate(uploads, start=1):
        try:
            seen.append(models.look(open_upload(upload, models.limits))[0])
        except UserError as error:
            raise UserError(f"picture {number} of {len(uploads)}: {error}; nobody was enrolled") from error
    crops = [one.crop for one in seen]
    embeddings = models.embed(crops)
    with models.lock:
        return seen, models.gallery.enrol(name, embeddings, crops)


def remove(models: Models, name: str | None) -> None:
    """Forget a character. UserError where nobody is called so."""
    if not name:
        raise UserError("nobody is chosen: pick a character to remove")
    with models.lock:
        models.gallery.remove(name)


def set_threshold(models: Models, threshold: float) -> None:
    """Set the similarity below which a face is nobody's, and keep it with the gallery."""
    with models.lock:
        models.gallery.threshold = float(threshold)
        models.gallery.save()


def names(models: Models) -> list[str]:
    """Who is enrolled, sorted."""
    with models.lock:
        return sorted(models.gallery.people)


def overview(models: Models) -> str:
    """HTML: a card for each enrolled character."""
    with models.lock:
        gallery = models.gallery
        broken = note(f"{len(gallery.broken)} characters cannot be read: enrol them anew", bad=True)
        people = [
            card(name, gallery.thumbnail(name, 0), _pictures(len(gallery.people[name])))
            for name in sorted(gallery.people)
        ]
    return (broken if gallery.broken else "") + (cards(people) if people else note("nobody is enrolled yet"))


def _pictures(count: int) -> str:
    return f"{count} picture{'s' * (count > 1)}"


def answer(models: Models, name: str, uploads: Sequence[str] | None) -> tuple[str, str]:
    """Enrol, and what to show: the faces that were taken, and a line, as HTML."""
    seen, total = enrol(models, name, uploads)
    whole = sum(one.face is None for one in seen)
    doubt = f"; in {whole} no face was found, and the whole picture was taken" if whole else ""
    taken = cards([card("whole picture" if one.face is None else "face", one.crop) for one in seen])
    return taken, note(f"{' '.join(name.split())} is enrolled with {_pictures(total)}{doubt}")


def tab(models: Models):
    """The tab, inside a gradio.Blocks. Returns (function, outputs) that bring it up to date when a page is opened."""
    import gradio as gr

    from visualize.demo.inputs import answered

    with gr.Row():
        with gr.Column(scale=2):
            name = gr.Textbox(label="name of the character", max_lines=1, max_length=200, elem_id="enrol-name")
            files = gr.File(
                label="one to five pictures",
                file_count="multiple",
                file_types=["image"],
                height=160,
                elem_id="enrol-files",
            )
            go = gr.Button("Enrol", variant="primary", elem_id="enrol-go")
            line = gr.HTML(note("a few pictures are enough: nothing is trained"), elem_id="enrol-note")
            taken = gr.HTML(elem_id="enrol-taken")
        with gr.Column(scale=3):
            people = gr.HTML(elem_id="enrol-people")
            with gr.Row(equal_height=True):
                who = gr.Dropdown([], label="remove a character", elem_id="enrol-who")
                gone = gr.Button("Remove", variant="stop", scale=0, min_width=120, elem_id="enrol-remove")
            threshold = gr.Slider(
                -1, 1, step=0.01, label="similarity below which a face is unknown", elem_id="enrol-threshold"
            )

    def fresh():
        with models.lock:
            value = models.gallery.threshold
        return overview(models), gr.Dropdown(names(models), value=None), -1.0 if value is None else round(value, 3)

    def forget(chosen):
        remove(models, chosen)
        return (note(f"{chosen} is removed"),)

    def limit(value):
        set_threshold(models, value)
        return (note(f"faces below {value:.2f} are unknown from now on"),)

    state = [people, who, threshold]
    options = {"api_visibility": "private", "show_progress": "minimal"}
    enrolling = answered(lambda text, paths: answer(models, text, paths), ("",))
    go.click(enrolling, [name, files], [taken, line], **options).then(fresh, None, state, **options)
    gone.click(answered(forget, ()), who, line, **options).then(fresh, None, state, **options)
    threshold.release(answered(limit, ()), threshold, line, **options)
    return fresh, state
