"""Load the 4-bit model with or without its adapter, ask it one question or many, and stop where an answer ends."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch

from medquad_utils import CourseError
from medquad_utils.chat import end_ids, prompt_ids, prompt_messages, set_pad_token
from medquad_utils.machine import local_rank
from medquad_utils.profiles import Plan
from medquad_utils.quantization import nf4_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# peft 0.21 still asks transformers 5.23 for the flag by its old name; nothing that a reader could mend.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def load_tokenizer(plan: Plan) -> PreTrainedTokenizerBase:
    """The base model's tokenizer with a pad token that is no end token; pads go on the right, as training wants them.

    Raises:
        CourseError: the tokenizer is not to be had (see ``explain_load_error``).
    """
    from transformers import AutoTokenizer

    with _Explained(plan):
        tokenizer = AutoTokenizer.from_pretrained(plan.model_source, revision=plan.hub_revision)
    try:
        set_pad_token(tokenizer)
    except ValueError as error:
        raise CourseError(f"{plan.model_id}: {error}") from error
    tokenizer.padding_side = "right"
    return tokenizer


def load_base(plan: Plan, quantized: bool = True) -> PreTrainedModel:
    """The base model on the plan's device, its linear layers in NF4 (or in the compute dtype with ``quantized=False``).

    Raises:
        CourseError: the model is not to be had, or its files are damaged.
    """
    from transformers import AutoModelForCausalLM

    with _Explained(plan):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            plan.model_source,
            revision=plan.hub_revision,
            dtype=getattr(torch, plan.compute_dtype),
            quantization_config=nf4_config(plan) if quantized else None,
            attn_implementation=plan.attention,
            # Unquantised, an 8 B model is larger than a T4: what the card does not hold stays in RAM and is copied in when needed.
            device_map="auto"
            if plan.device == "cuda" and not quantized
            else {"": local_rank() if plan.device == "cuda" else "cpu"},
        )
    # On a CPU with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first forward pass in eval mode, for good, into a
    # layout whose kernel passes no gradient: training afterwards would go wrong without a word.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def load_tuned(plan: Plan, adapter: Path | None = None) -> PreTrainedModel:
    """The 4-bit base with the adapter of ``adapter`` (default: what lesson 04 saved) on top.

    Raises:
        CourseError: no adapter there, one that was trained on another base, or a damaged file.
    """
    return load_adapters(plan, {"default": adapter or plan.folder / "adapter"})


def load_adapters(
    plan: Plan, adapters: Mapping[str, Path], trainable: bool = False
) -> PreTrainedModel:
    """The 4-bit base once, with several adapters beside its weights; ``model.set_adapter(name)`` says which one answers.

    ``adapters`` maps a name of your choice to a folder; the first one is active. They are frozen unless ``trainable``.

    Raises:
        CourseError: two adapters of different bases; no adapter there, one of another base, or a damaged file.
    """
    from peft import PeftModel

    check_same_base(adapters)
    for folder in adapters.values():
        check_adapter(plan, folder)
    model: Any = load_base(plan)
    for number, (name, folder) in enumerate(adapters.items()):
        try:
            if number:
                model.load_adapter(folder, adapter_name=name, is_trainable=trainable)
            else:
                model = PeftModel.from_pretrained(
                    model, folder, adapter_name=name, is_trainable=trainable
                )
        except (
            Exception
        ) as error:  # a truncated file raises SafetensorError, a wrong shape RuntimeError
            raise CourseError(
                f"the adapter in {folder.name}/ does not load onto {plan.model_id} ({_first_line(error)}). "
                "Delete the folder and run lesson 04 again."
            ) from error
    tuned: PreTrainedModel = model.eval()
    return tuned


def check_same_base(adapters: Mapping[str, Path]) -> None:
    """Refuse adapters (name -> folder) that were trained on different bases: they cannot take turns on one.

    An adapter of another origin, without the course's ``plan.json``, is judged by the base that its config names.

    Raises:
        CourseError: names two of them and their bases.
    """
    of_base: dict[str, str] = {}
    for name, folder in adapters.items():
        of_base.setdefault(_base_of(folder), name)
    known = [(name, base) for base, name in of_base.items() if base]
    if len(known) > 1:
        (one, first), (other, second) = known[:2]
        raise CourseError(
            f"adapters of different bases cannot take turns on one: {one!r} was trained on {first}, {other!r} on {second}. "
            f"Leave one out, or train {other!r} again on {first}."
        )


def _base_of(folder: Path) -> str:
    """Which base an adapter's folder says that it was trained on; "" if nothing in it says so."""
    record, config = folder / "plan.json", folder / "adapter_config.json"
    if record.is_file():
        made = json.loads(record.read_text(encoding="utf-8"))
        base = made.get("base", "")
        return " ".join(
            filter(None, [made.get("model_id"), f"({base})" if base and "@" not in base else ""])
        )
    name = (
        json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if config.is_file()
        else None
    )
    return "" if name is None or Path(name).is_absolute() else str(name)


