"""Perceptual hashes: the exact variant, what they survive, and the search for near-duplicates, against brute force.

Run: python -m pytest tests/test_phash.py
"""

import numpy as np
import pytest
from PIL import Image, ImageOps

from util.data import phash
from util.data.face_crop import FaceCrops
from util.data.manifest import read_manifest, write_manifest
from util.data.phash import Hashes, dct_hash, hamming_pairs, hash_images, join_hashes, near_pairs, popcount
from util.data.sources import FolderSource


def smooth(seed: int, size=(96, 80), grid: int = 7) -> Image.Image:
    """A picture with large structures."""
    coarse = np.random.default_rng(seed).integers(0, 256, (grid, grid, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def as_hashes(plain, mirror=None, blank=None, bad=()) -> Hashes:
    plain = np.asarray(plain, dtype=np.uint64)
    mirror = np.zeros_like(plain) if mirror is None else np.asarray(mirror, dtype=np.uint64)
    blank = np.zeros(len(plain), bool) if blank is None else np.asarray(blank)
    return Hashes(plain, mirror, plain, blank, list(bad))


def bits(a, b) -> int:
    return (int(a) ^ int(b)).bit_count()


def flipped(code: int, places) -> int:
    for place in places:
        code ^= 1 << int(place)
    return code


# --- the hash ---------------------------------------------------------------------------------------------------


def test_the_hash_is_the_documented_variant():
    from scipy.fft import dctn  # slow to import

    pictures = [smooth(seed) for seed in range(40)]
    grey = [np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), float) for image in pictures]
    low = dctn(np.stack(grey), axes=(1, 2), type=2, norm="ortho")[:, :8, :8].reshape(40, 64)
    median = np.median(low[:, 1:], axis=1)
    low[:, 0] = 0.0
    expected = [int("".join("1" if value > limit else "0" for value in row), 2) for row, limit in zip(low, median)]  # noqa: B905
    got = dct_hash(np.stack([phash.grey_square(image) for image in pictures]))
    assert got.dtype == np.uint64 and got.tolist() == expected


def test_the_hash_of_given_pixels_is_a_constant_of_nature():
    """Another number here means that hashes stored by earlier versions cannot be compared any more."""
    y, x = np.mgrid[:32, :32]
    pixels = ((x * x * 3 + y * 37 + (x * y) % 29 * 5) % 256).astype(np.uint8)
    got = dct_hash(np.stack([pixels, pixels[:, ::-1], pixels[::-1]]))
    assert [hex(value) for value in got] == ["0xc26d94b7464b59b4", "0x9738c1f2575e45c1", "0xc29a947a46f6516b"]


def test_the_transform_is_exact_integer_arithmetic():
    basis = phash._BASIS
    assert np.array_equal(basis, np.rint(basis))
    grey = np.random.default_rng(1).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    low = basis @ grey.astype(np.float64) @ basis.T
    exact = basis.astype(object).astype(int).astype(object) @ grey.astype(object) @ basis.T.astype(int).astype(object)
    assert np.array_equal(low, exact.astype(np.float64)) and np.abs(exact).max() < 2**53


@pytest.mark.parametrize("shape, kind", [((2, 32, 31), np.uint8), ((2, 32, 32), np.float32)])
def test_other_arrays_are_refused(shape, kind):
    with pytest.raises(ValueError, match="uint8"):
        dct_hash(np.zeros(shape, kind))


