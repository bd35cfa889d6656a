"""Question templates, groups by disease, the split that keeps them apart, and leakage."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, combinations, islice
from typing import Any

import numpy

from medquad_utils import CourseError
from medquad_utils.files import Row

# The questions of MedQuAD, with or without its odd spaces -> the type of each, with no exception.
TEMPLATES = {
    r"what is \(are\) {} ?\?": "information",
    r"what are the symptoms of {} ?\?": "symptoms",
    r"what are the treatments for {} ?\?": "treatment",
    r"is {} inherited ?\?": "inheritance",
    r"how many people are affected by {} ?\?": "frequency",
    r"what are the genetic changes related to {} ?\?": "genetic changes",
    r"what causes {} ?\?": "causes",
    r"how to diagnose {} ?\?": "exams and tests",
    r"what research \(or clinical trials\) is being done for {} ?\?": "research",
    r"what is the outlook for {} ?\?": "outlook",
    r"who is at risk for {}\?? ?\?": "susceptibility",
    r"what to do for {} ?\?": "considerations",
    r"how to prevent {} ?\?": "prevention",
    r"what are the stages of {} ?\?": "stages",
    r"what are the complications of {} ?\?": "complications",
    r"where to find support for people with {} ?\?": "support groups",
    r"do you have information about {}": "information",
}
TYPES = tuple(TEMPLATES.values())
# The focus is the disease that a question names.
_PATTERNS = [re.compile(t.format(r"(?P<focus>[^\s?].*?)"), re.IGNORECASE) for t in TEMPLATES]


def template_of(question: str) -> tuple[int, str] | None:
    """Return the number of the template that a question follows, and the disease it names."""
    for number, pattern in enumerate(_PATTERNS):
        if match := pattern.fullmatch(question.strip()):
            return number, match["focus"]
    return None


def _compared(match: re.Match[str]) -> str:
    """Keep letters, marks and digits of every script; replace other characters by a space."""
    kind = unicodedata.category(match[0])
    # Format characters, such as a soft hyphen, stand within words: they are dropped.
    return match[0] if kind[0] in "LMN" else "" if kind == "Cf" else " "


def normalise(text: str | None) -> str:
    """Convert a name or a question to lower case without punctuation, for comparison."""
    text = unicodedata.normalize("NFC", (text or "").lower())
    return " ".join(re.sub(r"[^\w ]|_", _compared, text).split())


def focus_of(row: Row) -> str:
    """Return the disease of a row, normalised: its focus, or the name in its question, or ""."""
    if row["focus"]:
        return normalise(row["focus"])
    match = template_of(row["question"])
    return normalise(match[1]) if match else ""


def held_out_by(rows: Sequence[Row]) -> list[str]:
    """Return what the parts keep together and intervals resample, for each row: its disease.

    Where most rows name no disease, as in a table of questions and answers alone, a row without
    one is held out by its question.
    """
    foci = [focus_of(row) for row in rows]
    if 2 * foci.count("") <= len(foci):
        return foci
    pairs = zip(foci, rows, strict=True)
    return [focus or normalise(row["question"]) for focus, row in pairs]


NGRAM = 8  # words in a row that two texts share by copying, hardly by chance

# Two diseases that share a rare concept or answer are one group. A common one joins nothing.
RARE = 5  # foci that carry a UMLS concept, at most; "Syndrome" is carried by many more
BOILERPLATE = 10  # foci that carry an answer, at most; an answer with more is boilerplate


def repeats(rows: Sequence[Row]) -> dict[str, int]:
    """Count exact pairs, questions with several answers, and rows that share their answer."""
    answers: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        answers[normalise(row["question"])].add(row["answer"])
    shared = Counter(row["answer"] for row in rows)
    pairs = {(row["question"], row["answer"]) for row in rows}
    return {
        "exact pairs, beyond the first": len(rows) - len(pairs),
        "questions with several answers": sum(len(several) > 1 for several in answers.values()),
        "rows that share their answer": sum(count for count in shared.values() if count > 1),
    }


def boilerplate(rows: Sequence[Row]) -> dict[str, int]:
    """Count the foci of each answer that more than ``BOILERPLATE`` foci carry, largest first."""
    foci: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        foci[row["answer"]].add(focus_of(row))
    counts = {answer: len(names) for answer, names in foci.items() if len(names) > BOILERPLATE}
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))


def groups(rows: Sequence[Row]) -> list[int]:
    """Number the group of each row: rows that share something specific to their disease.

    That is the focus, the normalised question, the URL, a rare CUI, or an answer that is not
    boilerplate. Rows without a focus are one group, unless most rows have none.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    carriers: dict[tuple[str, str], set[str]] = defaultdict(set)
    keys = []
    for row, focus in zip(rows, held_out_by(rows), strict=True):
        shared = [("cui", cui) for cui in row["cui"] or ()] + [("answer", row["answer"])]
        for key in shared:
            carriers[key].add(focus)
        own = [("focus", focus), ("question", normalise(row["question"]))]
        keys.append(own + ([("url", row["url"])] if row["url"] else []) + shared)
    most = {"cui": RARE, "answer": BOILERPLATE}
    common = {key for key, foci in carriers.items() if len(foci) > most[key[0]]}
    # A graph of the rows: each is linked to the first row that has the same key.
    first: dict[tuple[str, str], int] = {}
    links = [(n, first.setdefault(k, n)) for n, own in enumerate(keys) for k in {*own} - common]
    ends = numpy.array(links, dtype=int).reshape(-1, 2).T
    graph = coo_array((numpy.ones(len(links)), ends), shape=(len(rows), len(rows)))
    numbers: list[int] = connected_components(graph, directed=False)[1].tolist()
    return numbers


