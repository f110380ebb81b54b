"""Writes a ToonFaces folder: pictures and masks in chunks that any number of workers draw, the manifest last.

A chunk counts as done when its truth lies in `.parts/`, which is written after its pictures. An interrupted
run goes on with the missing chunks; a folder of other arguments is refused. So pictures of two runs never mix.
"""

import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from util.data.manifest import MANIFEST_NAME, read_manifest, write_manifest
from util.run.errors import UserError
from util.run.files import is_temporary, only_writer, write_atomically, write_text
from util.toonfaces.identity import Identity, make_identities
from util.toonfaces.look import Look, draw_look
from util.toonfaces.render import Face, render_face
from util.toonfaces.scene import render_scene
from util.toonfaces.split import Planned, Sizes, plan

VERSION = 1  # raised whenever the same arguments would draw other pictures
CHUNK = 50  # pictures
_MARKER = "unfinished.json"  # the arguments of the run that fills the folder
_PARTS = ".parts"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the pixels of a folder. size: px; scenes: pictures with several characters."""

    sizes: Sizes
    size: int
    seed: int
    scenes: int = 0

    def text(self) -> str:
        """The recipe as JSON, kept in the manifest."""
        return json.dumps({"toonfaces": VERSION, **asdict(self)}, sort_keys=True)


@lru_cache(maxsize=2)
def cast(recipe: Recipe) -> dict[str, list[Identity]]:
    """The characters by kind: "id" (main), "open", "novel". All differ from each other in shape."""
    main = make_identities(recipe.sizes.identities, recipe.seed, "id")
    others = make_identities(recipe.sizes.open_identities, recipe.seed, "open", tuple(main))
    novel = make_identities(recipe.sizes.novel_identities, recipe.seed, "novel", (*main, *others))
    return {"id": main, "open": others, "novel": novel}


def write_faces(out: Path, recipe: Recipe, workers: int) -> bool:
    """Draw every planned face into `out`. Returns False if it was all there already."""
    return _write(out, recipe, len(plan(recipe.sizes)), _draw_faces, workers, "faces")


def write_scenes(out: Path, recipe: Recipe, workers: int) -> bool:
    """Draw the scenes into `out`, a prepared folder of its own. Returns False if they were all there already."""
    return _write(out, recipe, recipe.scenes, _draw_scenes, workers, "scenes")


def _write(out: Path, recipe: Recipe, count: int, draw: Callable, workers: int, unit: str) -> bool:
    if _is_complete(out, recipe) and not _leftovers(out) and not _is_held(out):
        return False
    with only_writer(out, "--out"):
        return _fill(out, recipe, count, draw, workers, unit)


def _fill(out: Path, recipe: Recipe, count: int, draw: Callable, workers: int, unit: str) -> bool:
    """Draw what is missing, for the one process that holds `out`."""
    if _is_complete(out, recipe):  # of a run that was stopped between manifest and cleaning up
        for rest in _leftovers(out):
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        return False
    _claim(out, recipe)
    missing = [start for start in range(0, count, CHUNK) if not _part(out, start).is_file()]
    jobs = [(draw, out, recipe, start, min(start + CHUNK, count)) for start in missing]
    with tqdm(total=count, unit=unit, disable=None) as bar:
        bar.update(count - sum(stop - start for *_, start, stop in jobs))
        for drawn in _run(jobs, workers):
            bar.update(drawn)
    rows = [row for start in range(0, count, CHUNK) for row in json.loads(_part(out, start).read_text("utf-8"))]
    write_manifest(out, rows, extra={"recipe": recipe.text()})
    shutil.rmtree(out / _PARTS)
    (out / _MARKER).unlink()
    return True


def _is_complete(out: Path, recipe: Recipe) -> bool:
    if not (out / MANIFEST_NAME).is_file():
        return False
    if read_manifest(out).metadata.get("recipe") != recipe.text():
        raise UserError(f"{out} holds a data set made with other arguments: choose another --out, or delete it")
    return True


def _leftovers(out: Path) -> list[Path]:
    return [rest for rest in (out / _MARKER, out / _PARTS) if rest.exists()]


def _is_held(out: Path) -> bool:
    """Whether somebody fills the folder, or was killed when it was full already: the lock goes with the next."""
    return any(map(is_temporary, out.iterdir()))


def _claim(out: Path, recipe: Recipe) -> None:
    """Mark the folder as being filled with this recipe, or go on with one that is."""
    marker = out / _MARKER
    if marker.is_file():
        if marker.read_text("utf-8") != recipe.text():
            raise UserError(
                f"{out} holds an unfinished data set with other arguments: delete it or choose another --out"
            )
    elif not all(map(is_temporary, out.iterdir())):
        raise UserError(f"{out} exists and is no unfinished ToonFaces folder: choose another --out, or empty it")
    write_text(marker, recipe.text())  # first of all: of a run that is killed here, nothing else is left
    for name in ("images", "masks", _PARTS):
        (out / name).mkdir(parents=True, exist_ok=True)


def _part(out: Path, start: int) -> Path:
    return out / _PARTS / f"{start:07d}.json"


def _run(jobs: list[tuple], workers: int) -> Iterator[int]:
    """The number of pictures of each finished job, in the order of the jobs."""
    if workers == 0 or len(jobs) < 2:
        yield from map(_do, jobs)
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), initializer=_end_with_parent) as pool:
        yield from pool.map(_do, jobs)


def _end_with_parent() -> None:
    """A worker of a process that was killed would wait for work forever: let it end at once."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _do(job: tuple) -> int:
    draw, out, recipe, start, stop = job
    rows = draw(out, recipe, start, stop)
    os.sync()  # the chunk's pictures, before they count as done: all at once, one by one takes longer
    write_text(_part(out, start), json.dumps(rows))
    return stop - start


