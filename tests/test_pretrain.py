"""main_pretrain.py as its users run it: exact resuming, several processes, signals, faults."""

import json
import os
import pickle
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from datasets import Dataset, Features, Image

import main_pretrain
from tests import helpers
from tests.conftest import ROOT
from tests.helpers import assert_same, outcome
from util.training.checkpoint import read_checkpoint, save_checkpoint

fails = partial(helpers.fails, main_pretrain.main)


@pytest.fixture(scope="module")
def images(make_images, tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), 40)


def flags(images, run, *more):
    """36 training images or so, several steps of 8 an epoch, two epochs."""
    recipe = "--model mae_vit_nano_patch8 --input_size 16 --batch_size 8 --epochs 2 --warmup_epochs 1 --lr 1e-3"
    recipe += " --device cpu --num_workers 0 --eval_images 4 --log_every 2 --labels none"
    return ["--data_path", str(images), "--output_dir", str(run), *recipe.split(), *map(str, more)]


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The outcome of a run that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole")
    main_pretrain.main(flags(images, run))
    return outcome(run)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_from_the_middle_of_an_epoch_is_exact(images, whole, tmp_path, workers):
    more = ["--num_workers", workers, "--resume", "auto", "--max_steps", 3]
    for _ in range(2):  # left at step 3 and 6: in the middle of both epochs
        main_pretrain.main(flags(images, tmp_path, *more))
        assert read_checkpoint(tmp_path / "checkpoint-last.pth")["progress"]["step"]
    main_pretrain.main(flags(images, tmp_path, *more[:-2]))
    assert_same(outcome(tmp_path), whole)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["epochs"] == 2 and results["finished"] and results["val"]["psnr_db"] > 0
    assert results["images_seen"] == results["steps"] * 8


def test_a_save_inside_an_epoch_changes_nothing(images, whole, tmp_path):
    main_pretrain.main(flags(images, tmp_path, "--save_steps", 1))
    assert_same(outcome(tmp_path), whole)


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_resume_exactly(images, run_script, tmp_path, processes):
    command = ["main_pretrain.py", *flags(images, tmp_path / "whole", "--batch_size", 4)]
    run_script(*command, processes=processes)
    command = ["main_pretrain.py", *flags(images, tmp_path / "parts", "--batch_size", 4, "--resume", "auto")]
    run_script(*command, "--max_steps", 2, processes=processes)
    assert read_checkpoint(tmp_path / "parts" / "checkpoint-last.pth")["progress"]["step"] == 2
    run_script(*command, processes=processes)
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))


