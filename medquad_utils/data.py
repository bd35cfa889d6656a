"""MedQuAD from every source into one row schema, cleaned, and split so that no disease stands on both sides.

The data: Ben Abacha and Demner-Fushman, "A question-entailment approach to question answering", BMC Bioinformatics
2019, 20:511; CC BY 4.0.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medquad_utils import CourseError
from medquad_utils.cleaning import clean, damage
from medquad_utils.files import COLUMNS, LISTS, REQUIRED, read_rows, write_json, write_rows
from medquad_utils.files import Row as Row
from medquad_utils.profiles import Plan
from medquad_utils.splits import PARTS, Splits, focus_of, focus_recovery, leakage_report, split

HUB_DATASET = "keivalya/MedQuad-MedicalQnADataset"
HUB_REVISION = "5b0961fbaa6d7f9c344c5d59c29943fb900c2eca"
GIT_CLONE = "git clone https://github.com/abachaa/MedQuAD"


# ---- files ----------------------------------------------------------------------------------------------------------


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
        raise CourseError(
            f"source {plan.source!r} ({path.name or plan.source}) holds no question with an answer. {loaded}"
        )
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
        raise CourseError(
            f"no XML files under {str(folder)!r}: expected a clone of MedQuAD. Get it with: {GIT_CLONE}"
        )
    loaded = Loaded([])
    for file in files:
        try:
            loaded.rows += _document(ElementTree.parse(file).getroot(), loaded)
        except (
            ElementTree.ParseError,
            LookupError,
            ValueError,
            OSError,
        ) as error:  # malformed, an unknown encoding, unreadable
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
            loaded.skipped.append(
                f"{root.get('id') or root.tag}: an answer without its question or qtype"
            )
        else:
            rows.append(
                {
                    "qtype": question.get("qtype"),
                    "question": (question.text or "").strip(),
                    "answer": answer,
                    **shared,
                }
            )
    return rows


def read_records(path: Path, expected: str) -> list[dict[str, Any]]:
    """The records of a CSV, JSONL or parquet file, as they are; ``expected`` names the columns in the message of a missing file.

    Raises:
        CourseError: no such file, or not readable as its ending says.
    """
    if not path.is_file():
        raise CourseError(
            f"no file {str(path)!r}: expected a .csv, .jsonl or .parquet file with the columns {expected}."
        )
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
        raise CourseError(
            f"{path.name} lacks the columns {', '.join(missing)}: it has {', '.join(sorted(columns))}. Rename them."
        )
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


# ---- splits ---------------------------------------------------------------------------------------------------------


# ---- leakage --------------------------------------------------------------------------------------------------------


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
            raise CourseError(
                f"Specialty(names={self.names!r}) is no pattern: {error}. Put names side by side: 'heart|cardi'."
            ) from error

    def holds(self, row: Row) -> bool:
        """Whether a row's focus, a synonym or a semantic type belongs to the field."""
        pattern = re.compile(rf"\b(?:{self.names})", re.IGNORECASE)
        named = bool(self.names) and any(
            map(pattern.search, [focus_of(row), *(row["synonyms"] or ())])
        )
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
        raise CourseError(
            f"no specialty {specialty!r}: there are {', '.join(SPECIALTIES)}; or pass data.Specialty(names=...)."
        )
    field_of = SPECIALTIES[specialty] if isinstance(specialty, str) else specialty
    chosen = [row for row in rows if field_of.holds(row)]
    if len(chosen) < least:
        name = specialty if isinstance(specialty, str) else specialty.names
        raise CourseError(
            f"{len(chosen)} rows about {name!r} are too few to train on (at least {least}): widen it or load more rows."
        )
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


def make(
    plan: Plan, folder: Path, without: Sequence[str] = (), specialty: str = ""
) -> tuple[Splits, dict[str, Any]]:
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
        with suppress(
            CourseError
        ):  # questions in one's own words name no disease: then the column focus alone carries the split
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
        "damage": {
            name: [f"{_named(loaded.rows[n])}: {words}" for n, words in at]
            for name, at in damage(loaded.rows).items()
        },
        "focus_recovery": recovery,
    }
    with suppress(OSError):  # a folder that cannot be written is named by what comes next
        (folder / "data.json").unlink(
            missing_ok=True
        )  # until it is back, last of all, parts of two recipes may stand side by side
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
        _columns(
            "cleaning rule",
            {
                n: f"{e['changed']:,} changed, {e['dropped']:,} dropped"
                for n, e in card["cleaning"].items()
            },
        ),
        _columns("part", {name: f"{n:,} rows" for name, n in card["rows"].items()}),
        *card["notes"],
        *(
            _columns(f"leakage, {pair}", {name: f"{share:.1%}" for name, share in shares.items()})
            for pair, shares in pairs.items()
        ),
        _columns(
            "boilerplate",
            {
                " ".join(b["answer"].split())[:60]
                + " ...": f"{b['foci']:,} diseases, {sum(b['rows'].values()):,} rows"
                for b in common
            },
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
    return (
        "\n".join([head, *(f"  {name:<{width}}  {value}" for name, value in values.items())])
        if values
        else ""
    )
