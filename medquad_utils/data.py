"""The data stage: rows of every source in one schema, cleaned, and split by disease.

The data: Ben Abacha and Demner-Fushman, "A question-entailment approach to question answering",
BMC Bioinformatics 2019, 20:511; CC BY 4.0.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from medquad_utils import CourseError, files
from medquad_utils.assets import raw, sample
from medquad_utils.cleaning import clean, damage
from medquad_utils.files import COLUMNS, LISTS, REQUIRED, Row
from medquad_utils.profiles import Plan
from medquad_utils.splits import PARTS, Splits, focus_of, focus_recovery, leakage_report, split

HUB_DATASET = "keivalya/MedQuad-MedicalQnADataset"
HUB_FILE = "medDataset_processed.csv"
HUB_REVISION = "5b0961fbaa6d7f9c344c5d59c29943fb900c2eca"
GIT_CLONE = "git clone https://github.com/abachaa/MedQuAD"


@dataclass
class Loaded:
    """The rows of a source. ``skipped`` names each file or row that could not be used."""

    rows: list[Row]
    skipped: list[str] = field(default_factory=list)
    unanswered: int = 0

    def __str__(self) -> str:
        lines = [f"{len(self.rows):,} rows"]
        if self.unanswered:
            lines.append(f"{self.unanswered:,} questions without an answer left out")
        if self.skipped:
            more = "; ..." if len(self.skipped) > 3 else ""
            lines.append(f"{len(self.skipped):,} skipped: {'; '.join(self.skipped[:3])}{more}")
        return ", ".join(lines)


def load(plan: Plan) -> Loaded:
    """Load the rows of the plan's source."""
    path = Path(plan.data_path)
    if plan.source == "sample":
        loaded = _parse((n, BytesIO(text.encode())) for n, text in raw.documents().items())
    elif plan.source == "hub":
        loaded = load_table(_hub_file())
    elif plan.source == "xml":
        loaded = load_xml(path)
    else:
        loaded = load_table(path)
    if not loaded.rows:
        raise CourseError(
            f"source {plan.source!r} ({path.name}) holds no question with an answer. {loaded}"
        )
    return loaded


def load_xml(folder: Path) -> Loaded:
    """Load the answered questions of a clone of MedQuAD. Broken files are skipped and named."""
    paths = sorted(folder.rglob("*.xml")) if folder.is_dir() else []
    if not paths:
        raise CourseError(
            f"no XML files under {str(folder)!r}: expected a clone of MedQuAD. "
            f"Get it with: {GIT_CLONE}"
        )
    return _parse((f"{path.parent.name}/{path.name}", path) for path in paths)


def _parse(documents: Iterable[tuple[str, Path | BytesIO]]) -> Loaded:
    """Parse XML documents in MedQuAD's layout, each with the name that a note gives it."""
    loaded = Loaded([])
    for name, document in documents:
        try:
            _add_document(ElementTree.parse(document).getroot(), loaded)
        except (ElementTree.ParseError, LookupError, ValueError, OSError) as error:
            # Expat raises LookupError and ValueError for encodings that it cannot read.
            loaded.skipped.append(f"{name} ({error})")
    return loaded


def _add_document(root: ElementTree.Element, loaded: Loaded) -> None:
    def texts(path: str) -> list[str] | None:
        return [e.text.strip() for e in root.iterfind(path) if e.text and e.text.strip()] or None

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
        question, answer = ((pair.findtext(tag) or "").strip() for tag in ("Question", "Answer"))
        qtype = next((e.get("qtype") for e in pair.iterfind("Question")), None)
        if not answer:  # upstream removed the answers of three collections for copyright
            loaded.unanswered += 1
        elif not question or not qtype:
            name = root.get("id") or root.tag
            loaded.skipped.append(f"{name}: an answer without its question or qtype")
        else:
            own = {"qtype": qtype, "question": question, "answer": answer}
            loaded.rows.append(own | shared)


def load_table(path: Path) -> Loaded:
    """Load a CSV, JSONL or parquet file with the columns of the Hub (in any case) or of a row."""
    records = read_records(path, ", ".join(REQUIRED))
    columns = {str(name).strip().lower() for record in records[:1] for name in record}
    missing = [c for c in REQUIRED if c not in columns]
    if records and missing:
        raise CourseError(
            f"{path.name} lacks the columns {', '.join(missing)}: "
            f"it has {', '.join(sorted(columns))}. Rename them."
        )
    loaded = Loaded([])
    for number, record in enumerate(records, start=1):
        values = {str(name).strip().lower(): value for name, value in record.items()}
        row = {column: _value(column, values.get(column)) for column in COLUMNS}
        if wrong := [column for column in REQUIRED if row[column] is None]:
            loaded.skipped.append(f"row {number}: {wrong[0]} is not text")
        else:
            loaded.rows.append(row)
    return loaded


