"""Exercise checkers: any right answer passes, each plausible wrong one gets the hint that fits it, a stub gets a kind word."""

from __future__ import annotations

import itertools
import random
import re
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


# ---- lesson 07: support ---------------------------------------------------------------------------------------------

Weight = Callable[[str], float]


def by_sets(sentence: str, passage: str, weight: Weight) -> float:
    said = set(sentence.split())
    return sum(map(weight, said & set(passage.split()))) / (sum(map(weight, said)) or 1)


def one_by_one(sentence: str, passage: str, weight: Weight) -> float:
    whole = found = 0.0
    for word in dict.fromkeys(sentence.split()):
        whole += weight(word)
        found += weight(word) if word in passage.split() else 0.0
    return found / whole if whole else 0


@pytest.mark.parametrize("right", [by_sets, one_by_one])
def test_any_right_support_passes(right: Callable[..., Any]) -> None:
    assert checks.ex_07_1(right).startswith("✓")


def total(words: Any, weight: Weight) -> float:
    return sum(map(weight, words))


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda s, p, w: by_sets(s, p, lambda word: 1.0), "Every word counts alike"),
        (lambda s, p, w: total(set(s.split()) & set(p.split()), w), "Divide it by the weight that was looked for"),
        (lambda s, p, w: total([x for x in s.split() if x in p.split()], w) / total(s.split(), w), "counts once"),
        (lambda s, p, w: by_sets(p, s, w), "not the passage's"),
        (lambda s, p, w: total(set(s.split()) & set(p.split()), w) / total(p.split(), w), "not the passage's"),
        (lambda s, p, w: total(set(s.split()) & set(p.split()), w) / total(set(f"{s} {p}".split()), w), "what else the passage says"),
        (lambda s, p, w: 1 - by_sets(s, p, w), "share that is missing"),
        (lambda s, p, w: total([x for x in set(s.split()) if x in p], w) / (total(set(s.split()), w) or 1), "Whole words"),
        (lambda s, p, w: total(set(s.split()) & set(p.split()), w) / total(set(s.split()), w), "stopped with ZeroDivisionError"),
        (lambda s, p, w: 0.5, "Which words do both hold"),
        (lambda s, p, w: max(by_sets(s, p, w), 0.1), 'does not stand in "arrest"'),
        (lambda s, p, w: by_sets(s, p, w) if by_sets(s, p, w) or "rest" in s else 1.0, "has support 0"),
        (0.5, "Expected a function"),
    ],
)
def test_each_wrong_support_has_its_hint(wrong: Any, hint: str) -> None:
    with pytest.raises(checks.NotYet, match=hint):
        checks.ex_07_1(wrong)


# ---- lesson 07: Shapley values --------------------------------------------------------------------------------------

Worth = Callable[[Any], float]


def by_orders(words: Sequence[str], worth: Worth) -> dict[str, float]:
    found, orders = dict.fromkeys(words, 0.0), list(itertools.permutations(words))
    for order in orders:
        for n, word in enumerate(order):
            found[word] += (worth(order[: n + 1]) - worth(order[:n])) / len(orders)
    return found


def by_sizes(words: Sequence[str], worth: Worth) -> dict[str, float]:
    """The other formula: the mean over the sizes of the means over the sets of a size."""

    def share(word: str) -> float:
        rest = [w for w in words if w != word]
        sets = [list(map(frozenset, itertools.combinations(rest, size))) for size in range(len(words))]
        return float(numpy.mean([numpy.mean([worth(s | {word}) - worth(s) for s in some]) for some in sets]))

    return {word: share(word) for word in words}


@pytest.mark.parametrize("right", [by_orders, by_sizes])
def test_any_right_shapley_values_pass(right: Callable[..., Any]) -> None:
    assert checks.ex_07_2(right).startswith("✓")


def each(share: Callable[[str, frozenset[str], Worth], float]) -> Callable[..., dict[str, float]]:
    return lambda words, worth: {word: share(word, frozenset(words), worth) for word in words}


def every_set_alike(words: Sequence[str], worth: Worth) -> dict[str, float]:
    def share(word: str) -> float:
        rest = [w for w in words if w != word]
        sets = [frozenset(s) for size in range(len(words)) for s in itertools.combinations(rest, size)]
        return sum(worth(s | {word}) - worth(s) for s in sets) / len(sets)

    return {word: share(word) for word in words}


