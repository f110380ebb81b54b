"""What a project will cost, before it is begun: time, memory and disk of each way to train, on a device of your choice.

python scripts/plan.py --device "RTX 5090" --images 50000 --goal pretrain --model vit_base_patch16 --epochs 400
python scripts/plan.py --device auto --images 4000 --classes 40 --goal all --model vit_small_patch16
python scripts/plan.py --device cpu --model vit_nano_patch8 --input_size 64 --validate

Operations are counted by formula (util/benchmark/cost.py), memory by running the step on tensors without contents
(util/training/memory.py), so neither needs the device. Time is operations / (rate x efficiency), plus the optimizer's
traffic; rate and efficiency are those of a table, or on this machine's own device measured. Expect 1.5 times either way
for a device of the table; that the images arrive in time is assumed, and said in images/s.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models_mae import MAE_MODELS, build_mae
from models_vit import VIT_MODELS, Block, build_vit
from util.benchmark import cost
from util.benchmark.devices import RUNTIME_BYTES, Device, measure_device, named_device
from util.mae.masking import visible_count
from util.run import args as flags
from util.run.device import autocast, inference_batch, pick_device
from util.run.errors import UserError, cli
from util.run.log import write_json
from util.training.batch_size import MULTIPLE, SHARE
from util.training.memory import StepMemory, checkpoint_blocks, measure_step
from util.transfer.lora import LoRAConfig, add_lora

GOALS = ("probe", "lora", "finetune", "pretrain")
EPOCHS = {"probe": 50, "lora": 50, "finetune": 50, "pretrain": 400}  # the defaults of the scripts
BATCH = {"probe": 256, "lora": 64, "finetune": 64, "pretrain": 64}
PROBE_VIEWS = 2  # the default of main_linprobe.py
# bytes that fused AdamW and the gradient norm move per trained parameter and step: weight, gradient and two moments
# read, the first and the last two written, the gradient read once more
OPTIMIZER_BYTES = 32
CANVAS = 256  # px, of packed data


@dataclass(frozen=True)
class Plan:
    """What one way to train costs. bytes and seconds; flops: of one image, forward and backward.

    batch: images per process and step, as asked. memory: of a process at that batch; largest: the batch that fits.
    """

    goal: str
    epochs: int
    batch: int
    parameters: int
    trained: int
    flops: int
    images_per_s: float
    seconds_per_epoch: float
    seconds: float
    memory: int
    image_memory: int
    largest: int
    checkpoints: int
    advice: str | None = None


def build(goal: str, args) -> nn.Module:
    """The network as the goal's script trains it, in training mode."""
    size = flags.height_width(args.input_size)
    if goal == "pretrain":
        model = build_mae(f"mae_{args.model}", size)
    else:
        model = build_vit(args.model, img_size=size)
        if goal == "lora":
            add_lora(model, LoRAConfig(args.lora_rank))
        model.head = nn.Linear(model.embed_dim, args.classes)
    return model.requires_grad_(False).eval() if goal == "probe" else model.train()


def training_pass(goal: str, model: nn.Module, device: Device, args) -> Callable[[int], None]:
    """step(batch size): what the goal's script runs between two updates; for a probe, the encoder alone."""
    height, width = flags.height_width(args.input_size)
    cpu = torch.device("cpu")  # tensors without contents are said to lie there

    def loss_of(images: torch.Tensor) -> torch.Tensor:
        if goal == "pretrain":
            noise = torch.rand(len(images), model.num_patches(images))
            return model(images, args.mask_ratio, noise, 1.0)
        return F.cross_entropy(model(images).float(), torch.zeros(len(images), dtype=torch.int64))

    def step(size: int) -> None:
        images = torch.zeros(size, 3, height, width)
        with autocast(cpu, device.precision):
            if goal == "probe":
                with torch.no_grad():
                    model.embed(images)
                return
            loss = loss_of(images)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def step_memory(goal: str, device: Device, args, recompute: bool) -> tuple[StepMemory, int]:
    """Memory of a step beside what is kept between steps, and the bytes of that: libraries, weights, two moments."""
    with FakeTensorMode():
        model = build(goal, args)
        if recompute and goal != "probe":
            checkpoint_blocks(model)
        memory = measure_step(training_pass(goal, model, device, args))
        kept = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
        kept += 2 * sum(value.nbytes for value in model.parameters() if value.requires_grad)
    return memory, kept + int(RUNTIME_BYTES[device.kind])


