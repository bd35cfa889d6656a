"""The dial of the course: a *profile* says what is studied, the *hardware* says how, ``resolve`` joins them to a plan.

Nothing here imports torch at module level, so that the command line answers at once.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medquad_utils import CourseError, machine
from medquad_utils.machine import (
    Hardware,
    _friendly_errors,
    default_out,
    detect,
    hub_reachable,
    hub_token,
    on_colab,
    processes,
    token_gap,
)
from medquad_utils.memory import Micro, training_memory
from medquad_utils.memory import Shape as Shape  # part of this module's face

TINY_MODEL = Path(__file__).parent / "assets" / "tiny"
SOURCES = ("sample", "hub", "xml", "csv", "jsonl", "parquet")


@dataclass(frozen=True)
class Profile:
    """What is studied: the model, the data and the sizes of a run."""

    name: str
    model_id: str
    revision: str | None
    shape: Shape
    source: str
    gated: bool
    rows: int  # training rows at most; 0 = all
    eval_rows: int  # rows of validation and of test at most
    max_length: int  # tokens of one example
    tokens_per_step: int  # real tokens that one optimizer step should see
    lora_r: int
    learning_rate: float
    epochs: int
    max_new_tokens: int


PROFILES: dict[str, Profile] = {
    p.name: p
    for p in (
        Profile(
            "tiny", "embedded", None, Shape(256, 4, 640, 8, 4, 3072, tied=True), "sample", False,
            rows=0, eval_rows=150, max_length=256, tokens_per_step=1024,
            lora_r=16, learning_rate=2e-3, epochs=3, max_new_tokens=64,
        ),
        Profile(
            "small", "HuggingFaceTB/SmolLM2-135M-Instruct", None, Shape(576, 30, 1536, 9, 3, 49152, tied=True), "hub", False,
            rows=2000, eval_rows=100, max_length=512, tokens_per_step=4096,
            lora_r=16, learning_rate=5e-4, epochs=1, max_new_tokens=200,
        ),
        Profile(
            "llama-1b", "meta-llama/Llama-3.2-1B-Instruct", None,
            Shape(2048, 16, 8192, 32, 8, 128256, tied=True, head_dim=64), "hub", True,
            rows=4000, eval_rows=200, max_length=1024, tokens_per_step=8192,
            lora_r=16, learning_rate=2e-4, epochs=1, max_new_tokens=256,
        ),
        Profile(
            "llama-8b", "meta-llama/Meta-Llama-3-8B-Instruct", "5f0b02c75b57c5855da9ae460ce51323ea669d8a",
            Shape(4096, 32, 14336, 32, 8, 128256), "hub", True,
            rows=4000, eval_rows=200, max_length=1024, tokens_per_step=8192,
            lora_r=16, learning_rate=2e-4, epochs=1, max_new_tokens=256,
        ),
    )
}  # fmt: skip


# Tokens of a packed row at most, by device. Longer ones dilute the fixed cost of a micro-batch further, but with SDPA every
# token is compared with the whole row and then masked: at 4,096 tokens that is a seventh of an 8 B model's forward pass. A
# CPU's caches hold a short row only: tiny trains 1,500 tokens/s in rows of 512 and 1,200 in rows of 2,048.
MAX_PACK = {"cuda": 4096, "cpu": 512}


def sized(profile: Profile, source: str) -> Profile:
    """The profile's sizes for ``source``: real answers are long, and ``tiny`` takes fewer and longer rows of them."""
    if profile.name == "tiny" and source != "sample":
        return dataclasses.replace(profile, rows=240, eval_rows=40, max_length=512, epochs=2)
    return profile


