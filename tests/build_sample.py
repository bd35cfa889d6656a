"""Write the embedded sample: XML documents in MedQuAD's layout, with planted defects.

``python tests/build_sample.py`` writes ``medquad_utils/assets/medquad_sample``. The course wrote
the wording and the counts (``build_sample.toml``), so the truth about every row is known: which
defects were planted in it, and which condition it is about. Cleaning gives most of ``rows`` back.
"""

from __future__ import annotations

import random
import re
import shutil
import tomllib
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from medquad_utils.assets import sample
from medquad_utils.assets.sample import Condition
from medquad_utils.data import SAMPLE
from medquad_utils.files import Row, write_json

WORDING = Path(__file__).with_name("build_sample.toml")
TRUTH = "truth.json"  # the condition of each row, and defect -> the numbers of its rows, from 0
QUESTIONS, ANSWERS = (
    {qtype: str(s[kind]) for qtype, s in sample.SENTENCES.items()}
    for kind in ("question", "answer")
)
_TOML = tomllib.loads(WORDING.read_text(encoding="utf-8"))
LINKS = ("question", "url", "cui")  # what joins a clinic's document to its condition
HOME = ("handbook", "leaflets")  # their rows are the clean ones, changed in place
COMMON = "S0000000"  # a concept of every condition. The sample's own numbers, not those of UMLS.


@dataclass(frozen=True)
class Truth:
    """What is known about a raw row: its condition, and the defect planted in it ("": none)."""

    condition: str
    defect: str


@dataclass
class Document:
    """The text of a collection about one condition.

    By question type: the ``clean`` rows of the condition, and the document's ``rows`` with defects.
    """

    collection: str
    number: int
    condition: Condition
    clean: dict[str, Row]
    focus: str
    cui: list[str] = field(default_factory=list)
    url: str = ""
    link: str = ""
    rows: dict[str, tuple[Row, str]] = field(default_factory=dict)


def rows() -> list[Row]:
    """Return the sample as rows with ``files.COLUMNS``."""
    result: list[Row] = []
    for number, condition in enumerate(sample.conditions()):
        for place, qtype in enumerate(condition.facts):
            # MedQuAD's sources write a name as a heading or as in a text, so the sample has both.
            name = condition.name if (number + place) % 2 else condition.mention
            row = {
                "qtype": qtype,
                "question": QUESTIONS[qtype].format(name=name),
                "answer": sample.fill(ANSWERS[qtype], condition, qtype),
                "focus": condition.name,
                "synonyms": condition.synonyms,
                "cui": None,
                "semantic_type": [condition.semantic_type],
                "source": sample.SOURCE,
                "url": None,
                "document_id": f"sample-{number:03d}",
            }
            result.append(row)
    return result


def statements(condition: Condition, qtype: str) -> list[str]:
    """Return every paraphrase of the facts of one question type."""
    return [sample.fill(template, condition, qtype) for template in sample.STATEMENTS[qtype]]


def _open(rng: random.Random) -> dict[tuple[str, int], Document]:
    """Open the documents of each collection: a clinic's under a synonym, a mailbox's without focus.

    Every condition is in the handbook or the leaflets. Some are elsewhere too.
    """
    conditions = sample.conditions()
    everyone = range(len(conditions))
    members = {"handbook": [n for n in everyone if n % 3], "leaflets": list(everyone[::3])}
    for name, count in _TOML["conditions"].items():
        fit = [n for n in everyone if name != "clinic" or conditions[n].synonyms]
        members[name] = rng.sample(fit, count)
    clean: list[dict[str, Row]] = [{} for _ in conditions]
    for row in rows():
        clean[int(row["document_id"].removeprefix("sample-"))][row["qtype"]] = row
    documents = {}
    for collection, numbers in members.items():
        for n in numbers:
            condition = conditions[n]
            focus = "" if collection == "mailbox" else condition.name
            concepts = [f"S{n + 1:07d}", COMMON] if collection in HOME else []
            document = Document(collection, n, condition, clean[n], focus, concepts)
            documents[collection, n] = document
    for place, n in enumerate(members["clinic"]):
        spelled, home = documents["clinic", n], documents[HOME[n % 3 == 0], n]
        spelled.focus = spelled.condition.synonyms[0]
        # The last two share nothing with their condition's own document.
        spelled.link = LINKS[place % 3] if place < len(members["clinic"]) - 2 else ""
        if spelled.link == "url":
            spelled.url = home.url = f"https://clinic.example/{n}"
        elif spelled.link == "cui":
            spelled.cui = home.cui
    return documents


