"""Scores against numbers worked out by hand, and the baselines that need no training."""

from __future__ import annotations

import itertools
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medquad_utils import evaluation
from medquad_utils.assets import sample
from medquad_utils.data import COLUMNS, Row
from medquad_utils.generation import Answer


def row(qtype: str, question: str, answer: str, **others: Any) -> Row:
    return {**dict.fromkeys(COLUMNS), "qtype": qtype, "question": question, "answer": answer, **others}


# ---- ROUGE-L --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("the cat on a mat", "the cat sat on the mat", 8 / 11),  # "the cat on mat" is 4 of 5 and of 6 words: 2 x 4 / (5 + 6)
        ("mat the on sat cat the", "the cat sat on the mat", 6 / 12),  # reversed: "the on the" keeps its order, 3 of 6 and of 6 words
        ("Fever, cough and CHILLS.", "fever; cough; and chills", 1.0),  # case and punctuation do not count
        ("a symptom was treated", "a symptoms was treating", 1.0),  # stemmed: symptom, treat
        ("nothing alike here", "fever and cough", 0.0),
        ("", "fever and cough", 0.0),
    ],
)
def test_rouge_l_equals_the_value_worked_out_by_hand(answer: str, reference: str, f1: float) -> None:
    assert evaluation.rouge_l([answer], [reference]) == pytest.approx([f1])


