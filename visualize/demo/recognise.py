"""Who is in a picture: faces found and boxed, and the enrolled characters most alike to each."""

from dataclasses import dataclass

from PIL import Image

from util.data.faces import Face
from util.transfer.gallery import Match
from visualize.demo.models import Models, Seen
from visualize.demo.pictures import boxed, card, cards, note, open_upload

TOP = 5
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Named:
    """A face and the characters most alike to it, best first. name: the best one's, or UNKNOWN below the threshold."""

    seen: Seen
    matches: list[Match]
    name: str

    @property
    def face(self) -> Face | None:
        return self.seen.face


def recognise(models: Models, picture: Image.Image) -> list[Named]:
    """Every face of a picture, from left to right."""
    seen = models.look(picture)
    if all(one.face for one in seen):
        seen = sorted(seen, key=lambda one: one.face.box[0])
    embeddings = models.embed([one.crop for one in seen])
    with models.lock:
        found = models.gallery.identify(embeddings, TOP)
        return [Named(one, matches, _name(models, matches)) for one, matches in zip(seen, found, strict=True)]


def _name(models: Models, matches: list[Match]) -> str:
    return matches[0].name if matches and models.gallery.is_known(matches[0]) else UNKNOWN


def draw(picture: Image.Image, named: list[Named]) -> Image.Image:
    """The picture with a numbered box for each face."""
    found = [(one.face.box, str(number)) for number, one in enumerate(named, start=1) if one.face]
    return boxed(picture, [box for box, _ in found], [caption for _, caption in found])


def describe(models: Models, named: list[Named]) -> str:
    """HTML: a row for each face, with its crop, its name, and the top characters' gallery pictures."""
    with models.lock:
        return "".join(_row(models, number, one) for number, one in enumerate(named, start=1))


def _row(models: Models, number: int, one: Named) -> str:
    gallery = models.gallery
    own = card(one.name, one.seen.crop, f"face {number}" if one.face else "the whole picture")
    others = [
        card(match.name, gallery.thumbnail(match.name, match.nearest), f"{match.similarity:.3f}", match.similarity)
        for match in one.matches
    ]
    kind = "unknown" if one.name == UNKNOWN else "known"
    return f'<section class="face {kind}"><div class="own">{own}</div>{cards(others)}</section>'


def summary(models: Models, named: list[Named]) -> str:
    """One line: how many faces, who they are, and by which threshold."""
    if not models.gallery.people:
        return "nobody is enrolled yet: enrol a character first"
    threshold = models.gallery.threshold
    how = "no threshold is set: the best is always named" if threshold is None else f"named from {threshold:.2f}"
    count = f"{len(named)} face{'s' * (len(named) > 1)}"
    whole = "the whole picture is taken" if models.finder is None else "no face found, the whole picture is taken"
    faces = count if named[0].face else whole
    return f"{faces}: {', '.join(one.name for one in named)} (similarity is a cosine; {how})"


def answer(models: Models, upload: str | None) -> tuple[Image.Image, str, str]:
    """The tab's job: the boxed picture, the rows and the line, as HTML. UserError for what is no picture."""
    picture = open_upload(upload, models.limits)
    named = recognise(models, picture)
    return draw(picture, named), describe(models, named), note(summary(models, named))


def tab(models: Models, examples: list[str]) -> None:
    """The tab, inside a gradio.Blocks."""
    import gradio as gr

    from visualize.demo.inputs import answered, picture_input

    with gr.Row():
        with gr.Column(scale=2):
            upload = picture_input(label="picture", height=320, elem_id="recognise-upload")
            go = gr.Button("Recognise", variant="primary", elem_id="recognise-go")
            if examples:
                gr.Examples(examples, upload, label="examples, drawn by ToonFaces", examples_per_page=12)
        with gr.Column(scale=3):
            line = gr.HTML(note("upload, paste or pick a picture"), elem_id="recognise-note")
            shown = gr.Image(
                label="faces found", interactive=False, format="jpeg", height=300, buttons=["download", "fullscreen"],
                elem_id="recognise-boxes",
            )  # fmt: skip
            rows = gr.HTML(elem_id="recognise-rows")
    fn = answered(lambda path: answer(models, path), (None, ""))
    for event in (upload.change, go.click):
        event(fn, upload, [shown, rows, line], api_visibility="private", show_progress="minimal")
