"""The training loop and its parts: order of images, processes, accumulation, faults, schedules."""

import itertools
import json
import math
import shutil
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models_mae import MaskedAutoencoder
from tests.conftest import SMALL_MAE
from tests.helpers import assert_same
from util.data import prefetch
from util.data.augment import to_unit
from util.data.loader import StepSampler
from util.mae.masking import Masking
from util.mae.scores import SCORES
from util.run.device import grad_scaler
from util.run.dist import World
from util.run.errors import UserError
from util.run.log import RunFolder
from util.run.seed import uniform_for
from util.training.checkpoint import Progress, plain_args, read_checkpoint, restore
from util.training.compile import Compiled
from util.training.faults import NonFiniteGuard
from util.training.loop import Setup, _Trainer, train
from util.training.optim import WarmupCosine, decay_groups, make_optimizer, unfreeze_in_stages

WORKER = "tests/gradient_worker.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(make_images, tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), 40)


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def load(path):
    return torch.load(path, weights_only=True)


def test_the_guard_reports_a_loss_that_is_infinite_with_a_finite_gradient():
    optimizer = make_optimizer([{"params": [nn.Parameter(torch.ones(4))]}], 0.1, torch.device("cpu"))
    guard = NonFiniteGuard(optimizer, torch.amp.GradScaler("cpu", enabled=False), torch.device("cpu"))
    for step, loss in enumerate([1.0, math.inf, 1.0]):
        guard.step(torch.tensor(loss), torch.tensor(1.0), step)
    assert guard.first_bad_step() == 2


def test_processes_and_accumulation_share_out_the_same_gradient(images, run_script, tmp_path):
    """Eight images a step: at once, as two batches, or on two processes. Compared in float64."""
    run_script(WORKER, images, tmp_path / "one", 8, 1)
    run_script(WORKER, images, tmp_path / "accum", 4, 2)
    run_script(WORKER, images, tmp_path / "two", 4, 1, processes=2)
    run_script(WORKER, images, tmp_path / "both", 2, 2, processes=2)
    reference = load(tmp_path / "one.0.pth")
    assert len(reference["gradients"]) == 4
    for name in ("accum.0", "two.0", "two.1", "both.0", "both.1"):
        other = load(tmp_path / f"{name}.pth")
        for mine, theirs in zip(reference["gradients"], other["gradients"], strict=True):
            assert mine.keys() == theirs.keys()
            for key in mine:
                assert torch.allclose(mine[key], theirs[key], rtol=1e-9, atol=1e-13), (name, key)


def test_a_loss_that_is_nan_on_one_process_stops_all_before_any_weight_changes(images, run_script, tmp_path):
    run_script(WORKER, images, tmp_path / "good", 4, 1, "short", processes=2)
    run_script(WORKER, images, tmp_path / "bad", 4, 1, "nan", processes=2)
    after_two_steps = load(tmp_path / "good.0.pth")["model"]
    for rank in (0, 1):
        outcome = load(tmp_path / f"bad.{rank}.pth")
        assert "is not finite at step 3" in outcome["error"]  # the third
        assert all(torch.equal(after_two_steps[name], value) for name, value in outcome["model"].items())
    assert not (tmp_path / "bad-run" / "checkpoint-last.pth").exists()


def test_a_signal_during_the_evaluation_of_one_process_stops_both(images, run_script, tmp_path):
    run_script(WORKER, images, tmp_path / "out", 4, 1, "signal", processes=2)
    outcomes = [load(tmp_path / f"out.{rank}.pth") for rank in (0, 1)]
    assert [outcome["error"] for outcome in outcomes] == ["SIGTERM", "SIGTERM"]
    assert [len(outcome["gradients"]) for outcome in outcomes] == [5, 5]  # one epoch of two


def test_the_guard_lets_no_update_through_from_the_first_bad_step_on():
    weight = nn.Parameter(torch.ones(4))
    optimizer = make_optimizer([{"params": [weight]}], 0.1, torch.device("cpu"))
    guard = NonFiniteGuard(optimizer, torch.amp.GradScaler("cpu", enabled=False), torch.device("cpu"))
    history = []
    for step, gradient in enumerate([1.0, 1.0, math.inf, 1.0]):
        weight.grad = torch.full((4,), gradient)
        guard.step(torch.tensor(0.0), weight.grad.norm(), step)
        history.append(weight.detach().clone())
    assert guard.first_bad_step() == 3  # the third
    assert not torch.equal(history[0], history[1])
    assert torch.equal(history[1], history[2]) and torch.equal(history[1], history[3])


