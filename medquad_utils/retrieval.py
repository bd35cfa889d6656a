"""Search the MedQuAD rows, and cite the passages that support the sentences of an answer.

BM25: Robertson and Zaragoza, 2009, in Lucene's variant as bm25s computes it (k1 = 1.5, b = 0.75).
Fusion: Cormack, Clarke and Buettcher, "Reciprocal rank fusion", SIGIR 2009.

A citation was looked up after the answer: the model has not read it. A sentence with a close
passage may still be wrong.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy

from medquad_utils import CourseError
from medquad_utils.assets.sample import SOURCE
from medquad_utils.chat import tidy_question
from medquad_utils.files import Row
from medquad_utils.splits import draw, template_of

ARCHIVED = "archived NIH text, collected about 2016-2019; links may have moved"
COURSE_TEXT = "text written for this course, not NIH text"
OTHER_TEXT = "text of a table that was loaded"
NO_SOURCE = "no close source was found"

RANK_CONSTANT = 60  # the k of Cormack et al.
CANDIDATES = 20  # number of fused rows that are sorted by score
FALSE_SOURCES = 0.05  # highest share of questions about unknown diseases that may get a source
THRESHOLD = 0.79  # from ``calibrate`` on the validation rows of the real MedQuAD; a test checks it
PASSAGES = 3  # under an answer, at most
# A sentence whose best passage scores less has no close source. Of 1,462 sentences of MedQuAD, a
# tenth reach it in passages about other diseases, half of those word for word.
SUPPORT = 0.6
WORD = r"\w+"  # single letters and digits count: hepatitis C, type 1
SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?=[\"'(\[]?[A-Z0-9])|\n+")
DOSE = re.compile(  # a number has 20 digits at most, or the search would take quadratic time
    r"\b\d[\d.,]{0,20}(?:\s?(?:-|–|to)\s?\d[\d.,]{0,20})?\s?(?:mg|mcg|[µμ]g|g|ml|cc|i\.?u\.?|units?"
    r"|(?:milli|micro)?grams?|millilit(?:er|re)s?|tablets?|pills?|capsules?|drops?|puffs?"
    r"|(?:tea|table)spoons?)\b(?:\s?/\s?\w+)?",
    re.IGNORECASE,
)
ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|Dr|Mr|Mrs|Ms|St|No|approx|[A-Z])\.)$")


def plain(text: str) -> str:
    """Lower the case and delete apostrophes and non-ASCII letters, as MedQuAD itself does."""
    return text.replace("'", "").encode("ascii", "ignore").decode().lower()


def words(text: str) -> list[str]:
    """Return the different words of a text in reading order; stop words stay, with tiny weights."""
    return list(dict.fromkeys(re.findall(WORD, plain(text))))


def sentences(text: str) -> list[str]:
    """Split ``text`` into sentences; a line break ends one, an abbreviation such as "e.g." none."""
    parts: list[str] = []
    for part in filter(None, map(str.strip, SENTENCE_END.split(text))):
        if parts and ABBREVIATION.search(parts[-1][-8:]):  # the longest is "approx."
            parts[-1] += f" {part}"
        else:
            parts.append(part)
    return parts


def _names(row: Row) -> list[str]:
    """The focus (or the disease in the question, or the question), then the synonyms."""
    match = template_of(row["question"])
    return [row["focus"] or (match[1] if match else row["question"]), *(row["synonyms"] or ())]


def _name_words(row: Row) -> list[frozenset[str]]:
    return [frozenset(name) for name in map(words, _names(row)) if name]


class Hit(NamedTuple):
    """A row of a search; ``score`` is from 0 to 1 (see ``Index``)."""

    row: Row
    score: float

    @property
    def title(self) -> str:
        """The disease, or the question without the gap before its question mark."""
        return " ".join((self.row["focus"] or tidy_question(self.row["question"])).split())

    @property
    def note(self) -> str:
        """The kind of text: archived by the NIH, written for the course, or a user's own."""
        if (self.row["source"] or "").startswith(SOURCE):
            return COURSE_TEXT
        return ARCHIVED if re.search(r"//[^/]*\.gov/", self.row["url"] or "") else OTHER_TEXT

    def __str__(self) -> str:
        about = [self.row["source"], self.row["url"], f"score {self.score:.2f}", self.note]
        return f"{self.title} ({'; '.join(filter(None, about))})"


