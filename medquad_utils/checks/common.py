"""What the checks of all lessons share: predictions, hints, and what an exercise is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from medquad_utils import CourseError


class NotYet(CourseError):
    """An exercise that is not solved yet; the message is a hint."""


def predict(guess: Any, truth: float, unit: str, because: str) -> str:
    """Compare a guess with the truth, and say why the truth is what it is.

    Percentages and scores have two ends, so their distance counts; of other units the ratio.
    """
    number, shown = finite(plain(guess)), f"it is {truth:,.4g} {unit}."
    if number is None:
        return f"No score this time, for my_guess is {guess!r:.40}, no number; {shown} {because}"
    said = f"You said {number:,.4g} {unit}; {shown} {_verdict(number, truth, unit)}."
    meant = 100 * number if unit in ("%", "percent") and 0 < number <= 1 else number
    meant = number / 100 if unit == "ROUGE-L" and number > 1 else meant
    if abs(meant - truth) < abs(number - truth):  # 0.5 for 50 %, or 50 for 0.5
        said += f" Or did you mean {meant:,.4g} {unit}? That is how it is written here."
    return f"{said} {because}"


SCALES = {"%": 100, "percent": 100, "ROUGE-L": 1}  # units whose values go from 0 to this


def _verdict(guess: float, truth: float, unit: str) -> str:
    if guess == truth:
        return "Spot on"
    ratio = max(guess / truth, truth / guess) if min(guess, truth) > 0 else math.inf
    off, verdicts = ratio, {1.1: "Spot on", 1.5: "Close", 3.2: "The right order of magnitude"}
    if unit in SCALES:  # by the distance, but 5 % is not close to 0.5 %
        off = 1 if 3 < ratio < math.inf else abs(guess - truth) / SCALES[unit]
        verdicts = {0.03: "Spot on", 0.1: "Close", 0.25: "Not far off"}
    return next((text for most, text in verdicts.items() if off <= most), "That is a surprise")


def attempt(checker: Callable[[Any], str], answer: Any) -> None:
    """Print the praise or the hint of ``checker``, so that the notebook runs on."""
    try:
        print(checker(answer))
    except NotYet as hint:
        print(f"Not yet. {hint}")


@dataclass(frozen=True)
class Exercise:
    """How to judge an answer, and typical wrong answers with their hints.

    A case is (arguments, right result, rows); the arguments are None if no function is asked for.
    A row is (wrong result, hint) or (wrong result, hint, covers); it fits a result that is the
    same, or for which ``covers(result)`` is true. A result may also be a function that returns it.
    """

    kind: tuple[str, Callable[[Any], Any]]  # name; reads a plain value, None if it is not one
    about: str  # what an answer looks like
    cases: Sequence[tuple[Any, Any, Sequence[tuple[Any, ...]]]]
    praise: str
    run: Callable[..., Any] = lambda function, *arguments: function(*arguments)
    stub: str = "Your function returns nothing yet. {about}"
    tolerance: float = 1e-6

    def __call__(self, answer: Any) -> str:
        """Return praise for a right answer; raise ``NotYet`` with a hint for any other."""
        for given, right, rows in self.cases:
            result = self._result(answer, given)
            if self._same(result, self._expected(right, given)):
                continue
            fits = (row for row in rows if self._fits(row, result, given))
            hint = next(fits, rows[-1])[1]
            shown = ", ".join(repr(value) for value in given or () if not callable(value))
            raise NotYet(f"{hint} It fails for {shown}." if 0 < len(shown) < 120 else hint)
        return f"✓ {self.praise}"

    def _fits(self, row: tuple[Any, ...], result: Any, given: Any) -> bool:
        wrong, _, *covers = row
        return covers[0](result) if covers else self._same(self._expected(wrong, given), result)

    def _expected(self, value: Any, given: Sequence[Any] | None) -> Any:
        return self._result(value, given) if callable(value) else self.kind[1](value)

    def _result(self, answer: Any, given: Sequence[Any] | None) -> Any:
        """Return the answer, or what it returns if it is a function, as plain Python."""
        if given is None:
            return self._read(answer, "Replace the dots with your answer. {about}")
        if not callable(answer):
            raise NotYet(f"Expected a function by its name, got {answer!r:.40}. {self.about}")

        def read(*arguments: Any) -> Any:
            return self._read(answer(*arguments), self.stub)

        try:
            return self.run(read, *copy.deepcopy(given))
        except NotYet:
            raise
        except Exception as error:  # a learner's function may fail in any way
            text = f"Your function stopped with {type(error).__name__}: {error}. {self.about}"
            raise NotYet(text) from None

    def _read(self, value: Any, stub: str) -> Any:
        if value is None or value is ...:
            raise NotYet(stub.format(about=self.about))
        if (result := self.kind[1](plain(value))) is None:
            raise NotYet(f"Expected {self.kind[0]}, got {value!r:.40}. {self.about}")
        return result

    def _same(self, one: Any, other: Any) -> bool:
        if isinstance(one, list) and isinstance(other, list):
            return len(one) == len(other) and all(map(self._same, one, other))
        if isinstance(one, int | float) and isinstance(other, int | float):
            return abs(one - other) <= self.tolerance
        return bool(one == other)


def number(truth: float, near: float, about: str, wrong: list[Any], praise: str) -> Exercise:
    """Make an exercise whose answer is a number, right up to ``near``."""
    return Exercise(NUMBER, about, [(None, truth, wrong)], praise, tolerance=near)


def letters(truth: str, about: str, praise: str, **hints: str) -> Exercise:
    """Make an exercise whose answer is a choice of letters, with a hint for each misjudged one."""
    right = set(truth)
    rows = [(right ^ {x}, hints[x], lambda chosen, x=x: x in chosen ^ right) for x in hints]

    def read(value: Any) -> set[str] | None:
        text = value if isinstance(value, str) else "".join(items(value, str) or [])
        found = {character for character in text.lower() if character.isalpha()}
        return found if found and found <= set(hints) else None

    return Exercise(("some of the letters", read), about, [(None, right, rows)], praise)


def plain(value: Any) -> Any:
    """Turn numpy's and torch's values into numbers, texts and lists, and tuples into lists."""
    if hasattr(value, "tolist") and not isinstance(value, type):
        value = value.tolist()
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def finite(value: Any) -> float | None:
    """Return a finite number as a float, also from a text or a list of one; None for all else."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def items(value: Any, kind: Any) -> list[Any] | None:
    """Return what a list, tuple, set or generator holds, None if it is not of ``kind``."""
    if isinstance(value, str | type) or not hasattr(value, "__iter__"):
        return None
    found = plain(list(value))
    return found if all(isinstance(item, kind) for item in found) else None


def flat(value: Any) -> list[Any]:
    """Return the numbers of nested lists in one list."""
    return [part for inner in value for part in flat(inner)] if isinstance(value, list) else [value]


def on_tensors(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function`` with torch tensors in place of lists."""
    import torch

    return function(*(torch.tensor(a) if isinstance(a, list) else a for a in arguments))


NUMBER = ("a number", finite)
NUMBERS = ("a list of numbers", lambda value: items(value, int | float))
TENSOR = ("a tensor", lambda value: items(flat(value), int | float))
TEXT = ("a text", lambda value: value if isinstance(value, str) else None)
TEXTS = ("a list of texts", lambda value: items(value, str))
NAMES = ("a list of names", lambda value: None if (x := items(value, str)) is None else set(x))
