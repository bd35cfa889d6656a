"""What training will cost: memory, time and money for a Llama of any shape on any card, by arithmetic alone (no torch).

``python -m medquad_utils.estimate`` writes README's cost table anew, from the runs that were measured and from estimates.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medquad_utils import CourseError
from medquad_utils.files import write_between
from medquad_utils.machine import Hardware
from medquad_utils.memory import (
    BASE_GB,
    Micro,
    Shape,
    adapter_parameters,
    bits_per_parameter,
    grouped,
    training_memory,
    weights_gb,
)
from medquad_utils.profiles import PROFILES, Fit, fit_step, micro_batch

HOME = Path(__file__).parent.parent
RESULTS = HOME / "tests" / "benchmarks" / "results"
MARKS = "<!-- costs -->", "<!-- /costs -->"

# The training part of MedQuAD (13,335 rows kept of 16,407, split by disease group): rows that fit into so many tokens, and
# their tokens. Measured on the XML with the tiny model's tokenizer, whose vocabulary is 3,072; Llama-3's is 128,256 and gives
# fewer tokens for the same text, so times in minutes err on the high side.
TRAINING_PART = {
    128: (1662, 164_279), 256: (4657, 749_335), 512: (8636, 2_160_526), 1024: (10_098, 3_162_374),
    2048: (10_497, 3_718_894), 4096: (10_618, 4_063_026), 1 << 62: (10_655, 4_250_819),
}  # fmt: skip
LAUNCH_SECONDS = 0.003  # of one block's forward and backward pass in Python and kernel launches, at least; an assumption
LIBRARIES_GB = 3.0  # of RAM that Python, torch and the CUDA libraries take; an assumption
SHARD_GB = 5.0  # the files that the Hub's repository of Llama-3-8B is cut into


@dataclass(frozen=True)
class Card:
    """A GPU (or a CPU), from its data sheet; ``efficiency`` is the share of the peak that matrix products are taken to reach."""

    name: str
    marks: tuple[str, ...]  # what its name holds where torch tells it
    memory_gb: float  # GB of 1e9 bytes that torch sees, which is less than the name promises
    capability: tuple[int, int] | None  # CUDA compute capability
    tflops: float  # dense 16-bit matrix products with 32-bit sums at the data sheet's clock; on a CPU 32-bit ones
    bandwidth: float  # GB/s
    efficiency: float
    basis: str  # where the efficiency comes from

    @property
    def hardware(self) -> Hardware:
        """The card as ``profiles.resolve`` sees it."""
        return Hardware(
            "cuda" if self.capability else "cpu",
            self.name,
            self.memory_gb,
            self.capability,
            gpus=int(bool(self.capability)),
        )


_LOW_POWER = "assumed: 70 W hold its clock far below the data sheet's"
_AMPERE = "assumed: between what is taken for an H100 and for a 4090"
_HOPPER = "assumed, from a reported 12,473 tokens/s (38 to 41 % at 4N) of 16-bit LoRA at 8 B in NeMo AutoModel"
CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card("T4", ("T4",), 15.0, (7, 5), 65, 320, 0.35, _LOW_POWER),
        Card("L4", ("L4",), 23.0, (8, 9), 121, 300, 0.40, _LOW_POWER),
        Card("A10G", ("A10G",), 23.0, (8, 6), 70, 600, 0.50, _AMPERE),
        Card("A100-40", ("A100", "40GB"), 42.0, (8, 0), 312, 1555, 0.50, _AMPERE),
        Card("A100-80", ("A100", "80GB"), 85.0, (8, 0), 312, 2039, 0.50, _AMPERE),
        Card("H100", ("H100",), 85.0, (9, 0), 989, 3350, 0.45, _HOPPER),
        Card("H200", ("H200",), 150.0, (9, 0), 989, 4800, 0.45, _HOPPER),
        Card("RTX 4090", ("RTX", "4090"), 25.0, (8, 9), 165, 1008, 0.55,
             "assumed, from a reported 2,413 tokens/s (44 % at 4N, everything included) of 8 B QLoRA in torchtune"),
        Card("CPU", ("CPU",), 16.0, None, 0.075, 20, 0.40,
             "assumed: two AVX2 cores whose products reach 75 GFLOP/s in fp32; a 20 M Llama reached about 40 % of its core's"),
    )
}  # fmt: skip


# ---- time -----------------------------------------------------------------------------------------------------------


def flops_per_token(
    shape: Shape, recomputed: float = 0.0, context: float = 0.0, rank: int = 0
) -> float:
    """FLOP of training one token with a frozen base: 4N, plus what is asked for.

    N counts the weights that multiply: all linear layers and the head, not the embedding, which is looked up. A multiply
    and an add are two FLOP, so the forward pass is 2N. The backward pass of a linear layer has two products of that size:
    the gradient of its inputs (2N), which must go on to the layers below, and the gradient of its weights (2N), which a
    frozen layer does not need and autograd does not compute. Counters that say 6N (Kaplan et al., arXiv 2001.08361, for
    training all weights) therefore overstate LoRA by half; lesson 03 counts it.

    Args:
        shape: of the model. Llama-3-8B: 30.0 GF.
        recomputed: share of the blocks whose forward pass activation checkpointing runs again: +2N of the blocks (44.0 GF
            for all of an 8 B model).
        context: keys that a query is multiplied with, on average. Attention has no frozen side: both of its products need
            both gradients, so it is 4 x width x context forward and twice that backward, in every block. A causal row has
            half its length; SDPA with a mask computes all of it.
        rank: of the adapters on all linear layers: 6 FLOP a trained number, 8 if it is computed twice.
    """
    frozen = (
        4 * (shape.block_parameters + shape.vocab * shape.hidden)
        + 2 * recomputed * shape.block_parameters
    )
    attention = shape.layers * shape.linears()["o_proj"][0] * context * (12 + 4 * recomputed)
    return frozen + attention + adapter_parameters(shape, rank) * (6 + 2 * recomputed)


def dequantisation_seconds(shape: Shape, card: Card, recomputed: float = 0.0) -> float:
    """Seconds that one micro-batch spends on unpacking 4-bit weights, however few tokens it has.

    Each pass over the blocks (forward, backward, and forward again where activations are recomputed) reads the packed weights,
    writes them unpacked and reads them again: 31.5 GB at 8 B in 16 bits. Three passes over the memory's bandwidth give the
    taxes that are reported: about 315 ms on a T4 or an L4, 61 on an A100, 28 on an H100.
    """
    unpacked = 2 if card.capability else 4
    moved = shape.block_parameters * (bits_per_parameter(double_quant=True) / 8 + 2 * unpacked)
    return (2 + recomputed) * moved / card.bandwidth / 1e9


def epoch_tokens(length: int) -> int:
    """Tokens of the training rows of MedQuAD that fit into ``length`` tokens (of the next larger size that was measured)."""
    return next(tokens for most, (_, tokens) in TRAINING_PART.items() if most >= length)


def host_ram_gb(shape: Shape, card: Card) -> dict[str, float]:
    """GB of RAM that loading takes, at most: files are mapped and quantised tensor by tensor, never held twice.

    The mapped pages of a file are a cache that the system may drop at any time; one shard of it is counted.
    """
    model = (
        0.0
        if card.capability
        else weights_gb(training_memory(shape, Micro(1, 1, 1, 4, 4, cuda=False)))
    )
    return {
        "Python and libraries": LIBRARIES_GB,
        "one shard of the files": min(SHARD_GB, 2 * shape.parameters / 1e9),
        "the largest tensor": 2 * shape.vocab * shape.hidden / 1e9,
        "the 4-bit model": model,
    }


# ---- measured runs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run of ``tests/benchmarks/train_speed.py``: what was run, and what came out."""

    profile: str
    device: str
    date: str
    shape: Shape
    micro: Micro
    longest: int  # tokens of the longest row that was trained on
    peak_gb: float  # torch.cuda.max_memory_allocated, or the resident set of a CPU run
    tokens_per_second: float

    @property
    def card(self) -> Card | None:
        """The card of ``CARDS`` that the device's name stands for."""
        return next(
            (
                c
                for c in CARDS.values()
                if set(c.marks) <= set(self.device.replace("-", " ").split())
            ),
            None,
        )


