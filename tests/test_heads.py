"""Heads: every margin formula against loops over arccosines, and the details that break trainings silently."""

import math
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from util.run.errors import UserError
from util.transfer.heads import HEADS, MarginHead, build_head, minimal_scale, set_margin_progress

MARGIN_HEADS = ("arcface", "cosface", "curricularface")
N, D, C = 12, 6, 5


def batch(seed: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (N, D), which ask for a gradient, and labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return embeddings, torch.randint(0, C, (N,), generator=generator)


def small_head(kind: str, dtype=torch.float64, **options) -> MarginHead:
    torch.manual_seed(1)
    return build_head(kind, D, C, **{"scale": 16, **options}).to(dtype)


def opposed(head: MarginHead, labels: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Embeddings (N, D) at given angles (N,), in rad, to the directions of their classes; 3 x unit length."""
    w = F.normalize(head.weight.detach()[labels])
    generator = torch.Generator().manual_seed(9)
    aside = torch.randn(len(labels), D, generator=generator, dtype=torch.float64).to(w)
    aside = F.normalize(aside - (aside * w).sum(1, keepdim=True) * w)
    return (3 * (angles[:, None].cos() * w + angles[:, None].sin() * aside)).requires_grad_()


def reference(kind, embeddings, weight, labels, scale, margin, t) -> torch.Tensor:
    """Logits (N, C), one at a time, by the angles themselves."""
    rows = []
    for x, y in zip(embeddings, labels.tolist(), strict=True):
        angles = [torch.arccos(x.dot(w) / (x.dot(x) * w.dot(w)).sqrt()) for w in weight]
        row = [angle.cos() for angle in angles]
        if kind == "cosface":
            row[y] = row[y] - margin
        else:
            shifted = torch.cos(angles[y] + margin)
            if kind == "curricularface":
                row = [cos * (t + cos) if cos > shifted else cos for cos in row]
            beyond = angles[y] > math.pi - margin
            row[y] = angles[y].cos() - margin * math.sin(margin) if beyond else shifted
        rows.append(torch.stack(row))
    return scale * torch.stack(rows)


def moved(t: float, embeddings, weight, labels) -> float:
    """CurricularFace's t after one more batch."""
    x, w = embeddings.detach().numpy(), weight.detach().numpy()[labels]
    cosines = (x * w).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(w, axis=1)
    return 0.01 * cosines.mean() + 0.99 * t


@pytest.mark.parametrize("kind", MARGIN_HEADS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_logits_loss_and_gradients_are_those_of_the_formulas(kind, dtype, tolerance):
    margin = 0.35 if kind == "cosface" else 0.5
    head = small_head(kind, dtype)
    angles = torch.linspace(0.05, 3.1, N, dtype=dtype)
    assert (angles > math.pi - 0.5).sum() == 2
    t = 0.0
    for seed in range(3):
        embeddings, labels = batch(seed, dtype)
        if seed == 2:
            embeddings = opposed(head, labels, angles)
        x, w = embeddings.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
        t = moved(t, x, w, labels)
        expected = reference(kind, x, w, labels, 16, margin, t)
        expected_loss = F.cross_entropy(expected, labels)
        expected_loss.backward()

        head.zero_grad()
        logits = head(embeddings, labels)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        assert logits.dtype == dtype
        close = {"rtol": tolerance, "atol": 10 * tolerance}
        torch.testing.assert_close(logits.double(), expected, **close)
        torch.testing.assert_close(loss.double(), expected_loss, **close)
        torch.testing.assert_close(embeddings.grad.double(), x.grad, **close)
        torch.testing.assert_close(head.weight.grad.double(), w.grad, **close)
    assert x.grad.abs().max() > 0.1


@pytest.mark.parametrize("kind", MARGIN_HEADS)
def test_without_labels_the_logits_are_scaled_cosines(kind):
    head = small_head(kind)
    x, labels = batch(0)
    expected = 16 * F.cosine_similarity(x[:, None], head.weight[None], dim=2)
    torch.testing.assert_close(head(x), expected)
    assert not torch.allclose(head(x, labels), expected, atol=0.1)


@pytest.mark.parametrize("kind", MARGIN_HEADS)
def test_the_logit_of_the_true_class_falls_with_the_angle(kind):
    angles = torch.linspace(0, math.pi, 5001, dtype=torch.float64)
    labels = torch.zeros(len(angles), dtype=torch.long)
    for margin, factor in [(0.0, 1.0), (0.3, 1.0), (0.5, 1.0), (0.5, 0.5), (0.99, 1.0), (1.5, 1.0)]:
        if kind == "cosface" and margin > 1:
            continue
        head = small_head(kind, margin=margin, scale=1)
        head.margin_factor = factor
        steps = head(opposed(head, labels, angles), labels)[:, 0].diff()
        assert steps.max() <= 1e-12 and steps.min() < -1e-4
        if margin:  # what the fallback is for
            assert torch.cos(angles + margin * factor).diff().max() > 1e-7


@pytest.mark.parametrize("kind, name, margin", [("arcface", "ArcFaceLoss", 0.5), ("cosface", "CosFaceLoss", 0.35)])
def test_the_loss_is_that_of_pytorch_metric_learning(kind, name, margin):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    head = small_head(kind, scale=None)
    _, labels = batch(0)
    x = opposed(head, labels, torch.linspace(0.05, 2.6, N, dtype=torch.float64))
    theirs = getattr(losses, name)(C, D, margin=math.degrees(margin) if kind == "arcface" else margin, scale=64)
    theirs.W.data = head.weight.data.T.clone()
    torch.testing.assert_close(F.cross_entropy(head(x, labels), labels), theirs(x, labels))


@pytest.mark.parametrize("kind", ["arcface", "cosface"])
def test_a_margin_factor_of_0_leaves_a_scaled_cosine_softmax(kind):
    head = small_head(kind)
    x, labels = batch(0)
    head.margin_factor = 0.0
    assert torch.equal(head(x, labels), head(x))


@pytest.mark.parametrize("kind", MARGIN_HEADS)
def test_a_margin_factor_is_as_good_as_a_smaller_margin(kind):
    warming, smaller = small_head(kind, margin=0.5), small_head(kind, margin=0.2)
    _, labels = batch(0)
    x = opposed(warming, labels, torch.linspace(0.05, 3.1, N, dtype=torch.float64))
    warming.margin_factor = 0.4
    assert torch.equal(warming(x, labels), smaller(x, labels))


def test_the_margin_grows_over_the_warm_up_and_then_stays():
    head = small_head("arcface")
    factors = []
    for epoch in range(7):
        set_margin_progress(head, epoch, 4)
        factors.append(head.margin_factor)
    assert factors == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    set_margin_progress(head, 0, 0)
    assert head.margin_factor == 1
    linear = build_head("linear", D, C)
    before = dict(vars(linear))
    set_margin_progress(linear, 0, 4)
    assert vars(linear) == before


def test_t_follows_the_hand_calculation_and_only_training_moves_it():
    head = small_head("curricularface")
    t = 0.0
    for seed in range(4):
        x, labels = batch(seed)
        t = moved(t, x, head.weight, labels)
        head(x, labels)
        assert abs(t) > 1e-4
        assert head.t.item() == pytest.approx(t, abs=1e-12)
    head(x)
    head.eval()
    head(x, labels)
    assert head.t.item() == pytest.approx(t, abs=1e-12)
    assert not head.t.requires_grad


def test_the_fallback_does_not_make_a_negative_hard():
    head = build_head("curricularface", 2, 2, scale=1).double().eval()
    head.t.fill_(0.3)
    angles = torch.tensor([0.0, 0.1], dtype=torch.float64)  # of the two classes
    head.weight.data = torch.stack([angles.cos(), angles.sin()], dim=1)
    x = torch.tensor([[math.cos(-3.1), math.sin(-3.1)]], dtype=torch.float64)
    logits = head(x, torch.tensor([0]))[0]
    # at 3.2 rad the negative lies below cos(3.1 + 0.5), and above the fallback that the true class has there
    assert math.cos(3.2) < math.cos(3.1 + 0.5) and math.cos(3.2) > logits[0]
    assert logits[1].item() == pytest.approx(math.cos(3.2), abs=1e-12)


def test_t_is_saved_and_the_next_loss_is_the_same():
    head = small_head("curricularface", torch.float32)
    with torch.no_grad():
        for seed in range(3):
            head(*batch(seed, torch.float32))
    state = {name: value.clone() for name, value in head.state_dict().items()}
    assert state["t"].shape == () and state["t"].dtype == torch.float32
    other = build_head("curricularface", D, C, scale=16)
    other.load_state_dict(state)
    x, labels = batch(3, torch.float32)
    expected = F.cross_entropy(head(x, labels), labels)
    assert torch.equal(F.cross_entropy(other(x, labels), labels), expected)
    other.load_state_dict({**state, "t": torch.zeros(())})
    assert not torch.equal(F.cross_entropy(other(x, labels), labels), expected)


def _half_of_each_batch(rank: int, folder: str) -> None:
    """One of two processes: runs the head on its half of each batch and writes down its state."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    head = small_head("curricularface")
    half = slice(rank * N // 2, (rank + 1) * N // 2)
    for seed in range(3):
        x, labels = batch(seed)
        logits = head(x[half], labels[half])
    torch.save({"t": head.t, "logits": logits.detach()}, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def test_two_processes_have_the_t_of_one_with_the_joined_batch(tmp_path):
    torch.multiprocessing.spawn(_half_of_each_batch, args=(str(tmp_path),), nprocs=2)
    head, alone = small_head("curricularface"), small_head("curricularface")
    for seed in range(3):
        x, labels = batch(seed)
        logits = head(x, labels)
        alone(x[: N // 2], labels[: N // 2])
    parts = [torch.load(tmp_path / f"{rank}.pth") for rank in range(2)]
    for part in parts:
        torch.testing.assert_close(part["t"], head.t, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.cat([part["logits"] for part in parts]), logits)
    assert abs(alone.t - head.t) > 1e-4


@pytest.mark.parametrize("kind", MARGIN_HEADS)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_head(kind, low):
    head = small_head(kind, torch.float32).eval()  # so that t stands still
    x, labels = batch(0, torch.float32)
    expected, half = head(x, labels), head(x.to(low).float(), labels)
    with torch.autocast("cpu", dtype=low):
        assert F.linear(x, head.weight).dtype == low
        assert torch.equal(head(x, labels), expected)
        logits = head(x.to(low), labels)
    assert logits.dtype == torch.float32 and torch.equal(logits, half)


@pytest.mark.parametrize("kind", MARGIN_HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_where_embedding_and_class_lie_on_one_line(kind, dtype):
    head = small_head(kind, dtype)
    head.weight.data = torch.eye(C, D, dtype=dtype)
    labels = torch.tensor([0, 1, 2, 3])
    x = (
        torch.eye(C, D, dtype=dtype)[labels] * torch.tensor([[2.0], [-2.0], [1.0], [-1.0]], dtype=dtype)
    ).requires_grad_()
    logits = head(x, labels)
    F.cross_entropy(logits, labels).backward()
    assert head.cosine(x).gather(1, labels[:, None]).flatten().tolist() == [1, -1, 1, -1]
    for tensor in (logits, x.grad, head.weight.grad):
        assert tensor.isfinite().all()

    naive = head.cosine(x).detach().requires_grad_()
    torch.cos(naive.acos() + 0.5).sum().backward()
    assert not naive.grad.isfinite().all()


def test_the_linear_head_starts_as_the_official_one_and_has_its_names():
    torch.manual_seed(0)
    model = nn.Module()
    model.head = build_head("linear", 200, 100)
    assert set(model.state_dict()) == {"head.weight", "head.bias"}
    assert model.head.weight.shape == (100, 200)
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert not model.head.bias.any()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_batch_norm_standardises_the_embeddings_in_front_of_the_head(kind):
    torch.manual_seed(0)
    head = build_head(kind, D, C, batch_norm=True)
    assert set(head[0].state_dict()) == {"running_mean", "running_var", "num_batches_tracked"}  # no scale, no shift
    assert head[0].eps == 1e-6
    x = 1e-3 * torch.randn(64, D) + 5
    plain = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(head(x), head[1](plain), rtol=1e-3, atol=1e-3)


def test_the_mlp_has_one_hidden_layer():
    x = torch.randn(N, D)
    for hidden, width in [(None, D), (11, 11)]:
        head = build_head("mlp", D, C, hidden=hidden)
        first, _, last = head
        assert first.weight.shape == (width, D) and last.weight.shape == (C, width)
        torch.testing.assert_close(head(x), last(F.gelu(first(x))))


def test_margin_heads_have_the_scales_and_margins_of_their_papers():
    settings = {kind: (build_head(kind, D, C).scale, build_head(kind, D, C).margin) for kind in MARGIN_HEADS}
    assert settings == {"arcface": (64, 0.5), "cosface": (64, 0.35), "curricularface": (64, 0.5)}
    assert set(HEADS) == {"linear", "mlp", *MARGIN_HEADS}


@pytest.mark.parametrize(
    "kind, options, words",
    [
        ("softmax", {}, "curricularface"),
        ("arcface", {"scale": 0.0}, "scale of 0.0"),
        ("cosface", {"scale": -1.0}, "scale of -1.0"),
        ("cosface", {"scale": math.inf}, "scale of inf"),
        ("arcface", {"margin": -0.1}, "margin of -0.1"),
        ("arcface", {"margin": math.pi / 2}, "below 1.571"),
        ("curricularface", {"margin": 1.6}, "below 1.571"),
        ("cosface", {"margin": 1.0}, "below 1,"),
        ("arcface", {"margin": math.nan}, "margin of nan"),
        ("arcface", {"batch_norm": True}, "linear or mlp"),
        ("curricularface", {"hidden": 8}, "choose mlp"),
        ("linear", {"margin": 0.5}, "no margin: "),
        ("mlp", {"scale": 64.0, "margin": 0.5}, "no scale and no margin: "),
    ],
)
def test_what_a_head_cannot_be_is_said_in_one_line(kind, options, words):
    with pytest.raises(UserError, match=words) as caught:
        build_head(kind, D, C, **options)
    assert "\n" not in str(caught.value) and "choose" in str(caught.value)


def test_margins_at_the_ends_of_their_ranges_are_taken():
    for kind, margin in [("arcface", 0.0), ("arcface", 1.57), ("cosface", 0.0), ("cosface", 0.999)]:
        assert build_head(kind, D, C, margin=margin).margin == margin


@pytest.mark.parametrize("classes, p", [(2, 0.9), (20, 0.9), (3263, 0.99)])
def test_the_minimal_scale_reaches_its_probability_on_a_simplex(classes, p):
    cosines = torch.full((classes,), -1 / (classes - 1), dtype=torch.float64)
    cosines[0] = 1
    scale = minimal_scale(classes, p)
    assert (scale * cosines).softmax(0)[0].item() == pytest.approx(p, abs=1e-12)
