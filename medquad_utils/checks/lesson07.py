"""Lesson 07: two errors of refusing, Shapley values, sufficiency."""

from collections.abc import Iterable, Sequence

from medquad_utils.checks.common import NUMBER, NUMBERS, Exercise, items

_QUESTION = (["is", "gout", "croup or", "is", "mumps"], [0.5, 2.0, -4.0, 3.0, 1.0])
_WORDS = ("a dictionary, word -> number", lambda found: items(
    [found.get(word) for word in "abcd"] if isinstance(found, dict) and len(found) == 4 else None,
    int | float))  # fmt: skip


def _worth(kept: Iterable[str]) -> float:
    k = frozenset(kept)  # "a" counts by itself, "b" only with "c" or "d"; all four lose a little
    return 2.0 * ("a" in k) + 4.0 * ({*"bc"} <= k) + 3.0 * ({*"bd"} <= k) - 1.5 * (len(k) == 4) - 7


def _log_p(words: Sequence[str]) -> float:
    return sum(2.0**place * len(word) for place, word in enumerate(words)) - 20


ex_07_1 = Exercise(NUMBERS, "Return two numbers: the share of questions with an answer that were "
    "refused, and the share of the others that were answered.", [
    (([1, 1, 1, 0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0, 1, 0]), [0.2, 0.75], [
        ([0.2, 0.25], "The second number is the share that was answered, not refused."),
        ([0.8, 0.75], "The first number is the share that was refused, not answered."),
        ([0.75, 0.2], "Right numbers, in the other order."),
        ([1 / 9, 3 / 9], "Divide each count by the questions of its own kind, not by all."),
        ([1 / 2, 3 / 7], "Divide by the questions with (without) an answer, not by the refusals "
         "(answers)."),
        ([1, 3], "These are counts. Divide each by the questions of its kind."),
        ([0.5, 0.5], "Count each kind of error apart, and divide by the questions of that kind."),
    ]),
    (([0, 1], [0, 1]), [1, 1], [([0, 0], "To refuse is an error only where the answer is.")]),
], "Right: a model that always refuses has the errors 1 and 0.")  # fmt: skip

ex_07_2 = Exercise(_WORDS, "worth(frozenset(...)) gives log p with these words only.", [
    ((("a", "b", "c", "d"), _worth), {"a": 1.625, "b": 3.125, "c": 1.625, "d": 1.125}, [
        ({"a": 0.5, "b": 5.5, "c": 2.5, "d": 1.5}, "That is leave-one-out: each word comes last."),
        ({"a": 2, "b": 0, "c": 0, "d": 0}, "That is each word alone: as the first to come in."),
        ({"a": 39, "b": 75, "c": 39, "d": 27}, "That is the sum over all orders. Take the mean."),
        ({"a": 1.8125, "b": 3.3125, "c": 1.8125, "d": 1.3125}, "Take orders, not sets of words."),
        ({"a": 1, "b": 1, "c": 1, "d": 1}, "What does a word add when it comes in, on average?"),
    ]),
], "Right: the shares add up, and two words that do the same get the same.")  # fmt: skip

ex_07_3 = Exercise(NUMBER, "log_p(list_of_words) gives log p of the fixed answer.", [
    ((*_QUESTION, _log_p, 2), 130, [  # log p: 118, with "gout" and the second "is" alone -12
        (-130, "The sign is turned: before minus after."),
        (100, "That deletes the first k words: it is comprehensiveness. Keep only them."),
        (126, "A large value below 0 speaks against the answer: it is not among the first."),
        (120, '"is" stands there twice: keep the one with the large value, by its place.'),
        (128, "The words that stay must keep their order."),
        (-12, "Compare log_p(words) with log_p of the words that stay."),
    ]),
    ((*_QUESTION, _log_p, 0), 138, [(0, "With no word kept, log_p gets an empty list.")]),
    ((*_QUESTION, _log_p, 5), 0, [(138, "With all words kept, nothing falls.")]),
], "Right: a small fall means that these words are enough.")  # fmt: skip
