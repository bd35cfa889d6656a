"""LoRA: parameter counts against PEFT, the start at zero, alpha over rank, dtypes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from medquad_utils import lora
from medquad_utils.generation import load_base
from medquad_utils.profiles import PROFILES, Plan, Shape

LAYERS, INTERMEDIATE = 3, 52
# Odd sizes on purpose: heads x head_dim is not the hidden size, nothing is a power of two.
ODD = LlamaConfig(
    vocab_size=61, hidden_size=36, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
    num_attention_heads=6, num_key_value_heads=2, head_dim=10,
)  # fmt: skip


@pytest.fixture
def plan() -> Plan:
    return tiny(lora_r=5)


@pytest.fixture
def odd() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(ODD).eval()


def test_adapter_count_by_hand_and_for_eight_billion() -> None:
    shape = Shape(hidden=10, layers=1, intermediate=30, heads=2, kv_heads=1, vocab=7)
    assert lora.adapter_parameters(shape, 1, ("k_proj",)) == 10 + 5
    assert lora.adapter_parameters(shape, 3, ("gate_proj", "down_proj")) == 3 * (40 + 40)
    assert lora.adapter_parameters(shape, 1) == 20 + 15 + 15 + 20 + 40 + 40 + 40
    for rank, count in {8: 20_971_520, 16: 41_943_040, 64: 167_772_160}.items():
        assert lora.adapter_parameters(PROFILES["llama-8b"].shape, rank) == count


configs = st.builds(
    lambda heads, **sizes: LlamaConfig(
        vocab_size=11, num_attention_heads=heads[0], num_key_value_heads=heads[1], **sizes
    ),
    st.sampled_from([(4, 4), (4, 2), (4, 1), (2, 1)]),
    hidden_size=st.integers(1, 6).map(lambda n: 8 * n),
    intermediate_size=st.integers(1, 40),
    num_hidden_layers=st.integers(1, 3),
    head_dim=st.sampled_from([None, 6]),
    tie_word_embeddings=st.booleans(),
)


@given(configs | st.just(ODD), st.integers(1, 9))
def test_adapter_count_equals_what_peft_trains(config: LlamaConfig, rank: int) -> None:
    model = LlamaForCausalLM(config)
    shape = Shape.of(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    adapted = get_peft_model(model, lora.lora_config(tiny(lora_r=rank)))
    count = lora.adapter_parameters(shape, rank)
    assert lora.trainable_parameters(adapted) == count == adapted.get_nb_trainable_parameters()[0]


def test_adapted_model_starts_as_the_base(odd: Any, plan: Plan) -> None:
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        before = odd(input_ids=ids).logits
        adapted = get_peft_model(odd, lora.lora_config(plan)).eval()
        assert torch.equal(adapted(input_ids=ids).logits, before)
        norms = lora.lora_b_norms(adapted)
        assert (len(norms), set(norms.values())) == (len(lora.ALL_LINEAR) * LAYERS, {0.0})
        first = next(p for name, p in adapted.named_parameters() if ".lora_B." in name)
        first.fill_(0.5)
        assert not torch.equal(adapted(input_ids=ids).logits, before)
    changed = [norm for norm in lora.lora_b_norms(adapted).values() if norm]
    assert changed == [pytest.approx(0.5 * math.sqrt(first.numel()))]


def test_update_is_alpha_over_rank_times_b_a(odd: Any, plan: Plan) -> None:
    adapted = get_peft_model(odd, lora.lora_config(plan)).eval()
    layer = adapted.base_model.model.model.layers[2].mlp.down_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.normal_()
    x = torch.randn(3, INTERMEDIATE)
    by_hand = x @ (layer.base_layer.weight + plan.lora_alpha / plan.lora_r * b @ a).T
    torch.testing.assert_close(layer(x), by_hand, atol=1e-5, rtol=1e-5)


def test_embedded_base_in_4_bits_gets_adapters_in_fp32() -> None:
    plan = tiny()
    adapted = get_peft_model(load_base(plan), lora.lora_config(plan))
    shape, profile = Shape.of(adapted.config), PROFILES["tiny"].shape
    assert (profile.linears(), profile.parameters) == (shape.linears(), shape.parameters)
    frozen = {"uint8": shape.block_parameters // 2}
    frozen["float32"] = shape.parameters - shape.block_parameters
    trained = {"float32": lora.adapter_parameters(shape, plan.lora_r)}
    assert lora.dtype_census(adapted) == {"frozen": frozen, "trained": trained}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_casting_changes_adapters_only(odd: Any, plan: Plan, dtype: torch.dtype) -> None:
    adapted = get_peft_model(odd.to(torch.float16), lora.lora_config(plan))
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in adapted.named_parameters()}
    lora.cast_adapters(adapted, dtype)
    for name, p in adapted.named_parameters():
        same, pointer, value = before[name]
        assert p is same and p.requires_grad == (".lora_" in name)
        if p.requires_grad:
            assert p.dtype == dtype and torch.equal(p, value.to(dtype))
        else:
            assert p.dtype == torch.float16 and p.data_ptr() == pointer and torch.equal(p, value)


def test_the_frozen_hash_covers_every_byte_of_the_base_and_no_adapter() -> None:
    plan = tiny()
    base = load_base(plan)
    before = lora.frozen_hash(base)
    adapted = get_peft_model(base, lora.lora_config(plan))
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            parameter.data.fill_(1.0)
    assert lora.frozen_hash(adapted) == before, "adapters are not frozen bytes"
    assert lora.frozen_hash(adapted.unload()) == before
    layer = base.model.layers[0]
    state = layer.mlp.up_proj.weight.quant_state
    frozen = {
        "codes": layer.self_attn.q_proj.weight.data, "scales": state.absmax,
        "scales of scales": state.state2.absmax, "norms": layer.input_layernorm.weight.data,
        "embeddings": base.model.embed_tokens.weight.data,
    }  # fmt: skip
    for name, tensor in frozen.items():
        kept = tensor.clone()
        tensor.view(-1)[0] += 1
        assert lora.frozen_hash(base) != before, name
        tensor.copy_(kept)
    assert lora.frozen_hash(base) == before


def test_singular_values_are_those_of_the_product(odd: Any, plan: Plan) -> None:
    adapted = get_peft_model(odd, lora.lora_config(plan))
    expected = []
    for layer in (m for m in adapted.modules() if hasattr(m, "lora_B")):
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        values = torch.linalg.svdvals(update.detach())[: plan.lora_r]
        expected.append(values / values[0])
    found = torch.tensor(lora.singular_values(adapted))
    assert torch.allclose(found, torch.stack(expected).mean(0), atol=1e-5)
