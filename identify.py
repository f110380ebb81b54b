"""Who is in a folder of pictures: faces found, grouped by character, named from a gallery; the rest is unknown.

python identify.py PICTURES --ckpt RUN/checkpoint-best.pth --finder cascade:lbpcascade_animeface.xml --output_dir OUT
python identify.py ... --enrol 3="Rei Ayanami"        # after a look at OUT/sheet.png: cluster 3 is Rei
python identify.py ...                                # or write names into the column enrol_as of OUT/faces.csv

OUT gets faces.csv (a row for each face), sheet.png and more pages of it, bad_images.jsonl, results.json. Who is
enrolled lies in the gallery and is found in other folders too. The same call again looks at new pictures only.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from models_finders import KINDS, WHOLE, finder_parts, open_finder
from models_transfer import MODEL_NAMES, load_recogniser
from util.data.augment import EvalCrop
from util.data.face_crop import cut_face
from util.data.faces import MIN_SCORE
from util.data.images import BadImage, decode_image
from util.run import args as flags
from util.run.device import inference_batch, pick_device, pick_precision
from util.run.errors import UserError, cli
from util.run.files import only_writer, write_text
from util.run.log import progress, provenance, write_json
from util.training.checkpoint import plain_args
from util.training.pretrained import fingerprint_of
from util.transfer.clusters import METHODS, cluster_faces
from util.transfer.encoder import Encoder
from util.transfer.face_search import FaceSearch, WholeFinder, list_pictures
from util.transfer.face_sheet import sheet_rows, write_sheets
from util.transfer.face_store import Faces, FaceStore
from util.transfer.face_table import FaceTable, fresh_rows, wishes
from util.transfer.gallery import Gallery
from util.transfer.naming import UNKNOWN, Name, name_faces, share_names, stranger_threshold

PADDING = 0.6  # as much around a face as class folders of anime faces mostly show


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags.Parser("Who is in a folder of pictures")
    parser.add_argument("folder", metavar="PICTURES", help="folder of pictures, nested or not")
    parser.add_argument("--output_dir", required=True, metavar="OUT", help="folder for faces.csv and the sheets")
    group = parser.add_argument_group("faces")
    group.add_argument(
        "--finder", required=True, metavar="SPEC",
        help=f"{', '.join(KINDS)}; + unites several; {WHOLE}: each picture is a face",
    )  # fmt: skip
    group.add_argument("--min_score", type=flags.fraction, default=MIN_SCORE, help="of a face, fraction in 0..1")
    group.add_argument(
        "--face_padding", type=flags.rate, default=None, metavar="X",
        help=f"show X of the face box's side around it; default: as the network was trained, else {PADDING}",
    )  # fmt: skip
    group = parser.add_argument_group("network")
    group.add_argument(
        "--ckpt", required=True, metavar="W", help="a transfer run's checkpoint, or weights of an encoder"
    )
    group.add_argument("--model", default=None, metavar="NAME", help=f"of weights that do not say it: {MODEL_NAMES}")
    group.add_argument("--input_size", type=flags.image_size, default=None, help="px; default: as in training")
    group.add_argument("--batch_size", type=flags.count, default=64, help="faces that are embedded at a time")
    group.add_argument("--num_workers", type=flags.count0, default=2, help="threads that decode pictures")
    flags.add_device_args(group)
    group = parser.add_argument_group("characters")
    group.add_argument("--gallery", default=None, metavar="DIR", help="enrolled characters; default: OUT/gallery")
    group.add_argument(
        "--threshold", type=flags.number(float, -1.0, 1.0), default=None,
        help="cosine below which nobody is meant, -1..1; default: the gallery's, else by --far",
    )  # fmt: skip
    group.add_argument(
        "--far", type=flags.fraction, default=0.01,
        help="share of strangers that may get a name, as the gallery itself can tell, fraction in 0..1",
    )  # fmt: skip
    group.add_argument(
        "--name_by", choices=("face", "cluster"), default="face",
        help="cluster: where half of a cluster has a name, mostly the same, all of it has: more names, less sure",
    )  # fmt: skip
    group.add_argument("--clustering", choices=METHODS, default=METHODS[0], help="how faces are grouped")
    group.add_argument(
        "--similarity", type=flags.number(float, -1.0, 1.0), default=0.34,
        help="mean cosine at which clusters are joined, -1..1 (agglomerative)",
    )  # fmt: skip
    group.add_argument("--least", type=flags.number(int, 2), default=3, help="faces that make a cluster (hdbscan)")
    group.add_argument(
        "--enrol", nargs="+", type=_cluster_name, default=[], metavar="CLUSTER=NAME",
        help="enrol the faces of a cluster of OUT/faces.csv, as the last run has numbered it",
    )  # fmt: skip
    group.add_argument("--forget", nargs="+", default=[], metavar="NAME", help="take a character out of the gallery")
    group.add_argument("--sheet_pages", type=flags.count0, default=20, help="pages of the contact sheet, at most")
    return parser.parse_args(argv)


def _cluster_name(text: str) -> tuple[int, str]:
    number, sign, name = text.partition("=")
    if not sign or not number.strip().isdigit() or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form CLUSTER=NAME, such as 3=Rei")
    return int(number), name


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    out = Path(args.output_dir)
    with only_writer(out):
        identify(args, out)


def identify(args: argparse.Namespace, out: Path) -> None:
    """Find, embed, group and name the faces; write what was found to `out`."""
    folder = Path(args.folder)
    place = Path(args.gallery or out / "gallery")
    pictures = list_pictures(folder, leave_out=(out, place))
    search, weights = open_search(args)
    gallery = Gallery.open(place, weights, search.dim)
    for path, reason in gallery.broken.items():
        print(f"warning: {path} cannot be read ({reason}): that character is not found")

    store = FaceStore(out / "cache", facts_of(args, search, weights), search.dim)
    with progress(total=sum(picture not in store for picture in pictures), unit="img") as bar:
        search.run(folder, pictures, store, bar.update)
    found = [store[picture] for picture in pictures]
    bad = list_bad(out, found)
    table = FaceTable.of(found)
    print(f"{len(table)} faces in {len(pictures) - bad} pictures, {bad} more cannot be read")

    for name in args.forget:
        gallery.remove(name)
    enrol(args, folder, gallery, table, search)
    options = {"method": args.clustering, "similarity": args.similarity, "least": args.least, "seed": args.seed}
    clusters = cluster_faces(table.embeddings, **options)
    threshold, origin = choose_threshold(args, gallery)
    names = name_faces(gallery, table.embeddings, threshold)
    if args.name_by == "cluster":
        names = share_names(names, clusters)

    table.write(out / "faces.csv", names, clusters)
    rows = sheet_rows(names, clusters, table.embeddings)
    files, left = write_sheets(out, rows, lambda chosen: thumbnails(folder, table, chosen, search), args.sheet_pages)
    if left:
        print(f"{left} rows have no place on {args.sheet_pages} pages: raise --sheet_pages, or read faces.csv")
    counts = count_names(names)
    results = {
        "pictures": len(pictures), "bad": bad, "faces": len(table), "clusters": int(clusters.max(initial=0)),
        "named": counts, "unknown": len(table) - sum(counts.values()),
        "threshold": {"value": threshold, "from": origin}, "weights": weights, "finished": True,
        **provenance(plain_args(args), pick_device(args.device)),
    }  # fmt: skip
    write_json(out / "results.json", results)
    print(
        f"{len(counts)} characters on {sum(counts.values())} faces, {results['unknown']} unknown: {out / 'faces.csv'}"
    )
    print("sheet: " + (", ".join(map(str, files)) or "none, for there is no face"))


def open_search(args) -> tuple[FaceSearch, str]:
    """How faces are found and embedded, and the fingerprint of the network."""
    device = pick_device(args.device)
    finder = WholeFinder() if args.finder == WHOLE else open_finder(args.finder, device)
    trained = load_recogniser(args.ckpt, model=args.model, input_size=args.input_size, device=device)
    size = flags.height_width(args.input_size or trained.args["input_size"])
    padding = next(x for x in (args.face_padding, trained.args.get("face_padding"), PADDING) if x is not None)
    precision = pick_precision(args.precision, device)
    encoder = Encoder(trained.model, device, precision, most=inference_batch(args.batch_size, device))
    search = FaceSearch(
        finder, encoder, trained.model.embed_dim, EvalCrop(size), padding, args.min_score, args.num_workers
    )
    return search, fingerprint_of(trained.model.state_dict())


def facts_of(args, search: FaceSearch, weights: str) -> dict:
    """All that finds and embeddings depend on, beside the pictures."""
    finders = []
    for part in finder_parts(args.finder) if args.finder != WHOLE else ():
        file = Path(part.partition(":")[2]).stat()
        finders.append([part, file.st_size, file.st_mtime_ns])
    return {
        "weights": weights, "finders": finders, "min_score": args.min_score, "padding": search.padding,
        "crop": repr(search.crop), "precision": search.encoder.precision,
    }  # fmt: skip


def list_bad(out: Path, found: Sequence[Faces]) -> int:
    """Write bad_images.jsonl, and count its lines; UserError where no picture can be read."""
    bad = [{"path": faces.picture.name, "reason": faces.bad} for faces in found if faces.bad]
    write_text(out / "bad_images.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in bad))
    if len(bad) == len(found):
        raise UserError(f"none of {len(bad)} pictures can be read, the first: {bad[0]['path']} ({bad[0]['reason']})")
    return len(bad)


def enrol(args, folder: Path, gallery: Gallery, table: FaceTable, search: FaceSearch) -> None:
    """Put into the gallery what --enrol and the column enrol_as of the last faces.csv say."""
    wanted, lost = wishes(Path(args.output_dir) / "faces.csv", table, dict(args.enrol))
    if lost:
        print(f"warning: {lost} faces that have a name in enrol_as are no longer there: nobody was enrolled from them")
    for name, rows in wanted.items():
        rows = np.array(rows)[fresh_rows(gallery, name, table.embeddings[rows])].tolist()
        if rows:
            pictures = thumbnails(folder, table, rows, search)
            there = [row for row in rows if row in pictures]
            total = gallery.enrol(name, table.embeddings[there], [pictures[row] for row in there])
            print(f"enrolled {name}: {len(there)} faces, {total} in all")


def choose_threshold(args, gallery: Gallery) -> tuple[float | None, str]:
    """(the cosine below which nobody is meant, where it comes from); None where nobody is enrolled."""
    if not gallery.people:
        return None, "the gallery is empty"
    if args.threshold is not None:
        return args.threshold, "--threshold"
    if gallery.threshold is not None:
        return gallery.threshold, "gallery"
    found = stranger_threshold(gallery, args.far)
    if found is None:  # one character says nothing of strangers
        return args.similarity, "--similarity"
    return found, f"strangers at FAR {args.far:g}"


def thumbnails(folder: Path, table: FaceTable, rows: Sequence[int], search: FaceSearch) -> dict[int, Image.Image]:
    """The faces of some rows, each picture decoded once; without those of pictures that are gone by now."""
    by_picture: dict[str, list[int]] = {}
    for row in rows:
        by_picture.setdefault(table.picture[row], []).append(row)
    padding = 0.0 if isinstance(search.finder, WholeFinder) else search.padding
    faces = {}
    for name, own in by_picture.items():
        try:
            image = decode_image(folder / name)
        except BadImage:
            continue
        faces |= {row: cut_face(image, table.boxes[row].tolist(), padding) for row in own}
    return {row: _small(face) for row, face in faces.items()}


def _small(face: Image.Image, side: int = 192) -> Image.Image:
    face = face.copy()
    face.thumbnail((side, side))
    return face


def count_names(names: Sequence[Name]) -> dict[str, int]:
    """{character: faces}, the most frequent first, without the unknown."""
    given = [name.name for name in names if name.name != UNKNOWN]
    return dict(sorted(((name, given.count(name)) for name in set(given)), key=lambda pair: (-pair[1], pair[0])))


if __name__ == "__main__":
    main()
