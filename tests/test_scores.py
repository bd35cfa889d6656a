"""Scores against numbers worked out by hand, against brute force, and against what must hold for every text."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medquad_utils import chat, generation, lora, profiles, scores
from medquad_utils.assets import sample
from medquad_utils.data import Row
from medquad_utils.profiles import CourseError, Hardware, Plan

CPU = Hardware("cpu", "any", 16.0, cores=2)
CAT = "the cat sat on the mat"

LIKENESS: dict[str, Callable[[Sequence[str], scores.References], numpy.ndarray]] = {
    "rouge1": lambda a, r: scores.rouge(a, r)["rouge1"],
    "rouge2": lambda a, r: scores.rouge(a, r)["rouge2"],
    "rougeL": scores.rouge_l,
    "bleu": scores.bleu,
    "chrf": scores.chrf,
    "tfidf_cosine": scores.tfidf_cosine,
}
every_likeness = pytest.mark.parametrize("likeness", LIKENESS.values(), ids=list(LIKENESS))


# ---- ROUGE ----------------------------------------------------------------------------------------------------------


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
    assert scores.rouge_l([answer], [reference]) == pytest.approx([f1])


words = st.lists(st.sampled_from(["aa", "bb", "cc", "dd"]), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(words, words)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(answer: list[str], reference: list[str]) -> None:
    """The oracle tries every subsequence."""

    def subsequences(text: list[str]) -> set[tuple[str, ...]]:
        return {s for n in range(len(text) + 1) for s in itertools.combinations(text, n)}

    longest = max(map(len, subsequences(answer) & subsequences(reference)))
    expected = 2 * longest / (len(answer) + len(reference))
    assert scores.rouge_l([" ".join(answer)], [" ".join(reference)]) == pytest.approx([expected])


def test_rouge_l_wants_an_answer_for_each_reference() -> None:
    with pytest.raises(ValueError, match="longer"):
        scores.rouge_l(["one"], ["one", "two"])


@pytest.mark.parametrize(
    ("answer", "rouge1", "rouge2"),
    [
        (CAT, 1.0, 1.0),
        ("the cat on a mat", 8 / 11, 2 / 9),  # the, cat, on, mat of 5 and 6 words; "the cat" of 4 and 5 pairs
        ("the the the", 4 / 9, 0.0),  # the reference holds "the" twice: the third does not count
        ("cat", 2 / 7, 0.0),
    ],
)
def test_rouge_1_and_2_equal_the_values_worked_out_by_hand(answer: str, rouge1: float, rouge2: float) -> None:
    found = scores.rouge([answer], [CAT])
    assert (found["rouge1"], found["rouge2"]) == (pytest.approx([rouge1]), pytest.approx([rouge2]))


texts = st.lists(
    st.sampled_from(["Treats", "treatment", "the", "heart's", "U.S.A.", "naïve", "β-2", "3.5 mg", "\n", "skin_rash", "–"]), max_size=14
)


@settings(max_examples=60)
@given(texts, texts)
def test_rouge_gives_the_numbers_of_googles_own_scorer(answer: list[str], reference: list[str]) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    a, r = " ".join(answer), " ".join(reference)
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(r, a)
    ours = scores.rouge([a], [r])
    assert {k: v[0] for k, v in ours.items()} == pytest.approx({k: v.fmeasure for k, v in theirs.items()}, abs=1e-12)


def test_rouge_gives_the_numbers_of_googles_own_scorer_on_long_answers() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    articles = scores.plain_texts(profiles.resolve("tiny", hardware=CPU))[:12]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    ours = scores.rouge(articles[:6], articles[6:])
    for number, (a, r) in enumerate(zip(articles[:6], articles[6:], strict=True)):
        assert {k: v[number] for k, v in ours.items()} == pytest.approx({k: v.fmeasure for k, v in scorer.score(r, a).items()}, abs=1e-12)


def test_rouge_does_not_see_other_scripts_and_chrf_does() -> None:
    greek, other = "ο πυρετός και ο βήχας", "ο πυρετός και ο πόνος"
    assert all(v.tolist() == [0.0] for v in scores.rouge([greek], [greek]).values())
    assert scores.chrf([greek], [greek]) == pytest.approx([1.0])
    assert 0.4 < scores.chrf([greek], [other])[0] < 1


# ---- BLEU and chrF --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (CAT, 1.0),
        ("the cat sat", math.exp(1 - 6 / 3)),  # all of its runs of 1, 2 and 3 words are there; half as long as the reference
        ("cat", math.exp(1 - 6)),
        # 4 of 5 words, 1 of 4 pairs; no triple of 3 and no run of four of 2: smoothed to 1/2 and 1/4 of a match
        ("the cat on a mat", math.exp(1 - 6 / 5) * (4 / 5 * 1 / 4 * (1 / 2) / 3 * (1 / 4) / 2) ** (1 / 4)),
        ("a dog", 0.0),
        ("", 0.0),
    ],
)
def test_sentence_bleu_equals_the_value_worked_out_by_hand(answer: str, expected: float) -> None:
    assert scores.bleu([answer], [CAT]) == pytest.approx([expected])


def ngrams(items: Sequence[Any], n: int) -> Counter[tuple[Any, ...]]:
    return Counter(tuple(items[i : i + n]) for i in range(len(items) - n + 1))


def corpus_bleu_by_hand(rows: Sequence[tuple[str, list[str]]]) -> float:
    """Papineni et al., 2002, for texts whose words are parted by spaces and whose every order has a match."""
    matched, said, length, goal = [0] * 4, [0] * 4, 0, 0
    for answer, references in rows:
        tokens = answer.split()
        length += len(tokens)
        goal += min((abs(len(r.split()) - len(tokens)), len(r.split())) for r in references)[1]
        for n in range(1, 5):
            allowed: Counter[Any] = Counter()
            for reference in references:
                allowed |= ngrams(reference.split(), n)
            matched[n - 1] += (ngrams(tokens, n) & allowed).total()
            said[n - 1] += ngrams(tokens, n).total()
    precision = math.prod(m / s for m, s in zip(matched, said, strict=True)) ** 0.25
    return precision * min(1.0, math.exp(1 - goal / length))


def chrf_by_hand(rows: Sequence[tuple[str, str]]) -> float:
    """Popović, 2015: F2 of precision and recall, each the mean over the orders 1 to 6; spaces do not count."""
    precisions, recalls = [], []
    for n in range(1, 7):
        pairs = [(ngrams("".join(a.split()), n), ngrams("".join(r.split()), n)) for a, r in rows]
        matched, said, there = (sum(x) for x in zip(*(((a & r).total(), a.total(), r.total()) for a, r in pairs), strict=True))
        if said and there:
            precisions.append(matched / said)
            recalls.append(matched / there)
    p, r = (sum(x) / max(1, len(x)) for x in (precisions, recalls))
    return 5 * p * r / (4 * p + r) if p + r else 0.0


ROWS = [
    ("the cat sat on the mat today", ["the cat sat on the mat", "today the cat sat on a mat at home"]),
    ("fever and a dry cough are common signs", ["common signs are fever and a dry cough"]),
    ("rest helps", ["rest and fluids help", "sleep", "a long rest helps most people"]),
]


def test_corpus_bleu_counts_over_all_rows_however_many_references_each_has() -> None:
    answers, references = zip(*ROWS, strict=True)
    assert scores.corpus_bleu(answers, references) == pytest.approx(corpus_bleu_by_hand(ROWS))
    assert scores.corpus_bleu(answers, references) != pytest.approx(scores.bleu(answers, references).mean(), rel=0.02)


def test_corpus_chrf_counts_over_all_rows_with_the_best_reference_of_each() -> None:
    answers, references = zip(*ROWS, strict=True)
    best = [(a, max(known, key=lambda r: chrf_by_hand([(a, r)]))) for a, known in ROWS]
    assert scores.corpus_chrf(answers, references) == pytest.approx(chrf_by_hand(best))


@settings(max_examples=40)
@given(st.text("abc d", max_size=12), st.text("abc d", max_size=12))
def test_chrf_is_the_f2_of_runs_of_characters(answer: str, reference: str) -> None:
    assert scores.chrf([answer], [reference]) == pytest.approx([chrf_by_hand([(answer, reference)])])


def test_bleu_and_chrf_are_those_of_the_sacrebleu_command(tmp_path: Path) -> None:
    answers = [answer for answer, _ in ROWS] + ["Take it twice a day, e.g. after meals; don't stop (3.5 mg)."]
    references = [known[0] for _, known in ROWS] + ["Take 3.5 mg twice a day after meals. Don't stop early!"]
    (tmp_path / "said").write_text("\n".join(answers))
    (tmp_path / "known").write_text("\n".join(references))
    command = [sys.executable, "-m", "sacrebleu", "known", "-i", "said", "-m", "bleu", "chrf", "-b", "-w", "6"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    printed = [float(line.strip(" ,[]")) / 100 for line in done.stdout.split() if line.strip(" ,[]")]
    assert [scores.corpus_bleu(answers, references), scores.corpus_chrf(answers, references)] == pytest.approx(printed, abs=1e-7)


def test_a_corpus_of_nothing_is_refused() -> None:
    with pytest.raises(CourseError, match="at least one row"):
        scores.corpus_bleu([], [])


# ---- TF-IDF, length, repetition -------------------------------------------------------------------------------------


def test_the_tfidf_cosine_equals_the_value_worked_out_by_hand() -> None:
    corpus = ["fever cough", "fever rash"]
    rare = math.log((1 + 2) / (1 + 1)) + 1  # in one of two texts; "fever", in both, weighs 1
    assert scores.tfidf_cosine(["fever cough"], ["fever rash"], corpus) == pytest.approx([1 / (1 + rare**2)])
    assert scores.tfidf_cosine(["Cough!"], ["fever cough"], corpus) == pytest.approx([rare / math.hypot(1, rare)])


def test_without_a_corpus_the_references_say_how_rare_a_word_is() -> None:
    references = [["fever cough"], ["fever rash", "fever"]]
    assert scores.tfidf_cosine(["rash", "cough"], references).tolist() == [0, 0]
    flat = ["fever cough", "fever rash", "fever"]
    answers = ["cough with fever", "a rash"]
    assert scores.tfidf_cosine(answers, references) == pytest.approx(scores.tfidf_cosine(answers, references, flat))


def test_a_word_that_the_corpus_lacks_is_not_seen() -> None:
    assert scores.tfidf_cosine(["fever zzz", "zzz"], ["fever", "zzz"], ["fever cough"]) == pytest.approx([1, 0])
    assert scores.tfidf_cosine(["fever"], ["fever"], ["?!", "--"]).tolist() == [0], "a corpus without a word"


@pytest.mark.parametrize(
    ("answer", "references", "ratio"),
    [
        ("one two three", ["one two three four five six"], 1 / 2),
        ("one two three four five six", ["one two three"], 2.0),
        ("one two three four five", ["a b c d e f", "a", "a b c"], 5 / 6),  # six is nearer than three or one
        ("one two three", ["a b c d", "a b"], 3 / 2),  # equally near: the shorter one, as in BLEU
        ("", ["one two"], 0.0),
        ("one two", [""], 2.0),
    ],
)
def test_the_length_ratio_is_to_the_nearest_reference(answer: str, references: list[str], ratio: float) -> None:
    assert scores.length_ratio([answer], [references]).tolist() == [ratio]


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("a b c d", 0.0),
        ("a b c d e f g h", 0.0),
        ("a b c d a b c d", 1 / 5),  # five runs; "a b c d" is there twice
        ("Go, go go! GO go go go", 3 / 4),  # four runs, all alike
        ("go go go", 0.0),
        ("", 0.0),
    ],
)
def test_repetition_is_the_share_of_runs_of_four_words_said_before(answer: str, share: float) -> None:
    assert scores.repetition([answer]) == pytest.approx([share])


# ---- what holds for every text --------------------------------------------------------------------------------------

sentences = st.lists(st.sampled_from(["fever", "Cough", "and", "a", "rash,", "skin", "the", "heart's", "3.5"]), max_size=9).map(" ".join)
said = st.lists(sentences, min_size=1, max_size=3)


@every_likeness
@settings(max_examples=25)
@given(data=st.data())
def test_a_likeness_lies_between_0_and_1_and_the_best_reference_counts(likeness: Any, data: st.DataObject) -> None:
    answers = data.draw(said)
    references = [data.draw(said) for _ in answers]
    found = likeness(answers, references)
    assert found.dtype == numpy.float64
    assert found.shape == (len(answers),)
    assert ((found >= 0) & (found <= 1)).all()
    if likeness is not scores.tfidf_cosine:  # there the references also say how rare a word is
        assert found == pytest.approx([max(likeness([a], [r])[0] for r in known) for a, known in zip(answers, references, strict=True)])


@every_likeness
@given(text=st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20).map(lambda t: f"fever {t} and 5 words"))
def test_a_text_is_alike_to_itself_and_to_the_best_of_several(likeness: Any, text: str) -> None:
    assert likeness([text, text], [[text], ["else", text]]) == pytest.approx([1, 1])


@every_likeness
def test_an_empty_answer_scores_0_and_so_does_what_a_table_holds_in_its_place(likeness: Any) -> None:
    nothing: list[Any] = ["", None, math.nan, " \n", "?!", "\x00\x07", "<br/>"]
    assert likeness(nothing, [CAT] * len(nothing)).tolist() == [0] * len(nothing)
    assert likeness(["fever"], [[""]]).tolist() == [0]
    assert likeness([], []).shape == (0,)
    assert scores.repetition(nothing).tolist() == [0] * len(nothing)


@every_likeness
def test_a_row_without_a_reference_is_named(likeness: Any) -> None:
    for missing in ([], None, math.nan, [None]):
        with pytest.raises(CourseError, match="row 1 has no reference answer"):
            likeness(["a", "b"], ["a", missing])


@given(st.lists(st.sampled_from(["fever", "cough", "rash", "skin", "heart"]), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_rouge_1_and_tfidf_do_not_see_the_order_of_words(said: list[str], rng: random.Random) -> None:
    shuffled = rng.sample(said, len(said))
    for blind in (LIKENESS["rouge1"], LIKENESS["tfidf_cosine"]):
        assert blind([" ".join(shuffled)], [" ".join(said)]) == pytest.approx([1])


def test_the_other_scores_see_the_order_of_words() -> None:
    shuffled = "mat the on cat sat the"
    for name in ("rouge2", "rougeL", "bleu", "chrf"):
        assert LIKENESS[name]([shuffled], [CAT])[0] < 0.8


def test_every_score_says_what_it_is() -> None:
    assert set(LIKENESS) <= set(scores.SCORES)
    assert {s.better for s in scores.SCORES.values()} == {"up", "down", "near 1"}
    assert all(s.name and s.unit and len(s.what.split()) > 3 for s in scores.SCORES.values())
    assert len({s.name for s in scores.SCORES.values()}) == len(scores.SCORES)


def test_the_module_loads_without_the_heavy_packages() -> None:
    heavy = ("torch", "transformers", "scipy", "sklearn", "sacrebleu", "rouge_score", "nltk")
    code = f"import sys, medquad_utils.scores; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---- facts ----------------------------------------------------------------------------------------------------------


def test_every_reference_answer_of_the_sample_holds_all_its_facts() -> None:
    rows = sample.rows()
    complete = scores.facts_complete([str(r["answer"]) for r in rows], rows)
    assert len(complete) == len(rows)
    assert complete.all()


def test_no_reference_answer_holds_the_facts_of_another_condition() -> None:
    """Each row is answered with the next condition's answer to the same question."""
    rows = [r for r in sample.rows() if r["qtype"] == "treatment"]
    others = [str(r["answer"]) for r in rows[1:] + rows[:1]]
    assert not scores.facts_complete(others, rows).any()


