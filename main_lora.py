"""LoRA on anime characters (arXiv 2106.09685): a frozen encoder with small trained adapters, and a head.

python main_lora.py --data_path DIR --model vit_base_patch16 --init W --rank 8 --output_dir RUN
python scripts/export.py --help       # a plain network with the adapters in its weights, or a PEFT folder
"""

from dataclasses import asdict

from models_transfer import MODEL_NAMES, attach_head, start_backbone
from util.data.labels import open_labelled
from util.run import args as flags
from util.training.optim import transfer_groups
from util.training.session import Session, script
from util.transfer.lora import LoRAConfig, add_lora, count_parameters, is_adapter
from util.transfer.recipe import add_lora_args, add_training_args, add_transfer_args, transfer


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("LoRA fine-tuning on labelled pictures")
    add_transfer_args(
        parser,
        model_names=MODEL_NAMES,
        batch_size=64,
        epochs=50,
        warmup_epochs=2,
        lr=5e-5,
        min_lr=1e-6,
        weight_decay=1e-4,
        color_jitter=0.1,
    )
    add_training_args(parser, head_lr=2e-4, mixes=False)
    add_lora_args(parser)
    return parser.parse_args(argv)


def adapt(args, here: Session) -> None:
    """Data, frozen model, adapters and head, and the shared recipe."""
    config = LoRAConfig(args.rank, args.alpha, tuple(args.lora_targets), args.lora_dropout)
    config.validate()
    task = open_labelled(args)
    model = start_backbone(vars(args), here.run.say)
    full = sum(parameter.numel() for parameter in model.parameters())
    add_lora(model, config)
    attach_head(model, vars(args), len(task.classes))
    trainable, total = count_parameters(model)
    head = sum(parameter.numel() for parameter in model.head.parameters())
    here.run.say(
        f"{trainable:,} of {total:,} parameters are trainable: {trainable - head:,} in adapters, {head:,} in the head, "
        f"{1 - trainable / (full + head):.1%} fewer than in full fine-tuning"
    )
    transfer(
        here,
        task,
        model,
        lambda lr: transfer_groups(model, args.weight_decay, head_scale=args.head_lr / lr),
        saved=lambda name: is_adapter(name) or name.startswith("head."),
        notes={"base": model.origin, "lora": asdict(config)},
    )


main = script(get_args, adapt)

if __name__ == "__main__":
    main()