@pytest.mark.parametrize(
    "argv",
    [
        ["--decoder", "cross", "--predict_ratio", 0.5],
        ["--predict_ratio", 0.5, "--fill", "--grad_checkpoint", "--accum_iter", 2],
        ["--decoder", "cross", "--grad_checkpoint", "--norm_pix_loss"],
    ],
    ids=["cross", "fill", "checkpointed"],
)
def test_cheaper_ways_train_and_resume_exactly(images, whole, tmp_path, argv):
    main_pretrain.main(flags(images, tmp_path / "whole", *argv))
    main_pretrain.main(flags(images, tmp_path / "parts", *argv, "--max_steps", 1))
    main_pretrain.main(flags(images, tmp_path / "parts", *argv, "--resume", "auto"))
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))
    lines = outcome(tmp_path / "whole")[3]
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] and lines[-1]["val_loss"] != whole[3][-1]["val_loss"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_resumes_exactly(images, tmp_path, precision):
    argv = ["--precision", precision, "--accum_iter", 2, "--clip_grad", 1]
    main_pretrain.main(flags(images, tmp_path / "whole", *argv))
    main_pretrain.main(flags(images, tmp_path / "parts", *argv, "--max_steps", 1))
    main_pretrain.main(flags(images, tmp_path / "parts", *argv, "--resume", "auto"))
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))
    lines = outcome(tmp_path / "whole")[3]
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    scaler = read_checkpoint(tmp_path / "whole" / "checkpoint-last.pth")["scaler"]
    assert bool(scaler) == (precision == "fp16")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(images, tmp_path, signum):
    command = [sys.executable, "main_pretrain.py", *flags(images, tmp_path, "--epochs", 2000, "--resume", "auto")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    for line in process.stdout:  # it is training once the first epoch is reported
        if line.startswith("epoch 0 "):
            break
    process.send_signal(signum)
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 128 + signum
    assert "stopped by" in rest and "--resume auto" in rest
    progress = read_checkpoint(tmp_path / "checkpoint-last.pth")["progress"]
    assert progress["global_step"] > 0
    # an undisturbed run to the same step has the same weights
    stopped = read_checkpoint(tmp_path / "checkpoint-last.pth")["model"]
    other = tmp_path / "undisturbed"
    main_pretrain.main(flags(images, other, "--epochs", 2000, "--max_steps", progress["global_step"]))
    assert_same(read_checkpoint(other / "checkpoint-last.pth")["model"], stopped)


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(images, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "main_pretrain.py",
    ]
    command += flags(images, tmp_path, "--batch_size", 4, "--epochs", 2000)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    for line in process.stdout:
        if line.startswith("epoch 0 "):
            break
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGTERM)
    rest = process.stdout.read()
    process.wait(timeout=60)
    assert "stopped by SIGTERM" in rest and process.returncode == 1  # torchrun's, for workers that left with 143
    assert read_checkpoint(tmp_path / "checkpoint-last.pth")["progress"]["global_step"] > 0


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(images, tmp_path, capsys):
    main_pretrain.main(flags(images, tmp_path, "--max_steps", 3))
    good = (tmp_path / "checkpoint-last.pth").read_bytes()
    with pytest.raises(SystemExit) as stop:
        main_pretrain.main(flags(images, tmp_path, "--resume", "auto", "--lr", 1e30))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "is not finite at step" in error and error.count("\n") == 1
    assert (tmp_path / "checkpoint-last.pth").read_bytes() == good


@pytest.fixture(scope="module")
def shards(images, tmp_path_factory):
    """The same images as a data set of four Parquet files, one of its pictures damaged."""
    folder = tmp_path_factory.mktemp("shards")
    files = sorted(images.glob("*.png"))
    for number in range(4):
        cells = [{"bytes": path.read_bytes(), "path": path.name} for path in files[number::4]]
        if number == 2:
            cells[5]["bytes"] = b"no picture"
        Dataset.from_dict({"image": cells}, features=Features({"image": Image()})).to_parquet(
            folder / f"{number}.parquet"
        )
    return folder


def test_a_stream_resumes_exactly_with_any_number_of_workers(shards, tmp_path):
    argv = ["--streaming", "--epoch_images", 24, "--max_bad", 0.1]
    main_pretrain.main(flags(f"hf:{shards}", tmp_path / "whole", *argv))
    for workers, steps in ((2, 2), (0, 2), (2, 9)):
        more = ["--num_workers", workers, "--max_steps", steps, "--resume", "auto"]
        main_pretrain.main(flags(f"hf:{shards}", tmp_path / "parts", *argv, *more))
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))
    assert outcome(tmp_path / "whole")[2]["global_step"] == 6


def test_a_stream_needs_its_length(shards, tmp_path, capsys):
    assert "--epoch_images" in fails(capsys, flags(f"hf:{shards}", tmp_path / "run", "--streaming"))


def test_a_stored_hugging_face_data_set(shards, tmp_path, capsys, monkeypatch):
    main_pretrain.main(flags(f"hf:{shards}", tmp_path, "--max_bad", 0.1))
    assert json.loads((tmp_path / "results.json").read_text())["finished"]


class Payload:
    """A pickle that runs code when it is loaded without care."""

    def __reduce__(self):
        return os.mkdir, ("carried_code_ran",)


