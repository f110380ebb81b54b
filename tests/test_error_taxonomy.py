"""Tags on probes that are made for them, neighbours by brute force, shares and ratios by counting.

Run: python -m pytest tests/test_error_taxonomy.py
"""

import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from util.benchmark import errors as module
from util.benchmark.errors import (
    TAGS,
    Evidence,
    colour_evidence,
    error_sheet,
    find_neighbours,
    list_errors,
    tag_probes,
    taxonomy_table,
)
from util.data.colour import colour_signature, reduce_signatures
from util.data.smart_crop import rgb_to_lab
from util.run.seed import rng_for


def evidence(count: int = 4, **columns) -> Evidence:
    """Probes of identities 0, 1, ..., named rightly and clearly, unless the columns say otherwise."""
    labels = np.arange(count)
    usual = {
        "labels": labels,
        "predicted": labels.copy(),
        "rivals": (labels + 1) % count,
        "score": np.full(count, 0.8),
        "margin": np.full(count, 0.3),
        "own_row": labels * 10,
        "rival_row": (labels + 1) % count * 10,
        "own": np.full(count, 0.8),
        "rival": np.full(count, 0.5),
        "agreement": np.zeros(count),
    }
    return Evidence(**{**usual, **{name: np.array(values) for name, values in columns.items()}})


def applies(tags: dict, tag: str) -> list:
    return [None if np.isnan(value) else bool(value) for value in tags[tag]]


def test_without_any_evidence_only_label_doubt_can_be_told():
    tags = tag_probes(evidence())
    assert tuple(tags) == TAGS
    for tag in TAGS[:-1]:
        assert applies(tags, tag) == [None] * 4
    assert applies(tags, "label doubt") == [False] * 4


def test_a_small_face():
    found = evidence(short_side=[63.9, 64.0, 200.0, np.nan])
    assert applies(tag_probes(found), "small face") == [True, False, False, None]
    assert applies(tag_probes(found, small_px=201), "small face") == [True, True, True, None]


def test_an_occlusion():
    found = evidence(occlusion=np.array(["none", "hat", None, "hand"], dtype=object))
    assert applies(tag_probes(found), "occlusion") == [False, True, None, True]


def test_a_style_gap_is_one_to_the_own_identity():
    found = evidence(
        style=np.array(["moe", "moe", None, "sketch"], dtype=object),
        own_style=np.array(["moe", "sketch", "moe", None], dtype=object),
    )
    assert applies(tag_probes(found), "style gap") == [False, True, None, None]
    assert applies(tag_probes(replace(found, own_style=None)), "style gap") == [None] * 4
    # the style that row -1 of a gallery has is nobody's
    assert applies(tag_probes(replace(found, own_row=np.array([0, -1, 0, 0]))), "style gap") == [
        False,
        None,
        None,
        None,
    ]


def test_the_same_colour_scheme():
    found = evidence(5, colour_own=[0.9, 0.8, 0.5, 0.8, np.nan], colour_rival=[0.8, 0.8, 0.6, 0.95, 0.9])
    # nearer to the own; as near; nearer to the rival, yet not near; nearer to the rival; not known
    assert applies(tag_probes(found), "same colour scheme") == [False, True, False, True, None]
    assert applies(tag_probes(found, colour_floor=0.55), "same colour scheme") == [False, True, True, True, None]


def test_label_doubt_takes_a_clear_lead_of_the_rival_and_its_neighbours():
    found = evidence(
        6,
        predicted=[1, 2, 3, 3, 4, 5],  # the first three are errors
        own=[0.2, 0.2, 0.5, 0.8, 0.9, np.nan],
        rival=[0.6, 0.6, 0.6, 0.5, 0.5, 0.5],
        agreement=[1.0, 0.6, 1.0, 0.0, 1.0, 1.0],
    )
    # rightly named ones lead by 0.3 and 0.4, the median is 0.35
    assert applies(tag_probes(found), "label doubt") == [True, False, False, False, False, None]
    assert applies(tag_probes(found, doubt_agreement=0.5), "label doubt") == [True, True, False, False, False, None]
    assert applies(tag_probes(found, doubt=0.25), "label doubt") == [True, False, True, False, False, None]
    assert applies(tag_probes(found, doubt=1.2), "label doubt") == [False] * 5 + [None]


