"""Compare the tuned model with its base and with baselines, with an interval for every number.

Five arms (``ARMS``) answer a file of questions. Each arm's answers are saved when the arm is done:
a stopped run repeats one arm at most.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import pandas

from medquad_utils import CourseError, files, generation, retrieval, safety, scores
from medquad_utils.adapters import adapter_id, adapter_record, base_id
from medquad_utils.atomic import whole_file
from medquad_utils.chat import grounded_messages, prompt_ids, prompt_messages
from medquad_utils.cleaning import is_boilerplate
from medquad_utils.data import Places, identity, listed, load_table, prepare, written
from medquad_utils.files import Row, read_json, read_rows, value_hash, write_json
from medquad_utils.generation import Answer, generate
from medquad_utils.profiles import Plan
from medquad_utils.quantization import unpacked
from medquad_utils.scores import SCORES, facts_column, interval, paired_interval, rouge_l
from medquad_utils.splits import Splits, held_out_by, leakage, normalise
from medquad_utils.splits import focus_of as focus_of  # lesson 06 compares diseases
from medquad_utils.tables import clean_text, has_words

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
    from transformers import PreTrainedTokenizerBase as Tokenizer

ARMS = {
    "base": "the model before training",
    "tuned": "the model with its adapter",
    "grounded": "the tuned model with archive passages before the question, where any is close",
    "nearest": "no model: the answer to the most similar training question of the same type",
    "another disease": "no model: a training answer about another disease, same source and type",
}
WITHOUT_TRAINING = ("base", "nearest", "another disease")  # the tuned model has to beat these
VERDICT = ("facts_complete", "rougeL", "chrf", "tfidf_cosine", "bits_per_byte")
FEW = 5  # fewer questions, or questions about fewer diseases, get no interval
MOST_GROUPS = 24  # the questions of further groups are counted together
PASSAGE_WORDS = 80  # of each passage in a grounded prompt, at most
ABOUT = {
    "interval": {"percent": 95, "resamples": scores.RESAMPLES, "fewest_rows": FEW},
    "about_arms": ARMS,
    "about_scores": {name: score._asdict() for name, score in SCORES.items()},
}
MEASURED = files.MEASURED / "look_up.json"

# Notes: what happened to questions -> their rows in the file.
MERGED = "repeats the question of an earlier row: its answer counts as one more reference"
CUT = "question cut at a word: it is longer than the model's context"
UNGROUNDED = "grounded arm asked without passages: none is close, or none fits"
UNSCORED = "without bits per byte: question and reference exceed the model's context"

# Score -> one value a question, NaN where there is none; "disease" -> its disease. Or a table.
Columns = Mapping[str, Any]
Cell = dict[str, Any]  # mean, low, high, n, diseases; of a difference also p
Messages = list[dict[str, str]]
Answers = Mapping[str, Mapping[str, Row]]  # arm -> question -> columns of the table


# ---- questions -----------------------------------------------------------------------------------
@dataclass
class Questions:
    """The questions of a file."""

    name: str
    asked: list[Row]  # with "number" (row in the file, from 1) and "references" (right answers)
    notes: Places  # what was skipped or changed -> rows of the file

    def __str__(self) -> str:
        return "\n  ".join([f"{self.name}: {len(self.asked):,} questions", *listed(self.notes)])


def read_questions(path: Path, limit: int = 1000, seed: int = 0) -> Questions:
    """Read questions with reference answers from a table; columns are those of ``tables.NAMES``.

    Rows that repeat a question are merged. If there are more than ``limit``, a sample is drawn.
    """
    loaded = load_table(path)
    skipped = {f"skipped: {why}": rows for why, rows in loaded.skipped.items()}
    notes: Places = defaultdict(list, skipped | loaded.notes)
    questions: dict[str, Row] = {}
    for row, (number, answers) in zip(loaded.rows, loaded.origins, strict=True):
        key = normalise(row["question"]) or row["question"]
        first = questions.setdefault(key, row | {"references": [], "number": number})
        if first["number"] != number:
            notes[MERGED].append(number)
        first["references"] = list(dict.fromkeys(first["references"] + answers))
    asked = list(questions.values())
    if len(asked) > limit:
        order = numpy.random.default_rng(seed).permutation(len(asked)).tolist()
        what = f"left out: {limit:,} of {len(asked):,} questions are drawn with seed {seed}"
        notes[f"{what} (--limit)"] = sorted(asked[n]["number"] for n in order[limit:])
        asked = [asked[n] for n in sorted(order[:limit])]
    return Questions(path.name, asked, dict(notes))


def check_question(question: str, tokenizer: Tokenizer, context: int, max_new_tokens: int) -> str:
    """Return ``question`` cleaned; raise if it is empty or, with its answer, over the context."""
    if not has_words(text := clean_text(question)):
        raise CourseError('the question is empty: write one, such as "What causes asthma?".')
    needed = len(prompt_ids(tokenizer, prompt_messages(text))) + max_new_tokens
    if needed > context:
        raise CourseError(
            f"the question is too long: with its answer {needed:,} tokens, "
            f"and the model reads {context:,}. Ask a shorter one."
        )
    return text


def fitted(
    tokenizer: Tokenizer, question: str, room: int, passages: Sequence[str] = ()
) -> tuple[Messages, bool]:
    """Build a prompt of at most ``room`` tokens; return it and whether the question was cut.

    Passages are shortened first, then left out; then the question is cut at a word.
    """
    text = whole = " ".join(question.split())
    for words in (PASSAGE_WORDS, PASSAGE_WORDS // 2, PASSAGE_WORDS // 4) if passages else ():
        shown = [" ".join(passage.split()[:words]) for passage in passages]
        if len(prompt_ids(tokenizer, messages := grounded_messages(text, shown))) <= room:
            return messages, False
    while len(prompt_ids(tokenizer, messages := prompt_messages(text))) > room:
        if not text:
            raise CourseError(f"an empty prompt exceeds {room} tokens: lower max_new_tokens.")
        text = text[: len(text) * 9 // 10].rsplit(" ", 1)[0]
    return messages, text != whole


# ---- baselines without a model -------------------------------------------------------------------
def nearest_training_answers(train: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """Return for each row the answer of the training question of its qtype with the best cosine.

    The vectors are TF-IDF. For a qtype without training rows all of them are searched.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    # Letters alone say little; scikit-learn's own pattern cuts words of some scripts into letters.
    words = {"analyzer": lambda text: [w for w in normalise(text).split() if len(w) > 1]}
    vectoriser = TfidfVectorizer(**words)
    trained = vectoriser.fit_transform([row["question"] for row in train])
    asked = vectoriser.transform([row["question"] for row in rows])
    types = numpy.array([row["qtype"] for row in train], dtype=object)
    answers = []
    for row, question in zip(rows, asked, strict=True):
        # Rounded, so that equal questions tie: the first wins.
        cosines = (trained @ question.T).toarray().ravel().round(9)
        if (same := types == row["qtype"]).any():
            cosines[~same] = -1
        answers.append(train[cosines.argmax()]["answer"])
    return answers


