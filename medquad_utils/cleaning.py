"""Small named rules that clean MedQuAD rows, each with its count, its examples and a switch."""

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
# One heading or several in a row; a question to the reader ("Have you ever felt dizzy?") is no heading but how some texts begin.
HEADING = re.compile(
    r"(?:(?:what|how|is|are|can|who|do|does|why|where|which|when|will|has|have|should|could)\b(?![^?\n]{0,250}\byour?\b)"
    r"(?:[^?.\n]|\.(?!\s)){2,250}\?(?:\s+|$))+",
    re.IGNORECASE,
)
# Each pattern with a word that must be there: looking for the word first is what keeps cleaning linear in the text.
# The first runs from the sentence that announces the table of the Human Phenotype Ontology to the last one below it.
PHENOTYPES = (
    "Human Phenotype Ontology provides",
    re.compile(
        r"The Human Phenotype Ontology provides the following list.*?(?:the sign or symptom may be rare or common\.|\Z)",
        re.DOTALL,
    ),
)
KEY_POINTS = (
    "Key Points",
    re.compile(r"\AKey Points\s*-.*?\n\s*\n\s*", re.DOTALL),
)  # the bullets come back as headings below
INSTITUTE = "NIH:", re.compile(r"NIH: *[^.\n]{3,120}\Z")
NAVIGATION = (
    ("Espaol", re.compile(r"\AEspaol\s*\n")),  # the name of a link, its n with a tilde lost
    ("Summary", re.compile(r"\ASummary *: *")),
    ("On this Page", re.compile(r"\AOn this Page\b(?:[^.?]*\?)+")),
    (
        "On this page",
        re.compile(r"\bOn this page,? you(?:'ll| will|ll) find [^.]{0,300}\."),
    ),  # a list without a full stop may precede
    ("Top of page", re.compile(r"\bTop of page\b")),
    ("More on:", re.compile(r"^[^\S\n]*More on:[^\n]*$", re.MULTILINE)),
    ("(Watch the video", re.compile(r"\(Watch the video[^()]*(?:\([^()]*\)[^()]*)*\)")),
    # A sentence, whose stops are not those within a number or an address; what is longer is a list with facts in it.
    (
        "lick here",
        re.compile(
            r"(?:(?<![^\n])|(?<=\.)(?![a-z\d]))(?:[^.\n]|\.(?=[a-z\d])){0,200}\b[Cc]lick here\b(?:[^.\n]|\.(?=[a-z\d]))*\.?"
        ),
    ),
    ("", re.compile(r"\A\s*(?:Topics|Frequently Asked Que+stions \(FAQs\))\s*\Z")),
)


@dataclass(frozen=True)
class Rule:
    """A rule of cleaning: ``apply`` maps an answer to what is kept of it; an empty result drops the row."""

    name: str
    what: str
    apply: Callable[[str], str]


def _without(*marked: tuple[str, re.Pattern[str]]) -> Callable[[str], str]:
    def apply(answer: str) -> str:
        found = [pattern for word, pattern in marked if word in answer]
        for pattern in found:
            answer = pattern.sub("", answer)
        return answer.strip() if found else answer

    return apply


def _is_heading(answer: str) -> bool:
    return HEADING.fullmatch(answer) is not None


def _without_heading(answer: str) -> str:
    found = HEADING.match(answer)
    return answer[found.end() :] or answer if found else answer


def _drop_if(wrong: Callable[[str], Any]) -> Callable[[str], str]:
    return lambda answer: "" if wrong(answer) else answer


def _phenotypes_alone(answer: str) -> bool:
    prose = _without(PHENOTYPES)(answer)
    return PHENOTYPES[0] in answer and (not prose or _is_heading(prose))


def _phenotypes_behind_prose(answer: str) -> str:
    return answer if _phenotypes_alone(answer) else _without(PHENOTYPES)(answer)


def tidy_space(text: str) -> str:
    """One space between words, one line break between paragraphs, none at the ends."""
    return "\n".join(tidy for line in text.split("\n") if (tidy := " ".join(line.split())))


