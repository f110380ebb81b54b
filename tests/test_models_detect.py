"""The detector: pyramids, losses and finds against torchvision's own FCOS, what learns, pictures of any size.

Run: python -m pytest tests/test_models_detect.py
"""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models.detection.fcos import FCOS

from models_detect import Detector, PictureDetector, SimplePyramid, build_detector
from util.run.errors import UserError

SIZE = (64, 96)


def flags(**changed) -> dict:
    return {
        "model": "vit_nano_patch8", "init": None, "input_size": list(SIZE), "seed": 0, "train": "full", "width": 64,
        "convs": 1, "rank": 2, "alpha": None, "lora_targets": ["q", "v"], "lora_dropout": 0.0, **changed,
    }  # fmt: skip


def built(**changed) -> Detector:
    return build_detector(flags(**changed))


def target(boxes, labels=None, known=(True, True)) -> dict:
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.zeros(len(boxes), dtype=torch.int64) if labels is None else torch.tensor(labels)
    return {"boxes": boxes, "labels": labels, "known": torch.tensor(known)}


IMAGES = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
TARGETS = [target([[8, 8, 40, 44], [16, 16, 24, 22]], [0, 1]), target([[50, 4, 90, 60]])]


class Reference(FCOS):
    """torchvision's detector with our modules, and nothing resized or normalised."""

    def __init__(self, ours: Detector):
        class Maps(nn.Module):
            out_channels = ours.backbone.out_channels

            def forward(self, images):
                return OrderedDict(enumerate(ours.backbone(images)))

        super().__init__(
            Maps(), 2, anchor_generator=ours.anchor_generator, image_mean=[0.0] * 3, image_std=[1.0] * 3,
            min_size=min(SIZE), max_size=max(SIZE), size_divisible=ours.multiple, score_thresh=ours.score_thresh,
            detections_per_img=ours.detections_per_img,
        )  # fmt: skip
        plain = FCOS.__init__.__globals__["FCOSHead"](ours.backbone.out_channels, 1, 2, 1)
        plain.load_state_dict(ours.head.state_dict())
        self.head = plain


def test_losses_and_finds_are_torchvisions():
    ours = built()
    reference = Reference(ours)
    losses = ours(IMAGES, TARGETS)
    expected = reference.train()(list(IMAGES), [{name: one[name] for name in ("boxes", "labels")} for one in TARGETS])
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-5)
    with torch.no_grad():
        found, wanted = ours.eval()(IMAGES), reference.eval()(list(IMAGES))
    assert len(found[0]["boxes"])
    for one, other in zip(found, wanted, strict=True):
        for name in ("boxes", "scores", "labels"):
            assert torch.allclose(one[name].float(), other[name].float(), atol=1e-4)


def test_eyes_that_are_not_known_cost_nothing():
    model = built()
    unknown = [target([[8, 8, 40, 44]], known=(True, False))]
    sum(model(IMAGES[:1], unknown).values()).backward()
    gradient = model.head.classification_head.cls_logits.weight.grad
    assert gradient[0].abs().max() > 0 and gradient[1].abs().max() == 0
    with_eyes = model(IMAGES[:1], [target([[8, 8, 40, 44]])])["classification"]
    assert with_eyes > model(IMAGES[:1], unknown)["classification"]


def test_the_simple_pyramid_has_four_strides():
    maps = SimplePyramid(8, 6)(torch.randn(1, 8, 8, 12))
    assert [tuple(one.shape) for one in maps] == [(1, 6, 16, 24), (1, 6, 8, 12), (1, 6, 4, 6), (1, 6, 2, 3)]


@pytest.mark.parametrize(
    ("name", "strides"),
    [("vit_nano_patch8", (4, 8, 16, 32)), ("vit_nano_patch16", (8, 16, 32, 64)), ("timm:resnet18", (8, 16, 32, 64))],
)
def test_maps_lie_where_their_strides_say(name, strides):
    model = built(model=name).eval()
    maps = model.backbone(torch.rand(1, 3, 128, 192))
    assert model.backbone.strides == strides and model.multiple == strides[-1]
    assert [tuple(one.shape[1:]) for one in maps] == [(64, 128 // s, 192 // s) for s in strides]
    loss = sum(model.train()(torch.rand(2, 3, 128, 192), TARGETS).values())
    loss.backward()
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # a parameter without a gradient would stall other processes; a network's own classifier is not there
    assert not [name for name in lacking if not name.endswith("eyes")], lacking


def test_a_picture_may_be_larger_than_in_training_and_not_square():
    finder = PictureDetector(built(), torch.device("cpu"), 96)
    pictures = [Image.new("RGB", size, "white") for size in ((200, 50), (31, 77), (4000, 2500), (1, 1))]
    for size in (None, 160):
        for picture, found in zip(pictures, finder.detect(pictures, size), strict=True):
            assert found.boxes.shape == (len(found.scores), 4) and found.boxes.dtype == np.float32
            assert (found.boxes >= 0).all() and (found.boxes <= [*picture.size, *picture.size]).all()
            assert set(found.labels) <= {1, 2} and (np.diff(found.scores) <= 0).all()


def test_boxes_come_back_in_px_of_the_picture():
    """A picture and its double show the same to the detector: the boxes are the double."""
    finder = PictureDetector(built(), torch.device("cpu"), 96)
    small = Image.fromarray(np.uint8(255 * np.random.default_rng(0).random((64, 96, 3))))
    large = small.resize((192, 128), Image.Resampling.NEAREST)
    one, two = finder.detect([small])[0], finder.detect([large], 96)[0]
    assert abs(len(one.scores) - len(two.scores)) <= 0.2 * len(one.scores)
    best = one.boxes[0] * 2
    assert np.abs(two.boxes - best).max(1).min() < 8


def trained(model: Detector) -> Detector:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(model.train()(IMAGES, TARGETS).values()).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", ["vit_nano_patch8", "timm:resnet18"])
def test_a_frozen_backbone_does_not_change(name):
    model = built(model=name, train="frozen", input_size=[64, 128])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.rand(2, 3, 64, 128)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sum(model.train()(images, TARGETS).values()).backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and not [key for key in changed if key.startswith("backbone.net.")]


def test_with_lora_the_adapters_learn_and_the_rest_of_the_backbone_does_not():
    model = built(train="lora")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained(model)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    own = {key for key in changed if key.startswith("backbone.net.")}
    assert own and all("lora_" in key for key in own) and any(key.startswith("head.") for key in changed)


def test_a_picture_as_small_as_the_last_stride_is_looked_at():
    model = built().eval()
    finder = PictureDetector(model, torch.device("cpu"), 1)
    assert model.multiple == 32  # so that the last map is a single place
    found = finder.detect([Image.new("RGB", (9, 7))])[0]
    assert np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()


def test_networks_without_maps_and_odd_widths_are_refused():
    for width in (32, 72):  # 32 channels in 32 groups: one value each where the last map has one place
        with pytest.raises(UserError, match="multiple of 32, from 64"):
            built(width=width)
    with pytest.raises(UserError, match="no maps of strides"):
        built(model="timm:vit_tiny_patch16_224", input_size=[224, 224])