def _bm25(texts: Iterable[str]) -> Any:
    # bm25s imports jax where it is installed, as on Colab: on a GPU, jax would take torch's memory.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    tokens = bm25s.tokenize(list(texts), token_pattern=WORD, stopwords=None, show_progress=False)
    ranking = bm25s.BM25()
    ranking.index(tokens, show_progress=False)
    return ranking


class Index:
    """Two BM25 rankings (headings; headings with answers), fused by rank, then sorted by score.

    A score of 1 means that the question names the disease of the hit and nothing else. It is

        share of the question that the hit's best name covers x share of the name in the question

    Shares are sums of inverse document frequency, log(1 + (N - f + 0.5) / (f + 0.5)) for a word in
    f of N rows. In a question, each weight is multiplied by the share of those f rows that have the
    word in a name: "my doctor says" weighs nothing. A word that no row has weighs most: an unknown
    disease lowers the score, and so does a small archive (see ``calibrate``).
    """

    def __init__(self, rows: Sequence[Row]):
        # In a heading each word stands once: twenty synonyms weigh as one.
        headings = [" ".join(words(" ".join([row["question"], *_names(row)]))) for row in rows]
        # An answer alone seldom has the synonyms and would rank too low.
        wholes = [f"{h} {plain(row['answer'])}" for h, row in zip(headings, rows, strict=True)]
        if not any(map(words, wholes)):
            raise CourseError(
                f"an index needs rows with text: got {len(rows)} rows. "
                "Load some with data.prepare(plan).train."
            )
        self.rows, self.threshold = list(rows), THRESHOLD
        self._rankings = _bm25(headings), _bm25(wholes)
        self._names = [_name_words(row) for row in rows]
        self._all_names = {name for names in self._names for name in names}
        named = Counter(word for names in self._names for word in set().union(*names))
        vocabulary, starts = self._rankings[1].vocab_dict, self._rankings[1].scores["indptr"]
        # Word i of the vocabulary has the entries starts[i] to starts[i + 1], one a row.
        counts = {word: int(starts[i + 1] - starts[i]) for word, i in vocabulary.items() if word}
        self._weights = {word: self._idf(count) for word, count in counts.items()}
        self._question_weights = {w: named[w] / counts[w] * idf for w, idf in self._weights.items()}

    def _idf(self, count: int) -> float:
        return math.log(1 + (len(self.rows) - count + 0.5) / (count + 0.5))

    def weight(self, words: Iterable[str], question: bool = False) -> float:
        """Sum the weights of ``words`` (see the class)."""
        weights, unknown = self._question_weights if question else self._weights, self._idf(0)
        # fsum, because a set has no order and the result of a plain sum depends on the order.
        return math.fsum(weights.get(word, unknown) for word in words)

    def search(
        self, questions: Sequence[str], k: int = 3, without: Sequence[Collection[int]] | None = None
    ) -> list[list[Hit]]:
        """Return for each question its best rows, at most ``k``; none if it shares no word.

        ``without`` holds for each question the numbers of rows to leave out.
        """
        if isinstance(questions, str):
            raise CourseError("search takes a list of questions: write search([question]).")
        pairs = zip(questions, without or [()] * len(questions), strict=True)
        return [self._hits(words(question), k, list(numbers)) for question, numbers in pairs]

    def _hits(self, question: list[str], k: int, excluded: list[int]) -> list[Hit]:
        from scipy.stats import rankdata

        points = numpy.array([
            ranking.get_scores_from_ids(ranking.get_tokens_ids(question))
            for ranking in self._rankings
        ])  # fmt: skip
        points[:, excluded] = 0
        ranks = rankdata(-points, method="min", axis=1)  # ties share a rank
        merit = numpy.where(points > 0, 1 / (RANK_CONSTANT + ranks), 0).sum(axis=0)
        order = numpy.argsort(-merit, kind="stable")[: max(k, CANDIDATES)]
        asked, total = frozenset(question), self.weight(question, question=True)

        def score(name: frozenset[str]) -> float:
            both = asked & name
            covered = self.weight(both, question=True) / total
            return covered * self.weight(both) / self.weight(name)

        scores = {
            int(i): max((score(name) for name in self._names[i] if name & asked), default=0.0)
            for i in order
            if merit[i] > 0
        }
        # Rows of one disease have equal scores: the most similar question comes first.
        best = sorted(scores, key=lambda i: (-scores[i], -points[0, i]))
        return [Hit(self.rows[i], scores[i]) for i in best[:k]]

    def knows(self, row: Row) -> bool:
        """Return whether a name of the row's disease, in any word order, is in the archive."""
        return not self._all_names.isdisjoint(_name_words(row))

    def close(self, hits: Sequence[Hit]) -> list[Hit]:
        """Return the hits at or over the threshold."""
        return [hit for hit in hits if hit.score >= self.threshold]


