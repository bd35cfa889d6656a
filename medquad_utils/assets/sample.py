"""The embedded sample: short facts about real conditions, read from ``conditions.toml``.

Two things are made of the facts, and never mixed: *rows* (a question and its answer, in MedQuAD's own columns and
question templates) for the lessons, and *statements* (plain prose, several paraphrases of each) for pretraining the
embedded base. The base never sees a row, the fine-tuning never sees a statement.
"""

from __future__ import annotations

import dataclasses
import random
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CONDITIONS = Path(__file__).with_name("conditions.toml")

# MedQuAD's own question templates, odd spacing included.
QUESTIONS = {
    "information": "What is (are) {name} ?",
    "symptoms": "What are the symptoms of {name} ?",
    "causes": "What causes {name} ?",
    "treatment": "What are the treatments for {name} ?",
    "prevention": "How to prevent {name} ?",
    "outlook": "What is the outlook for {name} ?",
    "inheritance": "Is {name} inherited ?",
    "exams and tests": "How to diagnose {name} ?",
    "susceptibility": "Who is at risk for {name}? ?",
}

# How a row answers: one manner per question type. Fine-tuning has to learn exactly this.
ANSWERS = {
    "information": "In short, {name} {be} {facts}.",
    "symptoms": "The most common symptoms of {name} are {facts}.",
    "causes": "Known causes of {name} are {facts}.",
    "treatment": "Treatment for {name} can include {facts}.",
    "prevention": "You can lower the risk of {name} by {facts}.",
    "outlook": "The outlook for {name}: {facts}.",
    "inheritance": "As a rule, {name} {be} {facts}.",
    "exams and tests": "Doctors diagnose {name} with the help of {facts}.",
    "susceptibility": "The risk of {name} is higher for {facts}.",
}

# How prose states the same facts. Paraphrases matter: a fact seen in one wording only is recalled in that wording only.
STATEMENTS = {
    "information": (
        "{Name} {be} {facts}.",
        "By definition, {name} {be} {facts}.",
        "In medicine, the name {name} stands for {facts}.",
        "Textbooks describe {name} as {facts}.",
        "Put simply, {name} {be} {facts}.",
        "What doctors call {name} {be} {facts}.",
    ),
    "symptoms": (
        "Symptoms of {name} include {facts}.",
        "People with {name} often notice {facts}.",
        "The signs of {name} are {facts}.",
        "{Name} may bring {facts}.",
        "Typical complaints in {name} are {facts}.",
        "A person with {name} can have {facts}.",
    ),
    "causes": (
        "Causes of {name} include {facts}.",
        "{Name} can result from {facts}.",
        "Behind {name} there may be {facts}.",
        "Doctors trace {name} back to {facts}.",
        "The known origins of {name} are {facts}.",
        "Research links {name} to {facts}.",
    ),
    "treatment": (
        "Treatments for {name} include {facts}.",
        "{Name} can be treated with {facts}.",
        "To treat {name}, doctors use {facts}.",
        "The usual care for {name} is {facts}.",
        "Care for {name} may include {facts}.",
        "People with {name} are often helped by {facts}.",
    ),
    "prevention": (
        "Steps that help prevent {name} include {facts}.",
        "The risk of {name} can be lowered by {facts}.",
        "To prevent {name}, experts advise {facts}.",
        "Protection against {name} comes from {facts}.",
        "One can guard against {name} by {facts}.",
        "Good ways to avoid {name} are {facts}.",
    ),
    "outlook": (
        "With {name}, {facts}.",
        "As for the outlook in {name}, {facts}.",
        "In the long run, with {name} {facts}.",
        "The prognosis of {name}: {facts}.",
        "The course of {name}: {facts}.",
        "For those living with {name}, {facts}.",
    ),
    "inheritance": (
        "In families, {name} {be} {facts}.",
        "As for heredity, {name} {be} {facts}.",
        "Geneticists say that {name} {be} {facts}.",
        "{Name} {be} {facts}.",
        "By its genetics, {name} {be} {facts}.",
        "From parent to child, {name} {be} {facts}.",
    ),
    "exams and tests": (
        "Tests for {name} include {facts}.",
        "{Name} {be} diagnosed with {facts}.",
        "To find {name}, doctors rely on {facts}.",
        "The diagnosis of {name} rests on {facts}.",
        "Doctors confirm {name} by {facts}.",
        "Useful exams in {name} are {facts}.",
    ),
    "susceptibility": (
        "People at higher risk of {name} include {facts}.",
        "{Name} {be} more likely in {facts}.",
        "Those most often affected by {name} are {facts}.",
        "Risk groups for {name} are {facts}.",
        "The chance of {name} is raised in {facts}.",
        "More prone to {name} are {facts}.",
    ),
}


