"""main_detect.py as its users run it: exact resuming, the three ways of training, what is refused.

Run: python -m pytest tests/test_detect.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import main_detect
from models_detect import load_detector
from tests.helpers import assert_same, fails, outcome, results_of
from tests.ranks import run_ranks
from util.data.manifest import write_manifest
from util.training.checkpoint import read_checkpoint
from util.training.session import session


def make_squares(folder, pictures: int = 26):
    """Dark squares with two white eyes on light pictures: faces that are easily told."""
    rng, rows = np.random.default_rng(0), []
    folder.mkdir(parents=True)
    for i in range(pictures):
        picture = Image.fromarray(rng.integers(180, 255, (48, 64, 3), dtype=np.uint8))
        for k in range(rng.integers(1, 3)):
            side = int(rng.integers(12, 28))
            x, y = int(rng.integers(k * 32, 33 - side + k * 32)) if side < 32 else k * 32, int(rng.integers(48 - side))
            ImageDraw.Draw(picture).rectangle((x, y, x + side - 1, y + side - 1), fill=(20, 30, 90))
            eyes = [[x + 2, y + 3, x + 6, y + 7], [x + side - 6, y + 3, x + side - 2, y + 7]]
            for eye in eyes:
                ImageDraw.Draw(picture).rectangle((eye[0], eye[1], eye[2] - 1, eye[3] - 1), fill="white")
            rows.append(
                {
                    "sample_id": f"{i}-{k}",
                    "file_name": f"{i:02d}.png",
                    "box": [x, y, x + side, y + side],
                    "eyes": eyes,
                    "split": "train" if i < 18 else "val",
                }
            )
        picture.save(folder / f"{i:02d}.png")
    write_manifest(folder, rows)
    return folder


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return make_squares(tmp_path_factory.mktemp("data") / "squares")


def flags(data, run, *more):
    """18 training pictures: three steps of 6 in each of two epochs."""
    recipe = "--model vit_nano_patch16 --input_size 64x128 --batch_size 6 --epochs 2 --warmup_epochs 1 --width 64"
    recipe += " --convs 1 --device cpu --num_workers 0 --log_every 2 --lr 1e-3"
    return ["--data_path", str(data), "--output_dir", str(run), *recipe.split(), *map(str, more)]


@pytest.fixture(scope="module")
def whole(squares, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole")
    main_detect.main(flags(squares, run))
    return run


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_from_the_middle_of_an_epoch_is_exact(squares, whole, tmp_path, workers):
    more = ["--num_workers", workers, "--resume", "auto", "--max_steps", 2]
    for _ in range(2):
        main_detect.main(flags(squares, tmp_path, *more))
        assert read_checkpoint(tmp_path / "checkpoint-last.pth")["progress"]["step"]
    main_detect.main(flags(squares, tmp_path, *more[:-2]))
    assert_same(outcome(tmp_path), outcome(whole))
    best = [read_checkpoint(run / "checkpoint-best.pth")["model"] for run in (tmp_path, whole)]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[1])


def test_results_and_what_its_checkpoint_finds(squares, whole):
    results = results_of(whole)
    assert results["finished"] and results["epochs"] == 2 and 0 <= results["val"]["ap50"] <= 1
    finder = load_detector(whole / "checkpoint-best.pth")
    assert finder.size == 128 and not finder.model.training
    picture = Image.open(squares / "20.png").convert("RGB")
    one, two = (finder.detect([picture])[0] for _ in range(2))
    assert np.array_equal(one.boxes, two.boxes) and len(one.scores)


@pytest.fixture(scope="module")
def learned(squares, tmp_path_factory):
    """A detector that has seen the squares a few dozen times."""
    run = tmp_path_factory.mktemp("learned")
    main_detect.main(flags(squares, run, "--epochs", 40, "--eval_every", 10, "--head_lr", 3e-3))
    return run


def test_it_learns(learned):
    """Squares of one colour are found in pictures that were never seen."""
    assert results_of(learned)["best_val"]["ap50"] > 0.8


def _figures(argv: list[str], checkpoint: str, out: str) -> None:
    """In each process: the figures of a detector on held-out pictures."""
    args = main_detect.get_args(argv)
    with session(args) as here:
        scenes = main_detect.open_scenes(args, "val")
        figures = main_detect.Validation(here, scenes)(load_detector(checkpoint).model)
        Path(f"{out}.{here.world.rank}").write_text(json.dumps(figures))


def test_held_out_pictures_are_shared_out_and_give_the_figures_of_one_process(squares, learned, tmp_path):
    """Of eight pictures one cannot be read; three processes cannot have equally many."""
    data, checkpoint = shutil.copytree(squares, tmp_path / "data"), learned / "checkpoint-best.pth"
    (data / "19.png").write_bytes(b"damaged")
    _figures(flags(data, tmp_path / "run"), checkpoint, str(tmp_path / "one"))
    expected = json.loads((tmp_path / "one.0").read_text())
    assert 0.2 < expected["ap"] < 1 and expected["ap50"] > 0.8
    argv = flags(data, tmp_path / "run", "--batch_size", 2)
    said = run_ranks(3, "tests.test_detect:_figures", argv, checkpoint, str(tmp_path / "three"))
    for rank in range(3):
        assert json.loads((tmp_path / f"three.{rank}").read_text()) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert [text.count("left out of the evaluation") for text in said] == [1, 0, 0]


@pytest.mark.parametrize("way", ["lora", "frozen"])
def test_ways_of_training_go_through_a_checkpoint(squares, tmp_path, way):
    main_detect.main(flags(squares, tmp_path / "run", "--train", way, "--rank", 2, "--epochs", 1))
    results = results_of(tmp_path / "run")
    assert 0 < results["trainable_params"] < 0.5 * results["total_params"]
    finder = load_detector(tmp_path / "run/checkpoint-best.pth")
    picture = Image.open(squares / "20.png").convert("RGB")
    assert finder.detect([picture])[0].boxes.shape[1] == 4
    names = [name for name in finder.model.state_dict() if "lora_" in name]
    assert bool(names) == (way == "lora")


def test_two_processes_train_on(squares, tmp_path, run_script):
    run_script("main_detect.py", *flags(squares, tmp_path, "--batch_size", 3), processes=2)
    assert results_of(tmp_path)["finished"] and results_of(tmp_path)["steps"] == 6


def test_what_a_user_can_get_wrong_is_one_line(squares, whole, tmp_path, make_images, capsys):
    run = tmp_path / "run"

    def said(*argv) -> str:
        return fails(main_detect.main, capsys, flags(*argv))

    assert "multiple of" in said(squares, run, "--input_size", "72x128")
    assert "--face_padding" in said(squares, run, "--face_padding", 0.5)
    assert "--scale_jitter" in said(squares, run, "--scale_jitter", 2, 1)
    assert "no face boxes" in said(make_images(tmp_path / "plain", 12), run, "--labels", "none")
    with pytest.raises(main_detect.UserError, match=r"no checkpoint of main_detect\.py"):
        checkpoint = read_checkpoint(whole / "checkpoint-best.pth")
        del checkpoint["kind"]
        torch.save(checkpoint, tmp_path / "other.pth")
        load_detector(tmp_path / "other.pth")
