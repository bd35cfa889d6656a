"""Nearest MedQuAD rows with source and URL: BM25 over names and over whole rows, fused by rank; TF-IDF to compare with.

BM25: Robertson and Zaragoza, "The probabilistic relevance framework: BM25 and beyond", 2009, in Lucene's variant as
bm25s computes it (k1 = 1.5, b = 0.75). Fusion: Cormack, Clarke and Buettcher, "Reciprocal rank fusion outperforms
Condorcet and individual rank learning methods", SIGIR 2009.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from medquad_utils import CourseError
from medquad_utils.files import Row, read_rows, write_json, write_rows
from medquad_utils.splits import draw, template_of

ARCHIVED = "archived NIH text, collected about 2016-2019; links may have moved"
COURSE_TEXT = "text written for this course, not NIH text"
NO_SOURCE = "no close source was found"

RANK_CONSTANT = 60  # the k of Cormack et al.
CANDIDATES = 20  # as many of the best fused rows are put in the order of their scores
DEPTH = (
    1000  # a row further down either ranking adds less than 1/1060: it moves no row into a top ten
)
FALSE_SOURCES = 0.05  # at most this share of questions about unknown diseases may be given a source
THRESHOLD = 0.79  # what ``calibrate`` found on the validation part of the real MedQuAD; the tests hold it to that
VERSION, CARD, ROWS = 1, "index.json", "rows.parquet"
WORD = r"\w+"  # single letters and digits count: hepatitis C, type 1


def plain(text: str) -> str:
    """Lower case, without apostrophes and without what is not ASCII: upstream deleted those letters ("Sjgren"), so we do too."""
    return text.replace("'", "").encode("ascii", "ignore").decode().lower()


def words(text: str) -> list[str]:
    """The different words of a text, in the order in which they first occur. No stop words: their weight is near zero anyway."""
    return list(dict.fromkeys(re.findall(WORD, plain(text))))


def _names(row: Row) -> list[str]:
    """The focus, or what the question's template names, or else the whole question; then the synonyms."""
    found = template_of(row["question"])
    return [row["focus"] or (found[1] if found else row["question"]), *(row["synonyms"] or ())]


def _name_words(row: Row) -> list[frozenset[str]]:
    return [name for name in map(frozenset, map(words, _names(row))) if name]


def _heading(row: Row) -> str:
    """The words of the question and of all names of the disease, each once: twenty synonyms must not outweigh one."""
    return " ".join(words(" ".join([row["question"], *_names(row)])))


def _whole(row: Row) -> str:
    """Heading and answer: an answer by itself seldom says the synonyms, and a rank in it would count against them."""
    return f"{_heading(row)} {plain(row['answer'])}"


@dataclass(frozen=True)
class Hit:
    """A row that was found; ``score`` is 0 to 1 and can be compared between questions (see ``Index``)."""

    row: Row
    score: float

    @property
    def title(self) -> str:
        """The disease, or the question without the gaps that MedQuAD's templates leave before the question mark."""
        return " ".join(
            (self.row["focus"] or re.sub(r"[\s?]*\?\s*$", "?", self.row["question"])).split()
        )

    @property
    def source(self) -> str | None:
        """The collection that the row comes from, where the data says it."""
        source: str | None = self.row["source"]
        return source

    @property
    def url(self) -> str | None:
        """The page that the row was taken from, where the data says it."""
        url: str | None = self.row["url"]
        return url

    @property
    def note(self) -> str:
        """What kind of text it is: archived, or written for the course."""
        return COURSE_TEXT if self.source == "course sample" else ARCHIVED

    def __str__(self) -> str:
        about = [
            part for part in (self.source, self.url, f"score {self.score:.2f}", self.note) if part
        ]
        return f"{self.title} ({'; '.join(about)})"


