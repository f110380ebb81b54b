"""util/representation: attention, rollout, CKA, components of patches, probes, neighbours, by independent references.

Run: python -m pytest tests/test_representation.py
"""

import numpy as np
import pytest
import torch
from skimage.color import lab2rgb
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from models_baseline import build_baseline
from models_vit import VisionTransformer
from util.representation.cka import cka_matrix, linear_cka
from util.representation.layers import (
    attention_by_layer,
    blocks_of,
    grid_of,
    pooled,
    pooling_of,
    prefix_tokens,
    tokens_by_layer,
)
from util.representation.nearest import nearest
from util.representation.patch_pca import (
    as_colours,
    fit_components,
    foreground_by,
    lab_to_srgb,
    otsu,
    to_unit_range,
    without_position,
)
from util.representation.probe import probe
from util.representation.rollout import entropy, mean_distance, over_patches, rollout
from util.run.errors import UserError
from util.run.seed import rng_for
from util.transfer.lora import LoRAConfig, add_lora, merge_lora

SIZE, PATCH, HEADS = (32, 48), 8, 4


def small_vit(seed=0, **options) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(SIZE, PATCH, embed_dim=48, depth=3, num_heads=HEADS, **options)
    for parameter in model.parameters():  # attention of fresh weights is nearly uniform
        parameter.data += 0.15 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return small_vit()


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))


# --- attention ----------------------------------------------------------------------------------------------------


def attention_outputs(model, images) -> list[torch.Tensor]:
    """What the attention layer of each block really gave."""
    found = []
    handles = [block.attn.register_forward_hook(lambda _, i, out: found.append(out)) for block in blocks_of(model)]
    with torch.inference_mode():
        model.embed(images)
    for handle in handles:
        handle.remove()
    return found


def values_of(model, images, i) -> torch.Tensor:
    """The values (N, heads, T, d) of block i, from the tokens that came into it."""
    block = blocks_of(model)[i]
    with torch.inference_mode():
        x = block.norm1(tokens_by_layer(model, images)[i])
        n, t, d = x.shape
        weight, bias = block.attn.qkv.weight[2 * d :], block.attn.qkv.bias[2 * d :]
        return (x @ weight.T + bias).reshape(n, t, block.attn.num_heads, -1).transpose(1, 2)


