"""main_simclr.py: its views, its loss, several processes, exact resuming, and what transfer makes of its checkpoints.

Run: python -m pytest tests/test_simclr.py
"""

import math
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from torch import nn
from torchvision.transforms.v2 import functional as modern

import main_linprobe
import main_simclr
from models_transfer import load_recogniser, start_backbone
from tests import helpers, simclr_worker
from tests.helpers import assert_same, kill_when_written, make_identities, outcome, results_of, transfer_flags
from util.data.augment import TrainCrop, View
from util.data.augment_batch import DeferredView
from util.data.batches import collate
from util.data.effects import EFFECTS, blur_radius
from util.data.loader import TrainLoader
from util.data.sources import open_source
from util.run.dist import World
from util.run.errors import UserError
from util.run.seed import rng_for
from util.simclr.head import ProjectionHead, share_batch_statistics
from util.simclr.loss import nt_xent
from util.simclr.views import TwoViews, ViewPair, view_batch
from util.training.checkpoint import read_checkpoint, save_checkpoint

fails = partial(helpers.fails, main_simclr.main)
CPU = torch.device("cpu")
PUBLISHED = {"jitter": 0.8, "hue": 0.2, "grey": 0.2, "blur": 0.5}


# views


def canvas(seed: int, size: int = 64) -> np.ndarray:
    """A smooth picture with flat areas, grey, black and white ones among them, uint8 (size, size, 3)."""
    rng = np.random.default_rng(seed)
    coarse = PILImage.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((size, size), PILImage.Resampling.BICUBIC))
    for i, level in enumerate((0, 128, 255)):
        pixels[size // 2 :, 8 * i : 8 * i + 8] = level
    pixels[: size // 3, : size // 3] = rng.choice([0, 255], 3)
    return pixels


def effect(name: str, pixels: np.ndarray, **parameters) -> torch.Tensor:
    """One effect on a batch of copies of a picture; each parameter has a value for each copy."""
    views = {key: torch.tensor(values, dtype=torch.float32) for key, values in parameters.items()}
    copies = torch.from_numpy(pixels).permute(2, 0, 1).float().repeat(len(next(iter(views.values()))), 1, 1, 1)
    return EFFECTS[name](copies, views)


def test_the_hue_is_turned_as_by_torchvision():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pixels[:, ::4] = pixels[:, ::4, :1]  # greys
    pixels[:, 1::4, 0] = pixels[:, 1::4, 1]  # two channels alike
    turns = [0.0, 0.5, -0.5, 1 / 6, *np.random.default_rng(1).uniform(-0.5, 0.5, 12)]
    got = effect("hue", pixels, hue=turns)
    picture = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = torch.stack([modern.adjust_hue(picture, turn) for turn in turns]).float()
    assert torch.equal(got[0], picture.float()) and torch.equal(got, got.round())
    assert (got - expected).abs().max() <= 1 and (got - expected).abs().mean() < 0.5
    assert (got[1:] - got[0]).abs().mean() > 10


def test_grey_is_torchvisions_and_only_where_it_is_asked_for():
    pixels = canvas(0)
    got, picture = effect("grey", pixels, grey=[1.0, 0.0]), torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(got[0], modern.rgb_to_grayscale(picture, num_output_channels=3).float())
    assert torch.equal(got[1], picture.float())


def by_torchvision(pixels: np.ndarray, view: View, size: tuple[int, int]) -> torch.Tensor:
    x1, y1, x2, y2 = view.box
    picture = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    picture = modern.resized_crop(picture, y1, x1, y2 - y1, x2 - x1, list(size), modern.InterpolationMode.BICUBIC)
    picture = modern.horizontal_flip(picture) if view.flip else picture
    picture = modern.adjust_brightness(picture, view.brightness)
    picture = modern.adjust_contrast(picture, view.contrast)
    picture = modern.adjust_saturation(picture, view.saturation)
    picture = modern.adjust_hue(picture, view.hue)
    picture = modern.rgb_to_grayscale(picture, num_output_channels=3) if view.grey else picture
    kernel = [2 * blur_radius(size) + 1] * 2
    return modern.gaussian_blur(picture, kernel, [view.blur] * 2) if view.blur else picture


def test_workers_and_device_make_the_views_of_torchvision():
    size = (40, 48)
    transform = TwoViews(TrainCrop(size, scale=(0.08, 1.0)), **PUBLISHED)
    pictures = [canvas(i) for i in range(50)]
    drawn = [transform.draw(picture, {}, rng_for(i)) for i, picture in enumerate(pictures)]
    expected = [
        [by_torchvision(p, view, size) for view in (d.first, d.second)] for p, d in zip(pictures, drawn, strict=True)
    ]
    expected = torch.stack([torch.stack(pair) for pair in expected]).transpose(0, 1).flatten(0, 1).float()
    for seen in (transform, DeferredView(transform)):
        samples = [seen(picture, {}, rng_for(i)) for i, picture in enumerate(pictures)]
        named = [sample if isinstance(sample, dict) else {"image": sample} for sample in samples]
        batch = collate([{**sample, "index": i, "epoch": 0, "bad": []} for i, sample in enumerate(named)])
        got = view_batch(batch, transform)
        assert got.shape == (100, 3, *size) and got.dtype == torch.float32 and got.min() >= 0 and got.max() <= 1
        apart = (got * 255 - expected).abs()
        # a level that the resampling rounds otherwise is magnified by brightness, contrast and saturation, and where
        # two channels change places, by the hue
        assert apart.quantile(0.999) <= 4 and apart.mean() < 0.05


def draws(count: int, **strengths) -> list[View]:
    transform, picture = TwoViews(TrainCrop((112, 112), scale=(0.08, 1.0)), **strengths), canvas(0)
    pairs = [transform.draw(picture, {}, rng_for(i)) for i in range(count)]
    return [view for pair in pairs for view in (pair.first, pair.second)]


def test_the_parameters_are_distributed_as_published():
    views = draws(1500, **PUBLISHED)
    jittered = [view for view in views if view.brightness != 1]
    for share, found in (
        (0.8, len(jittered)),
        (0.2, sum(v.grey for v in views)),
        (0.5, sum(v.blur > 0 for v in views)),
    ):
        assert abs(found / len(views) - share) < 0.04  # four standard errors
    for name in ("brightness", "contrast", "saturation"):
        values = [getattr(view, name) for view in jittered]
        assert 0.2 <= min(values) < 0.22 and 1.78 < max(values) <= 1.8 and abs(np.mean(values) - 1) < 0.04
    hues = [view.hue for view in jittered]
    assert -0.2 <= min(hues) < -0.19 and 0.19 < max(hues) <= 0.2
    assert all(view.hue == 0 for view in views if view.brightness == 1)
    sigmas = [view.blur for view in views if view.blur]
    assert 0.05 <= min(sigmas) < 0.06 and 0.98 < max(sigmas) <= 1.0  # half of 0.1 to 2: the side is half of 224
    areas = [(x2 - x1) * (y2 - y1) / 64**2 for x1, y1, x2, y2 in (view.box for view in views)]
    assert min(areas) > 0.07 and min(areas) < 0.1 and max(areas) > 0.9
    assert abs(np.mean([view.flip for view in views]) - 0.5) < 0.04


def test_two_views_of_a_picture_know_nothing_of_each_other():
    views = draws(800, **PUBLISHED)
    for number in (lambda view: view.box[0], lambda view: view.brightness, lambda view: view.blur, lambda v: v.grey):
        first, second = (np.array([float(number(view)) for view in views[start::2]]) for start in (0, 1))
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.12 and (first != second).any()


def test_a_switch_changes_only_what_it_is_for():
    plain, published = draws(100, **{**PUBLISHED, "hue": 0.0, "grey": 0.0}), draws(100, **PUBLISHED)
    assert {view.hue for view in plain} == {0.0} and not any(view.grey for view in plain)
    changed = 0
    for one, other in zip(plain, published, strict=True):
        names = {name for name, value in vars(one).items() if value != getattr(other, name)}
        assert names <= {"hue", "grey"}
        changed += bool(names)
    assert changed > 100
    off = TwoViews(TrainCrop((16, 16)), jitter=0.0, blur=0.0)
    assert off.effects == () and TwoViews(TrainCrop((16, 16)), **PUBLISHED).effects == ("jitter", "hue", "grey", "blur")


@pytest.fixture(scope="module")
def images(make_images, tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), 40)


@pytest.mark.parametrize("workers", [0, 2])
def test_views_follow_from_seed_epoch_index_and_number_alone(images, workers):
    source = open_source(str(images), "train", labels="none", val_fraction=0.1)
    transform = TwoViews(TrainCrop((16, 16)), **PUBLISHED)
    options = {"batch_size": 8, "accum_iter": 1, "seed": 3, "world": World(), "num_workers": workers, "device": CPU}
    loader = TrainLoader(source, transform, **options)
    batch = list(loader.enter(2, 1))[1]
    loader.close()
    for pair, index in zip(batch["image"], batch["index"].tolist(), strict=True):
        key = int(rng_for(3, 2, index, "augment").integers(1 << 63))
        for number, pixels in enumerate(pair):
            again = transform._draw(source.load(index), source.record(index), rng_for(key, number))
            assert torch.equal(pixels, again.apply(source.load(index), (16, 16)))
    other = transform(source.load(0), source.record(0), rng_for(3, 3, 0, "augment"))
    assert not torch.equal(other, transform(source.load(0), source.record(0), rng_for(3, 2, 0, "augment")))


def test_the_first_views_come_first():
    pair = ViewPair(View((0, 0, 32, 32)), View((32, 32, 64, 64), grey=True))
    transform, pictures = TwoViews(TrainCrop((32, 32)), **PUBLISHED), [canvas(0), canvas(1)]
    inside = collate(
        [{"image": pair.apply(p, (32, 32)), "index": i, "epoch": 0, "bad": []} for i, p in enumerate(pictures)]
    )
    deferred = {"image": torch.from_numpy(np.stack(pictures)), "views": torch.stack([pair.packed()] * 2)}
    for batch in (inside, deferred):
        got = view_batch(batch, transform) * 255
        for i, picture in enumerate(pictures):
            pixels = torch.from_numpy(picture).permute(2, 0, 1)
            assert (got[i] - pixels[:, :32, :32]).abs().max() <= 1.001
            grey = modern.rgb_to_grayscale(pixels[:, 32:, 32:], num_output_channels=3)
            assert (got[2 + i] - grey).abs().max() <= 1.001


def test_a_batch_of_views_is_made_without_the_host_waiting():
    from torch._subclasses.fake_tensor import FakeTensorMode

    transform = TwoViews(TrainCrop((32, 32)), **PUBLISHED)
    with FakeTensorMode():  # what needs a value, or mixes devices, fails
        views = torch.empty(5, 2, len(View((0, 0, 1, 1)).packed()), device="cuda")
        stored = torch.empty(5, 64, 64, 3, dtype=torch.uint8, device="cuda")
        got = view_batch({"image": stored, "views": views}, transform)
        assert got.shape == (10, 3, 32, 32) and got.device.type == "cuda"
        loss, top1 = nt_xent(torch.empty(10, 8, device="cuda"), 0.2)
        assert loss.device.type == top1.device.type == "cuda"


# the loss


def by_hand(projections: np.ndarray, temperature: float) -> tuple[float, float]:
    """NT-Xent and top-1 by the double loop of equation 1."""
    unit = [row / math.sqrt(sum(x * x for x in row)) for row in projections.astype(np.float64)]
    count, losses, right = len(unit), [], 0
    for i in range(count):
        j = (i + count // 2) % count
        similar = {k: float(unit[i] @ unit[k]) for k in range(count) if k != i}
        losses.append(
            -math.log(math.exp(similar[j] / temperature) / sum(math.exp(s / temperature) for s in similar.values()))
        )
        right += max(similar, key=similar.get) == j
    return sum(losses) / count, right / count


@pytest.mark.parametrize("temperature", [0.1, 0.2, 0.5, 1.0])
def test_the_loss_is_equation_1(temperature):
    projections = torch.randn(14, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    projections[7:] += projections[:7]
    loss, top1 = nt_xent(projections, temperature)
    assert (loss.item(), top1.item()) == pytest.approx(by_hand(projections.numpy(), temperature), rel=1e-12)
    assert 0 < top1 < 1


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_loss_and_its_gradient_are_those_of_pytorch_metric_learning(temperature):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    ours = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    loss = nt_xent(ours, temperature)[0]
    expected = losses.NTXentLoss(temperature=temperature)(theirs, torch.arange(16).repeat(2))
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6) and ours.grad.abs().max() > 1e-3


def test_chance_and_certainty():
    generator = torch.Generator().manual_seed(0)
    loss, top1 = nt_xent(torch.randn(1024, 4096, generator=generator), 0.5)
    assert loss.item() == pytest.approx(math.log(1023), abs=2e-3) and top1 < 0.02
    loss, top1 = nt_xent(torch.ones(10, 4), 0.2)
    assert loss.item() == pytest.approx(math.log(9), abs=1e-5)
    loss, top1 = nt_xent(torch.eye(8).repeat(2, 1) * 5, 0.1)  # partners alike, all else at right angles
    assert loss.item() == pytest.approx(math.log(1 + 14 * math.exp(-10)), rel=1e-3) and top1 == 1


def test_the_length_of_a_projection_and_autocast_do_not_count():
    projections = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    loss = nt_xent(projections, 0.1)[0]
    assert nt_xent(projections * torch.linspace(0.1, 9, 12)[:, None], 0.1)[0].item() == pytest.approx(
        loss.item(), rel=1e-5
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nt_xent(projections, 0.1)[0], loss)
    assert nt_xent(projections.bfloat16(), 0.1)[0].dtype == torch.float32


def test_two_processes_have_the_gradient_of_one(run_script, tmp_path):
    simclr_worker.main(str(tmp_path / "one"))
    run_script("tests/simclr_worker.py", tmp_path / "all", processes=2)
    one = torch.load(tmp_path / "one.0.pth", weights_only=True)
    parts = [torch.load(tmp_path / f"all.{rank}.pth", weights_only=True) for rank in range(2)]
    for figure in ("loss", "top1"):
        mean = sum(part[figure] for part in parts) / 2
        assert mean.item() == pytest.approx(one[figure].item(), rel=1e-12)
    assert one["loss"].item() == pytest.approx(math.log(2 * simclr_worker.PICTURES - 1), abs=0.5)
    for name, gradient in one["gradients"].items():
        for part in parts:
            torch.testing.assert_close(part["gradients"][name], gradient, rtol=1e-9, atol=1e-12)
    assert one["gradients"]["patch_embed.proj.weight"].abs().max() > 1e-6


# the head and batch norms


def test_heads():
    embeddings = torch.randn(6, 32)
    for norm, parameters in (("layer", 64), ("batch", 64), ("none", 32)):
        head = ProjectionHead(32, norm)
        assert head(embeddings).shape == (6, 128)
        assert sum(p.numel() for p in head.parameters()) == 32 * 32 + parameters + 32 * 128 + 128
    alone = torch.cat([ProjectionHead.forward(layer := ProjectionHead(32), row[None]) for row in embeddings[:1]])
    assert torch.allclose(layer(embeddings)[:1], alone, atol=1e-6)  # no statistics over a batch


def test_batch_norms_are_shared_between_processes_or_refused():
    import timm
    from timm.layers import SyncBatchNormAct

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net, self.head = timm.create_model("efficientnet_lite0", num_classes=0), ProjectionHead(1280, "batch")

        def forward(self, images):
            return self.head(self.net(images))

    images = torch.rand(2, 3, 32, 32)
    model = Pair().eval()
    before, names = model(images), set(model.state_dict())
    assert share_batch_statistics(model, World(), CPU) is model and isinstance(model.head.norm, nn.BatchNorm1d)
    with pytest.raises(UserError, match="CUDA"):
        share_batch_statistics(model, World(size=2), CPU)
    shared = share_batch_statistics(model, World(size=2), torch.device("cuda"))
    kinds = {type(module) for module in shared.modules()}
    assert {nn.SyncBatchNorm, SyncBatchNormAct} <= kinds and not {nn.BatchNorm1d, nn.BatchNorm2d} & kinds
    assert set(shared.state_dict()) == names and torch.allclose(shared.eval()(images), before, atol=1e-5)
    plain = ProjectionHead(8, "layer")
    assert share_batch_statistics(plain, World(size=2), CPU) is plain


# training


def flags(images, run, *more):
    """36 training images or so, several steps of 8 an epoch, two epochs."""
    recipe = "--model vit_nano_patch8 --input_size 16 --batch_size 8 --epochs 2 --warmup_epochs 1 --lr 1e-3"
    recipe += " --device cpu --num_workers 0 --eval_images 4 --log_every 2 --labels none"
    return ["--data_path", str(images), "--output_dir", str(run), *recipe.split(), *map(str, more)]


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole")
    main_simclr.main(flags(images, run))
    return run


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_from_the_middle_of_an_epoch_is_exact(images, whole, tmp_path, workers):
    more = ["--num_workers", workers, "--resume", "auto", "--max_steps", 3]
    for _ in range(2):  # left at step 3 and 6: in the middle of both epochs
        main_simclr.main(flags(images, tmp_path, *more))
        assert read_checkpoint(tmp_path / "checkpoint-last.pth")["progress"]["step"]
    main_simclr.main(flags(images, tmp_path, *more[:-2]))
    assert_same(outcome(tmp_path), outcome(whole))


def test_a_killed_run_goes_on_bit_for_bit(images, whole, tmp_path):
    argv = flags(images, tmp_path, "--save_steps", 1, "--resume", "auto")
    kill_when_written([sys.executable, "main_simclr.py", *argv], tmp_path / "checkpoint-last.pth", 1)
    progress = read_checkpoint(tmp_path / "checkpoint-last.pth")["progress"]
    assert 0 < progress["global_step"] < 8
    main_simclr.main(argv)
    assert_same(outcome(tmp_path), outcome(whole))


@pytest.mark.parametrize(
    "argv",
    [
        ["--opt", "lars", "--lr", 1, "--hue", 0.2, "--grey", 0.2, "--grad_checkpoint", "--precision", "bf16"],
        ["--model", "timm:resnet10t", "--input_size", 32, "--head_norm", "batch"],
    ],
    ids=["lars", "batch norm"],
)
def test_other_recipes_train_and_resume_exactly(images, tmp_path, argv):
    main_simclr.main(flags(images, tmp_path / "whole", *argv))
    for _ in range(2):
        main_simclr.main(flags(images, tmp_path / "parts", *argv, "--max_steps", 3, "--resume", "auto"))
    main_simclr.main(flags(images, tmp_path / "parts", *argv, "--resume", "auto"))
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))
    lines = outcome(tmp_path / "whole")[3]
    assert lines[-1]["val_loss"] != lines[0]["val_loss"]


