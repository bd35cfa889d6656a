"""The dial of the course: a *profile* says what is studied, the *hardware* says how, ``resolve`` joins them to a plan.

Nothing here imports torch at module level, so that the command line answers at once.
"""

from __future__ import annotations

import dataclasses
import html
import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TINY_MODEL = Path(__file__).parent / "assets" / "tiny"
SOURCES = ("sample", "hub", "xml", "csv", "jsonl", "parquet")


class CourseError(Exception):
    """A mistake that the reader can mend; the message says what is wrong, what was expected and what to do next."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama that parameter counts and memory are computed from."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    head_dim: int = 0

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The shape of a ``transformers.LlamaConfig`` (or any config with its field names)."""
        return cls(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            vocab=config.vocab_size,
            tied=config.tie_word_embeddings,
            head_dim=getattr(config, "head_dim", 0) or 0,
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (inputs, outputs) of the seven linear layers of one block."""
        head = self.head_dim or self.hidden // self.heads
        return {
            "q_proj": (self.hidden, self.heads * head),
            "k_proj": (self.hidden, self.kv_heads * head),
            "v_proj": (self.hidden, self.kv_heads * head),
            "o_proj": (self.heads * head, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def block_parameters(self) -> int:
        """Weights in the linear layers of all blocks: what 4-bit quantisation packs."""
        return self.layers * sum(i * o for i, o in self.linears().values())

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding and of the head (once if they are tied): these stay in 16 or 32 bits."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All weights, the norms included."""
        return self.block_parameters + self.embedding_parameters + self.hidden * (2 * self.layers + 1)


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
            rows=0, eval_rows=150, max_length=256, tokens_per_step=1200,
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


# Tokens of a packed row at most. Longer ones dilute the fixed cost of a micro-batch further, but with SDPA every token is
# compared with the whole row and then masked: at 4,096 tokens that is a seventh of an 8 B model's forward pass.
MAX_PACK = 4096


def sized(profile: Profile, source: str) -> Profile:
    """The profile's sizes for ``source``: real answers are long, and ``tiny`` takes fewer and longer rows of them."""
    if profile.name == "tiny" and source != "sample":
        return dataclasses.replace(profile, rows=240, eval_rows=40, max_length=512, epochs=2)
    return profile


@dataclass(frozen=True)
class Hardware:
    """What the machine offers. ``memory_gb`` is the memory a model can use: the card's, or the RAM of a CPU run."""

    device: str  # "cpu", "cuda" or "mps"
    name: str
    memory_gb: float
    capability: tuple[int, int] | None = None  # CUDA compute capability
    bf16_cpu: bool = False  # AVX512-BF16 or AMX: without it bf16 matrix products crawl
    cores: int = 1
    gpus: int = 0


def detect() -> Hardware:
    """Look at this machine. Imports torch.

    CUDA is judged by compute capability, not by ``torch.cuda.is_bf16_supported()``: that counts emulation, and a T4
    would crawl.
    """
    import psutil
    import torch

    ram = psutil.virtual_memory().total / 1e9
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = (properties.major, properties.minor)
        return Hardware("cuda", properties.name, properties.total_memory / 1e9, capability, False, cores, torch.cuda.device_count())
    bf16 = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    if torch.backends.mps.is_available():
        return Hardware("mps", "Apple GPU", ram, None, False, cores)
    return Hardware("cpu", platform.processor() or platform.machine(), ram, None, bf16, cores)


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

    @property
    def folder(self) -> Path:
        """``runs/<profile>``: where every stage of this plan writes."""
        return Path(self.out) / self.profile

    @property
    def packing(self) -> bool:
        """Whether short rows share a row of ``pack_length`` tokens."""
        return self.pack_length > 0

    @property
    def model_source(self) -> str:
        """What ``from_pretrained`` takes: a folder or a Hub id."""
        if self.model_path:
            return self.model_path
        return str(TINY_MODEL) if self.model_id == "embedded" else self.model_id

    def table(self) -> list[tuple[str, str]]:
        """The plan as (what, value) pairs in plain words."""
        steps = f"{self.max_steps} steps" if self.max_steps else f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}"
        model = f"{Path(self.model_path).name} (local folder)" if self.model_path else self.model_id
        return [
            ("profile", f"{self.profile} ({self.why})"),
            ("base model", model + (f" @ {self.revision[:8]}" if self.revision and not self.model_path else "")),
            ("data", self.source + (f" ({Path(self.data_path).name})" if self.data_path else "")),
            ("runs on", self.hardware),
            ("numbers", f"4-bit NF4 weights, {self.compute_dtype} compute, {self.adapter_dtype} adapters"),
            ("LoRA", f"rank {self.lora_r}, alpha {self.lora_alpha}, dropout {self.lora_dropout}, all linear layers"),
            ("one step", f"{self.batch_size} x {self.accumulation} rows of up to {self.max_length} tokens" if not self.packing else
                         f"{self.accumulation} x {self.pack_length} tokens, packed with rows of up to {self.max_length}"),
            ("training", f"{steps}, learning rate {self.learning_rate:g}, {self.optimizer}"
                         + (", activation checkpointing" if self.checkpointing else "")),
            ("rows", f"{self.rows or 'all'} for training, up to {self.eval_rows} each for validation and test"),
            ("predicted memory", f"{self.memory_gb:.2f} GB of {self.card_gb:.0f} GB"),
        ]  # fmt: skip

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
        return {k: (Path(v).name if k in ("model_path", "data_path", "out") and v else v) for k, v in values.items()}


