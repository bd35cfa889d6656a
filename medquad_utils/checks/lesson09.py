"""Lesson 09: general rows beside own ones, a mixture, adapters that may be shipped."""

import random
from collections.abc import Callable

from medquad_utils.checks.common import NAMES, TEXTS, Exercise, number

_OWN, _GENERAL = [f"own {n}" for n in range(30)], [f"general {n}" for n in range(200)]
_ADAPTERS = {"sure": ((0.02, 0.1), (-0.03, 0.01)), "hopes": ((-0.01, 0.3), (-0.01, 0.02)),
    "unsure": ((0.05, 0.2), (-0.15, 0.12)), "wrecks": ((0.1, 0.3), (-0.4, -0.2)),
    "better": ((0.01, 0.05), (0.01, 0.04))}  # fmt: skip
_PASS = {"sure", "better"}


def _mix(own: list[str], general: list[str], share: float, seed: float) -> list[str]:
    rng = random.Random(seed)
    rows = own + rng.sample(general, round(len(own) * share / (1 - share)))
    return rng.sample(rows, len(rows))


def _kept(mix: Callable[..., list[str]]) -> int:
    """Count the promises of a mixture that ``mix`` keeps before it breaks one."""
    own, general = _OWN[:], _GENERAL[:]
    calls = ((0.5, 0), (0.5, 0), (0.5, 1), (0.2, 0), (0.0, 0))
    half, again, other, few, none = (mix(own, general, *call) for call in calls)
    drawn = [row for row in half if row not in _OWN]
    return [
        (own, general) == (_OWN, _GENERAL),
        sorted(row for row in half if row in _OWN) == sorted(_OWN),
        len(set(drawn) & set(_GENERAL)) == len(drawn),
        len(drawn) == 30,
        len(few) in (37, 38) and sorted(none) == sorted(_OWN),
        half == again,
        set(half) != set(other),
        drawn not in (half[:30], half[-30:]),
        False,
    ].index(False)


ex_09_1 = number(40, 1e-6, "How many general rows, as a whole number?", [
    (30, "That is a quarter of the own rows. The quarter is to be one of all rows."),
    (160, "That is how many rows there are in all. How many of them are general?"),
    (39, "Less than a quarter of all rows would be general.", lambda n: n < 40),
    (90, "More than a quarter of all rows would be general."),
], "The own rows are the other three quarters; a share of all is not a share of them.")  # fmt: skip

ex_09_2 = Exercise(TEXTS, "It returns a list of rows.", [
    ((), _mix, [
        (lambda o, g, s, n: o.append("") or o, "A list that went in was changed: extend a copy."),
        (lambda o, g, s, n: _mix(o[1:], g, s, n), "Each own row must be in the result, once."),
        (lambda o, g, s, n: _mix(o, g[:9] * 9, s, n), "Draw general rows without replacement."),
        (lambda o, g, s, n: _mix(o, g, 10 / 13, n), "At 0.5, half of the result must be general."),
        (lambda o, g, s, n: _mix(o, g, 0.5, n), "At 0.2, a fifth of the result must be general."),
        (lambda o, g, s, n: _mix(o, g, s, random.random()), "The same seed gives the same list."),
        (lambda o, g, s, n: _mix(o, g, s, 0), "Another seed must draw other general rows."),
        (lambda o, g, s, n: sorted(_mix(o, g, s, n)), "The rows are not shuffled."),
    ]),
], "All of the field, a fair draw of the rest, and every step sees both.", _kept)  # fmt: skip

ex_09_3 = Exercise(NAMES, "It returns a list of names.", [
    ((_ADAPTERS, 0.05), _PASS, [
        ({"wrecks"}, "One that surely loses 0.20 outside passed.", lambda names: "wrecks" in names),
        ({"hopes"}, "A gain that may be below 0 passed.", lambda names: "hopes" in names),
        ({"unsure"}, "A possible loss of 0.15 passed.", lambda names: "unsure" in names),
        ({"better"}, "One that surely loses no more than 0.03 outside did not pass."),
        ({"sure"}, "One that gains on both sides did not pass."),
    ]),
    ((_ADAPTERS, 0.01), {"better"}, [(_PASS, "The margin is 0.01, the possible loss 0.03.")]),
    ((_ADAPTERS, 0.5), {*_ADAPTERS} - {"hopes"}, [(_PASS, "At a margin of 0.5 gains decide.")]),
], "That little was lost is shown by the worst end of the interval.")  # fmt: skip
