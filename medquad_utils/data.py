"""MedQuAD from every source into one row schema, cleaned, and split so that no disease stands on both sides.

The data: Ben Abacha and Demner-Fushman, "A question-entailment approach to question answering", BMC Bioinformatics
2019, 20:511; CC BY 4.0.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any
from zlib import crc32

from medquad_utils.cleaning import Row as Row  # the package's name for a row is data.Row
from medquad_utils.cleaning import clean, damage
from medquad_utils.profiles import CourseError, Plan

# The schema that every source is brought to; what a source lacks is None.
COLUMNS = ("qtype", "question", "answer", "focus", "synonyms", "cui", "semantic_type", "source", "url", "document_id")
LISTS = ("synonyms", "cui", "semantic_type")
REQUIRED = ("qtype", "question", "answer")

HUB_DATASET = "keivalya/MedQuad-MedicalQnADataset"
HUB_REVISION = "5b0961fbaa6d7f9c344c5d59c29943fb900c2eca"
GIT_CLONE = "git clone https://github.com/abachaa/MedQuAD"


# ---- files ----------------------------------------------------------------------------------------------------------


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it at the end: whole or not at all.

    Raises:
        CourseError: the disk is full or the folder cannot be written; an older ``path`` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise CourseError(f"cannot write {path.name}: {reason}. Free some space or choose another folder with out=...") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield the path of a folder to be made beside ``folder``, which it replaces at the end: whole or not at all.

    Whatever goes wrong is raised as it is, and leaves an older ``folder`` as it was.
    """
    fresh, older = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        shutil.rmtree(older, ignore_errors=True)
        if folder.exists():
            folder.rename(older)
        fresh.rename(folder)
    except BaseException:
        if older.exists() and not folder.exists():
            older.rename(folder)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(older, ignore_errors=True)


def between(text: str, marks: tuple[str, str]) -> str:
    """What stands in ``text`` between its two ``marks``, without the white space around it.

    Raises:
        CourseError: ``text`` lacks one of them.
    """
    return _parted(text, marks)[1].strip()


def write_between(path: Path, marks: tuple[str, str], made: str) -> None:
    """Put ``made`` between the two ``marks`` of a text file; all else in it stays.

    Raises:
        CourseError: the file lacks one of them, or cannot be written.
    """
    head, _, tail = _parted(path.read_text(encoding="utf-8"), marks, path.name)
    with whole_file(path) as temporary:
        temporary.write_text(f"{head}{marks[0]}\n{made}\n{marks[1]}{tail}", encoding="utf-8")


def _parted(text: str, marks: tuple[str, str], name: str = "the text") -> tuple[str, str, str]:
    head, first, rest = text.partition(marks[0])
    made, second, tail = rest.partition(marks[1])
    if not (first and second):
        raise CourseError(f"{name} holds no {marks[0]} ... {marks[1]}: put them where the table shall stand.")
    return head, made, tail


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows of the common schema as parquet, whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    text, texts = pyarrow.string(), pyarrow.list_(pyarrow.string())
    schema = pyarrow.schema([(c, texts if c in LISTS else text) for c in COLUMNS])
    with whole_file(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=schema), temporary)


def read_rows(path: Path) -> list[Row]:
    """Read what ``write_rows`` wrote.

    Raises:
        CourseError: the file is not there or is not parquet.
    """
    import pyarrow.lib
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.lib.ArrowInvalid) as error:
        raise CourseError(f"cannot read {path.name}: {error}. Delete it and run lesson 01 again.") from error
    return rows


# ---- sources --------------------------------------------------------------------------------------------------------


@dataclass
class Loaded:
    """Rows of a source, and what was left out on the way: ``skipped`` holds one line for each thing."""

    rows: list[Row]
    skipped: list[str] = field(default_factory=list)
    unanswered: int = 0

    def __str__(self) -> str:
        lines = [f"{len(self.rows):,} rows"]
        if self.unanswered:
            lines.append(f"{self.unanswered:,} questions without an answer left out")
        if self.skipped:
            shown = "; ".join(self.skipped[:3]) + ("; ..." if len(self.skipped) > 3 else "")
            lines.append(f"{len(self.skipped):,} skipped: {shown}")
        return ", ".join(lines)


