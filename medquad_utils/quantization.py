"""4-bit NormalFloat (NF4) by hand, and the config that makes bitsandbytes do it.

QLoRA, arXiv 2305.14314, section 3: the 16 levels sit at quantiles of a normal distribution, weights are scaled to
[-1, 1] block by block, and the scales themselves are quantised once more ("double quantisation").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from medquad_utils.memory import BLOCK
from medquad_utils.memory import (
    bits_per_parameter as bits_per_parameter,
)  # part of this module's face
from medquad_utils.profiles import Plan, Shape

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

# FP4 as bitsandbytes stores it (sign, two exponent bits, one mantissa bit, with 0 and a subnormal), over its largest value 12.
FP4_LEVELS = torch.tensor([-12, -8, -6, -4, -3, -2, -0.0625, 0, 0.0625, 2, 3, 4, 6, 8, 12]) / 12
INT4_LEVELS = torch.arange(-7, 8) / 7  # symmetric: 15 of the 16 codes


def nf4_levels(offset: float = 0.9677083) -> torch.Tensor:
    """The 16 levels of NF4, fp32, ascending from -1 to 1.

    Eight quantiles of N(0, 1) above zero, seven below and an exact zero, divided by the largest. ``offset`` is the
    probability at which the outermost level sits: 1 - (1/30 + 1/32) / 2, the middle between the last half-bins of a
    15- and a 16-level grid.
    """
    normal = torch.distributions.Normal(
        torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    )
    positive = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)])
    return (levels / levels.max()).float()


def quantize_blocks(
    weights: torch.Tensor, levels: torch.Tensor, block: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round ``weights`` (any shape, a multiple of ``block`` values) to ``levels``, block by block.

    Returns:
        codes: int64, shape (blocks, block), the nearest level of each weight over its block's scale.
        scales: fp32, shape (blocks,), the largest magnitude of each block ("absmax").

    Raises:
        ValueError: the number of weights is not a multiple of ``block``.
    """
    if weights.numel() % block:
        raise ValueError(f"{weights.numel()} weights are no multiple of the block size {block}")
    blocks = weights.reshape(-1, block).float()
    scales = blocks.abs().amax(dim=1)
    unit = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)
    return codes, scales


def dequantize_blocks(
    codes: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, shape: torch.Size | None = None
) -> torch.Tensor:
    """The weights that ``quantize_blocks`` stands for: level times scale, fp32, in ``shape`` if it is given."""
    weights = levels[codes] * scales[:, None]
    return weights if shape is None else weights.reshape(shape)


def relative_error(weights: torch.Tensor, levels: torch.Tensor, block: int = BLOCK) -> float:
    """Root-mean-square error of rounding to ``levels`` over the root-mean-square of ``weights``."""
    rounded = dequantize_blocks(*quantize_blocks(weights, levels, block), levels, weights.shape)
    return float((rounded - weights).norm() / weights.norm())


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' packed bytes (two codes a byte, the first in the high half) as int64 codes in reading order."""
    flat = packed.flatten().to(torch.int64)
    return torch.stack([flat >> 4, flat & 15], dim=1).flatten()


def model_memory_gb(shape: Shape, bits: float, other_bits: float = 16) -> dict[str, float]:
    """GB (1e9 bytes) of a Llama's parts when its blocks' linear layers take ``bits`` and everything else ``other_bits``."""
    rest = shape.parameters - shape.block_parameters - shape.embedding_parameters
    return {
        "linear layers": shape.block_parameters * bits / 8e9,
        "embeddings and head": shape.embedding_parameters * other_bits / 8e9,
        "norms": rest * other_bits / 8e9,
    }


def nf4_config(plan: Plan) -> BitsAndBytesConfig:
    """The course's 4-bit config: NF4 with double quantisation, computing in the plan's dtype.

    FSDP cuts only floating-point tensors: there the packed codes are stored as if they were weights of that dtype. The bytes
    are the same.
    """
    from transformers import BitsAndBytesConfig

    storage = {"bnb_4bit_quant_storage": getattr(torch, plan.compute_dtype)} if plan.sharded else {}
    return BitsAndBytesConfig(
        **storage,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, plan.compute_dtype),
    )


def measured_memory(model: torch.nn.Module) -> dict[str, int]:
    """Bytes that a loaded model's parameters take, 4-bit scales included, by kind."""
    import bitsandbytes

    sizes = {"4-bit codes": 0, "4-bit scales": 0, "16/32-bit weights": 0}
    for parameter in {id(p): p for p in model.parameters()}.values():
        if isinstance(parameter, bitsandbytes.nn.Params4bit):
            sizes["4-bit codes"] += parameter.numel() * parameter.element_size()
            sizes["4-bit scales"] += sum(
                t.numel() * t.element_size() for t in _tensors(parameter.quant_state)
            )
        else:
            sizes["16/32-bit weights"] += parameter.numel() * parameter.element_size()
    return sizes


def _tensors(state: Any) -> list[torch.Tensor]:
    nested = [state.state2.absmax, state.offset] if state.nested else []
    return [state.absmax, *nested]


def text_perplexity(model: torch.nn.Module, tokenizer: Any, texts: list[str]) -> float:
    """exp of the mean negative log-likelihood of a token of ``texts``, each scored alone after BOS."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"].to(
                next(model.parameters()).device
            )
            logits = model(input_ids=ids).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    return float(torch.tensor(total / max(1, count)).exp())
