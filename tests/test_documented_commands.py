"""Every command in the README and in docs/ exists, parses, and runs at small settings, or a table here says why not.

Run: python -m pytest tests/test_documented_commands.py

A command is a line of a code block that begins with a program. Placeholders (DIR, W, RUN, ...) are filled with what
earlier commands have made: tiny ToonFaces, pre-trained, adapted. Two commands that come to the same at small settings
are run once. Shell scripts run with a stand-in for Python that writes down what it was asked to do, and that is parsed.
"""

import argparse
import functools
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from util.run.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "datasets/README.md",
    *sorted((ROOT / "datasets/cards").glob("*.md")),
]
PROGRAMS = ("python", "bash", "torchrun", "sbatch", "source", "pip", "git", "hf", "cd", "tensorboard", "export")

REAL_DATA = "real data; run on a tree of its layout"
# beginning of a command -> why it is not run here, and the test that runs it, if there is one
NOT_RUN = {
    "torchrun": ("several processes", "test_loop.py"),
    "source scripts/slurm/site.sh": ("no SLURM here; its commands are run with stand-ins", "test_slurm.py"),
    "sbatch": ("no SLURM here; its commands are run with stand-ins", "test_slurm.py"),
    "git clone": ("a download", None),
    "pip install": ("a download", None),
    "hf download": ("a download", None),
    "bash scripts/test.sh": ("it runs these tests", None),
    "tensorboard": ("it serves until it is stopped", None),
    "python -m visualize.demo": ("it serves until it is stopped", "test_demo.py"),
    "python identify.py": ("a face finder's weights are a download", "test_identify.py"),
    "python scripts/push_to_hub.py": ("the Hub; run against a stand-in", "test_hub_push.py"),
    "python scripts/plan.py --device auto": ("it measures this machine, for seconds", "test_plan.py"),
    "python scripts/bench_pretrain.py": ("steps of ViT-B", "test_bench_pretrain.py"),
    "python scripts/bench_scale.py": ("its sizes are its point, minutes each", "test_bench_scale.py"),
    "python scripts/bench_growth.py": ("its sizes are its point, minutes each", "test_growth.py"),
    "python scripts/long_run.py": ("an hour", "test_long_run.py"),
    "python scripts/denoise_labels.py": ("real data", "test_denoise.py"),
    "python datasets/identity_map.py": ("label files of real data", "test_identity_map.py"),
    "python datasets/prepare_acrd.py": (REAL_DATA, "test_prepare_acrd.py"),
    "python datasets/prepare_animediffusion.py": (REAL_DATA, "test_prepare_pools.py"),
    "python datasets/prepare_dafre.py": (REAL_DATA, "test_prepare_dafre.py"),
    "python datasets/prepare_huggan.py": (REAL_DATA, "test_prepare_pools.py"),
    "python datasets/prepare_icartoonface_det.py": (REAL_DATA, "test_prepare_icartoonface.py"),
    "python datasets/prepare_icartoonface_rec.py": (REAL_DATA, "test_prepare_icartoonface.py"),
    "python datasets/prepare_moeimouto.py": (REAL_DATA, "test_prepare_moeimouto.py"),
    "python datasets/prepare_splcher.py": (REAL_DATA, "test_prepare_pools.py"),
    "python scripts/release_protocols.py": ("a release of real data", "test_release.py"),
    "python scripts/score_submission.py": ("a release of real data", "test_release.py"),
    "python scripts/fault_campaign.py": ("200 kills, minutes", "test_fault_campaign.py"),
    "python scripts/fuzz_readers.py": ("10,000 files for each reader, hours", "test_fuzz_readers.py"),
    "python scripts/load_demo.py": ("1,000 visitors, minutes", "test_demo_gate.py"),
    "python scripts/tune.py": ("trainings of several methods", "test_tune.py"),
    "python scripts/leaderboard_page.py": ("results of several models", "test_release.py"),
}  # fmt: skip