@dataclass(frozen=True)
class Plan:
    """Everything a run is made of; frozen, printable, and saved beside what it made."""

    profile: str
    model_id: str
    revision: str | None
    model_path: str  # a local folder instead of the Hub; "" = model_id
    source: str
    data_path: str
    device: str  # where the model runs: "cpu" or "cuda"
    hardware: str
    compute_dtype: str  # of activations and of 4-bit matrix products
    adapter_dtype: str
    batch_size: int
    accumulation: int
    max_length: int  # tokens of one example at most
    pack_length: int  # tokens of one packed row; 0 = rows are padded, not packed
    checkpointing: bool
    attention: str
    optimizer: str
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    learning_rate: float
    epochs: int
    max_steps: int  # 0 = as many as the epochs need
    rows: int
    eval_rows: int
    max_new_tokens: int
    seed: int
    out: str
    memory_gb: float  # predicted peak of training
    card_gb: float
    why: str
    processes: int = 1  # that share every step, each on its own GPU
    sharded: bool = False  # FSDP: each process holds a part of the weights (otherwise DDP: each holds all of them)
    gpus: int = 0  # on the machine that made the plan

    @property
    def folder(self) -> Path:
        """``runs/<profile>``: where every stage of this plan writes."""
        return Path(self.out) / self.profile

    @property
    def packing(self) -> bool:
        """Whether short rows share a row of ``pack_length`` tokens."""
        return self.pack_length > 0

    @property
    def on_hub(self) -> bool:
        """Whether the base comes from the Hub: neither from a folder of this machine nor with the package."""
        return not self.model_path and self.model_id != "embedded"

    @property
    def hub_revision(self) -> str | None:
        """What ``from_pretrained`` takes beside ``model_source``: the pinned commit of a model on the Hub."""
        return self.revision if self.on_hub else None

    @property
    def model_source(self) -> str:
        """What ``from_pretrained`` takes: a folder or a Hub id."""
        if self.model_path:
            return self.model_path
        return str(TINY_MODEL) if self.model_id == "embedded" else self.model_id

    @property
    def launch(self) -> str:
        """The command that trains this plan on the machine's other GPUs as well; "" if there are none or a launcher runs already.

        It starts as many processes as there are GPUs, or the largest number below that shares a step evenly.
        """
        if self.processes > 1 or self.gpus < 2:
            return ""
        count = max(
            n
            for n in _shares(self.accumulation * self.pack_length, self.max_length)
            if n <= self.gpus
        )
        return (
            f"torchrun --nproc_per_node {count} -m medquad_utils.training --profile {self.profile}"
            if count > 1
            else ""
        )

    def table(self) -> list[tuple[str, str]]:
        """The plan as (what, value) pairs in plain words."""
        steps = (
            f"{self.max_steps} steps"
            if self.max_steps
            else f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}"
        )
        model = f"{Path(self.model_path).name} (local folder)" if self.model_path else self.model_id
        each = f", in each of {self.processes} processes" if self.processes > 1 else ""
        return [
            ("profile", f"{self.profile} ({self.why})"),
            ("base model", model + (f" @ {self.revision[:8]}" if self.revision and not self.model_path else "")),
            ("data", self.source + (f" ({Path(self.data_path).name})" if self.data_path else "")),
            ("runs on", self.hardware),
            *([("other GPUs", f"this process takes 1 of {self.gpus}; to train on more: {self.launch}")] if self.launch else []),
            ("numbers", f"4-bit NF4 weights, {self.compute_dtype} compute, {self.adapter_dtype} adapters"),
            ("LoRA", f"rank {self.lora_r}, alpha {self.lora_alpha}, dropout {self.lora_dropout}, all linear layers"),
            ("one step", (f"{self.batch_size} x {self.accumulation} rows of up to {self.max_length} tokens" if not self.packing else
                          f"{self.accumulation} x {self.pack_length} tokens, packed with rows of up to {self.max_length}") + each),
            ("training", f"{steps}, learning rate {self.learning_rate:g}, {self.optimizer}"
                         + (", activation checkpointing" if self.checkpointing else "")),
            ("rows", f"{self.rows or 'all'} for training, up to {self.eval_rows} each for validation and test"),
            ("predicted memory", f"{self.memory_gb:.2f} GB of {self.card_gb:.0f} GB"),
            *([("results", self._kept())] if on_colab() else []),
        ]  # fmt: skip

    def _kept(self) -> str:
        """Where results lie on Colab, and what becomes of them when the session ends."""
        if self.folder.is_relative_to(machine.DRIVE):
            return f"on Drive, in {self.folder.relative_to(machine.DRIVE)}: a later session goes on from there"
        return "on this runtime's disk, lost with the session: mount Drive (folder icon > Mount Drive) and run this cell again"

    def __str__(self) -> str:
        rows = self.table()
        width = max(len(k) for k, _ in rows)
        return "\n".join(f"{k:<{width}}  {v}" for k, v in rows)

    def __repr__(self) -> str:
        return str(self)  # a notebook keeps the text beside the HTML: no path of this machine in it

    def _repr_html_(self) -> str:
        cells = "".join(
            f'<tr><th style="text-align:left">{html.escape(k)}</th><td style="text-align:left">{html.escape(v)}</td></tr>'
            for k, v in self.table()
        )
        return f"<table>{cells}</table>"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file; no path of this machine in it."""
        values = dataclasses.asdict(self)
        return {
            k: (Path(v).name if k in ("model_path", "data_path", "out") and v else v)
            for k, v in values.items()
        }


def compute_dtype(hardware: Hardware) -> str:
    """bf16 from Ampere on (capability 8.0) and on CPUs with AVX512-BF16, fp16 on older cards, fp32 elsewhere."""
    if hardware.device == "cuda":
        return "bfloat16" if (hardware.capability or (0, 0)) >= (8, 0) else "float16"
    return "bfloat16" if hardware.device == "cpu" and hardware.bf16_cpu else "float32"


def micro_batch(
    profile: str,
    hardware: Hardware,
    rank: int,
    rows: int,
    length: int,
    checkpoint: int = 0,
    dropout: float | None = None,
) -> Micro:
    """A micro-batch of ``rows`` x ``length`` tokens in the numbers that the hardware computes in."""
    compute = compute_dtype(hardware)
    thinned = adapter_dropout(profile) if dropout is None else dropout
    sizes = (_BYTES[compute], _BYTES[ADAPTER_DTYPE])
    return Micro(rows, length, rank, *sizes, checkpoint, thinned > 0, hardware.device == "cuda")


def adapter_dropout(profile: str) -> float:
    """Share of an adapter's inputs that training sets to zero: none for ``tiny``, whose data is written for it."""
    return 0.0 if profile == "tiny" else 0.05


