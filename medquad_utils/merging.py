"""Merge base and adapter into one model by four routes, and measure how each drifts and answers.

LoRA, arXiv 2106.09685: y = W x + (alpha / r) B A x, so W + (alpha / r) B A is one matrix that needs
no adapter. QLoRA, arXiv 2305.14314, trains the adapter beside W *as 4 bits hold it*. So it matters
which W the adapter is added to.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medquad_utils import CourseError
from medquad_utils.adapters import check_adapter, save_with
from medquad_utils.chat import encode, prompt_messages
from medquad_utils.evaluation import Cell, measure, score_columns
from medquad_utils.files import Row
from medquad_utils.generation import ask, load_base, load_tokenizer, load_tuned
from medquad_utils.memory import BLOCK
from medquad_utils.profiles import Plan
from medquad_utils.quantization import measured_memory, unpacked
from medquad_utils.report import cell
from medquad_utils.scores import answer_loss

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


def merge(plan: Plan, route: str, adapter: Path | None = None) -> PreTrainedModel:
    """Load base and adapter (default: the adapter of lesson 04) as one model, by one of ``ROUTES``.

    "dequantised" and "16-bit" add in fp32 and round once, to the plan's compute dtype. They need
    one copy of the base in that dtype (16.1 GB at 8 B). What the card cannot hold stays in RAM.
    """
    if route not in ROUTES:
        raise CourseError(f"unknown route {route!r}: expected one of {', '.join(ROUTES)}.")
    folder = adapter or plan.folder / "adapter"
    if route in ("dequantised", "16-bit"):
        return _merge_unquantised(plan, folder, route == "dequantised")
    tuned: Any = load_tuned(plan, folder)
    if route == "4-bit":  # peft dequantises each layer, adds, and rounds to NF4 once more
        with warnings.catch_warnings():  # peft warns about the drift that we measure
            warnings.filterwarnings("ignore", message="Merge lora module to 4-bit")
            tuned = tuned.merge_and_unload().eval()
    return tuned  # type: ignore[no-any-return]


def _merge_unquantised(plan: Plan, folder: Path, dequantised: bool) -> PreTrainedModel:
    check_adapter(plan, folder)
    # `load_base(plan).dequantize()` and peft's merge drift as little, but transformers cannot split
    # a 4-bit model between card and RAM, and 8 B in 16 bits fit neither into a T4 nor its host.
    model = load_base(plan, quantized=False)
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise CourseError(
            "card and RAM cannot hold the unquantised base: keep the adapter or use more RAM."
        )
    layers = block_linears(model)
    factors, scale = _lora_factors(plan, folder, layers)
    for name, layer in layers.items():
        # accelerate keeps the weight of a layer that the card has no room for in a map in RAM
        hook: Any = getattr(layer, "_hf_hook", None)
        stored = hook.weights_map["weight"] if getattr(hook, "offload", False) else layer.weight
        weight = stored.data.to(plan.device)
        merged = (through_nf4(weight) if dequantised else weight).float()
        if name in factors:
            a, b = (factor.to(merged) for factor in factors[name])
            merged += scale * b @ a
        if not stored.data.copy_(merged).isfinite().all():
            raise CourseError(
                f"the merged {name} is not finite in {plan.compute_dtype}: "
                "train again at half the learning rate."
            )
    return model


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


def _lora_factors(
    plan: Plan, folder: Path, layers: Mapping[str, torch.nn.Linear]
) -> tuple[dict[str, list[torch.Tensor]], float]:
    """Read layer -> A (r, inputs) and B (outputs, r), and the scale alpha / r."""
    from peft import LoraConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = LoraConfig.from_pretrained(str(folder))
        weights = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CourseError(
            f"the adapter in {folder.name}/ is damaged ({error}): run lesson 04 again."
        ) from error
    keys = {n: [f"base_model.model.{n}.lora_{side}.weight" for side in "AB"] for n in layers}
    whole = {n: pair for n, pair in keys.items() if weights.keys() >= set(pair)}
    factors = {n: [weights.pop(key) for key in pair] for n, pair in whole.items()}
    fits = all(
        (*b.shape, *a.shape) == (layers[n].out_features, config.r, config.r, layers[n].in_features)
        for n, (a, b) in factors.items()
    )
    special = config.use_dora or config.use_rslora or config.rank_pattern or config.alpha_pattern
    # What is left in the file belongs to no linear layer of a block, or is half of a pair.
    if weights or special or not fits:
        raise CourseError(
            f"the adapter in {folder.name}/ is not a plain LoRA of {plan.model_id}: "
            "keep it beside its base (route 'adapter')."
        )
    return factors, config.lora_alpha / config.r


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Write ``model`` to a new ``folder`` in the Hub's layout, and what belongs beside it.

    The weights keep their dtype, in files of at most 2 GB.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded")
        model.save_pretrained(folder, max_shard_size="2GB")
    save_with(tokenizer, folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    return folder


@dataclass(frozen=True)
class Drift:
    """How far a route's model is from the model as trained, on held-out rows.

    A cell holds mean, low, high, n and diseases (``evaluation.measure``). A change is paired: this
    route minus the model as trained.
    """

    kl: Cell  # KL(trained || route) of the next token, in nats: mean over the tokens of an answer
    top1: Cell  # share of an answer's tokens with the same most probable token
    same_answers: Cell  # share of questions with equal greedy answers
    bits_per_byte: Cell  # of the reference answers
    bits_change: Cell
    rouge_l: Cell  # of the greedy answers
    rouge_l_change: Cell
    megabytes: float  # of the weights that `save` writes, in 1e6 bytes
    tokens_per_second: float


def drift(
    plan: Plan, rows: Sequence[Row], adapter: Path | None = None, routes: Sequence[str] = MERGED,
    most: int = 64,
) -> dict[str, Drift]:  # fmt: skip
    """Measure ``routes`` against the model as trained, and how well each does its task.

    KL is over the first ``most`` tokens of each answer. One model at a time is in memory. The
    trained model's logits wait in RAM in its own dtype: 0.26 GB for 16 rows and a vocabulary of
    128,256 in 16 bits.
    """
    tokenizer, results = load_tokenizer(plan), {}
    trained: tuple[list[torch.Tensor], list[str], dict[str, Any]] | None = None
    for route in ("adapter", *routes):
        model = merge(plan, route, adapter)
        logits = [_answer_logits(model, tokenizer, row, most) for row in rows]
        columns, texts, speed = _task(model, tokenizer, rows, plan.max_new_tokens)
        trained = trained or (logits, texts, columns)
        gaps = [distance(*pair) for pair in zip(trained[0], logits, strict=True)]
        columns |= {key: [gap[key] for gap in gaps] for key in ("kl", "top1")}
        columns["same"] = [float(a == b) for a, b in zip(trained[1], texts, strict=True)]
        # Compared with itself: no other sample could differ.
        point = {"low": None, "high": None} if columns is trained[2] else {}
        kl, top1, same = (_cell(key, columns) | point for key in ("kl", "top1", "same"))
        bits, rouge = (
            (_cell(score, columns), _cell(score, columns, trained[2]))
            for score in ("bits_per_byte", "rougeL")
        )
        results[route] = Drift(kl, top1, same, *bits, *rouge, saved_bytes(model) / 1e6, speed)
        del model, logits  # before the next one is loaded
    return results


def _cell(score: str, columns: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> Cell:
    return measure(score, columns, before) or {"mean": None, "low": None, "high": None}


def _task(
    model: PreTrainedModel, tokenizer: Any, rows: Sequence[Row], most: int
) -> tuple[dict[str, Any], list[str], float]:
    """Answer and score ``rows``: columns for ``measure``, the answers, tokens a second."""
    questions, references = ([row[key] for row in rows] for key in ("question", "answer"))
    with unpacked(model):  # a 4-bit base answers faster on a CPU; the weights are the same
        ask(model, tokenizer, questions, min(most, 2))  # warm up: the first call prepares kernels
        started = time.perf_counter()
        answers = ask(model, tokenizer, questions, most)
        seconds = time.perf_counter() - started
        losses = answer_loss(model, tokenizer, [*map(prompt_messages, questions)], references)
    columns, texts = losses._asdict() | score_columns(answers, rows), [a.text for a in answers]
    return columns, texts, sum(a.tokens + a.stopped for a in answers) / seconds


def _answer_logits(model: PreTrainedModel, tokenizer: Any, row: Row, most: int) -> torch.Tensor:
    """Return the logits of a row's answer: (tokens, vocabulary), in the model's dtype, in RAM."""
    # One row at a time: with padding, other rows would change the logits.
    encoded = encode(tokenizer, row)
    count, start = min(most, sum(encoded.in_loss)), encoded.in_loss.index(True)
    ids = torch.tensor([encoded.ids[: start + count - 1]], device=model.device)
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, logits_to_keep=count).logits[0].cpu()
    return logits


def distance(expected: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Compare the logits of one answer, (tokens, vocabulary): ``kl`` and ``top1`` of ``Drift``.

    KL(expected || other) of a token is the sum of p log(p / q), in nats.
    """
    # The smallest divergences vanish in fp32.
    p, q = (logits.double().log_softmax(-1) for logits in (expected, other))
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    same = (p.argmax(-1) == q.argmax(-1)).double()
    return {"kl": float(kl.mean()), "top1": float(same.mean())}


