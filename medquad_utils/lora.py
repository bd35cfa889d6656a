"""LoRA adapters: the config, the parameter counts in closed form, and a look at where they sit and in which dtypes.

LoRA, arXiv 2106.09685: a frozen weight W gets a learned low-rank term, y = W x + (alpha / r) B A x, with B = 0 at the start.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from medquad_utils.memory import ALL_LINEAR
from medquad_utils.memory import (
    adapter_parameters as adapter_parameters,
)  # part of this module's face
from medquad_utils.profiles import Plan

if TYPE_CHECKING:
    from peft import LoraConfig


def lora_config(plan: Plan) -> LoraConfig:
    """The course's adapter: the plan's rank and alpha on all linear layers of every block."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=plan.lora_r,
        lora_alpha=plan.lora_alpha,
        lora_dropout=plan.lora_dropout,
        target_modules=list(ALL_LINEAR),
    )


def trainable_parameters(model: torch.nn.Module) -> int:
    """Parameters of ``model`` that a gradient step changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def adapted_modules(model: torch.nn.Module) -> dict[str, int]:
    """Kind of linear layer -> how many of its kind carry an adapter."""
    names = [name.split(".")[-4] for name, _ in model.named_parameters() if ".lora_A." in name]
    return dict(Counter(names))


def dtype_census(model: torch.nn.Module) -> dict[str, dict[str, int]]:
    """Role ("frozen" or "trained") -> dtype -> number of stored values; packed 4-bit weights are counted in bytes (uint8)."""
    census: dict[str, Counter[str]] = {"frozen": Counter(), "trained": Counter()}
    for parameter in model.parameters():
        census["trained" if parameter.requires_grad else "frozen"][
            str(parameter.dtype).removeprefix("torch.")
        ] += parameter.numel()
    return {role: dict(counts) for role, counts in census.items()}


def lora_b_norms(model: torch.nn.Module) -> dict[str, float]:
    """Name -> Frobenius norm of every ``lora_B``: all zero before training; a zero afterwards means that it never learned."""
    return {
        name: float(p.detach().float().norm())
        for name, p in model.named_parameters()
        if ".lora_B." in name
    }


def cast_adapters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast the trainable parameters of ``model`` to ``dtype``, in place.

    To be called *after* ``SFTTrainer`` is built: the trainer casts the adapters of a 4-bit model to bf16 whatever the
    config says. On a CPU without AVX512-BF16 that makes every step 15 to 20 times slower; on a GPU before Ampere, fp16
    training then fails in the gradient scaler. fp32 adapters mend both.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
