"""Every script answers --help with status 0 and explains each of its flags; new scripts are found by themselves.

Run: python -m pytest tests/test_cli_help.py
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Put in front of sys.path of each script: argparse then names, on standard error, the flags it has no help for.
SPY = """
import argparse, sys

plain = argparse.ArgumentParser.print_help

def print_help(self, file=None):
    bare = [a.option_strings or [a.dest] for a in self._actions if not (a.help or "").strip()]
    print("without help:", bare, file=sys.stderr)
    plain(self, file)

argparse.ArgumentParser.print_help = print_help
"""


def is_script(path: Path) -> bool:
    return 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")


def find_commands() -> dict[str, list[str]]:
    """Name -> command line, of every Python script that a user may run."""
    commands = {}
    for pattern in ("*.py", "datasets/*.py", "scripts/**/*.py"):
        for path in filter(is_script, sorted(ROOT.glob(pattern))):
            name = str(path.relative_to(ROOT))
            commands[name] = [sys.executable, name]
    for path in filter(is_script, sorted((ROOT / "visualize").glob("*.py"))):
        commands[f"visualize.{path.stem}"] = [sys.executable, "-m", f"visualize.{path.stem}"]
    return commands


COMMANDS = find_commands()
SHELL_SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.sh") if path.name != "env.sh")


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, subprocess.CompletedProcess]:
    """What each script says to --help. They run side by side, because most of the time goes into imports."""
    folder = tmp_path_factory.mktemp("spy")
    (folder / "sitecustomize.py").write_text(SPY)
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}

    def ask(command: list[str]) -> subprocess.CompletedProcess:
        return subprocess.run([*command, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(COMMANDS, pool.map(ask, COMMANDS.values()), strict=True))


def test_the_scripts_are_found():
    assert {"main_pretrain.py", "scripts/bench_pretrain.py"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_python_script_explains_itself(answers, name):
    answer = answers[name]
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("usage: ")
    assert "without help: []" in answer.stderr


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_script_explains_itself(path):
    assert "help_if_asked" in path.read_text()  # otherwise --help might set it going
    answer = subprocess.run(["bash", path, "--help"], capture_output=True, text=True, timeout=30)
    assert answer.returncode == 0, answer.stderr
    assert f"scripts/{path.name}" in answer.stdout
