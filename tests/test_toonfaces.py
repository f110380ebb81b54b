"""ToonFaces: the truth is checked against pixels, by drawing a picture again with one thing changed."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from util.data.manifest import read_manifest
from util.run.errors import UserError
from util.toonfaces import dataset
from util.toonfaces.dataset import Recipe, write_faces, write_scenes
from util.toonfaces.identity import make_identities
from util.toonfaces.look import BACKGROUNDS, EXPRESSIONS, OCCLUSIONS, OUTFITS, POSES, draw_look
from util.toonfaces.render import render_face
from util.toonfaces.scene import render_scene
from util.toonfaces.split import Sizes, long_tail, plan
from util.toonfaces.style import STYLES

SCRIPT = Path(__file__).resolve().parents[1] / "datasets" / "prepare_toonfaces.py"
SMALL = Recipe(Sizes(6, 72, 1.0, 4, 5, 2, 5), size=48, seed=3)
OPEN_FACED = ("blunt", "parted", "wispy", "spiky")  # fringes that leave both eyes free


@pytest.fixture(scope="module")
def cast():
    return make_identities(40, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("toonfaces") / "faces"
    assert write_faces(out, SMALL, workers=0)
    return out


def pixels(image):
    return np.asarray(image, dtype=np.int32)


def changed(a, b, threshold=0):
    """Where two pictures differ, (H, W) bool."""
    return np.abs(pixels(a) - pixels(b)).max(axis=-1) > threshold


def grow(mask, by=1):
    """A bool mask grown by some pixels."""
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * by + 1))) > 0


def inside(boxes, shape, margin=0):
    found = np.zeros(shape, dtype=bool)
    for x1, y1, x2, y2 in boxes:
        top, left = max(int(y1) - margin, 0), max(int(x1) - margin, 0)
        found[top : int(np.ceil(y2)) + margin, left : int(np.ceil(x2)) + margin] = True
    return found


def clear_faces(cast, count=40):
    """Faces whose both eyes nothing hides."""
    for number in range(count):
        who = cast[number % len(cast)]
        who = replace(who, traits=replace(who.traits, bangs=OPEN_FACED[number % 4], face_accessory="none"))
        yield who, draw_look((1, "clear", number), occlusion="none", yaw=float(-24 + 7 * (number % 8)))


# The truth against the pixels


def test_eye_boxes_hold_the_eyes_and_nothing_but_the_eyes(cast):
    slack = []
    for who, look in clear_faces(cast):
        with_eyes, without = render_face(who, look), render_face(who, look, hide=frozenset({"eyes"}))
        assert len(with_eyes.face.eyes) == 2
        differs = changed(with_eyes.image, without.image)
        assert not (differs & ~inside(with_eyes.face.eyes, differs.shape)).any()
        for box in with_eyes.face.eyes:
            assert differs[inside([box], differs.shape)].mean() > 0.12  # a shut eye is little more than a line
            ys, xs = np.nonzero(differs & inside([box], differs.shape))
            slack.append(np.abs(np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) - box))
    assert (np.median(slack, axis=0) < (1, 3, 1, 1)).all(), (
        "hair covers the upper rim of many eyes, the others are rare"
    )


def test_hidden_eyes_have_no_box(cast):
    for number in range(24):
        who, _ = next(clear_faces(cast[number:], 1))
        still = {"yaw": 0.0, "pitch": 0.0, "roll": 0.0, "expression": "neutral"}
        for fixed in ({"occlusion": "hand", "hand": "eye"}, {"occlusion": "bangs"}):
            look = draw_look((2, "hidden", number), **still, **fixed)
            face = render_face(who, look).face
            assert len(face.eyes) == 1
            middle = (face.box[0] + face.box[2]) / 2
            assert ((face.eyes[0][0] + face.eyes[0][2]) / 2 - middle) * look.hidden_side < 0


def test_masks_fit_the_figure(cast):
    for number in range(40):
        look = draw_look((3, "mask", number), background="plain", contrast=0.0, light=(235, 235, 235))
        black, white = (
            render_face(cast[number], replace(look, backdrop=(v, v, v), backdrop_2=(v, v, v))) for v in (0, 255)
        )
        mask = np.asarray(black.mask) > 0
        assert set(np.unique(np.asarray(black.mask))) == {0, 255}
        assert ((np.asarray(white.mask) > 0) == mask).all()
        differs = changed(black.image, white.image, threshold=8)
        # pixels of a narrow gap between two locks are mostly figure and yet show some background
        assert (differs & ~grow(~mask)).sum() <= 0.002 * mask.sum(), "the background shows through inside the mask"
        assert (differs | grow(mask)).all(), "the figure goes on outside the mask"


def test_face_box_is_the_face(cast):
    for who, look in clear_faces(cast):
        seen, box = render_face(who, look), np.array(render_face(who, look).face.box)
        differs = changed(seen.image, render_face(who, look, hide=frozenset({"face"})).image)
        ys, xs = np.nonzero(differs)
        assert not (differs & ~inside([box], differs.shape, margin=2)).any()
        assert abs(ys.max() + 1 - box[3]) <= 3, "the box ends at the chin"
        assert xs.max() - xs.min() > 0.6 * (box[2] - box[0])


def test_boxes_lie_in_the_picture_and_eyes_in_the_face(cast):
    for number in range(60):
        picture = render_face(cast[number % 40], draw_look((4, number)), size=64)
        boxes = np.array([picture.face.box, *picture.face.eyes])
        assert (boxes >= 0).all() and (boxes <= 64).all()
        assert (boxes[:, :2] >= boxes[0, :2]).all() and (boxes[:, 2:] <= boxes[0, 2:]).all()
        assert (boxes[:, 2:] - boxes[:, :2] > 1).all()


def features(picture):
    return np.mean(picture.face.eyes, axis=0)


def test_pose_names_the_turn_of_the_features(cast):
    for who, look in clear_faces(cast, 20):
        for pose, yaw, pitch in (("left", -30.0, 0.0), ("right", 30.0, 0.0), ("up", 0.0, 15.0), ("down", 0.0, -15.0)):
            turned = replace(look, yaw=yaw, pitch=pitch, roll=0.0)
            front = replace(turned, yaw=0.0, pitch=0.0)
            assert turned.pose == pose and front.pose == "front"
            shift = np.mean(render_face(who, turned).face.eyes, axis=0) - np.mean(
                render_face(who, front).face.eyes, axis=0
            )
            expected = {"left": -shift[0], "right": shift[0], "up": -shift[1], "down": shift[1]}[pose]
            assert expected > 1


def test_turning_is_not_a_shift(cast):
    """Yaw moves features by their depth: the eyes come apart from the outline, and the far eye is narrower."""
    for who, look in clear_faces(cast, 12):
        look = replace(look, yaw=30.0, pitch=0.0, roll=0.0)
        near, far = sorted(render_face(who, look).face.eyes)
        assert far[2] - far[0] < near[2] - near[0]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_trait_draws_in_every_style(cast, style, expression):
    number = list(EXPRESSIONS).index(expression)
    for k in range(4):
        who = cast[(number * 4 + k) % 40]
        look = draw_look((5, number, k), style=style, expression=expression, occlusion=OCCLUSIONS[(number + k) % 5])
        look = replace(look, outfit=OUTFITS[(number + k) % 7], background=BACKGROUNDS[(number + 3 * k) % 10])
        assert pixels(render_face(who, look, size=48).image).std() > 10


def test_sketches_have_no_colours_and_the_others_do(cast):
    saturation = {
        name: np.mean(
            [
                np.ptp(
                    pixels(render_face(cast[k], draw_look((6, k), style=name, light=(255, 255, 255)), 48).image), -1
                ).mean()
                for k in range(10)
            ]
        )
        for name in STYLES
    }
    assert saturation["sketch"] < 12 < 30 < min(saturation[name] for name in STYLES if name != "sketch")


# Identities


def test_any_two_identities_differ_in_a_clear_shape():
    main = make_identities(120, seed=0)
    others = make_identities(40, seed=0, prefix="open", known=tuple(main))
    everybody = main + others
    assert min(a.traits.distance(b.traits) for i, a in enumerate(everybody) for b in everybody[:i]) >= 2


def test_identities_share_their_colours(cast):
    combinations = Counter((who.hair_colour, who.eye_colour) for who in cast)
    assert max(combinations.values()) >= 3
    assert sum(count for count in combinations.values() if count > 1) >= 20


def test_colour_alone_does_not_name_the_character(cast):
    """The nearest neighbour by colour histogram, on whole pictures and on the figures alone, stays below 40 %."""
    figures = {"train": [], "test": []}
    labels = {"train": [], "test": []}
    for split, count in (("train", 14), ("test", 3)):
        for label, who in enumerate(cast):
            for number in range(count):
                picture = render_face(who, draw_look((0, "face", who.name, split, number)), size=48)
                figures[split].append(picture)
                labels[split].append(label)
    for histogram in (rgb_histogram, hue_histogram):
        for masked in (False, True):
            train = np.stack([histogram(p, masked) for p in figures["train"]])
            found = [np.abs(train - histogram(p, masked)).sum(axis=1).argmin() for p in figures["test"]]
            top1 = np.mean(np.array(labels["train"])[found] == np.array(labels["test"]))
            assert 1 / 40 < top1 < 0.40, (histogram.__name__, masked, top1)


def rgb_histogram(picture, masked):
    level = pixels(picture.image) // 32
    return _histogram(level[..., 0] * 64 + level[..., 1] * 8 + level[..., 2], 512, picture, masked)


def hue_histogram(picture, masked):
    hsv = pixels(picture.image.convert("HSV"))
    return _histogram(hsv[..., 0] // 8 * 4 + hsv[..., 1] // 64, 128, picture, masked)


def _histogram(index, bins, picture, masked):
    counted = index[np.asarray(picture.mask) > 0] if masked else index.ravel()
    return np.bincount(counted, minlength=bins) / counted.size


# Splits and frequencies


def test_plan_counts_and_disjoint_splits():
    sizes = Sizes(40, 4000, 1.0, open_identities=7, open_images=3, novel_identities=5, novel_images=4)
    rows = plan(sizes)
    counts = Counter(row.split for row in rows)
    assert counts == {"train": 3200, "val": 400, "test": 400, "open_val": 9, "open_test": 12, "novel": 20}
    people = {split: {(r.kind, r.character) for r in rows if r.split == split} for split in counts}
    assert people["train"] == people["val"] == people["test"]
    apart = [people["train"], people["open_val"], people["open_test"], people["novel"]]
    assert sum(len(p) for p in apart) == len(set.union(*apart)) == 40 + 7 + 5
    per_person = Counter((r.split, r.character) for r in rows if r.kind == "id")
    assert {per_person["train", c] for c in range(40)} == {80}


@pytest.mark.parametrize(
    ("total", "classes", "imbalance"), [(3200, 40, 1.0), (3200, 40, 50.0), (50, 40, 100.0), (7, 1, 9.0)]
)
def test_long_tail(total, classes, imbalance):
    counts = long_tail(total, classes, imbalance)
    assert sum(counts) == total and len(counts) == classes and min(counts) >= 1
    assert counts == sorted(counts, reverse=True)
    if total == 3200:
        assert counts[0] / counts[-1] == pytest.approx(imbalance, rel=0.1)


def test_val_and_test_stay_balanced_in_a_long_tail():
    counts = Counter((row.split, row.character) for row in plan(Sizes(10, 1000, imbalance=20.0)))
    assert counts["train", 0] > 10 * counts["train", 9]
    assert {counts["val", c] for c in range(10)} == {counts["test", c] for c in range(10)} == {10}


# The folder


def test_manifest_is_complete(folder):
    manifest = read_manifest(folder)
    rows = [manifest.row(i) for i in range(len(manifest))]
    assert len(rows) == 72 + 20 + 10
    assert all(value is not None for row in rows for value in row.values())
    assert {row["style"] for row in rows} <= set(STYLES) and {row["pose"] for row in rows} <= set(POSES)
    assert {row["occlusion"] for row in rows} <= set(OCCLUSIONS)
    assert {row["expression"] for row in rows} <= set(EXPRESSIONS)
    assert len({row["source"] for row in rows}) == len(rows)
    for row in rows[::9]:
        with Image.open(folder / row["file_name"]) as image, Image.open(folder / row["mask_file"]) as mask:
            assert (image.size, image.mode) == ((48, 48), "RGB") and (mask.size, mask.mode) == ((48, 48), "L")
            assert set(np.unique(np.asarray(mask))) == {0, 255}
    assert not (folder / ".parts").exists() and not (folder / "unfinished.json").exists()


def digest(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_workers_do_not_change_a_byte(folder, tmp_path):
    write_faces(tmp_path / "two", SMALL, workers=2)
    assert digest(tmp_path / "two") == digest(folder)


def test_another_seed_draws_other_pictures(folder, tmp_path):
    write_faces(tmp_path / "other", replace(SMALL, seed=4), workers=0)
    ours, theirs = digest(folder), digest(tmp_path / "other")
    assert ours.keys() == theirs.keys()
    assert not any(ours[name] == theirs[name] for name in ours if name.startswith("images"))


def test_a_complete_folder_is_left_alone(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert not write_faces(folder, SMALL, workers=0)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError, match="other arguments"):
        write_faces(folder, replace(SMALL, size=64), workers=0)


def test_an_interrupted_run_goes_on(folder, tmp_path, monkeypatch):
    out, draw, drawn = tmp_path / "faces", dataset._draw_face, []

    def stop_half_way(*args):
        drawn.append(args)
        if len(drawn) == 70:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(dataset, "_draw_face", stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        write_faces(out, SMALL, workers=0)
    assert not (out / "metadata.parquet").exists()
    with pytest.raises(UserError, match="unfinished data set with other arguments"):
        write_faces(out, replace(SMALL, seed=9), workers=0)
    drawn.clear()
    monkeypatch.setattr(dataset, "_draw_face", lambda *args: drawn.append(args) or draw(*args))
    assert write_faces(out, SMALL, workers=0)
    assert len(drawn) == 102 - dataset.CHUNK, "the finished chunk is not drawn again"
    assert digest(out) == digest(folder)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(UserError, match="empty it"):
        write_faces(tmp_path, SMALL, workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


# Scenes


def test_scenes(tmp_path):
    recipe = replace(SMALL, scenes=20)
    assert write_scenes(tmp_path / "scenes", recipe, workers=0)
    assert not write_scenes(tmp_path / "scenes", recipe, workers=0)
    manifest = read_manifest(tmp_path / "scenes")
    rows = [manifest.row(i) for i in range(len(manifest))]
    files = Counter(row["file_name"] for row in rows)
    assert len(files) == 20 and max(files.values()) >= 3
    for name in files:
        of_file = [row for row in rows if row["file_name"] == name]
        assert len({row["split"] for row in of_file}) == len({row["source"] for row in of_file}) == 1
    boxes = np.array([row["box"] for row in rows])
    assert (boxes >= 0).all() and (boxes[:, [0, 2]] <= 144).all() and (boxes[:, [1, 3]] <= 96).all()
    side = (boxes[:, 2:] - boxes[:, :2]).min(axis=1)
    assert side.min() < 12 and side.max() > 30
    assert {row["split"] for row in rows} == {"train", "val", "test"}


def test_scenes_have_overlapping_faces_and_count_only_visible_eyes(cast):
    overlaps = hidden = 0
    for number in range(30):
        scene = render_scene(cast, (8, number), 192, 128)
        faces = [face for _, _, face in scene.faces]
        for i, far in enumerate(faces):
            for near in faces[i + 1 :]:
                x1, y1 = np.maximum(far.box[:2], near.box[:2])
                x2, y2 = np.minimum(far.box[2:], near.box[2:])
                overlaps += x2 > x1 and y2 > y1
            hidden += len(far.eyes) < 2
    assert overlaps >= 2 and hidden >= 10


# The command line


@pytest.fixture(scope="module")
def script(import_script):
    return import_script("datasets/prepare_toonfaces.py")


def call(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prepare_toonfaces.py", *map(str, arguments)])
    script.main()


def test_help():
    result = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert "--imbalance" in result.stdout and "px" in result.stdout


def test_command_line(script, monkeypatch, tmp_path, capsys):
    arguments = ("--out", tmp_path / "t", "--identities", 3, "--images", 30, "--open_identities", 0,
                 "--novel_identities", 0, "--size", 48, "--scenes", 2, "--workers", 0)  # fmt: skip
    call(script, monkeypatch, *arguments)
    assert capsys.readouterr().out.count("drawn") == 2
    call(script, monkeypatch, *arguments)
    assert capsys.readouterr().out.count("complete already, nothing to do") == 2
    assert json.loads(read_manifest(tmp_path / "t").metadata["recipe"])["seed"] == 0
    with Image.open(tmp_path / "t" / "sheet.png") as sheet:
        assert sheet.width > sheet.height > 3 * 128


@pytest.mark.parametrize(
    "wrong",
    [
        ("--identities", 0), ("--images", 100), ("--size", 8), ("--size", 5000), ("--imbalance", 0.5),
        ("--imbalance", "nan"), ("--workers", -1), ("--scenes", -2), ("--open_identities", 9000),
    ],
)  # fmt: skip
def test_bad_arguments_end_in_one_line(script, monkeypatch, tmp_path, capsys, wrong):
    with pytest.raises(SystemExit) as stop:
        call(script, monkeypatch, "--out", tmp_path / "t", *wrong)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1
    assert not (tmp_path / "t").exists()
