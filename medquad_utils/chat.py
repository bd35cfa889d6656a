"""Messages, the Llama-3 chat format and the label mask: what the model reads, and which part of it is learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# One system turn for training and for inference: a model that was tuned under one prompt answers worse under another.
SYSTEM_PROMPT = "You answer medical questions in plain words, for information only."

# The three questions that are asked before and after training, in every lesson and in the demo.
THREE_QUESTIONS = (
    "What are the symptoms of shingles?",
    "What are the treatments for eczema?",
    "What is (are) Parkinson's disease?",
)

# What stands beside every printed answer.
NOTICE = (
    "Not medical advice. A language model wrote this answer from what it learned; it may be wrong or out of date. "
    "Ask a health professional. In an emergency call your local emergency number."
)

# Writes the same bytes as Llama-3's own template: every turn is a header, a blank line, the trimmed text, and <|eot_id|>.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for turn in messages %}"
    "{{- '<|start_header_id|>' + turn['role'] + '<|end_header_id|>\\n\\n' + turn['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)

END_OF_TURN = "<|eot_id|>"
END_OF_TEXT = "<|end_of_text|>"
IGNORED = -100  # the label that the loss skips


def tidy_question(question: str) -> str:
    """Close the gaps that MedQuAD's templates leave: ``"What causes Asthma ?"`` -> ``"What causes Asthma?"``."""
    text = " ".join(question.split())
    bare = text.rstrip("? ")
    return f"{bare}?" if "?" in text[len(bare) :] else text


def without_tokens(text: str) -> str:
    """``text`` with every ``<|`` parted: a reader who types ``<|eot_id|>`` must not end a turn or open one of another role."""
    return text.replace("<|", "< |")


def prompt_messages(
    question: str, history: Sequence[Mapping[str, str]] = ()
) -> list[dict[str, str]]:
    """The turns before an answer: system, earlier turns, the question."""
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        *({"role": turn["role"], "content": without_tokens(turn["content"])} for turn in history),
        {"role": "user", "content": without_tokens(tidy_question(question))},
    ]


def grounded_messages(question: str, passages: Sequence[str] = ()) -> list[dict[str, str]]:
    """The turns before an answer that leans on ``passages``: numbered, before the question, in the user's turn.

    Without passages the turns are those of ``prompt_messages``.
    """
    system, user = prompt_messages(question)
    if not passages:
        return [system, user]
    numbered = "\n".join(
        f"[{number}] {without_tokens(' '.join(text.split()))}"
        for number, text in enumerate(passages, start=1)
    )
    return [system, {"role": "user", "content": f"Passages:\n{numbered}\n\n{user['content']}"}]


def to_example(row: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """One row as TRL's conversational prompt/completion pair; only the completion enters the loss."""
    return {
        "prompt": prompt_messages(row["question"]),
        "completion": [{"role": "assistant", "content": without_tokens(row["answer"])}],
    }


def to_dataset(rows: Iterable[Mapping[str, Any]]) -> Dataset:
    """Rows as a ``datasets.Dataset`` with the columns ``prompt`` and ``completion``."""
    from datasets import Dataset

    return Dataset.from_list([to_example(row) for row in rows])


@dataclass(frozen=True)
class Encoded:
    """One example as the trainer sees it: ``ids`` and ``labels`` of equal length; label -100 means "not in the loss"."""

    ids: list[int]
    labels: list[int]

    @property
    def in_loss(self) -> list[bool]:
        """One flag a token."""
        return [label != IGNORED for label in self.labels]

    @property
    def share_in_loss(self) -> float:
        """Share of the tokens that are learned, 0 to 1."""
        return sum(self.in_loss) / len(self.labels)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]
) -> list[int]:
    """Token ids of ``messages`` with the header of the coming answer; exactly one BOS."""
    encoded = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=True
    )
    return list(encoded["input_ids"])


def encode(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], max_length: int | None = None
) -> Encoded:
    """Tokens and labels of one row: the prompt masked, the answer and its end-of-turn token learned."""
    example = to_example(row)
    prompt = prompt_ids(tokenizer, example["prompt"])
    full = tokenizer.apply_chat_template(
        example["prompt"] + example["completion"], return_dict=True
    )["input_ids"]
    labels = [IGNORED] * len(prompt) + list(full[len(prompt) :])
    return Encoded(list(full[:max_length]), labels[:max_length])


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that open an answer's turn (header and blank line): what a prompt holds beyond its messages."""
    messages = prompt_messages("?")
    return prompt_ids(tokenizer, messages)[
        len(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]) :
    ]


def encode_all(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], chunk: int = 1024
) -> list[Encoded]:
    """``encode`` of each row, a chunk at a time: the tokenizer works on many texts at once, outside Python.

    The answer begins after the last token that opens a turn, which no text can hold (``without_tokens``): so a row is rendered
    and tokenised once, without its offsets.
    """
    known = list(
        range(len(tokenizer))
    )  # one object for each id: half of the memory of as many as there are tokens
    opening, backend = opening_ids(tokenizer), tokenizer.backend_tokenizer
    backend.no_padding()  # whatever an earlier call has left behind
    backend.no_truncation()
    encoded: list[Encoded] = []
    for start in range(0, len(rows), chunk):
        examples = [to_example(row) for row in rows[start : start + chunk]]
        texts = tokenizer.apply_chat_template(
            [e["prompt"] + e["completion"] for e in examples], tokenize=False
        )
        for made in backend.encode_batch_fast(texts, add_special_tokens=False):
            ids = [known[i] for i in made.ids]
            head = len(ids) - 1 - ids[::-1].index(opening[0]) + len(opening)
            encoded.append(Encoded(ids, [IGNORED] * head + ids[head:]))
    return encoded


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids at which generation stops: end of text and end of turn, whichever of them the tokenizer calls its eos."""
    ids = [
        tokenizer.eos_token_id,
        *(tokenizer.convert_tokens_to_ids(token) for token in (END_OF_TEXT, END_OF_TURN)),
    ]
    return list(dict.fromkeys(i for i in ids if i is not None and i != tokenizer.unk_token_id))


def set_pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Give ``tokenizer`` a pad token that is neither end of text nor end of turn, without adding one; returns it.

    A collator that masks pads by id would mask every end-of-turn label too if they were the same token, and the tuned
    model would never stop. Llama 3.1 reserves a pad token; Llama 3.0 has unused reserved tokens.

    Raises:
        ValueError: the vocabulary holds no token that can serve.
    """
    ends = end_ids(tokenizer)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return str(tokenizer.pad_token)
    vocabulary = tokenizer.get_vocab()
    for token in (
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_0|>",
        "<|endoftext|>",
        "<pad>",
    ):
        if token in vocabulary and vocabulary[token] not in ends:
            tokenizer.pad_token = token
            return token
    raise ValueError(
        "the tokenizer has no token that could serve as padding: its pad token is an end token, and neither "
        "<|finetune_right_pad_id|> nor <|reserved_special_token_0|> is in its vocabulary. Use a Llama-3 tokenizer."
    )
