"""Cost of training a Llama on a card: memory, time and money, by arithmetic alone (no torch)."""

from __future__ import annotations

import itertools
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from medquad_utils import CourseError, memory
from medquad_utils.files import MEASURED, read_json
from medquad_utils.machine import Hardware
from medquad_utils.memory import Micro, Shape
from medquad_utils.profiles import ROOM, Fit, micro_of, resolve

# MedQuAD's training part (13,351 rows kept of 16,423, split by disease group): how many rows fit
# into so many tokens, and their tokens. Measured with the tiny model's tokenizer (vocabulary
# 3,072); Llama-3's (128,256) gives fewer tokens for the same text, so minutes err on the high side.
TRAINING_PART = {
    128: (1663, 164_391), 256: (4661, 749_979), 512: (8645, 2_163_190), 1024: (10_109, 3_166_147),
    2048: (10_509, 3_723_751), 4096: (10_630, 4_067_883), 1 << 62: (10_667, 4_255_676),
}  # fmt: skip
# Keys that a token of MedQuAD's rows of up to 1,024 tokens meets in its own example, on average
# (lengths.json). They decide the cost of attention where packed examples are computed alone.
CONTEXT = 215
LAUNCH_SECONDS = 0.004  # at least, for Python and kernel launches in one pass of a block: _AMPERE
BANDWIDTH = 0.9  # share of the data sheet's that element-wise kernels reach; an assumption
ATTENTION = 0.25  # share of tflops that attention is taken to reach, of short examples or masked
LIBRARIES_GB = 3.0  # of RAM that Python, torch and the CUDA libraries take; an assumption
SHARD_GB = 5.0  # the files that the Hub's repository of Llama-3-8B is cut into


@dataclass(frozen=True)
class Card:
    """A GPU (or a CPU) from its data sheet."""

    name: str
    memory_gb: float  # to plan with, in GB of 1e9 bytes: what torch sees, rounded down
    capability: tuple[int, int] | None  # CUDA compute capability
    tflops: float  # dense 16-bit products with 32-bit sums; on a CPU 32-bit ones
    bandwidth: float  # GB/s
    efficiency: float  # share of tflops that matrix products are taken to reach
    basis: str  # where the efficiency comes from

    @property
    def hardware(self) -> Hardware:
        """The card as ``profiles.resolve`` sees it."""
        device = "cuda" if self.capability else "cpu"
        return Hardware(device, self.name, self.memory_gb, self.capability)


_LOW_POWER = "assumed: 70 W hold its clock far below the data sheet's"
_A10G = "from 22.2 minutes of 8 B QLoRA on Alpaca 2k that litgpt reports"
_AMPERE = "from 375 to 1,450 ms a row of Qwen-7B's Q-LoRA on an A100, as its README reports"
_HOPPER = "assumed: square products alone reach 80 % on such a card, LoRA's thin ones far less"
_ADA = ("from 2,413 tokens/s of 8 B QLoRA with activation checkpointing and torch.compile that "
        "torchtune reports")  # fmt: skip
_CPU = ("assumed: two AVX2 cores whose products reach 75 GFLOP/s in fp32; a 20 M Llama reached "
        "about 40 % of its core's")  # fmt: skip
CARDS = {card.name: card for card in (
    Card("T4", 15.0, (7, 5), 65, 320, 0.40, _LOW_POWER),
    Card("L4", 23.0, (8, 9), 121, 300, 0.50, _LOW_POWER),
    Card("A10G", 23.0, (8, 6), 70, 600, 0.45, _A10G),
    Card("A100-40", 42.0, (8, 0), 312, 1555, 0.65, _AMPERE),
    Card("A100-80", 85.0, (8, 0), 312, 2039, 0.65, _AMPERE),
    Card("H100", 85.0, (9, 0), 989, 3350, 0.60, _HOPPER),
    Card("H200", 150.0, (9, 0), 989, 4800, 0.60, _HOPPER),
    Card("RTX 4090", 25.0, (8, 9), 165, 1008, 0.80, _ADA),
    Card("CPU", 16.0, None, 0.075, 20, 0.40, _CPU),
)}  # fmt: skip


def flops_per_token(shape: Shape, recomputed: bool = False, rank: int = 0) -> float:
    """Return the FLOP of training one token with a frozen base, 4N, and adapters; no attention.

    N counts the weights that multiply: all linear layers and the head, not the embedding. The
    forward pass is 2N (a multiply and an add), the gradient of the inputs 2N. The gradient of the
    weights, the last third of 6N (Kaplan et al., arXiv 2001.08361), a frozen layer does not need.

    Args:
        shape: of the model. Llama-3-8B: 30.0 GF.
        recomputed: with activation checkpointing: +2N of the blocks (44.0 GF).
        rank: of the adapters on all linear layers: 6 FLOP a trained number, 8 if computed twice.
    """
    blocks = shape.block_parameters
    frozen = 4 * (blocks + shape.vocab * shape.hidden) + 2 * recomputed * blocks
    return frozen + memory.adapter_parameters(shape, rank) * (6 + 2 * recomputed)