@pytest.fixture
def several() -> Row:
    """A row of the sample whose answer lists three facts or more."""
    return next(r for r in sample.rows() if len(sample.facts_of(str(r["focus"]), str(r["qtype"]))) >= 3 and r["qtype"] == "symptoms")


def test_facts_count_whatever_the_order_the_case_and_the_words_around_them(several: Row) -> None:
    facts = sample.facts_of(several["focus"], "symptoms")
    assert scores.facts_complete(["It brings: " + "; then ".join(facts[::-1]).upper() + "!"], [several]).tolist() == [True]


def test_one_fact_missing_or_cut_in_the_middle_of_a_word_is_not_complete(several: Row) -> None:
    facts = sample.facts_of(several["focus"], "symptoms")
    for number, fact in enumerate(facts):
        others = facts[:number] + facts[number + 1 :]
        wrong = ["", " ".join(others), ", ".join([*others, fact + "s"]), ", ".join([*others, fact[:-1]])]
        assert not scores.facts_complete(wrong, [several] * len(wrong)).any(), fact


def test_rows_whose_source_lists_no_facts_are_left_out_not_counted_as_wrong(several: Row) -> None:
    foreign = {**several, "source": "NIHSeniorHealth"}
    unknown = {**several, "focus": "a condition that the sample lacks"}
    assert scores.facts_complete(["x", "x"], [foreign, unknown]).shape == (0,)
    assert scores.facts_complete([several["answer"], "x"], [several, foreign]).tolist() == [True]