def test_two_processes_train_as_one_and_resume_exactly(images, whole, run_script, tmp_path):
    command = ["main_simclr.py", *flags(images, tmp_path, "--batch_size", 4, "--resume", "auto")]
    run_script(*command, "--max_steps", 3, processes=2)
    run_script(*command, processes=2)
    parts, one = outcome(tmp_path), outcome(whole)
    for ours, theirs in zip(parts[3], one[3], strict=True):
        for figure in ("train_loss", "val_loss"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-3)
    run_script("main_simclr.py", *flags(images, tmp_path / "whole", "--batch_size", 4), processes=2)
    assert_same(parts, outcome(tmp_path / "whole"))


def test_it_learns(images, tmp_path):
    mild = ["--min_crop", 0.5, "--color_jitter", 0.2, "--blur", 0]
    main_simclr.main(flags(images, tmp_path, "--epochs", 15, "--lr", 2e-3, *mild))
    lines = outcome(tmp_path)[3]
    loss, top1 = (np.mean([line[name] for line in lines[-5:]]) for name in ("train_loss", "train_top1"))
    assert loss < lines[0]["train_loss"] - 0.3 and top1 > lines[0]["train_top1"] + 0.1
    assert lines[-1]["val_loss"] < math.log(7) - 0.3  # chance among the views of 4 images


