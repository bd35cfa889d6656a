"""Checks that a learner meets: kind scores for predictions, and exercise checkers that hint but never tell.

A checker takes an answer, accepts any correct one, and raises ``NotYet`` with a hint for a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from medquad_utils.profiles import CourseError


class NotYet(CourseError):
    """An exercise that is not solved yet; the message is a hint."""


def predict(guess: float, truth: float, unit: str, because: str) -> str:
    """Score a guess kindly, by its factor from the truth, and say why the truth is what it is."""
    if guess <= 0 or truth <= 0:
        verdict = "A guess above zero would have been closer"
    else:
        factor = max(guess / truth, truth / guess)
        verdict = (
            "Spot on" if factor <= 1.1
            else "Close" if factor <= 1.5
            else "The right order of magnitude" if factor <= 5
            else "A surprise, then: that is what a prediction is for"
        )  # fmt: skip
    return f"You said {guess:,.4g} {unit}; it is {truth:,.4g} {unit}. {verdict}. {because}"


def attempt(checker: Callable[[Any], str], answer: Any) -> None:
    """Print what ``checker`` says to ``answer``: praise, or the hint of a ``NotYet``, so that the notebook runs on."""
    try:
        print(checker(answer))
    except NotYet as hint:
        print(f"Not yet. {hint}")


def _need(right: bool, hint: str) -> None:
    if not right:
        raise NotYet(hint)


def _number(answer: Any, hint: str) -> float:
    """``answer`` as a float; a stub (``None``, ``...``) or a text gets ``hint``."""
    if answer is None or answer is ...:
        raise NotYet(f"Replace the dots with your answer. {hint}")
    try:
        return float(answer)
    except (TypeError, ValueError):
        raise NotYet(f"Expected a number, got {type(answer).__name__}. {hint}") from None


def _function(answer: Any, hint: str) -> Callable[..., Any]:
    """``answer`` if it can be called; else a hint."""
    if not callable(answer):
        raise NotYet(f"Expected a function. {hint}")
    return answer  # type: ignore[no-any-return]


def _well_done(what: str) -> str:
    return f"✓ {what}"


# ---- lesson 01 ------------------------------------------------------------------------------------------------------

# ---- lesson 02 ------------------------------------------------------------------------------------------------------

# ---- lesson 03 ------------------------------------------------------------------------------------------------------

# ---- lesson 04 ------------------------------------------------------------------------------------------------------

# ---- lesson 05 ------------------------------------------------------------------------------------------------------
