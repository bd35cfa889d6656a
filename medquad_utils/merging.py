"""One model out of base and adapter: four routes, how far each drifts from the model that was trained, and a folder to serve.

LoRA, arXiv 2106.09685: y = W x + (alpha / r) B A x, so that W + (alpha / r) B A is one matrix which needs no adapter. QLoRA,
arXiv 2305.14314, trains the adapter beside W *as 4 bits hold it*: which W it is added to decides how much the model changes.
"""

from __future__ import annotations

import gc
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medquad_utils import CourseError
from medquad_utils.chat import encode, end_ids
from medquad_utils.files import Row, whole_folder
from medquad_utils.generation import ask, check_adapter, load_base, load_tokenizer, load_tuned
from medquad_utils.memory import BLOCK
from medquad_utils.profiles import Plan
from medquad_utils.quantization import measured_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Route -> what it does. The first is the model as it was trained, against which the others are measured.
ROUTES = {
    "adapter": "keep the adapter beside the 4-bit base",
    "dequantised": "dequantise the base, then merge",
    "16-bit": "merge into the 16-bit base",
    "4-bit": "merge into the 4-bit base",
}
MERGED = tuple(ROUTES)[1:]


def merge(plan: Plan, route: str, adapter: Path | None = None) -> PreTrainedModel:
    """The base and the adapter of ``adapter`` (default: what lesson 04 saved) as one model, made by one of ``ROUTES``.

    "dequantised" and "16-bit" add in fp32 and round once, to the plan's compute dtype: 16 bits on a GPU, fp32 on a CPU without
    bf16 units. So a merged model computes in the dtype that it is stored in. Both walk through the base layer by layer, in
    place, and "dequantised" sends each layer there and back through NF4. The peak is one copy of the base in the compute
    dtype, 16.1 GB at 8 B, and three fp32 copies of its largest matrix, 0.7 GB; what the card does not hold stays in RAM.
    The other two routes hold the 4-bit base, 5.7 GB, and the adapter.

    Raises:
        CourseError: an unknown route; no adapter, or one of another base, or one that is damaged or no plain LoRA; too little
            memory; a merged weight that is not finite.
    """
    if route not in ROUTES:
        raise CourseError(f"unknown route {route!r}: expected one of {', '.join(ROUTES)}.")
    folder = adapter or plan.folder / "adapter"
    if route == "adapter":
        return load_tuned(plan, folder)
    if route == "4-bit":
        return _into_four_bits(load_tuned(plan, folder))
    check_adapter(plan, folder)
    updates = _updates(folder)
    model = load_base(plan, quantized=False)
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise CourseError(
            "card and RAM together do not hold the base unquantised: keep the adapter, or merge on a larger machine."
        )
    with torch.no_grad():
        for name, layer in block_linears(model).items():
            stored = _stored(layer)
            weight = stored.to(plan.device)
            exact = (through_nf4(weight) if route == "dequantised" else weight).float()
            if update := updates.pop(name, None):
                exact += _fitting(update(exact.device), exact, name)
            if not exact.isfinite().all() or not stored.copy_(exact).isfinite().all():
                raise CourseError(
                    f"the merged {name} is not finite in {plan.compute_dtype}: train again at half the learning rate."
                )
    if updates:
        raise CourseError(
            f"the adapter has {len(updates)} layers that {plan.model_id} lacks, the first is {next(iter(updates))}."
        )
    return model


def _fitting(update: torch.Tensor, weight: torch.Tensor, name: str) -> torch.Tensor:
    if update.shape != weight.shape:
        raise CourseError(
            f"the adapter's {name} is {tuple(update.shape)}, the base's {tuple(weight.shape)}: it belongs to another base."
        )
    return update


def block_linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Name -> linear layer of every block of an unquantised Llama: those that 4-bit loading quantises; the head is none of them."""
    return {
        n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n
    }


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` as the 4-bit base holds it: to NF4 with double quantisation and back, same shape, dtype and device."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    dequantised: torch.Tensor = dequantize_4bit(packed, state)
    return dequantised


def _stored(layer: torch.nn.Module) -> torch.Tensor:
    """The tensor that holds a layer's weight; of a layer that the card has no room for, accelerate keeps it in RAM."""
    hook: Any = getattr(layer, "_hf_hook", None)
    weight: Any = hook.weights_map["weight"] if getattr(hook, "offload", False) else layer.weight
    stored: torch.Tensor = weight.data
    return stored


