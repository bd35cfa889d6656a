"""Exercises accept right answers in any form and give a hint to wrong ones; guesses get a score."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from sklearn.metrics import cohen_kappa_score
from torch import Tensor

from medquad_utils import checks
from medquad_utils.checks import EXERCISES, NotYet

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("0[1-9]_*.ipynb"))  # the quickstart has no exercises
exercises = pytest.mark.parametrize("name", EXERCISES)
lessons = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def code_cells(path: Path, tag: str = "") -> list[Any]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    return [cell for cell in code if not tag or tag in cell["metadata"].get("tags", ())]


def source(cells: list[Any]) -> str:
    return "\n".join("".join(cell["source"]) for cell in cells)


@functools.cache
def solutions() -> dict[str, Any]:
    """The answer to each exercise that the solution notebooks hand to its checker."""
    answers: dict[str, Any] = {}

    def keep(exercise: Any, answer: Any) -> str:
        answers[next(name for name, each in EXERCISES.items() if each is exercise)] = answer
        return "kept"

    with mock.patch.object(checks.Exercise, "__call__", keep), contextlib.redirect_stdout(None):
        for path in sorted((NOTEBOOKS / "solutions").glob("*.ipynb")):
            exec(source(code_cells(path)), {})
    return answers


def hint_for(name: str, answer: Any) -> str:
    with pytest.raises(NotYet) as caught:
        EXERCISES[name](answer)
    return str(caught.value)


def test_every_exercise_belongs_to_a_lesson_and_has_a_solution() -> None:
    assert list(EXERCISES) == [f"ex_{path.stem[:2]}_{n}" for path in LESSONS for n in (1, 2, 3)]
    assert set(EXERCISES) == set(solutions())


@lessons
def test_each_of_three_exercise_cells_is_a_stub_and_shows_its_hint(path: Path) -> None:
    assert f"](solutions/{path.name})" in path.read_text(encoding="utf-8")
    for number, cell in enumerate(code_cells(path, "exercise"), start=1):
        called = re.findall(r"checks\.attempt\(checks\.(\w+), ", source([cell]))
        assert called == [f"ex_{path.stem[:2]}_{number}"]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(source([cell]), {"checks": checks})
        assert printed.getvalue().startswith("Not yet. ")
        assert printed.getvalue() == "".join(cell["outputs"][0]["text"])
    assert number == 3


@exercises
def test_a_stub_is_refused_with_a_hint(name: str) -> None:
    for stub in (..., None, lambda *_: ..., lambda *_: None):
        assert hint_for(name, stub)


def failing(exercise: checks.Exercise, case: int, wrong: Any) -> Any:
    """An answer that is right in the cases before ``case``, and ``wrong`` there."""
    if exercise.cases[case][0] is None or callable(wrong):
        return wrong
    results = iter([*(right for _, right, _ in exercise.cases[:case]), wrong])
    return lambda *arguments: next(results)


@exercises
def test_each_wrong_answer_of_the_table_gets_its_hint(name: str) -> None:
    exercise, hints = EXERCISES[name], []
    for case, (_, _, rows) in enumerate(exercise.cases):
        for wrong, hint, *_ in rows:
            assert hint_for(name, failing(exercise, case, wrong)).startswith(hint)
            hints.append(hint)
    assert len(hints) == len(set(hints)) >= 3


def test_a_wrong_answer_outside_the_table_gets_the_nearest_hint() -> None:
    (_, _, steps), *_ = checks.ex_04_2.cases
    assert hint_for("ex_04_2", lambda *_: 50).startswith(steps[3][1])  # covered by a condition
    assert hint_for("ex_04_2", lambda *_: 97).startswith(steps[-1][1])  # covered by none


@exercises
def test_no_hint_gives_the_answer_away(name: str) -> None:
    exercise = EXERCISES[name]
    (arguments, right, rows), *_ = exercise.cases
    hints = " ".join([exercise.about, *(hint for _, hint, *_ in rows)]).replace(",", "")
    if isinstance(right, set) and arguments is None:
        forms = "|".join(s.join(sorted(right)) for s in ("", " ", " and "))
        assert not re.search(rf"\b({forms})\b", hints)
    elif arguments is None:
        numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", hints)]
        assert not [n for n in numbers if min(abs(n - right), abs(n - 100 * right)) < 0.01 * right]


ODD = [
    0, -1, 1e300, math.nan, math.inf, True, 2j, "", "text", "1,5", b"1", [], {}, set(), [[1], [2]],
    [[1], [2, 3]], [None], {"a": []}, object(), list, numpy.zeros((2, 3)), numpy.array(["x"]),
    numpy.float64("nan"), torch.zeros(2, 2), torch.tensor([]), range(3), (n / 0 for n in range(3)),
]  # fmt: skip


@exercises
def test_an_odd_answer_gets_a_hint_and_no_traceback(name: str) -> None:
    for odd in ODD:
        assert hint_for(name, odd)
        assert hint_for(name, lambda *arguments, odd=odd: odd)
    assert hint_for(name, lambda: "no arguments")


def test_an_error_in_an_answer_is_named_in_the_hint() -> None:
    assert "stopped with KeyError: 'b'" in hint_for("ex_04_2", lambda *_: {}["b"])


NUMBERS: list[Any] = [str, numpy.float64, torch.tensor, numpy.atleast_1d, lambda x: [x], Fraction]
LETTERS: list[Any] = [list, set, tuple, ", ".join, str.upper, lambda x: numpy.array(list(x))]
RESULTS: dict[str, list[Any]] = {  # by the kind of result that an exercise expects
    "a number": [str, numpy.float64, lambda x: torch.tensor(x, dtype=torch.float64)],
    "a list of numbers": [tuple, iter, numpy.array, torch.tensor, lambda x: list(torch.tensor(x))],
    "a list of names": [tuple, iter, set, dict.fromkeys, numpy.array],
    "a list of texts": [tuple, iter, numpy.array],
    "a text": [numpy.str_],
    "a tensor": [numpy.asarray, list, Tensor.tolist, torch.clone, Tensor.requires_grad_],
    "two numbers": [list, numpy.array, torch.tensor],
    "True or False": [int, numpy.bool_, torch.tensor],
    "a dictionary, word -> number": [lambda x: {w: numpy.float64(v) for w, v in x.items()}],
    "a text, and True or False": [list, lambda x: numpy.array(x, dtype=object)],
}


@exercises
def test_the_solution_is_accepted_in_every_form(name: str) -> None:
    exercise, solution = EXERCISES[name], solutions()[name]
    if callable(solution):
        forms = RESULTS[exercise.kind[0]]
        answers = [lambda *given, form=form: form(solution(*given)) for form in forms]
    else:
        answers = [form(solution) for form in (LETTERS if isinstance(solution, str) else NUMBERS)]
    for answer in [solution, *answers]:
        assert exercise(answer).startswith("✓ ")


def mixture_by_numpy(own: list[str], general: list[str], share: float, seed: int) -> Any:
    rng = numpy.random.default_rng(seed)
    drawn = rng.choice(general, int(len(own) * share / (1 - share)), replace=False)
    return rng.permutation([*own, *drawn])


OTHER_WAYS = [
    ("ex_01_1", 0.72), ("ex_02_1", 4.16), ("ex_02_3", "39.5"), ("ex_05_2", numpy.float32(0.87)),
    ("ex_03_2", lambda w, a, b, alpha: torch.addmm(w, b, a, alpha=alpha / len(a))),
    ("ex_04_1", lambda labels: numpy.flatnonzero(numpy.array(labels[1:]) != -100)),
    ("ex_06_2", cohen_kappa_score),
    ("ex_09_2", mixture_by_numpy),
]  # fmt: skip


@pytest.mark.parametrize(("name", "answer"), OTHER_WAYS)
def test_another_right_answer_is_accepted(name: str, answer: Any) -> None:
    assert EXERCISES[name](answer) == EXERCISES[name](answer)


def test_attempt_prints_praise_or_hint_and_no_fault(capsys: pytest.CaptureFixture[str]) -> None:
    checks.attempt(checks.ex_09_1, 40)
    checks.attempt(checks.ex_09_1, 160)
    praise, hint = capsys.readouterr().out.splitlines()
    assert praise.startswith("✓ ") and hint.startswith("Not yet. That is how many rows there are")
    with pytest.raises(ZeroDivisionError):
        checks.attempt(lambda answer: str(1 // 0), 1)


@pytest.mark.parametrize(
    ("guess", "truth", "unit", "verdict"),
    [  # by the ratio; on a scale with two ends by the distance
        (5.7, 5.7, "GB", "Spot on"), (5.2, 5.7, "GB", "Spot on"), (4, 5.7, "GB", "Close"),
        (8, 5.7, "GB", "Close"), (2, 5.7, "GB", "The right order of magnitude"),
        (57, 5.7, "GB", "That is a surprise"), (-3, 5.7, "GB", "That is a surprise"),
        (0, 0, "GB", "Spot on"), (-1, 0, "GB", "That is a surprise"),
        (" 5.7 ", 5.7, "GB", "Spot on"),
        ([5.7], 5.7, "GB", "Spot on"), (torch.tensor(5.7), 5.7, "GB", "Spot on"),
        (30, 99, "percent", "That is a surprise"), (98, 99, "%", "Spot on"), (91, 99, "%", "Close"),
        (80, 99, "%", "Not far off"), (1, 3, "%", "Spot on"), (5, 0.5, "%", "That is a surprise"),
        (0.5, 0.18, "ROUGE-L", "That is a surprise"),
    ],
)  # fmt: skip
def test_a_guess_gets_a_score(guess: Any, truth: float, unit: str, verdict: str) -> None:
    said = checks.predict(guess, truth, unit, "So it is.")
    assert f"; it is {truth:.4g} {unit}. {verdict}" in said and said.endswith(". So it is.")


def test_a_guess_that_is_no_number_gets_no_score() -> None:
    for guess in (None, ..., "4 GB", "", math.nan, math.inf, True, [1, 2], len):
        said = checks.predict(guess, 5.7, "GB", "So it is.")
        assert said.startswith("No score") and said.endswith("it is 5.7 GB. So it is.")


@pytest.mark.parametrize(
    ("guess", "truth", "unit", "meant"),
    [
        (0.5, 48, "%", "50 %"), (1, 84, "percent", "100 percent"), (60, 0.55, "ROUGE-L", "0.6 "),
        (0.5, 0.52, "%", ""), (0.5, 48, "GB", ""), (5, 48, "%", ""), (0.3, 0.4, "ROUGE-L", ""),
    ],
)  # fmt: skip
def test_percent_and_share_are_told_apart(guess: Any, truth: float, unit: str, meant: str) -> None:
    said = checks.predict(guess, truth, unit, "So it is.")
    assert f"Or did you mean {meant}" in said if meant else "did you mean" not in said
