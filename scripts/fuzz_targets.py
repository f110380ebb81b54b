"""The readers that scripts/fuzz_readers.py gives damaged files to: what is valid, what is damaged, how it is read."""

import importlib.util
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from models_transfer import load_recogniser, start_backbone
from scripts import fuzz_corpus as corpus
from scripts.fuzz_mutations import mutate
from util.benchmark.detection_files import read_predictions
from util.benchmark.embedded import FACTS, embed_split, read_embeddings
from util.benchmark.release import SUMS, digest, read_release
from util.benchmark.scores import read_scores
from util.benchmark.submission import read_scores as read_submission
from util.benchmark.submission import score_protocols
from util.data import pack
from util.data.faces import StoredFinder
from util.data.images import alpha_of, decode_image
from util.data.manifest import read_manifest
from util.data.maps import check_rows, read_map
from util.data.packed import PackedFile, PackedSource
from util.data.prepare import image_sizes
from util.data.sources import open_source
from util.data.trials import ICARTOONFACE, read_protocol
from util.run.files import write_text
from util.training.checkpoint import restore
from util.transfer.face_store import FaceStore, PictureFile
from util.transfer.face_table import FaceTable, wishes
from util.transfer.gallery import Gallery
from util.transfer.lora import LoRAConfig, add_lora, load_lora, load_peft

ROOT = Path(__file__).resolve().parents[1]
Rng = np.random.Generator


@dataclass(frozen=True)
class Reader:
    """make(folder): writes valid files. read(folder, victim): reads them, `victim` being the one that was damaged.

    victims: glob patterns of the files that are damaged. repair(folder, rng): brings checksums up to date, so that the
    damage is not found by them.
    """

    make: Callable[[Path], None]
    read: Callable[[Path, Path], object]
    victims: tuple[str, ...]
    repair: Callable[[Path, Rng], None] | None = field(default=None)

    def damage(self, valid: Path, folder: Path, rng: Rng) -> Path:
        """Copy the valid files to `folder`, damage one of them there, and return its path."""
        shutil.copytree(valid, folder, copy_function=os.link)  # readers do not write into files that are there
        found = sorted(path for pattern in self.victims for path in folder.glob(pattern) if path.is_file())
        victim = found[int(rng.integers(len(found)))]
        same = [path for path in found if path.suffix == victim.suffix and path != victim]
        other = [same[int(rng.integers(len(same)))].read_bytes()] if same else []
        data = victim.read_bytes()
        victim.unlink()
        victim.write_bytes(mutate(data, victim.suffix, rng, other))
        if self.repair:
            self.repair(folder, rng)
        return victim


# --- pictures and tables --------------------------------------------------------------------------------------------


def read_image(folder: Path, victim: Path) -> None:
    """As a file, as bytes, and its size alone."""
    list(image_sizes(folder, [victim.name]))
    decode_image(victim)
    alpha_of(victim.read_bytes())


def read_prepared(folder: Path, victim: Path) -> None:
    """Every cell, and the pictures of a role."""
    manifest = read_manifest(folder)
    rows = [manifest.row(i) for i in range(len(manifest))]
    if rows:
        manifest.path(0), manifest.mask_path(0)
        open_source(folder, "train").stamp()


def read_trials(folder: Path, victim: Path) -> None:
    """The official trials."""
    read_protocol(folder, ICARTOONFACE)


