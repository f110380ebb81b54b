"""How well faces and eyes are found: COCO's figures, errors, speed, on a checkpoint or on anybody's finds.

python eval_detection.py --ckpt RUN/checkpoint-best.pth --data_path DIR --output_dir OUT --sizes 256 384 512
python eval_detection.py --predictions FILE.json --data_path DIR --output_dir OUT

OUT gets results.json, report.md with its figures and contact sheets of the errors, annotations.json and
predictions.json in COCO's forms. Of several --sizes the first is that of the headline.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models_detect import load_detector
from models_finders import KINDS, open_finder
from util.benchmark import detection
from util.benchmark.detection import EYE, FACE, NAMES, Scene
from util.benchmark.detection_errors import diagnose, taxonomy
from util.benchmark.detection_figures import error_sheets, found_sheet, pr_figure, size_figure
from util.benchmark.detection_files import Stored, read_predictions
from util.benchmark.detection_report import headline, write_report
from util.data.faces import find_faces
from util.data.images import BadImage
from util.data.roles import ROLES
from util.data.scenes import Scenes
from util.data.sources import LABELS, open_source, spread
from util.run import args as flags
from util.run.errors import UserError
from util.run.log import provenance, write_json
from util.training.checkpoint import plain_args
from util.training.session import Session, script

WARMUP = 3  # first pictures, whose times do not count


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Detection figures of a checkpoint, a face finder or a file of finds")
    group = parser.add_argument_group("what is evaluated")
    what = group.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", metavar="W", help="checkpoint of main_detect.py")
    what.add_argument("--finder", metavar="SPEC", help=f"{', '.join(KINDS)}; + unites several")
    what.add_argument(
        "--predictions", metavar="FILE",
        help="finds of any detector: .json of COCO results, or .csv, image,xmin,ymin,xmax,ymax,face,score",
    )  # fmt: skip
    group.add_argument(
        "--sizes", type=flags.count, nargs="+", default=None,
        help="longer sides of the input, px; default: that of training",
    )  # fmt: skip
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", required=True, metavar="DIR", help="prepared folder, a row for each face")
    group.add_argument("--split", choices=tuple(ROLES), default="test", help="which part of the data")
    group.add_argument("--labels", choices=LABELS, default="auto", help="what a nested folder of images means")
    group.add_argument("--val_fraction", type=flags.fraction, default=0.1, help="as in training, fraction in 0..1")
    group.add_argument("--images", type=flags.count0, default=0, help="pictures, spread over the split; 0 = all")
    group.add_argument(
        "--max_bad", type=flags.fraction, default=0.01, help="share of unreadable pictures that is borne, 0..1"
    )
    group = parser.add_argument_group("figures")
    group.add_argument(
        "--score_threshold", type=flags.fraction, default=0.5, help="finds below do not count as errors, 0..1"
    )
    group.add_argument("--replicates", type=flags.count, default=1000, help="of the bootstrap over pictures")
    group.add_argument("--sheet_pictures", type=flags.count0, default=24, help="errors or pictures on a contact sheet")
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", required=True, metavar="OUT", help="folder for results.json, report.md, figures")
    group.add_argument(
        "--resume", default="auto", choices=["auto"], help="an evaluation begins anew; for the grid runner"
    )
    group.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    group.add_argument("--seed", type=flags.count0, default=0, help="of the bootstrap")
    parser.set_defaults(log_dir=None)
    args = parser.parse_args(argv)
    if args.sizes and not args.ckpt:
        raise UserError("--sizes goes with --ckpt: a finder and a file have sizes of their own, leave it out")
    return args


class Subject(NamedTuple):
    """What is evaluated. find: (number of the picture, picture, size) -> what is in it. sizes: px, or None.

    elsewhere: finds of pictures that are not there.
    """

    name: str
    find: Callable
    sizes: list[int | None]
    elsewhere: int = 0


def open_subject(args, here: Session, scenes: Scenes) -> Subject:
    """The checkpoint, the finder or the file that the flags name."""
    if args.ckpt:
        detector = load_detector(args.ckpt, here.device)
        sizes = list(dict.fromkeys(args.sizes or [detector.size]))
        return Subject(args.ckpt, lambda _, picture, size: detector.detect([picture], size)[0], sizes)
    if args.finder:
        finder = open_finder(args.finder, here.device)
        return Subject(args.finder, lambda i, picture, _: finds_of(finder, picture, scenes.files[i]), [None])
    stored, elsewhere = read_predictions(args.predictions, scenes.files)
    return Subject(args.predictions, lambda i, *_: stored[i], [None], elsewhere)


def finds_of(finder, picture, name: str) -> Stored:
    """The faces and eyes of a finder, an eye as sure as its face."""
    faces = find_faces(picture, finder, name, min_score=0.0)
    rows = [(face.box, face.score, FACE) for face in faces]
    rows += [(eye, face.score, EYE) for face in faces for eye in face.eyes]
    boxes, scores, labels = zip(*rows, strict=True) if rows else ((), (), ())
    return Stored(np.array(boxes).reshape(-1, 4), np.array(scores), np.array(labels, np.int64))


class Watched(NamedTuple):
    """What was seen. numbers: of the pictures in the data. scenes: by input size. seconds: of each, by input size."""

    numbers: list[int]
    scenes: dict[int | None, list[Scene]]
    seconds: dict[int | None, list[float]]
    bad: list[dict]


def watch(args, here: Session, subject: Subject, data: Scenes) -> Watched:
    """Find what there is in each picture at each size. UserError where too many pictures cannot be read."""
    seen = Watched([], {size: [] for size in subject.sizes}, {size: [] for size in subject.sizes}, [])
    chosen = spread(len(data), args.images)
    hidden = occlusions(data)
    with here.run.progress(total=len(chosen), desc="finding", unit="picture") as bar:
        for i in chosen:
            bar.update()
            try:
                picture = data.load(i)
            except BadImage as error:
                seen.bad.append({"file_name": data.files[i], "reason": error.reason})
                continue
            seen.numbers.append(i)
            for size in subject.sizes:
                started = time.perf_counter()
                finds = subject.find(i, picture, size)
                seen.seconds[size].append(time.perf_counter() - started)
                seen.scenes[size].append(detection.make_scene(data.record(i), finds, picture.size, hidden[i]))
    if len(seen.bad) > args.max_bad * len(chosen) or not seen.numbers:
        worst = seen.bad[0]
        raise UserError(
            f"{len(seen.bad)} of {len(chosen)} pictures cannot be read, such as {worst['file_name']} "
            f"({worst['reason']}): mend them, or raise --max_bad"
        )
    return seen


def occlusions(data: Scenes) -> list[tuple]:
    """What hides each true box of each picture, faces first; () where the data do not say."""
    names = {name: [] for name in data.files}
    rows = zip(*(data.source.column(name) for name in ("file_name", "box", "occlusion")), strict=True)
    for name, box, hidden in rows:
        if box:
            names[name].append(hidden)
    found = []
    for i, own in enumerate(names.values()):
        labels = data.record(i)["labels"]
        faces = int((labels == FACE - 1).sum())
        fits = faces == len(own) and any(own)
        found.append((*own, *[None] * (len(labels) - faces)) if fits else ())
    return found


def speed(seconds: list[float]) -> dict[str, float]:
    """Latency and rate of one picture at a time; the first pictures warm up."""
    timed = np.array(seconds[WARMUP:] or seconds)
    p50, p95 = (1000 * np.quantile(timed, [0.5, 0.95])).tolist()
    return {"latency_ms_p50": p50, "latency_ms_p95": p95, "images_per_s": float(1 / timed.mean())}


def measure_classes(args, scenes: list[Scene]) -> dict[str, dict]:
    """The figures of each class, or why there are none."""
    options = {"replicates": args.replicates, "seed": args.seed}
    classes: dict = {NAMES[FACE]: detection.measure(scenes, FACE, **options)}
    eyes = detection.of_label(scenes, EYE)
    if not any(len(scene.boxes) for scene in eyes):
        classes[NAMES[EYE]] = {"skipped": "the data have no eye boxes"}
    elif not any((scene.found_labels == EYE).any() for scene in scenes):
        classes[NAMES[EYE]] = {"skipped": "no eye was looked for, or none found"}
    else:
        classes[NAMES[EYE]] = {**detection.measure(scenes, EYE, **options), "pictures": len(eyes)}
    return classes


def describe(scenes: list[Scene], left_out: dict[str, int]) -> dict:
    """How much there was to find."""
    labels = np.concatenate([scene.labels for scene in scenes])
    counts = {f"{name}s": int((labels == label).sum()) for label, name in NAMES.items()}
    empty = sum(not (scene.labels == FACE).any() for scene in scenes)
    return {"pictures": len(scenes), "pictures_without_a_face": empty, **counts, "left_out": left_out}


def operating_point(matches: detection.Matches, threshold: float) -> dict:
    """Precision and recall at the threshold, and at that of the best F1 on these very pictures."""
    best = detection.best_threshold(matches)
    return {
        **detection.at_threshold(matches, threshold),
        "best_f1": None if best is None else detection.at_threshold(matches, best),
    }


def write_tables(folder: Path, data: Scenes, seen: Watched, scenes: list[Scene]) -> None:
    """annotations.json and predictions.json, as COCO's tools and --predictions take them."""
    images = [
        {"id": i + 1, "file_name": data.files[i], "width": scene.size[0], "height": scene.size[1]}
        for i, scene in zip(seen.numbers, scenes, strict=True)
    ]
    truth, finds = detection.coco_tables(scenes, images)
    write_json(folder / "annotations.json", truth)
    keys = ("image_id", "category_id", "bbox", "score")
    write_json(folder / "predictions.json", [{key: row[key] for key in keys} for row in finds["annotations"]])


