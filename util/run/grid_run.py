"""One run of a grid: its folder, its command, its process."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from util.run.errors import UserError
from util.run.files import BUSY, in_use, is_temporary, lock, name_process, try_lock, write_text

USER_ERROR = 2  # the exit status of a run that would fail again in the same way


@dataclass(frozen=True)
class Run:
    """One training. command: the script and all its flags, but for --output_dir and --resume; settings: the
    varied flags among them, as text. names_folder: the command says itself where it writes, so it gets neither flag,
    and is done when it has written metrics.json."""

    name: str
    command: tuple[str, ...]
    settings: dict[str, str]
    folder: Path
    names_folder: bool = False

    @property
    def label(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.settings.items())])

    @property
    def output(self) -> Path:
        return self.folder / "output.txt"

    def argv(self) -> list[str]:
        """What is started: a .py file or -m MODULE under this Python, anything else as it stands."""
        python = [sys.executable] if self.command[0].endswith(".py") or self.command[0] == "-m" else []
        own = [] if self.names_folder else ["--output_dir", str(self.folder), "--resume", "auto"]
        return [*python, *self.command, *own]

    def results(self) -> dict:
        """results.json, or {} where it is not there or damaged; of a command that names its folder, metrics.json."""
        results = _read_json(self.folder / ("metrics.json" if self.names_folder else "results.json"))
        if not isinstance(results, dict):
            return {}
        return results | {"finished": True} if self.names_folder else results

    def state(self) -> str:
        """ "done", "failed", "unfinished" (stopped, or running) or "waiting" (never started)."""
        if self.results().get("finished"):
            return "done"
        record = self._record()
        if record is None:
            return "waiting"
        return "failed" if record["error"] else "unfinished"

    def error(self) -> str | None:
        """What the last attempt failed of, in one line."""
        return (self._record() or {}).get("error")

    def write_record(self, error: str | None = None, process: str | None = None) -> None:
        """Note in command.json what this folder is for, what the last attempt failed of, and who is at work."""
        record = {"name": self.name, "settings": self.settings, "command": self.command, "error": error}
        record |= {"process": process} if process else {}
        write_text(self.folder / "command.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def check(self) -> None:
        """UserError where the script is missing, or the folder is another run's."""
        if self.command[0].endswith(".py") and not Path(self.command[0]).is_file():
            raise UserError(f"{self.name}: there is no script {self.command[0]}: see --command")
        record = self._record()
        if record is None:
            if self.folder.exists() and any(map(self._is_foreign, self.folder.iterdir())):
                raise UserError(f"{self.folder} holds files that no grid made: choose another --out")
        elif tuple(record["command"]) != self.command:
            there, wanted = _difference(record["command"], self.command)
            raise UserError(
                f"{self.folder} holds a run of another command (there: {there}; wanted: {wanted}): "
                "choose another --out, or remove that folder"
            )

    def _is_foreign(self, path: Path) -> bool:
        """Whether a file was there before the grid: one that was killed at once leaves an empty output.txt."""
        began = path == self.output and not path.stat().st_size
        return path.is_file() and not began and not is_temporary(path)

    def is_running(self, patience_s: float = 0.0) -> bool:
        """Whether a process is at work in the folder for so many seconds yet: of this grid, or of another one."""
        if not self.output.exists():
            return False
        with open(self.output, "rb") as file:
            return try_lock(file, patience_s=patience_s, inherited=True) == BUSY

    def in_use(self) -> UserError:
        """What to say where a process is at work in the folder."""
        holder = (self._record() or {}).get("process", "another process")
        return in_use(str(self.folder), holder, self.output, "choose another --out")

    def _record(self) -> dict | None:
        record = _read_json(self.folder / "command.json")
        return record if isinstance(record, dict) and {"command", "error"} <= record.keys() else None


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _difference(there: Iterable[str], wanted: Iterable[str]) -> tuple[str, str]:
    """The flags, with their values, that only one of two commands has."""
    parts = [re.split(r" (?=--)", shlex.join(command)) for command in (there, wanted)]
    only = [Counter(parts[i]) - Counter(parts[1 - i]) for i in (0, 1)]
    return tuple(" ".join(part.elements()) or "nothing of it" for part in only)


class Job:
    """A run that has been started; its output goes to output.txt, which it keeps locked while it lives.

    beside: how many run at the same time, this one included; they share the cores, unless OMP_NUM_THREADS is set.
    """

    def __init__(self, run: Run, slot: int, device: str | None, beside: int = 1):
        self.run, self.slot, self.process, self.started = run, slot, None, time.monotonic()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if beside > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // beside)))
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            with open(run.output, "ab") as output:
                self.start = output.tell()
                if not lock(output, inherited=True):  # data workers of a run that failed may outlive it for a moment
                    self.note = str(run.in_use())
                    return
                run.write_record()
                # a session of its own: Ctrl-C reaches it through this process alone, once
                self.process = subprocess.Popen(
                    run.argv(), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    env=environment, start_new_session=True,
                )  # fmt: skip
            run.write_record(process=name_process(self.process.pid))
        except OSError as error:
            self.note = f"cannot be started: {error.strerror}: {error.filename}"

    def has_ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def send(self, signum: int) -> None:
        # to it alone: a data worker that a signal ends would take it down before it has saved
        if self.process is not None:
            self.process.send_signal(signum)

    def wait(self) -> None:
        if self.process is not None:
            self.process.wait()

    def lines(self) -> list[str]:
        """The last lines that this attempt has written."""
        with open(self.run.output, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self.start, size - 8192))
            text = file.read().decode("utf-8", errors="replace")
        return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]

    def finish(self, stopped: int) -> bool:
        """Judge how it ended, and record a failure. Returns whether another attempt might mend it."""
        self.state = self.run.state()
        if self.state == "done":
            self.note = f"{time.monotonic() - self.started:.0f} s"
            return False
        if self.process is not None:
            self.note = error_line(self.lines(), self.process.returncode)
            if stopped:
                return False
        self.state = "failed"
        if self.run.folder.is_dir():
            self.run.write_record(self.note)
        return self.process is not None and self.process.returncode != USER_ERROR


def error_line(lines: list[str], status: int) -> str:
    """The line of a run's output that says why it ended with this exit status (negative: by that signal)."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}" + (", memory may have run out" if status == -9 else "")
    if status == 0:
        return "ended without an error, but results.json does not say that it is finished"
    telling = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (telling or lines or [f"exit status {status}, and no word about it"])[-1]