def test_the_run_folder_holds_what_was_promised(images, tmp_path):
    data = make_identities(tmp_path / "identities")
    main_simclr.main(flags(data, tmp_path / "run", "--labels", "folders", "--eval_images", 20))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"args.json", "log.txt", "checkpoint-last.pth", "checkpoint-best.pth", "results.json", "views.png"} <= names
    results = results_of(tmp_path / "run")
    assert results["finished"] and results["val"].keys() == {"loss", "top1", "nn_top1"}
    assert {"git_commit", "data_fingerprint", "images_per_s", "trainable_params"} <= results.keys()
    picture = np.array(PILImage.open(tmp_path / "run/views.png"))
    assert picture.shape[1] > 6 * 128 and picture.std() > 20
    best = read_checkpoint(tmp_path / "run/checkpoint-best.pth")["progress"]
    assert best["best"] == min(line["val_loss"] for line in outcome(tmp_path / "run")[3])
    main_simclr.main(flags(images, tmp_path / "plain", "--eval_images", 0))
    assert results_of(tmp_path / "plain")["val"] is None and not (tmp_path / "plain/views.png").exists()


def test_the_evaluation_counts_by_hand(tmp_path):
    data = make_identities(tmp_path / "identities", train=2, val=4)
    alone = data / "val" / "alone"
    alone.mkdir()
    (data / "val/rei/00.png").rename(alone / "00.png")
    args = main_simclr.get_args(flags(data, tmp_path / "run", "--labels", "folders", "--eval_images", 16))
    run = SimpleNamespace(say=print)
    held_out = main_simclr.HeldOut(args, run, CPU)
    model = start_backbone(vars(args)).eval()
    found = held_out(model, 1)
    embeddings = F.normalize(model.embed(held_out.plain / 255)).detach().double().numpy()
    right = judged = 0
    for i, name in enumerate(held_out.identities):
        if name != "alone":
            others = [k for k in range(16) if k != i]
            right += held_out.identities[max(others, key=lambda k: embeddings[i] @ embeddings[k])] == name
            judged += 1
    assert judged == 15 and found["nn_top1"] == pytest.approx(right / 15)
    expected = by_hand(model(held_out.views / 255).detach().numpy(), args.temperature)
    assert (found["loss"], found["top1"]) == pytest.approx(expected, rel=1e-4)
    assert held_out(model, 2) == found and main_simclr.HeldOut(args, run, CPU)(model, 1) == found