def attention_flops(shape: Shape, context: float, recomputed: bool = False) -> float:
    """Return attention's FLOP a token, of which each meets ``context`` keys on average.

    Two products need both gradients: 4 x width x context forward, twice that backward. SDPA with a
    mask computes the whole row.
    """
    return shape.layers * shape.linears()["o_proj"][0] * context * (12 + 4 * recomputed)


def elementwise_bytes(shape: Shape, micro: Micro) -> float:
    """Return the bytes a token that all kernels but products and attention read and write.

    Norms, rotations, SiLU, residuals, casts, LoRA's sums: memory-bound, 2.9 MB a block at 8 B.
    Counted on transformers 5.23 and peft 0.21; tests/test_estimate.py counts again. The norms work
    in 32 bits. The forward pass takes 42 %.
    """
    h, i, c = shape.hidden, shape.intermediate, micro.compute_bytes
    q, kv = shape.linears()["o_proj"][0], shape.linears()["k_proj"][1]
    moved = 280 * h + c * (42 * h + 35 * i + 39 * q + 46 * kv)
    moved += 10 * c * (5 * h + q + i) if micro.dropout else 0
    return shape.layers * moved * (1 + 0.42 * micro.checkpoint)


def dequantisation_seconds(shape: Shape, card: Card, recomputed: bool = False) -> float:
    """Return the seconds that one micro-batch spends on unpacking 4-bit weights, at any length.

    Each pass (forward, backward, forward again where recomputed) reads the packed weights, writes
    them unpacked and reads them again: 31.5 GB at 8 B in 16 bits, and the reported costs: about
    315 ms on a T4 or an L4, 61 on an A100, 28 on an H100.
    """
    packed, unpacked = memory.bits_per_parameter(double_quant=True) / 8, 2 if card.capability else 4
    moved = shape.block_parameters * (packed + 2 * unpacked)
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

    def on(self, card: Card) -> bool:
        """Whether this card took the run: torch calls an A100-40 "NVIDIA A100-SXM4-40GB"."""
        device = self.device.replace("GB", "")
        return {*re.split("[ -]", card.name)} <= {*re.split("[ -]", device)}


