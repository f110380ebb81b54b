"""Anime face detection on a backbone: frozen, with LoRA adapters, or all of it learning.

python main_detect.py --data_path DIR --model vit_base_patch16 --init W --output_dir RUN
python main_detect.py ... --train lora --rank 8        # or --train frozen
python main_detect.py ... --model timm:resnet50 --init timm:resnet50      # the convolutional baseline
"""

from itertools import chain

import torch

from models_detect import KIND, WAYS, Detector, PictureDetector, build_detector
from models_transfer import MODEL_NAMES
from util.benchmark.detection import Finds, headline
from util.data.augment import to_unit
from util.data.images import BadImage
from util.data.loader import TrainLoader, loader_options
from util.data.scenes import Scenes, SceneView
from util.data.sources import open_source
from util.run import args as flags
from util.run.errors import UserError
from util.training.optim import decay_groups, make_optimizer, transfer_groups
from util.training.session import Session, fit, script
from util.transfer.recipe import BETAS, add_lora_args, base_rate, cosine


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Anime face detection on a pre-trained backbone")
    flags.add_data_args(parser, input_size=512, batch_size=16, streams=False)
    flags.add_optim_args(parser, lr=1e-4, epochs=50, warmup_epochs=1, weight_decay=0.05, min_lr=1e-6)
    flags.add_runtime_args(parser)
    parser.set_defaults(clip_grad=1.0)
    group = parser.add_argument_group("detector")
    group.add_argument("--model", default="vit_base_patch16", metavar="NAME", help=MODEL_NAMES)
    flags.add_init_arg(group)
    group.add_argument("--train", choices=WAYS, default="full", help="what of the backbone learns")
    group.add_argument("--head_lr", type=flags.positive, default=1e-3, help="rate of pyramid and head, absolute")
    group.add_argument(
        "--layer_decay", type=flags.fraction, default=1.0, help="rate of a layer against the one above, 0..1"
    )
    group.add_argument("--drop_path", type=flags.ratio, default=0.0, help="stochastic depth of the last block, 0..1")
    group.add_argument("--width", type=flags.count, default=256, help="channels of pyramid and head: 64, 96, 128, ...")
    group.add_argument("--convs", type=flags.count, default=4, help="layers of each tower of the head")
    add_lora_args(parser)
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--scale_jitter", type=flags.positive, nargs=2, default=(0.5, 2.0), metavar=("LOW", "HIGH"),
        help="pictures are scaled to fit the input, times a factor between these",
    )  # fmt: skip
    group.add_argument("--color_jitter", type=flags.fraction, default=0.2, help="change of brightness and so on, 0..1")
    args = parser.parse_args(argv)
    if args.scale_jitter[0] > args.scale_jitter[1]:
        raise UserError("--scale_jitter goes from low to high: give the smaller factor first")
    if args.face_padding is not None:
        raise UserError("--face_padding cuts the faces out that are to be found: leave it out")
    return args


def open_scenes(args, role: str) -> Scenes:
    """The pictures for a role with all their faces."""
    return Scenes(open_source(args.data_path, role, labels=args.labels, val_fraction=args.val_fraction))


def targets_of(batch: dict) -> list[dict]:
    """What FCOS learns from: the boxes of each picture, without the rows that fill up the batch."""
    parts = zip(batch["boxes"], batch["labels"], batch["known"], strict=True)
    return [
        {"boxes": boxes[labels >= 0], "labels": labels[labels >= 0], "known": known} for boxes, labels, known in parts
    ]


def step(model, batch: dict) -> dict[str, torch.Tensor]:
    """The loss of a step, and its parts: class, box, and how central a place is in its box."""
    losses = model(to_unit(batch["image"]), targets_of(batch))
    return {"loss": sum(losses.values()), **{name: value.detach() for name, value in losses.items()}}


def parameter_groups(model: Detector, args, lr: float) -> list[dict]:
    """The backbone at --lr, its layers by --layer_decay; pyramid and head at --head_lr."""
    own = [(name, p) for name, p in model.named_parameters() if not name.startswith("backbone.net.")]
    fresh = [{**group, "lr_scale": args.head_lr / lr} for group in decay_groups(own, args.weight_decay)]
    return transfer_groups(model.backbone.net, args.weight_decay, layer_decay=args.layer_decay) + fresh


class Validation:
    """Average precision on held-out pictures, at the size of training.

    The processes share the pictures out, and all of them return the figures of all pictures.
    """

    def __init__(self, here: Session, scenes: Scenes):
        self.here, self.scenes = here, scenes

    def __call__(self, model: Detector, epoch: int = 0) -> dict[str, float]:
        size, world = max(flags.height_width(self.here.args.input_size)), self.here.world
        finder = PictureDetector(model, self.here.device, size, self.here.args.precision)
        own = {i: self._seen(finder, i) for i in range(world.rank, len(self.scenes), world.size)}
        shares = world.gather_objects(own)

        def figures() -> dict[str, float]:
            seen = [each for _, each in sorted(chain.from_iterable(share.items() for share in shares))]
            for reason in (each for each in seen if isinstance(each, str)):
                self.here.run.say(f"left out of the evaluation: {reason}")
            pairs = [each for each in seen if not isinstance(each, str)]
            return headline([truth for truth, _ in pairs], [found for _, found in pairs])

        return world.from_main(figures)

    def _seen(self, finder: PictureDetector, i: int) -> tuple[dict, Finds] | str:
        """What there is on picture `i`, and what is found; the reason for one that cannot be read."""
        try:
            (found,) = finder.detect([self.scenes.load(i)])
        except BadImage as error:
            return str(error)
        return self.scenes.record(i), found


def detect(args, here: Session) -> None:
    """Data, model, and the shared loop."""
    train, val = open_scenes(args, "train"), open_scenes(args, "val")
    model = build_detector(vars(args), here.run.say, weights=here.resume_from is None).to(here.device)
    size = flags.height_width(args.input_size)
    if any(side % model.multiple for side in size):
        raise UserError(
            f"--input_size {args.input_size} does not divide by {model.multiple} px: choose a multiple of it"
        )
    view = SceneView(size, train.most, tuple(args.scale_jitter), args.color_jitter)
    loader = TrainLoader(train, view, **loader_options(args, here.world, here.device))
    lr = base_rate(args, loader.step_images)
    results = fit(
        here,
        f"{args.model} ({args.train}) at {args.input_size} px, {train.faces} faces, lr {lr:.3g},",
        model=model,
        step_fn=step,
        loader=loader,
        optimizer=make_optimizer(parameter_groups(model, args, lr), lr, here.device, BETAS),
        schedule=cosine(args, lr, loader.steps),
        evaluate=Validation(here, val),
        best_of=("ap50", "max"),
        notes={"kind": KIND},
    )
    if results:
        here.run.results(results)


main = script(get_args, detect)

if __name__ == "__main__":
    main()
