"""Merging: what a merged weight is, how far each route drifts, and what a saved folder holds and answers."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from medquad_utils import chat, generation, merging
from medquad_utils.assets import sample
from medquad_utils.merging import Drift
from medquad_utils.profiles import CourseError, Hardware, Plan, resolve

CPU = Hardware("cpu", "any", 16.0, cores=2)
LAYER = "model.layers.1.mlp.down_proj"
ROWS = sample.rows()[:3]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(dtype: str = "float32", out: str = "") -> Plan:
    return dataclasses.replace(resolve("tiny", hardware=CPU, out=out), compute_dtype=dtype, max_new_tokens=6)


@pytest.fixture
def adapter(tiny_adapter: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))


def scaled(folder: Path, factor: float) -> Path:
    """The adapter in ``folder`` with every ``lora_B`` times ``factor``."""
    file = folder / "adapter_model.safetensors"
    save_file({k: v * factor if ".lora_B." in k else v for k, v in load_file(file).items()}, file)
    return folder


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach() for name, layer in merging.block_linears(model).items()}


def in_four_bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name -> dequantised weight of every 4-bit layer, from what bitsandbytes holds."""
    from bitsandbytes.functional import dequantize_4bit

    found = {n: m.weight for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    return {name: dequantize_4bit(w.data, w.quant_state) for name, w in found.items()}  # type: ignore[union-attr]


def update_of(folder: Path, layer: str) -> torch.Tensor:
    weights = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    a, b = (weights[f"base_model.model.{layer}.lora_{side}.weight"].double() for side in "AB")
    return config["lora_alpha"] / config["r"] * torch.einsum("or,ri->oi", b, a)


# ---- a merged weight ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_way_through_nf4_is_what_the_four_bit_base_holds(dtype: str) -> None:
    held = in_four_bits(generation.load_base(tiny(dtype)))
    plain = weights_of(generation.load_base(tiny(dtype), quantized=False))
    assert held.keys() == plain.keys()
    for name, weight in plain.items():
        assert torch.equal(merging.through_nf4(weight), held[name]), name


@pytest.mark.parametrize("route", ["dequantised", "16-bit"])
def test_a_merged_weight_is_the_base_plus_the_scaled_product(route: str, tiny_adapter: Path) -> None:
    base = in_four_bits(generation.load_base(tiny())) if route == "dequantised" else weights_of(generation.load_base(tiny(), False))
    merged = weights_of(merging.merge(tiny(), route, tiny_adapter))
    for name in (LAYER, "model.layers.0.self_attn.k_proj"):
        expected = base[name].double() + update_of(tiny_adapter, name)
        assert float((merged[name] - expected).abs().max()) < 1e-6
        assert float((merged[name] - base[name]).abs().max()) > 1e-3


def test_merging_into_the_plain_base_is_what_peft_does(tiny_adapter: Path) -> None:
    from peft import PeftModel

    theirs = weights_of(PeftModel.from_pretrained(generation.load_base(tiny(), quantized=False), tiny_adapter).merge_and_unload())
    ours = weights_of(merging.merge(tiny(), "16-bit", tiny_adapter))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


@pytest.mark.parametrize("factor", [1.0, 1e-4], ids=["trained", "one step"])
def test_no_weight_in_sixteen_bits_is_farther_from_the_exact_one_than_in_four(factor: float, adapter: Path) -> None:
    """What 4 bits can hold is a 16-bit number too, and 16 bits take the nearest: true for any base and any adapter."""
    scaled(adapter, factor)
    plan = tiny("bfloat16")
    base, sixteen = in_four_bits(generation.load_base(plan)), weights_of(merging.merge(plan, "dequantised", adapter))
    four = in_four_bits(merging.merge(plan, "4-bit", adapter))
    exact = base[LAYER].double() + update_of(adapter, LAYER)
    one = (sixteen[LAYER].double() - exact).abs()
    other = (four[LAYER].bfloat16().double() - exact).abs()
    assert bool((one <= other + 1e-9).all())
    assert float(one.sum()) < 0.9 * float(other.sum())


@pytest.mark.parametrize("route", merging.ROUTES)
def test_the_routes_leave_embeddings_and_norms_alone(route: str, tiny_adapter: Path) -> None:
    base = {n: p for n, p in generation.load_base(tiny(), False).named_parameters() if "_proj" not in n}
    merged = {n.removeprefix("base_model.model."): p for n, p in merging.merge(tiny(), route, tiny_adapter).named_parameters()}
    assert len(base) == 10
    assert all(torch.equal(merged[name], weight) for name, weight in base.items())


def test_rank_stabilised_lora_has_its_own_scale(adapter: Path) -> None:
    plain = weights_of(generation.load_base(tiny(), quantized=False))[LAYER]
    once = weights_of(merging.merge(tiny(), "16-bit", adapter))[LAYER] - plain
    change_config(adapter, use_rslora=True)
    assert torch.allclose(weights_of(merging.merge(tiny(), "16-bit", adapter))[LAYER] - plain, 4 * once, atol=1e-5)  # 16 / sqrt(16)


def test_layers_that_accelerate_keeps_off_the_card_are_merged_and_saved_too(
    tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a card that is too small: every block's weights wait elsewhere and come in for a forward pass."""
    from accelerate import cpu_offload

    ids = torch.tensor([[0, 9, 8, 7]])
    plain = merging.merge(tiny(), "dequantised", tiny_adapter)
    expected = plain(input_ids=ids).logits
    whole = generation.load_base

    def offloaded(plan: Plan, quantized: bool = True) -> Any:
        model: Any = whole(plan, quantized)
        for block in model.model.layers:
            cpu_offload(block, execution_device=torch.device("cpu"))
        model.hf_device_map = {"model.embed_tokens": 0, "model.layers": "cpu"}  # by which transformers tells that it is offloaded
        return model

    monkeypatch.setattr(merging, "load_base", offloaded)
    model = merging.merge(tiny(), "dequantised", tiny_adapter)
    assert all(layer.weight.is_meta for layer in merging.block_linears(model).values())
    assert torch.equal(model(input_ids=ids).logits, expected)
    saved = load_file(merging.save(model, generation.load_tokenizer(tiny()), tmp_path / "saved") / "model.safetensors")
    assert all(torch.equal(saved[f"{name}.weight"], weight) for name, weight in weights_of(plain).items())


# ---- drift ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tiny_adapter: Path) -> dict[str, Drift]:
    return merging.drift(tiny(), ROWS, tiny_adapter)


def test_the_kept_adapter_does_not_drift_and_dequantising_hardly(report: dict[str, Drift]) -> None:
    assert list(report) == list(merging.ROUTES)
    kept = report["adapter"]
    assert (kept.logit_mean, kept.logit_max, kept.kl, kept.top1, kept.same_answers) == (0, 0, 0, 1, 1)
    assert report["dequantised"].kl < 1e-9
    assert report["dequantised"].logit_max < 1e-4
    assert (report["dequantised"].top1, report["dequantised"].same_answers) == (1, 1)
    for route in ("16-bit", "4-bit"):
        assert report[route].logit_mean > 100 * report["dequantised"].logit_mean
        assert report[route].kl > 100 * report["dequantised"].kl


def test_the_order_holds_where_weights_are_rounded_to_sixteen_bits(tiny_adapter: Path) -> None:
    found = merging.drift(tiny("bfloat16"), ROWS[:1], tiny_adapter, ["4-bit", "dequantised"])
    assert 0 < found["dequantised"].logit_mean < found["4-bit"].logit_mean / 3
    assert found["dequantised"].kl < found["4-bit"].kl


def test_an_adapter_that_hardly_learned_leaves_no_route_far_behind(adapter: Path) -> None:
    """Its steps are smaller than what 16 bits resolve: the routes may tie, and the lesson's check must hold all the same."""
    found = merging.drift(tiny("bfloat16"), ROWS[:1], scaled(adapter, 1e-5), ["dequantised", "4-bit"])
    assert found["dequantised"].kl <= found["4-bit"].kl + 1e-3


def test_the_figures_against_a_count_by_hand() -> None:
    ln = math.log
    expected = merging._Measured([torch.tensor([[ln(3.0), 0.0]]), torch.tensor([[0.0, 0.0], [-2.0, 2.0]])], ["a", "b"], 0, 0)
    found = merging._Measured([torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, -2.0]])], ["a", "c"], 7.5, 9.0)
    drift = merging._compare(expected, found)
    likely = 1 / (1 + math.exp(-4))
    kl = [0.75 * ln(0.75 / 0.5) + 0.25 * ln(0.25 / 0.5), 0.0, (2 * likely - 1) * 4]
    assert drift.logit_mean == pytest.approx((ln(3) + 8) / (ln(3) + 4))
    assert drift.logit_max == pytest.approx(4 / 2)
    assert drift.kl == pytest.approx(sum(kl) / 3, rel=1e-6)
    assert (drift.top1, drift.same_answers, drift.megabytes, drift.tokens_per_second) == (2 / 3, 0.5, 7.5, 9.0)


