"""Merging: what a merged weight is, how far each route drifts, what a saved folder holds."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import build_sample
import pytest
import torch
from accelerate import cpu_offload
from bitsandbytes.functional import dequantize_4bit
from conftest import tiny
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from medquad_utils import CourseError, chat, generation, merging
from medquad_utils.profiles import Plan

LAYER = "model.layers.1.mlp.down_proj"
ROWS = build_sample.rows()[:3]


def plan(dtype: str = "float32") -> Plan:
    return dataclasses.replace(tiny(), compute_dtype=dtype, max_new_tokens=6)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach() for name, layer in merging.block_linears(model).items()}


def in_four_bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Dequantise every 4-bit layer from what bitsandbytes holds."""
    layers: Any = {n: m for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    return {n: dequantize_4bit(m.weight.data, m.weight.quant_state) for n, m in layers.items()}


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[0, 5, 9, 300, 17]])).logits


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_way_through_nf4_is_what_the_four_bit_base_holds(dtype: str) -> None:
    held = in_four_bits(generation.load_base(plan(dtype)))
    exact = weights_of(generation.load_base(plan(dtype), quantized=False))
    assert held.keys() == exact.keys()
    assert all(torch.equal(merging.through_nf4(exact[name]), held[name]) for name in held)


@pytest.mark.parametrize("route", ["dequantised", "16-bit"])
def test_merged_is_base_plus_scaled_product(route: str, tiny_adapter: Path, tiny_base: Any) -> None:
    plain = generation.load_base(plan(), quantized=False)
    base = in_four_bits(tiny_base) if route == "dequantised" else weights_of(plain)
    model = merging.merge(plan(), route, tiny_adapter)
    merged, updates = weights_of(model), load_file(tiny_adapter / "adapter_model.safetensors")
    for name in (LAYER, "model.layers.0.self_attn.k_proj"):
        a, b = (updates[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        assert float((merged[name] - (base[name].double() + 32 / 16 * b @ a)).abs().max()) < 1e-6
        assert float((merged[name] - base[name]).abs().max()) > 1e-3
    others = {n: p for n, p in plain.named_parameters() if "_proj" not in n}
    assert len(others) == 10
    assert all(torch.equal(model.get_parameter(n), p) for n, p in others.items())
    if route == "16-bit":
        theirs = weights_of(PeftModel.from_pretrained(plain, tiny_adapter).merge_and_unload())
        assert all(torch.allclose(merged[name], theirs[name], atol=1e-6) for name in theirs)


@pytest.mark.parametrize("route", ["dequantised", "16-bit"])
def test_layers_that_the_card_cannot_hold_are_merged_in_ram(
    route: str, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(merging.merge(plan(), route, tiny_adapter))
    held_in_ram = cpu_offload(generation.load_base(plan(), quantized=False), "cpu")
    monkeypatch.setattr(merging, "load_base", lambda *args, **kwargs: held_in_ram)
    assert held_in_ram.get_parameter(f"{LAYER}.weight").is_meta
    assert torch.equal(logits(merging.merge(plan(), route, tiny_adapter)), expected)


def test_dequantising_drifts_least(tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gc.collect", int)  # most of the time, and this model is small
    monkeypatch.setattr("medquad_utils.evaluation.FEW", 1)
    report = merging.drift(plan(), ROWS, tiny_adapter)
    assert list(report) == list(merging.ROUTES)
    kept, least = report["adapter"], report["dequantised"]
    assert [cell["mean"] for cell in (kept.kl, kept.top1, kept.same_answers)] == [0, 1, 1]
    assert {cell["high"] for cell in (kept.kl, kept.top1, kept.same_answers)} == {None}
    assert kept.bits_change["mean"] == kept.rouge_l_change["mean"] == 0
    assert least.kl["mean"] < 1e-9 and least.same_answers["mean"] == 1
    for route in ("16-bit", "4-bit"):
        other = report[route]
        assert other.kl["mean"] > 100 * least.kl["mean"]
        change = other.bits_per_byte["mean"] - kept.bits_per_byte["mean"]
        assert other.bits_change["mean"] == pytest.approx(change, abs=1e-9) and change != 0
    low = merging.drift(plan("bfloat16"), ROWS[:1], tiny_adapter, ["4-bit", "dequantised"])
    assert 0 < low["dequantised"].kl["mean"] < low["4-bit"].kl["mean"] / 3


def cell(mean: float, half: float | None = None) -> dict[str, Any]:
    ends = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "low": ends[0], "high": ends[1], "n": 9, "diseases": 9}


def route(kl: float, bits: dict[str, Any], rouge: dict[str, Any]) -> merging.Drift:
    return merging.Drift(cell(kl), *[cell(1.0)] * 3, bits, cell(1.0), rouge, 1.0, 1.0)


def test_a_route_is_worse_if_an_interval_lies_on_the_worse_side() -> None:
    fine, unsure = route(0.3, cell(0.1), cell(0.0)), route(0.2, cell(0.1, 0.2), cell(-0.1, 0.2))
    bits, rouge = route(0.1, cell(0.2, 0.1), cell(0.0, 0.1)), route(0.1, cell(0), cell(-0.2, 0.1))
    assert [merging.worse(r) for r in (fine, unsure, bits, rouge)] == [False, False, True, True]
    report = {"adapter": route(0, cell(0), cell(0)), "dequantised": bits, "4-bit": fine}
    rows, header = merging.table({"mine": {r: vars(found) for r, found in report.items()}})
    assert header[:4] == ["run", "route", "KL, nats", "same answers"]
    assert rows[1] == ["mine", "dequantised", "0.100", "1.000", "0.200 [0.100, 0.300]",
                       "0.000 [-0.100, 0.100]", 1.0, 1.0]  # fmt: skip
    assert [list(spans) for spans in merging.changes(report).values()] == [["dequantised"]] * 2


def test_the_distance_of_logits_against_a_count_by_hand() -> None:
    ln = math.log
    one = torch.tensor([[ln(3.0), 0.0], [0.0, 0.0], [-2.0, 2.0]])
    other = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, -2.0]])
    likely = 1 / (1 + math.exp(-4))
    kl = [0.75 * ln(0.75 / 0.5) + 0.25 * ln(0.25 / 0.5), 0.0, (2 * likely - 1) * 4]
    assert merging.distance(one, other) == pytest.approx({"kl": sum(kl) / 3, "top1": 2 / 3})