FORMS = ("{name} {qtype}", "{qtype} of {name}?", "My doctor says it is {name}: what about {qtype}?")


def probes(rows: Sequence[Row], most: int = 300, seed: int = 0) -> list[str]:
    """Write questions about the diseases of at most ``most`` rows, not in MedQuAD's templates."""
    questions = []
    for number, row in enumerate(draw(rows, most, seed)):
        names, form = _names(row), FORMS[number % len(FORMS)]
        name = names[number // len(FORMS) % len(names)]
        questions.append(form.format(name=name, qtype=row["qtype"]))
    return questions


def calibrate(index: Index, inside: Sequence[str], outside: Sequence[str]) -> float:
    """Set and return a threshold that at most 5 % of the ``outside`` questions reach.

    ``inside`` asks about diseases of the archive, ``outside`` about others. The threshold lies
    midway between the first outside score past those 5 % and the next inside score.
    """
    inner, outer = (
        [max((hit.score for hit in hits), default=0.0) for hits in index.search(questions)]
        for questions in (inside, outside)
    )
    highest = sorted(outer, reverse=True)[int(FALSE_SOURCES * len(outer))]
    above = [score for score in inner if score > highest]
    index.threshold = (highest + min(above)) / 2 if above else math.nextafter(highest, 2)
    return index.threshold


class Support(NamedTuple):
    """A sentence of an answer and the passage that shares most with it."""

    sentence: str
    score: float  # 0 to 1, of the best passage, even if it is under ``SUPPORT``
    hit: Hit | None  # None if no passage reaches ``SUPPORT``
    evidence: str  # the best sentence of that passage, or ""


def supports(index: Index, answer: str, hits: Sequence[Hit]) -> list[Support]:
    """Pair each sentence of ``answer`` with its best passage of ``hits``, the first of equals.

    The score is the share, 0 to 1, of the sentence's words, by their weights, that one sentence of
    the passage or its title holds. It sees neither a "not" nor a paraphrase.
    """
    held = [
        (text, hit, {*words(hit.title), *words(text)})
        for hit in hits
        for text in sentences(hit.row["answer"])
    ]
    results = []
    for sentence in sentences(answer):
        claim = set(words(sentence))
        total = index.weight(claim) or 1.0  # a sentence without words scores 0
        scored = [(index.weight(claim & known) / total, text, hit) for text, hit, known in held]
        score, evidence, hit = max(scored, key=itemgetter(0), default=(0.0, "", None))
        close = score >= SUPPORT
        results.append(Support(sentence, score, hit if close else None, evidence if close else ""))
    return results


def cite(index: Index | None, question: str, answer: str) -> tuple[list[Hit], list[Support]]:
    """Return the passages close to ``question`` and the support of each sentence of ``answer``."""
    if index is None:
        return [], [Support(sentence, 0.0, None, "") for sentence in sentences(answer)]
    hits = index.close(index.search([question], PASSAGES)[0])
    return hits, supports(index, answer, hits)


def dose_notes(answer: str, cited: Callable[[], Sequence[Support]]) -> list[str]:
    """Return a line for each number with a dose unit: its source, or that there is none.

    A source is the closest passage of the sentence, if it holds the same number and unit.
    ``cited`` gives the support of the sentences; it is called only if there is such a number.
    """
    if not DOSE.search(answer):
        return []
    notes: dict[str, None] = {}
    for part in cited():
        held = {"".join(dose[0].lower().split()) for dose in DOSE.finditer(part.evidence)}
        for match in DOSE.finditer(part.sentence):
            source = part.hit if part.hit and "".join(match[0].lower().split()) in held else None
            notes[f"{match[0]}: {source or 'no source for this number'}"] = None
    return list(notes)