# ---- intervals ------------------------------------------------------------------------------------------------------


def test_the_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    rng = numpy.random.default_rng(1)
    draws = rng.beta(2, 5, size=(300, 60))  # scores between 0 and 1, skewed; the true mean is 2/7
    inside = [low <= 2 / 7 <= high for low, high in (scores.mean_interval(d, resamples=500) for d in draws)]
    assert 0.90 <= numpy.mean(inside) <= 0.98


def test_the_interval_is_that_of_normal_theory_for_many_values() -> None:
    values = numpy.random.default_rng(2).normal(0.4, 0.2, size=1000)
    half = 1.96 * values.std(ddof=1) / numpy.sqrt(len(values))
    low, high = scores.mean_interval(values)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    assert scores.mean_interval(values) == (low, high), "the same seed gives the same interval"


def test_the_interval_of_equal_values_is_a_point_and_flags_count_as_0_and_1() -> None:
    assert scores.mean_interval(numpy.full(10, 0.25)) == (0.25, 0.25)
    low, high = scores.mean_interval(numpy.array([True] * 30 + [False] * 10))
    assert 0.5 < low < 0.75 < high < 1


@pytest.mark.parametrize("count", [2, 40, 700])
def test_the_interval_is_the_middle_95_percent_of_the_means_of_rows_drawn_again(count: int) -> None:
    values = numpy.random.default_rng(3).random(count)
    drawn = numpy.random.default_rng(7).integers(0, count, size=(2000, count))
    low, high = numpy.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    assert scores.interval(values, seed=7) == pytest.approx((values.mean(), low, high))