class _Archive(ABC):
    """Rows that can be searched."""

    def __init__(self, rows: Sequence[Row]):
        if not any(words(_whole(row)) for row in rows):
            raise CourseError(
                f"an index needs rows with text: got {len(rows)} rows. Load some with data.prepare(plan).train."
            )
        self.rows = list(rows)

    def search(
        self, questions: Sequence[str], k: int = 3, without: Sequence[Collection[int]] | None = None
    ) -> list[list[Hit]]:
        """For each question its at most ``k`` best rows, best first; equals stand in the order of the rows.

        ``without`` holds for each question the numbers of rows that must not be found (its own row, in an evaluation).
        A question that shares no word with the archive finds nothing.

        Raises:
            CourseError: ``questions`` is one text, ``k`` is under 1, or ``without`` does not fit questions and rows.
        """
        if isinstance(questions, str):
            raise CourseError(
                "search takes a list of questions: put the one question into brackets, search([question])."
            )
        if k < 1:
            raise CourseError(f"k={k}: expected 1 or more rows for each question.")
        barred: list[Sequence[int]] = (
            [()] * len(questions) if without is None else [sorted(numbers) for numbers in without]
        )
        if len(barred) != len(questions):
            raise CourseError(
                f"without has {len(barred)} sets for {len(questions)} questions: give one set for each, empty ones too."
            )
        if strange := [n for numbers in barred for n in numbers if not 0 <= n < len(self.rows)]:
            raise CourseError(
                f"without names row {strange[0]}: the index has rows 0 to {len(self.rows) - 1}."
            )
        return [
            self._hits(words(question), k, numbers)
            for question, numbers in zip(questions, barred, strict=True)
        ]

    @abstractmethod
    def _hits(self, asked: list[str], k: int, barred: Sequence[int]) -> list[Hit]: ...


def _bm25s() -> Any:
    # At import bm25s runs a jax operation where jax is installed, as on Colab; on a GPU that would take most of its memory from torch.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


def _bm25(texts: Iterable[str]) -> Any:
    bm25s = _bm25s()
    index = bm25s.BM25()
    index.index(
        bm25s.tokenize(list(texts), token_pattern=WORD, stopwords=None, show_progress=False),
        show_progress=False,
    )
    return index


def reciprocal_ranks(scores: numpy.ndarray, depth: int = DEPTH) -> numpy.ndarray:
    """1 / (60 + rank) for each score over 0 down to rank ``depth``, else 0; shape (rows,), float64. Equal scores share a rank."""
    kept = numpy.flatnonzero(scores > 0)
    if len(kept) > depth:
        kept = numpy.flatnonzero(scores >= numpy.partition(scores, -depth)[-depth])
    ranks = 1 + numpy.searchsorted(numpy.sort(-scores[kept]), -scores[kept])
    merit = numpy.zeros(len(scores))
    merit[kept] = 1 / (RANK_CONSTANT + ranks)
    return merit


