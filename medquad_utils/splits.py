"""Templates, groups by disease, the split that keeps them apart, and what leaks between its parts."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any
from zlib import crc32

from medquad_utils import CourseError
from medquad_utils.files import COLUMNS, REQUIRED
from medquad_utils.files import Row as Row

# MedQuAD's question templates; the group is the focus.
TEMPLATES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^what is \(are\) (?P<focus>.+?) \?$",
        r"^what are the symptoms of (?P<focus>.+?) \?$",
        r"^what are the treatments for (?P<focus>.+?) \?$",
        r"^is (?P<focus>.+?) inherited \?$",
        r"^how many people are affected by (?P<focus>.+?) \?$",
        r"^what are the genetic changes related to (?P<focus>.+?) \?$",
        r"^what causes (?P<focus>.+?) \?$",
        r"^how to diagnose (?P<focus>.+?) \?$",
        r"^what research \(or clinical trials\) is being done for (?P<focus>.+?) \?$",
        r"^what is the outlook for (?P<focus>.+?) \?$",
        r"^who is at risk for (?P<focus>.+?)\? \?$",
        r"^what to do for (?P<focus>.+?) \?$",
        r"^how to prevent (?P<focus>.+?) \?$",
        r"^what are the stages of (?P<focus>.+?) \?$",
        r"^what are the complications of (?P<focus>.+?) \?$",
        r"^where to find support for people with (?P<focus>.+?) \?$",
        r"^do you have information about (?P<focus>.+?)$",
    )
)


def template_of(question: str) -> tuple[int, str] | None:
    """Which of ``TEMPLATES`` a question follows, and the disease it names; ``None`` for a question of another form."""
    for number, template in enumerate(TEMPLATES):
        if match := template.match(question.strip()):
            return number, match["focus"]
    return None


def normalise(text: str | None) -> str:
    """Lower case, punctuation out, single spaces: how names and questions are compared."""
    return " ".join(re.sub(r"[^\w\s]|_", " ", (text or "").lower()).split())


def focus_of(row: Row) -> str:
    """What a row is about, normalised: its focus, or what its question's template names, or "" if neither says it."""
    if row["focus"]:
        return normalise(row["focus"])
    found = template_of(row["question"])
    return normalise(found[1]) if found else ""


RARE = 5  # a concept ("Syndrome") that more foci than this carry joins nothing
BOILERPLATE = (
    10  # an answer that more foci than this carry is boilerplate, and joins nothing either
)


def boilerplate(rows: Sequence[Row]) -> dict[str, int]:
    """Answers that more than ``BOILERPLATE`` foci carry, each with their number, the most common first."""
    foci: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        foci[row["answer"]].add(focus_of(row))
    counts = {answer: len(names) for answer, names in foci.items() if len(names) > BOILERPLATE}
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))


def groups(rows: Sequence[Row]) -> list[int]:
    """A group number for each row; rows that share something which only their disease has are one group.

    Joined are rows with the same focus, normalised question, URL, rare CUI, or answer that is no boilerplate. Rows without
    any focus are one group.
    """
    foci = [focus_of(row) for row in rows]
    keys: list[list[tuple[str, str]]] = []
    carried: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row, focus in zip(rows, foci, strict=True):
        widely = [("cui", cui) for cui in row["cui"] or ()] + [("answer", row["answer"])]
        for key in widely:
            carried[key].add(focus)
        own = [
            ("focus", focus),
            ("question", normalise(row["question"])),
            *([("url", row["url"])] if row["url"] else []),
        ]
        keys.append(own + widely)
    most = {"cui": RARE, "answer": BOILERPLATE}
    return _connected(
        [[k for k in ks if k not in carried or len(carried[k]) <= most[k[0]]] for ks in keys]
    )


def _connected(keys: Sequence[Sequence[tuple[str, str]]]) -> list[int]:
    """Component of each element when elements that share a key are joined (union-find, paths halved)."""
    parent = list(range(len(keys)))

    def find(x: int) -> int:
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    owner: dict[tuple[str, str], int] = {}
    for number, mine in enumerate(keys):
        for key in mine:
            parent[find(number)] = find(owner.setdefault(key, number))
    order: dict[int, int] = {}
    return [order.setdefault(find(number), len(order)) for number in range(len(keys))]


PARTS = ("train", "validation", "test")
FRACTIONS = (0.8, 0.1, 0.1)