def test_label_doubt_does_not_depend_on_the_spread_of_a_models_cosines():
    found = evidence(4, predicted=[1, 1, 2, 3], own=[0.2, 0.8, 0.8, 0.8], rival=[0.6, 0.5, 0.5, 0.5], agreement=[1] * 4)
    narrow = replace(found, own=0.9 + found.own / 100, rival=0.9 + found.rival / 100)
    assert applies(tag_probes(found), "label doubt") == applies(tag_probes(narrow), "label doubt")
    assert applies(tag_probes(found), "label doubt")[0]


def test_errors_are_listed_with_the_clearest_first():
    found = evidence(
        5, predicted=[0, 3, 2, 1, 0], margin=[0.9, 0.1, 0.8, 0.5, 0.1], short_side=[9, 9, 99, 99, 99],
        rival_row=[0, 7, 0, -1, 3], occlusion=np.array(["hat"] * 5, dtype=object),
    )  # fmt: skip
    listed = list_errors(found, tag_probes(found))
    assert [error["row"] for error in listed] == [3, 1, 4]
    assert listed[1] == {
        "row": 1, "label": 1, "predicted": 3, "nearest_row": 7, "own_row": 10, "tags": ["small face", "occlusion"],
        "score": 0.8, "margin": 0.1,
    }  # fmt: skip
    assert listed[0]["nearest_row"] is None and listed[0]["tags"] == ["occlusion"]
    assert list_errors(evidence(), {}) == []


# -- the table


def test_a_ratio_tells_a_tag_that_explains_from_one_that_does_not():
    """300 probes, 100 of them wrong: one tag is on 60 % of the errors and 20 % of the others, one on 40 % of both."""
    wrong = np.repeat([True, False], [100, 200])
    groups = np.arange(300) % 30
    explains, idle = np.zeros(300), np.zeros(300)
    explains[:60], explains[100:140] = 1, 1
    idle[:40], idle[100:180] = 1, 1
    table = taxonomy_table({"a": explains, "b": idle}, wrong, groups, replicates=300)
    assert table["errors"] == 100 and table["probes"] == 300 and table["untagged"] == pytest.approx(0.4)
    a, b = table["tags"]["a"], table["tags"]["b"]
    assert a["errors"] == 60 and a["unknown"] == 0
    assert (a["share_of_errors"], a["share_of_correct"], a["ratio"]) == pytest.approx((0.6, 0.2, 3.0))
    assert (b["share_of_errors"], b["share_of_correct"], b["ratio"]) == pytest.approx((0.4, 0.4, 1.0))
    assert a["ratio_ci95"][0] > 1 and b["ratio_ci95"][0] < 1 < b["ratio_ci95"][1]
    for row in (a, b):
        for name in ("share_of_errors", "share_of_correct", "ratio"):
            assert row[f"{name}_ci95"][0] <= row[name] <= row[f"{name}_ci95"][1]


def test_intervals_are_those_of_a_bootstrap_over_identities():
    rng = np.random.default_rng(3)
    groups, wrong = rng.integers(0, 12, 400), rng.random(400) < 0.3
    values = np.where(rng.random(400) < 0.1, np.nan, rng.random(400) < np.where(wrong, 0.6, 0.3))
    row = taxonomy_table({"a": values}, wrong, groups, replicates=200, seed=8)["tags"]["a"]
    known, ratios = ~np.isnan(values), []
    for replicate in range(200):
        drawn = rng_for(8, replicate, "bootstrap").choice(np.arange(12), 12)
        rows = np.concatenate([np.flatnonzero((groups == i) & known) for i in drawn])
        ratios.append(values[rows][wrong[rows]].mean() / values[rows][~wrong[rows]].mean())
    assert row["ratio_ci95"] == pytest.approx(np.quantile(ratios, [0.025, 0.975]).tolist())
    assert row["unknown"] == (~known).sum()
    assert row["share_of_errors"] == pytest.approx(values[known & wrong].mean())