# On every machine. fp16 adapters break the gradient scaler. bf16 ones swallow the small updates at the end of the schedule,
# and peft 0.21 loads them as fp32 when a run is resumed, which makes it another run.
ADAPTER_DTYPE = "float32"
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def choose(hardware: Hardware, reachable: bool, token: bool, gap: str = "") -> tuple[str, str]:
    """The profile that ``auto`` takes, and why, with the step that leads to the next one up; ``gap`` is why there is no token."""
    if hardware.memory_gb < 2:
        return "tiny", f"auto: only {hardware.memory_gb:.1f} GB of memory; 'small' needs 2 GB"
    if not reachable:
        return "tiny", "auto: the Hugging Face Hub is out of reach; with a network, 'small' is next"
    if hardware.device != "cuda":
        return (
            "small",
            "auto: no CUDA GPU; on Colab choose Runtime > Change runtime type > T4 GPU for a Llama",
        )
    if not token:
        reason = f" ({gap})" if gap else ""
        return (
            "small",
            f"auto: a GPU but no HF_TOKEN{reason}; accept the Llama 3 licence on the Hub and set the token for a Llama",
        )
    if hardware.memory_gb >= 14:
        return "llama-8b", "auto: a GPU with room for 8 B in 4 bits, and a token"
    if hardware.memory_gb >= 4:
        return (
            "llama-1b",
            f"auto: a GPU with {hardware.memory_gb:.0f} GB and a token; 'llama-8b' needs 14 GB",
        )
    return "small", f"auto: a GPU with {hardware.memory_gb:.0f} GB; 'llama-1b' needs 4 GB"


def resolve(
    profile: str = "auto",
    *,
    hardware: Hardware | None = None,
    source: str = "",
    data_path: str = "",
    model_path: str = "",
    rows: int = 0,
    max_steps: int = 0,
    lora_r: int = 0,
    seed: int = 0,
    out: str = "",
) -> Plan:
    """Join a profile and the hardware to a plan; an empty or zero argument keeps the profile's own value.

    Under a launcher the plan is one process's share: as many rows or tokens a step in all as one process would take.

    Raises:
        CourseError: an unknown profile or source, a source without its path, a model that no setting fits in memory, or a
            number of processes that cannot share a step evenly.
    """
    _friendly_errors()
    if profile not in ("auto", *PROFILES):
        raise CourseError(
            f"unknown profile {profile!r}: expected auto, {', '.join(PROFILES)}. Set profile to one of these."
        )
    hardware = hardware or detect()
    why = "as asked"
    if profile == "auto":
        reachable = hub_reachable()
        token = bool(reachable and hub_token())
        profile, why = choose(hardware, reachable, token, "" if token else token_gap())
    source = source or PROFILES[profile].source
    _check_source(source, data_path)
    chosen = sized(PROFILES[profile], source)
    shape = _shape_in(model_path) if model_path else chosen.shape
    fit = fit_step(chosen, shape, hardware, lora_r or chosen.lora_r, processes())
    cuda = hardware.device == "cuda"
    dtype = compute_dtype(hardware)
    sharded = (
        os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    )  # as accelerate launch sets it
    return Plan(
        profile=profile, model_id=chosen.model_id, revision=chosen.revision, model_path=model_path,
        source=source, data_path=data_path, device="cuda" if cuda else "cpu",
        hardware=f"{hardware.name}, {hardware.memory_gb:.0f} GB" if cuda else f"CPU, {hardware.cores} cores, {hardware.memory_gb:.0f} GB",
        compute_dtype=dtype, adapter_dtype=ADAPTER_DTYPE,
        batch_size=1, accumulation=fit.accumulation, max_length=fit.length,
        pack_length=fit.pack, checkpointing=fit.checkpointing, attention="sdpa",
        # FSDP2 hands the optimizer tensors that are cut, and bitsandbytes 0.50 refuses those ("mixed torch.Tensor and DTensor").
        optimizer="paged_adamw_8bit" if cuda and not sharded else "adamw_torch",
        lora_r=lora_r or chosen.lora_r, lora_alpha=2 * (lora_r or chosen.lora_r), lora_dropout=adapter_dropout(profile),
        learning_rate=chosen.learning_rate, epochs=chosen.epochs, max_steps=max_steps,
        rows=rows or chosen.rows, eval_rows=min(chosen.eval_rows, rows or chosen.eval_rows), max_new_tokens=chosen.max_new_tokens,
        seed=seed, out=out or default_out(), memory_gb=fit.memory_gb, card_gb=hardware.memory_gb, why=why,
        processes=processes(), sharded=sharded, gpus=hardware.gpus,
    )  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """How one step is cut so that the memory holds it: ``accumulation`` packed rows of ``pack`` tokens, one after the other."""

    accumulation: int
    length: int
    pack: int
    checkpointing: bool
    memory_gb: float


