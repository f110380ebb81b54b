"""Several processes against one: training, evaluation, resuming on other numbers of them, and sharded models (FSDP2).

Run: python -m pytest tests/test_ranks.py
"""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import main_finetune
import main_lora
import main_pretrain
from models_mae import build_mae
from models_transfer import attach_head, start_backbone
from tests.helpers import assert_same, make_identities, outcome, results_of, transfer_flags
from tests.ranks import run_ranks
from util.data.augment import EvalCrop
from util.data.labels import open_labelled
from util.run.dist import World, join, leave, read_world
from util.run.errors import UserError
from util.run.files import only_writer
from util.training.checkpoint import read_checkpoint
from util.training.optim import decay_groups, make_optimizer
from util.training.session import session
from util.training.sharded import own_part, put_back, shard, whole_state
from util.transfer import features, recipe
from util.transfer.recipe import Validation

STEP = 12  # images of a step, whoever sees them
MAINS = {"pretrain": main_pretrain.main, "finetune": main_finetune.main, "lora": main_lora.main}
# what runs on one process and on several: script, and flags that draw no numbers of their own in each process
RECIPES = {
    "pretrain": ("pretrain", ""),
    "pretrain accumulated": ("pretrain", "--accum_iter 3 --clip_grad 0.5 --grad_checkpoint"),
    "pretrain hard and refined": ("pretrain", "--masking hard --refine --colour_loss 0.5"),
    "pretrain in stages": ("pretrain", "--unfreeze_every 1 --unfreeze_blocks 4"),
    "finetune": ("finetune", "--smoothing 0.1 --layer_decay 0.7"),
    "finetune curricular": ("finetune", "--head curricularface --margin_warmup 1"),
    "lora": ("lora", "--rank 2 --head mlp"),
}


@pytest.fixture(scope="module")
def data(make_images, tmp_path_factory):
    """Pictures for each script; neither their number nor that of the held-out ones can be shared out evenly."""
    images = make_images(tmp_path_factory.mktemp("images"), 43)
    people = make_identities(tmp_path_factory.mktemp("people"), train=13, val=5, test=3)
    (people / "val" / "rei" / "02.png").write_bytes(b"damaged")
    return {"pretrain": images, "finetune": people, "lora": people}