@cache
def _script(name: str):
    """A script of datasets/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"fuzzed_{name}", ROOT / f"datasets/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def prepare(script: str, *flags: str) -> Callable[[Path, Path], None]:
    """A reader that runs a prepare script on the folder. FOLDER in a flag stands for it."""

    def read(folder: Path, victim: Path) -> None:
        given = [flag.replace("FOLDER", str(folder)) for flag in flags]
        # not through @cli, which would end the process
        _script(script).main.__wrapped__(["--data_path", str(folder), "--out", str(folder.parent / "out"), *given])

    return read


def prepare_pools(folder: Path, victim: Path) -> None:
    """Both data sets that come as Parquet files of pictures."""
    prepare("prepare_huggan")(folder, victim)
    shutil.rmtree(folder.parent / "out")
    prepare("prepare_animediffusion")(folder, victim)


def map_names(folder: Path, victim: Path) -> None:
    """The names of three data sets against each other."""
    where = {"moeimouto": "moe/classid_classname.csv", "dafre": "dafre/labels/classid_classname.csv"}
    where |= {"acrd": "acrd/tagIds.tsv", "acrd_splits": "acrd", "dafre_test": "dafre/labels/test.csv"}
    flags = [part for name, path in where.items() for part in (f"--{name}", str(folder / path))]
    _script("identity_map").main.__wrapped__(
        [*flags, "--out", str(folder / "map.csv"), "--lists", str(folder / "lists")]
    )


def make_packed(folder: Path) -> None:
    """A packed file with a map and trials in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as name:  # of this child process alone
        data = Path(name) / "unpacked"
        corpus.maps(data)
        corpus.protocols(data)
        flags = ["--data_path", str(data), "--out", str(folder / "data.pack"), "--canvas", "8", "--num_workers", "0"]
        pack.main([*flags, "--max_bad", "1"])


def read_packed(folder: Path, victim: Path) -> None:
    """Through a role, then every cell, canvas, map and trial, and the checksums."""
    source = open_source(victim, "train")
    file = PackedFile(victim)
    every = PackedSource("all", file)
    for i in range(len(every)):
        dict(every.record(i))
        every.load(i)
    source.stamp()
    for name in file.names("maps"):
        file.semantic_map(name)
    read_protocol(victim, ICARTOONFACE)
    list(file.damage())


def read_maps(folder: Path, victim: Path) -> None:
    """A map, and whether it is of these rows."""
    manifest = read_manifest(folder)
    check_rows(folder / "maps", manifest)
    np.asarray(read_map(folder / "maps/face.npy")).sum()


# --- weights ----------------------------------------------------------------------------------------------------------


def read_weights(folder: Path, victim: Path) -> None:
    """Into an encoder, as --init and --ckpt do."""
    path = victim.parent if victim.parent.name == "hf" else victim
    load_recogniser(str(path), model=corpus.MODEL)


def read_transfer(folder: Path, victim: Path) -> None:
    """A checkpoint with a head."""
    load_recogniser(str(victim))


