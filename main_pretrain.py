"""Masked autoencoder pre-training (arXiv 2111.06377), from scratch or domain-adaptive from a checkpoint.

python main_pretrain.py --data_path DIR --model mae_vit_base_patch16 --output_dir RUN
torchrun --nproc_per_node=8 main_pretrain.py --data_path DIR --init official:mae_pretrain_vit_base_full --output_dir RUN
python main_pretrain.py ... --resume auto      # go on where the run was stopped, bit for bit
"""

import torch

from models_mae import MAE_MODELS, MaskedAutoencoder, build_mae, paste
from models_mae_weights import load_mae_weights
from models_perceptual import open_feature_net
from models_vit import unpatchify
from util.benchmark.reconstruction import psnr
from util.data.augment import EvalCrop, TrainCrop, standardize, to_unit
from util.data.augment_batch import pictures
from util.data.face_crop import open_pictures
from util.data.loader import first_held_out, open_loader
from util.data.sheet import sheet
from util.mae.masking import SCHEDULES, Masking, random_mask, visible_count
from util.mae.remedies import PICTURE_LOSSES, PictureLosses
from util.run import args as flags
from util.run.errors import UserError
from util.run.log import RunFolder
from util.run.seed import uniform_for
from util.training.batch_size import settle_batch_size
from util.training.hub import load_weights
from util.training.optim import WarmupCosine, decay_groups, make_optimizer, unfreeze_in_stages
from util.training.session import Session, fit, script

SHOWN = 8  # held-out images in the picture of an epoch


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Masked autoencoder pre-training")
    flags.add_data_args(parser, input_size=224, batch_size=64, auto_batch=True)
    flags.add_optim_args(parser, blr=1.5e-4, epochs=400, warmup_epochs=40, weight_decay=0.05)
    flags.add_runtime_args(parser)
    group = parser.add_argument_group("masked autoencoder")
    group.add_argument(
        "--model", choices=MAE_MODELS, default="mae_vit_base_patch16", metavar="NAME", help=", ".join(MAE_MODELS)
    )
    flags.add_init_arg(group)
    group.add_argument("--mask_ratio", type=flags.ratio, default=0.75, help="removed patches, fraction in 0..1")
    add_masking_args(group)
    group.add_argument(
        "--norm_pix_loss", action="store_true", help="predict patches normalised by their own statistics"
    )
    group.add_argument(
        "--decoder",
        choices=("self", "cross"),
        default="self",
        help="self: the official one; cross: masked patches only read visible ones (CrossMAE), about 1.3 times as fast",
    )
    group.add_argument(
        "--predict_ratio", type=flags.share, default=1.0, help="predicted part of the removed patches, fraction in 0..1"
    )
    group.add_argument(
        "--fill", action="store_true", help="predict the rest by one light layer (PR-MIM); with --predict_ratio below 1"
    )
    add_remedy_args(parser)
    flags.add_crop_arg(group, 0.2)
    flags.add_augment_arg(group)
    flags.add_shard_arg(group)
    flags.add_unfreeze_args(group, first="the decoder")
    group.add_argument("--eval_images", type=flags.count0, default=128, help="held-out images per evaluation; 0: none")
    args = parser.parse_args(argv)
    masking(args)  # refuses what is no strategy before anything is opened
    if args.fill and (args.decoder == "cross" or args.predict_ratio == 1):
        raise UserError("--fill completes a partial prediction: give --predict_ratio below 1, and --decoder self")
    check_remedies(args)
    return args


def add_masking_args(group) -> None:
    """Which patches are removed."""
    group.add_argument(
        "--masking",
        default="random",
        metavar="NAME[:WEIGHT]+...",
        help="random, face, foreground, lineart, green, block, grid, box (of the face's area) or hard (learned), or a "
        "weighted sum such as face:2+lineart; a weight below 0 inverts, as in face:-1",
    )
    group.add_argument(
        "--mask_strength",
        type=flags.rate,
        default=4.0,
        help="log odds of removal between patches of score 1 and 0; 0: random, 1000: nearly always the highest",
    )
    group.add_argument(
        "--mask_random", type=flags.fraction, default=0.5, help="samples masked at random all the same, 0..1"
    )
    group.add_argument(
        "--mask_schedule", choices=SCHEDULES, default="constant", help="the strength rises from 0, or falls to 0"
    )
    group.add_argument(
        "--maps",
        default=None,
        metavar="DIR",
        help="semantic maps of the data (datasets/prepare_maps.py); default: DATA/maps",
    )


