"""Reference runs: the numbers of all lessons, kept in ``notebooks/reference/<profile>/``.

``medquad run --reference DIR`` writes one. It holds the model's own answers, and no sentence of the
data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from medquad_utils import data
from medquad_utils.atomic import whole_folder
from medquad_utils.files import Row, read_json, write_json
from medquad_utils.machine import versions
from medquad_utils.profiles import PROFILES, Plan
from medquad_utils.splits import NGRAM, ngrams

FOLDER = Path(__file__).parent.parent / "notebooks" / "reference"
YOURS, HIDDEN = "your run", "[as in MedQuAD]"
QUESTIONS = 10  # held-out ones in answers.json
PLACES = {"model_path", "data_path", "out"}  # keys whose values name a folder of this machine
REAL = [name for name in PROFILES if name != "tiny"]  # what a reader on tiny wants to see
COUNTS = ("loaded", "unanswered", "by_source", "by_qtype", "cleaning", "rows", "notes")


def beside(name: str, yours: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a lesson's metrics by run: ``yours``, and the committed run of the largest profile."""
    if not (folder := folder_with(file := f"metrics/{name}.json")):
        print("No reference run of this lesson is in this checkout.")
        return {YOURS: yours}
    return {YOURS: yours, label(read_json(folder / "reference.json")): read_json(folder / file)}


def folder_with(file: str) -> Path | None:
    """Return the folder of the largest profile's committed run on real data that holds ``file``."""
    folders = (FOLDER / profile for profile in reversed(REAL))
    return next((folder for folder in folders if (folder / file).is_file()), None)


def label(about: Mapping[str, Any]) -> str:
    """Name a run: "SmolLM2-135M-Instruct on MedQuAD, CPU, 2026-11-30"."""
    names = {"sample": "the course's sample", "hub": "MedQuAD", "xml": "MedQuAD"}
    rows = names.get(about["data"]["source"], "a table of rows")
    model, chip = about["model"].split("/")[-1], about["hardware"].split(",")[0]
    return f"{model} on {rows}, {chip}, {about['date']}"


def counts_beside(yours: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return counts of rows by run, as ``beside``: ``by_source`` and ``by_qtype``."""
    if not (folder := folder_with("reference.json")):
        return {YOURS: yours}
    about = read_json(folder / "reference.json")
    return {YOURS: yours, label(about): about["data"]}


def write(plan: Plan, folder: Path, seconds: Mapping[str, float], peak_gb: float = 0) -> None:
    """Write what all lessons of ``plan`` left to ``folder``; ``seconds`` by the lessons' titles."""
    content = {"reference.json": about(plan, seconds, peak_gb), "answers.json": answers(plan)}
    for path in sorted((plan.folder / "metrics").glob("*.json")):
        content[f"metrics/{path.name}"] = read_json(path)
    parts = data.prepare(plan)  # cleaning can join words that stand apart in the rows as loaded
    rows = [*data.load(plan).rows, *parts.train, *parts.validation, *parts.test]
    with whole_folder(folder) as fresh:
        for name, value in without_sentences(content, rows).items():
            write_json(fresh / name, value)


def about(plan: Plan, seconds: Mapping[str, float], peak_gb: float) -> dict[str, Any]:
    """Describe the run: model, data, machine, versions, date and times."""
    card = read_json(plan.folder / "data" / "data.json")
    return {
        "profile": plan.profile,
        "model": plan.model_id,
        "weights": plan.origin or f"from {'a local folder' if plan.model_path else 'the Hub'}",
        "data": {"source": plan.source} | {name: card[name] for name in COUNTS},
        "hardware": plan.hardware,
        "versions": versions(),
        "date": date.today().isoformat(),
        "seconds": {title: round(value, 1) for title, value in seconds.items()},
        "peak_gb": round(peak_gb, 1),
        "plan": plan.as_dict(fit=True),
    }


def answers(plan: Plan) -> dict[str, list[dict[str, str]]]:
    """Return what base and tuned model say to the three questions, and to ten of lesson 06."""
    import pandas

    three = read_json(plan.folder / "metrics" / "ask.json")["answers"]
    arms = pandas.read_parquet(plan.folder / "evaluation" / "answers.parquet").groupby("arm")
    said = {arm: dict(zip(t["question"], t["answer"], strict=True)) for arm, t in arms}
    # Longer questions are sentences of the data: they would be hidden.
    short = [q for q in said["base"] if len(re.findall(r"\w+", q)) < NGRAM][:QUESTIONS]
    held_out = [{"question": q} | {arm: said[arm][q] for arm in ("base", "tuned")} for q in short]
    return {"three questions": three, "held out": held_out}


def without_sentences(value: Any, rows: Sequence[Row]) -> Any:
    """Copy a JSON value without ``PLACES``; eight words in a row of the data become ``HIDDEN``."""
    texts: list[str] = []
    _mapped(value, texts.append)
    held = ngrams(text for row in rows for text in (row["question"], row["answer"]))
    shared = set(ngrams(texts)).intersection(held)  # the small set: the rows are only passed by
    return _mapped(value, lambda text: _hidden(text, shared))


def _mapped(value: Any, change: Callable[[str], Any]) -> Any:
    if isinstance(value, dict):
        return {k: _mapped(v, change) for k, v in value.items() if k not in PLACES}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _hidden(text: str, shared: set[tuple[str, ...]]) -> str:
    """Replace the stretches of ``text`` that are made of shared n-grams."""
    # Words as in ``ngrams``, with their places; the data are in ASCII.
    words, pieces, end = list(re.finditer(r"[^\W_]+", text)), [], 0
    for start, (first, last) in enumerate(zip(words, words[NGRAM - 1 :], strict=False)):
        if tuple(word[0].lower() for word in words[start : start + NGRAM]) in shared:
            if first.start() >= end:  # a new stretch
                pieces += [text[end : first.start()], HIDDEN]
            end = last.end()
    return "".join([*pieces, text[end:]])
