"""Named rules that clean MedQuAD rows. Each has a count, examples and a switch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from medquad_utils import CourseError
from medquad_utils.files import Row

LINK_LIST = re.compile(
    r"These resources (?:from MedlinePlus )?(?:address|offer)|The resources listed in this section",
    re.IGNORECASE,
)
# One heading or several. A question to the reader ("Have you ever felt dizzy?") is text, not one.
HEADING = re.compile(
    r"(?:(?:what|how|is|are|can|who|do|does|why|where|which|when|will|has|have|should|could)\b"
    r"(?![^?\n]{0,250}\byour?\b)(?:[^?.\n]|\.(?!\s)){2,250}\?(?:\s+|$))+",
    re.IGNORECASE,
)
# A pattern that is a pair has a word that its matches contain. A search for the word comes first,
# which keeps the time of cleaning linear in the length of a text.
# The table of the Human Phenotype Ontology, from its announcement to the last sentence below it.
PHENOTYPES = (
    "Human Phenotype Ontology provides",
    r"(?s:The Human Phenotype Ontology provides the following list"
    r".*?(?:the sign or symptom may be rare or common\.|\Z))",
)
KEY_POINTS = ("Key Points", r"(?s:\AKey Points\s*-.*?\n\s*\n\s*)")
INSTITUTE = re.compile(r"NIH: *+[^.\n]{3,120}+\s*+")  # possessive: nothing is tried twice
NAVIGATION = (
    ("Espaol", r"\AEspaol\s*\n"),  # the name of a link, its n with a tilde lost
    ("Summary", r"\ASummary *: *"),
    ("On this Page", r"\AOn this Page\b(?:[^.?]*\?)+"),
    # It need not begin a sentence: the list before it may have no full stop.
    ("On this page", r"\bOn this page,? you(?:'ll| will|ll) find [^.]{0,300}\."),
    ("Top of page", r"\bTop of page\b"),
    ("More on:", r"(?m:^[^\S\n]*More on:[^\n]*$)"),
    ("(Watch the video", r"\(Watch the video[^()]*(?:\([^()]*\)[^()]*)*\)"),
    # One sentence, in which a full stop may be part of a number or an address. What is longer
    # than 200 characters is a list with facts in it.
    (
        "lick here",
        r"(?:(?<![^\n])|(?<=\.)(?![a-z\d]))(?:[^.\n]|\.(?=[a-z\d])){0,200}"
        r"\b[Cc]lick here\b(?:[^.\n]|\.(?=[a-z\d]))*\.?",
    ),
    ("", r"\A\s*(?:Topics|Frequently Asked Que+stions \(FAQs\))\s*\Z"),
)


def _cut(answer: str, *patterns: tuple[str, str]) -> str:
    left = answer
    for word, pattern in patterns:
        if word in left:
            left = re.sub(pattern, "", left)
    return answer if left == answer else left.strip()


def _drop_if(test: Callable[[str], Any]) -> Callable[[str], str]:
    return lambda answer: "" if test(answer) else answer


def _drop_phenotypes(answer: str) -> str:
    prose = _cut(answer, PHENOTYPES)
    alone = PHENOTYPES[0] in answer and (not prose or HEADING.fullmatch(prose))
    return "" if alone else answer


def _cut_phenotypes(answer: str) -> str:
    # A table alone is the work of the rule before, which may be off.
    return _cut(answer, PHENOTYPES) if _drop_phenotypes(answer) else answer


def _cut_heading(answer: str) -> str:
    match = HEADING.match(answer)
    return answer[match.end() :] if match and match.end() < len(answer) else answer


def _cut_institutes(answer: str) -> str:
    end = len(answer)
    # A second one shows once the last is cut. From the back, each is looked at once.
    while (start := answer.rfind("NIH:", 0, end)) >= 0 and INSTITUTE.fullmatch(answer, start, end):
        end = start
    return answer if end == len(answer) else answer[:end].strip()


def tidy_space(text: str) -> str:
    """Leave one space between words and one line break between paragraphs."""
    return "\n".join(tidy for line in text.split("\n") if (tidy := " ".join(line.split())))


@dataclass(frozen=True)
class Rule:
    """A rule of cleaning. ``apply`` returns the new answer; "" drops the row."""

    name: str
    what: str
    apply: Callable[[str], str]


# In the order of their work. A new rule is one more line: it is counted and can be left out.
RULES = (
    Rule("link list", "a list of links without a sentence: dropped", _drop_if(LINK_LIST.match)),
    Rule("phenotype list", "a table of phenotypes without prose: dropped", _drop_phenotypes),
    Rule("phenotype tail", "a table of phenotypes after prose: cut", _cut_phenotypes),
    Rule(
        "navigation",
        "hints for a web page's reader (click here): cut; dropped if nothing else is left",
        lambda text: _cut(text, *NAVIGATION),
    ),
    Rule("Key Points", "bullets that repeat the text: cut", lambda text: _cut(text, KEY_POINTS)),
    Rule("heading alone", "a heading without a text: dropped", _drop_if(HEADING.fullmatch)),
    Rule("heading repeated", "a question at the beginning: cut", _cut_heading),
    Rule("institute tail", "the institute's name: cut", _cut_institutes),
    Rule("white space", "several spaces or empty lines: one", tidy_space),
    Rule("under five words", "too short: dropped", _drop_if(lambda text: len(text.split()) < 5)),
)
DUPLICATE = "exact duplicate"
NAMES = (*(rule.name for rule in RULES), DUPLICATE)


@dataclass
class Effect:
    """Rows that one rule changed or dropped, with up to three (before, after) answers."""

    changed: int = 0
    dropped: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)

    def note(self, before: str, after: str) -> None:
        """Count one row; an empty ``after`` drops it."""
        self.changed += bool(after)
        self.dropped += not after
        if len(self.examples) < 3:
            self.examples.append((before, after))


def clean(rows: Sequence[Row], without: Iterable[str] = ()) -> tuple[list[Row], dict[str, Effect]]:
    """Apply ``RULES`` in order, except those named in ``without``, then drop exact duplicates.

    Returns the cleaned rows, and the effect of each rule that was on.
    """
    off = set(without)
    if unknown := sorted(off - set(NAMES)):
        raise CourseError(
            f"no cleaning rule {', '.join(map(repr, unknown))}: there are {', '.join(NAMES)}."
        )
    effects = {name: Effect() for name in NAMES if name not in off}
    rules = [rule for rule in RULES if rule.name in effects]
    cleaned: list[Row] = []
    seen: set[tuple[str, str]] = set()
    for row in rows:
        question, answer = row["question"], row["answer"]
        for rule in rules:
            before, answer = answer, rule.apply(answer)
            if answer != before:
                effects[rule.name].note(before, answer)
        if "white space" in effects:
            question = tidy_space(question).replace("\n", " ")
        if DUPLICATE in effects and (question, answer) in seen:
            effects[DUPLICATE].note(answer, "")
        elif answer:
            seen.add((question, answer))
            cleaned.append({**row, "question": question, "answer": answer})
    return cleaned, effects


def is_boilerplate(row: Row) -> bool:
    """Return whether a template wrote the answer: a list of links, or a phenotype table."""
    return bool(LINK_LIST.match(row["answer"])) or PHENOTYPES[0] in row["answer"]


# Characters outside ASCII were deleted upstream. This is reported, not repaired: some words can
# only be wrong, and some units may have lost a micro sign, so that 300 g/L can mean 300 µg/L.
DAMAGE = {
    "letters": re.compile(
        r"\b(?:(?:do|does|did|is|are|was|ca|wo|has|have)nt|youre|theyre|Sjgrens?|Mnires?|Behets?"
        r"|Guillain-Barr|Crohns|Parkinsons|Alzheimers)\b"
    ),
    "units": re.compile(r"\b\d[\d,.]{0,12} ?(?:g/L|g/mL|mol/L)(?!\w)"),
}


def damage(rows: Sequence[Row]) -> dict[str, list[tuple[int, str]]]:
    """List lost ``letters`` and doubtful ``units`` as (row number, the words around)."""
    places: dict[str, list[tuple[int, str]]] = {name: [] for name in DAMAGE}
    for number, row in enumerate(rows):
        answer = row["answer"]
        for name, pattern in DAMAGE.items():
            for match in pattern.finditer(answer):
                around = answer[max(0, match.start() - 40) : match.end() + 20]
                places[name].append((number, " ".join(around.split())))
    return places
