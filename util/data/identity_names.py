"""Names of characters in different data sets: one spelling for one name, and which names may be one person.

A name is a base and qualifiers in parentheses, as Danbooru writes it: lancer_(fate/zero). Spelling is levelled (case,
spaces, hyphens, apostrophes, dots) and so is the order of given and family name: rin_toosaka is toosaka_rin. Names of
one base are one person where their series agree, or where only one series is known for the base and the other name
has none. Names of different series are different people: kasumi_(doa) and kasumi_(pokemon). A name without a series
beside several of them is ambiguous: it may be any of these, and they are still not one another.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

# Races and kinds that data sets list as characters; the first five are the ones DAF:re is known for, the others are
# the playable races of the same games.
GENERIC = frozenset((
    "mithra", "elvaan", "hume", "inkling", "octoling",
    "tarutaru", "galka", "miqote", "au_ra", "lalafell", "hyur", "elezen", "roegadyn", "viera",
))  # fmt: skip
# qualifiers that tell a form of the same person, not a series
FORMS = frozenset((
    "character", "all", "male", "female", "young", "younger", "old", "older", "adult", "child", "teen", "original",
    "new", "alter", "lily", "human", "human_form", "true_form", "anime", "manga", "movie", "cosplay", "swimsuit",
    "summer", "bride", "maid", "santa", "halloween", "school_uniform",
))  # fmt: skip


@dataclass(frozen=True)
class Name:
    """A name taken apart. text: as given, spelling levelled. base: no qualifiers. series, forms: the qualifiers."""

    text: str
    base: str
    series: str | None
    forms: tuple[str, ...]

    @property
    def key(self) -> str:
        """The base without regard to the order of given and family name."""
        tokens = self.base.split("_")
        # names made of numbers or letters (person_1_2, class_a_b) are codes: there the order means something
        words = all(len(token) > 1 and token.isalpha() for token in tokens)
        return "_".join(sorted(tokens)) if words else self.base


@dataclass(frozen=True)
class Alias:
    """What is known of one name among others.

    canonical: one spelling for all that differ in spelling only. group: equal for names that may be one person.
    base: equal for names of one base, whatever the series. ambiguous: it may belong to several groups of its base.
    generic: not a person but a race or a kind.
    """

    name: str
    canonical: str
    group: str
    base: str
    ambiguous: bool
    generic: bool


def normalise(text: str) -> str:
    """One spelling: lower case, words joined by "_", no apostrophes, dots or other marks; parentheses and "/" stay."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"[\s_\-]+", "_", text)
    text = "".join(letter for letter in text if letter.isalnum() or letter in "_()/")
    text = re.sub(r"_*\(_*", "_(", text)
    return re.sub(r"_+", "_", re.sub(r"_*\)", ")", text)).strip("_")


def without_number(name: str) -> str:
    """004_takamachi_nanoha -> takamachi_nanoha; a name without a number in front stays as it is."""
    return re.sub(r"^\d+_+(?=.*[^\W\d_])", "", name)


def base_name(tag: str) -> str:
    """A tag without the qualifiers at its end: the grouping that the counts known for DAF:re and ACRD go by."""
    return re.sub(r"_\(.*\)$", "", tag)


def parse_name(text: str) -> Name:
    """Take a name apart. The last qualifier that is not one of FORMS is the series; the others are forms."""
    levelled = normalise(text)
    qualifiers = re.findall(r"\(([^()]*)\)", levelled)
    base = normalise(re.sub(r"\([^()]*\)", "", levelled)) or levelled
    known = [qualifier for qualifier in qualifiers if qualifier and qualifier not in FORMS]
    series = known[-1] if known else None
    forms = tuple(sorted(qualifier for qualifier in qualifiers if qualifier and qualifier != series))
    return Name(levelled, base, series, forms)


def alias_groups(
    names: Sequence[str], *, same_as: Mapping[str, str] | None = None, generic: Collection[str] = GENERIC
) -> list[Alias]:
    """Group names, an Alias for each, in order. A name's group depends on which other names there are.

    same_as: {name: other name} of people known under quite another name; the other name takes its place. generic:
    bases that are no persons, in the spelling of `normalise`.
    """
    parsed = [parse_name((same_as or {}).get(name, name)) for name in names]
    clusters: dict[str, list[Name]] = {}
    for name in parsed:
        clusters.setdefault(name.key, []).append(name)
    worlds = {key: _worlds({name.series for name in members} - {None}) for key, members in clusters.items()}
    spelling = {key: _first_spelling(name.base for name in members) for key, members in clusters.items()}
    found = []
    for name, own in zip(names, parsed, strict=True):
        here, base = worlds[own.key], spelling[own.key]
        several = len(set(here.values())) > 1
        group = base
        if several and own.series:
            group = f"{base}_({here[own.series]})"
        qualifiers = [*own.forms, *([own.series] if own.series else [])]
        canonical = "_".join([base, *(f"({qualifier})" for qualifier in qualifiers)])
        kind = own.base in generic and own.series is None
        found.append(Alias(name, canonical, group, own.key, several and own.series is None, kind))
    return found


def may_be_same(one: Alias, other: Alias) -> str | None:
    """Why two names of one `alias_groups` call may be one person: "name", "alias", "ambiguous"; None if not."""
    if one.base != other.base:
        return None
    if one.canonical == other.canonical:
        return "name"
    if one.group == other.group:
        return "alias"
    return "ambiguous" if one.ambiguous or other.ambiguous else None


def clashes(ours: Iterable[Alias], theirs: Iterable[Alias]) -> list[tuple[Alias, Alias, str]]:
    """All pairs, one of ours and one of theirs, that may be one person, with the reason, in our order.

    Generic names clash too: a model that was trained on a race has seen whoever the other data call by its name.
    """
    by_base: dict[str, list[Alias]] = {}
    for alias in theirs:
        by_base.setdefault(alias.base, []).append(alias)
    pairs = [(one, other, may_be_same(one, other)) for one in ours for other in by_base.get(one.base, ())]
    return [pair for pair in pairs if pair[2]]


def _worlds(series: set[str]) -> dict[str, str]:
    """Series -> the one it belongs to: fate/zero and fate/stay_night to fate, fire_emblem_if to fire_emblem."""
    found: dict[str, str] = {}
    for own in sorted(series, key=lambda text: (len(text), text)):
        top = re.sub(r"(_([ivx]+|\d+))+$", "", own.split("/", 1)[0]) or own
        found[own] = next((world for world in found.values() if top == world or top.startswith(world + "_")), top)
    return found


def _first_spelling(bases: Iterable[str]) -> str:
    """The most frequent spelling of a base, the first in the alphabet among equals."""
    counts = Counter(bases)
    return min(counts, key=lambda base: (-counts[base], base))
