"""Loading, asking and stopping: what an answer is, and what a reader is told when a model or an adapter is not to be had."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_adapter
from safetensors.torch import load_file, save_file

from medquad_utils import chat, generation, profiles
from medquad_utils.profiles import TINY_MODEL, CourseError, Hardware, Plan

CPU = Hardware("cpu", "any", 16.0, cores=2)
QUESTIONS = (*chat.THREE_QUESTIONS, "Is cystic fibrosis inherited ?", "What causes gout, and how do doctors find out that someone has it?")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return profiles.resolve("tiny", hardware=CPU, out=str(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def tokenizer(plan: Plan) -> Any:
    return generation.load_tokenizer(plan)


@pytest.fixture(scope="module")
def model(plan: Plan) -> Any:
    return generation.load_base(plan)


@pytest.fixture(scope="module")
def adapter(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as lesson 04 saves one, of random weights."""
    return random_adapter(plan, tmp_path_factory.mktemp("made") / "adapter", {})


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter to damage."""
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


@pytest.fixture
def model_copy(tmp_path: Path) -> Path:
    """A copy of the embedded model to damage."""
    return Path(shutil.copytree(TINY_MODEL, tmp_path / "model"))


def one_line(message: str) -> str:
    assert message
    assert "\n" not in message
    return message


# ---- asking ---------------------------------------------------------------------------------------------------------


def test_a_batch_answers_as_one_by_one(model: Any, tokenizer: Any) -> None:
    alone = [generation.ask(model, tokenizer, [q], 24)[0] for q in QUESTIONS]
    lengths = {len(chat.prompt_ids(tokenizer, chat.prompt_messages(q))) for q in QUESTIONS}
    assert len(lengths) > 2, "the prompts are to need padding"
    assert generation.ask(model, tokenizer, QUESTIONS, 24) == alone
    assert generation.ask(model, tokenizer, QUESTIONS, 24, batch_size=2) == alone
    assert len({answer.text for answer in alone}) > 1


def test_an_answer_is_what_transformers_generates_after_the_prompt(model: Any, tokenizer: Any) -> None:
    """The oracle is ``model.generate`` on the rendered text, with no padding and no code of ours in between."""
    text = tokenizer.apply_chat_template(chat.prompt_messages(QUESTIONS[0]), add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**ids, do_sample=False, max_new_tokens=12, min_new_tokens=12)
    expected = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    answer = generation.ask(model, tokenizer, [QUESTIONS[0]], 12, min_new_tokens=12)[0]
    assert (answer.text, answer.tokens, answer.stopped) == (expected, 12, False)


@pytest.mark.parametrize("end", [chat.END_OF_TURN, "<|end_of_text|>"])
def test_generation_stops_on_either_end_token(model: Any, tokenizer: Any, end: str) -> None:
    """A bias makes ``end`` the likeliest token, from the fourth on; one forward pass a token shows when it stopped."""
    passes: list[int] = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    number = tokenizer.convert_tokens_to_ids(end)
    try:
        answer = generation.ask(model, tokenizer, [QUESTIONS[0]], 20, min_new_tokens=3, sequence_bias=[[[number], 1e4]])[0]
    finally:
        hook.remove()
    assert (answer.stopped, answer.tokens, len(passes)) == (True, 3, 4)
    assert end not in answer.text


def test_both_ends_are_in_the_models_own_generation_config(model: Any, tokenizer: Any) -> None:
    ends = [tokenizer.convert_tokens_to_ids(t) for t in ("<|end_of_text|>", chat.END_OF_TURN)]
    assert sorted(model.generation_config.eos_token_id) == sorted(ends) == sorted(chat.end_ids(tokenizer))
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.pad_token_id not in ends


def test_an_answer_that_is_cut_off_says_that_it_did_not_stop(model: Any, tokenizer: Any) -> None:
    answer = generation.ask(model, tokenizer, [QUESTIONS[0]], 5, suppress_tokens=chat.end_ids(tokenizer))[0]
    assert (answer.stopped, answer.tokens) == (False, 5)


@pytest.mark.parametrize("question", QUESTIONS[:2])
def test_the_streamed_pieces_joined_are_the_answer(model: Any, tokenizer: Any, question: str) -> None:
    pieces = list(generation.stream(model, tokenizer, question, 20))
    assert "".join(pieces).strip() == generation.ask(model, tokenizer, [question], 20)[0].text
    assert len(pieces) > 1


def test_closing_a_stream_ends_the_generation_at_its_next_token(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    generate, endless = model.generate, {"suppress_tokens": chat.end_ids(tokenizer)}
    monkeypatch.setattr(model, "generate", lambda **settings: made.append(generate(**settings, **endless).shape[1]))
    pieces = generation.stream(model, tokenizer, QUESTIONS[0], 200)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    (length,) = made  # it has waited for the end
    assert length < 200


def test_a_stream_that_fails_raises_instead_of_waiting_for_ever(model: Any, tokenizer: Any) -> None:
    caught: list[BaseException] = []

    def read() -> None:
        try:
            list(generation.stream(model, tokenizer, QUESTIONS[0], -1))
        except Exception as error:
            caught.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(timeout=120)
    assert caught, "the reader still waits for a piece that never comes"
    assert "max_new_tokens" in str(caught[0])


def test_next_token_probabilities_are_a_distribution_that_greedy_decoding_follows(model: Any, tokenizer: Any) -> None:
    messages = chat.prompt_messages(QUESTIONS[1])
    probabilities = generation.next_token_probabilities(model, tokenizer, messages)
    assert probabilities.shape == (model.config.vocab_size,)
    assert probabilities.dtype == torch.float32
    assert float(probabilities.min()) >= 0
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-5)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    first = model.generate(**ids, do_sample=False, max_new_tokens=1)[0, -1]
    assert int(probabilities.argmax()) == int(first)
    later = generation.next_token_probabilities(model, tokenizer, messages, start="The")
    assert float(later.sum()) == pytest.approx(1, abs=1e-5)
    assert not torch.allclose(later, probabilities)


def test_an_end_of_the_callers_replaces_the_tokenizers(model: Any, tokenizer: Any) -> None:
    free = generation.ask(model, tokenizer, [QUESTIONS[0]], 24, eos_token_id=[-1])[0]
    assert (free.tokens, free.stopped) == (24, False)
    ids = tokenizer.encode(free.text, add_special_tokens=False)
    end = ids[6]
    ended = generation.ask(model, tokenizer, [QUESTIONS[0]], 24, eos_token_id=[end])[0]
    assert (ended.tokens, ended.stopped) == (ids.index(end), True)
    assert free.text.startswith(ended.text)


# ---- dequantised once -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(plan: Plan, adapter: Path) -> Any:
    return generation.load_tuned(plan, adapter)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at each product with packed weights."""
    import bitsandbytes

    made: list[int] = []
    real = bitsandbytes.matmul_4bit

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(1)
        product: torch.Tensor = real(*args, **kwargs)
        return product

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", counted)
    return made


