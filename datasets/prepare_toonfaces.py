"""ToonFaces: a procedural anime-face data set with known truth, the project's embedded default.

    python datasets/prepare_toonfaces.py --out data/toonfaces --identities 40 --images 4000 --size 128 --seed 0

writes images/, masks/ and metadata.parquet, and sheet.png to look at. `--images` counts the main identities
(train, val and test: 80, 10 and 10 %); the open and the novel identities come on top. With `--scenes N` the
folder OUT/scenes holds pictures with several characters, one row for each face, as data for detection.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.run.errors import UserError, cli
from util.run.files import write_atomically
from util.toonfaces.dataset import Recipe, cast, write_faces, write_scenes
from util.toonfaces.identity import MAX_IDENTITIES
from util.toonfaces.overview import overview
from util.toonfaces.split import Sizes

MIN_SIZE, MAX_SIZE = 32, 1024


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write")
    add("--identities", type=int, default=40, help="characters in train, val and test (default: %(default)s)")
    add("--images", type=int, default=4000, help="pictures of them in total (default: %(default)s)")
    add("--imbalance", type=float, default=1.0, help="train pictures of the most frequent character over those of "
        "the rarest, at least 1; val and test stay balanced (default: %(default)s)")  # fmt: skip
    add("--open_identities", type=int, default=20, help="characters never trained on, half of them open_val, half "
        "open_test (default: %(default)s)")  # fmt: skip
    add("--open_images", type=int, default=20, help="pictures of each of them (default: %(default)s)")
    add("--novel_identities", type=int, default=10, help="characters for few-shot learning (default: %(default)s)")
    add("--novel_images", type=int, default=25, help="pictures of each of them (default: %(default)s)")
    add("--scenes", type=int, default=0, help="pictures with several characters, 3 x size by 2 x size px, in "
        "OUT/scenes (default: %(default)s)")  # fmt: skip
    add("--size", type=int, default=128, help=f"side of a face picture, px, {MIN_SIZE}..{MAX_SIZE} "
        "(default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="equal seeds give equal pictures (default: %(default)s)")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that draw, 0: this one; the "
        "pictures do not depend on it (default: %(default)s)")  # fmt: skip
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise UserError for the first argument that makes no data set."""
    lowest = {"identities": 1, "open_identities": 0, "open_images": 1, "novel_identities": 0, "novel_images": 1,
              "scenes": 0, "workers": 0}  # fmt: skip
    for name, low in lowest.items():
        if getattr(args, name) < low:
            raise UserError(f"--{name} {getattr(args, name)} is too small: give {low} or more")
    if not MIN_SIZE <= args.size <= MAX_SIZE:
        raise UserError(f"--size {args.size} is out of range: give {MIN_SIZE}..{MAX_SIZE} px")
    if args.images < 10 * args.identities:
        raise UserError(f"--images {args.images} is too few: give 10 or more for each of {args.identities} identities")
    total = args.identities + args.open_identities + args.novel_identities
    if total > MAX_IDENTITIES:
        raise UserError(f"{total} characters are too many to tell apart: ask for {MAX_IDENTITIES} or fewer in all")
    if not args.imbalance >= 1:
        raise UserError(f"--imbalance {args.imbalance} is too small: give 1 (balanced) or more")


@cli
def main() -> None:
    args = get_args_parser().parse_args()
    check(args)
    sizes = Sizes(args.identities, args.images, args.imbalance, args.open_identities, args.open_images,
                  args.novel_identities, args.novel_images)  # fmt: skip
    faces, scenes = Recipe(sizes, args.size, args.seed), Recipe(sizes, args.size, args.seed, args.scenes)
    drawn = write_faces(args.out, faces, args.workers)
    print(f"{args.out}: {'drawn' if drawn else 'complete already, nothing to do'}")
    if args.scenes:
        drawn = write_scenes(args.out / "scenes", scenes, args.workers)
        print(f"{args.out / 'scenes'}: {'drawn' if drawn else 'complete already, nothing to do'}")
    picture = args.out / "sheet.png"
    if not picture.is_file():
        shown = overview(cast(faces)["id"][:8], args.seed)
        write_atomically(picture, lambda temporary: shown.save(temporary, format="PNG"))


if __name__ == "__main__":
    main()
