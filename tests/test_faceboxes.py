"""Run: python -m pytest tests/test_faceboxes.py"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models_faceboxes
from models_faceboxes import FaceBoxes, decode, load_faceboxes, make_priors
from models_finders import open_finder
from util.data.faces import CascadeFinder, NetworkFinder, StoredFinder, UnionFinder, find_faces
from util.run.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
WEIGHTS = SHARED / "weights" / "FaceBoxesProd.pth"


def layout() -> dict[str, tuple]:
    """Names and shapes of the published state dict, written out from the file rather than from our layers."""
    shapes = {}

    def convolution(name, *shape):
        shapes[f"{name}.conv.weight"] = shape
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = shape[:1]
        shapes[f"{name}.bn.num_batches_tracked"] = ()

    convolution("conv1", 24, 3, 7, 7)
    convolution("conv2", 64, 48, 5, 5)
    for block in ("inception1", "inception2", "inception3"):
        for branch in ("branch1x1", "branch1x1_2"):
            convolution(f"{block}.{branch}", 32, 128, 1, 1)
        for branch in ("branch3x3_reduce", "branch3x3_reduce_2"):
            convolution(f"{block}.{branch}", 24, 128, 1, 1)
        for branch, inputs in (("branch3x3", 24), ("branch3x3_2", 24), ("branch3x3_3", 32)):
            convolution(f"{block}.{branch}", 32, inputs, 3, 3)
    convolution("conv3_1", 128, 128, 1, 1)
    convolution("conv3_2", 256, 128, 3, 3)
    convolution("conv4_1", 128, 256, 1, 1)
    convolution("conv4_2", 256, 128, 3, 3)
    for head, outputs in (("loc", (84, 4, 4)), ("conf", (42, 2, 2))):
        for number, (count, inputs) in enumerate(zip(outputs, (128, 256, 256), strict=True)):
            shapes[f"{head}.{number}.weight"], shapes[f"{head}.{number}.bias"] = (count, inputs, 3, 3), (count,)
    return shapes


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in layout().items():
        values = torch.rand(shape, generator=generator) if shape else torch.tensor(0)
        state[name] = values if "bn" in name else values * 0.1 - 0.05
    path = tmp_path_factory.mktemp("weights") / "made.pth"
    torch.save(state, path)
    return path


def test_a_state_dict_of_the_published_layout_loads_strictly(weights):
    state, model = torch.load(weights, weights_only=True), load_faceboxes(str(weights))
    assert not model.training
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == layout()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def brute_force_priors(height: int, width: int) -> list[tuple]:
    rows = []
    for stride, sizes in ((32, {32: 4, 64: 2, 128: 1}), (64, {256: 1}), (128, {512: 1})):
        for row in range(math.ceil(height / stride)):
            for column in range(math.ceil(width / stride)):
                for side, density in sizes.items():
                    first = 0.5 if density == 1 else 0.0
                    for n in range(density * density):
                        y, x = row + first + n // density / density, column + first + n % density / density
                        rows.append((x * stride, y * stride, side, side))
    return rows


@pytest.mark.parametrize("size", [(64, 96), (100, 130), (33, 257)])
def test_priors_are_tiled_as_the_paper_says(size):
    assert np.allclose(make_priors(*size), brute_force_priors(*size))


def test_offsets_are_decoded_one_by_one():
    generator = torch.Generator().manual_seed(1)
    priors, offsets = make_priors(64, 64), torch.randn(2, 86, 4, generator=generator)
    boxes = decode(offsets, priors)
    for n in range(2):
        for (cx, cy, w, h), (dx, dy, dw, dh), box in zip(
            priors.tolist(), offsets[n].tolist(), boxes[n].tolist(), strict=True
        ):
            x, y, wide, high = cx + 0.1 * dx * w, cy + 0.1 * dy * h, w * math.exp(0.2 * dw), h * math.exp(0.2 * dh)
            expected = (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)
            assert box == pytest.approx(expected, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("size", [(64, 96), (100, 130), (17, 300)])
def test_the_network_has_an_output_for_each_prior(size):
    offsets, logits = FaceBoxes().eval()(torch.randn(2, 3, *size))
    priors = len(make_priors(*size))
    assert offsets.shape == (2, priors, 4) and logits.shape == (2, priors, 2)


def test_an_output_belongs_to_the_prior_of_its_cell():
    """A head that answers to one prior of a cell with its bias alone: all boxes then have that prior's side."""
    model = FaceBoxes().eval()
    for head in (*model.loc, *model.conf):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    with torch.no_grad():
        for head in model.conf:
            head.bias.view(-1, 2)[:, 0] = 20.0
        model.conf[0].bias.view(-1, 2)[16 + 2] = torch.tensor([0.0, 20.0])  # the third of the four priors of 64 px
    ((boxes, scores),) = model.detect(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), max_overlap=1.0)
    centres = {tuple(c) for c in ((boxes[:, :2] + boxes[:, 2:]) / 2).tolist()}
    assert len(boxes) == 4 and torch.allclose(scores, torch.ones(4))
    assert centres == {(0, 16), (32, 16), (0, 48), (32, 48)}
    assert torch.allclose(boxes[:, 2:] - boxes[:, :2], torch.tensor(64.0))


