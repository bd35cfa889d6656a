"""Train the adapter by supervised fine-tuning: rows -> trainer -> checkpoints -> saved adapter.

``train`` is the whole run, and the file follows its order. ``chat.to_dataset`` makes a prompt and a
completion of a row; TRL tokenizes both and labels the prompt -100, so that only the answer is in
the loss (``chat.encode`` shows this label mask).

``medquad train`` does it without a notebook. ``torchrun`` and ``accelerate launch`` take it as
``-m medquad_utils.training``: process 0 prepares the data, prints and writes, the others compute.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError

from medquad_utils import CourseError, data, generation, lora, preflight
from medquad_utils.adapters import adapter_record, base_id, save_with
from medquad_utils.atomic import locked, reason, whole_folder
from medquad_utils.chat import encode, to_dataset, without_bars
from medquad_utils.files import ASSETS, Row, read_json, write_json
from medquad_utils.generation import load_base, load_tokenizer
from medquad_utils.machine import peak_memory_gb, versions
from medquad_utils.memory import CPU_LOSS_COLUMNS
from medquad_utils.profiles import Plan
from medquad_utils.splits import Splits, draw

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
    from trl import SFTConfig, SFTTrainer

# For accelerate launch --config_file.
CONFIGS = {p.stem: p for p in (ASSETS / "accelerate").glob("*.yaml")}
# By this step the warm-up, which begins at rate 0, is over, and so are the first steps that the
# gradient scaler skips in fp16. An adapter that is still zero gets no gradient.
WATCHED = 10
# Fields of a plan that do not change what is learned: a run may resume with other values.
OF_MACHINE = ("why", "memory_gb", "card_gb", "hardware", "gpus", "out")
# Fields of a record that make another adapter, whatever machine trains it; the folders' names are
# not among them, because ``base`` and ``data`` are hashes of what is in them.
MADE_FROM = ("base", "data", "seed", "rows", "max_steps", "lora_r", "lora_alpha", "lora_dropout",
             "learning_rate", "epochs")  # fmt: skip


# ---- the whole run -------------------------------------------------------------------------------


def train(plan: Plan) -> dict[str, Any]:
    """Do the whole run; one that was interrupted goes on. Returns the metrics of ``finish``."""
    state = process_state(plan)
    tokenizer, lock = load_tokenizer(plan), locked(plan.folder / "checkpoints", wait=False)
    with lock if state.is_main_process else nullcontext():
        with state.main_process_first():  # the others read what it wrote: in one file system
            splits = data.prepare(plan)
        rows = select(plan, tokenizer, splits)
        trainer = build_trainer(plan, load_base(plan), tokenizer, rows)
        preflight.require(preflight.checks(plan, tokenizer, rows.train, trainer))
        with state.main_process_first():
            checkpoint = resumable(plan)
        started = time.time()
        trainer.train(resume_from_checkpoint=checkpoint)
        return finish(plan, trainer, time.time() - started)


def ensure_adapter(plan: Plan) -> Path:
    """Return the folder of lesson 04's adapter; train it if it is missing or of another plan.

    On another base than the embedded one it may take hours: a CourseError names what differs.
    """
    folder = plan.folder / "adapter"
    data.prepare(plan)
    changed = differs(adapter_record(folder), record_of(plan, fit=False), MADE_FROM)
    if changed and plan.model_id != "embedded":
        raise CourseError(
            f"no adapter of this plan is in {plan.folder.name}/adapter ({changed}), and training "
            "one takes minutes on a GPU to an hour on a CPU. Take its plan again, or run lesson 04 "
            f"or medquad train --profile {plan.profile} (how long: medquad estimate)."
        )
    if changed:
        print(f"An adapter is trained: {changed}.")
        train(plan)
    return folder


def record_of(plan: Plan, fit: bool = True) -> dict[str, Any]:
    """Return what is kept with an adapter: the plan, and which weights and rows it really used.

    Without ``fit`` it lacks the sizes of a step, which a machine too small to train does not have.
    """
    rows = data.identity(plan.folder / "data")
    return plan.as_dict(fit) | {"revision": plan.hub_revision, "base": base_id(plan), "data": rows}


def differs(before: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str] = ()) -> str:
    """Say which of ``keys`` (default: all) have another value in two records; "" if none has."""
    pairs = {key: (before.get(key), now[key]) for key in keys or now}
    changed = [f"{key} was {a!r}, now {b!r}" for key, (a, b) in pairs.items() if a != b]
    return "; ".join(changed) if before else "there is none yet"


# ---- rows ----------------------------------------------------------------------------------------


def select(plan: Plan, tokenizer: Tokenizer, splits: Splits) -> Splits:
    """Draw the rows that the plan trains, validates and tests on, of those that fit.

    A row that is too long is left out, not cut: a cut answer has no end for the model to learn.
    """
    train = draw_fitting(plan, tokenizer, splits.train, plan.rows)
    held_out = (splits.validation, splits.test)
    validation, test = (draw_fitting(plan, tokenizer, rows, plan.eval_rows) for rows in held_out)
    drawn = Splits(train, validation, test)
    if empty := [part for part, count in drawn.sizes().items() if not count]:
        raise CourseError(
            f"no row of the {empty[0]} part of {plan.source!r} fits into {plan.fit.max_length} "
            "tokens: choose a profile with a larger max_length."
        )
    return drawn


def draw_fitting(plan: Plan, tokenizer: Tokenizer, rows: Sequence[Row], count: int) -> list[Row]:
    """Draw at most ``count`` rows (0 = all) that fit into ``max_length``, by the plan's seed."""

    def fits(row: Row) -> bool:
        return len(encode(tokenizer, row).ids) <= plan.fit.max_length

    return draw(rows, count, plan.seed, fits)


