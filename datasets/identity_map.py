"""Who is who across moeImouto, DAF:re and ACRD: a map of their names, and evaluation lists without an overlap.

    python datasets/identity_map.py --moeimouto moe/classid_classname.csv --dafre labels/classid_classname.csv \\
        --acrd tagIds.tsv --out identity_map.csv --lists lists
    python datasets/identity_map.py --acrd_splits acrd --dafre_test labels/test.csv --lists lists

The map has a row for each identity: canonical, dataset, class_id, name, alias_group, ambiguous, generic. Names of one
alias_group may be one person (util/data/identity_names.py has the rules); an ambiguous name may belong to any group of
its base; a generic one is a race or a kind. lists/B_without_A.csv are the identities of B that nobody in A may be: for
testing on B what was trained on A. The second command lists the test pictures of DAF:re that are not in the training
split of ACRD, which DAF:re was made from.
"""

import csv
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.data.identity_names import Alias, alias_groups, base_name, clashes, without_number
from util.data.prepare import parse_numbers, read_table, read_text
from util.run.args import Parser
from util.run.errors import UserError, cli
from util.run.files import write_atomically
from util.run.log import write_json

COLUMNS = ("canonical", "dataset", "class_id", "name", "alias_group", "ambiguous", "generic")
# moeImouto's short or otherwise romanised names, and the tag of the same character: paired from memory, the tags were
# checked to exist, no picture was looked at. Names that could be several characters ("reina", "midori") are left out.
MOEIMOUTO_TAGS = {
    "black_rock_shooter": "black_rock_shooter_(character)",
    "canal_volphied": "canal_vorfeed",
    "golden_darkness": "konjiki_no_yami",
    "horo": "holo",
    "ito_chika": "itou_chika",
    "ito_nobue": "itou_nobue",
    "kanu": "kan'u_unchou",
    "li_syaoran": "li_xiaolang",
    "louise": "louise_francoise_le_blanc_de_la_valliere",
    "maria": "maria_(hayate_no_gotoku!)",
    "nia": "nia_teppelin",
    "rollo_lamperouge": "rolo_lamperouge",
    "saber": "artoria_pendragon_(all)",
    "seto_san": "seto_sun",
    "tohsaka_rin": "toosaka_rin",
    "yoko": "yoko_littner",
}
# what is known of the released label files (notes of this project, counted by others before)
PUBLISHED = {
    "moeimouto identities": 173,
    "dafre identities": 3_263,
    "acrd identities": 70_095,
    "moeimouto names in dafre": 133,
    "moeimouto names in acrd": 154,
    "dafre base names shared": 78,
    "dafre names that share a base": 168,
    "acrd base names shared": 4_300,
    "acrd names that share a base": 15_425,
    "dafre test pictures": 94_440,
    "dafre test pictures in acrd train": 91_061,
    "dafre test pictures in acrd val": 1_696,
    "dafre test pictures in acrd test": 1_683,
}


def get_parser() -> Parser:
    parser = Parser("Map identities across data sets, and list what is left without an overlap.")
    parser.add_argument("--moeimouto", metavar="CSV", help="classid_classname.csv of moeImouto: class_id,class_name")
    parser.add_argument("--dafre", metavar="CSV", help="classid_classname.csv of DAF:re: class_id,class_name")
    parser.add_argument("--acrd", metavar="TSV", help="tagIds.tsv of ACRD: name, tab, id")
    parser.add_argument("--out", metavar="CSV", help="the map to write")
    parser.add_argument("--lists", metavar="OUT", help="folder for evaluation lists and lists.json")
    parser.add_argument("--acrd_splits", metavar="DIR", help="folder of ACRD's trainSplit, valSplit, testSplit.tsv")
    parser.add_argument("--dafre_test", metavar="CSV", help="test.csv of DAF:re: class_id,dir")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the counts with the published ones; exit status 1 where they differ",
    )
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    names = read_names(args)
    if bool(args.acrd_splits) != bool(args.dafre_test):
        raise UserError("--acrd_splits and --dafre_test go together: give both")
    if not names and not args.acrd_splits:
        raise UserError("there is nothing to map: give two of --moeimouto, --dafre, --acrd")
    if not (args.out or args.lists or args.check):
        raise UserError("there is nothing to write: give --out CSV, --lists OUT or --check")
    counts = count_names(names)
    known = name_aliases(names)
    if args.out and names:
        write_rows(Path(args.out), COLUMNS, map_rows(names, known))
        groups = {alias.group for aliases in known.values() for alias in aliases}
        counts["alias groups"] = len(groups)
        print(f"{args.out}: {sum(map(len, names.values()))} names of {', '.join(names)}, {len(groups)} alias groups")
    report = {}
    for trained, tested in permutations(names, 2):
        kept, reasons = without_overlap(known[tested], known[trained])
        report[f"{tested}_without_{trained}"] = reasons
        if args.lists:
            rows = [names[tested][i] for i in kept]
            write_rows(Path(args.lists) / f"{tested}_without_{trained}.csv", ("class_id", "class_name"), rows)
        print(f"{tested}, of a model trained on {trained}: {', '.join(f'{key} {n}' for key, n in reasons.items())}")
    if args.acrd_splits:
        rows = acrd_overlap(Path(args.acrd_splits), Path(args.dafre_test), counts)
        if args.lists:
            write_rows(Path(args.lists) / "dafre_test_without_acrd_train.csv", ("class_id", "dir", "acrd_split"), rows)
        print(f"dafre test pictures that are not in acrd's train split: {len(rows)}")
    if args.lists:
        write_json(Path(args.lists) / "lists.json", {"counts": counts, "lists": report})
    if args.check:
        check(counts)


# --- names ------------------------------------------------------------------------------------------------------