def _value(column: str, value: Any) -> Any:
    """Convert to the column's type, text or a list of texts; a blank, NaN or number is None."""
    if column in LISTS:
        values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        return [v.strip() for v in values if isinstance(v, str) and v.strip()] or None
    return (value.strip() or None) if isinstance(value, str) else None


def read_records(path: Path, expected: str) -> list[dict[str, Any]]:
    """Read the records of a CSV, JSONL or parquet file; ``expected`` lists columns for an error."""
    if not path.is_file():
        raise CourseError(
            f"no file {str(path)!r}: "
            f"expected a .csv, .jsonl or .parquet file with the columns {expected}."
        )
    try:
        return _records(path)
    except (OSError, csv.Error, ValueError) as error:
        raise CourseError(
            f"cannot read {path.name} as {path.suffix.lstrip('.')}: {error}. "
            "Save it again as .csv or .jsonl in UTF-8, or as .parquet."
        ) from error


def _records(path: Path) -> list[dict[str, Any]]:
    # Not pandas: it turns None into NaN, and the first cell of a row that is too long into an
    # index. "utf-8-sig" drops the byte-order mark that Excel writes.
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return list(pyarrow.parquet.read_table(path).to_pylist())
    if path.suffix == ".csv":
        csv.field_size_limit(1 << 30)  # answers can be longer than the default of 128 KiB
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file, strict=True))  # strict: a lost quote is an error
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"the ending {path.suffix!r} is none of .csv, .jsonl, .parquet")
    with path.open(encoding="utf-8-sig") as file:
        records = [json.loads(line) for line in file if line.strip()]
    if wrong := [record for record in records if not isinstance(record, dict)]:
        raise ValueError(f"a line is not an object: {str(wrong[0])[:60]}")
    return records


def _hub_file() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(HUB_DATASET, HUB_FILE, repo_type="dataset", revision=HUB_REVISION)
    except Exception as error:  # the library raises many kinds of error here
        raise CourseError(
            f"the data set {HUB_DATASET} could not be loaded from the Hub "
            f"({type(error).__name__}). Check the network, or read MedQuAD from a folder: "
            f"{GIT_CLONE}, then source=xml data_path=MedQuAD; source=sample needs no network."
        ) from error
    return Path(file)


@dataclass(frozen=True)
class Specialty:
    """A field of medicine: a pattern for the names of its diseases, and UMLS semantic types."""

    names: str
    semantic_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            re.compile(self.names)
        except re.error as error:
            raise CourseError(
                f"Specialty(names={self.names!r}) is no pattern: {error}. "
                "Separate names by a bar: 'heart|cardi'."
            ) from error

    def holds(self, row: Row) -> bool:
        """Return whether a row's focus, a synonym or a semantic type belongs to the field."""
        if set(self.semantic_types) & set(row["semantic_type"] or ()):
            return True
        pattern = re.compile(rf"\b(?:{self.names})", re.IGNORECASE)
        names = [focus_of(row), *(row["synonyms"] or ())]
        return bool(self.names) and any(map(pattern.search, names))


_SPECIALTIES = Path(__file__).parent / "assets" / "specialties.toml"
SPECIALTIES = {
    name: Specialty("|".join(entry["names"]), tuple(entry.get("semantic_types", ())))
    for name, entry in tomllib.loads(_SPECIALTIES.read_text(encoding="utf-8")).items()
}


def select(rows: Sequence[Row], specialty: str | Specialty, least: int = 50) -> list[Row]:
    """Select the rows of a specialty: a name of ``SPECIALTIES``, or a ``Specialty``.

    Raises:
        CourseError: there is no such specialty, or it has fewer than ``least`` rows.
    """
    chosen = SPECIALTIES.get(specialty) if isinstance(specialty, str) else specialty
    if chosen is None:
        raise CourseError(
            f"no specialty {specialty!r}: there are {', '.join(SPECIALTIES)}; "
            "or pass data.Specialty(names=...)."
        )
    selected = [row for row in rows if chosen.holds(row)]
    if len(selected) < least:
        name = specialty if isinstance(specialty, str) else specialty.names
        raise CourseError(
            f"{len(selected)} rows about {name!r} are too few to train on (at least {least}): "
            "widen it or load more rows."
        )
    return selected


def _recipe(plan: Plan, without: Sequence[str] = (), specialty: str = "") -> dict[str, Any]:
    """Describe what determines the written rows: source, state of its files, seed and options."""
    path = Path(plan.data_path)
    sources = {"sample": [sample.CONDITIONS, raw.WORDING], "hub": []}.get(
        plan.source, [path] if path.is_file() else path.rglob("*.xml")
    )
    states = [file.stat() for file in sources]
    return {
        "source": plan.source,
        "data": Path(plan.data_path).name,
        "bytes": sum(s.st_size for s in states),
        "changed": max((s.st_mtime_ns for s in states), default=0),
        "seed": plan.seed,
        "without": sorted(without),
        "specialty": specialty,
    }