# the 32 pictures of ToonFaces, below, are one step, so that a step ends an epoch and leaves a best checkpoint
TRAINING = "--input_size 32 --batch_size 32 --accum_iter 1 --epochs 2 --warmup_epochs 0 --max_steps 1 --num_workers 0 "
TRAINING += "--lr 1e-3 --device cpu --precision fp32 --compile off --augment_on workers"
PRETRAIN = f"{TRAINING} --model mae_vit_nano_patch8 --eval_images 2"
TRANSFER = f"{TRAINING} --model vit_nano_patch8"
PROTOCOLS = "--device cpu --precision fp32 --compile off --num_workers 0 --replicates 5 --negatives 20 --episodes 5 "
PROTOCOLS += "--ways 2 --shots 1 --protocols closed_set verification"
# what makes each script small; flags given twice count as they stand last
SMALL = {
    "main_pretrain.py": PRETRAIN,
    "main_simclr.py": TRANSFER,
    "main_linprobe.py": TRAINING.replace("--augment_on workers", "") + " --model vit_nano_patch8 --views 1 --lr_grid 1",
    "main_lora.py": TRANSFER,
    "main_finetune.py": TRANSFER,
    "main_detect.py": TRAINING.replace("--augment_on workers", "").replace("--input_size 32", "--input_size 64x128")
    + " --model vit_nano_patch8 --width 64 --convs 1 --batch_size 8 --data_path {data}/scenes",
    "eval_recognition.py": PROTOCOLS,
    "eval_detection.py": "--device cpu --replicates 5 --sheet_pictures 2 --images 2 --sizes 128 "
    "--data_path {data}/scenes",
    "visualize.reconstruct": "--images 2 --batch_size 2 --device cpu",
    "visualize.masking": "--images 1 --device cpu",
    "visualize.detect": "--device cpu",
    "datasets/prepare_folder.py": "",
    "datasets/prepare_maps.py": "--num_workers 0 --sheet 2",
    "datasets/prepare_toonfaces.py": "--identities 4 --images 40 --open_identities 2 --open_images 4 "
    "--novel_identities 2 --novel_images 4 --size 48 --scenes 10 --workers 0",
    "scripts/bench_protocols.py": "--images 300 --identities 20 --dim 16 --replicates 5 --threads 1",
    "scripts/check_leakage.py": "",
    "scripts/reproduce_published.py": "",
    "scripts/plan.py": "--model vit_nano_patch16 --input_size 32 --batch_size 4",
    "scripts/export.py": "",
    "util.data.pack": "--num_workers 0",
    "util.run.grid": "",
}  # fmt: skip
OUTPUT = ("--output_dir", "--out")
SEVERAL_PARSERS = ("scripts/release_protocols.py",)  # main() chooses one
# what makes a shell script end where it would read what the runs have written
SHELL_SETTINGS = {"scripts/masking_study.sh": {"GRID": "--dry_run"}}
# what a placeholder of a command stands for: the folder of an earlier run, by the script that reads it
RUN_OF = {
    "eval_recognition.py": "lora", "scripts/export.py": "lora",
    "eval_detection.py": "detect", "visualize.detect": "detect",
}  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A line of a document. words: as the shell splits it; settings: NAME=VALUE before the program."""

    document: str
    text: str
    words: tuple[str, ...]
    settings: tuple[str, ...] = ()

    @property
    def script(self) -> str | None:
        """main_x.py, scripts/x.py, visualize.x, scripts/x.sh ...; None for another program."""
        words = [word for word in self.words[1:] if not word.startswith("--")]
        if self.words[0] == "python":
            return words[1] if words[0] == "-m" else words[0]
        return next((word for word in words if word.endswith((".py", ".sh", ".sbatch"))), None)

    @property
    def arguments(self) -> list[str]:
        return list(self.words[self.words.index(self.script) + 1 :])

    @property
    def why_not(self) -> tuple[str, str | None] | None:
        text = " ".join(self.words)
        return next((why for start, why in NOT_RUN.items() if text.startswith(start)), None)


def code_lines(text: str) -> Iterator[str]:
    """Lines of fenced and indented code blocks, those that end in a backslash joined to the next."""
    fenced, kept = False, ""
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            kept += line.strip()
            if not kept.endswith("\\"):
                yield kept
            kept = kept[:-1] if kept.endswith("\\") else ""


def read_commands(path: Path) -> Iterator[Command]:
    name = str(path.relative_to(ROOT))
    for line in code_lines(path.read_text(encoding="utf-8")):
        for part in re.split(r"\s+&&\s+", line):
            settings = re.match(r"(?:[A-Z_]+=(?:\"[^\"]*\"|\S*)\s+)*", part)[0]
            if part[len(settings) :].startswith(tuple(f"{program} " for program in PROGRAMS)):
                words = shlex.split(part[len(settings) :].replace("[", "").replace("]", ""), comments=True)
                yield Command(name, part, tuple(words), tuple(shlex.split(settings)))
            else:
                # a comment, a tree of files, a line of another language; what looks like a command must be one
                assert line.startswith("#") or not re.search(r"^\S+\.(py|sh) --", part), f"{name}: {part}"


COMMANDS = [command for path in DOCUMENTS for command in read_commands(path)]
PYTHON = [command for command in COMMANDS if command.words[0] in ("python", "torchrun")]
SHELL = [command for command in COMMANDS if command.words[0] == "bash" and not command.why_not]
RUN_HERE = [command for command in PYTHON if not command.why_not]


def named(command: Command) -> str:
    return f"{command.document}: {command.text.split('#')[0].strip()[:90]}"


class Parsed(Exception):
    """Carries what parse_args returned out of a main() that does not stop there."""


@functools.cache
def load(script: str):
    """A script as a module. Nothing in datasets/ can be imported by name."""
    if not script.endswith(".py"):
        folder = (ROOT / script.replace(".", "/")).is_dir()
        return importlib.import_module(f"{script}.__main__" if folder else script)
    if "/" not in script:
        return importlib.import_module(script.removesuffix(".py"))
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(monkeypatch, script: str, arguments: list[str]) -> argparse.Namespace:
    """The flags as the script itself reads them from its command line; UserError, or a failure, for wrong ones."""
    module, plain = load(script), argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        raise Parsed(plain(self, *args, **kwargs))

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        if hasattr(module, "get_args") and script not in SEVERAL_PARSERS:
            return module.get_args()
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Parsed) as parsed:
            getattr(module.main, "__wrapped__", module.main)()
        return parsed.value.args[0]


def completed(command: Command) -> list[str]:
    """The arguments, "..." in place of the flags of a command above filled in."""
    arguments = command.arguments
    if "..." in arguments:
        at = arguments.index("...")
        given = [] if "--data_path" in arguments else ["--data_path", "DIR"]
        arguments[at : at + 1] = given + ([] if "--output_dir" in arguments else ["--output_dir", "RUN"])
    return arguments


# --- what is documented -------------------------------------------------------------------------------------------


def test_commands_are_found():
    assert len(RUN_HERE) > 20 and len(SHELL) > 8
    texts = [" ".join(command.words) for command in COMMANDS]
    assert "python main_pretrain.py --data_path DIR --masking face --output_dir RUN" in texts
    assert any(command.settings == ("PROBE=LABELLED",) for command in COMMANDS)


@pytest.mark.parametrize("command", PYTHON, ids=named)
def test_it_exists_and_its_flags_parse(monkeypatch, command):
    if "--help" in command.arguments:
        pytest.skip("--help of every script: test_cli_help.py")
    try:
        parse(monkeypatch, command.script, completed(command))
    except UserError as error:
        pytest.fail(f"{command.document}: {command.text}\n{error}")


@pytest.mark.parametrize("command", COMMANDS, ids=named)
def test_it_is_run_or_said_why_not(command):
    """A new command is run here by an entry in SMALL, or left out by one in NOT_RUN."""
    if command.why_not:
        reason, test = command.why_not
        assert reason
        stem = Path(command.script or "").stem.removeprefix("prepare_")
        assert test is None or stem in (ROOT / "tests" / test).read_text() or command.words[0] in ("torchrun", "source")
    elif command.words[0] == "python":
        assert command.script in SMALL, f"{command.document}: {command.text}: add {command.script} to SMALL or NOT_RUN"
    else:
        assert command.words[0] in ("bash", "cd", "export") or command in PYTHON, f"{command.text}: add it to NOT_RUN"


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), f"{target} of {path.name}"
        assert not anchor or anchor in anchors(there), f"{target} of {path.name}"


# --- Python, at small settings -------------------------------------------------------------------------------------


class World:
    """What earlier commands have made, and what each came to. folder: for all of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.patch, self.done, self.runs, self.places = folder, monkeypatch, {}, {}, 0
        self.data = folder / "toonfaces"
        self.run("datasets/prepare_toonfaces.py", ["--out", str(self.data)])
        self.run("datasets/prepare_maps.py", ["--data_path", str(self.data)])
        # the very commands that the README gives
        for name, script in (("mae", "main_pretrain.py"), ("lora", "main_lora.py"), ("detect", "main_detect.py")):
            init = [] if name == "mae" else ["--init", self.runs["mae"] + "/checkpoint-last.pth"]
            self.runs[name] = str(self.run(script, ["--data_path", str(self.data), *init, "--output_dir", "RUN"]))
        flags = ["--ckpt", self.runs["lora"] + "/checkpoint-best.pth", "--data_path", str(self.data)]
        embedded = self.run("eval_recognition.py", [*flags, "--output_dir", "OUT", "--save_embeddings"])
        pack = self.run("util.data.pack", ["--data_path", str(self.data), "--out", "data.pack", "--canvas", "48"])
        self.files = {"npz": str(embedded / "embeddings.npz"), "pack": str(pack)}

    def fill(self, script: str, arguments: list[str]) -> list[str]:
        """Arguments with placeholders filled. Where a run is read, it is one that the script can read."""
        reads = self.runs.get(RUN_OF.get(script, "mae"), "RUN")
        values = {"DIR": self.data, "DATA": self.data, "LABELLED": self.data, "FOLDER": self.data / "images"}
        values |= {"PICTURES": self.data / "images", "CHARACTERS": self.data}
        values |= {"data/mine": self.data, "data/toonfaces": self.data, "data/faces": self.data}
        values |= {"W": f"{reads}/checkpoint-last.pth", "INIT": f"{reads}/checkpoint-last.pth", "RUN": reads}
        pattern = re.compile(rf"\b({'|'.join(values)})\b")
        filled = []
        for flag, word in zip(["", *arguments], arguments, strict=False):
            filled.append(word if flag in OUTPUT else self._filled(word, reads, pattern, values))
        return filled

    def _filled(self, word: str, reads: str, pattern: re.Pattern, values: dict) -> str:
        if word.startswith("/"):
            return word
        if word.startswith(("official:", "hf:", "timm:")):  # a download
            return f"{self.runs['mae']}/checkpoint-last.pth"
        if word.endswith((".npz", ".pack")):
            return self.files[word.rpartition(".")[2]]
        if found := re.fullmatch(r"runs/.*/(checkpoint.*)", word):
            return f"{reads}/{found[1]}"
        return pattern.sub(lambda found: str(values[found[0]]), word)

    def run(self, script: str, arguments: list[str]) -> Path | None:
        """Run a script with what makes it small, once; where its output lies."""
        given = self.fill(script, arguments) + shlex.split(SMALL[script].format(data=self.data))
        key = (script, *self._meaning(script, given))
        if key not in self.done:
            where = self._place(script, given)
            with self.patch.context() as patch:
                patch.setattr(sys, "argv", [script, *given])
                patch.chdir(self.folder)
                try:
                    load(script).main()
                except SystemExit as stop:
                    # 1: leaks were found, as might be in so few characters
                    fine = (0, None, 1) if script == "scripts/check_leakage.py" else (0, None)
                    assert stop.code in fine, f"{script} {shlex.join(given)}"
            self.done[key] = where
        return self.done[key]

    def _place(self, script: str, given: list[str]) -> Path | None:
        """A folder of its own for the output; that of a copied run where it is resumed."""
        flag = next((flag for flag in OUTPUT if flag in given), None)
        if flag is None:
            return None
        at = given.index(flag) + 1
        if given[at].startswith("/") or "--check" in given:
            given[at] = self.files["pack"] if given[at].endswith(".pack") else given[at]
            return Path(given[at])
        self.places += 1
        where = self.folder / f"{self.places}-{Path(given[at]).name}"
        if "--resume" in given and script == "main_pretrain.py":
            shutil.copytree(self.runs["mae"], where)
        given[at] = str(where)
        return where

    def _meaning(self, script: str, given: list[str]) -> list:
        """What tells two commands apart: their flags as the script reads them, but for where they write."""
        if "--help" in given:
            return given
        values = vars(parse(self.patch, script, given))
        return sorted((name, repr(value)) for name, value in values.items() if f"--{name}" not in OUTPUT)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield World(tmp_path_factory.mktemp("documented"), patch)