def saved_bytes(model: torch.nn.Module) -> int:
    """Count the bytes of a published model's weights; of an adapter, which is kept in 32 bits."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return sum(measured_memory(model).values())
    return sum(4 * p.numel() for name, p in model.named_parameters() if ".lora_" in name)


TABLE = {  # field of a ``Drift`` -> column
    "kl": "KL, nats", "same_answers": "same answers", "bits_change": "bits per byte, change",
    "rouge_l_change": "ROUGE-L, change", "megabytes": "MB", "tokens_per_second": "tokens per s",
}  # fmt: skip


def table(runs: Mapping[str, Mapping[str, Any]]) -> tuple[list[list[Any]], list[str]]:
    """Return rows and header of a table: run -> route -> the fields of a ``Drift``."""
    rows = [
        [run, route, *(cell(v) if isinstance(v := fields[key], dict) else v for key in TABLE)]
        for run, routes in runs.items() for route, fields in routes.items()
    ]  # fmt: skip
    return rows, ["run", "route", *TABLE.values()]


def changes(report: Mapping[str, Drift]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Return score -> route -> change at the task with its ends, of those that have an interval."""
    spans: dict[str, dict[str, tuple[float, float, float]]] = {}
    for route, drift in report.items():
        cells = {"bits per byte (lower is better)": drift.bits_change}
        cells |= {"ROUGE-L (higher is better)": drift.rouge_l_change}
        for score, values in cells.items():
            if values["low"] is not None:
                ends = values["mean"], values["low"], values["high"]
                spans.setdefault(score, {})[route] = ends
    return spans


def worse(route: Drift) -> bool:
    """Return whether a route's model is measurably worse at its task than the model as trained."""
    low, high = route.bits_change["low"], route.rouge_l_change["high"]
    return (low is not None and low > 0) or (high is not None and high < 0)