def _draw_faces(out: Path, recipe: Recipe, start: int, stop: int) -> list[dict]:
    return [_draw_face(out, recipe, planned) for planned in plan(recipe.sizes)[start:stop]]


def _draw_face(out: Path, recipe: Recipe, planned: Planned) -> dict:
    identity = cast(recipe)[planned.kind][planned.character]
    look = draw_look((recipe.seed, "face", identity.name, planned.split, planned.number))
    picture = render_face(identity, look, recipe.size)
    name = f"{identity.name}_{planned.split}_{planned.number:05d}"
    _save(out, name, picture)
    return _row(name, name, planned.split, identity, look, picture.face)


def _draw_scenes(out: Path, recipe: Recipe, start: int, stop: int) -> list[dict]:
    rows = []
    for number in range(start, stop):
        scene = render_scene(cast(recipe)["id"], (recipe.seed, "scene", number), recipe.size * 3, recipe.size * 2)
        name = f"scene_{number:05d}"
        _save(out, name, scene)
        split = {8: "val", 9: "test"}.get(number % 10, "train")
        rows += [_row(f"{name}_{k}", name, split, *face) for k, face in enumerate(scene.faces)]
    return rows


def _save(out: Path, name: str, picture) -> None:
    for folder, image in (("images", picture.image), ("masks", picture.mask)):
        write_atomically(
            out / folder / f"{name}.png",
            lambda part, image=image: image.save(part, format="PNG", compress_level=1),
            sync=False,  # thousands of small files: `_do` syncs a chunk at once
        )


def _row(sample_id: str, file: str, split: str, identity: Identity, look: Look, face: Face) -> dict:
    return {
        "sample_id": sample_id,
        "file_name": f"images/{file}.png",
        "identity": identity.name,
        "split": split,
        "box": list(face.box),
        "eyes": [list(box) for box in face.eyes],
        "source": file,
        "style": look.style.name,
        "pose": look.pose,
        "occlusion": look.occlusion,
        "expression": look.expression.name,
        "mask_file": f"masks/{file}.png",
    }
