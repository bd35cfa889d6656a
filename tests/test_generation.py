"""Loading, asking and stopping, and what a reader is told about a damaged model or adapter."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import types
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import bitsandbytes
import httpx2
import psutil
import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file, save_file

from medquad_utils import CourseError, adapters, chat, generation, quantization, training
from medquad_utils.profiles import PROFILES, TINY_MODEL

LONG = "What causes gout, and how do doctors find out that someone has it?"
QUESTIONS = [*chat.THREE_QUESTIONS, "Is cystic fibrosis inherited ?", LONG]
PROMPT = chat.prompt_messages(QUESTIONS[0])
BASE, WEIGHTS_OF_BASE = "config.json", "model.safetensors"
WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "plan.json"
CHAT_TEMPLATE = (TINY_MODEL / "chat_template.jinja").read_text()
LAYERS = 7 * PROFILES["tiny"].shape.layers  # in 4 bits


@pytest.fixture(scope="module")
def base(tiny_base: Any, tiny_tokenizer: Any) -> tuple[Any, Any]:
    return tiny_base, tiny_tokenizer


@pytest.fixture(scope="module")
def tuned(tiny_adapter: Path, tiny_tokenizer: Any) -> tuple[Any, Any]:
    return generation.load_tuned(tiny(), tiny_adapter), tiny_tokenizer


def logits(model: Any, tokenizer: Any) -> Any:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([chat.prompt_ids(tokenizer, PROMPT)])).logits


def test_a_batch_answers_as_one_by_one(base: Any) -> None:
    alone = [generation.ask(*base, [question], 24)[0] for question in QUESTIONS]
    prompts = [chat.prompt_ids(base[1], chat.prompt_messages(q)) for q in QUESTIONS]
    assert len(set(map(len, prompts))) > 2, "the prompts need padding"
    assert generation.ask(*base, QUESTIONS, 24) == alone
    assert generation.ask(*base, QUESTIONS, 24, batch_size=2) == alone
    assert len({answer.text for answer in alone}) > 1


def test_an_answer_is_what_transformers_generates_greedily(base: Any) -> None:
    model, tokenizer = base
    text = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)  # no padding
    output = model.generate(**ids, do_sample=False, max_new_tokens=12, min_new_tokens=12)
    new = output[0, ids["input_ids"].shape[1] :]
    (answer,) = generation.ask(*base, QUESTIONS[:1], 12, min_new_tokens=12)
    assert answer.text == tokenizer.decode(new, skip_special_tokens=True).strip()
    assert (answer.tokens, answer.stopped) == (12, False)


@pytest.mark.parametrize("end", [chat.END_OF_TURN, chat.END_OF_TEXT])
def test_generation_stops_on_either_end_token(base: Any, end: str) -> None:
    """A bias makes ``end`` the likeliest token from the fourth on."""
    bias = [[[base[1].convert_tokens_to_ids(end)], 1e4]]
    passes: list[int] = []
    hook = base[0].register_forward_hook(lambda *_: passes.append(1))
    (ended,) = generation.ask(*base, QUESTIONS[:1], 20, min_new_tokens=3, sequence_bias=bias)
    hook.remove()
    assert (ended.stopped, ended.tokens, len(passes)) == (True, 3, 4)
    assert end not in ended.text
    never = chat.end_ids(base[1])
    (cut,) = generation.ask(*base, QUESTIONS[:1], 5, suppress_tokens=never)
    assert (cut.stopped, cut.tokens) == (False, 5)


def keep(stream: Any, returned: list[Any]) -> Any:
    returned.append((yield from stream))


def test_streamed_pieces_joined_are_the_answer(base: Any) -> None:
    for question in QUESTIONS[:2]:
        returned: list[Any] = []
        pieces = list(keep(generation.stream(*base, question, 20), returned))
        assert "".join(pieces).strip() == generation.ask(*base, [question], 20)[0].text
        assert len(pieces) > 1 and returned == generation.ask(*base, [question], 20)


def test_a_stream_ends_with_its_reader(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    generate, never = base[0].generate, chat.end_ids(base[1])

    def endless(**settings: Any) -> None:
        lengths.append(generate(**settings, suppress_tokens=never).shape[1])

    monkeypatch.setattr(base[0], "generate", endless)
    pieces: Any = generation.stream(*base, QUESTIONS[0], 200)
    next(pieces)
    pieces.close()
    assert lengths[0] < 200, "it went on although nobody reads"
    with pytest.raises(ValueError, match="max_new_tokens"):  # and does not wait for ever
        list(generation.stream(*base, QUESTIONS[0], -1))


def test_unpacked_weights_answer_alike_to_the_bit(
    tuned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, products = tuned[0], Mock(wraps=bitsandbytes.matmul_4bit)
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", products)
    with model.disable_adapter():
        plain = logits(*tuned)
    full = logits(*tuned)
    assert not torch.equal(plain, full)
    with quantization.unpacked(model):
        with quantization.unpacked(model):
            assert torch.equal(logits(*tuned), full)
        with model.disable_adapter():
            assert torch.equal(logits(*tuned), plain)
        assert products.call_count == 2 * LAYERS, "a packed weight was multiplied by"
    assert torch.equal(logits(*tuned), full)
    assert products.call_count == 3 * LAYERS, "the layers are as they were"
    products.reset_mock()
    need, answers = 4 * PROFILES["tiny"].shape.block_parameters, []  # fp32
    for free, packed in ((2 * need, False), (2 * need - 2, True)):
        memory = types.SimpleNamespace(available=free)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        answers += generation.ask(*tuned, QUESTIONS[:1], 2)
        assert products.called == packed
    assert answers[0] == answers[1]


def test_adapters_take_turns_on_one_base_and_each_answers_as_alone(
    base: Any, tuned: Any, tiny_adapter: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_adapter, tmp_path / "other"))
    (other / RECORD).unlink()  # an adapter that does not say where it is from is tried
    flipped = {k: -v if "lora_B" in k else v for k, v in load_file(other / WEIGHTS).items()}
    save_file(flipped, other / WEIGHTS)
    both: Any = generation.load_adapters(tiny(), {"one": tiny_adapter, "two": other})
    assert not both.training
    assert not any(p.requires_grad for p in both.parameters())
    alone = {"one": logits(*tuned), "two": logits(generation.load_tuned(tiny(), other), base[1])}
    assert not torch.equal(alone["one"], alone["two"])
    assert torch.equal(logits(both, base[1]), alone["one"]), "the first one is active"
    for name in ("two", "one", "two"):
        both.set_adapter(name, inference_mode=True)
        assert torch.equal(logits(both, base[1]), alone[name])
    with both.disable_adapter():
        assert torch.equal(logits(both, base[1]), logits(*base))


def test_an_adapter_has_one_dtype_in_use_here_and_by_the_cards_code(tiny_adapter: Path) -> None:
    """It is trained in fp32, but under autocast it multiplies in the compute dtype, too."""
    from transformers import AutoModelForCausalLM

    plan = dataclasses.replace(tiny(), compute_dtype="bfloat16")
    card = AutoModelForCausalLM.from_pretrained(
        TINY_MODEL, quantization_config=quantization.nf4_config(plan), dtype=torch.bfloat16
    )
    card.load_adapter(str(tiny_adapter))
    models = [generation.load_tuned(plan, tiny_adapter), card]
    kinds = [{p.dtype for n, p in m.named_parameters() if ".lora_" in n} for m in models]
    assert kinds == [{torch.bfloat16}] * 2
    further = generation.load_adapters(plan, {"default": tiny_adapter}, trainable=True)
    assert {p.dtype for p in further.parameters() if p.requires_grad} == {torch.float32}


def test_todays_date_is_not_in_the_prompt(tmp_path: Path) -> None:
    """As in Llama 3.2: what is trained today is asked next week."""
    folder = Path(shutil.copytree(TINY_MODEL, tmp_path / "model"))
    dated = 'Today Date: {{ strftime_now("%d %b %Y") }} ' + CHAT_TEMPLATE
    (folder / "chat_template.jinja").write_text(dated)
    tokenizer = generation.load_tokenizer(dataclasses.replace(tiny(), model_path=str(folder)))
    text = tokenizer.apply_chat_template(PROMPT, tokenize=False)
    assert text.startswith("Today Date: 26 Jul 2024<|begin")
    assert tokenizer.padding_side == "right", "as training wants it"


def spoil(folder: Path, name: str, kept: float | dict[str, Any]) -> Path:
    """Keep the first part of a file, or change fields of a JSON file."""
    file = folder / name
    if isinstance(kept, dict):
        file.write_text(json.dumps(json.loads(file.read_text()) | kept))
    else:
        file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    return folder


def with_folder(folder: Path, name: str) -> Path:
    """Put a folder in the place of a file."""
    (folder / name).unlink()
    (folder / name).mkdir()
    return folder


def without(file: Path, part: str) -> Path:
    """Take the tensors whose names hold ``part`` out of a file of weights."""
    kept = {name: tensor for name, tensor in load_file(file).items() if part not in name}
    save_file(kept, file, {"format": "pt"})
    return file.parent


def nan(file: Path) -> Path:
    """Put a NaN into one tensor of a file of weights."""
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = math.nan
    save_file(tensors, file, {"format": "pt"})
    return file.parent


def flipped(file: Path, part: str) -> Path:
    """Turn round the rows of the tensors whose names hold ``part``."""
    tensors = load_file(file)
    save_file({n: t.flip(0).contiguous() if part in n else t for n, t in tensors.items()}, file)
    return file.parent


def test_a_base_is_named_by_all_its_tensors_and_not_by_its_folder(tmp_path: Path) -> None:
    def of(folder: Path) -> str:
        return adapters.base_id(dataclasses.replace(tiny(), model_path=str(folder)))

    same, other, told = (Path(shutil.copytree(TINY_MODEL, tmp_path / n)) for n in "abc")
    flipped(other / WEIGHTS_OF_BASE, "layers.3.mlp.down_proj")  # the last of the file
    (told / "chat_template.jinja").write_text("another " + CHAT_TEMPLATE)
    assert of(same) == adapters.base_id(tiny())
    assert len({of(folder) for folder in (same, other, told)}) == 3
    (same / "chat_template.jinja").unlink()  # as in folders of transformers 4
    inside = {of(spoil(same, "tokenizer_config.json", {"chat_template": t})) for t in "ab"}
    assert len(inside) == 2


def test_an_adapter_is_named_by_its_weights_and_their_scale(
    tiny_adapter: Path, tmp_path: Path
) -> None:
    same, scaled, other = (Path(shutil.copytree(tiny_adapter, tmp_path / n)) for n in "abc")
    spoil(same, CONFIG, {"base_model_name_or_path": "moved"})
    spoil(scaled, CONFIG, {"lora_alpha": 64})
    flipped(other / WEIGHTS, "layers.3.mlp.down_proj.lora_B")
    assert adapters.adapter_id(same) == adapters.adapter_id(tiny_adapter)
    assert len({adapters.adapter_id(folder) for folder in (same, scaled, other)}) == 3


def test_a_model_of_the_hub_is_named_by_the_commit_that_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branch moves on the Hub after training: the adapter's record still says which base."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--me--base"
    plan = dataclasses.replace(tiny(tmp_path), model_id="me/base")
    assert adapters.base_id(plan) == "me/base@main", "nobody knows yet"
    for commit in ("a" * 40, "b" * 40):
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    record = training.record_of(plan, fit=False)
    assert (record["revision"], record["base"]) == ("a" * 40, f"me/base@{'a' * 40}")
    (repo / "refs" / "main").write_text("b" * 40)
    assert plan.hub_revision == "b" * 40
    assert dataclasses.replace(plan, revision=record["revision"]).hub_revision == "a" * 40
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in (WEIGHTS, CONFIG):
        (folder / name).write_text("{}")
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(CourseError, match=r"trained on me/base \(me/base@a+\), but .*@b+\)"):
        adapters.check_adapter(plan, folder)


DAMAGED_BASES: dict[str, tuple[Any, str]] = {
    "no head": (lambda f: spoil(f, BASE, {"tie_word_embeddings": False}), "missing lm_head"),
    "no layer": (lambda f: without(f / WEIGHTS_OF_BASE, "1.mlp.up_"), r"missing .*1\.mlp\.up_proj"),
    "more": (lambda f: spoil(f, BASE, {"num_hidden_layers": 3}), r"unexpected .*layers\.3"),
}


@pytest.mark.parametrize("name", DAMAGED_BASES)
def test_weights_that_are_not_those_of_the_config_are_refused(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGED_BASES[name]
    folder = damage(Path(shutil.copytree(TINY_MODEL, tmp_path / "model")))
    with pytest.raises(CourseError, match=rf"do not fit its config\.json \(.*{message}"):
        generation.load_base(dataclasses.replace(tiny(), model_path=str(folder)))


NF4 = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
MUTE = "{% for turn in messages if turn.role == 'user' %}{{ turn.content }}{% endfor %}"
STRICT = "{{ raise_exception('System role not supported') }}"


UNSUITED = [
    ("config.json", NF4, r"quantised already \(bitsandbytes\): expected 16 or 32 bits"),
    ("config.json", {"vocab_size": 3000}, "has a token 3071, but its embedding has 3000 rows"),
    ("chat_template.jinja", "", "template cannot be used .*Use the instruct version"),
    ("chat_template.jinja", MUTE, "it leaves out the system turn or the question"),
    ("chat_template.jinja", STRICT, "System role not supported"),
]


@pytest.mark.parametrize(("file", "content", "message"), UNSUITED)
def test_a_base_that_does_not_suit_is_refused_before_its_weights_are_read(
    file: str, content: Any, message: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(TINY_MODEL, tmp_path / "model"))
    (folder / WEIGHTS_OF_BASE).write_bytes(b"not read")
    if isinstance(content, dict):
        spoil(folder, file, content)
    else:
        (folder / file).unlink() if not content else (folder / file).write_text(content)
    with pytest.raises(CourseError, match=message):
        generation.load_base(dataclasses.replace(tiny(), model_path=str(folder)))


UNFIT: dict[str, tuple[Any, str]] = {
    "missing": (lambda f: f / "nowhere", r"no adapter in nowhere/: lesson 04 .*--only 04"),
    "another model": (lambda f: spoil(f, RECORD, {"model_id": "a/llama"}), "trained on a/llama"),
    "other weights of it": (lambda f: spoil(f, RECORD, {"base": "01"}), r"on embedded \(01\)"),
    "a folder": (
        lambda f: with_folder(f, RECORD),
        r"damaged \(Is a directory\): delete it",
    ),
    "torn": (lambda f: spoil(f, WEIGHTS, 0.5), "does not load onto embedded .*lesson 04 again"),
    "another rank": (lambda f: spoil(f, CONFIG, {"r": 8}), "does not load onto embedded"),
    "NaN": (lambda f: nan(f / WEIGHTS), "holds numbers that are not finite: base_model"),
    "a layer less": (lambda f: without(f / WEIGHTS, "2.mlp.up_proj"), "not have the same tensors"),
    "changed base": (lambda f: spoil(f, CONFIG, {"init_lora_weights": "pissa"}), "= 'pissa'"),
    "trained tokens": (lambda f: spoil(f, CONFIG, {"trainable_token_indices": [7]}), "plain LoRA"),
    "classifier": (lambda f: spoil(f, CONFIG, {"task_type": "SEQ_CLS"}), "task_type = 'SEQ_CLS'"),
    "unknown": (lambda f: spoil(f, CONFIG, {"of_tomorrow": 1}), "has of_tomorrow = 1 in adapter"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(
    name: str, tiny_adapter: Path, tmp_path: Path
) -> None:
    damage, message = UNFIT[name]
    folder = damage(Path(shutil.copytree(tiny_adapter, tmp_path / "copy")))
    with pytest.raises(CourseError, match=message) as caught:
        generation.load_tuned(tiny(), folder)
    assert "\n" not in str(caught.value)


def test_an_adapter_that_may_not_be_read_is_not_only_called_damaged(
    tiny_base: Any, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (PermissionError(13, "Denied"), RuntimeError("Denied (os error 13)")):
        monkeypatch.setattr("peft.PeftModel.from_pretrained", Mock(side_effect=error))
        with pytest.raises(CourseError, match=r"Denied.*\)\. See that you may read its files, or"):
            generation.load_adapters(tiny(), {"own": tiny_adapter}, base=tiny_base)


def test_a_random_start_of_an_adapter_is_accepted(tiny_adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_adapter, tmp_path / "copy"))
    for start in (True, False, "gaussian"):
        spoil(folder, CONFIG, {"init_lora_weights": start})
        adapters.check_adapter(tiny(), folder)


def test_adapters_of_different_bases_are_refused_before_loading(
    tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = Path(shutil.copytree(tiny_adapter, tmp_path / "foreign"))
    spoil(foreign, RECORD, {"model_id": "some/llama", "base": "some/llama@main"})
    monkeypatch.setattr(generation, "load_base", lambda *_: pytest.fail("the base was loaded"))
    both = {"own": tiny_adapter, "foreign": foreign}
    with pytest.raises(CourseError, match=r"trained on some/llama .*, but the plan loads embedded"):
        generation.load_adapters(tiny(), both)
    said = r"different bases .*: 'own' was trained on embedded .*, 'foreign' on some/llama"
    with pytest.raises(CourseError, match=said):
        adapters.check_same_base(both)


@pytest.mark.parametrize("name", [WEIGHTS_OF_BASE, "tokenizer.json"])
def test_a_damaged_base_is_named(name: str, tmp_path: Path) -> None:
    folder = spoil(Path(shutil.copytree(TINY_MODEL, tmp_path / "gated-403")), name, 0.5)
    said = "cannot load the model in .* Expected an undamaged folder in the Hub's layout"
    with pytest.raises(CourseError, match=said) as caught:
        generation.load_base(dataclasses.replace(tiny(), model_path=str(folder)))
    assert "\n" not in str(caught.value)


GATED = "is gated https://huggingface.co/some/gate licence HF_TOKEN Colab 'small'"
OFFLINE = "cannot load some/gate from the Hub network profile 'tiny' needs neither"
SAID = {401: GATED, 403: GATED, 404: OFFLINE, 0: OFFLINE}  # 0: no network


@pytest.mark.parametrize("status", SAID)
def test_hub_errors_are_explained(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers and huggingface_hub ask a client that answers as the Hub does."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        headers = {"X-Error-Code": "RepoNotFound" if status == 404 else "GatedRepo"}
        return httpx2.Response(status, headers=headers, request=request)

    client = httpx2.Client(transport=httpx2.MockTransport(answer))
    monkeypatch.setattr("huggingface_hub.utils._http._GLOBAL_CLIENT", client)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", status == 0)
    with pytest.raises(CourseError) as caught:
        generation.load_tokenizer(dataclasses.replace(tiny(), model_id="some/gate"))
    assert [word for word in SAID[status].split() if word not in str(caught.value)] == []