def test_unpacked_weights_give_the_same_logits_to_the_bit_with_the_adapter_and_without(
    tuned: Any, tokenizer: Any, products: list[int]
) -> None:
    ids = torch.tensor([chat.prompt_ids(tokenizer, chat.prompt_messages(QUESTIONS[0]))])

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = tuned(input_ids=ids).logits
        return found

    with tuned.disable_adapter():
        base = logits()
    with_adapter, stored = logits(), {name: p.clone() for name, p in tuned.named_parameters()}
    layers = 7 * tuned.config.num_hidden_layers
    assert len(products) == 2 * layers
    with generation.unpacked(tuned):
        assert torch.equal(logits(), with_adapter)
        with tuned.disable_adapter():
            assert torch.equal(logits(), base)
        assert not torch.equal(base, with_adapter)
        assert len(products) == 2 * layers, "a packed weight was multiplied by"
        with generation.unpacked(tuned):
            logits()
        logits()
        assert len(products) == 2 * layers, "the inner context has ended the outer one"
        assert all(torch.equal(p, stored[name]) for name, p in tuned.named_parameters())
    assert torch.equal(logits(), with_adapter)
    assert len(products) == 3 * layers


def test_answers_are_generated_from_unpacked_weights_and_the_model_is_left_as_it_was(
    tuned: Any, tokenizer: Any, products: list[int]
) -> None:
    generation.ask(tuned, tokenizer, QUESTIONS[:2], 3)
    "".join(generation.stream(tuned, tokenizer, QUESTIONS[0], 3))
    with pytest.raises(ValueError, match="max_new_tokens"):
        generation.ask(tuned, tokenizer, QUESTIONS[:1], -1)
    for _ in generation.generate_batches(tuned, tokenizer, [chat.prompt_messages(q) for q in QUESTIONS], 2, batch_size=2):
        break  # a caller who reads one batch and no more
    assert products == []
    generation.next_token_probabilities(tuned, tokenizer, chat.prompt_messages(QUESTIONS[0]))
    assert len(products) == 7 * tuned.config.num_hidden_layers


