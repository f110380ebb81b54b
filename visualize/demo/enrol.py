"""Enrol a character from a few pictures, see who is enrolled, forget one, set the threshold."""

from collections.abc import Sequence

from util.data.images import BadImage
from util.data.sources import Source, open_source, spread
from util.run.errors import UserError
from util.transfer.naming import stranger_threshold
from visualize.demo.models import Models, Seen
from visualize.demo.pictures import card, cards, note, open_upload

MOST = 20  # pictures at once
FAR = 0.1  # share of strangers that may be named, where the gallery itself sets the threshold


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


def enrol_folder(models: Models, data_path: str) -> str:
    """Enrol everybody of a data path who is not in the gallery yet; returns a line that says what was done.

    data_path: as `util.data.sources.open_source` takes it, with identities. The pictures are those of training, at most
    MOST of a character. Where the gallery has no threshold it gets its own guess. UserError where nobody has a name.
    """
    source = open_source(data_path, "train")
    identities = source.column("identity")
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(identities):
        if name is not None:
            rows.setdefault(name, []).append(row)
    if not rows:
        raise UserError(f"--enrol {data_path} has no names: give a folder of pictures for each character")
    fresh = {name: own for name, own in rows.items() if " ".join(name.split()) not in models.gallery.people}
    counts = [_enrol_rows(models, source, name, own) for name, own in fresh.items()]
    gallery = models.gallery
    if gallery.threshold is None and (threshold := stranger_threshold(gallery, FAR)) is not None:
        set_threshold(models, threshold)
    taken, bad = (sum(each) for each in zip((0, 0), *counts, strict=True))
    line = f"{sum(own > 0 for own, _ in counts)} characters of {data_path} enrolled with {_pictures(taken)}"
    known = len(rows) - len(fresh)
    return line + (f", {known} were enrolled before" if known else "") + (f", {bad} cannot be read" if bad else "")


def _enrol_rows(models: Models, source: Source, name: str, rows: list[int]) -> tuple[int, int]:
    """Enrol a character from some rows of a source; how many pictures were taken, and how many cannot be read."""
    crops, bad = [], 0
    for row in (rows[i] for i in spread(len(rows), MOST)):
        try:
            crops.append(models.look(source.load(row))[0].crop)
        except BadImage:
            bad += 1
    if crops:
        with models.lock:
            models.gallery.enrol(name, models.embed(crops), crops)
    return len(crops), bad


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
    return f"{count} picture{'s' * (count != 1)}"


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
