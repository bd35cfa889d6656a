"""Questions from a file, whatever is wrong with it: what can be mended is mended and counted, the rest is skipped and named."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medquad_utils import CourseError
from medquad_utils.chat import grounded_messages, prompt_ids
from medquad_utils.data import read_records
from medquad_utils.files import COLUMNS, Row
from medquad_utils.splits import normalise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What the columns may be called, in any case.
QUESTION = ("question", "prompt")
REFERENCES = ("answer", "answers", "reference", "references")
OPTIONAL = ("qtype", "source", "focus", "url")

# Control characters, marks that turn the direction of writing, halves of surrogate pairs; tabs and line breaks stay.
CONTROL = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
STEERING = re.compile(
    r"<\|[^|]*\|>|\[/?INST\]|<</?SYS>>|\b(?:ignore|disregard|forget)\b.{0,30}\b(?:instructions?|prompts?|rules)\b|\bsystem prompt\b",
    re.IGNORECASE | re.DOTALL,
)

NO_QUESTION = "skipped: the question is empty or no text"
NO_ANSWER = "skipped: no reference answer is text"
CONTROLS = "control characters taken out"
FOREIGN = "kept, though mostly in another script than Latin: ROUGE reads nothing of it, chrF does"
SUSPECT = "kept, though it looks like an attempt to steer the model; special tokens are parted and stay text"
MERGED = "asks what an earlier row asks: merged, its answer is one more reference"

PASSAGE_WORDS = 80  # words of a passage that a grounded prompt shows at most
WIDEST = 32  # characters of plain text that one token covers at most, generously


@dataclass(frozen=True)
class Question:
    """One question: ``number`` is its row in the file, from 1; each of ``references`` is a right answer."""

    number: int
    question: str
    references: tuple[str, ...]
    qtype: str | None = None
    source: str | None = None
    focus: str | None = None
    url: str | None = None

    @classmethod
    def of(cls, number: int, row: Row) -> Question:
        """A row of the common schema as a question with one reference."""
        return cls(number, row["question"], (row["answer"],), *(row[c] for c in OPTIONAL))

    @cached_property
    def row(self) -> Row:
        """The question as a row of the common schema; its answer is the first reference."""
        known = {column: getattr(self, column) for column in OPTIONAL}
        return {
            **dict.fromkeys(COLUMNS),
            **known,
            "question": self.question,
            "answer": self.references[0],
        }


@dataclass
class Questions:
    """The questions of a file, and ``notes``: what was skipped, changed or looked odd -> numbers of the rows, from 1."""

    name: str
    asked: list[Question]
    notes: dict[str, list[int]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.asked):,} questions"]
        for what, rows in self.notes.items():
            shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            lines.append(f"  {len(rows):,} x {what} (row {shown})")
        return "\n".join(lines)


def read_questions(path: Path, limit: int = 1000, seed: int = 0) -> Questions:
    """The questions of a CSV, JSONL or parquet file with one or several reference answers each.

    Columns, in any case: ``question`` or ``prompt``; ``answer``, ``answers``, ``reference`` or ``references``, a text or a
    list of texts (in CSV as JSON); if there, ``qtype``, ``source``, ``focus`` and ``url``. Others are ignored. Rows that ask
    the same become one question with all their answers. Of more than ``limit`` questions (0: no limit) that many are drawn.

    Raises:
        CourseError: no such file, not readable, a column is missing, or no question with an answer is left.
    """
    records = [
        {str(k).strip().lower(): v for k, v in record.items()}
        for record in read_records(path, "question, answer")
    ]
    columns = {name for record in records for name in record}
    missing = [" or ".join(names) for names in (QUESTION, REFERENCES) if not columns & set(names)]
    if records and missing:
        has = ", ".join(sorted(columns))
        raise CourseError(
            f"{path.name} lacks a column {' and a column '.join(missing)}: it has {has}. Rename what holds them."
        )
    notes: dict[str, list[int]] = defaultdict(list)
    asked: dict[str, Question] = {}
    for number, record in enumerate(records, start=1):
        question = _question(number, record, notes)
        if question is None:
            continue
        key = normalise(question.question) or question.question
        if known := asked.get(key):
            notes[MERGED].append(number)
            question = dataclasses.replace(
                known, references=tuple(dict.fromkeys(known.references + question.references))
            )
        asked[key] = question
    questions = Questions(path.name, list(asked.values()), dict(notes))
    if not asked:
        why = "; ".join(line.strip() for line in str(questions).splitlines()[1:]) or "it is empty"
        raise CourseError(
            f"{path.name} holds no question with an answer ({why}). Give each row a question and an answer."
        )
    return _drawn(questions, limit, seed)


def _question(
    number: int, record: Mapping[str, Any], notes: dict[str, list[int]]
) -> Question | None:
    """One record as a question, or ``None`` where a part is missing; what was found odd goes to ``notes``."""
    asked = next((text for name in QUESTION for text in _texts(record.get(name))), "")
    references = [text for name in REFERENCES for text in _texts(record.get(name), several=True)]
    if not asked or not references:
        notes[NO_ANSWER if asked else NO_QUESTION].append(number)
        return None
    clean, *answers = (CONTROL.sub("", text).strip() for text in (asked, *references))
    found = {
        CONTROLS: [clean, *answers] != [asked, *references],
        FOREIGN: _foreign(clean) or _foreign(answers[0]),
        SUSPECT: any(map(STEERING.search, [clean, *answers])),
    }
    for what, there in found.items():
        if there:
            notes[what].append(number)
    known = {
        name: CONTROL.sub("", text) for name in OPTIONAL for text in _texts(record.get(name))[:1]
    }
    return Question(number, clean, tuple(dict.fromkeys(answers)), **known)


def _texts(value: Any, several: bool = False) -> list[str]:
    """The texts in a cell: itself, or the members of a list or (with ``several``) of a JSON list; without blanks and NaN."""
    if several and isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):  # a text that opens with a bracket
            value = json.loads(value)
    values = value if isinstance(value, list) else [value]
    return [
        v.strip()
        for v in values
        if isinstance(v, str) and CONTROL.sub("", v).strip().lower() not in ("", "nan")
    ]


def _foreign(text: str) -> bool:
    """Whether most letters of ``text`` are of another script than Latin."""
    letters = [] if text.isascii() else [c for c in text if c.isalpha()]
    return sum(c > "\u024f" and not "\u1e00" <= c <= "\u1eff" for c in letters) > len(letters) / 2


def _drawn(questions: Questions, limit: int, seed: int) -> Questions:
    import numpy

    asked = questions.asked
    if not limit or len(asked) <= limit:
        return questions
    chosen = set(numpy.random.default_rng(seed).permutation(len(asked))[:limit].tolist())
    left = f"left out: {limit:,} of {len(asked):,} questions are drawn with seed {seed} (--limit changes that)"
    notes = questions.notes | {left: [q.number for n, q in enumerate(asked) if n not in chosen]}
    return Questions(questions.name, [asked[n] for n in sorted(chosen)], notes)


def fitted(
    tokenizer: PreTrainedTokenizerBase, question: str, room: int, passages: Sequence[str] = ()
) -> tuple[list[dict[str, str]], bool]:
    """The messages that ask ``question`` over ``passages`` in at most ``room`` tokens, and whether the question had to be cut.

    Passages get shorter first, and are left out next; then the question is cut at a word.

    Raises:
        CourseError: not even an empty question fits.
    """

    def fits(messages: list[dict[str, str]]) -> bool:
        return len(prompt_ids(tokenizer, messages)) <= room

    whole = " ".join(question.split())
    text = whole[: WIDEST * max(0, room)]
    for words in (PASSAGE_WORDS, PASSAGE_WORDS // 2, PASSAGE_WORDS // 4, 0):
        messages = grounded_messages(
            text, [" ".join(passage.split()[:words]) for passage in passages if words]
        )
        if fits(messages):
            return messages, len(text) < len(whole)
    if not fits(grounded_messages("")):
        raise CourseError(
            f"a prompt has room for {room} tokens, less than the empty one takes: lower max_new_tokens."
        )
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(grounded_messages(text[:middle])) else (low, middle - 1)
    cut = text[:low].rsplit(" ", 1)[0] if text[low : low + 1] != " " else text[:low]
    return grounded_messages(cut), True