words = st.lists(st.sampled_from(["aa", "bb", "cc", "dd"]), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(words, words)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(answer: list[str], reference: list[str]) -> None:
    """The oracle tries every subsequence."""

    def subsequences(text: list[str]) -> set[tuple[str, ...]]:
        return {s for n in range(len(text) + 1) for s in itertools.combinations(text, n)}

    longest = max(map(len, subsequences(answer) & subsequences(reference)))
    expected = 2 * longest / (len(answer) + len(reference))
    assert evaluation.rouge_l([" ".join(answer)], [" ".join(reference)]) == pytest.approx([expected])


def test_rouge_l_wants_an_answer_for_each_reference() -> None:
    with pytest.raises(ValueError, match="longer"):
        evaluation.rouge_l(["one"], ["one", "two"])


# ---- facts ----------------------------------------------------------------------------------------------------------


def test_every_reference_answer_of_the_sample_holds_all_its_facts() -> None:
    rows = sample.rows()
    complete = evaluation.facts_complete([str(r["answer"]) for r in rows], rows)
    assert len(complete) == len(rows)
    assert complete.all()


def test_no_reference_answer_holds_the_facts_of_another_condition() -> None:
    """Each row is answered with the next condition's answer to the same question."""
    rows = [r for r in sample.rows() if r["qtype"] == "treatment"]
    others = [str(r["answer"]) for r in rows[1:] + rows[:1]]
    assert not evaluation.facts_complete(others, rows).any()


@pytest.fixture
def several() -> Row:
    """A row of the sample whose answer lists three facts or more."""
    return next(r for r in sample.rows() if len(sample.facts_of(str(r["focus"]), str(r["qtype"]))) >= 3 and r["qtype"] == "symptoms")


def test_facts_count_whatever_the_order_the_case_and_the_words_around_them(several: Row) -> None:
    facts = sample.facts_of(several["focus"], "symptoms")
    assert evaluation.facts_complete(["It brings: " + "; then ".join(facts[::-1]).upper() + "!"], [several]).tolist() == [True]


def test_one_fact_missing_or_cut_in_the_middle_of_a_word_is_not_complete(several: Row) -> None:
    facts = sample.facts_of(several["focus"], "symptoms")
    for number, fact in enumerate(facts):
        others = facts[:number] + facts[number + 1 :]
        wrong = ["", " ".join(others), ", ".join([*others, fact + "s"]), ", ".join([*others, fact[:-1]])]
        assert not evaluation.facts_complete(wrong, [several] * len(wrong)).any(), fact


def test_rows_whose_source_lists_no_facts_are_left_out_not_counted_as_wrong(several: Row) -> None:
    foreign = {**several, "source": "NIHSeniorHealth"}
    unknown = {**several, "focus": "a condition that the sample lacks"}
    assert evaluation.facts_complete(["x", "x"], [foreign, unknown]).shape == (0,)
    assert evaluation.facts_complete([several["answer"], "x"], [several, foreign]).tolist() == [True]


# ---- intervals ------------------------------------------------------------------------------------------------------


def test_the_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    rng = numpy.random.default_rng(1)
    draws = rng.beta(2, 5, size=(300, 60))  # scores between 0 and 1, skewed; the true mean is 2/7
    inside = [low <= 2 / 7 <= high for low, high in (evaluation.mean_interval(d, resamples=500) for d in draws)]
    assert 0.90 <= numpy.mean(inside) <= 0.98


def test_the_interval_is_that_of_normal_theory_for_many_values() -> None:
    values = numpy.random.default_rng(2).normal(0.4, 0.2, size=1000)
    half = 1.96 * values.std(ddof=1) / numpy.sqrt(len(values))
    low, high = evaluation.mean_interval(values)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    assert evaluation.mean_interval(values) == (low, high), "the same seed gives the same interval"


def test_the_interval_of_equal_values_is_a_point_and_flags_count_as_0_and_1() -> None:
    assert evaluation.mean_interval(numpy.full(10, 0.25)) == (0.25, 0.25)
    low, high = evaluation.mean_interval(numpy.array([True] * 30 + [False] * 10))
    assert 0.5 < low < 0.75 < high < 1


# ---- baselines and the outcome --------------------------------------------------------------------------------------

TRAIN = [
    row("symptoms", "What are the symptoms of Shingles ?", "S-shingles"),
    row("symptoms", "What are the symptoms of Gout in the foot ?", "S-gout"),
    row("treatment", "What are the treatments for Shingles ?", "T-shingles"),
    row("treatment", "What are the treatments for Gout ?", "T-gout"),
]


def test_the_nearest_training_answer_is_of_the_same_question_type() -> None:
    asked = [
        row("treatment", "What are the treatments for Gout in old age ?", ""),
        row("symptoms", "What are the symptoms of Shingles in old age ?", ""),
        row("symptoms", "What are the treatments for Shingles ?", ""),  # the words are those of a treatment row, the type is not
    ]
    assert evaluation.nearest_training_answers(TRAIN, asked) == ["T-gout", "S-shingles", "S-shingles"]


def test_a_question_type_that_training_lacks_is_looked_up_among_all() -> None:
    assert evaluation.nearest_training_answers(TRAIN, [row("outlook", "Gout in the foot: what comes next ?", "")]) == ["S-gout"]


def test_the_nearest_training_answer_of_a_training_question_is_its_own() -> None:
    rows = sample.rows()[:200]
    assert evaluation.nearest_training_answers(rows, rows[::7]) == [r["answer"] for r in rows[::7]]


def test_the_outcome_holds_what_was_measured(several: Row) -> None:
    other = row("symptoms", "What are the symptoms of X ?", "alpha beta gamma delta", source="elsewhere")
    base = [Answer("", 64, False), Answer("alpha beta", 2, False)]
    tuned = [Answer(several["answer"], 20, True), Answer("alpha beta gamma", 3, False)]
    train = [row("symptoms", "What are the symptoms of X ?", "alpha")]
    found = evaluation.outcome([several, other], train, base, tuned)
    assert {k: v for k, v in found.items() if k != "rouge_l_gain_ci95"} == {
        "rows": 2,
        "rouge_l_base": round((0 + 2 * 2 / 6) / 2, 4),
        "rouge_l_tuned": round((1 + 2 * 3 / 7) / 2, 4),
        "rouge_l_nearest": round((0 + 2 * 1 / 5) / 2, 4),
        "stop_rate_base": 0.0,
        "stop_rate_tuned": 0.5,
        "facts_complete_base": 0.0,
        "facts_complete_tuned": 1.0,
        "facts_complete_nearest": 0.0,
    }
    low, high = found["rouge_l_gain_ci95"]
    assert (low, high) == pytest.approx((6 / 7 - 4 / 6, 1.0), abs=1e-4)  # of two values, the extremes: one row drawn twice


def test_the_outcome_of_rows_without_facts_says_none_instead_of_zero() -> None:
    rows = [row("symptoms", "What are the symptoms of X ?", "alpha beta")]
    found = evaluation.outcome(rows, rows, [Answer("alpha", 1, True)], [Answer("alpha beta", 2, True)])
    assert [found[f"facts_complete_{who}"] for who in ("base", "tuned", "nearest")] == [None, None, None]
    assert found["rouge_l_gain_ci95"] == pytest.approx([1 / 3, 1 / 3], abs=1e-4)
