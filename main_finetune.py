"""Full fine-tuning on anime characters: every weight learns. Also trains the supervised baselines.

python main_finetune.py --data_path DIR --model vit_base_patch16 --init W --output_dir RUN
python main_finetune.py --data_path DIR --model timm:resnet50 --init timm:resnet50 --head arcface --output_dir RUN
python main_finetune.py ... --label_fraction 0.05      # a part of the labels, the same share of each character
"""

from models_transfer import MODEL_NAMES, attach_head, load_head, start_backbone
from util.data.labels import open_labelled
from util.run import args as flags
from util.run.errors import UserError
from util.training.optim import transfer_groups, unfreeze_in_stages
from util.training.session import Session, script
from util.transfer.recipe import add_training_args, add_transfer_args, transfer


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Full fine-tuning on labelled pictures")
    add_transfer_args(
        parser,
        model_names=MODEL_NAMES,
        batch_size=64,
        epochs=50,
        warmup_epochs=2,
        lr=5e-5,
        min_lr=1e-5,
        weight_decay=0.05,
    )
    add_training_args(parser, head_lr=2e-4, mixes=True)
    group = parser.add_argument_group("full fine-tuning")
    group.add_argument(
        "--layer_decay", type=flags.fraction, default=1.0, help="rate of a layer against the one above, 0..1"
    )
    group.add_argument(
        "--head_init", default=None, metavar="FILE", help="checkpoint of a probe to take the head from; default: fresh"
    )
    group.add_argument("--drop_path", type=flags.ratio, default=0.0, help="stochastic depth of the last block, 0..1")
    flags.add_unfreeze_args(group, first="the head")
    return parser.parse_args(argv)


def finetune(args, here: Session) -> None:
    """Data, model, what learns when, and the shared recipe."""
    task = open_labelled(args)
    # a resumed run finds its weights in its checkpoint
    model = start_backbone(vars(args), here.run.say, weights=here.resume_from is None)
    attach_head(model, vars(args), len(task.classes))
    if args.head_init and not here.resume_from:
        load_head(model, args.head_init, task.classes)
    if not hasattr(model, "blocks") and (args.layer_decay < 1 or args.unfreeze_every):
        raise UserError(f"{args.model} has no transformer blocks: leave out --layer_decay and --unfreeze_every")
    if args.unfreeze_every and args.patience:
        raise UserError("--patience could end the run before everything is unfrozen: leave out it or --unfreeze_every")
    stage = None
    if args.unfreeze_every:
        stage = unfreeze_in_stages(model, args.unfreeze_every, args.unfreeze_blocks, ("head.", "fc_norm."))
    transfer(
        here,
        task,
        model,
        lambda lr: transfer_groups(
            model, args.weight_decay, head_scale=args.head_lr / lr, layer_decay=args.layer_decay
        ),
        stage=stage,
    )


main = script(get_args, finetune)

if __name__ == "__main__":
    main()