numbers = st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=2, max_size=6)


@given(numbers)
def test_divergence_is_the_sum_written_out(pairs: list[tuple[float, float]]) -> None:
    one, other = zip(*pairs, strict=True)
    p, q = ([math.exp(v) / math.fsum(map(math.exp, values)) for v in values] for values in (one, other))
    expected = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    found = float(merging.divergence(torch.tensor([one]).double(), torch.tensor([other]).double())[0])
    assert found >= 0
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)  # the inputs are fp32


def test_the_logits_are_those_that_predict_the_answer(tiny_adapter: Path) -> None:
    plan = tiny()
    model, tokenizer = merging.merge(plan, "adapter", tiny_adapter), generation.load_tokenizer(plan)
    encoded = chat.encode(tokenizer, ROWS[0])
    with torch.inference_mode():
        all_of_them = model(input_ids=torch.tensor([encoded.ids])).logits[0]
    places = [n - 1 for n, learned in enumerate(encoded.in_loss) if learned]
    (found,) = merging._answer_logits(model, tokenizer, ROWS[:1], most=1000)
    assert torch.allclose(found, all_of_them[places], atol=1e-4)
    (few,) = merging._answer_logits(model, tokenizer, ROWS[:1], most=3)
    assert torch.allclose(few, all_of_them[places[:3]], atol=1e-4)


