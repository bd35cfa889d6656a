"""The SFT run: config, pre-flight check, trainer, resume and metrics; ``python -m medquad_utils.training --profile P`` runs it."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from medquad_utils import CourseError, launch
from medquad_utils.chat import IGNORED, encode, end_ids, prompt_ids, prompt_messages, to_dataset
from medquad_utils.data import prepare
from medquad_utils.files import Row, whole_folder, write_json
from medquad_utils.generation import base_id, load_base, load_tokenizer
from medquad_utils.lora import (
    adapter_parameters,
    cast_adapters,
    dtype_census,
    lora_b_norms,
    lora_config,
    trainable_parameters,
)
from medquad_utils.profiles import PROFILES, Plan, Shape, resolve
from medquad_utils.splits import Splits, draw

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
    validation, test = (
        draw(part, plan.eval_rows, plan.seed, fits) for part in (splits.validation, splits.test)
    )
    if not (train and validation and test):
        raise CourseError(
            f"no row of {plan.source!r} fits into {plan.max_length} tokens: choose a profile with a larger max_length."
        )
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
        logging_first_step=True,  # a run of fewer steps than five has a loss too
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        report_to="none",
        seed=plan.seed,
    )


def preflight(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], trainer: SFTTrainer
) -> list[tuple[str, str, bool]]:
    """What must hold before the first step, as (what, found, right): looked up in what the trainer will really feed."""
    documents = list(_documents(trainer, 256))
    pad, ends, bos = tokenizer.pad_token_id, end_ids(tokenizer), tokenizer.bos_token_id
    padded = sum(int((labels[ids == pad] != IGNORED).sum()) for ids, labels in documents)
    learned = sum(int((labels != IGNORED).sum()) for _, labels in documents)
    read = sum(int((ids != pad).sum()) for ids, _ in documents)
    prompt = prompt_ids(tokenizer, prompt_messages(rows[0]["question"]))
    trained = encode(tokenizer, rows[0])
    prefix = trained.ids[: sum(not x for x in trained.in_loss)]
    turns = max(
        1, trained.ids.count(bos)
    )  # 1, but where the BOS is what opens every turn, as in ChatML
    begins = (
        Counter(int((ids == bos).sum()) / turns for ids, _ in documents)
        if bos is not None
        else Counter({1.0: len(documents)})
    )
    stops = Counter(sum(int((labels == end).sum()) for end in ends) for _, labels in documents)
    census = dtype_census(trainer.model)["trained"]
    count, expected = (
        trainable_parameters(trainer.model),
        adapter_parameters(Shape.of(trainer.model.config), plan.lora_r),
    )
    return [
        ("BOS tokens per example", _counted(begins), set(begins) == {1}),
        ("end tokens in the loss per answer", _counted(stops), set(stops) == {1}),
        ("pad tokens in the loss", str(padded), not padded),
        ("pad is no end token", str(tokenizer.pad_token), pad not in ends),
        ("share of tokens in the loss", f"{learned / max(1, read):.0%}", learned > 0),
        ("prompt in training = prompt in use", f"{len(prompt)} tokens", prefix == prompt),
        ("adapter dtype", ", ".join(census), list(census) == [plan.adapter_dtype]),
        ("trainable parameters", f"{count:,} (closed form {expected:,})", count == expected),
        (
            "predicted memory",
            f"{plan.memory_gb:.2f} of {plan.card_gb:.0f} GB",
            plan.memory_gb <= plan.card_gb,
        ),
    ]


def _documents(trainer: SFTTrainer, most: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, labels) of each example in the first ``most`` training rows, as the collator hands them on; a packed row holds several."""
    for number in range(min(most, len(trainer.train_dataset))):
        batch = trainer.data_collator([trainer.train_dataset[number]])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        starts = (
            (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
            if "position_ids" in batch
            else [0]
        )
        for start, end in itertools.pairwise([*starts, len(ids)]):
            yield ids[start:end], labels[start:end]


def _counted(found: Counter[Any]) -> str:
    """``{1: 864}`` as "1 in each of 864", anything else count by count."""
    if len(found) == 1:
        return f"{next(iter(found)):g} in each of {found.total():,}"
    return ", ".join(f"{value:g} in {times:,}" for value, times in sorted(found.items()))


def require(checks: Sequence[tuple[str, str, bool]]) -> None:
    """Stop before a run that would be wasted.

    Raises:
        CourseError: names each check that does not hold.
    """
    failed = [f"{what}: {found}" for what, found, right in checks if not right]
    if failed:
        raise CourseError(
            "pre-flight check failed: " + "; ".join(failed) + ". Mend it before training."
        )


def build_trainer(
    plan: Plan,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Splits,
    folder: Path | None = None,
    **changes: Any,
) -> SFTTrainer:
    """An ``SFTTrainer`` for the plan on a 4-bit ``model``; ``changes`` replace fields of the ``SFTConfig``.

    A ``model`` with an adapter goes on from there; any other gets a fresh one. Without validation rows pass eval_strategy="no".
    The adapters are cast after the trainer is built (see ``lora.cast_adapters``).
    """
    from peft import PeftModel
    from transformers import set_seed
    from trl import SFTTrainer

    set_seed(plan.seed)
    config = sft_config(plan, folder)
    for name, value in (launch.settings(plan) | changes).items():
        setattr(config, name, value)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=to_dataset(rows.train),
        eval_dataset=to_dataset(rows.validation) if rows.validation else None,
        processing_class=tokenizer,
        peft_config=None if isinstance(model, PeftModel) else lora_config(plan),
    )
    cast_adapters(trainer.model, getattr(torch, plan.adapter_dtype))
    watch(trainer)
    return trainer