def read_runs(folder: Path = RESULTS) -> list[Run]:
    """Our arm of every run in ``train_speed_*.json``: {profile: {machine, date, shape, plan, arms: {"c": ...}}}."""
    found = []
    for file in sorted(folder.glob("train_speed_*.json")):
        for name, run in json.loads(file.read_text(encoding="utf-8")).items():
            ours, plan = run["arms"].get("c", {}), run["plan"]
            if not ours.get("figures"):
                continue
            packed = plan["pack_length"]
            compute, adapter = (
                4 if plan[dtype] == "float32" else 2 for dtype in ("compute_dtype", "adapter_dtype")
            )
            micro = Micro(1 if packed else plan["batch_size"], packed or plan["max_length"], plan["lora_r"], compute, adapter,
                          int(plan["checkpointing"]), plan["lora_dropout"] > 0, plan["device"] == "cuda")  # fmt: skip
            device, speed = run["machine"]["device"], ours["figures"]["tokens_per_s"]
            found.append(
                Run(
                    name,
                    device,
                    run["date"],
                    Shape(**run["shape"]),
                    micro,
                    plan["max_length"],
                    ours["peak_gb"],
                    speed,
                )
            )
    return found


def allocated_gb(parts: dict[str, float]) -> float:
    """Of the parts of a GPU run, what ``torch.cuda.max_memory_allocated`` counts: neither the context nor the paged optimizer."""
    return sum(parts.values()) - BASE_GB - parts["optimizer"]


