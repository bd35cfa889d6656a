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
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medquad_utils.profiles import CourseError, Plan

Row = dict[str, Any]

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


def load_table(path: Path) -> Loaded:
    """Rows of a CSV, JSONL or parquet file with the Hub's columns (in any case) or the common schema.

    Raises:
        CourseError: no such file, not readable as its ending says, or a required column is missing.
    """
    if not path.is_file():
        raise CourseError(f"no file {str(path)!r}: expected a .csv, .jsonl or .parquet file with the columns {', '.join(REQUIRED)}.")
    try:
        records = list(_records(path))
    except (OSError, csv.Error, ValueError) as error:
        kind = path.suffix.lstrip(".")
        advice = "Save it again as .csv or .jsonl in UTF-8, or as .parquet."
        raise CourseError(f"cannot read {path.name} as {kind}: {error}. {advice}") from error
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


# ---- cleaning -------------------------------------------------------------------------------------------------------

LINK_LIST = re.compile(r"^These resources (from MedlinePlus )?(address|offer)|^The resources listed in this section", re.IGNORECASE)


def _white_space(row: Row) -> Row:
    return {**row, "question": re.sub(r"\s+", " ", row["question"]).strip(), "answer": re.sub(r"[ \t]+", " ", row["answer"]).strip()}


# A rule maps a row to the row to keep, changed or not, or to None: drop it.
RULES: dict[str, Callable[[Row], Row | None]] = {
    "white space": _white_space,
    "under five words": lambda row: row if len(row["answer"].split()) >= 5 else None,
    "link list": lambda row: None if LINK_LIST.match(row["answer"]) else row,
}


def clean(rows: Sequence[Row], without: Iterable[str] = ()) -> tuple[list[Row], dict[str, int]]:
    """Apply ``RULES`` in order (but those named in ``without``), then drop exact duplicates.

    Returns the rows kept and, for each rule, how many rows it changed or dropped.
    """
    counts: Counter[str] = Counter(dict.fromkeys((*RULES, "exact duplicate"), 0))
    kept, seen = [], set()
    for row in rows:
        current: Row | None = row
        for name, rule in RULES.items():
            if name in without or current is None:
                continue
            changed = rule(current)
            counts[name] += changed != current
            current = changed
        if current is None:
            continue
        pair = (current["question"], current["answer"])
        if "exact duplicate" not in without and pair in seen:
            counts["exact duplicate"] += 1
            continue
        seen.add(pair)
        kept.append(current)
    return kept, dict(counts)


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
    """What a row is about, normalised: its focus, or what its question's template names, or else the whole question."""
    if row["focus"]:
        return normalise(row["focus"])
    found = template_of(row["question"])
    return normalise(found[1] if found else row["question"])


RARE = 5  # a concept ("Syndrome") or a paragraph that more foci than this carry joins nothing: it is boilerplate
LONG_ANSWER = 200  # characters; a shorter answer may recur by chance


def groups(rows: Sequence[Row]) -> list[int]:
    """A group number for each row: rows that share a focus, a URL, a rare CUI or a rare long answer are one group."""
    parent: dict[Any, Any] = {}

    def find(x: Any) -> Any:
        parent.setdefault(x, x)
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    foci: dict[tuple[str, str], set[str]] = defaultdict(set)
    links: list[list[tuple[str, str]]] = []
    for row in rows:
        focus = focus_of(row)
        shared = [("cui", cui) for cui in row["cui"] or ()]
        shared += [("answer", row["answer"])] if len(row["answer"]) >= LONG_ANSWER else []
        for key in shared:
            foci[key].add(focus)
        links.append([("focus", focus), *([("url", row["url"])] if row["url"] else []), *shared])
    for number, keys in enumerate(links):
        for key in keys:
            if len(foci.get(key, ())) <= RARE:
                parent[find(key)] = find(("row", number))
    order: dict[Any, int] = {}
    return [order.setdefault(find(("row", number)), len(order)) for number in range(len(rows))]


# ---- splits ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """Training, validation and test rows; ``cleaning`` counts what each rule changed or dropped."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    cleaning: dict[str, int] = field(default_factory=dict)

    def sizes(self) -> dict[str, int]:
        """Rows in each part."""
        return {name: len(getattr(self, name)) for name in ("train", "validation", "test")}


