"""Exercise checkers: any right answer passes, each plausible wrong one gets the hint that fits it, a stub gets a kind word."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
from scipy.stats import bootstrap

from medquad_utils import checks

Score = Callable[[str, str], float]


@pytest.mark.parametrize("checker", [getattr(checks, name) for name in dir(checks) if name.startswith("ex_")])
def test_a_stub_gets_a_hint_and_no_error(checker: Callable[[Any], str], capsys: pytest.CaptureFixture[str]) -> None:
    for stub in (..., None, lambda *arguments: ...):
        checks.attempt(checker, stub)
        assert capsys.readouterr().out.startswith("Not yet. ")


# ---- lesson 06: claims ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["ae", "a, e", "E A", {"a", "e"}, ["e", "a"], ("A", "E")])
def test_the_claims_that_hold_pass_in_any_form(answer: Any) -> None:
    assert checks.ex_06_1(answer).startswith("✓")


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        ("abe", "b:"), ("ace", "c:"), ("ade", "d:"), ("e", "one side of 0"), ("a", "cannot be excluded"),
        ("axe", "claims are a to e"), ("", "claims are a to e"), (2, "Expected letters"),
    ],
)  # fmt: skip
def test_each_wrong_choice_of_claims_has_its_hint(answer: Any, hint: str) -> None:
    with pytest.raises(checks.NotYet, match=hint):
        checks.ex_06_1(answer)


# ---- lesson 06: the paired bootstrap --------------------------------------------------------------------------------


def drawn(values: Any, low: float = 2.5, seed: int = 1) -> tuple[float, float]:
    means = numpy.random.default_rng(seed).choice(values, (3000, len(values))).mean(axis=1)
    return float(numpy.percentile(means, low)), float(numpy.percentile(means, 100 - low))


def by_hand(a: list[float], b: list[float]) -> list[float]:
    rng, means = random.Random(5), []
    for _ in range(2000):
        chosen = [rng.randrange(len(a)) for _ in a]
        means.append(sum(b[n] - a[n] for n in chosen) / len(a))
    return [sorted(means)[50], sorted(means)[1949]]


def by_scipy(a: list[float], b: list[float]) -> Any:
    found = bootstrap((numpy.subtract(b, a),), numpy.mean, method="BCa", rng=numpy.random.default_rng(2)).confidence_interval
    return numpy.array([found.low, found.high])


def apart(a: list[float], b: list[float]) -> tuple[float, float]:
    rng = numpy.random.default_rng(3)
    gains = rng.choice(b, (2000, len(b))).mean(axis=1) - rng.choice(a, (2000, len(a))).mean(axis=1)
    return float(numpy.percentile(gains, 2.5)), float(numpy.percentile(gains, 97.5))


@pytest.mark.parametrize("right", [by_hand, by_scipy, *(lambda a, b, s=s: drawn(numpy.subtract(b, a), seed=s) for s in range(8))])
def test_any_paired_bootstrap_passes(right: Callable[..., Any]) -> None:
    assert checks.ex_06_2(right).startswith("✓")


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (apart, "Too wide"),
        (lambda a, b: drawn(numpy.subtract(a, b)), "sign is turned"),
        (lambda a, b: drawn(b), "interval of one mean"),
        (lambda a, b: drawn(a), "interval of one mean"),
        (lambda a, b: drawn(numpy.subtract(b, a), 5.0), "90 %"),
        (lambda a, b: tuple(numpy.percentile(numpy.subtract(b, a), [2.5, 97.5])), "single differences"),
        (lambda a, b: (numpy.mean(b) - numpy.mean(a),) * 2, "without replacement"),
        (lambda a, b: drawn(numpy.subtract(b, a))[::-1], "lower end comes first"),
        (lambda a, b: drawn(numpy.subtract(b, a), 10.0), "Which percentiles"),
        (lambda a, b: numpy.mean(b) - numpy.mean(a), "two numbers"),
        (lambda a, b: a.nothing, "stopped with AttributeError"),
        (7, "Expected a function"),
    ],
)
def test_each_wrong_bootstrap_has_its_hint(wrong: Any, hint: str) -> None:
    with pytest.raises(checks.NotYet, match=hint):
        checks.ex_06_2(wrong)


# ---- lesson 06: the swapped disease ---------------------------------------------------------------------------------


def others_of(text: str, references: Sequence[str], own: int, score: Score) -> list[float]:
    return [score(text, reference) for n, reference in enumerate(references) if n != own]


def by_loop(text: str, references: list[str], own: int, score: Score) -> bool:
    return all(score(text, references[own]) > value for value in others_of(text, references, own, score))


def by_numpy(text: str, references: list[str], own: int, score: Score) -> Any:
    values = numpy.array([score(text, reference) for reference in references])
    return values[own] > numpy.delete(values, own).max()


@pytest.mark.parametrize("right", [by_loop, by_numpy, lambda *given: int(by_loop(*given))])
def test_any_right_way_to_tell_the_disease_passes(right: Callable[..., Any]) -> None:
    assert checks.ex_06_3(right).startswith("✓")


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda t, r, own, s: s(t, r[own]), "not a likeness"),
        (lambda t, r, own, s: True, "compare with the other references"),
        (lambda t, r, own, s: False, "though in other words"),
        (lambda t, r, own, s: s(t, r[own]) > max(s(t, x) for x in r), "though in other words"),
        (lambda t, r, own, s: s(t, r[own]) >= max(s(t, x) for x in r), "a tie is not nearer"),
        (lambda t, r, own, s: s(t, r[own]) > numpy.mean(others_of(t, r, own, s)), "mean of the others"),
        (lambda t, r, own, s: s(t, r[own]) > 0.9, "though in other words"),
        (lambda t, r, own, s: s(t, r[own]) > 0.2, "one of them is nearer"),
        (lambda t, r, own, s: s(t, r[1]) > max(s(t, r[0]), s(t, r[2])), "one of them is nearer"),
        (lambda t, r, own, s: r.nothing, "stopped with AttributeError"),
        ("gout", "Expected a function"),
    ],
)
def test_each_wrong_way_to_tell_the_disease_has_its_hint(wrong: Any, hint: str) -> None:
    with pytest.raises(checks.NotYet, match=hint):
        checks.ex_06_3(wrong)