# ---- the estimate ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What one way of training a model on one card takes."""

    name: str
    shape: Shape
    card: Card
    micro: Micro
    packed: bool
    tokens: int  # real tokens of an epoch
    row: float  # tokens of the mean micro-batch; ``micro`` is the longest, for memory
    price: float  # of an hour, in any currency; 0 = not asked for
    run: Run | None  # the same run, if it was measured

    @property
    def parts(self) -> dict[str, float]:
        """Part -> GB of the predicted peak."""
        return training_memory(self.shape, self.micro)

    @property
    def groups(self) -> dict[str, float]:
        """The parts as six, as many as a picture can tell apart."""
        return grouped(self.parts)

    @property
    def memory_gb(self) -> float:
        """Predicted peak in GB."""
        return sum(self.parts.values())

    @property
    def recomputed(self) -> float:
        """Share of the blocks that run forward twice."""
        return (
            math.ceil(self.shape.layers / self.micro.checkpoint) / self.shape.layers
            if self.micro.checkpoint
            else 0.0
        )

    @property
    def predicted_tokens_per_second(self) -> float:
        """Real tokens a second by arithmetic: products at the card's assumed efficiency, then the tax of unpacking."""
        flops = flops_per_token(self.shape, self.recomputed, self.row, self.micro.rank) * self.row
        seconds = flops / (self.card.tflops * 1e12 * self.card.efficiency) + dequantisation_seconds(
            self.shape, self.card, self.recomputed
        )
        return self.row / max(seconds, LAUNCH_SECONDS * self.shape.layers)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens a second: measured, else predicted."""
        return self.run.tokens_per_second if self.run else self.predicted_tokens_per_second

    @property
    def minutes(self) -> float:
        """Minutes of one epoch."""
        return self.tokens / self.tokens_per_second / 60

    @property
    def cost(self) -> float:
        """Price of one epoch at the rate that was given."""
        return self.minutes / 60 * self.price

    @property
    def basis(self) -> str:
        """Whether speed was measured."""
        return f"measured on {self.run.device}, {self.run.date}" if self.run else "estimate"

    @property
    def micro_words(self) -> str:
        """The micro-batch in words."""
        rows = (
            f"1 packed row of {self.micro.length:,}"
            if self.packed
            else f"{self.micro.rows} x {self.micro.length:,}, padded"
        )
        again = {0: "off", 1: "every block"}.get(
            self.micro.checkpoint, f"every {self.micro.checkpoint} blocks"
        )
        return f"{rows} tokens, activation checkpointing {again}"

    def __str__(self) -> str:
        numbers = f"{8 * self.micro.compute_bytes}-bit compute, {8 * self.micro.adapter_bytes}-bit adapters of rank {self.micro.rank}"
        title = f"{self.name}, {self.shape.parameters / 1e6:,.0f} M parameters, on {self.card.name} ({self.card.memory_gb:g} GB)"
        return "\n".join(
            [
                title,
                f"{numbers}; {self.micro_words}",
                "",
                *self._memory_lines(),
                "",
                *self._time_lines(),
            ]
        )

    def _memory_lines(self) -> list[str]:
        parts, total = self.parts, self.memory_gb
        digits = 2 if total > 5 else 3
        verdict = (
            "fits"
            if total <= self.card.memory_gb
            else "does not fit: try --length, --rank or --checkpointing full, or another card"
        )
        lines = [text_bar(parts, self.card.memory_gb)]
        lines += [
            f"  {key} {name:<24} {gb:7.{digits}f} GB"
            for key, (name, gb) in zip(KEYS, parts.items(), strict=True)
        ]
        lines += [
            f"    {'all':<24} {total:7.{digits}f} GB of {self.card.memory_gb:g}: {verdict}  [estimate]"
        ]
        return lines + (
            [f"    {'peak':<24} {self.run.peak_gb:7.{digits}f} GB  [{self.basis}]"]
            if self.run
            else []
        )

    def _time_lines(self) -> list[str]:
        plain, again = (flops_per_token(self.shape, share) / 1e9 for share in (0, self.recomputed))
        tax = 1000 * dequantisation_seconds(self.shape, self.card, self.recomputed)
        ram = host_ram_gb(self.shape, self.card)
        rows = {
            "compute": f"{plain:.3g} GF a token at 4N, {again:.3g} with what is recomputed; unpacking weights {tax:.0f} ms a micro-batch",
            "speed": f"{self.tokens_per_second:,.0f} real tokens/s  [{self.basis}]",
            "": f"taken: {self.card.efficiency:.0%} of {self.card.tflops:g} TFLOP/s; {self.card.basis}",
            "one epoch": f"{self.minutes:,.0f} min for {self.tokens:,} tokens of MedQuAD  [{self.basis}]",
            "price": f"{self.cost:,.2f} an epoch at {self.price:.2f} an hour  [{self.basis}]",
            "RAM to load": f"{sum(ram.values()):.1f} GB: "
            + " + ".join(f"{gb:.1f} {name}" for name, gb in ram.items())
            + "  [estimate]",
        }
        left_out = ("price",) * (not self.price) + ("",) * bool(self.run)
        return [f"{name:<12} {text}" for name, text in rows.items() if name not in left_out]


KEYS = "4qeagoxluc"  # a letter for each part of the bar


def text_bar(parts: dict[str, float], card_gb: float, width: int = 72) -> str:
    """The parts as a bar of letters in which ``width`` characters stand for the card; what does not fit runs past its end."""
    drawn, done = "", 0.0
    for key, gb in zip(KEYS, parts.values(), strict=True):
        done += gb
        drawn += key * (round(width * done / card_gb) - len(drawn))
    return f"  |{drawn[:width]:.<{width}}|{drawn[width : 2 * width]}"


def estimate(
    profile: str = "llama-8b",
    gpu: str = "T4",
    *,
    length: int = 0,
    rank: int = 0,
    packing: bool = True,
    checkpointing: int | None = None,
    price: float = 0.0,
    tokens: int = 0,
    config: str = "",
    runs: list[Run] | None = None,
) -> Estimate:
    """What training takes; an argument that is not given is what ``profiles.resolve`` would choose on that card.

    Args:
        profile: the recipe: lengths, rank, tokens a step.
        gpu: one of ``CARDS``, in any case.
        length: tokens of a packed row, or of the longest row without packing.
        packing: whether short rows share a row of ``length`` tokens; without it a micro-batch is one row.
        checkpointing: 0 off, 1 every block, n every n-th block.
        price: of the card for an hour, in the currency you think in.
        tokens: real tokens of an epoch (default: the training part of MedQuAD, see ``TRAINING_PART``).
        config: a ``config.json`` of another Llama, or the folder that holds it.
        runs: measured runs to compare with (default: those of this checkout).

    Raises:
        CourseError: unknown profile or card, a config of no Llama, a number that makes no sense.
    """
    if profile not in PROFILES:
        raise CourseError(f"unknown profile {profile!r}: expected {', '.join(PROFILES)}.")
    card = next((c for name, c in CARDS.items() if name.lower() == gpu.lower()), None)
    if card is None:
        raise CourseError(
            f"unknown card {gpu!r}: expected {', '.join(CARDS)}. Take the one nearest in memory and bandwidth."
        )
    _check_numbers(length, rank, checkpointing, price, tokens)
    recipe = PROFILES[profile]
    shape = read_shape(config) if config else recipe.shape
    rank = rank or recipe.lora_r
    try:
        fit = fit_step(replace(recipe, shape=shape), shape, card.hardware, rank)
    except CourseError:  # nothing fits: show by how much
        fit = Fit(1, recipe.max_length // 4, recipe.max_length // 4, True, math.inf)
    row = length or (fit.pack if packing else fit.length)
    checkpoint = int(fit.checkpointing) if checkpointing is None else checkpointing
    micro = micro_batch(profile, card.hardware, rank, 1, row, checkpoint)
    count, found = next(
        sizes for most, sizes in TRAINING_PART.items() if most >= (fit.length if packing else row)
    )
    mean = row if packing else min(row, found / count)  # of real tokens; a row alone has no pads
    known = read_runs() if runs is None else runs
    same = [
        run
        for run in known
        if (run.profile, run.card, run.shape, run.micro) == (profile, card, shape, micro)
    ]
    name = _folder_name(config) if config else profile
    return Estimate(
        name, shape, card, micro, packing, tokens or found, mean, price, same[-1] if same else None
    )


def _folder_name(config: str) -> str:
    path = Path(config)
    return (path.parent if path.suffix == ".json" else path).resolve().name


def _check_numbers(
    length: int, rank: int, checkpointing: int | None, price: float, tokens: int
) -> None:
    whole = {
        "length": (length, 1 << 20),
        "rank": (rank, 4096),
        "checkpointing": (checkpointing or 0, 1000),
        "tokens": (tokens, 10**15),
    }
    for name, (value, most) in whole.items():
        if not 0 <= value <= most:
            raise CourseError(
                f"{name} {value}: expected a whole number from 1 to {most:,} (checkpointing: 0 is off)."
            )
    if not 0 <= price < 1e6:
        raise CourseError(
            f"price {price}: expected what the card costs for an hour, for example 1.20."
        )


def read_shape(config: str) -> Shape:
    """The shape in a ``config.json`` of a Llama, given as the file or its folder; reads JSON only.

    Raises:
        CourseError: no such file, no JSON, another architecture, or sizes that are missing or make no sense.
    """
    path = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = (
            "no such file"
            if isinstance(error, FileNotFoundError)
            else "it is no JSON file that can be read"
        )
        raise CourseError(
            f"config {path.name!r}: {reason}. Give a model's config.json, or the folder that holds it."
        ) from error
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind != "llama":
        raise CourseError(
            f"config {path.name!r} is of model_type {kind!r}: expected 'llama', whose memory and FLOP are known here."
        )
    names = {"hidden": "hidden_size", "layers": "num_hidden_layers", "intermediate": "intermediate_size", "heads": "num_attention_heads",
             "vocab": "vocab_size"}  # fmt: skip
    sizes = {field: found.get(name) for field, name in names.items()}
    sizes["kv_heads"] = found.get("num_key_value_heads") or sizes["heads"]
    sizes["head_dim"] = found.get("head_dim") or 0
    wrong = [
        names.get(field, field)
        for field, size in sizes.items()
        if type(size) is not int or size < (field != "head_dim")
    ]
    if wrong:
        raise CourseError(
            f"config {path.name!r} lacks a whole number over 0 for {', '.join(wrong)}: expected the config.json of a Llama."
        )
    if not sizes["head_dim"] and sizes["hidden"] % sizes["heads"]:
        raise CourseError(
            f"config {path.name!r}: hidden_size {sizes['hidden']} is no multiple of {sizes['heads']} heads, and no head_dim."
        )
    return Shape(**sizes, tied=bool(found.get("tie_word_embeddings", False)))


# ---- README ---------------------------------------------------------------------------------------------------------


def cost_table(folder: Path = RESULTS) -> str:
    """README's table: the 8 B model on every GPU of ``CARDS``, and every run that was measured, in Markdown."""
    runs = read_runs(folder)
    lines = [
        "| model | on | one micro-batch | peak memory | tokens/s | minutes an epoch | from |",
        "|---|---|---|---|---|---|---|",
    ]
    made = [
        estimate("llama-8b", name, runs=runs) for name, card in CARDS.items() if card.capability
    ]
    lines += [
        f"| `llama-8b` | {e.card.name} | {e.micro_words} | {e.run.peak_gb if e.run else e.memory_gb:.1f} GB | {e.tokens_per_second:,.0f} | "
        f"{e.minutes:,.0f} | {e.basis} |"
        for e in made
    ]
    lines += [
        f"| `{run.profile}` | {run.device} | {run.micro.rows} x {run.micro.length:,} tokens | "
        f"{run.peak_gb:.1f} GB | {run.tokens_per_second:,.0f} | "
        f"{epoch_tokens(run.longest) / run.tokens_per_second / 60:,.0f} | measured, {run.date} |"
        for run in runs
        if not any(run is e.run for e in made)
    ]
    return "\n".join(lines)


def write_readme(readme: Path = HOME / "README.md", folder: Path = RESULTS) -> None:
    """Put ``cost_table`` between the marks of README.md.

    Raises:
        CourseError: the file has no marks.
    """
    write_between(readme, MARKS, cost_table(folder))


if __name__ == "__main__":
    write_readme()
    sys.exit(0)
