"""The comparison of all methods under equal conditions, into one leaderboard: mean and deviation over three seeds.

python scripts/benchmark.py --data_path data/toonfaces --preset tiny --jobs 2 --out runs/benchmark -- --num_workers 0
python scripts/benchmark.py --data_path DIR --devices 0,1 --weights mae=FILE dino=FILE --budget images=5000000

OUT gets leaderboard.md, .csv and .tex and figures of accuracy against parameters, training time and latency. All
methods see the same pictures at one size, and are evaluated on the same pairs, episodes and test pictures. The same
call again skips what is finished, goes on with what was stopped, and tries again what failed. Flags after a lone --
go to every script. Weights that cannot be had leave a method out, by name and with the reason; no others take their
place.
"""

import json
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.benchmark import budget as budgets
from util.benchmark.availability import named_weights, unavailable
from util.benchmark.chains import Bench, Chain, calibration_keys, needs, unique
from util.benchmark.leaderboard import Board, entry_of, make_board
from util.benchmark.leaderboard_figures import draw_figures
from util.benchmark.leaderboard_tables import About, csv_table, latex, markdown
from util.benchmark.methods import PRESETS, WEIGHTS, Method, with_settings
from util.benchmark.progress_table import ProgressTable
from util.run import args as flags
from util.run.errors import UserError, cli
from util.run.files import write_text
from util.run.grid import parse_runner_args, run_all


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Compare all methods; flags after a lone -- are added to every command")
    add = parser.add_argument
    add("--data_path", required=True, metavar="DIR", help="prepared or class folders, or hf:OWNER/NAME")
    add("--out", type=Path, default=Path("runs/benchmark"), metavar="DIR", help="folder for runs and leaderboard")
    add(
        "--preset",
        choices=PRESETS,
        default="full",
        help="full: ViT-B/16 at 224 px; face112: at 112 px; tiny: two CPU cores",
    )
    add(
        "--methods", nargs="+", default=["all"], metavar="NAME", help="of the preset, or all; an unknown one lists them"
    )
    add("--seeds", nargs="+", type=flags.count0, default=[0, 1, 2], help="of training; the evaluation has one seed")
    add(
        "--budget", type=budgets.parse_budget, default="recipe", metavar="KIND=AMOUNT",
        help="recipe, or matched: epochs=N, images=N or gpu_minutes=X in all, memory=GIB, "
        "convergence[=PATIENCE]",
    )  # fmt: skip
    add(
        "--pretrain_share", type=flags.share, default=0.5, metavar="X",
        help="of a budget of images or minutes, for a method's own pre-training, fraction in 0..1",
    )  # fmt: skip
    add("--weights", nargs="+", default=[], metavar="KEY=FILE", help=f"instead of a download: {', '.join(WEIGHTS)}")
    add("--tuned", type=Path, metavar="FILE", help='JSON, {"METHOD": {"lr": 1e-3, "from": "where it was chosen"}}')
    add("--reference", metavar="NAME", help="method that all are set against; default: fine-tuning from random weights")
    add("--retry", type=flags.count0, default=0, help="further attempts at a run that fails")
    add("--dry_run", action="store_true", help="print the commands and what is done of them, and start nothing")
    add("--report_only", action="store_true", help="write the leaderboard of what is done, and start nothing")
    args = parse_runner_args(parser, argv)
    args.seeds = list(dict.fromkeys(args.seeds))
    return args


# --- what is to be run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The methods as their budget leaves them, why some are left out, and the runs of the others."""

    methods: Sequence[Method]
    left_out: dict[str, str]
    chains: Sequence[Chain]


def make_plan(args) -> Plan:
    """Choose methods, look for their weights, match their budgets. May start calibration runs."""
    preset = PRESETS[args.preset]
    methods = with_settings(preset.choose(args.methods), read_tuned(args.tuned))
    if args.reference not in (None, *preset.methods):
        raise UserError(f"--reference {args.reference} is not in the preset: {', '.join(preset.methods)}")
    bench = open_bench(args)
    needed = {key: bench.weights[key] for key in sorted({m.needed_weights for m in methods if m.needed_weights})}
    starts_nothing = args.dry_run or args.report_only
    missing = known_reasons(args.out) if starts_nothing else unavailable(needed)
    left_out = {m.name: missing[m.needed_weights] for m in methods if m.needed_weights in missing}
    ready = [method for method in methods if method.name not in left_out]
    matched = match(args, bench, ready, left_out)
    if not starts_nothing:
        write_text(args.out / "unavailable.json", json.dumps(missing, indent=2) + "\n")
    runnable = list(matched.values())
    return Plan([matched.get(m.name, m) for m in methods], left_out, bench.chains(runnable, args.seeds))


