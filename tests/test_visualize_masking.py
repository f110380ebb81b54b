"""visualize/masking.py: scores and masks are those of the strategies, words that fit, the figure, bad input.

Run: python -m pytest tests/test_visualize_masking.py
"""

import numpy as np
import pytest
import torch
from helpers import fails
from PIL import Image

from models_mae import build_mae
from models_mae_weights import load_mae
from util.data.manifest import write_manifest
from util.data.maps import find_maps
from util.data.sources import open_source
from util.mae.masking import Masking
from util.mae.scores import SCORES
from util.run.seed import rng_for
from visualize import masking
from visualize.pictures import Batch, Pictures, heat

NAME, SIZE, PATCH, GRID = "mae_vit_nano_patch8", 32, 8, (4, 4)
MAPS = ("face", "eyes", "foreground")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four test pictures of 64 x 64 px; each has a face in another corner."""
    folder = tmp_path_factory.mktemp("data")
    rng = rng_for(0, "masking figure")
    for i in range(4):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    write_manifest(folder, [{"sample_id": str(i), "file_name": f"{i}.png", "split": "test"} for i in range(4)])
    (folder / "maps").mkdir()
    maps = np.zeros((3, 4, 32, 32), dtype=np.uint8)
    for i in range(4):
        top, left = 16 * (i // 2), 16 * (i % 2)
        maps[0, i, top : top + 16, left : left + 16] = 255  # 2 x 2 patches
        maps[1, i, top : top + 8, left : left + 16] = 255
    maps[2, :, 8:] = 255
    for name, values in zip(MAPS, maps, strict=True):
        np.save(folder / "maps" / f"{name}.npy", values)
    return folder


@pytest.fixture(scope="module")
def batch(data):
    source = open_source(data, "test")
    maps, missing = find_maps(source, MAPS, None)
    assert not missing and maps.names == MAPS
    return next(iter(Pictures(source, range(4), (SIZE, SIZE), 4, "", maps=maps, grid=GRID)))


@pytest.fixture(scope="module")
def ckpts(tmp_path_factory):
    """{hard: checkpoint}, of models that have learned to predict their errors, or not."""
    folder, found = tmp_path_factory.mktemp("ckpt"), {}
    for hard in (False, True):
        torch.manual_seed(0)
        model = build_mae(NAME, SIZE, hard=hard)
        found[hard] = folder / f"{hard}.pth"
        torch.save({"model": model.state_dict(), "args": {"model": NAME, "input_size": SIZE}}, found[hard])
    return found


def run(capsys, data, out, *flags) -> str:
    capsys.readouterr()
    argv = ["--data_path", data, "--out", out, "--device", "cpu", *flags]
    masking.main([str(word) for word in argv])
    return capsys.readouterr().out


# --- what is shown


def test_every_strategy_has_words():
    assert masking.WORDS.keys() == SCORES.keys()
    assert {Masking(name.partition("@")[0]).weights.keys() <= SCORES.keys() for name in masking.DEFAULT} == {True}
    assert {part for name in masking.DEFAULT for part in Masking(name.partition("@")[0]).weights} == set(SCORES)


def test_words_say_what_is_removed_and_what_is_kept():
    def words(name):
        return masking.in_words(Masking(name))

    assert words("random") == "removes every patch alike"
    assert words("face") == "rather removes the face, the eyes above all"
    assert words("face:-1") == "rather keeps the face, the eyes above all"
    mixed = words("foreground:3+lineart:-1")
    assert mixed == "rather removes the figure (75%);\nrather keeps lines and fine detail (25%)"


def test_maps_go_through_the_crop_onto_the_patches(batch):
    for i in range(4):
        face = torch.zeros(GRID, dtype=torch.uint8)
        top, left = 2 * (i // 2), 2 * (i % 2)
        face[top : top + 2, left : left + 2] = 255
        assert torch.equal(batch.maps[i, 0], face)


def test_scores_are_the_maps_from_kept_to_removed(batch):
    face, eyes, figure = batch.maps.float().div(255).unbind(1)
    expected = {
        "face": (face + eyes) / 2,
        "face:-1": 1 - (face + eyes) / 2,
        "foreground": figure,
        "foreground:3+face:-1": 0.75 * figure - 0.25 * (face + eyes) / 2 + 0.25,
        "random": torch.zeros(4, *GRID),
    }
    for name, scores in expected.items():
        shown = masking.apply(Masking(name, random_share=0), batch, MAPS, GRID, 0.75)
        torch.testing.assert_close(shown.scores, scores)
        assert (shown.mask.sum(dim=1) == 12).all()


def test_at_great_strength_the_mask_is_the_ranking_of_the_scores(batch):
    removed = masking.apply(Masking("face", strength=1000, random_share=0), batch, MAPS, GRID, 0.25)
    assert torch.equal(removed.mask.view(-1, *GRID), (batch.maps[:, 0] > 0).float())
    kept = masking.apply(Masking("face:-1", strength=1000, random_share=0), batch, MAPS, GRID, 0.75)
    assert torch.equal(kept.mask.view(-1, *GRID), (batch.maps[:, 0] == 0).float())
    assert masking.removed_share(removed, batch.maps[:, 0]) == 1
    assert masking.removed_share(kept, batch.maps[:, 0]) == 0
    assert masking.removed_share(kept, batch.maps[:, 1] * 0) is None


def test_share_removed_counts_covered_area(batch):
    shown = masking.apply(Masking("random"), batch, MAPS, GRID, 0.5)
    total, gone = 0, 0
    for i in range(4):
        for y in range(4):
            for x in range(4):
                value = int(batch.maps[i, 2, y, x])
                total += value
                gone += value * int(shown.mask[i, 4 * y + x])
    assert masking.removed_share(shown, batch.maps[:, 2]) == pytest.approx(gone / total)


@pytest.mark.parametrize("with_model", [False, True])
def test_panel_shows_the_picture_its_score_its_mask_and_the_reconstruction(batch, ckpts, monkeypatch, with_model):
    model = load_mae(str(ckpts[False])) if with_model else None
    shown, seen = masking.apply(Masking("face", random_share=0), batch, MAPS, GRID, 0.5), {}
    monkeypatch.setattr(masking, "sheet", lambda rows, **titles: seen.update(rows=rows, **titles))
    masking.panel("face", batch, shown, model, PATCH)
    assert len(seen["rows"]) == 4 and len(seen["rows"][0]) == len(seen["column_titles"]) == 3 + with_model
    for i, (original, score, masked, *rest) in enumerate(seen["rows"]):
        assert torch.equal(original, batch.images[i])
        assert (score == heat(shown.scores[i].numpy(), 1.0)).all()
        for patch in range(16):
            rows, columns = (slice(PATCH * k, PATCH * (k + 1)) for k in divmod(patch, 4))
            whole = torch.full((3, PATCH, PATCH), 0.5) if shown.mask[i, patch] else original[:, rows, columns]
            assert torch.equal(masked[:, rows, columns], whole)
        if with_model:
            torch.testing.assert_close(rest[0], model.reconstruct(batch.images, shown.mask)["pasted"][i])


# --- the figure


def test_figure_has_a_block_for_each_strategy(data, ckpts, tmp_path, capsys):
    out = tmp_path / "deeper" / "masking.png"
    flags = ["--ckpt", ckpts[True], "--images", "2", "--columns", "2", "--strategies", "random", "hard", "grid"]
    assert "3 strategies on 2 pictures" in run(capsys, data, out, *flags)
    width, height = Image.open(out).size
    assert 2 * 4 * 112 < width < 2 * 4 * 112 + 160  # picture, score, mask, reconstruction
    assert 2 * 2 * 112 < height < 2 * 2 * 112 + 360  # two lines of blocks of two pictures


def test_what_cannot_be_had_is_said(data, ckpts, tmp_path, capsys):
    out = tmp_path / "a.png"
    printed = run(capsys, data, out, "--ckpt", ckpts[False])
    assert printed.startswith("not shown: hard: ") and f"{len(masking.DEFAULT) - 1} strategies" in printed
    printed = run(capsys, data, out, "--strategies", "hard", "block", "--input_size", "32", "--patch_size", "8")
    assert "not shown: hard" in printed and "1 strategies" in printed
    for name in ("0.png", "1.png"):
        (tmp_path / "plain" / "test").mkdir(parents=True, exist_ok=True)
        (tmp_path / "plain" / "test" / name).write_bytes((data / name).read_bytes())
    printed = run(capsys, tmp_path / "plain", out, "--ckpt", ckpts[True])
    for name in ("face", "face:-1", "foreground", "box"):
        assert f"not shown: {name}: " in printed
    assert f"{len(masking.DEFAULT) - 4} strategies" in printed


def test_seeds_change_the_masks(data, tmp_path, capsys):
    def pixels(*flags):
        run(
            capsys,
            data,
            tmp_path / "s.png",
            "--strategies",
            "random",
            "--input_size",
            "32",
            "--patch_size",
            "8",
            *flags,
        )
        return np.asarray(Image.open(tmp_path / "s.png"))

    first = pixels()
    assert (pixels() == first).all() and (pixels("--seed", "1") != first).any()


def test_bad_input_ends_in_one_line(data, ckpts, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    good = ["--device", "cpu", "--data_path", data, "--out", tmp_path / "x.png", "--ckpt", ckpts[False]]

    def fail(*flags):  # the last of a repeated flag counts
        return fails(masking.main, capsys, [str(word) for word in (*good, *flags)])

    assert "ends in .png" in fail("--out", tmp_path / "x.jpg")
    assert "nowhere" in fail("--data_path", tmp_path / "nowhere")
    assert "'hair' is no strategy" in fail("--strategies", "hair")
    assert "none of the 16 patches" in fail("--mask_ratio", "0.99")
    assert "none can be shown" in fail("--strategies", "hard")
    assert "grid@1000" in fail("--strategies", "grid@much")
    assert "empty" in fail("--maps", tmp_path / "empty")
    assert "empty" in fail("--strategies", "face", "random", "--maps", tmp_path / "empty")
    assert "--input_size" in fail("--input_size", "30")
    assert not (tmp_path / "x.png").exists()


def test_a_batch_without_maps_needs_none():
    images = torch.rand(2, 3, SIZE, SIZE)
    strategy = Masking("grid", strength=1000, random_share=0)
    shown = masking.apply(strategy, Batch(images, torch.arange(2), None), (), GRID, 0.75)
    kept = shown.mask.view(-1, *GRID) == 0
    # one of four is kept, in every 2 x 2 cell of the pattern
    assert all(kept[:, y : y + 2, x : x + 2].sum(dim=(1, 2)).eq(1).all() for y in range(3) for x in range(3))
