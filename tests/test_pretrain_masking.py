"""Masking strategies in main_pretrain.py: what they train, exact resuming, refusals.

Run: python -m pytest tests/test_pretrain_masking.py
"""

import numpy as np
import pytest
import torch

import main_pretrain
from models_mae import build_mae
from tests.helpers import assert_same, fails, outcome
from util.data.manifest import write_manifest


@pytest.fixture(scope="module")
def images(make_images, tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), 40)


def flags(images, run, *more):
    """34 training images, four steps of 8 an epoch, two epochs."""
    recipe = "--model mae_vit_nano_patch8 --input_size 32 --batch_size 8 --epochs 2 --warmup_epochs 1 --lr 1e-3"
    recipe += " --device cpu --num_workers 0 --eval_images 4 --log_every 2"
    return ["--data_path", str(images), "--output_dir", str(run), *recipe.split(), *map(str, more)]


@pytest.fixture(scope="module")
def mapped(images, tmp_path_factory):
    """The images as a prepared folder with semantic maps, a prediction of errors and all."""
    folder = tmp_path_factory.mktemp("mapped")
    names = sorted(path.name for path in images.iterdir())
    splits = ["val"] * 6 + ["pretrain"] * (len(names) - 6)
    rows = [{"sample_id": n, "file_name": n, "split": split} for n, split in zip(names, splits, strict=True)]
    write_manifest(folder, rows, image_root=images)
    (folder / "maps").mkdir()
    for name in ("face", "eyes", "foreground"):
        values = np.random.default_rng(len(name)).integers(0, 256, (len(names), 32, 32), dtype=np.uint8)
        np.save(folder / "maps" / f"{name}.npy", values)
    return folder


@pytest.mark.parametrize(
    "argv",
    [
        ["--masking", "face+foreground:-1+lineart", "--mask_schedule", "easy_to_hard"],
        ["--masking", "green", "--mask_strength", 1000, "--mask_random", 0],
        ["--masking", "hard", "--mask_strength", 2, "--grad_checkpoint"],
        ["--masking", "hard+box", "--decoder", "cross", "--predict_ratio", 0.5, "--num_workers", 2],
    ],
    ids=["semantic", "green", "hard", "mixture"],
)
def test_masking_strategies_train_and_resume_exactly(mapped, tmp_path, argv):
    main_pretrain.main(flags(mapped, tmp_path / "random", "--mask_random", 1))
    main_pretrain.main(flags(mapped, tmp_path / "whole", *argv))
    main_pretrain.main(flags(mapped, tmp_path / "parts", *argv, "--max_steps", 3))
    main_pretrain.main(flags(mapped, tmp_path / "parts", *argv, "--resume", "auto"))
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))
    lines, others = outcome(tmp_path / "whole")[3], outcome(tmp_path / "random")[3]
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] and lines[-1]["val_loss"] != others[-1]["val_loss"]


def test_strength_0_trains_as_random_masking_does(mapped, tmp_path):
    """Bit for bit, though the maps are read and the scores made."""
    main_pretrain.main(flags(mapped, tmp_path / "random"))
    main_pretrain.main(flags(mapped, tmp_path / "zero", "--masking", "face+lineart+grid", "--mask_strength", 0))
    for zero, random in zip(outcome(tmp_path / "zero"), outcome(tmp_path / "random"), strict=True):
        if "data" in zero:  # that of the data covers the maps
            zero, random = ({k: v for k, v in part.items() if k != "data"} for part in (zero, random))
        assert_same(zero, random)


def test_what_is_hard_is_learned_beside_and_changes_nothing_else(mapped, tmp_path):
    """With all samples masked at random, the autoencoder's weights are those of a run without the prediction."""
    main_pretrain.main(flags(mapped, tmp_path / "random"))
    main_pretrain.main(flags(mapped, tmp_path / "hard", "--masking", "hard", "--mask_random", 1))
    plain, hard = (outcome(tmp_path / name)[0] for name in ("random", "hard"))
    judge = {name for name in hard if name.startswith("decoder_hardness")}
    assert hard.keys() - judge == plain.keys() and judge
    assert_same({name: hard[name] for name in plain}, dict(plain))
    torch.manual_seed(0)
    fresh = build_mae("mae_vit_nano_patch8", 32, hard=True).state_dict()
    assert all((hard[name] != fresh[name]).any() for name in judge)
    main_pretrain.main(flags(mapped, tmp_path / "on", "--init", tmp_path / "hard/checkpoint-last.pth"))


def test_the_batch_size_is_found_with_maps_too(mapped, tmp_path, capsys):
    argv = flags(mapped, tmp_path / "auto", "--masking", "face", "--max_steps", 1)
    argv[argv.index("--batch_size") + 1] = "auto"
    main_pretrain.main(argv)
    assert "--batch_size auto: " in capsys.readouterr().out


def test_masking_refusals(images, mapped, tmp_path, capsys):
    def refused(data, *argv) -> str:
        return fails(main_pretrain.main, capsys, flags(data, tmp_path / "run", *argv))

    assert "no strategy" in refused(images, "--masking", "nose")
    assert "prepare_maps.py" in refused(images, "--masking", "face")
    assert "maps" in refused(mapped, "--masking", "face", "--maps", tmp_path / "nowhere")
    assert "--streaming" in refused("hf:nobody/nothing", "--masking", "foreground", "--streaming", "--epoch_images", 8)


def test_two_processes_mask_and_learn_as_one_does(mapped, run_script, tmp_path):
    """What is removed, and what is learned to be hard, does not depend on which process has which sample."""
    argv = ["--masking", "face+hard", "--epochs", 1]
    main_pretrain.main(flags(mapped, tmp_path / "one", *argv))
    run_script("main_pretrain.py", *flags(mapped, tmp_path / "two", *argv, "--batch_size", 4), processes=2)
    # not by weights: those whose gradient is 0, such as the biases of keys, are moved by rounding errors
    (one,), (two,) = (outcome(tmp_path / name)[3] for name in ("one", "two"))
    for name in ("train_loss", "val_loss", "train_grad_norm"):
        assert two[name] == pytest.approx(one[name], rel=1e-4)
    main_pretrain.main(flags(mapped, tmp_path / "other", "--masking", "face+hard:2", "--epochs", 1))
    assert outcome(tmp_path / "other")[3][0]["train_loss"] != pytest.approx(one["train_loss"], rel=1e-4)
