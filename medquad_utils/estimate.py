"""Cost of training a Llama on a card: memory, time and money, by arithmetic alone (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from medquad_utils import CourseError
from medquad_utils.files import MEASURED, read_json
from medquad_utils.machine import Hardware
from medquad_utils.memory import (
    Micro,
    Shape,
    adapter_parameters,
    bits_per_parameter,
    grouped,
    training_memory,
    weights_gb,
)
from medquad_utils.profiles import BYTES, PROFILES, Fit, compute_dtype, fit_step, micro_batch

# MedQuAD's training part (13,335 rows kept of 16,407, split by disease group): how many rows fit
# into so many tokens, and their tokens. Measured with the tiny model's tokenizer (vocabulary
# 3,072); Llama-3's (128,256) gives fewer tokens for the same text, so minutes err on the high side.
TRAINING_PART = {
    128: (1662, 164_279), 256: (4657, 749_335), 512: (8636, 2_160_526), 1024: (10_098, 3_162_374),
    2048: (10_497, 3_718_894), 4096: (10_618, 4_063_026), 1 << 62: (10_655, 4_250_819),
}  # fmt: skip
LAUNCH_SECONDS = 0.003  # of a block's passes in Python and kernel launches, at least; an assumption
LIBRARIES_GB = 3.0  # of RAM that Python, torch and the CUDA libraries take; an assumption
SHARD_GB = 5.0  # the files that the Hub's repository of Llama-3-8B is cut into


@dataclass(frozen=True)
class Card:
    """A GPU (or a CPU) from its data sheet."""

    name: str
    memory_gb: float  # GB of 1e9 bytes that torch sees, which is less than the name promises
    capability: tuple[int, int] | None  # CUDA compute capability
    tflops: float  # dense 16-bit products with 32-bit sums; on a CPU 32-bit ones
    bandwidth: float  # GB/s
    efficiency: float  # share of tflops that matrix products are taken to reach
    basis: str  # where the efficiency comes from
    marks: tuple[str, ...] = ()  # words of its name in torch; default: the name itself

    @property
    def hardware(self) -> Hardware:
        """The card as ``profiles.resolve`` sees it."""
        kind, gpus = ("cuda", 1) if self.capability else ("cpu", 0)
        return Hardware(kind, self.name, self.memory_gb, self.capability, gpus=gpus)


_LOW_POWER = "assumed: 70 W hold its clock far below the data sheet's"
_AMPERE = "assumed: between what is taken for an H100 and for a 4090"
_HOPPER = ("assumed, from a reported 12,473 tokens/s (38 to 41 % at 4N) of 16-bit LoRA at 8 B in "
           "NeMo AutoModel")  # fmt: skip
_ADA = ("assumed, from a reported 2,413 tokens/s (44 % at 4N, everything included) of 8 B QLoRA in "
        "torchtune")  # fmt: skip
_CPU = ("assumed: two AVX2 cores whose products reach 75 GFLOP/s in fp32; a 20 M Llama reached "
        "about 40 % of its core's")  # fmt: skip
CARDS = {card.name: card for card in (
    Card("T4", 15.0, (7, 5), 65, 320, 0.35, _LOW_POWER),
    Card("L4", 23.0, (8, 9), 121, 300, 0.40, _LOW_POWER),
    Card("A10G", 23.0, (8, 6), 70, 600, 0.50, _AMPERE),
    Card("A100-40", 42.0, (8, 0), 312, 1555, 0.50, _AMPERE, ("A100", "40GB")),
    Card("A100-80", 85.0, (8, 0), 312, 2039, 0.50, _AMPERE, ("A100", "80GB")),
    Card("H100", 85.0, (9, 0), 989, 3350, 0.45, _HOPPER),
    Card("H200", 150.0, (9, 0), 989, 4800, 0.45, _HOPPER),
    Card("RTX 4090", 25.0, (8, 9), 165, 1008, 0.55, _ADA, ("RTX", "4090")),
    Card("CPU", 16.0, None, 0.075, 20, 0.40, _CPU),
)}  # fmt: skip


def flops_per_token(
    shape: Shape, recomputed: float = 0.0, context: float = 0.0, rank: int = 0
) -> float:
    """Return the FLOP of training one token with a frozen base: 4N, plus what is asked for.

    N counts the weights that multiply: all linear layers and the head, not the embedding. The
    forward pass is 2N (a multiply and an add). The backward pass of a linear layer has two products
    of that size: the gradient of its inputs (2N), which the layers below need, and the gradient of
    its weights, which a frozen layer does not. 6N (Kaplan et al., arXiv 2001.08361) counts both.

    Args:
        shape: of the model. Llama-3-8B: 30.0 GF.
        recomputed: share of the blocks with activation checkpointing: +2N of them (44.0 GF: all).
        context: keys that a query meets, on average. Both of attention's products need both
            gradients: 4 x width x context forward, twice that backward. SDPA with a mask computes
            the whole row.
        rank: of the adapters on all linear layers: 6 FLOP a trained number, 8 if computed twice.
    """
    blocks = shape.block_parameters
    frozen = 4 * (blocks + shape.vocab * shape.hidden) + 2 * recomputed * blocks
    attention = shape.layers * shape.linears()["o_proj"][0] * context * (12 + 4 * recomputed)
    return frozen + attention + adapter_parameters(shape, rank) * (6 + 2 * recomputed)


def dequantisation_seconds(shape: Shape, card: Card, recomputed: float = 0.0) -> float:
    """Return the seconds that one micro-batch spends on unpacking 4-bit weights, at any length.

    Each pass (forward, backward, forward again where recomputed) reads the packed weights, writes
    them unpacked and reads them again: 31.5 GB at 8 B in 16 bits. Over the memory's bandwidth that
    gives the reported costs: about 315 ms on a T4 or an L4, 61 on an A100, 28 on an H100.
    """
    unpacked = 2 if card.capability else 4
    moved = shape.block_parameters * (bits_per_parameter(double_quant=True) / 8 + 2 * unpacked)
    return (2 + recomputed) * moved / card.bandwidth / 1e9


@dataclass(frozen=True)
class Run:
    """One measured run of ``tests/benchmarks/train_speed.py``."""

    profile: str
    device: str
    date: str
    shape: Shape
    micro: Micro
    longest: int  # tokens of the longest example
    peak_gb: float  # torch.cuda.max_memory_allocated, or the resident set of a CPU run
    tokens_per_second: float
    card: Card | None  # of ``CARDS``


def read_runs(folder: Path = MEASURED) -> list[Run]:
    """Read our arm of every run in ``train_speed_*.json``."""
    runs = []
    for file in sorted(folder.glob("train_speed_*.json")):
        for name, run in read_json(file).items():
            ours, plan = run["arms"].get("c", {}), run["plan"]
            if not ours.get("figures"):
                continue
            sizes = BYTES[plan["compute_dtype"]], BYTES[plan["adapter_dtype"]]
            device = run["machine"]["device"]
            words = set(device.replace("-", " ").split())
            card = next((c for c in CARDS.values() if set(c.marks or (c.name,)) <= words), None)
            micro = Micro(
                1, plan["pack_length"], plan["lora_r"], *sizes, int(plan["checkpointing"]),
                plan["lora_dropout"] > 0, plan["device"] == "cuda",
            )  # fmt: skip
            runs.append(Run(
                name, device, run["date"], Shape(**run["shape"]), micro, plan["max_length"],
                ours["peak_gb"], ours["figures"]["tokens_per_s"], card,
            ))  # fmt: skip
    return runs


@dataclass(frozen=True)
class Estimate:
    """The cost of training a model in one way on one card."""

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
        n = self.micro.checkpoint
        return math.ceil(self.shape.layers / n) / self.shape.layers if n else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Real tokens a second: measured, else products at the card's speed, then unpacking."""
        if self.run:
            return self.run.tokens_per_second
        flops = flops_per_token(self.shape, self.recomputed, self.row, self.micro.rank) * self.row
        seconds = flops / (self.card.tflops * 1e12 * self.card.efficiency)
        seconds += dequantisation_seconds(self.shape, self.card, self.recomputed)
        return self.row / max(seconds, LAUNCH_SECONDS * self.shape.layers)

    @property
    def minutes(self) -> float:
        """Minutes of one epoch."""
        return self.tokens / self.tokens_per_second / 60

    @property
    def basis(self) -> str:
        """Whether speed was measured."""
        return f"measured on {self.run.device}, {self.run.date}" if self.run else "estimate"

    @property
    def micro_words(self) -> str:
        """The micro-batch in words."""
        n, length = self.micro.checkpoint, f"{self.micro.length:,}"
        rows = f"1 packed row of {length}" if self.packed else f"1 x {length}, padded"
        again = {0: "off", 1: "every block"}.get(n, f"every {n} blocks")
        return f"{rows} tokens, activation checkpointing {again}"

    def __str__(self) -> str:
        millions, micro = self.shape.parameters / 1e6, self.micro
        bits = f"{8 * micro.compute_bytes}-bit compute, {8 * micro.adapter_bytes}-bit adapters"
        return "\n".join([
            f"{self.name}, {millions:,.0f} M parameters, on {self.card.name} "
            f"({self.card.memory_gb:g} GB)",
            f"{bits} of rank {micro.rank}; {self.micro_words}",
            "", *self._memory_lines(), "", *self._time_lines(),
        ])  # fmt: skip

    def _memory_lines(self) -> list[str]:
        total, card = self.memory_gb, self.card.memory_gb
        digits = 2 if total > 5 else 3
        verdict = "fits"
        if total > card:
            verdict = "does not fit: try --length, --rank or --checkpointing full, or another card"
        lines = [f"  {name:<24} {gb:7.{digits}f} GB" for name, gb in self.parts.items()]
        lines += [f"  {'all':<24} {total:7.{digits}f} GB of {card:g}: {verdict}  [estimate]"]
        if self.run:
            lines += [f"  {'peak':<24} {self.run.peak_gb:7.{digits}f} GB  [{self.basis}]"]
        return lines

    def _time_lines(self) -> list[str]:
        card, shape, basis = self.card, self.shape, f"[{self.basis}]"
        plain, again = (flops_per_token(shape, share) / 1e9 for share in (0, self.recomputed))
        tax = 1000 * dequantisation_seconds(shape, card, self.recomputed)
        rows = [
            ("compute", f"{plain:.3g} GF a token at 4N, {again:.3g} with what is recomputed; "
                        f"unpacking weights {tax:.0f} ms a micro-batch"),
            ("speed", f"{self.tokens_per_second:,.0f} real tokens/s  {basis}"),
        ]  # fmt: skip
        if not self.run:
            rows += [("", f"{card.efficiency:.0%} of {card.tflops:g} TFLOP/s; {card.basis}")]
        tokens = f"{self.tokens:,} tokens of MedQuAD"
        rows += [("one epoch", f"{self.minutes:,.0f} min for {tokens}  {basis}")]
        if self.price:
            cost = f"{self.minutes / 60 * self.price:,.2f} an epoch at {self.price:.2f} an hour"
            rows += [("price", f"{cost}  {basis}")]
        # Files are mapped and quantised tensor by tensor: no second copy of the model in RAM.
        ram = {
            "Python and libraries": LIBRARIES_GB,
            "one shard of the files": min(SHARD_GB, 2 * shape.parameters / 1e9),
            "the largest tensor": 2 * shape.vocab * shape.hidden / 1e9,
            "the 4-bit model": 0.0 if card.capability else weights_gb(self.parts),
        }
        parts = " + ".join(f"{gb:.1f} {name}" for name, gb in ram.items())
        rows += [("RAM to load", f"{sum(ram.values()):.1f} GB: {parts}  [estimate]")]
        return [f"{name:<12} {text}" for name, text in rows]