# ---- trainer -------------------------------------------------------------------------------------


def sft_config(plan: Plan, folder: Path | None = None) -> SFTConfig:
    """Translate the plan into TRL's settings; checkpoints go to ``folder``."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(folder or plan.folder / "checkpoints"),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=plan.fit.pack_length // plan.fit.max_length,
        gradient_accumulation_steps=plan.fit.accumulation,
        completion_only_loss=True,  # TRL labels every token of a prompt -100
        max_length=plan.fit.pack_length,  # of a packed row
        packing=True,
        packing_strategy="bfd_split",  # splits nothing: ``select`` left longer rows out
        eval_packing=False,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        num_train_epochs=plan.epochs,
        max_steps=plan.max_steps or -1,
        optim=plan.optimizer,
        bf16=plan.compute_dtype == "bfloat16",  # by default on, even where it is only emulated
        fp16=plan.compute_dtype == "float16",
        activation_checkpointing=plan.fit.checkpointing,
        use_cpu=plan.device == "cpu",
        # Every adapter gets a gradient in every step, so DDP need not look for those without.
        # Not ddp_static_graph: with accumulation torch 2.13 stops at an internal assertion.
        ddp_find_unused_parameters=False if plan.processes > 1 else None,
        logging_steps=5,
        logging_first_step=True,  # a run of fewer steps than five has a loss too
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        report_to="none",
        seed=plan.seed,
    )


@without_bars()
def build_trainer(
    plan: Plan, model: Any, tokenizer: Tokenizer, rows: Splits, folder: Path | None = None,
    **changes: Any,
) -> SFTTrainer:  # fmt: skip
    """Build the trainer for a 4-bit ``model``; ``changes`` replace fields of the ``SFTConfig``.

    A model that has an adapter trains it further; any other gets a new one. Without validation
    rows pass ``eval_strategy="no"``.
    """
    from peft import PeftModel
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from transformers import set_seed
    from trl import SFTTrainer
    from trl.trainer import utils

    set_seed(plan.seed)
    if plan.device == "cpu":
        utils._CHUNKED_LOGPROB_CHUNK_SIZE = CPU_LOSS_COLUMNS  # no setting: trl reads this constant
    config = sft_config(plan, folder)
    for name, value in changes.items():
        setattr(config, name, value)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=to_dataset(rows.train),
        eval_dataset=to_dataset(rows.validation) if rows.validation else None,
        processing_class=tokenizer,
        peft_config=None if isinstance(model, PeftModel) else lora.lora_config(plan),
    )
    lora.cast_adapters(trainer.model, getattr(torch, plan.adapter_dtype))
    if plan.sharded and plan.compute_dtype != "float32":
        # accelerate casts the model's outputs, TRL's log-probabilities among them, to 16 bits: a
        # loss of 8.0406 would be reported as 8.0319.
        dtype, fsdp = getattr(torch, plan.compute_dtype), trainer.accelerator.state.fsdp_plugin
        fsdp.mixed_precision_policy = MixedPrecisionPolicy(dtype, dtype, torch.float32)
    watch(trainer)
    return trainer


def watch(trainer: SFTTrainer) -> None:
    """Add a callback: a checkpoint about every tenth of a run, and a stop if it is of no use.

    It stops on a loss that is not finite, and on an adapter that is still zero at ``WATCHED``.
    """
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loss = kwargs["logs"].get("loss", 0.0)
            if not math.isfinite(loss):
                raise CourseError(
                    f"the loss is {loss} at step {state.global_step}: "
                    "halve the learning rate, or compute in float32."
                )

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step, last = state.global_step, state.max_steps
            if step == WATCHED:
                preflight.require_learning(kwargs["model"])
            if step % math.ceil(last / 10) == 0 and step < last:
                # At the end of an epoch the trainer validates first, then saves by itself. The
                # checkpoint must hold that validation loss, so it is not saved here.
                control.should_save = control.should_save or not float(state.epoch).is_integer()

    trainer.args.logging_nan_inf_filter = False  # by default the log leaves NaN losses out
    trainer.add_callback(Watch())


def ask_while_training(
    trainer: SFTTrainer, plan: Plan, question: str, steps: Sequence[int]
) -> dict[int, str]:
    """Add a callback that asks ``question`` after these ``steps`` and after the last one.

    Returns step -> answer, which fills while the trainer runs. Asking draws no random number.
    """
    from transformers import TrainerCallback

    answers: dict[int, str] = {}

    class Ask(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step, model = state.global_step, kwargs["model"]
            if step in (*steps, state.max_steps):
                model.eval()  # no dropout; the trainer switches back by itself
                tokenizer, limit = trainer.processing_class, plan.max_new_tokens
                answers[step] = generation.ask(model, tokenizer, [question], limit)[0].text

    trainer.add_callback(Ask())
    return answers


# ---- resume and save -----------------------------------------------------------------------------


def recipe(plan: Plan) -> dict[str, Any]:
    """Return everything in the plan's record that determines the adapter."""
    return {k: v for k, v in record_of(plan).items() if k not in OF_MACHINE}


