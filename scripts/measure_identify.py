"""How well identify.py groups and names faces whose identity is known.

    python eval_recognition.py --ckpt W --data_path DIR --output_dir EVAL --protocols open_set --save_embeddings
    python scripts/measure_identify.py --embeddings EVAL/embeddings.npz --data_path DIR --out identify.json

Clusters: B-cubed and pairwise F1 of several collections, for both methods; their one setting is chosen on val and
open_val together, known and new characters. Names: a gallery of --shots pictures of each character; probes are other
pictures of them, and of characters that are in no gallery. "trained": characters that the network knows, from train,
probes from test, strangers from open_test. "new": characters of open_test, strangers from open_val; nobody was trained
on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from util.benchmark.clustering import clustering_report
from util.benchmark.embedded import read_embeddings
from util.data.manifest import read_manifest
from util.run import args as flags
from util.run.device import pick_device
from util.run.errors import UserError, cli
from util.run.log import provenance, write_json
from util.run.seed import rng_for
from util.training.checkpoint import plain_args
from util.transfer.clusters import cluster_faces
from util.transfer.gallery import Gallery, unit
from util.transfer.naming import UNKNOWN, name_faces, share_names, stranger_threshold

TUNED_ON = ("val", "open_val")
GRID = {
    "agglomerative": {"similarity": [round(0.02 * step, 2) for step in range(5, 46)]},
    "hdbscan": {"least": [2, 3, 4, 5, 6, 8, 10, 15, 20, 30]},
}
FARS = (0.01, 0.05, 0.1)


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Clusters and names of faces against the truth")
    parser.add_argument("--embeddings", required=True, metavar="FILE", help=".npz of eval_recognition.py")
    parser.add_argument("--data_path", required=True, metavar="DIR", help="prepared folder with their identities")
    parser.add_argument("--shots", type=flags.count, nargs="+", default=[1, 5, 10], help="gallery pictures of each")
    parser.add_argument(
        "--draws", type=flags.count, default=20, help="galleries that are drawn; figures are their mean"
    )
    parser.add_argument("--seed", type=flags.count0, default=0, help="of the galleries")
    parser.add_argument("--out", required=True, metavar="JSON", help="result file")
    return parser.parse_args(argv)


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    splits = labelled(args.embeddings, args.data_path)
    if not set(TUNED_ON) <= splits.keys():
        raise UserError(f"{args.data_path} lacks labelled {' or '.join(TUNED_ON)} samples among the embeddings")
    chosen = {method: tune(*joined_splits(splits, TUNED_ON), method) for method in GRID}
    results = {"chosen": chosen, "clusters": measure_clusters(splits, chosen), "names": {}}
    joined = chosen["agglomerative"]["similarity"]
    for kind, gallery, probes, strangers in (
        ("trained", "train", "test", "open_test"),
        ("new", "open_test", "open_test", "open_val"),
    ):
        if {gallery, probes, strangers} <= splits.keys():
            for shots in args.shots:
                results["names"][f"{kind}, {shots} shots"] = measure_names(
                    splits[gallery], splits[probes], splits[strangers], shots, joined, args
                )
    write_json(Path(args.out), {**results, **provenance(plain_args(args), pick_device("cpu"))})
    print(f"figures: {args.out}")


def labelled(embeddings: str, data_path: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{split: (embeddings (n, D), identities (n,))} of the samples that have both."""
    rows, sample_id = read_embeddings(embeddings)
    places = {name: place for place, name in enumerate(sample_id.tolist())}
    table = read_manifest(data_path).table.select(["sample_id", "identity", "split"]).to_pylist()
    found: dict[str, list[tuple[int, str]]] = {}
    for row in table:
        if row["identity"] is not None and row["sample_id"] in places:
            found.setdefault(row["split"], []).append((places[row["sample_id"]], row["identity"]))
    return {
        split: (rows[[place for place, _ in pairs]], np.array([name for _, name in pairs]))
        for split, pairs in found.items()
    }


