"""Load the 4-bit model with or without adapters, ask it questions, and stop at the answer's end."""

from __future__ import annotations

import re
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch

from medquad_utils import CourseError, attention, lora
from medquad_utils.adapters import check_adapter, check_tensors
from medquad_utils.chat import SYSTEM_PROMPT, end_ids, prompt_ids, prompt_messages, set_pad_token
from medquad_utils.machine import free_memory, local_rank
from medquad_utils.profiles import Plan
from medquad_utils.quantization import nf4_config, unpacked

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

Messages = Sequence[Mapping[str, str]]

# peft 0.21 asks transformers 5.23 for a flag by its old name. A reader can do nothing about it.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def load_tokenizer(plan: Plan) -> Tokenizer:
    """Load the tokenizer: a pad token that differs from the end tokens, padding on the right.

    A CourseError says why it cannot be loaded, or why the base does not suit the course.
    """
    from transformers import AutoConfig, AutoTokenizer

    with _explained(plan):
        config = AutoConfig.from_pretrained(plan.model_source, revision=plan.hub_revision)
        tokenizer = AutoTokenizer.from_pretrained(plan.model_source, revision=plan.hub_revision)
    try:
        _look(config, tokenizer)
    except ValueError as error:
        raise CourseError(f"{plan.model_id}: {error}") from error
    # The template of Llama 3.2 writes today's date into the prompt: training must not see another
    # prompt than next week's questions. This date is the template's own default.
    template = tokenizer.chat_template
    if isinstance(template, str):
        tokenizer.chat_template = re.sub(r"strftime_now\([^)]*\)", '"26 Jul 2024"', template)
    tokenizer.padding_side = "right"  # for training; generation pads its batches itself
    return tokenizer


def _look(config: Any, tokenizer: Tokenizer) -> None:
    """Check what the files of a base say, before its weights are read; sets the pad token.

    Raises ``ValueError``: quantised weights, a token without an embedding, no pad token, or a chat
    template that is missing or drops the system turn.
    """
    if quantized := getattr(config, "quantization_config", None):
        method = dict(quantized).get("quant_method", "some method")
        raise ValueError(
            f"its weights are quantised already ({method}): expected 16 or 32 bits a weight, which "
            "the course quantises itself. Name the model that these weights were made from."
        )
    rows, largest = config.get_text_config().vocab_size, max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(
            f"its tokenizer has a token {largest}, but its embedding has {rows} rows: expected a "
            "row for each token. Take tokenizer and weights from one source."
        )
    set_pad_token(tokenizer)
    question, reason = "Why?", "it leaves out the system turn or the question"
    try:
        text = tokenizer.apply_chat_template(prompt_messages(question), tokenize=False)
    except Exception as error:  # none there, or whatever a template raises
        text, reason = "", _first_line(error)
    if not (SYSTEM_PROMPT in text and question in text):
        raise ValueError(
            f"its chat template cannot be used ({reason}): expected one that writes a system and a "
            "user turn. Use the instruct version of the model, which has one."
        )


def load_base(plan: Plan, quantized: bool = True) -> PreTrainedModel:
    """Load the base model in NF4, or in the compute dtype with ``quantized=False``.

    A model that nothing refers to any more is gone from the card before this one comes. A base
    that cannot be loaded, or whose files lack tensors of its config, raises a CourseError.
    """
    from transformers import AutoModelForCausalLM

    load_tokenizer(plan)  # looks at the small files before it reads the large ones
    free_memory()
    attention.register()
    device = {"": local_rank() if plan.device == "cuda" else "cpu"}
    with _explained(plan):
        model, report = AutoModelForCausalLM.from_pretrained(
            plan.model_source,
            revision=plan.hub_revision,
            dtype=getattr(torch, plan.compute_dtype),
            quantization_config=nf4_config(plan) if quantized else None,
            attn_implementation=plan.attention,
            # Unquantised, an 8 B model is larger than a T4: "auto" keeps the rest in RAM.
            device_map="auto" if plan.device == "cuda" and not quantized else device,
            output_loading_info=True,
        )
    if problems := [f"{k.removesuffix('_keys')} {sorted(v)[0]}" for k, v in report.items() if v]:
        raise CourseError(
            f"the weights of {plan.model_id} do not fit its config.json ({', '.join(problems)}): "
            "expected every tensor of the model, and no other. Get the model's folder again."
        )
    # With AVX512-BF16, bitsandbytes repacks 4-bit weights at the first forward pass in eval mode,
    # for good. The kernel of that layout passes no gradient, so later training would be wrong.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    base: PreTrainedModel = model.eval()
    return base


