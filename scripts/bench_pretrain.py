"""Step time, peak memory and use of the device in pre-training: ours beside the official design and the peers.

python scripts/bench_pretrain.py --out bench.json --model mae_vit_base_patch16 --input_size 224 --batch_size 8
python scripts/bench_pretrain.py --out bench.json --contenders ours ours_fast official_design --batch_size 32

All contenders get the same weights, images, masks and precision, and those with the objective of the paper must agree
on the loss before the clock starts. A step is a whole optimizer step. Each contender lives in a process of its own,
because its memory and how it handles freed memory are a process's; they take turns, so that whatever else the machine
does falls on all of them, and the medians count.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models_mae import MAE_MODELS, MaskedAutoencoder, build_mae
from scripts.contenders import CONTENDERS, EXACT, Contender, installed
from util.benchmark.speed import matmul_rate
from util.run import args as flags
from util.run.device import peak_memory_bytes, pick_device, pick_precision, synchronize
from util.run.errors import UserError, cli
from util.run.log import provenance, write_json
from util.run.seed import uniform_for

LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}  # relative


def make_batch(args, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, H, W) and noise (N, L), the same for every contender."""
    patches = (args.input_size // MAE_MODELS[args.model].keywords["patch_size"]) ** 2
    index = torch.arange(args.batch_size)
    images = uniform_for(args.seed, 0, index, 3 * args.input_size**2).view(-1, 3, args.input_size, args.input_size)
    return (images * 4 - 2).to(device), uniform_for(args.seed, 1, index, patches).to(device)


def step_flops(args) -> int:
    """Floating-point operations of the matrix products of our exact step, two for a multiply-add."""
    model = MaskedAutoencoder(img_size=args.input_size, **MAE_MODELS[args.model].keywords).to("meta")
    images = torch.empty(args.batch_size, 3, args.input_size, args.input_size, device="meta")
    noise = torch.empty(args.batch_size, model.num_patches(images), device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # its products can be counted
        model(images, args.mask_ratio, noise, 1.0).backward()
    return counter.get_total_flops()


def serve(args) -> None:
    """Be one contender: build it, say what its first loss is, then make a turn for each line that comes in."""
    torch.manual_seed(args.seed)
    # what pick_device arranges for the memory of a CPU process is ours: the peers do without
    bare = args.device == "cpu" and not args.serve.startswith("ours")
    device = torch.device("cpu") if bare else pick_device(args.device)
    precision = pick_precision(args.precision, device)
    weights = build_mae(args.model, args.input_size).state_dict()
    before = peak_memory_bytes(device)
    contender, batch = Contender(args.serve, args, device, precision, weights), make_batch(args, device)
    del weights
    with torch.no_grad():
        loss = float(contender.loss(*batch))
    _answer({"loss": loss})
    steps = args.steps_per_turn or (10 if device.type == "cuda" else 1)
    for _ in sys.stdin:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(steps):
            contender.step(*batch)
        synchronize(device)
        ms = (time.perf_counter() - started) * 1e3 / steps
        _answer({"ms": ms, "peak_memory_bytes": peak_memory_bytes(device) - before})


def _answer(message: dict) -> None:
    print(json.dumps(message), flush=True)


class Seat:
    """A contender in its own process."""

    def __init__(self, name: str, argv: list[str]):
        # a shell in between, because Linux hands the peak of a process on to what it executes
        program = [sys.executable, str(Path(__file__).resolve()), *argv, "--serve", name]
        command = ["sh", "-c", '"$@"; exit $?', "sh", *program]
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.loss = self._read()["loss"]

    def turn(self) -> dict:
        """Take some steps; {"ms": per step, "peak_memory_bytes": so far, what the contender added to its process}."""
        self.process.stdin.write("turn\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the contender {self.name} ended with status {self.process.wait()}: see its words above")
        return json.loads(line)

    def leave(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def check_same_objective(losses: dict[str, float], precision: str) -> None:
    """AssertionError where a contender with the paper's objective does not compute what ours does."""
    exact = {name: loss for name, loss in losses.items() if name in EXACT}
    for name, loss in exact.items():
        if abs(loss / exact["ours"] - 1) > LOSS_TOLERANCE[precision]:
            raise AssertionError(f"{name} does not compute our objective: the losses are {exact}")


def take_turns(seats: list[Seat], args) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds per step of every round, and peak memory. The order changes from round to round."""
    times, memory = {seat.name: [] for seat in seats}, {}
    for number in range(args.warmup + args.steps):
        first = number % len(seats)
        for seat in seats[first:] + seats[:first]:
            answer = seat.turn()
            memory[seat.name] = answer["peak_memory_bytes"]
            if number >= args.warmup:
                times[seat.name].append(answer["ms"])
    return times, memory


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Step time and peak memory against the official design and the peers")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="result file, JSON")
    parser.add_argument("--model", choices=MAE_MODELS, default="mae_vit_base_patch16", metavar="NAME", help="model")
    parser.add_argument("--input_size", type=flags.count, default=224, help="side of the square images, px")
    parser.add_argument("--batch_size", type=flags.count, default=8, help="images per step")
    parser.add_argument("--mask_ratio", type=flags.ratio, default=0.75, help="removed patches, fraction in 0..1")
    parser.add_argument("--norm_pix_loss", action="store_true", help="the loss on normalised patches")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=[name for name in CONTENDERS if name != "ours_compiled"],
        metavar="NAME",
        help=f"who takes part, beside ours: {', '.join(CONTENDERS)}; those that are not installed are left out",
    )
    parser.add_argument(
        "--steps", type=flags.count, default=10, help="timed rounds; every contender has a turn in each"
    )
    parser.add_argument("--steps_per_turn", type=flags.count, default=None, help="steps; default: 10 on cuda, else 1")
    parser.add_argument("--warmup", type=flags.count0, default=2, help="rounds before the clock starts")
    flags.add_device_args(parser)
    parser.add_argument("--threads", type=flags.count0, default=0, help="CPU threads; 0: as torch chooses")
    parser.add_argument("--serve", choices=CONTENDERS, default=None, help="be one contender (this script calls it so)")
    return parser.parse_args(argv)


def present(args) -> list[str]:
    """The contenders of the flags that can take part, ours first; the others are named on the way."""
    names = ["ours", *(name for name in CONTENDERS if name in args.contenders and name != "ours")]
    if args.norm_pix_loss and "lightly" in names:
        print("lightly is left out: its objective is on raw pixels")
        names.remove("lightly")
    missing = [name for name in names if not installed(name)]
    for name in missing:
        print(f"{name} is left out: its library is not installed")
    return [name for name in names if name not in missing]


@cli
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = get_args(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if args.serve:
        serve(args)
        return

    device, started = pick_device(args.device), time.perf_counter()
    precision = pick_precision(args.precision, device)
    flops = step_flops(args)
    seats = [Seat(name, [*argv, "--device", device.type]) for name in present(args)]
    check_same_objective({seat.name: seat.loss for seat in seats}, precision)
    times, memory = take_turns(seats, args)
    for seat in seats:
        seat.leave()
    rate = matmul_rate(device, precision)

    result = summary(times, memory, flops, rate)
    where = "resident, libraries loaded on first use included" if device.type == "cpu" else "on the device"
    result["memory"] = f"what one contender alone adds to its process at the peak ({where})"
    result["provenance"] = provenance({**vars(args), "out": str(args.out), "precision": precision}, device)
    result["wall_seconds"] = time.perf_counter() - started
    write_json(args.out, result)
    print(table(result, args.batch_size))
    print(f"written to {args.out}")


def summary(times: dict[str, list[float]], memory: dict[str, int], flops: int, rate: float) -> dict:
    """The figures of every contender, and how many times as fast as each other one ours is.

    flops: of our exact step. rate: the device's measured peak in matrix products, FLOP/s.
    """
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        name: {
            "ms_per_step": medians[name],
            "peak_memory_bytes": memory[name],
            "mfu": flops / (medians[name] / 1e3) / rate if name in EXACT else None,
            "ms_of_each_round": times[name],
            "what": CONTENDERS[name],
        }
        for name in times
    }
    for name, key in (("official_design", "ratio_official"), ("hf", "ratio_hf"), ("lightly", "ratio_lightly")):
        result[key] = medians[name] / medians["ours"] if name in medians else None
    for name in ("ours_fast", "ours_compiled"):
        if name in medians and "official_design" in medians:
            result[f"ratio_official_{name}"] = medians["official_design"] / medians[name]
    return result | {"step_flops": flops, "matmul_flops_per_s": rate}


def table(result: dict, batch_size: int) -> str:
    """The result as a Markdown table."""
    lines = [
        "| | ms per step | images/s | peak memory | MFU | times as fast as the official design |",
        "|" + "---|" * 6,
    ]
    base = result.get("official_design", {}).get("ms_per_step")
    for name in CONTENDERS:
        if name in result:
            row = result[name]
            ms, mfu = row["ms_per_step"], f"{row['mfu']:.0%}" if row["mfu"] else ""
            ratio = f"{base / ms:.2f}" if base else ""
            memory = f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB"
            lines.append(f"| {name} | {ms:,.0f} | {batch_size / ms * 1e3:.2f} | {memory} | {mfu} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