def read_runs(folder: Path = MEASURED) -> list[Run]:
    """Read the course's own arm ("c") of every run in ``train_speed_*.json``."""
    runs = []
    for file in sorted(folder.glob("train_speed_*.json")):
        for name, run in read_json(file).items():
            plan, ours = run["plan"], run["arms"].get("c", {})
            if not ours.get("figures"):
                continue
            micro = micro_of(plan, plan["pack_length"], plan["checkpointing"])
            runs.append(Run(
                name, run["machine"]["device"], run["date"], Shape(**run["shape"]), micro,
                plan["max_length"], ours["peak_gb"], ours["figures"]["tokens_per_s"],
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
    context: float  # keys that a token meets in attention, on average
    price: float  # of an hour, in any currency; 0 = not asked for
    run: Run | None  # the same run, if it was measured

    groups = property(lambda self: memory.training_memory(self.shape, self.micro))  # name -> GB
    memory_gb = property(lambda self: sum(self.groups.values()))  # the predicted peak
    minutes = property(lambda self: self.tokens / self.tokens_per_second / 60)  # of an epoch

    @property
    def tokens_per_second(self) -> float:
        """Real tokens a second: measured, else from ``seconds`` of a micro-batch."""
        return self.run.tokens_per_second if self.run else self.row / sum(self.seconds.values())

    @property
    def seconds(self) -> dict[str, float]:
        """Part -> seconds of the mean micro-batch, each at its own rate."""
        card, again, shape = self.card, self.micro.checkpoint, self.shape
        products = flops_per_token(shape, again, self.micro.rank) / card.efficiency
        attention = attention_flops(shape, self.context, again) / ATTENTION
        moved = elementwise_bytes(shape, self.micro)
        parts = {
            "products": self.row * products / card.tflops / 1e12,
            "attention": self.row * attention / card.tflops / 1e12,
            "other kernels": self.row * moved / (BANDWIDTH * card.bandwidth) / 1e9,
            "unpacking": dequantisation_seconds(shape, card, again),
        }
        launches = LAUNCH_SECONDS * shape.layers * (2 + again)
        return parts | {"waiting for launches": max(0.0, launches - sum(parts.values()))}

    @property
    def basis(self) -> str:
        """Whether speed was measured."""
        return f"measured on {self.run.device}, {self.run.date}" if self.run else "estimate"

    @property
    def micro_words(self) -> str:
        """The micro-batch in words."""
        row = "1 packed row of" if self.packed else "1 example of up to"
        again = "every block" if self.micro.checkpoint else "off"
        return f"{row} {self.micro.length:,} tokens, activation checkpointing {again}"

    def __str__(self) -> str:
        card, micro, total, basis = self.card, self.micro, self.memory_gb, f"[{self.basis}]"
        plain, again = (
            flops_per_token(self.shape, part) / 1e9 for part in (False, micro.checkpoint)
        )
        times = ", ".join(f"{name} {1000 * part:.0f}" for name, part in self.seconds.items())
        does_not = "does not fit: try --length, --rank or --checkpointing full, or another card"
        verdict = "fits" if total <= ROOM * card.memory_gb else does_not
        row = ("  {:<24} {:7.2f} GB" if total > 5 else "  {:<24} {:7.3f} GB").format
        lines = [
            f"{self.name}, {self.shape.parameters / 1e6:,.0f} M parameters, "
            f"on {card.name} ({card.memory_gb:g} GB)",
            f"{8 * micro.compute_bytes}-bit compute, {8 * micro.adapter_bytes}-bit adapters "
            f"of rank {micro.rank}; {self.micro_words}",
            "", *itertools.starmap(row, self.groups.items()),
            f"{row('all', total)} of {card.memory_gb:g}: {verdict}  [estimate]",
            f"{row('peak', self.run.peak_gb)}  {basis}" if self.run else None,
            "",
            f"compute      {plain:.3g} GF a token at 4N, {again:.3g} with what is recomputed",
            f"micro-batch  {times} ms  [estimate]",
            f"speed        {self.tokens_per_second:,.0f} real tokens/s  {basis}",
            None if self.run else
            f"             {card.efficiency:.0%} of {card.tflops:g} TFLOP/s; {card.basis}",
            f"one epoch    {self.minutes:,.0f} min for {self.tokens:,} tokens of MedQuAD  {basis}",
            f"price        {self.minutes / 60 * self.price:,.2f} an epoch "
            f"at {self.price:.2f} an hour  {basis}" if self.price else None,
            f"RAM to load  {self.loading()}  [estimate]",
        ]  # fmt: skip
        return "\n".join(line for line in lines if line is not None)

    def loading(self) -> str:
        """The RAM that loading takes: files are mapped, and each tensor is quantised alone."""
        shape = self.shape
        ram = {
            "Python and libraries": LIBRARIES_GB,
            "one shard of the files": min(SHARD_GB, 2 * shape.parameters / 1e9),
            "the largest tensor": 2 * shape.vocab * shape.hidden / 1e9,
            "the 4-bit model": 0.0
            if self.card.capability
            else self.groups["4-bit weights"] + self.groups["embeddings and head"],
        }
        parts = " + ".join(f"{gb:.1f} {name}" for name, gb in ram.items())
        return f"{sum(ram.values()):.1f} GB: {parts}"


def estimate(
    profile: str = "llama-8b", gpu: str = "T4", *, length: int = 0, rank: int = 0,
    packing: bool = True, checkpointing: bool | None = None, price: float = 0.0, tokens: int = 0,
    config: str = "", runs: list[Run] | None = None,
) -> Estimate:  # fmt: skip
    """Estimate training; what is not given is what ``profiles.resolve`` chooses on that card.

    Args:
        profile: the recipe: lengths, rank, tokens a step.
        gpu: one of ``CARDS``, in any case.
        length: tokens of a packed row, or of the longest example with ``packing=False``.
        tokens: real tokens of an epoch (default: of MedQuAD's training part).
        config: another Llama: OWNER/NAME, a folder, or the path of its ``config.json``.
        runs: measured runs to compare with (default: those of the package).
    """
    if not (card := next((c for c in CARDS.values() if c.name.lower() == gpu.lower()), None)):
        names = ", ".join(CARDS)
        raise CourseError(f"unknown card {gpu!r}: expected {names}. Take the one most like yours.")
    plan = resolve(profile, hardware=card.hardware, model=config, lora_r=rank)
    shape, shortest = plan.shape, plan.sized.max_length // 4
    fit = Fit(1, shortest, shortest, checkpointing=True, memory_gb=0)  # to show by how much
    with suppress(CourseError):  # nothing fits
        fit = plan.fit
    length = length or (fit.pack_length if packing else fit.max_length)
    micro = plan.micro(length, fit.checkpointing if checkpointing is None else checkpointing)
    longest = min(fit.max_length, length) if packing else length  # longer rows are left out
    rows, known = next(part for most, part in TRAINING_PART.items() if most >= longest)
    mean = length if packing else min(length, known / rows)  # a padded row alone has no pads
    context = min(CONTEXT, mean / 2) if micro.varlen else mean
    asked, measured = (plan.profile, shape, micro), read_runs() if runs is None else runs
    same = [r for r in measured if r.on(card) and (r.profile, r.shape, r.micro) == asked]
    name, run = plan.model_id if config else plan.profile, same[-1] if same else None
    return Estimate(name, shape, card, micro, packing, tokens or known, mean, context, price, run)