def resumable(plan: Plan) -> Path | None:
    """Return the checkpoint to resume from, or ``None``; deletes newer ones, which a kill tore.

    Checkpoints of another plan or base raise a CourseError that names what differs. Without a
    record of a plan they count as this plan's.
    """
    folder = plan.folder / "checkpoints"
    record, now = folder / "plan.json", recipe(plan)
    before = read_json(record, "processes") if record.is_file() else now
    checkpoint = last_checkpoint(folder, before["processes"])
    if checkpoint and (changed := differs(before, now)):
        raise CourseError(
            f"the checkpoints in {plan.profile}/checkpoints are of another plan "
            f"({changed}). Delete the folder to start afresh, or set the plan back."
        )
    if process_state(plan).is_main_process:
        for path in itertools.takewhile(lambda path: path != checkpoint, checkpoints(folder)):
            shutil.rmtree(path)
        write_json(record, now)
    return checkpoint


def last_checkpoint(folder: Path, processes: int = 1) -> Path | None:
    """Return the newest checkpoint that all ``processes`` wrote to its end, or ``None``."""
    for checkpoint in checkpoints(folder):
        with suppress(OSError, CourseError):  # a kill left no state, or a part of one
            read_json(checkpoint / "trainer_state.json")  # process 0 writes it last
            if len(list(checkpoint.glob("rng_state*.pth"))) >= processes:
                return checkpoint
    return None


def checkpoints(folder: Path) -> list[Path]:
    """List the folders of checkpoints, newest first; a copy or an archive has another name."""
    numbered = [p for p in folder.glob("checkpoint-*") if p.name.partition("-")[2].isdecimal()]
    return sorted(filter(Path.is_dir, numbered), key=lambda p: -int(p.name.partition("-")[2]))


