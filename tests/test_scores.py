"""Scores against values worked out by hand, against other libraries, and on any input."""

from __future__ import annotations

import math
from typing import Any

import build_sample
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from medquad_utils import CourseError, chat, scores
from medquad_utils.assets import sample

CAT = "the cat sat on the mat"
CORPUS = ["fever cough", "fever rash"]
RARE = math.log((1 + 2) / (1 + 1)) + 1  # the IDF of a word in one of two texts; 1 if it is in both
LIKENESS = ("rouge1", "rouge2", "rougeL", "bleu", "chrf", "tfidf_cosine")


def measure(score: str, answers: Any, references: Any) -> numpy.ndarray:
    """The values of one score by its name."""
    if score == "unstemmed":  # the default of the package evaluate
        return scores.rouge_l(answers, references, stem=False)
    if score.startswith("rouge"):
        return scores.rouge(answers, references)[score]
    corpus = [[*CORPUS, CAT]] if score == "tfidf_cosine" else []
    return getattr(scores, score)(answers, references, *corpus)


@pytest.mark.parametrize(
    ("score", "answer", "known", "value"),
    [
        ("rouge1", "the cat on a mat", [CAT], 8 / 11),  # 4 of 5 and of 6 words
        ("rouge1", "the the the", [CAT], 4 / 9),  # the reference holds "the" twice
        ("rouge1", "ο πυρετός", ["ο πυρετός"], 0),  # no word in another script, as in Google's
        ("rouge2", "the cat on a mat", [CAT], 2 / 9),  # 1 of 4 and of 5 pairs
        ("rougeL", "mat the on sat cat the", [CAT], 6 / 12),  # "the on the" keeps its order
        ("rougeL", "The CATS sat; on the mat!", [CAT], 1),  # stemmed; case does not count
        ("unstemmed", "The CATS sat; on the mat!", [CAT], 5 / 6),
        ("bleu", "the cat sat", [CAT], math.exp(1 - 6 / 3)),  # half as long, all runs are there
        # 4 of 5 words, 1 of 4 pairs; no triple of 3 and no run of four of 2: smoothed
        ("bleu", "the cat on a mat", [CAT], math.exp(-1 / 5) * (1 / 5 / 6 / 8) ** (1 / 4)),
        ("chrf", "abc", ["abd"], (2 / 3 + 1 / 2 + 0) / 3),  # one, two and three characters
        ("chrf", "a b", ["abcd"], 25 / 53),  # F2 of precision 1 and recall (1/2 + 1/3) / 2
        ("chrf", "ο πυρετός", ["ο πυρετός"], 1),
        ("length_ratio", "one two three", ["1 2 3 4 5 6"], 1 / 2),
        ("length_ratio", "one two three four five", ["a b c d e f", "a", "a b c"], 5 / 6),
        ("length_ratio", "one two three", ["a b c d", "a b"], 3 / 2),  # the shorter, as in BLEU
    ],
)
def test_scores_equal_hand_values(score: str, answer: str, known: list[str], value: float) -> None:
    assert measure(score, [answer], [known]) == pytest.approx([value])


def test_repetition_is_the_share_of_runs_of_four_words_said_before() -> None:
    answers = ["a b c d e f g h", "a b c d a b c d", "Go, go go! GO go go go", "go go go", ""]
    assert scores.repetition(answers) == pytest.approx([0, 1 / 5, 3 / 4, 0, 0])


def test_tfidf_weighs_words_by_the_corpus_that_is_given() -> None:
    answers, references = ["fever cough", "fever zzz", "zzz", "Cough!"], ["fever rash", "fever"]
    references += ["zzz", "fever cough"]
    found = scores.tfidf_cosine(answers, references, CORPUS)
    expected = [1 / (1 + RARE**2), 1, 0, RARE / math.hypot(1, RARE)]
    assert found == pytest.approx(expected), "a word it lacks is not seen"
    assert scores.tfidf_cosine(["पैर"], ["पोर"], ["पैर पोर"]) == [0], "letters and marks are one word"


words = st.lists(st.sampled_from(["fever", "Cough", "a", "rash,", "the", "heart's"]), max_size=9)
said = st.lists(words.map(" ".join), min_size=1, max_size=3)


