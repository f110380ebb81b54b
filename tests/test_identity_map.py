"""Names of one character in several data sets, and the map and the lists made from them.

The lines of label files here are a few of the real ones. Run: python -m pytest tests/test_identity_map.py
"""

import csv
import json
import os
from itertools import combinations
from pathlib import Path

import pytest
from helpers import fails

from util.data.identity_names import (
    alias_groups,
    base_name,
    clashes,
    may_be_same,
    normalise,
    parse_name,
    without_number,
)

REAL = Path(os.environ.get("ANIMASK_LABELS", "nowhere"))
needs_labels = pytest.mark.skipif(
    not all((REAL / name).is_file() for name in ("acrd/tagIds.tsv", "dafre/test.csv", "moeimouto/test.csv")),
    reason="ANIMASK_LABELS does not name the folder of the released label files",
)

MOEIMOUTO = """class_id,class_name
1,004_takamachi_nanoha
21,026_tohsaka_rin
97,013_saber
105,015_c.c
115,065_sanzenin_nagi
131,137_sonsaku_hakufu
132,000_hatsune_miku
153,035_yoko
173,173_reina
"""
DAFRE = """33,hatsune_miku
34,takamachi_nanoha
50,toosaka_rin
61,c.c.
206,kasumi_(doa)
375,kasumi_(pokemon)
404,lancer
700,mithra
841,lancer_(fate/zero)
1742,kasumi_(kantai_collection)
1900,sanzen'in_nagi
"""
ACRD = """miyu_(vampire_princess_miyu)\t0
hatsune_miku\t1
takamachi_nanoha\t2
yoko_littner\t3
kasumi\t4
kasumi_(doa)\t5
li_"xiaolang"\t6
sonsaku_hakufu\t7
reina_prowler\t8
mithra\t9
"""


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Takamachi Nanoha", "takamachi_nanoha"),
        ("takamachi__nanoha_", "takamachi_nanoha"),
        ("Takamachi-Nanoha", "takamachi_nanoha"),
        ("C.C.", "cc"),
        ("sanzen'in_nagi", "sanzenin_nagi"),
        ('li_"xiaolang"', "li_xiaolang"),
        ("Kasumi (Dead or Alive)", "kasumi_(dead_or_alive)"),
        ("lancer_(Fate/Zero)", "lancer_(fate/zero)"),
        ("ＫＡＳＵＭＩ（ＤＯＡ）", "kasumi_(doa)"),
        ("魔法少女 小圆", "魔法少女_小圆"),
    ],
)
def test_spelling_is_levelled(text, expected):
    assert normalise(text) == expected and normalise(expected) == expected


@pytest.mark.parametrize(
    "text, base, series, forms",
    [
        ("hatsune_miku", "hatsune_miku", None, ()),
        ("lancer_(fate/zero)", "lancer", "fate/zero", ()),
        ("fujimaru_ritsuka_(female)", "fujimaru_ritsuka", None, ("female",)),
        ("raikou_(swimsuit_lancer)_(fate)", "raikou", "fate", ("swimsuit_lancer",)),
        ("gardevoir_(female)_(pokemon)", "gardevoir", "pokemon", ("female",)),
        ("(unknown)", "(unknown)", "unknown", ()),
    ],
)
def test_names_are_taken_apart(text, base, series, forms):
    name = parse_name(text)
    assert (name.base, name.series, name.forms) == (base, series, forms)


def test_the_number_in_front_is_left_out():
    assert without_number("004_takamachi_nanoha") == "takamachi_nanoha"
    assert without_number("103_c.c") == "c.c"
    for name in ("1001", "12_34", "takamachi_004", "2b_(nier)"):
        assert without_number(name) == name


def test_base_names_are_tags_without_their_last_qualifiers():
    assert base_name("kasumi_(doa)") == base_name("kasumi_(a)_(b)") == "kasumi"
    for tag in ("reily_(kuro)_black", "macon_(steelblue", "kasumi", "(x)"):
        assert base_name(tag) == tag


def reason(one: str, other: str, *beside: str, **more) -> str | None:
    first, second, *_ = alias_groups([one, other, *beside], **more)
    assert may_be_same(first, second) == may_be_same(second, first)
    return may_be_same(first, second)