RULES = (
    Rule("link list", "a list of links without a sentence: dropped", _drop_if(LINK_LIST.match)),
    Rule("phenotype list", "a table of the Human Phenotype Ontology without prose: dropped", _drop_if(_phenotypes_alone)),
    Rule("phenotype tail", "such a table behind prose: the prose stays", _phenotypes_behind_prose),
    Rule("navigation", "words for a web page's reader (top of page, click here): cut; dropped where nothing else is left",
         _without(*NAVIGATION)),
    Rule("Key Points", "the summary in bullets that repeats the text below it: cut", _without(KEY_POINTS)),
    Rule("heading alone", "a heading without a text: dropped", _drop_if(_is_heading)),
    Rule("heading repeated", "a first sentence that repeats the question: cut", _without_heading),
    Rule("institute tail", "a last line that names the institute: cut", _without(INSTITUTE)),
    Rule("white space", "runs of spaces and empty lines: one", tidy_space),
    Rule("under five words", "too short to answer anything: dropped", _drop_if(lambda answer: len(answer.split()) < 5)),
)  # fmt: skip
DUPLICATE = "exact duplicate"
NAMES = (*(rule.name for rule in RULES), DUPLICATE)


@dataclass
class Effect:
    """What one rule did: rows changed, rows dropped, and up to three (before, after) answers; after is "" for a dropped row."""

    changed: int = 0
    dropped: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)

    def note(self, before: str, after: str) -> None:
        """Count one row."""
        if after:
            self.changed += 1
        else:
            self.dropped += 1
        if len(self.examples) < 3:
            self.examples.append((before, after))


def clean(rows: Sequence[Row], without: Iterable[str] = ()) -> tuple[list[Row], dict[str, Effect]]:
    """Apply ``RULES`` in order, but those named in ``without``, then drop exact duplicates.

    Returns the rows kept and the effect of each rule that was on.

    Raises:
        CourseError: ``without`` names a rule that there is not.
    """
    off = set(without)
    if unknown := sorted(off - set(NAMES)):
        raise CourseError(
            f"no cleaning rule {', '.join(map(repr, unknown))}: there are {', '.join(NAMES)}."
        )
    effects = {name: Effect() for name in NAMES if name not in off}
    rules = [rule for rule in RULES if rule.name in effects]
    kept: list[Row] = []
    seen: set[tuple[str, str]] = set()
    for row in rows:
        answer, question = row["answer"], row["question"]
        for rule in rules:
            before, answer = answer, rule.apply(answer)
            if answer != before:
                effects[rule.name].note(before, answer)
            if not answer:
                break
        if not answer:
            continue
        if "white space" in effects:
            question = tidy_space(question).replace("\n", " ")
        if DUPLICATE in effects:
            if (question, answer) in seen:
                effects[DUPLICATE].note(answer, "")
                continue
            seen.add((question, answer))
        kept.append({**row, "question": question, "answer": answer})
    return kept, effects


def is_boilerplate(row: Row) -> bool:
    """Whether an answer was written by a template: a list of links or a table of the Human Phenotype Ontology."""
    return bool(LINK_LIST.match(row["answer"])) or PHENOTYPES[0] in row["answer"]


# ---- damage that is reported, not mended ----------------------------------------------------------------------------

# Letters outside ASCII were deleted upstream. What is left shows in words that cannot be right, and in units without their prefix.
LOST_LETTERS = re.compile(
    r"\b(?:(?:do|does|did|is|are|was|ca|wo|has|have)nt|youre|theyre|Sjgrens?|Mnires?|Behets?|Guillain-Barr|Crohns|Parkinsons|Alzheimers)\b"
)
LOST_UNIT = re.compile(r"\b\d[\d,.]{0,12} ?(?:g/L|g/mL|mol/L)(?!\w)")


def damage(rows: Sequence[Row]) -> dict[str, list[tuple[int, str]]]:
    """Where characters were lost upstream, as (row number, the words around); nothing is guessed or mended.

    ``"letters"``: words that lost an apostrophe or an accent. ``"units"``: numbers whose unit may have lost its prefix (a
    micro sign), so that 300 g/L can mean 300 µg/L: a reader must look them up.
    """
    found: dict[str, list[tuple[int, str]]] = {"letters": [], "units": []}
    for number, row in enumerate(rows):
        answer = row["answer"]
        for name, pattern in (("letters", LOST_LETTERS), ("units", LOST_UNIT)):
            for match in pattern.finditer(answer):
                found[name].append(
                    (
                        number,
                        " ".join(answer[max(0, match.start() - 40) : match.end() + 20].split()),
                    )
                )
    return found