def test_detection_reads_rgb_and_subtracts_the_mean(monkeypatch):
    model, seen = FaceBoxes().eval(), []
    monkeypatch.setattr(model, "forward", lambda x: seen.append(x) or (torch.zeros(1, 23, 4), torch.zeros(1, 23, 2)))
    monkeypatch.setattr(models_faceboxes, "make_priors", lambda *size: torch.ones(23, 4))
    model.detect(torch.tensor([200, 150, 100], dtype=torch.uint8).view(1, 3, 1, 1))
    assert seen[0].flatten().tolist() == [100 - 104, 150 - 117, 200 - 123]


def test_non_maximum_suppression_keeps_what_brute_force_keeps():
    generator = torch.Generator().manual_seed(2)
    corner = torch.rand(60, 2, generator=generator) * 60
    boxes = torch.cat((corner, corner + 10 + 30 * torch.rand(60, 2, generator=generator)), 1)
    scores = torch.rand(60, generator=generator)
    kept, kept_scores = models_faceboxes._strongest(boxes, scores, 0.2, 0.3)

    def iou(a, b):
        width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        shared = max(width, 0) * max(height, 0)
        return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)

    expected = []
    for i in sorted(range(60), key=lambda i: -scores[i]):
        if scores[i] >= 0.2 and all(iou(boxes[i].tolist(), boxes[j].tolist()) <= 0.3 for j in expected):
            expected.append(i)
    assert 3 < len(expected) < 50
    assert torch.equal(kept, boxes[expected]) and torch.equal(kept_scores, scores[expected])


def test_a_spec_opens_its_finder(weights, tmp_path):
    (tmp_path / "a.xml").write_text("<opencv_storage/>")
    (tmp_path / "a+b.json").write_text("{}")
    united = open_finder(f"cascade:{tmp_path}/a.xml+faceboxes:{weights}+boxes:{tmp_path}/a+b.json")
    assert isinstance(united, UnionFinder) and united.needs_name
    assert [type(finder) for finder in united.finders] == [CascadeFinder, NetworkFinder, StoredFinder]
    assert isinstance(open_finder(f"faceboxes:{weights}"), NetworkFinder)


@pytest.mark.parametrize("spec", ["", "cascade", "cascade:", "yolo:a.pt", "a.xml", "cascade:a.xml+yolo:a.pt"])
def test_an_unknown_finder_is_one_line(spec):
    with pytest.raises(UserError, match=r"^(face finder|cascade) [^\n]*$"):
        open_finder(spec)


def test_weights_of_another_network_are_one_line(tmp_path):
    torch.save({"model": {"patch_embed.weight": torch.zeros(2)}}, tmp_path / "mae.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name, words in (("mae.pth", "holds no FaceBoxes weights"), ("text.pth", "text.pth"), ("none.pth", "none.pth")):
        with pytest.raises(UserError, match=words) as error:
            open_finder(f"faceboxes:{tmp_path}/{name}")
        assert "\n" not in str(error.value)


def test_the_published_weights_find_a_face():
    if not WEIGHTS.is_file():
        pytest.skip("no FaceBoxes weights under ../shared/data/weights")
    picture = SHARED / "illus" / "animegirls_computers"
    pictures = sorted(path for path in picture.iterdir() if path.suffix in (".jpg", ".png"))[:6]
    finder = open_finder(f"faceboxes:{WEIGHTS}")
    found = [find_faces(Image.open(path), finder) for path in pictures]
    assert sum(map(bool, found)) >= 3
    grey = Image.new("RGB", (200, 150), (128, 128, 128))
    assert find_faces(grey, finder) == []
