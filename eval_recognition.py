"""Every recognition protocol on one checkpoint, or on anybody's embeddings: one command, one report.

python eval_recognition.py --ckpt RUN/checkpoint-best.pth --data_path DIR --output_dir OUT
python eval_recognition.py --embeddings FILE.npz --data_path DIR --output_dir OUT

Each split is embedded once and kept on disk for the next evaluation. OUT gets results.json, report.md with its
figures, and the lists behind them: pairs, predictions, errors, embeddings if asked for.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from models_transfer import load_recogniser
from util.benchmark import protocols
from util.benchmark.embedded import Bench, Split
from util.benchmark.illustrate import draw_figures
from util.benchmark.lists import write_lists
from util.benchmark.protocols import Outcome, Skipped
from util.benchmark.report import headline, write_report
from util.data.colour import reduce_signatures
from util.data.trials import ICARTOONFACE, read_protocol
from util.run import args as flags
from util.run.errors import UserError
from util.run.files import write_atomically
from util.run.log import provenance, write_json
from util.training.checkpoint import plain_args
from util.training.session import Session, script
from util.transfer.subject import EmbeddingFile, ModelSubject, Pictures, Subject
from util.transfer.views import mistakes, resolution, stress

PROTOCOLS = ("closed_set", "icartoonface", "verification", "open_set", "few_shot", "long_tail", "stress", "resolution")


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Recognition protocols on a checkpoint or on embeddings")
    flags.add_data_args(parser, input_size=None, batch_size=64, streams=False)
    group = parser.add_argument_group("what is evaluated")
    what = group.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", default=None, metavar="W", help="a transfer run's checkpoint, or weights of an encoder")
    what.add_argument(
        "--embeddings", default=None, metavar="FILE", help=".npz with embeddings (N, D) and sample_id (N,), any model's"
    )
    group.add_argument("--model", default=None, metavar="NAME", help="model of weights that do not say it")
    group.add_argument(
        "--cls_token",
        action="store_true",
        help="embed by the class token where there is no head; default: mean pooling",
    )
    group.add_argument("--flip_test", action="store_true", help="add the embedding of the mirrored picture to each")
    group.add_argument(
        "--feature_cache", default=None, metavar="DIR", help="where embeddings are kept; default: features/ beside OUT"
    )
    add_protocol_args(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", required=True, metavar="OUT", help="folder for results.json, report.md, figures")
    group.add_argument(
        "--save_embeddings", action="store_true", help="write OUT/embeddings.npz, as --embeddings takes it"
    )
    group.add_argument("--no_figures", action="store_true", help="report.md without pictures: ten seconds less")
    group.add_argument(
        "--resume",
        default="auto",
        choices=["auto"],
        help="embeddings that are there are always used; for the grid runner",
    )
    flags.add_device_args(group)
    flags.add_compile_arg(group)
    parser.set_defaults(log_dir=None)
    args = parser.parse_args(argv)
    if args.cascade and (len(args.cascade) < 2 or args.cascade != sorted(set(args.cascade))):
        raise UserError("--cascade goes from small to large: give two sides in px or more, in that order")
    return args


def add_protocol_args(parser: flags.Parser) -> None:
    """What the protocols can be told."""
    group = parser.add_argument_group("protocols")
    group.add_argument(
        "--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS), metavar="NAME", help=", ".join(PROTOCOLS)
    )
    group.add_argument("--replicates", type=flags.count, default=1000, help="of the bootstrap over identities")
    group.add_argument("--negatives", type=flags.count, default=100_000, help="verification: pairs of two identities")
    group.add_argument(
        "--positives", type=flags.count, default=50, help="verification: pairs of each identity, at most"
    )
    group.add_argument("--all_pairs", action="store_true", help="verification: also every pair there is, streamed")
    group.add_argument("--ways", type=flags.number(int, 2), nargs="+", default=[5, 20], help="few-shot: classes")
    group.add_argument("--shots", type=flags.count, nargs="+", default=[1, 5], help="few-shot: images per class")
    group.add_argument("--episodes", type=flags.number(int, 2), default=1000, help="few-shot: of each kind")
    group.add_argument("--many", type=flags.count, default=100, help="long tail: head classes have more images")
    group.add_argument("--few", type=flags.count, default=20, help="long tail: tail classes have fewer images")
    group.add_argument(
        "--imbalance", type=flags.number(float, 1.0), default=None,
        help="long tail: cut the gallery to a power law, most frequent over rarest identity",
    )  # fmt: skip
    group.add_argument(
        "--stresses", nargs="+", default=None, metavar="NAME", help="stress: which of the synthetic ones; default: all"
    )
    group.add_argument(
        "--resolutions", type=flags.count, nargs="+", default=None,
        help="resolution: sides in px; default: 1, 1.5 and 2 times the size that the model was trained at",
    )  # fmt: skip
    group.add_argument(
        "--cascade", type=flags.count, nargs="*", default=None, metavar="PX",
        help="resolution: sides in px, from small to large, of which the larger are for unsure pictures; no number: no "
        "cascade; default: half and whole of the size that the model was trained at",
    )  # fmt: skip
    group.add_argument(
        "--cascade_loss", type=flags.fraction, default=0.005,
        help="resolution: accuracy that the cascade may lose on validation, fraction in 0..1",
    )  # fmt: skip


def open_subject(args, here: Session) -> tuple[Subject, Bench]:
    """What is evaluated, and the bench of its embeddings."""
    options = {"seed": args.seed, "replicates": args.replicates}
    cache = Path(args.feature_cache) if args.feature_cache else Path(args.output_dir).parent / "features"
    if args.embeddings:
        subject = EmbeddingFile(here, Pictures(args), cache, args.embeddings)
        return subject, Bench(subject.split, **options)
    trained = load_recogniser(
        args.ckpt, model=args.model, input_size=args.input_size, global_pool=not args.cls_token, device=here.device
    )
    args.model = trained.args["model"]
    args.input_size = args.input_size or trained.args["input_size"]
    if args.face_padding is None:
        args.face_padding = trained.args.get("face_padding")
    subject = ModelSubject(here, Pictures(args), cache, trained.model, args.model, args.input_size, args.flip_test)
    return subject, Bench(subject.split, head=subject.head, classes=trained.classes, **options)


def runs(args, bench: Bench, subject: Subject) -> dict[str, Callable[[], Outcome]]:
    """The protocols by name, ready to be run."""
    trials = read_protocol(args.data_path, ICARTOONFACE)
    settings = tuple((ways, shots) for ways in args.ways for shots in args.shots)
    pairs = {"negatives": args.negatives, "positives_per_identity": args.positives, "all_pairs": args.all_pairs}
    return {
        "closed_set": partial(protocols.closed_set, bench),
        "icartoonface": partial(protocols.icartoonface, bench, trials),
        "verification": partial(protocols.verification, bench, signatures=partial(colours, subject), **pairs),
        "open_set": partial(protocols.open_set, bench),
        "few_shot": partial(protocols.few_shot, bench, settings=settings, count=args.episodes),
        "long_tail": partial(protocols.long_tail, bench, many=args.many, few=args.few, imbalance=args.imbalance),
        "stress": partial(stress, bench, subject, args.stresses),
        "resolution": partial(
            resolution, bench, subject, args.resolutions, cascade=args.cascade, most_lost=args.cascade_loss
        ),
    }


def colours(subject: Subject, split: Split) -> np.ndarray:
    """What a split's pictures look like without any model, in few numbers each: (N, 16)."""
    return reduce_signatures(subject.looks(split))


