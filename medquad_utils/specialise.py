"""Train further adapters: on one field of medicine, mixed with others, or from another adapter.

Lessons 07 and 09. Each adapter lies in ``runs/<profile>/specialties/`` and is trained once.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medquad_utils import CourseError, generation, preflight, training
from medquad_utils.adapters import adapter_id, adapter_record
from medquad_utils.files import Row, value_hash, write_json
from medquad_utils.profiles import Plan
from medquad_utils.specialties import SPECIALTIES, select
from medquad_utils.splits import Splits, draw

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer
    from trl import SFTTrainer

HELD_OUT = 5  # rows: evaluation gives no interval for fewer
ONE_IN = 6  # lesson 09 trains often: it takes one in six of the plan's rows, on each side


class Parts(NamedTuple):
    """A split by specialty: training rows in it and not in it, held-out rows likewise."""

    own: list[Row]
    general: list[Row]
    inside: list[Row]
    outside: list[Row]

    def sizes(self) -> dict[str, int]:
        """Rows in each part."""
        return {name: len(rows) for name, rows in self._asdict().items()}


def parts(plan: Plan, tokenizer: Tokenizer, splits: Splits, specialty: str) -> Parts:
    """Divide ``splits`` into rows inside and outside of a specialty, drawn as the plan says.

    Validation rows select nothing here, so they are held-out rows as well as the test rows. Too few
    rows of either kind raise a CourseError.
    """
    own, field = select(splits.train, specialty), SPECIALTIES[specialty]
    held_out = splits.validation + splits.test
    draw_rows = partial(training.draw_fitting, plan, tokenizer)
    most = math.ceil(plan.rows / ONE_IN)  # 0 stays 0: all rows
    divided = Parts(
        own=draw_rows(own, most),
        general=draw_rows([row for row in splits.train if not field.holds(row)], most),
        inside=draw_rows([row for row in held_out if field.holds(row)], plan.eval_rows),
        outside=draw_rows([row for row in held_out if not field.holds(row)], plan.eval_rows),
    )
    if not (divided.own and divided.general) or min(map(len, divided[2:])) < HELD_OUT:
        raise CourseError(
            f"{specialty!r} leaves too few rows that fit into {plan.fit.max_length} tokens: "
            f"{divided.sizes()}, and inside and outside need {HELD_OUT} each. "
            "Choose another specialty, more rows, or another seed."
        )
    return divided


def ensure(
    plan: Plan, name: str, rows: Sequence[Row], start: Path | None = None,
    base: PreTrainedModel | None = None, **settings: Any,
) -> Path:  # fmt: skip
    """Return ``runs/<profile>/specialties/<name>``: an adapter trained on ``rows``, now or before.

    Training continues the adapter in ``start``, or begins on the base. ``settings`` replace fields
    of the ``SFTConfig``; ``disable_tqdm=True`` prints nothing. The adapter is used again if plan,
    rows, start and settings are the same. An interrupted run resumes. ``base`` is a loaded 4-bit
    base to train on instead of another one; afterwards it carries no adapter.
    """
    folder = plan.folder / "specialties" / name
    work = folder.with_name(f".{name}.checkpoints")
    shown = [[row["question"], row["answer"], *row.get("passages", ())] for row in rows]
    wanted = training.recipe(plan) | {"examples": value_hash(shown), "settings": settings}
    wanted["start"] = adapter_id(start) if start else "base"
    if adapter_record(folder).get("recipe") == wanted:
        return folder
    if adapter_record(work) != wanted:
        shutil.rmtree(work, ignore_errors=True)  # checkpoints of another recipe
    write_json(work / "plan.json", wanted)
    tokenizer, split = generation.load_tokenizer(plan), Splits(list(rows), [], [])
    if start:
        model = generation.load_adapters(plan, {"default": start}, trainable=True, base=base)
    else:
        model = generation.bare_base(plan, base)
    settings = {"eval_strategy": "no", "save_strategy": "no"} | settings  # ``watch`` still saves
    trainer = training.build_trainer(plan, model, tokenizer, split, work, **settings)
    try:
        preflight.require(preflight.checks(plan, tokenizer, rows, trainer))
        _limit_steps(plan, trainer, settings.get("max_steps", 0))
        trainer.train(resume_from_checkpoint=training.last_checkpoint(work))
        preflight.require_learning(trainer.model)
        steps, losses = trainer.state.global_step, training.curve(trainer, "loss")
        training.save_adapter(plan, trainer, folder, recipe=wanted, steps=steps, losses=losses)
    finally:
        if base is not None:
            generation.unload(trainer.model)
    shutil.rmtree(work, ignore_errors=True)
    return folder


def _limit_steps(plan: Plan, trainer: SFTTrainer, steps: int) -> None:
    """Apply the plan's limit, which makes no run longer than ``steps``, or than its epochs."""
    from transformers import PrinterCallback

    if trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)  # transformers' replacement of the progress bar
    if plan.max_steps:
        needed = math.ceil(len(trainer.train_dataset) / plan.fit.accumulation)  # in an epoch
        needed *= int(trainer.args.num_train_epochs)
        trainer.args.max_steps = min(steps or needed, plan.max_steps)


def mixed(own: Sequence[Row], general: Sequence[Row], share: float, seed: int = 0) -> list[Row]:
    """Mix all ``own`` rows with drawn ``general`` ones that make up ``share`` of the result."""
    count = round(len(own) * share / (1 - share)) if 0 <= share < 1 else -1
    if not 0 <= count <= len(general):
        most = len(general) / (len(general) + len(own))
        raise CourseError(
            f"no mixture has a share of {share}: with {len(general)} general rows choose from 0, "
            f"the sub-corpus alone, to {most:.2f}."
        )
    return draw([*own, *(draw(general, count, seed) if count else ())], 0, seed)