def test_the_recipe_reaches_the_optimizer(images, tmp_path):
    """blr x effective batch / 256, and the defaults of the optimizer that is chosen."""
    without_lr = [flag for flag in flags(images, tmp_path / "run") if flag not in ("--lr", "1e-3")]
    for opt, blr, decay in (("adamw", 5e-4, 0.05), ("lars", 0.3, 1e-6)):
        argv = [*without_lr, "--opt", opt, "--epochs", "1", "--warmup_epochs", "1", "--output_dir", tmp_path / opt]
        main_simclr.main([*map(str, argv)])
        assert outcome(tmp_path / opt)[3][0]["lr"] == pytest.approx(blr * 8 / 256)
        groups = read_checkpoint(tmp_path / opt / "checkpoint-last.pth")["optimizer"]["param_groups"]
        assert {group["weight_decay"] for group in groups} == {decay, 0.0} and ("trust" in groups[0]) == (opt == "lars")
    assert main_simclr.get_args([*without_lr, "--opt", "lars", "--weight_decay", "0"]).weight_decay == 0


def test_a_stream_trains_too(images, tmp_path):
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(images.glob("*.png"))]
    (tmp_path / "shards").mkdir()
    Dataset.from_dict({"image": cells}, features=Features({"image": Image()})).to_parquet(tmp_path / "shards/0.parquet")
    argv = ["--streaming", "--epoch_images", 24, "--eval_images", 2]
    main_simclr.main(flags(f"hf:{tmp_path / 'shards'}", tmp_path / "run", *argv))
    results = results_of(tmp_path / "run")
    assert results["finished"] and results["steps"] == 6 and results["val"]["loss"] > 0


