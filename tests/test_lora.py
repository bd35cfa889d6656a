"""LoRA: closed forms against PEFT, the start at zero, dtypes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from medquad_utils.generation import load_base
from medquad_utils.lora import (
    ALL_LINEAR,
    adapted_modules,
    adapter_parameters,
    cast_adapters,
    dtype_census,
    lora_b_norms,
    lora_config,
    trainable_parameters,
)
from medquad_utils.profiles import PROFILES, Hardware, Plan, Shape, resolve

# Odd sizes on purpose: heads x head_dim is not the hidden size, nothing is a power of two.
ODD = {
    "vocab_size": 61, "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 10,
}  # fmt: skip


@pytest.fixture
def plan(tmp_path: Any) -> Plan:
    return resolve("tiny", hardware=Hardware("cpu", "a CPU", 8.0), lora_r=5, out=str(tmp_path))


@pytest.fixture
def odd() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**ODD)).eval()


# ---- counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "parameters"), [(8, 20_971_520), (16, 41_943_040), (64, 167_772_160)])
def test_the_closed_form_gives_the_known_counts_for_eight_billion(rank: int, parameters: int) -> None:
    assert adapter_parameters(PROFILES["llama-8b"].shape, rank) == parameters


def test_the_closed_form_by_hand_for_one_layer() -> None:
    shape = Shape(hidden=10, layers=1, intermediate=30, heads=2, kv_heads=1, vocab=7)
    assert adapter_parameters(shape, 1, ("q_proj",)) == 10 + 10
    assert adapter_parameters(shape, 1, ("k_proj",)) == 10 + 5
    assert adapter_parameters(shape, 3, ("gate_proj", "down_proj")) == 3 * (40 + 40)
    assert adapter_parameters(shape, 1) == 20 + 15 + 15 + 20 + 40 + 40 + 40


sizes = st.fixed_dictionaries(
    {"hidden_size": st.integers(1, 6).map(lambda n: 4 * n), "intermediate_size": st.integers(1, 40), "num_hidden_layers": st.integers(1, 3)}
)


@given(sizes, st.sampled_from([(4, 4), (4, 2), (4, 1), (2, 1)]), st.sampled_from([0, 6]), st.integers(1, 9), st.booleans())
def test_the_closed_form_equals_what_peft_trains(
    size: dict[str, int], heads: tuple[int, int], head_dim: int, rank: int, tied: bool
) -> None:
    config = LlamaConfig(
        **size, vocab_size=11, num_attention_heads=heads[0], num_key_value_heads=heads[1], tie_word_embeddings=tied,
        **({"head_dim": head_dim} if head_dim else {}),
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    shape = Shape.of(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    plan = resolve("tiny", hardware=Hardware("cpu", "a CPU", 8.0), lora_r=rank, out="runs")
    adapted = get_peft_model(model, lora_config(plan))
    assert trainable_parameters(adapted) == adapter_parameters(shape, rank) == adapted.get_nb_trainable_parameters()[0]


def test_every_linear_layer_of_every_block_of_an_odd_llama_is_adapted(odd: LlamaForCausalLM, plan: Plan) -> None:
    adapted = get_peft_model(odd, lora_config(plan))
    assert adapted_modules(adapted) == dict.fromkeys(ALL_LINEAR, ODD["num_hidden_layers"])
    assert trainable_parameters(adapted) == adapter_parameters(Shape.of(odd.config), 5)
    some = lora_config(plan)
    some.target_modules = {"q_proj", "v_proj"}
    partly = get_peft_model(LlamaForCausalLM(LlamaConfig(**ODD)), some)
    assert adapted_modules(partly) == {"q_proj": 3, "v_proj": 3}
    assert trainable_parameters(partly) == adapter_parameters(Shape.of(odd.config), 5, ("q_proj", "v_proj"))


# ---- the start ------------------------------------------------------------------------------------------------------


def test_at_step_zero_the_adapted_model_is_the_base(odd: LlamaForCausalLM, plan: Plan) -> None:
    ids = torch.arange(12).reshape(2, 6)
    with torch.inference_mode():
        before = odd(input_ids=ids).logits
    adapted = get_peft_model(odd, lora_config(plan)).eval()
    with torch.inference_mode():
        assert torch.equal(adapted(input_ids=ids).logits, before)
    norms = lora_b_norms(adapted)
    assert len(norms) == len(ALL_LINEAR) * ODD["num_hidden_layers"]
    assert set(norms.values()) == {0.0}
    first = next(p for name, p in adapted.named_parameters() if ".lora_B." in name)
    with torch.no_grad():
        first.fill_(0.5)
    with torch.inference_mode():
        assert not torch.equal(adapted(input_ids=ids).logits, before)
    changed = [norm for norm in lora_b_norms(adapted).values() if norm]
    assert changed == [pytest.approx(0.5 * math.sqrt(first.numel()))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, torch.Tensor, Any]:
    """The embedded base in 4 bits: its plan, its logits on a few tokens, and the same model with adapters."""
    plan = resolve("tiny", hardware=Hardware("cpu", "a CPU", 8.0), out=str(tmp_path_factory.mktemp("runs")))
    model = load_base(plan)
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(20)[None]).logits
    return plan, logits, get_peft_model(model, lora_config(plan)).eval()


def test_the_embedded_base_starts_at_itself_with_the_closed_forms_count(tiny: tuple[Plan, torch.Tensor, Any]) -> None:
    plan, before, adapted = tiny
    with torch.inference_mode():
        assert torch.equal(adapted(input_ids=torch.arange(20)[None]).logits, before)
    count = adapter_parameters(Shape.of(adapted.config), plan.lora_r)
    assert trainable_parameters(adapted) == count == adapted.get_nb_trainable_parameters()[0]
    assert PROFILES["tiny"].shape.linears() == Shape.of(adapted.config).linears(), "the profile's shape is the embedded model's"
    assert PROFILES["tiny"].shape.parameters == Shape.of(adapted.config).parameters


def test_the_update_is_alpha_over_rank_times_b_a(odd: LlamaForCausalLM, plan: Plan) -> None:
    adapted = get_peft_model(odd, lora_config(plan)).eval()
    layer = adapted.base_model.model.model.layers[2].mlp.down_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.normal_()
    x = torch.randn(3, ODD["intermediate_size"])
    by_hand = x @ (layer.base_layer.weight + plan.lora_alpha / plan.lora_r * b @ a).T
    torch.testing.assert_close(layer(x), by_hand, atol=1e-5, rtol=1e-5)


# ---- dtypes ---------------------------------------------------------------------------------------------------------


def test_the_census_of_the_embedded_base_in_four_bits(tiny: tuple[Plan, torch.Tensor, Any]) -> None:
    plan, _, adapted = tiny
    shape = Shape.of(adapted.config)
    census = dtype_census(adapted)
    assert census == {
        "frozen": {"uint8": shape.block_parameters // 2, "float32": shape.parameters - shape.block_parameters},
        "trained": {"float32": adapter_parameters(shape, plan.lora_r)},
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_casting_touches_trainable_parameters_only(odd: LlamaForCausalLM, plan: Plan, dtype: torch.dtype) -> None:
    adapted = get_peft_model(odd.to(torch.float16), lora_config(plan))
    frozen = {name: (p, p.data_ptr(), p.clone()) for name, p in adapted.named_parameters() if not p.requires_grad}
    trained = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    cast_adapters(adapted, dtype)
    after = dict(adapted.named_parameters())
    for name, (parameter, pointer, value) in frozen.items():
        assert after[name] is parameter
        assert (parameter.data_ptr(), parameter.dtype) == (pointer, torch.float16)
        assert torch.equal(parameter, value)
    for name, value in trained.items():
        assert after[name].requires_grad
        assert torch.equal(after[name], value.to(dtype))
    name = str(dtype).removeprefix("torch.")
    assert dtype_census(adapted)["trained"] == {name: adapter_parameters(Shape.of(odd.config), plan.lora_r)}
