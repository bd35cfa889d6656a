"""Messages, the Llama-3 chat format and the label mask."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Training and inference share one system turn: under another prompt a tuned model answers worse.
SYSTEM_PROMPT = "You answer medical questions in plain words, for information only."

# Asked before and after training, in the lessons and in the demo.
THREE_QUESTIONS = (
    "What are the symptoms of shingles?",
    "What are the treatments for eczema?",
    "What is (are) Parkinson's disease?",
)

# Printed beside every answer.
NOTICE = (
    "Not medical advice. A language model wrote this answer from what it learned; it may be wrong "
    "or out of date. Ask a health professional. In an emergency call your local emergency number."
)

END_OF_TURN, END_OF_TEXT = "<|eot_id|>", "<|end_of_text|>"
PAD_TOKENS = ["<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<|endoftext|>", "<pad>"]
IGNORED = -100  # the label that the loss skips
# How a special token begins: <|name|> of Llama, Qwen and Granite (DeepSeek has another bar), <name>
# and [NAME] of Mistral and SmolLM. Tags of HTML and words in brackets stay as they are.
TOKEN = re.compile(
    r"<(?=[|｜]|/?(?:s|bos|eos|unk|pad|mask|think|code|filename|reponame|[a-z]+_\w+)>)"
    r"|\[(?=/?(?:INST|THINK|ARGS|IMG|PREFIX|MIDDLE|SUFFIX|[a-z]+_\w+)\])",
    re.IGNORECASE,
)


def tidy_question(question: str) -> str:
    """Close the gaps of MedQuAD's templates: "What causes Asthma ?" becomes "... Asthma?"."""
    text = " ".join(question.split())
    bare = text.rstrip("? ")
    return f"{bare}?" if "?" in text[len(bare) :] else text


def without_tokens(text: str) -> str:
    """Break up special tokens of any family, so that a typed ``<|eot_id|>`` cannot end a turn."""
    return TOKEN.sub(r"\g<0> ", text)


def prompt_messages(
    question: str, history: Sequence[Mapping[str, str]] = ()
) -> list[dict[str, str]]:
    """Build the turns before an answer: system, earlier turns, the question."""
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        *({"role": turn["role"], "content": without_tokens(turn["content"])} for turn in history),
        {"role": "user", "content": without_tokens(tidy_question(question))},
    ]


def grounded_messages(question: str, passages: Sequence[str] = ()) -> list[dict[str, str]]:
    """Build the turns before an answer, with numbered ``passages`` in front of the question."""
    system, user = prompt_messages(question)
    if passages:
        texts = [without_tokens(" ".join(passage.split())) for passage in passages]
        numbered = "\n".join(f"[{number}] {text}" for number, text in enumerate(texts, start=1))
        user["content"] = f"Passages:\n{numbered}\n\n{user['content']}"
    return [system, user]


def to_example(row: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Convert a row to TRL's prompt and completion; only the completion enters the loss.

    Its "passages", a list of texts that a row need not have, stand before the question.
    """
    return {
        "prompt": grounded_messages(row["question"], row.get("passages", ())),
        "completion": [{"role": "assistant", "content": without_tokens(row["answer"])}],
    }


def to_dataset(rows: Iterable[Mapping[str, Any]]) -> Dataset:
    """Convert rows to a data set with the columns ``prompt`` and ``completion``."""
    from datasets import Dataset

    return Dataset.from_list([to_example(row) for row in rows])


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide the progress bars of ``datasets`` inside: building a trainer shows eight short ones."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@dataclass(frozen=True)
class Encoded:
    """The tokens of one example and their labels; label -100 keeps a token out of the loss."""

    ids: list[int]
    labels: list[int]

    @property
    def in_loss(self) -> list[bool]:
        """Whether each token is in the loss."""
        return [label != IGNORED for label in self.labels]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]
) -> list[int]:
    """Tokenize ``messages`` and the header of the answer."""
    return _ids(tokenizer, messages, add_generation_prompt=True)


def _ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], **settings: bool
) -> list[int]:
    # The template writes the BOS token. A call of the tokenizer on rendered text adds a second one.
    encoded = tokenizer.apply_chat_template(list(messages), return_dict=True, **settings)
    return list(encoded["input_ids"])


def encode(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> Encoded:
    """Tokenize a row as TRL does: only the answer and its end of turn have labels."""
    example = to_example(row)
    prompt = prompt_ids(tokenizer, example["prompt"])
    ids = _ids(tokenizer, example["prompt"] + example["completion"])
    # The ids begin with those of the prompt: no token spans the header's newlines and the answer.
    # A label stands at the place of its own token. The model shifts the labels when it computes
    # the loss.
    labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
    return Encoded(ids, labels)


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that stop generation: end of text and end of turn."""
    # A base model calls one of them its EOS, an instruct model the other.
    tokens = [tokenizer.convert_tokens_to_ids(token) for token in (END_OF_TEXT, END_OF_TURN)]
    ids = dict.fromkeys([tokenizer.eos_token_id, *tokens])
    # A vocabulary without the token gives None or the id of "unknown".
    return [i for i in ids if i not in (None, tokenizer.unk_token_id)]


def set_pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Set a pad token that differs from the end tokens, without adding one, and return it.

    It is the tokenizer's own, or one of ``PAD_TOKENS``: Llama 3.1 reserves one, Llama 3.0 has
    unused tokens. Raises ``ValueError`` if the vocabulary has none.
    """
    # A collator may mask padding by its id. With the id of an end token it would mask the end of
    # every answer too, and the tuned model would never stop.
    vocabulary, ends = tokenizer.get_vocab(), end_ids(tokenizer)
    for token in (tokenizer.pad_token, *PAD_TOKENS):
        if token in vocabulary and vocabulary[token] not in ends:
            tokenizer.pad_token = token
            return str(token)
    raise ValueError(
        "the tokenizer has no token that could serve as padding: expected its pad token or one of "
        f"{', '.join(PAD_TOKENS)}, and no end token. Use a Llama-3 tokenizer."
    )