PARTS = ("train", "validation", "test")
Fractions = tuple[float, float, float]  # of the rows, in the order of PARTS
FRACTIONS: Fractions = (0.8, 0.1, 0.1)


@dataclass(frozen=True)
class Splits:
    """Training, validation and test rows, and notes on the split."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    notes: list[str] = field(default_factory=list, compare=False)

    def sizes(self) -> dict[str, int]:
        """Count the rows of each part."""
        return {name: len(getattr(self, name)) for name in PARTS}


# The part of a group depends on its name and the seed, so it mostly stays when rows are added. Such
# a split cannot balance question types. So this prefix was chosen, by their counts alone, to give
# every type of MedQuAD about its share in each part with seed 0.
SALT = "medquad-468655"


def _place(key: str, seed: int) -> float:
    """Map a key and a seed to a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


def split(rows: Sequence[Row], fractions: Fractions = FRACTIONS, seed: int = 0) -> Splits:
    """Split by disease: a group goes to one part, by a hash of its first focus and ``seed``.

    A group that is larger than the smallest part goes to training, with a note. An empty part
    raises a CourseError.
    """
    numbers, names = groups(rows), held_out_by(rows)
    first: dict[int, str] = {}  # group -> its first focus in the alphabet
    for number, name in sorted(zip(numbers, names, strict=True)):
        first.setdefault(number, name)
    limit = max(1, min(fractions[1:]) * len(rows))
    large = {n: size for n, size in Counter(numbers).items() if size > limit}
    place = {n: _place(f"{SALT}:{focus}", seed) for n, focus in first.items()}
    place |= dict.fromkeys(large, 0.0)  # in training
    reason = f"is larger than a part of {limit:,.0f}: kept in training"
    notes = [f"group {first[n]!r} ({size:,} rows) {reason}" for n, size in large.items()]
    if (unnamed := sum(not focus_of(row) for row in rows)) and "" not in names:
        notes.append(
            f"{unnamed:,} of {len(rows):,} rows name no disease: they are held out by their "
            "question and answer. Two questions about one disease may be in two parts; a column "
            "focus that names the disease prevents it."
        )
    splits = _divide(rows, [place[n] for n in numbers], fractions, notes)
    if not all(sizes := list(splits.sizes().values())):
        seeds = " Another seed may do." if len(first) >= len(PARTS) else ""
        raise CourseError(
            f"{len(rows)} rows in {len(first)} groups are too few for three parts: got {sizes} "
            f"rows with seed {seed}.{seeds} Load more rows, or more diseases (a column focus names "
            "them)."
        )
    return splits


def split_by_row(rows: Sequence[Row], fractions: Fractions = FRACTIONS, seed: int = 0) -> Splits:
    """Split row by row, which leaks: for comparison with ``split``."""
    places = [_place(f"{n}:{row['question']}", seed) for n, row in enumerate(rows)]
    return _divide(rows, places, fractions, [])


def _divide(
    rows: Sequence[Row], places: Sequence[float], fractions: Fractions, notes: list[str]
) -> Splits:
    """Divide rows, each with a place in [0, 1), into the three parts."""
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    borders = list(accumulate(fractions[:2]))
    for row, place in zip(rows, places, strict=True):
        parts[bisect(borders, place)].append(row)
    return Splits(*parts, notes=notes)


def leakage(
    train: Sequence[Row], test: Sequence[Row], common: Container[str] | None = None
) -> dict[str, float]:
    """Measure what of ``test`` is also in ``train``, as shares from 0 to 1.

    ``8-gram``: of the sequences of eight words in test answers. All others: of the test rows.
    ``common`` are the boilerplate answers, by default those of both sets together.
    """
    common = boilerplate([*train, *test]) if common is None else common
    keys: dict[str, Callable[[Row], str]] = {
        "question": lambda row: row["question"],
        "normalised question": lambda row: normalise(row["question"]),
        "focus": focus_of,
        "answer": lambda row: row["answer"],
        "answer but boilerplate": lambda row: "" if row["answer"] in common else row["answer"],
    }
    shares = {}
    for name, key in keys.items():
        trained = {key(row) for row in train} - {""}
        shares[name] = sum(key(row) in trained for row in test) / max(1, len(test))
    tested = list(ngrams(row["answer"] for row in test))
    # The small set is kept: training is only passed by.
    shared = set(tested).intersection(ngrams(row["answer"] for row in train))
    return shares | {"8-gram": sum(ngram in shared for ngram in tested) / max(1, len(tested))}


def ngrams(texts: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Yield every sequence of eight words within a text, in lower case."""
    for text in texts:
        words = normalise(text).split()
        yield from zip(*(words[start:] for start in range(NGRAM)), strict=False)


def leakage_report(splits: Splits) -> dict[str, Any]:
    """Measure ``leakage`` between each two parts, and count the foci of boilerplate answers."""
    common = boilerplate([*splits.train, *splits.validation, *splits.test])
    pairs = {
        f"{a} / {b}": leakage(getattr(splits, a), getattr(splits, b), common)
        for a, b in combinations(PARTS, 2)
    }
    return {**pairs, "boilerplate": common}


def draw(
    rows: Sequence[Row], most: int, seed: int, fits: Callable[[Row], bool] = lambda row: True
) -> list[Row]:
    """Draw at most ``most`` rows (0 = all) in a seeded order, only those that ``fits`` accepts."""
    ordered = sorted(rows, key=lambda row: _place(row["question"] + row["answer"], seed))
    return list(islice(filter(fits, ordered), most or None))  # asks fits only until it has enough
