"""Batches augmented on the device: the workers' picture, torchvision's picture, and runs that resume bit for bit.

Run: python -m pytest tests/test_augment_batch.py
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_same, fails, make_identities, outcome, transfer_flags
from PIL import Image
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as modern

import main_finetune
import main_pretrain
from util.data import pack
from util.data.augment import EvalCrop, TrainCrop, TrainView, View, to_unit, unpack
from util.data.augment_batch import DeferredView, apply_views, pictures, placed, resampling_matrix
from util.data.batches import collate
from util.data.effects import blur_radius, erase_noise
from util.data.loader import TrainLoader, in_order
from util.data.sources import Subset, open_source
from util.run.device import augments_batches
from util.run.dist import World
from util.run.errors import UserError
from util.run.seed import rng_for

ALL = {"jitter": 0.4, "blur": 0.5, "erase": 0.5}
SIZES = [((96, 96), (48, 48)), ((64, 64), (96, 80)), ((80, 120), (40, 64))]  # canvas and target: both ways, oblong


def canvas(size: tuple[int, int], seed: int) -> np.ndarray:
    """A smooth picture with hard edges, uint8 (H, W, 3), of all levels."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize(size[::-1], Image.Resampling.BICUBIC))
    pixels[size[0] // 3 : size[0] // 2, size[1] // 4 : size[1] // 2] = rng.choice([0, 255], 3)
    return pixels


def drawn(transform, size: tuple[int, int], count: int) -> tuple[list[np.ndarray], list[View]]:
    canvases = [canvas(size, i) for i in range(count)]
    return canvases, [transform.draw(picture, {}, rng_for(i)) for i, picture in enumerate(canvases)]


def batched(canvases, views, size, effects=()) -> torch.Tensor:
    return apply_views(
        torch.from_numpy(np.stack(canvases)), torch.stack([view.packed() for view in views]), size, effects
    )


def difference(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Largest and mean, in levels."""
    apart = (one.float() - other.float()).abs()
    return apart.max().item(), apart.mean().item()


@pytest.mark.parametrize("count", [5, 16, 64, 100])
def test_resampling_is_the_linear_map_of_interpolate(count):
    rng, length = np.random.default_rng(0), 64
    lines = torch.rand(1, 1, length, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(60):
        low = int(rng.integers(0, length))
        high = int(rng.integers(low + 1, length + 1))
        ends = [torch.tensor([end], dtype=torch.float64) for end in (low, high)]
        [matrix] = resampling_matrix(*ends, length, count)
        expected = functional.interpolate(lines[:, :, low:high], (count, 3), mode="bicubic", antialias=True)
        assert (matrix @ lines[0, 0] - expected[0, 0]).abs().max() < 1e-6
        assert (matrix.sum(1) - 1).abs().max() < 1e-12
        assert not matrix[:, :low].any() and not matrix[:, high:].any()
        [mirrored] = resampling_matrix(*ends, length, count, torch.ones(1))
        assert (mirrored - matrix.flip(0)).abs().max() < 1e-12


def test_a_crop_of_the_target_size_is_not_resampled():
    matrix = resampling_matrix(torch.tensor([3.0]), torch.tensor([35.0]), 64, 32)[0]
    assert torch.equal(matrix, torch.eye(64)[3:35])
    picture = canvas((64, 64), 0)
    got = batched([picture], [View((3, 5, 35, 37))], (32, 32))
    assert torch.equal(got[0], torch.from_numpy(picture[5:37, 3:35]).permute(2, 0, 1).float())


@pytest.mark.parametrize(
    ("strengths", "most"),
    [({}, 2), ({"jitter": 0.4}, 5), ({"blur": 1.0}, 2), ({"erase": 1.0}, 2), (ALL, 5)],  # contrast magnifies a level
)
@pytest.mark.parametrize(("stored", "size"), SIZES)
def test_both_ways_give_the_same_picture(stored, size, strengths, most):
    view = TrainView(TrainCrop(size, scale=(0.05, 1.0)), **strengths)
    canvases, views = drawn(view, stored, 100)
    assert {drawn.flip for drawn in views} == {False, True}
    got = batched(canvases, views, size, view.effects)
    one_by_one = torch.stack([drawn.apply(picture, size) for drawn, picture in zip(views, canvases, strict=True)])
    assert got.dtype == torch.float32 and got.shape == (100, 3, *size) and got.is_contiguous()
    assert torch.equal(got, got.round()) and got.min() >= 0 and got.max() <= 255
    largest, mean = difference(got, one_by_one)
    assert largest <= most and mean < 0.02


def by_torchvision(picture: np.ndarray, view: View, size: tuple[int, int]) -> torch.Tensor:
    x1, y1, x2, y2 = view.box
    pixels = torch.from_numpy(picture).permute(2, 0, 1).contiguous()
    pixels = modern.resized_crop(
        pixels, y1, x1, y2 - y1, x2 - x1, list(size), modern.InterpolationMode.BICUBIC, antialias=True
    )
    pixels = modern.horizontal_flip(pixels) if view.flip else pixels
    pixels = modern.adjust_brightness(pixels, view.brightness)
    pixels = modern.adjust_contrast(pixels, view.contrast)
    pixels = modern.adjust_saturation(pixels, view.saturation)
    if view.blur:
        pixels = modern.gaussian_blur(pixels, [2 * blur_radius(size) + 1] * 2, [view.blur] * 2)
    x1, y1, x2, y2 = view.erase
    noise = erase_noise(torch.tensor([view.noise]), (x2 - x1) * (y2 - y1)).view(3, y2 - y1, x2 - x1).to(torch.uint8)
    return modern.erase(pixels, y1, x1, y2 - y1, x2 - x1, noise)


@pytest.mark.parametrize(("stored", "size"), SIZES)
def test_both_ways_are_torchvisions(stored, size):
    view = TrainView(TrainCrop(size, scale=(0.05, 1.0)), **ALL)
    canvases, views = drawn(view, stored, 60)
    expected = torch.stack([by_torchvision(*pair, size) for pair in zip(canvases, views, strict=True)])
    one_by_one = torch.stack([drawn.apply(picture, size) for drawn, picture in zip(views, canvases, strict=True)])
    for got in (batched(canvases, views, size, view.effects), one_by_one):
        largest, mean = difference(got, expected)
        assert largest <= 5 and mean < 0.02


def test_noise_is_the_same_both_ways_and_fills_the_box_alone():
    size = (48, 64)
    view = TrainView(TrainCrop(size), erase=1.0)
    canvases, views = drawn(view, (64, 64), 40)
    got, plain = batched(canvases, views, size, view.effects), batched(canvases, views, size)
    keys = set()
    for i, (picture, parameters) in enumerate(zip(canvases, views, strict=True)):
        x1, y1, x2, y2 = parameters.erase
        assert torch.equal(got[i, :, y1:y2, x1:x2], parameters.apply(picture, size)[:, y1:y2, x1:x2].float())
        outside = torch.ones(size, dtype=torch.bool)
        outside[y1:y2, x1:x2] = False
        assert torch.equal(got[i][:, outside], plain[i][:, outside])
        keys.add(parameters.noise)
    assert len(keys) == len(views)


def test_parameters_that_change_nothing_change_nothing():
    """One batch holds pictures with an effect and others without."""
    size, picture = (40, 40), canvas((64, 64), 3)
    box = (5, 5, 45, 45)  # of the target's size: exact in both ways
    plain = [View(box), View(box, True)]
    changed = [View(box, brightness=0.5), View(box, blur=1.5), View(box, erase=(4, 4, 20, 30), noise=9)]
    got = batched([picture] * 5, plain + changed, size, tuple(ALL))
    expected = torch.from_numpy(picture[5:45, 5:45]).permute(2, 0, 1).float()
    assert difference(got[0], expected)[0] <= 1  # a saturation of 1 may round a grey level down, as torchvision's does
    assert difference(got[1], expected.flip(-1))[0] <= 1
    assert all(difference(got[i], expected)[0] > 20 for i in (2, 3, 4))


def test_a_batch_is_not_written_to_and_its_order_does_not_matter():
    view = TrainView(TrainCrop((32, 32)), **ALL)
    canvases, views = drawn(view, (64, 64), 12)
    images, packed = torch.from_numpy(np.stack(canvases)), torch.stack([one.packed() for one in views])
    before = images.clone(), packed.clone()
    got = apply_views(images, packed, (32, 32), view.effects)
    assert torch.equal(images, before[0]) and torch.equal(packed, before[1])
    turned = apply_views(images.flip(0), packed.flip(0), (32, 32), view.effects)
    largest, mean = difference(got, turned.flip(0))
    assert largest <= 2 and mean < 1e-3


def test_autocast_does_not_reach_the_pictures():
    canvases, views = drawn(TrainCrop((32, 32)), (64, 64), 4)
    plain = batched(canvases, views, (32, 32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(batched(canvases, views, (32, 32)), plain)


class Counted(TorchDispatchMode):
    """Counts what the host asks of the device."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_the_host_neither_waits_for_the_device_nor_loops_over_samples():
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    view = TrainView(TrainCrop((32, 48)), **ALL)
    with FakeTensorMode():  # shapes and devices without values: what needs a value, or mixes devices, fails
        for device in ("cpu", "cuda"):
            packed = torch.empty(5, len(View((0, 0, 1, 1)).packed()), device=device)
            stored = torch.empty(5, 64, 80, 3, dtype=torch.uint8, device=device)
            got = apply_views(stored, packed, view.size, view.effects)
            assert got.shape == (5, 3, 32, 48) and got.device.type == device
            with pytest.raises(DataDependentOutputException):
                bool(got.sum() > 0)
    counts = []
    for n in (2, 9):
        canvases, views = drawn(view, (64, 80), n)
        images, packed = torch.from_numpy(np.stack(canvases)), torch.stack([one.packed() for one in views])
        with Counted() as counted:
            apply_views(images, packed, view.size, view.effects)
        counts.append(counted.calls)
    assert counts[0] == counts[1] > 0


def test_crops_colours_and_blur_are_one_graph():
    view = TrainView(TrainCrop((32, 32)), jitter=0.4, blur=0.5)
    canvases, views = drawn(view, (64, 64), 6)
    arguments = torch.from_numpy(np.stack(canvases)), torch.stack([one.packed() for one in views]), view.size
    compiled = torch.compile(apply_views, fullgraph=True, backend="aot_eager")
    assert difference(compiled(*arguments, view.effects), apply_views(*arguments, view.effects))[0] <= 1


def test_packed_parameters_come_back():
    view = View((1, 2, 2**24 - 1, 4), True, 1.1, 0.9, 1.3, 0.7, (5, 6, 7, 8), 2**24 - 1)
    back = unpack(torch.stack([view.packed(), View((0, 0, 9, 9)).packed()]))
    assert list(back) == list(vars(view))
    for name, value in vars(view).items():
        assert back[name][0].tolist() == pytest.approx(np.float64(value).tolist(), rel=1e-6)
    assert back["box"][0].tolist() == list(view.box) and back["noise"][0] == view.noise
    neutral = {name: float(values[1]) for name, values in back.items() if values.ndim == 1}
    names = ("flip", "brightness", "contrast", "saturation", "blur", "noise", "hue", "grey")
    assert neutral == dict(zip(names, (0, 1, 1, 1, 0, 0, 0, 0), strict=True))


class Packed:
    """A source whose pictures are all stored as uint8 (40, 40, 3)."""

    picture_size = (40, 40)

    def __init__(self, source):
        self.source, self.name, self.fingerprint = source, source.name, source.fingerprint

    def __len__(self):
        return len(self.source)

    def record(self, i):
        return self.source.record(i)

    def column(self, name):
        return self.source.column(name)

    def stamp(self):
        return self.source.stamp()

    def load(self, i):
        return np.array(self.source.load(i).resize((40, 40), Image.Resampling.BICUBIC))

    view = load


def test_the_deferred_view_draws_what_its_transform_draws():
    transform, picture = TrainView(TrainCrop((32, 32)), **ALL), canvas((64, 64), 0)
    for i in range(20):
        sample = DeferredView(transform)(picture, {}, rng_for(i))
        assert torch.equal(sample["views"], transform.draw(picture, {}, rng_for(i)).packed())
        assert np.array_equal(sample["image"], picture) and sample["image"].dtype == np.uint8
    batch = collate([{**sample, "epoch": 0, "index": i, "bad": []} for i in range(2)])
    batch["image"].zero_()  # its own memory, not the stored picture's
    assert picture.any() and batch["image"].shape == (2, 64, 64, 3)
    assert repr(DeferredView(transform)) != repr(transform)


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_give_both_ways_the_same_samples(tmp_path, workers):
    source = Packed(open_source(make_identities(tmp_path / "data"), "train"))
    classes = {name: i for i, name in enumerate(sorted(set(source.column("identity"))))}
    view, cpu = TrainView(TrainCrop((24, 24)), jitter=0.2, erase=0.5), torch.device("cpu")
    options = {"batch_size": 8, "accum_iter": 1, "seed": 3, "world": World(), "num_workers": workers, "device": cpu}
    loaders = [TrainLoader(source, seen, classes=classes, **options) for seen in (view, DeferredView(view))]
    batches = zip(*(loader.enter(1, 2) for loader in loaders), strict=True)
    for crop, stored in batches:
        assert stored["image"].shape == (8, 40, 40, 3) and stored["image"].dtype == torch.uint8
        assert torch.equal(crop["index"], stored["index"]) and torch.equal(crop["label"], stored["label"])
        one, other = pictures(crop, view), pictures(stored, view)
        assert torch.equal(one, to_unit(crop["image"])) and other.dtype == torch.float32
        largest, mean = difference(one * 255, other * 255)
        assert largest < 4 and mean < 0.05
    for loader in loaders:
        loader.close()


def test_a_smart_crop_can_be_deferred_too(tmp_path):
    source, crop = Packed(open_source(make_identities(tmp_path / "data"), "val")), EvalCrop((24, 16))
    options = {"batch_size": 8, "num_workers": 0, "device": torch.device("cpu")}
    for one, other in zip(*(in_order(source, view, **options) for view in (crop, DeferredView(crop))), strict=True):
        assert difference(pictures(one, crop) * 255, pictures(other, crop) * 255)[0] < 2.01


@pytest.mark.parametrize("augment_on", ["auto", "workers", "device"])
@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("part", [True, False])
def test_crops_are_made_where_the_flag_says(augment_on, kind, packed, part):
    transform, source = TrainCrop((32, 32)), SimpleNamespace(name="the/data", fingerprint="0" * 16)
    if packed:
        source.picture_size = (40, 40)
    if part:
        source = Subset(Subset(source, np.arange(4)), np.arange(2))
    if augment_on == "device" and not packed:
        with pytest.raises(UserError, match="the/data"):
            placed(transform, augment_on, source, torch.device(kind))
        return
    found = placed(transform, augment_on, source, torch.device(kind))
    deferred = packed and (augment_on == "device" or (augment_on == "auto" and kind == "cuda"))
    assert isinstance(found, DeferredView) == deferred
    assert (found.transform if deferred else found) is transform
    assert augments_batches(torch.device(kind)) == (kind == "cuda")


@pytest.fixture
def packed_pictures(monkeypatch):
    """What scripts open is packed."""
    from util.data import labels, loader

    opened = loader.open_pictures
    for module in (loader, labels):
        monkeypatch.setattr(module, "open_pictures", lambda args, role: Packed(opened(args, role)))


def pretrain_flags(data, run, *more) -> list[str]:
    recipe = "--labels none --model mae_vit_nano_patch8 --input_size 32 --batch_size 4 --epochs 2 --warmup_epochs 1"
    recipe += " --accum_iter 2 --num_workers 0 --device cpu --eval_images 2 --log_every 2 --val_fraction 0.1"
    return ["--data_path", str(data), "--output_dir", str(run), *recipe.split(), *map(str, more)]


def test_a_pretraining_on_the_device_resumes_bit_for_bit(tmp_path, make_images, packed_pictures):
    data, flags = make_images(tmp_path / "images", 28), ("--augment_on", "device")
    main_pretrain.main(pretrain_flags(data, tmp_path / "whole", *flags))
    main_pretrain.main(pretrain_flags(data, tmp_path / "parts", *flags, "--max_steps", 2))
    main_pretrain.main(pretrain_flags(data, tmp_path / "parts", *flags, "--resume", "auto"))
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))
    main_pretrain.main(pretrain_flags(data, tmp_path / "workers", "--augment_on", "workers"))
    on_device, in_workers = (outcome(tmp_path / run)[3] for run in ("whole", "workers"))
    for one, other in zip(on_device, in_workers, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
        assert one["train_loss"] != other["train_loss"]  # it is another computation, so the flag was heard


def test_a_fine_tuning_on_the_device_resumes_bit_for_bit(tmp_path, packed_pictures):
    data = make_identities(tmp_path / "data")
    flags = "--augment_on", "device", "--color_jitter", 0.2, "--blur", 0.5, "--reprob", 0.5
    main_finetune.main(transfer_flags(data, tmp_path / "whole", *flags))
    main_finetune.main(transfer_flags(data, tmp_path / "parts", *flags, "--max_steps", 4))
    main_finetune.main(transfer_flags(data, tmp_path / "parts", *flags, "--resume", "auto"))
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))


def test_packed_data_train_on_the_device(tmp_path, make_images):
    """The real thing, with workers: canvases that are mapped read-only go to the step as they lie."""
    packed = tmp_path / "data.pack"
    images = make_images(tmp_path / "images", 28)
    pack.main(["--data_path", str(images), "--out", str(packed), "--canvas", "36", "--num_workers", "0"])
    for augment_on in ("device", "workers"):
        flags = ("--augment_on", augment_on, "--num_workers", 1)
        main_pretrain.main(pretrain_flags(packed, tmp_path / augment_on, *flags))
    losses = [[line["train_loss"] for line in outcome(tmp_path / run)[3]] for run in ("device", "workers")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] != losses[1]


def test_pictures_of_many_sizes_are_refused_in_one_line(tmp_path, make_images, capsys):
    data = make_images(tmp_path / "images", 20)
    error = fails(main_pretrain.main, capsys, pretrain_flags(data, tmp_path / "run", "--augment_on", "device"))
    assert str(data) in error and "--augment_on device" in error
    streamed = pretrain_flags(data, tmp_path / "run", "--augment_on", "device", "--streaming", "--epoch_images", 8)
    assert "stream" in fails(main_pretrain.main, capsys, streamed)
