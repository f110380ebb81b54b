"""What is a pre-trained checkpoint worth? Reconstruction, a linear probe and few-shot recognition, sample by sample.

python scripts/score_pretraining.py --ckpt RUN/checkpoint-last.pth --pictures DIR --labelled DIR --output_dir OUT

OUT/results.json has the means, OUT/scores.npz what each sample scored, so that checkpoints can be compared on the same
samples later (scripts/masking_table.py; scripts/compare_pretraining.py scores two and compares them). Nothing here
depends on how the checkpoint was trained: the masks follow from --seed alone, random ones by default; the probe is
logistic regression on the frozen encoder's mean patch token, cross-validated so that every picture is tested once,
pictures of one source in one fold; the episodes are the same for all. Regions need the semantic maps of the pictures.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

from models_mae import MaskedAutoencoder
from models_mae_weights import load_mae
from models_transfer import load_recogniser
from util.benchmark.few_shot import episode_accuracies, episodes
from util.benchmark.reconstruction import psnr
from util.benchmark.regions import MAPS, measure_regions, region_masks
from util.benchmark.scores import SCORES_NAME, Measured, under, write_scores
from util.data.augment import EvalCrop, WithMaps, to_unit
from util.data.loader import in_order, readable
from util.data.maps import MappedSource, Maps, find_maps
from util.data.roles import MissingRole
from util.data.sources import Source, open_source, origins
from util.mae.masking import Masking, random_mask
from util.run import args as flags
from util.run.device import autocast, pick_device, pick_precision
from util.run.errors import UserError, cli
from util.run.files import only_writer
from util.run.log import RunFolder, provenance
from util.run.seed import rng_for

FOLDS = 5
FEW_SHOT = ((5, 1), (5, 5))  # ways, shots
ROLES = ("train", "val", "test", "open_val", "open_test")


# --- reconstruction ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """Held-out pictures. maps: the semantic maps they have, None if none; missing: why they lack the others."""

    source: Source
    maps: Maps | None
    missing: dict[str, str]


def open_pictures(args) -> Pictures:
    """The test part of --pictures, with the semantic maps that there are."""
    source = open_source(args.pictures, "test", labels=args.labels, val_fraction=args.val_fraction)
    maps, missing = find_maps(source, MAPS, args.maps)
    for strategy in args.test_maskings:
        for name in Masking(strategy).maps:
            if name in missing:
                raise UserError(f"--test_maskings {strategy}: {missing[name]}")
    return Pictures(source, maps, missing)


def score_pictures(ckpt: str, pictures: Pictures, args, device: torch.device) -> dict[str, Measured]:
    """PSNR of each held-out picture, dB: whole with its visible patches, and over the removed pixels of each region.

    NaN where a picture shows nothing of a region, or where the removed pixels are equal.
    """
    model = load_mae(ckpt, device=device)
    size = tuple(side * model.patch_size for side in model.grid)
    source, crop = pictures.source, EvalCrop(size)
    names = pictures.maps.names if pictures.maps else ()
    if pictures.maps:
        source, crop = MappedSource(source, pictures.maps), WithMaps(crop, size)
    options = {"strength": args.test_strength, "random_share": 0.0, "seed": args.seed}
    tests = {strategy: Masking(strategy, **options) for strategy in ("random", *args.test_maskings)}
    values, rows = {}, []
    for batch in in_order(source, crop, batch_size=args.batch_size, num_workers=args.num_workers, device=device):
        shown = readable(batch)
        rows.append(batch["index"][shown])
        for strategy, masking in tests.items():
            for name, part in _reconstruct(model, batch, strategy, masking, names, args, device).items():
                values.setdefault(name, []).append(part.cpu()[shown])
    rows = torch.cat(rows).numpy()
    ids, groups = (column[rows] for column in (_column(source, "sample_id"), origins(source)))
    values = {name: torch.cat(parts).double().numpy() for name, parts in values.items()}
    return {name: Measured(np.where(np.isfinite(part), part, np.nan), ids, groups) for name, part in values.items()}


def _reconstruct(model: MaskedAutoencoder, batch: dict, strategy: str, masking: Masking, maps, args, device) -> dict:
    """The PSNR (N,) of a batch under the masks of one strategy, by measure; of regions only under random masks."""
    images, index = to_unit(batch["image"].to(device)), batch["index"].to(device)
    pixels = batch["maps"].to(device) if maps else None
    on_patches = None
    if masking.maps:
        chosen = pixels[:, [maps.index(name) for name in masking.maps]]
        on_patches = avg_pool2d(chosen.float(), model.patch_size).round().to(torch.uint8)
    order = masking.order(images, model.grid, 0, index, on_patches)
    shown = model.reconstruct(images, random_mask(order, args.mask_ratio))
    whole = psnr(images, shown["pasted"])
    if strategy != "random":
        return {under(strategy): whole}
    found = {"psnr_db": whole}
    if maps:
        regions = measure_regions(images, shown["pasted"], shown["mask"], region_masks(pixels, maps))
        found |= {f"psnr_{region}_db": figures["psnr_db"] for region, figures in regions.items()}
    return found


# --- recognition ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """Labelled pictures of several roles, one after the other. ids, labels, origins, fold: (N,), fold of the probe."""

    sources: list[Source]
    ids: np.ndarray
    labels: np.ndarray
    origins: np.ndarray
    fold: np.ndarray


def open_labelled(args) -> Labelled:
    """The pictures of --labelled of all roles but "novel"; UserError where some have no label."""
    sources = []
    for role in ROLES:
        try:
            sources.append(open_source(args.labelled, role, labels=args.labels, val_fraction=args.val_fraction))
        except MissingRole:
            continue
    identities = [identity for source in sources for identity in source.column("identity")]
    if None in identities or len(set(identities)) < 2:
        raise UserError(f"--labelled {args.labelled} names no two characters: give pictures with an identity each")
    labels, cut_from = np.array(identities), np.concatenate([origins(source) for source in sources])
    ids = np.concatenate([_column(source, "sample_id") for source in sources])
    return Labelled(sources, ids, labels, cut_from, fold_of(labels, cut_from, args.seed))


@torch.inference_mode()
def embeddings(ckpt: str, labelled: Labelled, args, device: torch.device) -> np.ndarray:
    """The frozen encoder's embeddings of all labelled pictures, (N, D) float32."""
    recogniser = load_recogniser(ckpt, model=args.model, device=device)
    crop = EvalCrop(flags.height_width(recogniser.args["input_size"]))
    precision, parts = pick_precision(args.precision, device), []
    for source in labelled.sources:
        for batch in in_order(source, crop, batch_size=args.batch_size, num_workers=args.num_workers, device=device):
            if batch["bad"]:
                raise UserError(f"{batch['bad'][0][1]} cannot be read: leave it out of --labelled")
            with autocast(device, precision):
                parts.append(recogniser.model.embed(to_unit(batch["image"].to(device))).float().cpu())
    return torch.cat(parts).numpy()


