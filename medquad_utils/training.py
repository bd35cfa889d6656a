"""The SFT run: config, pre-flight check, trainer, resume and metrics; ``python -m medquad_utils.training --profile P`` runs it."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from medquad_utils.chat import END_OF_TURN, IGNORED, encode, end_ids, prompt_ids, prompt_messages, to_dataset
from medquad_utils.data import Row, Splits, draw, prepare, write_json
from medquad_utils.generation import base_id, load_base, load_tokenizer
from medquad_utils.lora import adapter_parameters, cast_adapters, dtype_census, lora_b_norms, lora_config, trainable_parameters
from medquad_utils.profiles import CourseError, Plan, Shape, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig, SFTTrainer


def select(plan: Plan, tokenizer: PreTrainedTokenizerBase, splits: Splits) -> Splits:
    """The rows that the plan trains and validates on: as many as it says, and only those that fit into ``max_length``.

    A row that is too long is left out rather than cut: an answer that was cut never shows the model where to stop.

    Raises:
        CourseError: no row fits.
    """

    def fits(row: Row) -> bool:
        return len(encode(tokenizer, row).ids) <= plan.max_length

    train = draw(splits.train, plan.rows, plan.seed, fits)
    validation, test = (draw(part, plan.eval_rows, plan.seed, fits) for part in (splits.validation, splits.test))
    if not (train and validation and test):
        raise CourseError(f"no row of {plan.source!r} fits into {plan.max_length} tokens: choose a profile with a larger max_length.")
    return Splits(train, validation, test, splits.cleaning, splits.notes)


def sft_config(plan: Plan, folder: Path | None = None) -> SFTConfig:
    """TRL's settings for the plan. Precision is said outright: left alone, ``SFTConfig`` turns bf16 on everywhere."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(folder or plan.folder / "checkpoints"),
        per_device_train_batch_size=plan.batch_size,
        per_device_eval_batch_size=max(plan.batch_size, plan.pack_length // plan.max_length),
        gradient_accumulation_steps=plan.accumulation,
        max_length=plan.pack_length or plan.max_length,
        packing=plan.packing,
        packing_strategy="bfd_split",
        eval_packing=False,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        num_train_epochs=plan.epochs,
        max_steps=plan.max_steps or -1,
        optim=plan.optimizer,
        bf16=plan.compute_dtype == "bfloat16",
        fp16=plan.compute_dtype == "float16",
        activation_checkpointing=plan.checkpointing,
        use_cpu=plan.device == "cpu",
        logging_steps=5,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        report_to="none",
        seed=plan.seed,
    )


def preflight(plan: Plan, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], trainer: SFTTrainer) -> list[tuple[str, str, bool]]:
    """What must hold before the first step, as (what, found, right): looked up in what the trainer will really feed."""
    features = [trainer.train_dataset[i] for i in range(min(64, len(trainer.train_dataset)))]
    batch = trainer.data_collator(features)
    ids, labels = batch["input_ids"], batch["labels"]
    learned = labels != IGNORED
    eot, pad = tokenizer.convert_tokens_to_ids(END_OF_TURN), tokenizer.pad_token_id
    bos = int((ids == tokenizer.bos_token_id).sum())
    ends = int((learned & (labels == eot)).sum()) if eot is not None else 0
    sample = rows[0]
    prompt = prompt_ids(tokenizer, prompt_messages(sample["question"]))
    trained = encode(tokenizer, sample)
    turns = max(1, trained.ids.count(tokenizer.bos_token_id))  # 1, but where the BOS is what opens every turn, as in ChatML
    examples = bos // turns if plan.packing else len(features)
    prefix = trained.ids[: sum(not x for x in trained.in_loss)]
    census = dtype_census(trainer.model)["trained"]
    count = trainable_parameters(trainer.model)
    expected = adapter_parameters(Shape.of(trainer.model.config), plan.lora_r)
    return [
        ("BOS tokens per example", f"{bos / examples:.2f}", bos == examples * turns or tokenizer.bos_token_id is None),
        (f"{END_OF_TURN} in the loss per answer", f"{ends / examples:.2f}", ends == examples or eot in (None, tokenizer.unk_token_id)),
        ("pad tokens in the loss", str(int((learned & (ids == pad)).sum())), not bool((learned & (ids == pad)).any())),
        ("pad is no end token", str(tokenizer.pad_token), pad not in end_ids(tokenizer)),
        ("share of tokens in the loss", f"{float(learned.sum() / (ids != pad).sum()):.0%}", bool(learned.any())),
        ("prompt in training = prompt in use", f"{len(prompt)} tokens", prefix == prompt),
        ("adapter dtype", ", ".join(census), list(census) == [plan.adapter_dtype]),
        ("trainable parameters", f"{count:,} (closed form {expected:,})", count == expected),
        ("predicted memory", f"{plan.memory_gb:.2f} of {plan.card_gb:.0f} GB", plan.memory_gb <= plan.card_gb),
    ]