def load_tuned(plan: Plan, adapter: Path | None = None) -> PreTrainedModel:
    """Load the 4-bit base with the adapter in a folder (default: that of lesson 04)."""
    return load_adapters(plan, {"default": adapter or plan.folder / "adapter"})


def load_adapters(
    plan: Plan, adapters: Mapping[str, Path], trainable: bool = False,
    base: PreTrainedModel | None = None,
) -> PreTrainedModel:  # fmt: skip
    """Load the 4-bit base once, and several adapters (name -> folder) beside its weights.

    The first adapter is active; ``model.set_adapter(name)`` switches. Adapters to train further are
    in fp32, others in the compute dtype, which training multiplied in. ``base`` is a loaded base to
    put them on; ``unload`` takes them off again. An adapter that does not fit is a CourseError.
    """
    from peft import PeftModel

    for folder in adapters.values():
        check_adapter(plan, folder)
    model: Any = bare_base(plan, base)
    for name, folder in adapters.items():
        options: dict[str, Any] = {"adapter_name": name, "is_trainable": trainable}
        try:
            if isinstance(model, PeftModel):
                model.load_adapter(folder, **options)
            else:
                model = PeftModel.from_pretrained(model, folder, **options)
            check_tensors(model, name, folder)
        except Exception as error:  # of safetensors if a file is cut, of torch on a wrong shape
            raise CourseError(
                f"the adapter in {folder.name}/ does not load onto {plan.model_id} "
                f"({_first_line(error)}). See that you may read its files, or move the folder away "
                "and run lesson 04 again."
            ) from error
    if not trainable:
        lora.cast_adapters(model, getattr(torch, plan.compute_dtype))
    return model.eval()


def bare_base(plan: Plan, base: PreTrainedModel | None = None) -> PreTrainedModel:
    """Return ``base`` if it carries no adapter, else raise; without one, load the plan's."""
    if base is None:
        return load_base(plan)
    if hasattr(base, "peft_config"):
        raise CourseError(
            "this base carries adapters already: expected a bare one. Take them off with "
            "generation.unload(model), or load the base again."
        )
    free_memory()  # the optimizer of an earlier run is a part of reference cycles
    return base


def unload(model: Any) -> PreTrainedModel:
    """Take all adapters off a model and return its base, as it was loaded."""
    base: PreTrainedModel = model.unload()
    vars(base).pop("forward", None)  # TRL's, which returns no logits
    if base.is_activation_checkpointing:
        base.activation_checkpointing_disable()
        base.disable_input_require_grads()
    return base.eval()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextmanager
def _explained(plan: Plan) -> Iterator[None]:
    """Turn an error in loading the plan's model into one message with the next step."""
    try:
        yield
    except Exception as error:
        model, reason = plan.model_source if plan.model_path else plan.model_id, _first_line(error)
        text = f"{type(error).__name__} {error} {type(error.__cause__).__name__} {error.__cause__}"
        gated = r"GatedRepo|access a gated repo|\b40[13] (Client Error|Unauthorized|Forbidden)"
        if plan.on_hub and re.search(gated, text):
            raise CourseError(
                f"{model} is gated. Open https://huggingface.co/{model} and accept its licence. "
                "Make a read token under Settings > Access Tokens and set it as HF_TOKEN (on "
                "Colab: the key icon, with Notebook access). Profile 'small' needs no token."
            ) from error
        where, todo = "the model in {}", "Expected an undamaged folder in the Hub's layout."
        if plan.on_hub:
            where = "{} from the Hub"
            todo = "Check the network, or delete a damaged download; profile 'tiny' needs neither."
        raise CourseError(f"cannot load {where.format(model)} ({reason}). {todo}") from error