def check_adapter(plan: Plan, folder: Path) -> None:
    """Refuse an adapter folder that is not whole or belongs to another base model.

    Raises:
        CourseError: names what does not match and what to do.
    """
    if (
        not (folder / "adapter_config.json").is_file()
        or not (folder / "adapter_model.safetensors").is_file()
    ):
        raise CourseError(
            f"no adapter in {folder.name}/: lesson 04 trains one (medquad run --profile {plan.profile} --only 04)."
        )
    record = folder / "plan.json"
    made = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if made.get("model_id", plan.model_id) != plan.model_id:
        raise CourseError(
            f"the adapter was trained on {made['model_id']}, but the plan loads {plan.model_id}. Use the profile it was trained with."
        )
    if "base" in made and made["base"] != base_id(plan):
        raise CourseError(
            f"the adapter in {folder.name}/ was trained on other weights of {plan.model_id}: run lesson 04 again."
        )


def base_id(plan: Plan) -> str:
    """Which weights the plan's base has: the Hub id and revision, or a hash over the first MB of a local folder's files."""
    source = Path(plan.model_source)
    if not source.is_dir():
        return f"{plan.model_id}@{plan.revision or 'main'}"
    digest = hashlib.sha256()
    for file in sorted([source / "config.json", *source.glob("*.safetensors")]):
        with file.open("rb") as opened:
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + opened.read(1 << 20))
    return digest.hexdigest()[:16]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class _Explained:
    """Turn a failed download or a damaged file into one message with the next step."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: Any
    ) -> None:
        if not isinstance(error, Exception):
            return
        raise CourseError(explain_load_error(error, self.plan)) from error


def explain_load_error(error: Exception, plan: Plan) -> str:
    """What went wrong in loading the plan's model, and what to click or set."""
    model = plan.model_source if plan.model_path else plan.model_id
    local = not plan.on_hub
    cause = error.__cause__
    text = f"{type(error).__name__} {error} {type(cause).__name__} {cause or ''}"
    if not local and re.search(
        r"GatedRepo|access a gated repo|\b40[13] (Client Error|Unauthorized|Forbidden)", text
    ):
        return (
            f"{model} is gated. Open https://huggingface.co/{model}, accept its licence, make a read token under Settings > "
            "Access Tokens and set it as HF_TOKEN (on Colab: the key icon, with Notebook access). Profile 'small' needs no token."
        )
    if "safetensor" in text.lower() or "header" in text.lower():
        return f"the weights of {model} are damaged ({_first_line(error)}). Delete the folder or the cached copy and load again."
    if local:
        return f"cannot load the model in {model} ({_first_line(error)}). Expected a folder in the Hub's layout."
    return f"cannot load {model} from the Hub ({_first_line(error)}). Check the network; profile 'tiny' needs none."


@contextmanager
def unpacked(model: torch.nn.Module) -> Iterator[None]:
    """Within it a model on a CPU dequantises its 4-bit weights once, not at every token; what it computes is the same to the bit.

    On a CPU, bitsandbytes makes the whole matrix out of its 4 bits at each call of a layer, then multiplies by it
    (``backends/default/ops.py``, ``_gemm_4bit_default_impl``). Here the matrices are made at the start and dropped at the end.
    They take 2 or 4 bytes a weight: where that is more than half of the free RAM, nothing changes. Nor does it on a GPU, whose
    kernels multiply by the packed weights. The parameters stay as they are, and so do adapters, switched on or off.
    """
    import psutil
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layers = [
        layer for layer in model.modules() if isinstance(layer, Linear4bit) and _unpackable(layer)
    ]
    need = sum(
        layer.in_features * layer.out_features * layer.compute_dtype.itemsize for layer in layers
    )
    if need > psutil.virtual_memory().available / 2:
        layers = []
    try:
        for layer in layers:
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            layer.forward = partial(_linear, weight=weight, bias=layer.bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _unpackable(layer: Any) -> bool:
    """Whether a 4-bit layer is on the CPU, in plain layout, computes in the dtype of its matrix, and has not been unpacked yet."""
    state = layer.weight.quant_state
    plain = (
        layer.weight.device.type == "cpu"
        and state is not None
        and not getattr(state, "packing_format_for_cpu", False)
    )
    return plain and state.dtype == layer.compute_dtype and "forward" not in vars(layer)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


@dataclass(frozen=True)
class Answer:
    """One generated answer: its text, how many tokens it took, and whether it ended on an end token by itself."""

    text: str
    tokens: int
    stopped: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    max_new_tokens: int,
    batch_size: int = 32,
    progress: str = "",
    **sampling: Any,
) -> list[Answer]:
    """Answer ``conversations`` (lists of messages) in batches, greedily unless ``sampling`` says otherwise.

    ``progress`` names a progress bar.
    """
    batches = generate_batches(
        model, tokenizer, conversations, max_new_tokens, batch_size, progress, **sampling
    )
    answers = {number: answer for batch in batches for number, answer in batch.items()}
    return [answers[number] for number in range(len(conversations))]


