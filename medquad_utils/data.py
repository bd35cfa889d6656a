"""The data stage: rows of every source in one schema, cleaned, and split by disease.

The data: Ben Abacha and Demner-Fushman, "A question-entailment approach to question answering",
BMC Bioinformatics 2019, 20:511; CC BY 4.0.
"""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medquad_utils import CourseError, atomic, files, machine, specialties, tables
from medquad_utils.cleaning import Effect, clean, damage
from medquad_utils.files import ASSETS, COLUMNS, LISTS, Row
from medquad_utils.profiles import Plan
from medquad_utils.splits import PARTS, TYPES, Splits, leakage_report, split, template_of
from medquad_utils.tables import ENDINGS, clean_text, has_words, list_files

HUB_DATASET = "keivalya/MedQuad-MedicalQnADataset"
HUB = {  # data set on the Hub -> its table, and the commit or branch; data.json records the commit
    HUB_DATASET: ("medDataset_processed.csv", "5b0961fbaa6d7f9c344c5d59c29943fb900c2eca"),
    "lavita/MedQuAD": ("*.parquet", "main"),
}
GIT_CLONE = "git clone https://github.com/abachaa/MedQuAD"

SAMPLE = ASSETS / "medquad_sample"  # invented documents, in MedQuAD's layout
MISSING = {"nan", "null", "none", "n/a", "#n/a"}  # what programs write for an empty cell

Place = int | str  # number of a record, from 1, over all files of a source; or a document's name
Places = dict[str, list[Place]]  # what happened to records -> which

NO_ANSWER = "no answer"  # as ``_problem`` says it
CLEANED = "control characters removed, or letters composed (NFC)"
FOREIGN = "HTML, or letters that were decoded wrongly; kept"
MARKUP = re.compile(r"</?[a-zA-Z][^<>\n]{0,80}>|&(?:amp|nbsp|lt|gt|quot|#\d+);|â€|[ÂÃ][\x80-\xbf]")


@dataclass
class Loaded:
    """The rows of a source, and what happened to its records.

    A record became a row or is in ``skipped``, by reason. ``notes`` lists changes. ``origins``
    holds the place and all right answers of each row.
    """

    rows: list[Row]
    skipped: Places = field(default_factory=lambda: defaultdict(list))
    notes: Places = field(default_factory=lambda: defaultdict(list))
    origins: list[tuple[Place, list[str]]] = field(default_factory=list, compare=False)
    commit: str = ""  # of a data set on the Hub

    @property
    def records(self) -> int:
        """Count the records."""
        return len(self.rows) + sum(map(len, self.skipped.values()))

    def __str__(self) -> str:
        told = [*listed(self.skipped), *listed(self.notes)]
        return "; ".join([f"{len(self.rows):,} rows of {self.records:,} records", *told])


def listed(places: Mapping[str, Sequence[Place]]) -> list[str]:
    """Describe what happened to records: how often, and where first."""
    return [
        f"{len(at):,} x {what} (record {', '.join(map(str, at[:5]))}{', ...' * (len(at) > 5)})"
        for what, at in places.items()
    ]


def load(plan: Plan) -> Loaded:
    """Load the rows of the plan's source."""
    if plan.source == "sample":
        return load_xml(SAMPLE)
    if plan.source == "hub":
        return load_hub(plan.data_path or HUB_DATASET)
    return (load_xml if plan.source == "xml" else load_table)(Path(plan.data_path))


def _with_rows(loaded: Loaded, name: str) -> Loaded:
    if not loaded.rows:
        raise CourseError(
            f"{name} holds no question with an answer: {loaded}. Expected a question and its "
            "answer in each record."
        )
    return loaded


def load_xml(path: Path) -> Loaded:
    """Load the answered questions of a clone of MedQuAD. Broken files are skipped and named."""
    if not (paths := list_files(path, [".xml"])):
        raise CourseError(
            f"no XML files under {str(path)!r}: expected a clone of MedQuAD. "
            f"Get it with: {GIT_CLONE}"
        )
    loaded = Loaded([])
    for file in paths:
        try:
            _add_document(ElementTree.parse(file).getroot(), loaded)
        except (ElementTree.ParseError, LookupError, ValueError, OSError) as error:
            # Expat raises LookupError and ValueError for encodings that it cannot read.
            loaded.skipped["broken XML"].append(f"{file.parent.name}/{file.name} ({error})")
    return _with_rows(loaded, path.name)