def load(plan: Plan) -> Loaded:
    """The rows of the plan's source.

    Raises:
        CourseError: the source is missing, empty, unreadable or lacks a column.
    """
    path = Path(plan.data_path)
    readers: dict[str, Callable[[], Loaded]] = {
        "sample": _load_sample,
        "hub": _load_hub,
        "xml": lambda: load_xml(path),
        "csv": lambda: load_table(path),
        "jsonl": lambda: load_table(path),
        "parquet": lambda: load_table(path),
    }
    loaded = readers[plan.source]()
    if not loaded.rows:
        raise CourseError(f"source {plan.source!r} ({path.name or plan.source}) holds no question with an answer. {loaded}")
    return loaded


def _load_sample() -> Loaded:
    from medquad_utils.assets.sample import rows

    return Loaded(rows())


def load_xml(folder: Path) -> Loaded:
    """All answered questions of a clone of the MedQuAD XML; broken files are skipped, counted and named.

    Raises:
        CourseError: ``folder`` is not there or holds no XML.
    """
    files = sorted(folder.rglob("*.xml")) if folder.is_dir() else []
    if not files:
        raise CourseError(f"no XML files under {str(folder)!r}: expected a clone of MedQuAD. Get it with: {GIT_CLONE}")
    loaded = Loaded([])
    for file in files:
        try:
            loaded.rows += _document(ElementTree.parse(file).getroot(), loaded)
        except (ElementTree.ParseError, LookupError, ValueError, OSError) as error:  # malformed, an unknown encoding, unreadable
            loaded.skipped.append(f"{file.parent.name}/{file.name} ({error})")
    return loaded


def _document(root: ElementTree.Element, loaded: Loaded) -> list[Row]:
    def texts(path: str) -> list[str] | None:
        return [e.text.strip() for e in root.iterfind(path) if e.text and e.text.strip()] or None

    rows = []
    shared = {
        "focus": (root.findtext("Focus") or "").strip() or None,
        "synonyms": texts(".//Synonym"),
        "cui": texts(".//CUI"),
        "semantic_type": texts(".//SemanticType"),
        "source": root.get("source"),
        "url": root.get("url"),
        "document_id": root.get("id"),
    }
    for pair in root.iterfind(".//QAPair"):
        question, answer = pair.find("Question"), (pair.findtext("Answer") or "").strip()
        if not answer:
            loaded.unanswered += 1
        elif question is None or not (question.text or "").strip() or not question.get("qtype"):
            loaded.skipped.append(f"{root.get('id') or root.tag}: an answer without its question or qtype")
        else:
            rows.append({"qtype": question.get("qtype"), "question": (question.text or "").strip(), "answer": answer, **shared})
    return rows


def read_records(path: Path, expected: str) -> list[dict[str, Any]]:
    """The records of a CSV, JSONL or parquet file, as they are; ``expected`` names the columns in the message of a missing file.

    Raises:
        CourseError: no such file, or not readable as its ending says.
    """
    if not path.is_file():
        raise CourseError(f"no file {str(path)!r}: expected a .csv, .jsonl or .parquet file with the columns {expected}.")
    try:
        return list(_records(path))
    except (OSError, csv.Error, ValueError) as error:
        kind = path.suffix.lstrip(".")
        advice = "Save it again as .csv or .jsonl in UTF-8, or as .parquet."
        raise CourseError(f"cannot read {path.name} as {kind}: {error}. {advice}") from error