def fold_of(labels: np.ndarray, sources: np.ndarray, seed: int) -> np.ndarray:
    """The fold (N,) of each picture; pictures of one source share one, and so are never trained and tested on."""
    from sklearn.model_selection import GroupKFold  # slow to import

    if len(np.unique(sources)) < FOLDS:
        raise UserError(f"--labelled has pictures from fewer than {FOLDS} sources: give more for the linear probe")
    fold, shuffled = np.empty(len(labels), dtype=np.int64), rng_for(seed, "folds").permutation(len(labels))
    for number, (_, test) in enumerate(GroupKFold(FOLDS).split(shuffled, groups=sources[shuffled])):
        fold[shuffled[test]] = number
    return fold


def probe_hits(features: np.ndarray, labels: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Whether a linear probe trained on the other folds names each picture rightly, (N,) bool."""
    from sklearn.linear_model import LogisticRegression  # slow to import
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    hits = np.zeros(len(labels), dtype=bool)
    for number in range(FOLDS):
        test = fold == number
        judge = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
        hits[test] = judge.fit(features[~test], labels[~test]).predict(features[test]) == labels[test]
    return hits


def score_probe(features: np.ndarray, labelled: Labelled) -> dict[str, Measured]:
    """Whether the probe names each labelled picture rightly, 0 or 1, in groups of characters."""
    hits = probe_hits(features, labelled.labels, labelled.fold)
    return {"probe_top1": Measured(hits.astype(np.float64), labelled.ids, labelled.labels)}


def score_few_shot(features: np.ndarray, labelled: Labelled, args) -> tuple[dict[str, Measured], dict[str, str]]:
    """The share of right answers for each class of each episode, in groups of characters; and what was left out, why.

    Nearest class mean on centred, normalised embeddings ("CL2N", arXiv 1911.04623).
    """
    scores, skipped = {}, {}
    for ways, shots in FEW_SHOT:
        name = f"few_shot_{ways}way_{shots}shot"
        options = {"ways": ways, "shots": shots, "count": args.episodes, "seed": args.seed}
        try:
            drawn = episodes(labelled.labels, sources=labelled.origins, **options)
        except UserError as error:
            skipped[name] = str(error)
            continue
        accuracies = episode_accuracies(features, drawn, base_mean=features.mean(axis=0))
        ids = np.array([f"{episode}/{way}" for episode, way in np.ndindex(accuracies.shape)])
        scores[name] = Measured(accuracies.ravel(), ids, drawn.classes.ravel())
    return scores, skipped


def _column(source: Source, name: str) -> np.ndarray:
    return np.array(source.column(name))


# --- the script -------------------------------------------------------------------------------------------------


def add_scoring_args(parser: flags.Parser) -> None:
    """What is scored, and how: the protocol."""
    add = parser.add_argument
    add("--pictures", metavar="DIR", help="any --data_path whose test part is reconstructed")
    add("--labelled", metavar="DIR", help="any --data_path with labels, for the linear probe")
    add("--maps", default=None, metavar="DIR", help="semantic maps of --pictures; default: its maps/, if there is one")
    add("--model", default=None, metavar="NAME", help="the encoder, for weights that do not say it")
    add("--mask_ratio", type=flags.ratio, default=0.75, help="removed patches, fraction in 0..1")
    add(
        "--test_maskings", nargs="*", default=[], metavar="STRATEGY",
        help="reconstruct under these masks too, named as for main_pretrain.py --masking",
    )  # fmt: skip
    add("--test_strength", type=flags.rate, default=4.0, help="of --test_maskings, log odds as of --mask_strength")
    add("--episodes", type=flags.count, default=1000, help="few-shot episodes of a setting")
    add("--labels", choices=("auto", "none", "folders", "metadata"), default="auto", help="of folders")
    add("--val_fraction", type=flags.fraction, default=0.1, help="held out without a split, 0..1")
    add("--batch_size", type=flags.count, default=128, help="images at a time")
    add("--num_workers", type=flags.count0, default=0, help="processes that decode images")
    flags.add_device_args(parser)


def check_scoring_args(args) -> None:
    """UserError where there is nothing to score, or a masking that no test can use."""
    if not args.pictures and not args.labelled:
        raise UserError("there is nothing to score on: give --pictures, --labelled, or both")
    for strategy in args.test_maskings:
        masking = Masking(strategy)
        if masking.hard or masking.is_random:
            reason = "follows the model that is tested" if masking.hard else "is tested in any case"
            raise UserError(f"--test_maskings {strategy} {reason}: leave it out")


@dataclass(frozen=True)
class Data:
    """What checkpoints are scored on; either part may be None."""

    pictures: Pictures | None
    labelled: Labelled | None

    @property
    def fingerprints(self) -> list[str]:
        """Of all sources."""
        sources = [self.pictures.source] if self.pictures else []
        return [source.fingerprint for source in sources + (self.labelled.sources if self.labelled else [])]


def open_data(args) -> Data:
    """The pictures that the flags of `add_scoring_args` name."""
    return Data(open_pictures(args) if args.pictures else None, open_labelled(args) if args.labelled else None)


def score(ckpt: str, data: Data, args, device: torch.device) -> tuple[dict[str, Measured], dict[str, str]]:
    """Every measure of one checkpoint, and those that the data cannot support, with the reason."""
    scores, skipped = {}, {}
    if data.pictures:
        scores |= score_pictures(ckpt, data.pictures, args, device)
        skipped |= {f"regions of the map {name}": reason for name, reason in data.pictures.missing.items()}
    if data.labelled:
        features = embeddings(ckpt, data.labelled, args, device)
        few_shot, missing = score_few_shot(features, data.labelled, args)
        scores |= score_probe(features, data.labelled) | few_shot
        skipped |= missing
    return scores, skipped


def protocol(args, data: Data) -> dict:
    """All that the scores of two checkpoints must have in common to be compared."""
    names = ("mask_ratio", "test_strength", "episodes", "seed")
    maps = data.pictures.maps.fingerprint if data.pictures and data.pictures.maps else None
    return {name: getattr(args, name) for name in names} | {"data": data.fingerprints, "maps": maps}


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Score one pre-trained checkpoint, sample by sample")
    parser.add_argument("--ckpt", required=True, metavar="W", help="pre-trained weights, such as checkpoint-last.pth")
    parser.add_argument("--output_dir", required=True, metavar="OUT", help="folder for results.json and scores.npz")
    parser.add_argument("--resume", default="auto", choices=["auto"], help="for the grid runner: scores start anew")
    add_scoring_args(parser)
    args = parser.parse_args(argv)
    check_scoring_args(args)
    return args


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    started, device = time.perf_counter(), pick_device(args.device)
    folder = RunFolder(args.output_dir, is_main=True)
    with only_writer(folder.path):
        judge(args, folder, device, started)


def judge(args, folder: RunFolder, device: torch.device, started: float) -> None:
    """Measure every score that the data allow, and write them down."""
    data = open_data(args)
    scores, skipped = score(args.ckpt, data, args, device)
    write_scores(folder.path / SCORES_NAME, scores, protocol(args, data))
    for name, measured in scores.items():
        folder.say(f"{name} {measured.mean:.4g} ({len(measured.values)} values)")
    for name, reason in skipped.items():
        folder.say(f"not measured: {name}: {reason}")
    results = {name: measured.mean for name, measured in scores.items()} | {"skipped": skipped}
    results |= provenance(vars(args), device, "+".join(data.fingerprints))
    folder.results({**results, "wall_seconds": time.perf_counter() - started, "finished": True})


if __name__ == "__main__":
    main()
