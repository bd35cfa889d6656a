"""Compare the tuned model with its base and with baselines, with an interval for every number.

Five arms (``ARMS``) answer a file of questions under one token limit. ``answers.parquet`` holds
one row for each question and arm; ``metrics.json`` holds the numbers of the report. Each arm's
answers are saved when the arm is done, so a stopped run repeats one arm at most.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from medquad_utils import CourseError, files, retrieval, safety, scores
from medquad_utils.chat import grounded_messages, prompt_ids, prompt_messages
from medquad_utils.cleaning import is_boilerplate
from medquad_utils.data import prepare, read_records
from medquad_utils.files import COLUMNS, Row, read_json, read_rows, whole_file, write_json
from medquad_utils.generation import (
    Answer,
    adapter_record,
    ask,
    base_id,
    generate,
    load_tokenizer,
    load_tuned,
)  # fmt: skip
from medquad_utils.profiles import Plan, resolve_trained
from medquad_utils.quantization import unpacked
from medquad_utils.scores import SCORES, facts_complete, interval, rouge_l
from medquad_utils.splits import focus_of, leakage, normalise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ARMS = {
    "base": "the model before training",
    "tuned": "the model with its adapter",
    "grounded": "the tuned model with archive passages before the question, where any is close",
    "nearest": "no model: the answer to the most similar training question of the same type",
    "another disease": "no model: a training answer about another disease, same source and type",
}
WITHOUT_TRAINING = ("base", "nearest", "another disease")  # the tuned model has to beat these
VERDICT = ("facts_complete", "rougeL", "chrf", "tfidf_cosine", "bits_per_byte")
FEW = 5  # a group of fewer questions gets no interval
MOST_GROUPS = 24  # the questions of further groups are counted together
PASSAGES = 3  # in a grounded prompt, at most
PASSAGE_WORDS = 80  # of each passage, at most
MEASURED = files.MEASURED / "look_up.json"

CONTROL = re.compile(  # control characters, direction marks, surrogates; tabs and newlines stay
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
QUESTION = ("question", "prompt")  # names of columns, in any case
REFERENCES = ("answer", "answers", "reference", "references")
OPTIONAL = ("qtype", "source", "focus", "url")

# Notes: what happened to questions -> their rows in the file.
NO_QUESTION = "skipped: the question is empty or not text"
NO_ANSWER = "skipped: no reference answer is text"
CONTROLS = "control characters removed"
MERGED = "repeats the question of an earlier row: its answer counts as one more reference"
CUT = "question cut at a word: it is longer than the model's context"
UNGROUNDED = f"grounded arm asked without passages: {retrieval.NO_SOURCE}"
NOBODY = "no training answer about another disease: that arm's answer is empty"
UNSCORED = "without bits per byte: question and reference exceed the model's context"

Columns = dict[str, numpy.ndarray]  # score -> one value a question; NaN where there is none
Cell = dict[str, Any]  # mean, low, high, n
Messages = list[dict[str, str]]
Notes = dict[str, list[int]]

# ---- questions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One question: ``number`` is its row in the file, from 1; each reference is a right answer."""

    number: int
    question: str
    references: tuple[str, ...]
    qtype: str | None = None
    source: str | None = None
    focus: str | None = None
    url: str | None = None

    @classmethod
    def of(cls, number: int, row: Row) -> Question:
        """Turn a row of the common schema into a question with one reference."""
        return cls(number, row["question"], (row["answer"],), *(row[c] for c in OPTIONAL))

    @cached_property
    def row(self) -> Row:
        """The question as a row of the common schema; its answer is the first reference."""
        fields = {column: getattr(self, column) for column in ("question", *OPTIONAL)}
        return {**dict.fromkeys(COLUMNS), **fields, "answer": self.references[0]}


@dataclass
class Questions:
    """The questions of a file, and notes: what was skipped or changed -> rows of the file."""

    name: str
    asked: list[Question]
    notes: Notes = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.asked):,} questions"]
        for what, rows in self.notes.items():
            shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            lines.append(f"  {len(rows):,} x {what} (row {shown})")
        return "\n".join(lines)


