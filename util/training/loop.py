"""THE training loop. A script hands it `step_fn(model, batch) -> {"loss": ..., other scalars}`.

The loop never waits for the device inside a step: the loss is read every `log_every` steps, and a
non-finite step is noticed on the device, which holds back its update and all later ones until the
host looks. It stops at an optimizer step on SIGTERM, SIGINT and SIGHUP, on every process at the same
one, and a run that is resumed goes on bit for bit as if nothing had happened.
"""

import argparse
import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from util.data.loader import StreamLoader, TrainLoader
from util.data.prefetch import DeviceBatches
from util.run import device as devices
from util.run.dist import World
from util.run.errors import UserError
from util.run.log import RunFolder
from util.run.seed import torch_seed
from util.training.checkpoint import Progress, plain_args, save_checkpoint, select
from util.training.compile import Compiled
from util.training.faults import BadImages, NonFiniteGuard, Signals, Stopped
from util.training.optim import WarmupCosine
from util.training.sharded import own_part, whole, whole_state


@dataclass
class Setup:
    """What a script has built and the loop drives."""

    # the flags: epochs, max_steps, accum_iter, clip_grad, log_every, save_steps, eval_every, max_bad, compile, seed
    args: argparse.Namespace
    model: nn.Module
    step_fn: Callable[[nn.Module, dict], dict[str, torch.Tensor]]
    loader: TrainLoader | StreamLoader
    optimizer: torch.optim.Optimizer
    schedule: WarmupCosine
    world: World
    device: torch.device
    precision: str
    scaler: torch.amp.GradScaler
    run: RunFolder
    # (model, epochs done) -> figures, the same on all processes that have it: all, or the main one alone
    evaluate: Callable[[nn.Module, int], dict[str, float]] | None = None
    stage: Callable[[int], list[str]] | None = None  # progressive unfreezing; see util.training.optim
    best_of: tuple[str, str] = ("loss", "min")  # the evaluation figure that makes a checkpoint the best
    patience: int | None = None  # epochs without a better figure after which the run is over
    saved: Callable[[str], bool] | None = None  # which names of the state dict checkpoints hold; all by default
    best_state: Callable[[], dict] | None = None  # the state dict of checkpoint-best.pth; by default as in the last
    notes: dict = field(default_factory=dict)  # plain facts that go into checkpoints, beside the weights
    sharded: bool = False  # whether the model is shared out over the processes (util.training.sharded)

    def is_over(self, progress: Progress) -> bool:
        """Whether the last epoch is done, or `patience` epochs brought nothing better."""
        judged = self.patience is not None and progress.best_epoch is not None and progress.step == 0
        stale = judged and progress.val_epoch - progress.best_epoch >= self.patience
        return stale or progress.epoch >= self.args.epochs


def train(setup: Setup, progress: Progress) -> dict:
    """Train from where `progress` stands to the last epoch or --max_steps.

    Returns the figures for results.json. Raises Stopped after a signal, UserError where the loss is
    not finite or too many images are damaged; the checkpoint on disk is then the last good one.
    """
    return _Trainer(setup, progress).run()


