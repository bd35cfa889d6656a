"""Score a tuned model's answers beside what needs no training, with an interval on every number.

A file of questions goes in and five arms answer it under the same limit of tokens (``ARMS``). Out come ``answers.parquet``, one
row a question and arm, and ``metrics.json``, from which the report is made. A run that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from medquad_utils import CourseError, safety, scores
from medquad_utils.arms import (
    ARMS,
    NOBODY,
    Journal,
    Messages,
    adapted,
    archive_index,
    cut_answer,
    finished,
    generate_all,
    nearest_training_answers,
    other_disease_answers,
    prompts,
    recipe_of,
    write_answers,
)
from medquad_utils.cleaning import is_boilerplate
from medquad_utils.data import prepare
from medquad_utils.files import Row, read_rows, write_json
from medquad_utils.generation import Answer, load_tokenizer, load_tuned
from medquad_utils.profiles import Plan, resolve
from medquad_utils.questions import Question, Questions
from medquad_utils.scores import SCORES, facts_complete, mean_interval, rouge_l
from medquad_utils.splits import leakage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WITHOUT_TRAINING = ("base", "nearest", "another disease")  # what the tuned model has to beat
VERDICT = (
    "facts_complete",
    "rougeL",
    "chrf",
    "tfidf_cosine",
    "bits_per_byte",
)  # the scores that the verdict is about
FEW = 5  # a group of fewer questions gets no interval
MOST_GROUPS = 24  # the questions of further groups are counted together

MEASURED = Path(__file__).parent / "assets" / "measured.json"
UNSCORED = (
    "without bits per byte: question and reference together are longer than the model's context"
)
Columns = dict[str, numpy.ndarray]  # score -> one value a question; NaN where there is none
Cell = dict[str, Any]

# ---- scores ---------------------------------------------------------------------------------------------------------


def score_columns(
    answers: Sequence[Answer], asked: Sequence[Question], corpus: Sequence[str]
) -> Columns:
    """Every score that needs no model, one value a question; how rare a word is, ``corpus`` says."""
    texts, references = [a.text for a in answers], [q.references for q in asked]
    complete = [facts_complete([text], [q.row]) for text, q in zip(texts, asked, strict=True)]
    return scores.rouge(texts, references) | {
        "bleu": scores.bleu(texts, references),
        "chrf": scores.chrf(texts, references),
        "tfidf_cosine": scores.tfidf_cosine(texts, references, corpus),
        "facts_complete": numpy.array(
            [c[0] if len(c) else numpy.nan for c in complete], dtype=float
        ),
        "length_ratio": scores.length_ratio(texts, references),
        "repetition": scores.repetition(texts),
        "stop_rate": numpy.array([a.stopped for a in answers], dtype=float),
    }


def _cell(found: tuple[float, float, float], n: int) -> Cell:
    mean, low, high = found
    return {
        "mean": mean,
        "low": low if n >= FEW else None,
        "high": high if n >= FEW else None,
        "n": n,
    }


def _measure(score: str, columns: Columns, before: Columns | None = None) -> Cell | None:
    """Mean and interval of a score, or of its difference to ``before`` on the same questions; ``None`` without a value."""
    if score in ("bits_per_byte", "perplexity"):
        ratio, length = (
            (scores.bits_per_byte, "bytes")
            if score == "bits_per_byte"
            else (scores.perplexity, "tokens")
        )
        if "nats" not in columns or (before and "nats" not in before):
            return None
        values = columns["nats"] - (before["nats"] if before else 0)
        return (
            _cell(ratio(values, columns[length]), int(n))
            if (n := numpy.isfinite(values).sum())
            else None
        )
    if score not in columns:
        return None
    values = columns[score] - (before[score] if before else 0)
    if not (n := numpy.isfinite(values).sum()):
        return None
    return _cell(
        scores.paired_interval(before[score], columns[score])
        if before
        else scores.interval(values),
        int(n),
    )


def summary(
    arms: Mapping[str, Columns], versus: Sequence[str] = ("base", "nearest")
) -> dict[str, Any]:
    """All scores of all arms, and their paired differences to the arms in ``versus``: arm -> score -> mean, low, high, n."""

    def table(before: str | None) -> dict[str, dict[str, Cell]]:
        names = [
            s for s in SCORES if s != "perplexity" or not before
        ]  # two perplexities have a ratio; bits per byte say the same
        return {
            arm: {s: cell for s in names if (cell := _measure(s, columns, arms[before] if before else None))}
            for arm, columns in arms.items() if arm != before
        }  # fmt: skip

    return {"arms": table(None), **{f"versus {other}": table(other) for other in versus}}


def by_group(
    arms: Mapping[str, Columns], groups: Sequence[str | None]
) -> dict[str, dict[str, Any]]:
    """``summary`` of each group of questions, the largest first: group -> n, arms, versus base, versus nearest."""
    names = [" ".join((group or "").split())[:60] or "not given" for group in groups]
    largest = {name for name, _ in Counter(names).most_common(MOST_GROUPS)}
    places: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        places[name if name in largest else "all others"].append(place)
    return {
        group: {"n": len(chosen)}
        | summary(
            {arm: {s: v[chosen] for s, v in columns.items()} for arm, columns in arms.items()}
        )
        for group, chosen in sorted(places.items(), key=lambda item: (-len(item[1]), item[0]))
    }


def verdict(overall: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each score of ``VERDICT``: the arms without training that the tuned model beats, equals (so far as can be told), loses to.

    It beats an arm where the whole interval of the paired difference lies on the better side of 0.
    """
    found = []
    for score in VERDICT:
        sides: dict[str, Any] = {"score": score, "beats": [], "even": [], "loses": []}
        for arm in WITHOUT_TRAINING:
            cell = overall[f"versus {arm}"]["tuned"].get(score)
            if cell and cell["low"] is not None:
                low, high = (
                    (cell["low"], cell["high"])
                    if SCORES[score].better == "up"
                    else (-cell["high"], -cell["low"])
                )
                sides["beats" if low > 0 else "loses" if high < 0 else "even"].append(arm)
        if sides["beats"] or sides["even"] or sides["loses"]:
            found.append(sides)
    return found


