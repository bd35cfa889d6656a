"""Who answers the questions of an evaluation: the model before and after training, and three arms to compare it with.

Every arm has the same limit of tokens. Generated answers are on the disk batch by batch: a run that was killed goes on where it
stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from medquad_utils import CourseError, retrieval, safety
from medquad_utils.chat import prompt_messages
from medquad_utils.cleaning import is_boilerplate
from medquad_utils.files import Row, whole_file
from medquad_utils.generation import Answer, base_id, generate_batches
from medquad_utils.profiles import Plan
from medquad_utils.questions import Question, fitted
from medquad_utils.splits import focus_of, normalise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ARMS = {
    "base": "the model before training",
    "tuned": "the model with its adapter",
    "grounded": "the tuned model with passages from the archive before the question; without any where none is close",
    "nearest": "no model: the training answer whose question, of the same type, is most alike",
    "another disease": "no model: a training answer about another disease, of the same source and type",
}
PASSAGES = 3  # in a grounded prompt, at most

CUT = "question cut at a word: it is longer than the model's context"
UNGROUNDED = f"grounded arm asked without passages: {retrieval.NO_SOURCE}"
NOBODY = "no training answer about another disease: that arm's answer is empty"

Messages = list[dict[str, str]]

# ---- arms that need no model ----------------------------------------------------------------------------------------


def nearest_training_answers(train: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """What a look-up would say: for each row the answer of the most alike training question of the same qtype.

    Alike: the cosine of the questions' TF-IDF vectors (scikit-learn's defaults); of equals the first. A qtype that training
    lacks is looked up among all rows.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectoriser = TfidfVectorizer()
    known = vectoriser.fit_transform([row["question"] for row in train])
    asked = vectoriser.transform([row["question"] for row in rows])
    of_type, wanted = numbers_by(train, "qtype"), numbers_by(rows, "qtype")
    nearest = [0] * len(rows)
    for qtype, places in wanted.items():
        candidates = of_type.get(qtype) or list(range(len(train)))
        for start in range(0, len(places), 256):  # a part at a time: the table of cosines is dense
            part = places[start : start + 256]
            alike = (
                (asked[part] @ known[candidates].T).toarray().round(9)
            )  # rounded, so that equals are equal
            for place, best in zip(part, alike.argmax(axis=1), strict=True):
                nearest[place] = candidates[best]
    return [train[number]["answer"] for number in nearest]


def other_disease_answers(train: Sequence[Row], rows: Sequence[Row], seed: int = 0) -> list[str]:
    """For each row a training answer about another disease, drawn among those of the same source and qtype.

    Where there is none: of the same qtype, then any; "" where training knows no other disease at all. What such answers score
    is the style that all answers share: nothing in them is about the question.
    """
    rng = numpy.random.default_rng(seed)
    foci = [focus_of(row) for row in train]
    of_both, of_type = numbers_by(train, "source", "qtype"), numbers_by(train, "qtype")
    answers = []
    for row in rows:
        focus = focus_of(row)
        pools = (
            of_both.get((row["source"], row["qtype"]), []),
            of_type.get(row["qtype"], []),
            range(len(train)),
        )
        others = next(filter(None, ([n for n in pool if foci[n] != focus] for pool in pools)), None)
        answers.append(train[rng.choice(others)]["answer"] if others else "")
    return answers