@pytest.mark.parametrize("processes, batch, accum", [(1, 12, 1), (2, 3, 2), (3, 2, 2), (4, 3, 1)])
def test_a_step_sees_the_same_images_however_it_is_shared_out(processes, batch, accum):
    reference = StepSampler(50, 12, 1, 7, World())
    reference.enter(3, 0)
    expected = [sorted(index for _, index in step) for step in reference]
    assert len(expected) == 4 and len({i for step in expected for i in step}) == 48
    shares = []
    for rank in range(processes):
        sampler = StepSampler(50, batch, accum, 7, World(rank, rank, processes))
        sampler.enter(3, 0)
        batches = [[index for epoch, index in b] for b in sampler]
        assert len(batches) == len(sampler) == 4 * accum and all(len(b) == batch for b in batches)
        shares.append([flat(batches[s * accum : (s + 1) * accum]) for s in range(4)])
    assert [sorted(flat(share[s] for share in shares)) for s in range(4)] == expected


def test_an_epoch_is_entered_at_any_step_and_epochs_differ():
    sampler = StepSampler(50, 6, 2, 0, World())
    sampler.enter(1, 0)
    whole = list(sampler)
    sampler.enter(1, 3)
    assert list(sampler) == whole[6:]
    sampler.enter(2, 0)
    assert [[i for _, i in b] for b in sampler] != [[i for _, i in b] for b in whole]
    with pytest.raises(UserError, match="larger than the data set"):
        StepSampler(10, 6, 2, 0, World())