def require(checks: Sequence[tuple[str, str, bool]]) -> None:
    """Stop before a run that would be wasted.

    Raises:
        CourseError: names each check that does not hold.
    """
    failed = [f"{what}: {found}" for what, found, right in checks if not right]
    if failed:
        raise CourseError("pre-flight check failed: " + "; ".join(failed) + ". Mend it before training.")


def build_trainer(
    plan: Plan, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Splits, folder: Path | None = None, **changes: Any
) -> SFTTrainer:
    """An ``SFTTrainer`` for the plan on a 4-bit ``model``; ``changes`` replace fields of the ``SFTConfig``.

    The adapters are cast after the trainer is built (see ``lora.cast_adapters``).
    """
    from transformers import set_seed
    from trl import SFTTrainer

    set_seed(plan.seed)
    config = sft_config(plan, folder)
    for name, value in changes.items():
        setattr(config, name, value)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=to_dataset(rows.train),
        eval_dataset=to_dataset(rows.validation),
        processing_class=tokenizer,
        peft_config=lora_config(plan),
    )
    cast_adapters(trainer.model, getattr(torch, plan.adapter_dtype))
    trainer.add_callback(_stop_on_nan())
    return trainer


def _stop_on_nan() -> Any:
    from transformers import TrainerCallback

    class StopOnNan(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            args.logging_nan_inf_filter = False  # left on, the log shows the mean of the finite losses instead of a NaN

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
            loss = (logs or {}).get("loss", 0.0)
            if not math.isfinite(loss):
                raise CourseError(f"the loss is {loss} at step {state.global_step}: halve the learning rate, or compute in float32.")

    return StopOnNan()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint under ``folder``; its state file is written last."""
    whole = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return max(whole, key=lambda p: int(p.name.split("-")[1]), default=None)


def resumable(plan: Plan) -> Path | None:
    """The checkpoint that a run of this plan goes on from, or ``None`` for a fresh start.

    Raises:
        CourseError: the checkpoints belong to another plan; names what differs.
    """
    folder = plan.folder / "checkpoints"
    record = folder / "plan.json"
    found = last_checkpoint(folder)
    if found and record.is_file():
        before, now = json.loads(record.read_text()), plan.as_dict()
        ignored = ("why", "memory_gb", "card_gb", "hardware", "out", "data_path")
        differs = [f"{k} was {before.get(k)!r}, now {now[k]!r}" for k in now if k not in ignored and before.get(k) != now[k]]
        if differs:
            raise CourseError(
                f"the checkpoints in {plan.profile}/checkpoints are of another plan ({'; '.join(differs)}). "
                "Delete the folder to start afresh, or set the plan back."
            )
    write_json(record, plan.as_dict())
    return found


def finish(plan: Plan, trainer: SFTTrainer, seconds: float) -> dict[str, Any]:
    """Check that every adapter learned, save the adapter with its plan, write ``metrics/train.json``; returns the metrics.

    Raises:
        CourseError: some ``lora_B`` is still zero, or became NaN.
    """
    norms = lora_b_norms(trainer.model)
    if wild := [name for name, norm in norms.items() if not math.isfinite(norm)]:
        raise CourseError(f"{len(wild)} adapters hold NaN, the first is {wild[0]}: halve the learning rate, or compute in float32.")
    idle = [name for name, norm in norms.items() if norm == 0]
    if idle:
        raise CourseError(f"{len(idle)} adapters did not learn (lora_B is zero), the first is {idle[0]}: gradients do not reach them.")
    save_adapter(plan, trainer)
    history = trainer.state.log_history
    losses = [(e["step"], e["loss"]) for e in history if "loss" in e]
    validation = [(e["step"], e["eval_loss"]) for e in history if "eval_loss" in e]
    metrics = {
        "steps": trainer.state.global_step,
        "rows": len(trainer.train_dataset),
        "seconds": round(seconds, 1),
        "loss_first": round(losses[0][1], 4),
        "loss_last": round(losses[-1][1], 4),
        "validation_loss": round(validation[-1][1], 4),
        "trainable_parameters": trainable_parameters(trainer.model),
        "train_curve": losses,
        "validation_curve": validation,
        "plan": plan.as_dict(),
    }
    write_json(plan.folder / "metrics" / "train.json", metrics)
    shutil.rmtree(plan.folder / "checkpoints", ignore_errors=True)
    return metrics


def save_adapter(plan: Plan, trainer: SFTTrainer) -> Path:
    """Write ``runs/<profile>/adapter`` (adapter, tokenizer, plan), whole or not at all; returns the folder."""
    folder = plan.folder / "adapter"
    fresh, older = folder.with_name(".adapter.part"), folder.with_name(".adapter.old")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        trainer.model.save_pretrained(fresh)
        trainer.processing_class.save_pretrained(fresh)
        write_json(fresh / "plan.json", plan.as_dict() | {"base": base_id(plan)})
        shutil.rmtree(older, ignore_errors=True)
        if folder.exists():
            folder.rename(older)
        fresh.rename(folder)
    except (OSError, SafetensorError) as error:  # a full disk is an OSError to Python, a SafetensorError to the weights' writer
        reason = getattr(error, "strerror", None) or error
        raise CourseError(f"cannot save the adapter: {reason}. The older one is untouched; free some space.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(older, ignore_errors=True)
    return folder


def train(plan: Plan) -> dict[str, Any]:
    """The whole run: data, 4-bit base, adapters, pre-flight, training (resumed if it was cut off), adapter and metrics."""
    tokenizer = load_tokenizer(plan)
    rows = select(plan, tokenizer, prepare(plan))
    trainer = build_trainer(plan, load_base(plan), tokenizer, rows)
    require(preflight(plan, tokenizer, rows.train, trainer))
    started = time.time()
    trainer.train(resume_from_checkpoint=str(checkpoint) if (checkpoint := resumable(plan)) else None)
    return finish(plan, trainer, time.time() - started)


def ensure_adapter(plan: Plan) -> Path:
    """The adapter of lesson 04, trained now if it is not there or belongs to other settings of the data."""
    folder = plan.folder / "adapter"
    record = folder / "plan.json"
    if record.is_file():
        made = json.loads(record.read_text())
        now = plan.as_dict() | {"base": base_id(plan)}
        if all(made.get(k) == now[k] for k in ("model_id", "base", "source", "data_path", "seed")):
            return folder
    train(plan)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of a run without a notebook."""
    parser = argparse.ArgumentParser(prog="python -m medquad_utils.training", description=main.__doc__)
    parser.add_argument("--profile", default="auto")
    for name in ("source", "data-path", "model-path", "out"):
        parser.add_argument(f"--{name}", default="")
    for name in ("rows", "max-steps", "lora-r", "seed"):
        parser.add_argument(f"--{name}", type=int, default=0)
    values = vars(parser.parse_args(arguments))
    try:
        plan = resolve(values.pop("profile"), **values)
        print(plan)
        metrics = train(plan)
    except CourseError as error:
        print(f"medquad: {error}", file=sys.stderr)
        return 1
    print({k: v for k, v in metrics.items() if k not in ("plan", "train_curve", "validation_curve")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