def open_bench(args) -> Bench:
    """Data, evaluation, weights and further flags of all runs."""
    preset = PRESETS[args.preset]
    weights = {**preset.weights, **named_weights(args.weights, preset.weights)}
    return Bench(args.out, args.data_path, preset.evaluation, weights, args.extra)


def known_reasons(out: Path) -> dict[str, str]:
    """What the last call that looked for weights has found missing."""
    path = out / "unavailable.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_tuned(file: Path | None) -> dict[str, dict]:
    """The settings of --tuned, by method or pre-training."""
    if file is None:
        return {}
    try:
        tuned = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--tuned {file} cannot be read ({error}): give a JSON file") from error
    methods = [method for preset in PRESETS.values() for method in preset.methods.values()]
    known = {m.name for m in methods} | {m.pretraining.name for m in methods if m.pretraining}
    if not isinstance(tuned, dict) or not all(isinstance(settings, dict) for settings in tuned.values()):
        raise UserError(f'--tuned {file} is not of the form {{"METHOD": {{"lr": 1e-3}}}}: mend it')
    if strangers := sorted(set(tuned) - known):
        raise UserError(f"--tuned {file} names {strangers[0]}, which is no method: {', '.join(sorted(known))}")
    return {name: {"from": str(file), **settings} for name, settings in tuned.items()}


def match(args, bench: Bench, methods: Sequence[Method], left_out: dict[str, str]) -> dict[str, Method]:
    """The methods under the budget, by name; those that it does not suffice for join `left_out`."""
    kind = args.budget.kind
    if kind == "memory":
        refuse_without_cuda()
    if kind not in ("images", "gpu_minutes"):
        return {method.name: budgets.apply_simple(args.budget, method) for method in methods}
    paces = image_paces(args, methods) if kind == "images" else time_paces(args, bench, methods, left_out)
    amount = args.budget.amount * (60 if kind == "gpu_minutes" else 1)
    matched = {}
    for method in methods:
        before, after = calibration_keys(method)
        if method.name in left_out:
            continue
        try:
            epochs = budgets.divide(amount, args.pretrain_share, paces.get(before), paces[after])
            matched[method.name] = budgets.with_epochs(method, *epochs)
        except UserError as error:
            left_out[method.name] = str(error)
    return matched


def refuse_without_cuda() -> None:
    import torch  # slow to import, and half a GB that would lie beside the runs

    if not torch.cuda.is_available():
        raise UserError("--budget memory needs a CUDA card, whose memory can be counted: choose another budget")


def image_paces(args, methods: Sequence[Method]) -> dict[str, budgets.Pace]:
    """Images of an epoch of each stage, by `calibration_keys`, as the data have them."""
    import main_finetune
    from util.data.face_crop import open_pictures
    from util.data.labels import open_labelled

    data = main_finetune.get_args(["--data_path", args.data_path, "--output_dir", str(args.out), *args.extra])
    unlabelled, labelled = len(open_pictures(data, "train")), len(open_labelled(data).train)
    paces = {}
    for method in methods:
        before, after = calibration_keys(method)
        if before:
            paces[before] = budgets.images_pace(unlabelled, int(method.pretraining.stage.number("batch_size")))
        paces[after] = budgets.images_pace(labelled, int(method.transfer.number("batch_size")))
    return paces


def time_paces(args, bench: Bench, methods: Sequence[Method], left_out: dict[str, str]) -> dict[str, budgets.Pace]:
    """Seconds of an epoch of each stage, measured by short runs with the first seed, one at a time."""
    calibrations = bench.calibrations(methods, args.seeds[0])
    if not (args.dry_run or args.report_only):
        args.out.mkdir(parents=True, exist_ok=True)
        signum = run_all(list(calibrations.values()), devices=args.devices[:1], retry=args.retry)
        if signum:
            sys.exit(128 + signum)
    paces = {}
    for method in methods:
        for key in filter(None, calibration_keys(method)):
            try:
                paces[key] = calibrations[key].pace()
            except UserError as error:
                left_out[method.name] = str(error)
    if not (args.dry_run or args.report_only):
        seconds = {
            key: {"seconds_per_epoch": pace.per_epoch, "fixed_seconds": pace.fixed} for key, pace in paces.items()
        }
        write_text(args.out / "calibration.json", json.dumps(seconds, indent=2) + "\n")
    return paces