def test_what_is_not_known_is_in_no_share():
    wrong = np.array([True, True, True, False, False])
    values = np.array([1, np.nan, 0, 1, 1.0])
    row = taxonomy_table({"a": values}, wrong, np.arange(5), replicates=50)["tags"]["a"]
    assert row["share_of_errors"] == 0.5 and row["share_of_correct"] == 1.0 and row["unknown"] == 1


def test_a_tag_without_evidence_or_without_others_is_skipped_and_never_zero():
    wrong = np.array([True, False, False])
    nothing = np.full(3, np.nan)
    table = taxonomy_table({"a": nothing, "b": np.array([1, np.nan, np.nan])}, wrong, np.arange(3), replicates=20)
    assert table["tags"]["a"] == {"skipped": "not known of any of the errors"}
    assert table["tags"]["b"] == {"skipped": "not known of any of the rightly named probes"}
    only_errors = taxonomy_table({"a": np.array([1.0, 0, 0])}, wrong, np.arange(3), replicates=20)["tags"]["a"]
    assert only_errors["share_of_correct"] == 0 and only_errors["ratio"] is None and only_errors["ratio_ci95"] is None
    flawless = taxonomy_table({"a": np.zeros(3)}, np.zeros(3, dtype=bool), np.arange(3))
    assert flawless["errors"] == 0 and flawless["untagged"] is None and "skipped" in flawless["tags"]["a"]


