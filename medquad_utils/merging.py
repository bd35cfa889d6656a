"""Merge base and adapter into one model by four routes, and measure how far each drifts.

LoRA, arXiv 2106.09685: y = W x + (alpha / r) B A x, so W + (alpha / r) B A is one matrix that needs
no adapter. QLoRA, arXiv 2305.14314, trains the adapter beside W *as 4 bits hold it*. So it matters
which W the adapter is added to.
"""

from __future__ import annotations

import gc
import math
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
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

# Route -> what it does. The first is the model as trained, the reference for the others.
ROUTES = {
    "adapter": "keep the adapter beside the 4-bit base",
    "dequantised": "dequantise the base, then merge",
    "16-bit": "merge into the 16-bit base",
    "4-bit": "merge into the 4-bit base",
}
MERGED = tuple(ROUTES)[1:]
FILES = re.compile(  # what `save` writes
    r"(adapter_|generation_)?config\.json|(adapter_)?model(-\d+-of-\d+)?\.safetensors"
    r"(\.index\.json)?|(tokenizer|tokenizer_config|special_tokens_map)\.json|chat_template\.jinja"
)


def merge(plan: Plan, route: str, adapter: Path | None = None) -> PreTrainedModel:
    """Load base and adapter (default: the adapter of lesson 04) as one model, by one of ``ROUTES``.

    "dequantised" and "16-bit" add in fp32 and round once, to the plan's compute dtype. They need
    one copy of the base in that dtype (16.1 GB at 8 B). What the card cannot hold stays in RAM.

    Raises:
        CourseError: unknown route, unsuitable adapter, too little memory, a weight not finite.
    """
    if route not in ROUTES:
        raise CourseError(f"unknown route {route!r}: expected one of {', '.join(ROUTES)}.")
    folder = adapter or plan.folder / "adapter"
    if route == "adapter":
        return load_tuned(plan, folder)
    if route == "4-bit":  # peft dequantises each layer, adds, and rounds to NF4 once more
        tuned: Any = load_tuned(plan, folder)
        with warnings.catch_warnings():  # peft warns about the drift that we measure
            warnings.filterwarnings("ignore", message="Merge lora module to 4-bit")
            return tuned.merge_and_unload().eval()  # type: ignore[no-any-return]
    check_adapter(plan, folder)
    updates = _updates(folder)
    # Not `load_base(plan).dequantize()`: same drift, but 8 B in 16 bits must fit on the card.
    model = load_base(plan, quantized=False)
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise CourseError(
            "card and RAM cannot hold the unquantised base: keep the adapter or use more RAM."
        )
    with torch.no_grad():
        for name, layer in block_linears(model).items():
            _merge_layer(plan, name, layer, updates.pop(name, None), route == "dequantised")
    if updates:
        raise CourseError(
            f"the adapter has {len(updates)} layers that {plan.model_id} lacks, "
            f"first {next(iter(updates))}: use the base it was trained on."
        )
    return model


def _merge_layer(
    plan: Plan, name: str, layer: torch.nn.Module, update: Any, dequantised: bool
) -> None:
    # accelerate keeps the weight of a layer that the card has no room for in a map in RAM
    hook: Any = getattr(layer, "_hf_hook", None)
    weight: Any = hook.weights_map["weight"] if getattr(hook, "offload", False) else layer.weight
    stored, on_device = weight.data, weight.data.to(plan.device)
    exact = (through_nf4(on_device) if dequantised else on_device).float()
    if update:
        a, b, scale = update
        if (b.shape[0], a.shape[1]) != exact.shape:
            raise CourseError(
                f"the adapter's {name} is {(b.shape[0], a.shape[1])}, the base's "
                f"{tuple(exact.shape)}: use the base it was trained on."
            )
        exact += scale * (b.to(exact.device) @ a.to(exact.device))
    if not exact.isfinite().all() or not stored.copy_(exact).isfinite().all():
        raise CourseError(
            f"the merged {name} is not finite in {plan.compute_dtype}: "
            "train again at half the learning rate."
        )