def draw(args, folder: Path, data: Scenes, seen: Watched, scenes: list[Scene], results: dict) -> dict[str, str]:
    """The figures; {what they show: file, relative to the folder}."""
    place = folder / "figures"
    place.mkdir(parents=True, exist_ok=True)
    labels = [label for label, name in NAMES.items() if "ap" in results["classes"][name]]
    curves = {NAMES[label]: detection.curves_of(detection.match(scenes, label)) for label in labels}
    drawn = {}
    if not np.isnan(curves[NAMES[FACE]]).any():
        drawn["precision_recall"] = "precision_recall.png"
        pr_figure(curves, place / drawn["precision_recall"])
    if len(results["sizes"]) > 1 and "precision_recall" in drawn:
        drawn["sizes"] = "sizes.png"
        size_figure(results["sizes"], place / drawn["sizes"])
    if args.sheet_pictures:
        own = detection.of_label(scenes, FACE)  # of every picture: faces are always known
        errors = diagnose(scenes, FACE, args.score_threshold)
        pictures = (place, errors, own, lambda i: data.load(seen.numbers[i]), args.sheet_pictures)
        drawn |= {"found": found_sheet(*pictures)} | error_sheets(*pictures)
    return {name: f"figures/{file}" for name, file in drawn.items()}