def finish(plan: Plan, trainer: SFTTrainer, seconds: float) -> dict[str, Any]:
    """Save the adapter and ``metrics/train.json`` if every adapter learned; returns the metrics.

    Then the checkpoints are deleted.
    """
    preflight.require_learning(trainer.model)
    trainer.accelerator.wait_for_everyone()  # the others may still write to a checkpoint
    save_adapter(plan, trainer)
    losses, validation = curve(trainer, "loss"), curve(trainer, "eval_loss")
    packed = trainer.train_dataset
    metrics = {
        "steps": trainer.state.global_step,
        "rows": sum(map(len, packed["seq_lengths"])),  # examples; a packed row holds several
        "packed_rows": len(packed),
        "seconds": round(seconds, 1),
        "versions": versions(),
        "peak_memory_gb": peak_memory_gb(),
        "loss_first": round(losses[0][1], 4),
        "loss_last": round(losses[-1][1], 4),
        "validation_loss": round(validation[-1][1], 4),
        "trainable_parameters": lora.trainable_parameters(trainer.model),
        "train_curve": losses,
        "validation_curve": validation,
        "plan": record_of(plan),
    }
    if not plan.sharded:  # there a process holds parts of the matrices
        spectrum = lora.singular_values(trainer.model)
        metrics["singular_values"] = list(enumerate(spectrum, start=1))
    if trainer.is_world_process_zero():
        write_json(plan.folder / "metrics" / "train.json", metrics)
        folder = plan.folder / "checkpoints"
        for path in checkpoints(folder):
            shutil.rmtree(path, ignore_errors=True)
        for name in ("plan.json", "README.md"):  # TRL writes the second
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # what somebody else put there stays
            folder.rmdir()
    return metrics


def curve(trainer: SFTTrainer, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of every line of the trainer's log that holds ``name``."""
    return [(e["step"], e[name]) for e in trainer.state.log_history if name in e]


def save_adapter(plan: Plan, trainer: SFTTrainer, folder: Path | None = None, **more: Any) -> Path:
    """Write adapter, tokenizer and plan to ``folder`` (default: that of lesson 04), all or nothing.

    ``more`` is recorded with the plan. Every process must call it; the first one writes.
    """
    folder, weights = folder or plan.folder / "adapter", None
    if plan.sharded:  # each process gathers the trained parameters on the CPU
        trained = trainer.model.named_parameters()
        weights = {name: p.full_tensor().cpu() for name, p in trained if p.requires_grad}
    if not trainer.is_world_process_zero():
        return folder
    record = record_of(plan) | more
    if plan.model_path:  # relative, so that both folders can move together
        record["model_path"] = os.path.relpath(plan.model_path, folder)
    try:
        with whole_folder(folder) as fresh:
            trainer.model.save_pretrained(fresh, state_dict=weights)
            # PEFT names the base by its path on this machine, here and in a README of its own.
            config = read_json(fresh / "adapter_config.json")
            config["base_model_name_or_path"] = plan.model_id if plan.on_hub else None
            write_json(fresh / "adapter_config.json", config)
            (fresh / "README.md").unlink(missing_ok=True)
            write_json(fresh / "plan.json", record)
            save_with(trainer.processing_class, fresh)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise CourseError(
            f"cannot save the adapter: {reason(error)} The older one is untouched."
        ) from error
    return folder


# ---- several processes ---------------------------------------------------------------------------


def process_state(plan: Plan) -> PartialState:
    """Return accelerate's view of the processes; all but the first show no bars or warnings."""
    state = PartialState(cpu=plan.device == "cpu")  # under a launcher it connects them
    if not state.is_main_process:
        import datasets
        from transformers.utils import logging

        datasets.disable_progress_bars()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    return state


def run(plan: Plan) -> None:
    """Train in every process of a launcher, or in this one alone; the first prints."""
    state = process_state(plan)
    try:
        state.print(plan)
        metrics = train(plan)
    finally:
        state.destroy_process_group()
    long = ("plan", "train_curve", "validation_curve", "singular_values")
    state.print({name: value for name, value in metrics.items() if name not in long})


if __name__ == "__main__":  # each process of a launcher is a ``medquad train``, with its options
    sys.exit(importlib.import_module("medquad_utils.__main__").main(["train", *sys.argv[1:]]))
