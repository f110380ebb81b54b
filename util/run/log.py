"""What a run leaves behind: args.json, log.txt, TensorBoard events, bad_images.jsonl, results.json."""

import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from util.run.causes import disk_trouble
from util.run.device import describe_device
from util.run.errors import UserError
from util.run.files import write_atomically, write_text


def write_json(path: Path, value) -> None:
    """Write JSON atomically, and make its folder; what JSON cannot say (infinity, NaN) becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n")


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def read_json_lines(path: Path) -> list[dict]:
    """The objects in a file with one on each line; without the lines that a crash or a power cut left in pieces."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(ValueError):
            found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict)]


def provenance(args: dict, device: torch.device, data_fingerprint: str | None = None) -> dict:
    """What a result file needs to be traced: commit, command, seed, device, versions, data, date."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "numpy", "pillow"):
        versions[name] = metadata.version(name)
    return {
        "git_commit": git_commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "args": args,
        "seed": args.get("seed"),
        "device": describe_device(device),
        "versions": versions,
        "data_fingerprint": data_fingerprint,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def git_commit() -> str | None:
    """The commit this code is at, with "+changes" if files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        run = [
            subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, timeout=10)
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.TimeoutExpired):
        return None
    if run[0].returncode:
        return None
    return run[0].stdout.strip() + ("+changes" if run[1].stdout.strip() else "")


def progress(iterable: Iterable | None = None, *, disable: bool = False, **options) -> tqdm:
    """A tqdm bar that is quiet when standard error is not a terminal."""
    return tqdm(iterable, disable=disable or not sys.stderr.isatty(), dynamic_ncols=True, leave=False, **options)


def _thread_failed(failed) -> None:
    """TensorBoard's thread hands a full disk on to whoever writes next: no traceback of its own."""
    if disk_trouble(failed.exc_value) is None:
        threading.__excepthook__(failed)


class RunFolder:
    """The output folder of a training run. Only the main process writes; on the others every call is silent."""

    def __init__(self, output_dir: str, *, is_main: bool, log_dir: str | None = None):
        self.path = Path(output_dir)
        self.is_main = is_main
        self.last = self.path / "checkpoint-last.pth"
        self.previous = self.path / "checkpoint-previous.pth"
        self.damaged = self.path / "checkpoint-damaged.pth"
        self.best = self.path / "checkpoint-best.pth"
        self._log_dir = log_dir or self.path
        self._writer = None
        if is_main:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"--output_dir {output_dir} cannot be made ({error.strerror}): choose another"
                ) from error
            if not os.access(self.path, os.W_OK):
                raise UserError(f"--output_dir {output_dir} is not writable: choose another")

    def say(self, message: str) -> None:
        """A line for the person watching."""
        if self.is_main:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()

    def progress(self, **options) -> tqdm:
        """A progress bar, quiet on the other processes."""
        return progress(disable=not self.is_main, **options)

    def start(self, args: dict, first_epoch: int, first_step: int) -> None:
        """Record the flags; drop what the log says of epochs that will run again."""
        if not self.is_main:
            return
        write_json(self.path / "args.json", args)
        log = self.path / "log.txt"
        if log.exists():
            # a last line that a crash cut short is of an epoch that will run again
            kept = [entry for entry in read_json_lines(log) if entry.get("epoch", math.inf) < first_epoch]
            write_text(log, "".join(json.dumps(entry) + "\n" for entry in kept))
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        threading.excepthook = _thread_failed
        try:
            # what was logged after the checkpoint will be logged again
            self._writer = SummaryWriter(str(self._log_dir), purge_step=first_step + 1)
        except OSError as error:
            raise UserError(f"--log_dir {self._log_dir} cannot be made ({error.strerror}): choose another") from error

    def scalars(self, values: dict[str, float], step: int) -> None:
        """TensorBoard scalars at an optimizer step."""
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def picture(self, name: str, image, step: int) -> None:
        """A PIL image, to a PNG in the folder and to TensorBoard."""
        if self._writer:
            write_atomically(self.path / f"{name}.png", lambda temporary: image.save(temporary, format="PNG"))
            channels = len(image.getbands())
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            self._writer.add_image(name, pixels.view(image.height, image.width, channels), step, dataformats="HWC")

    def epoch(self, values: dict) -> None:
        """One JSON object, one line of log.txt."""
        if self.is_main:
            with open(self.path / "log.txt", "a", encoding="utf-8") as file:
                file.write(json.dumps(_plain(values)) + "\n")

    def is_finished(self) -> bool:
        """Whether results.json says that the run was brought to its end."""
        try:
            return json.loads((self.path / "results.json").read_bytes())["finished"]
        except (OSError, ValueError, KeyError, TypeError):  # none, or damaged: it is written again
            return False

    def results(self, values: dict) -> None:
        """Write results.json."""
        if self.is_main:
            write_json(self.path / "results.json", values)

    def close(self) -> None:
        if self._writer:
            self._writer.close()