# transfer


@pytest.fixture(scope="module", params=["vit_nano_patch8", "timm:resnet10t"])
def pretrained(request, images, tmp_path_factory):
    """(model name, checkpoint) of a short run of each kind of backbone."""
    run = tmp_path_factory.mktemp("pretrained")
    argv = ["--model", request.param, "--input_size", 32, "--max_steps", 2, "--head_norm", "batch"]
    main_simclr.main(flags(images, run, *argv))
    return request.param, run / "checkpoint-last.pth"


def test_transfer_takes_the_encoder_without_the_projection(pretrained, tmp_path):
    name, checkpoint = pretrained
    state = read_checkpoint(checkpoint)["model"]
    args = {"model": name, "init": str(checkpoint), "input_size": 32, "global_pool": True, "seed": 1}
    for model in (start_backbone(args), load_recogniser(str(checkpoint)).model):
        own = model.state_dict()
        assert isinstance(model.head, nn.Identity) and not any(key.startswith("head.") for key in own)
        assert {key for key in state if not key.startswith("head.")} == set(own)
        assert all(torch.equal(value, state[key]) for key, value in own.items())
    assert {key.split(".")[1] for key in state if key.startswith("head.")} == {"fc1", "norm", "fc2"}


def test_no_other_unknown_weights_are_left_out(pretrained, tmp_path):
    name, checkpoint = pretrained
    state = read_checkpoint(checkpoint)["model"]
    for stranger in ("projection.weight", "heads.fc1.weight"):
        save_checkpoint(tmp_path / "other.pth", {"model": {**state, stranger: torch.zeros(2)}})
        args = {"model": name, "init": str(tmp_path / "other.pth"), "input_size": 32, "global_pool": True, "seed": 1}
        with pytest.raises(UserError, match=r"projection\.weight|heads\.fc1"):
            start_backbone(args)