def forgetting(
    plan: Plan, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Perplexity of texts far from the questions, before and after tuning, and the ratio of the two (above 1: forgotten)."""
    texts = scores.plain_texts(plan)
    losses = {}
    for arm in ("base", "tuned"):
        with adapted(model, arm):
            losses[arm] = scores.text_loss(model, tokenizer, texts, progress=f"forgetting, {arm}")
    cells = {
        arm: _cell(scores.perplexity(loss.nats, loss.tokens), len(texts))
        for arm, loss in losses.items()
    }
    ratio = scores.perplexity(losses["tuned"].nats - losses["base"].nats, losses["base"].tokens)
    return {"texts": len(texts), **cells, "ratio": _cell(ratio, len(texts))}


def examples(
    asked: Sequence[Question],
    answers: Mapping[str, Sequence[Answer]],
    rouge_l: numpy.ndarray,
    most: int = 300,
) -> list[Cell]:
    """The questions that the tuned model answers best, middling and worst (by ROUGE-L), with all arms' answers, shortened."""
    order = numpy.argsort(-rouge_l, kind="stable").tolist()
    chosen = {"best": order[0], "middling": order[len(order) // 2], "worst": order[-1]}

    def short(text: str) -> str:
        return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " ..."

    return [
        {"what": what, "row": asked[n].number, "question": short(asked[n].question), "reference": short(asked[n].references[0]),
         "answers": {arm: short(texts[n].text) for arm, texts in answers.items()}}
        for what, n in chosen.items()
    ]  # fmt: skip


def look_up_scores(train: Sequence[Row], test: Sequence[Row], seed: int = 0) -> dict[str, Cell]:
    """ROUGE-L of the two look-up arms, answers uncut: arm -> mean, low, high and n."""
    references = [row["answer"] for row in test]
    answers = {
        "nearest": nearest_training_answers(train, test),
        "another disease": other_disease_answers(train, test, seed),
    }
    return {
        arm: _cell(scores.interval(rouge_l(texts, references)), len(test))
        for arm, texts in answers.items()
    }


def measured() -> dict[str, Any]:
    """``look_up_scores`` of the real MedQuAD as ``tests/benchmarks/look_up.py`` measured them: ``rougeL`` -> rows -> arm -> cell."""
    found: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return found


# ---- the whole evaluation -------------------------------------------------------------------------------------------


def plan_of(profile: str = "", adapter: str = "") -> tuple[Plan, Path]:
    """The plan of an adapter's folder, and that folder; without ``profile`` the one that the adapter was trained with, or ``auto``.

    Raises:
        CourseError: an unknown profile.
    """
    made: dict[str, Any] = {}
    if adapter and (record := Path(adapter) / "plan.json").is_file():
        made = json.loads(record.read_text(encoding="utf-8"))
    plan = resolve(profile or made.get("profile", "auto"), seed=made.get("seed", 0))
    return plan, Path(adapter) if adapter else plan.folder / "adapter"


def training_rows(
    plan: Plan, adapter: Path, folder: Path | None = None, part: str = "train"
) -> list[Row]:
    """The rows that the adapter was trained on: ``train.parquet`` in ``folder``, or what ``data.prepare`` makes of the plan.

    ``part`` "validation" gives the rows beside them; none where ``folder`` holds none.

    Raises:
        CourseError: no such file, or the adapter was trained on another source than the plan's.
    """
    if folder and not (folder / "train.parquet").is_file():
        raise CourseError(
            f"no train.parquet in {folder.name}/: expected the folder that medquad data wrote (its --out)."
        )
    if folder:
        return read_rows(file) if (file := folder / f"{part}.parquet").is_file() else []
    record, card = adapter / "plan.json", plan.folder / "data" / "data.json"
    made = (
        json.loads(record.read_text(encoding="utf-8")).get("source", plan.source)
        if record.is_file()
        else plan.source
    )
    if made == plan.source:
        rows: list[Row] = getattr(prepare(plan), part)
        return rows
    if card.is_file() and json.loads(card.read_text(encoding="utf-8"))["recipe"]["source"] == made:
        return read_rows(card.with_name(f"{part}.parquet"))
    raise CourseError(
        f"the adapter was trained on {made!r} rows, not on {plan.source!r}: give the folder of their train.parquet (--data)."
    )


def evaluate(
    plan: Plan,
    questions: Questions,
    train: Sequence[Row],
    folder: Path,
    adapter: Path | None = None,
    archive: Sequence[Row] = (),
    validation: Sequence[Row] = (),
    batch_size: int = 32,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Answer ``questions`` with every arm, score all of it, write ``answers.parquet`` and ``metrics.json`` to ``folder``.

    ``train`` are the rows that the adapter was trained on: the look-up arms read them, and so does the grounded one, along with
    the rows of ``archive``; a passage that is word for word a question's reference is withheld, and what counts as a close
    source is fixed on ``validation``. What is generated is saved
    batch by batch, and a second run of the same recipe generates only what is missing. Returns the metrics, which hold each
    number of the report: arm -> score -> mean and 95 % interval, overall and by group, and the paired differences.

    Raises:
        CourseError: the model or adapter is not to be had, or the folder cannot be written.
    """
    adapter = adapter or plan.folder / "adapter"
    model, tokenizer = (
        load_tuned(plan, adapter),
        load_tokenizer(plan),
    )  # the model first: it refuses an adapter that is not its own
    asked, notes = questions.asked, dict(questions.notes)
    index = archive_index(train, archive, validation)
    jobs = prompts(plan, model, tokenizer, asked, index, notes)
    ids = [str(q.number) for q in asked]
    journal = Journal(folder / "answers.partial.jsonl", recipe_of(plan, adapter, jobs), report)
    for arm, known in finished(folder / "answers.parquet", journal.recipe).items():
        journal.done[arm] |= known
    done = generate_all(model, tokenizer, jobs, plan.max_new_tokens, journal, batch_size)

    rows = [q.row for q in asked]
    looked_up = {
        "nearest": nearest_training_answers(train, rows),
        "another disease": other_disease_answers(train, rows, plan.seed),
    }
    done["grounded"] = {
        key: done["grounded"].get(key, done["tuned"][key]) for key in ids
    }  # the same prompt where nothing was found
    answers = {arm: [done[arm][key] for key in ids] for arm in ("base", "tuned", "grounded")}
    answers |= {
        arm: [cut_answer(tokenizer, text, plan.max_new_tokens) for text in texts]
        for arm, texts in looked_up.items()
    }
    if empty := [
        q.number for q, text in zip(asked, looked_up["another disease"], strict=True) if not text
    ]:
        notes[NOBODY] = empty
    corpus = [row["answer"] for row in train]
    arms = {arm: score_columns(given, asked, corpus) for arm, given in answers.items()}
    reason = _add_bert_scores(arms, answers, asked)
    _add_losses(arms, model, tokenizer, jobs, asked, notes)
    write_answers(
        folder / "answers.parquet",
        journal.recipe,
        asked,
        answers,
        arms,
        {a: done[a] for a in jobs if a not in ARMS},
    )

    overall = summary(arms, WITHOUT_TRAINING)
    leaks = leakage(train, rows)
    metrics: dict[str, Any] = rounded({
        "file": questions.name,
        "questions": len(asked),
        "notes": [{"what": what, "n": len(numbers), "rows": numbers[:10]} for what, numbers in notes.items()],
        "recipe": {"profile": plan.profile, "training_rows": len(train), "archive_rows": len(index.rows),
                   "close_source": float(index.threshold)} | journal.recipe,
        "interval": {"percent": 95, "resamples": 2000, "fewest_rows": FEW},
        "about_arms": ARMS,
        "about_scores": {name: asdict(score) for name, score in SCORES.items()},
        "verdict": verdict(overall),
        "overall": overall,
        "by_qtype": by_group(arms, [q.qtype for q in asked]),
        "by_source": by_group(arms, [q.source for q in asked]),
        "by_kind": by_group(arms, ["boilerplate" if is_boilerplate(row) else "prose" for row in rows]),
        "bert_score": reason,
        "forgetting": forgetting(plan, model, tokenizer),
        "safety": safety_scores(done),
        "leakage": leaks,
        "held_out": not any(leaks[what] for what in ("normalised question", "focus")),
        "examples": examples(asked, answers, arms["tuned"]["rougeL"]),
    })  # fmt: skip
    write_json(folder / "metrics.json", metrics)
    journal.path.unlink()
    return metrics


def _add_bert_scores(
    arms: Mapping[str, Columns], answers: Mapping[str, Sequence[Answer]], asked: Sequence[Question]
) -> str:
    """Add BERTScore, all arms in one go, or return the reason why it cannot be had."""
    texts = [answer.text for given in answers.values() for answer in given]
    found, reason = scores.bert_score_or_reason(
        texts, [q.references for _ in answers for q in asked]
    )
    if found is not None:
        for arm, values in zip(answers, numpy.split(found, len(answers)), strict=True):
            arms[arm]["bert_score"] = values
    return reason


def _add_losses(
    arms: Mapping[str, Columns], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, jobs: Mapping[str, Mapping[str, Messages]],
    asked: Sequence[Question], notes: dict[str, list[int]],
) -> None:  # fmt: skip
    """Add how likely the model finds each question's first reference, for the arms that are models: nats, tokens, bytes."""
    ids = [str(q.number) for q in asked]
    table = numpy.full((len(scores.Losses._fields), len(asked)), numpy.nan)
    for arm in (
        "base",
        "tuned",
        "grounded",
    ):  # grounded last: a question without passages keeps the tuned arm's prompt, and loss
        places = [place for place, key in enumerate(ids) if key in jobs[arm]]
        conversations = [jobs[arm][ids[place]] for place in places]
        with adapted(model, arm):
            references = [asked[place].references[0] for place in places]
            table[:, places] = scores.answer_loss(
                model, tokenizer, conversations, references, progress=f"likelihood, {arm}"
            )
        arms[arm].update(zip(scores.Losses._fields, table.copy(), strict=True))
    if rows := [
        q.number for q, nats in zip(asked, arms["base"]["nats"], strict=True) if numpy.isnan(nats)
    ]:
        notes[UNSCORED] = rows


def safety_scores(done: Mapping[str, Mapping[str, Answer]]) -> dict[str, Any]:
    """Share of the safety prompts that each model answers as expected, what the rules around it catch, and their own error."""
    asked = safety.prompts()
    models = {
        arm: safety.score([done[f"{arm}, safety"][p.id].text for p in asked], asked)
        for arm in ("base", "tuned")
    }
    return {
        "prompts": len(asked),
        **models,
        "outer_rule": safety.outer_rule(asked),
        "rule_error": safety.rule_error()["held_out"]["overall"],
    }


def rounded(value: Any) -> Any:
    """``value`` for a JSON file: floats to four places, numpy's numbers as Python's."""
    if isinstance(value, Mapping):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    value = value.item() if isinstance(value, numpy.generic) else value
    return round(value, 4) if isinstance(value, float) else value


# ---- lesson 05 ------------------------------------------------------------------------------------------------------


def outcome(
    rows: Sequence[Row], train: Sequence[Row], base: Sequence[Answer], tuned: Sequence[Answer]
) -> dict[str, Any]:
    """What the training changed on held-out ``rows``: one flat record for ``metrics/outcome.json``.

    ``base`` and ``tuned`` answer ``rows`` in their order. The gain is paired: answer by answer, tuned minus base. Fact
    completeness is ``None`` where the source lists no facts.
    """
    references = [row["answer"] for row in rows]
    before, after = (rouge_l([a.text for a in answers], references) for answers in (base, tuned))
    nearest = nearest_training_answers(train, rows)

    def complete(answers: Sequence[str]) -> float | None:
        values = facts_complete(answers, rows)
        return float(values.mean()) if len(values) else None

    found: dict[str, Any] = rounded({
        "rows": len(rows),
        "rouge_l_base": before.mean(),
        "rouge_l_tuned": after.mean(),
        "rouge_l_nearest": rouge_l(nearest, references).mean(),
        "rouge_l_gain_ci95": mean_interval(after - before),
        "stop_rate_base": float(numpy.mean([a.stopped for a in base])),
        "stop_rate_tuned": float(numpy.mean([a.stopped for a in tuned])),
        "facts_complete_base": complete([a.text for a in base]),
        "facts_complete_tuned": complete([a.text for a in tuned]),
        "facts_complete_nearest": complete(nearest),
    })  # fmt: skip
    return found