def block_linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Return name -> linear layer of all blocks: the layers that 4-bit loading quantises."""
    modules = model.named_modules()
    return {n: m for n, m in modules if isinstance(m, torch.nn.Linear) and ".layers." in n}


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """Quantise to NF4 with double quantisation and back; same shape, dtype and device."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    settings: Any = {"blocksize": BLOCK, "compress_statistics": True, "quant_type": "nf4"}
    dequantised: torch.Tensor = dequantize_4bit(*quantize_4bit(weight.contiguous(), **settings))
    return dequantised


def _updates(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Layer -> its A (r, inputs) and B (outputs, r) in fp32, and the scale alpha / r."""
    from peft import LoraConfig, PeftConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = PeftConfig.from_pretrained(str(folder))
        weights = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CourseError(
            f"the adapter in {folder.name}/ is damaged ({error}): run lesson 04 again."
        ) from error
    names = {re.sub(r"\.lora_[AB]\.weight$", "", key) for key in weights}
    variants = ("use_dora", "rank_pattern", "alpha_pattern")
    plain = isinstance(config, LoraConfig) and not any(getattr(config, v) for v in variants)
    if not plain or {f"{n}.lora_{side}.weight" for n in names for side in "AB"} != set(weights):
        raise CourseError(
            f"the adapter in {folder.name}/ is not a plain LoRA: keep it beside its base "
            "(route 'adapter')."
        )
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    pairs = {n: [weights[f"{n}.lora_{side}.weight"].float() for side in "AB"] for n in names}
    return {n.removeprefix("base_model.model."): (a, b, scale) for n, (a, b) in pairs.items()}


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Write ``model`` in the Hub's layout, whole or not at all, replacing an older copy.

    The weights keep their dtype, in files of at most 2 GB. The generation config, also that of
    ``model`` itself, stops at every end token. The tokenizer pads on the left, for generation.
    """
    from safetensors import SafetensorError

    check_folder(folder, FILES)
    config, side = model.generation_config, tokenizer.padding_side
    config.eos_token_id = end_ids(tokenizer)  # type: ignore[union-attr]
    config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]
    try:
        tokenizer.padding_side = "left"
        with whole_folder(folder) as fresh, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded")
            model.save_pretrained(fresh, max_shard_size="2GB")
            tokenizer.save_pretrained(fresh)
            (fresh / "README.md").unlink(missing_ok=True)  # peft's empty model card
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        reason = getattr(error, "strerror", None) or error
        raise CourseError(
            f"cannot save {folder.name}/: {reason}. Nothing was changed; free some disk space."
        ) from error
    finally:
        tokenizer.padding_side = side
    return folder


def check_folder(folder: Path, allowed: re.Pattern[str]) -> None:
    """Check that ``folder`` may be replaced: absent, or only file names matching ``allowed``."""
    if not folder.exists():
        return
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else [folder.name]
    if other := [name for name in names if not folder.is_dir() or not allowed.fullmatch(name)]:
        raise CourseError(
            f"{folder.name}/ is in use: it holds {min(other)}. Choose another folder."
        )


@dataclass(frozen=True)
class Drift:
    """The distance between a route's model and the model as trained, on held-out rows.

    ``logit_mean`` and ``logit_max`` are absolute differences over the mean and the largest
    magnitude. ``kl`` is KL(trained || route) of the next token, in nats, mean over answer tokens;
    ``top1`` the share of tokens with the same most probable token; ``same_answers`` the share of
    questions with equal greedy answers; ``megabytes`` (1e6 bytes) what ``save`` writes.
    """

    logit_mean: float
    logit_max: float
    kl: float
    top1: float
    same_answers: float
    megabytes: float
    tokens_per_second: float


def drift(
    plan: Plan, rows: Sequence[Row], adapter: Path | None = None, routes: Sequence[str] = MERGED,
    most: int = 64, report: Callable[[str], None] = lambda line: None,
) -> dict[str, Drift]:  # fmt: skip
    """Measure ``routes`` against the model as trained, on the first ``most`` tokens of each answer.

    One model at a time is in memory. The trained model's logits wait in RAM in its own dtype:
    0.26 GB for 16 rows and a vocabulary of 128,256 in 16 bits.
    """
    if not rows:
        raise CourseError("no rows to measure the drift on: expected at least one held-out row.")
    tokenizer, expected, results = load_tokenizer(plan), None, {}
    for route in ("adapter", *(r for r in routes if r != "adapter")):
        report(f"{route}: {ROUTES.get(route, 'unknown')}")
        model = merge(plan, route, adapter)
        measured = _measure(plan, model, tokenizer, rows, most)
        expected = expected or measured
        results[route] = _compare(expected, measured)
        del model, measured
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without a GPU
    return results