@pytest.mark.parametrize("command", RUN_HERE, ids=named)
def test_it_runs(world, command):
    optional = re.search(r"\[(.*)\]", command.text)  # what may be left out is
    left_out = shlex.split(optional[1]) if optional else []
    where = world.run(command.script, [word for word in completed(command) if word not in left_out])
    assert where is None or where.exists()


# --- shell scripts, with a Python that writes down what it is asked to do ------------------------------------------

RECORDER = """#!/usr/bin/env bash
[ "${1:-}" = -c ] || [ "${1:-}" = - ] || printf '%s\\0' "$@" "" >>"$RECORD"
"""


@pytest.fixture
def recorded(tmp_path) -> Callable[[Command], list[list[str]]]:
    """recorded(command): the command lines of Python that a shell script comes to."""
    (tmp_path / "python").write_text(RECORDER)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "DATA").mkdir()

    def run(command: Command) -> list[list[str]]:
        fill = {"DIR": "DATA", "LABELLED": "DATA", "data/toonfaces": "DATA", "data/toonfaces72.pack": "DATA"}
        words = [
            str(tmp_path / fill.get(word, word)) if fill.get(word, word) == "DATA" else word for word in command.words
        ]
        more = dict(setting.split("=", 1) for setting in command.settings)
        more = {name: str(tmp_path / "DATA") if value == "LABELLED" else value for name, value in more.items()}
        more |= SHELL_SETTINGS.get(command.script, {})
        environment = {**os.environ, **more, "RECORD": str(tmp_path / "record"), "ANIMASK_USE_ACTIVE_ENV": "1"}
        environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        calls = (tmp_path / "record").read_text().split("\0\0")
        return [words for call in calls if (words := call.strip("\0").split("\0")) and words[:2] != ["-m", "pip"]]

    return run


@pytest.mark.parametrize("command", SHELL, ids=named)
def test_what_a_shell_script_asks_for_parses(monkeypatch, recorded, command):
    calls = [words for words in recorded(command) if words != [""]]
    assert calls
    for words in calls:
        script, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
        args = parse(monkeypatch, script, arguments)
        for text in getattr(args, "command", None) or []:  # of the grid runner: NAME: SCRIPT FLAGS
            assert (ROOT / shlex.split(text.split(":", 1)[1])[0]).is_file()