def _updates(folder: Path) -> dict[str, Callable[[str | torch.device], torch.Tensor]]:
    """Layer -> a function that gives its (alpha / r) B A on a device, fp32, shape (outputs, inputs)."""
    from peft import LoraConfig, PeftConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = PeftConfig.from_pretrained(str(folder))
        weights = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CourseError(
            f"the adapter in {folder.name}/ is damaged ({error}). Delete the folder and run lesson 04 again."
        ) from error
    shapes = {re.sub(r"\.lora_[AB]\.weight$", "", key) for key in weights}
    plain = isinstance(config, LoraConfig) and not (
        config.use_dora or config.rank_pattern or config.alpha_pattern
    )
    if not plain or any(
        f"{name}.lora_{side}.weight" not in weights for name in shapes for side in "AB"
    ):
        raise CourseError(
            f"the adapter in {folder.name}/ is no plain LoRA: keep it beside its base (route 'adapter')."
        )
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)

    def update(name: str) -> Callable[[str | torch.device], torch.Tensor]:
        a, b = (weights[f"{name}.lora_{side}.weight"].float() for side in "AB")
        return lambda device: scale * (b.to(device) @ a.to(device))

    return {name.removeprefix("base_model.model."): update(name) for name in shapes}


def _into_four_bits(tuned: Any) -> PreTrainedModel:
    """peft's own way: each layer is dequantised, merged and rounded to NF4 once more."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Merge lora module to 4-bit"
        )  # this is the drift that we measure
        merged: PreTrainedModel = tuned.merge_and_unload()
    return merged.eval()


# What ``save`` writes, of either kind; a folder that holds anything else is somebody's.
_OURS = re.compile(
    r"(adapter_|generation_)?config\.json|(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|"
    r"(tokenizer|tokenizer_config|special_tokens_map)\.json|chat_template\.jinja"
)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Write ``model`` as a folder in the Hub's layout, whole or not at all, in place of an older one; returns ``folder``.

    It holds safetensors of at most 2 GB a file in the dtype that the model computes in, the config (with a
    ``quantization_config`` only after the route "4-bit"), a generation config that stops on every end token, and the tokenizer
    with its chat template and pads on the left, as generation wants them. Of route "adapter" it holds adapter and tokenizer alone.
    ``model`` stops on every end token from now on, too.

    Raises:
        CourseError: ``folder`` exists and holds something that this function did not write; the disk is full.
    """
    from safetensors import SafetensorError

    if folder.exists():
        strange = (
            [p.name for p in folder.iterdir() if not _OURS.fullmatch(p.name)]
            if folder.is_dir()
            else [folder.name]
        )
        if strange:
            raise CourseError(
                f"{folder.name}/ is in use: it holds {min(strange)}. Choose another folder, or empty this one."
            )
    config, side = model.generation_config, tokenizer.padding_side
    config.eos_token_id, config.pad_token_id = end_ids(tokenizer), tokenizer.pad_token_id  # type: ignore[union-attr]
    try:
        tokenizer.padding_side = "left"
        with whole_folder(folder) as fresh:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message="Attempting to save a model with offloaded modules"
                )  # a file at a time
                model.save_pretrained(fresh, max_shard_size="2GB")
            tokenizer.save_pretrained(fresh)
            (fresh / "README.md").unlink(missing_ok=True)  # peft's empty model card
    except (
        OSError,
        SafetensorError,
    ) as error:  # a full disk is an OSError to Python, a SafetensorError to the weights' writer
        reason = getattr(error, "strerror", None) or error
        raise CourseError(
            f"cannot save {folder.name}/: {reason}. Nothing was changed; free some space or choose another disk."
        ) from error
    finally:
        tokenizer.padding_side = side
    return folder


@dataclass(frozen=True)
class Drift:
    """How far a route's model is from the model as it was trained, on held-out rows.

    Attributes:
        logit_mean: mean absolute difference of the logits over their mean magnitude.
        logit_max: largest absolute difference of a logit over the largest magnitude.
        kl: KL(as trained || route) of the next token, mean over the tokens of the answers, in nats.
        top1: share of those tokens at which both hold the same token for the most probable one.
        same_answers: share of the questions whose greedy answers are equal to the letter.
        megabytes: size of the weights that ``save`` writes, in 1e6 bytes; an adapter needs its base besides.
        tokens_per_second: of greedy generation, all questions in one batch.
    """

    logit_mean: float
    logit_max: float
    kl: float
    top1: float
    same_answers: float
    megabytes: float
    tokens_per_second: float