def test_a_single_value_is_a_point_and_none_at_all_is_refused() -> None:
    assert scores.interval([0.1]) == (0.1, 0.1, 0.1)
    assert scores.interval([0.1, 0.1, 0.1]) == (0.1, 0.1, 0.1), "not 0.10000000000000002"
    assert scores.interval([math.nan, 0.1]) == (0.1, 0.1, 0.1)
    for nothing in ([], [math.nan]):
        with pytest.raises(CourseError, match="at least one row"):
            scores.interval(nothing)


def test_a_paired_interval_is_narrower_than_those_of_two_arms_that_rise_and_fall_together() -> None:
    rng = numpy.random.default_rng(4)
    hardness = rng.normal(0.4, 0.2, 200)  # of a question, for either arm
    before, after = hardness + rng.normal(0, 0.05, 200), hardness + 0.03 + rng.normal(0, 0.05, 200)
    value, low, high = scores.paired_interval(before, after)
    assert value == pytest.approx(after.mean() - before.mean())
    assert 0 < low < value < high, "the gain is above 0"
    unpaired = math.hypot(*((lambda i: i[2] - i[1])(scores.interval(arm)) for arm in (before, after)))
    assert high - low < 0.5 * unpaired
    assert scores.paired_interval(after, before) == pytest.approx((-value, -high, -low), abs=2e-3)
    assert scores.paired_interval(before, before) == (0, 0, 0)