def numbers_by(rows: Sequence[Row], *columns: str) -> dict[Any, list[int]]:
    """Value, or tuple of values, of ``columns`` -> the numbers of the rows that have it."""
    found: dict[Any, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        values = tuple(row[column] for column in columns)
        found[values if len(values) > 1 else values[0]].append(number)
    return dict(found)


def cut_answer(tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> Answer:
    """A looked-up text under the limit that the models have."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return Answer(
        text if len(ids) <= most else tokenizer.decode(ids[:most]).strip(),
        min(len(ids), most),
        len(ids) <= most,
    )


# ---- arms that generate, their answers saved as they come ------------------------------------------------------------


def archive_index(
    train: Sequence[Row], archive: Sequence[Row], validation: Sequence[Row]
) -> retrieval.Index:
    """An index of ``train`` and ``archive`` whose threshold is fixed on ``validation``: its diseases are those that ``train`` lacks.

    Without a validation row about another disease the threshold is the one of the full MedQuAD.
    """
    index = small = retrieval.Index(train)
    if archive:
        index = retrieval.Index([*train, *archive])
    if outside := retrieval.probes([row for row in validation if not small.knows(row)]):
        index.threshold = retrieval.calibrate(small, retrieval.probes(train), outside)
    return index


def prompts(
    plan: Plan, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Question], index: retrieval.Index,
    notes: dict[str, list[int]],
) -> dict[str, dict[str, Messages]]:  # fmt: skip
    """What is to be generated, arm -> id -> messages; what had to be cut or found no source goes to ``notes``.

    The grounded arm has only the questions for which a source was found: the others' prompts would be the tuned arm's.
    """
    room = int(model.config.max_position_embeddings) - plan.max_new_tokens
    same = numbers_by([{"answer": normalise(row["answer"])} for row in index.rows], "answer")
    withheld = [{n for text in q.references for n in same.get(normalise(text), ())} for q in asked]
    found = [
        index.close(hits) for hits in index.search([q.question for q in asked], PASSAGES, withheld)
    ]
    plain, grounded = {}, {}
    for q, hits in zip(asked, found, strict=True):
        plain[str(q.number)], cut = fitted(tokenizer, q.question, room)
        if cut:
            notes.setdefault(CUT, []).append(q.number)
        if hits:
            passages = [f"{hit.title}: {hit.row['answer']}" for hit in hits]
            grounded[str(q.number)] = fitted(tokenizer, q.question, room, passages)[0]
        else:
            notes.setdefault(UNGROUNDED, []).append(q.number)
    safe = {prompt.id: prompt_messages(prompt.prompt) for prompt in safety.prompts()}
    return {
        "base": plain,
        "tuned": plain,
        "grounded": grounded,
        "base, safety": safe,
        "tuned, safety": safe,
    }


def recipe_of(plan: Plan, adapter: Path, jobs: Mapping[str, Any]) -> dict[str, Any]:
    """What decides every generated answer; the prompts hold the questions and the passages."""

    def digest(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()[:16]

    return {
        "model": plan.model_id,
        "base": base_id(plan),
        "adapter": digest((adapter / "adapter_model.safetensors").read_bytes()),
        "prompts": digest(json.dumps(jobs).encode()),
        "max_new_tokens": plan.max_new_tokens,
        "seed": plan.seed,
    }


class Journal:
    """Answers on disk as they come, one line a batch, the recipe in the first line; ``done`` maps an arm to its answers by id.

    A line that a kill tore off is dropped. A journal of another recipe is set aside as ``<name>.old``.
    """

    def __init__(
        self, path: Path, recipe: Mapping[str, Any], report: Callable[[str], None] = print
    ):
        self.path, self.recipe = path, dict(recipe)
        self.done: dict[str, dict[str, Answer]] = defaultdict(dict)
        lines = self._lines()
        if lines and lines[0] != self.recipe:
            differs = ", ".join(k for k in recipe if lines[0].get(k) != recipe[k])
            report(
                f"{path.name} is of another run ({differs} differ): set aside as {path.name}.old."
            )
            path.replace(path.with_name(f"{path.name}.old"))
            lines = []
        with whole_file(
            path
        ) as temporary:  # rewritten without a torn line, to which the next one would stick
            temporary.write_text(
                "".join(f"{json.dumps(line)}\n" for line in (recipe, *lines[1:])), encoding="utf-8"
            )
        for line in lines[1:]:
            self.done[line["arm"]] |= {
                key: Answer(*values) for key, values in line["answers"].items()
            }

    def _lines(self) -> list[dict[str, Any]]:
        lines = []
        for text in self.path.read_bytes().split(b"\n") if self.path.is_file() else ():
            try:
                lines.append(dict(json.loads(text)))
            except (ValueError, TypeError):
                break
        return lines

    def add(self, arm: str, answers: Mapping[str, Answer]) -> None:
        """Append a batch; it is on the disk when this returns.

        Raises:
            CourseError: the disk is full.
        """
        self.done[arm] |= answers
        line = {
            "arm": arm,
            "answers": {key: [a.text, a.tokens, a.stopped] for key, a in answers.items()},
        }
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(line)}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            advice = "Free some space and run again: it goes on from here."
            raise CourseError(
                f"cannot write {self.path.name}: {error.strerror}. {advice}"
            ) from error


def adapted(model: PreTrainedModel, arm: str) -> AbstractContextManager[Any]:
    """The context in which ``model`` is what ``arm`` asks: without its adapter for the base."""
    context: AbstractContextManager[Any] = (
        model.disable_adapter() if arm.startswith("base") else nullcontext()
    )  # type: ignore[operator]
    return context


def generate_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Mapping[str, Mapping[str, Messages]],
    max_new_tokens: int,
    journal: Journal,
    batch_size: int = 32,
) -> dict[str, dict[str, Answer]]:
    """Answer ``jobs`` (arm -> id -> messages), but for what the journal already holds; arm -> id -> answer."""
    for arm, conversations in jobs.items():
        left = [key for key in conversations if key not in journal.done[arm]]
        with adapted(model, arm):
            asked = [conversations[key] for key in left]
            for batch in (
                generate_batches(model, tokenizer, asked, max_new_tokens, batch_size, arm)
                if left
                else ()
            ):
                journal.add(arm, {left[number]: answer for number, answer in batch.items()})
    return journal.done


# ---- the table of all answers ----------------------------------------------------------------------------------------


def write_answers(
    path: Path, recipe: Mapping[str, Any], asked: Sequence[Question], answers: Mapping[str, Sequence[Answer]],
    arms: Mapping[str, Mapping[str, numpy.ndarray]], others: Mapping[str, Mapping[str, Answer]],
) -> None:  # fmt: skip
    """Write one row a question and arm with its scores, and the answers to the safety prompts; the recipe is in the metadata."""
    import pyarrow
    import pyarrow.parquet

    def row(key: str, arm: str, answer: Answer, more: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "id": key,
            "arm": arm,
            "answer": answer.text,
            "tokens": answer.tokens,
            "stopped": answer.stopped,
            **more,
        }

    names = list(
        dict.fromkeys(
            name
            for columns in arms.values()
            for name in columns
            if name not in ("stop_rate", "tokens")
        )
    )
    rows = []
    for place, q in enumerate(asked):
        about: dict[str, Any] = {
            "question": q.question,
            "references": list(q.references),
            "qtype": q.qtype,
            "source": q.source,
            "focus": q.focus,
        }
        about["boilerplate"] = is_boilerplate(q.row)
        for arm, given in answers.items():
            scored = {name: float(arms[arm][name][place]) for name in names if name in arms[arm]}
            rows.append(
                row(
                    str(q.number),
                    arm,
                    given[place],
                    about | {k: None if v != v else v for k, v in scored.items()},
                )
            )
    asks = {prompt.id: prompt.prompt for prompt in safety.prompts()}
    rows += [
        row(key, arm, answer, {"question": asks[key]})
        for arm, given in others.items()
        for key, answer in given.items()
    ]
    text, number, flag = pyarrow.string(), pyarrow.float64(), pyarrow.bool_()
    fields = [("id", text), ("arm", text), ("question", text), ("answer", text), ("tokens", pyarrow.int64()), ("stopped", flag),
              ("references", pyarrow.list_(text)), ("qtype", text), ("source", text), ("focus", text), ("boilerplate", flag),
              *((name, number) for name in names)]  # fmt: skip
    schema = pyarrow.schema(fields, metadata={"recipe": json.dumps(recipe)})
    with whole_file(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), temporary)


def finished(path: Path, recipe: Mapping[str, Any]) -> dict[str, dict[str, Answer]]:
    """The answers of ``write_answers``, arm -> id -> answer; nothing if there are none, or they are of another recipe."""
    import pyarrow.lib
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.lib.ArrowInvalid):
        return {}
    if json.loads((table.schema.metadata or {}).get(b"recipe", b"{}")) != recipe:
        return {}
    answers: dict[str, dict[str, Answer]] = defaultdict(dict)
    for row in table.select(["arm", "id", "answer", "tokens", "stopped"]).to_pylist():
        answers[row["arm"]][row["id"]] = Answer(row["answer"], row["tokens"], row["stopped"])
    return answers