@dataclass(frozen=True)
class _Measured:
    logits: list[torch.Tensor]  # per row: (answer tokens, vocabulary), in the model's dtype, in RAM
    answers: list[str]
    megabytes: float
    tokens_per_second: float


def _measure(
    plan: Plan, model: PreTrainedModel, tokenizer: Any, rows: Sequence[Row], most: int
) -> _Measured:
    logits = []
    for row in rows:  # one by one: with padding, other rows would change the logits
        encoded = encode(tokenizer, row)
        count, start = min(most, sum(encoded.in_loss)), encoded.in_loss.index(True)
        ids = torch.tensor([encoded.ids[: start + count - 1]], device=model.device)
        with torch.inference_mode():
            logits.append(model(input_ids=ids, logits_to_keep=count).logits[0].cpu())
    started = time.perf_counter()
    answers = ask(model, tokenizer, [row["question"] for row in rows], plan.max_new_tokens)
    speed = sum(a.tokens + a.stopped for a in answers) / (time.perf_counter() - started)
    return _Measured(logits, [a.text for a in answers], saved_bytes(model) / 1e6, speed)


def saved_bytes(model: torch.nn.Module) -> int:
    """Count the bytes of weights that ``save`` writes; for a peft model, of the adapter alone."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return sum(measured_memory(model).values())
    parameters = model.named_parameters()
    return sum(p.numel() * p.element_size() for name, p in parameters if ".lora_" in name)


def _compare(expected: _Measured, measured: _Measured) -> Drift:
    gaps = size = kl = largest = top = 0.0
    same = tokens = 0
    for one, other in zip(expected.logits, measured.logits, strict=True):
        a, b = one.double(), other.double()  # the smallest divergences vanish in fp32
        gap = (a - b).abs()
        gaps, size = gaps + float(gap.sum()), size + float(a.abs().sum())
        largest, top = max(largest, float(gap.max())), max(top, float(a.abs().max()))
        kl += float(divergence(a, b).sum())
        same, tokens = same + int((a.argmax(-1) == b.argmax(-1)).sum()), tokens + len(a)
    pairs = list(zip(expected.answers, measured.answers, strict=True))
    return Drift(
        gaps / size, largest / top, kl / tokens, same / tokens,
        sum(a == b for a, b in pairs) / len(pairs), measured.megabytes, measured.tokens_per_second,
    )  # fmt: skip


def divergence(expected: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(expected || other), sum of p log(p / q), in nats; (tokens, vocabulary) -> (tokens,)."""
    p, q = expected.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


def best(report: Mapping[str, Drift]) -> str:
    """Return the merged route with the smallest divergence, the first in ``ROUTES`` of equals."""
    if not (merged := [route for route in MERGED if route in report]):
        raise CourseError(f"the report holds no merged route: expected one of {', '.join(MERGED)}.")
    return min(merged, key=lambda route: report[route].kl)


def recommendation(report: Mapping[str, Drift]) -> str:
    """Recommend a route for exactness, for size, and for a server that needs one plain folder."""
    exact = min(report, key=lambda route: report[route].kl)
    small = min(report, key=lambda route: report[route].megabytes)
    goals = {exact: "exactness", small: "size"} if exact != small else {exact: "exactness or size"}
    lines = [
        f"For {goal}: {ROUTES[route]} ({report[route].megabytes:,.1f} MB)."
        for route, goal in goals.items()
    ]
    single = best(report)
    kls = ", ".join(f"{report[r].kl:.2g} for '{r}'" for r in MERGED if r in report)
    return " ".join(
        [
            *lines,
            f"For a server that needs one plain folder: {ROUTES[single]} (nats per token: {kls}).",
        ]
    )