def compute_dtype(hardware: Hardware) -> str:
    """bf16 from Ampere on (capability 8.0) and on CPUs with AVX512-BF16, fp16 on older cards, fp32 elsewhere."""
    if hardware.device == "cuda":
        return "bfloat16" if (hardware.capability or (0, 0)) >= (8, 0) else "float16"
    return "bfloat16" if hardware.device == "cpu" and hardware.bf16_cpu else "float32"


def training_memory_gb(
    shape: Shape, lora_r: int, tokens: int, compute_bytes: int, adapter_bytes: int, checkpointing: bool, packed_bits: float = 4.127
) -> float:
    """Predicted peak memory of QLoRA training, in GB (1e9 bytes); an estimate, meant to err on the high side.

    Weights in ``packed_bits`` a parameter (NF4 with double quantisation: 4 + 8/64 + 32/16384 bits, QLoRA, arXiv
    2305.14314, section 3), embeddings and head in the compute dtype, adapters with gradients and an 8-bit Adam's two
    moments, the activations of ``tokens`` tokens, the widest loss chunk, and 0.8 GB for a CUDA context.
    """
    frozen = shape.block_parameters * packed_bits / 8 + shape.embedding_parameters * compute_bytes
    adapters = shape.layers * sum(lora_r * (i + o) for i, o in shape.linears().values())
    trained = adapters * (2 * adapter_bytes + 8)
    block_inputs = shape.layers * shape.hidden * tokens * compute_bytes
    inside = (18 * shape.hidden + 8 * shape.intermediate) * tokens * compute_bytes  # one block's saved tensors
    activations = block_inputs + (inside if checkpointing else inside * shape.layers)
    dequantised = max(i * o for i, o in shape.linears().values()) * compute_bytes
    logits = min(tokens, 1024) * shape.vocab * 4 * 3
    return (frozen + trained + activations + dequantised + logits) / 1e9 + 0.8


_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether the Hugging Face Hub answers; ``HF_HUB_OFFLINE=1`` counts as no."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    import httpx

    try:
        httpx.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=timeout, follow_redirects=True).raise_for_status()
    except (httpx.HTTPError, OSError):
        return False
    return True


def hub_token() -> str | None:
    """The Hub token of the environment, of the Hub's own login, or of Colab's secrets; ``None`` if there is none."""
    from huggingface_hub import get_token

    token: str | None = get_token()
    return token


def choose(hardware: Hardware, reachable: bool, token: bool) -> tuple[str, str]:
    """The profile that ``auto`` takes, and why, with the step that leads to the next one up."""
    if hardware.memory_gb < 2:
        return "tiny", f"auto: only {hardware.memory_gb:.1f} GB of memory; 'small' needs 2 GB"
    if not reachable:
        return "tiny", "auto: the Hugging Face Hub is out of reach; with a network, 'small' is next"
    if hardware.device != "cuda":
        return "small", "auto: no CUDA GPU; on Colab choose Runtime > Change runtime type > T4 GPU for a Llama"
    if not token:
        return "small", "auto: a GPU but no HF_TOKEN; accept the Llama 3 licence on the Hub and set the token for a Llama"
    if hardware.memory_gb >= 14:
        return "llama-8b", "auto: a GPU with room for 8 B in 4 bits, and a token"
    if hardware.memory_gb >= 4:
        return "llama-1b", f"auto: a GPU with {hardware.memory_gb:.0f} GB and a token; 'llama-8b' needs 14 GB"
    return "small", f"auto: a GPU with {hardware.memory_gb:.0f} GB; 'llama-1b' needs 4 GB"