def fit_step(
    profile: Profile, shape: Shape, hardware: Hardware, rank: int, processes: int = 1
) -> Fit:
    """The fastest step that the memory holds.

    Longest rows come first: what is too long is left out of the data. Then follow rows that are packed as long as possible
    without activation checkpointing, which computes the forward pass a second time, and only then with it. A packed row is
    one micro-batch: every micro-batch pays once for dequantising all weights.
    """
    if processes not in (counts := _shares(profile.tokens_per_step, profile.max_length)):
        raise CourseError(
            f"{processes} processes cannot share a step of {profile.tokens_per_step:,} tokens evenly, and the size of a step is part "
            f"of the recipe: launch {', '.join(map(str, counts))}."
        )

    def need(tokens: int, checkpoint: int) -> float:
        return sum(
            training_memory(
                shape, micro_batch(profile.name, hardware, rank, 1, tokens, checkpoint)
            ).values()
        )

    share, most = (
        profile.tokens_per_step // processes,
        MAX_PACK["cuda" if hardware.device == "cuda" else "cpu"],
    )
    for length in (profile.max_length, profile.max_length // 2, profile.max_length // 4):
        packs = _halved(min(most, share), length)
        for checkpoint, tokens in itertools.product((0, 1), packs):
            memory = need(tokens, checkpoint)
            if memory <= 0.92 * hardware.memory_gb:
                return Fit(max(1, share // tokens), length, tokens, bool(checkpoint), memory)
    least_gb = need(profile.max_length // 4, 1)
    smaller = [p for p in PROFILES if PROFILES[p].shape.parameters < shape.parameters]
    raise CourseError(
        f"profile {profile.name} needs about {least_gb:.1f} GB even for its shortest rows, but this machine offers "
        f"{hardware.memory_gb:.1f} GB. Choose a smaller profile ({', '.join(smaller) or 'none is left'}) or a larger card."
    )


def _shares(whole: int, least: int) -> list[int]:
    """Into how many equal parts of at least ``least`` a step of ``whole`` tokens can be cut; 1 always counts."""
    return [n for n in range(1, max(1, whole // least) + 1) if whole % n == 0]


def _halved(most: int, least: int) -> list[int]:
    """``most``, its half, its quarter ... down to ``least``; ``least`` alone if that is more."""
    sizes = []
    while most > least:
        sizes.append(most)
        most //= 2
    return [*sizes, least]


def _check_source(source: str, data_path: str) -> None:
    if source not in SOURCES:
        raise CourseError(f"unknown source {source!r}: expected one of {', '.join(SOURCES)}.")
    if source not in ("sample", "hub") and not data_path:
        kind = "folder" if source == "xml" else "file"
        raise CourseError(
            f"source {source!r} needs data_path: the {kind} to read. Add -p data_path=... (medquad data: --path ...)"
        )


def _shape_in(folder: str) -> Shape:
    from transformers import AutoConfig

    if not (Path(folder) / "config.json").is_file():
        raise CourseError(
            f"model_path {folder!r} holds no config.json: expected a model folder in the Hub's layout."
        )
    return Shape.of(AutoConfig.from_pretrained(folder))
