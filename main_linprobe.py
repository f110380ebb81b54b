"""Linear probe: a frozen encoder and a linear or shallow MLP head, at several learning rates side by side.

python main_linprobe.py --data_path DIR --model vit_base_patch16 --init W --output_dir RUN

The encoder sees each view of each image once, not once per epoch; its embeddings are kept on disk, and every later
probe of the same weights and data begins at once.
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from models_transfer import MODEL_NAMES, attach_head, start_backbone
from models_vit import Backbone
from util.data.augment import EvalCrop
from util.data.labels import Labelled, open_labelled
from util.run import args as flags
from util.run.errors import UserError
from util.training.checkpoint import read_checkpoint
from util.training.optim import decay_groups, make_optimizer
from util.training.pretrained import fingerprint_of
from util.training.session import Session, fit, script
from util.transfer.features import FeatureLoader, Features, cached_features
from util.transfer.recipe import BETAS, add_transfer_args, base_rate, cosine, report, score, train_view

MOST_RATES = 8


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Linear probe of a frozen encoder on labelled pictures")
    add_transfer_args(
        parser,
        model_names=MODEL_NAMES,
        heads=("linear", "mlp"),
        batch_size=256,
        auto_batch=False,
        epochs=50,
        warmup_epochs=0,
        lr=1e-3,
        weight_decay=0.0,
    )
    group = parser.add_argument_group("probe")
    group.add_argument("--views", type=flags.count, default=2, help="random crops of each image; epochs take turns")
    group.add_argument(
        "--lr_grid",
        type=flags.positive,
        nargs="+",
        default=[0.3, 1.0, 3.0, 10.0, 30.0],
        metavar="X",
        help="factors of the learning rate, trained side by side; the best on validation is kept",
    )
    group.add_argument(
        "--head_norm",
        action="store_true",
        help="standardise the embeddings by a batch norm, as the official probe does",
    )
    group.add_argument(
        "--balanced", action="store_true", help="draw every identity equally often, however many images it has"
    )
    group.add_argument(
        "--feature_cache", default=None, metavar="DIR", help="where embeddings are kept; default: features/ beside RUN"
    )
    return parser.parse_args(argv)


class Heads(nn.Module):
    """A head for each learning rate, on the same embeddings."""

    def __init__(self, heads: list[nn.Module]):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, embeddings: torch.Tensor) -> list[torch.Tensor]:
        """(N, D) -> scores (N, C) of each head."""
        return [head(embeddings) for head in self.heads]


def probe_step(model: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    """The sum of the heads' losses: each head's gradient is that of its own."""
    losses = [F.cross_entropy(logits.float(), batch["label"]) for logits in model(batch["features"])]
    return {"loss": torch.stack(losses).sum()}


class Choice:
    """Validation of all heads; it remembers which was the best."""

    def __init__(self, features: Features, labels: torch.Tensor, rates: list[float], device: torch.device):
        good = features.readable
        self.features, self.labels = features.embeddings[good].to(device), labels[good]
        self.rates, self.best = rates, 0

    @torch.inference_mode()
    def __call__(self, model: Heads, epoch: int) -> dict[str, float]:
        logits = [scores.float().cpu() for scores in model(self.features)]
        right = [(scores.argmax(dim=1) == self.labels).sum().item() for scores in logits]
        losses = [F.cross_entropy(scores, self.labels).item() for scores in logits]
        self.best = max(range(len(logits)), key=lambda number: (right[number], -losses[number]))
        return {**score(logits[self.best], self.labels), "lr": self.rates[self.best]}


class Frozen:
    """The embeddings of a task's images by a frozen encoder, from the cache or computed into it."""

    def __init__(self, here: Session, task: Labelled, model: Backbone):
        args = here.args
        self.here, self.task, self.model, self.weights = here, task, model, fingerprint_of(model.state_dict())
        self.cache = Path(args.feature_cache) if args.feature_cache else Path(args.output_dir).parent / "features"

    def views(self, count: int) -> list[Features]:
        """Random views of the training images."""
        return [self._features("train", train_view(self.here.args), view) for view in range(count)]

    def held_out(self, role: str) -> Features:
        """The one view of the "val" or "test" images; damaged ones are named."""
        features = self._features(role, EvalCrop(flags.height_width(self.here.args.input_size)))
        for _, path, reason in features.bad:
            self.here.run.say(f"left out of the evaluation: {path}: {reason}")
        return features

    def labels(self, role: str) -> torch.Tensor:
        """Class numbers (N,) int64."""
        return torch.from_numpy(self.task.labels(getattr(self.task, role)))

    def _features(self, role: str, transform, view: int = 0) -> Features:
        source = getattr(self.task, role)
        return cached_features(
            self.here, self.cache, self.model, self.weights, source, transform, view, f"{role} images"
        )