def test_warmup_and_cosine():
    schedule = WarmupCosine(lr=1.0, min_lr=0.1, warmup_steps=4, total_steps=12)
    assert [schedule.at(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule.at(4) == 1.0 and schedule.at(8) == pytest.approx(0.55) and schedule.at(12) == pytest.approx(0.1)
    # torch's own cosine, from the end of the warm-up on
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8, eta_min=0.1)
    for step in range(4, 12):
        assert schedule.at(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    optimizer.param_groups[0]["lr_scale"] = 0.5
    schedule.apply(optimizer, 0)
    assert optimizer.param_groups[0]["lr"] == 0.125


def small_encoder():
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
    model.norm, model.decoder_embed, model.patch_embed = nn.LayerNorm(2), nn.Linear(2, 2), nn.Linear(2, 2)
    model.pos_embed = nn.Parameter(torch.zeros(1, 3, 2), requires_grad=False)
    return model


def test_stages_open_the_encoder_from_the_top():
    model = small_encoder()
    stage = unfreeze_in_stages(model, every=3, top_k=2, always=("decoder",))
    opened = [
        sorted({name.split(".weight")[0].split(".bias")[0] for name in stage(epoch)}) for epoch in (0, 2, 3, 6, 9)
    ]
    assert opened[0] == opened[1] == ["decoder_embed"]
    assert opened[2] == ["blocks.3", "blocks.4", "decoder_embed", "norm"]
    assert opened[3] == ["blocks.1", "blocks.2", "blocks.3", "blocks.4", "decoder_embed", "norm"]
    assert opened[4] == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
        "blocks.3",
        "blocks.4",
        "decoder_embed",
        "norm",
        "patch_embed",
    ]
    assert not model.pos_embed.requires_grad


def test_biases_and_norms_do_not_decay():
    decayed, plain = decay_groups(small_encoder().named_parameters(), 0.05)
    assert decayed["weight_decay"] == 0.05 and plain["weight_decay"] == 0
    assert all(p.ndim == 2 for p in decayed["params"]) and len(decayed["params"]) == 7
    assert all(p.ndim == 1 for p in plain["params"]) and len(plain["params"]) == 9


class Numbers:
    """A loader of random pictures, as the training loop sees one. damaged: batch -> index of a damaged image in it."""

    images, fingerprint, step_images = 100, "numbers", 4

    def __init__(self, steps: int, accum_iter: int = 1, damaged: dict[int, int] | None = None):
        self.steps, self.accum_iter, self.damaged = steps, accum_iter, damaged or {}

    def enter(self, epoch, step):
        for number in range(step * self.accum_iter, self.steps * self.accum_iter):
            noise = torch.Generator().manual_seed(100 * epoch + number)
            image = torch.randint(0, 256, (self.step_images // self.accum_iter, 3, 32, 32), generator=noise)
            bad = [(self.damaged[number], "x.png", "cut short")] if number in self.damaged else []
            index = torch.arange(len(image)) + 10 * number
            yield {"image": image.to(torch.uint8), "index": index, "epoch": epoch, "bad": bad}

    def close(self):
        pass


class Dropping(nn.Module):
    """Two layers with dropout between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3072, 8), nn.Linear(8, 2)

    def forward(self, image):
        hidden = nn.functional.gelu(self.first(image.flatten(1).float() / 255))
        return self.second(nn.functional.dropout(hidden, 0.5, self.training))


def dropping_step(model, batch):
    return {"loss": model(batch["image"]).square().mean()}


def small_mae_step(model, batch):
    noise = uniform_for(0, batch["epoch"], batch["index"], 16)
    return {"loss": model(to_unit(batch["image"]), 0.75, noise, 1.0)}


def setup_of(folder, model=None, step=dropping_step, loader=None, precision="fp32", world=None, **flags) -> Setup:
    """A run of `Dropping` or another model on the CPU; flags: of the scripts."""
    if model is None:
        torch.manual_seed(0)
        model = Dropping()
    loader = loader or Numbers(4)
    defaults = {"epochs": 1, "accum_iter": 1, "clip_grad": None, "log_every": 100, "save_steps": None, "seed": 0}
    defaults |= {"max_steps": None, "eval_every": 1, "max_bad": 1.0, "compile": "off"}
    return Setup(
        args=SimpleNamespace(**{**defaults, **flags}), model=model, step_fn=step, loader=loader,
        optimizer=make_optimizer(decay_groups(model.named_parameters(), 0.05), 1e-3, CPU),
        schedule=WarmupCosine(1e-3, 0, 0, 10), world=world or World(), device=CPU, precision=precision,
        scaler=grad_scaler(CPU, precision), run=RunFolder(folder, is_main=True),
    )  # fmt: skip


def resumed(setup: Setup) -> Progress:
    """Where the run's last checkpoint stands, put into the setup."""
    args = plain_args(setup.args)
    return restore(setup.run.last, setup.model, setup.optimizer, setup.scaler, args, setup.loader, setup.run.say)


class NoWaiting(TorchDispatchMode):
    """Fails where the host reads a number from a tensor, but in the functions that are there to wait."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2")
    METHODS = ("tolist", "cpu", "numpy", "item", "__bool__", "__float__", "__int__", "__index__")
    WAITS = ("_look", "_agree", "_note_time", "_end_epoch", "_save")

    def __init__(self, monkeypatch):
        super().__init__()
        self.allowed, self.waits = 0, []
        for name in self.WAITS:
            monkeypatch.setattr(_Trainer, name, self._allowing(name, getattr(_Trainer, name)))
        for name in self.METHODS:
            monkeypatch.setattr(torch.Tensor, name, self._refusing(name, getattr(torch.Tensor, name)))

    def _allowing(self, name, method):
        def run(*args, **kwargs):
            self.allowed += 1
            self.waits.append(name)
            try:
                return method(*args, **kwargs)
            finally:
                self.allowed -= 1

        return run

    def _refusing(self, name, method):
        def run(*args, **kwargs):
            assert self.allowed, f"the host waits in Tensor.{name}"
            return method(*args, **kwargs)

        return run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert self.allowed or name not in self.READS, f"the host waits in {name}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_host_never_waits_for_the_device_inside_an_epoch(tmp_path, monkeypatch, precision):
    loader = Numbers(6, accum_iter=2)
    setup = setup_of(
        tmp_path, MaskedAutoencoder(**SMALL_MAE), small_mae_step, loader, precision,
        accum_iter=2, clip_grad=1.0, log_every=4,
    )  # fmt: skip
    with NoWaiting(monkeypatch) as watch:
        train(setup, Progress())
    assert watch.waits == ["_look", "_agree", "_agree", "_note_time", "_end_epoch", "_save"]


def test_no_masking_strategy_makes_the_host_wait(monkeypatch):
    everything = Masking("+".join(SCORES), schedule="easy_to_hard", epochs=3)
    images, index = torch.rand(4, 3, 32, 32), torch.arange(4)
    maps = torch.full((4, len(everything.maps), 4, 4), 128, dtype=torch.uint8)
    with NoWaiting(monkeypatch) as watch:
        everything.order(images, (4, 4), 1, index, maps, torch.rand(4, 16))
    assert not watch.waits


@pytest.mark.parametrize("read", ["__float__", "__bool__", "item", "tolist", "cpu", "nonzero"])
def test_a_step_that_waits_would_be_found(tmp_path, monkeypatch, read):
    def waiting(model, batch):
        loss = dropping_step(model, batch)["loss"]
        getattr(loss, read)()
        return {"loss": loss}

    with NoWaiting(monkeypatch), pytest.raises(AssertionError, match="the host waits"):
        train(setup_of(tmp_path, step=waiting), Progress())


def test_the_gradient_norm_is_one_kernel_for_many_tensors():
    """`get_total_norm` takes the fused path where there is one."""
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    gradients = [torch.randn(3, 4) for _ in range(20)]
    with Names():
        norm = nn.utils.get_total_norm(gradients)
    assert names.count("_foreach_norm") == 1 and len(names) < 5
    assert norm.item() == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-6)


def test_damaged_images_count_when_they_are_trained_on(tmp_path, monkeypatch):
    """With a batch in flight, as on CUDA, a run that stops early has not heard of what it holds."""
    monkeypatch.setattr(prefetch, "side_stream", lambda device: "side")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_stream=lambda stream: None))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    loader = Numbers(4, damaged={1: 11, 2: 22, 3: 33})
    first = train(setup_of(tmp_path, loader=loader, max_steps=2), Progress())
    assert first["bad_images"] == 1
    found = [json.loads(line)["index"] for line in (tmp_path / "bad_images.jsonl").read_text().splitlines()]
    assert found == [11]
    setup = setup_of(tmp_path, loader=loader)
    assert train(setup, resumed(setup))["bad_images"] == 3
    whole = setup_of(tmp_path / "whole", loader=Numbers(4))
    monkeypatch.undo()
    train(whole, Progress())
    assert_same(dict(setup.model.state_dict()), dict(whole.model.state_dict()))


def slow_compile(forward):
    """Stands for torch.compile: the first call takes a while."""
    calls = []

    def run(*args):
        calls or time.sleep(0.2)
        calls.append(1)
        return forward(*args)

    return run


def test_the_warm_up_of_a_compiled_model_is_told_apart_from_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", slow_compile)
    results = train(setup_of(tmp_path, compile="on", max_steps=3), Progress())
    assert "compiled in 0 s" in capsys.readouterr().out
    assert results["compile_seconds"] >= 0.2 and results["images_seen"] == 12
    assert results["images_per_s"] == pytest.approx(8 / results["train_seconds"])
    setup = setup_of(tmp_path, compile="on")
    last = train(setup, resumed(setup))
    assert last["compile_seconds"] >= 0.4 and last["images_per_s"] == pytest.approx(8 / last["train_seconds"])
    names = read_checkpoint(tmp_path / "checkpoint-last.pth")["model"].keys()
    assert names == Dropping().state_dict().keys()


def test_a_model_that_cannot_be_compiled_runs_as_it_is(tmp_path, monkeypatch, capsys):
    def broken(forward):
        def run(*args):
            raise RuntimeError("\nNo working C++ compiler found\nmore about it")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    setup, plain = setup_of(tmp_path / "a", compile="on"), setup_of(tmp_path / "b")
    train(setup, Progress())
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "compile" in line] == [
        "warning: torch.compile fails here, so the model runs without it: No working C++ compiler found"
    ]
    train(plain, Progress())
    assert_same(dict(setup.model.state_dict()), dict(plain.model.state_dict()))


def test_the_models_own_errors_are_not_blamed_on_the_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward: forward)

    class Wrong(Dropping):
        def forward(self, image):
            raise UserError("no such picture")

    with pytest.raises(UserError, match="no such picture"):
        train(setup_of(tmp_path, Wrong(), compile="on"), Progress())


def test_ddp_goes_around_the_compiled_model(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", slow_compile)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        trainer = _Trainer(setup_of(tmp_path, compile="on", world=World(0, 0, 2)), Progress())
        trainer._prepare_epoch()
    finally:
        torch.distributed.destroy_process_group()
    assert isinstance(trainer.wrapped, nn.parallel.DistributedDataParallel)
    assert isinstance(trainer.wrapped.module, Compiled)
    assert trainer.wrapped.module.model is trainer.setup.model


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_a_compiled_run_resumes_exactly(tmp_path, capsys):
    def compiled(folder, **flags):
        torch._dynamo.reset()
        return setup_of(tmp_path / folder, compile="on", **flags)

    whole = compiled("whole")
    train(whole, Progress())
    train(compiled("parts", max_steps=2), Progress())
    parts = compiled("parts")
    results = train(parts, resumed(parts))
    assert results["compile_seconds"] > 0 and capsys.readouterr().out.count("compiled in") == 3
    assert_same(dict(parts.model.state_dict()), dict(whole.model.state_dict()))
    assert_same(parts.optimizer.state_dict(), whole.optimizer.state_dict())