def estimate(
    profile: str = "llama-8b", gpu: str = "T4", *, length: int = 0, rank: int = 0,
    packing: bool = True, checkpointing: int | None = None, price: float = 0.0, tokens: int = 0,
    config: str = "", runs: list[Run] | None = None,
) -> Estimate:  # fmt: skip
    """Estimate training; what is not given is what ``profiles.resolve`` chooses on that card.

    Args:
        profile: the recipe: lengths, rank, tokens a step.
        gpu: one of ``CARDS``, in any case.
        length: tokens of a packed row, or of the longest example with ``packing=False``.
        checkpointing: 0 off, 1 every block, n every n-th block.
        tokens: real tokens of an epoch (default: of MedQuAD's training part).
        config: a ``config.json`` of another Llama, or its folder.
        runs: measured runs to compare with (default: those of the package).

    Raises:
        CourseError: unknown profile or card, a config of no Llama, a number out of range.
    """
    _check(profile, gpu, length, rank, checkpointing or 0, price, tokens)
    card = next(card for name, card in CARDS.items() if name.lower() == gpu.lower())
    recipe, compute, cuda = PROFILES[profile], compute_dtype(card.hardware), bool(card.capability)
    shape, rank = read_shape(config) if config else recipe.shape, rank or recipe.lora_r
    try:
        fit = fit_step(recipe, shape, compute, cuda, card.memory_gb, rank)
    except CourseError:  # nothing fits: show by how much
        fit = Fit(1, recipe.max_length // 4, recipe.max_length // 4, True, math.inf)
    row = length or (fit.pack_length if packing else fit.max_length)
    checkpoint = int(fit.checkpointing) if checkpointing is None else checkpointing
    micro = micro_batch(profile, compute, cuda, rank, row, checkpoint)
    longest = fit.max_length if packing else row
    rows, known = next(sizes for most, sizes in TRAINING_PART.items() if most >= longest)
    mean = row if packing else min(row, known / rows)  # a padded row alone has no pads
    runs, this = read_runs() if runs is None else runs, (profile, card, shape, micro)
    same = [run for run in runs if (run.profile, run.card, run.shape, run.micro) == this]
    path = Path(config).resolve()
    name = (path.parent if path.suffix == ".json" else path).name if config else profile
    run = same[-1] if same else None
    return Estimate(name, shape, card, micro, packing, tokens or known, mean, price, run)


def _check(
    profile: str, gpu: str, length: int, rank: int, checkpointing: int, price: float, tokens: int
) -> None:
    """Check the names and the ranges of what the command line gives."""
    if profile not in PROFILES:
        raise CourseError(f"unknown profile {profile!r}: expected {', '.join(PROFILES)}.")
    if gpu.lower() not in map(str.lower, CARDS):
        names = ", ".join(CARDS)
        raise CourseError(f"unknown card {gpu!r}: expected {names}. Take the one most like yours.")
    numbers = {
        "length": (length, 1 << 20), "rank": (rank, 4096), "checkpointing": (checkpointing, 1000),
        "tokens": (tokens, 10**15), "price": (price, 10**6),
    }  # fmt: skip
    for name, (value, most) in numbers.items():
        if not 0 <= value <= most:
            raise CourseError(f"{name} {value}: expected a number from 0 to {most:,}.")


def read_shape(config: str) -> Shape:
    """Read the shape from a Llama's ``config.json``, given as the file or its folder.

    Raises:
        CourseError: no such file, no JSON, another architecture, sizes missing or wrong.
    """
    path = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
    name = f"config {path.name!r}"
    try:
        values: Any = read_json(path)
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not readable JSON"
        raise CourseError(f"{name}: {reason}. Give a model's config.json or its folder.") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != "llama":
        raise CourseError(f"{name} is of model_type {kind!r}: expected 'llama'.")
    values = {"num_key_value_heads": values.get("num_attention_heads"), "head_dim": 0} | values
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
             "num_key_value_heads", "vocab_size")  # fmt: skip
    wrong = [key for key in names if type(values.get(key)) is not int or values[key] < 1]
    if wrong:
        raise CourseError(f"{name} lacks a whole number over 0 for {', '.join(wrong)}.")
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if not values["head_dim"] and width % heads:
        raise CourseError(
            f"{name}: hidden_size {width} is no multiple of {heads} heads, and it has no head_dim."
        )
    return Shape.of(SimpleNamespace(**{"tie_word_embeddings": False} | values))
