"""A leaderboard page from a folder of results: leaderboard.md and a static leaderboard.html.

python scripts/leaderboard_page.py runs/evaluations --out FOLDER [--release RELEASE]

Every results.json of eval_recognition.py and scripts/score_submission.py under the folders is a row; docs/protocols.md
says what submission.json beside it may add. Different data, pairs or episodes make different tables.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.benchmark.leaderboard_page import html_page, markdown_page, read_all, sections
from util.benchmark.release import SUMS, digest, read_release
from util.run import args as flags
from util.run.errors import cli
from util.run.files import write_text


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("A leaderboard page from results")
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folders that hold results.json, nested or not")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for leaderboard.md and leaderboard.html")
    parser.add_argument("--release", default=None, metavar="DIR", help="evaluations that follow it stand in its table")
    parser.add_argument("--title", default="Anime character recognition", help="of the page")
    return parser.parse_args(argv)


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    release = read_release(args.release) if args.release else None
    made = sections(read_all(args.folders), release, digest(Path(args.release) / SUMS) if release else "")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "leaderboard.md", markdown_page(args.title, made))
    write_text(out / "leaderboard.html", html_page(args.title, made))
    models = sum(len(section.models) for section in made)
    print(f"{models} models in {len(made)} tables: {out / 'leaderboard.md'}, {out / 'leaderboard.html'}")


if __name__ == "__main__":
    main()