def read_resume(folder: Path, victim: Path) -> None:
    """Into a run that goes on."""
    model = start_backbone(corpus.FLAGS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = Namespace(step_images=4, fingerprint="d")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    restore(victim, model, optimizer, scaler, corpus.FLAGS, loader, lambda text: None)


def read_adapters(folder: Path, victim: Path) -> None:
    """Into an encoder."""
    config, state = load_peft(folder)
    model = start_backbone(corpus.FLAGS)
    add_lora(model, LoRAConfig(config.rank, config.alpha, config.targets))
    load_lora(model, state, str(folder))


# --- what is computed -----------------------------------------------------------------------------------------------


def read_npz(folder: Path, victim: Path) -> None:
    """Embeddings of anybody's model, made ready for the protocols."""
    embeddings, sample_id = read_embeddings(str(victim))
    embed_split("test", embeddings, {name: list(sample_id) for name in FACTS})


def read_benchmark(folder: Path, victim: Path) -> None:
    """A release, and a submission to it."""
    release = read_release(folder / "release")
    score_protocols(read_submission(str(folder / "scores.npz"), release), release, replicates=4)


def resum(folder: Path, rng: Rng) -> None:
    """Checksums of a release that somebody has changed: right nine times in ten."""
    if rng.random() < 0.9:
        release = folder / "release"
        files = sorted(path for path in release.rglob("*") if path.is_file() and path.name != SUMS)
        lines = (f"{digest(path)}  {path.relative_to(release).as_posix()}\n" for path in files)
        write_text(release / SUMS, "".join(lines))


def read_found(folder: Path, victim: Path) -> None:
    """What a detector found."""
    files = [f"{i}.png" for i in range(4)]
    if victim.name == "stored.json":
        StoredFinder(victim).find(None, "0.png")
    else:
        read_predictions(victim, files)


def read_gallery(folder: Path, victim: Path) -> None:
    """Enrolled characters, and who a picture shows."""
    shelf = Gallery.open(folder, "0123", corpus.DIM)
    for matches in shelf.identify(np.ones((1, corpus.DIM), np.float32)):
        for match in matches:
            shelf.is_known(match)
            shelf.thumbnail(match.name, match.nearest)


def read_faces(folder: Path, victim: Path) -> None:
    """Found faces, and the names that were written beside them."""
    store = FaceStore(folder / "store", {"finder": "a"}, corpus.DIM)
    pictures = [picture for i in range(3) if (picture := PictureFile(f"{i}.png", f"1-{i}")) in store]
    table = FaceTable.of([store[picture] for picture in pictures]) if pictures else None
    if table:
        wishes(folder / "faces.csv", table, {0: "asuka"})


def read_measures(folder: Path, victim: Path) -> None:
    """Scores of a pre-trained model."""
    print([measured.mean for measured in read_scores(victim)[0].values()])


LISTS = ("*.csv", "*.txt", "*.tsv", "labels/*.csv")
READERS = {
    "images": Reader(corpus.images, read_image, ("*",)),
    "manifest": Reader(corpus.prepared, read_prepared, ("metadata.parquet",)),
    "protocols": Reader(corpus.protocols, read_trials, ("protocols/*",)),
    "icartoonface_det": Reader(corpus.icartoonface_det, prepare("prepare_icartoonface_det"), LISTS),
    "icartoonface_rec": Reader(
        corpus.icartoonface_rec,
        prepare("prepare_icartoonface_rec", "--groups", "blocks", "--val_identities", "1"),
        LISTS,
    ),
    "acrd": Reader(corpus.acrd, prepare("prepare_acrd", "--min_images", "1"), LISTS),
    "dafre": Reader(corpus.dafre, prepare("prepare_dafre", "--grouped"), LISTS),
    "moeimouto": Reader(corpus.moeimouto, prepare("prepare_moeimouto"), LISTS),
    "picture_list": Reader(
        corpus.listed,
        prepare("prepare_folder", "--splits", "FOLDER/splits.csv", "--include", "a", "--parts", "FOLDER/parts.json"),
        ("splits.csv", "parts.json"),
    ),
    "pools": Reader(corpus.pool, prepare_pools, ("*.parquet",)),
    "names": Reader(corpus.names, map_names, ("moe/*.csv", "dafre/labels/*.csv", "acrd/*.tsv")),
    "packed": Reader(make_packed, read_packed, ("*.pack",)),
    "maps": Reader(corpus.maps, read_maps, ("maps/*",)),
    "weights": Reader(corpus.weights, read_weights, ("*.*", "hf/*")),
    "transfer": Reader(corpus.transfer, read_transfer, ("*.pth",)),
    "resume": Reader(corpus.resume, read_resume, ("*.pth",)),
    "adapters": Reader(corpus.adapters, read_adapters, ("*",)),
    "embeddings": Reader(corpus.embeddings, read_npz, ("*.npz",)),
    "release": Reader(corpus.release, read_benchmark, ("scores.npz", "release/*", "release/*/*"), resum),
    "predictions": Reader(corpus.predictions, read_found, ("*",)),
    "gallery": Reader(corpus.gallery, read_gallery, ("gallery.json", "people/*.npz")),
    "faces": Reader(corpus.faces, read_faces, ("store/*/*.npz", "faces.csv")),
    "measures": Reader(corpus.measures, read_measures, ("*.npz",)),
}