def load_table(path: Path) -> Loaded:
    """Rows of a CSV, JSONL or parquet file with the Hub's columns (in any case) or the common schema.

    Raises:
        CourseError: no such file, not readable as its ending says, or a required column is missing.
    """
    records = read_records(path, ", ".join(REQUIRED))
    columns = {str(name).strip().lower() for record in records[:1] for name in record}
    missing = [c for c in REQUIRED if c not in columns]
    if records and missing:
        raise CourseError(f"{path.name} lacks the columns {', '.join(missing)}: it has {', '.join(sorted(columns))}. Rename them.")
    loaded = Loaded([])
    for number, record in enumerate(records, start=1):
        values = {str(k).strip().lower(): v for k, v in record.items()}
        wrong = [c for c in REQUIRED if not isinstance(values.get(c), str) or not values[c].strip()]
        if wrong:
            loaded.skipped.append(f"row {number}: {wrong[0]} is not text")
        else:
            loaded.rows.append({c: _value(c, values.get(c)) for c in COLUMNS})
    return loaded


def _value(column: str, value: Any) -> Any:
    """``value`` as the schema has it: text, a list of texts, or ``None`` for what is neither (a blank, a NaN, a number)."""
    if column in LISTS:
        values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        return [v.strip() for v in values if isinstance(v, str) and v.strip()] or None
    return (value.strip() or None) if isinstance(value, str) else None


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(path).to_pylist()
    elif path.suffix in (".jsonl", ".json"):
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
            if line.strip():
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"line {number} is not an object")
                yield record
    elif path.suffix == ".csv":
        csv.field_size_limit(1 << 30)
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file)
    else:
        raise ValueError(f"the ending {path.suffix!r} is none of .csv, .jsonl, .parquet")


def _load_hub() -> Loaded:
    import datasets

    try:
        table = datasets.load_dataset(HUB_DATASET, revision=HUB_REVISION, split="train")
    except Exception as error:  # the library raises many kinds; each means: not to be had now
        raise CourseError(
            f"the data set {HUB_DATASET} could not be loaded from the Hub ({type(error).__name__}). Check the network, "
            f"or read MedQuAD from a folder: {GIT_CLONE}, then source=xml data_path=MedQuAD; source=sample needs no network."
        ) from error
    rows = [{**dict.fromkeys(COLUMNS), **{k.lower(): v for k, v in r.items()}} for r in table]
    return Loaded([{c: row[c] for c in COLUMNS} for row in rows])


# ---- questions and groups -------------------------------------------------------------------------------------------

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
BOILERPLATE = 10  # an answer that more foci than this carry is boilerplate, and joins nothing either


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
        own = [("focus", focus), ("question", normalise(row["question"])), *([("url", row["url"])] if row["url"] else [])]
        keys.append(own + widely)
    most = {"cui": RARE, "answer": BOILERPLATE}
    return _connected([[k for k in ks if k not in carried or len(carried[k]) <= most[k[0]]] for ks in keys])


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


# ---- splits ---------------------------------------------------------------------------------------------------------

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
        return {qtype: {name: counts[name][qtype] / n for name in PARTS} for qtype, n in total.most_common()}


# A group's part hangs on nothing but its name and the seed, so that it stays where it is when rows are added. Such a split
# cannot also count question types; instead this prefix of the hash was chosen, once and by those counts alone, so that with
# seed 0 every type of MedQuAD comes close to its share of each part.
SALT = "medquad-468655"