def _place(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the key and the seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


def split(rows: Sequence[Row], fractions: tuple[float, float, float] = (0.8, 0.1, 0.1), seed: int = 0) -> Splits:
    """Grouped split: a whole group goes to one part, by a hash of its first focus and ``seed``.

    A group keeps its part when rows are added elsewhere.

    Raises:
        CourseError: the fractions do not add up to 1, or a part comes out empty.
    """
    if abs(sum(fractions) - 1) > 1e-9 or min(fractions) <= 0:
        raise CourseError(f"fractions {fractions} must be positive and add up to 1, for example (0.8, 0.1, 0.1).")
    numbers = groups(rows)
    first: dict[int, str] = {}
    for number, row in zip(numbers, rows, strict=True):
        first[number] = min(first.get(number, focus_of(row)), focus_of(row))
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for number, row in zip(numbers, rows, strict=True):
        place = _place(first[number], seed)
        parts[0 if place < fractions[0] else 1 if place < fractions[0] + fractions[1] else 2].append(row)
    if not all(parts):
        got = [len(p) for p in parts]
        raise CourseError(f"{len(rows)} rows in {len(first)} groups are too few for three parts: got {got} rows. Load more rows.")
    return Splits(*parts)


def split_by_row(rows: Sequence[Row], fractions: tuple[float, float, float] = (0.8, 0.1, 0.1), seed: int = 0) -> Splits:
    """The split that leaks, for comparison: every row is drawn on its own."""
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for number, row in enumerate(rows):
        place = _place(f"{number}:{row['question']}", seed)
        parts[0 if place < fractions[0] else 1 if place < fractions[0] + fractions[1] else 2].append(row)
    return Splits(*parts)


def leakage(train: Sequence[Row], test: Sequence[Row]) -> dict[str, float]:
    """Share of test rows, 0 to 1, whose question, normalised question, focus or answer also stands in ``train``."""
    keys: dict[str, Callable[[Row], str]] = {
        "question": lambda row: row["question"],
        "normalised question": lambda row: normalise(row["question"]),
        "focus": focus_of,
        "answer": lambda row: row["answer"],
    }
    shares = {}
    for name, key in keys.items():
        known = {key(row) for row in train}
        shares[name] = sum(key(row) in known for row in test) / max(1, len(test))
    return shares


# ---- the stage ------------------------------------------------------------------------------------------------------


def _recipe(plan: Plan) -> dict[str, Any]:
    """What decides which rows are written; a stage made from another recipe, or from files that have changed since, is made again."""
    from medquad_utils.assets.sample import CONDITIONS

    path = CONDITIONS if plan.source == "sample" else Path(plan.data_path)
    found = [] if plan.source == "hub" else [path] if path.is_file() else path.rglob("*.xml")
    states = [f.stat() for f in found if f.is_file()]
    size, changed = sum(s.st_size for s in states), max((s.st_mtime_ns for s in states), default=0)
    return {"source": plan.source, "data": Path(plan.data_path).name, "bytes": size, "changed": changed, "seed": plan.seed}


def prepare(plan: Plan) -> Splits:
    """The plan's splits: read from ``runs/<profile>/data``, or, if they are not there, loaded, cleaned, split and written."""
    folder = plan.folder / "data"
    card = folder / "data.json"
    parts = [folder / f"{part}.parquet" for part in ("train", "validation", "test")]
    if card.is_file() and all(p.is_file() for p in parts) and (written := json.loads(card.read_text()))["recipe"] == _recipe(plan):
        train, validation, test = map(read_rows, parts)
        return Splits(train, validation, test, written["cleaning"])
    loaded = load(plan)
    rows, cleaning = clean(loaded.rows)
    splits = dataclasses.replace(split(rows, seed=plan.seed), cleaning=cleaning)
    card.unlink(missing_ok=True)  # until it is back, last of all, parts of two recipes may stand side by side
    for path in parts:
        write_rows(path, getattr(splits, path.stem))
    write_json(card, {"recipe": _recipe(plan), "loaded": len(loaded.rows), "skipped": loaded.skipped,
                      "cleaning": cleaning, "rows": splits.sizes()})  # fmt: skip
    return splits


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