def test_what_a_user_can_get_wrong_is_one_line(images, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "readme.txt").write_text("no picture")
    run = tmp_path / "run"
    assert "nowhere" in fails(capsys, flags(tmp_path / "nowhere", run))
    assert "empty" in fails(capsys, flags(tmp_path / "empty", run))
    assert "texts" in fails(capsys, flags(tmp_path / "texts", run))
    assert "1.5 is out of range" in fails(capsys, flags(images, run, "--mask_ratio", 1.5))
    assert "multiple of 8" in fails(capsys, flags(images, run, "--input_size", 20))
    assert "--batch_size" in fails(capsys, flags(images, run, "--batch_size", 64))
    assert "does not exist" in fails(capsys, flags(images, run, "--resume", tmp_path / "none.pth"))
    if not torch.cuda.is_available():
        assert "not available" in fails(capsys, flags(images, run, "--device", "cuda"))

    tiny = main_pretrain.build_mae("mae_vit_tiny_patch8", 16)
    save_checkpoint(tmp_path / "tiny.pth", {"model": tiny.state_dict()})
    assert "another model" in fails(capsys, flags(images, run, "--init", tmp_path / "tiny.pth"))
    assert "no run to go on with" in fails(capsys, flags(images, run, "--resume", tmp_path / "tiny.pth"))

    monkeypatch.chdir(tmp_path)
    for name, content in (("code.pth", {"model": Payload()}), ("pickle.pth", None)):
        if content:
            torch.save(content, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(pickle.dumps(Payload()))
        for flag in ("--init", "--resume"):
            fails(capsys, flags(images, run, flag, tmp_path / name))
    assert not (tmp_path / "carried_code_ran").exists()


def test_a_second_run_does_not_write_over_a_first(images, tmp_path, capsys):
    main_pretrain.main(flags(images, tmp_path, "--max_steps", 1))
    assert "--resume auto" in fails(capsys, flags(images, tmp_path))


@pytest.mark.parametrize("steps", [1, 4])
def test_a_run_goes_on_only_with_the_same_step_size(images, tmp_path, capsys, steps):
    main_pretrain.main(flags(images, tmp_path, "--max_steps", steps))
    assert "images per step" in fails(capsys, flags(images, tmp_path, "--resume", "auto", "--batch_size", 4))


def test_a_run_goes_on_inside_an_epoch_only_with_the_same_data(images, make_images, tmp_path, capsys):
    main_pretrain.main(flags(images, tmp_path / "run", "--max_steps", 1))
    other = make_images(tmp_path / "other", 30)
    assert "other data" in fails(capsys, flags(other, tmp_path / "run", "--resume", "auto"))


def test_changed_flags_are_announced_and_count(images, tmp_path, capsys):
    main_pretrain.main(flags(images, tmp_path, "--max_steps", 1))
    main_pretrain.main(flags(images, tmp_path, "--resume", "auto", "--weight_decay", 0.5))
    assert "--weight_decay was 0.05 and is now 0.5" in capsys.readouterr().out
    groups = read_checkpoint(tmp_path / "checkpoint-last.pth")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]


def test_a_resumed_run_does_not_need_its_start_weights(images, tmp_path):
    start = tmp_path / "start.pth"
    save_checkpoint(start, {"model": main_pretrain.build_mae("mae_vit_nano_patch8", 16).state_dict()})
    main_pretrain.main(flags(images, tmp_path / "run", "--init", start, "--max_steps", 1))
    start.unlink()
    main_pretrain.main(flags(images, tmp_path / "run", "--init", start, "--resume", "auto"))


def test_the_recipe_reaches_the_optimizer(images, tmp_path):
    """blr x effective batch / 256, two epochs of warm-up, and the best checkpoint is that of the lowest loss."""
    argv = ["--blr", 0.32, "--warmup_epochs", 2, "--epochs", 3, "--accum_iter", 2, "--clip_grad", 1e-9]
    argv = [flag for flag in flags(images, tmp_path, *argv) if flag not in ("--lr", "1e-3")]
    main_pretrain.main(argv)
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    peak = 0.32 * 16 / 256  # two steps an epoch
    assert [line["lr"] for line in lines] == pytest.approx([peak / 2, peak, peak / 2])
    best = min(lines, key=lambda line: line["val_loss"])
    saved = read_checkpoint(tmp_path / "checkpoint-best.pth")
    assert saved["epoch"] == best["epoch"] and saved["progress"]["best"] == best["val_loss"]


