"""The estimate beside training runs that others have published.

python tests/benchmarks/published.py     # writes the table of README.md; arithmetic, no card
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import common

from medquad_utils import estimate
from medquad_utils.memory import Shape
from medquad_utils.profiles import PROFILES

LLAMA, QWEN = PROFILES["llama-8b"].shape, Shape(4096, 32, 11008, 32, 32, 151936)
LITGPT = {"dropout": True, "varlen": False}


@dataclass(frozen=True)
class Published:
    """A published run: its micro-batch, and what its figure holds beside training."""

    what: str
    source: str
    shape: Shape
    gpu: str
    length: int  # tokens of a micro-batch, pads included
    rank: int
    checkpointing: bool
    context: float  # keys that a token meets in attention, on average
    tokens_per_s: float  # as published
    real: float = 1.0  # share of the tokens that are no pads
    training: float = 1.0  # share of the published time that is training
    gb: float = 0.0  # published peak; 0 = none
    other: dict[str, Any] = field(default_factory=dict)  # fields of ``Micro`` unlike our plan's

    def bill(self) -> estimate.Estimate:
        """The estimate of the same micro-batch."""
        bill = estimate.estimate(
            "llama-8b", self.gpu, length=self.length, rank=self.rank,
            checkpointing=self.checkpointing, runs=[],
        )  # fmt: skip
        micro = dataclasses.replace(bill.micro, **self.other)
        return dataclasses.replace(bill, shape=self.shape, context=self.context, micro=micro)

    def estimated(self) -> float:
        """Estimated tokens/s, counted as the source counts them."""
        return self.bill().tokens_per_second * self.real * self.training


# Qwen reports seconds of an iteration of 8 rows: 3.0, 3.0, 3.5, 7.0 and 11.6. litgpt: 22.24 minutes
# for 2 epochs of 1,900 rows of 110 to 130 tokens (with Alpaca's template; an assumption), two at a
# time. The longer one of two is about a quarter longer than the mean. Loading, five validations of
# 100 rows and five samples of 100 tokens take about 15 % of its time.
RUNS = (
    Published("Llama-3.1-8B QLoRA, 2 x 2,048 packed, compiled", "torchtune", LLAMA, "RTX 4090",
              4096, 8, True, 215, 2413, gb=7.9),
    *(Published(f"Qwen-7B Q-LoRA (GPTQ), FlashAttention-2, {length:,}", "Qwen README", QWEN,
                "A100-80", length, 64, True, length / 2, 8 * length / seconds,
                other={"dropout": True})
      for length, seconds in ((256, 3.0), (512, 3.0), (1024, 3.5), (2048, 7.0), (4096, 11.6))),
    *(Published(f"Llama-3-8B QLoRA, Alpaca 2k, rows of {mean}", "litgpt config_hub", LLAMA, "A10G",
                round(2.5 * mean), 32, False, 1.25 * mean, 3800 * mean / (22.24 * 60), real=0.8,
                training=0.85, other=LITGPT)
      for mean in (110, 130)),
    Published("the same, memory of 2 x 512", "litgpt config_hub", LLAMA, "A10G", 1024, 32, False,
              512, 0, gb=17.4, other=LITGPT),
)  # fmt: skip


def page() -> str:
    """Return the table: published figure, estimate and ratio of speed and of memory."""
    rows = []
    for run in RUNS:
        speed, memory, bill = ["", "", ""], list[str](), run.bill()
        if run.tokens_per_s:
            ratio = run.estimated() / run.tokens_per_s
            speed = [f"{run.tokens_per_s:,.0f}", f"{run.estimated():,.0f}", f"{ratio:.2f}"]
        if run.gb:
            memory = [f"{run.gb:.1f}", f"{bill.memory_gb:.1f}", f"{bill.memory_gb / run.gb:.2f}"]
        rows.append([run.what, run.source, run.gpu, *speed, *memory])
    head = "run|source|on|tokens/s|estimate|ratio|peak, GB|estimate|ratio"
    return "\n".join(common.table(head, rows))


if __name__ == "__main__":
    common.write_readme("published", page())