def read_questions(path: Path, limit: int = 1000, seed: int = 0) -> Questions:
    """Read questions with reference answers from a CSV, JSONL or parquet file.

    Columns, in any case: ``question`` or ``prompt``; ``answer(s)`` or ``reference(s)``, a text or
    a list of texts (in CSV as JSON); optional ``qtype``, ``source``, ``focus``, ``url``. Rows that
    repeat a question are merged. Over ``limit`` questions (0: no limit) are sampled.
    """
    table = read_records(path, "question, answer")
    records = [{str(name).strip().lower(): v for name, v in row.items()} for row in table]
    columns = {name for record in records for name in record}
    missing = [" or ".join(names) for names in (QUESTION, REFERENCES) if not columns & set(names)]
    if records and missing:
        raise CourseError(
            f"{path.name} lacks a column {' and a column '.join(missing)}: it has "
            f"{', '.join(sorted(columns))}. Rename the columns."
        )
    asked: dict[str, Question] = {}
    notes: Notes = defaultdict(list)
    for number, record in enumerate(records, start=1):
        if (question := _question(number, record, notes)) is None:
            continue
        key = normalise(question.question) or question.question
        if first := asked.get(key):
            notes[MERGED].append(number)
            references = dict.fromkeys(first.references + question.references)
            question = dataclasses.replace(first, references=tuple(references))
        asked[key] = question
    questions = Questions(path.name, list(asked.values()), dict(notes))
    if not asked:
        why = "; ".join(line.strip() for line in str(questions).splitlines()[1:]) or "it is empty"
        raise CourseError(f"{path.name} holds no question with an answer ({why}).")
    if limit and len(asked) > limit:
        order = numpy.random.default_rng(seed).permutation(len(asked)).tolist()
        left_out = sorted(questions.asked[n].number for n in order[limit:])
        what = f"left out: {limit:,} of {len(asked):,} questions are drawn with seed {seed}"
        questions.notes[f"{what} (--limit)"] = left_out
        questions.asked = [questions.asked[n] for n in sorted(order[:limit])]
    return questions


def _question(number: int, record: Mapping[str, Any], notes: Notes) -> Question | None:
    asked = [text for name in QUESTION for text in _texts(record.get(name))]
    references = [text for name in REFERENCES for text in _texts(record.get(name), several=True)]
    if not asked or not references:
        notes[NO_ANSWER if asked else NO_QUESTION].append(number)
        return None
    clean, *answers = (CONTROL.sub("", text).strip() for text in (asked[0], *references))
    if [clean, *answers] != [asked[0], *references]:
        notes[CONTROLS].append(number)
    texts = {name: _texts(record.get(name)) for name in OPTIONAL}
    others = {name: CONTROL.sub("", cell[0]) for name, cell in texts.items() if cell}
    return Question(number, clean, tuple(dict.fromkeys(answers)), **others)


def _texts(value: Any, several: bool = False) -> list[str]:
    """List the texts of a table's cell: a text, a list, or (``several``) a list as JSON."""
    if several and isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):  # a text that opens with a bracket
            value = json.loads(value)
    texts = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]
    return [v.strip() for v in texts if CONTROL.sub("", v).strip().lower() not in ("", "nan")]


