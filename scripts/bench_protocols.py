"""Time and peak memory of the protocols at scale, on synthetic embeddings with a long tail of identities.

python scripts/bench_protocols.py --what all_pairs --images 100000 --identities 7000 --out bench.json
python scripts/bench_protocols.py --what identification --images 1000000 --identities 70000 --out bench.json

One protocol a process, because a process's peak memory never goes down.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from util.benchmark.all_pairs import all_pairs_report
from util.benchmark.identification import class_centres, nearest_classes
from util.benchmark.pairs import pair_scores, sample_pairs
from util.benchmark.verification import verification_report
from util.run import args as flags
from util.run.device import peak_memory_bytes
from util.run.errors import UserError, cli
from util.run.log import progress, provenance, write_json
from util.run.seed import rng_for

CPU = torch.device("cpu")
NOISE = 2.0  # of a picture about its identity, per dimension: cosine 0.2 between pictures of one identity
BLOCK = 4096  # rows that are drawn at a time


class Clock:
    """Wall seconds of named phases, printed as they end."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def time(self, name: str, work: Callable):
        """The result of work()."""
        started = time.perf_counter()
        result = work()
        self.seconds[name] = time.perf_counter() - started
        print(
            f"{name:16} {self.seconds[name]:9.1f} s {peak_memory_bytes(CPU) / 2**20:9.0f} MiB at the peak", flush=True
        )
        return result


def make_labels(images: int, identities: int, seed: int) -> np.ndarray:
    """(N,) identity codes, shuffled: each identity once, the rest in proportion to 1 / (rank + 20)."""
    rng, weights = rng_for(seed, "labels"), 1 / (np.arange(identities) + 20)
    more = rng.choice(identities, images - identities, p=weights / weights.sum())
    return rng.permutation(np.concatenate([np.arange(identities), more]))


def make_embeddings(labels: np.ndarray, identities: int, dim: int, seed: int) -> np.ndarray:
    """(N, dim) float32, L2-normalised: the identity's random direction and noise; drawn in place, block by block."""
    centres = rng_for(seed, "centres").standard_normal((identities, dim), dtype=np.float32)
    embeddings = np.empty((len(labels), dim), dtype=np.float32)
    for number, start in enumerate(range(0, len(labels), BLOCK)):
        rows = embeddings[start : start + BLOCK]
        rng_for(seed, number, "noise").standard_normal(out=rows, dtype=np.float32)
        rows *= NOISE
        rows += centres[labels[start : start + BLOCK]]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return embeddings


def all_pairs(clock: Clock, embeddings: np.ndarray, labels: np.ndarray, args) -> dict:
    """Every pair there is."""
    with progress(total=len(labels) * (len(labels) - 1), unit="pair", unit_scale=True) as bar:
        return clock.time(
            "all pairs",
            lambda: all_pairs_report(
                embeddings, labels, replicates=args.replicates, seed=args.seed, progress=bar.update
            ),
        )


def verification(clock: Clock, embeddings: np.ndarray, labels: np.ndarray, args) -> dict:
    """A seeded list of pairs."""
    pairs = clock.time(
        "pair list",
        lambda: sample_pairs(labels, seed=args.seed, positives_per_identity=args.positives, negatives=args.negatives),
    )
    scores = clock.time("pair scores", lambda: pair_scores(embeddings, pairs.a, pairs.b))
    return clock.time(
        "figures",
        lambda: verification_report(
            scores, pairs.same, labels[pairs.a], labels[pairs.b], replicates=args.replicates, seed=args.seed
        ),
    )


def identification(clock: Clock, embeddings: np.ndarray, labels: np.ndarray, args) -> dict:
    """The nearest class centres of every picture; centres hold the pictures themselves, so the rate is no result."""
    centres = clock.time("class centres", lambda: class_centres(embeddings, labels, args.identities))
    found, _ = clock.time("nearest centres", lambda: nearest_classes(embeddings, centres, 5))
    return {
        "top1": float(np.mean(found[:, 0] == labels)),
        "top5": float(np.mean((found == labels[:, None]).any(axis=1))),
    }


PROTOCOLS = {"all_pairs": all_pairs, "verification": verification, "identification": identification}


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Time and peak memory of the protocols at scale, on synthetic embeddings")
    parser.add_argument("--what", choices=PROTOCOLS, required=True, help="the protocol; one a process")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="result file, JSON")
    parser.add_argument("--images", type=flags.count, default=100_000, help="embeddings")
    parser.add_argument("--identities", type=flags.number(int, 2), default=7000, help="identities, 2 to --images")
    parser.add_argument("--dim", type=flags.count, default=512, help="numbers in an embedding")
    parser.add_argument(
        "--negatives", type=flags.count, default=10_000_000, help="verification: pairs of two identities"
    )
    parser.add_argument("--positives", type=flags.count, default=50, help="verification: pairs of an identity, at most")
    parser.add_argument("--replicates", type=flags.count, default=1000, help="of the bootstrap over identities")
    parser.add_argument("--threads", type=flags.count0, default=0, help="CPU threads; 0: as torch chooses")
    parser.add_argument("--seed", type=flags.count0, default=0, help="of the embeddings and the pair list")
    args = parser.parse_args(argv)
    if args.identities > args.images:
        raise UserError(f"{args.identities} identities need as many images, not {args.images}: give --images more")
    return args


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    started = time.perf_counter()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    clock = Clock()
    labels = make_labels(args.images, args.identities, args.seed)
    embeddings = clock.time("embeddings", lambda: make_embeddings(labels, args.identities, args.dim, args.seed))
    before = peak_memory_bytes(CPU)
    figures = PROTOCOLS[args.what](clock, embeddings, labels, args)
    result = {
        "what": args.what,
        "figures": figures,
        "seconds": clock.seconds,
        "protocol_seconds": sum(seconds for name, seconds in clock.seconds.items() if name != "embeddings"),
        "embeddings_bytes": embeddings.nbytes,
        "peak_memory_bytes_before": before,
        "peak_memory_bytes": peak_memory_bytes(CPU),
        "provenance": provenance({**vars(args), "out": str(args.out)}, CPU),
        "wall_seconds": time.perf_counter() - started,
    }
    write_json(args.out, result)
    print(
        f"{args.what}: {result['protocol_seconds']:.1f} s, {result['peak_memory_bytes'] / 2**20:.0f} MiB at the peak, "
        f"of which embeddings {embeddings.nbytes / 2**20:.0f} MiB; written to {args.out}"
    )


if __name__ == "__main__":
    main()