def evaluate(args, here: Session) -> None:
    """Find, compare, write the report."""
    began = time.perf_counter()
    if here.world.size > 1:
        raise UserError("a detector is evaluated in one process: start it without torchrun")
    if here.run.last.exists() or here.run.best.exists():
        raise UserError(f"--output_dir {args.output_dir} holds a training run: choose another folder")
    data = Scenes(open_source(args.data_path, args.split, labels=args.labels, val_fraction=args.val_fraction))
    subject = open_subject(args, here, data)
    here.run.say(f"evaluating {subject.name} on {args.split} of {args.data_path}")
    seen = watch(args, here, subject, data)
    cleaned = {size: detection.clean(scenes) for size, scenes in seen.scenes.items()}
    scenes, left_out = cleaned[subject.sizes[0]]
    left_out |= {"true_boxes": left_out["true_boxes"] + data.dropped, "pictures": len(seen.bad)}
    left_out["finds_elsewhere"] = subject.elsewhere
    classes = measure_classes(args, scenes)
    options = {"replicates": args.replicates, "seed": args.seed}
    sizes = {}
    for size in subject.sizes if args.ckpt else ():
        own = classes["face"] if size == subject.sizes[0] else detection.measure(cleaned[size][0], **options)
        sizes[str(size)] = {**own, **speed(seen.seconds[size])}
    timed = {"skipped": "the finds are from a file"} if args.predictions else speed(seen.seconds[subject.sizes[0]])
    results = {
        **classes["face"],
        "errors": taxonomy(scenes, FACE, score_threshold=args.score_threshold, **options),
        "operating_point": operating_point(detection.match(scenes), args.score_threshold),
        "images_per_s": timed.get("images_per_s", timed),
        "classes": classes,
        "sizes": sizes,
        "data": describe(scenes, left_out),
        "subject": {"name": subject.name, "size": subject.sizes[0]},
        "finished": True,
        **provenance(plain_args(args), here.device, data.fingerprint),
    }
    folder = here.run.path
    write_tables(folder, data, seen, scenes)
    write_json(folder / "left_out.json", seen.bad)
    figures = draw(args, folder, data, seen, scenes, results)
    results["wall_seconds"] = round(time.perf_counter() - began, 1)
    write_report(folder / "report.md", f"{subject.name} on {args.split} of {args.data_path}", results, figures)
    here.run.results(results)  # last: it says that the evaluation is finished
    here.run.say(headline(results))
    here.run.say(f"report: {folder / 'report.md'}")


main = script(get_args, evaluate)

if __name__ == "__main__":
    main()
