"""SimCLR pre-training (arXiv 2002.05709) of any backbone: two views of a picture shall lie near each other.

python main_simclr.py --data_path DIR --model vit_base_patch16 --output_dir RUN
python main_simclr.py --data_path DIR --model timm:resnet50 --head_norm batch --opt lars --output_dir RUN
torchrun --nproc_per_node=8 main_simclr.py --data_path DIR --output_dir RUN     # all pictures of a step are negatives
python main_linprobe.py --data_path DIR --model vit_base_patch16 --init RUN/checkpoint-last.pth --output_dir PROBE

Labels are not looked at, but for a figure of the evaluation where there are some.
"""

import numpy as np
import torch
import torch.nn.functional as F

from models_transfer import MODEL_NAMES, start_backbone
from models_vit import Backbone
from util.data.augment import EvalCrop, TrainCrop, to_unit
from util.data.loader import first_held_out, open_loader
from util.data.sheet import sheet
from util.run import args as flags
from util.run.dist import World
from util.run.errors import UserError
from util.run.files import write_atomically
from util.run.log import RunFolder
from util.run.seed import rng_for
from util.simclr.head import NORMS, ProjectionHead, share_batch_statistics
from util.simclr.loss import nt_xent
from util.simclr.views import TwoViews, view_batch
from util.training.optim import LARS, WarmupCosine, make_optimizer, transfer_groups
from util.training.session import Session, fit, script

# AdamW's are those of other contrastive training of vision transformers (arXiv 2104.02057); LARS has SimCLR's
RECIPES = {"adamw": {"blr": 5e-4, "weight_decay": 0.05}, "lars": {"blr": 0.3, "weight_decay": 1e-6}}
BETAS = (0.9, 0.999)
SHOWN = 8  # held-out pictures whose views are drawn


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("SimCLR pre-training")
    flags.add_data_args(parser, input_size=224, batch_size=256)
    flags.add_optim_args(parser, epochs=400, warmup_epochs=10, weight_decay=None)
    flags.add_runtime_args(parser)
    group = parser.add_argument_group("SimCLR")
    group.add_argument("--model", default="vit_base_patch16", metavar="NAME", help=MODEL_NAMES)
    flags.add_init_arg(group)
    group.add_argument(
        "--opt",
        choices=RECIPES,
        default="adamw",
        help="its own defaults: adamw has --blr 5e-4 and --weight_decay 0.05, lars 0.3 and 1e-6",
    )
    group.add_argument(
        "--temperature",
        type=flags.positive,
        default=0.2,
        help="of the loss, usually 0.1..0.5: small ones look at the nearest negatives alone",
    )
    group.add_argument(
        "--head_norm",
        choices=NORMS,
        default="layer",
        help="of the projection head; batch is the published one, and with several processes needs CUDA",
    )
    group.add_argument("--eval_images", type=flags.count0, default=256, help="held-out images per evaluation; 0: none")
    add_view_args(parser)
    args = parser.parse_args(argv)
    args.global_pool = True  # what is trained is the mean of the patch tokens; transfer reads it here
    for name, value in RECIPES[args.opt].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.accum_iter > 1:
        raise UserError("--accum_iter adds up losses that know no negatives of each other: raise --batch_size instead")
    return args


def add_view_args(parser) -> None:
    """What happens to a picture on its way to a view."""
    group = parser.add_argument_group("views")
    flags.add_crop_arg(group, 0.08)
    flags.add_augment_arg(group)
    group.add_argument(
        "--color_jitter",
        type=flags.fraction,
        default=0.8,
        help="change of brightness, contrast and saturation, in 80 %% of views, fraction in 0..1",
    )
    group.add_argument(
        "--hue",
        type=flags.number(float, 0.0, 0.5),
        default=0.0,
        help="turn of the hue beside it, either way, fraction of the circle in 0..0.5; SimCLR has 0.2, here it is off: "
        "the views of a character with pink hair and of one with blue hair would be told to be alike",
    )
    group.add_argument(
        "--grey",
        type=flags.fraction,
        default=0.0,
        help="share of views without colour, fraction in 0..1; SimCLR has 0.2, here it is off for the same reason",
    )
    group.add_argument(
        "--blur",
        type=flags.fraction,
        default=0.5,
        help="share of views that are blurred, by 0.1 to 2 px at 224 px and less at smaller sizes, fraction in 0..1",
    )


