"""Check what a trainer will really feed, before the first step, and that its adapters learn."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from medquad_utils import CourseError, lora
from medquad_utils.chat import IGNORED, encode, end_ids, prompt_ids, to_example
from medquad_utils.files import Row
from medquad_utils.machine import triton_needs
from medquad_utils.memory import Shape, adapter_parameters
from medquad_utils.profiles import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
    from trl import SFTTrainer


def checks(
    plan: Plan, tokenizer: Tokenizer, rows: Sequence[Row], trainer: SFTTrainer
) -> list[tuple[str, str, bool]]:
    """Check the first 256 packed rows as the trainer will feed them: (what, value, passed)."""
    examples = list(_examples(trainer))
    ids, labels = map(torch.cat, zip(*examples, strict=True))
    ends, pad, bos = end_ids(tokenizer), tokenizer.pad_token_id, tokenizer.bos_token_id
    padded, in_loss = int((labels[ids == pad] != IGNORED).sum()), int((labels != IGNORED).sum())
    share = in_loss / int((ids != pad).sum())
    stops = Counter(sum(int((y == end).sum()) for end in ends) for _, y in examples)
    asked = {tuple(prompt_ids(tokenizer, to_example(row)["prompt"])) for row in rows}
    fed = {tuple(x[: int((y != IGNORED).int().argmax())].tolist()) for x, y in examples}  # prompts
    # In ChatML the BOS opens every turn; it counts as right if all examples have as many.
    turns = max(1, encode(tokenizer, rows[0]).ids.count(bos))
    begins = Counter(1.0 if bos is None else int((x == bos).sum()) / turns for x, _ in examples)
    dtypes = list(lora.dtype_census(trainer.model)["trained"])
    count = lora.trainable_parameters(trainer.model)
    expected = adapter_parameters(Shape.of(trainer.model.config), plan.lora_r)
    memory = f"{plan.fit.memory_gb:.2f} of {plan.card_gb:.0f} GB"
    return [
        ("BOS tokens per example", _counts(begins), set(begins) == {1}),
        ("end tokens in the loss per answer", _counts(stops), set(stops) == {1}),
        ("pad tokens in the loss", str(padded), not padded),
        ("pad token differs from the end tokens", str(tokenizer.pad_token), pad not in ends),
        ("share of tokens in the loss", f"{share:.0%}", in_loss > 0),
        ("prompts in training are those of use", f"{len(fed):,} prompts", fed <= asked),
        ("adapter dtype", ", ".join(dtypes), dtypes == [plan.adapter_dtype]),
        ("trainable parameters", f"{count:,} (closed form {expected:,})", count == expected),
        ("predicted memory", memory, plan.fit.memory_gb <= plan.card_gb),
        *([("what Triton needs", *triton_needs())] if plan.device == "cuda" else []),
    ]


def _examples(trainer: SFTTrainer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (ids, labels) of each example in the first 256 packed rows, as collated."""
    for row in itertools.islice(trainer.train_dataset, 256):
        batch = trainer.data_collator([row])
        # Position numbers begin anew with each example of a packed row.
        starts = (batch["position_ids"][0] == 0).nonzero().flatten()[1:]
        split = (batch[name][0].tensor_split(starts) for name in ("input_ids", "labels"))
        yield from zip(*split, strict=True)


def _counts(counter: Counter[Any]) -> str:
    """Write ``{1: 864}`` as "1 in each of 864", and anything else count by count."""
    if len(counter) == 1:
        return f"{next(iter(counter)):g} in each of {counter.total():,}"
    return ", ".join(f"{value:g} in {times:,}" for value, times in sorted(counter.items()))


def require(checks: Sequence[tuple[str, str, bool]]) -> None:
    """Raise a ``CourseError`` that names each check of ``checks`` that failed."""
    if failed := [f"{what}: {value}" for what, value, passed in checks if not passed]:
        raise CourseError(f"pre-flight check failed: {'; '.join(failed)}. Fix it before training.")


def require_learning(model: torch.nn.Module) -> None:
    """Check that every ``lora_B`` is finite and has left zero; names the first that has not."""
    norms = lora.lora_b_norms(model)
    if broken := [name for name, norm in norms.items() if not math.isfinite(norm)]:
        raise CourseError(
            f"{len(broken)} adapters are not finite, the first is {broken[0]}: "
            "halve the learning rate, or compute in float32."
        )
    if idle := [name for name, norm in norms.items() if norm == 0]:
        raise CourseError(
            f"{len(idle)} adapters did not learn (lora_B is zero), the first is {idle[0]}: "
            "gradients do not reach them. Load an adapter that goes on with is_trainable=True. "
            "With activation checkpointing call model.enable_input_require_grads() first."
        )