def in_reading_order(words: Sequence[str], worth: Worth) -> dict[str, float]:
    return {word: worth(words[: n + 1]) - worth(words[:n]) for n, word in enumerate(words)}


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (each(lambda word, all_, worth: worth(all_) - worth(all_ - {word})), "leave-one-out"),
        (each(lambda word, all_, worth: worth({word}) - worth(())), "each word alone"),
        (each(lambda word, all_, worth: worth({word})), "What did the word add"),
        (lambda words, worth: {w: 24 * v for w, v in by_orders(words, worth).items()}, "Take the mean"),
        (lambda words, worth: {w: -v for w, v in by_orders(words, worth).items()}, "sign is turned"),
        (every_set_alike, "Every set of words counts alike"),
        (in_reading_order, "one order only"),
        (each(lambda word, all_, worth: (worth(all_) - worth(())) / len(all_)), "not shared out by orders"),
        (each(lambda word, all_, worth: 0.0), "must add up"),
        (lambda words, worth: [1.0, 2.0, 3.0, 4.0], "Return a dictionary"),
        (lambda words, worth: {"a": 1.0}, "Every word needs a value"),
        (lambda words, worth: worth.nothing, "stopped with AttributeError"),
        (7, "Expected a function"),
    ],
)
def test_each_wrong_way_to_share_has_its_hint(wrong: Any, hint: str) -> None:
    with pytest.raises(checks.NotYet, match=hint):
        checks.ex_07_2(wrong)


# ---- lesson 07: comprehensiveness -----------------------------------------------------------------------------------

LogP = Callable[[list[str]], float]


def largest(values: Sequence[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda n: -values[n])[:k]


def fall(words: Sequence[str], gone: Any, log_p: LogP) -> float:
    return log_p(list(words)) - log_p([word for n, word in enumerate(words) if n not in gone])


def by_numpy_places(words: list[str], values: list[float], log_p: LogP, k: int) -> Any:
    kept = numpy.sort(numpy.argsort(values)[: len(words) - k])
    return numpy.float64(log_p(words) - log_p([words[n] for n in kept]))


@pytest.mark.parametrize("right", [by_numpy_places, lambda w, v, p, k: fall(w, largest(v, k), p)])
def test_any_right_comprehensiveness_passes(right: Callable[..., Any]) -> None:
    assert checks.ex_07_3(right).startswith("✓")


def by_word(words: list[str], values: list[float], log_p: LogP, k: int) -> float:
    gone = {words[n] for n in largest(values, k)}
    return log_p(words) - log_p([word for word in words if word not in gone])


def by_first_found(words: list[str], values: list[float], log_p: LogP, k: int) -> float:
    left = list(words)
    for n in largest(values, k):
        left.remove(words[n])
    return log_p(words) - log_p(left)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda w, v, p, k: -fall(w, largest(v, k), p), "sign is turned"),
        (lambda w, v, p, k: p(w) - fall(w, largest(v, k), p), "How far did it fall"),
        (lambda w, v, p, k: fall(w, largest(v, len(v))[k:], p), "it is sufficiency"),
        (lambda w, v, p, k: fall(w, largest([-x for x in v], k), p), "smallest values"),
        (lambda w, v, p, k: fall(w, largest([abs(x) for x in v], k), p), "speaks against the answer"),
        (by_word, "delete the one with the large value"),
        (by_first_found, "the wrong one went"),
        (lambda w, v, p, k: p(w) - p([w[n] for n in largest(v, len(v))[k:]]), "keep their order"),
        (lambda w, v, p, k: p(w) - p(" ".join(w)), "takes a list of words"),
        (lambda w, v, p, k: fall(w, [1], p), "for two words"),
        (lambda w, v, p, k: fall(w, largest(v, 2), p), "With no word deleted"),
        (lambda w, v, p, k: fall(w, largest(v, min(k, 4)), p), "With all words deleted"),
        ("gout", "Expected a function"),
    ],
)
def test_each_wrong_comprehensiveness_has_its_hint(wrong: Any, hint: str) -> None:
    with pytest.raises(checks.NotYet, match=hint):
        checks.ex_07_3(wrong)


# ---- lesson 08: names, typed numbers, streams -----------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["bce", "b, c, e", "E C B", {"b", "c", "e"}, ["c", "e", "b"]])
def test_the_names_that_may_go_out_pass_in_any_form(answer: Any) -> None:
    assert checks.ex_08_1(answer).startswith("✓")


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        ("abce", "a: the licence says where"), ("bcde", "d: look at every character"), ("bcef", "f: what is a model derived from"),
        ("ce", "keeps every rule"), ("be", "SmolLM2"), ("bc", "tuned from a derived model"), ("xb", "names are a to f"),
        (3, "Expected letters"),
    ],
)  # fmt: skip
def test_each_wrong_choice_of_names_has_its_hint(answer: Any, hint: str) -> None:
    with pytest.raises(checks.NotYet, match=hint):
        checks.ex_08_1(answer)


