"""scripts/export.py --onnx: the same numbers in onnxruntime, at any batch size.

Run: python -m pytest tests/test_onnx.py
"""

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms

from models_detect import build_detector, load_detector
from models_transfer import attach_head, load_recogniser, start_backbone
from models_vit import build_vit
from tests.helpers import fails
from util.training import onnx_file
from util.training.onnx_file import write_onnx
from util.transfer.lora import LoRAConfig, add_lora

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

SIZE = 16


@pytest.fixture(scope="module")
def export(import_script):
    return import_script("scripts/export.py").main


def run(path, images: torch.Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images.numpy()}), strict=True))


def pictures(count: int, side: int = SIZE) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(11 + count))


def test_a_recogniser_with_adapters_gives_embeddings_and_scores(export, tmp_path, capsys):
    args = {"model": "vit_nano_patch8", "input_size": SIZE, "global_pool": True, "seed": 0, "init": None}
    args |= {"head": "cosface", "scale": 16.0, "margin": 0.2}
    model, lora = start_backbone(args), LoRAConfig(2, 4.0, ("q", "v"))
    add_lora(model, lora)
    attach_head(model, args, 3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    state = {name: value for name, value in model.state_dict().items() if "lora_" in name or name.startswith("head.")}
    ckpt, out = tmp_path / "checkpoint-best.pth", tmp_path / "new" / "faces.onnx"
    notes = {"classes": ["a", "b", "c"], "args": args, "lora": vars(lora), "base": model.origin}
    torch.save({"model": state, **notes}, ckpt)
    export(["--ckpt", str(ckpt), "--onnx", str(out)])
    assert "embeddings, scores" in capsys.readouterr().out
    expected = load_recogniser(str(ckpt)).model
    for count in (1, 5):
        found = run(out, pictures(count))
        with torch.inference_mode():
            np.testing.assert_allclose(found["embeddings"], expected.embed(pictures(count)), atol=2e-5)
            np.testing.assert_allclose(found["scores"], expected(pictures(count)), atol=2e-4)


def test_an_encoder_gives_embeddings_at_a_size_of_ones_own(export, tmp_path):
    torch.manual_seed(0)
    model = build_vit("vit_nano_patch8", img_size=SIZE).eval()
    torch.save(
        {"model": model.state_dict(), "args": {"model": "vit_nano_patch8", "input_size": SIZE}}, tmp_path / "w.pth"
    )
    out = tmp_path / "encoder.onnx"
    export(["--ckpt", str(tmp_path / "w.pth"), "--onnx", str(out), "--input_size", "24"])
    with torch.inference_mode():
        expected = model.embed(pictures(4, 24))
    found = run(out, pictures(4, 24))
    assert list(found) == ["embeddings"]
    np.testing.assert_allclose(found["embeddings"], expected, atol=2e-4)


def test_a_detector_gives_what_its_own_last_step_starts_from(export, tmp_path):
    args = {
        "model": "vit_nano_patch8", "input_size": 64, "seed": 0, "init": None, "width": 64, "convs": 1, "train": "full",
    }  # fmt: skip
    model = build_detector(args)
    torch.nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.5)
    torch.save({"model": model.state_dict(), "args": args, "kind": "detector"}, tmp_path / "d.pth")
    out = tmp_path / "detector.onnx"
    export(["--ckpt", str(tmp_path / "d.pth"), "--onnx", str(out)])
    detector = load_detector(tmp_path / "d.pth").model
    images = pictures(3, 64)
    with torch.inference_mode():
        expected = detector(images)
    found = run(out, images)
    for scores, boxes, own in zip(found["scores"], found["boxes"], expected, strict=True):
        place, label = np.nonzero(scores > detector.score_thresh)
        clipped = torch.from_numpy(boxes[place].clip(0, 64))
        values = torch.from_numpy(scores[place, label])
        kept = batched_nms(clipped, values, torch.from_numpy(label), detector.nms_thresh)
        assert len(own["scores"]) >= 20
        # the best ones: where scores are nearly equal, rounding may put them in another order
        torch.testing.assert_close(values[kept][:20], own["scores"][:20], atol=1e-3, rtol=0)
        apart = (own["boxes"][:20, None] - clipped[kept][None]).abs().amax(dim=2)
        assert apart.amin(dim=1).max() < 0.2  # px


class Scaled(torch.nn.Module):
    """Channel means times a factor; `fixed` says it for batches of two only."""

    def __init__(self, factor: float, fixed: bool = False):
        super().__init__()
        self.factor, self.fixed = factor, fixed

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = images.mean((2, 3)) * self.factor
        return means + torch.zeros(2, 1) if self.fixed else means


@pytest.mark.parametrize(
    ("other", "message"), [(Scaled(1.01), "differs from PyTorch"), (Scaled(1.0, True), "does not take 1 images|gives")]
)
def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch, other, message):
    export = torch.onnx.export

    def of_another(module, images, *, dynamic_shapes, **options):
        return export(other, images, dynamic_shapes=None if other.fixed else dynamic_shapes, **options)

    monkeypatch.setattr(torch.onnx, "export", of_another)
    with pytest.raises(onnx_file.UserError, match=message):
        write_onnx(Scaled(1.0).eval(), (8, 8), tmp_path / "a.onnx", ("means",))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_one_line(export, tmp_path, capsys, monkeypatch):
    argv = ["--ckpt", str(tmp_path / "none.pth"), "--onnx"]
    assert "does not end in .onnx" in fails(export, capsys, [*argv, str(tmp_path / "a.bin")])
    assert "do not exist" in fails(export, capsys, [*argv, str(tmp_path / "a.onnx"), "--model", "vit_nano_patch8"])
    monkeypatch.setattr(onnx_file, "NEEDED", ("onnx", "no_such_library"))
    line = fails(export, capsys, [*argv, str(tmp_path / "a.onnx")])
    assert "no_such_library" in line and "requirements-dev.txt" in line
