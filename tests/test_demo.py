"""The demo's tabs without a browser: uploads within limits, recognition, enrolment, annotation, masks, calibration.

Run: python -m pytest tests/test_demo.py
"""

import asyncio
import io
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models_mae import build_mae
from models_vit import build_vit
from tests import helpers
from tests.helpers import waves
from util.data.faces import Face
from util.data.manifest import read_manifest, write_manifest
from util.data.sources import open_source
from util.run.errors import UserError
from util.transfer.naming import stranger_threshold
from visualize.demo import annotate, enrol, recognise, reconstruct, verify
from visualize.demo.annotations import Annotations, Draft, Label
from visualize.demo.calibrate import calibrate, check, open_set_trials, rates_at, threshold_of
from visualize.demo.gate import BodyLimit
from visualize.demo.models import Models, Settings
from visualize.demo.pictures import Limits, boxed, card, note, open_upload
from visualize.demo.weights import FOLDER, Calibration, Facts, read_facts, write_weights

LIMITS = Limits(max_mb=0.5, max_pixels=200_000)
HOSTILE = '<img src=x onerror="alert(1)">'


def png(picture: Image.Image) -> bytes:
    written = io.BytesIO()
    picture.save(written, "PNG")
    return written.getvalue()


def save(picture: Image.Image, path: Path) -> str:
    picture.save(path, "PNG")
    return str(path)