def check_attention(model, images):
    attentions, outputs = attention_by_layer(model, images), attention_outputs(model, images)
    assert len(attentions) == len(blocks_of(model))
    for i, (weights, output) in enumerate(zip(attentions, outputs, strict=True)):
        n, heads, tokens, _ = weights.shape
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(n, heads, tokens), atol=1e-5, rtol=0)
        mixed = (weights @ values_of(model, images, i)).transpose(1, 2).flatten(2)
        with torch.inference_mode():
            again = blocks_of(model)[i].attn.proj(mixed)
        torch.testing.assert_close(again, output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("global_pool", [True, False])
def test_attention_gives_back_what_the_fused_layers_gave(images, global_pool):
    check_attention(small_vit(global_pool=global_pool), images)


def test_attention_of_a_network_of_timm(images):
    torch.manual_seed(0)
    model = build_baseline("timm:vit_tiny_patch16_224", SIZE).eval()
    check_attention(model, images)
    assert prefix_tokens(model) == 1 and pooling_of(model) == "class" and grid_of(model, images) == (2, 3)


def test_attention_with_adapters_is_that_of_merged_weights(images):
    model = small_vit()
    add_lora(model, LoRAConfig(rank=2, targets=("q", "k")))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    beside = attention_by_layer(model, images)
    plain = attention_by_layer(small_vit(), images)
    merge_lora(model)
    for a, b, c in zip(beside, attention_by_layer(model, images), plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        assert (a - c).abs().max() > 1e-3


def test_chosen_layers_only(model, images):
    everything = attention_by_layer(model, images)
    last, first = attention_by_layer(model, images, [-1, 0])
    assert torch.equal(last, everything[2]) and torch.equal(first, everything[0])


def test_nothing_is_left_hooked(model, images):
    attention_by_layer(model, images)
    tokens_by_layer(model, images)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_attends_otherwise_is_refused(images):
    model = small_vit()

    class Sharper(type(model.blocks[1].attn)):
        def forward(self, x, last=None):
            n, t, _ = x.shape
            q, k, v = self.qkv(x).reshape(n, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
            out = torch.nn.functional.scaled_dot_product_attention(3 * q, k, v)
            return self.proj(out.transpose(1, 2).flatten(2))

    model.blocks[1].attn.__class__ = Sharper
    with pytest.raises(UserError, match="Sharper does more than softmax"):
        attention_by_layer(model, images)


def test_networks_without_blocks_are_refused(images):
    with pytest.raises(UserError, match="no transformer blocks"):
        attention_by_layer(build_baseline("timm:resnet10t", SIZE).eval(), images)


def test_tokens_are_those_of_the_forward_pass(model, images):
    layers = tokens_by_layer(model, images)
    with torch.inference_mode():
        assert len(layers) == 4 and torch.equal(layers[-1], model.forward_features(images))
        assert torch.equal(model.blocks[0](layers[0]), layers[1])
        embedded = model.fc_norm(pooled(layers[-1], 1, "mean"))
        torch.testing.assert_close(embedded, model.embed(images))
    assert torch.equal(pooled(layers[2], 1, "class"), layers[2][:, 0])


# --- rollout ------------------------------------------------------------------------------------------------------


def test_rollout_is_the_product_of_the_matrices_written_out():
    first = np.array([[[0.2, 0.8], [0.6, 0.4]], [[1.0, 0.0], [0.4, 0.6]]])  # two heads, two tokens
    second = np.array([[[0.5, 0.5], [0.1, 0.9]], [[0.3, 0.7], [0.9, 0.1]]])
    # means of the heads: [[.6 .4] [.5 .5]] and [[.4 .6] [.5 .5]]; half of each, half the identity
    a = np.array([[0.8, 0.2], [0.25, 0.75]])
    b = np.array([[0.7, 0.3], [0.25, 0.75]])
    expected = [[0.7 * 0.8 + 0.3 * 0.25, 0.7 * 0.2 + 0.3 * 0.75], [0.25 * 0.8 + 0.75 * 0.25, 0.25 * 0.2 + 0.75 * 0.75]]
    np.testing.assert_allclose(b @ a, expected)
    found = rollout([torch.tensor(first)[None], torch.tensor(second)[None]])
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-12)


def test_rollout_keeps_rows_that_sum_to_one(model, images):
    found = rollout(attention_by_layer(model, images))
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(3, 25), atol=1e-5, rtol=0)
    one = attention_by_layer(model, images, [1])
    torch.testing.assert_close(rollout(one), 0.5 * one[0].mean(dim=1) + 0.5 * torch.eye(25))


def test_over_patches_is_in_multiples_of_an_equal_share():
    weights = torch.tensor([[0.5, 0.1, 0.4], [0.2, 0.2, 0.6], [0.4, 0.3, 0.3]])  # the class token, two patches
    torch.testing.assert_close(over_patches(weights, 1, "class"), torch.tensor([0.4, 1.6]))
    torch.testing.assert_close(over_patches(weights, 1, "mean"), torch.tensor([0.25, 0.45]) / 0.35)


def test_entropy_from_one_patch_to_all_alike():
    shares = torch.tensor([[4.0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 0, 0]])
    torch.testing.assert_close(entropy(shares), torch.tensor([0.0, 1.0, 0.5]))


def test_mean_distance_by_brute_force(model, images):
    weights, grid = attention_by_layer(model, images, [-1])[0], grid_of(model, images)
    expected, w = np.zeros((3, HEADS)), weights[:, :, 1:, 1:].double().numpy()
    for i in range(24):
        for j in range(24):
            far = PATCH * np.hypot(i // grid[1] - j // grid[1], i % grid[1] - j % grid[1])
            expected += far * w[:, :, i, j] / w[:, :, i].sum(axis=-1) / 24
    np.testing.assert_allclose(mean_distance(weights, 1, grid, PATCH), expected, rtol=1e-5)


# --- CKA ----------------------------------------------------------------------------------------------------------


def hsic_by_hand(x, y, unbiased):
    """Of linear kernels, term by term."""
    n = len(x)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    if not unbiased:
        h = np.eye(n) - np.ones((n, n)) / n
        return np.trace(k @ h @ l @ h) / (n - 1) ** 2
    k, l = k * (1 - np.eye(n)), l * (1 - np.eye(n))  # noqa: E741
    one = np.ones(n)
    terms = np.trace(k @ l), (one @ k @ one) * (one @ l @ one) / (n - 1) / (n - 2), 2 * (one @ k @ l @ one) / (n - 2)
    return (terms[0] + terms[1] - terms[2]) / (n * (n - 3))


@pytest.fixture(scope="module")
def pair():
    rng = rng_for(0, "cka")
    x = rng.normal(size=(40, 7)) + 3
    return x, np.concatenate([x[:, :3] @ rng.normal(size=(3, 5)), rng.normal(size=(40, 6))], axis=1) - 1


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_is_that_of_hsic_by_hand(pair, debiased):
    x, y = pair
    own = hsic_by_hand(x, x, debiased) * hsic_by_hand(y, y, debiased)
    assert linear_cka(x, y, debiased=debiased) == pytest.approx(hsic_by_hand(x, y, debiased) / np.sqrt(own), rel=1e-9)


def test_cka_is_the_formula_on_features(pair):
    x, y = (part - part.mean(axis=0) for part in pair)
    expected = np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    assert linear_cka(*pair) == pytest.approx(expected, rel=1e-9)
    assert 0.05 < expected < 0.95


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_does_not_see_rotation_scale_and_shift_but_does_see_a_linear_map(pair, debiased):
    x, y = pair
    rng = rng_for(1, "cka")
    rotation = np.linalg.qr(rng.normal(size=(7, 7)))[0]
    value = linear_cka(x, y, debiased=debiased)
    assert linear_cka(x @ rotation, y, debiased=debiased) == pytest.approx(value, rel=1e-9)
    assert linear_cka(1e-12 * x, 1e12 * y + 5, debiased=debiased) == pytest.approx(value, rel=1e-6)
    assert linear_cka(x, x @ rotation, debiased=debiased) == pytest.approx(1)
    assert linear_cka(x @ np.diag([9, 1, 1, 1, 1, 1, 1]), y, debiased=debiased) != pytest.approx(value, abs=1e-3)


def test_debiased_cka_of_unrelated_features_is_about_zero_the_plain_one_is_not():
    rng = rng_for(2, "cka")
    draws = [(rng.normal(size=(30, 200)), rng.normal(size=(30, 200))) for _ in range(20)]
    assert abs(np.mean([linear_cka(x, y, debiased=True) for x, y in draws])) < 0.02
    assert np.mean([linear_cka(x, y) for x, y in draws]) > 0.8


def test_cka_matrix_is_every_pair(pair):
    x, y = pair
    table = cka_matrix([x, y, x[:, :2]], [y, x])
    assert table.shape == (3, 2)
    assert table[2, 0] == pytest.approx(linear_cka(x[:, :2], y)) and table[0, 1] == pytest.approx(1)
    assert np.isnan(linear_cka(np.ones((5, 2)), x[:5]))
    with pytest.raises(ValueError, match="same pictures"):
        cka_matrix([x], [y[:-1]])
    with pytest.raises(ValueError, match="4 pictures"):
        linear_cka(x[:3], y[:3], debiased=True)


# --- components of patches ----------------------------------------------------------------------------------------


def test_components_are_those_of_scikit_learn():
    rng = rng_for(0, "pca")
    tokens = (rng.normal(size=(200, 10)) * np.linspace(3, 0.3, 10)) @ rng.normal(size=(10, 10)) + 5
    ours, theirs = fit_components(tokens, 3), PCA(3, svd_solver="full").fit(tokens)
    np.testing.assert_allclose(ours.share, theirs.explained_variance_ratio_, rtol=1e-9)
    np.testing.assert_allclose(np.abs(ours.of(tokens)), np.abs(theirs.transform(tokens)), atol=1e-8)
    assert (ours.axes[range(3), np.abs(ours.axes).argmax(axis=1)] > 0).all()
    np.testing.assert_allclose(fit_components(tokens[::-1], 3).axes, ours.axes, atol=1e-9)


def test_without_position_takes_out_what_all_pictures_share():
    rng = rng_for(1, "pca")
    own, place = rng.normal(size=(5, 6, 4)), rng.normal(size=(1, 6, 4))
    np.testing.assert_allclose(without_position(own + place), own - own.mean(axis=0), atol=1e-12)


def test_otsu_splits_two_clusters_where_the_variance_between_is_largest():
    rng = rng_for(2, "pca")
    values = np.concatenate([rng.normal(-2, 0.5, 300), rng.normal(3, 0.5, 100)])
    between = [
        (low := values[values <= t]).size * (high := values[values > t]).size * (low.mean() - high.mean()) ** 2
        for t in np.sort(values)[:-1]
    ]
    best = np.sort(values)[np.argmax(between)]
    assert (values > otsu(values)).sum() == pytest.approx((values > best).sum(), abs=2)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_figure_is_the_side_away_from_the_border(sign):
    values = np.zeros((2, 6, 6))
    values[:, 2:5, 1:4] = 4 * sign
    values += 0.01 * rng_for(3, "pca").normal(size=values.shape)
    found = foreground_by(values.reshape(2, 36), (6, 6))
    np.testing.assert_array_equal(found.reshape(2, 6, 6), values * sign > 2)


def test_lab_to_srgb_is_that_of_scikit_image():
    grid = np.stack(np.meshgrid([25.0, 60, 90], [-40.0, 0, 40], [-50.0, 0, 50], indexing="ij"), axis=-1)
    np.testing.assert_allclose(lab_to_srgb(grid), np.clip(lab2rgb(grid), 0, 1), atol=2e-3)


def test_colours_differ_in_lightness_first_then_from_blue_to_yellow():
    black_to_white = as_colours(np.array([[0.0, 0.5, 0.5], [1, 0.5, 0.5]]))
    assert black_to_white[1].min() > black_to_white[0].max()
    np.testing.assert_allclose(black_to_white, black_to_white[:, :1].repeat(3, axis=1), atol=0.02)  # greys
    blue, yellow = as_colours(np.array([[0.6, 0.0, 0.5], [0.6, 1, 0.5]]))
    assert blue[2] > blue[0] and yellow[2] < yellow[0]
    green, red = as_colours(np.array([[0.5, 0.5, 0.0], [0.5, 0.5, 1]]))
    assert green[1] > green[0] and red[0] > red[1]


def test_unit_range_is_by_percentiles():
    values = np.stack([np.arange(201.0), np.full(201, 7.0)], axis=1)
    found = to_unit_range(values)
    np.testing.assert_allclose(found[:, 0], ((np.arange(201) - 2) / 196).clip(0, 1))
    assert (found[:, 1] == 0).all()


# --- probes and neighbours ----------------------------------------------------------------------------------------


def clusters(per_class, seed):
    rng = rng_for(seed, "clusters")
    labels = np.repeat(np.array(["a", "b", "c"]), per_class)
    centres = {"a": [0, 0, 9], "b": [1.6, 0, 9], "c": [0, 1.6, 9]}
    return rng.normal(size=(3 * per_class, 3)) * [1, 1, 1e-3] + [centres[x] for x in labels], labels


def test_probe_is_logistic_regression_on_standardised_features_with_the_best_c_of_val():
    train, val, test = clusters(30, 0), clusters(40, 1), clusters(50, 2)
    scaler = StandardScaler().fit(train[0])
    fitted = {c: LogisticRegression(C=c, max_iter=2000).fit(scaler.transform(train[0]), train[1]) for c in (1e-4, 1.0)}
    on_val = {c: model.score(scaler.transform(val[0]), val[1]) for c, model in fitted.items()}
    right, chosen = probe(train, val, test, (1e-4, 1.0))
    assert chosen == max(on_val, key=on_val.get)
    np.testing.assert_array_equal(right, fitted[chosen].predict(scaler.transform(test[0])) == test[1])
    assert 0.5 < right.mean() < 0.95
    assert probe(train, None, test, (0.01, 0.1, 1.0))[1] == 0.1


def test_probe_survives_features_that_do_not_vary():
    train, test = clusters(20, 0), clusters(20, 1)
    wide = [np.concatenate([x, np.full((len(x), 1), 4.0)], axis=1) for x in (train[0], test[0])]
    np.testing.assert_array_equal(probe((wide[0], train[1]), None, (wide[1], test[1]))[0], probe(train, None, test)[0])


def unit(rng, shape):
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_neighbours_by_brute_force_over_several_blocks(monkeypatch):
    monkeypatch.setattr("util.representation.nearest._BLOCK", 7)
    rng = rng_for(0, "nearest")
    queries, gallery = unit(rng, (20, 6)), unit(rng, (31, 6))
    found, cosines = nearest(queries, gallery, 4)
    for i, query in enumerate(queries.astype(np.float64)):
        scores = [float(np.dot(query, other)) for other in gallery.astype(np.float64)]
        best = sorted(range(31), key=lambda j: -scores[j])[:4]
        assert found[i].tolist() == best
        np.testing.assert_allclose(cosines[i], [scores[j] for j in best], atol=1e-6)


def test_a_picture_is_no_neighbour_of_its_own():
    gallery = unit(rng_for(1, "nearest"), (9, 4))
    codes = np.array(list("abcdefghi"))
    assert (nearest(gallery, gallery, 1)[0][:, 0] == np.arange(9)).all()
    found, cosines = nearest(gallery, gallery, 8, (codes, codes))
    for i in range(9):
        assert sorted(found[i].tolist()) == [j for j in range(9) if j != i]
    assert np.isfinite(cosines).all()
    with pytest.raises(ValueError, match="too many"):
        nearest(gallery, gallery, 9, (codes, codes))