def test_arms_of_other_rows_cannot_be_paired() -> None:
    with pytest.raises(CourseError, match="2 and 3 values"):
        scores.paired_interval([1, 2], [1, 2, 3])


def test_bits_per_byte_is_a_ratio_of_sums_and_perplexity_its_like_for_tokens() -> None:
    nats, sizes = numpy.array([math.log(2) * 8, math.log(2) * 2]), numpy.array([8, 1])
    value, low, high = scores.bits_per_byte(nats, sizes)
    assert (value, low, high) == pytest.approx((10 / 9, 1, 2)), "not (1 + 2) / 2; of two rows, the extremes"
    assert scores.perplexity(nats, sizes) == pytest.approx((2**value, 2**low, 2**high))
    assert scores.perplexity(numpy.array([math.log(7)] * 3), numpy.array([1] * 3)) == pytest.approx((7, 7, 7))


def test_a_row_that_was_not_scored_does_not_count() -> None:
    nats, sizes = numpy.array([3.0, math.nan, 5.0]), numpy.array([4.0, math.nan, 4.0])
    assert scores.bits_per_byte(nats, sizes) == scores.bits_per_byte(nats[[0, 2]], sizes[[0, 2]])
    with pytest.raises(CourseError, match="at least one row"):
        scores.perplexity(nats[1:2], sizes[1:2])