def _wordings(document: Document, row: Row) -> dict[str, str]:
    """Return the fields that a text of ``build_sample.toml`` may hold, for one clean row."""
    condition, answer, qtype = document.condition, str(row["answer"]), str(row["qtype"])
    facts, name = condition.facts[qtype], condition.mention
    focus = document.focus if document.collection == "clinic" else name
    asked = QUESTIONS[qtype].format(name=focus)
    kept = document.collection in HOME or document.link == "question"
    article = " ".join([*(str(r["answer"]) for r in document.clean.values()), _TOML["closing"]])
    return {
        "name": name,
        "Name": name[0].upper() + name[1:],
        "focus": focus,
        "original": row["question"],
        "question": row["question"] if kept else asked,
        "heading": re.sub(r"[\s?]+$", "?", asked),
        "answer": answer,
        "near": answer.replace(" and ", ", and "),
        "article": article,
        "facts": sample.phrase(qtype, facts),
        "bullets": "\n - ".join(facts),
        "signs": "\n".join(f"{fact} -" for fact in facts),
        "spaced": answer.replace(" ", "   ", 4),
        "deleted": answer.replace("'", "").replace("Barre", "Barr"),
        "broken": article.replace(" of ", " o f ", 2),
    }


def _planted(plant: dict[str, Any], document: Document, row: Row) -> Row | None:
    """Write a row as an entry of the TOML file says, or return None where it does not fit."""
    if row["qtype"] not in plant.get("from", [row["qtype"]]):
        return None
    if document.condition.name not in plant.get("only", [document.condition.name]):
        return None
    wordings = _wordings(document, row)
    answer = plant["text"].format(**wordings)
    if answer == row["answer"] and plant["text"] != "{answer}":  # no letter to delete here
        return None
    question = plant.get("question", "{question}").format(**wordings)
    return {"qtype": plant.get("qtype", row["qtype"]), "question": question, "answer": answer}


@cache
def _documents() -> tuple[Document, ...]:
    """Write every document: the clean rows, then each entry of ``build_sample.toml`` in turn."""
    rng = random.Random(31)  # fixed: chosen by counts, so that each part has its share
    documents = _open(rng)
    for document in documents.values():
        if document.collection in HOME:
            document.rows = {qtype: (row, "") for qtype, row in document.clean.items()}
    free = [(d, qtype) for d in documents.values() for qtype in d.clean]  # each is taken once
    # A plant that names its conditions goes first: no other may take its row.
    for plant in sorted(_TOML["plant"], key=lambda plant: "only" not in plant):
        places = [(d, qtype) for d, qtype in free if d.collection == plant["collection"]]
        count = 0
        for document, qtype in rng.sample(places, len(places)):
            changed = _planted(plant, document, document.clean[qtype])
            if changed and count < plant.get("count", 1):
                document.rows[qtype] = (changed, plant.get("defect", ""))
                free.remove((document, qtype))
                count += 1
    return tuple(sorted(documents.values(), key=lambda d: (d.collection, d.number)))


def _xml(document: Document) -> str:
    """Write a document in MedQuAD's layout."""
    root = ElementTree.Element("Document", id=f"{document.collection}-{document.number:03d}")
    root.set("source", f"{sample.SOURCE}: {document.collection}")
    if document.url:
        root.set("url", document.url)

    def add(parent: ElementTree.Element, tag: str, text: str, **known: str) -> ElementTree.Element:
        element = ElementTree.SubElement(parent, tag, known)
        element.text = text
        return element

    add(root, "Focus", document.focus)
    annotations = add(root, "FocusAnnotations", "")
    names = document.condition.synonyms if document.collection in HOME else []
    kinds = {"CUI": document.cui, "SemanticType": [document.condition.semantic_type]}
    for tag, values in (kinds | {"Synonym": names}).items():
        for value in values:
            add(annotations, tag, value)
    pairs = add(root, "QAPairs", "")
    for row, _ in document.rows.values():
        pair = add(pairs, "QAPair", "")
        add(pair, "Question", row["question"], qtype=row["qtype"])
        add(pair, "Answer", row["answer"])
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def documents() -> dict[str, str]:
    """Return the XML of each file by its name. Three of them are broken."""
    written = {f"{d.collection}/{d.number:03d}.xml": _xml(d) for d in _documents() if d.rows}
    return written | {file["name"]: file["text"] for file in _TOML["broken_file"]}


def truth() -> list[Truth]:
    """Return what is known about each answered row, in the order of ``documents``."""
    return [
        Truth(document.condition.name, defect)
        for document in _documents()
        for row, defect in document.rows.values()
        if row["answer"]
    ]


def build(folder: Path) -> None:
    """Write the documents, and what is known about their rows (``TRUTH``), to ``folder``."""
    for name, text in documents().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    planted: dict[str, list[int]] = {}
    for number, about in enumerate(truth()):
        if about.defect:
            planted.setdefault(about.defect, []).append(number)
    write_json(folder / TRUTH, {"conditions": [t.condition for t in truth()], "planted": planted})


if __name__ == "__main__":
    shutil.rmtree(SAMPLE, ignore_errors=True)
    build(SAMPLE)
