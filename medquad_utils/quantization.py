"""4-bit NormalFloat (NF4) by hand, the config for bitsandbytes, and 4-bit weights unpacked on CPUs.

QLoRA, arXiv 2305.14314, section 3: the 16 levels are quantiles of a normal distribution. Weights
are scaled to [-1, 1] block by block, and the scales are quantised again ("double quantisation").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from medquad_utils.memory import BLOCK, Shape
from medquad_utils.memory import bits_per_parameter as bits_per_parameter  # lessons call it here
from medquad_utils.profiles import Plan

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

# FP4 as bitsandbytes stores it: sign, two exponent bits, one mantissa bit; its largest value is 12.
FP4_LEVELS = torch.tensor([-12, -8, -6, -4, -3, -2, -0.0625, 0, 0.0625, 2, 3, 4, 6, 8, 12]) / 12


def nf4_levels(offset: float = 0.9677083) -> torch.Tensor:
    """Compute the 16 levels of NF4: fp32, ascending from -1 to 1.

    Eight quantiles of N(0, 1) above zero, seven below, and an exact zero, divided by the largest.
    ``offset`` is the probability of the outermost level: 1 - (1/30 + 1/32) / 2, the middle between
    the last half-bins of a 15-level and a 16-level grid.
    """
    # ndtri(p) is the p-quantile of N(0, 1). Zero, the quantile of 0.5, must come once only.
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    positive = torch.special.ndtri(torch.linspace(0.5, offset, 9, dtype=torch.float64))
    levels = torch.cat([negative, positive])
    return (levels / levels.max()).float()


def quantize_blocks(
    weights: torch.Tensor, levels: torch.Tensor, block: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round ``weights`` (any shape, whole blocks) to the nearest of ``levels``, block by block.

    Returns:
        codes: int64, shape (blocks, block), the index of each weight's level.
        scales: fp32, shape (blocks,), the largest magnitude of each block ("absmax").
    """
    blocks = weights.reshape(-1, block).float()
    scales = blocks.abs().amax(dim=1)
    # The largest weight of a block becomes 1 or -1, which are levels: it is stored exactly.
    # A block of zeros has scale 0, and the clamp avoids 0 / 0.
    unit = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    # The nearest level: count the midpoints between neighbouring levels that lie below the weight.
    codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)
    return codes, scales


def dequantize_blocks(
    codes: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, shape: torch.Size | None = None
) -> torch.Tensor:
    """Return the fp32 weights that ``quantize_blocks`` stored: level times scale of the block."""
    weights = levels[codes] * scales[:, None]
    return weights if shape is None else weights.reshape(shape)


def model_memory_gb(shape: Shape, bits: float, other_bits: float = 16) -> dict[str, float]:
    """Return GB (1e9 bytes) by part: ``bits`` a weight in linear layers, else ``other_bits``."""
    rest = shape.parameters - shape.block_parameters - shape.embedding_parameters
    return {
        "linear layers": shape.block_parameters * bits / 8e9,
        "embeddings and head": shape.embedding_parameters * other_bits / 8e9,
        "norms": rest * other_bits / 8e9,
    }


def nf4_config(plan: Plan) -> BitsAndBytesConfig:
    """Build the course's 4-bit config: NF4, double quantisation, the plan's compute dtype."""
    from transformers import BitsAndBytesConfig

    dtype = getattr(torch, plan.compute_dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,  # the scales in 8 bits: 4.127 bits a weight, not 4.5
        bnb_4bit_compute_dtype=dtype,
        # FSDP shards only floating-point tensors: it needs the same bytes under another dtype.
        bnb_4bit_quant_storage=dtype if plan.sharded else torch.uint8,
    )


def measured_memory(model: torch.nn.Module) -> dict[str, int]:
    """Count the bytes of a loaded model's parameters, 4-bit scales included, by kind."""
    from bitsandbytes.nn import Params4bit

    sizes = {"4-bit codes": 0, "4-bit scales": 0, "16/32-bit weights": 0}
    for parameter in model.parameters():  # shared parameters come once
        if not isinstance(parameter, Params4bit):
            sizes["16/32-bit weights"] += parameter.nbytes
            continue
        sizes["4-bit codes"] += parameter.nbytes
        state = parameter.quant_state
        # Double quantisation: 8-bit scales, with fp32 scales and a mean (offset) of their own.
        nested = [state.state2.absmax, state.offset] if state.nested else []
        sizes["4-bit scales"] += sum(tensor.nbytes for tensor in (state.absmax, *nested))
    return sizes


@contextmanager
def unpacked(model: torch.nn.Module) -> Iterator[None]:
    """Dequantise 4-bit weights once inside the block; results stay the same to the bit.

    On a CPU, bitsandbytes dequantises the whole matrix at every call of a layer. Nothing changes on
    a GPU, whose kernels read packed weights, or if the matrices (2 or 4 bytes a weight) need more
    than half of the free RAM. Parameters and adapters stay as they are.
    """
    import psutil
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layers = [m for m in model.modules() if isinstance(m, Linear4bit) and _can_unpack(m)]
    need = sum(m.in_features * m.out_features * m.compute_dtype.itemsize for m in layers)
    layers = layers if need <= psutil.virtual_memory().available / 2 else []
    try:
        for layer in layers:
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            # An attribute of the object hides the method of its class until it is deleted.
            layer.forward = partial(_linear, weight=weight, bias=layer.bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _can_unpack(layer: Any) -> bool:
    """Check that a layer is on the CPU, in plain layout and not unpacked by an outer block."""
    state = layer.weight.quant_state
    return (
        layer.weight.device.type == "cpu"
        and not getattr(state, "packing_format_for_cpu", False)  # for CPUs with AVX-512 BF16
        and state.dtype == layer.compute_dtype
        and "forward" not in vars(layer)
    )


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)
