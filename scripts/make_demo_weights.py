"""The weights that ship with the demo, out of training runs: half precision, calibrated, at most 10 MB together.

python scripts/make_demo_weights.py --recogniser RUN/checkpoint-best.pth --mae RUN/checkpoint-last.pth \
    --detector RUN/checkpoint-best.pth --data_path data/toonfaces

The recogniser's threshold and calibration come from open_val and novel, identities that it was not trained on, and
are checked on open_test. weights.json says what each file is.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from models_detect import KIND, load_detector
from models_transfer import load_recogniser
from util.data.augment import EvalCrop
from util.data.face_crop import FaceCrops
from util.data.sources import open_source
from util.run import args as flags
from util.run.device import INFERENCE_BATCH
from util.run.errors import UserError, cli
from util.run.log import git_commit, write_json
from util.training.checkpoint import read_checkpoint
from util.training.hub import load_weights
from util.transfer.encoder import Encoder
from visualize.demo.calibrate import calibrate, check, open_set_trials, rates_at, threshold_of
from visualize.demo.weights import FOLDER, PADDING, Facts, read_facts, write_weights

MOST_BYTES = 10_000_000
TUNE, CHECK = ("open_val", "novel"), ("open_test",)
_PATHS = ("data_path", "init", "output_dir", "log_dir", "resume", "head_init", "maps", "mean_data_path")
_FIGURES = ("val", "test", "epochs", "steps")  # of results.json


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Make the weights that ship with the demo")
    add = parser.add_argument
    add("--recogniser", required=True, metavar="FILE", help="checkpoint of a transfer run; its head is left out")
    add("--mae", required=True, metavar="FILE", help="checkpoint of main_pretrain.py, with its decoder")
    add("--detector", required=True, metavar="FILE", help="checkpoint of main_detect.py")
    add("--data_path", required=True, metavar="DIR", help="prepared folder with open_val, open_test and novel")
    add("--face_padding", type=flags.rate, default=PADDING, metavar="X", help="crops reach X box sides beyond the face")
    add("--licence", default="Apache-2.0", help="of the weights; name the data's where it is stricter")
    add("--out", default=str(FOLDER), metavar="DIR", help="folder to write")
    add("--seed", type=flags.count0, default=0, help="of the pairs and galleries that numbers are set on")
    return parser.parse_args(argv)


def portable(args: dict) -> dict:
    """The flags of a run without the folders of the machine it took place on."""
    kept = {name: value for name, value in args.items() if name not in flags.BOOKKEEPING and value is not None}
    return {
        name: Path(value).name if name in _PATHS and isinstance(value, str) else value for name, value in kept.items()
    }


def made_from(ckpt: str, args: dict, licence: str) -> dict:
    """How weights were made: flags, figures of the run, commit, licence."""
    path, figures = Path(ckpt), {}
    results = path.with_name("results.json")
    if results.is_file():
        figures = {name: value for name, value in json.loads(results.read_text()).items() if name in _FIGURES}
    epoch = read_checkpoint(path).get("epoch")
    return {
        "run": path.parent.name, "epoch": epoch, "args": portable(args), "results": figures, "commit": git_commit(),
        "licence": licence, "precision": "fp16",
    }  # fmt: skip


def embed_roles(encode: Encoder, size, data_path: str, roles, padding: float) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, D) of the faces of some roles, cut out as the demo cuts them, and their identity codes (N,)."""
    embeddings, names = [], []
    crop = EvalCrop(size)
    for role in roles:
        source = FaceCrops(open_source(data_path, role), padding)
        for first in range(0, len(source), INFERENCE_BATCH):
            rows = range(first, min(first + INFERENCE_BATCH, len(source)))
            batch = torch.stack([crop(source.load(i), {}) for i in rows])
            embeddings.append(encode(batch).cpu().numpy())
        names += source.column("identity")
    return np.concatenate(embeddings), np.unique(names, return_inverse=True)[1]


def make_recogniser(args, path: Path) -> None:
    """Write the encoder, then set its threshold and calibration with the weights as they ship."""
    trained = load_recogniser(args.recogniser)
    state = {name: value for name, value in trained.model.state_dict().items() if not name.startswith("head.")}
    made, kept = made_from(args.recogniser, trained.args, args.licence), portable(trained.args)
    write_weights(path, state, kept, Facts(args.face_padding, made=made))
    model = load_recogniser(str(path), global_pool=kept.get("global_pool", True)).model
    encode = Encoder(model, torch.device("cpu"), "fp32", most=INFERENCE_BATCH)
    size = flags.height_width(kept["input_size"])
    tune, other = (embed_roles(encode, size, args.data_path, r, args.face_padding) for r in (TUNE, CHECK))
    calibration = calibrate(*tune, f"{Path(args.data_path).name}, {' and '.join(TUNE)}", args.seed)
    calibration.about["checked_on"] = {"data": " and ".join(CHECK), **check(calibration, *other, args.seed)}
    chosen = threshold_of(open_set_trials(*tune, args.seed))
    made["threshold"] = {**chosen, "checked_on": rates_at(chosen["value"], open_set_trials(*other, args.seed))}
    write_weights(path, state, kept, Facts(args.face_padding, chosen["value"], calibration, made))


def make_mae(args, path: Path) -> None:
    weights = load_weights(args.mae)
    write_weights(
        path, weights.state, portable(weights.args), Facts(made=made_from(args.mae, weights.args, args.licence))
    )


def make_detector(args, path: Path) -> None:
    load_detector(args.detector)  # refuses what is none
    checkpoint = read_checkpoint(Path(args.detector))
    made = made_from(args.detector, checkpoint["args"], args.licence)
    write_weights(path, checkpoint["model"], {**portable(checkpoint["args"]), "kind": KIND}, Facts(made=made))


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    out, card = Path(args.out), {}
    for name, make in {"recogniser": make_recogniser, "mae": make_mae, "detector": make_detector}.items():
        path = out / f"{name}.safetensors"
        make(args, path)
        card[path.name] = {"bytes": path.stat().st_size, **asdict(read_facts(str(path)))}
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    write_json(out / "weights.json", card)
    total = sum(entry["bytes"] for entry in card.values())
    if total > MOST_BYTES:
        raise UserError(f"the weights have {total / 1e6:.1f} MB together, more than 10: export smaller models")
    facts = card["recogniser.safetensors"]
    print(f"threshold {facts['threshold']:.3f}, {json.dumps(facts['made']['threshold']['checked_on'])} on {CHECK[0]}")
    print(f"calibration {json.dumps(facts['calibration']['about']['checked_on'])}")


if __name__ == "__main__":
    main()