@pytest.mark.parametrize("score", LIKENESS)
@settings(max_examples=25)
@given(data=st.data())
def test_likeness_is_from_0_to_1_and_the_best_reference_counts(score: str, data: Any) -> None:
    answers = data.draw(said)
    references = [data.draw(said) for _ in answers]
    found = measure(score, answers, references)
    assert (found.dtype, found.shape) == (numpy.float64, (len(answers),))
    assert ((found >= 0) & (found <= 1)).all()
    pairs = zip(answers, references, strict=True)
    best = [max(measure(score, [a], [r])[0] for r in known) for a, known in pairs]
    assert found == pytest.approx(best)
    whole = [f"fever {text} and 5 words" for text in answers]
    same = measure(score, whole, [["else", text] for text in whole])
    assert same == pytest.approx([1] * len(whole))


@pytest.mark.parametrize("score", LIKENESS)
def test_empty_answers_score_0_and_missing_references_are_named(score: str) -> None:
    nothing: list[Any] = ["", None, math.nan, " \n", "?!", "\x00\x07", "<br/>"]
    assert measure(score, nothing, [CAT] * len(nothing)).tolist() == [0] * len(nothing)
    assert measure(score, [], []).shape == (0,)
    known = ["a dog", CAT]  # pandas reads a list in a parquet file as an array
    assert measure(score, ["cat"], [numpy.array(known)]) == measure(score, ["cat"], [known])
    for missing in ([], None, math.nan, [None]):
        with pytest.raises(CourseError, match="row 2 has no reference answer"):
            measure(score, ["a", "b"], ["a", missing])


def test_facts_count_in_any_order_but_only_whole_and_all_of_them() -> None:
    asked = [(r, sample.facts_of(str(r["focus"]), str(r["qtype"]))) for r in build_sample.rows()]
    row, facts = next((r, f) for r, f in asked if r["qtype"] == "symptoms" and len(f) >= 3)
    shouted = "It brings: " + "; then ".join(facts[::-1]).upper() + "!"
    foreign = {**row, "source": "NIHSeniorHealth"}
    values = scores.facts_column(["x", shouted], [foreign, row])
    assert numpy.array_equal(values, [math.nan, 1], equal_nan=True), "only the sample lists facts"
    for number, fact in enumerate(facts):
        others = facts[:number] + facts[number + 1 :]
        wrong = ["", *(", ".join([*others, *more]) for more in ([], [fact + "s"], [fact[:-1]]))]
        assert not scores.facts_column(wrong, [row] * len(wrong)).any(), fact


def test_groups_are_resampled_whole_and_a_row_without_one_stands_alone() -> None:
    many = numpy.random.default_rng(3).random(40)
    drawn = numpy.random.default_rng(0).integers(0, 40, size=(2000, 40))
    ends = numpy.quantile(many[drawn].mean(axis=1), [0.025, 0.975])
    assert scores.interval(many) == pytest.approx((many.mean(), *ends)), "percentile bootstrap"
    values, groups = [0.2, 0.4, 0.9], ["gout", "gout", "asthma"]
    # One draw in four takes gout twice (mean 0.3), one asthma twice (0.9), the others both.
    assert scores.interval(values, groups) == pytest.approx((0.5, 0.3, 0.9))
    alone = scores.interval(values)
    assert scores.interval(values, ["", "", ""]) == scores.interval(values, [None, 7, ""]) == alone
    gap = scores.interval([*values, math.nan], [*groups, "gout"])
    assert gap == scores.interval(values, groups), "a row without a value leaves its group"
    with pytest.raises(IndexError, match="boolean index did not match"):
        scores.interval(values, groups[:2])


@pytest.mark.parametrize(("count", "n"), [(0, 98), (98, 98), (13, 13), (3, 10), (0, 1)])
def test_a_share_has_the_interval_of_wilson(count: int, n: int) -> None:
    known = binomtest(count, n).proportion_ci(method="wilson")
    assert scores.wilson(count / n, n) == pytest.approx((known.low, known.high))
    found = scores.interval([True] * count + [False] * (n - count))
    assert found == pytest.approx((count / n, known.low, known.high))
    assert found[1] < found[2]


