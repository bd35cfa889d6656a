"""NF4 by hand against bitsandbytes; errors, bits and memory against known numbers."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Params4bit
from conftest import REPO, tiny
from hypothesis import given
from hypothesis import strategies as st

from medquad_utils import quantization as q
from medquad_utils.files import read_json
from medquad_utils.generation import load_base
from medquad_utils.machine import Hardware
from medquad_utils.profiles import PROFILES, Shape, resolve

BLOCK, NF4 = q.BLOCK, q.nf4_levels()
# The levels as the QLoRA paper prints them (arXiv 2305.14314, appendix E).
PAPER = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
pack = partial(bnb.quantize_4bit, blocksize=BLOCK, quant_type="nf4")


def scales_of(state: Any) -> torch.Tensor:
    if not state.nested:
        return state.absmax
    return (bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset).flatten()


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """The codes in bitsandbytes' bytes: two a byte, the first in the high half."""
    flat = packed.flatten().to(torch.int64)
    return torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1, BLOCK)


def relative_error(weights: torch.Tensor, levels: torch.Tensor) -> float:
    rounded = q.dequantize_blocks(*q.quantize_blocks(weights, levels), levels, weights.shape)
    return float((rounded - weights).norm() / weights.norm())


def stored(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What bitsandbytes makes of ``weights``: codes, scales, and the weights it reads back."""
    packed, state = pack(weights)
    return unpack_codes(packed), scales_of(state), bnb.dequantize_4bit(packed, state)


def normal(*shape: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_levels_are_those_of_the_paper_and_of_bitsandbytes() -> None:
    torch.testing.assert_close(NF4, torch.tensor(PAPER), atol=2e-7, rtol=0)
    torch.testing.assert_close(NF4, bnb.get_4bit_type("nf4", device="cpu"), atol=2e-7, rtol=0)
    fp4 = torch.unique(bnb.get_4bit_type("fp4", device="cpu"))
    torch.testing.assert_close(q.FP4_LEVELS, fp4, atol=1e-7, rtol=0)


WEIGHTS = {
    "a normal matrix": normal(512, 256),
    "zeros": torch.zeros(BLOCK),
    "one negative constant": torch.full((BLOCK,), -7e-4),
    "one outlier": torch.cat([normal(BLOCK - 1, scale=1e-3), torch.tensor([100.0])]),
    "one weight among zeros": torch.cat([torch.zeros(BLOCK - 1), torch.tensor([-3e-5])]),
    "the levels themselves": 0.37 * NF4.repeat(BLOCK // 16),
    "huge": normal(BLOCK, scale=1e30),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_hand_made_codes_are_those_of_bitsandbytes(name: str) -> None:
    weights = WEIGHTS[name][None]
    codes, scales = q.quantize_blocks(weights, NF4)
    expected_codes, expected_scales, expected = stored(weights)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scales, expected_scales)
    read_back = q.dequantize_blocks(codes, scales, NF4, weights.shape)
    torch.testing.assert_close(read_back, expected, atol=3e-7 * float(scales.max()), rtol=0)


floats = st.floats(-1, 1, width=32, allow_subnormal=False)
lists = st.lists(floats, min_size=BLOCK, max_size=BLOCK)
scales = st.integers(-20, 20).map(lambda power: 10.0**power)
blocks = st.builds(torch.mul, lists.map(torch.tensor), scales)


@given(blocks)
def test_any_block_gets_the_codes_of_bitsandbytes(block: torch.Tensor) -> None:
    """Only a weight half-way between two levels, within rounding, may get the neighbour's code."""
    codes, scales = q.quantize_blocks(block[None], NF4)
    expected, expected_scales, _ = stored(block[None])
    assert torch.equal(scales, expected_scales)
    unit = (block / scales if scales > 0 else block)[None]
    half_way = ((unit[..., None] - (NF4[1:] + NF4[:-1]) / 2).abs() < 1e-6).any(-1)
    assert torch.equal(codes[~half_way], expected[~half_way])
    assert int((codes - expected).abs().max()) <= 1


def test_errors_on_normal_weights_are_the_measured_ones() -> None:
    int4 = torch.arange(-7, 8) / 7
    for levels, expected in ((NF4, 0.0920), (q.FP4_LEVELS, 0.1220), (int4, 0.1076)):
        assert relative_error(normal(1024, 1024), levels) == pytest.approx(expected, abs=4e-4)


def test_double_quantisation_saves_bits_at_almost_no_error() -> None:
    weights = normal(1024, 1024)
    errors = []
    for double, by_hand in ((False, 4.5), (True, 4 + 8 / 64 + 32 / (64 * 256))):
        packed, state = pack(weights, compress_statistics=double)
        scales = [state.absmax, state.state2.absmax] if double else [state.absmax]
        bits = 8 * sum(t.numel() * t.element_size() for t in (packed, *scales)) / weights.numel()
        assert q.bits_per_parameter(double) == by_hand == bits
        read_back = bnb.dequantize_4bit(packed, state)
        errors.append(float((read_back - weights).norm() / weights.norm()))
    assert errors[0] == pytest.approx(relative_error(weights, NF4), abs=1e-6)
    assert 0 < errors[1] - errors[0] < 1e-4


def test_eight_billion_parameters_take_under_six_gigabytes() -> None:
    shape = PROFILES["llama-8b"].shape
    assert shape.block_parameters == 6_979_321_856
    four_bits = q.model_memory_gb(shape, q.bits_per_parameter(double_quant=True))
    assert sum(four_bits.values()) == pytest.approx(5.70, abs=0.005)
    for bits in (16, 32):
        parts = q.model_memory_gb(shape, bits, bits)
        assert sum(parts.values()) == pytest.approx(8_030_261_248 * bits / 8e9)


def test_config_has_nf4_double_quantisation_and_the_plans_dtype() -> None:
    config = q.nf4_config(tiny())
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert config.bnb_4bit_use_double_quant is True
    assert config.bnb_4bit_compute_dtype == torch.float32
    t4 = resolve("tiny", hardware=Hardware("cuda", "Tesla T4", 15.0, (7, 5)), out="runs")
    assert q.nf4_config(t4).bnb_4bit_compute_dtype == torch.float16


def test_loaded_model_takes_the_predicted_memory(tiny_base: Any) -> None:
    shape = Shape.of(tiny_base.config)
    found = q.measured_memory(tiny_base)
    predicted = q.model_memory_gb(shape, q.bits_per_parameter(double_quant=True), other_bits=32)
    assert found["4-bit codes"] * 2 == shape.block_parameters
    packed = found["4-bit codes"] + found["4-bit scales"]
    assert packed == pytest.approx(predicted["linear layers"] * 1e9, rel=0.0002)
    rest = predicted["embeddings and head"] + predicted["norms"]
    assert found["16/32-bit weights"] == pytest.approx(rest * 1e9, rel=1e-9)
    named = tiny_base.named_parameters()
    kinds = {name.split(".")[-2] for name, p in named if isinstance(p, Params4bit)}
    assert kinds == set(shape.linears()), "only the linear layers of the blocks are packed"


def test_loaded_weights_are_those_of_the_hand_made_code(tiny_base: Any) -> None:
    plain = load_base(tiny(), quantized=False)
    for name in ("q_proj", "k_proj", "o_proj"):
        layer = getattr(tiny_base.model.layers[1].self_attn, name)
        original = getattr(plain.model.layers[1].self_attn, name).weight.detach()
        codes, scales = q.quantize_blocks(original, NF4)
        assert torch.equal(unpack_codes(layer.weight.data), codes)
        found = scales_of(layer.weight.quant_state)
        torch.testing.assert_close(found, scales, atol=0.01 * float(scales.max()), rtol=0)


def test_lesson_02_says_which_formats_transformers_trains() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    cells = read_json(REPO / "notebooks" / "02_quantize_to_4_bits.ipynb")["cells"]
    rows = [line.split("|")[1:4] for cell in cells for line in cell["source"] if line[0] == "|"]
    said = {name: trains for what, _, trains in rows for name in re.findall("`(.+?)`", what)}
    assert said.pop("awq") == "with gptqmodel 5"  # asks for the version of a package
    assert len(said) == 6
    for name, trains in said.items():
        assert trains == ("yes" if AUTO_QUANTIZER_MAPPING[name].is_trainable.fget(None) else "no")