class Index(_Archive):
    """Two BM25 rankings, over headings (question and names) and over headings with answers, fused by rank, then ordered by score.

    The score asks whether the disease of the hit is the one of the question. For each name of the hit (focus, synonyms)

        score = share of the question that the name covers x share of the name that the question covers

    and the closest name counts. Both are shares of inverse document frequency, log(1 + (N - f + 0.5) / (f + 0.5)) for a
    word in f of N rows. In a question that is multiplied by the share of those f rows that have the word in a name: "my
    doctor says" weighs nothing, "syndrome" little, and a word that no row has weighs most, so an unknown disease pulls
    the score down. 1 means that the question names this disease and no other. Fused ranks cannot say that: some row is
    always first. Answers do not count, because long ones mention many diseases; so a question that names no disease
    scores near 0, however good its hits may be. A small archive knows few ordinary words and takes the others for unknown
    names: scores are lower there, and the threshold, which was found on the whole MedQuAD, has to be found again (``calibrate``).

    Raises:
        CourseError: no rows, or no row with a word in it.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        threshold: float = THRESHOLD,
        _rankings: tuple[Any, Any] | None = None,
    ):
        super().__init__(rows)
        self.threshold = threshold
        self._rankings = _rankings or (_bm25(map(_heading, rows)), _bm25(map(_whole, rows)))
        self._names = [_name_words(row) for row in rows]
        self._known = {name for names in self._names for name in names}
        self._naming = Counter(word for names in self._names for word in set().union(*names))

    def _hits(self, asked: list[str], k: int, barred: Sequence[int]) -> list[Hit]:
        headings, wholes = (
            ranking.get_scores_from_ids(ranking.get_tokens_ids(asked)) for ranking in self._rankings
        )
        headings[list(barred)] = wholes[list(barred)] = 0
        merit = reciprocal_ranks(headings, max(k, DEPTH)) + reciprocal_ranks(wholes, max(k, DEPTH))
        fused = [
            int(i)
            for i in numpy.argsort(-merit, kind="stable")[: max(k, CANDIDATES)]
            if merit[i] > 0
        ]
        scores = dict(zip(fused, self._scores(frozenset(asked), fused), strict=True))
        best = sorted(
            fused, key=lambda i: (-scores[i], -headings[i])
        )  # of one disease, first the row whose question is most alike
        return [Hit(self.rows[i], scores[i]) for i in best[:k]]

    def _scores(self, asked: frozenset[str], numbers: Iterable[int]) -> list[float]:
        whole = self.mass(asked, question=True)

        def closeness(name: frozenset[str]) -> float:
            common = asked & name
            return (
                self.mass(common, question=True) / whole * self.mass(common) / self.mass(name)
                if common
                else 0.0
            )

        return [max(map(closeness, self._names[number]), default=0.0) for number in numbers]

    def mass(self, some: Iterable[str], question: bool = False) -> float:
        """Sum of the words' weights (see the class); ``fsum`` because a set has no order, and a plain sum depends on one."""
        return math.fsum(self._weight(word, question) for word in some)

    def _weight(self, word: str, question: bool) -> float:
        vocabulary, starts, n = (
            self._rankings[1].vocab_dict,
            self._rankings[1].scores["indptr"],
            len(self.rows),
        )
        found = int(starts[i + 1] - starts[i]) if (i := vocabulary.get(word)) is not None else 0
        share = self._naming[word] / found if question and found else 1.0
        return share * math.log(1 + (n - found + 0.5) / (found + 0.5))

    def knows(self, row: Row) -> bool:
        """Whether a name of the row's disease, in any order of its words, is a name in the archive."""
        return not self._known.isdisjoint(_name_words(row))

    def close(self, hits: Sequence[Hit]) -> list[Hit]:
        """The hits at or over the threshold; where none is left, print ``NO_SOURCE``."""
        return [hit for hit in hits if hit.score >= self.threshold]

    def save(self, folder: Path | str) -> None:
        """Write rows, rankings and threshold; the card with their hashes comes last, so a folder is whole or is no index.

        Raises:
            CourseError: the folder cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".part") as part:
                new = Path(part)
                write_rows(new / ROWS, self.rows)
                for name, ranking in zip(("headings", "wholes"), self._rankings, strict=True):
                    ranking.save(new / name, show_progress=False)
                files = sorted(file.relative_to(new) for file in new.rglob("*") if file.is_file())
                hashes = {file.as_posix(): _hash(new / file) for file in files}
                (folder / CARD).unlink(missing_ok=True)
                for file in files:
                    (folder / file).parent.mkdir(exist_ok=True)
                    (new / file).replace(folder / file)
        except OSError as error:
            raise CourseError(
                f"cannot write the index to {str(folder)!r}: {error}. Free some space or choose another folder."
            ) from error
        card = {
            "version": VERSION,
            "rows": len(self.rows),
            "threshold": float(self.threshold),
            "sha256": hashes,
        }
        write_json(folder / CARD, card)

    @classmethod
    def load(cls, folder: Path | str) -> Index:
        """Read what ``save`` wrote.

        Raises:
            CourseError: there is no index in the folder, or it is half written, damaged or of another version.
        """
        folder = Path(folder)
        try:
            card = json.loads((folder / CARD).read_text(encoding="utf-8"))
            if card["version"] != VERSION:
                raise ValueError(f"version {card['version']}, expected {VERSION}")
            if changed := [
                name for name, known in card["sha256"].items() if _hash(folder / name) != known
            ]:
                raise ValueError(f"{', '.join(changed)} changed after it was saved")
            headings, wholes = (
                _bm25s().BM25.load(folder / name, show_progress=False)
                for name in ("headings", "wholes")
            )
            return cls(read_rows(folder / ROWS), float(card["threshold"]), (headings, wholes))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, CourseError) as error:
            advice = "Make it again with Index(rows).save(folder)."
            raise CourseError(
                f"no whole index in {str(folder)!r} ({type(error).__name__}: {error}). {advice}"
            ) from error


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class TfidfIndex(_Archive):
    """The simple one, to compare with: cosine of TF-IDF vectors (scikit-learn's defaults) of question and whole row.

    A hit's score is that cosine.

    Raises:
        CourseError: no rows, or no row with a word in it.
    """

    def __init__(self, rows: Sequence[Row]):
        from sklearn.feature_extraction.text import TfidfVectorizer

        super().__init__(rows)
        self._vectorizer = TfidfVectorizer(token_pattern=WORD)
        self._postings = self._vectorizer.fit_transform(
            map(_whole, rows)
        ).T.tocsr()  # (words, rows): a question reads its own words only

    def _hits(self, asked: list[str], k: int, barred: Sequence[int]) -> list[Hit]:
        cosine = (self._vectorizer.transform([" ".join(asked)]) @ self._postings).toarray().ravel()
        cosine[list(barred)] = 0
        best = numpy.argsort(-cosine, kind="stable")[:k]
        return [Hit(self.rows[i], min(1.0, float(cosine[i]))) for i in best if cosine[i] > 0]


# ---- the threshold --------------------------------------------------------------------------------------------------

FORMS = ("{name} {qtype}", "{qtype} of {name}?", "My doctor says it is {name}: what about {qtype}?")


def probes(rows: Sequence[Row], most: int = 300, seed: int = 0) -> list[str]:
    """At most ``most`` questions about the diseases of ``rows``, in other words than MedQuAD's templates, by focus and synonyms in turn."""
    asked = []
    for number, row in enumerate(draw(rows, most, seed)):
        names = _names(row)
        asked.append(
            FORMS[number % len(FORMS)].format(
                name=names[number // len(FORMS) % len(names)], qtype=row["qtype"]
            )
        )
    return asked


def _best_scores(index: Index, questions: Sequence[str]) -> numpy.ndarray:
    if not questions:
        raise CourseError(
            "a threshold needs questions inside and outside the archive: got none. Make some with probes(rows)."
        )
    return numpy.array(
        [max((hit.score for hit in hits), default=0.0) for hits in index.search(questions)]
    )


def error_rates(index: Index, inside: Sequence[str], outside: Sequence[str]) -> dict[str, float]:
    """Shares, 0 to 1, at the index's threshold.

    ``missed``: questions about diseases of the archive for which no source is given; ``false``: questions about other
    diseases for which one is given.

    Raises:
        CourseError: no questions.
    """
    missed, false = (
        _best_scores(index, inside) < index.threshold,
        _best_scores(index, outside) >= index.threshold,
    )
    return {"missed": float(missed.mean()), "false": float(false.mean())}


def calibrate(index: Index, inside: Sequence[str], outside: Sequence[str]) -> float:
    """Set and return the lowest threshold that gives a source to at most 5 % of the ``outside`` questions.

    ``inside`` asks about diseases of the archive; ``outside`` about others, so make it of validation rows for which
    ``index.knows(row)`` is false. Neither may come from test data. The threshold stands midway between the highest
    outside score that must stay below it and the next inside score.

    Raises:
        CourseError: no questions.
    """
    outer = numpy.sort(_best_scores(index, outside))[::-1]
    highest = outer[int(FALSE_SOURCES * len(outer))]
    above = (scores := _best_scores(index, inside))[scores > highest]
    index.threshold = float(
        (highest + above.min()) / 2 if len(above) else numpy.nextafter(highest, 2)
    )
    return index.threshold