def test_a_share_by_groups_counts_its_effective_rows() -> None:
    def wilson(count: int, n: int) -> Any:
        return pytest.approx((count / n, *scores.wilson(count / n, n)))

    copies = [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0], list("aaaabbbbcccc")
    assert scores.interval(*copies) == wilson(1, 3), "four copies of a row are one row"
    assert scores.interval([0, 1] * 6, list("aabbccddeeff")) == wilson(6, 12), "never above n"
    # All right: 9 rows of one disease and 3 of another count as 12**2 / (9**2 + 3**2) rows.
    expected = 1.0, *scores.wilson(1, 144 / 90)
    assert scores.interval([1] * 12, list("aaaaaaaaabbb")) == pytest.approx(expected)
    # By hand: gaps 0.6 0.6 | -0.4 -0.4 | -0.4: squared 1.2, by group 1.2, -0.8, -0.4 squared 2.24
    found = scores.effective_rows(numpy.array([1, 1, 0, 0, 0]), list("aabbc"))
    assert found == pytest.approx(5 * 1.2 / 2.24)


def test_no_interval_where_the_data_allow_none() -> None:
    for values, groups in (([0.1] * 7, None), ([math.nan, 0.1], None), ([0.1, 0.7], ["a", "a"])):
        value, low, high = scores.interval(values, groups)
        assert value == pytest.approx(numpy.nanmean(values)) and math.isnan(low + high)
    same = numpy.zeros(9)
    assert numpy.isnan(scores.bits_per_byte(same, same + 4)[1:]).all(), "two arms with one prompt"
    assert numpy.isnan(scores.paired_interval([0.1] * 5, [0.2] * 5)[1:]).all()
    for nothing in ([], [math.nan]):
        with pytest.raises(CourseError, match="at least one row"):
            scores.interval(nothing)


def test_equal_paired_differences_of_shares_are_bounded_by_wilson() -> None:
    """0 of 98 differ: at most a share of 0.0377 does, up or down."""
    ones, u = [1.0] * 98, binomtest(0, 98).proportion_ci(method="wilson").high
    assert u == pytest.approx(0.0377, abs=1e-4)
    assert scores.paired_interval(ones, ones) == pytest.approx((0, -u, u))
    assert scores.paired_interval([0.0] * 98, ones) == pytest.approx((1, 1 - 2 * u, 1))
    u = scores.wilson(0, 14)[1]  # 98 rows about 14 diseases
    by_group = scores.paired_interval(ones, ones, [row % 14 for row in range(98)])
    assert by_group == pytest.approx((0, -u, u))