# --- the leaderboard ------------------------------------------------------------------------------------------------


def read_board(args, plan: Plan) -> Board:
    """What there is so far."""
    own: dict[str, list[Chain]] = {method.name: [] for method in plan.methods}
    for chain in plan.chains:
        own[chain.method.name].append(chain)
    entries = [entry_of(method, own[method.name], plan.left_out.get(method.name)) for method in plan.methods]
    return make_board(entries, args.reference or PRESETS[args.preset].reference)


def describe(args, plan: Plan) -> About:
    """What a reader has to know beside the numbers."""
    preset = PRESETS[args.preset]
    done = (chain.evaluation.results() for chain in plan.chains if chain.state() == "done")
    made = next(done, {})
    facts = {
        "Data": f"{args.data_path}, {preset.input_size} px",
        "Preset": f"{args.preset}, {len(plan.methods)} methods, seeds {' '.join(map(str, args.seeds))}",
        "Runs at the same time": str(args.jobs),
    }
    facts |= {title: str(made[key]) for title, key in (("Device", "device"), ("Commit", "git_commit")) if key in made}
    if args.extra:
        facts["Further flags of every script"] = shlex.join(args.extra)
    return About("Leaderboard", args.budget.describe(args.pretrain_share), args.seeds, preset.evaluation, facts)


def write_tables(args, plan: Plan) -> Board:
    """leaderboard.md, .csv and .tex, each in one step."""
    board, about = read_board(args, plan), describe(args, plan)
    for name, text in (("md", markdown(board, about)), ("csv", csv_table(board)), ("tex", latex(board, about))):
        write_text(args.out / f"leaderboard.{name}", text)
    return board


class Written:
    """Writes the tables anew whenever another evaluation is done."""

    def __init__(self, args, plan: Plan):
        self.args, self.plan, self.done = args, plan, -1

    def __call__(self) -> None:
        done = sum(chain.evaluation.output.exists() and chain.state() == "done" for chain in self.plan.chains)
        if done != self.done:
            self.done = done
            write_tables(self.args, self.plan)


def conclude(args, plan: Plan, signum: int) -> None:
    """The last tables and the figures, how it went, and the exit status that says so."""
    board = write_tables(args, plan)
    figures = draw_figures(board, args.out)
    for name, why in plan.left_out.items():
        print(f"unavailable: {name}: {why}", file=sys.stderr)
    failed = [run for run in unique(plan.chains) if run.state() == "failed"]
    for run in failed:
        print(f"failed: {run.label}: {run.error()} (see {run.output})", file=sys.stderr)
    done = sum(chain.state() == "done" for chain in plan.chains)
    print(f"{done} of {len(plan.chains)} (methods x seeds) are done, {len(failed)} runs failed")
    print(f"table: {args.out / 'leaderboard.md'}; {len(figures)} figures beside it")
    if signum:
        print(f"stopped by {signal.Signals(signum).name}: the same command goes on from here")
        sys.exit(128 + signum)
    sys.exit(1 if failed else 0)


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    if args.dry_run:
        for run in unique(make_plan(args).chains):
            print(f"# {run.label}: {run.state()}\n{shlex.join(run.argv())}")
        return
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be made ({error.strerror}): choose another") from error
    plan = make_plan(args)
    if args.report_only:
        conclude(args, plan, 0)
    wanted = needs(plan.chains)
    signum = run_all(
        unique(plan.chains),
        jobs=args.jobs,
        devices=args.devices,
        retry=args.retry,
        on_change=Written(args, plan),
        needs=lambda run: wanted[run.folder],
        display=ProgressTable(plan.chains, list(plan.left_out)) if sys.stdout.isatty() and plan.chains else None,
    )
    conclude(args, plan, signum)


if __name__ == "__main__":
    main()