def generate_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    max_new_tokens: int,
    batch_size: int = 32,
    progress: str = "",
    **sampling: Any,
) -> Iterator[dict[int, Answer]]:
    """Yield the answers batch by batch, each a dict from a conversation's number to its answer: for a caller who saves as it goes.

    Prompts are padded on the left, so that every answer begins where its prompt ends; batches hold prompts of alike
    length, the shortest first. ``sampling`` goes to ``model.generate``; its ``eos_token_id`` replaces the tokenizer's ends.

    Not transformers' continuous batching (``generate_batch``): it answers alike, but on a CPU more slowly than these batches,
    drops settings that it does not know (``min_new_tokens``, ``sequence_bias``) with a warning, and logs a failure instead of
    raising it. Figures: tests/benchmarks/README.md.
    """
    from tqdm.auto import tqdm

    prompts = [prompt_ids(tokenizer, c) for c in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    starts = range(0, len(order), batch_size)
    greedy = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings = greedy | {"eos_token_id": end_ids(tokenizer)} | sampling
    with unpacked(model):
        for start in tqdm(starts, desc=progress, disable=not progress):
            chosen = order[start : start + batch_size]
            batch = _left_padded([prompts[i] for i in chosen], tokenizer.pad_token_id, model.device)
            with torch.inference_mode():
                output = model.generate(**batch, max_new_tokens=max_new_tokens, **settings)
            rows = output[:, batch["input_ids"].shape[1] :].tolist()
            yield {
                i: _read(tokenizer, ids, settings["eos_token_id"])
                for i, ids in zip(chosen, rows, strict=True)
            }


def _left_padded(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _read(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: Sequence[int]) -> Answer:
    length = next((n for n, i in enumerate(ids) if i in ends), None)
    kept = list(ids if length is None else ids[:length])
    return Answer(
        tokenizer.decode(kept, skip_special_tokens=True).strip(), len(kept), length is not None
    )


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    max_new_tokens: int = 128,
    **settings: Any,
) -> list[Answer]:
    """Answer each question on its own, under the course's system prompt."""
    return generate(
        model, tokenizer, [prompt_messages(q) for q in questions], max_new_tokens, **settings
    )


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    max_new_tokens: int = 128,
) -> Iterator[str]:
    """Yield the greedy answer piece by piece while it is being generated; closing the iterator ends the generation at its next token."""
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    encoded = tokenizer.apply_chat_template(
        prompt_messages(question), add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    left = Event()  # nobody reads any more
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[no-untyped-call]
    settings = {
        **encoded, "streamer": streamer, "max_new_tokens": max_new_tokens, "do_sample": False,
        "eos_token_id": end_ids(tokenizer), "pad_token_id": tokenizer.pad_token_id,
        "stopping_criteria": StoppingCriteriaList([lambda ids, scores, **_: torch.full(ids.shape[:1], left.is_set(), device=ids.device)]),
    }  # fmt: skip
    failure: list[Exception] = []

    def work() -> None:
        try:
            with unpacked(model):
                model.generate(**settings)
        except (
            Exception
        ) as error:  # say so to the reader below, which would wait for the next piece for ever
            failure.append(error)
            streamer.end()

    worker = Thread(target=work, daemon=True)
    worker.start()
    try:
        yield from streamer
    finally:
        left.set()
        worker.join()
    if failure:
        raise failure[0]


def next_token_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    start: str = "",
) -> torch.Tensor:
    """Probabilities of the token after ``messages`` and the answer's first words ``start``; fp32, shape (vocabulary,)."""
    ids = prompt_ids(tokenizer, messages) + tokenizer(start, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1]
    probabilities: torch.Tensor = logits.float().softmax(-1).cpu()
    return probabilities
