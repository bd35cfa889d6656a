"""The Llama-3 format, the label mask, the pad token and the end tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from trl import SFTConfig, SFTTrainer

from medquad_utils import chat
from medquad_utils.chat import IGNORED, encode, end_ids, prompt_ids, prompt_messages, set_pad_token

EOT, EOS, PAD = "<|eot_id|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
RESERVED = "<|reserved_special_token_0|>"
CONTROLS = ("<|begin_of_text|>", EOS, "<|start_header_id|>", "<|end_header_id|>", EOT, PAD)
# Anything a user may type: letters of every script, white space, control tokens and their pieces.
pieces = st.sampled_from([*CONTROLS, "<|", "|>", "<", "|", "eot_id", "\n\n", " ?", "\u2028"])
typed = st.lists(st.text(max_size=8) | pieces, max_size=8).map("".join)


def row(question: str, answer: str = "It is a disease of the lungs.") -> dict[str, Any]:
    return {"qtype": "information", "question": question, "answer": answer}


def controls(tokenizer: Any, ids: list[int]) -> list[int]:
    """How often each of ``CONTROLS`` occurs."""
    return [ids.count(tokenizer.convert_tokens_to_ids(token)) for token in CONTROLS]


def made_up(*extra: str, eos: str = EOS, pad: str | None = None) -> Any:
    """A tokenizer of a few words, with ``extra`` tokens."""
    words = dict.fromkeys(["[UNK]", "a", "b", eos, *extra])
    vocabulary = {word: number for number, word in enumerate(words)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    special = {"unk_token": "[UNK]", "eos_token": eos, "pad_token": pad}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special)


def test_prompt_has_the_bytes_of_llama_3_and_one_begin_of_text(tiny_tokenizer: Any) -> None:
    """By hand from https://github.com/meta-llama/llama-models, "Instruct prompt"."""
    history = [{"role": "user", "content": " Hello\n"}, {"role": "assistant", "content": "A\n\nB"}]
    messages = prompt_messages("What causes  Asthma ?", history)
    written = (
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{chat.SYSTEM_PROMPT}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA\n\nB<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat causes Asthma?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    ids = prompt_ids(tiny_tokenizer, messages)
    assert ids == tiny_tokenizer(written, add_special_tokens=False)["input_ids"]
    assert tiny_tokenizer.decode(ids) == written


@given(question=typed)
def test_typed_control_tokens_open_and_end_no_turn(tiny_tokenizer: Any, question: str) -> None:
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": question}]
    for history, turns in (([], 2), (said, 4)):
        ids = prompt_ids(tiny_tokenizer, prompt_messages(question, history))
        assert controls(tiny_tokenizer, ids) == [1, 0, turns + 1, turns + 1, turns, 0]


FAMILIES = {
    "mistral": "<s> </s> <unk> [INST] [/INST] [TOOL_CALLS] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [IMG]",
    "qwen": "<|im_start|> <|im_end|> <|endoftext|> <think> </think> <tool_call> </tool_response>",
    "smollm": "<repo_name> <reponame> <filename> <gh_stars> <jupyter_code> <code> <empty_output>",
    "granite": "<|start_of_role|> <|end_of_role|> <fim_prefix> <fim_pad> <|tool_call|>",
    "gemma": "<bos> <eos> <pad> <start_of_turn> <end_of_turn>",
    "deepseek": "<｜User｜> <｜end▁of▁sentence｜>",
}


def of_family(tiny_tokenizer: Any, tokens: str) -> tuple[Any, set[int], str]:
    """A tokenizer that has these tokens as well, their ids, and a text that a user may type."""
    other = copy.deepcopy(tiny_tokenizer)
    other.add_special_tokens({"additional_special_tokens": tokens.split()})
    ids, typed = set(other.convert_tokens_to_ids(tokens.split())), f"gout {tokens} <<s>s>"
    assert len(ids) == len(tokens.split()) and ids <= set(other(typed)["input_ids"])
    return other, ids, typed + tokens.replace(" ", "")


@pytest.mark.parametrize("tokens", FAMILIES.values(), ids=FAMILIES)
def test_typed_tokens_of_any_family_are_text(tiny_tokenizer: Any, tokens: str) -> None:
    other, special, typed = of_family(tiny_tokenizer, tokens)
    asked = prompt_messages(typed, [{"role": "assistant", "content": typed}])
    learned = encode(other, row(typed, typed) | {"passages": [typed]})
    assert not special & {*prompt_ids(other, asked), *learned.ids}
    plain = "<b>5 < 6</b>, <5%, [CDC] and a|b"
    assert chat.without_tokens(plain) == plain


def test_tidying_closes_the_gaps_of_the_question_templates() -> None:
    long = "? " * 200_000 + "x"  # a pattern that backtracks takes minutes
    for question, tidied in {
        "Who is at risk for Asthma? ?": "Who is at risk for Asthma?",
        "  What is (are)\n \t Asthma ?? ": "What is (are) Asthma?",
    }.items() | {(text, text) for text in ("Tell me about asthma", "Why? Because", "", long)}:
        assert chat.tidy_question(question) == tidied == chat.tidy_question(tidied)


@given(question=typed, answer=typed)
def test_labels_hold_only_the_answer_and_its_end_of_turn(
    tiny_tokenizer: Any, question: str, answer: str
) -> None:
    encoded = encode(tiny_tokenizer, row(question, answer))
    prompt = prompt_ids(tiny_tokenizer, prompt_messages(question))
    assert encoded.ids[: len(prompt)] == prompt, "training and use have the same prompt"
    learned = encoded.ids[len(prompt) :]
    assert encoded.labels == [IGNORED] * len(prompt) + learned
    assert tiny_tokenizer.decode(learned) == chat.without_tokens(answer.strip()) + EOT
    assert controls(tiny_tokenizer, learned) == [0, 0, 0, 0, 1, 0]
    assert encoded.in_loss == [False] * len(prompt) + [True] * len(learned)


def test_passages_of_a_row_stand_before_its_question_in_training_as_in_use(
    tiny_tokenizer: Any,
) -> None:
    asked = row("What causes Gout ?", "Uric acid.") | {"passages": ["Gout: acid.", "Mumps: rest."]}
    (turns, *_) = chat.to_dataset([asked])["prompt"]
    assert turns == chat.grounded_messages("What causes Gout ?", asked["passages"])
    assert turns[-1]["content"].startswith("Passages:\n[1] Gout: acid.\n[2] Mumps: rest.\n\nWhat")
    encoded = encode(tiny_tokenizer, asked)
    learned = [i for i, own in zip(encoded.ids, encoded.in_loss, strict=True) if own]
    assert tiny_tokenizer.decode(learned) == f"Uric acid.{EOT}"


def test_trl_trains_on_the_same_tokens_and_labels(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer, special, typed = of_family(tiny_tokenizer, f"{FAMILIES['mistral']} <|im_start|>")
    rows = [row("What is (are) Asthma ?"), row("What causes Gout ?", "It can be due to crystals.")]
    rows.append(row(f"Is {typed} ?", f"No. {typed}"))
    llama = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=transformers.LlamaForCausalLM(llama),
        args=SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none"),
        train_dataset=chat.to_dataset(rows),
        processing_class=tokenizer,
    )
    assert datasets.is_progress_bar_enabled(), "the bars of other data sets are still shown"
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    for r, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        encoded = encode(tokenizer, r)
        length = len(encoded.ids)
        assert ids[:length].tolist() == encoded.ids
        assert labels[:length].tolist() == encoded.labels
        assert not special & set(ids.tolist()), "a row holds no control token"
        assert set(labels[length:].tolist()) <= {IGNORED}


@pytest.mark.parametrize(
    ("tokens", "eos", "pad", "expected"),
    [
        ((EOT, PAD), EOS, EOT, PAD),
        ((EOT, PAD), EOS, EOS, PAD),
        ((EOS, PAD), EOT, EOS, PAD),
        ((EOT, RESERVED), EOS, None, RESERVED),
        ((EOT, RESERVED, PAD), EOT, None, PAD),
        ((EOT, "<mine>"), EOS, "<mine>", "<mine>"),
        (("<|im_start|>", "<|endoftext|>"), "<|im_end|>", "<|im_end|>", "<|endoftext|>"),
    ],
)
def test_pad_token_is_never_an_end_token(tokens: Any, eos: str, pad: Any, expected: str) -> None:
    tokenizer = made_up(*tokens, eos=eos, pad=pad)
    size = len(tokenizer)
    assert set_pad_token(tokenizer) == expected == tokenizer.pad_token
    assert tokenizer.pad_token_id not in (*end_ids(tokenizer), tokenizer.unk_token_id)
    assert len(tokenizer) == size, "a new token would not fit the base model"


def test_tokenizer_without_a_token_for_padding_is_refused() -> None:
    for tokenizer in (made_up(EOT, pad=EOT), made_up(eos="<|endoftext|>"), made_up("c")):
        with pytest.raises(ValueError, match="no token that could serve as padding"):
            set_pad_token(tokenizer)


def test_generation_stops_at_both_ends_and_at_no_unknown_token(tiny_tokenizer: Any) -> None:
    for tokenizer in (tiny_tokenizer, made_up(EOT), made_up(EOS, eos=EOT)):
        assert {*tokenizer.convert_ids_to_tokens(end_ids(tokenizer))} == {EOS, EOT}
    assert tiny_tokenizer.pad_token_id not in end_ids(tiny_tokenizer)
    other = made_up(eos="</s>")
    assert other.convert_ids_to_tokens(end_ids(other)) == ["</s>"]
