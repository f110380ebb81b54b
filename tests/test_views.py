"""visualize/attention, patch_pca, neighbours, embedding_map: figures and numbers, on networks small enough to check.

Run: python -m pytest tests/test_views.py
"""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.manifold import trustworthiness

from models_mae import build_mae
from models_transfer import load_recogniser, start_backbone
from tests.helpers import fails, make_identities, waves
from util.data.augment import EvalCrop, to_unit
from util.data.sources import open_source
from util.representation.layers import attention_by_layer
from util.run.seed import rng_for
from visualize import attention, embedding_map, neighbours, patch_pca, views

NAME, SIZE, PATCH, HEADS, DEPTH = "vit_nano_patch8", 32, 8, 4, 6
VIEWS = {"attention": attention, "patch_pca": patch_pca, "neighbours": neighbours, "embedding_map": embedding_map}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four identities, 3 training pictures and 2 test pictures of each."""
    return make_identities(tmp_path_factory.mktemp("data"), train=3, val=1, test=2)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A masked autoencoder's checkpoint whose attention is not uniform."""
    torch.manual_seed(0)
    model = build_mae(f"mae_{NAME}", SIZE)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("runs") / "mae" / "seed=0" / "checkpoint-last.pth"
    path.parent.mkdir(parents=True)
    torch.save({"model": model.state_dict(), "args": {"model": f"mae_{NAME}", "input_size": SIZE}}, path)
    return path


def run(view: str, ckpt, data, out, *flags) -> dict:
    """The numbers that a view writes beside its figure, which is checked."""
    argv = ["--ckpt", ckpt, "--data_path", data, "--out", out, "--device", "cpu", *flags]
    VIEWS[view].main([str(word) for word in argv])
    figure = Image.open(out)
    assert figure.info["dpi"][0] >= 150 and figure.width >= 1000
    assert len(np.unique(np.asarray(figure.convert("L")))) > 20
    return json.loads(out.with_suffix(".json").read_text())


def pictures_of(data, role, size=SIZE) -> torch.Tensor:
    """Every picture of a role as a network sees it."""
    source, crop = open_source(data, role), EvalCrop((size, size))
    return to_unit(torch.stack([crop(source.load(i), source.record(i)) for i in range(len(source))]))


def embeddings_of(ckpt, data, role) -> np.ndarray:
    with torch.inference_mode():
        found = load_recogniser(str(ckpt)).model.embed(pictures_of(data, role)).numpy().astype(np.float64)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


# --- attention and patches ----------------------------------------------------------------------------------------


def test_attention_figure_and_its_numbers(ckpt, data, tmp_path):
    numbers = run("attention", ckpt, data, tmp_path / "a.png", "--images", "3")
    assert numbers["query"] == "mean" and numbers["block"] == DEPTH and len(numbers["heads"]) == HEADS
    source = open_source(data, "test")
    assert numbers["images"] == [source.column("sample_id")[i] for i in (0, 2, 5)]
    shown = pictures_of(data, "test")[[0, 2, 5]]
    weights = attention_by_layer(load_recogniser(str(ckpt)).model, shown, [-1])[0][:, :, 1:, 1:].double().numpy()
    for head, entry in enumerate(numbers["heads"]):
        p = weights[:, head].mean(axis=1)
        p /= p.sum(axis=1, keepdims=True)
        assert entry["entropy"] == pytest.approx(-(p * np.log(p)).sum(axis=1).mean() / np.log(16), abs=2e-4)
    classes = run("attention", ckpt, data, tmp_path / "c.png", "--images", "3", "--query", "class")
    assert classes["query"] == "class" and classes["heads"] != numbers["heads"]


def test_maps_are_heads_their_mean_and_the_product_of_all_blocks(ckpt, data):
    encoder = views.Encoder(str(ckpt), load_recogniser(str(ckpt)).model, (SIZE, SIZE), {})
    images = pictures_of(data, "test")[:2]
    maps, _ = attention.look_at(encoder, images, "class")
    assert maps.shape == (2, HEADS + 2, 4, 4)
    np.testing.assert_allclose(maps.mean(axis=(2, 3)), 1, rtol=1e-4)
    layers = [w.double().numpy() for w in attention_by_layer(encoder.model, images)]
    for i in range(2):
        for head in range(HEADS):
            row = layers[-1][i, head, 0, 1:]
            np.testing.assert_allclose(maps[i, head].ravel(), 16 * row / row.sum(), rtol=1e-4)
        row = layers[-1][i, :, 0, 1:].mean(axis=0)
        np.testing.assert_allclose(maps[i, HEADS].ravel(), 16 * row / row.sum(), rtol=1e-4)
        product = np.eye(17)
        for weights in layers:
            product = (0.5 * weights[i].mean(axis=0) + 0.5 * np.eye(17)) @ product
        np.testing.assert_allclose(maps[i, -1].ravel(), 16 * product[0, 1:] / product[0, 1:].sum(), rtol=1e-4)