def prepare(plan: Plan) -> Splits:
    """Read the plan's splits from ``runs/<profile>/data``, or make and write them."""
    folder = plan.folder / "data"
    card, parts = folder / "data.json", [folder / f"{part}.parquet" for part in PARTS]
    if card.is_file() and all(part.is_file() for part in parts):
        written = files.read_json(card)
        if written["recipe"] == _recipe(plan):
            train, validation, test = map(files.read_rows, parts)
            return Splits(train, validation, test, written["cleaning"], written["notes"])
    return make(plan, folder)[0]


def make(
    plan: Plan, folder: Path, without: Sequence[str] = (), specialty: str = ""
) -> tuple[Splits, dict[str, Any]]:
    """Load, clean, split and write three parquet files, ``leakage.json`` and ``data.json``.

    ``without`` names cleaning rules to turn off. ``specialty`` selects a sub-corpus. Returns the
    splits and the content of ``data.json``.
    """
    loaded = load(plan)
    rows, effects = clean(loaded.rows, without)
    rows = select(rows, specialty) if specialty else rows
    cleaning = {name: {"changed": e.changed, "dropped": e.dropped} for name, e in effects.items()}
    splits = dataclasses.replace(split(rows, seed=plan.seed), cleaning=cleaning)
    card = _card(loaded, splits) | {"recipe": _recipe(plan, without, specialty)}
    card |= {"specialty": specialty, "focus_recovery": None, "leakage": leakage_report(splits)}
    if any(row["focus"] for row in rows):
        with suppress(CourseError):  # the questions name no disease, only the column focus does
            card["focus_recovery"] = focus_recovery(rows, plan.seed)
    # Without data.json the parts are not used, so a kill never leaves parts of two recipes.
    with suppress(OSError):
        (folder / "data.json").unlink(missing_ok=True)
    for part in PARTS:
        files.write_rows(folder / f"{part}.parquet", getattr(splits, part))
    files.write_json(folder / "leakage.json", card["leakage"])
    files.write_json(folder / "data.json", card)
    return splits, card


def _card(loaded: Loaded, splits: Splits) -> dict[str, Any]:
    """Count what was loaded, what cleaning did, and what each part holds."""

    def place(number: int, words: str) -> str:
        row = loaded.rows[number]
        about = filter(None, (row["source"], row["document_id"], row["question"]))
        return f"{' '.join(about)}: {words}"

    damaged = damage(loaded.rows)
    return {
        "loaded": len(loaded.rows),
        "unanswered": loaded.unanswered,
        "skipped": loaded.skipped,
        "by_source": dict(Counter(row["source"] or "unknown" for row in loaded.rows).most_common()),
        "by_qtype": dict(Counter(row["qtype"] for row in loaded.rows).most_common()),
        "cleaning": splits.cleaning,
        "rows": splits.sizes(),
        "shares": splits.shares(),
        "notes": splits.notes,
        "damage": {kind: [place(*p) for p in places] for kind, places in damaged.items()},
    }


def summary(card: Mapping[str, Any]) -> str:
    """Describe in text what ``make`` loaded, cleaned and split, and what leaks."""
    leaks = dict(card["leakage"])
    common = {
        f"{' '.join(b['answer'].split())[:60]} ...": f"{b['foci']:,} diseases, "
        f"{sum(b['rows'].values()):,} rows"
        for b in leaks.pop("boilerplate")
    }
    effects = {
        rule: f"{effect['changed']:,} changed, {effect['dropped']:,} dropped"
        for rule, effect in card["cleaning"].items()
    }
    letters, units = card["damage"]["letters"], card["damage"]["units"]
    blocks = [
        f"{card['loaded']:,} answered rows ({card['unanswered']:,} without an answer, "
        f"{len(card['skipped']):,} skipped)",
        _table("source", card["by_source"]),
        _table("question type", card["by_qtype"]),
        _table("cleaning rule", effects),
        _table("part", {part: f"{n:,} rows" for part, n in card["rows"].items()}),
        *card["notes"],
        *(_table(f"leakage, {pair}", shares) for pair, shares in leaks.items()),
        _table("boilerplate", common),
        f"{len(letters):,} words lost a letter upstream; {len(units):,} numbers may have lost "
        "the prefix of their unit" + "".join(f"\n  {place}" for place in units),
    ]
    if recovery := card["focus_recovery"]:
        blocks.append(
            f"with the Hub's columns alone: focus found in {recovery['found']:.1%} of rows, "
            f"{recovery['precision']:.1%} of them right; {recovery['leak']:.1%} of test rows "
            "would share a group with training"
        )
    return "\n\n".join(block for block in blocks if block)


def _table(head: str, values: Mapping[str, Any]) -> str:
    width = max(map(len, [head, *values]))
    forms = {int: ",", float: ".1%", str: ""}
    lines = [f"  {name:<{width}}  {value:{forms[type(value)]}}" for name, value in values.items()]
    return "\n".join([head, *lines]) if values else ""