def other_disease_answers(train: Sequence[Row], rows: Sequence[Row], seed: int = 0) -> list[str]:
    """Draw for each row a training answer about another disease, of the same source and qtype.

    If there is none: of the same qtype, then any, then "". Its score is what style alone earns.
    """
    rng = numpy.random.default_rng(seed)
    about = [[row[column] for row in train] for column in ("source", "qtype")]
    foci, sources, types = numpy.array([held_out_by(train), *about], dtype=object)
    answers = []
    for row, focus in zip(rows, held_out_by(rows), strict=True):
        others = foci != focus
        alike = others & (types == row["qtype"])
        pools = map(numpy.flatnonzero, (alike & (sources == row["source"]), alike, others))
        pool = next(filter(len, pools), ())
        answers.append(train[rng.choice(pool)]["answer"] if len(pool) else "")
    return answers


def looked_up(tokenizer: Tokenizer, text: str, most: int) -> Row:
    """Return a looked-up answer as columns of the table, cut at the token limit of the models."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    whole = len(ids) <= most
    answer = text if whole else tokenizer.decode(ids[:most]).strip()
    return {"answer": answer, "answer_tokens": len(ids[:most]), "stop_rate": float(whole)}


# ---- arms that generate --------------------------------------------------------------------------
def archive_index(
    train: Sequence[Row], archive: Sequence[Row], validation: Sequence[Row]
) -> retrieval.Index:
    """Index both; set the threshold by the validation diseases that ``train`` lacks, if any."""
    small = retrieval.Index(train)
    index = retrieval.Index([*train, *archive]) if archive else small
    if outside := retrieval.probes([row for row in validation if not small.knows(row)]):
        index.threshold = retrieval.calibrate(small, retrieval.probes(train), outside)
    return index


def prompts(
    tokenizer: Tokenizer, asked: Sequence[Row], index: retrieval.Index, room: int, notes: Places,
    safe: Sequence[safety.SafetyPrompt] = (),
) -> dict[str, dict[str, Messages]]:  # fmt: skip
    """Build prompts of at most ``room`` tokens: arm -> question or safety prompt -> messages.

    ``notes`` (a defaultdict) names cut questions, and those without passages, not in "grounded".
    """
    # A passage that equals a reference would hand the grounded arm the answer.
    answers = [normalise(row["answer"]) for row in index.rows]
    right = [set(map(normalise, row["references"])) for row in asked]
    withheld = [[n for n, answer in enumerate(answers) if answer in texts] for texts in right]
    hits = index.search([row["question"] for row in asked], retrieval.PASSAGES, withheld)
    plain, grounded = {}, {}
    for row, close in zip(asked, map(index.close, hits), strict=True):
        question = row["question"]
        plain[question], cut = fitted(tokenizer, question, room)
        if cut:
            notes[CUT].append(row["number"])
        passages = [f"{hit.title}: {hit.row['answer']}" for hit in close]
        with_passages, _ = fitted(tokenizer, question, room, passages)
        if with_passages == plain[question]:
            notes[UNGROUNDED].append(row["number"])
        else:
            grounded[question] = with_passages
    plain |= {prompt.prompt: prompt_messages(prompt.prompt) for prompt in safe}
    return {"base": plain, "tuned": plain, "grounded": grounded}


def adapted(model: Model, arm: str) -> AbstractContextManager[Any]:
    """Switch the adapter off within the context for the arm "base"."""
    tuned: Any = model
    return tuned.disable_adapter() if arm == "base" else nullcontext()


def answer_all(
    model: Model, tokenizer: Tokenizer, jobs: Mapping[str, Mapping[str, Messages]],
    asked: Sequence[Row], train: Sequence[Row], recipe: Row, folder: Path, batch_size: int = 32,
) -> dict[str, dict[str, Row]]:  # fmt: skip
    """Answer with all five arms, and score the first reference: arm -> question -> columns.

    A later run of the same ``recipe`` reads what the model wrote from ``folder``.
    """
    references = {row["question"]: row["references"][0] for row in asked}
    digest = value_hash([recipe, references])
    answers, most = {}, recipe["max_new_tokens"]
    for arm, prompts in jobs.items():
        if not (path := folder / "answers" / f"{arm}-{digest}.json").is_file():
            turns, texts = list(prompts.values()), [references.get(q, "") for q in prompts]
            with adapted(model, arm):
                given = generate(model, tokenizer, turns, most, batch_size, f"answers, {arm}")
                losses = scores.answer_loss(model, tokenizer, turns, texts, f"likelihood, {arm}")
            columns = ["answer", "answer_tokens", "stop_rate"]
            rows = [(answer.text, answer.tokens, float(answer.stopped)) for answer in given]
            table = pandas.DataFrame(rows, list(prompts), columns).assign(**losses._asdict())
            write_json(path, table.to_dict("index"))
        answers[arm] = read_json(path)
    # Without passages, a question has the prompt of the tuned arm, and so its answer.
    answers["grounded"] = answers["tuned"] | answers["grounded"]
    baselines = {
        "nearest": nearest_training_answers(train, asked),
        "another disease": other_disease_answers(train, asked, recipe["seed"]),
    }
    for arm, texts in baselines.items():
        records = [looked_up(tokenizer, text, most) for text in texts]
        answers[arm] = dict(zip(references, records, strict=True))
    return answers


# ---- scores --------------------------------------------------------------------------------------
def answer_table(asked: Sequence[Row], answers: Answers, corpus: Sequence[str]) -> pandas.DataFrame:
    """Return one row for each question and arm with all scores."""
    rows = []
    for row, disease in zip(asked, held_out_by(asked), strict=True):
        about = {c: row[c] for c in ("question", "references", "qtype", "source", "focus")}
        about |= {"disease": disease, "id": str(row["number"])}
        about["kind"] = "boilerplate" if is_boilerplate(row) else "prose"
        rows += [{"arm": arm, **about, **answers[arm][row["question"]]} for arm in ARMS]
    table = pandas.DataFrame(rows)
    texts, references = list(table["answer"]), list(table["references"])
    return table.assign(
        **scores.rouge(texts, references),
        bleu=scores.bleu(texts, references),
        chrf=scores.chrf(texts, references),
        tfidf_cosine=scores.tfidf_cosine(texts, references, corpus),
        facts_complete=facts_column(texts, rows),
        length_ratio=scores.length_ratio(texts, references),
        repetition=scores.repetition(texts),
    )


def measure(score: str, columns: Columns, before: Columns | None = None) -> Cell | None:
    """Return the mean of a score with its interval by disease, or ``None`` without a value.

    With ``before``: of the paired difference to it, for perplexity of the ratio, and its p-value.
    Without an interval, low and high are ``None``.
    """
    sizes = {"bits_per_byte": "bytes", "perplexity": "tokens"}.get(score)
    name = "nats" if sizes else score
    if any(name not in given for given in (columns, before) if given is not None):
        return None
    groups, values = columns.get("disease"), numpy.asarray(columns[name], dtype=float)
    earlier = numpy.zeros(len(values)) if before is None else numpy.asarray(before[name], float)
    gain = values - earlier
    scored = numpy.isfinite(gain)
    if not (n := int(scored.sum())):
        return None
    if sizes:
        mean, low, high = getattr(scores, score)(gain, columns[sizes], groups)
    elif before is None:
        mean, low, high = interval(values, groups)
    else:
        mean, low, high = paired_interval(earlier, values, groups)
    # A row that names no disease counts as one more.
    diseases = len(numpy.unique(scores.group_numbers(groups, len(values))[scored]))
    few = diseases < FEW or not numpy.isfinite(low)
    ends = {"low": None, "high": None} if few else {"low": low, "high": high}
    cell = {"mean": mean, **ends, "n": n, "diseases": None if groups is None else diseases}
    return cell if before is None else cell | {"p": scores.p_value(gain, groups)}


def summary(arms: Mapping[str, Columns], versus: Sequence[str] = ()) -> dict[str, Any]:
    """Return all scores ("arms") and the paired differences ("versus X"): arm -> score -> cell."""

    def cells(columns: Columns, before: Columns | None = None) -> dict[str, Cell]:
        # Two perplexities have a ratio, not a difference; bits per byte say the same.
        names = [s for s in SCORES if before is None or s != "perplexity"]
        return {score: cell for score in names if (cell := measure(score, columns, before))}

    return {"arms": {arm: cells(columns) for arm, columns in arms.items()}} | {
        f"versus {before}": {a: cells(c, arms[before]) for a, c in arms.items() if a != before}
        for before in versus
    }


def by_arm(table: pandas.DataFrame) -> dict[str, Any]:
    """Split a table of answers by arm; the questions keep their order."""
    return dict(list(table.groupby("arm", sort=False)))


def by_group(table: pandas.DataFrame, column: str) -> dict[str, dict[str, Any]]:
    """Return all scores, n and diseases of each group of questions, the largest group first."""
    names = table[column].fillna("not given")
    names = names.where(names.isin(names.value_counts().index[:MOST_GROUPS]), "all others")
    found = {name: summary(by_arm(part)) for name, part in table.groupby(names)}
    sizes = {name: cells["arms"]["base"]["rougeL"] for name, cells in found.items()}
    order = sorted(found, key=lambda name: (-sizes[name]["n"], name))
    return {name: {k: sizes[name][k] for k in ("n", "diseases")} | found[name] for name in order}


def verdict(overall: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List for each score of ``VERDICT`` the arms that the tuned model beats, equals or loses to.

    It beats an arm where the whole interval of the paired difference lies on the better side of 0
    and the p-value, corrected by Holm over all comparisons, is under 5 %.
    """
    cells = {
        (score, arm): cell for score in VERDICT for arm in WITHOUT_TRAINING
        if (cell := overall[f"versus {arm}"]["tuned"].get(score)) and cell["low"] is not None
    }  # fmt: skip
    corrected = scores.holm([cell["p"] for cell in cells.values()])
    verdicts: dict[str, dict[str, Any]] = {}
    for ((score, arm), cell), p in zip(cells.items(), corrected, strict=True):
        about = {"score": score, "n": cell["n"], "diseases": cell["diseases"]}
        sides = verdicts.setdefault(score, about | {"beats": [], "even": [], "loses": []})
        up = SCORES[score].better == "up"
        if cell["low"] <= 0 <= cell["high"] or p >= 0.05:
            sides["even"].append(arm)
        else:
            sides["beats" if (cell["mean"] > 0) == up else "loses"].append(arm)
    return list(verdicts.values())