def add_remedy_args(parser) -> None:
    """What is done against block artefacts, wrong colours and lost detail."""
    group = parser.add_argument_group("remedies (of the order of the pixel loss at a weight of 1; 0: off)")
    add = group.add_argument
    add("--multiscale_loss", type=flags.rate, default=0.0, metavar="W", help="weight: error of cells of 2, 4, 8 px")
    add("--frequency_loss", type=flags.rate, default=0.0, metavar="W", help="weight: error of Fourier amplitudes")
    add("--colour_loss", type=flags.rate, default=0.0, metavar="W", help="weight: error of channels' mean and spread")
    add("--feature_loss", type=flags.rate, default=0.0, metavar="W", help="weight: distance of a network's features")
    add("--feature_net", metavar="NET", help="that network: own:CHECKPOINT, timm:NAME or timm:NAME=FILE")
    add("--refine", action="store_true", help="mend the borders of predicted patches by convolutions, 5 %% more work")


def check_remedies(args) -> None:
    """UserError for remedies without what they need, and together with what leaves them no picture to work on."""
    if bool(args.feature_loss) != bool(args.feature_net):
        raise UserError("--feature_loss and --feature_net need each other: give both, or neither")
    given = [f"--{name}_loss" for name in PICTURE_LOSSES if getattr(args, f"{name}_loss")] + ["--refine"] * args.refine
    if given and args.norm_pix_loss:
        raise UserError(f"{given[0]} works on pixels, and --norm_pix_loss predicts none: leave one of them out")
    if given and args.predict_ratio < 1:
        raise UserError(f"{given[0]} works on whole pictures: leave out --predict_ratio (and --fill)")


class HeldOut:
    """Fixed held-out images under fixed masks: their loss, their PSNR, and a picture of the first few.

    The processes share the images out, and all of them return the figures of all images.
    """

    def __init__(self, args, here: Session):
        crop = EvalCrop(flags.height_width(args.input_size))
        images = [crop(picture, record) for picture, record in first_held_out(args, here.run.say)]
        self.count, self.index = len(images), torch.tensor(here.world.rows(len(images)))
        self.images, self.args, self.here = torch.stack(images)[self.index], args, here

    def __call__(self, model, epoch: int) -> dict[str, float]:
        world, device = self.here.world, self.here.device
        count = min(SHOWN, self.count)
        figures, few, wanted = [], [], len(world.rows(count))
        for own in torch.arange(len(self.images)).split(self.args.batch_size):
            images = to_unit(self.images[own].to(device))
            noise = uniform_for(self.args.seed, 0, self.index[own].to(device), model.num_patches(images))
            shown = model.reconstruct(images, random_mask(noise, self.args.mask_ratio)) | {"images": images}
            figures.append(torch.stack([shown["loss"], psnr(images, shown["pasted"])]))
            if own[0] < wanted:
                few.append({name: shown[name] for name in ("images", "pred", "pasted", "mask")})
        loss, psnr_db = (world.collect(values)[: self.count].mean().item() for values in torch.cat(figures, dim=1))
        few = {name: torch.cat([part[name] for part in few])[:wanted] for name in few[0]}
        few = {name: world.collect(values)[:count].cpu() for name, values in few.items()}
        if world.is_main:
            self._draw(few, epoch, psnr_db)
        return {"loss": loss, "psnr_db": psnr_db}

    def _draw(self, shown: dict, epoch: int, psnr_db: float) -> None:
        masked = torch.where(shown["mask"] > 0, 0.5, shown["images"])
        titles = ("original", "masked", "reconstruction", "with visible")
        note = "  (oracle statistics)" if self.args.norm_pix_loss else ""
        picture = sheet(
            list(zip(shown["images"], masked, shown["pred"], shown["pasted"], strict=True)),
            column_titles=titles,
            title=f"epoch {epoch}, {self.args.mask_ratio:.0%} masked, PSNR {psnr_db:.2f} dB{note}",
        )
        self.here.run.picture("reconstruction", picture, epoch)


