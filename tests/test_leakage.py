"""Links, components, straddling, repair and identities that are not new: each leak is found, clean data stay clean.

Run: python -m pytest tests/test_leakage.py
"""

from itertools import product

import numpy as np
import pytest

from util.benchmark import leakage
from util.benchmark.leakage import KINDS, Links, Pictures
from util.benchmark.leakage_report import Findings, draw_examples, lines_of, spread
from util.data.phash import Hashes
from util.run.errors import UserError


def codes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


def flip(code, *places: int) -> np.uint64:
    for place in places:
        code = code ^ np.uint64(1 << place)
    return code


def hashes_of(plain: np.ndarray, mirror=None, digest=None, bad=()) -> Hashes:
    mirror = codes(len(plain), 91) if mirror is None else mirror
    digest = codes(len(plain), 92) if digest is None else digest
    return Hashes(plain, mirror, digest, np.zeros(len(plain), bool), list(bad))


def pictures_of(split: str, hashes: Hashes | None = None, *, pool=None, identity=None, source=None, **more) -> Pictures:
    """split: names, or letters of train, val, test, pretrain, open_test (o), open_val (u), novel."""
    letters = {"t": "train", "v": "val", "e": "test", "p": "pretrain", "o": "open_test", "u": "open_val", "n": "novel"}
    count = len(split)
    return Pictures(
        [f"s{i}" for i in range(count)],
        list(pool or "a" * count),
        [letters[letter] for letter in split],
        list(identity) if identity else [None] * count,
        list(source) if source else [None] * count,
        hashes or hashes_of(codes(count, 5)),
        **more,
    )


def found(links: Links) -> list[tuple[int, int, str]]:
    return [(int(a), int(b), KINDS[kind]) for a, b, kind in zip(links.a, links.b, links.kind, strict=True)]


def link_list(*pairs: tuple[int, int]) -> Links:
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    none = np.full(len(table), -1)
    return Links(table[:, 0], table[:, 1], np.ones(len(table), np.int64), none, none.astype(np.float32))


# --- links ------------------------------------------------------------------------------------------------------


def test_each_kind_of_link_is_found_and_nothing_else():
    plain, mirror, digest = codes(12, 1), codes(12, 2), codes(12, 3)
    digest[1] = digest[0]  # 0 and 1: the same pixels
    plain[1], mirror[1] = plain[0], mirror[0]
    plain[3] = flip(plain[2], 0, 9, 33, 63)  # 4 bits
    plain[5] = flip(mirror[4], 7)  # mirrored
    plain[7] = flip(plain[6], 0, 1, 2, 3, 4)  # 5 bits: no link
    source = [None] * 8 + ["album", "album", "other", None]
    links, unsure = leakage.find_links(pictures_of("te" * 6, hashes_of(plain, mirror, digest), source=source))
    assert found(links) == [(0, 1, "identical"), (2, 3, "near"), (4, 5, "mirrored"), (8, 9, "source")]
    assert links.distance.tolist() == [0, 4, 1, -1] and np.isnan(links.cosine).all()
    assert found(unsure) == [(6, 7, "near")] and unsure.distance.tolist() == [5]


def test_clean_pictures_have_no_link():
    links, unsure = leakage.find_links(pictures_of("tve" * 100))
    assert not len(links.a) and not len(unsure.a)


@pytest.mark.parametrize("distance, expected", [(3, 0), (4, 1), (16, 1)])
def test_the_distance_is_the_limit(distance, expected):
    plain = codes(2)
    plain[1] = flip(plain[0], 1, 20, 40, 60)
    links, _ = leakage.find_links(pictures_of("te", hashes_of(plain)), distance=distance, far=0)
    assert len(links.a) == expected


def test_far_pairs_are_links_where_embeddings_agree():
    plain = codes(40, 4)
    for row in (1, 3, 5):
        plain[row] = flip(plain[row - 1], 0, 10, 20, 30, 40, 50)
    embeddings = np.random.default_rng(0).normal(size=(40, 24)).astype(np.float32)
    embeddings[1] = embeddings[0] + 0.1  # agrees
    embeddings[5] = np.nan  # 2 and 3 do not agree, 4 and 5 are not known
    pictures = pictures_of("te" * 20, hashes_of(plain), embeddings=embeddings)
    links, unsure = leakage.find_links(pictures, cosine=0.9999)
    assert found(links) == [(0, 1, "near")] and links.distance.tolist() == [6] and links.cosine[0] > 0.95
    assert [pair[:2] for pair in found(unsure)] == [(2, 3), (4, 5)]
    links, _ = leakage.find_links(pictures, cosine=0.95, far=4)
    assert found(links) == [(0, 1, "embedding")] and links.distance.tolist() == [-1]