def test_patch_pca_figure_whole_and_of_the_figure(ckpt, data, tmp_path):
    whole = run("patch_pca", ckpt, data, tmp_path / "p.png", "--images", "2", "--fit_images", "8")
    assert len(whole["images"]) == 2 and whole["fitted_to"] == 8 and whole["layer"] == DEPTH
    assert whole["variance"] == sorted(whole["variance"], reverse=True) and 0 < sum(whole["variance"]) <= 1
    early = run("patch_pca", ckpt, data, tmp_path / "e.png", "--images", "2", "--layer", "1", "--foreground",
                "--remove_position")  # fmt: skip
    assert early["layer"] == 1 and 0 < early["figure_share"] < 1 and early["figure_iou"] is None
    assert early["variance"] != whole["variance"]


def test_painted_figure_is_what_the_first_component_sets_apart():
    rng = rng_for(0, "paint")
    figure = np.zeros((3, 6, 6), dtype=bool)
    figure[:, 1:5, 2:5] = True
    tokens = 0.1 * rng.normal(size=(3, 36, 8))
    tokens[figure.reshape(3, 36)] += [5, 0, 0, 0, 0, 0, 0, 0]
    painted = patch_pca.paint(tokens, (6, 6), foreground=True)
    np.testing.assert_array_equal(painted.figure, figure)
    np.testing.assert_array_equal(np.isnan(painted.values).all(axis=-1), ~figure)
    assert patch_pca.agreement(figure, figure.reshape(3, 36).astype(float)) == 1
    half = figure.copy()
    half[:, :, 4] = False
    assert patch_pca.agreement(half, figure.reshape(3, 36).astype(float)) == pytest.approx(2 / 3)


# --- neighbours ---------------------------------------------------------------------------------------------------


def test_neighbours_are_those_of_brute_force(ckpt, data, tmp_path):
    numbers = run("neighbours", ckpt, data, tmp_path / "n.png", "--images", "8", "--neighbours", "3")
    queries, gallery = (embeddings_of(ckpt, data, role) for role in ("test", "train"))
    ours, theirs = open_source(data, "test"), open_source(data, "train")
    first = 0
    for entry, query, who in zip(numbers["shown"], queries, ours.column("identity"), strict=True):
        best = np.argsort(-(gallery @ query))[:3]
        assert entry["identity"] == who
        assert [n["sample_id"] for n in entry["neighbours"]] == [theirs.column("sample_id")[i] for i in best]
        np.testing.assert_allclose([n["cosine"] for n in entry["neighbours"]], (gallery @ query)[best], atol=2e-5)
        first += theirs.column("identity")[best[0]] == who
    assert numbers["first_right"] == first / 8 and numbers["gallery"] == 12
    within = run("neighbours", ckpt, data, tmp_path / "w.png", "--queries", "train", "--neighbours", "2",
                 "--images", "12")  # fmt: skip
    assert all(entry["query"] not in [n["sample_id"] for n in entry["neighbours"]] for entry in within["shown"])


def test_rates_and_choice_of_queries():
    right = np.array([[True, False], [False, True], [False, False], [True, True]])
    assert neighbours.rates(right) == {"first_right": 0.5, "neighbours_right": 0.5, "any_right": 0.75}
    assert neighbours.choose(right, 9, "all") == [0, 1, 2, 3]
    assert neighbours.choose(right, 9, "right") == [0, 3] and neighbours.choose(right, 1, "wrong") == [1]


def test_right_and_wrong_differ_in_more_than_colour(data):
    picture = waves(1)
    found = [[(picture, "rei", 0.9, True), (picture, "asuka", 0.8, False)]]
    figure = neighbours.draw([picture], found, ["rei"], "title", 1.0)
    cells = figure.axes[1:]
    assert cells[0].spines["left"].get_linestyle() == "-"
    assert cells[1].spines["left"].get_linestyle() != "-"
    marks = [cell.texts[0].get_text()[0] for cell in cells]
    assert marks == ["\N{CHECK MARK}", "\N{BALLOT X}"]


# --- the map ------------------------------------------------------------------------------------------------------


def test_map_figure_and_its_numbers(ckpt, data, tmp_path):
    numbers = run("embedding_map", ckpt, data, tmp_path / "m.png", "--split", "train", "--perplexity", "3",
                  "--identities", "rei", "asuka", "--thumbnails", "3")  # fmt: skip
    found, source = embeddings_of(ckpt, data, "train"), open_source(data, "train")
    places = np.array([[point["x"], point["y"]] for point in numbers["points"]])
    assert [point["sample_id"] for point in numbers["points"]] == source.column("sample_id")
    assert numbers["trustworthiness"] == pytest.approx(trustworthiness(found, places, n_neighbors=5), abs=1e-3)
    who = np.array(source.column("identity"))

    def same(similarity):
        np.fill_diagonal(similarity, -np.inf)
        return (who[similarity.argmax(axis=1)] == who).mean()

    assert numbers["nearest_same_identity"]["embeddings"] == same(found @ found.T)
    assert numbers["nearest_same_identity"]["map"] == same(-np.square(places[:, None] - places[None]).sum(axis=2))
    again = run("embedding_map", ckpt, data, tmp_path / "again.png", "--split", "train", "--perplexity", "3",
                "--thumbnails", "0")  # fmt: skip
    assert again["points"] == numbers["points"]


