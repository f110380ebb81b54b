"""Weights for others: a plain network with its adapters merged in, a PEFT folder, or an ONNX file.

python scripts/export.py --ckpt RUN/checkpoint-best.pth --out weights.safetensors   # official names, and the head
python scripts/export.py --ckpt RUN/checkpoint-best.pth --peft FOLDER               # the adapters
python scripts/export.py --ckpt RUN/checkpoint-best.pth --onnx FILE.onnx            # embeddings, scores with a head

An ONNX file takes float32 images (N, 3, H, W) in [0, 1], N of any size. Of a detector of main_detect.py it gives a
score for each place and class and a box for each place: thresholds and non-maximum suppression are left to who reads
it, for lists of another length for each picture have no place in a batch.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from torchvision.models.detection.image_list import ImageList

from models_detect import KIND, Detector, load_detector
from models_transfer import Transferred, load_recogniser, load_transferred
from util.run import args as flags
from util.run.errors import UserError, cli
from util.run.files import write_atomically
from util.training.checkpoint import read_checkpoint
from util.training.onnx_file import require_onnx, write_onnx
from util.transfer.lora import merge_lora, save_peft


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Export what a transfer script has trained; as ONNX also encoders and detectors")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint-best.pth of a transfer run")
    parser.add_argument("--out", default=None, metavar="FILE", help="where to write the plain network, .safetensors")
    parser.add_argument("--peft", default=None, metavar="FOLDER", help="where to write the adapters in PEFT's format")
    parser.add_argument("--onnx", default=None, metavar="FILE", help="where to write the network, .onnx")
    parser.add_argument("--model", default=None, metavar="NAME", help="for --onnx: of weights that do not say it")
    parser.add_argument("--input_size", type=flags.image_size, default=None, help="for --onnx: px; default: as trained")
    return parser.parse_args(argv)


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    if not args.out and not args.peft and not args.onnx:
        raise UserError("nothing to write: give --out FILE.safetensors, --peft FOLDER, --onnx FILE.onnx, or several")
    for flag, suffix in (("out", ".safetensors"), ("onnx", ".onnx")):
        given = getattr(args, flag)
        if given and Path(given).suffix != suffix:
            raise UserError(f"--{flag} {given} does not end in {suffix}: name it so, that others know its format")
    if args.onnx:
        require_onnx()
        outputs, error = export_onnx(args)
        print(f"ONNX: {args.onnx} ({', '.join(outputs)}; within {error:.1e} of PyTorch)")
    if not args.out and not args.peft:
        return
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


# --- ONNX -----------------------------------------------------------------------------------------------------------


class EmbedAndScore(nn.Module):
    """Images (N, 3, H, W) in [0, 1] -> embeddings (N, D), and with a head the scores (N, C) of its classes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        embeddings = self.model.embed(images)
        return embeddings if isinstance(self.model.head, nn.Identity) else (embeddings, self.model.head(embeddings))


class PlacesAndBoxes(nn.Module):
    """Images (N, 3, H, W) in [0, 1] -> scores (N, A, classes) in 0..1 and boxes (N, A, 4), x1 y1 x2 y2 px.

    A: places of all maps of the pyramid. The score is FCOS's, the root of class times centre-ness (arXiv 1904.01355).
    """

    def __init__(self, detector: Detector, size: tuple[int, int]):
        super().__init__()
        self.detector = detector
        images = torch.zeros(1, 3, *size)
        with torch.inference_mode():
            maps = detector.backbone(images)
            anchors = detector.anchor_generator(ImageList(images, [size]), maps)[0].clone()
        self.register_buffer("centres", (anchors[:, :2] + anchors[:, 2:]) / 2)
        self.register_buffer("sides", anchors[:, 2:] - anchors[:, :2])

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.detector.head(self.detector.backbone(images))
        scores = (found["cls_logits"].sigmoid() * found["bbox_ctrness"].sigmoid()).sqrt()
        reach = found["bbox_regression"] * self.sides.repeat(1, 2)
        return scores, torch.cat([self.centres - reach[..., :2], self.centres + reach[..., 2:]], dim=-1)


def export_onnx(args) -> tuple[tuple[str, ...], float]:
    """Write --onnx; (the names of its outputs, the largest error of the check)."""
    if is_detector(args.ckpt):
        found = load_detector(args.ckpt)
        side = args.input_size or -(-found.size // found.model.multiple) * found.model.multiple
        size = flags.height_width(side)
        if any(length % found.model.multiple for length in size):
            raise UserError(f"--input_size {side} does not divide by {found.model.multiple}, as this detector needs")
        outputs = ("scores", "boxes")
        return outputs, write_onnx(PlacesAndBoxes(found.model, size).eval(), size, args.onnx, outputs)
    trained = load_recogniser(args.ckpt, model=args.model, input_size=args.input_size)
    size = flags.height_width(args.input_size or trained.args["input_size"])
    trained.model.check_size(size)
    outputs = ("embeddings",) if isinstance(trained.model.head, nn.Identity) else ("embeddings", "scores")
    return outputs, write_onnx(EmbedAndScore(trained.model).eval(), size, args.onnx, outputs)


def is_detector(ckpt: str) -> bool:
    """Whether a checkpoint is one of main_detect.py."""
    path = Path(ckpt)
    if not path.is_file() or path.suffix == ".safetensors":
        return False
    checkpoint = read_checkpoint(path)
    return isinstance(checkpoint, dict) and checkpoint.get("kind") == KIND


if __name__ == "__main__":
    main()
