"""Lesson 06: claims that intervals support, a paired bootstrap, the swapped disease."""

import random
import statistics
from collections.abc import Sequence

from medquad_utils.checks.common import Exercise, items, letters

_TEXTS = ("swollen cheeks and fever", "sudden pain in the toe", "a barking cough at night")
_RANDOM = random.Random(6)
_A = [_RANDOM.uniform(0.1, 0.9) for _ in range(60)]
_GAINS = [_RANDOM.gauss(0.05, 0.1) for _ in _A]
_B = [score + gain for score, gain in zip(_A, _GAINS, strict=True)]


def _interval(values: Sequence[float], z: float = 1.96) -> tuple[float, float]:  # normal theory
    mean, error = statistics.fmean(values), statistics.pstdev(values) / len(values) ** 0.5
    return mean - z * error, mean + z * error


def _overlap(one: str, other: str) -> float:
    return len({*one.split()} & {*other.split()}) / len({*one.split(), *other.split()})


ex_06_1 = letters("ae", 'Give the letters of all claims that hold, for example "bd" or {"b", "d"}.',
    "Right: an interval that leaves out 0 supports a claim; one that holds 0 leaves it open.",
    b="b: two gains are compared by the interval of their difference, not by size.",
    c="c: an interval that holds 0 does not prove that there is no difference. What else is in it?",
    d="d: whether separate intervals overlap says little about answers to the same questions.",
    a="One of the paired intervals lies on one side of 0. Which claim does that support?",
    e="An interval also says what cannot be excluded: look at the upper end of C's.")  # fmt: skip

ex_06_2 = Exercise(("two numbers", lambda ends: [sum(x) / 2, x[1] - x[0]]  # center and width
    if len(x := items(ends, int | float) or []) == 2 else None),
    "It gets two lists of equal length and returns two numbers.", [
    ((_A, _B), _interval(_GAINS), [
        (_interval([-gain for gain in _GAINS]), "The sign is turned: above 0, b should be better."),
        (_interval(_B), "That is an interval of one mean. Take differences.", lambda x: x[0] > 0.3),
        (_interval(_GAINS, 15), "Single gains spread so, not their mean.", lambda x: x[1] > 0.25),
        (_interval(_GAINS, 6), "Draw questions, with both scores of each.", lambda x: x[1] > 0.09),
        (_interval(_GAINS, 1.645), "That is a 90 % interval: leave out 2.5 % at each end."),
        (_interval(_GAINS, 0), "Draw with replacement, and take percentiles of the means."),
    ]),
], "Right: draw questions, not answers; the pairs stay.", tolerance=0.0045)  # fmt: skip

ex_06_3 = Exercise(("True or False", lambda x: x if isinstance(x, int) else None),
    "score(text, reference) gives the likeness of two texts.", [
    (("pain in the big toe", 1), True, [(False, "The same in other words must pass.")]),
    ((_TEXTS[1], 1), True, [(False, "The reference itself must pass: it is none of the others.")]),
    (("a cough at night", 1), False, [(True, "Another disease passed: compare with the others.")]),
    (("swollen cheeks", 2), False, [(True, "The first is nearest. Which one is its own?")]),
    ((f"a barking cough at {_TEXTS[1]}", 2), False, [(True, "Compare with each of the others.")]),
    (("quite unlike", 0), False, [(True, "Like none of them is no hit: a tie is not nearer.")]),
], "Right: only the other references tell a disease from a style.",
    lambda answer, text, own: answer(text, list(_TEXTS), own, _overlap))  # fmt: skip