def run_protocols(args, here: Session, bench: Bench, subject: Subject) -> dict[str, Outcome]:
    """The outcome of each protocol that was asked for; UserError where the data support none of them."""
    outcomes, ready = {}, runs(args, bench, subject)
    for name in dict.fromkeys(args.protocols):
        started = time.perf_counter()
        try:
            outcomes[name] = ready[name]()
            outcomes[name].results["seconds"] = round(time.perf_counter() - started, 2)
        except Skipped as why:
            outcomes[name] = Outcome({"skipped": str(why)})
        here.run.say(headline(name, outcomes[name].results))
    if all("skipped" in outcome.results for outcome in outcomes.values()):
        name, outcome = next(iter(outcomes.items()))
        raise UserError(f"{args.data_path} supports none of these protocols; {name}: {outcome.results['skipped']}")
    return outcomes


def save_embeddings(path: Path, bench: Bench) -> None:
    """Every embedding that was used, at its own length, as --embeddings takes it."""
    splits = bench.embedded
    embeddings = np.concatenate([split.raw for split in splits])
    sample_id = np.concatenate([split.facts["sample_id"].astype(str) for split in splits])

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, embeddings=embeddings, sample_id=sample_id)

    write_atomically(path, write)


def explain(bench: Bench, subject: Subject, outcomes: dict[str, Outcome]) -> Outcome | None:
    """The error taxonomy of the closed set, where that was run."""
    closed = outcomes.get("closed_set")
    if closed is None or not closed.arrays:
        return None
    return mistakes(subject, closed, replicates=bench.replicates, seed=bench.seed)


def evaluate(args, here: Session) -> None:
    """Embed, run the protocols, write the report."""
    started = time.perf_counter()
    if here.run.last.exists() or here.run.best.exists():
        raise UserError(f"--output_dir {args.output_dir} holds a training run: choose another folder")
    subject, bench = open_subject(args, here)
    here.run.say(f"evaluating {subject.name} on {args.data_path}")
    outcomes = run_protocols(args, here, bench, subject)
    if errors := explain(bench, subject, outcomes):
        outcomes["errors"] = errors
    if not here.world.is_main:
        return
    folder, left_out = here.run.path, {role: bad for role, bad in subject.left_out.items() if bad}
    results = {name: outcome.results for name, outcome in outcomes.items()}
    results |= {
        "subject": {"name": subject.name, "weights": subject.weights, "flip_test": args.flip_test},
        "data": bench.describe() | {"left_out": {role: len(bad) for role, bad in left_out.items()}},
        "finished": True,
        "wall_seconds": round(time.perf_counter() - started, 1),
        **provenance(plain_args(args), here.device, subject.fingerprint()),
    }
    lists = write_lists(folder, outcomes, bench.classes)
    write_json(folder / "left_out.json", left_out)
    if args.save_embeddings:
        save_embeddings(folder / "embeddings.npz", bench)
    figures = {}
    if not args.no_figures:
        figures = draw_figures(folder, outcomes, bench.classes, lambda role, row: subject.pictures(role).load(row))
    write_report(folder / "report.md", f"{subject.name} on {args.data_path}", results, figures, lists)
    here.run.results(results)  # last: it says that the evaluation is finished
    here.run.say(f"report: {folder / 'report.md'}")


main = script(get_args, evaluate)

if __name__ == "__main__":
    main()