# The other names of the second layout, which four files of NINDS have.
SECOND = {"doctitle-focus": "Focus", "cui": "CUI", "semanticType": "SemanticType",
          "pair": "QAPair", "question": "Question", "answer": "Answer"}  # fmt: skip


def _add_document(root: ElementTree.Element, loaded: Loaded) -> None:
    for element in root.iter():
        element.tag = SECOND.get(element.tag, element.tag)
    tags = {"focus": "Focus", "cui": "CUI", "semantic_type": "SemanticType", "synonyms": "Synonym"}
    shared: Row = {column: [e.text for e in root.iter(tag)] for column, tag in tags.items()}
    shared["source"] = root.get("source", root.get("corpus"))
    shared["url"] = root.get("url")
    shared["document_id"] = root.get("id", root.get("docid"))
    place, before = shared["document_id"] or root.tag, loaded.records
    pairs = list(root.iter("QAPair"))
    for pair in pairs:
        own = {"question": pair.findtext("Question"), "answer": pair.findtext("Answer")}
        qtype = next((e.get("qtype") for e in pair.iterfind("Question")), None)
        _add(shared | own | {"qtype": qtype}, place, loaded)
    if not pairs:
        loaded.skipped["a document without questions"].append(place)
    assert loaded.records == before + max(1, len(pairs)), f"{place}: a question was lost"


def load_hub(name: str) -> Loaded:
    """Load a data set of ``HUB``."""
    from huggingface_hub import snapshot_download

    if name not in HUB:
        raise CourseError(
            f"source 'hub' reads {' or '.join(HUB)}, not {name!r}: download the file of another "
            "data set, then source=csv data_path=FILE."
        )
    table, commit = HUB[name]
    todo = (
        f"Check the network, or read MedQuAD from a folder: {GIT_CLONE}, then source=xml "
        "data_path=MedQuAD; source=sample needs no network."
    )
    with machine.network(f"the data set {name} could not be loaded from the Hub", todo):
        folder = Path(snapshot_download(name, repo_type="dataset", revision=commit,
                                        allow_patterns=table))  # fmt: skip
    # The Hub's cache names the folder of a snapshot by its commit.
    return dataclasses.replace(load_table(folder), commit=folder.name)


def load_table(path: Path) -> Loaded:
    """Load a table, or all tables below a folder: files of ``ENDINGS`` with columns of ``NAMES``.

    A CourseError names the line or the record that cannot be read without a guess.
    """
    if not (found := list_files(path, ENDINGS)):
        raise CourseError(
            f"no table {str(path)!r}: expected a file, or a folder of files, that ends in "
            f"{', '.join(ENDINGS)} (or .gz), with columns for question and answer."
        )
    loaded, number = Loaded([]), 0
    for file in found:
        (records, notes), first = tables.read(file), number + 1
        loaded.notes.update({note: [first] for note in notes})
        for number, record in enumerate(records, first):
            if record is None:
                loaded.skipped["a chat that is not one question and its answer"].append(number)
            else:
                _add(record, number, loaded)
    assert loaded.records == number, f"{number} records, but {loaded.records} are accounted for"
    return _with_rows(loaded, path.name)


def _problem(column: str, cell: Sequence[str] | None, found: Sequence[str]) -> str:
    """Say why a cell holds no question or no answer, or ""."""
    if cell is None:
        return f"{column} is not text"
    if column == "question" and len(found) > 1:
        return "several questions in one record"
    return "" if found else f"no {column}"