def drift(
    plan: Plan,
    rows: Sequence[Row],
    adapter: Path | None = None,
    routes: Sequence[str] = MERGED,
    most: int = 64,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Drift]:
    """Measure ``routes`` against the model as it was trained; route "adapter" stands first in what is returned.

    One model at a time is in memory. Of each row's answer the first ``most`` tokens count. The logits of the model as trained
    wait in RAM in its own dtype: 0.26 GB for 16 rows and a vocabulary of 128,256 in 16 bits. The comparison runs in fp64,
    since the smallest divergences are below what fp32 can subtract.

    Raises:
        CourseError: no rows, or what ``merge`` raises.
    """
    if not rows:
        raise CourseError(
            "no rows to measure the drift on: expected at least one held-out question with its answer."
        )
    tokenizer = load_tokenizer(plan)
    expected: _Measured | None = None
    found = {}
    for route in ("adapter", *(r for r in routes if r != "adapter")):
        report(f"{route}: {ROUTES.get(route, 'unknown')}")
        model = merge(plan, route, adapter)
        measured = _measure(plan, model, tokenizer, rows, most)
        expected = expected or measured
        found[route] = _compare(expected, measured)
        del model, measured
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without a GPU
    return found


@dataclass(frozen=True)
class _Measured:
    logits: list[
        torch.Tensor
    ]  # one a row, (tokens of the answer, vocabulary), in the model's dtype, in RAM
    answers: list[str]
    megabytes: float
    tokens_per_second: float


def _measure(
    plan: Plan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    most: int,
) -> _Measured:
    logits = list(_answer_logits(model, tokenizer, rows, most))
    started = time.perf_counter()
    answers = ask(model, tokenizer, [row["question"] for row in rows], plan.max_new_tokens)
    seconds = time.perf_counter() - started
    written = sum(a.tokens + a.stopped for a in answers)
    return _Measured(logits, [a.text for a in answers], saved_bytes(model) / 1e6, written / seconds)


def _answer_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], most: int
) -> Iterator[torch.Tensor]:
    """The logits from which each row's answer is predicted, row by row: no pads, so that no other row changes them."""
    for row in rows:
        encoded = encode(tokenizer, row)
        count = min(most, sum(encoded.in_loss))
        start = encoded.in_loss.index(True)
        ids = torch.tensor([encoded.ids[: start + count - 1]], device=model.device)
        with torch.inference_mode():
            yield model(input_ids=ids, logits_to_keep=count).logits[0].cpu()


def saved_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights that ``save`` writes: of a peft model the adapter alone, else every parameter, tied ones once."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        return sum(
            p.numel() * p.element_size() for name, p in model.named_parameters() if ".lora_" in name
        )
    return sum(measured_memory(model).values())


def _compare(expected: _Measured, found: _Measured) -> Drift:
    apart = size = kl = 0.0
    largest = top = 0.0
    same = tokens = values = 0
    for one, other in zip(expected.logits, found.logits, strict=True):
        a, b = one.double(), other.double()
        gap = (a - b).abs()
        apart, size = apart + float(gap.sum()), size + float(a.abs().sum())
        largest, top = max(largest, float(gap.max())), max(top, float(a.abs().max()))
        kl += float(divergence(a, b).sum())
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        tokens, values = tokens + len(a), values + a.numel()
    agree = sum(a == b for a, b in zip(expected.answers, found.answers, strict=True)) / len(
        found.answers
    )
    return Drift(
        apart / size,
        largest / top,
        kl / tokens,
        same / tokens,
        agree,
        found.megabytes,
        found.tokens_per_second,
    )


def divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(expected || found) in nats of two sets of logits, (tokens, vocabulary) -> (tokens,); never below zero.

    Kullback and Leibler, On Information and Sufficiency, 1951: the sum of p log(p / q).
    """
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


def best(report: Mapping[str, Drift]) -> str:
    """The merged route with the smallest divergence; the one that stands first in ``ROUTES`` where two are equal.

    Raises:
        CourseError: the report holds no merged route.
    """
    if not (merged := [route for route in MERGED if route in report]):
        raise CourseError(f"the report holds no merged route: expected one of {', '.join(MERGED)}.")
    return min(merged, key=lambda route: report[route].kl)


def recommendation(report: Mapping[str, Drift]) -> str:
    """What to do, in one sentence made from the numbers: for exactness, for size, and for a server that wants one plain folder."""
    exact, small = (
        min(report, key=lambda r: report[r].kl),
        min(report, key=lambda r: report[r].megabytes),
    )
    single = best(report)
    wants = [("exactness", exact), ("size", small)]
    first = (
        f"where exactness or size matters, {ROUTES[exact]} ({report[exact].megabytes:,.1f} MB)"
        if exact == small
        else "; ".join(
            f"where {want} matters, {ROUTES[route]} ({report[route].megabytes:,.1f} MB)"
            for want, route in wants
        )
    )
    others = ", ".join(
        f"{report[r].kl:.2g} for '{r}'" for r in MERGED if r in report and r != single
    )
    return (
        f"{first[0].upper()}{first[1:]}; where a server wants one plain folder, {ROUTES[single]} ({report[single].megabytes:,.1f} MB, "
        f"{report[single].kl:.2g} nats per token{f'; {others}' if others else ''})."
    )
