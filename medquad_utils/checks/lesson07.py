"""Lesson 07: support by a passage, Shapley values, comprehensiveness."""

from collections.abc import Iterable, Sequence

from medquad_utils.checks.common import NUMBER, Exercise, items

_weight = {"gout": 3.5, "needs": 0.5, "is": 0, "rest": 2, "and": 0.5, "ice": 5}.get
_QUESTION = (["is", "gout", "croup or", "is", "mumps"], [0.5, 3.0, -4.0, 2.0, 1.0])
_WORDS = ("a dictionary, word -> number", lambda found: items(
    [found.get(word) for word in "abcd"] if isinstance(found, dict) and len(found) == 4 else None,
    int | float))  # fmt: skip


def _worth(kept: Iterable[str]) -> float:
    k = frozenset(kept)  # "a" counts by itself, "b" only with "c" or "d"; all four lose a little
    return 2.0 * ("a" in k) + 4.0 * ({*"bc"} <= k) + 3.0 * ({*"bd"} <= k) - 1.5 * (len(k) == 4) - 7


def _log_p(words: Sequence[str]) -> float:
    return sum(2.0**place * len(word) for place, word in enumerate(words)) - 20


ex_07_1 = Exercise(NUMBER, "weight(word) gives the weight of one word.", [
    (("gout needs rest and rest", "gout needs ice and ice and ice", _weight), 4.5 / 6.5, [
        (3 / 4, "Every word counts alike there. A rare word weighs more: weight(word)."),
        (4.5, "That is the weight that was found. Divide it by the weight that was looked for."),
        (4.5 / 8.5, 'A word that the sentence repeats ("rest") counts once.'),
        (4.5 / 9.5, "Divide by the weight of the sentence's words, not the passage's."),
        (2 / 6.5, "That is the share that is missing."),
        (1 / 2, "Which words do both hold, and what do they weigh?"),
    ]),
    (("rest", "resting arrest", _weight), 0, [(1, '"rest" does not stand as a word in "arrest".')]),
    (("is", "is", _weight), 0, [(1, "A sentence that weighs nothing has support 0.")]),
], "Right: this is the score under every cited sentence.")  # fmt: skip

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
    ((*_QUESTION, _log_p, 2), 100, [  # log p: 118, without "gout" and the second "is" 18
        (-100, "The sign is turned: before minus after."),
        (130, "That keeps the first k words: it is sufficiency. Delete them."),
        (112, "A large value below 0 speaks against the answer: it is not the first to go."),
        (120, '"is" stands there twice: delete the one with the large value, by its place.'),
        (97, "The words that stay must keep their order."),
        (18, "Compare log_p(words) with log_p of the words that stay."),
    ]),
    ((*_QUESTION, _log_p, 0), 0, [(100, "With no word deleted, nothing falls.")]),
    ((*_QUESTION, _log_p, 5), 138, [(114, "With all words deleted, log_p gets an empty list.")]),
], "Right: deleted, not zeroed, and the answer says whether the words mattered.")  # fmt: skip
