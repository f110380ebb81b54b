"""Published results again: run the stages of a preset, and print what was expected beside what was obtained.

python scripts/reproduce_published.py --list
python scripts/reproduce_published.py --preset dafre_vitl16_128 --data_path data/dafre [--dry_run] [-- FLAGS]

The data are those that the preset's script of datasets/ writes. FLAGS are added to every training. Stages that are
finished are skipped, so the same call goes on where it was stopped. OUT/PRESET/comparison.json has the table.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.benchmark.published import PRESETS, Preset
from util.run.args import Parser
from util.run.errors import UserError, cli
from util.run.files import write_text
from util.run.grid import run_all
from util.run.grid_report import flatten
from util.run.grid_run import Run
from util.run.log import write_json


def get_args(argv: list[str] | None = None):
    parser = Parser("Reproduce a published result")
    parser.add_argument("--preset", choices=PRESETS, metavar="NAME", help=", ".join(PRESETS))
    parser.add_argument("--data_path", metavar="DIR", help="prepared data; --list says by which script")
    parser.add_argument("--out", default="runs/published", type=Path, metavar="DIR", help="folder for the runs")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and start nothing")
    parser.add_argument("--list", action="store_true", help="say what there is, and what is expected of it")
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.flags = tuple(argv[cut + 1 :])
    if not args.list and not (args.preset and args.data_path):
        raise UserError("what is to be reproduced? Give --preset and --data_path, or --list")
    return args


def plan(preset: Preset, data: str, out: Path, flags: tuple[str, ...] = ()) -> list[Run]:
    """The stages of a preset in their order. flags: added to every training, where the last one counts."""
    folders = {stage.name: str(out / stage.name) for stage in preset.stages}
    runs = []
    for stage in preset.stages:
        words = [word.format(data=data, **folders) for word in shlex.split(stage.words)]
        more = flags if Path(words[0]).name.startswith("main_") else ()
        runs.append(Run(stage.name, (*words, *more), {}, out / stage.name))
    return runs


def compare(preset: Preset, runs: list[Run]) -> list[dict]:
    """Each expected figure beside the one that was obtained, None where its stage has not got so far."""
    figures = {run.name: flatten(run.results()) if run.state() == "done" else {} for run in runs}
    return [
        {
            "stage": expected.stage,
            "figure": expected.figure,
            "expected": expected.value,
            "obtained": figures[expected.stage].get(expected.figure),
            "source": expected.source,
        }
        for expected in preset.expected
    ]


def lines(rows: list[dict]) -> list[str]:
    """The comparison, a figure a line, in per cent."""
    said = []
    for row in rows:
        obtained = "nothing" if row["obtained"] is None else f"{100 * row['obtained']:.2f} %"
        gap = "" if row["obtained"] is None else f" ({100 * (row['obtained'] - row['expected']):+.2f} points)"
        name = f"{row['stage']}: {row['figure']}"
        said.append(f"{name}: expected {100 * row['expected']:.2f} %, obtained {obtained}{gap}")
    return said


def describe(name: str, preset: Preset) -> str:
    """What a preset is, for --list."""
    expected = "; ".join(f"{row.figure} of {row.stage} {100 * row.value:.2f} %" for row in preset.expected)
    sources = "; ".join(dict.fromkeys(row.source for row in preset.expected))
    parts = [name, f"  {preset.title}", f"  data: {preset.prepare}", f"  expected: {expected}", f"  source: {sources}"]
    return "\n".join([*parts, *(f"  differs: {text}" for text in preset.differs)])


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    if args.list:
        print("\n\n".join(describe(name, preset) for name, preset in PRESETS.items()))
        return
    preset = PRESETS[args.preset]
    out = args.out / args.preset
    runs = plan(preset, args.data_path, out, args.flags)
    if args.dry_run:
        for run in runs:
            print(f"# {run.label}: {run.state()}\n{shlex.join(run.argv())}")
        return
    if not Path(args.data_path).exists() and not args.data_path.startswith("hf:"):
        raise UserError(f"--data_path {args.data_path} does not exist: make it with {preset.prepare}")
    signum = run_all(runs, needs=lambda run: runs[: runs.index(run)])
    rows = compare(preset, runs)
    write_json(out / "comparison.json", {"preset": args.preset, "differs": preset.differs, "figures": rows})
    text = [preset.title, *lines(rows), *(f"differs: {text}" for text in preset.differs)]
    write_text(out / "comparison.txt", "\n".join(text) + "\n")
    print("\n".join(text))
    for run in runs:
        if run.state() == "failed":
            print(f"failed: {run.label}: {run.error()} (see {run.output})", file=sys.stderr)
    sys.exit(128 + signum if signum else int(any(run.state() != "done" for run in runs)))


if __name__ == "__main__":
    main()