def test_p_values_are_two_sided_and_corrected_by_holm() -> None:
    rng = numpy.random.default_rng(8)
    noise = rng.normal(0, 1, 400)
    for mean in (0.08, -0.11):  # against normal theory
        values = noise - noise.mean() + mean
        z = abs(mean) / (values.std() / math.sqrt(400))
        assert scores.p_value(values) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.03)
    assert scores.p_value(numpy.ones(20)) == 1 / 2001 and scores.p_value(numpy.zeros(9)) == 1
    assert scores.p_value(numpy.ones(5)) == pytest.approx(2 / 32, abs=0.02), "two of 32 signs"
    effect = numpy.repeat(rng.normal(0.1, 0.5, 20), 20)
    assert scores.p_value(effect, groups=[row // 20 for row in range(400)]) > 0.1
    assert scores.p_value(effect) < 0.01, "400 rows, as if they were not 20 groups"
    noise = rng.normal(0, 1, (400, 8)).repeat(3, axis=1)  # eight diseases, three rows each
    false = [scores.p_value(values, [n // 3 for n in range(24)]) < 0.05 for values in noise]
    assert 0.02 < numpy.mean(false) < 0.08, "at 5 %, one in twenty of equal arms looks better"
    # Sorted 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.04 x 1, never below an earlier one.
    assert scores.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert scores.holm([0.7, 0.6]) == [1, 1] and scores.holm([]) == []


def test_paired_interval_is_after_minus_before_of_each_row() -> None:
    rng = numpy.random.default_rng(4)
    hardness = rng.normal(0.4, 0.2, 200)  # of a question, for either arm
    before, after = (hardness + gain + rng.normal(0, 0.05, 200) for gain in (0, 0.03))
    value, low, high = scores.paired_interval(before, after)
    assert value == pytest.approx(after.mean() - before.mean())
    assert 0 < low < value < high, "the gain is above 0"
    unpaired = math.hypot(*(i[2] - i[1] for i in map(scores.interval, (before, after))))
    assert high - low < 0.5 * unpaired
    groups = [row // 20 for row in range(200)]
    paired = scores.paired_interval(before, after, groups)
    assert paired == scores.interval(after - before, groups), "clustered too"
    with pytest.raises(ValueError, match="must have the same shape"):
        scores.paired_interval([1, 2], [1, 2, 3])


def test_bits_per_byte_and_perplexity_are_ratios_of_sums_over_whole_rows() -> None:
    nats, sizes = numpy.array([math.log(2) * 8, math.log(2) * 2]), numpy.array([8, 1])
    value, low, high = scores.bits_per_byte(nats, sizes)
    assert (value, low, high) == pytest.approx((10 / 9, 1, 2)), "of two rows, the extremes"
    assert scores.perplexity(nats, sizes) == pytest.approx((2**value, 2**low, 2**high))
    gaps = numpy.array([3.0, math.nan, 5.0]), numpy.array([4.0, math.nan, 4.0])
    assert scores.bits_per_byte(*gaps) == scores.bits_per_byte(*(g[[0, 2]] for g in gaps))
    # The first two rows are one disease: 10 bits over 9 bytes, against 3 over 1.
    nats, sizes = numpy.append(nats, math.log(2) * 3), numpy.append(sizes, 1)
    by_group = scores.bits_per_byte(nats, sizes, ["a", "a", "b"])
    assert by_group == pytest.approx((13 / 10, 10 / 9, 3))
    found = scores.perplexity(nats, sizes, ["a", "a", "b"])
    assert found == pytest.approx([2**bits for bits in by_group])


QUESTIONS = [*chat.THREE_QUESTIONS, "What causes gout, and how is it found ?"]
REFERENCES = ["Fever.", " Rest – and 3½ weeks of naïve hope.\n", "Gout " * 40, "<|eot_id|> is text"]


def nats_by_hand(model: Any, ids: list[int], first: int) -> float:
    """Nats of ``ids[first:]`` given what stands before each, one unpadded row, in float64."""
    with torch.inference_mode():
        log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(log_p[at - 1, ids[at]]) for at in range(first, len(ids)))


@pytest.mark.parametrize("batch", [1, 150, 8192])
def test_answer_loss_is_of_trained_tokens(
    tiny_base: Any, tiny_tokenizer: Any, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's own encoding gives the ids and the mask; the end of turn does not count."""
    monkeypatch.setattr(scores, "BATCH_TOKENS", batch)
    asked = [chat.prompt_messages(question) for question in QUESTIONS]
    found = scores.answer_loss(tiny_base, tiny_tokenizer, asked, REFERENCES)
    assert found.bytes.tolist() == [6, 38, 199, 19]  # trimmed, in UTF-8, the special token parted
    for number, (question, reference) in enumerate(zip(QUESTIONS, REFERENCES, strict=True)):
        encoded = chat.encode(tiny_tokenizer, {"question": question, "answer": reference})
        assert encoded.ids[-1] == tiny_tokenizer.convert_tokens_to_ids(chat.END_OF_TURN)
        first = encoded.in_loss.index(True)
        expected = nats_by_hand(tiny_base, encoded.ids[:-1], first)
        assert found.nats[number] == pytest.approx(expected, abs=5e-4)
        assert found.tokens[number] == len(encoded.ids) - 1 - first


def test_text_loss_starts_at_the_first_token(tiny_base: Any, tiny_tokenizer: Any) -> None:
    asked = ["Asthma is common.", "", "Fever – 39 °C – passes.\nRest helps.", "x " * 2000]
    found = scores.text_loss(tiny_base, tiny_tokenizer, asked)
    for column in found:
        assert numpy.isnan(column).tolist() == [False, True, False, True], "left out, not cut"
    for number in (0, 2):
        ids = tiny_tokenizer(asked[number])["input_ids"]
        assert ids[0] == tiny_tokenizer.bos_token_id
        assert found.nats[number] == pytest.approx(nats_by_hand(tiny_base, ids, 1), abs=5e-4)