def probe(args, here: Session) -> None:
    """Data, frozen encoder, its embeddings, and heads at several rates on them."""
    if len(args.lr_grid) > MOST_RATES:
        raise UserError(f"--lr_grid has {len(args.lr_grid)} factors: give at most {MOST_RATES}")
    if args.clip_grad is not None:
        raise UserError("--clip_grad would tie the learning rates of the grid together: leave it out")
    task = open_labelled(args)
    model = start_backbone(vars(args), here.run.say).to(here.device).eval().requires_grad_(False)
    frozen = Frozen(here, task, model)
    views = frozen.views(args.views)
    loader = FeatureLoader(
        views, frozen.labels("train").numpy(), task.train.fingerprint,
        batch_size=args.batch_size, accum_iter=args.accum_iter, seed=args.seed, world=here.world,
        balanced=args.balanced,
    )  # fmt: skip
    if args.head_norm and loader.batch_size == 1:
        raise UserError("--head_norm needs batches of two images or more: raise --batch_size, or leave it out")
    lr = base_rate(args, loader.step_images)
    heads = Heads([attach_head(model, vars(args), len(task.classes)) for _ in args.lr_grid]).to(here.device)
    choice = Choice(frozen.held_out("val"), frozen.labels("val"), [lr * x for x in args.lr_grid], here.device)
    groups = [
        {**group, "lr_scale": factor}
        for head, factor in zip(heads.heads, args.lr_grid, strict=True)
        for group in decay_groups(head.named_parameters(), args.weight_decay)
    ]
    started = time.perf_counter()
    results = fit(
        here,
        f"{args.model}, {len(args.lr_grid)} {args.head} probes of {len(task.classes)} identities, lr {lr:.3g},",
        model=heads,
        step_fn=probe_step,
        loader=loader,
        optimizer=make_optimizer(groups, lr, here.device, BETAS),
        schedule=cosine(args, lr, loader.steps),
        evaluate=choice if here.world.is_main else None,
        best_of=("top1", "max"),
        patience=args.patience,
        best_state=lambda: {f"head.{name}": value for name, value in heads.heads[choice.best].state_dict().items()},
        notes={"classes": list(task.classes), "base": model.origin},
    )
    if results:
        results |= costs(here, model, views, results, time.perf_counter() - started)
        if results["finished"] and task.test is not None:
            results["test"] = test_best(here, frozen)
        report(here, task, results)


def costs(here: Session, model: Backbone, views: list[Features], results: dict, seconds: float) -> dict:
    """What a probe costs, as one would compare it with the other methods: the encoder's passes count.

    results: what the loop says of the heads. seconds: what their training took in this process, all in all.
    """
    encoder = sum(view.seconds for view in views)
    total, epochs = encoder + results["train_seconds"], results["epochs"]
    figures = {
        "trainable_params": sum(parameter.numel() for parameter in model.head.parameters()),
        "total_params": sum(parameter.numel() for parameter in model.parameters()),
        "seconds_per_epoch": total / max(epochs, 1),
        "images_per_s": results["images_seen"] / total,
        "peak_memory_bytes": max(results["peak_memory_bytes"], *(view.peak_memory_bytes for view in views)),
        "encoder_pass_seconds": views[0].seconds,
    }
    if results["finished"] and not here.resume_from:  # else a part of the time was spent in another process
        figures["heads_seconds"] = seconds
        figures["speedup_over_rerunning"] = epochs * views[0].seconds / (encoder + seconds)
        here.run.say(
            f"{epochs} epochs cost {len(views)} passes of the encoder and {seconds:.1f} s: "
            f"{figures['speedup_over_rerunning']:.1f} times less than running it in every epoch"
        )
    return figures


@torch.inference_mode()
def test_best(here: Session, frozen: Frozen) -> dict[str, float]:
    """The figures of the best head on the test images; all processes share the work of embedding them."""
    features, model = frozen.held_out("test"), frozen.model
    here.world.barrier()  # the main process may still be writing the checkpoint
    model.load_state_dict({**model.state_dict(), **read_checkpoint(here.run.best)["model"]})
    good = features.readable
    scores = model.head.to(here.device).eval()(features.embeddings[good].to(here.device))
    return score(scores.float().cpu(), frozen.labels("test")[good])


main = script(get_args, probe)

if __name__ == "__main__":
    main()