def two_views(args) -> TwoViews:
    """The augmentation that the flags describe."""
    crop = TrainCrop(flags.height_width(args.input_size), scale=(args.min_crop, 1.0))
    return TwoViews(crop, jitter=args.color_jitter, hue=args.hue, grey=args.grey, blur=args.blur)


def build_model(args, here: Session) -> Backbone:
    """The backbone with its start weights, if the run is a fresh one, and a projection head in the place of its head.

    So its names are those of every backbone, and whoever loads its checkpoint leaves out `head.` and nothing else.
    """
    model = start_backbone(vars(args), here.run.say, weights=here.resume_from is None)
    torch.manual_seed(args.seed)
    model.head = ProjectionHead(model.embed_dim, args.head_norm)
    return share_batch_statistics(model, here.world, here.device).to(here.device)


def step_fn(args, world: World):
    """One step's loss over the views of all processes."""
    views = two_views(args)

    def step(model, batch: dict) -> dict[str, torch.Tensor]:
        loss, top1 = nt_xent(model(view_batch(batch, views)), args.temperature, world)
        return {"loss": loss, "top1": top1}

    return step


class HeldOut:
    """Fixed views of held-out pictures: their loss, and how many views find their partner among all others.

    Where pictures have identities, also how many have a nearest neighbour of their own identity (`nn_top1`), among
    those that could.
    """

    def __init__(self, args, run: RunFolder, device: torch.device):
        views, crop = two_views(args), EvalCrop(flags.height_width(args.input_size))
        pairs, plain, identities = [], [], []
        for number, (picture, record) in enumerate(first_held_out(args, run.say)):
            pairs.append(views(picture, record, rng_for(args.seed, number, "held-out views")))
            plain.append(crop(picture, record))
            identities.append(record.get("identity"))
        if len(pairs) < 2:
            raise UserError(f"{args.data_path} has one held-out image, and none to tell it from: give --eval_images 0")
        self.views, self.plain = torch.stack(pairs).transpose(0, 1).flatten(0, 1), torch.stack(plain)
        self.identities = np.array([name or "" for name in identities])
        self.args, self.device = args, device

    def draw(self):
        """The first few pictures and their views, a PIL image."""
        count = len(self.plain)
        trios = [(self.plain[i], self.views[i], self.views[count + i]) for i in range(min(SHOWN, count))]
        rows = [sum(trios[i : i + 2], ()) for i in range(0, len(trios), 2)]
        return sheet(rows, column_titles=("picture", "first view", "second view") * 2)

    @torch.inference_mode()
    def __call__(self, model: Backbone, epoch: int) -> dict[str, float]:
        projections = self._map(model, self.views)
        loss, top1 = nt_xent(projections, self.args.temperature)
        found = {"loss": loss.item(), "top1": top1.item()}
        same = self.identities[:, None] == self.identities
        np.fill_diagonal(same, False)
        known = same.any(1) & (self.identities != "")
        if known.any():
            embeddings = F.normalize(self._map(model.embed, self.plain).float())
            nearest = (embeddings @ embeddings.T).fill_diagonal_(-2).argmax(1).cpu().numpy()
            found["nn_top1"] = float(same[np.arange(len(same)), nearest][known].mean())
        return found

    def _map(self, network, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([network(to_unit(part.to(self.device))) for part in images.split(self.args.batch_size)])


def pretrain(args, here: Session) -> None:
    """Set up, resume, train, and write results.json."""
    if args.batch_size * here.world.size < 2:
        raise UserError("one picture per step has no negatives: raise --batch_size")
    model = build_model(args, here)
    loader = open_loader(args, two_views(args), here.world, here.device)
    evaluate = HeldOut(args, here.run, here.device) if args.eval_images and here.world.is_main else None
    if evaluate:
        write_atomically(here.run.path / "views.png", lambda path: evaluate.draw().save(path, format="PNG"))
    lr = args.lr if args.lr is not None else args.blr * loader.step_images / 256
    groups = transfer_groups(model, args.weight_decay)
    optimizer = LARS(groups, lr) if args.opt == "lars" else make_optimizer(groups, lr, here.device, BETAS)
    results = fit(
        here,
        f"{args.model} at {args.input_size} px, {args.opt}, lr {lr:.3g},",
        model=model,
        step_fn=step_fn(args, here.world),
        loader=loader,
        optimizer=optimizer,
        schedule=WarmupCosine(lr, args.min_lr, round(args.warmup_epochs * loader.steps), args.epochs * loader.steps),
        evaluate=evaluate,
    )
    if results:
        here.run.results(results)


main = script(get_args, pretrain)

if __name__ == "__main__":
    main()
