"""What a packing has done so far: FILE.part.jsonl, a line for the plan and one for each chunk that is on the disk."""

import fcntl
import json
import os
from pathlib import Path

from util.run.errors import UserError

_WORDS = {
    "samples": "the number of samples",
    "fingerprint": "the list of samples",
    "stamp": "the pictures",
    "beside": "the maps or protocols",
}


def difference(before: dict, now: dict) -> str | None:
    """What changed between two plans, in words; None if nothing did."""
    changed = [name for name in now if before.get(name) != now[name]]
    facts = [_WORDS[name] for name in changed if name in _WORDS]
    choices = [f"--{name} was {before.get(name)} and is now {now[name]}" for name in changed if name not in _WORDS]
    return ", ".join([*choices, *facts]) or None


class Journal:
    """The journal of a packing, to be used as a context: it is locked against a second one meanwhile.

    out: FILE. part: FILE.part, where the pixels go; they end at `end_of_pixels`, bytes. plan: what is packed, and how;
    that of an earlier start must be equal, unless `overwrite` gives it up. chunks: number -> what `add` got. bad: row
    -> why its picture cannot be read. Raises UserError.
    """

    def __init__(self, out: Path, plan: dict, end_of_pixels: int, overwrite: bool):
        self.out, self.plan, self.end_of_pixels, self.overwrite = out, plan, end_of_pixels, overwrite
        self.part = out.with_name(f"{out.name}.part")
        self.path = out.with_name(f"{out.name}.part.jsonl")
        self.chunks: dict[int, dict] = {}
        self.bad: dict[int, str] = {}

    def __enter__(self) -> "Journal":
        self._file = open(self.path, "a+", encoding="utf-8")
        try:
            # of this process alone: workers that outlive it for a moment do not hold it
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._start()
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{self.path} is in use by another packing: wait for it, or give another --out") from None
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def _start(self) -> None:
        lines = self._whole_lines()
        changed = difference(lines[0], self.plan) if lines else None
        if changed and not self.overwrite:
            raise UserError(
                f"{self.part} was begun from other data or with other flags ({changed}): give another --out, or "
                "--overwrite"
            )
        if not lines or changed or not self.part.exists():
            self._file.truncate(0)
            lines = []
            self.part.unlink(missing_ok=True)  # what is left of an earlier packing may still be written to for a moment
            with open(self.part, "wb") as part:
                part.truncate(self.end_of_pixels)
            self._write(self.plan)
        for done in lines[1:]:
            self._note(done)

    def _whole_lines(self) -> list[dict]:
        """The lines so far; one that was cut short by a crash is taken away."""
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._file.truncate(len(whole.encode()))
        return [json.loads(line) for line in whole.splitlines()]

    def add(self, done: dict) -> None:
        """Note a chunk: {"chunk": number, "checksum": hex, "rows": [...]}, a row that is a str says what is wrong."""
        self._write(done)
        self._note(done)

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _note(self, done: dict) -> None:
        self.chunks[done["chunk"]] = done
        first = done["chunk"] * self.plan["chunk"]
        self.bad |= {first + i: row for i, row in enumerate(done["rows"]) if isinstance(row, str)}

    def in_order(self) -> list[dict]:
        """The chunks by their number."""
        return [self.chunks[number] for number in sorted(self.chunks)]

    def rows(self) -> list:
        """What is known of every canvas."""
        return [row for done in self.in_order() for row in done["rows"]]

    def finish(self) -> None:
        """Give the file its name, and remove the journal."""
        os.replace(self.part, self.out)
        self.path.unlink()