def test_faces_link_pictures_whose_surroundings_differ():
    faces = codes(6, 8)
    faces[3] = flip(faces[0], 2, 3)
    faces[5] = flip(faces[4], 2, 3, 50)
    pictures = pictures_of("tvtete", hashes_of(codes(6)), faces=hashes_of(faces))
    links, _ = leakage.find_links(pictures)
    assert found(links) == [(0, 3, "face")] and links.distance.tolist() == [2]
    links, _ = leakage.find_links(pictures, face_distance=3)
    assert found(links) == [(0, 3, "face"), (4, 5, "face")]


def test_a_pair_comes_once_as_its_strongest_kind():
    plain = codes(4)
    plain[1], plain[2] = plain[0], flip(plain[0], 5)
    digest = codes(4, 3)
    digest[1] = digest[0]
    embeddings = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    embeddings[1] = embeddings[2] = embeddings[0]
    pictures = pictures_of("ttee", hashes_of(plain, digest=digest), source="xxxx", embeddings=embeddings)
    links, _ = leakage.find_links(pictures)
    kinds = {(a, b): kind for a, b, kind in found(links)}
    assert len(kinds) == len(links.a)
    assert kinds[0, 1] == "identical" and kinds[0, 2] == kinds[1, 2] == "near" and kinds[0, 3] == "source"


@pytest.mark.parametrize("ignore, expected", [(["near"], "embedding"), (["near", "embedding"], "source")])
def test_an_ignored_kind_hides_no_weaker_one(ignore, expected):
    plain = codes(3)
    plain[1] = flip(plain[0], 5)
    embeddings = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    embeddings[1] = embeddings[0]
    pictures = pictures_of("tev", hashes_of(plain), source=["x", "x", None], embeddings=embeddings)
    assert found(leakage.find_links(pictures, ignore=ignore)[0]) == [(0, 1, expected)]


def test_identical_pictures_are_linked_as_such_only():
    """Also those beyond the first of their side, which hash and embedding would link as well."""
    hashes = hashes_of(codes(8)[[0] * 6 + [6, 7]], np.zeros(8, np.uint64), codes(8)[[0] * 6 + [6, 7]])
    embeddings = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)[[0] * 6 + [6, 7]]
    links, _ = leakage.find_links(pictures_of("tttteeee", hashes, embeddings=embeddings), cosine=0.999)
    assert {kind for *_, kind in found(links)} == {"identical"}
    assert sorted(pair[:2] for pair in found(links)) == [(0, row) for row in range(1, 6)] + [
        (row, 4) for row in range(1, 4)
    ] + [(4, 5)]


def test_sources_and_unreadable_pictures_of_two_pools_are_not_the_same():
    hashes = hashes_of(np.zeros(4, np.uint64), np.zeros(4, np.uint64), np.zeros(4, np.uint64))
    hashes = Hashes(hashes.plain, hashes.mirror, hashes.digest, hashes.blank, [(row, "p", "r") for row in range(4)])
    links, _ = leakage.find_links(pictures_of("tete", hashes, pool="aabb", source="1111"))
    assert found(links) == [(0, 1, "source"), (2, 3, "source")]


def test_blank_pictures_are_linked_only_where_they_are_identical():
    zeros = np.zeros(4, np.uint64)
    digest = np.array([1, 1, 2, 3], np.uint64)
    links, _ = leakage.find_links(pictures_of("tete", Hashes(zeros, zeros, digest, np.ones(4, bool), [])))
    assert found(links) == [(0, 1, "identical")]


def test_links_within_a_group_join_it_and_tell_every_picture_that_leaks():
    """A source of 300 pictures on three sides: a link to the first of each side, not 300 * 299 / 2."""
    split = "".join(np.random.default_rng(3).choice(list("tve"), 300))
    pictures = pictures_of(split, hashes_of(codes(300)), source=["album"] * 300)
    links, _ = leakage.find_links(pictures)
    side, sides = pictures.sides()
    assert len(links.a) <= 300 * 3
    assert len(np.unique(leakage.components(300, links.a, links.b))) == 1
    leaking = leakage.leaks(links, side, leakage.forbidden_sides(sides))
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        own = leaking.take(np.isin(side[leaking.a], (one, other)) & np.isin(side[leaking.b], (one, other)))
        rows = set(own.a.tolist()) | set(own.b.tolist())
        assert rows == set(np.flatnonzero(np.isin(side, (one, other))).tolist())


