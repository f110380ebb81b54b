"""`datasets` is Hugging Face's library, everywhere, although a folder of ours has that name.

Run: python -m pytest tests/test_datasets_guard.py
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOCAL = ROOT / "datasets"


def test_datasets_means_hugging_face():
    spec = importlib.util.find_spec("datasets")
    assert spec is not None and spec.origin is not None, "HF `datasets` is not installed: only our folder was found"
    assert LOCAL not in Path(spec.origin).resolve().parents


def test_our_folder_can_never_be_a_package():
    assert not list(LOCAL.rglob("__init__.py"))
    assert not list(LOCAL.rglob("test_*.py"))
    assert not (LOCAL / "util.py").exists()  # it would hide the package util from the scripts beside it


@pytest.mark.parametrize("place", ["repository", "folder"])
def test_the_library_wins_from_the_folder_and_from_above_it(place):
    folder = ROOT if place == "repository" else LOCAL
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import datasets; print(datasets.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert LOCAL not in Path(found.stdout.strip()).resolve().parents


def test_the_library_is_imported_by_name_and_lazily():
    """`from datasets import x` fails loudly where only our folder is found; a bare import would succeed."""
    for path in ROOT.glob("**/*.py"):
        if path.is_relative_to(ROOT / ".venv") or path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*import datasets\b", text, re.MULTILINE), path
        assert path.parent.name == "tests" or not re.search(r"^from datasets import", text, re.MULTILINE), path


@pytest.mark.parametrize("script", sorted(path.name for path in LOCAL.glob("*.py")))
def test_scripts_put_the_repository_first(script):
    text = (LOCAL / script).read_text(encoding="utf-8")
    line = "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"
    assert line in text
    assert text.index(line) < text.index("from util")