def joined_splits(splits: dict, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(embeddings (n, D), identities (n,)) of several splits."""
    embeddings, identities = zip(*(splits[name] for name in names), strict=True)
    return np.concatenate(embeddings), np.concatenate(identities)


def tune(embeddings: np.ndarray, identities: np.ndarray, method: str) -> dict:
    """The setting of a method with the highest B-cubed F1."""
    ((name, values),) = GRID[method].items()
    scores = {
        value: clustering_report(cluster_faces(embeddings, method=method, **{name: value}), identities)["bcubed"]["f1"]
        for value in values
    }
    return {name: max(scores, key=scores.get), "bcubed_f1": {str(value): score for value, score in scores.items()}}


def measure_clusters(splits: dict, chosen: dict) -> dict:
    """{collection: {method: report}} with the chosen settings."""
    wanted = (TUNED_ON, ("open_test",), ("test",), ("test", "open_test"))
    collections = {" + ".join(names): joined_splits(splits, names) for names in wanted if set(names) <= splits.keys()}
    report = {}
    for name, (embeddings, identities) in collections.items():
        report[name] = {}
        for method, setting in chosen.items():
            option = {key: value for key, value in setting.items() if key in GRID[method]}
            report[name][method] = clustering_report(cluster_faces(embeddings, method=method, **option), identities)
    return report


def measure_names(gallery: tuple, probes: tuple, strangers: tuple, shots: int, similarity: float, args) -> dict:
    """{"FAR 0.01": {"cluster": {...}, "face": {...}, "threshold"}}: means over draws of the gallery."""
    figures: dict[str, dict[str, list]] = {}
    for draw in range(args.draws):
        enrolled = draw_shots(gallery[1], shots, rng_for(args.seed, shots, draw, "gallery"))
        rest = slice(None) if probes is not gallery else np.setdiff1d(np.arange(len(probes[1])), enrolled)
        known = probes[0][rest], probes[1][rest]
        faces = np.concatenate([known[0], strangers[0]])
        truth = np.concatenate([known[1], np.full(len(strangers[1]), UNKNOWN)])
        people = in_memory(gallery[0][enrolled], gallery[1][enrolled])
        clusters = cluster_faces(faces, similarity=similarity)
        for far in FARS:
            threshold = stranger_threshold(people, far)
            block = figures.setdefault(f"FAR {far:g}", {})
            block.setdefault("threshold", []).append(threshold)
            names = name_faces(people, faces, threshold)
            for way, found in (("face", names), ("cluster", share_names(names, clusters))):
                given = np.array([name.name for name in found])
                for key, value in outcome(given, truth).items():
                    block.setdefault(f"{way}.{key}", []).append(value)
    return {far: {key: float(np.mean(values)) for key, values in block.items()} for far, block in figures.items()}


def draw_shots(identities: np.ndarray, shots: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of `shots` pictures of each identity, or of all but one where there are fewer."""
    rows = [np.flatnonzero(identities == name) for name in np.unique(identities)]
    return np.concatenate([rng.choice(own, max(1, min(shots, len(own) - 1)), replace=False) for own in rows])


def in_memory(embeddings: np.ndarray, identities: np.ndarray) -> Gallery:
    """A gallery that is not kept."""
    people = {str(name): unit(embeddings[identities == name]) for name in np.unique(identities)}
    return Gallery(Path(), "", embeddings.shape[1], people=people)


def outcome(given: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Rates in 0..1: of enrolled characters right, wrong and rejected; of strangers rejected; of all names right."""
    stranger, named = truth == UNKNOWN, given != UNKNOWN
    right = given == truth
    return {
        "right": float(right[~stranger].mean()),
        "wrong": float((named & ~right)[~stranger].mean()),
        "missed": float((~named)[~stranger].mean()),
        "strangers_rejected": float(right[stranger].mean()),
        "all_right": float(right.mean()),
        "precision": float(right[named].mean()) if named.any() else 1.0,
    }


if __name__ == "__main__":
    main()