# --- embeddings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_pairs_by_cosine_equal_brute_force(block):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(90, 3)).astype(np.float32)
    embeddings[[4, 50]] = np.nan
    embeddings[7, 1] = np.inf
    vectors = leakage.centred(embeddings)
    good = np.isfinite(embeddings).all(1)
    own = embeddings[good] - embeddings[good].mean(0)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    assert np.allclose(vectors[good], own, atol=1e-5) and np.isnan(vectors[~good]).all()
    a, b = leakage.cosine_pairs(vectors, 0.9, block)
    table = np.full((90, 90), -2.0)
    table[np.ix_(good, good)] = own @ own.T
    assert list(zip(a.tolist(), b.tolist(), strict=True)) == [tuple(p) for p in np.argwhere(np.triu(table, 1) >= 0.9)]
    assert len(a) > 50


def test_a_threshold_that_tells_nothing_apart_is_refused():
    embeddings = np.random.default_rng(0).normal(size=(1500, 4)).astype(np.float32)
    pictures = pictures_of("te" * 750, hashes_of(codes(1500)), embeddings=embeddings)
    with pytest.raises(UserError, match=r"of random pairs .* give a --cosine above 0\.\d+"):
        leakage.find_links(pictures, cosine=0.8)


def test_random_pairs_show_what_is_ordinary():
    vectors = leakage.centred(np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32))
    values = leakage.random_cosines(vectors)
    table = (vectors @ vectors.T)[np.triu_indices(500, 1)]
    assert abs(np.quantile(values, 0.99) - np.quantile(table, 0.99)) < 0.02 and values.max() < 0.9999
    assert not len(leakage.random_cosines(np.full((3, 2), np.nan, np.float32)))


# --- components and sides ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("links", [0, 30, 80, 300])
def test_components_equal_those_of_scipy(links):
    from scipy.sparse import coo_array  # slow to import
    from scipy.sparse.csgraph import connected_components

    a, b = np.random.default_rng(links).integers(0, 120, (2, links))
    got = leakage.components(120, a, b)
    expected = connected_components(coo_array((np.ones(links), (a, b)), shape=(120, 120)), directed=False)[1]
    assert len(set(zip(got.tolist(), expected.tolist(), strict=True))) == len(set(got)) == len(set(expected))
    for own in set(got.tolist()):
        assert np.flatnonzero(got == own)[0] == own  # named by its first row
    assert np.array_equal(got, leakage.components(120, b[::-1], a[::-1]))


def test_a_long_chain_is_one_component():
    rows = np.arange(300_000)
    assert not leakage.components(len(rows), rows[1:], rows[:-1]).any()


def test_which_sides_may_not_share_a_picture():
    sides = [("a", "train"), ("a", "pretrain"), ("a", "val"), ("a", "open_test"), ("b", "train"), ("b", "test")]
    forbidden = leakage.forbidden_sides(sides)
    allowed = {(0, 1), (0, 4), (1, 4), (2, 5), (3, 5)}  # both trained on, or both held out in different pools
    for i, j in product(range(6), repeat=2):
        assert forbidden[i, j] == (i != j and (min(i, j), max(i, j)) not in allowed), (sides[i], sides[j])


def test_what_is_trained_on_can_be_told():
    sides = [("a", "train"), ("b", "recon_test"), ("c", "train")]
    assert leakage.forbidden_sides(sides).astype(int).tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    chosen = leakage.forbidden_sides(sides, {("a", "train"), ("b", "recon_test")})
    assert chosen.astype(int).tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]


def straddles(component, side, forbidden) -> set[int]:
    return {
        int(component[i])
        for i, j in product(range(len(side)), repeat=2)
        if component[i] == component[j] and forbidden[side[i], side[j]]
    }


