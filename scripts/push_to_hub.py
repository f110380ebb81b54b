"""A trained model as a repository of the Hugging Face hub: weights, config.json and a model card.

python scripts/push_to_hub.py --ckpt RUN/checkpoint-best.pth --out FOLDER                     # to be looked at
python scripts/push_to_hub.py --ckpt RUN/checkpoint-best.pth --out FOLDER --repo OWNER/NAME   # and uploaded

Masked autoencoders, recognisers (ViT) and LoRA adapters. The card's figures come from results.json beside the
checkpoint and from --results of eval_recognition.py; its licence from where the weights come from.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models_hub import HubMAE, HubViT, push_folder, save_adapters
from models_transfer import load_transferred
from util.run import args as flags
from util.run.errors import UserError, cli
from util.training.checkpoint import read_checkpoint
from util.training.hub import load_weights
from util.training.lineage import Licence, licence_of, lineage
from util.training.model_card import Card

KINDS = ("mae", "recogniser", "adapters")
SUMMARIES = {
    "mae": "A masked autoencoder (arXiv 2111.06377) for anime art: encoder and decoder.",
    "recogniser": "A vision transformer that recognises anime characters; its embeddings serve new characters too.",
    "adapters": "LoRA adapters (arXiv 2106.09685) and a head that recognise anime characters, in PEFT's format.",
}
EXAMPLES = {
    "mae": """
from models_hub import HubMAE

model = HubMAE.from_pretrained("{name}")
loss, pred, mask = model(images, mask_ratio=0.75)   # images (N, 3, H, W) in [0, 1]
""",
    "recogniser": """
from models_hub import HubViT

model = HubViT.from_pretrained("{name}")
embeddings = model.embed(images)                    # images (N, 3, H, W) in [0, 1]
names = [model.classes[i] for i in model(images).argmax(1)]
""",
    "adapters": """
from models_hub import load_adapters

trained = load_adapters("{name}")                   # init=FILE: the start weights, if they lie elsewhere
names = [trained.classes[i] for i in trained.model(images).argmax(1)]
""",
}


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Write a repository of the Hugging Face hub, and upload it if asked to")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint of a pre-training or transfer run")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the repository's files are written here")
    parser.add_argument(
        "--repo", default=None, metavar="OWNER/NAME", help="upload there; nothing is uploaded without it"
    )
    parser.add_argument("--revision", default=None, metavar="BRANCH", help="branch to upload to; default: main")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is made")
    parser.add_argument("--kind", choices=KINDS, default=None, help="default: what the checkpoint is")
    parser.add_argument("--results", nargs="*", default=[], metavar="JSON", help="results.json of eval_recognition.py")
    parser.add_argument("--title", default=None, help="of the model card; default: the model's name")
    parser.add_argument(
        "--license", default=None, metavar="ID", help="as the hub spells it, where the start weights do not settle it"
    )
    return parser.parse_args(argv)


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty: choose another folder, or empty it")
    checkpoint = read_checkpoint(Path(args.ckpt))
    kind = args.kind or kind_of(checkpoint)
    write_repository(out, kind, args, make_card(kind, args, checkpoint))
    print(f"{kind}: {out} (" + ", ".join(sorted(path.name for path in out.iterdir())) + ")")
    if args.repo:
        print(f"pushed: {push_folder(out, args.repo, revision=args.revision, private=args.private)}")
    else:
        print("nothing was uploaded: look at README.md, then give --repo OWNER/NAME with an empty --out")


def kind_of(checkpoint: dict) -> str:
    """What a checkpoint is of."""
    if isinstance(checkpoint, dict) and "classes" in checkpoint:
        return "adapters" if "lora" in checkpoint else "recogniser"
    return "mae"


def make_card(kind: str, args, checkpoint: dict) -> Card:
    """The model card; UserError where the licence is not known and not given, or a results file cannot be read."""
    own = checkpoint.get("args", {})
    own = own if isinstance(own, dict) else vars(own)
    sources = lineage(own)
    licence = licence_of(sources)
    if licence is None and args.license is None:
        raise UserError(f"the licence of {sources[-1]} is not known here: look it up and give --license")
    if args.license and licence is None:
        licence = Licence(args.license, f"As of the start weights, {sources[-1]}.")
    elif args.license and args.license != licence.name:
        raise UserError(f"--license {args.license} does not agree with the start weights: {licence.reason}")
    name = args.repo or "OWNER/NAME"
    return Card(
        title=args.title or f"{own.get('model', 'weights')} for anime characters",
        summary=SUMMARIES[kind],
        example=EXAMPLES[kind].format(name=name),
        licence=licence,
        args=own,
        results=[read_results(path) for path in results_files(args)],
        sources=sources,
        classes=checkpoint.get("classes", ()),
        tags=["lora", "peft"] if kind == "adapters" else [],
    )


def results_files(args) -> list[Path]:
    """The results.json beside the checkpoint, if there is one, and those that are named."""
    beside = Path(args.ckpt).with_name("results.json")
    return [*([beside] if beside.is_file() else []), *map(Path, args.results)]


def read_results(path: Path) -> dict:
    """A results.json."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): give results.json of a run") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is no results.json: it holds {type(found).__name__}")
    return found


def write_repository(out: Path, kind: str, args, card: Card) -> None:
    """The repository's files."""
    if kind == "mae":
        model = HubMAE.of_weights(load_weights(args.ckpt))
    else:
        trained = load_transferred(args.ckpt)
        if kind == "adapters":
            save_adapters(out, trained, card)
            return
        model = HubViT.of(trained)
    model.card = card
    model.save_pretrained(out)


if __name__ == "__main__":
    main()