@dataclass(frozen=True)
class Answer:
    """A generated answer: its text, its number of tokens, and whether it ended on an end token."""

    text: str
    tokens: int
    stopped: bool


def generate(
    model: PreTrainedModel, tokenizer: Tokenizer, conversations: Sequence[Messages],
    max_new_tokens: int, batch_size: int = 32, progress: str = "", **sampling: Any,
) -> list[Answer]:  # fmt: skip
    """Answer ``conversations`` in batches, greedily unless ``sampling`` says otherwise.

    ``progress`` labels a progress bar. ``sampling`` goes to ``model.generate``.
    """
    from tqdm.auto import tqdm

    prompts = [prompt_ids(tokenizer, c) for c in conversations]
    # Prompts of similar length share a batch, so little of it is padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    settings = _greedy(tokenizer, max_new_tokens) | sampling
    answers: dict[int, Answer] = {}
    with unpacked(model), torch.inference_mode():
        for start in tqdm(range(0, len(order), batch_size), desc=progress, disable=not progress):
            numbers = order[start : start + batch_size]
            # Padding on the left: every answer begins directly behind its prompt.
            left = {"padding_side": "left", "return_tensors": "pt"}
            batch = tokenizer.pad({"input_ids": [prompts[i] for i in numbers]}, **left)
            output = model.generate(**batch.to(model.device), **settings)
            for number, ids in zip(numbers, output[:, batch["input_ids"].shape[1] :], strict=True):
                answers[number] = _read(tokenizer, ids.tolist(), settings["eos_token_id"])
    return [answers[number] for number in range(len(prompts))]


def _greedy(tokenizer: Tokenizer, max_new_tokens: int) -> dict[str, Any]:
    """Return settings for ``model.generate``: the likeliest token each time, up to an end token."""
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    ends = {"eos_token_id": end_ids(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return {"max_new_tokens": max_new_tokens} | greedy | ends


def _read(tokenizer: Tokenizer, ids: Sequence[int], ends: Sequence[int]) -> Answer:
    """Decode generated ids up to the first end token; what follows it is padding."""
    length = next((n for n, i in enumerate(ids) if i in ends), None)
    ids = list(ids[:length])
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Answer(text, len(ids), length is not None)


def ask(
    model: PreTrainedModel, tokenizer: Tokenizer, questions: Sequence[str],
    max_new_tokens: int = 128, **settings: Any,
) -> list[Answer]:  # fmt: skip
    """Answer each question in its own conversation, under the course's system prompt."""
    conversations = [prompt_messages(question) for question in questions]
    return generate(model, tokenizer, conversations, max_new_tokens, **settings)


def stream(
    model: PreTrainedModel, tokenizer: Tokenizer, question: str, max_new_tokens: int = 128,
    history: Messages = (),
) -> Generator[str, None, Answer]:  # fmt: skip
    """Yield the greedy answer after the turns ``history`` in pieces, and return it whole.

    Closing the generator ends the generation.
    """
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    prompt = prompt_ids(tokenizer, prompt_messages(question, history))
    ids = torch.tensor([prompt], device=model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    closed = Event()
    stop = StoppingCriteriaList([lambda *_, **__: closed.is_set()])  # asked after each token
    settings = _greedy(tokenizer, max_new_tokens) | {"attention_mask": torch.ones_like(ids)}

    def work() -> Answer:
        try:
            with unpacked(model):
                output: Any = model.generate(
                    input_ids=ids, streamer=streamer, stopping_criteria=stop, **settings
                )
            return _read(tokenizer, output[0, ids.shape[1] :].tolist(), settings["eos_token_id"])
        finally:
            streamer.end()  # after an error the reader would wait for ever

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        try:
            yield from streamer
        finally:
            closed.set()
    return done.result()  # raises what went wrong in the thread