@pytest.mark.parametrize("route", merging.ROUTES)
def test_a_saved_folder_loads_as_the_model_that_was_measured(
    route: str, tiny_adapter: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    low = plan("float32" if route == "adapter" else "bfloat16")
    model = merging.merge(low, route, tiny_adapter)
    folder = merging.save(model, tiny_tokenizer, tmp_path / "saved")
    written = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert merging.saved_bytes(model) == pytest.approx(written, rel=0.02)
    assert tiny_tokenizer.padding_side == "right", "the caller's tokenizer stays as it was"
    if route == "adapter":
        again: Any = generation.load_tuned(low, folder)
    else:
        again = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert again.dtype == torch.bfloat16
        assert again.generation_config.eos_token_id == chat.end_ids(tiny_tokenizer)
        config = (folder / "config.json").read_text()
        assert ("quantization_config" in config) == (route == "4-bit")
    if route == "4-bit":  # on some CPUs bitsandbytes computes it in another way once it is saved
        one, other = in_four_bits(again), in_four_bits(model)
        assert all(torch.equal(one[name], other[name]) for name in one)
    else:
        assert torch.equal(logits(again), logits(model))


def test_a_saved_folder_says_everything_where_older_programs_look(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """transformers before 5, vLLM and Ollama know no rope_parameters; the base samples."""
    model = generation.load_base(plan(), quantized=False)
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 512}  # fmt: skip
    model.config.rope_parameters = scaling | {"rope_theta": 12345.0}
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    folder = merging.save(model, tiny_tokenizer, tmp_path / "saved")
    names = ("config", "tokenizer_config", "generation_config")
    config, tokenizer, settings = (json.loads((folder / f"{n}.json").read_text()) for n in names)
    assert (config["rope_theta"], config["rope_scaling"]) == (12345.0, scaling)
    assert config["pad_token_id"] == tiny_tokenizer.pad_token_id
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "<|eot_id|>" in tokenizer["additional_special_tokens"]
    assert (tokenizer["padding_side"], tiny_tokenizer.padding_side) == ("left", "right")
    assert settings["do_sample"] is False and not {"temperature", "top_p"} & settings.keys()
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o644}
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.config.rope_parameters == scaling | {"rope_theta": 12345.0}


ABSENT = "model.layers.9.mlp.up_proj"


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        ({"use_dora": True}, {}, "is not a plain LoRA of embedded: keep it beside its base"),
        ({"alpha_pattern": {"q_proj": 4}}, {}, "is not a plain LoRA"),
        ({}, {f"{LAYER}.lora_B.bias_of": (256, 1)}, "is not a plain LoRA"),
        ({}, {f"{ABSENT}.lora_A": (16, 256), f"{ABSENT}.lora_B": (640, 16)}, "plain LoRA of emb"),
        ({}, {f"{LAYER}.lora_B": (128, 16)}, "is not a plain LoRA of"),
        ({}, {f"{LAYER}.lora_B": None}, "is not a plain LoRA of"),
        ({}, {f"{LAYER}.lora_A": (8, 256)}, "is not a plain LoRA of"),
        ({"lora_alpha": 1e8}, {}, "is not finite in float16: train again at half"),
    ],
)
def test_an_adapter_that_cannot_be_merged_right_is_refused(
    config: Any, sizes: dict[str, Any], message: str, tiny_adapter: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | config))
    tensors = load_file(file)
    for name, size in sizes.items():
        tensors.pop(key := f"base_model.model.{name}.weight", None)
        tensors |= {key: torch.ones(size)} if size else {}
    save_file(tensors, file)
    with pytest.raises(CourseError, match=message):
        merging.merge(plan("float16"), "dequantised", folder)