def test_clipping_changes_the_step(images, tmp_path, monkeypatch):
    norms = []
    real = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    main_pretrain.main(flags(images, tmp_path / "a", "--max_steps", 2))
    main_pretrain.main(flags(images, tmp_path / "b", "--max_steps", 2, "--clip_grad", 0.01))
    assert min(norms[:2]) > 0.02 and norms[2:] == pytest.approx([0.01, 0.01], rel=1e-3)


@pytest.mark.parametrize("damaged, stops", [(1, False), (4, True)])
def test_damaged_images(make_images, tmp_path, capsys, damaged, stops):
    folder = make_images(tmp_path / "images", 200)
    for i in range(damaged):
        whole = (folder / f"{i * 7:03d}.png").read_bytes()
        (folder / f"{i * 7:03d}.png").write_bytes(whole[: len(whole) // 2])
    argv = flags(folder, tmp_path / "run", "--epochs", 1, "--val_fraction", 0, "--eval_images", 0, "--log_every", 20)
    if stops:
        assert "--max_bad" in fails(capsys, argv)
    else:
        main_pretrain.main(argv)
        assert json.loads((tmp_path / "run" / "results.json").read_text())["bad_images"] == 1
    entries = [json.loads(line) for line in (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()]
    assert {os.path.basename(entry["path"]) for entry in entries} <= {f"{i * 7:03d}.png" for i in range(damaged)}
    assert len(entries) >= (3 if stops else 1) and all(entry["reason"] for entry in entries)


def test_progressive_unfreezing(images, tmp_path, capsys):
    torch.manual_seed(1)
    start = main_pretrain.build_mae("mae_vit_nano_patch8", 16)
    save_checkpoint(tmp_path / "start.pth", {"model": start.state_dict()})
    argv = ["--init", tmp_path / "start.pth", "--unfreeze_every", 1, "--unfreeze_blocks", 2, "--epochs", 2]
    main_pretrain.main(flags(images, tmp_path / "run", *argv))
    before, after = start.state_dict(), read_checkpoint(tmp_path / "run" / "checkpoint-last.pth")["model"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # stage 0 trains the decoder, stage 1 the top two of six blocks too
    assert {"decoder_pred.weight", "mask_token", "blocks.5.mlp.fc1.weight", "blocks.4.norm1.bias"} <= moved
    assert not any(name.startswith(("blocks.0", "blocks.3", "patch_embed", "cls_token")) for name in moved)
    assert not moved & {"pos_embed", "decoder_pos_embed"}
    # exact under resume, the change of stage included
    main_pretrain.main(flags(images, tmp_path / "parts", *argv, "--max_steps", 3))
    main_pretrain.main(flags(images, tmp_path / "parts", *argv, "--resume", "auto", "--max_steps", 2))
    main_pretrain.main(flags(images, tmp_path / "parts", *argv, "--resume", "auto"))
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "run"))


def test_domain_adaptive_pretraining_says_where_the_decoder_comes_from(images, tmp_path, capsys):
    start = main_pretrain.build_mae("mae_vit_nano_patch8", 32)
    encoder = {n: v for n, v in start.state_dict().items() if not n.startswith(("decoder", "mask_token"))}
    save_checkpoint(tmp_path / "encoder.pth", {"model": encoder})
    main_pretrain.main(flags(images, tmp_path / "run", "--init", tmp_path / "encoder.pth", "--max_steps", 1))
    assert "the decoder starts fresh" in capsys.readouterr().out


def test_the_run_folder_holds_what_was_promised(images, tmp_path):
    main_pretrain.main(flags(images, tmp_path, "--accum_iter", 2, "--clip_grad", 0.5, "--norm_pix_loss"))
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "args.json",
        "log.txt",
        "checkpoint-last.pth",
        "checkpoint-best.pth",
        "results.json",
        "reconstruction.png",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert {"train_loss", "train_grad_norm", "lr", "val_loss", "val_psnr_db"} <= lines[0].keys()
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"git_commit", "seed", "device", "versions", "data_fingerprint", "train_seconds"} <= results.keys()