def build_model(args, run: RunFolder, fresh: bool) -> torch.nn.Module:
    """The model; for a fresh run with its start weights, and a word on where they come from."""
    torch.manual_seed(args.seed)
    size = flags.height_width(args.input_size)
    options = {"decoder": args.decoder, "fill": args.fill, "hard": masking(args).hard, "refine": args.refine}
    model = build_mae(args.model, size, args.norm_pix_loss, **options)
    if not fresh:
        return model
    if not args.init:
        run.say("weights: random (no --init)")
        return model
    weights = load_weights(args.init)
    missing = load_mae_weights(model, weights)
    whole = ("the decoder",) if "mask_token" in missing else ()
    parts = whole or sorted({name.split(".")[0] for name in missing})
    run.say(f"weights: {weights.source}" + (f"; {' and '.join(parts)} starts fresh" if missing else ""))
    return model


def train_crop(args) -> TrainCrop:
    """The augmentation that the flags describe."""
    return TrainCrop(flags.height_width(args.input_size), scale=(args.min_crop, 1.0))


def masking(args) -> Masking:
    """The masking strategy that the flags describe."""
    return Masking(
        args.masking,
        strength=args.mask_strength,
        random_share=args.mask_random,
        schedule=args.mask_schedule,
        epochs=args.epochs,
        seed=args.seed,
    )


def picture_losses(args, mae: MaskedAutoencoder, device: torch.device) -> PictureLosses:
    """What the flags add to the pixel loss."""
    net = open_feature_net(args.feature_net, args.input_size).to(device) if args.feature_net else None
    return PictureLosses({name: getattr(args, f"{name}_loss") for name in PICTURE_LOSSES}, mae.patch_size, net)


def step_fn(args, mae: MaskedAutoencoder, added: PictureLosses | None = None):
    """One step's loss: masks are drawn from (seed, epoch, sample index), on the device.

    mae: the model itself, which `step` may be handed wrapped. added: what joins the pixel loss.
    """
    crop, strategy = train_crop(args), masking(args)

    def step(model, batch: dict) -> dict[str, torch.Tensor]:
        images = pictures(batch, crop)
        hard = mae.hardness(images) if strategy.hard else None
        grid = mae.grid_of(*images.shape[-2:])
        noise = strategy.order(images, grid, batch["epoch"], batch["index"], batch.get("maps"), hard)
        images = standardize(images)
        if not added:
            return {"loss": model(images, args.mask_ratio, noise, args.predict_ratio)}
        loss, pred, mask = model(images, args.mask_ratio, noise)
        picture = unpatchify(pred.float(), mae.patch_size, grid)
        return added(loss, images, *paste(images, picture, mask, mae.patch_size))

    return step


def count_images(args) -> int:
    """The size of the training set; a stream of unknown length is refused when it is opened."""
    return (args.epoch_images or 1) if args.streaming else len(open_pictures(args, "train"))


def pretrain(args, here: Session) -> None:
    """Set up, resume, train, and write results.json."""
    model = here.placed(build_model(args, here.run, fresh=here.resume_from is None))
    patches = model.grid[0] * model.grid[1]
    if not 0 < visible_count(patches, args.mask_ratio) < patches:
        raise UserError(f"--mask_ratio {args.mask_ratio:g} of {patches} patches leaves none to see or none to predict")
    added = picture_losses(args, model, here.device)
    step, maps = step_fn(args, model, added), masking(args).maps

    def blank_step(model, batch: dict) -> dict[str, torch.Tensor]:
        """A step on made-up pictures, to see what memory it takes."""
        blank = torch.zeros(len(batch["index"]), len(maps), *model.grid, dtype=torch.uint8, device=here.device)
        return step(model, {**batch, "maps": blank} if maps else batch)

    settle_batch_size(args, here, model, blank_step, lambda: count_images(args))
    loader = open_loader(args, train_crop(args), here.world, here.device, maps, model.grid)
    evaluate = HeldOut(args, here) if args.eval_images else None
    lr = args.lr if args.lr is not None else args.blr * loader.step_images / 256
    stage = None
    if args.unfreeze_every:
        stage = unfreeze_in_stages(model, args.unfreeze_every, args.unfreeze_blocks, ("decoder", "mask_token"))
    results = fit(
        here,
        f"{args.model} at {args.input_size} px, lr {lr:.3g},",
        model=model,
        step_fn=step,
        loader=loader,
        optimizer=make_optimizer(decay_groups(model.named_parameters(), args.weight_decay), lr, here.device),
        schedule=WarmupCosine(lr, args.min_lr, round(args.warmup_epochs * loader.steps), args.epochs * loader.steps),
        evaluate=evaluate,
        stage=stage,
        notes={"feature_net": added.features.fingerprint} if args.feature_net else {},
    )
    if results:
        here.run.results(results)


main = script(get_args, pretrain)

if __name__ == "__main__":
    main()
