"""Weights for others, out of a transfer checkpoint: a plain network with its adapters merged in, or a PEFT folder.

python scripts/export.py --ckpt RUN/checkpoint-best.pth --out weights.safetensors   # official names, and the head
python scripts/export.py --ckpt RUN/checkpoint-best.pth --peft FOLDER               # the adapters
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models_transfer import Transferred, load_transferred
from util.run import args as flags
from util.run.errors import UserError, cli
from util.run.files import write_atomically
from util.transfer.lora import merge_lora, save_peft


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Export what a transfer script has trained")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint-best.pth of a transfer run")
    parser.add_argument("--out", default=None, metavar="FILE", help="where to write the plain network, .safetensors")
    parser.add_argument("--peft", default=None, metavar="FOLDER", help="where to write the adapters in PEFT's format")
    return parser.parse_args(argv)


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    if not args.out and not args.peft:
        raise UserError("nothing to write: give --out FILE.safetensors, --peft FOLDER, or both")
    if args.out and Path(args.out).suffix != ".safetensors":
        raise UserError(f"--out {args.out} does not end in .safetensors: name it so, that others know its format")
    trained = load_transferred(args.ckpt)
    if args.peft:
        if trained.lora is None:
            raise UserError(f"{args.ckpt} has no LoRA adapters: give --out instead of --peft")
        save_peft(args.peft, trained.model, trained.lora, trained.args["init"])
        print(f"adapters: {args.peft}")
    if args.out:
        write_plain(trained, Path(args.out))
        print(f"weights: {args.out}")


def write_plain(trained: Transferred, path: Path) -> None:
    """Merge adapters, if any, and write the state dict; class names and flags go into the file's metadata."""
    from safetensors.torch import save_file

    if trained.lora:
        merge_lora(trained.model)
    state = {name: value.contiguous() for name, value in trained.model.state_dict().items()}
    facts = {"classes": trained.classes, "args": trained.args}
    metadata = {"format": "pt", **{name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda part: save_file(state, part, metadata=metadata))


if __name__ == "__main__":
    main()