def test_without_the_memory_for_it_weights_stay_packed(
    tuned: Any, tokenizer: Any, products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    shape = profiles.PROFILES["tiny"].shape
    need = 4 * shape.block_parameters  # fp32
    expected = generation.ask(tuned, tokenizer, QUESTIONS[:1], 2)
    for free, packed in ((2 * need, False), (2 * need - 2, True)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: types.SimpleNamespace(available=free))
        assert generation.ask(tuned, tokenizer, QUESTIONS[:1], 2) == expected
        assert bool(products) == packed


# ---- loading --------------------------------------------------------------------------------------------------------


def test_the_base_is_in_4_bits_and_the_tokenizer_pads_on_the_right_with_no_end_token(model: Any, tokenizer: Any) -> None:
    import bitsandbytes

    packed = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(packed) == 7 * model.config.num_hidden_layers
    assert {m.weight.quant_type for m in packed} == {"nf4"}
    assert all(m.weight.quant_state.nested for m in packed)
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token_id not in chat.end_ids(tokenizer)


def test_the_tuned_model_is_the_base_plus_the_adapter(plan: Plan, model: Any, tokenizer: Any, adapter: Path) -> None:
    tuned = generation.load_tuned(plan, adapter)
    messages = chat.prompt_messages(QUESTIONS[0])
    base = generation.next_token_probabilities(model, tokenizer, messages)
    with tuned.disable_adapter():  # type: ignore[operator]
        assert torch.equal(generation.next_token_probabilities(tuned, tokenizer, messages), base)
    assert not torch.allclose(generation.next_token_probabilities(tuned, tokenizer, messages), base)
    assert not tuned.training


def test_no_adapter_names_the_lesson_that_trains_one(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(CourseError, match=r"no adapter in nowhere/: lesson 04 .*--only 04") as caught:
        generation.load_tuned(plan, tmp_path / "nowhere")
    one_line(str(caught.value))


def test_an_adapter_without_its_weights_counts_as_none(plan: Plan, copied: Path) -> None:
    (copied / "adapter_model.safetensors").unlink()
    with pytest.raises(CourseError, match="no adapter in"):
        generation.load_tuned(plan, copied)


def test_an_adapter_of_another_base_is_refused_by_name(plan: Plan, copied: Path) -> None:
    (copied / "plan.json").write_text(json.dumps(plan.as_dict() | {"model_id": "meta-llama/Meta-Llama-3-8B-Instruct"}))
    with pytest.raises(CourseError, match=r"trained on meta-llama/Meta-Llama-3-8B-Instruct, but the plan loads embedded"):
        generation.load_tuned(plan, copied)


def test_an_adapter_of_another_shape_is_refused_though_no_plan_lies_beside_it(plan: Plan, copied: Path) -> None:

    (copied / "plan.json").unlink()
    weights = copied / "adapter_model.safetensors"
    save_file({k: torch.cat([v, v], dim=1 if ".lora_A." in k else 0) for k, v in load_file(weights).items()}, weights)
    with pytest.raises(CourseError, match=r"does not load onto embedded .*lesson 04 again") as caught:
        generation.load_tuned(plan, copied)
    one_line(str(caught.value))


@pytest.mark.parametrize("kept", [0, 4, 0.5, -1], ids=["empty", "half a header", "half", "one byte short"])
def test_a_truncated_adapter_is_told_from_a_missing_one(plan: Plan, copied: Path, kept: float) -> None:
    weights = copied / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(kept * len(whole)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(CourseError, match=r"adapter in adapter/ does not load .*Delete the folder and run lesson 04") as caught:
        generation.load_tuned(plan, copied)
    one_line(str(caught.value))


@pytest.mark.parametrize("kept", [0, 0.5], ids=["empty", "half"])
def test_a_truncated_base_says_that_the_weights_are_damaged(plan: Plan, model_copy: Path, kept: float) -> None:
    weights = model_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(kept * weights.stat().st_size)])
    with pytest.raises(CourseError, match=r"weights of .* are damaged.*load again") as caught:
        generation.load_base(dataclasses.replace(plan, model_path=str(model_copy)))
    one_line(str(caught.value))


def test_a_folder_that_is_no_model_is_not_called_gated_whatever_its_name(plan: Plan, tmp_path: Path) -> None:
    folder = tmp_path / "gated-403"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for load in (generation.load_tokenizer, generation.load_base):
        with pytest.raises(CourseError, match=r"cannot load the model in .*Hub's layout") as caught:
            load(dataclasses.replace(plan, model_path=str(folder)))
        one_line(str(caught.value))


def test_a_tokenizer_that_is_no_json_is_one_clear_message(plan: Plan, model_copy: Path) -> None:
    tokens = model_copy / "tokenizer.json"
    tokens.write_text(tokens.read_text()[:100])
    with pytest.raises(CourseError, match="cannot load the model in"):
        generation.load_tokenizer(dataclasses.replace(plan, model_path=str(model_copy)))


def test_a_hub_out_of_reach_offers_the_profile_that_needs_none(plan: Plan) -> None:
    """``HF_HUB_OFFLINE=1`` is set for all tests; the name is one that no cache of a reader's machine can hold."""
    absent = "medquad-test/never-published"
    small = dataclasses.replace(plan, profile="small", model_id=absent)
    for load in (generation.load_tokenizer, generation.load_base):
        with pytest.raises(CourseError, match=rf"cannot load {absent} from the Hub .*profile 'tiny' needs none") as caught:
            load(small)
        one_line(str(caught.value))


class Hub(BaseHTTPRequestHandler):
    """The Hub's answers to a request without rights: the repository's name is the status."""

    def do_GET(self) -> None:
        status = int(self.path.split("/")[2]) if self.path.startswith("/gate/") else 404
        self.send_response(status)
        self.send_header("X-Error-Code", "GatedRepo" if status in (401, 403) else "RepoNotFound")
        self.send_header("X-Error-Message", "Access to this model is restricted." if status in (401, 403) else "Repository not found")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815  (the name is http.server's)

    def log_message(self, *_: Any) -> None: ...


ASK_THE_HUB = """
import dataclasses, sys
from medquad_utils import generation, profiles
plan = profiles.resolve("tiny", hardware=profiles.Hardware("cpu", "any", 16.0))
for name in sys.argv[1:]:
    try:
        generation.load_tokenizer(dataclasses.replace(plan, model_id=name))
    except profiles.CourseError as error:
        print(name, "|", error)
"""


def test_a_gated_repository_says_what_to_click_and_offers_the_open_profile(tmp_path: Path) -> None:
    """The real road: transformers and huggingface_hub ask a server that answers as the Hub does (no token, a token without rights)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK_THE_HUB, "gate/401", "gate/403", "nobody/nothing"],
            capture_output=True, text=True, env=environment, cwd=tmp_path, check=True,
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    no_token, no_rights, unknown = done.stdout.splitlines()
    for line, name in ((no_token, "gate/401"), (no_rights, "gate/403")):
        assert f"{name} is gated" in line
        assert f"https://huggingface.co/{name}" in line
        for word in ("licence", "HF_TOKEN", "Colab", "'small'"):
            assert word in line
    assert "is gated" not in unknown
    assert "cannot load nobody/nothing" in unknown