class _Trainer:
    def __init__(self, setup: Setup, state: Progress):
        self.setup, self.state = setup, state
        self.args, self.world, self.device = setup.args, setup.world, setup.device
        self.steps = setup.loader.steps
        self.total_steps = self.args.epochs * self.steps
        self.guard = NonFiniteGuard(setup.optimizer, setup.scaler, self.device)
        self.bad = BadImages(setup.run, setup.loader.images, self.args.max_bad, resumed=state.global_step > 0)
        self.wrapped = None
        self.exchanges = False  # whether `wrapped` is DistributedDataParallel
        self.compiled: Compiled | None = None  # what `wrapped` is or holds, until its first step is done
        self.trainable = None
        self.stop_signal = 0  # what all processes agreed on, unlike signals.received, which is this one's own
        self.steps_here = 0
        self.sums = self._own_sums(state.sums)
        state.step_images, state.data = setup.loader.step_images, setup.loader.fingerprint

    def run(self) -> dict:
        with Signals() as self.signals, closing(self.setup.loader):
            while not self._is_over() and not self._reached_max_steps():
                self._prepare_epoch()
                finished = self._run_epoch()
                if finished:
                    self._end_epoch()
                else:
                    self._save()
                if not self._is_over():
                    self._agree()  # a signal may have come to one process during the evaluation
                    if self.stop_signal:
                        self._stop()
        return self._summary()

    def _stop(self) -> None:
        stopped = Stopped(self.stop_signal)
        self.setup.run.say(f"stopped by {stopped}; saved to {self.setup.run.last}: go on with --resume auto")
        self.world.barrier()  # torchrun ends all processes as soon as one has left
        raise stopped

    def _own_sums(self, saved: list[dict[str, float]]) -> dict[str, float]:
        """This process's running sums of scalars; where the number of processes changed, the mean of all."""
        if len(saved) == self.world.size:
            return saved[self.world.rank]
        return {name: sum(sums[name] for sums in saved) / len(saved) for name in (saved[0] if saved else ())}

    def _prepare_epoch(self) -> None:
        """Set what is trainable, and wrap the model anew where that changed."""
        trainable = self.setup.stage(self.state.epoch) if self.setup.stage else True
        if self.wrapped is not None and trainable == self.trainable:
            return
        if self.setup.stage:
            self.setup.run.say(f"epoch {self.state.epoch}: {len(trainable)} weights and biases are trainable")
        self.trainable = trainable
        model = self.setup.model
        if not self.setup.sharded and devices.use_compile(self.args.compile, self.device, self.total_steps):
            model = self.compiled = Compiled(model, self.setup.run.say)
        self.exchanges = self.world.size > 1 and not self.setup.sharded
        if self.exchanges:
            ids = [self.device.index] if self.device.type == "cuda" else None
            # gloo: without the search for unused parameters the gradient buckets are laid out anew after the first
            # step, and from three processes on a resumed run would add in another order than an uninterrupted one
            search = self.device.type != "cuda"
            model = DistributedDataParallel(
                model, device_ids=ids, broadcast_buffers=False, find_unused_parameters=search
            )
        self.wrapped = model

    def _run_epoch(self) -> bool:
        """Train to the end of the epoch. False if it was left earlier, at a whole step."""
        state, args = self.state, self.args
        self.setup.model.train()
        sums = {name: torch.tensor(value, device=self.device) for name, value in self.sums.items()}
        batches = DeviceBatches(self.setup.loader.enter(state.epoch, state.step), self.device)
        bar = self.setup.run.progress(
            total=self.steps * state.step_images,
            initial=state.step * state.step_images,
            desc=f"epoch {state.epoch}/{args.epochs}",
            unit="img",
            unit_scale=True,
        )
        started = time.perf_counter()
        while state.step < self.steps:
            scalars = self._step(batches)
            if self.compiled:
                started = self._note_compilation(started)
            sums = {name: sums.get(name, 0.0) + value for name, value in scalars.items()}
            state.step += 1
            state.global_step += 1
            self.steps_here += 1
            bar.update(state.step_images)
            look = state.global_step % args.log_every == 0
            save = args.save_steps and state.global_step % args.save_steps == 0
            if look:
                self._look(scalars, bar)
            leaving = state.step == self.steps or self._reached_max_steps()
            if look or save or leaving or (self.world.size == 1 and self.signals.received):
                self._agree()
            if leaving or self.stop_signal:
                break
            if save:
                self._note_time(sums, started)
                started = time.perf_counter()
                self._save()
        bar.close()
        devices.synchronize(self.device)
        self._note_time(sums, started)
        return state.step == self.steps

    def _note_compilation(self, started: float) -> float:
        """Account for the first step through a compiled model, which is no measure of the speed of training.

        started: when it began (`time.perf_counter`). Returns the present time.
        """
        devices.synchronize(self.device)
        now = time.perf_counter()
        if self.compiled.works:
            self.setup.run.say(f"compiled in {now - started:.0f} s")
        self.state.compile_seconds += now - started
        self.state.compile_steps += 1
        self.compiled = None
        return now

    def _step(self, batches: DeviceBatches) -> dict[str, torch.Tensor]:
        """One optimizer step over `accum_iter` batches. Returns its scalars, still on the device."""
        setup, args, state = self.setup, self.args, self.state
        # dropout and the like: a function of the step, so there is no generator state to save
        torch.manual_seed(torch_seed(args.seed, state.global_step, self.world.rank))
        lr = setup.schedule.apply(setup.optimizer, state.global_step)
        scalars: dict[str, torch.Tensor] = {}
        for micro in range(args.accum_iter):
            batch = next(batches)
            for bad in batch["bad"]:
                self.bad.add(bad)
            last = micro == args.accum_iter - 1
            # gradients are exchanged once per step, not once per batch; of a sharded model nobody has room for all
            with self.wrapped.no_sync() if self.exchanges and not last else nullcontext():
                with devices.autocast(self.device, setup.precision):
                    out = setup.step_fn(self.wrapped, batch)
                setup.scaler.scale(out["loss"] / args.accum_iter).backward()
            batches.prefetch()
            for name, value in out.items():
                scalars[name] = scalars.get(name, 0.0) + value.detach().float() / args.accum_iter
        setup.scaler.unscale_(setup.optimizer)
        parameters = [p for group in setup.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = whole(nn.utils.get_total_norm([p.grad for p in parameters]))
        if args.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(parameters, args.clip_grad, norm)
        self.guard.step(scalars["loss"], norm, state.global_step)
        setup.optimizer.zero_grad(set_to_none=True)
        self.lr = lr
        # under fp16 an overflowing step is skipped: it has no norm to speak of
        return {**scalars, "grad_norm": torch.where(norm.isfinite(), norm, 0.0)}

    def _look(self, scalars: dict[str, torch.Tensor], bar) -> None:
        """Read the scalars from the device: the one place inside an epoch where the host waits."""
        values = {name: float(value) for name, value in scalars.items()}
        bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        self.setup.run.scalars({**{f"train/{k}": v for k, v in values.items()}, "lr": self.lr}, self.state.global_step)

    def _agree(self) -> None:
        """Bring all processes to one mind about signals and faults; UserError on all of them if one has a fault.

        Called at the same steps on every process, and before anything is saved.
        """
        wishes = [self.signals.received, self.guard.first_bad_step(), self.bad.share > self.args.max_bad]
        wishes = self.world.all_reduce(torch.tensor(wishes, dtype=torch.float32, device=self.device), "max")
        self.stop_signal, bad_step, too_many_bad = (int(wish) for wish in wishes.tolist())
        if bad_step:
            self._diverged(bad_step)
        if too_many_bad:
            self.bad.merge(self.world)
            self.bad.check()

    def _diverged(self, step: int) -> None:
        last = self.setup.run.last
        start = f"go on from {last}" if last.exists() else "start again"
        raise UserError(
            f"the loss, a gradient or a weight is not finite at step {step}: nothing of it was saved; "
            f"{start} with a lower --lr, --clip_grad 1 or --precision fp32"
        )

    def _is_over(self) -> bool:
        return self.setup.is_over(self.state)

    def _reached_max_steps(self) -> bool:
        return self.args.max_steps is not None and self.steps_here >= self.args.max_steps

    def _note_time(self, sums: dict[str, torch.Tensor], started: float) -> None:
        self.sums = {name: float(value) for name, value in sums.items()}
        seconds = time.perf_counter() - started
        self.state.seconds += seconds
        self.state.epoch_seconds += seconds

    def _end_epoch(self) -> None:
        """Average the scalars, evaluate, log, and save."""
        setup, state = self.setup, self.state
        names = sorted(self.sums)
        means = torch.tensor([self.sums[name] for name in names], dtype=torch.float32, device=self.device)
        means = (self.world.all_reduce(means) / (self.world.size * self.steps)).tolist()
        line = {"epoch": state.epoch, "global_step": state.global_step, "lr": self.lr}
        line |= {f"train_{name}": value for name, value in zip(names, means, strict=True)}
        line["seconds"] = round(state.epoch_seconds, 3)
        state.epoch, state.step, state.epoch_seconds, self.sums = state.epoch + 1, 0, 0.0, {}
        is_best = self._evaluate(line)
        setup.run.epoch(line)
        setup.run.say("  ".join(f"{key} {_short(value)}" for key, value in line.items()))
        self._save(best=is_best)

    def _evaluate(self, line: dict) -> bool:
        """Add the evaluation's figures to the epoch's line. True if this is the best model so far."""
        setup, state = self.setup, self.state
        if state.epoch % self.args.eval_every and state.epoch != self.args.epochs:
            return False
        better = diverged = False
        # what batch norm has seen differs between the processes: all judge the model that the main one saves
        self.world.take_from_main(setup.model.buffers())
        if setup.evaluate:
            setup.model.eval()
            state.val = setup.evaluate(setup.model, state.epoch)
            line |= {f"val_{name}": value for name, value in state.val.items()}
            setup.run.scalars({f"val/{name}": value for name, value in state.val.items()}, state.global_step)
            figure, aim = setup.best_of
            value = state.val[figure] * (1 if aim == "min" else -1)
            diverged = not all(map(math.isfinite, state.val.values()))
            better = state.best is None or value < state.best
            if better:
                state.best, state.best_val = value, state.val
        found = torch.tensor([diverged, better], dtype=torch.float32, device=self.device)
        diverged, better = (bool(value) for value in self.world.all_reduce(found, "max").tolist())
        if diverged:
            self._diverged(state.global_step)
        state.val_epoch = state.epoch
        if better:
            state.best_epoch = state.epoch
        return better

    def _save(self, best: bool = False) -> None:
        """Write checkpoint-last.pth, and checkpoint-best.pth too if this is the best model so far."""
        setup = self.setup
        weights = torch.stack([own_part(value.detach()).isfinite().all() for value in setup.model.parameters()])
        if self.world.all_reduce((~weights.all()).float(), "max"):
            self._diverged(self.state.global_step)
        self.bad.merge(self.world)
        self.bad.check()
        sums = self.world.gather_objects(self.sums)
        model, optimizer = select(setup.model.state_dict(), setup.saved), setup.optimizer.state_dict()
        if setup.sharded:
            model, optimizer = (whole_state(state, keep=self.world.is_main) for state in (model, optimizer))
        if not self.world.is_main:
            return
        checkpoint = {
            **setup.notes,
            "model": model,
            "optimizer": optimizer,
            "scaler": setup.scaler.state_dict(),
            "epoch": self.state.epoch - 1,  # the last finished one, as in the official layout
            "args": plain_args(self.args),
            "progress": asdict(self.state) | {"sums": sums},
        }
        if best:  # first: a kill between the two then repeats the epoch, and the best is not lost
            kept = {key: value for key, value in checkpoint.items() if key not in ("optimizer", "scaler")}
            if setup.best_state:
                kept["model"] = setup.best_state()
            save_checkpoint(setup.run.best, kept)
        save_checkpoint(setup.run.last, checkpoint, setup.run.previous)

    def _summary(self) -> dict:
        parameters = list(self.setup.model.named_parameters())
        images = self.state.global_step * self.state.step_images
        timed = self.state.global_step - self.state.compile_steps  # steps whose time is in `seconds`
        return {
            "trainable_params": sum(p.numel() for _, p in parameters if p.requires_grad),
            "total_params": sum(p.numel() for _, p in parameters),
            "peak_memory_bytes": devices.peak_memory_bytes(self.device),
            "seconds_per_epoch": self.state.seconds / max(timed, 1) * self.steps,
            "images_per_s": timed * self.state.step_images / self.state.seconds if timed else None,
            "epochs": self.state.epoch,
            "steps": self.state.global_step,
            "train_images": self.setup.loader.images,
            "images_seen": images,
            "train_seconds": self.state.seconds,
            "compile_seconds": self.state.compile_seconds,
            "finished": self._is_over(),
            "bad_images": len(self.bad),
            "val": self.state.val,
            "best_epoch": self.state.best_epoch,
            "best_val": self.state.best_val,
        }


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
