"""Do two pictures show one character? With a probability where the recogniser was calibrated, else without."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from util.run.errors import UserError
from util.transfer.gallery import unit
from visualize.demo.models import Models, Seen
from visualize.demo.pictures import card, cards, note, open_upload

SURE = 0.5  # probability from which two faces are called the same


@dataclass(frozen=True)
class Verdict:
    """faces: what was compared, the surest of each picture. similarity: cosine. probability: 0..1, None: unknown."""

    faces: tuple[Seen, Seen]
    similarity: float
    probability: float | None

    @property
    def same(self) -> bool | None:
        return None if self.probability is None else self.probability >= SURE


def verify(models: Models, first: Image.Image, second: Image.Image) -> Verdict:
    """Compare the surest face of each picture."""
    faces = (models.look(first)[0], models.look(second)[0])
    one, other = unit(models.embed([seen.crop for seen in faces]))
    similarity = float(np.dot(one, other))
    calibration = models.facts.calibration
    return Verdict(faces, similarity, calibration.probability(similarity) if calibration else None)


def describe(models: Models, verdict: Verdict) -> str:
    """One line: the verdict, its probability, and what it rests on."""
    cosine = f"similarity {verdict.similarity:.3f}"
    if verdict.probability is None:
        return f"{cosine}; this recogniser was not calibrated, so there is no probability and no verdict"
    word = "same character" if verdict.same else "different characters"
    about = models.facts.calibration.about
    basis = f", fitted on {about['pairs']} pairs of {about['data']}" if {"pairs", "data"} <= about.keys() else ""
    return f"{word}: probability of the same {verdict.probability:.1%} ({cosine}; even odds beforehand{basis})"


def answer(models: Models, first: str | None, second: str | None) -> tuple[str, str]:
    """The tab's job: the two faces and the verdict, as HTML. UserError names the picture that cannot be read."""
    pictures = []
    for which, upload in (("first", first), ("second", second)):
        try:
            pictures.append(open_upload(upload, models.limits))
        except UserError as error:
            raise UserError(f"the {which} picture: {error}") from error
    verdict = verify(models, *pictures)
    seen = [card("whole picture" if one.face is None else "its face", one.crop) for one in verdict.faces]
    return cards(seen), note(describe(models, verdict))


def tab(models: Models) -> None:
    """The tab, inside a gradio.Blocks."""
    import gradio as gr

    from visualize.demo.inputs import answered, picture_input

    with gr.Row():
        first = picture_input(label="first picture", height=300, elem_id="verify-first")
        second = picture_input(label="second picture", height=300, elem_id="verify-second")
    go = gr.Button("Compare", variant="primary", elem_id="verify-go")
    line = gr.HTML(note("of each picture the surest face is compared"), elem_id="verify-note")
    faces = gr.HTML(elem_id="verify-faces")
    fn = answered(lambda *paths: answer(models, *paths), ("",))
    go.click(fn, [first, second], [faces, line], api_visibility="private", show_progress="minimal")