def fitted(
    tokenizer: PreTrainedTokenizerBase, question: str, room: int, passages: Sequence[str] = ()
) -> tuple[Messages, bool]:
    """Build a prompt of at most ``room`` tokens; return it and whether the question was cut.

    Passages are shortened first, then left out; then the question is cut at a word.
    """

    def fits(messages: Messages) -> bool:
        return len(prompt_ids(tokenizer, messages)) <= room

    whole = " ".join(question.split())
    text = whole[: 32 * room]  # no token is that long: it saves time with a huge text
    for words in (PASSAGE_WORDS, PASSAGE_WORDS // 2, PASSAGE_WORDS // 4) if passages else ():
        shown = [" ".join(passage.split()[:words]) for passage in passages]
        if fits(messages := grounded_messages(text, shown)):
            return messages, text != whole
    while not fits(messages := grounded_messages(text)):
        if not text:
            raise CourseError(f"an empty prompt exceeds {room} tokens: lower max_new_tokens.")
        text = text[: len(text) * 9 // 10].rsplit(" ", 1)[0]
    return messages, text != whole


# ---- baselines without a model -------------------------------------------------------------------


def nearest_training_answers(train: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """Return for each row the answer of the most similar training question of the same qtype.

    Similarity is the cosine of TF-IDF vectors; of equals the first wins. For a qtype without
    training rows all of them are searched.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectoriser = TfidfVectorizer()
    trained = vectoriser.fit_transform([row["question"] for row in train])
    asked = vectoriser.transform([row["question"] for row in rows])
    of_type, nearest = numbers_by(train, "qtype"), [0] * len(rows)
    for qtype, places in numbers_by(rows, "qtype").items():
        candidates = of_type.get(qtype) or list(range(len(train)))
        for start in range(0, len(places), 256):  # the matrix of cosines is dense
            part = places[start : start + 256]
            # Rounded, so that equal questions tie.
            cosines = (asked[part] @ trained[candidates].T).toarray().round(9)
            for place, best in zip(part, cosines.argmax(axis=1), strict=True):
                nearest[place] = candidates[best]
    return [train[number]["answer"] for number in nearest]


def other_disease_answers(train: Sequence[Row], rows: Sequence[Row], seed: int = 0) -> list[str]:
    """Draw for each row a training answer about another disease, of the same source and qtype.

    If there is none: of the same qtype, then any, then "". Its score is what style alone earns.
    """
    rng = numpy.random.default_rng(seed)
    foci, everything = [focus_of(row) for row in train], range(len(train))
    of_both, of_type = numbers_by(train, "source", "qtype"), numbers_by(train, "qtype")
    answers = []
    for row in rows:
        focus, both = focus_of(row), (row["source"], row["qtype"])
        pools = (of_both.get(both, []), of_type.get(row["qtype"], []), everything)
        others = next(filter(None, ([n for n in pool if foci[n] != focus] for pool in pools)), None)
        answers.append(train[rng.choice(others)]["answer"] if others else "")
    return answers


def numbers_by(rows: Sequence[Row], *columns: str) -> dict[Any, list[int]]:
    """Group the numbers of rows by the value (or tuple of values) of ``columns``."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        values = tuple(row[column] for column in columns)
        groups[values if len(values) > 1 else values[0]].append(number)
    return dict(groups)


def cut_answer(tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> Answer:
    """Cut a looked-up text at the token limit of the models."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) <= most:
        return Answer(text, len(ids), True)
    return Answer(tokenizer.decode(ids[:most]).strip(), most, False)


# ---- arms that generate --------------------------------------------------------------------------


def archive_index(
    train: Sequence[Row], archive: Sequence[Row], validation: Sequence[Row]
) -> retrieval.Index:
    """Index ``train`` and ``archive``; calibrate on the validation diseases that ``train`` lacks.

    Without such a row the threshold stays that of the full MedQuAD.
    """
    index = small = retrieval.Index(train)
    if archive:
        index = retrieval.Index([*train, *archive])
    if outside := retrieval.probes([row for row in validation if not small.knows(row)]):
        index.threshold = retrieval.calibrate(small, retrieval.probes(train), outside)
    return index


def prompts(
    plan: Plan, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question], index: retrieval.Index, notes: Notes,
) -> dict[str, dict[str, Messages]]:  # fmt: skip
    """Build the prompts, arm -> id -> messages; add cut and ungrounded questions to ``notes``.

    Ungrounded questions are left out of "grounded": their prompt is that of the tuned arm.
    """
    room = int(model.config.max_position_embeddings) - plan.max_new_tokens
    # A passage that equals a reference would hand the grounded arm the answer.
    same = numbers_by([{"answer": normalise(row["answer"])} for row in index.rows], "answer")
    withheld = [{n for text in q.references for n in same.get(normalise(text), ())} for q in asked]
    hits = index.search([q.question for q in asked], PASSAGES, withheld)
    plain, grounded = {}, {}
    for q, close in zip(asked, map(index.close, hits), strict=True):
        plain[str(q.number)], cut = fitted(tokenizer, q.question, room)
        if cut:
            notes.setdefault(CUT, []).append(q.number)
        if close:
            passages = [f"{hit.title}: {hit.row['answer']}" for hit in close]
            grounded[str(q.number)] = fitted(tokenizer, q.question, room, passages)[0]
        else:
            notes.setdefault(UNGROUNDED, []).append(q.number)
    safe = {prompt.id: prompt_messages(prompt.prompt) for prompt in safety.prompts()}
    arms = {"base": plain, "tuned": plain, "grounded": grounded}
    return arms | {"base, safety": safe, "tuned, safety": safe}


def recipe_of(plan: Plan, adapter: Path, jobs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides every generated answer; prompts and adapter as SHA-256 prefixes."""
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    return {
        "model": plan.model_id,
        "base": base_id(plan),
        "adapter": hashlib.sha256(weights).hexdigest()[:16],
        "prompts": hashlib.sha256(json.dumps(jobs).encode()).hexdigest()[:16],
        "max_new_tokens": plan.max_new_tokens,
        "seed": plan.seed,
    }


def adapted(model: PreTrainedModel, arm: str) -> AbstractContextManager[Any]:
    """Switch the adapter off within the context for an arm of the base."""
    tuned: Any = model
    return tuned.disable_adapter() if arm.startswith("base") else nullcontext()


def generate_all(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    jobs: Mapping[str, Mapping[str, Messages]], recipe: Mapping[str, Any], folder: Path,
    batch_size: int = 32, report: Callable[[str], None] = print,
) -> dict[str, dict[str, Answer]]:  # fmt: skip
    """Answer ``jobs``; return arm -> id -> answer. Arms with a file in ``folder`` are read from it.

    Files of another recipe are set aside as ``<folder>.old``.
    """
    file, old = folder / "recipe.json", folder.with_name(f"{folder.name}.old")
    if file.is_file() and (older := read_json(file)) != recipe:
        differs = ", ".join(k for k in recipe if older.get(k) != recipe[k])
        report(f"{folder.name}/ is of another run ({differs} differ): set aside as {old.name}/.")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    write_json(file, recipe)
    answers = {}
    for arm, conversations in jobs.items():
        if not (path := folder / f"{arm}.jsonl").is_file():
            asked, most = list(conversations.values()), recipe["max_new_tokens"]
            with adapted(model, arm):
                new = generate(model, tokenizer, asked, most, batch_size=batch_size, progress=arm)
            records = ({"id": k, **asdict(a)} for k, a in zip(conversations, new, strict=True))
            with whole_file(path) as temporary:
                text = "".join(f"{json.dumps(record)}\n" for record in records)
                temporary.write_text(text, encoding="utf-8")
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        answers[arm] = {line.pop("id"): Answer(**line) for line in lines}
    return answers


# ---- scores --------------------------------------------------------------------------------------


def score_columns(
    answers: Sequence[Answer], asked: Sequence[Question], corpus: Sequence[str]
) -> Columns:
    """Compute every score that needs no model; ``corpus`` gives the document frequencies."""
    texts, references = [a.text for a in answers], [q.references for q in asked]
    return scores.rouge(texts, references) | {
        "bleu": scores.bleu(texts, references),
        "chrf": scores.chrf(texts, references),
        "tfidf_cosine": scores.tfidf_cosine(texts, references, corpus),
        "facts_complete": facts_column(texts, [q.row for q in asked]),
        "length_ratio": scores.length_ratio(texts, references),
        "repetition": scores.repetition(texts),
        "stop_rate": numpy.array([a.stopped for a in answers], dtype=float),
    }


def facts_column(texts: Sequence[str], rows: Sequence[Row]) -> numpy.ndarray:
    """Compute ``facts_complete`` as floats, NaN for rows whose source lists no facts."""
    values = (facts_complete([text], [row]) for text, row in zip(texts, rows, strict=True))
    return numpy.array([v[0] if len(v) else numpy.nan for v in values], dtype=float)


def add_bert_scores(
    columns: dict[str, Columns], answers: dict[str, list[Answer]], asked: Sequence[Question]
) -> str:
    """Add BERTScore to all arms, or return the reason why it is missing."""
    texts = [answer.text for row in zip(*answers.values(), strict=True) for answer in row]
    references = [q.references for q in asked for _ in answers]
    values, reason = scores.bert_score_or_reason(texts, references)
    if values is not None:
        for arm, column in zip(answers, values.reshape(-1, len(answers)).T, strict=True):
            columns[arm]["bert_score"] = column
    return reason


def add_losses(
    columns: Mapping[str, Columns], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    jobs: Mapping[str, Mapping[str, Messages]], asked: Sequence[Question], notes: Notes,
) -> None:  # fmt: skip
    """Add the likelihood of each first reference (``scores.Losses``) to the arms with a model."""
    table = numpy.full((len(scores.Losses._fields), len(asked)), numpy.nan)
    # Grounded comes last: without passages a question keeps the tuned arm's prompt, and its loss.
    for arm in ("base", "tuned", "grounded"):
        places = [place for place, q in enumerate(asked) if str(q.number) in jobs[arm]]
        conversations = [jobs[arm][str(asked[place].number)] for place in places]
        references = [asked[place].references[0] for place in places]
        with adapted(model, arm):
            table[:, places] = scores.answer_loss(
                model, tokenizer, conversations, references, progress=f"likelihood, {arm}"
            )
        columns[arm].update(zip(scores.Losses._fields, table.copy(), strict=True))
    if rows := [q.number for q, nats in zip(asked, table[0], strict=True) if numpy.isnan(nats)]:
        notes[UNSCORED] = rows


RATIOS: dict[str, tuple[Callable[..., scores.Interval], str]] = {
    "bits_per_byte": (scores.bits_per_byte, "bytes"),
    "perplexity": (scores.perplexity, "tokens"),
}


def _cell(values: scores.Interval, n: int) -> Cell:
    mean, low, high = values
    few = n < FEW
    return {"mean": mean, "low": None if few else low, "high": None if few else high, "n": n}


def _measure(score: str, columns: Columns, before: Columns | None = None) -> Cell | None:
    """Mean of a score, or of its paired difference to ``before``; ``None`` without a value."""
    ratio, size = RATIOS.get(score, (None, ""))
    name = "nats" if ratio else score
    if name not in columns or (before and name not in before):
        return None
    values = columns[name] - (before[name] if before else 0)
    if not (n := int(numpy.isfinite(values).sum())):
        return None
    return _cell(ratio(values, columns[size]) if ratio else interval(values), n)


def summary(
    arms: Mapping[str, Columns], versus: Sequence[str] = ("base", "nearest")
) -> dict[str, Any]:
    """Return all scores ("arms") and the paired differences ("versus X"): arm -> score -> cell."""

    def table(before: str | None) -> dict[str, dict[str, Cell]]:
        other = arms[before] if before else None
        # Two perplexities have a ratio, not a difference; bits per byte say the same.
        names = [s for s in SCORES if s != "perplexity" or not other]
        rest = {arm: columns for arm, columns in arms.items() if arm != before}
        cells = {arm: {s: _measure(s, c, other) for s in names} for arm, c in rest.items()}
        return {arm: {s: cell for s, cell in row.items() if cell} for arm, row in cells.items()}

    return {"arms": table(None), **{f"versus {other}": table(other) for other in versus}}


def by_group(
    arms: Mapping[str, Columns], groups: Sequence[str | None]
) -> dict[str, dict[str, Any]]:
    """Return ``summary`` and n of each group of questions, the largest group first."""
    names = [" ".join((group or "").split())[:60] or "not given" for group in groups]
    largest = {name for name, _ in Counter(names).most_common(MOST_GROUPS)}
    places: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        places[name if name in largest else "all others"].append(place)
    ordered = sorted(places.items(), key=lambda item: (-len(item[1]), item[0]))
    return {
        group: {"n": len(chosen)}
        | summary({arm: {s: v[chosen] for s, v in c.items()} for arm, c in arms.items()})
        for group, chosen in ordered
    }


def verdict(overall: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List for each score of ``VERDICT`` the arms that the tuned model beats, equals or loses to.

    It beats an arm where the whole interval of the paired difference lies on the better side of 0.
    """
    verdicts = []
    for score in VERDICT:
        sides: dict[str, Any] = {"score": score, "beats": [], "even": [], "loses": []}
        sign = 1 if SCORES[score].better == "up" else -1
        for arm in WITHOUT_TRAINING:
            cell = overall[f"versus {arm}"]["tuned"].get(score)
            if cell and cell["low"] is not None:
                low, high = sorted((sign * cell["low"], sign * cell["high"]))
                sides["beats" if low > 0 else "loses" if high < 0 else "even"].append(arm)
        if sides["beats"] or sides["even"] or sides["loses"]:
            verdicts.append(sides)
    return verdicts


def forgetting(
    plan: Plan, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return perplexity on plain texts before and after tuning, and the ratio (above 1: worse)."""
    texts, losses = scores.plain_texts(plan), {}
    for arm in ("base", "tuned"):
        with adapted(model, arm):
            losses[arm] = scores.text_loss(model, tokenizer, texts, progress=f"forgetting, {arm}")
    base, tuned = losses["base"], losses["tuned"]
    nats = {"base": base.nats, "tuned": tuned.nats, "ratio": tuned.nats - base.nats}
    cells = {k: _cell(scores.perplexity(v, base.tokens), len(texts)) for k, v in nats.items()}
    return {"texts": len(texts), **cells}


def examples(
    asked: Sequence[Question], answers: Mapping[str, Sequence[Answer]], values: numpy.ndarray
) -> list[Cell]:
    """Show all answers, shortened, where the tuned model's ``values`` are best, middling, worst."""
    order = numpy.argsort(-values, kind="stable").tolist()
    chosen = {"best": order[0], "middling": order[len(order) // 2], "worst": order[-1]}

    def short(text: str) -> str:
        return text if len(text) <= 300 else text[:300].rsplit(" ", 1)[0] + " ..."

    return [
        {"what": what, "row": asked[n].number, "question": short(asked[n].question),
         "reference": short(asked[n].references[0]),
         "answers": {arm: short(texts[n].text) for arm, texts in answers.items()}}
        for what, n in chosen.items()
    ]  # fmt: skip


def safety_scores(answers: Mapping[str, Mapping[str, Answer]]) -> dict[str, Any]:
    """Return how base and tuned model pass the safety prompts, and the error of the rules."""
    asked = safety.prompts()
    texts = {a: [answers[f"{a}, safety"][p.id].text for p in asked] for a in ("base", "tuned")}
    models = {arm: safety.score(answered, asked) for arm, answered in texts.items()}
    rules = {"outer_rule": safety.outer_rule(asked), "rule_error": safety.rule_error()}
    return {"prompts": len(asked), **models, **rules}


def rounded(value: Any) -> Any:
    """Prepare ``value`` for JSON: floats with four decimals, numpy's numbers as Python's."""
    if isinstance(value, Mapping):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    value = value.item() if isinstance(value, numpy.generic) else value
    return round(value, 4) if isinstance(value, float) else value


# ---- the whole evaluation ------------------------------------------------------------------------


def plan_of(
    profile: str = "", adapter: str = "", model: str = "", out: str = ""
) -> tuple[Plan, Path]:
    """Return the plan of an adapter's folder, by default the one it was trained with."""
    folder = Path(adapter) if adapter else None
    record = adapter_record(folder) if folder else {}
    profile = profile or record.get("profile", "auto")
    plan = resolve_trained(profile, model=model, out=out, adapter=folder)
    plan = dataclasses.replace(plan, seed=record.get("seed", 0))
    return plan, folder or plan.folder / "adapter"


def training_rows(
    plan: Plan, adapter: Path, folder: Path | None = None, part: str = "train"
) -> list[Row]:
    """Return a part of the data of the adapter: from ``folder``, or what ``data.prepare`` makes.

    Without the file of another part than "train" in ``folder``, return no rows.
    """
    if folder and not (folder / "train.parquet").is_file():
        raise CourseError(
            f"no train.parquet in {folder.name}/: expected the --out folder of medquad data."
        )
    if folder:
        return read_rows(file) if (file := folder / f"{part}.parquet").is_file() else []
    card, source = plan.folder / "data" / "data.json", adapter_record(adapter).get("source")
    if source in (None, plan.source):
        rows: list[Row] = getattr(prepare(plan), part)
        return rows
    if card.is_file() and read_json(card)["recipe"]["source"] == source:
        return read_rows(card.with_name(f"{part}.parquet"))
    raise CourseError(
        f"the adapter was trained on {source!r} rows, not on {plan.source!r}: give the folder of "
        "their train.parquet (--data)."
    )


def whole_archive(plan: Plan, adapter: Path) -> retrieval.Index:
    """Index all rows of the data that ``adapter`` was trained on, validation and test rows too."""
    parts = ("train", "validation", "test")
    train, validation, test = (training_rows(plan, adapter, part=part) for part in parts)
    return archive_index(train, [*validation, *test], validation)


def check_question(
    question: str, tokenizer: PreTrainedTokenizerBase, context: int, max_new_tokens: int
) -> str:
    """Return ``question`` without control characters.

    Raises CourseError if it is empty, or longer with its answer than the ``context`` (tokens).
    """
    text = CONTROL.sub("", question).strip()
    if not text:
        raise CourseError(
            'the question is empty: write one, for example medquad explain "What causes asthma?"'
        )
    needed = len(prompt_ids(tokenizer, prompt_messages(text))) + max_new_tokens
    if needed > context:
        raise CourseError(
            f"the question is too long: with its answer {needed:,} tokens, "
            f"and the model reads {context:,}. Ask a shorter one."
        )
    return text


def evaluate(
    plan: Plan, questions: Questions, train: Sequence[Row], folder: Path,
    adapter: Path | None = None, archive: Sequence[Row] = (), validation: Sequence[Row] = (),
    batch_size: int = 32, report: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Answer and score ``questions`` with every arm; write answers.parquet and metrics.json.

    ``train`` are the rows that the adapter was trained on. Baselines and grounded arm read them;
    the grounded arm also reads ``archive``, with a threshold from ``validation``. Returns the
    metrics: every score by arm and by group, and paired differences, with 95 % intervals.
    """
    adapter, asked, notes = adapter or plan.folder / "adapter", questions.asked, {**questions.notes}
    model = load_tuned(plan, adapter)  # first, because it refuses an adapter of another base
    tokenizer = load_tokenizer(plan)
    index = archive_index(train, archive, validation)
    jobs = prompts(plan, model, tokenizer, asked, index, notes)
    recipe = recipe_of(plan, adapter, jobs)
    generated = generate_all(model, tokenizer, jobs, recipe, folder / "answers", batch_size, report)
    answers = align_answers(plan, tokenizer, asked, train, generated, notes)
    corpus = [row["answer"] for row in train]
    columns = {arm: score_columns(given, asked, corpus) for arm, given in answers.items()}
    bert_score = add_bert_scores(columns, answers, asked)
    add_losses(columns, model, tokenizer, jobs, asked, notes)
    write_answers(folder / "answers.parquet", asked, answers, columns, generated)
    setting = {"profile": plan.profile, "training_rows": len(train)}
    setting |= {"archive_rows": len(index.rows), "close_source": float(index.threshold)} | recipe
    metrics: dict[str, Any] = rounded({
        **about(questions, notes, setting),
        **results(asked, columns),
        "bert_score": bert_score,
        "forgetting": forgetting(plan, model, tokenizer),
        "safety": safety_scores(generated),
        "leakage": (shares := leakage(train, [q.row for q in asked])),
        "held_out": not (shares["normalised question"] or shares["focus"]),
        "examples": examples(asked, answers, columns["tuned"]["rougeL"]),
    })  # fmt: skip
    write_json(folder / "metrics.json", metrics)
    return metrics


def align_answers(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Question], train: Sequence[Row],
    generated: Mapping[str, Mapping[str, Answer]], notes: Notes,
) -> dict[str, list[Answer]]:  # fmt: skip
    """Return the answers of all five arms, in the order of ``asked``."""
    rows, ids = [q.row for q in asked], [str(q.number) for q in asked]
    answers = {arm: [generated[arm][key] for key in ids] for arm in ("base", "tuned")}
    grounded = {**generated["tuned"], **generated["grounded"]}  # no passages: the same prompt
    answers["grounded"] = [grounded[key] for key in ids]
    looked_up = {"nearest": nearest_training_answers(train, rows)}
    looked_up["another disease"] = other_disease_answers(train, rows, plan.seed)
    for arm, texts in looked_up.items():
        answers[arm] = [cut_answer(tokenizer, text, plan.max_new_tokens) for text in texts]
        if empty := [q.number for q, text in zip(asked, texts, strict=True) if not text]:
            notes[NOBODY] = empty
    return answers


def about(questions: Questions, notes: Notes, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the run: file, notes, recipe, and the meaning of arms, scores and intervals."""
    return {
        "file": questions.name,
        "questions": len(questions.asked),
        "notes": [{"what": k, "n": len(rows), "rows": rows[:10]} for k, rows in notes.items()],
        "recipe": recipe,
        "interval": {"percent": 95, "resamples": 2000, "fewest_rows": FEW},
        "about_arms": ARMS,
        "about_scores": {name: score._asdict() for name, score in SCORES.items()},
    }


def results(asked: Sequence[Question], columns: Mapping[str, Columns]) -> dict[str, Any]:
    """Summarise the scores overall, by type, source and kind of answer, and give the verdict."""
    kinds = ["boilerplate" if is_boilerplate(q.row) else "prose" for q in asked]
    overall = summary(columns, WITHOUT_TRAINING)
    return {
        "verdict": verdict(overall),
        "overall": overall,
        "by_qtype": by_group(columns, [q.qtype for q in asked]),
        "by_source": by_group(columns, [q.source for q in asked]),
        "by_kind": by_group(columns, kinds),
    }


def write_answers(
    path: Path, asked: Sequence[Question], answers: Mapping[str, Sequence[Answer]],
    columns: Mapping[str, Columns], generated: Mapping[str, Mapping[str, Answer]],
) -> None:  # fmt: skip
    """Write one row for each question and arm with its scores, and the safety answers."""
    import pandas

    def row(key: str, arm: str, question: str, answer: Answer) -> dict[str, Any]:
        given = {"answer": answer.text, "tokens": answer.tokens, "stopped": answer.stopped}
        return {"id": key, "arm": arm, "question": question, **given}

    rows = []
    for place, q in enumerate(asked):
        more: dict[str, Any] = {"references": list(q.references), "qtype": q.qtype}
        more |= {"source": q.source, "focus": q.focus, "boilerplate": is_boilerplate(q.row)}
        for arm, given in answers.items():
            values = {s: float(column[place]) for s, column in columns[arm].items()}
            values = {s: v for s, v in values.items() if s not in ("stop_rate", "tokens")}
            rows.append(row(str(q.number), arm, q.question, given[place]) | more | values)
    asks = {prompt.id: prompt.prompt for prompt in safety.prompts()}
    for arm in ("base, safety", "tuned, safety"):
        rows += [row(key, arm, asks[key], answer) for key, answer in generated[arm].items()]
    with whole_file(path) as temporary:
        pandas.DataFrame(rows).to_parquet(temporary, index=False)


# ---- lessons 01, 05 and 06 -----------------------------------------------------------------------


def look_up_scores(train: Sequence[Row], test: Sequence[Row], seed: int = 0) -> dict[str, Cell]:
    """Return ROUGE-L of both look-up baselines, answers uncut: arm -> cell."""
    references = [row["answer"] for row in test]
    answers = {"nearest": nearest_training_answers(train, test)}
    answers["another disease"] = other_disease_answers(train, test, seed)
    columns = {arm: rouge_l(texts, references) for arm, texts in answers.items()}
    return {arm: _cell(interval(column), len(test)) for arm, column in columns.items()}


def measured() -> dict[str, Any]:
    """Return ``look_up_scores`` of the real MedQuAD (tests/benchmarks/look_up.py measured them)."""
    table: dict[str, Any] = read_json(MEASURED)
    return table


def outcome(
    rows: Sequence[Row], train: Sequence[Row], base: Sequence[Answer], tuned: Sequence[Answer]
) -> dict[str, Any]:
    """Summarise what training changed on held-out ``rows``, for ``metrics/outcome.json``.

    The gain is paired, tuned minus base. Facts are ``None`` where the source lists none.
    """
    nearest, references = nearest_training_answers(train, rows), [row["answer"] for row in rows]
    texts = {"base": [a.text for a in base], "tuned": [a.text for a in tuned], "nearest": nearest}
    rouge = {arm: rouge_l(answers, references) for arm, answers in texts.items()}
    facts = {arm: facts_complete(answers, rows) for arm, answers in texts.items()}
    table: dict[str, Any] = rounded({
        "rows": len(rows),
        **{f"rouge_l_{arm}": values.mean() for arm, values in rouge.items()},
        "rouge_l_gain_ci95": interval(rouge["tuned"] - rouge["base"])[1:],
        "stop_rate_base": float(numpy.mean([a.stopped for a in base])),
        "stop_rate_tuned": float(numpy.mean([a.stopped for a in tuned])),
        **{f"facts_complete_{arm}": v.mean() if len(v) else None for arm, v in facts.items()},
    })  # fmt: skip
    return table


def answer_columns(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_new_tokens: int,
) -> Columns:
    """Answer ``rows`` and score the answers for ``summary``: one value a row, NaN if there is none.

    ROUGE-L, all facts present (embedded sample only), stop rate, and the loss of the reference.
    """
    references = [row["answer"] for row in rows]
    with unpacked(model):
        answers = ask(model, tokenizer, [row["question"] for row in rows], max_new_tokens)
        conversations = [prompt_messages(row["question"]) for row in rows]
        losses = scores.answer_loss(model, tokenizer, conversations, references)
    texts = [answer.text for answer in answers]
    return {
        "rougeL": rouge_l(texts, references),
        "facts_complete": facts_column(texts, rows),
        "stop_rate": numpy.array([answer.stopped for answer in answers], dtype=float),
        **losses._asdict(),
    }
