"""The embedded sample: short facts about real conditions, read from ``conditions.toml``.

They became questions and answers (``medquad_sample/``, by tests/build_sample.py) and articles for
pretraining the embedded base, which sees no answer. Fine-tuning sees no article.
"""

from __future__ import annotations

import dataclasses
import random
import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

SOURCE = "course sample"  # how the source of each of its rows begins
CONDITIONS = Path(__file__).with_name("conditions.toml")
SENTENCES = tomllib.loads(Path(__file__).with_name("sentences.toml").read_text(encoding="utf-8"))
# By question type. STATEMENTS have six forms each: a fact that is seen in one wording only is
# recalled in that wording only. Questions are MedQuAD's own templates, with its odd spaces. Answers
# have one form a type, which fine-tuning has to learn.
STATEMENTS: dict[str, list[str]] = {qtype: s["statements"] for qtype, s in SENTENCES.items()}


@dataclass(frozen=True)
class Condition:
    """One condition: ``name`` as in a heading, ``mention`` as in running text.

    ``facts`` maps a question type to short phrases, in a fixed order.
    """

    name: str
    mention: str
    specialty: str
    semantic_type: str
    facts: dict[str, list[str]]
    synonyms: list[str] = field(default_factory=list)
    plural: bool = False


@cache
def conditions() -> tuple[Condition, ...]:
    """Read all conditions, in file order."""
    entries = tomllib.loads(CONDITIONS.read_text(encoding="utf-8"))["condition"]
    return tuple(Condition(**entry) for entry in entries)


def phrase(qtype: str, facts: list[str]) -> str:
    """Join the facts of one question type as its sentences need them."""
    if qtype == "information":
        return " ".join(facts)
    if qtype in ("outlook", "inheritance"):
        return ", and ".join(facts)
    return facts[0] if len(facts) == 1 else ", ".join(facts[:-1]) + " and " + facts[-1]


def fill(template: str, condition: Condition, qtype: str) -> str:
    """Fill a sentence with the name and the facts of a condition."""
    return template.format(
        name=condition.mention,
        Name=condition.mention[0].upper() + condition.mention[1:],
        be="are" if condition.plural else "is",
        facts=phrase(qtype, condition.facts[qtype]),
    )


def facts_of(focus: str, qtype: str) -> list[str]:
    """Return the facts of a complete answer; ``focus`` is a condition's name or synonym."""
    return _by_name().get(focus.lower(), {}).get(qtype, [])


@cache
def _by_name() -> dict[str, dict[str, list[str]]]:
    return {name.lower(): c.facts for c in conditions() for name in (c.name, *c.synonyms)}


def _draw(condition: Condition, aspects: int, rng: random.Random) -> list[str]:
    """Draw up to ``aspects`` statements, in random order and wording."""
    if rng.random() < 0.3:  # the name as in a heading
        condition = dataclasses.replace(condition, mention=condition.name)
    qtypes = rng.sample(list(condition.facts), min(aspects, len(condition.facts)))
    return [fill(rng.choice(STATEMENTS[qtype]), condition, qtype) for qtype in qtypes]


def article(
    condition: Condition, aspects: int, rng: random.Random, beside: Condition | None = None
) -> str:
    """Write a short article, mostly under a title; with ``beside`` it mixes two conditions."""
    if beside is not None:
        half = -(-aspects // 2)  # rounded up
        lines = _draw(condition, half, rng) + _draw(beside, half, rng)
        rng.shuffle(lines)
        return " ".join(lines)
    title = condition.name + "\n" if rng.random() < 0.7 else ""
    return title + " ".join(_draw(condition, aspects, rng))