def default_out() -> str:
    """``$MEDQUAD_OUT``, or ``runs`` at the root of the checkout that holds the working folder, else ``runs`` in it."""
    if chosen := os.environ.get("MEDQUAD_OUT"):
        return chosen
    here = Path.cwd()
    root = next((p for p in (here, *here.parents) if (p / "medquad_utils").is_dir() and (p / "pyproject.toml").is_file()), here)
    return str(root / "runs")


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

    Raises:
        CourseError: an unknown profile or source, a source without its path, or a model that no setting fits in memory.
    """
    _friendly_errors()
    if profile not in ("auto", *PROFILES):
        raise CourseError(f"unknown profile {profile!r}: expected auto, {', '.join(PROFILES)}. Set profile to one of these.")
    hardware = hardware or detect()
    why = "as asked"
    if profile == "auto":
        reachable = hub_reachable()
        profile, why = choose(hardware, reachable, bool(reachable and hub_token()))
    source = source or PROFILES[profile].source
    _check_source(source, data_path)
    chosen = sized(PROFILES[profile], source)
    shape = _shape_in(model_path) if model_path else chosen.shape
    fit = _fit(chosen, shape, hardware, lora_r or chosen.lora_r)
    cuda = hardware.device == "cuda"
    dtype = compute_dtype(hardware)
    return Plan(
        profile=profile, model_id=chosen.model_id, revision=chosen.revision, model_path=model_path,
        source=source, data_path=data_path, device="cuda" if cuda else "cpu",
        hardware=f"{hardware.name}, {hardware.memory_gb:.0f} GB" if cuda else f"CPU, {hardware.cores} cores, {hardware.memory_gb:.0f} GB",
        compute_dtype=dtype, adapter_dtype=adapter_dtype(dtype),
        batch_size=fit.batch, accumulation=fit.accumulation, max_length=fit.length,
        pack_length=fit.pack, checkpointing=fit.checkpointing, attention="sdpa",
        optimizer="paged_adamw_8bit" if cuda else "adamw_torch",
        lora_r=lora_r or chosen.lora_r, lora_alpha=2 * (lora_r or chosen.lora_r), lora_dropout=0.0 if profile == "tiny" else 0.05,
        learning_rate=chosen.learning_rate, epochs=chosen.epochs, max_steps=max_steps,
        rows=rows or chosen.rows, eval_rows=chosen.eval_rows, max_new_tokens=chosen.max_new_tokens,
        seed=seed, out=out or default_out(), memory_gb=fit.memory_gb, card_gb=hardware.memory_gb, why=why,
    )  # fmt: skip


def adapter_dtype(compute: str) -> str:
    """bf16 adapters beside bf16 compute; fp32 otherwise: fp16 adapters underflow and break the gradient scaler."""
    return "bfloat16" if compute == "bfloat16" else "float32"


@dataclass(frozen=True)
class _Fit:
    """How one step is cut so that the memory holds it."""

    batch: int
    accumulation: int
    length: int
    pack: int
    checkpointing: bool
    memory_gb: float


def _fit(profile: Profile, shape: Shape, hardware: Hardware, rank: int) -> _Fit:
    """The fastest step that the memory holds.

    Longest rows come first: what is too long is left out of the data. On a GPU follow rows that are packed as long as
    possible without activation checkpointing, which computes the forward pass a second time, and only then with it. A
    packed row is one micro-batch: every micro-batch pays once for dequantising all weights.
    """
    cuda = hardware.device == "cuda"
    compute = compute_dtype(hardware)
    sizes = (_BYTES[compute], _BYTES[adapter_dtype(compute)])
    # On a CPU rows are padded; the mean example fills about a third of max_length.
    rows = 1 << (max(1, profile.tokens_per_step // 75).bit_length() - 1)
    for length in (profile.max_length, profile.max_length // 2, profile.max_length // 4):
        packs = _halved(min(MAX_PACK, profile.tokens_per_step), length)
        cuts = [(tokens, checkpointing) for checkpointing in (False, True) for tokens in packs] if cuda else []
        cuts = cuts or [(batch * length, False) for batch in _halved(rows, 1)]
        for tokens, checkpointing in cuts:
            memory = training_memory_gb(shape, rank, tokens, *sizes, checkpointing)
            if memory > 0.92 * hardware.memory_gb:
                continue
            if cuda:
                return _Fit(1, max(1, profile.tokens_per_step // tokens), length, tokens, checkpointing, memory)
            return _Fit(tokens // length, rows * length // tokens, length, 0, checkpointing, memory)
    need = training_memory_gb(shape, rank, profile.max_length // 4, *sizes, cuda)
    smaller = [p for p in PROFILES if PROFILES[p].shape.parameters < shape.parameters]
    raise CourseError(
        f"profile {profile.name} needs about {need:.1f} GB even at batch 1, but this machine offers "
        f"{hardware.memory_gb:.1f} GB. Choose a smaller profile ({', '.join(smaller) or 'none is left'}) or a larger card."
    )


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
        raise CourseError(f"source {source!r} needs data_path: the {kind} to read. Add -p data_path=... (medquad data: --path ...)")


def _shape_in(folder: str) -> Shape:
    from transformers import AutoConfig

    if not (Path(folder) / "config.json").is_file():
        raise CourseError(f"model_path {folder!r} holds no config.json: expected a model folder in the Hub's layout.")
    return Shape.of(AutoConfig.from_pretrained(folder))


def _friendly_errors() -> None:
    """In a notebook, show one clear message for a ``CourseError`` and for a cell that was run out of order."""
    import sys

    if "IPython" not in sys.modules or (shell := sys.modules["IPython"].get_ipython()) is None:
        return

    def handler(shell: Any, kind: type[BaseException], error: BaseException, trace: Any, tb_offset: int | None = None) -> list[str]:
        text = str(error)
        if isinstance(error, NameError):
            text += ". A cell above has not been run yet: choose Run > Run All Above Selected Cell, then run this one again."
        shell._showtraceback(kind, text, [f"{kind.__name__}: {text}"])
        return [text]

    shell.set_custom_exc((CourseError, NameError), handler)


def versions() -> dict[str, str]:
    """Installed versions of the packages that the course stands on."""
    names = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate")
    return {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in names}}
