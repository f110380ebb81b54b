"""What LoRA, fine-tuning or domain adaptation has changed in an encoder, layer by layer.

    python -m visualize.adaptation --after RUN/checkpoint-best.pth --data_path DIR --out adaptation.png
    python -m visualize.adaptation --before W --after E1.pth E2.pth E4.pth --data_path DIR --out adaptation.png

Before and after see the same pictures. Linear CKA (arXiv 1905.00414) says how much of a layer's representation is
still there, 1: all of it; a linear probe on each layer says what became of the identities in it. Several --after are
stages of one adaptation: they are drawn over its epochs. --before is by default what --after says it started from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from util.benchmark.bootstrap import mean_interval
from util.benchmark.figure_style import finish, percent, short
from util.data.face_crop import open_pictures
from util.data.roles import MissingRole
from util.data.sources import Source, spread
from util.representation.cka import cka_matrix, linear_cka
from util.representation.layers import blocks_of, pooled, pooling_of, prefix_tokens, tokens_by_layer
from util.representation.probe import probe
from util.run.args import Parser, count
from util.run.device import pick_device
from util.run.errors import UserError, cli
from util.training.checkpoint import read_checkpoint
from visualize.adaptation_figure import MATRICES, draw
from visualize.views import (
    RANDOM,
    Encoder,
    add_encoder_args,
    add_picture_args,
    check_out,
    file_in,
    look,
    name_of,
    open_encoder,
    stages_in,
    write_numbers,
)


@dataclass(frozen=True)
class Part:
    """Labelled pictures of one role. names: who is on each of `rows`."""

    source: Source
    rows: list[int]
    names: np.ndarray


@dataclass(frozen=True)
class Probed:
    """right: (layers, N) bool, whether the probe of each layer names each test picture rightly. strengths: their C."""

    right: np.ndarray
    strengths: list[float]

    @property
    def accuracy(self) -> np.ndarray:
        """(layers,), fractions."""
        return self.right.mean(axis=1)


# --- what is compared ---------------------------------------------------------------------------------------------


def flags_of(spec: str) -> dict:
    """The flags that a checkpoint was trained with, and "epochs_done"; {} where it is no file of ours."""
    path = Path(file_in(spec))
    if not path.is_file() or path.suffix in (".safetensors", ".bin"):
        return {}
    checkpoint = read_checkpoint(path)
    args = checkpoint.get("args", {})
    found = dict(args if isinstance(args, dict) else vars(args))
    if isinstance(checkpoint.get("epoch"), int):
        found["epochs_done"] = checkpoint["epoch"] + 1
    return found


def open_before(args, after: Encoder, device: torch.device) -> Encoder:
    """What --before names, else the start weights of the adapted encoder; UserError where it does not name them."""
    init = args.before or flags_of(after.spec).get("init")
    if not init:
        raise UserError(f"{after.spec} does not say what it started from: give --before (random: an untrained encoder)")
    says = init != RANDOM and "model" in flags_of(init)
    return open_encoder(init, args, device, model=None if says else after.args["model"])


def read_layers(encoder: Encoder, source: Source, rows: Sequence[int], args, query: str) -> tuple[list, list[int]]:
    """One vector for each picture from every layer: (layers) of (n, D), and the numbers of the readable pictures."""
    prefix, found, numbers = prefix_tokens(encoder.model), [], []
    for images, index, _ in look(encoder, source, rows, args, encoder.label):
        layers = tokens_by_layer(encoder.model, images.to(encoder.device))
        found.append([pooled(tokens, prefix, query).cpu().numpy() for tokens in layers])
        numbers += index.tolist()
    if not found:
        raise UserError(f"no picture of {source.name} can be read: check the files")
    return [np.concatenate(parts) for parts in zip(*found, strict=True)], numbers


def weight_change(before: torch.nn.Module, after: torch.nn.Module) -> dict[str, list[float | None]]:
    """|W_after - W_before| / |W_before| (Frobenius norms) of each kind of matrix in each block; {} for other shapes."""
    changes: dict[str, list[float | None]] = {}
    for old, new in zip(blocks_of(before), blocks_of(after), strict=True):
        for name in MATRICES:
            try:
                a, b = (block.get_submodule(name).weight.detach().cpu().double() for block in (old, new))
            except AttributeError:
                return {}
            if a.shape != b.shape:
                return {}
            changes.setdefault(name, []).append(((b - a).norm() / a.norm()).item() if a.norm() else None)
    return changes


# --- probes -------------------------------------------------------------------------------------------------------


def open_parts(args) -> dict[str, Part | None]:
    """The labelled pictures to train, to choose and to test on; "val" is None where it would be the test pictures.

    UserError of the kind MissingRole where the data have no labels.
    """
    wanted = {"train": args.train_images, "val": args.images, "test": args.images}
    parts: dict[str, Part | None] = {}
    for role, most in wanted.items():
        source = open_pictures(args, role)
        names = source.column("identity")
        known = [i for i, name in enumerate(names) if name is not None]
        if role != "train":
            known = [i for i in known if names[i] in set(parts["train"].names.tolist())]
        rows = [known[i] for i in spread(len(known), most)] if known else []
        if len({names[i] for i in rows}) < 2:
            raise MissingRole(f"{args.data_path} has fewer than two identities for {role!r}: no probe can be trained")
        parts[role] = Part(source, rows, np.array([names[i] for i in rows]))
    if parts["val"].source.fingerprint == parts["test"].source.fingerprint:
        parts["val"] = None
    return parts


def probe_layers(encoder: Encoder, parts: dict[str, Part | None], args, query: str) -> Probed:
    """A probe on every layer of an encoder."""
    read = {}
    for role, part in parts.items():
        if part is not None:
            layers, numbers = read_layers(encoder, part.source, part.rows, args, query)
            kept = np.isin(part.rows, numbers)
            read[role] = layers, part.names[kept]
    rights, strengths = [], []
    for layer in range(len(read["train"][0])):
        train, val, test = ((read[r][0][layer], read[r][1]) if r in read else None for r in ("train", "val", "test"))
        right, strength = probe(train, val, test)
        rights.append(right)
        strengths.append(strength)
    return Probed(np.stack(rights), strengths)


def intervals(values: np.ndarray, names: np.ndarray, seed: int) -> list[list[float] | None]:
    """95 % intervals of the mean of each row of (layers, N), by bootstrap over identities."""
    return [mean_interval(row.astype(float), names, seed=seed) for row in values]


# --- the command --------------------------------------------------------------------------------------------------


def get_args(argv: list[str] | None = None):
    parser = Parser("What adaptation has changed in an encoder: CKA, linear probes and weights, layer by layer")
    add_encoder_args(parser, ckpt=False)
    add_picture_args(parser, images=400, images_help="pictures compared, and tested on, evenly spread", split=None)
    group = parser.add_argument_group("adaptation")
    group.add_argument(
        "--after", required=True, nargs="+", metavar="W",
        help="adapted encoders, as --ckpt of the other views; several: stages of one adaptation, earliest first; "
        "a folder with checkpoint-N.pth: all of these",
    )  # fmt: skip
    group.add_argument(
        "--before", default=None, metavar="W",
        help="the encoder before that, or random; default: what --after started from",
    )  # fmt: skip
    group.add_argument(
        "--names", nargs=2, default=None, metavar=("BEFORE", "AFTER"), help="what to call them; default: their runs"
    )
    group.add_argument("--train_images", type=count, default=1500, help="pictures that probes are trained on")
    group.add_argument("--no_probes", action="store_true", help="similarity and weights alone")
    group.add_argument(
        "--query", choices=("auto", "class", "mean"), default="auto",
        help="what stands for a picture: the class token, or the mean of the patches; auto: what --after embeds by",
    )  # fmt: skip
    return parser.parse_args(argv)


def name_stages(specs: Sequence[str]) -> tuple[list[str], list[int]]:
    """What the stages are called, and their epochs, 0 first: those of the checkpoints if they rise, else 1, 2, ..."""
    if len(specs) == 1:
        return ["after"], []
    done = [flags_of(spec).get("epochs_done") for spec in specs]
    if None in done or sorted(set(done)) != done:
        done = list(range(1, len(specs) + 1))
        return [f"stage {number}" for number in done], [0, *done]
    return [f"{number} epoch{'s' * (number > 1)}" for number in done], [0, *done]


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    out, device = check_out(args.out), pick_device(args.device)
    specs = [stage for spec in args.after for stage in stages_in(spec)]
    afters = [open_encoder(spec, args, device) for spec in specs]
    args.input_size = list(afters[-1].size)
    before = open_before(args, afters[-1], device)
    depths = [len(blocks_of(encoder.model)) for encoder in (before, *afters)]
    if len(set(depths)) > 1:
        listed = ", ".join(map(str, depths))
        raise UserError(f"before and after have different depths ({listed} blocks): give stages of one network")
    query = pooling_of(afters[-1].model) if args.query == "auto" else args.query

    source = open_pictures(args, "test")
    rows = spread(len(source), args.images)
    first, numbers = read_layers(before, source, rows, args, query)
    layers = [read_layers(encoder, source, rows, args, query)[0] for encoder in afters]
    if len(numbers) < 4:
        raise UserError(f"{len(numbers)} pictures are too few to compare: give at least 4")
    cka = cka_matrix(first, layers[-1])
    stages, epochs = name_stages(specs)
    changes = weight_change(before.model, afters[-1].model)
    diagonals = {
        name: [linear_cka(a, b) for a, b in zip(first, own, strict=True)]
        for name, own in zip(stages, layers, strict=True)
    }
    report = {
        "before": before.spec, "after": specs, "images": len(numbers), "query": query, "stages": stages,
        "cka": diagonals,
        "cka_debiased": [linear_cka(a, b, debiased=True) for a, b in zip(first, layers[-1], strict=True)],
        "cka_matrix": cka.tolist(), "weight_change": changes,
    }  # fmt: skip
    probes, accuracy, bounds, floor = _probe_all(args, [before, *afters], ["before", *stages], query)
    report["probes"] = probes

    called = args.names or [name_of(before.spec), name_of(specs[-1])]
    title = f"What changed from {short(called[0], 44)} to {short(called[1], 44)}: the last layer keeps a CKA of "
    title += f"{cka[-1, -1]:.2f} with what it was"
    if accuracy:
        title += f"; a probe of it goes from {percent(accuracy['before'][-1])} to {percent(accuracy[stages[-1]][-1])}"
    finish(draw(cka, diagonals, changes, accuracy, bounds, epochs, floor), title, out)
    print(f"{len(numbers)} pictures: {out}; numbers: {write_numbers(out, report, args, device, source)}")


def _probe_all(args, encoders: list[Encoder], names: list[str], query: str):
    """The report of the probes, and by stage their accuracy and intervals, and chance; empty where there are none."""
    if args.no_probes:
        return {"skipped": "--no_probes"}, {}, {}, None
    try:
        parts = open_parts(args)
    except MissingRole as why:
        print(f"no probes: {why}")
        return {"skipped": str(why)}, {}, {}, None
    probed = {name: probe_layers(encoder, parts, args, query) for name, encoder in zip(names, encoders, strict=True)}
    who = parts["test"].names
    accuracy = {name: found.accuracy.tolist() for name, found in probed.items()}
    # where a picture could not be read it is missing from all, so the rest no longer fits the names
    matched = all(found.right.shape[1] == len(who) for found in probed.values())
    bounds = {
        name: intervals(found.right, who, args.seed) if matched else [None] * len(found.right)
        for name, found in probed.items()
    }
    report = {
        "classes": len(set(parts["train"].names.tolist())), "train_images": len(parts["train"].rows),
        "test_images": len(who), "chosen_on": "val" if parts["val"] else None, "accuracy": accuracy, "ci95": bounds,
        "strengths": {name: found.strengths for name, found in probed.items()},
    }  # fmt: skip
    if matched:
        gain = probed[names[-1]].right.astype(float) - probed["before"].right
        report["gain"] = {"mean": gain.mean(axis=1).tolist(), "ci95": intervals(gain, who, args.seed)}
    return report, accuracy, bounds, 1 / report["classes"]


if __name__ == "__main__":
    main()