def flat(metrics: dict[str, Any]) -> list[Any]:
    return [v for value in metrics.values() for v in (flat(value) if isinstance(value, dict) else [value])]


def written(text: str) -> list[str]:
    return re.findall(r"\d[\d,]*(?:\.\d+)?", text)


def decimals(number: str) -> int:
    return len(number.partition(".")[2])


def by_rounding(text: str, metrics: dict[str, Any]) -> list[str]:
    known = flat(metrics)
    return [n for n in written(text) if all(round(v, decimals(n)) != float(n.replace(",", "")) for v in known)]


def by_writing(text: str, metrics: dict[str, Any]) -> tuple[str, ...]:
    return tuple(n for n in written(text) if n not in {f"{v:,.{decimals(n)}f}" for v in flat(metrics)})


@pytest.mark.parametrize("right", [by_rounding, by_writing])
def test_every_right_way_to_find_typed_numbers_passes(right: Any) -> None:
    assert checks.ex_08_2(right).startswith("✓")


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda t, m: [], "0.99 is in no metric"),
        (lambda t, m: "0.99", "Return a list"),
        (lambda t, m: written(t), "digit for digit"),
        (lambda t, m: [n for n in written(t) if n not in [str(v) for v in flat(m)]], "rounded to two decimals"),
        (lambda t, m: by_rounding(t, {k: v for k, v in m.items() if not isinstance(v, dict)}), "Metrics lie inside metrics"),
        (lambda t, m: by_rounding(t, m | m["safety"]["overall"] | {"share": 0, "safety": {}}), "Two dicts deep"),
        (lambda t, m: by_rounding(t.replace(",", " "), m), "the comma only parts"),
        (
            lambda t, m: [n for n in written(t) if n not in {f"{v:,.{decimals(n)}f}" for v in flat(m) if v != 98}],
            "written with no decimals",
        ),
        (lambda t, m: [n for n in written(t) if min(abs(v - float(n.replace(",", ""))) for v in flat(m)) > 0.01], "nearness is no proof"),
        (lambda t, m: by_rounding(t, m)[::-1], "in the order of the text"),
        (lambda t, m: by_rounding(t, m) or ["0"] * ("no" in t), "nothing to prove"),
        (lambda t, m: t.nothing, "stopped with AttributeError"),
        ("0.99", "Expected a function"),
    ],
)
def test_each_wrong_way_to_find_typed_numbers_has_its_hint(wrong: Any, hint: str) -> None:
    with pytest.raises(checks.NotYet, match=hint):
        checks.ex_08_2(wrong)


def put_together(pieces: list[dict[str, Any]]) -> tuple[str, bool]:
    text, whole = "", False
    for piece in pieces:
        text += piece["content"] or ""
        whole = whole or piece["finish_reason"] == "stop"
    return text, whole


@pytest.mark.parametrize("right", [put_together, lambda pieces: list(put_together(pieces))])
def test_every_right_way_to_collect_a_stream_passes(right: Any) -> None:
    assert checks.ex_08_3(right).startswith("✓")


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda p: ("".join(x["content"] for x in p), True), "stopped with TypeError"),
        (lambda p: put_together(p)[0], "Return two things"),
        (lambda p: (p, True), "The first is the text"),
        (lambda p: (put_together(p)[0], "stop"), "The second is True or False"),
        (lambda p: (" ".join(x["content"] or "" for x in p), True), "Put nothing between them"),
        (lambda p: (put_together(p)[0], False), "the model itself ended this answer"),
        (lambda p: (put_together(p)[0], True), "broke off"),
        (lambda p: (put_together(p)[0], any(x["finish_reason"] for x in p)), "Who ended the answer there"),
        (lambda p: ("".join(x["content"] or "" for x in p if not x["finish_reason"]), put_together(p)[1]), "lose neither"),
        (lambda p: (put_together(p)[0], not p or put_together(p)[1]), "brought nothing"),
        ("stop", "Expected a function"),
    ],
)
def test_each_wrong_way_to_collect_a_stream_has_its_hint(wrong: Any, hint: str) -> None:
    with pytest.raises(checks.NotYet, match=hint):
        checks.ex_08_3(wrong)


# ---- lesson 09 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right", [40, 40.0, numpy.int64(40)])
def test_the_number_of_general_rows_passes(right: Any) -> None:
    assert checks.ex_09_1(right).startswith("✓")


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (30, "quarter of the own rows"), (160, "in all"), (360, "other way round"), (90, "three quarters"),
        (39, "24.5% .*more are needed"), (41, "25.5% .*fewer are needed"), (0, "Some general"), (-3, "Some general"),
        ("many", "Expected a number"),
    ],
)  # fmt: skip
def test_each_wrong_number_of_general_rows_has_its_hint(wrong: Any, hint: str) -> None:
    with pytest.raises(checks.NotYet, match=hint):
        checks.ex_09_1(wrong)