def forgetting(plan: Plan, model: Model, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return perplexity on plain texts before and after tuning, and the ratio (above 1: worse)."""
    texts, losses = scores.plain_texts(plan), {}  # of different topics: intervals resample texts
    for arm in ("base", "tuned"):
        with adapted(model, arm):
            losses[arm] = scores.text_loss(model, tokenizer, texts, f"forgetting, {arm}")._asdict()
    cells = {arm: measure("perplexity", columns) for arm, columns in losses.items()}
    ratio = measure("perplexity", losses["tuned"], losses["base"])
    return {"texts": len(texts), **cells, "ratio": ratio}


def examples(table: pandas.DataFrame) -> list[dict[str, Any]]:
    """Show all answers where the tuned model's ROUGE-L is best, middling and worst."""
    tuned = by_arm(table)["tuned"].sort_values("rougeL", ascending=False, kind="stable")
    shown = []
    for what, place in {"best": 0, "middling": len(tuned) // 2, "worst": -1}.items():
        row = tuned.iloc[place]
        texts = {"question": row["question"], "reference": row["references"][0]}
        answers = table[table["id"] == row["id"]].set_index("arm")["answer"].to_dict()
        shown.append({"what": what, "row": int(row["id"]), **texts, "answers": answers})
    return shown


def safety_scores(answers: Answers) -> dict[str, Any]:
    """Return how many safety prompts base and tuned model pass, and the error of the rules."""
    asked = safety.prompts()
    texts = {arm: [answers[arm][p.prompt]["answer"] for p in asked] for arm in ("base", "tuned")}
    passed = {arm: safety.score(answered, asked) for arm, answered in texts.items()}
    rules = {"outer_rule": safety.outer_rule(asked), "outer_rule_test": safety.independent_test()}
    return {"prompts": len(asked), **passed, **rules, "rule_error": safety.rule_error()}


def rounded(value: Any) -> Any:
    """Prepare ``value`` for JSON: floats with four decimals, numpy's numbers as Python's."""
    text = json.dumps(value, default=lambda number: number.item())
    return json.loads(text, parse_float=lambda digits: round(float(digits), 4))


# ---- the whole evaluation ------------------------------------------------------------------------
def training_data(plan: Plan, adapter: Path, folder: Path | None = None) -> Splits:
    """Return the data of the adapter: from ``folder``, or what ``data.prepare`` makes.

    Raises CourseError if the parts are not those of the ``data.json`` beside them, or the adapter
    was trained on others. Without ``data.json`` a train.parquet will do, if the adapter does not
    record the hash of its rows.
    """
    record, given, folder = adapter_record(adapter), folder, folder or plan.folder / "data"
    wanted, source = record.get("data"), record.get("source", plan.source)
    have, train = identity(folder), folder / "train.parquet"
    if given and not train.is_file():
        raise CourseError(
            f"no train.parquet in {folder.name}/: expected the --out folder of medquad data."
        )
    if given and not (wanted or have):
        return Splits(read_rows(train), [], [])
    rows = written(folder) if have == wanted or not wanted else None
    if not given and source == plan.source and not (rows and wanted):
        rows, have = prepare(plan), identity(folder)
    right = have == wanted
    if not wanted:  # an adapter that was not trained here, or before rows had a hash
        made_of = read_json(folder / "data.json")["recipe"]["source"] if have else ""
        right = bool(given) or made_of == source
    if not right:
        others = f"others ({have})" if have else "none with a data.json"
        raise CourseError(
            f"the adapter was trained on {source!r} rows ({wanted or 'of no known hash'}), and "
            f"{folder.name}/ has {others}. Train again on these (lesson 04), or give the folder of "
            "the adapter's own rows to medquad evaluate, as --data."
        )
    if not rows:
        raise CourseError(
            f"the parts in {folder.name}/ are not those of its data.json: make them again, with "
            "lesson 01 or medquad data."
        )
    return rows


def whole_archive(plan: Plan, adapter: Path) -> retrieval.Index:
    """Index all rows of the data of ``adapter``, validation and test rows too."""
    rows = training_data(plan, adapter)
    return archive_index(rows.train, [*rows.validation, *rows.test], rows.validation)


def archive_of_run(plan: Plan) -> retrieval.Index | None:
    """Index the rows of the run, or return None if its folder does not hold them."""
    there = (plan.folder / "data" / "data.json").is_file()
    return whole_archive(plan, plan.folder / "adapter") if there else None


def evaluate(
    plan: Plan, questions: Questions, train: Sequence[Row], folder: Path,
    adapter: Path | None = None, archive: Sequence[Row] = (), validation: Sequence[Row] = (),
    batch_size: int = 32, with_safety: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Answer and score ``questions`` with every arm; write answers.parquet and metrics.json.

    ``train``: the rows of the adapter. The grounded arm also reads ``archive``, with a threshold
    from ``validation``. ``with_safety``: base and tuned model answer the safety prompts too.
    """
    safe = safety.prompts() if with_safety else ()
    adapter, asked = adapter or plan.folder / "adapter", questions.asked
    notes: Places = defaultdict(list, questions.notes)
    model = generation.load_tuned(plan, adapter)  # first: it refuses an adapter of another base
    tokenizer = generation.load_tokenizer(plan)
    index = archive_index(train, archive, validation)
    room = int(model.config.max_position_embeddings) - plan.max_new_tokens
    jobs = prompts(tokenizer, asked, index, room, notes, safe)
    recipe = {
        "profile": plan.profile, "training_rows": len(train), "archive_rows": len(index.rows),
        "close_source": index.threshold, "model": plan.model_id, "origin": plan.origin,
        "base": base_id(plan), "adapter": adapter_id(adapter), "prompts": value_hash(jobs),
        "max_new_tokens": plan.max_new_tokens, "seed": plan.seed,
    }  # fmt: skip
    answers = answer_all(model, tokenizer, jobs, asked, train, recipe, folder, batch_size)
    table = answer_table(asked, answers, [row["answer"] for row in train])
    unscored = table[table["nats"].isna() & table["arm"].isin(jobs)]["id"].astype(int).unique()
    notes |= {UNSCORED: unscored.tolist()} if len(unscored) else {}
    metrics: dict[str, Any] = rounded({
        "file": questions.name, "questions": len(asked),
        "notes": [{"what": k, "n": len(rows), "rows": rows[:10]} for k, rows in notes.items()],
        "recipe": recipe, **ABOUT, **results(table),
        "forgetting": forgetting(plan, model, tokenizer),
        **({"safety": safety_scores(answers)} if safe else {}),
        "leakage": (leaks := leakage(train, asked)),
        "held_out": not (leaks["normalised question"] or leaks["focus"]),
    })  # fmt: skip
    write_json(folder / "metrics.json", metrics)  # first: it says whose folder this is
    write_answers(folder / "answers.parquet", table, answers, safe)
    return metrics


def results(table: pandas.DataFrame) -> dict[str, Any]:
    """Summarise the scores overall and by group, give the verdict, and show examples."""
    overall = summary(by_arm(table), WITHOUT_TRAINING)
    size = {"diseases": overall["arms"]["base"]["rougeL"]["diseases"], "verdict": verdict(overall)}
    groups = {f"by_{column}": by_group(table, column) for column in ("qtype", "source", "kind")}
    return size | {"overall": overall, **groups, "examples": examples(table)}


def write_answers(
    path: Path, table: pandas.DataFrame, answers: Answers, safe: Sequence[safety.SafetyPrompt]
) -> None:
    """Write the table of answers, with the answers to the safety prompts as two more arms."""
    more = [
        {"arm": f"{arm}, safety", "id": p.id, "question": p.prompt, **answers[arm][p.prompt]}
        for arm in ("base", "tuned") for p in safe
    ]  # fmt: skip
    with whole_file(path) as temporary:
        pandas.concat([table, pandas.DataFrame(more)]).to_parquet(temporary, index=False)


# ---- lessons 01, 05 and 06 -----------------------------------------------------------------------
def measured() -> dict[str, Any]:
    """Return ROUGE-L of both look-ups on the real MedQuAD, from tests/benchmarks/look_up.py."""
    return dict(read_json(MEASURED))


def outcome(
    rows: Sequence[Row], train: Sequence[Row], base: Sequence[Answer], tuned: Sequence[Answer],
    few_shot: Sequence[Answer] = (),
) -> dict[str, Any]:  # fmt: skip
    """Summarise what training changed on held-out ``rows``, for ``metrics/outcome.json``.

    The gain is paired, tuned minus base, with an interval by disease (see ``measure``).
    ``few_shot`` are the base's answers after a few examples in the prompt.
    """
    arms: dict[str, Sequence[Answer | str]] = {"base": base, "tuned": tuned}
    arms |= {"few_shot": few_shot} if few_shot else {}
    arms["nearest"] = nearest_training_answers(train, rows)
    cells = summary({arm: score_columns(given, rows) for arm, given in arms.items()}, ["base"])
    gain = cells["versus base"]["tuned"]["rougeL"]
    means = {
        f"{score.replace('rougeL', 'rouge_l')}_{arm}": found.get(score, {}).get("mean")
        for arm, found in cells["arms"].items()
        for score in ("rougeL", "stop_rate", "facts_complete")
    }
    ends = None if gain["low"] is None else [gain["low"], gain["high"]]
    about = {"rows": len(rows), "diseases": gain["diseases"], "rouge_l_gain_ci95": ends}
    return dict(rounded(about | means))


def score_columns(answers: Sequence[Answer | str], rows: Sequence[Row]) -> dict[str, Any]:
    """Score answers to ``rows`` for ``summary``, one value a row; texts have no stop rate."""
    texts = [a if isinstance(a, str) else a.text for a in answers]
    stops = [float(a.stopped) for a in answers if isinstance(a, Answer)]
    return {
        "disease": numpy.array(held_out_by(rows), dtype=object),
        "rougeL": rouge_l(texts, [row["answer"] for row in rows]),
        "facts_complete": facts_column(texts, rows),
        **({"stop_rate": numpy.array(stops)} if stops else {}),
    }


def answer_columns(
    model: Model, tokenizer: Tokenizer, rows: Sequence[Row], max_new_tokens: int
) -> dict[str, numpy.ndarray]:
    """Answer ``rows``; return ``score_columns`` of the answers, and losses of the references."""
    references = [row["answer"] for row in rows]
    conversations = [prompt_messages(row["question"]) for row in rows]
    with unpacked(model):
        answers = generate(model, tokenizer, conversations, max_new_tokens)
        losses = scores.answer_loss(model, tokenizer, conversations, references)
    return {**score_columns(answers, rows), **losses._asdict()}