def most_images(memory: StepMemory, kept: int, device: Device) -> int:
    """The largest batch that fits, as --batch_size auto would choose it; 0 if not one image does."""
    room = int(SHARE * device.memory) - kept
    most = memory.largest(room) if room > 0 else 0
    return most // MULTIPLE * MULTIPLE or most


def flops_per_image(goal: str, args) -> int:
    """Operations that an image costs in an epoch; of a probe in a view, as its epochs cost next to nothing."""
    mae = MAE_MODELS[f"mae_{args.model}"].keywords
    shape = cost.Shape.of(mae)
    height, width = flags.height_width(args.input_size)
    patches = (height // shape.patch) * (width // shape.patch)
    visible = visible_count(patches, args.mask_ratio)
    count = {
        "probe": lambda: cost.embedding(shape, patches),
        "lora": lambda: cost.adapting(shape, patches, args.classes, args.lora_rank),
        "finetune": lambda: cost.finetuning(shape, patches, args.classes),
        "pretrain": lambda: cost.pretraining(shape, patches, visible),
    }[goal]()
    if args.grad_checkpoint and goal != "probe":
        encoded, decoded = (1 + visible, 1 + patches) if goal == "pretrain" else (1 + patches, 0)
        count += cost.recomputing(shape, encoded, decoded)
    return count


def parameters_of(goal: str, args) -> tuple[int, int]:
    """All and the trained parameters."""
    with torch.device("meta"):
        model = build(goal, args)
    if goal == "probe":
        model.head.requires_grad_(True)
    sizes = [(value.numel(), value.requires_grad) for value in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


def make_plan(goal: str, device: Device, args) -> Plan:
    """Count and foresee one goal."""
    parameters, trained = parameters_of(goal, args)
    flops, epochs, batch = flops_per_image(goal, args), args.epochs or EPOCHS[goal], args.batch_size or BATCH[goal]
    if goal == "probe":
        batch = inference_batch(args.batch_size or 64, torch.device(device.kind))
    passes = PROBE_VIEWS if goal == "probe" else epochs
    optimizer = 0.0 if goal == "probe" else trained * OPTIMIZER_BYTES / device.bandwidth / (batch * args.accum_iter)
    per_image = flops / (device.rate * device.efficiency) + optimizer
    memory, kept = step_memory(goal, device, args, args.grad_checkpoint)
    largest = most_images(memory, kept, device)
    # the last checkpoint holds both moments beside what is saved, the best one does not; pre-training saves all weights
    saved = trained if goal in ("lora", "probe") else parameters
    plan = Plan(
        goal, epochs, batch, parameters, trained, flops,
        images_per_s=1 / per_image,
        seconds_per_epoch=per_image * args.images,
        seconds=per_image * args.images * passes,
        memory=kept + memory.peak(batch),
        image_memory=int(memory.per_image.max()),
        largest=largest,
        checkpoints=4 * (2 * saved + 2 * trained),
    )  # fmt: skip
    return plan if batch <= largest else replace(plan, advice=advice(plan, device, args))


def advice(plan: Plan, device: Device, args) -> str:
    """What to do about a batch that does not fit."""
    said = f"{plan.goal}: {plan.batch} images need {_gb(plan.memory)}, {device.name} has {_gb(device.memory)}: "
    remedies = []
    if plan.largest:
        fewest = -(-plan.batch // plan.largest)
        # a number that divides the batch, so that the effective one stays
        times = next((n for n in range(fewest, 2 * fewest) if plan.batch % n == 0), fewest)
        share = f"--batch_size {-(-plan.batch // times)}"
        remedies.append(share if plan.goal == "probe" else f"{share} --accum_iter {times * args.accum_iter}")
    if plan.goal != "probe" and not args.grad_checkpoint:
        memory, kept = step_memory(plan.goal, device, args, recompute=True)
        if most := most_images(memory, kept, device):
            smaller = "" if most >= plan.batch else f" --batch_size {most}"
            needed = _gb(kept + memory.peak(min(most, plan.batch)))
            remedies.append(f"--grad_checkpoint{smaller} ({needed}, about a third more time)")
    return said + (" or ".join(remedies) or "choose a smaller --model or --input_size")


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _pace(images_per_s: float) -> str:
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"


def _duration(seconds: float) -> str:
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds / 86_400:.1f} d"


def table(plans: list[Plan], device: Device, args) -> str:
    """The plans as a Markdown table, and what they rest on."""
    how = "measured here" if device.measured else "as published"
    rows = [
        f"{args.model} at {args.input_size} px, {args.images:,} images, on {device.name}: {device.rate / 1e12:.3g} "
        f"TFLOP/s in {device.precision} {how}, of which {device.efficiency:.0%}; {_gb(device.memory)}",
        "",
        "| goal | epochs | GFLOP/image | images/s | per epoch | total | batch | memory | largest batch | checkpoints |",
        "|" + "---|" * 10,
    ]
    for plan in plans:
        epoch = "" if plan.goal == "probe" else _duration(plan.seconds_per_epoch)
        cells = (
            plan.goal, plan.epochs, f"{plan.flops / 1e9:.3g}", _pace(plan.images_per_s), epoch,
            _duration(plan.seconds), plan.batch, _gb(plan.memory), plan.largest, _gb(plan.checkpoints),
        )  # fmt: skip
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    if any(plan.goal == "probe" for plan in plans):
        rows += ["", f"probe: {PROBE_VIEWS} passes of the encoder; its epochs run on kept embeddings and cost seconds"]
    packed = 3 * CANVAS**2
    rows += [""]
    rows.append(f"disk for the data, packed at {CANVAS} px: {_gb(args.images * packed)} ({packed:,} bytes per image)")
    return "\n".join(rows + [f"does not fit: {plan.advice}" for plan in plans if plan.advice])


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Time, memory and disk of training, before it is begun")
    add = parser.add_argument
    add("--device", default="auto", help="a name such as H100, RTX 5090, M4; cpu, or auto: this machine's, measured")
    add("--measure", action="store_true", help="measure the rate of this machine's device instead of the published one")
    add("--goal", choices=(*GOALS, "all"), default="all", help="how to train")
    add("--model", choices=VIT_MODELS, default="vit_base_patch16", metavar="NAME", help="encoder")
    add("--images", type=flags.count, default=10_000, help="training images")
    add("--epochs", type=flags.count, default=None, help="passes over them; default: 400 to pre-train, else 50")
    add("--batch_size", type=flags.count, default=None, help="images per process and step; default: the script's")
    add("--accum_iter", type=flags.count, default=1, help="batches per optimizer step")
    add("--input_size", type=flags.image_size, default=224, help="px, a side or HEIGHTxWIDTH")
    add("--mask_ratio", type=flags.ratio, default=0.75, help="removed patches in pre-training, fraction in 0..1")
    add("--classes", type=flags.count, default=100, help="identities to tell apart")
    add("--lora_rank", type=flags.count, default=8, help="of each adapter")
    add("--grad_checkpoint", action="store_true", help="recompute blocks: less memory, more time")
    add("--threads", type=flags.count0, default=0, help="CPU threads; 0: as torch chooses")
    add("--validate", action="store_true", help="run short jobs on this machine's device and compare with the plan")
    add("--out", type=Path, default=None, metavar="FILE", help="result file, JSON")
    return parser.parse_args(argv)


def this_device(args, device: torch.device) -> Device:
    """This machine's device, measured on a block of the network."""
    shape = cost.Shape.of(VIT_MODELS[args.model].keywords)
    height, width = flags.height_width(args.input_size)
    tokens, images = 1 + (height // shape.patch) * (width // shape.patch), 32 if device.type == "cuda" else 4
    block = Block(shape.dim, VIT_MODELS[args.model].keywords["num_heads"]).to(device)
    x = torch.randn(images, tokens, shape.dim, device=device, requires_grad=True)
    return measure_device(device, block, x, 3 * images * cost.block(tokens, shape.dim))


def device_of(args) -> Device:
    """The device that is planned for."""
    if args.device in ("cpu", "auto", "cuda", "mps"):
        return this_device(args, pick_device(args.device))
    if args.measure or args.validate:
        here, named = pick_device("auto"), named_device(args.device)
        if here.type != named.kind:
            raise UserError(f"{named.name} is not here to be measured, only a {here.type}: leave out --measure")
        return this_device(args, here)
    return named_device(args.device)


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    device = device_of(args)
    plans = [make_plan(goal, device, args) for goal in (GOALS if args.goal == "all" else [args.goal])]
    result = {"device": asdict(device), "plans": [asdict(plan) for plan in plans]}
    print(table(plans, device, args))
    if args.validate:
        from scripts.plan_validation import validate

        result["validation"] = validate(plans, device, args)
    if args.out:
        write_json(args.out, result)
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