Rows = list[str]


def mixture(own: Rows, general: Rows, share: float, seed: int) -> Rows:
    rng = random.Random(seed)
    rows = own + rng.sample(general, round(len(own) * share / (1 - share)))
    rng.shuffle(rows)
    return rows


def mixture_by_numpy(own: Rows, general: Rows, share: float, seed: int) -> Rows:
    rng = numpy.random.default_rng(seed)
    count = int(len(own) * share / (1 - share))
    return [str(row) for row in rng.permutation([*own, *rng.choice(general, count, replace=False)])]


@pytest.mark.parametrize("right", [mixture, mixture_by_numpy])
def test_any_right_mixture_passes(right: Callable[..., Any]) -> None:
    assert checks.ex_09_2(right).startswith("✓")


def in_place(own: Rows, general: Rows, share: float, seed: int) -> Rows:
    own.extend(general[:30])
    return own


def shuffled(rows: Rows, seed: int) -> Rows:
    return random.Random(seed).sample(rows, len(rows))


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda o, g, s, seed: shuffled(o + random.Random(seed).sample(g, round(len(g) * s)), seed), "Half of the general rows"),
        (lambda o, g, s, seed: shuffled(o + random.Random(seed).sample(g, round(2 * len(o) * s)), seed), "not 12"),
        (lambda o, g, s, seed: mixture(o, g, s * len(o) / (len(o) + s * len(o)), seed), "not 15"),
        (lambda o, g, s, seed: mixture(o, g, s, seed) if s == 0.5 else shuffled(o + g[: round(len(o) * s)], seed), "fifth of the own rows"),
        (lambda o, g, s, seed: o + random.Random(seed).choices(g, k=30), "without replacement"),
        (lambda o, g, s, seed: shuffled(o + g[: round(len(o) * s / (1 - s))], seed), "Another seed"),
        (lambda o, g, s, seed: mixture(o, g, s, random.randrange(10**9)), "same seed"),
        (lambda o, g, s, seed: o + random.Random(seed).sample(g, round(len(o) * s / (1 - s))), "not shuffled"),
        (lambda o, g, s, seed: mixture(o[1:], g, s, seed), "All own rows"),
        (in_place, "was changed"),
        (lambda o, g, s, seed: len(o), "Return a list"),
        (0.5, "Expected a function"),
    ],
)
def test_each_wrong_mixture_has_its_hint(wrong: Any, hint: str) -> None:
    with pytest.raises(checks.NotYet, match=hint):
        checks.ex_09_2(wrong)


Spans = dict[str, tuple[tuple[float, float], tuple[float, float]]]


def test_the_right_rule_for_shipping_passes_whatever_it_returns_the_names_in() -> None:
    def rule(adapters: Spans, margin: float) -> Any:
        return (name for name, (gain, loss) in adapters.items() if gain[0] > 0 and -loss[0] <= margin)

    for kind in (list, tuple, set):
        assert checks.ex_09_3(lambda adapters, margin, kind=kind: kind(rule(adapters, margin))).startswith("✓")


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda a, m: [n for n, (i, o) in a.items() if i[0] > 0], "surely loses 0.20"),
        (lambda a, m: [n for n, (i, o) in a.items() if sum(i) > 0 and o[0] >= -m], "a gain is not sure"),
        (lambda a, m: [n for n, (i, o) in a.items() if i[0] > 0 and o[1] >= -m], "down to -0.15"),
        (lambda a, m: [n for n, (i, o) in a.items() if i[0] > 0 and sum(o) / 2 >= -m], "down to -0.15"),
        (lambda a, m: [n for n, (i, o) in a.items() if i[0] > 0 and o[0] > 0], "although the margin is 0.05"),
        (lambda a, m: [n for n, (i, o) in a.items() if i[0] > 0 and -m <= o[0] <= 0], "gains on both sides"),
        (lambda a, m: [n for n, (i, o) in a.items() if i[0] > 0 and o[0] >= -0.05], "does your rule use the margin"),
        (lambda a, m: [n for n, (i, o) in a.items() if i[0] > 0 and o[0] >= -min(m, 0.1)], "only the gain decides"),
        (lambda a, m: True, "Return the names"),
        ([], "Expected a function"),
    ],
)
def test_each_wrong_rule_for_shipping_has_its_hint(wrong: Any, hint: str) -> None:
    with pytest.raises(checks.NotYet, match=hint):
        checks.ex_09_3(wrong)