def read_names(args) -> dict[str, list[tuple[str, str]]]:
    """Data set -> (class_id, class_name) of its identities, as its file has them."""
    names = {}
    for dataset, separator, columns in (
        ("moeimouto", ",", ("class_id", "class_name")),
        ("dafre", ",", ("class_id", "class_name")),
        ("acrd", "\t", ("class_name", "class_id")),
    ):
        path = getattr(args, dataset)
        if path is None:
            continue
        if not Path(path).is_file():
            raise UserError(f"--{dataset} {path} does not exist: give the label file of the release")
        rows = read_tags(Path(path)) if separator == "\t" else read_table(Path(path), columns, separator)
        if not rows:
            raise UserError(f"--{dataset} {path} lists no names: get the file again")
        if columns[0] == "class_name":
            rows = [(number, name) for name, number in rows]
        parse_numbers((number for number, _ in rows), int, f"--{dataset} {path}")
        names[dataset] = [(number, name) for number, name in rows]
    return names


def read_tags(path: Path) -> list[tuple[str, str]]:
    """The rows of tagIds.tsv. Its names hold quotation marks that quote nothing, so it is no CSV with tabs."""
    rows = [line.split("\t") for line in read_text(path).splitlines() if line]
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise UserError(f"{path}, line {number}: {len(row)} fields, not 2 (name, id): give tagIds.tsv of ACRD")
    return [(name, number) for name, number in rows]


def plain(dataset: str, name: str) -> str:
    """The name without the number that moeImouto puts in front."""
    return without_number(name) if dataset == "moeimouto" else name


def name_aliases(names: dict[str, list[tuple[str, str]]]) -> dict[str, list[Alias]]:
    """Data set -> an Alias for each of its names; all data sets are grouped together."""
    spelled = [
        MOEIMOUTO_TAGS.get(plain(dataset, name), plain(dataset, name)) if dataset == "moeimouto" else name
        for dataset, rows in names.items()
        for _, name in rows
    ]
    aliases = iter(alias_groups(spelled))
    return {dataset: [next(aliases) for _ in rows] for dataset, rows in names.items()}


def map_rows(names, known) -> list[tuple]:
    """The rows of the map, sorted so that those of one group stand together."""
    rows = [
        (alias.canonical, dataset, number, name, alias.group, int(alias.ambiguous), int(alias.generic))
        for dataset, own in names.items()
        for (number, name), alias in zip(own, known[dataset], strict=True)
    ]
    return sorted(rows, key=lambda row: (row[4], row[0], row[1], int(row[2])))


def without_overlap(tested: list[Alias], trained: list[Alias]) -> tuple[list[int], dict[str, int]]:
    """The identities that stay, and how many do, and how many go for each reason."""
    order = {"name": 0, "alias": 1, "ambiguous": 2}
    reason_of: dict[Alias, str] = {}
    for own, _, reason in clashes(tested, trained):
        reason_of[own] = min(reason, reason_of.get(own, reason), key=order.__getitem__)
    counts = dict.fromkeys(("kept", *order, "generic"), 0)
    kept = []
    for i, own in enumerate(tested):
        reason = reason_of.get(own) or ("generic" if own.generic else "kept")
        counts[reason] += 1
        if reason == "kept":
            kept.append(i)
    return kept, counts


def count_names(names: dict[str, list[tuple[str, str]]]) -> dict[str, int]:
    """What the published counts are of: names as they are written, and base names."""
    counts = {}
    written = {dataset: {plain(dataset, name) for _, name in rows} for dataset, rows in names.items()}
    for dataset, rows in names.items():
        counts[f"{dataset} identities"] = len(rows)
        if dataset == "moeimouto":
            continue
        shared = {base: n for base, n in Counter(base_name(name) for _, name in rows).items() if n > 1}
        counts[f"{dataset} base names shared"] = len(shared)
        counts[f"{dataset} names that share a base"] = sum(shared.values())
        if "moeimouto" in written:
            counts[f"moeimouto names in {dataset}"] = len(written["moeimouto"] & written[dataset])
    return counts


# --- pictures ---------------------------------------------------------------------------------------------------


def acrd_overlap(folder: Path, test: Path, counts: dict[str, int]) -> list[tuple[str, str, str]]:
    """The rows of DAF:re's test list whose picture is not in ACRD's train split: class_id, dir, ACRD's split or ""."""
    split_of = {}
    for split in ("train", "val", "test"):
        path = folder / f"{split}Split.tsv"
        if not path.is_file():
            raise UserError(f"{path} does not exist: --acrd_splits is the folder of the three lists of ACRD")
        split_of.update(dict.fromkeys(read_text(path).split(), split))
    if not test.is_file():
        raise UserError(f"--dafre_test {test} does not exist: give test.csv of DAF:re")
    rows = [(number, name, split_of.get(Path(name).stem, "")) for number, name in read_table(test, ("class_id", "dir"))]
    found = Counter(split for *_, split in rows)
    counts["dafre test pictures"] = len(rows)
    counts.update({f"dafre test pictures in acrd {split}": found[split] for split in ("train", "val", "test")})
    return [row for row in rows if row[2] != "train"]


# --- what is written --------------------------------------------------------------------------------------------


def write_rows(path: Path, columns, rows) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(rows)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)


def check(counts: dict[str, int]) -> None:
    """Compare what was counted with what is published."""
    different = [name for name, number in PUBLISHED.items() if counts.get(name, number) != number]
    for name in different:
        print(f"differs: {name}: {counts[name]} found, {PUBLISHED[name]} published")
    same = sum(name in counts for name in PUBLISHED) - len(different)
    print(f"check: {same} of {same + len(different)} counts equal the published ones")
    if different:
        sys.exit(1)


if __name__ == "__main__":
    main()