@dataclass(frozen=True)
class Splits:
    """Training, validation and test rows; ``cleaning`` counts what each rule changed or dropped, ``notes`` says what was odd."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    cleaning: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def sizes(self) -> dict[str, int]:
        """Rows in each part."""
        return {name: len(getattr(self, name)) for name in PARTS}

    def shares(self) -> dict[str, dict[str, float]]:
        """For each question type, the share of its rows in each part, 0 to 1."""
        counts = {name: Counter(row["qtype"] for row in getattr(self, name)) for name in PARTS}
        total = sum(counts.values(), Counter())
        return {
            qtype: {name: counts[name][qtype] / n for name in PARTS}
            for qtype, n in total.most_common()
        }


# A group's part hangs on nothing but its name and the seed, so that it stays where it is when rows are added. Such a split
# cannot also count question types; instead this prefix of the hash was chosen, once and by those counts alone, so that with
# seed 0 every type of MedQuAD comes close to its share of each part.
SALT = "medquad-468655"


def _place(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the key and the seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


def _part(place: float, fractions: tuple[float, float, float]) -> int:
    return 0 if place < fractions[0] else 1 if place < fractions[0] + fractions[1] else 2


def split(
    rows: Sequence[Row], fractions: tuple[float, float, float] = FRACTIONS, seed: int = 0
) -> Splits:
    """Grouped split: a whole group goes to one part, by a hash of its first focus and ``seed``.

    A group that is larger than the smallest part should be goes to training; a note says so.

    Raises:
        CourseError: the fractions do not add up to 1, or a part comes out empty.
    """
    _check(fractions)
    numbers = groups(rows)
    first: dict[int, str] = {}
    for number, row in zip(numbers, rows, strict=True):
        first[number] = min(first.get(number, focus_of(row)), focus_of(row))
    size, most = Counter(numbers), max(1, min(fractions[1:]) * len(rows))
    part = {
        number: 0 if size[number] > most else _part(_place(f"{SALT}:{name}", seed), fractions)
        for number, name in first.items()
    }
    parts = _parts(rows, [part[number] for number in numbers])
    if not all(parts):
        raise CourseError(
            f"{len(rows)} rows in {len(first)} groups are too few for three parts: got {[len(p) for p in parts]} rows. Load more "
            "rows; where questions follow none of MedQuAD's templates, add a column focus that names the disease."
        )
    large = [
        f"group {first[n]!r} ({k:,} rows) is larger than a part of {most:,.0f}: kept in training"
        for n, k in size.items()
        if k > most
    ]
    return Splits(*parts, notes=large)


def split_by_row(
    rows: Sequence[Row], fractions: tuple[float, float, float] = FRACTIONS, seed: int = 0
) -> Splits:
    """The split that leaks, for comparison: every row is drawn on its own.

    Raises:
        CourseError: the fractions do not add up to 1.
    """
    _check(fractions)
    return Splits(
        *_parts(
            rows,
            [
                _part(_place(f"{n}:{row['question']}", seed), fractions)
                for n, row in enumerate(rows)
            ],
        )
    )


def _check(fractions: tuple[float, float, float]) -> None:
    if not (abs(sum(fractions) - 1) < 1e-9 and min(fractions) > 0):
        raise CourseError(
            f"fractions {fractions} must be positive and add up to 1, for example (0.8, 0.1, 0.1)."
        )


def _parts(rows: Sequence[Row], where: Sequence[int]) -> tuple[list[Row], list[Row], list[Row]]:
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for row, part in zip(rows, where, strict=True):
        parts[part].append(row)
    return parts


def leakage(train: Sequence[Row], test: Sequence[Row]) -> dict[str, float]:
    """What of ``test`` also stands in ``train``, as shares from 0 to 1.

    Of the test rows: whose ``question`` does, letter by letter; whose ``normalised question``, ``focus`` or ``answer`` does;
    and whose ``answer`` does although it is no ``boilerplate`` of the two sets. ``8-gram``: of the runs of eight words in
    test answers.
    """
    return _shared_rows(train, test, boilerplate([*train, *test])) | {
        "8-gram": _shared(_runs(train), _runs(test))
    }


def _shared_rows(
    train: Sequence[Row], test: Sequence[Row], common: Container[str]
) -> dict[str, float]:
    keys: dict[str, Callable[[Row], str]] = {
        "question": lambda row: row["question"],
        "normalised question": lambda row: normalise(row["question"]),
        "focus": focus_of,
        "answer": lambda row: row["answer"],
        "answer but boilerplate": lambda row: "" if row["answer"] in common else row["answer"],
    }
    shares = {}
    for name, key in keys.items():
        known = {key(row) for row in train} - {""}
        shares[name] = sum(key(row) in known for row in test) / max(1, len(test))
    return shares


def _shared(known: Any, asked: Any) -> float:
    """Share of ``asked`` that is in ``known``, two arrays of hashes, 0 to 1."""
    import numpy

    if not len(asked) or not len(known):
        return 0.0
    known = numpy.sort(known)  # and looked up by halving: several times faster here than numpy.isin
    places = numpy.searchsorted(known, asked).clip(max=len(known) - 1)
    return float((known[places] == asked).mean())


def _runs(rows: Sequence[Row], length: int = 8) -> Any:
    """A 64-bit hash of every run of ``length`` words within an answer, as one array; equal runs have equal hashes."""
    import numpy

    found, ends = array("Q"), []
    for row in rows:
        found.extend(crc32(word.encode()) for word in re.findall(r"\w+", row["answer"].lower()))
        ends.append(len(found))
    words = numpy.frombuffer(found, dtype=numpy.uint64) if found else numpy.zeros(0, numpy.uint64)
    hashed = numpy.zeros(max(0, len(words) - length + 1), numpy.uint64)
    for place in range(length):  # a polynomial in an odd base, modulo 2**64
        hashed = hashed * numpy.uint64(0x9E3779B97F4A7C15) + words[place : place + len(hashed)]
    whole = numpy.ones(len(hashed), dtype=bool)  # but not across two answers
    for end in ends:
        whole[max(0, end - length + 1) : end] = False
    return hashed[whole]


def leakage_report(splits: Splits) -> dict[str, Any]:
    """``leakage`` between each pair of parts, and the boilerplate answers with their foci and their rows in each part."""
    rows = {name: getattr(splits, name) for name in PARTS}
    counts = {name: Counter(row["answer"] for row in rows[name]) for name in PARTS}
    common = boilerplate([row for name in PARTS for row in rows[name]])
    listed = [
        {"answer": a, "foci": foci, "rows": {name: counts[name][a] for name in PARTS}}
        for a, foci in common.items()
    ]
    runs = {name: _runs(rows[name]) for name in PARTS}
    pairs = {
        f"{a} / {b}": _shared_rows(rows[a], rows[b], common) | {"8-gram": _shared(runs[a], runs[b])}
        for a, b in combinations(PARTS, 2)
    }
    return {**pairs, "boilerplate": listed}


def focus_recovery(rows: Sequence[Row], seed: int = 0) -> dict[str, float]:
    """What is lost where only type, question and answer are known, as in the Hub's file; shares from 0 to 1.

    ``found``: rows whose focus some template names; ``precision``: where the name is the focus of the XML; ``leak``: test rows
    of a split on these three columns that share a group of the full columns (a URL, a rare concept) with a training row.

    Raises:
        CourseError: the questions name too few diseases for a split.
    """
    bare = [
        {**dict.fromkeys(COLUMNS), **{c: row[c] for c in REQUIRED}, "document_id": str(n)}
        for n, row in enumerate(rows)
    ]
    known = [
        (normalise(row["focus"]), focus_of(without))
        for row, without in zip(rows, bare, strict=True)
        if row["focus"]
    ]
    found = [(focus, guess) for focus, guess in known if guess]
    numbers, parts = groups(rows), split(bare, seed=seed)
    trained = {numbers[int(row["document_id"])] for row in parts.train}
    return {
        "found": len(found) / max(1, len(known)),
        "precision": sum(focus == guess for focus, guess in found) / max(1, len(found)),
        "leak": sum(numbers[int(row["document_id"])] in trained for row in parts.test)
        / len(parts.test),
    }


def draw(
    rows: Sequence[Row], most: int, seed: int, fits: Callable[[Row], bool] = lambda row: True
) -> list[Row]:
    """At most ``most`` rows (0 = all) in a seeded order, of those for which ``fits`` is true."""
    ordered = sorted(rows, key=lambda row: _place(row["question"] + row["answer"], seed))
    kept: list[Row] = []
    for row in ordered:
        if most and len(kept) >= most:
            break
        if fits(row):
            kept.append(row)
    return kept