def random_case(seed: int) -> tuple[Pictures, Links, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    count = 60
    pictures = pictures_of(
        "".join(rng.choice(list("tveouvnp"), count)),
        pool="".join(rng.choice(list("aab"), count)),
        identity=rng.choice(["x", "y", "z"], count).tolist(),
    )
    pairs = [sorted(pair) for pair in rng.integers(0, count, (rng.integers(5, 50), 2)).tolist() if pair[0] != pair[1]]
    links = link_list(*{tuple(pair) for pair in pairs})
    side, sides = pictures.sides()
    forbidden = leakage.forbidden_sides(sides)
    return pictures, links, leakage.components(count, links.a, links.b), side, forbidden


@pytest.mark.parametrize("seed", range(8))
def test_straddling_components_equal_brute_force(seed):
    _, links, component, side, forbidden = random_case(seed)
    expected = straddles(component, side, forbidden)
    assert leakage.straddling(component, side, forbidden).tolist() == sorted(expected) and expected
    leaking = leakage.leaks(links, side, forbidden)
    direct = [(a, b) for a, b in zip(links.a, links.b, strict=True) if forbidden[side[a], side[b]]]
    assert list(zip(leaking.a, leaking.b, strict=True)) == direct


def test_a_chain_through_a_harmless_side_straddles():
    """a:train - a:pretrain may be joined, and b:test with neither, though no link joins it to a:train itself."""
    pictures = pictures_of("tpe", pool="aab")
    side, sides = pictures.sides()
    component = leakage.components(3, np.array([0, 1]), np.array([1, 2]))
    assert leakage.straddling(component, side, leakage.forbidden_sides(sides)).tolist() == [0]


def test_leaks_are_counted_by_kind_and_side():
    pictures = pictures_of("ttteev")
    side, sides = pictures.sides()
    links = link_list((0, 3), (0, 4), (1, 3), (2, 5))
    links = links._replace(kind=np.array([0, 1, 1, 1]))
    table = leakage.count_leaks(links, side, sides)
    assert [(row["kind"], row["pairs"]) for row in table] == [("identical", 1), ("near", 2), ("near", 1)]
    near = table[1]["sides"]
    assert [(own["split"], own["pictures"]) for own in near] == [("train", 2), ("test", 2)]
    assert leakage.count_leaks(link_list(), side, sides) == []


# --- repair -----------------------------------------------------------------------------------------------------


def again(pictures: Pictures, split: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows that are left, their sides, and which of these may not be joined."""
    rows = np.array([row for row, own in enumerate(split) if own is not None])
    left = [(pictures.pool[row], split[row]) for row in rows]
    sides = list(dict.fromkeys(left))
    return rows, np.array([sides.index(own) for own in left]), leakage.forbidden_sides(sides)


@pytest.mark.parametrize("seed, move", product(range(12), (False, True)))
def test_no_component_straddles_after_the_repair(seed, move):
    pictures, _, component, side, forbidden = random_case(seed)
    repaired = leakage.repair(pictures, component, forbidden, move=move)
    rows, new_side, new_forbidden = again(pictures, repaired.split)
    assert not len(leakage.straddling(component[rows], new_side, new_forbidden))
    assert not straddles(component[rows], new_side, new_forbidden)
    assert repaired.dropped == 60 - len(rows)
    moved = [row for row in rows if repaired.split[row] != pictures.split[row]]
    assert repaired.moved == len(moved) and (move or not moved)
    harmless = ~np.isin(component, leakage.straddling(component, side, forbidden))
    assert all(repaired.split[row] == pictures.split[row] for row in np.flatnonzero(harmless))


@pytest.mark.parametrize(
    "split, expected",
    [("te", [None, "test"]), ("tv", [None, "val"]), ("ve", [None, "test"]), ("po", [None, "open_test"]),
     ("tve", [None, None, "test"]), ("uo", [None, "open_test"]), ("tp", ["train", "pretrain"]),
     ("nt", ["novel", None])],
)  # fmt: skip
def test_training_yields_to_validation_and_both_to_the_test(split, expected):
    pictures = pictures_of(split)
    _, sides = pictures.sides()
    component = np.zeros(len(split), np.int64)
    repaired = leakage.repair(pictures, component, leakage.forbidden_sides(sides))
    assert repaired.split == expected and repaired.dropped == expected.count(None)


def test_a_split_of_another_name_is_held_out():
    pictures = Pictures(["0", "1"], ["a", "a"], ["recon_test", "pretrain"], [None] * 2, [None] * 2, hashes_of(codes(2)))
    _, sides = pictures.sides()
    assert leakage.repair(pictures, np.zeros(2, int), leakage.forbidden_sides(sides)).split == ["recon_test", None]


def test_pictures_move_only_where_their_identity_is_known():
    pictures = pictures_of("teteteo", pool="aaaabbb", identity=["x", "x", "y", "x", "x", "x", "z"])
    component = np.array([0, 0, 1, 1, 2, 3, 2])
    _, sides = pictures.sides()
    repaired = leakage.repair(pictures, component, leakage.forbidden_sides(sides), move=True)
    # 0 joins the test; y is not in a's test; an open split does not know x
    assert repaired.split == ["test", "test", None, "test", None, "test", "open_test"]
    assert (repaired.moved, repaired.dropped) == (1, 2)
    across = pictures_of("te", pool="ab", identity="xx")
    repaired = leakage.repair(across, np.zeros(2, int), leakage.forbidden_sides(across.sides()[1]), move=True)
    assert repaired.split == [None, "test"]


def test_identities_that_yield_are_dropped_before_anything_else():
    """The picture of the open identity goes, so the training picture it was linked to may stay."""
    pictures = pictures_of("to", identity="xx")
    forbidden = leakage.forbidden_sides(pictures.sides()[1])
    yielding = leakage.not_new(pictures, leakage.identity_leaks(pictures))
    assert yielding.tolist() == [False, True]
    assert leakage.repair(pictures, np.zeros(2, int), forbidden, yielding=yielding).split == ["train", None]


def test_identities_without_training_are_counted():
    pictures = pictures_of("ttte", identity="xxyx")
    assert leakage.lost_identities(pictures, ["train", None, "train", "test"]) == 0
    assert leakage.lost_identities(pictures, [None, None, "train", "test"]) == 1


# --- identities -------------------------------------------------------------------------------------------------


def names_that_leak(split: str, identity: list, pool=None, **more) -> list[tuple[str, str, list[tuple[str, str]]]]:
    leaks = leakage.identity_leaks(pictures_of(split, identity=identity, pool=pool), **more)
    return [
        (leak.unknown.split, leak.unknown.identity, [(own.identity, why) for own, why in leak.seen]) for leak in leaks
    ]


@pytest.mark.parametrize(
    "known, unknown, reason",
    [
        ("lancer", "lancer_(fate/zero)", "alias"),
        ("rin_toosaka", "toosaka_rin", "name"),
        ("Toosaka Rin", "toosaka_rin", "name"),
        ("000_hatsune_miku", "000_hatsune_miku", "name"),
        ("fujimaru_ritsuka_(male)", "fujimaru_ritsuka_(female)", "alias"),
        ("kasumi_(doa)", "kasumi_(pokemon)", None),
        ("akagi_(kantai_collection)", "akagi_(azur_lane)", None),
        ("person_1_2", "person_2_1", None),
    ],
)
def test_aliases_across_splits_that_must_differ(known, unknown, reason):
    expected = [("open_test", unknown, [(known, reason)])] if reason else []
    assert names_that_leak("to", [known, unknown]) == expected


def test_a_name_that_may_be_either_of_two_is_ambiguous():
    got = names_that_leak("tto", ["kasumi_(doa)", "kasumi_(pokemon)", "kasumi"])
    assert got == [("open_test", "kasumi", [("kasumi_(doa)", "ambiguous"), ("kasumi_(pokemon)", "ambiguous")])]
    assert names_that_leak("tto", ["kasumi_(doa)", "kasumi_(pokemon)", "kasumi"], ignore=["ambiguous"]) == []


def test_which_splits_may_share_an_identity():
    free = ["tve", "pto", "no", "nu", "po"]
    bound = {"to": "open_test", "vo": "open_test", "eu": "open_val", "tn": "novel", "uo": "open_val"}
    for split in free:
        identity = ["x"] * len(split) if split != "pto" else ["x", "y", "x"]
        assert names_that_leak(split, identity) == [], split
    for split, loser in bound.items():
        assert [leak[0] for leak in names_that_leak(split, ["x", "x"])] == [loser], split


def test_identities_of_two_pools():
    """What one pool trained on is not new in another; numbers mean nothing across pools."""
    assert names_that_leak("to", ["rei", "rei"], "ab") == [("open_test", "rei", [("rei", "name")])]
    assert names_that_leak("to", ["004_ayanami_rei", "rei_ayanami"], "ab")[0][2] == [("004_ayanami_rei", "name")]
    assert names_that_leak("eo", ["rei", "rei"], "ab") == []
    assert names_that_leak("to", ["1001", "1001"], "ab") == []
    assert names_that_leak("to", ["1001", "1001"], "aa") == [("open_test", "1001", [("1001", "name")])]


def test_numbers_in_front_are_kept_where_they_tell_people_apart():
    assert names_that_leak("tto", ["001_girl", "002_girl", "003_girl"]) == []


def test_other_names_can_be_declared():
    assert names_that_leak("to", ["horo", "holo"]) == []
    assert names_that_leak("to", ["horo", "holo"], same_as={"horo": "holo"}) == [
        ("open_test", "holo", [("horo", "name")])
    ]


# --- the report -------------------------------------------------------------------------------------------------


@pytest.fixture
def findings() -> Findings:
    plain = codes(30, 6)
    for a, b, n in ((0, 1, 0), (2, 3, 2), (4, 5, 4), (6, 7, 6), (8, 10, 1)):
        plain[b] = flip(plain[a], *range(n))
    pictures = pictures_of("te" * 15, hashes_of(plain), identity=["x", "y"] * 15)
    links, unsure = leakage.find_links(pictures)
    forbidden = leakage.forbidden_sides(pictures.sides()[1])
    return Findings(pictures, links, unsure, forbidden, leakage.identity_leaks(pictures))


def test_the_report_counts_what_was_found(findings):
    report = findings.report()
    assert not report["clean"] and report["straddling_components"] == 3 and report["unconfirmed_pairs"] == 1
    assert report["components"] == 26 and report["links"]["near"] == 4 and len(report["pairs"]) == 3
    assert report["straddling"] == [[f"a:train s{i}", f"a:test s{i + 1}"] for i in (0, 2, 4)]
    assert report["pairs"][1]["distance"] == 2 and report["pairs"][1]["b"]["sample_id"] == "s3"
    text = "\n".join(lines_of(report))
    assert "LEAK near: 3 pairs, a:train (3 pictures) - a:test (3 pictures)" in text and "3 components straddle" in text


def test_ignored_kinds_make_a_report_clean(findings):
    pictures = findings.pictures
    links, unsure = leakage.find_links(pictures, ignore=["near"])
    report = Findings(pictures, links, unsure, findings.forbidden, []).report()
    assert report["clean"] and lines_of(report)[-1] == "clean"


def test_cosines_are_reported_to_choose_thresholds_by(findings):
    embeddings = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    embeddings[3], embeddings[29] = embeddings[2], np.nan
    pictures = pictures_of("te" * 15, findings.pictures.hashes, embeddings=embeddings)
    report = Findings(pictures, *leakage.find_links(pictures), findings.forbidden, []).report()
    assert report["cosine"]["missing"] == 1 and report["cosine"]["random_pairs"]["0.9999"] <= 1
    own = [findings.links.distance <= 2]
    rows = findings.links.take(own[0])
    vectors = leakage.centred(embeddings)
    expected = np.quantile((vectors[rows.a] * vectors[rows.b]).sum(1), 0.5)
    assert report["cosine"]["near_duplicates"]["0.5"] == pytest.approx(float(expected), abs=1e-3)


def test_examples_are_spread_over_kinds_and_distances():
    links = link_list(*((i, 100 + i) for i in range(60)))
    links = links._replace(kind=np.array([1] * 50 + [2] * 8 + [5] * 2), distance=np.arange(60) % 5)
    shown = spread(links, 12)
    assert len(shown) == len(set(shown)) <= 12
    by_kind = {kind: [i for i in shown if links.kind[i] == kind] for kind in (1, 2, 5)}
    assert len(by_kind[5]) == 2 and len(by_kind[2]) >= 4 and len(by_kind[1]) >= 4
    assert {int(links.distance[i]) for i in by_kind[1]} >= {0, 4}
    assert spread(link_list(), 5) == []


def test_the_picture_shows_both_of_each_pair(findings):
    from PIL import Image

    asked = []
    picture = draw_examples(findings, lambda row: asked.append(row) or Image.new("RGB", (40, 40), "red"), 16)
    assert sorted(asked) == list(range(8))  # three leaks, and the pair that was not counted
    red = (np.asarray(picture) == (255, 0, 0)).all(2).sum()
    assert red == 8 * 128 * 128
    empty = findings.pictures
    nothing = Findings(empty, link_list(), link_list(), findings.forbidden, [])
    assert draw_examples(nothing, lambda row: None, 16) is None