def test_one_model_at_a_time_is_in_memory(tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    merge = merging.merge

    def watched(*arguments: Any) -> Any:
        assert [ref for ref in made if ref() is not None] == []
        model = merge(*arguments)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(merging, "merge", watched)
    lines: list[str] = []
    merging.drift(tiny(), ROWS[:1], tiny_adapter, report=lines.append)
    assert len(made) == 4
    assert [line.split(":")[0] for line in lines] == list(merging.ROUTES)


# ---- the recommendation ---------------------------------------------------------------------------------------------


def row(kl: float, megabytes: float) -> Drift:
    return Drift(0.1, 0.1, kl, 1.0, 1.0, megabytes, 1.0)


def test_the_recommendation_follows_the_numbers() -> None:
    usual = {"adapter": row(0, 1), "dequantised": row(0.001, 14), "16-bit": row(0.02, 14), "4-bit": row(0.03, 4)}
    assert merging.best(usual) == "dequantised"
    assert merging.recommendation(usual) == (
        "Where exactness or size matters, keep the adapter beside the 4-bit base (1.0 MB); where a server wants one plain folder, "
        "dequantise the base, then merge (14.0 MB, 0.001 nats per token; 0.02 for '16-bit', 0.03 for '4-bit')."
    )
    other = usual | {"16-bit": row(0.0005, 14), "adapter": row(0, 5)}
    assert merging.best(other) == "16-bit"
    sentence = merging.recommendation(other)
    assert sentence.startswith("Where exactness matters, keep the adapter beside the 4-bit base (5.0 MB); where size matters, merge into")
    assert "one plain folder, merge into the 16-bit base (14.0 MB, 0.0005 nats per token; 0.001 for 'dequantised', 0.03" in sentence


def test_of_equal_routes_the_first_is_taken_and_none_is_refused() -> None:
    assert merging.best({"4-bit": row(0.0, 4), "dequantised": row(0.0, 14), "adapter": row(0.0, 1)}) == "dequantised"
    with pytest.raises(CourseError, match="no merged route: expected one of dequantised, 16-bit, 4-bit"):
        merging.best({"adapter": row(0, 1)})


# ---- a saved folder -------------------------------------------------------------------------------------------------

PLAIN = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, asked = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
pipe = pipeline("text-generation", model=AutoModelForCausalLM.from_pretrained(folder), tokenizer=tokenizer)
said = [pipe(messages, max_new_tokens=24, do_sample=False)[0]["generated_text"][-1]["content"].strip() for messages in asked]
print(json.dumps([said, tokenizer.padding_side, str(pipe.model.dtype)]))
"""


def test_a_saved_folder_answers_the_same_in_a_process_without_the_course(tiny_adapter: Path, tmp_path: Path) -> None:
    plan = tiny()
    model, tokenizer = merging.merge(plan, "dequantised", tiny_adapter), generation.load_tokenizer(plan)
    folder = merging.save(model, tokenizer, tmp_path / "deep" / "merged")
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {p.name for p in folder.iterdir()} == names
    assert [p.name for p in folder.parent.iterdir()] == ["merged"]
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == chat.end_ids(tokenizer)
    assert tokenizer.padding_side == "right", "the caller's tokenizer stays as it was"
    assert not any(str(Path(generation.__file__).parent.parent) in p.read_text() for p in folder.glob("*.json"))

    asked = [chat.prompt_messages(question) for question in chat.THREE_QUESTIONS[:2]]
    expected = [generation.generate(model, tokenizer, [messages], 24)[0].text for messages in asked]
    outside = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(folder), json.dumps(asked)], cwd=tmp_path, env=outside, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [expected, "left", "torch.float32"]
    assert all(expected)


@pytest.mark.parametrize("route", merging.ROUTES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_loads_again_as_it_was_and_has_the_size_that_was_said(
    route: str, dtype: str, tiny_adapter: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    plan = tiny(dtype)
    model, tokenizer = merging.merge(plan, route, tiny_adapter), generation.load_tokenizer(plan)
    folder = merging.save(model, tokenizer, tmp_path / "saved")
    written = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert merging.saved_bytes(model) == pytest.approx(written, rel=0.02)
    if route == "adapter":
        assert sorted(p.name for p in folder.glob("adapter_*")) == ["adapter_config.json", "adapter_model.safetensors"]
        again: Any = generation.load_tuned(plan, folder)
    else:
        again = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert again.dtype == getattr(torch, dtype)
        assert ("quantization_config" in json.loads((folder / "config.json").read_text())) == (route == "4-bit")
    ids = torch.tensor([[0, 5, 9, 300, 17]])
    with torch.inference_mode():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_folder_of_ours_is_replaced_and_anybody_elses_refused(tiny_adapter: Path, tmp_path: Path) -> None:
    plan = tiny()
    model, tokenizer = merging.merge(plan, "16-bit", tiny_adapter), generation.load_tokenizer(plan)
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"of an older run")
    merging.save(model, tokenizer, folder)
    assert not (folder / "adapter_model.safetensors").exists()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(CourseError, match=r"merged/ is in use: it holds thesis\.txt"):
        merging.save(model, tokenizer, folder)
    assert (folder / "thesis.txt").read_text() == "mine"
    file = tmp_path / "file"
    file.write_text("mine too")
    with pytest.raises(CourseError, match="file/ is in use"):
        merging.save(model, tokenizer, file)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "merged"]


@pytest.mark.parametrize("limit", [600, 1_000_000], ids=["first file", "weights"])
@pytest.mark.parametrize("older", [False, True], ids=["nothing there", "an older one"])
def test_a_full_disk_leaves_nothing_half_written(limit: int, older: bool, tiny_adapter: Path, tmp_path: Path) -> None:
    """A file-size limit is the disk: the operating system itself refuses the write in the middle of a file."""
    resource = pytest.importorskip("resource", reason="needs POSIX file-size limits: run the tests on Linux or macOS")
    plan = tiny()
    model, tokenizer = merging.merge(plan, "16-bit", tiny_adapter), generation.load_tokenizer(plan)
    folder = tmp_path / "merged"
    if older:
        folder.mkdir()
        (folder / "config.json").write_text("older")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(CourseError, match=r"cannot save merged/: .*Nothing was changed"):
            merging.save(model, tokenizer, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert [p.name for p in tmp_path.rglob("*")] == (["merged", "config.json"] if older else [])
    assert tokenizer.padding_side == "right"


# ---- bad input ------------------------------------------------------------------------------------------------------


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(folder: Path, name: str, value: torch.Tensor) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{name}.weight": value}, file)


def test_an_unknown_route_is_refused_with_the_known_ones(tiny_adapter: Path) -> None:
    with pytest.raises(CourseError, match=r"unknown route '8-bit': expected one of adapter, dequantised, 16-bit, 4-bit\."):
        merging.merge(tiny(), "8-bit", tiny_adapter)


@pytest.mark.parametrize("route", ["16-bit", "4-bit"])
def test_without_an_adapter_every_route_says_where_one_comes_from(route: str, tmp_path: Path) -> None:
    with pytest.raises(CourseError, match="no adapter in adapter/: lesson 04 trains one"):
        merging.merge(tiny(out=str(tmp_path)), route)


def test_no_rows_are_refused(tiny_adapter: Path) -> None:
    with pytest.raises(CourseError, match="no rows to measure the drift on"):
        merging.drift(tiny(), [], tiny_adapter)


@pytest.mark.parametrize("route", ["adapter", "16-bit"])
def test_a_damaged_adapter_is_named(route: str, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CourseError, match=r"the adapter in adapter/ .*run lesson 04 again"):
        merging.merge(tiny(), route, adapter)


@pytest.mark.parametrize("change", [{"use_dora": True}, {"rank_pattern": {"q_proj": 4}}, {"alpha_pattern": {"q_proj": 4}}], ids=str)
def test_an_adapter_that_is_no_plain_lora_is_not_merged_by_the_wrong_formula(change: dict[str, Any], adapter: Path) -> None:
    change_config(adapter, **change)
    with pytest.raises(CourseError, match="is no plain LoRA: keep it beside its base"):
        merging.merge(tiny(), "dequantised", adapter)


def test_a_trained_bias_is_not_dropped_in_silence(adapter: Path) -> None:
    change_weights(adapter, f"{LAYER}.lora_B.bias_of", torch.ones(256))
    with pytest.raises(CourseError, match="is no plain LoRA"):
        merging.merge(tiny(), "dequantised", adapter)


def test_layers_of_another_base_are_named(adapter: Path) -> None:
    change_weights(adapter, "model.layers.9.mlp.up_proj.lora_A", torch.ones(16, 256))
    change_weights(adapter, "model.layers.9.mlp.up_proj.lora_B", torch.ones(640, 16))
    with pytest.raises(CourseError, match=r"1 layers that embedded lacks, the first is model\.layers\.9\.mlp\.up_proj"):
        merging.merge(tiny(), "16-bit", adapter)


def test_a_layer_of_another_shape_is_named(adapter: Path) -> None:
    change_weights(adapter, f"{LAYER}.lora_B", torch.ones(128, 16))
    with pytest.raises(CourseError, match=r"down_proj is \(128, 640\), the base's \(256, 640\): it belongs to another base"):
        merging.merge(tiny(), "16-bit", adapter)


@pytest.mark.parametrize(("value", "dtype"), [(math.nan, "float32"), (1e4, "float16")], ids=["NaN", "too large for fp16"])
def test_a_weight_that_is_not_finite_is_not_saved_for_good(value: float, dtype: str, adapter: Path) -> None:
    change_weights(adapter, f"{LAYER}.lora_A", torch.full((16, 640), value))
    change_weights(adapter, f"{LAYER}.lora_B", torch.full((256, 16), 1.0))
    with pytest.raises(CourseError, match=rf"the merged {LAYER} is not finite in {dtype}"):
        merging.merge(tiny(dtype), "dequantised", adapter)


def test_a_base_that_spills_to_the_disk_is_refused(tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = generation.load_base(tiny(), quantized=False)
    model.hf_device_map = {"model": 0, "lm_head": "disk"}  # type: ignore[assignment]
    monkeypatch.setattr(merging, "load_base", lambda plan, quantized: model)
    with pytest.raises(CourseError, match="card and RAM together do not hold the base"):
        merging.merge(tiny(), "16-bit", tiny_adapter)
