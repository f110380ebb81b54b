"""visualize/reconstruction.ipynb: stripped, and clean from the repository root with and without data and weights.

Run: python -m pytest tests/test_notebook.py
"""

import base64
import io
import re

import pytest
import torch
from PIL import Image

from models_mae import build_mae
from tests.conftest import ROOT
from tests.helpers import waves
from visualize import reconstruct

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = ROOT / "visualize" / "reconstruction.ipynb"
NAME, SIZE = "mae_vit_nano_patch8", 32


@pytest.fixture
def execute(monkeypatch):
    """execute(CKPT=..., ...): run the notebook with these settings; its text, and its pictures."""

    def run(**settings):
        for name in ("CKPT", "DATA", "IMAGES", "SEED", "DISPLAY", "MPLBACKEND"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"SMALL": "1", "OMP_NUM_THREADS": "1", **settings}.items():
            monkeypatch.setenv(name, str(value))
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        client = nbclient.NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
        )
        client.execute()  # raises where a cell fails
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        assert not [output for output in outputs if output.get("name") == "stderr"]
        text = "".join(output.text for output in outputs if output.output_type == "stream")
        shown = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
        return text, [Image.open(io.BytesIO(base64.b64decode(png))) for png in shown]

    return run


def test_it_is_stripped_and_has_its_settings_first():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    for name in ("CKPT", "DATA", "IMAGES", "SMALL"):
        assert re.search(rf'^{name} = .*os\.environ\.get\("{name}"', code[0].source, re.MULTILINE), name
    assert not re.search(r"/(home|root|tmp|Users)/", NOTEBOOK.read_text(encoding="utf-8"))


def test_without_settings_it_draws_its_own_faces(execute):
    text, pictures = execute(IMAGES=2)
    assert "CKPT is not set" in text and "DATA is not set: drew 48 ToonFaces" in text
    # four ratios, three strategies, one mask of one's own
    assert len(pictures) == 8 and all(min(picture.size) > 200 for picture in pictures)
    assert re.search(r"^face +\d+\.\d+", text, re.MULTILINE) and "not shown: hard" in text


def test_its_numbers_are_those_of_the_command(execute, tmp_path, capsys):
    torch.manual_seed(0)
    model = build_mae(NAME, SIZE)
    ckpt, data = tmp_path / "mae.pth", tmp_path / "data"
    torch.save({"model": model.state_dict(), "args": {"model": NAME, "input_size": SIZE}}, ckpt)
    for part, count in (("train", 3), ("test", 4)):
        (data / part).mkdir(parents=True)
        for i in range(count):
            waves(part, i).save(data / part / f"{i}.png")
    text, pictures = execute(CKPT=ckpt, DATA=data, IMAGES=2, SEED=5)
    argv = ["--ckpt", ckpt, "--data_path", data, "--out", tmp_path / "out", "--device", "cpu", "--seed", "5"]
    reconstruct.main([str(word) for word in argv])
    table = capsys.readouterr().out.split("\n", 1)[1].rsplit("figure:", 1)[0].strip()
    assert "model" in table and table in text
    assert len(pictures) == 4 + 2 + 1  # no maps: random and block@1000 are left of the strategies
    assert "not shown: face" in text
