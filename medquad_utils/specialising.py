"""Adapters for a sub-corpus: its rows apart from the rest, general rows mixed in, and what was gained and forgotten.

Every adapter is trained on top of the base or of an earlier adapter and kept in ``runs/<profile>/specialties/<name>``.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from medquad_utils import CourseError, scores, training
from medquad_utils.chat import encode, prompt_messages
from medquad_utils.data import Specialty, select
from medquad_utils.evaluation import FEW, Columns
from medquad_utils.files import Row, write_json
from medquad_utils.generation import (
    ask,
    base_id,
    load_adapters,
    load_base,
    load_tokenizer,
    unpacked,
)
from medquad_utils.profiles import Plan
from medquad_utils.splits import Splits, draw

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Parts:
    """A split seen from one specialty: ``own`` and ``general`` rows to train on, held-out rows ``inside`` and ``outside`` of it."""

    own: list[Row]
    general: list[Row]
    inside: list[Row]
    outside: list[Row]

    def sizes(self) -> dict[str, int]:
        """Rows in each part."""
        return {name: len(rows) for name, rows in vars(self).items()}


def parts(
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    specialty: str | Specialty,
    least: int = 50,
) -> Parts:
    """The rows of ``splits`` in and outside of a specialty, those that fit into ``max_length``.

    As many as the plan says; of its own rows at most half as many: every one is seen by several runs.
    The split by disease stays: training rows come from the training part. Nothing is chosen by the validation rows here, so they
    are held out as well as the test rows, and a small field has more questions to be judged by.

    Raises:
        CourseError: no such specialty; fewer than ``least`` rows of it to train on, or than ``evaluation.FEW`` held out.
    """

    def drawn(rows: Sequence[Row], most: int) -> list[Row]:
        return draw(
            rows, most, plan.seed, lambda row: len(encode(tokenizer, row).ids) <= plan.max_length
        )

    own, held_out = select(splits.train, specialty, least), splits.validation + splits.test
    inside = select(held_out, specialty, 0)
    chosen = {id(row) for row in own + inside}
    general, outside = (
        [row for row in rows if id(row) not in chosen] for rows in (splits.train, held_out)
    )
    found = Parts(
        drawn(own, -(-plan.rows // 2)),
        drawn(general, plan.rows),
        drawn(inside, plan.eval_rows),
        drawn(outside, plan.eval_rows),
    )
    needed = {"own": 1, "general": 1, "inside": FEW, "outside": FEW}
    if short := [
        f"{len(getattr(found, part))} rows {part} (at least {n})"
        for part, n in needed.items()
        if len(getattr(found, part)) < n
    ]:
        name = specialty if isinstance(specialty, str) else specialty.names
        raise CourseError(
            f"{name!r} leaves too few rows that fit into {plan.max_length} tokens: {', '.join(short)}; inside and outside are held out. "
            "Choose another specialty, load more rows, or take another seed."
        )
    return found


def mixed(own: Sequence[Row], general: Sequence[Row], share: float, seed: int = 0) -> list[Row]:
    """All ``own`` rows and as many ``general`` ones, drawn, as make up ``share`` (0 to 1) of the whole.

    Raises:
        CourseError: a share outside of [0, 1), or more general rows than there are.
    """
    if not 0 <= share < 1:
        raise CourseError(
            f"a mixing share of {share} is none: expected 0 (the sub-corpus alone) or more, and less than 1."
        )
    count = round(len(own) * share / (1 - share))
    if count > len(general):
        most = len(general) / (len(general) + len(own))
        raise CourseError(
            f"a share of {share} takes {count} general rows, and there are {len(general)}: choose up to {most:.2f}."
        )
    return draw([*own, *(draw(general, count, seed) if count else ())], 0, seed)


def ensure(
    plan: Plan, name: str, rows: Sequence[Row], start: Path | None = None, **settings: Any
) -> Path:
    """The adapter ``runs/<profile>/specialties/<name>``: as it is there, or trained now on ``rows``.

    Training goes on from the adapter in ``start``, or begins afresh on the base; ``settings`` replace fields of the ``SFTConfig``.
    What is there is used if plan, rows, start and settings are the same. A run that was cut off goes on from its last checkpoint.
    ``max_steps`` is a limit here: it never makes a run longer than its epochs.

    Raises:
        CourseError: an adapter of another base, a pre-flight check that fails, an adapter that does not learn, a full disk.
    """
    folder = plan.folder / "specialties" / name
    work = folder.with_name(f".{name}.checkpoints")
    recipe = _recipe(plan, rows, start, settings)
    if (folder / "adapter_model.safetensors").is_file() and _recorded(folder / "plan.json").get(
        "recipe"
    ) == recipe:
        return folder
    if _recorded(work / "recipe.json") != recipe:
        shutil.rmtree(work, ignore_errors=True)
    write_json(work / "recipe.json", recipe)
    tokenizer = load_tokenizer(plan)
    model = load_adapters(plan, {"default": start}, trainable=True) if start else load_base(plan)
    quiet = {
        "eval_strategy": "no",
        "save_strategy": "no",
    }  # ten checkpoints are made all the same, see training.watch
    trainer = training.build_trainer(
        plan, model, tokenizer, Splits(list(rows), [], []), work, **quiet | settings
    )
    training.require(training.preflight(plan, tokenizer, rows, trainer))
    if trainer.args.max_steps > 0:
        whole = math.ceil(
            len(trainer.train_dataset) / plan.accumulation * trainer.args.num_train_epochs
        )
        trainer.args.max_steps = min(whole, trainer.args.max_steps)
    checkpoint = training.last_checkpoint(work)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    training.require_learning(trainer.model)
    losses = [
        (entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry
    ]
    more = {"recipe": recipe, "steps": trainer.state.global_step, "losses": losses}
    training.save_adapter(plan, trainer, folder=folder, more=more)
    shutil.rmtree(work, ignore_errors=True)
    return folder


def _recipe(
    plan: Plan, rows: Sequence[Row], start: Path | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What decides an adapter: the plan but for the machine, the rows in their order, what it starts from, the settings."""
    text = json.dumps([[row["question"], row["answer"]] for row in rows])
    weights = (start / "adapter_model.safetensors").read_bytes() if start else b""
    return {
        "plan": {
            name: value for name, value in plan.as_dict().items() if name not in training.OF_MACHINE
        },
        "base": base_id(plan),
        "rows": [len(rows), hashlib.sha256(text.encode()).hexdigest()[:16]],
        "start": hashlib.sha256(weights).hexdigest()[:16] if start else "base",
        "settings": dict(settings),
    }


def _recorded(file: Path) -> dict[str, Any]:
    """A JSON object from ``file``; an empty one where there is none, or half of one."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def answer_columns(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_new_tokens: int,
) -> Columns:
    """Answer ``rows`` and score them for ``evaluation.summary``: one value a row of each score, NaN where there is none.

    ROUGE-L, whether all facts are said (embedded sample only), whether the answer stopped, and how likely the model finds the
    reference (nats, tokens, bytes).
    """
    references = [row["answer"] for row in rows]
    with unpacked(model):
        answers = ask(model, tokenizer, [row["question"] for row in rows], max_new_tokens)
        losses = scores.answer_loss(
            model, tokenizer, [prompt_messages(row["question"]) for row in rows], references
        )
    texts = [answer.text for answer in answers]
    complete = [scores.facts_complete([text], [row]) for text, row in zip(texts, rows, strict=True)]
    return {
        "rougeL": scores.rouge_l(texts, references),
        "facts_complete": numpy.array(
            [found[0] if len(found) else numpy.nan for found in complete], dtype=float
        ),
        "stop_rate": numpy.array([answer.stopped for answer in answers], dtype=float),
        **losses._asdict(),
    }