@pytest.mark.parametrize(
    "one, other, expected",
    [
        ("toosaka_rin", "rin_toosaka", "name"),
        ("Toosaka Rin", "toosaka_rin", "name"),
        ("c.c", "c.c.", "name"),
        ("rin_toosaka_(fate)", "toosaka_rin_(fate)", "name"),
        ("lancer", "lancer_(fate/zero)", "alias"),
        ("lancer_(fate/stay_night)", "lancer_(fate/zero)", "alias"),
        ("nina_(breath_of_fire_ii)", "nina_(breath_of_fire_v)", "alias"),
        ("anna_(fire_emblem)", "anna_(fire_emblem_if)", "alias"),
        ("asahina_mikuru", "asahina_mikuru_(adult)", "alias"),
        ("kasumi_(doa)", "kasumi_(pokemon)", None),
        ("kaga_(kantai_collection)", "kaga_(azur_lane)", None),
        ("nagato_yuki", "nagato_yuri", None),
        ("i_26", "26_i", None),
        ("a_b", "b_a", None),
        ("yuki", "yuki_nagato", None),
    ],
)
def test_who_may_be_one_person(one, other, expected):
    assert reason(one, other) == expected


def test_a_name_without_a_series_beside_several_is_ambiguous():
    assert reason("kasumi", "kasumi_(doa)") == "alias"
    assert reason("kasumi", "kasumi_(doa)", "kasumi_(pokemon)") == "ambiguous"
    assert reason("kasumi_(doa)", "kasumi_(pokemon)", "kasumi") is None
    assert reason("kasumi", "kasumi_(young)", "kasumi_(doa)", "kasumi_(pokemon)") == "alias"


def test_another_name_can_be_declared():
    assert reason("horo", "holo") is None
    assert reason("horo", "holo", same_as={"horo": "holo"}) == "name"


def test_spelling_does_not_split_a_canonical_name():
    """The most frequent order of the names stands for all."""
    aliases = alias_groups(["rin_toosaka", "toosaka_rin", "Toosaka Rin", "toosaka_rin_(young)"])
    assert [alias.canonical for alias in aliases] == ["toosaka_rin"] * 3 + ["toosaka_rin_(young)"]
    assert len({alias.group for alias in aliases}) == 1


def test_races_are_generic_and_persons_of_their_name_are_not():
    found = {
        alias.name: alias.generic for alias in alias_groups(["mithra", "Miqo'te", "mithra_(psyren)", "hume", "rei"])
    }
    assert found == {"mithra": True, "Miqo'te": True, "mithra_(psyren)": False, "hume": True, "rei": False}


def test_clashes_equal_those_of_all_pairs():
    names = ["kasumi", "kasumi_(doa)", "kasumi_(pokemon)", "rin_a", "a_rin", "lancer", "lancer_(fate)", "x", "mithra"]
    aliases = alias_groups(names * 2)
    ours, theirs = aliases[: len(names)], aliases[len(names) :]
    expected = [(a, b, may_be_same(a, b)) for a in ours for b in theirs if may_be_same(a, b)]
    assert clashes(ours, theirs) == expected and len(expected) > len(names)


def test_groups_are_classes():
    """Two names of one group may be one person, and names of two groups of one base only where one is ambiguous."""
    names = [f"{base}{end}" for base in ("a_kun", "kun_a", "bo", "cee_dee", "dee_cee")
             for end in ("", "_(fate)", "_(fate/zero)", "_(pokemon)", "_(young)")]  # fmt: skip
    for one, other in combinations(alias_groups(names), 2):
        why = may_be_same(one, other)
        if one.group == other.group:
            assert why in ("name", "alias")
        else:
            assert why in (None, "ambiguous") and (why is None or one.ambiguous or other.ambiguous)


# --- the script -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script(import_script):
    return import_script("datasets/identity_map.py")


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    texts = {"moeimouto": MOEIMOUTO, "dafre": DAFRE, "acrd": ACRD}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    return {name: tmp_path / f"{name}.txt" for name in texts}


def flags(files: dict[str, Path], *more) -> list[str]:
    return [str(part) for name, path in files.items() for part in (f"--{name}", path)] + [str(part) for part in more]