@dataclass(frozen=True)
class Condition:
    """One condition of the sample; ``facts`` maps a MedQuAD question type to short phrases, in a fixed order."""

    name: str
    mention: str
    specialty: str
    semantic_type: str
    facts: dict[str, list[str]]
    synonyms: tuple[str, ...] = ()
    plural: bool = False

    @property
    def sentence_start(self) -> str:
        """The name as a sentence opens with it."""
        return self.mention[0].upper() + self.mention[1:]


@cache
def conditions(path: Path = CONDITIONS) -> tuple[Condition, ...]:
    """All conditions of ``path``, in file order."""
    with path.open("rb") as file:
        entries = tomllib.load(file)["condition"]
    return tuple(
        Condition(**{**entry, "synonyms": tuple(entry.get("synonyms", ()))}) for entry in entries
    )


def phrase(qtype: str, facts: list[str]) -> str:
    """Join the facts of one question type to the phrase that the templates expect."""
    if qtype == "information":
        return " ".join(facts)
    if qtype in ("outlook", "inheritance"):
        return ", and ".join(facts)
    return facts[0] if len(facts) == 1 else ", ".join(facts[:-1]) + " and " + facts[-1]


def _fill(template: str, condition: Condition, qtype: str) -> str:
    return template.format(
        name=condition.mention,
        Name=condition.sentence_start,
        be="are" if condition.plural else "is",
        facts=phrase(qtype, condition.facts[qtype]),
    )


def answer(condition: Condition, qtype: str) -> str:
    """The reference answer to a question of ``qtype`` about ``condition``."""
    return _fill(ANSWERS[qtype], condition, qtype)


def rows() -> list[dict[str, object]]:
    """The sample as rows of the common schema (see ``files.COLUMNS``); what the sample lacks is ``None``.

    MedQuAD's sources differ in how they write a name (GARD in capitals, GHR not), so every second row here uses the
    form of running text.
    """
    out: list[dict[str, object]] = []
    for number, condition in enumerate(conditions()):
        for place, qtype in enumerate(condition.facts):
            name = condition.name if (number + place) % 2 else condition.mention
            out.append(
                {
                    "qtype": qtype,
                    "question": QUESTIONS[qtype].format(name=name),
                    "answer": answer(condition, qtype),
                    "focus": condition.name,
                    "synonyms": list(condition.synonyms),
                    "cui": None,
                    "semantic_type": [condition.semantic_type],
                    "source": "course sample",
                    "url": None,
                    "document_id": f"sample-{number:03d}",
                }
            )
    return out


def facts_of(focus: str, qtype: str) -> list[str]:
    """The facts that a complete answer holds; empty where the sample has none."""
    return next(
        (c.facts.get(qtype, []) for c in conditions() if c.name.lower() == focus.lower()), []
    )


def statements(condition: Condition, qtype: str) -> list[str]:
    """Every paraphrase of one question type's facts."""
    return [_fill(template, condition, qtype) for template in STATEMENTS[qtype]]


def _told(condition: Condition, aspects: int, rng: random.Random) -> list[str]:
    """Up to ``aspects`` statements in random order and wording; now and then the name is written as in a heading."""
    if rng.random() < 0.3:
        condition = dataclasses.replace(condition, mention=condition.name)
    chosen = rng.sample(list(condition.facts), min(aspects, len(condition.facts)))
    return [_fill(rng.choice(STATEMENTS[qtype]), condition, qtype) for qtype in chosen]


def article(
    condition: Condition, aspects: int, rng: random.Random, beside: Condition | None = None
) -> str:
    """A short article about ``condition``, mostly under a title.

    With ``beside`` it is about two conditions, sentence by sentence in random order: only the name in a sentence then
    tells which one it is about.
    """
    if beside is not None:
        lines = _told(condition, -(-aspects // 2), rng) + _told(beside, -(-aspects // 2), rng)
        rng.shuffle(lines)
        return " ".join(lines)
    title = condition.name + "\n" if rng.random() < 0.7 else ""
    return title + " ".join(_told(condition, aspects, rng))