def test_a_probe_runs_on_the_checkpoint(pretrained, tmp_path):
    name, checkpoint = pretrained
    data = make_identities(tmp_path / "data")
    argv = transfer_flags(data, tmp_path / "probe", "--model", name, "--init", checkpoint, "--input_size", 32)
    main_linprobe.main([*argv, "--views", "1"])
    assert results_of(tmp_path / "probe")["finished"]
    probed = load_recogniser(str(tmp_path / "probe/checkpoint-best.pth"))
    assert len(probed.classes) == 4


# what a user can get wrong


def test_what_a_user_can_get_wrong_is_one_line(images, tmp_path, capsys):
    run = tmp_path / "run"
    assert "raise --batch_size" in fails(capsys, flags(images, run, "--accum_iter", 2))
    assert "no negatives" in fails(capsys, flags(images, run, "--batch_size", 1))
    assert "out of range" in fails(capsys, flags(images, run, "--temperature", 0))
    assert "out of range" in fails(capsys, flags(images, run, "--hue", 0.6))
    assert "unknown model" in fails(capsys, flags(images, run, "--model", "vit_of_dreams"))
    assert "'auto' is not an integer" in fails(capsys, flags(images, run, "--batch_size", "auto"))
    assert "--eval_images 0" in fails(capsys, flags(images, run, "--eval_images", 1))
    assert "larger than the data set" in fails(capsys, flags(images, run, "--batch_size", 64))
    assert not (run / "checkpoint-last.pth").exists()