# -- neighbours


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def embedded():
    """60 probes and 90 gallery pictures of identities 2, 4, ..., 20, some of whom are taken for each other."""
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(10, 8))
    gallery_labels = rng.permutation(np.repeat(np.arange(2, 22, 2), 9))
    labels = rng.permutation(np.repeat(np.arange(2, 22, 2), 6))
    gallery = unit(centres[gallery_labels // 2 - 1] + rng.normal(size=(90, 8)))
    probes = unit(centres[labels // 2 - 1] + rng.normal(size=(60, 8)))
    predicted = np.where(rng.random(60) < 0.4, rng.permutation(labels), labels)
    return probes, gallery, labels, gallery_labels, predicted


@pytest.mark.parametrize("block", [1, 700, 1 << 20])
def test_neighbours_are_found_as_by_asking_one_by_one(embedded, block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    probes, gallery, labels, gallery_labels, predicted = embedded
    found = find_neighbours(probes, gallery, labels, gallery_labels, predicted, k=4)
    assert (labels != predicted).sum() > 10
    names = np.unique(gallery_labels)
    centroids = {name: gallery[gallery_labels == name].mean(0) for name in names}
    centroids = {name: centre / np.linalg.norm(centre) for name, centre in centroids.items()}
    for i, probe in enumerate(probes):
        cosines = {name: float(probe @ centre) for name, centre in centroids.items()}
        ranked = sorted(cosines.values(), reverse=True)
        others = [name for name in names if name != labels[i]]
        rival = predicted[i] if predicted[i] != labels[i] else max(others, key=cosines.get)
        assert found["rivals"][i] == rival
        assert found["own"][i] == pytest.approx(cosines[labels[i]], abs=1e-5)
        assert found["rival"][i] == pytest.approx(cosines[rival], abs=1e-5)
        assert found["score"][i] == pytest.approx(ranked[0], abs=1e-5)
        assert found["margin"][i] == pytest.approx(ranked[0] - ranked[1], abs=1e-5)
        similarity = gallery @ probe
        for name, column in ((labels[i], "own_row"), (rival, "rival_row")):
            assert found[column][i] == max(np.flatnonzero(gallery_labels == name), key=lambda row: similarity[row])
        nearest = np.argsort(-similarity)[:4]
        assert found["agreement"][i] == np.mean(gallery_labels[nearest] == rival)


def test_identities_without_gallery_pictures_are_not_made_up(embedded):
    probes, gallery, labels, gallery_labels, predicted = embedded
    labels, predicted = labels.copy(), predicted.copy()
    labels[:3], predicted[3:5] = 99, 1  # a stranger, and an answer that no picture in the gallery bears out
    found = find_neighbours(probes, gallery, labels, gallery_labels, predicted)
    assert np.isnan(found["own"][:3]).all() and (found["own_row"][:3] == -1).all()
    assert np.isnan(found["rival"][3:5]).all() and (found["rival_row"][3:5] == -1).all()
    assert (found["rivals"][3:5] == 1).all() and (found["agreement"][3:5] == 0).all()
    assert np.isfinite(found["own"][3:]).all() and (found["rival_row"][5:] >= 0).all()
    known = Evidence(labels, predicted, **found)
    assert np.isnan(tag_probes(known)["label doubt"][:5]).all()
    assert list_errors(known, tag_probes(known))


def test_one_identity_alone_has_no_rival():
    probes = unit(np.random.default_rng(0).normal(size=(4, 3)))
    found = find_neighbours(probes, probes, np.zeros(4, int), np.zeros(4, int), np.zeros(4, int))
    assert np.isnan(found["rival"]).all() and (found["rival_row"] == -1).all() and (found["own_row"] == range(4)).all()


def test_a_wrong_label_in_the_probes_is_doubted(embedded):
    """Three clear identities; one probe of the first bears the label of the second."""
    rng = np.random.default_rng(2)
    centres = np.eye(3, 8)
    gallery_labels, labels = np.repeat(np.arange(3), 10), np.repeat(np.arange(3), 5)
    gallery, probes = (unit(centres[who] + 0.1 * rng.normal(size=(len(who), 8))) for who in (gallery_labels, labels))
    predicted = labels.copy()
    labels = labels.copy()
    labels[2] = 1
    found = Evidence(labels, predicted, **find_neighbours(probes, gallery, labels, gallery_labels, predicted))
    tags = tag_probes(found)
    assert np.flatnonzero(tags["label doubt"] == 1).tolist() == [2]
    [error] = list_errors(found, tags)
    assert error["tags"] == ["label doubt"] and gallery_labels[error["nearest_row"]] == 0
    assert gallery_labels[error["own_row"]] == 1


# -- colours


def flat(*colours, side: int = 64) -> torch.Tensor:
    """Vertical stripes of the colours: uint8 (3, side, side)."""
    stripes = np.repeat(np.array(colours, dtype=np.uint8), side // len(colours), axis=0)
    return torch.from_numpy(np.broadcast_to(stripes.T[:, None], (3, side, side)).copy())


RED, BLUE, PINK = (200, 30, 40), (40, 60, 190), (240, 170, 190)


def test_a_signature_is_a_unit_vector_of_the_colours_alone():
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 96, 48), dtype=np.uint8))
    signature = colour_signature(picture)
    assert signature.dtype == np.float32 and signature.min() >= 0
    assert np.linalg.norm(signature) == pytest.approx(1, abs=1e-6)
    frozen = picture.numpy().copy()
    frozen.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(signature, colour_signature(frozen))
    assert colour_signature(picture.flip(-1)) @ signature > 0.995  # where it stands does not matter
    large = picture.repeat_interleave(3, 1).repeat_interleave(3, 2)
    assert colour_signature(large) @ signature > 0.999


def test_shares_of_flat_colours_follow_from_the_histogram():
    """Both halves weigh the same: with bins apart, the cosine of the mixture with each colour is the root of 1 / 2."""
    red, blue, both = (colour_signature(flat(*colours)) for colours in ((RED,), (BLUE,), (RED, BLUE)))
    assert red @ blue < 1e-3
    assert both @ red == pytest.approx(np.sqrt(0.5), abs=0.01) and both @ blue == pytest.approx(np.sqrt(0.5), abs=0.01)


def test_the_bins_of_a_flat_colour_are_those_around_it():
    [[[lightness, a, b]]] = rgb_to_lab(np.uint8([[PINK]]))
    shares = (colour_signature(flat(PINK)).astype(np.float64) ** 2).reshape(4, 8, 8)
    assert shares.sum() == pytest.approx(1)
    for axis, (value, low, high, bins) in enumerate(((lightness, 0, 100, 4), (a, -50, 70, 8), (b, -60, 70, 8))):
        marginal = shares.sum(axis=tuple({0, 1, 2} - {axis}))
        centres = low + (np.arange(bins) + 0.5) * (high - low) / bins
        assert marginal @ centres == pytest.approx(np.clip(value, centres[0], centres[-1]), abs=0.01)
        assert (marginal > 1e-9).sum() <= 2


def test_similar_colours_are_near_and_the_background_weighs_little():
    pink, rose, blue = (colour_signature(flat(colour)) for colour in (PINK, (232, 160, 188), BLUE))
    assert pink @ rose > 0.8 > 0.1 > pink @ blue
    framed = flat(PINK)
    framed[:, :8], framed[:, -8:] = torch.tensor(BLUE).view(3, 1, 1), torch.tensor(BLUE).view(3, 1, 1)
    assert colour_signature(framed) @ pink > 0.95  # a quarter of the picture


def test_the_shift_of_a_bin_border_is_no_jump():
    steps = [colour_signature(flat((value, 120, 120))) for value in range(100, 200, 2)]
    assert min(a @ b for a, b in pairwise(steps)) > 0.95


def test_what_is_no_picture_is_refused():
    for wrong in (torch.zeros(3, 8, 8), torch.zeros(8, 8, 3, dtype=torch.uint8), np.zeros((8, 8), dtype=np.uint8)):
        with pytest.raises(ValueError, match="a picture must be uint8"):
            colour_signature(wrong)


def test_reduced_signatures_are_the_principal_components():
    from sklearn.decomposition import PCA

    signatures = np.random.default_rng(0).random((50, 20)).astype(np.float32)
    ours, theirs = reduce_signatures(signatures, 5), PCA(5).fit_transform(signatures.astype(np.float64))
    assert ours.shape == (50, 5) and np.allclose(np.abs(ours), np.abs(theirs), atol=1e-5)
    full = reduce_signatures(signatures, 20)
    distances = [np.linalg.norm(rows[:, None] - rows[None], axis=-1) for rows in (full, signatures)]
    assert np.allclose(*distances, atol=1e-5)


def test_colour_evidence_is_the_cosine_with_the_mean_of_each_side():
    signatures = np.stack([colour_signature(flat(colour)) for colour in (RED, BLUE, PINK)])
    gallery = signatures[[0, 0, 1, 2]]
    gallery_labels = np.array([5, 7, 7, 9])
    found = colour_evidence(signatures, gallery, np.array([5, 7, 1]), np.array([7, 9, 9]), gallery_labels)
    mean = (signatures[0] + signatures[1]) / np.linalg.norm(signatures[0] + signatures[1])
    assert found["colour_own"][:2] == pytest.approx([1, signatures[1] @ mean], abs=1e-5)
    assert np.isnan(found["colour_own"][2])
    assert found["colour_rival"] == pytest.approx([signatures[0] @ mean, signatures[1] @ signatures[2], 1], abs=1e-5)


# -- the sheet


def test_the_sheet_shows_probe_confusion_and_own_identity():
    listed = [
        {"row": 4, "label": 0, "predicted": 1, "nearest_row": 8, "own_row": 2, "tags": ["occlusion"], "score": 0.5,
         "margin": 0.1},
        {"row": 5, "label": 1, "predicted": 0, "nearest_row": 3, "own_row": None, "tags": [], "score": 0.5,
         "margin": 0.1},
        {"row": 6, "label": 1, "predicted": 0, "nearest_row": 3, "own_row": 1, "tags": [], "score": 0.5, "margin": 0.1},
    ]  # fmt: skip
    asked = []

    def loader(kind: str, base: tuple[int, int, int]):
        def load(row: int) -> Image.Image:
            asked.append((kind, row))
            return Image.new("RGB", (40, 40), tuple(value + row for value in base))

        return load

    probe, gallery = loader("probe", (200, 0, 0)), loader("gallery", (0, 0, 200))
    made = np.asarray(error_sheet(listed, probe, gallery, ["rin", "len"], limit=2, cell=40))
    assert asked == [("probe", 4), ("gallery", 8), ("gallery", 2), ("probe", 5), ("gallery", 3)]
    places = [np.argwhere((made == colour).all(-1)) for colour in ((204, 4, 4), (8, 8, 208), (2, 2, 202))]
    assert all(len(place) == 1600 for place in places)
    columns = [place[:, 1].min() for place in places]
    assert columns == sorted(columns) and len({place[:, 0].min() for place in places}) == 1
    assert not (made == (206, 6, 6)).all(-1).any()
    with pytest.raises(ValueError, match="no errors"):
        error_sheet([], probe, gallery, [])