def test_no_two_thumbnails_overlap_and_none_is_left_out_that_fits():
    places = rng_for(0, "apart").uniform(0, 6, (80, 2))
    chosen = embedding_map.choose_apart(places, range(80), 0.8, 80)
    for n, i in enumerate(chosen):
        assert all(np.abs(places[i] - places[j]).max() >= 0.8 for j in chosen[:n])
    for i in set(range(80)) - set(chosen):
        assert any(np.abs(places[i] - places[j]).max() < 0.8 for j in chosen)
    assert embedding_map.choose_apart(places, range(80), 0.8, 3) == chosen[:3]


def test_the_most_frequent_identities_get_a_colour():
    names = ["b"] * 3 + ["a"] * 3 + ["c"] * 5 + ["d"] + [None] * 9
    assert embedding_map.pick_identities(names, 3) == ["c", "a", "b"]
    assert embedding_map.pick_identities(names, ["d", "b", "d"]) == ["d", "b"]
    assert embedding_map.pick_identities([None], 6) == []


def test_umap_is_asked_for_cosines_and_the_seed(monkeypatch):
    asked = {}

    class UMAP:
        def __init__(self, **options):
            asked.update(options)

        def fit_transform(self, embeddings):
            return embeddings[:, :2]

    module = ModuleType("umap")
    module.UMAP, module.__spec__ = UMAP, SimpleNamespace()
    monkeypatch.setitem(sys.modules, "umap", module)
    points = rng_for(0, "umap").normal(size=(20, 5))
    np.testing.assert_array_equal(embedding_map.lay_out(points, "umap", 3, 15.0), points[:, :2])
    assert asked == {"n_neighbors": 15, "metric": "cosine", "random_state": 3}


# --- encoders and refusals ----------------------------------------------------------------------------------------


def args_of(**given):
    return SimpleNamespace(
        **{"model": None, "input_size": None, "cls_token": False, "face_padding": None, "seed": 0, **given}
    )


def test_encoders_by_name(ckpt, tmp_path):
    cpu, images = torch.device("cpu"), torch.rand(2, 3, SIZE, SIZE)
    trained = views.open_encoder(str(ckpt), args_of(), cpu)
    assert trained.size == (SIZE, SIZE) and trained.label == f"{NAME}, mae/seed=0"
    folder = views.open_encoder(str(ckpt.parent), args_of(), cpu)
    drawn = views.open_encoder("random", args_of(model=NAME, input_size=SIZE, seed=3), cpu)
    made = start_backbone({"model": NAME, "init": None, "seed": 3, "global_pool": True, "input_size": SIZE}).eval()
    with torch.inference_mode():
        assert torch.equal(trained.model.embed(images), folder.model.embed(images))
        assert torch.equal(drawn.model.embed(images), made.embed(images))
    assert drawn.label == f"{NAME}, random weights"
    assert views.open_encoder(str(ckpt), args_of(cls_token=True), cpu).model.global_pool is False


def test_refusals_are_one_line(ckpt, data, tmp_path, capsys, monkeypatch):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(4):
        waves(i).save(flat / f"{i}.png")

    def refused(view, *flags, ckpt=ckpt, data=data, out=tmp_path / "x.png"):
        argv = ["--ckpt", ckpt, "--data_path", data, "--out", out, "--device", "cpu", *flags]
        return fails(VIEWS[view].main, capsys, [str(word) for word in argv])

    assert "ends in .png" in refused("attention", out=tmp_path / "x.jpg")
    assert "--ckpt random needs --model" in refused("attention", ckpt="random")
    assert "no transformer blocks" in refused("attention", "--model", "timm:resnet10t", ckpt="random")
    assert "do not exist" in refused("patch_pca", ckpt=tmp_path / "none.pth")
    assert "--layer 7: " in refused("patch_pca", "--layer", "7")
    assert "does not exist" in refused("patch_pca", data=tmp_path / "nowhere")
    assert "has no labels" in refused("neighbours", "--queries", "train", data=flat)
    assert "--neighbours 13" in refused("neighbours", "--neighbours", "13")
    assert "needs more than 8 pictures" in refused("embedding_map")
    assert "none of these pictures shows it" in refused("embedding_map", "--identities", "kaworu")
    monkeypatch.setattr(embedding_map.importlib.util, "find_spec", lambda name, package=None: None)
    assert "pip install umap-learn" in refused("embedding_map", "--method", "umap", "--perplexity", "2")
    assert not (tmp_path / "x.png").exists()
