"""How a benchmark goes, as a table that is drawn anew on a terminal: a line for each method, a word for each seed."""

import shutil
import sys
import time
from collections.abc import Sequence

from util.benchmark.chains import Chain
from util.run.grid_run import Job, Run

REFRESH_S = 1.0
WORDS = {"pretrain": "pre-train", "transfer": "transfer", "eval": "evaluate"}
CLEAR = "\x1b[J"  # from the cursor to the end of the screen


class ProgressTable:
    """The display of `util.run.grid.run_all` on a terminal. unavailable: methods that cannot be run, by name."""

    def __init__(self, chains: Sequence[Chain], unavailable: Sequence[str] = (), stream=None):
        self.chains, self.unavailable, self.stream = chains, unavailable, stream or sys.stdout
        self.seeds = list(dict.fromkeys(chain.seed for chain in chains))
        self.methods = list(dict.fromkeys(chain.method.name for chain in chains))
        self.done: set[tuple[str, int]] = set()
        self.lines_shown, self.shown_at = 0, 0.0

    def say(self, message: str) -> None:
        """A line above the table."""
        self._erase()
        self.stream.write(message + "\n")
        self.shown_at = 0.0

    def ended(self, job: Job, again: bool) -> None:
        self.say(f"{job.state:<10} {job.run.label}: {job.note}" + (" (once more)" if again else ""))

    def watch(self, active: Sequence[Job]) -> None:
        """Draw the table, once a second at most."""
        if time.monotonic() < self.shown_at + REFRESH_S:
            return
        self._erase()
        size = shutil.get_terminal_size()
        lines = [line[: size.columns - 1] for line in self.lines(active, size.lines - 2)]
        self.stream.write("".join(f"{line}\n" for line in lines))
        self.stream.flush()
        self.lines_shown, self.shown_at = len(lines), time.monotonic()

    def close(self) -> None:
        self._erase()
        self.stream.flush()

    def lines(self, active: Sequence[Job], most: int) -> list[str]:
        """The table and the last word of each run that goes on; in `most` lines, finished methods give way first."""
        running = [job.run for job in active]
        states = {(chain.method.name, chain.seed): self._word(chain, running) for chain in self.chains}
        width = max(map(len, (*self.methods, "method")))
        head = f"{'method':<{width}}  " + "  ".join(f"{f'seed {seed}':<10}" for seed in self.seeds)
        tail = [f"{job.run.label}: {(job.lines() or ['starting'])[-1]}" for job in active if job.process]
        finished = [name for name in self.methods if all(states[name, seed] == "done" for seed in self.seeds)]
        room = max(1, most - len(tail) - 2)
        hidden = finished[: max(0, len(self.methods) - room)]
        rows = [
            f"{name:<{width}}  " + "  ".join(f"{states[name, seed]:<10}" for seed in self.seeds)
            for name in self.methods
            if name not in hidden
        ]
        count = sum(word == "done" for word in states.values())
        summary = f"{count} of {len(states)} done" + f", {len(self.unavailable)} methods unavailable" * bool(
            self.unavailable
        )
        return [head, *(row.rstrip() for row in rows[:room]), summary, *tail]

    def _word(self, chain: Chain, running: Sequence[Run]) -> str:
        key = (chain.method.name, chain.seed)
        if key in self.done:
            return "done"
        for stage, run in zip(list(WORDS)[-len(chain.runs) :], chain.runs, strict=True):
            if run in running:
                return f"{WORDS[stage]}..."
            state = run.state()
            if state != "done":
                return state if state == "failed" else "-" if run is chain.runs[0] else f"-> {WORDS[stage]}"
        self.done.add(key)
        return "done"

    def _erase(self) -> None:
        if self.lines_shown:
            self.stream.write(f"\x1b[{self.lines_shown}A\r{CLEAR}")
            self.lines_shown = 0
