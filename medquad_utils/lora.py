"""LoRA adapters: the config, and counts, norms, spectra and dtypes of their matrices.

LoRA, arXiv 2106.09685: a frozen weight W gets a trained low-rank update,
y = W x + (alpha / r) B A x. B starts at 0, so an untrained adapter changes nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from medquad_utils.memory import ALL_LINEAR
from medquad_utils.memory import adapter_parameters as adapter_parameters  # lessons call it here
from medquad_utils.profiles import Plan

if TYPE_CHECKING:
    from peft import LoraConfig


def lora_config(plan: Plan) -> LoraConfig:
    """Build the course's adapter config: rank and alpha of the plan, on every linear layer."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM", target_modules=list(ALL_LINEAR),
        r=plan.lora_r, lora_alpha=plan.lora_alpha, lora_dropout=plan.lora_dropout,
    )  # fmt: skip


def trainable_parameters(model: torch.nn.Module) -> int:
    """Count the parameters that training updates."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def dtype_census(model: torch.nn.Module) -> dict[str, dict[str, int]]:
    """Count stored values by role ("frozen", "trained") and dtype; 4-bit codes count as bytes."""
    census: dict[str, Counter[str]] = {"frozen": Counter(), "trained": Counter()}
    for parameter in model.parameters():
        role = "trained" if parameter.requires_grad else "frozen"
        census[role][str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return {role: dict(counts) for role, counts in census.items()}


def lora_b_norms(model: torch.nn.Module) -> dict[str, float]:
    """Return the Frobenius norm of every ``lora_B``: 0 means that it has not learned (yet)."""
    parameters = model.named_parameters()
    return {name: float(p.detach().float().norm()) for name, p in parameters if ".lora_B." in name}


def frozen_hash(model: torch.nn.Module) -> str:
    """Hash every byte that is not an adapter's: 4-bit codes and scales, embeddings, norms."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():  # the scales have entries of their own
        if ".lora_" not in name:
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def singular_values(model: torch.nn.Module) -> list[float]:
    """Return the singular values of the updates B A as shares of the largest, mean over layers."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_B")]
    spectra = []
    for layer in layers:
        a, b = (part["default"].weight.detach().float() for part in (layer.lora_A, layer.lora_B))
        # Those of the small r by r product of the triangular factors are the same.
        values = torch.linalg.svdvals(torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T)
        spectra.append(values / values[0])
    shares: list[float] = torch.stack(spectra).mean(0).tolist()
    return shares


def cast_adapters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast the adapters to ``dtype`` in place; for training do it *after* ``SFTTrainer`` is built.

    The trainer casts the adapters of a 4-bit model to bf16, whatever the config says. Then a CPU
    without AVX512-BF16 trains 15 to 20 times slower, and fp16 training on a GPU before Ampere
    fails in the gradient scaler. fp32 adapters avoid both.
    """
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