def test_a_copy_that_was_re_encoded_resized_or_mirrored_is_near(tmp_path):
    paths = []
    for seed in range(12):
        image = smooth(seed)
        image.save(tmp_path / f"{seed}.png")
        image.save(tmp_path / f"{seed}-q.jpg", quality=50)
        image.resize((48, 40), Image.Resampling.BILINEAR).save(tmp_path / f"{seed}-half.png")
        ImageOps.mirror(image).save(tmp_path / f"{seed}-mirror.jpg", quality=60)
        paths += [tmp_path / f"{seed}{end}" for end in (".png", "-q.jpg", "-half.png", "-mirror.jpg")]
    hashes = hash_images(paths)
    plain, mirror = hashes.plain, hashes.mirror
    for i in range(0, len(paths), 4):
        assert bits(plain[i], plain[i + 1]) <= 4 and bits(plain[i], plain[i + 2]) <= 4
        assert bits(mirror[i], plain[i + 3]) <= 4 and bits(plain[i], plain[i + 3]) > 8
    pairs = near_pairs(hashes, 4)
    found = {(int(a), int(b)): bool(m) for a, b, m in zip(pairs.a, pairs.b, pairs.mirrored, strict=True)}
    assert all(a // 4 == b // 4 for a, b in found)  # different pictures stay apart
    assert len(found) == 12 * 6
    assert all(mirrored == (b % 4 == 3) for (_, b), mirrored in found.items())


def test_the_mirror_hash_is_that_of_the_mirrored_picture(tmp_path):
    image = smooth(3, size=(64, 64))
    image.save(tmp_path / "a.png")
    ImageOps.mirror(image).save(tmp_path / "b.png")
    hashes = hash_images([tmp_path / "a.png", tmp_path / "b.png"])
    assert hashes.mirror[0] == hashes.plain[1] and hashes.mirror[1] == hashes.plain[0]
    assert hashes.digest[0] != hashes.digest[1]


# --- reading ----------------------------------------------------------------------------------------------------


def test_damaged_and_blank_pictures_are_told(tmp_path):
    smooth(0).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    Image.new("RGB", (50, 50), (200, 10, 10)).save(tmp_path / "blank.png")
    almost = np.full((50, 50, 3), 100, np.uint8)
    almost[:25] += 7
    Image.fromarray(almost).save(tmp_path / "almost.png")
    names = ["good.png", "bad.png", "blank.png", "almost.png", "missing.png"]
    hashes = hash_images([tmp_path / name for name in names])
    assert [row for row, *_ in hashes.bad] == [1, 4] and hashes.bad[0][1].endswith("bad.png")
    assert hashes.blank.tolist() == [False, False, True, True, False]
    assert hashes.readable.tolist() == [True, False, True, True, False]
    assert hashes.comparable.tolist() == [True, False, False, False, False]
    assert hashes.plain[1] == hashes.plain[4] == 0
    assert not len(near_pairs(hashes, 16).a)


def test_the_same_pixels_have_one_digest_in_any_file(tmp_path):
    image = smooth(1)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.bmp")
    image.save(tmp_path / "c.jpg")
    image.resize((80, 96)).save(tmp_path / "d.png")
    digest = hash_images(sorted(tmp_path.iterdir())).digest
    assert digest[0] == digest[1] and len(set(digest.tolist())) == 3


def test_order_and_numbers_do_not_depend_on_the_threads(tmp_path):
    paths = []
    for seed in range(150):  # more than two chunks
        paths.append(tmp_path / f"{seed}.png")
        smooth(seed, (20, 20)).save(paths[-1])
    (tmp_path / "140.png").write_bytes(b"")
    alone, done = hash_images(paths, workers=1), []
    shared = hash_images(paths, workers=5, advance=done.append)
    for name in ("plain", "mirror", "digest", "blank"):
        assert np.array_equal(getattr(alone, name), getattr(shared, name))
    assert sum(done) == 150 and alone.bad == shared.bad and alone.bad[0][0] == 140
    expected = [hash_images([path]).plain[0] for path in paths[:3] + paths[-3:]]
    assert expected == [*alone.plain[:3], *alone.plain[-3:]]
    assert len(hash_images([])) == 0


def test_rows_that_share_a_file_are_decoded_once_but_their_faces_each(tmp_path):
    smooth(0).save(tmp_path / "two.png")
    smooth(1).save(tmp_path / "one.png")
    boxes = {"a": [0, 0, 30, 30], "b": [50, 40, 90, 78], "c": [5, 5, 40, 40]}
    files = {"a": "two.png", "b": "two.png", "c": "one.png"}
    write_manifest(
        tmp_path, [{"sample_id": k, "file_name": files[k], "split": "train", "box": boxes[k]} for k in "abc"]
    )
    source = FolderSource("x", read_manifest(tmp_path))
    loads, plain_load = [], source.load
    source.load = lambda row: loads.append(row) or plain_load(row)
    whole = hash_images(source)
    assert sorted(loads) == [0, 2] and whole.plain[0] == whole.plain[1] != whole.plain[2]
    faces = hash_images(FaceCrops(source, 0.0))
    assert len(set(faces.plain.tolist())) == 3 and faces.plain[0] != whole.plain[0]


def test_a_damaged_file_is_told_for_each_of_its_rows(tmp_path):
    (tmp_path / "x.png").write_bytes(b"nothing")
    hashes = hash_images([tmp_path / "x.png"] * 3)
    assert [row for row, *_ in hashes.bad] == [0, 1, 2]


def test_joined_hashes_keep_their_bad_rows():
    one = as_hashes([1, 2], bad=[(1, "p", "r")])
    other = as_hashes([3, 4, 5], bad=[(0, "q", "s")])
    joined = join_hashes([one, other])
    assert joined.plain.tolist() == [1, 2, 3, 4, 5]
    assert joined.bad == [(1, "p", "r"), (2, "q", "s")]
    assert joined.readable.tolist() == [True, False, False, True, True]


# --- the search -------------------------------------------------------------------------------------------------


def clustered(count: int, seed: int) -> np.ndarray:
    """Codes around some centres, so that all small distances occur, with repetitions."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64, max(1, count // 8), dtype=np.uint64)
    codes = []
    for _ in range(count):
        places = rng.choice(64, rng.integers(0, 7), replace=False)
        codes.append(flipped(int(rng.choice(centres)), places))
    return np.array(codes, dtype=np.uint64)


def brute(codes: np.ndarray, distance: int) -> list[tuple[int, int, int]]:
    table = [[bits(a, b) for b in codes] for a in codes]
    return [(i, j, table[i][j]) for i in range(len(codes)) for j in range(i + 1, len(codes)) if table[i][j] <= distance]


@pytest.mark.parametrize("distance", [0, 1, 4, 5, 8, 12])
def test_the_search_equals_brute_force(distance):
    codes = clustered(150, distance)
    found = list(zip(*(part.tolist() for part in hamming_pairs(codes, distance)), strict=True))
    assert found == brute(codes, distance) and len(found) >= (1, 10)[distance > 0]


@pytest.mark.parametrize("codes", [0, 1, 2])
def test_a_search_among_hardly_anything(codes):
    found = hamming_pairs(np.arange(codes, dtype=np.uint64), 4)
    assert [part.tolist() for part in found] == ([[0], [1], [1]] if codes == 2 else [[], [], []])


@pytest.mark.parametrize("distance", [-1, 17])
def test_distances_it_cannot_search_are_refused(distance):
    with pytest.raises(ValueError, match="0 to 16"):
        hamming_pairs(np.zeros(2, np.uint64), distance)


@pytest.mark.parametrize("distance", [0, 3, 4, 8, 16])
@pytest.mark.parametrize("codes", [10, 10_000, 1_000_000, 100_000_000])
def test_any_pair_within_the_distance_agrees_in_some_bucket(distance, codes):
    """The pigeonhole, for every size of the data, so for every choice of bands."""
    masks = [int(mask) for mask in phash._masks(distance, codes)]
    rng = np.random.default_rng(distance)
    spread = [np.linspace(0, 63, distance).round().astype(int)] if distance else [[]]
    for places in [*spread, *(rng.choice(64, distance, replace=False) for _ in range(100))]:
        assert any(not mask & flipped(0, places) for mask in masks)
    assert all(mask for mask in masks)


def test_more_codes_are_searched_in_narrower_buckets():
    widths = [min(int(mask).bit_count() for mask in phash._masks(4, codes)) for codes in (100, 1_000_000, 10**9)]
    assert widths[0] < widths[1] < widths[2]


def brute_pairs(hashes: Hashes, distance: int) -> list[tuple[int, int, int, bool]]:
    rows = np.flatnonzero(hashes.comparable).tolist()
    found = []
    for place, a in enumerate(rows):
        for b in rows[place + 1 :]:
            plain = bits(hashes.plain[a], hashes.plain[b])
            mirrored = min(bits(hashes.plain[a], hashes.mirror[b]), bits(hashes.mirror[a], hashes.plain[b]))
            if min(plain, mirrored) <= distance:
                found.append((a, b, min(plain, mirrored), mirrored < plain))
    return found


@pytest.mark.parametrize("distance", [0, 4, 8])
def test_pairs_of_pictures_equal_brute_force(distance):
    both = clustered(240, 11)
    blank = np.zeros(120, bool)
    blank[[5, 80]] = True
    hashes = as_hashes(both[:120], both[120:], blank, bad=[(7, "p", "r"), (99, "q", "s")])
    pairs = near_pairs(hashes, distance)
    found = list(zip(*(part.tolist() for part in pairs), strict=True))
    assert found == brute_pairs(hashes, distance)
    assert {mirrored for *_, mirrored in found} == {False, True}
    assert not {5, 7, 80, 99} & {row for a, b, *_ in found for row in (a, b)}


def test_the_mirror_counts_from_either_side_and_two_mirrors_do_not():
    a, b = 0x0F0F0F0F0F0F0F0F, 0x123456789ABCDEF0
    far = 0xFFFFFFFF00000000
    pairs = near_pairs(as_hashes([a, b], [far, flipped(a, [0, 9])]), 4)
    assert (pairs.a.tolist(), pairs.b.tolist(), pairs.distance.tolist()) == ([0], [1], [2])
    pairs = near_pairs(as_hashes([a, b], [flipped(b, [3]), far]), 4)
    assert pairs.distance.tolist() == [1] and pairs.mirrored.tolist() == [True]
    assert not len(near_pairs(as_hashes([a, b], [far, far]), 4).a)


def test_a_symmetrical_picture_is_no_pair_with_itself():
    assert not len(near_pairs(as_hashes([5, 2**60 - 1], [5, 2**60 - 1]), 4).a)


@pytest.mark.parametrize("numpy_2", [True, False])
def test_popcount(monkeypatch, numpy_2):
    if not numpy_2:
        monkeypatch.delattr(np, "bitwise_count", raising=False)
    codes = np.array([0, 1, 2**64 - 1, 0xF0F0, 2**63], dtype=np.uint64)
    codes = np.concatenate([codes, np.random.default_rng(0).integers(0, 2**64, 200, dtype=np.uint64)])
    assert popcount(codes).tolist() == [int(code).bit_count() for code in codes]
    assert popcount(codes[::2]).tolist() == [int(code).bit_count() for code in codes[::2]]
    assert popcount(codes[:0]).tolist() == []