class TwoFaces:
    """Finds a face in each half of a picture wider than high, the right one surer; in others none."""

    needs_name = False

    def find(self, image, name=None):
        if image.width <= image.height:
            return []
        half = image.width / 2
        return [Face((4, 4, half - 4, 40), 0.6), Face((half + 4, 4, image.width - 4, 40), 0.9)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random networks in files such as ship: what a tab does with numbers does not depend on which they are."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    args = {"input_size": 32, "global_pool": True}
    facts = Facts(0.4, 0.5, Calibration(4.0, -1.0, {"pairs": 7, "data": "waves"}), {"licence": "none"})
    encoder = build_vit("vit_nano_patch8", img_size=32).state_dict()
    write_weights(folder / "r.safetensors", encoder, {**args, "model": "vit_nano_patch8"}, facts)
    write_weights(folder / "plain.safetensors", encoder, {**args, "model": "vit_nano_patch8"}, Facts())
    mae = build_mae("mae_vit_nano_patch8", 32).state_dict()
    write_weights(folder / "m.safetensors", mae, {**args, "model": "mae_vit_nano_patch8"}, Facts())
    return folder


@pytest.fixture
def open_models(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("visualize.demo.models.open_finder", lambda spec, device: TwoFaces())

    def build(ckpt: str = "r.safetensors", finder: str = "none") -> Models:
        return Models(
            Settings(
                str(weights / ckpt),
                str(weights / "m.safetensors"),
                finder,
                str(tmp_path / "gallery"),
                str(tmp_path / "notes"),
                "cpu",
                LIMITS,
            )
        )

    return build


@pytest.fixture
def models(open_models) -> Models:
    return open_models()


@pytest.fixture
def scene() -> Image.Image:
    """Two pictures side by side, in each of which TwoFaces finds a face."""
    both = Image.new("RGB", (80, 48))
    both.paste(waves("left"), (0, 0))
    both.paste(waves("right"), (40, 0))
    return both


# --- uploads ----------------------------------------------------------------------------------------------------


def bomb(side: int) -> bytes:
    """A PNG of a few bytes whose header announces side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content",
    [b"", b"no picture at all", png(waves("x"))[:150], bomb(60_000), bomb(500), b"<svg/>", b"GIF89a"],
    ids=["empty", "text", "cut short", "bomb", "above the limit", "svg", "head of a gif"],
)
def test_what_is_no_picture_is_one_line_without_a_path(tmp_path, content):
    path = tmp_path / "secret-name.png"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        open_upload(str(path), LIMITS)
    message = str(error.value)
    assert message.startswith("the picture cannot be read (") and "\n" not in message
    assert "secret-name" not in message and str(tmp_path) not in message


def test_a_file_above_the_limit_is_not_opened(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(b"x" * 500_001)
    with pytest.raises(UserError, match=r"0\.5 MB, and 0\.5 are allowed"):
        open_upload(str(path), LIMITS)


def test_a_file_is_what_its_bytes_are(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(png(waves("a")))
    assert np.array_equal(open_upload(str(path), LIMITS), waves("a"))
    with pytest.raises(UserError, match="no picture yet"):
        open_upload(None, LIMITS)


def test_names_are_text_wherever_they_are_shown():
    for html in (note(HOSTILE), card(HOSTILE, waves("a"), HOSTILE)):
        assert "<img src=x" not in html and "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;" in html


def test_boxes_scale_with_what_is_shown():
    shown = boxed(Image.new("RGB", (2560, 1280)), [(256, 256, 2304, 1024)])
    assert shown.size == (1280, 640)
    painted = np.argwhere(np.asarray(shown).any(-1))
    assert painted.min(0).tolist() == [128, 128] and painted.max(0).tolist() == [511, 1151]


# --- recognise and enrol ------------------------------------------------------------------------------------------


def test_an_enrolled_character_is_found_also_after_a_restart(open_models, tmp_path):
    models = open_models()
    one, two = (save(waves(name), tmp_path / f"{name}.png") for name in ("one", "two"))
    enrol.answer(models, " One  Piece ", [one])
    enrol.answer(models, "Two", [two])
    for opened in (models, open_models()):
        for upload, name in ((one, "One Piece"), (two, "Two")):
            named = recognise.recognise(opened, open_upload(upload, LIMITS))
            assert [face.name for face in named] == [name]
            assert named[0].matches[0].similarity == pytest.approx(1, abs=1e-5)
            shown, rows, line = recognise.answer(opened, upload)
            assert shown.size == (40, 48) and name in line and rows.count("data:image/jpeg") == 3


def test_pictures_that_are_faces_are_taken_whole(open_models, scene):
    models = open_models(finder="whole")
    assert models.faces(scene) == [] and [one.crop for one in models.look(scene)] == [scene]
    assert len(open_models().look(scene)) == 2


def test_each_face_of_a_picture_is_named_from_left_to_right(models, scene):
    for name, seen in zip(("right", "left"), models.look(scene), strict=True):  # the surest first
        models.gallery.enrol(name, models.embed([seen.crop]), [seen.crop])
    named = recognise.recognise(models, scene)
    assert [one.name for one in named] == ["left", "right"]
    # the crop reaches 0.4 of the box's longer side beyond it, cut at the border
    assert models.look(scene)[1].crop.size == (53, 48)  # 36 * (0.5 + 0.4) on either side of 20


def test_below_the_threshold_nobody_is_named(models, scene):
    models.gallery.enrol("somebody", models.embed([waves("z")]), [waves("z")])
    named = recognise.recognise(models, scene)
    best = max(one.matches[0].similarity for one in named)
    enrol.set_threshold(models, best + 1e-3)
    assert {one.name for one in recognise.recognise(models, scene)} == {recognise.UNKNOWN}
    enrol.set_threshold(models, -1)
    assert {one.name for one in recognise.recognise(models, scene)} == {"somebody"}


@pytest.fixture
def folders(tmp_path) -> Path:
    """A folder of pictures for each of two characters."""
    for name in ("Ann", "Bea"):
        (tmp_path / "characters" / name).mkdir(parents=True)
        for number in range(6):
            waves(f"{name}{number}").save(tmp_path / "characters" / name / f"{number}.png")
    return tmp_path / "characters"


def test_a_folder_of_characters_is_enrolled_once(open_models, folders):
    models = open_models("plain.safetensors")
    assert models.gallery.threshold is None
    source = open_source(str(folders), "train")  # a part is held out for validation
    trained = source.column("identity")
    (folders / source.record(trained.index("Bea"))["file_name"]).write_bytes(b"no picture")
    line = enrol.enrol_folder(models, str(folders))
    sizes = {name: len(rows) for name, rows in models.gallery.people.items()}
    assert sizes == {"Ann": trained.count("Ann"), "Bea": trained.count("Bea") - 1}
    assert line == f"2 characters of {folders} enrolled with {sum(sizes.values())} pictures, 1 cannot be read"
    assert models.gallery.threshold == stranger_threshold(models.gallery, enrol.FAR)

    enrol.remove(models, "Bea")
    enrol.set_threshold(models, 0.25)
    again = open_models("plain.safetensors")
    assert "1 were enrolled before" in enrol.enrol_folder(again, str(folders))
    assert {name: len(rows) for name, rows in again.gallery.people.items()} == sizes
    assert again.gallery.threshold == 0.25


def test_no_more_than_twenty_pictures_of_a_character_are_enrolled(models, tmp_path):
    helpers.make_identities(tmp_path / "many", ("ann", "bea"), train=enrol.MOST + 9)  # a tenth is held out
    enrol.enrol_folder(models, str(tmp_path / "many"))
    assert [len(rows) for rows in models.gallery.people.values()] == [enrol.MOST] * 2


def test_a_folder_without_names_is_one_line(models, folders):
    with pytest.raises(UserError, match="has no names"):
        enrol.enrol_folder(models, str(folders / "Ann"))


def test_a_new_gallery_takes_the_threshold_of_the_weights(open_models):
    models = open_models()
    assert models.gallery.threshold == 0.5
    enrol.set_threshold(models, 0.7)
    assert open_models().gallery.threshold == 0.7


def test_the_gallery_of_other_weights_is_refused(open_models, weights):
    models = open_models()
    models.gallery.enrol("a", models.embed([waves("a")]))
    torch.manual_seed(1)
    other = build_vit("vit_nano_patch8", img_size=32).state_dict()
    args = {"input_size": 32, "model": "vit_nano_patch8"}
    write_weights(weights / "other.safetensors", other, args, Facts())
    with pytest.raises(UserError, match="another network"):
        open_models("other.safetensors")


def test_one_bad_picture_enrols_nobody(models, tmp_path):
    good = save(waves("a"), tmp_path / "a.png")
    bad = tmp_path / "b.png"
    bad.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"picture 2 of 2: the picture cannot be read .* nobody was enrolled"):
        enrol.enrol(models, "A", [good, str(bad)])
    assert enrol.names(models) == [] and "nobody is enrolled yet" in enrol.overview(models)
    for name, uploads in (("", [good]), ("  ", [good]), ("A", []), ("A", None), ("A", [good] * 21)):
        with pytest.raises(UserError):
            enrol.enrol(models, name, uploads)


def test_a_removed_character_is_not_found(models, tmp_path):
    good = save(waves("a"), tmp_path / "a.png")
    enrol.answer(models, HOSTILE, [good])
    assert enrol.names(models) == [HOSTILE] and HOSTILE not in enrol.overview(models)
    enrol.remove(models, HOSTILE)
    assert recognise.answer(models, good)[2] == note("nobody is enrolled yet: enrol a character first")
    with pytest.raises(UserError):
        enrol.remove(models, HOSTILE)


# --- verify -------------------------------------------------------------------------------------------------------


def test_a_verdict_has_the_calibrated_probability(models, tmp_path):
    verdict = verify.verify(models, waves("a"), waves("a"))
    assert verdict.similarity == pytest.approx(1, abs=1e-5)
    assert verdict.probability == pytest.approx(1 / (1 + np.exp(-3)), abs=1e-4) and verdict.same
    assert "same character: probability of the same 95.3%" in verify.describe(models, verdict)
    low = replace(verdict, similarity=0.1, probability=0.4)
    assert verify.describe(models, low).startswith("different characters")
    with pytest.raises(UserError, match="the second picture: there is no picture"):
        verify.answer(models, save(waves("a"), tmp_path / "a.png"), None)


def test_without_calibration_no_probability_is_made_up(open_models):
    models = open_models("plain.safetensors")
    verdict = verify.verify(models, waves("a"), waves("b"))
    assert verdict.probability is None and verdict.same is None
    assert "not calibrated" in verify.describe(models, verdict) and "%" not in verify.describe(models, verdict)
    assert models.gallery.threshold is None


# --- reconstruct --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "removed"), [(0, 0), (0.25, 4), (0.5, 8), (0.9, 15)])
@pytest.mark.parametrize("choice", [name for name in reconstruct.STRATEGIES if name != reconstruct.PAINTED])
def test_every_strategy_removes_what_the_ratio_says(models, scene, choice, ratio, removed):
    mask_of = reconstruct.strategy_mask(models, scene, reconstruct.STRATEGIES[choice], ratio, 0)
    result = reconstruct.reconstruct(models, scene, mask_of)
    assert (result.removed, result.patches) == (removed, 16)
    assert (result.psnr_db == np.inf) == (removed == 0)


def test_the_painted_patches_are_those_removed(models):
    picture = Image.new("RGB", (64, 64), "white")
    layer = Image.new("RGBA", (64, 64))
    layer.paste((0, 0, 255, 255), (16, 0, 32, 16))  # the second patch of the first row, 16 px of the picture a side
    layer.paste((0, 0, 255, 255), (48, 48, 50, 50))  # a dot of 1.6 % of the last patch: a slip
    seen = {}

    def keep(images, view, faces):
        seen["mask"] = reconstruct.painted_mask(models, picture, [layer])(images, view, faces)
        return seen["mask"]

    result = reconstruct.reconstruct(models, picture, keep)
    assert seen["mask"][0].nonzero().flatten().tolist() == [1] and result.removed == 1
    grey = np.asarray(result.masked) == 128
    side = result.masked.width // 4
    assert grey[:side, side : 2 * side].all() and grey.sum() == side * side * 3
    # what was not painted is shown as it was
    assert (np.asarray(result.pasted)[side:] == 255).all()


def test_paint_over_everything_is_refused(models):
    picture = Image.new("RGB", (40, 40))
    editor = {"background": picture, "layers": [Image.new("RGBA", (40, 40), "red")]}
    with pytest.raises(UserError, match="no patch is left visible"):
        reconstruct.answer(models, editor, reconstruct.PAINTED, 0.5, 0)
    empty = {"background": picture, "layers": []}
    assert "nothing is removed: paint" in reconstruct.answer(models, empty, reconstruct.PAINTED, 0.5, 0)[3]
    for nothing in (None, {"background": None, "layers": []}):
        with pytest.raises(UserError, match="no picture yet"):
            reconstruct.answer(models, nothing, "random", 0.5, 0)
    with pytest.raises(UserError, match="no face was found"):
        reconstruct.answer(models, empty, "face and eyes", 0.5, 0)


def test_another_seed_is_another_mask(models, scene):
    results = [reconstruct.answer(models, {"background": scene}, "random", 0.5, seed) for seed in (0, 0, 1)]
    masked = [np.asarray(result[0]) for result in results]
    assert np.array_equal(masked[0], masked[1]) and not np.array_equal(masked[0], masked[2])


# --- annotate -----------------------------------------------------------------------------------------------------


def test_an_annotated_picture_is_a_prepared_folder(models, scene, tmp_path):
    page, line = annotate.open_new(models, save(scene, tmp_path / "scene.png"))
    assert line.startswith("2 faces found")
    page = annotate.change(annotate.choose(page, 1), identity=" Rei ", style="moe", pose="", occlusion="none")
    page = annotate.click(annotate.click(annotate.add(page), 30, 44), 10, 20)
    page = annotate.remove(annotate.choose(page, 0))
    saved, line = annotate.save(models, page)
    assert "2 faces of images/" in line and saved.draft.file_name.endswith(".png")
    manifest = read_manifest(tmp_path / "notes")
    rows = [manifest.row(i) for i in range(len(manifest))]
    assert [(row["identity"], row["style"], row["pose"], row["box"], row["split"]) for row in rows] == [
        ("Rei", "moe", None, [44, 4, 76, 40], "train"),
        (None, None, None, [10, 20, 30, 44], "train"),
    ]
    assert np.array_equal(Image.open(manifest.path(0)), scene)
    # the same picture again is corrected, not added
    annotate.save(models, replace(page, draft=replace(page.draft, labels=page.draft.labels[:1])))
    assert len(read_manifest(tmp_path / "notes")) == 1
    assert annotate.listed(models) == [saved.draft.file_name]
    assert annotate.open_stored(models, saved.draft.file_name)[0].draft.labels[0].identity == "Rei"


def test_correcting_leaves_all_else_as_it_was(tmp_path):
    for name in ("a", "b", "c"):
        save(waves(name), tmp_path / f"{name}.png")
    rows = [
        {"sample_id": f"{n}{k}", "file_name": f"{n}.png", "split": "test", "identity": n, "box": [1, 1, 9, 9],
         "eyes": [[2, 2, 4, 4]], "source": "album", "expression": "smile"}
        for n in "abc" for k in (0, 1)
    ]  # fmt: skip
    write_manifest(tmp_path, rows, extra={"recipe": "drawn"})
    folder = Annotations(tmp_path)
    draft = folder.open("b.png", LIMITS.max_pixels)
    changed = (replace(draft.labels[0], box=(-5, 2, 90, 20)), draft.labels[1], Label((1, 2, 3, 4), "new"))
    folder.save(replace(draft, labels=changed))
    manifest = read_manifest(tmp_path)
    assert manifest.metadata == {"recipe": "drawn"}
    assert [manifest.row(i)["sample_id"] for i in range(7)] == ["a0", "a1", "b0", "b1", "b_0", "c0", "c1"]
    assert manifest.row(2)["box"] == [0, 2, 40, 20]  # cut at the border
    for i, before in ((0, 0), (1, 1), (3, 3), (5, 4), (6, 5)):
        kept = manifest.row(i)
        assert {name: kept[name] for name in rows[before]} == rows[before]
    new = manifest.row(4)
    assert (new["split"], new["source"], new["file_name"]) == ("test", "b", "b.png")


def test_what_cannot_be_saved_says_why(tmp_path, scene):
    folder = Annotations(tmp_path / "notes")
    for labels, reason in (((), "no face"), ((Label(None),), "has no box"), ((Label((90, 1, 99, 9)),), "outside")):
        with pytest.raises(UserError, match=reason):
            folder.save(Draft(scene, labels))
    assert not (tmp_path / "notes").exists()
    save(scene, tmp_path / "a.png")
    row = {"sample_id": "a", "file_name": "a.png", "split": "train", "box": [1, 1, 9, 9]}
    write_manifest(tmp_path / "apart", [row], image_root=str(tmp_path))
    apart = Annotations(tmp_path / "apart")
    with pytest.raises(UserError, match="lie elsewhere"):
        apart.save(Draft(scene, (Label((1, 1, 9, 9)),)))
    (tmp_path / "apart/maps").mkdir()
    draft = apart.open("a.png", LIMITS.max_pixels)
    with pytest.raises(UserError, match="semantic maps"):
        apart.save(replace(draft, labels=draft.labels * 2))
    apart.save(replace(draft, labels=(replace(draft.labels[0], identity="x"),)))
    assert read_manifest(tmp_path / "apart").row(0)["identity"] == "x"
    for name in ("../a.png", "b.png"):
        with pytest.raises(UserError, match="is not in"):
            apart.open(name, LIMITS.max_pixels)


def test_clicks_need_a_face_and_some_distance(models, scene):
    page = annotate.start(models, scene)
    with pytest.raises(UserError, match="too close"):
        annotate.click(annotate.click(page, 5, 5), 7, 30)
    nobody = annotate.choose(page, -1)
    for act in (annotate.remove, lambda p: annotate.click(p, 1, 1), lambda p: annotate.change(p, identity="a")):
        with pytest.raises(UserError, match="no face is chosen"):
            act(nobody)
    moved = annotate.change(page, box=(1, 1, 20, 20))
    assert moved.label.box == (1, 1, 20, 20) and "eyes" not in moved.label.rest


# --- weights and calibration --------------------------------------------------------------------------------------


def characters(count: int, seed: int, noise: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(count), 12)
    return rng.normal(size=(count, 16))[labels] + noise * rng.normal(size=(len(labels), 16)), labels


def test_platt_scaling_is_the_minimum_of_the_balanced_log_loss():
    embeddings, labels = characters(8, 0, noise=1.2)
    fitted = calibrate(embeddings, labels, "noise")
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    upper = np.triu_indices(len(labels), 1)
    scores, same = (unit @ unit.T)[upper], (labels[:, None] == labels)[upper]
    weight = np.where(same, 0.5 / same.sum(), 0.5 / (~same).sum())

    def loss(slope: float, intercept: float) -> float:
        odds = slope * scores + intercept
        return float((weight * np.logaddexp(0, np.where(same, -odds, odds))).sum())

    best = loss(fitted.slope, fitted.intercept)
    for slope, intercept in ((0.1, 0), (-0.1, 0), (0, 0.05), (0, -0.05)):
        assert best <= loss(fitted.slope + slope, fitted.intercept + intercept) + 1e-6
    assert fitted.about == {"data": "noise", "pairs": len(scores)}
    others = check(fitted, *characters(8, 1, noise=1.2))
    assert others["accuracy"] > 0.7 and others["ece"] < 0.15
    assert check(Calibration(0.0, 0.0), embeddings, labels)["log_loss"] == pytest.approx(np.log(2))


def test_what_cannot_be_calibrated_is_refused():
    embeddings, labels = characters(1, 0)
    with pytest.raises(UserError, match="two characters"):
        calibrate(embeddings, labels, "one")
    embeddings, labels = characters(4, 0)
    with pytest.raises(UserError, match="train the recogniser more"):
        calibrate(np.concatenate([embeddings, -embeddings]), np.concatenate([labels, labels]), "opposites")


def test_the_threshold_lets_few_strangers_in():
    trials = open_set_trials(*characters(12, 0))
    known, correct, unknown = trials
    # half of the characters, each 12 pictures, 3 of them enrolled, in 20 galleries
    assert len(known) == len(correct) == 20 * 6 * 9 and len(unknown) == 20 * 6 * 12
    value = threshold_of(trials)["value"]
    rates = rates_at(value, trials)
    assert rates["far"] <= 0.1 + 1e-9 and rates["far"] == pytest.approx(np.mean(unknown >= value))
    assert rates["dir"] > 0.8
    assert rates_at(value, open_set_trials(*characters(12, 5)))["dir"] > 0.7


def test_weights_come_back_with_their_facts(weights, tmp_path):
    facts = read_facts(str(weights / "r.safetensors"))
    assert (facts.face_padding, facts.threshold, facts.made) == (0.4, 0.5, {"licence": "none"})
    assert facts.calibration == Calibration(4.0, -1.0, {"pairs": 7, "data": "waves"})
    assert read_facts("runs/a/checkpoint-best.pth") == Facts()
    with pytest.raises(UserError, match="half precision"):
        write_weights(tmp_path / "x.safetensors", {"w": torch.tensor([1e6])}, {}, Facts())
    (tmp_path / "y.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="metadata cannot be read"):
        read_facts(str(tmp_path / "y.safetensors"))


def test_what_ships_is_small_and_says_how_it_was_made():
    folder = FOLDER
    if not (folder / "weights.json").is_file():
        pytest.skip("the demo's weights are not made yet: scripts/make_demo_weights.py")
    card = json.loads((folder / "weights.json").read_text())
    assert card.keys() == {"recogniser.safetensors", "mae.safetensors", "detector.safetensors"}
    assert sum((folder / name).stat().st_size for name in card) <= 10_000_000
    for name, entry in card.items():
        assert entry["bytes"] == (folder / name).stat().st_size and entry["made"]["licence"]
        assert read_facts(str(folder / name)).made == entry["made"]
    assert card["recogniser.safetensors"]["calibration"]["slope"] > 0


# --- the server ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(("size", "passes"), [(1000, True), (1001, False)])
def test_a_request_above_the_limit_does_not_reach_the_application(told, size, passes):
    got, sent = [], []

    async def app(scope, receive, send):
        while (message := await receive())["type"] == "http.request":
            got.append(len(message["body"]))
            if not message["more_body"]:
                return

    parts = [
        {"type": "http.request", "body": b"x" * n, "more_body": more} for n, more in ((600, True), (size - 600, False))
    ]

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    headers = [(b"content-length", str(size).encode())] if told else []
    asyncio.run(BodyLimit(app, 1000)({"type": "http", "headers": headers}, receive, send))
    assert (sum(got) == size) == passes
    assert bool(sent) == (told and not passes) and (not sent or sent[0]["status"] == 413)
