"""NF4 by hand against bitsandbytes; errors, bits and memory against known numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from medquad_utils.generation import load_base
from medquad_utils.profiles import PROFILES, Hardware, Plan, Shape, resolve
from medquad_utils.quantization import (
    BLOCK,
    FP4_LEVELS,
    INT4_LEVELS,
    bits_per_parameter,
    dequantize_blocks,
    measured_memory,
    model_memory_gb,
    nf4_config,
    nf4_levels,
    quantize_blocks,
    relative_error,
    text_perplexity,
    unpack_codes,
)

NF4 = nf4_levels()
# The levels as the QLoRA paper prints them (arXiv 2305.14314, appendix E).
PAPER = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def stored(weights: torch.Tensor, double: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What bitsandbytes makes of ``weights``: codes, scales, and the weights it reads back."""
    packed, state = bnb.quantize_4bit(weights, blocksize=BLOCK, quant_type="nf4", compress_statistics=double)
    scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    return unpack_codes(packed).reshape(-1, BLOCK), scales.flatten(), bnb.dequantize_4bit(packed, state)


def normal(*shape: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


# ---- levels and codes -----------------------------------------------------------------------------------------------


def test_the_levels_are_those_of_the_paper_and_of_bitsandbytes() -> None:
    torch.testing.assert_close(NF4, torch.tensor(PAPER), atol=2e-7, rtol=0)
    torch.testing.assert_close(NF4, bnb.get_4bit_type("nf4", device="cpu"), atol=2e-7, rtol=0)
    torch.testing.assert_close(FP4_LEVELS, torch.unique(bnb.get_4bit_type("fp4", device="cpu")), atol=1e-7, rtol=0)
    assert (INT4_LEVELS * 7).tolist() == list(range(-7, 8))


ADVERSARIAL = {
    "zeros": torch.zeros(BLOCK),
    "one constant": torch.full((BLOCK,), 0.3),
    "one negative constant": torch.full((BLOCK,), -7e-4),
    "one outlier": torch.cat([normal(BLOCK - 1, scale=1e-3), torch.tensor([100.0])]),
    "one negative outlier": torch.cat([torch.tensor([-100.0]), normal(BLOCK - 1, scale=1e-3)]),
    "one weight among zeros": torch.cat([torch.zeros(BLOCK - 1), torch.tensor([-3e-5])]),
    "two signs": torch.tensor([1.0, -1.0]).repeat(BLOCK // 2),
    "the levels themselves": 0.37 * NF4.repeat(BLOCK // 16),
    "a ramp": torch.linspace(-2, 2, BLOCK),
    "huge": normal(BLOCK, scale=1e30),
    "minute": normal(BLOCK, scale=1e-30),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_an_adversarial_block_gets_the_codes_of_bitsandbytes(name: str) -> None:
    block = ADVERSARIAL[name][None]
    codes, scales = quantize_blocks(block, NF4)
    expected_codes, expected_scales, read_back = stored(block)
    assert codes.tolist() == expected_codes.tolist()
    assert scales.tolist() == expected_scales.tolist()
    torch.testing.assert_close(dequantize_blocks(codes, scales, NF4), read_back, atol=3e-7 * float(scales), rtol=0)


def test_a_normal_matrix_gets_the_codes_of_bitsandbytes() -> None:
    weights = normal(512, 256)
    codes, scales = quantize_blocks(weights, NF4)
    expected_codes, expected_scales, read_back = stored(weights)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scales, expected_scales)
    torch.testing.assert_close(dequantize_blocks(codes, scales, NF4, weights.shape), read_back, atol=1e-7, rtol=0)


blocks = st.tuples(st.lists(st.floats(-1, 1, width=32, allow_subnormal=False), min_size=BLOCK, max_size=BLOCK), st.integers(-20, 20)).map(
    lambda made: torch.tensor(made[0]) * 10.0 ** made[1]
)


@given(blocks)
def test_any_block_gets_the_codes_of_bitsandbytes(block: torch.Tensor) -> None:
    """Only exactly half-way between two levels, within rounding, may the neighbour be taken: both are equally near."""
    codes, scales = quantize_blocks(block[None], NF4)
    expected, expected_scales, _ = stored(block[None])
    assert torch.equal(scales, expected_scales)
    unit = (block / scales if scales > 0 else block)[None]
    half_way = ((unit[..., None] - (NF4[1:] + NF4[:-1]) / 2).abs() < 1e-6).any(-1)
    assert torch.equal(codes[~half_way], expected[~half_way])
    assert int((codes - expected).abs().max()) <= 1


@given(blocks, st.sampled_from([NF4, FP4_LEVELS, INT4_LEVELS]))
def test_no_error_exceeds_half_the_widest_gap_times_the_scale(block: torch.Tensor, levels: torch.Tensor) -> None:
    codes, scales = quantize_blocks(block[None], levels)
    error = (dequantize_blocks(codes, scales, levels) - block).abs().max()
    assert error <= scales * (levels.diff().max() / 2) * (1 + 1e-5)
    read_back = dequantize_blocks(codes, scales, levels, block.shape)
    assert read_back.shape == block.shape
    assert torch.equal(quantize_blocks(read_back[None], levels)[0], codes), "what was rounded once stays where it is"


@given(st.integers(1, 5 * BLOCK).filter(lambda n: n % BLOCK))
def test_weights_that_fill_no_block_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} weights are no multiple of the block size 64"):
        quantize_blocks(torch.zeros(count), NF4)


# ---- errors, bits and memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("levels", "expected"), [(NF4, 0.0920), (FP4_LEVELS, 0.1220), (INT4_LEVELS, 0.1076)], ids=["nf4", "fp4", "int4"])
def test_errors_on_normal_weights_are_those_that_were_measured(levels: torch.Tensor, expected: float) -> None:
    assert relative_error(normal(1024, 1024), levels) == pytest.approx(expected, abs=4e-4)


def test_double_quantisation_costs_next_to_no_accuracy() -> None:
    weights = normal(1024, 512)
    single, double = (float((stored(weights, d)[2] - weights).norm() / weights.norm()) for d in (False, True))
    assert single == pytest.approx(relative_error(weights, NF4), abs=1e-6)
    assert 0 < double - single < 1e-4


def test_a_weight_costs_four_and_a_half_bits_or_a_little_over_four() -> None:
    assert bits_per_parameter(double_quant=False) == 4.5
    assert bits_per_parameter(double_quant=True) == 4 + 8 / 64 + 32 / (64 * 256)
    assert round(bits_per_parameter(double_quant=True), 3) == 4.127


def test_the_bits_are_those_that_bitsandbytes_stores() -> None:
    weights = normal(1024, 1024)
    for double in (False, True):
        packed, state = bnb.quantize_4bit(weights, blocksize=BLOCK, quant_type="nf4", compress_statistics=double)
        scales = [state.absmax, state.state2.absmax] if double else [state.absmax]
        bits = 8 * sum(t.numel() * t.element_size() for t in (packed, *scales)) / weights.numel()
        assert bits == bits_per_parameter(double)


def test_eight_billion_parameters_take_under_six_gigabytes() -> None:
    shape = PROFILES["llama-8b"].shape
    assert shape.block_parameters == 6_979_321_856
    parts = model_memory_gb(shape, bits_per_parameter(double_quant=True))
    assert sum(parts.values()) == pytest.approx(5.70, abs=0.005)
    assert sum(model_memory_gb(shape, 16).values()) == pytest.approx(8_030_261_248 * 2 / 1e9)
    assert sum(model_memory_gb(shape, 32, 32).values()) == pytest.approx(8_030_261_248 * 4 / 1e9)


# ---- the loaded model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return resolve("tiny", hardware=Hardware("cpu", "a CPU", 8.0), out=str(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def model(plan: Plan) -> Any:
    return load_base(plan)


def test_the_config_asks_for_nf4_with_double_quantisation_in_the_plans_dtype(plan: Plan) -> None:
    config = nf4_config(plan)
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.float32
    t4 = resolve("tiny", hardware=Hardware("cuda", "Tesla T4", 15.0, (7, 5)), out=plan.out)
    assert nf4_config(t4).bnb_4bit_compute_dtype == torch.float16


def test_measured_memory_is_what_was_predicted(model: Any) -> None:
    shape = Shape.of(model.config)
    found = measured_memory(model)
    predicted = model_memory_gb(shape, bits_per_parameter(double_quant=True), other_bits=32)
    assert found["4-bit codes"] * 2 == shape.block_parameters
    assert found["4-bit codes"] + found["4-bit scales"] == pytest.approx(predicted["linear layers"] * 1e9, rel=0.002)
    assert found["16/32-bit weights"] == pytest.approx((predicted["embeddings and head"] + predicted["norms"]) * 1e9, rel=1e-9)


def test_the_loaded_weights_are_those_that_the_hand_made_code_gives(model: Any, plan: Plan) -> None:
    plain = LlamaForCausalLM.from_pretrained(plan.model_source, dtype=torch.float32)
    for name in ("q_proj", "k_proj", "o_proj"):
        layer, original = getattr(model.model.layers[1].self_attn, name), getattr(plain.model.layers[1].self_attn, name)
        codes, scales = quantize_blocks(original.weight.detach(), NF4)
        assert torch.equal(unpack_codes(layer.weight.data).reshape(-1, BLOCK), codes)
        state = layer.weight.quant_state
        stored_scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        torch.testing.assert_close(stored_scales.flatten(), scales, atol=0.01 * float(scales.max()), rtol=0)


def test_only_the_linear_layers_of_the_blocks_are_quantised(model: Any) -> None:
    import bitsandbytes

    packed = {name.rsplit(".", 2)[-2] for name, p in model.named_parameters() if isinstance(p, bitsandbytes.nn.Params4bit)}
    assert packed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {p.dtype for p in model.parameters() if not isinstance(p, bitsandbytes.nn.Params4bit)} == {torch.float32}


def test_perplexity_is_that_of_transformers_own_loss(model: Any, plan: Plan) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(plan.model_source)
    text = "Symptoms of asthma include wheezing."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss
    assert text_perplexity(model, tokenizer, [text]) == pytest.approx(float(loss.exp()), rel=1e-4)
    assert text_perplexity(model, tokenizer, [text, text]) == pytest.approx(float(loss.exp()), rel=1e-4)
    model_of_nothing = Path(plan.out)
    assert not list(model_of_nothing.iterdir()), "measuring writes no file"
