"""Lesson 06: claims that intervals support, agreement beyond luck, the wrong disease."""

from medquad_utils.checks.common import NUMBER, Exercise, letters

_TEXTS = ("swollen cheeks and fever", "sudden pain in the toe", "a barking cough at night")


def _overlap(one: str, other: str) -> float:
    return len({*one.split()} & {*other.split()}) / len({*one.split(), *other.split()})


ex_06_1 = letters("ae", 'Give the letters of all claims that hold, for example "bd" or {"b", "d"}.',
    "Right: an interval that leaves out 0 supports a claim; one that holds 0 leaves it open.",
    b="b: two gains are compared by the interval of their difference, not by size.",
    c="c: an interval that holds 0 does not prove that there is no difference. What else is in it?",
    d="d: whether separate intervals overlap says little about answers to the same questions.",
    a="One of the paired intervals lies on one side of 0. Which claim does that support?",
    e="An interval also says what cannot be excluded: look at the upper end of C's.")  # fmt: skip

ex_06_2 = Exercise(NUMBER, "It gets two lists of True and False, and returns a number.", [
    (([True] * 3 + [False] * 7, [True, True, False, True] + [False] * 6), 0.22 / 0.42, [
        (0.8, "That is the agreement. Take the luck out."),
        (0.6, "Luck is one half only if a judge passes half of the answers."),
        (0.22, "Divide by what is left above luck."),
        (0.71 / 0.91, "Two lists also agree by luck on what both refuse."),
    ]),
    (([True] * 2 + [False] * 6, [True] * 6 + [False] * 2), 0.2, [
        (-1 / 3, "Labels and verdicts each have their own share of True."),
    ]),
    (([True, False, True, False], [True] * 4), 0.0, [
        (0.5, "A judge that passes everything is no better than luck."),
    ]),
], "Right: kappa is 0 for a judge that passes everything, however many answers are safe."
)  # fmt: skip

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