def _add(record: Mapping[str, Any], place: Place, loaded: Loaded) -> None:
    """Add the row of a record to ``loaded``, or the reason why it has none."""
    cells = {column: tables.texts(record.get(column)) for column in COLUMNS}
    tidied = {column: list(map(clean_text, cell or ())) for column, cell in cells.items()}
    texts = {
        column: [text for text in found if has_words(text) and text.lower() not in MISSING]
        for column, found in tidied.items()
    }
    for column in ("question", "answer"):
        if problem := _problem(column, cells[column], texts[column]):
            loaded.skipped[problem].append(place)
            return
    for column in (column for column, cell in cells.items() if cell is None):
        loaded.notes[f"{column} is not text: left out"].append(place)
    row: Row = {column: next(iter(found), None) for column, found in texts.items()}
    for column in LISTS:  # lavita/MedQuAD separates several values by a bar
        parts = [part.strip() for text in texts[column] for part in text.split("|")]
        row[column] = list(filter(None, parts)) or None
    if not row["qtype"]:
        match = template_of(row["question"])
        row["qtype"] = TYPES[match[0]] if match else "information"
        how = "from the question's template" if match else "'information', for want of a template"
        loaded.notes[f"question type {how}"].append(place)
    if any(tidied[c] != [text.strip() for text in cell or ()] for c, cell in cells.items()):
        loaded.notes[CLEANED].append(place)
    if MARKUP.search(row["question"] + texts["answer"][0]):
        loaded.notes[FOREIGN].append(place)
    if len(texts["answer"]) > 1:
        loaded.notes["several right answers, of which training reads the first"].append(place)
    loaded.rows.append(row)
    loaded.origins.append((place, texts["answer"]))


def _recipe(plan: Plan, without: Sequence[str] = (), specialty: str = "") -> dict[str, Any]:
    """Describe what determines the written rows: source, its files, code, seed and options."""
    path, here = _path(plan), Path(__file__).parent
    names = ("data", "tables", "cleaning", "splits", "specialties")
    code = [here / f"{name}.py" for name in names]
    return {
        "code": files.content_hash(code, here),  # a new rule makes the rows anew
        "source": plan.source,
        "data": Path(plan.data_path).name,
        "files": files.content_hash(_files_of(plan), path if path.is_dir() else path.parent),
        "seed": plan.seed,
        "without": sorted(without),
        "specialty": specialty,
    }


def _path(plan: Plan) -> Path:
    return SAMPLE if plan.source == "sample" else Path(plan.data_path)


def _files_of(plan: Plan) -> list[Path]:
    """List the files of the plan's source on this machine."""
    return [] if plan.source == "hub" else list_files(_path(plan), [".xml", *ENDINGS])


def _check_replaced(plan: Plan, card: Path, parts: Sequence[Path]) -> None:
    """Check that the files to write replace no input and nothing that others wrote."""
    inputs = {file.resolve() for file in _files_of(plan)}
    if own := [path.name for path in (*parts, card) if path.resolve() in inputs]:
        raise CourseError(f"{own[0]} would replace the file that it is made from: set --out.")
    atomic.check_ours(card, '"other_specialties"', *parts)


def prepare(plan: Plan) -> Splits:
    """Read the plan's splits from ``runs/<profile>/data``, or make and write them."""
    folder = plan.folder / "data"
    return written(folder, _recipe(plan)) or make(plan, folder)[0]


def written(folder: Path, recipe: Mapping[str, Any] | None = None) -> Splits | None:
    """Read the splits that ``make`` wrote to ``folder``, of ``recipe`` if given.

    ``None`` if there are none, or the parts are not those of ``data.json``: a kill came between
    them, or somebody changed one.
    """
    card, parts = folder / "data.json", [folder / f"{part}.parquet" for part in PARTS]
    if not (card.is_file() and all(part.is_file() for part in parts)):
        return None
    record = files.read_json(card, "recipe", "splits")
    if recipe not in (None, record["recipe"]):
        return None
    train, validation, test = map(files.read_rows, parts)
    splits = Splits(train, validation, test)
    return splits if _hash(splits) == record["splits"] else None


def _hash(splits: Splits) -> str:
    parts = (getattr(splits, part) for part in PARTS)
    return files.value_hash([[[row.get(c) for c in COLUMNS] for row in part] for part in parts])


def identity(folder: Path) -> str:
    """Return the hash of all rows that ``make`` wrote to ``folder``; "" if there are none yet."""
    card = folder / "data.json"
    return str(files.read_json(card).get("splits", "")) if card.is_file() else ""


