"""Search: both rankings, their fusion, the score, the threshold; sources of sentences."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import build_sample
import numpy
import pytest

from medquad_utils import CourseError, retrieval, splits
from medquad_utils.files import COLUMNS, Row
from medquad_utils.retrieval import Hit, Index, calibrate, probes, words
from medquad_utils.splits import focus_of


def row(focus: str | None, question: str, answer: str, **known: Any) -> Row:
    about = {"qtype": "causes", "focus": focus, "question": question, "answer": answer}
    return {**dict.fromkeys(COLUMNS), **about, **known}


NAMES = (["Bronchial asthma"], ["Gouty arthritis"], ["Reiter's syndrome"])
TREATED = "Inhalers widen the airways; smoke makes asthma worse."
TOY = [
    row("Asthma", "What causes Asthma ?", "Pollen, smoke and cold air.", synonyms=NAMES[0]),
    row("Asthma", "What are the treatments for Asthma ?", TREATED, qtype="treatment"),
    row("Gout", "What causes Gout ?", "Uric acid. Asthma is no cause of it.", synonyms=NAMES[1]),
    row("Hepatitis C", "What causes Hepatitis C ?", "A virus in the blood."),
    row("Hepatitis B", "What causes Hepatitis B ?", "Another virus in the blood."),
    row("Reactive arthritis", "What causes it ?", "An infection in the body.", synonyms=NAMES[2]),
]


@pytest.fixture(scope="module")
def toy() -> Index:
    return Index(TOY)


def bm25_by_hand(documents: list[list[str]], asked: list[str]) -> list[float]:
    """BM25 as Lucene has it, written from the formula, with k1 = 1.5 and b = 0.75."""
    mean, total = sum(map(len, documents)) / len(documents), [0.0] * len(documents)
    for word in asked:
        holding = sum(word in document for document in documents)
        idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
        for number, document in enumerate(documents):
            often = document.count(word)
            total[number] += idf * often / (often + 1.5 * (0.25 + 0.75 * len(document) / mean))
    return [round(value, 5) for value in total]


def search_by_hand(rows: list[Row], question: str, barred: set[int]) -> list[tuple[int, float]]:
    """Row numbers and scores, best first: everything once more, without the library."""
    asked = words(question)
    named = [[r["focus"], *(r["synonyms"] or [])] for r in rows]
    names = [[set(words(name)) for name in several] for several in named]
    heads = [words(" ".join([r["question"], *n])) for r, n in zip(rows, named, strict=True)]
    answers = [re.findall(r"\w+", retrieval.plain(r["answer"])) for r in rows]
    wholes = [head + answer for head, answer in zip(heads, answers, strict=True)]
    ranked = [bm25_by_hand(documents, asked) for documents in (heads, wholes)]
    ranked = [[0.0 if n in barred else s for n, s in enumerate(values)] for values in ranked]
    merits = [[1 / (61 + sum(o > s for o in v)) if s else 0 for s in v] for v in ranked]
    fused = [one + other for one, other in zip(*merits, strict=True)]

    def mass(some: Any, question: bool = False) -> float:
        total = 0.0
        for word in some:
            holding = sum(word in whole for whole in wholes)
            naming = sum(any(word in name for name in several) for several in names)
            idf = math.log(1 + (len(rows) - holding + 0.5) / (holding + 0.5))
            total += idf * (naming / holding if question and holding else 1)
        return total

    def score(number: int) -> float:
        both = [(name, name.intersection(asked)) for name in names[number]]
        return max(mass(c, True) / mass(asked, True) * mass(c) / mass(name) for name, c in both)

    scores = {n: score(n) for n, merit in enumerate(fused) if merit}
    order = sorted(scores, key=lambda n: (-round(scores[n], 9), -ranked[0][n], -fused[n], n))
    return [(n, scores[n]) for n in order]


def test_search_fuses_two_bm25_rankings_and_finds_no_barred_row(toy: Index) -> None:
    asked = ["What causes asthma?", "bronchial asthma", "arthritis of a joint", "hepatitis c virus"]
    asked += ["can smoke cause gouty arthritis", "zxyzitis and asthma"]
    for barred, question in itertools.product((set(), {0, 4}), asked):
        hits = toy.search([question], k=20, without=[barred])[0]
        expected = search_by_hand(TOY, question, barred)
        assert [hit.row for hit in hits] == [TOY[n] for n, _ in expected], question
        assert [hit.score for hit in hits] == pytest.approx([score for _, score in expected])


def test_search_finds_the_disease_and_type(toy: Index) -> None:
    first = {"treatments for asthma": 1, "bronchial asthma causes": 0, "hepatitis B": 4}
    first |= {"Reiter’s syndrome": 5, "gout " * 200: 2, "\x00gout\x1b[31m\n<i>": 2}
    found = [hits[0].row for hits in toy.search([*first])]
    assert found == [TOY[number] for number in first.values()]


def test_other_words_have_no_source(toy: Index) -> None:
    asked = ["", "\x00", "哮喘", "?!", "what is the", " ".join(map(str, range(11_000))) + " gout"]
    assert [toy.close(hits) for hits in toy.search(asked)] == [[]] * 6


def test_a_hit_names_its_source_and_says_what_kind_of_text_it_is() -> None:
    url = "https://www.example.gov/asthma"
    archived = Hit(row("Asthma\n attack", "?", "", source="NHLBI", url=url), 0.876)
    assert str(archived) == f"Asthma attack (NHLBI; {url}; score 0.88; {retrieval.ARCHIVED})"
    assert Hit(build_sample.rows()[0], 1.0).note == retrieval.COURSE_TEXT
    bare = Index([row(None, "What causes Gout ?", "Uric acid.")]).search(["gout"])[0][0]
    assert str(bare) == f"What causes Gout? (score 1.00; {retrieval.OTHER_TEXT})"


def test_an_index_without_text_and_a_bare_question_are_refused(toy: Index) -> None:
    assert os.environ["JAX_PLATFORMS"] == "cpu", "jax does not take the GPU from torch"
    with pytest.raises(CourseError, match=r"rows with text: got 1 rows.*data.prepare"):
        Index([row(None, "哮喘", "哮喘")])
    with pytest.raises(CourseError, match=r"search\(\[question\]\)"):
        toy.search("asthma")


class Fixed(Index):
    """An index whose best score for a question is the number that the question says."""

    def search(self, questions: Any, k: int = 3, without: Any = None) -> list[list[Hit]]:
        return [[Hit(TOY[0], float(q)), Hit(TOY[1], float(q) / 2)] for q in questions]


def test_the_threshold_lets_one_outsider_in_twenty_pass_and_no_more() -> None:
    index, outside = Fixed(TOY), [str(n / 100) for n in range(1, 41)]  # 0.40 and 0.39 may pass
    threshold = calibrate(index, ["0.2", "0.38", "0.385", "0.9"], outside)
    assert threshold == index.threshold == pytest.approx((0.38 + 0.385) / 2)
    hits = [Hit(TOY[0], threshold), Hit(TOY[1], threshold - 1e-9)]
    assert index.close(hits) == hits[:1]


def test_a_disease_is_asked_for_and_known_by_any_of_its_names(toy: Index) -> None:
    asked = probes(TOY * 4)
    assert len(asked) == len(TOY) * 4 and asked == probes(TOY * 4) and len(probes(TOY, 2)) == 2
    assert not any(map(splits.template_of, asked)) and any(NAMES[0][0] in text for text in asked)
    assert toy.knows(row("ASTHMA, bronchial", "?", ""))
    assert toy.knows(row("Something", "?", "", synonyms=["Reiters syndrome"]))
    assert not toy.knows(row("Arthritis", "?", ""))


@pytest.fixture(scope="module")
def sample_index() -> Index:
    return Index(build_sample.rows())


def test_support_is_the_weighted_share_of_a_sentences_words(sample_index: Index) -> None:
    text = "Take care, e.g. Rest. See Dr. Who! Is 1.5 mg safe?  (Yes.) \nNo full stop"
    parts = ["Take care, e.g. Rest.", "See Dr. Who!", "Is 1.5 mg safe?", "(Yes.)", "No full stop"]
    assert retrieval.sentences(text) == parts
    passage = "It is rare. Gout is treated with colchicine and rest."
    hits = [Hit(row("Gout", "?", passage), 1.0)]
    ((_, score, _, evidence),) = retrieval.supports(sample_index, "Colchicine cures gout", hits)
    weights = [sample_index.weight([word]) for word in ("colchicine", "gout", "cures")]
    assert score == pytest.approx(sum(weights[:2]) / sum(weights))
    assert evidence == "Gout is treated with colchicine and rest."


def test_an_answer_is_cited_sentence_by_sentence(sample_index: Index) -> None:
    row = next(r for r in sample_index.rows if r["focus"] and r["qtype"] == "treatment")
    answer = f"{row['answer']} Zebras dance gladly at midnight."
    hits, (known, unknown) = retrieval.cite(sample_index, row["question"], answer)
    assert 1 <= len(hits) <= retrieval.PASSAGES
    assert known.hit is not None and known.hit.row["answer"] == row["answer"]
    assert (known.score, known.evidence) == (pytest.approx(1), known.sentence)
    assert (unknown.hit, unknown.evidence) == (None, "") and unknown.score < retrieval.SUPPORT
    hits, supports = retrieval.cite(sample_index, "What causes zebra fever?", answer)
    assert hits == [] and [s.hit for s in supports] == [None, None]


@pytest.mark.full
def test_on_real_medquad_the_threshold_holds_and_diseases_are_found(real_rows: list[Row]) -> None:
    parts = splits.split(real_rows)
    rows_of = Counter(map(focus_of, parts.train))
    inside = splits.draw(parts.train, 200, 0, lambda r: rows_of[focus_of(r)] > 2)
    out = {id(r) for r in inside}
    index = Index([r for r in parts.train if id(r) not in out])
    outside, test = ([r for r in p if not index.knows(r)] for p in (parts.validation, parts.test))
    found = calibrate(index, probes(inside), probes(outside))
    assert found == pytest.approx(retrieval.THRESHOLD, abs=0.06)
    missed, false = (list(map(index.close, index.search(probes(p)))) for p in (inside, test))
    assert 0 < missed.count([]) / len(missed) < 0.3
    assert 0.9 < false.count([]) / len(false) < 1, "of diseases that had no part in the choice"
    drawn = splits.draw(inside, 0, 0)  # the order in which probes asks
    for asked, rows in ((probes(inside), drawn), ([r["question"] for r in inside], inside)):
        pairs = zip(index.search(asked), rows, strict=True)
        right = [[focus_of(hit.row) == focus_of(r) for hit in hits] for hits, r in pairs]
        assert numpy.mean([r[0] for r in right]) > 0.85
        assert numpy.mean([any(r) for r in right]) > 0.9


def test_a_dose_has_its_source_or_says_that_there_is_none() -> None:
    named = {"focus": "Gout", "question": "What are the treatments for Gout ?"}
    row = build_sample.rows()[0] | named
    row |= {"answer": "People with gout may take 300 mg of the medicine each day. Rest the joint."}
    index = Index([row])
    right = "People with gout may take 300mg of the medicine each day."
    wrong = "People with gout may take 900 mg of the medicine each day. Two of 3 people recover."

    def notes(answer: str, archive: Index | None) -> list[str]:
        supports = retrieval.cite(archive, row["question"], answer)[1]
        return retrieval.dose_notes(answer, lambda: supports)

    index.threshold = 0.0
    (found,) = notes(right, index)
    assert found.startswith("300mg: Gout (")
    assert notes(wrong, index) == ["900 mg: no source for this number"]
    assert notes(right, None) == ["300mg: no source for this number"]
    assert notes(right.replace("300mg", "00 mg"), index) == ["00 mg: no source for this number"]
    twice = notes(f"{right} Take 300mg of another medicine for it.", index)
    assert len(twice) == 2 and twice[1] == "300mg: no source for this number"
    assert retrieval.dose_notes("It began in 1998.", lambda: pytest.fail("looked up")) == []
    units = "5 ml, 2-3 tablets, 1,000 IU, 0.5 mg/kg and 10 to 20 drops"
    assert len(retrieval.DOSE.findall(units)) == 5


def test_long_answers_are_searched_in_linear_time() -> None:
    """A pattern that starts again at every place would take minutes."""
    code = "from medquad_utils.retrieval import DOSE, sentences\n"
    code += "for part in ('1,', 'Dr. '): DOSE.findall(part * 40_000), sentences(part * 40_000)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