def watch(trainer: SFTTrainer) -> None:
    """Guard a run: ten checkpoints, not only one an epoch, and no step more once it is being wasted.

    It is, when a loss is not finite, and when an adapter has not moved by step ``WATCHED``.
    """
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            args.logging_nan_inf_filter = (
                False  # left on, the log shows the mean of the finite losses instead of a NaN
            )

        def on_log(
            self,
            args: Any,
            state: Any,
            control: Any,
            logs: dict[str, float] | None = None,
            **kwargs: Any,
        ) -> None:
            loss = (logs or {}).get("loss", 0.0)
            if not math.isfinite(loss):
                raise CourseError(
                    f"the loss is {loss} at step {state.global_step}: halve the learning rate, or compute in float32."
                )

        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            if state.global_step == WATCHED:
                require_learning(model)
            if (
                state.global_step % math.ceil(state.max_steps / 10) == 0
                and state.global_step < state.max_steps
            ):
                # the last step of an epoch is saved after its validation, by the trainer: its loss belongs to the checkpoint
                control.should_save = control.should_save or not float(state.epoch).is_integer()

    trainer.add_callback(Watch())


# Late enough for a warm-up that begins at a rate of 0, and for the first steps that a gradient scaler throws away in fp16.
WATCHED = 10


def require_learning(model: torch.nn.Module) -> None:
    """Every ``lora_B`` has left zero and holds a number.

    Raises:
        CourseError: names the first one that does not, and what to change.
    """
    norms = lora_b_norms(model)
    if wild := [name for name, norm in norms.items() if not math.isfinite(norm)]:
        raise CourseError(
            f"{len(wild)} adapters hold NaN, the first is {wild[0]}: halve the learning rate, or compute in float32."
        )
    if idle := [name for name, norm in norms.items() if norm == 0]:
        raise CourseError(
            f"{len(idle)} adapters did not learn (lora_B is zero), the first is {idle[0]}: gradients do not reach them. "
            "With activation checkpointing call model.enable_input_require_grads() first."
        )


def is_whole(checkpoint: Path, processes: int = 1) -> bool:
    """Whether everything that a run goes on from is there. The trainer writes its state last, but only that of the first process."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return processes == 1 or all(
        (checkpoint / f"rng_state_{rank}.pth").is_file() for rank in range(processes)
    )


def last_checkpoint(folder: Path, processes: int = 1) -> Path | None:
    """The newest whole checkpoint under ``folder``."""
    found = [p for p in folder.glob("checkpoint-*") if is_whole(p, processes)]
    return max(found, key=lambda p: int(p.name.split("-")[1]), default=None)


# What a plan says of the machine: it does not decide what is learned.
OF_MACHINE = ("why", "memory_gb", "card_gb", "hardware", "gpus", "out")


def resumable(plan: Plan) -> Path | None:
    """The checkpoint that a run of this plan goes on from, or ``None`` for a fresh start; half-written ones are removed.

    Raises:
        CourseError: the checkpoints belong to another plan or to other weights; names what differs.
    """
    folder = plan.folder / "checkpoints"
    record = folder / "plan.json"
    now = plan.as_dict() | {"base": base_id(plan)}
    before = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    processes = before.get("processes", 1)  # of the run that wrote them: more leave more behind
    found = last_checkpoint(folder, processes)
    if found and before:
        differs = [
            f"{k} was {before.get(k)!r}, now {now[k]!r}"
            for k in now
            if k not in OF_MACHINE and before.get(k) != now[k]
        ]
        if differs:
            raise CourseError(
                f"the checkpoints in {plan.profile}/checkpoints are of another plan ({'; '.join(differs)}). "
                "Delete the folder to start afresh, or set the plan back."
            )
    for torn in (p for p in folder.glob("checkpoint-*") if not is_whole(p, processes)):
        shutil.rmtree(torn)
    if launch.is_main():
        write_json(record, now)
    return found


def finish(plan: Plan, trainer: SFTTrainer, seconds: float) -> dict[str, Any]:
    """Check that every adapter learned, save the adapter with its plan, write ``metrics/train.json``; returns the metrics.

    Raises:
        CourseError: some ``lora_B`` is still zero, or became NaN.
    """
    require_learning(trainer.model)
    weights = launch.gathered(trainer.model)
    launch.wait()
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
    if launch.is_main():
        save_adapter(plan, trainer, weights)
        write_json(plan.folder / "metrics" / "train.json", metrics)
        shutil.rmtree(plan.folder / "checkpoints", ignore_errors=True)
    return metrics


def save_adapter(
    plan: Plan,
    trainer: SFTTrainer,
    weights: dict[str, torch.Tensor] | None = None,
    folder: Path | None = None,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``folder`` (default: ``runs/<profile>/adapter``) with adapter, tokenizer and plan, whole or not at all; returns it.

    ``weights`` are the adapter's where the model itself holds only a part of them (FSDP); ``more`` is recorded beside the plan.
    """
    folder = folder or plan.folder / "adapter"
    try:
        with whole_folder(folder) as fresh:
            trainer.model.save_pretrained(fresh, state_dict=weights)
            trainer.processing_class.save_pretrained(fresh)
            write_json(
                fresh / "plan.json", plan.as_dict() | {"base": base_id(plan)} | dict(more or {})
            )
    except (
        OSError,
        SafetensorError,
    ) as error:  # a full disk is an OSError to Python, a SafetensorError to the weights' writer
        reason = getattr(error, "strerror", None) or error
        raise CourseError(
            f"cannot save the adapter: {reason}. The older one is untouched; free some space."
        ) from error
    return folder