def make(
    plan: Plan, folder: Path, without: Sequence[str] = (), specialty: str = ""
) -> tuple[Splits, dict[str, Any]]:
    """Load, clean, split and write three parquet files and ``data.json``.

    ``without`` names cleaning rules to turn off. ``specialty`` selects a sub-corpus. Returns the
    splits and the content of ``data.json``.
    """
    parts = {part: folder / f"{part}.parquet" for part in PARTS}
    _check_replaced(plan, folder / "data.json", list(parts.values()))
    loaded = load(plan)
    rows, effects = clean(loaded.rows, without)
    chosen = specialties.select(rows, specialty) if specialty else rows
    try:
        splits = split(chosen, seed=plan.seed)
    except CourseError as error:  # too few: what was skipped may be why
        raise CourseError(f"{error} Loaded: {loaded}.") from error
    card = _card(loaded, effects, splits) | {"recipe": _recipe(plan, without, specialty)}
    card |= {"specialty": specialty, "other_specialties": len(rows) - len(chosen)}
    kept = sum(splits.sizes().values()) + card["other_specialties"]
    assert card["loaded"] == kept + card["dropped"], f"{card['loaded']} rows, {kept} are in parts"
    with atomic.locked(folder), ExitStack() as stack:
        # All is written before anything is replaced, in the order of a stack: data.json first. It
        # says whose folder it is, and its hash tells parts that a kill left of another recipe.
        for part, path in parts.items():
            temporary = stack.enter_context(atomic.whole_file(path))
            files.write_rows(temporary, getattr(splits, part))
        files.dump_json(stack.enter_context(atomic.whole_file(folder / "data.json")), card)
    return splits, card


def _card(loaded: Loaded, effects: Mapping[str, Effect], splits: Splits) -> dict[str, Any]:
    """Count what was loaded, what cleaning did, what each part holds, and what leaks."""
    skipped = {reason: at for reason, at in loaded.skipped.items() if reason != NO_ANSWER}
    leaks, lost = leakage_report(splits), damage(loaded.rows)
    common = {" ".join(a.split())[:60]: foci for a, foci in leaks.pop("boilerplate").items()}
    return {
        "records": loaded.records,
        "loaded": len(loaded.rows),
        "unanswered": len(loaded.skipped.get(NO_ANSWER, ())),
        "skipped": {reason: len(at) for reason, at in skipped.items()},
        "reading": [*listed(skipped), *listed(loaded.notes)],
        "commit": loaded.commit,
        "by_source": dict(Counter(row["source"] or "unknown" for row in loaded.rows).most_common()),
        "by_qtype": dict(Counter(row["qtype"] for row in loaded.rows).most_common()),
        "cleaning": {n: {"changed": e.changed, "dropped": e.dropped} for n, e in effects.items()},
        "dropped": sum(effect.dropped for effect in effects.values()),
        "rows": splits.sizes(),
        "notes": splits.notes,
        "leakage": leaks,
        "diseases_of_boilerplate": common,
        "words_that_lost_letters": len(lost["letters"]),
        "units_that_may_lack_a_prefix": [
            f"{loaded.origins[number][0]}: {words}" for number, words in lost["units"]
        ],
        "splits": _hash(splits),
    }


def summary(card: Mapping[str, Any]) -> str:
    """Write the record of ``make`` as text: where its records are, and a table of each count."""
    import pandas

    blocks = [
        f"{card['records']:,} records = {card['loaded']:,} rows + {card['unanswered']:,} without "
        f"an answer + {sum(card['skipped'].values()):,} skipped\n"
        f"{card['loaded']:,} rows = {sum(card['rows'].values()):,} in the parts + "
        f"{card['dropped']:,} dropped by cleaning"
        + (f" + {card['other_specialties']:,} of other fields" if card["specialty"] else ""),
        f"{card['words_that_lost_letters']:,} words lost a letter upstream; "
        f"{len(card['units_that_may_lack_a_prefix']):,} numbers may have lost the prefix of their "
        "unit",
    ]
    for name, value in card.items():
        head = name.replace("_", " ")
        if value and isinstance(value, list):
            blocks.append("\n".join([head, *value]))
        elif value and isinstance(value, dict) and name != "recipe":
            of_dicts = all(isinstance(part, dict) for part in value.values())
            table = pandas.DataFrame(value).T if of_dicts else pandas.Series(value)
            blocks.append(f"{head}\n{table.to_string(float_format='{:.1%}'.format)}")
    return "\n\n".join(blocks)