def test_the_difference_of_two_models_is_paired() -> None:
    rng = numpy.random.default_rng(5)
    sizes = rng.integers(50, 500, 100)
    before = sizes * rng.uniform(0.5, 3, 100)
    after = before - 0.1 * sizes * rng.uniform(0.8, 1.2, 100)
    value, low, high = scores.bits_per_byte(after - before, sizes)
    assert value == pytest.approx(scores.bits_per_byte(after, sizes)[0] - scores.bits_per_byte(before, sizes)[0])
    assert low < value < high < 0
    assert high - low < 0.1 * (lambda i: i[2] - i[1])(scores.bits_per_byte(before, sizes))
    assert scores.perplexity(after - before, sizes)[0] == pytest.approx(
        scores.perplexity(after, sizes)[0] / scores.perplexity(before, sizes)[0]
    )


# ---- likelihood -----------------------------------------------------------------------------------------------------

QUESTIONS = [*chat.THREE_QUESTIONS, "What causes gout, and how do doctors find out that someone has it ?", "Is cystic fibrosis inherited ?"]
REFERENCES = [
    "Fever.",
    "  Rest, fluids – and 3½ weeks of naïve hope; β-blockers.\n",
    "A rash that itches",
    "Gout " * 40,
    "<|eot_id|> is text here",
]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return profiles.resolve("tiny", hardware=CPU, out=str(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def tokenizer(plan: Plan) -> Any:
    return generation.load_tokenizer(plan)


@pytest.fixture(scope="module")
def model(plan: Plan) -> Any:
    return generation.load_base(plan)


@pytest.fixture(scope="module")
def conversations() -> list[list[dict[str, str]]]:
    return [chat.prompt_messages(question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def losses(model: Any, tokenizer: Any, conversations: Any) -> scores.Losses:
    return scores.answer_loss(model, tokenizer, conversations, REFERENCES, batch_size=3)


def log_softmax_by_hand(model: Any, ids: Sequence[int], first: int) -> float:
    """Nats of ``ids[first:]`` given what stands before each, one unpadded row, in float64."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([list(ids)])).logits[0].double()
    return sum(float(torch.logsumexp(logits[at - 1], 0) - logits[at - 1, ids[at]]) for at in range(first, len(ids)))


def test_the_answer_loss_is_that_of_the_trained_tokens_but_for_the_end_of_turn(model: Any, tokenizer: Any, losses: scores.Losses) -> None:
    """The ids and the mask come from the trainer's own encoding: what is measured is what was learned."""
    for number, (question, reference) in enumerate(zip(QUESTIONS, REFERENCES, strict=True)):
        encoded = chat.encode(tokenizer, {"question": question, "answer": reference})
        assert encoded.ids[-1] == tokenizer.convert_tokens_to_ids(chat.END_OF_TURN)
        first = encoded.in_loss.index(True)
        assert losses.nats[number] == pytest.approx(log_softmax_by_hand(model, encoded.ids[:-1], first), abs=5e-4)
        assert losses.tokens[number] == len(encoded.ids) - 1 - first


def test_bytes_are_those_of_the_trimmed_reference_in_utf8(losses: scores.Losses) -> None:
    assert losses.bytes.tolist() == [6, 59, 18, 199, 24]
    assert losses.bytes[1] == len("Rest, fluids – and 3½ weeks of naïve hope; β-blockers.".encode())


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_the_loss_of_a_row_does_not_depend_on_the_rows_beside_it(
    model: Any, tokenizer: Any, conversations: Any, losses: scores.Losses, batch_size: int
) -> None:
    order = [3, 0, 4, 2, 1]
    again = scores.answer_loss(model, tokenizer, [conversations[i] for i in order], [REFERENCES[i] for i in order], batch_size)
    assert again.nats == pytest.approx(losses.nats[order], abs=1e-3)
    assert (again.tokens.tolist(), again.bytes.tolist()) == (losses.tokens[order].tolist(), losses.bytes[order].tolist())


@given(st.lists(st.integers(1, 50), max_size=30).map(sorted), st.integers(1, 8), st.integers(1, 120))
def test_batches_hold_every_row_once_and_fit_in_memory(lengths: list[int], rows: int, tokens: int) -> None:
    found = list(scores._batches(range(len(lengths)), lengths, rows, tokens))
    assert [n for batch in found for n in batch] == list(range(len(lengths)))
    assert all(len(b) == 1 or (len(b) <= rows and len(b) * lengths[b[-1]] <= tokens) for b in found)
    for batch, following in itertools.pairwise(found):
        assert len(batch) == rows or (len(batch) + 1) * lengths[following[0]] > tokens, "no smaller than it must be"


def test_what_does_not_fit_or_is_empty_is_left_out_and_not_cut(
    model: Any, tokenizer: Any, conversations: Any, losses: scores.Losses
) -> None:
    context = model.config.max_position_embeddings
    fits = "fever " * (context - len(chat.prompt_ids(tokenizer, conversations[0])))
    ids = tokenizer(fits.strip(), add_special_tokens=False)["input_ids"]
    longest = tokenizer.decode(ids[: context - len(chat.prompt_ids(tokenizer, conversations[0]))])
    references: list[Any] = [longest, longest + " fever", "", REFERENCES[3], math.nan]
    found = scores.answer_loss(model, tokenizer, conversations[:1] * 3 + conversations[3:], references)
    assert numpy.isnan(found.nats).tolist() == [False, True, True, False, True]
    assert found.nats[3] == pytest.approx(losses.nats[3], abs=1e-3)
    for column in found:
        assert numpy.isnan(column).tolist() == [False, True, True, False, True]


def test_an_adapter_counts_and_can_be_switched_off(plan: Plan, tokenizer: Any, conversations: Any, losses: scores.Losses) -> None:
    from peft import get_peft_model

    torch.manual_seed(0)
    tuned = get_peft_model(generation.load_base(plan), lora.lora_config(plan)).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    changed = scores.answer_loss(tuned, tokenizer, conversations, REFERENCES)
    assert (abs(changed.nats - losses.nats) > 0.1).all()
    with tuned.disable_adapter():
        assert scores.answer_loss(tuned, tokenizer, conversations, REFERENCES).nats == pytest.approx(losses.nats, abs=1e-3)


def test_plain_text_is_scored_from_its_first_token(model: Any, tokenizer: Any) -> None:
    texts = ["Asthma is common.", "", "Fever – 39 °C – passes.\nRest helps.", "x " * 2000]
    found = scores.text_loss(model, tokenizer, texts, batch_size=2)
    for number in (0, 2):
        ids = tokenizer(texts[number])["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert found.nats[number] == pytest.approx(log_softmax_by_hand(model, ids, 1), abs=5e-4)
        assert (found.tokens[number], found.bytes[number]) == (len(ids) - 1, len(texts[number].encode()))
    assert numpy.isnan(found.nats).tolist() == [False, True, False, True]


def test_the_embedded_base_knows_its_own_domain_and_not_general_text(plan: Plan, model: Any, tokenizer: Any) -> None:
    own, general = scores.plain_texts(plan), scores.plain_texts(dataclasses.replace(plan, model_id="any/other"))
    assert own == scores.plain_texts(plan), "the same texts before and after tuning"
    assert scores.plain_texts(dataclasses.replace(plan, model_path="/some/folder")) == general
    (known, *_), (foreign, *_) = (scores.bits_per_byte(*scores.text_loss(model, tokenizer, texts[:12])[::2]) for texts in (own, general))
    assert known < 0.2
    assert foreign > 3


def test_the_general_paragraphs_are_thirty_different_ones_without_a_condition_of_the_sample(plan: Plan) -> None:
    general = scores.plain_texts(dataclasses.replace(plan, model_id="any/other"))
    assert len(set(general)) == 30
    assert all(45 <= len(text.split()) <= 75 for text in general)
    names = {name.lower() for c in sample.conditions() for name in (c.name, c.mention, *c.synonyms) if name != "ALL"}  # of leukaemia
    assert not [n for n in names if f" {n} " in " ".join(general).lower()]


# ---- BERTScore ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A RoBERTa of random weights with a byte-level tokenizer, 40 tokens long: the kind of model that BERTScore takes."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    folder = tmp_path_factory.mktemp("roberta")
    trained = ByteLevelBPETokenizer()
    corpus = [str(r["answer"]) for r in sample.rows()[:80]]
    trained.train_from_iterator(corpus, vocab_size=400, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], show_progress=False)
    trained.save_model(str(folder))
    tokenizer = RobertaTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 40
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=42, pad_token_id=1,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(folder)
    return str(folder)


def bert_score_by_hand(folder: str, answer: str, reference: str, layer: int) -> float:
    """Zhang et al., 2020, equations 1 to 3, token by token, with the text's first word spelt as inside a sentence."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def vectors(text: str) -> tuple[list[Any], range]:
        ids = tokenizer(" " + text.strip(), truncation=True)["input_ids"]
        with torch.inference_mode():
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
        return list(states), range(1, len(ids) - 1)

    (a, in_a), (b, in_b) = vectors(answer), vectors(reference)

    def mean_of_best(from_: list[Any], which: range, to: list[Any]) -> float:
        return sum(max(float(torch.cosine_similarity(from_[i], other, dim=0)) for other in to) for i in which) / len(which)

    p, r = mean_of_best(a, in_a, b), mean_of_best(b, in_b, a)
    return 2 * p * r / (p + r)


SAID = ["fever and a rash", "Rest.", "treatment can include " * 20, "a", "rest and fluids for some days"]
KNOWN = [["a rash and fever", "cough"], ["rest", "x y z"], ["Treatment can include rest."], ["b", "a"], ["fluids"]]


@pytest.mark.parametrize("layer", [0, 2])
def test_bert_score_equals_the_value_worked_out_token_by_token(encoder: str, layer: int) -> None:
    expected = [max(bert_score_by_hand(encoder, a, r, layer) for r in known) for a, known in zip(SAID, KNOWN, strict=True)]
    for batch_size in (1, 3, 32):
        assert scores.bert_score(SAID, KNOWN, encoder, layer, batch_size) == pytest.approx(expected, abs=1e-5)
    assert expected[3] == pytest.approx(1)
    assert min(expected) < 0.99


def test_bert_score_takes_the_last_layer_of_an_unknown_model_and_0_for_nothing(encoder: str) -> None:
    assert scores.bert_score(SAID, KNOWN, encoder) == pytest.approx(scores.bert_score(SAID, KNOWN, encoder, layer=2))
    nothing: list[Any] = ["", None, " "]
    assert scores.bert_score([*nothing, "x"], ["rest"] * 3 + [""], encoder).tolist() == [0] * 4


def test_bert_score_says_why_it_is_not_computed(encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed, why = scores.bert_score_or_reason(SAID, KNOWN, encoder)
    assert computed is not None
    assert why == ""
    assert computed == pytest.approx(scores.bert_score(SAID, KNOWN, encoder))
    assert scores.bert_score_or_reason(SAID, KNOWN) == (None, "the Hub is out of reach (roberta-large is not in the local cache)")
    monkeypatch.setattr(scores, "hub_reachable", lambda: True)
    unasked, why = scores.bert_score_or_reason(SAID, KNOWN)
    assert unasked is None
    assert "1.4 GB and slow without a GPU" in why and "hf download FacebookAI/roberta-large --revision" in why
    (tmp_path / "config.json").write_text("{")
    damaged, why = scores.bert_score_or_reason(SAID, KNOWN, str(tmp_path))
    assert damaged is None
    assert why.startswith(f"{tmp_path.name} does not load")
