"""Score answers against references, beside what needs no training, each with an interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy

from medquad_utils.assets.sample import facts_of
from medquad_utils.data import Row, normalise


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> numpy.ndarray:
    """ROUGE-L F1 of each answer, 0 to 1 (Lin, 2004; Google's ``rouge_score`` with stemming)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return numpy.array([scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)])


def facts_complete(answers: Sequence[str], rows: Sequence[Row]) -> numpy.ndarray:
    """True where an answer holds every fact of its row, word for word (case and punctuation aside).

    Only the embedded sample lists the facts of an answer; for other sources the array is empty.
    """
    complete = []
    for answer, row in zip(answers, rows, strict=True):
        facts = facts_of(row["focus"] or "", row["qtype"]) if row["source"] == "course sample" else []
        if facts:
            said = f" {normalise(answer)} "
            complete.append(all(f" {normalise(fact)} " in said for fact in facts))
    return numpy.array(complete, dtype=bool)


def nearest_training_answers(train: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """What a look-up would say: for each row the answer of the most alike training question of the same qtype.

    Alike means: most shared words, each weighted by how rare it is among the training questions.
    """
    words = [set(normalise(row["question"]).split()) for row in train]
    count = Counter(word for ws in words for word in ws)
    rare = {word: numpy.log(len(train) / n) for word, n in count.items()}
    by_type: dict[Any, list[int]] = {}
    for number, row in enumerate(train):
        by_type.setdefault(row["qtype"], []).append(number)
    answers = []
    for row in rows:
        asked = set(normalise(row["question"]).split())
        candidates = by_type.get(row["qtype"]) or range(len(train))
        best = max(candidates, key=lambda i: (sum(rare[w] for w in asked & words[i]) / (1 + sum(rare[w] for w in words[i])), -i))
        answers.append(train[best]["answer"])
    return answers


def mean_interval(values: numpy.ndarray, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean (Efron, 1979; percentile method)."""
    rng = numpy.random.default_rng(seed)
    means = rng.choice(values.astype(float), (resamples, len(values))).mean(axis=1)
    low, high = numpy.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def outcome(rows: Sequence[Row], train: Sequence[Row], base: Sequence[Any], tuned: Sequence[Any]) -> dict[str, Any]:
    """What the training changed on held-out ``rows``: one flat record for ``metrics/outcome.json``.

    ``base`` and ``tuned`` are ``generation.Answer`` objects, in the order of ``rows``. The gain is paired: answer by
    answer, tuned minus base. Fact completeness is ``None`` where the source lists no facts.
    """
    references = [row["answer"] for row in rows]
    before, after = (rouge_l([a.text for a in answers], references) for answers in (base, tuned))
    nearest = nearest_training_answers(train, rows)

    def complete(answers: Sequence[str]) -> float | None:
        values = facts_complete(answers, rows)
        return round(float(values.mean()), 4) if len(values) else None

    return {
        "rows": len(rows),
        "rouge_l_base": round(float(before.mean()), 4),
        "rouge_l_tuned": round(float(after.mean()), 4),
        "rouge_l_nearest": round(float(rouge_l(nearest, references).mean()), 4),
        "rouge_l_gain_ci95": [round(x, 4) for x in mean_interval(after - before)],
        "stop_rate_base": round(float(numpy.mean([a.stopped for a in base])), 4),
        "stop_rate_tuned": round(float(numpy.mean([a.stopped for a in tuned])), 4),
        "facts_complete_base": complete([a.text for a in base]),
        "facts_complete_tuned": complete([a.text for a in tuned]),
        "facts_complete_nearest": complete(nearest),
    }
