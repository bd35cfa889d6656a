"""What learners may hand in: for each checker, answers that are right in every form, and wrong ones with the hint that is theirs.

Part of the hint is enough; test_checks.py hands them all in, and test_form.py asks that every exercise has enough of them.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy
import torch
from scipy.stats import bootstrap

from medquad_utils import data

RIGHT: dict[str, list[Any]] = {}
WRONG: dict[str, list[tuple[Any, str]]] = {}
ABOUT_FORM = ("Expected", "stopped with", "Replace the dots")  # how such hints begin here: any exercise may give them


def with_own_hints(name: str) -> list[tuple[Any, str]]:
    """The wrong answers whose hints are about the exercise, not about the form of an answer."""
    return [(answer, hint) for answer, hint in WRONG.get(name, ()) if not hint.startswith(ABOUT_FORM)]


Score = Callable[[str, str], float]
Row = dict[str, Any]


# ---- lesson 01 ------------------------------------------------------------------------------------------------------

RIGHT["ex_01_1"] = [1200 / 1670, 0.72, 0.719, " 0.72 ", Fraction(120, 167), numpy.float32(0.72), torch.tensor(0.7186), [0.72]]

WRONG["ex_01_1"] = [
    (2 / 6, "share of rows"), (470 / 1670, "share that stays"), (688 / 1670, "what cutting loses"), (900 / 1670, "More than one row"),
    (72, "lies between 0 and 1, not 72"), (1670, "lies between 0 and 1"), (0.71, "two digits"), (0.9, "divide by the tokens of all six"),
    ("most", "Expected a number, and yours is 'most'"), (numpy.array([0.7, 0.3]), "Expected a number, and yours is of type ndarray"),
    (math.nan, "Expected a number, and yours is nan"), (True, "Expected a number, and yours is True"),
]  # fmt: skip


def leaking(train: list[Row], test: list[Row]) -> list[bool]:
    known = {data.focus_of(row) for row in train}
    return [data.focus_of(row) in known for row in test]


def foci(rows: list[Row]) -> list[str]:
    return [data.focus_of(row) for row in rows]


RIGHT["ex_01_2"] = [
    lambda train, test: sum(leaking(train, test)) / len(test),
    lambda train, test: numpy.mean(leaking(train, test)),
    lambda train, test: torch.tensor(leaking(train, test), dtype=torch.float64).mean(),
]

WRONG["ex_01_2"] = [
    (lambda a, b: sum(leaking(b, a)) / len(a), "share of the training rows"),
    (lambda a, b: len({*foci(a)} & {*foci(b)}) / len({*foci(b)}), "share of diseases"),
    (lambda a, b: len({*foci(a)} & {*foci(b)}) / len({*foci(a)}), "share of diseases"),
    (lambda a, b: len({*foci(a)} & {*foci(b)}) / len({*foci(a), *foci(b)}), "share of diseases"),
    (lambda a, b: len({*foci(a)} & {*foci(b)}) / len(b), "Each shared disease was counted once"),
    (lambda a, b: 1 - sum(leaking(a, b)) / len(b), "does not leak"),
    (lambda a, b: sum(leaking(a, b)), "number of rows"),
    (lambda a, b: 100 * sum(leaking(a, b)) / len(b), "in percent"),
    (lambda a, b: sum(row["focus"] in {r["focus"] for r in a} for row in b) / len(b), "are one disease"),
    (lambda a, b: max(sum(leaking(a, b)) / len(b), 0.1), "the leak is 0"),
    (lambda a, b: len(b), "Two of five"),
    (lambda a, b: a["focus"], "stopped with TypeError"),
    (lambda a, b: leaking(a, b), "Expected a number"),
    (0.75, "Expected a function by its name, and yours is 0.75"),
]

RIGHT["ex_01_3"] = [
    lambda text: re.sub(r"\s*\[\d+\]", "", text),
    lambda text: re.sub(r" ?\[[0-9]{1,4}\]", "", text),
    lambda text: numpy.str_(re.sub(r"\s*\[\d+\]", "", text)),
]

WRONG["ex_01_3"] = [
    (lambda text: " ".join(re.sub(r"\s*\[\d+\]", "", text).split()), "without any mark was changed"),
    (lambda text: re.sub(r"\s*\d+", "", text), "without any mark was changed"),
    (lambda text: re.sub(r"\s*\[.*?\]", "", text), "brackets that hold words"),
    (lambda text: re.sub(r"\s*\[\d\]", "", text), "four digits"),
    (lambda text: re.sub(r"(?<=\[)\d+(?=\])", "", text), "its brackets are not"),
    (lambda text: "" if re.search(r"\[\d+\]", text) else text, "whole answer was dropped"),
    (lambda text: re.sub(r"\[\d+\] ?", "", text), "Something else was cut"),
    (lambda text: re.sub(r"\s*\[\d+\]", "", text, count=1), "side by side"),
    (lambda text: re.sub(r"\[\d+\]", "", text), "space before a mark"),
    (lambda text: re.findall(r"\[\d+\]", text), "returns the text that is kept"),
    (lambda text: text.nothing, "stopped with AttributeError"),
    (r"\[\d+\]", "Expected a function"),
]


# ---- lesson 02 ------------------------------------------------------------------------------------------------------

RIGHT["ex_02_1"] = [4 + 8 / 128 + 32 / (128 * 256), 4.0635, "4.0635", numpy.float64(4.06348), torch.tensor([4.0635])]

WRONG["ex_02_1"] = [
    (4.127, "blocks of 64"), (4.25, "Double quantisation stores it in 8 bits"), (4.0625, "super-block of 256"), (4, "code alone"),
    (0.0635, "Add the code itself"), (4.5, "scales of 32 bits"), (4.06, "four digits"), (4.063, "four digits"), (8, "add it to the 4 bits"),
    ("about 4", "Expected a number"),
]  # fmt: skip


def undone(codes: Any, scales: Any, levels: Any) -> Any:
    return levels[codes] * scales[:, None]


RIGHT["ex_02_2"] = [
    undone,
    lambda *given: undone(*given).numpy(),
    lambda *given: undone(*given).tolist(),
    lambda *given: list(undone(*given)),
    lambda *given: undone(*given).flatten().half().float(),
    lambda *given: undone(*given).requires_grad_(),
]

WRONG["ex_02_2"] = [
    (lambda codes, scales, levels: levels[codes], "scale of each block is missing"),
    (lambda codes, scales, levels: codes * scales[:, None], "Look the level up first"),
    (lambda codes, scales, levels: levels[codes] / scales[:, None], "What undoes a division"),
    (lambda codes, scales, levels: levels[codes] * scales.max(), "a scale of its own"),
    (lambda codes, scales, levels: levels[codes] * scales.flip(0)[:, None], "Which scale belongs to which row"),
    (lambda codes, scales, levels: levels[codes[0]] * scales[0], "Expected 128 weights back, got 64"),
    (lambda codes, scales, levels: levels[codes] * scales, "stopped with RuntimeError"),
    (lambda codes, scales, levels: {"weights": codes}, "Expected a tensor back, got dict"),
    (4.0, "Expected a function"),
]

RIGHT["ex_02_3"] = [12e9 * 8 / (4 + 8 / 64 + 32 / (64 * 256)) / 1e9, 23.3, 23.26, 23.2, "23.3", numpy.float32(23.26)]

WRONG["ex_02_3"] = [
    (23.26e9, "Right unit"), (24, "4 bits a weight"), (21.33, "4.5 bits a weight"), (6, "in 16 bits"), (12, "one byte for each weight"),
    (24.98, "not 2.*30"), (2.908, "Bytes or bits"), (23, "one digit after the point"), (50, "12e9 bytes"), (..., "Replace the dots"),
]  # fmt: skip


# ---- lesson 03 ------------------------------------------------------------------------------------------------------

RIGHT["ex_03_1"] = [
    lambda i, o, r: r * i + o * r,
    lambda i, o, r: numpy.int64(r) * (i + o),
    lambda i, o, r: torch.tensor(r * (i + o)),
    lambda i, o, r: torch.empty(r, i).numel() + torch.empty(o, r).numel(),
]

WRONG["ex_03_1"] = [
    (lambda i, o, r: i * o, "counts the frozen weight W"),
    (lambda i, o, r: r * i * o, "multiplies all three"),
    (lambda i, o, r: i + o, "one rank only"),
    (lambda i, o, r: r * i * o * r, "added or multiplied"),
    (lambda i, o, r: i * o + r * (i + o), "includes the frozen weight W"),
    (lambda i, o, r: r * i, "That is one matrix"),
    (lambda i, o, r: r * o, "That is one matrix"),
    (lambda i, o, r: 2 * r * i, "only in a square layer"),
    (lambda i, o, r: r, "count the numbers in each"),
    (lambda i, o, r: (r * i, o * r), "Expected a number"),
    (lambda i, o: i + o, "stopped with TypeError"),
    (160, "Expected a function"),
]


def adapted(x: Any, w: Any, a: Any, b: Any, alpha: float) -> Any:
    return w @ x + alpha / a.shape[0] * (b @ (a @ x))


RIGHT["ex_03_2"] = [
    adapted,
    lambda x, w, a, b, alpha: (w + alpha / len(a) * b @ a) @ x[:, None],
    lambda x, w, a, b, alpha: adapted(*(numpy.asarray(part) for part in (x, w, a, b)), alpha),
    lambda *given: adapted(*given).tolist(),
    lambda *given: adapted(*given).requires_grad_(),
]

WRONG["ex_03_2"] = [
    (lambda x, w, a, b, alpha: w @ x, "base alone"),
    (lambda x, w, a, b, alpha: alpha / len(a) * b @ a @ x, "adapter's share alone"),
    (lambda x, w, a, b, alpha: w @ x + b @ a @ x, "scale is missing"),
    (lambda x, w, a, b, alpha: w @ x + alpha * b @ a @ x, "The rank belongs into the scale"),
    (lambda x, w, a, b, alpha: w @ x + alpha / a.shape[1] * b @ a @ x, "divided by the wrong size"),
    (lambda x, w, a, b, alpha: w @ x + len(a) / alpha * b @ a @ x, "upside down"),
    (lambda x, w, a, b, alpha: alpha / len(a) * (w + b @ a) @ x, "scale is for the update only"),
    (lambda x, w, a, b, alpha: w @ x - alpha / len(a) * b @ a @ x, "the values are not"),
    (lambda x, w, a, b, alpha: a @ x, "each of the 7 outputs"),
    (lambda x, w, a, b, alpha: w @ x + a @ b @ x, "stopped with RuntimeError"),
    (lambda x, w, a, b, alpha: "y", "Expected a tensor back, got str"),
    ("Wx + BAx", "Expected a function"),
]

RIGHT["ex_03_3"] = [98, 98.0, "98", numpy.int64(98), torch.tensor(98)]

WRONG["ex_03_3"] = [
    (16, "two layers cost less than seven"), (41_943_040, "number of parameters"), (425_984, "number of parameters"),
    (98.46, "whole number"), (99, "just over the budget"), (80, "takes v_proj as square"), (3150, "one block for the two layers"),
    (64, "higher rank still fits"), (200, "over the budget"), (math.inf, "Expected a number"), (0, "higher rank still fits"),
]  # fmt: skip


# ---- lesson 04 ------------------------------------------------------------------------------------------------------


def masked(ids: list[int], prompt_length: int) -> list[int]:
    return [-100] * prompt_length + ids[prompt_length:]


RIGHT["ex_04_1"] = [
    masked,
    lambda *given: tuple(masked(*given)),
    lambda *given: numpy.array(masked(*given)),
    lambda *given: torch.tensor(masked(*given)),
    lambda *given: list(torch.tensor(masked(*given))),
    lambda ids, n: (i if place >= n else -100 for place, i in enumerate(ids)),
]

WRONG["ex_04_1"] = [
    (lambda ids, n: ids[n:], "Masked is not removed"),
    (lambda ids, n: ids, "Every token is learned still"),
    (lambda ids, n: [-100] * len(ids), "Every label is masked"),
    (lambda ids, n: ids[:n] + [-100] * (len(ids) - n), "wrong way round"),
    (lambda ids, n: [0] * n + ids[n:], "not the one value that the loss skips"),
    (lambda ids, n: [*masked(ids, n)[:-1], -100], "would not learn to stop"),
    (lambda ids, n: [-100] * n + [*ids[n + 1 :], ids[n]], "each in its own place"),
    (lambda ids, n: len(ids), "Expected a list of labels, got int"),
    (lambda ids, n: [masked(ids, n)], "each of them one number"),
    (lambda ids, n: ids.nothing, "stopped with AttributeError"),
    ([-100, 5], "Expected a function"),
]


def steps(rows: int, batch: int, accumulation: int, epochs: int) -> int:
    return math.ceil(math.ceil(rows / batch) / accumulation) * epochs


RIGHT["ex_04_2"] = [
    steps,
    lambda *given: float(steps(*given)),
    lambda rows, batch, accumulation, epochs: numpy.ceil(numpy.ceil(rows / batch) / accumulation) * epochs,
    lambda rows, batch, accumulation, epochs: -(-rows // (batch * accumulation)) * epochs,
]

WRONG["ex_04_2"] = [
    (lambda rows, batch, accumulation, epochs: math.ceil(rows / batch) * epochs, "number of batches"),
    (lambda rows, batch, accumulation, epochs: steps(rows, batch, accumulation, 1), "right for one epoch"),
    (lambda rows, batch, accumulation, epochs: rows / batch / accumulation * epochs, "no half step"),
    (lambda rows, batch, accumulation, epochs: rows // (batch * accumulation) * epochs, "is too few"),
    (lambda rows, batch, accumulation, epochs: steps(rows, batch, 1, epochs) * accumulation, "is too many"),
    (lambda rows, batch, accumulation, epochs: math.ceil(rows * epochs / (batch * accumulation)), "is too few"),
    (lambda rows, batch, accumulation, epochs: rows / 0, "stopped with ZeroDivisionError"),
    (lambda rows, batch, accumulation, epochs: "four", "Expected a number"),
    (4, "Expected a function"),
]

RIGHT["ex_04_3"] = [1.9, "1.9", (10 * 1.0 + 90 * 2.0) / 100, numpy.average([1.0, 2.0], weights=[10, 90]), torch.tensor(1.9)]

WRONG["ex_04_3"] = [
    (1.5, "mean of the two means"), (3.0, "sum of the two means"), (190, "all tokens together"), (1.1, "wrong way round"),
    (95, "lies between the smallest and the largest"), (1.8, "Weigh each mean"), ("two", "Expected a number"),
]  # fmt: skip


# ---- lesson 05 ------------------------------------------------------------------------------------------------------


def trimmed(ids: list[int], ends: list[int]) -> list[int]:
    return list(itertools.takewhile(lambda i: i not in ends, ids))


RIGHT["ex_05_1"] = [
    trimmed,
    lambda *given: tuple(trimmed(*given)),
    lambda *given: numpy.array(trimmed(*given)),
    lambda *given: torch.tensor(trimmed(*given)),
    lambda ids, ends: itertools.takewhile(lambda i: i not in ends, ids),
]

WRONG["ex_05_1"] = [
    (lambda ids, ends: ids[:-1], "cut off by the limit"),
    (lambda ids, ends: ids, "no part of the answer"),
    (lambda ids, ends: ids[: ids.index(ends[0])] if ends[0] in ids else ids, "not only the first of the list"),
    (lambda ids, ends: [i for i in ids if i not in ends], "Dropping the end ids is not enough"),
    (lambda ids, ends: trimmed(ids, ends)[::-1] if ends[1] in ids else ids, "in their order"),
    (lambda ids, ends: next((ids[: ids.index(e)] for e in ends if e in ids), ids), "comes first in the row"),
    (lambda ids, ends: trimmed(ids, ends) or ids, "the answer is empty"),
    (lambda ids, ends: len(trimmed(ids, ends)), "not a count or a place"),
    (lambda ids, ends: [trimmed(ids, ends)], "each of them one number"),
    (lambda ids, ends: ids[: ids.index(4)], "stopped with ValueError"),
    ([7, 8], "Expected a function"),
]

RIGHT["ex_05_2"] = [2 / math.log(10), 0.87, "0.87", 0.8686, numpy.float32(0.87), torch.tensor(2 / math.log(10))]

WRONG["ex_05_2"] = [
    (0, "above zero"), (-1, "above zero"), (1, "about 7.4"), (math.log(10) / 2, "Temperature divides"), (0.2, "what undoes exp"),
    (2.0, "not powers of 10"), (0.5, "higher temperature"), (5, "lower temperature"), (0.001, "higher temperature"),
    ("low", "Expected a number"),
]  # fmt: skip


def kept(probabilities: dict[str, float], min_p: float) -> list[str]:
    bar = min_p * max(probabilities.values())
    return [token for token, p in probabilities.items() if p >= bar]


RIGHT["ex_05_3"] = [
    kept,
    lambda *given: set(kept(*given)),
    lambda *given: numpy.array(kept(*given)),
    lambda p, m: {token: p[token] for token in kept(p, m)},
    lambda p, m: (token for token in p if token in kept(p, m)),
]

WRONG["ex_05_3"] = [
    (lambda p, m: [t for t in p if p[t] >= m], "no fixed bar"),
    (lambda p, m: [t for t in p if t not in kept(p, m)], "The other way round"),
    (lambda p, m: list(p), "compare every token with that"),
    (lambda p, m: [t for t in p if p[t] >= m * next(iter(p.values()))], "wherever that stands"),
    (lambda p, m: [t for t in p if p[t] > m * max(p.values())], "exactly on the bar"),
    (lambda p, m: len(kept(p, m)), "not how many"),
    (lambda p, m: [p[t] for t in kept(p, m)], "not their probabilities"),
    (lambda p, m: [(t, p[t]) for t in kept(p, m)], "not their probabilities"),
    (lambda p, m: p.nothing, "stopped with AttributeError"),
    (0.5, "Expected a function"),
]


# ---- lesson 06: claims ----------------------------------------------------------------------------------------------


RIGHT["ex_06_1"] = ["ae", "a, e", "E A", {"a", "e"}, ["e", "a"], ("A", "E"), numpy.array(["a", "e"])]


WRONG["ex_06_1"] = [
    ("abe", "b:"), ("ace", "c:"), ("ade", "d:"), ("e", "one side of 0"), ("a", "cannot be excluded"),
    ("axe", "Choose from a to e"), ("", "Choose from a to e"), (2, "Expected letters"),
]  # fmt: skip


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


RIGHT["ex_06_2"] = [by_hand, by_scipy, *(lambda a, b, s=s: drawn(numpy.subtract(b, a), seed=s) for s in range(8))]


WRONG["ex_06_2"] = [
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
]


# ---- lesson 06: the swapped disease ---------------------------------------------------------------------------------


def others_of(text: str, references: Sequence[str], own: int, score: Score) -> list[float]:
    return [score(text, reference) for n, reference in enumerate(references) if n != own]


def by_loop(text: str, references: list[str], own: int, score: Score) -> bool:
    return all(score(text, references[own]) > value for value in others_of(text, references, own, score))


def by_numpy(text: str, references: list[str], own: int, score: Score) -> Any:
    values = numpy.array([score(text, reference) for reference in references])
    return values[own] > numpy.delete(values, own).max()


RIGHT["ex_06_3"] = [by_loop, by_numpy, lambda *given: int(by_loop(*given)), lambda *given: torch.tensor(by_loop(*given))]


WRONG["ex_06_3"] = [
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
]


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


RIGHT["ex_07_1"] = [by_sets, one_by_one, lambda *given: torch.tensor(by_sets(*given), dtype=torch.float64)]


def total(words: Any, weight: Weight) -> float:
    return sum(map(weight, words))


WRONG["ex_07_1"] = [
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
]


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


RIGHT["ex_07_2"] = [by_orders, by_sizes, lambda *given: {w: numpy.float64(v) for w, v in by_orders(*given).items()}]


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


WRONG["ex_07_2"] = [
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
]


# ---- lesson 07: comprehensiveness -----------------------------------------------------------------------------------

LogP = Callable[[list[str]], float]


def largest(values: Sequence[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda n: -values[n])[:k]


def fall(words: Sequence[str], gone: Any, log_p: LogP) -> float:
    return log_p(list(words)) - log_p([word for n, word in enumerate(words) if n not in gone])


def by_numpy_places(words: list[str], values: list[float], log_p: LogP, k: int) -> Any:
    kept = numpy.sort(numpy.argsort(values)[: len(words) - k])
    return numpy.float64(log_p(words) - log_p([words[n] for n in kept]))


RIGHT["ex_07_3"] = [by_numpy_places, lambda w, v, p, k: fall(w, largest(v, k), p)]


def by_word(words: list[str], values: list[float], log_p: LogP, k: int) -> float:
    gone = {words[n] for n in largest(values, k)}
    return log_p(words) - log_p([word for word in words if word not in gone])


def by_first_found(words: list[str], values: list[float], log_p: LogP, k: int) -> float:
    left = list(words)
    for n in largest(values, k):
        left.remove(words[n])
    return log_p(words) - log_p(left)


WRONG["ex_07_3"] = [
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
]


# ---- lesson 08: names, typed numbers, streams -----------------------------------------------------------------------


RIGHT["ex_08_1"] = ["bce", "b, c, e", "E C B", {"b", "c", "e"}, ["c", "e", "b"], numpy.array(["b", "c", "e"])]


WRONG["ex_08_1"] = [
    ("abce", "a: the licence says where"), ("bcde", "d: look at every character"), ("bcef", "f: what is a model derived from"),
    ("ce", "keeps every rule"), ("be", "SmolLM2"), ("bc", "tuned from a derived model"), ("xb", "Choose from a to f"),
    (3, "Expected letters"),
]  # fmt: skip


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


RIGHT["ex_08_2"] = [by_rounding, by_writing, lambda *given: numpy.array(by_rounding(*given))]


WRONG["ex_08_2"] = [
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
]


def put_together(pieces: list[dict[str, Any]]) -> tuple[str, bool]:
    text, whole = "", False
    for piece in pieces:
        text += piece["content"] or ""
        whole = whole or piece["finish_reason"] == "stop"
    return text, whole


RIGHT["ex_08_3"] = [put_together, lambda pieces: list(put_together(pieces)), lambda pieces: numpy.array(put_together(pieces), dtype=object)]


WRONG["ex_08_3"] = [
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
]


# ---- lesson 09 ------------------------------------------------------------------------------------------------------


RIGHT["ex_09_1"] = [40, 40.0, " 40 ", numpy.int64(40), torch.tensor(40)]


WRONG["ex_09_1"] = [
    (30, "quarter of the own rows"), (160, "in all"), (360, "other way round"), (90, "three quarters"),
    (39, "24.5% .*more are needed"), (41, "25.5% .*fewer are needed"), (0, "Some general"), (-3, "Some general"),
    ("many", "Expected a number"),
]  # fmt: skip


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


RIGHT["ex_09_2"] = [mixture, mixture_by_numpy, lambda *given: tuple(mixture(*given)), lambda *given: numpy.array(mixture(*given))]


def in_place(own: Rows, general: Rows, share: float, seed: int) -> Rows:
    own.extend(general[:30])
    return own


def shuffled(rows: Rows, seed: int) -> Rows:
    return random.Random(seed).sample(rows, len(rows))


WRONG["ex_09_2"] = [
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
]


Spans = dict[str, tuple[tuple[float, float], tuple[float, float]]]


def shippable(adapters: Spans, margin: float) -> list[str]:
    return [name for name, (gain, loss) in adapters.items() if gain[0] > 0 and -loss[0] <= margin]


RIGHT["ex_09_3"] = [
    shippable,
    lambda *given: set(shippable(*given)),
    lambda *given: numpy.array(shippable(*given)),
    lambda *given: iter(shippable(*given)),
]

WRONG["ex_09_3"] = [
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
]
