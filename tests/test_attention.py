"""torch's variable-length kernel, played on a CPU, gives SDPA's losses and answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import benchmark, tiny

from medquad_utils import chat, data, generation, profiles, training
from medquad_utils.machine import Hardware
from medquad_utils.profiles import VARLEN

common = benchmark("common")
ATTENTIONS = ("sdpa", VARLEN)


def test_the_kernel_is_taken_from_ampere_on_and_where_torch_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for capability, expected in (((7, 5), "sdpa"), ((8, 0), VARLEN), ((9, 0), VARLEN)):
        card = Hardware("cuda", "a GPU", 40.0, capability)
        assert profiles.resolve("llama-8b", hardware=card).attention == expected
    assert tiny().attention == "sdpa"
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.11.0+cu130")
    assert profiles.attention(card) == "sdpa", "this torch's kernel does not share keys"


def losses(out: Path, attention: str) -> tuple[list[float], list[float]]:
    """The losses of three steps of two packed rows, and of the validation after them."""
    plan = tiny(out, rows=14, max_steps=3).with_fit(pack_length=256, accumulation=2)
    plan = dataclasses.replace(plan, eval_rows=6, attention=attention)
    tokenizer = generation.load_tokenizer(plan)
    rows = training.select(plan, tokenizer, data.prepare(plan))
    settings: dict[str, Any] = {"logging_steps": 1, "save_strategy": "no", "eval_strategy": "no"}
    settings["per_device_eval_batch_size"] = 3
    model = generation.load_base(plan)
    trainer = training.build_trainer(plan, model, tokenizer, rows, out / "c", **settings)
    trainer.train()
    trainer.evaluate()
    return tuple([e for _, e in training.curve(trainer, n)] for n in ("loss", "eval_loss"))


def test_training_and_validation_have_sdpas_losses(tmp_path: Path) -> None:
    masked = losses(tmp_path, "sdpa")
    with common.varlen_on_cpu() as calls:
        alone = losses(tmp_path, VARLEN)
    layers = profiles.PROFILES["tiny"].shape.layers
    assert len(calls) > 6 * layers, "training's six rows, and validation's"
    assert max(calls[: 6 * layers]) > 1 < max(calls[6 * layers :]), "rows hold several examples"
    for one, other in zip(alone, masked, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    assert (len(masked[0]), len(masked[1])) == (3, 1)


def test_padded_rows_and_left_padded_generation_go_through_sdpa(tiny_tokenizer: Any) -> None:
    questions = [*chat.THREE_QUESTIONS, "What causes gout, and how do doctors find out about it?"]
    prompts = [chat.prompt_ids(tiny_tokenizer, chat.prompt_messages(q)) for q in questions]
    assert len(set(map(len, prompts))) > 1, "they need padding"
    rows = [
        tiny_tokenizer.pad({"input_ids": prompts}, padding_side=side, return_tensors="pt")
        for side in ("left", "right")
    ]
    answers, logits = [], []
    with common.varlen_on_cpu() as calls:
        for attention in ATTENTIONS:
            model = generation.load_base(dataclasses.replace(tiny(), attention=attention))
            assert model.config._attn_implementation == attention
            answers.append(generation.ask(model, tiny_tokenizer, questions, 16))
            with torch.inference_mode():
                logits.append([model(**row).logits for row in rows])
    assert answers[0] == answers[1]
    assert all(map(torch.equal, *logits))
    assert calls == [], "the kernel knows no padding"