def rows_of(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_map_brings_names_together(script, files, tmp_path):
    script.main(flags(files, "--out", tmp_path / "map.csv"))
    rows = rows_of(tmp_path / "map.csv")
    assert len(rows) == 9 + 11 + 10
    assert list(rows[0]) == ["canonical", "dataset", "class_id", "name", "alias_group", "ambiguous", "generic"]
    groups = {}
    for row in rows:
        groups.setdefault(row["alias_group"], set()).add((row["dataset"], row["name"]))
    assert groups["hatsune_miku"] == {
        ("moeimouto", "000_hatsune_miku"), ("dafre", "hatsune_miku"), ("acrd", "hatsune_miku")
    }  # fmt: skip
    assert groups["toosaka_rin"] == {("moeimouto", "026_tohsaka_rin"), ("dafre", "toosaka_rin")}
    assert groups["yoko_littner"] == {("moeimouto", "035_yoko"), ("acrd", "yoko_littner")}
    assert groups["sanzenin_nagi"] == {("moeimouto", "065_sanzenin_nagi"), ("dafre", "sanzen'in_nagi")}
    assert groups["lancer"] == {("dafre", "lancer"), ("dafre", "lancer_(fate/zero)")}
    assert groups["kasumi_(doa)"] == {("dafre", "kasumi_(doa)"), ("acrd", "kasumi_(doa)")}
    assert groups["kasumi_(pokemon)"] == {("dafre", "kasumi_(pokemon)")}
    flagged = {key: {row["name"] for row in rows if row[key] == "1"} for key in ("ambiguous", "generic")}
    assert flagged == {"ambiguous": {"kasumi"}, "generic": {"mithra"}}
    assert next(row for row in rows if row["name"] == "013_saber")["class_id"] == "97"


def test_the_map_does_not_depend_on_the_order_of_the_files(script, files, tmp_path):
    script.main(flags(files, "--out", tmp_path / "a.csv"))
    for path, text in zip(files.values(), (MOEIMOUTO, DAFRE, ACRD), strict=True):
        head, *lines = text.splitlines()
        lines = [head, *lines[::-1]] if head.startswith("class_id") else [*lines[::-1], head]
        path.write_text("\n".join(lines) + "\n")
    script.main(flags(files, "--out", tmp_path / "b.csv"))
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()


def test_lists_hold_nobody_the_other_data_may_have(script, files, tmp_path):
    script.main(flags(files, "--lists", tmp_path / "lists"))
    names = {
        path.stem: {row["class_name"] for row in rows_of(path)} for path in (tmp_path / "lists").glob("*_without_*.csv")
    }
    assert len(names) == 6
    assert names["moeimouto_without_dafre"] == {"013_saber", "137_sonsaku_hakufu", "035_yoko", "173_reina"}
    assert names["moeimouto_without_acrd"] == {
        "026_tohsaka_rin",
        "013_saber",
        "015_c.c",
        "065_sanzenin_nagi",
        "173_reina",
    }
    # kasumi of acrd may be any of the three, and mithra is a race
    assert names["dafre_without_acrd"] == {"toosaka_rin", "c.c.", "lancer", "lancer_(fate/zero)", "sanzen'in_nagi"}
    assert "kasumi_(pokemon)" in names["dafre_without_moeimouto"] and "mithra" not in names["dafre_without_moeimouto"]
    report = json.loads((tmp_path / "lists" / "lists.json").read_text())
    own = report["lists"]["dafre_without_acrd"]
    assert own == {"kept": 5, "name": 4, "alias": 0, "ambiguous": 2, "generic": 0} and sum(own.values()) == 11
    assert report["counts"]["moeimouto names in dafre"] == 2
    assert report["counts"]["dafre base names shared"] == 2
    assert report["counts"]["dafre names that share a base"] == 5


@pytest.mark.parametrize("trained", [["rei", "rei_(young)"], ["rei_(young)", "rei"]])
def test_the_strongest_reason_is_counted(script, trained):
    aliases = alias_groups(["rei", "asuka", *trained])
    kept, counts = script.without_overlap(aliases[:2], aliases[2:])
    assert kept == [1] and counts == {"kept": 1, "name": 1, "alias": 0, "ambiguous": 0, "generic": 0}


def test_test_pictures_that_acrd_trained_on_are_left_out(script, tmp_path):
    for split, ids in {"train": "11\n12\n13", "val": "21\n", "test": "31"}.items():  # the last line without its end
        (tmp_path / f"{split}Split.tsv").write_text(ids)
    listed = ["0,0011/11.jpg", "0,0021/21.jpg", "1,0031/31.jpg", "1,0013/13.jpg", "2,0099/99.jpg"]
    (tmp_path / "test.csv").write_text("\n".join(listed) + "\n")
    own = ["--acrd_splits", str(tmp_path), "--dafre_test", str(tmp_path / "test.csv")]
    script.main([*own, "--lists", str(tmp_path / "lists")])
    rows = rows_of(tmp_path / "lists" / "dafre_test_without_acrd_train.csv")
    assert [(row["class_id"], row["dir"], row["acrd_split"]) for row in rows] == [
        ("0", "0021/21.jpg", "val"), ("1", "0031/31.jpg", "test"), ("2", "0099/99.jpg", "")
    ]  # fmt: skip
    counts = json.loads((tmp_path / "lists" / "lists.json").read_text())["counts"]
    assert counts == {
        "dafre test pictures": 5,
        "dafre test pictures in acrd train": 2,
        "dafre test pictures in acrd val": 1,
        "dafre test pictures in acrd test": 1,
    }


def test_counts_that_differ_from_the_published_ones_are_told(script, files, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(flags(files, "--check"))
    said = capsys.readouterr().out
    assert stop.value.code == 1 and "differs: moeimouto identities: 9 found, 173 published" in said
    assert "0 of 9 counts equal" in said


@pytest.mark.parametrize(
    "own, said",
    [
        ([], "nothing to map"),
        (["--dafre", "nowhere.csv", "--check"], "--dafre nowhere.csv does not exist"),
        (["--dafre", "{dafre}"], "nothing to write"),
        (["--dafre", "{empty}", "--check"], "lists no names"),
        (["--dafre", "{acrd}", "--check"], "1 fields, not 2"),
        (["--acrd", "{dafre}", "--check"], "line 1: 1 fields, not 2"),
        (["--moeimouto", "{swapped}", "--check"], "are no numbers"),
        (["--acrd_splits", "nowhere", "--check"], "go together"),
        (["--acrd_splits", "nowhere", "--dafre_test", "{dafre}", "--check"], "trainSplit.tsv does not exist"),
    ],
)
def test_refusals_are_one_line(script, capsys, files, tmp_path, own, said):
    (tmp_path / "empty.csv").write_text("class_id,class_name\n")
    (tmp_path / "swapped.csv").write_text("hatsune_miku,0\n")
    places = {**files, "empty": tmp_path / "empty.csv", "swapped": tmp_path / "swapped.csv"}
    assert said in fails(script.main, capsys, [flag.format(**places) for flag in own])


def test_declared_tags_are_distinct_names_that_differ_from_their_own(script):
    tags = script.MOEIMOUTO_TAGS
    assert len(set(tags.values())) == len(tags)
    for name, tag in tags.items():
        assert parse_name(name) != parse_name(tag)


@needs_labels
def test_the_published_counts_of_the_real_files(script, tmp_path, capsys):
    own = ["--moeimouto", REAL / "moeimouto/classid_classname.csv", "--dafre", REAL / "dafre/classid_classname.csv"]
    own += ["--acrd", REAL / "acrd/tagIds.tsv", "--acrd_splits", REAL / "acrd", "--dafre_test", REAL / "dafre/test.csv"]
    script.main([str(flag) for flag in (*own, "--check", "--lists", tmp_path, "--out", tmp_path / "map.csv")])
    assert "13 of 13 counts equal the published ones" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "dafre_test_without_acrd_train.csv")) == 94_440 - 91_061
    groups = {}
    for row in rows_of(tmp_path / "map.csv"):
        if row["dataset"] == "dafre":
            groups.setdefault(row["alias_group"], set()).add(row["name"])
    assert groups["lancer"] == {"lancer", "lancer_(fate/zero)"}
    assert groups["kasumi_(doa)"] == {"kasumi_(doa)"}
    # each declared tag is a class of one of the other sets
    with open(REAL / "acrd/tagIds.tsv", encoding="utf-8") as file:
        tags = {line.split("\t")[0] for line in file}
    assert set(script.MOEIMOUTO_TAGS.values()) <= tags