def _place(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the key and the seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


def _part(place: float, fractions: tuple[float, float, float]) -> int:
    return 0 if place < fractions[0] else 1 if place < fractions[0] + fractions[1] else 2


def split(rows: Sequence[Row], fractions: tuple[float, float, float] = FRACTIONS, seed: int = 0) -> Splits:
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
    part = {number: 0 if size[number] > most else _part(_place(f"{SALT}:{name}", seed), fractions) for number, name in first.items()}
    parts = _parts(rows, [part[number] for number in numbers])
    if not all(parts):
        raise CourseError(
            f"{len(rows)} rows in {len(first)} groups are too few for three parts: got {[len(p) for p in parts]} rows. Load more "
            "rows; where questions follow none of MedQuAD's templates, add a column focus that names the disease."
        )
    large = [f"group {first[n]!r} ({k:,} rows) is larger than a part of {most:,.0f}: kept in training" for n, k in size.items() if k > most]
    return Splits(*parts, notes=large)


def split_by_row(rows: Sequence[Row], fractions: tuple[float, float, float] = FRACTIONS, seed: int = 0) -> Splits:
    """The split that leaks, for comparison: every row is drawn on its own.

    Raises:
        CourseError: the fractions do not add up to 1.
    """
    _check(fractions)
    return Splits(*_parts(rows, [_part(_place(f"{n}:{row['question']}", seed), fractions) for n, row in enumerate(rows)]))


def _check(fractions: tuple[float, float, float]) -> None:
    if not (abs(sum(fractions) - 1) < 1e-9 and min(fractions) > 0):
        raise CourseError(f"fractions {fractions} must be positive and add up to 1, for example (0.8, 0.1, 0.1).")


def _parts(rows: Sequence[Row], where: Sequence[int]) -> tuple[list[Row], list[Row], list[Row]]:
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for row, part in zip(rows, where, strict=True):
        parts[part].append(row)
    return parts


# ---- leakage --------------------------------------------------------------------------------------------------------


def leakage(train: Sequence[Row], test: Sequence[Row]) -> dict[str, float]:
    """What of ``test`` also stands in ``train``, as shares from 0 to 1.

    Of the test rows: whose ``question`` does, letter by letter; whose ``normalised question``, ``focus`` or ``answer`` does;
    and whose ``answer`` does although it is no ``boilerplate`` of the two sets. ``8-gram``: of the runs of eight words in
    test answers.
    """
    return _shared_rows(train, test, boilerplate([*train, *test])) | {"8-gram": _shared(_runs(train), _runs(test))}


def _shared_rows(train: Sequence[Row], test: Sequence[Row], common: Container[str]) -> dict[str, float]:
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
    listed = [{"answer": a, "foci": foci, "rows": {name: counts[name][a] for name in PARTS}} for a, foci in common.items()]
    runs = {name: _runs(rows[name]) for name in PARTS}
    pairs = {
        f"{a} / {b}": _shared_rows(rows[a], rows[b], common) | {"8-gram": _shared(runs[a], runs[b])} for a, b in combinations(PARTS, 2)
    }
    return {**pairs, "boilerplate": listed}


def focus_recovery(rows: Sequence[Row], seed: int = 0) -> dict[str, float]:
    """What is lost where only type, question and answer are known, as in the Hub's file; shares from 0 to 1.

    ``found``: rows whose focus some template names; ``precision``: where the name is the focus of the XML; ``leak``: test rows
    of a split on these three columns that share a group of the full columns (a URL, a rare concept) with a training row.

    Raises:
        CourseError: the questions name too few diseases for a split.
    """
    bare = [{**dict.fromkeys(COLUMNS), **{c: row[c] for c in REQUIRED}, "document_id": str(n)} for n, row in enumerate(rows)]
    known = [(normalise(row["focus"]), focus_of(without)) for row, without in zip(rows, bare, strict=True) if row["focus"]]
    found = [(focus, guess) for focus, guess in known if guess]
    numbers, parts = groups(rows), split(bare, seed=seed)
    trained = {numbers[int(row["document_id"])] for row in parts.train}
    return {
        "found": len(found) / max(1, len(known)),
        "precision": sum(focus == guess for focus, guess in found) / max(1, len(found)),
        "leak": sum(numbers[int(row["document_id"])] in trained for row in parts.test) / len(parts.test),
    }


# ---- sub-corpora ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Specialty:
    """A field of medicine: what its diseases' names hold (a pattern), or which UMLS semantic types they have."""

    names: str
    semantic_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            re.compile(self.names)
        except re.error as error:
            raise CourseError(f"Specialty(names={self.names!r}) is no pattern: {error}. Put names side by side: 'heart|cardi'.") from error

    def holds(self, row: Row) -> bool:
        """Whether a row's focus, a synonym or a semantic type belongs to the field."""
        pattern = re.compile(rf"\b(?:{self.names})", re.IGNORECASE)
        named = bool(self.names) and any(map(pattern.search, [focus_of(row), *(row["synonyms"] or ())]))
        return named or bool(set(self.semantic_types) & set(row["semantic_type"] or ()))


SPECIALTIES = {
    "cardiology": Specialty(
        r"heart(?!burn)|(?:endo|myo|peri|tachy|brady|dextro)?cardi|coronary|angina|arrhythmi|atrial|ventricular|long qt|aort|mitral|valve|"
        r"hypertension|high blood pressure|stroke|atheroscler|arter(?:y|ial|ies|itis)|vein|venous|thrombo(?:sis|embol)|vasculitis|aneurysm|"
        r"cholesterol|brugada"
    ),
    "oncology": Specialty(
        r"cancer|tumou?r|carcinom|leuk(?:a)?emia|lymphoma|melanoma|sarcoma|myeloma|neoplas|blastoma|glioma|metasta", ("T191",)
    ),
    "neurology": Specialty(
        r"brain|neuro|epilep|seizure|migraine|headache|dementia|alzheimer|parkinson|sclerosis|palsy|ataxia|dystonia|chorea|huntington|"
        r"myasthenia|encephal|mening|spinal|spina bifida|paralysis|narcolepsy|tourette|restless legs|myelitis"
    ),
    "endocrinology": Specialty(
        r"diabet|thyroid|goitre|goiter|adrenal|cushing|addison|pituitar|acromegaly|insulin|hypoglyc|hormone|growth hormone|polycystic ovar|"
        r"obesity|metabolic syndrome|hyperparathyroid|hypoparathyroid|gynecomastia|hypogonad"
    ),
    "gastroenterology": Specialty(
        r"stomach|gastr|bowel|colon|colitis|crohn|celiac|coeliac|liver|hepat|cirrhosis|pancrea|gallstone|gallbladder|bile|biliary|esophag|"
        r"intestin|constipation|diarrh|hernia|hemorrhoid|ulcer|reflux|digest|appendicitis|diverticul|lactose"
    ),
    "pulmonology": Specialty(
        r"lung|pulmonary|asthma|bronch|copd|emphysema|pneumo|respirat|breath|sleep apnea|pleur|cystic fibrosis|sarcoidosis|cough|tubercul"
    ),
    "nephrology and urology": Specialty(
        r"kidney|renal|nephr|glomerul|dialysis|urin|bladder|prostat|incontinence|cystitis|uret(?:er|hra)|peyronie|erectile|enuresis"
    ),
    "dermatology": Specialty(
        r"skin|derm|eczema|psoriasis|acne|rosacea|vitiligo|ichthyosis|epidermolysis|pemphig|hives|urticaria|wart|keratosis|alopecia|"
        r"hair loss|melanoma|scabies|shingles|hidradenitis|rash"
    ),
    "ophthalmology": Specialty(
        r"eye|ocular|vision|blind|retin|glaucoma|cataract|macular|cornea|uveitis|optic|conjunctiv|coloboma|keratoconus|strabismus|"
        r"color vision"
    ),
    "infectious diseases": Specialty(
        r"infect|virus|viral|bacteri|fungal|parasit|hiv|aids\b|flu\b|influenza|malaria|tubercul|hepatitis|herpes|measles|pox|fever|sepsis|"
        r"salmonell|lyme|pneumonia|meningitis|syphilis|chlamydia|gonorrh|worm|lice\b|coli\b|botulism|rabies|cholera"
    ),
    "mental health": Specialty(
        r"mental (?:health|illness|disorder)|depress|anxiety|bipolar|schizo|psych|autis|adhd|attention deficit|eating disorder|anorexia|"
        r"bulimia|alcohol|drug (?:abuse|use)|addict|suicid|stress|phobia|obsessive|panic|dementia", ("T048",)
    ),
    "rheumatology and bones": Specialty(
        r"arthr|rheumat|lupus|gout|osteo|bone|joint|spondyl|scoliosis|fibromyalgia|scleroderma|sjogren|sjgren|back pain|muscular|myositis|"
        r"fractur|tendon|bursitis|paget|skeletal dysplasia|chondrodysplasia|achondroplasia"
    ),
    "haematology": Specialty(
        r"blood|an(?:a)?emia|hemophilia|haemophilia|thalassemia|sickle|platelet|thrombocyt|bleeding|clot|hemochromatosis|neutropeni|"
        r"polycythemia|myelodysplas|leuk(?:a)?emia|von willebrand|porphyria|iron"
    ),
}  # fmt: skip


def select(rows: Sequence[Row], specialty: str | Specialty, least: int = 50) -> list[Row]:
    """The sub-corpus of a specialty: a name from ``SPECIALTIES``, or a ``Specialty`` of your own.

    Raises:
        CourseError: no such specialty, or fewer than ``least`` rows belong to it.
    """
    if isinstance(specialty, str) and specialty not in SPECIALTIES:
        raise CourseError(f"no specialty {specialty!r}: there are {', '.join(SPECIALTIES)}; or pass data.Specialty(names=...).")
    field_of = SPECIALTIES[specialty] if isinstance(specialty, str) else specialty
    chosen = [row for row in rows if field_of.holds(row)]
    if len(chosen) < least:
        name = specialty if isinstance(specialty, str) else specialty.names
        raise CourseError(f"{len(chosen)} rows about {name!r} are too few to train on (at least {least}): widen it or load more rows.")
    return chosen


# ---- the stage ------------------------------------------------------------------------------------------------------


def _recipe(plan: Plan, without: Sequence[str] = (), specialty: str = "") -> dict[str, Any]:
    """What decides which rows are written; a stage made from another recipe, or from files that have changed since, is made again."""
    from medquad_utils.assets.sample import CONDITIONS

    path = CONDITIONS if plan.source == "sample" else Path(plan.data_path)
    found = [] if plan.source == "hub" else [path] if path.is_file() else path.rglob("*.xml")
    states = [f.stat() for f in found if f.is_file()]
    size, changed = sum(s.st_size for s in states), max((s.st_mtime_ns for s in states), default=0)
    return {"source": plan.source, "data": Path(plan.data_path).name, "bytes": size, "changed": changed, "seed": plan.seed,
            "without": sorted(without), "specialty": specialty}  # fmt: skip


def prepare(plan: Plan) -> Splits:
    """The plan's splits: read from ``runs/<profile>/data``, or, if they are not there, made and written."""
    folder = plan.folder / "data"
    card, parts = folder / "data.json", [folder / f"{part}.parquet" for part in PARTS]
    if (
        card.is_file()
        and all(p.is_file() for p in parts)
        and (written := json.loads(card.read_text(encoding="utf-8")))["recipe"] == _recipe(plan)
    ):
        train, validation, test = map(read_rows, parts)
        return Splits(train, validation, test, written["cleaning"], written["notes"])
    return make(plan, folder)[0]


def make(plan: Plan, folder: Path, without: Sequence[str] = (), specialty: str = "") -> tuple[Splits, dict[str, Any]]:
    """Load, clean, split and write ``folder``: three parquet files, ``leakage.json`` and ``data.json``; returns splits and card.

    ``without`` names cleaning rules that are off; ``specialty`` keeps a sub-corpus.

    Raises:
        CourseError: what ``load``, ``clean``, ``select`` or ``split`` refuse.
    """
    loaded = load(plan)
    rows, effects = clean(loaded.rows, without)
    rows = select(rows, specialty) if specialty else rows
    cleaning = {name: {"changed": e.changed, "dropped": e.dropped} for name, e in effects.items()}
    splits = dataclasses.replace(split(rows, seed=plan.seed), cleaning=cleaning)
    recovery = None
    if any(row["focus"] for row in rows):
        with suppress(CourseError):  # questions in one's own words name no disease: then the column focus alone carries the split
            recovery = focus_recovery(rows, plan.seed)
    card = {
        "recipe": _recipe(plan, without, specialty),
        "loaded": len(loaded.rows),
        "unanswered": loaded.unanswered,
        "skipped": loaded.skipped,
        "by_source": dict(Counter(row["source"] or "unknown" for row in loaded.rows).most_common()),
        "by_qtype": dict(Counter(row["qtype"] for row in loaded.rows).most_common()),
        "cleaning": cleaning,
        "specialty": specialty,
        "rows": splits.sizes(),
        "shares": splits.shares(),
        "notes": splits.notes,
        "damage": {name: [f"{_named(loaded.rows[n])}: {words}" for n, words in at] for name, at in damage(loaded.rows).items()},
        "focus_recovery": recovery,
    }
    with suppress(OSError):  # a folder that cannot be written is named by what comes next
        (folder / "data.json").unlink(missing_ok=True)  # until it is back, last of all, parts of two recipes may stand side by side
    for part in PARTS:
        write_rows(folder / f"{part}.parquet", getattr(splits, part))
    card["leakage"] = leakage_report(splits)
    write_json(folder / "leakage.json", card["leakage"])
    write_json(folder / "data.json", card)
    return splits, card


def summary(card: Mapping[str, Any]) -> str:
    """What ``make`` did, as text: rows by source and type, the effect of each rule, the parts, and what leaks between them."""
    common = card["leakage"]["boilerplate"]
    pairs = {name: shares for name, shares in card["leakage"].items() if name != "boilerplate"}
    units = card["damage"]["units"]
    recovered = card["focus_recovery"]
    blocks = [
        f"{card['loaded']:,} answered rows ({card['unanswered']:,} without an answer, {len(card['skipped']):,} skipped)",
        _columns("source", {name: f"{n:,}" for name, n in card["by_source"].items()}),
        _columns("question type", {name: f"{n:,}" for name, n in card["by_qtype"].items()}),
        _columns("cleaning rule", {n: f"{e['changed']:,} changed, {e['dropped']:,} dropped" for n, e in card["cleaning"].items()}),
        _columns("part", {name: f"{n:,} rows" for name, n in card["rows"].items()}),
        *card["notes"],
        *(_columns(f"leakage, {pair}", {name: f"{share:.1%}" for name, share in shares.items()}) for pair, shares in pairs.items()),
        _columns(
            "boilerplate",
            {" ".join(b["answer"].split())[:60] + " ...": f"{b['foci']:,} diseases, {sum(b['rows'].values()):,} rows" for b in common},
        ),
        f"{len(card['damage']['letters']):,} words lost a letter upstream; {len(units):,} numbers may have lost the prefix of their unit"
        + "".join(f"\n  {place}" for place in units),
        recovered
        and f"with the Hub's columns alone: focus found in {recovered['found']:.1%} of rows, {recovered['precision']:.1%} of them right; "
        f"{recovered['leak']:.1%} of test rows would share a group with training",
    ]
    return "\n\n".join(block for block in blocks if block)


def _named(row: Row) -> str:
    return f"{row['source'] or ''} {row['document_id'] or ''} {row['question']}".strip()


def _columns(head: str, values: Mapping[str, str]) -> str:
    width = max(map(len, [head, *values]))
    return "\n".join([head, *(f"  {name:<{width}}  {value}" for name, value in values.items())]) if values else ""


def draw(rows: Sequence[Row], most: int, seed: int, fits: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """At most ``most`` rows (0 = all) in a seeded order, of those for which ``fits`` is true."""
    ordered = sorted(rows, key=lambda row: _place(row["question"] + row["answer"], seed))
    kept: list[Row] = []
    for row in ordered:
        if most and len(kept) >= most:
            break
        if fits(row):
            kept.append(row)
    return kept