def command(data, recipe: str, run: Path, processes: int = 1, *more) -> list[str]:
    """The flags of a recipe whose step is shared out over so many processes."""
    script, own = RECIPES[recipe]
    accum = 3 if "--accum_iter" in own else 1
    more = [*own.split(), "--batch_size", STEP // processes // accum, *more]
    if script != "pretrain":
        return transfer_flags(data[script], run, *more)
    fixed = "--model mae_vit_nano_patch8 --input_size 16 --epochs 2 --warmup_epochs 1 --lr 1e-3 --device cpu"
    fixed += " --num_workers 0 --eval_images 5 --log_every 2 --labels none --val_fraction 0.15"
    return ["--data_path", str(data[script]), "--output_dir", str(run), *fixed.split(), *map(str, more)]


def train_with(processes: int, data, recipe: str, run: Path, *more, **options) -> list[str]:
    """Run a recipe on several processes; returns what each said."""
    script = RECIPES[recipe][0]
    return run_ranks(processes, f"main_{script}:main", command(data, recipe, run, processes, *more), **options)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """alone(recipe): the run of one process."""
    runs = {}

    def of(recipe: str) -> Path:
        if recipe not in runs:
            run = tmp_path_factory.mktemp("alone") / "run"
            MAINS[RECIPES[recipe][0]](command(data, recipe, run))
            runs[recipe] = run
        return runs[recipe]

    return of


def assert_close(run: Path, reference: Path, rtol: float = 2e-4) -> None:
    """The same run but for the order in which numbers were added up: its log, its figures, its weights."""
    (weights, _, progress, lines), (expected, _, other, lines_alone) = outcome(run), outcome(reference)
    assert progress["global_step"] == other["global_step"] > 4 and len(lines) == len(lines_alone)
    for line, line_alone in zip(lines, lines_alone, strict=True):
        assert line == pytest.approx(line_alone, rel=rtol, abs=1e-5)
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        value, there = value.float(), expected[name].float()
        if name.endswith("qkv.bias"):  # a key's bias has no gradient but rounding, which AdamW makes a step of
            value, there = (torch.cat([part.chunk(3)[0], part.chunk(3)[2]]) for part in (value, there))
        # so are the gradients of what hardly moves: two steps of 1e-3 shall not be told apart by 3e-5
        assert torch.dist(value, there) <= rtol * there.norm() + 3e-5, name


@pytest.mark.parametrize("recipe, processes", [("pretrain", 2), ("pretrain", 4), ("finetune", 2), ("finetune", 4)])
def test_two_and_four_processes_train_as_one(data, alone, tmp_path, recipe, processes):
    train_with(processes, data, recipe, tmp_path / "run")
    assert_close(tmp_path / "run", alone(recipe))
    if recipe == "finetune":
        test, expected = (results_of(run)["test"] for run in (tmp_path / "run", alone(recipe)))
        assert test == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("delays", [(0, 1.5), (1.5, 0)], ids=["second late", "first late"])
def test_who_starts_late_changes_nothing(data, tmp_path, delays):
    train_with(2, data, "pretrain", tmp_path / "prompt")
    train_with(2, data, "pretrain", tmp_path / "late", delays=delays)
    assert_same(outcome(tmp_path / "late"), outcome(tmp_path / "prompt"))


def test_a_run_goes_on_with_other_numbers_of_processes(data, alone, tmp_path):
    run, more = tmp_path / "run", ("--max_steps", 2, "--resume", "auto")
    train_with(2, data, "pretrain", run, *more)
    train_with(4, data, "pretrain", run, *more[2:], "--max_steps", 1)
    MAINS["pretrain"](command(data, "pretrain", run, 1, *more[2:]))
    assert_close(run, alone("pretrain"))


def test_another_number_of_images_per_step_is_refused(data, tmp_path):
    MAINS["pretrain"](command(data, "pretrain", tmp_path, 1, "--max_steps", 2))
    said = train_with(3, data, "pretrain", tmp_path, "--resume", "auto", "--batch_size", STEP, fails=True)
    assert f"a run with {STEP} images per step, now there are {3 * STEP}" in said[0]


# what ends a run on all processes, in the same line


def _refused(script: str, argv: list[str], places: str = "") -> None:
    """In each process: a script is to end with status 2. places: a folder with a working directory for each."""
    if places:
        os.chdir(Path(places) / os.environ["RANK"])
    with pytest.raises(SystemExit) as stop:
        MAINS[script](argv)
    assert stop.value.code == 2


def refusal(*arguments, function: str = "_refused") -> str:
    """The one line with which each of two processes ends."""
    said = run_ranks(2, f"tests.test_ranks:{function}", *arguments)
    assert "Traceback" not in "".join(said)
    lines = [[line for line in text.splitlines() if line.startswith("error: ")] for text in said]
    assert lines[0] == lines[1] and len(lines[0]) == 1, said
    return lines[0][0]


@pytest.mark.parametrize("resumed", ["fresh", "resumed on one", "resumed on both", "locked on both"])
def test_machines_that_share_no_folder_are_refused(data, alone, tmp_path, resumed):
    for rank, place in enumerate((tmp_path / "0", tmp_path / "1")):
        place.mkdir()
        if resumed == "resumed on both" or (resumed == "resumed on one" and rank == 0):
            shutil.copytree(alone("pretrain"), place / "run")
        if resumed == "locked on both":  # by a run that was killed
            (place / "run").mkdir()
            (place / "run" / ".lock").write_text("process 1 on elsewhere")
    said = refusal("pretrain", command(data, "pretrain", Path("run"), 2, "--resume", "auto"), str(tmp_path))
    assert "process 1 does not see the folder run" in said and "--output_dir that all machines share" in said


def test_a_folder_in_use_is_refused_by_all(data, tmp_path):
    (tmp_path / "run").mkdir()
    with only_writer(tmp_path / "run"):
        said = refusal("pretrain", command(data, "pretrain", tmp_path / "run", 2))
    assert f"is in use by process {os.getpid()} on " in said


def test_a_folder_that_cannot_be_made_is_refused_by_all(data, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be made" in refusal("pretrain", command(data, "pretrain", tmp_path / "file" / "run", 2))


def _scored_as_if_none_could_be_read(argv: list[str]) -> None:
    score = recipe.score
    recipe.score = lambda logits, labels: score(logits[:0], labels[:0])
    try:
        _refused("finetune", argv)
    finally:
        recipe.score = score


def test_held_out_images_of_which_none_can_be_read_are_refused_by_all(data, tmp_path):
    said = refusal(command(data, "finetune", tmp_path / "run", 2), function="_scored_as_if_none_could_be_read")
    assert "none of the held-out images can be read" in said


def _count_checks(argv: list[str], out: str) -> None:
    """In each process: how often a run compares the checksums of a checkpoint."""
    judge, judged = zipfile.ZipFile.testzip, []
    zipfile.ZipFile.testzip = lambda archive: judged.append(1) or judge(archive)
    try:
        main_pretrain.main(argv)
    finally:
        zipfile.ZipFile.testzip = judge
    Path(f"{out}.{os.environ['RANK']}").write_text(str(len(judged)))


def test_a_checkpoint_is_judged_once(data, tmp_path):
    MAINS["pretrain"](command(data, "pretrain", tmp_path / "run", 1, "--max_steps", 2))
    argv = command(data, "pretrain", tmp_path / "run", 2, "--resume", "auto", "--batch_size", "auto")
    run_ranks(2, "tests.test_ranks:_count_checks", argv, str(tmp_path / "out"))
    assert [(tmp_path / f"out.{rank}").read_text() for rank in range(2)] == ["1", "0"]


# evaluation


@pytest.mark.parametrize("count, size", [(1, 1), (7, 3), (6, 3), (2, 4), (0, 2)])
def test_rows_are_dealt_to_equal_shares(count, size):
    shares = [World(rank, rank, size).rows(count) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    dealt = [share[turn] for turn in range(len(shares[0])) for share in shares]
    assert dealt[:count] == list(range(count)) and len(dealt) < count + size


def _figures(kind: str, argv: list[str], out: str) -> None:
    """In each process: the figures of a fresh model on held-out samples."""
    args = (main_pretrain if kind == "pretrain" else main_finetune).get_args(argv)
    with session(args) as here:
        if kind == "pretrain":
            model = main_pretrain.build_model(args, here.run, fresh=True).eval()
            figures = main_pretrain.HeldOut(args, here)(model, 1)
        else:
            task, model = open_labelled(args), start_backbone(vars(args))
            attach_head(model, vars(args), len(task.classes))
            figures = Validation(here, task, task.val)(model)
        Path(f"{out}.{here.world.rank}").write_text(json.dumps(figures))


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_held_out_samples_are_shared_out_and_give_the_figures_of_one_process(data, tmp_path, kind):
    argv = command(data, kind, tmp_path / "run", 3, "--batch_size", 2)
    _figures(kind, argv, str(tmp_path / "one"))
    said = run_ranks(3, "tests.test_ranks:_figures", kind, argv, str(tmp_path / "three"))
    expected = json.loads((tmp_path / "one.0").read_text())
    for rank in range(3):
        assert json.loads((tmp_path / f"three.{rank}").read_text()) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    if kind == "finetune":
        assert [text.count("left out of the evaluation") for text in said] == [1, 0, 0]


def test_all_judge_the_model_that_is_saved(data, tmp_path):
    """What batch norm has seen differs between the processes; the main one's is saved."""
    argv = transfer_flags(data["finetune"], tmp_path / "run", "--epochs", 2, "--batch_size", 6)
    argv[argv.index("vit_nano_patch8")] = "timm:test_resnet"
    run_ranks(2, "main_finetune:main", argv)
    logged = outcome(tmp_path / "run")[-1][-1]
    args = main_finetune.get_args([*argv, "--output_dir", str(tmp_path / "other")])
    with session(args) as here:
        task, model = open_labelled(args), start_backbone(vars(args))
        attach_head(model, vars(args), len(task.classes))
        model.load_state_dict(read_checkpoint(tmp_path / "run/checkpoint-last.pth")["model"])
        figures = Validation(here, task, task.val)(model)
    assert {name: logged[f"val_{name}"] for name in figures} == pytest.approx(figures, rel=1e-5)


def _embed(argv: list[str], out: str, chunk: int) -> None:
    """In each process: the embeddings of the training images, and how many of them this process has computed."""
    features.CHUNK = chunk
    compute, embedded = features._compute, []

    def counted(here, encoder, source, transform, view, chunks, bar):
        embedded.extend(map(len, chunks))
        return compute(here, encoder, source, transform, view, chunks, bar)

    features._compute = counted
    try:
        args = main_finetune.get_args(argv)
        with session(args) as here:
            task, model = open_labelled(args), start_backbone(vars(args)).eval()
            crop, cache = EvalCrop((16, 16)), Path(f"{out}-cache")
            found = features.cached_features(here, cache, model, "w", task.train, crop)
            torch.save({"embeddings": found.embeddings, "embedded": sum(embedded)}, f"{out}.{here.world.rank}")
    finally:
        features._compute = compute


def test_embeddings_are_shared_out_and_are_those_of_one_process(data, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 5)
    argv = command(data, "finetune", tmp_path / "run")
    _embed(argv, str(tmp_path / "one"), 5)
    run_ranks(3, "tests.test_ranks:_embed", argv, str(tmp_path / "three"), 5)
    expected, parts = torch.load(tmp_path / "one.0"), [torch.load(tmp_path / f"three.{rank}") for rank in range(3)]
    assert expected["embedded"] == 52 == sum(part["embedded"] for part in parts)
    assert all(part["embedded"] >= 15 for part in parts)
    for part in parts:
        np.testing.assert_allclose(part["embeddings"], expected["embeddings"], rtol=1e-6, atol=1e-6)


# sharded models


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_sharded_run_is_that_of_one_process(data, alone, tmp_path, recipe):
    train_with(2, data, recipe, tmp_path / "run", "--fsdp")
    assert_close(tmp_path / "run", alone(recipe))
    mine, expected = (read_checkpoint(run / "checkpoint-last.pth") for run in (tmp_path / "run", alone(recipe)))
    assert mine.keys() == expected.keys() and mine["args"].keys() == expected["args"].keys()
    for part in ("model", "optimizer"):
        assert_same(_layout(mine[part]), _layout(expected[part]))
    if RECIPES[recipe][0] != "pretrain":
        best = [read_checkpoint(run / "checkpoint-best.pth")["model"] for run in (tmp_path / "run", alone(recipe))]
        assert_same(*map(_layout, best))
        test, expected = (results_of(run)["test"] for run in (tmp_path / "run", alone(recipe)))
        assert test == pytest.approx(expected, rel=1e-3)


def _layout(state):
    """A state dict with shapes and kinds in the place of tensors."""
    if isinstance(state, dict):
        return {name: _layout(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_layout(value) for value in state]
    return (tuple(state.shape), state.dtype, type(state).__name__) if isinstance(state, torch.Tensor) else state


def test_a_sharded_run_resumes_exactly(data, tmp_path):
    train_with(3, data, "pretrain", tmp_path / "whole", "--fsdp")
    train_with(3, data, "pretrain", tmp_path / "parts", "--fsdp", "--max_steps", 2)
    train_with(3, data, "pretrain", tmp_path / "parts", "--fsdp", "--resume", "auto")
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))


def test_a_run_goes_on_sharded_and_whole_in_turns(data, alone, tmp_path):
    run, more = tmp_path / "run", ("--resume", "auto", "--max_steps", 1)
    train_with(2, data, "pretrain", run, *more, "--fsdp")
    train_with(2, data, "pretrain", run, *more)
    train_with(3, data, "pretrain", run, *more, "--fsdp")
    MAINS["pretrain"](command(data, "pretrain", run, 1, *more))
    train_with(2, data, "pretrain", run, *more[:2], "--fsdp")
    assert_close(run, alone("pretrain"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_works_sharded(data, tmp_path, precision):
    more = ("--precision", precision, "--clip_grad", 1)
    train_with(2, data, "pretrain", tmp_path / "sharded", *more, "--fsdp")
    train_with(2, data, "pretrain", tmp_path / "whole", *more)
    assert_close(tmp_path / "sharded", tmp_path / "whole", rtol=5e-3)
    scaler = read_checkpoint(tmp_path / "sharded" / "checkpoint-last.pth")["scaler"]
    assert bool(scaler) == (precision == "fp16")


def test_a_sharded_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(data, tmp_path):
    train_with(2, data, "pretrain", tmp_path, "--fsdp", "--max_steps", 2)
    good = (tmp_path / "checkpoint-last.pth").read_bytes()
    said = train_with(2, data, "pretrain", tmp_path, "--fsdp", "--resume", "auto", "--lr", 1e30, fails=True)
    assert "is not finite at step" in said[0] and "Traceback" not in said[0]
    assert (tmp_path / "checkpoint-last.pth").read_bytes() == good


def _share(out: str) -> None:
    """In each process: how much of a model it holds once that is shared out, and what becomes of the whole state."""
    world, device = read_world(), torch.device("cpu")
    join(world, device)
    torch.manual_seed(0)
    model = build_mae("mae_vit_nano_patch8", 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make_optimizer(decay_groups(model.named_parameters(), 0.05), 1e-3, device)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()
    moved = {name: value.clone() for name, value in model.state_dict().items()}
    shard(model, optimizer, world, device)
    held = sum(own_part(parameter).numel() for parameter in model.parameters())
    moments = sum(own_part(value).numel() for state in optimizer.state.values() for value in state.values())
    gathered = whole_state(model.state_dict(), keep=world.is_main)
    put_back(model, before)
    again = whole_state(model.state_dict(), keep=True)
    facts = {"held": held, "moments": moments, "all": sum(value.numel() for value in before.values())}
    same = [all(torch.equal(again[name], before[name]) for name in before)]
    if world.is_main:
        same.append(all(torch.equal(gathered[name], moved[name]) for name in moved))
    kept = [value is not None for value in gathered.values()]
    torch.save({**facts, "same": same, "kept": kept}, f"{out}.{world.rank}")
    leave()


def test_each_process_holds_its_share_and_all_of_it_comes_together_again(tmp_path):
    run_ranks(2, "tests.test_ranks:_share", str(tmp_path / "out"))
    parts = [torch.load(tmp_path / f"out.{rank}") for rank in range(2)]
    assert sum(part["held"] for part in parts) == parts[0]["all"]
    for rank, part in enumerate(parts):
        assert all(part["same"]) and all(part["kept"]) == any(part["kept"]) == (rank == 0)
        assert part["held"] < 0.52 * part["all"] and part["moments"] < 1.05 * part["all"]


@pytest.mark.parametrize(
    "more, reason",
    [
        (("--compile", "on"), "--compile on does not work with --fsdp"),
        (("--batch_size", "auto"), "--batch_size auto cannot foresee"),
    ],
)
def test_what_does_not_work_sharded_is_refused_in_one_line(data, tmp_path, more, reason):
    said = train_with(2, data, "finetune", tmp_path / "run", "--fsdp", *more, fails=True)
    assert reason in said[0] and said[0].count("error: ") == 1 and "Traceback" not in said[0]


def test_a_model_without_blocks_is_refused():
    model = torch.nn.Conv2d(3, 3, 1)
    with pytest.raises(UserError, match="transformer blocks, and this model has none"):
        shard(model, make_optimizer([{"params": model.parameters()}], 1e-3, torch.device("cpu")), World(0, 0, 2), "cpu")


def test_one_process_has_nothing_to_share_out(data, alone, tmp_path):
    MAINS["pretrain"](command(data, "pretrain", tmp_path / "run", 1, "--fsdp"))
    assert_same(outcome(tmp_path / "run"), outcome(alone("pretrain")))