def train(plan: Plan) -> dict[str, Any]:
    """The whole run: data, 4-bit base, adapters, pre-flight, training (resumed if it was cut off), adapter and metrics."""
    launch.quiet()
    tokenizer = load_tokenizer(plan)
    with launch.main_first(plan):
        splits = prepare(plan)
    rows = select(plan, tokenizer, splits)
    trainer = build_trainer(plan, load_base(plan), tokenizer, rows)
    require(preflight(plan, tokenizer, rows.train, trainer))
    with launch.main_first(plan):
        checkpoint = resumable(plan)
    started = time.time()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return finish(plan, trainer, time.time() - started)


def ensure_adapter(plan: Plan) -> Path:
    """The adapter of lesson 04, trained now if it is not there or belongs to other settings of the data."""
    folder = plan.folder / "adapter"
    record = folder / "plan.json"
    if record.is_file():
        made = json.loads(record.read_text(encoding="utf-8"))
        now = plan.as_dict() | {"base": base_id(plan)}
        if all(made.get(k) == now[k] for k in ("model_id", "base", "source", "data_path", "seed")):
            return folder
    train(plan)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Train without a notebook: alone, or in each process of ``torchrun --nproc_per_node N -m`` or ``accelerate launch -m``."""
    values = vars(_parser().parse_args(arguments))
    if name := values.pop("print_launch"):
        print(launch.config(name))
        return 0
    say = print if launch.is_main() else lambda text, file=None: None
    try:
        plan = resolve(values.pop("profile"), **values)
        say(plan)
        metrics = train(plan)
    except CourseError as error:
        say(f"medquad: {error}", file=sys.stderr)
        return 1
    finally:
        launch.close()
    say({k: v for k, v in metrics.items() if k not in ("plan", "train_curve", "validation_curve")})
    return 0


def _parser() -> argparse.ArgumentParser:
    """An option for each of the notebooks' parameters, and one for the launcher's config."""
    parser = argparse.ArgumentParser(
        prog="python -m medquad_utils.training",
        description="Train the adapter without a notebook: data, 4-bit base, pre-flight, training, adapter and metrics.",
        epilog="On several GPUs: torchrun --nproc_per_node N -m medquad_utils.training [options]",
    )
    parser.add_argument(
        "--profile",
        default="auto",
        metavar="P",
        help=f"auto, {', '.join(PROFILES)} (default: auto)",
    )
    for name, metavar, text in (
        ("source", "S", "sample, hub, xml, csv, jsonl or parquet (default: the profile's own)"),
        ("data-path", "PATH", "the folder or file of an xml, csv, jsonl or parquet source"),
        ("model-path", "DIR", "a model folder on this machine instead of the Hub"),
        ("out", "DIR", "where results go (default: runs)"),
    ):
        parser.add_argument(f"--{name}", default="", metavar=metavar, help=text)
    for name, text in (
        ("rows", "training rows; 0 is as many as the profile says"),
        ("max-steps", "training steps; 0 is as many as the epochs need"),
        ("lora-r", "rank of the adapters; 0 is the profile's own"),
        ("seed", "of the split, the draw and the adapters (default: 0)"),
    ):
        parser.add_argument(f"--{name}", type=int, default=0, metavar="N", help=text)
    text = "print the path of an accelerate config that ships here, for accelerate launch --config_file, and stop"
    parser.add_argument(
        "--print-launch",
        default="",
        choices=["", *launch.CONFIGS],
        metavar="|".join(launch.CONFIGS),
        help=text,
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
