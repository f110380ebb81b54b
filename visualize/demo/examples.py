"""What there is to try at once: characters of ToonFaces, drawn when the demo starts, none of them a training picture.

A new gallery is given CAST; STRANGERS are enrolled nowhere, so that a picture of them shows what unknown looks like.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image

from util.run.files import write_atomically
from util.toonfaces.identity import Identity, make_identities
from util.toonfaces.look import draw_look
from util.toonfaces.render import render_face
from util.toonfaces.scene import render_scene
from visualize.demo.models import Models

CAST = ("Aoi", "Hina", "Kaito", "Mei", "Nao", "Rin", "Sora", "Yuki")
STRANGERS = ("Jun", "Ren")
SEED = 2026  # of no data set in this project
SHOTS = 3  # pictures of each character in a new gallery
SIZE = 160  # px, side of a face picture
SCENES = (7, 8)  # numbers of scenes that show several faces


def characters() -> dict[str, Identity]:
    """Everybody by name."""
    made = make_identities(len(CAST) + len(STRANGERS), SEED, "demo")
    return {name: replace(one, name=name) for name, one in zip((*CAST, *STRANGERS), made, strict=True)}


def portrait(who: Identity, number: int, **look) -> Image.Image:
    """A picture of a character; every number another one. look: fields of `draw_look` that are fixed."""
    return render_face(who, draw_look((SEED, "demo", who.name, number), **look), SIZE).image


def fill_gallery(models: Models) -> int:
    """Enrol CAST in the gallery, SHOTS pictures each, and keep it on disk; returns how many characters it has."""
    people = characters()
    for name in CAST:
        shots = [portrait(people[name], number, occlusion="none") for number in range(SHOTS)]
        crops = [models.look(shot)[0].crop for shot in shots]
        with models.lock:
            models.gallery.enrol(name, models.embed(crops), crops)
    return len(models.gallery.people)


def pictures() -> Iterator[tuple[str, Image.Image]]:
    """File name and picture of each example: two scenes, characters of the gallery, a stranger."""
    people = characters()
    for number in SCENES:
        yield f"scene{number}.png", render_scene(list(people.values()), (SEED, "demo scene", number), 480, 320).image
    for name in (*CAST[:4], *STRANGERS):
        yield f"{name}.png", portrait(people[name], 100)


def write_examples(folder: Path) -> list[str]:
    """Draw the examples into a folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in pictures():
        write_atomically(folder / name, lambda part, picture=picture: picture.save(part, "PNG"))
        paths.append(str(folder / name))
    return paths
