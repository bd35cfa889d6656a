"""Exercise checkers: any right answer passes, each plausible wrong one gets the hint that fits it, a stub gets a kind word."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy
import pytest
import torch
from answers import RIGHT, WRONG, with_own_hints

from medquad_utils import checks

NAMES = [name for name in dir(checks) if name.startswith("ex_")]


def hint_for(name: str, answer: Any) -> str:
    with pytest.raises(checks.NotYet) as caught:
        getattr(checks, name)(answer)
    return str(caught.value)


def test_every_checker_has_answers_of_both_kinds_and_no_other_has() -> None:
    assert list(RIGHT) == list(WRONG) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_stub_gets_a_hint_and_no_error(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for stub in (..., None, lambda *arguments: ..., lambda *arguments: None):
        checks.attempt(getattr(checks, name), stub)
        assert capsys.readouterr().out.startswith("Not yet. ")


@pytest.mark.parametrize(("name", "answer"), [(name, answer) for name in RIGHT for answer in RIGHT[name]])
def test_a_right_answer_passes_in_any_form(name: str, answer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    checks.attempt(getattr(checks, name), answer)
    assert capsys.readouterr().out.startswith("✓ ")


@pytest.mark.parametrize(("name", "answer", "hint"), [(name, *wrong) for name in WRONG for wrong in WRONG[name]])
def test_a_wrong_answer_gets_the_hint_that_is_its_own(name: str, answer: Any, hint: str) -> None:
    assert re.search(hint, hint_for(name, answer))


@pytest.mark.parametrize("name", NAMES)
def test_hints_differ_in_more_than_their_numbers(name: str) -> None:
    said = {re.sub(r"[\d.,]+", "#", hint_for(name, answer)) for answer, _ in with_own_hints(name)}
    assert len(said) >= 3


SECRETS = {  # what a hint must not say
    "ex_01_1": r"0\.7[12]|1,?200", "ex_02_1": r"4\.0635", "ex_02_3": r"23\.[23]", "ex_03_1": r"r \* \(|inputs \+ outputs",
    "ex_03_3": r"\b98\b",
    "ex_04_3": r"1\.9\b", "ex_05_2": r"0\.8[67]", "ex_06_1": r"\b(ae|a and e)\b", "ex_08_1": r"\b(bce|b, c)\b", "ex_09_1": r"\b40\b",
}  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_no_hint_gives_the_solution_away(name: str) -> None:
    assert not [told for answer, _ in WRONG[name] if (told := re.search(SECRETS[name], hint_for(name, answer)))]


ODD = [
    0, -1, 1e300, math.nan, math.inf, True, 2j, "", "text", "1,5", b"1", [], {}, set(), [[1], [2]], [[1], [2, 3]], [None], {"a": []},
    object(), list, numpy.zeros((2, 3)), numpy.array(["x"]), numpy.float64("nan"), torch.zeros(2, 2), torch.tensor([]),
    range(3), (n / 0 for n in range(3)),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_oddest_answer_gets_a_hint_and_no_traceback(name: str) -> None:
    for odd in ODD:
        assert hint_for(name, odd)
        assert hint_for(name, lambda *arguments, odd=odd: odd)


def test_attempt_lets_an_error_of_the_course_through() -> None:
    def broken(answer: Any) -> str:
        raise ValueError("a fault of the checker")

    with pytest.raises(ValueError, match="fault of the checker"):
        checks.attempt(broken, 1)


# ---- predictions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guess", "truth", "verdict"),
    [
        (5.7, 5.7, "Spot on"), (5.2, 5.7, "Spot on"), (4, 5.7, "Close"), (8, 5.7, "Close"), (2, 5.7, "The right order of magnitude"),
        (57, 5.7, "A surprise, then"), (0, 5.7, "A guess above zero would have been closer"), (-3, 5.7, "A guess above zero"),
        (0, 0, "Spot on"), (10, 0, "Not a bit of it, then"), (-1, 0, "Not a bit of it, then"),
    ],
)  # fmt: skip
def test_a_guess_is_scored_kindly_and_explained(guess: float, truth: float, verdict: str) -> None:
    said = checks.predict(guess, truth, "GB", "Because of the scales.")
    assert said.startswith(f"You said {guess:,.4g} GB; it is {truth:,.4g} GB. {verdict}")
    assert said.endswith(". Because of the scales.")


@pytest.mark.parametrize("guess", ["4", " 4.0 ", numpy.float32(4), numpy.array([4]), torch.tensor(4.0), [4]])
def test_a_guess_may_have_any_form_of_a_number(guess: Any) -> None:
    assert checks.predict(guess, 4.0, "GB", "So it is.") == "You said 4 GB; it is 4 GB. Spot on. So it is."


@pytest.mark.parametrize(
    ("guess", "named"),
    [
        (None, "None"), (..., "still three dots"), ("four", "'four'"), ("4 GB", "'4 GB'"), ("", "''"), (math.nan, "nan"), (math.inf, "inf"),
        (True, "True"), ([1, 2], "of type list"), (len, "of type builtin_function_or_method"),
    ],
)  # fmt: skip
def test_no_number_is_no_guess_and_the_lesson_goes_on(guess: Any, named: str) -> None:
    said = checks.predict(guess, 5.7, "GB", "So it is.")
    assert said == f"No score this time: my_guess is {named}, and a number such as 2.5 was expected; it is 5.7 GB. So it is."


@pytest.mark.parametrize(
    ("guess", "truth", "unit", "meant"),
    [(0.5, 48, "%", "50 %"), (0.5, 48, "percent", "50 percent"), (1, 84, "%", "100 %"), (60, 0.55, "ROUGE-L", "0.6 ROUGE-L")],
)
def test_a_share_for_percent_is_told_apart_from_a_far_guess(guess: float, truth: float, unit: str, meant: str) -> None:
    assert f"Or did you mean {meant}?" in checks.predict(guess, truth, unit, "So it is.")


@pytest.mark.parametrize(("guess", "truth", "unit"), [(0.5, 0.52, "%"), (0.5, 48, "GB"), (5, 48, "%"), (0.3, 0.4, "ROUGE-L"), (0, 48, "%")])
def test_a_guess_that_may_be_meant_so_is_left_alone(guess: float, truth: float, unit: str) -> None:
    assert "did you mean" not in checks.predict(guess, truth, unit, "So it is.")
