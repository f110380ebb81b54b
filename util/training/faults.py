"""What can go wrong during a run: a signal, a loss that is not finite, images that cannot be read."""

import json
import signal
import time

import torch

from util.run.device import heeds_found_inf
from util.run.dist import World
from util.run.errors import UserError
from util.run.files import write_text
from util.run.log import RunFolder, read_json_lines

_PATIENCE_S = 5.0
_SMALLEST_SCALE = 1e-4  # of an fp16 gradient scaler; below it every step overflows


class Stopped(Exception):
    """A signal ended the run after it was saved."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum


class NonFiniteGuard:
    """Steps the optimizer, but on the device lets no update through from the first non-finite step on."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, device: torch.device):
        self.optimizer, self.scaler = optimizer, scaler
        self.on_host = not heeds_found_inf(device)
        self.held = torch.zeros((), device=device)  # 1 from the first step with a bad gradient on
        self.first = torch.zeros((), device=device)  # that step, or the first with a bad loss; counted from 1
        self.last = 0  # the latest step

    def step(self, loss: torch.Tensor, norm: torch.Tensor, step: int) -> None:
        """Update the weights by step 0, 1, ..., whose loss and gradient norm are still on the device.

        The gradient norm is the same on every process, so all hold back the same update. Under fp16 an
        overflowing gradient is daily business: the scaler skips the step, and only the loss is judged.
        """
        self.last = step + 1
        finite = torch.isfinite(loss)
        if not self.scaler.is_enabled():
            self.held = torch.maximum(self.held, (~torch.isfinite(norm)).float())
            self.optimizer.found_inf = self.held
            finite = finite & (self.held == 0)
        self.first = torch.where((self.first == 0) & ~finite, float(step + 1), self.first)
        if not (self.on_host and self._withhold(norm)):
            self.scaler.step(self.optimizer)
        self.scaler.update()

    def _withhold(self, norm: torch.Tensor) -> bool:
        """Whether the host keeps this update back. Under a scaler only this one: the next has a smaller scale."""
        return bool(~torch.isfinite(norm) if self.scaler.is_enabled() else self.held)

    def first_bad_step(self) -> int:
        """The first non-finite step, counted from 1, or 0 if there was none. Waits for the device."""
        if self.scaler.is_enabled() and self.scaler.get_scale() < _SMALLEST_SCALE:
            return int(self.first) or self.last
        return int(self.first)


class BadImages:
    """The damaged images met so far, listed in bad_images.jsonl."""

    def __init__(self, run: RunFolder, total: int, max_share: float, resumed: bool):
        self.path, self.run, self.total, self.max_share = run.path / "bad_images.jsonl", run, total, max_share
        self.found: dict[int, dict] = {}
        self.fresh: dict[int, dict] = {}  # found by this process since all were brought together
        self.written = 0
        if resumed and self.path.exists():
            self.found = {entry["index"]: entry for entry in read_json_lines(self.path)}
            self.written = len(self.found)

    def __len__(self) -> int:
        return len(self.found)

    @property
    def share(self) -> float:
        return len(self.found) / self.total

    def add(self, bad: tuple[int, str, str]) -> None:
        """Note a damaged image: (index, path, reason)."""
        if bad[0] not in self.found:
            self.found[bad[0]] = self.fresh[bad[0]] = dict(zip(("index", "path", "reason"), bad, strict=True))

    def merge(self, world: World) -> None:
        """Bring together what all processes found, and write the list if it grew."""
        for found in world.gather_objects(self.fresh):
            self.found |= found
        self.fresh = {}
        if len(self.found) > self.written and self.run.is_main:
            entries = [self.found[index] for index in sorted(self.found)]
            write_text(self.path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
            self.written = len(self.found)
            self.run.say(f"{self.written} damaged images skipped so far, listed in {self.path}")

    def check(self) -> None:
        """UserError if there are more than --max_bad of the data set."""
        if self.share > self.max_share:
            raise UserError(
                f"{len(self.found)} of {self.total} images cannot be read, more than --max_bad {self.max_share:g} "
                f"allows: see {self.path}, mend or remove them, or raise --max_bad"
            )


class Signals:
    """Turns SIGTERM, SIGINT and SIGHUP into a wish to stop; one that comes seconds later acts at once.

    A SIGHUP that is ignored stays so: a run under nohup goes on when its terminal is closed. SIGINT does not: a shell
    script lets all that it starts with & ignore it, and whoever sends it by hand means it, the second one too.
    """

    def __init__(self):
        self.received = 0
        self._before = {}
        self._first = 0.0

    def __enter__(self):
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def _note(self, signum: int, frame) -> None:
        # a launcher often passes on what the whole process group got already: that is one wish, not two
        if self.received and time.monotonic() - self._first > _PATIENCE_S:
            signal.signal(signum, self._at_once(signum))
            signal.raise_signal(signum)
        elif not self.received:
            self.received, self._first = signum, time.monotonic()

    def _at_once(self, signum: int):
        """What a signal does elsewhere in this process, or by default where that would be nothing."""
        if self._before[signum] != signal.SIG_IGN:
            return self._before[signum]
        return signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL

    def __exit__(self, *_) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
