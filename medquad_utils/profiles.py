"""The dial of the course: a profile says what is studied, the hardware how, `resolve` joins both.

`Profile` + `Hardware` = `Plan`. Torch and transformers are imported where a function needs them, so
the command line answers at once.
"""

from __future__ import annotations

import dataclasses
import html
import importlib.metadata
import itertools
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from medquad_utils import CourseError, machine
from medquad_utils.files import ASSETS, read_json, user_path
from medquad_utils.machine import Hardware
from medquad_utils.memory import Micro, training_memory
from medquad_utils.memory import Shape as Shape  # part of this module's interface

TINY_MODEL = ASSETS / "tiny"
# Source -> what its data_path names.
SOURCES = {"sample": "", "hub": "", "xml": "folder", "csv": "file", "jsonl": "file",
           "parquet": "file"}  # fmt: skip
LARGEST = 2**32 - 1  # number that a parameter may have; numpy takes no larger seed
ROOM = 0.92  # share of the memory that is planned with; fragments take some
MOST_RANK = 4096  # of an adapter: the width of the largest base
VARLEN = "medquad_varlen"  # attention within each example of a packed row (attention.py)
# Tokens of a packed row at most: what is fastest by the course's own estimate. SDPA compares every
# token with the whole row and masks the rest. A CPU's caches hold short rows only.
MAX_PACK = {VARLEN: 8192, "sdpa": 2048, "cpu": 512}


@dataclass(frozen=True)
class Profile:
    """What is studied: the model, the data and the sizes of a run."""

    name: str
    model_id: str
    revision: str | None
    shape: Shape
    source: str
    rows: int  # training rows at most; 0 = all
    eval_rows: int  # rows of validation and of test at most
    max_length: int  # tokens of one example
    tokens_per_step: int  # real tokens of one optimizer step
    learning_rate: float
    epochs: int
    max_new_tokens: int
    licence: str  # of the base: an id of assets/licences.toml
    gpu_gb: int = 0  # of the smallest card on which ``auto`` takes it
    gated: bool = False  # the Hub asks for a token
    lora_r: int = 16
    lora_dropout: float = 0.0  # any would cost 5 to 8 % of a step at 8 B, 20 % on a CPU


LLAMA: dict[str, Any] = {
    "rows": 4000, "eval_rows": 200, "max_length": 1024, "tokens_per_step": 8192,
}  # fmt: skip
PROFILES = {p.name: p for p in (
    Profile("tiny", "embedded", None, Shape(256, 4, 640, 8, 4, 3072, tied=True), "sample",
            rows=0, eval_rows=150, max_length=256, tokens_per_step=1024,
            learning_rate=2e-3, epochs=3, max_new_tokens=64, licence="apache-2.0"),
    Profile("small", "HuggingFaceTB/SmolLM2-135M-Instruct",
            "12fd25f77366fa6b3b4b768ec3050bf629380bac",
            Shape(576, 30, 1536, 9, 3, 49152, tied=True), "hub",
            rows=2000, eval_rows=100, max_length=512, tokens_per_step=4096,
            learning_rate=5e-4, epochs=1, max_new_tokens=200, licence="apache-2.0", gpu_gb=2),
    Profile("llama-1b", "meta-llama/Llama-3.2-1B-Instruct",
            "9213176726f574b556790deb65791e0c5aa438b6",
            Shape(2048, 16, 8192, 32, 8, 128256, tied=True, head_dim=64), "hub",
            **LLAMA, learning_rate=2e-4, epochs=1, max_new_tokens=256, licence="llama3.2",
            gpu_gb=4, gated=True),
    Profile("llama-8b", "meta-llama/Meta-Llama-3-8B-Instruct",
            "5f0b02c75b57c5855da9ae460ce51323ea669d8a", Shape(4096, 32, 14336, 32, 8, 128256),
            "hub", **LLAMA, learning_rate=2e-4, epochs=1, max_new_tokens=256, licence="llama3",
            gpu_gb=14, gated=True),
)}  # fmt: skip
BASES = {profile.model_id: profile for profile in PROFILES.values()}


@dataclass(frozen=True)
class Fit:
    """The sizes of one training step: ``accumulation`` packed rows, one after the other."""

    accumulation: int
    max_length: int  # tokens of one example at most
    pack_length: int  # tokens of one packed row
    checkpointing: bool
    memory_gb: float  # predicted peak


@dataclass(frozen=True)
class Plan:
    """All settings of a run: frozen, printable, and saved beside the run's results."""

    profile: str
    model_id: str
    revision: str | None
    model_path: str  # a folder instead of the Hub; "" = model_id
    source: str
    data_path: str
    device: str  # where the model runs: "cpu" or "cuda"
    hardware: str
    compute_dtype: str  # of activations and of 4-bit matrix products
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
    card_gb: float  # memory of the card, or of the machine on a CPU
    why: str  # why this profile was taken
    # fp16 adapters break the gradient scaler; bf16 ones lose small updates, and peft 0.21 loads
    # them as fp32 when a run resumes.
    adapter_dtype: str = "float32"
    processes: int = 1  # that share every step, each on its own GPU
    sharded: bool = False  # FSDP: a process holds a part of the weights. DDP: each holds all
    attention: str = "sdpa"  # transformers' name of it
    gpus: int = 0  # of the machine
    fixed_fit: Fit | None = None  # sizes of a step set by hand; None = computed on first use

    @cached_property
    def fit(self) -> Fit:
        """The sizes of one training step here, as ``fit_step`` finds them on first use.

        Asking and serving never need them.
        """
        return self.fixed_fit or fit_step(self)

    def with_fit(self, **sizes: Any) -> Plan:
        """Return a copy in which some sizes of a step (fields of ``Fit``) are set by hand."""
        return dataclasses.replace(self, fixed_fit=dataclasses.replace(self.fit, **sizes))

    @property
    def sized(self) -> Profile:
        """The profile, sized for the plan's source."""
        return sized(PROFILES[self.profile], self.source)

    @property
    def shape(self) -> Shape:
        """The sizes of the base: those of a profile are listed, others are in ``config.json``."""
        if not self.model_path and self.model_id in BASES:
            return BASES[self.model_id].shape
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.model_source, revision=self.hub_revision)
            if any("expert" in name for name in config.to_dict()):
                raise ValueError(f"a {config.model_type} has experts, which are not counted")
            return Shape.of(config)
        except Exception as error:  # whatever the file holds, or the network does
            reason = str(error).splitlines()[0].replace(self.model_source, self.model_id)
            raise CourseError(
                f"model {self.model_id!r}: its sizes cannot be read ({reason})."
                " Expected OWNER/NAME or the folder of a Llama."
            ) from error

    def micro(self, tokens: int, checkpoint: bool = False) -> Micro:
        """Return a micro-batch of one packed row; ``checkpoint``: each block is recomputed."""
        return micro_of(vars(self), tokens, checkpoint)

    @property
    def folder(self) -> Path:
        """``<out>/<profile>``: where every stage of this plan writes."""
        return Path(self.out) / self.profile

    @property
    def on_hub(self) -> bool:
        """Whether the base comes from the Hub: not from a folder of this machine."""
        return self.model_source == self.model_id

    @property
    def hub_revision(self) -> str | None:
        """The commit of a model on the Hub, for ``from_pretrained``: pinned, or looked up."""
        return machine.hub_commit(self.model_id, self.revision) if self.on_hub else None

    @property
    def model_source(self) -> str:
        """The folder or Hub id for ``from_pretrained``; fetched weights win over the Hub's."""
        if self.model_id == "embedded":
            return self.model_path or str(TINY_MODEL)
        return self.model_path or str(machine.fetched(self.model_id) or self.model_id)

    @property
    def origin(self) -> str:
        """What the reader of an answer must know about the base's weights; mostly ""."""
        note = Path(self.model_source) / "origin.json"
        return str(read_json(note)["note"]) if note.is_file() else ""

    @property
    def launch(self) -> str:
        """The command for the machine's other GPUs, of as many as share a step evenly, or ""."""
        count = max(n for n in shares(self.sized) if n <= max(1, self.gpus))
        if self.processes > 1 or count == 1:
            return ""
        module = "medquad_utils.training"
        return f"torchrun --nproc_per_node {count} -m {module} --profile {self.profile}"

    def table(self) -> dict[str, str]:
        """Return the plan in plain words: what -> value."""
        model = f"{Path(self.model_path).name} (local folder)" if self.model_path else self.model_id
        commit = f" @ {found[:8]}" if (found := self.hub_revision) else ""  # may ask the Hub
        files = f" ({Path(self.data_path).name})" if self.data_path else ""
        steps = f"{self.epochs} epoch" + ("s" if self.epochs > 1 else "")
        each = f", in each of {self.processes} processes" if self.processes > 1 else ""
        others = f"this process takes 1 of {self.gpus}; to train on more: {self.launch}"
        try:
            fit = self.fit
            step = f"{fit.accumulation} x {fit.pack_length} tokens, "
            step += f"packed with rows of up to {fit.max_length}{each}"
            memory = f"{fit.memory_gb:.2f} GB of {self.card_gb:.0f} GB"
            again = ", activation checkpointing" if fit.checkpointing else ""
            again += ", FlashAttention on packed rows" if self.attention == VARLEN else ""
        except CourseError as error:  # a machine too small to train may still ask and serve
            step, memory, again = "none: this machine cannot train it", str(error), ""
        rows = {
            "profile": f"{self.profile} ({self.why})",
            "base model": model + commit,
            "weights": self.origin,
            "data": self.source + files,
            "runs on": self.hardware,
            "other GPUs": others if self.launch else "",
            "numbers": f"4-bit NF4 weights, {self.compute_dtype} compute, "
                       f"{self.adapter_dtype} adapters",
            "LoRA": f"rank {self.lora_r}, alpha {self.lora_alpha}, dropout {self.lora_dropout}, "
                    "all linear layers",
            "one step": step,
            "training": f"{f'{self.max_steps} steps' if self.max_steps else steps}, "
                        f"learning rate {self.learning_rate:g}, {self.optimizer}{again}",
            "rows": f"{self.rows or 'all'} for training, "
                    f"up to {self.eval_rows} each for validation and test",
            "predicted memory": memory,
            "results": machine.hosted_results(self.folder),
        }  # fmt: skip
        return {what: value for what, value in rows.items() if value}

    def __str__(self) -> str:
        rows = self.table()
        width = max(map(len, rows))
        return "\n".join(f"{what:<{width}}  {value}" for what, value in rows.items())

    __repr__ = __str__  # a notebook keeps this text beside the HTML: no path of this machine in it

    def _repr_html_(self) -> str:
        left = 'style="text-align:left"'
        cells = "".join(
            f"<tr><th {left}>{html.escape(what)}</th><td {left}>{html.escape(value)}</td></tr>"
            for what, value in self.table().items()
        )
        return f"<table>{cells}</table>"

    def as_dict(self, fit: bool = False) -> dict[str, Any]:
        """Return plain values for a JSON file, paths as names; ``fit`` adds the sizes of a step."""
        values = dataclasses.asdict(self)
        del values["fixed_fit"]
        names = {k: Path(values[k]).name for k in ("model_path", "data_path", "out")}
        return values | names | (dataclasses.asdict(self.fit) if fit else {})


def resolve(
    profile: str = "auto", *, hardware: Hardware | None = None, source: str = "",
    data_path: str = "", model: str = "", rows: int = 0, max_steps: int = 0, lora_r: int = 0,
    seed: int = 0, out: str = "",
) -> Plan:  # fmt: skip
    """Join a profile and the hardware to a plan; empty or zero arguments keep the profile's value.

    ``model`` replaces the profile's base: OWNER/NAME on the Hub, or a folder. Under a launcher the
    plan is one process's share of a step. Two side effects keep the lessons to one line: a notebook
    shows errors plainly, and without ``hardware`` this process takes one GPU (``detect``).
    """
    machine.show_errors_plainly()
    numbers = {"rows": rows, "max_steps": max_steps, "lora_r": lora_r, "seed": seed}
    for name, value in numbers.items():
        number(name, int, str(value))
    if lora_r > MOST_RANK:
        raise CourseError(f"lora_r={lora_r}: expected a rank of at most {MOST_RANK:,}.")
    if max_steps == 1:
        raise CourseError("max_steps=1: the first step only warms up. Expected 0, or at least 2.")
    if profile not in ("auto", *PROFILES):
        names = ", ".join(PROFILES)
        raise CourseError(f"unknown profile {profile!r}: expected auto, {names}. Set one of these.")
    hardware, why = hardware or machine.detect(), "as asked"
    if profile == "auto":
        profile, why = choose(hardware)
    source, data_path = find_data(source, data_path, PROFILES[profile].source)
    chosen = sized(PROFILES[profile], source)
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"  # of accelerate launch
    rank = lora_r or chosen.lora_r
    return Plan(
        profile=profile, **find_base(chosen, model), source=chosen.source, data_path=data_path,
        device=hardware.device, hardware=str(hardware), compute_dtype=compute_dtype(hardware),
        optimizer=optimizer(hardware, sharded), attention=attention(hardware),
        lora_r=rank, lora_alpha=2 * rank, lora_dropout=chosen.lora_dropout,
        learning_rate=chosen.learning_rate, epochs=chosen.epochs, max_steps=max_steps,
        rows=rows or chosen.rows, eval_rows=min(chosen.eval_rows, rows or chosen.eval_rows),
        max_new_tokens=chosen.max_new_tokens, seed=seed,
        out=str(user_path(out or machine.default_out())),
        card_gb=hardware.memory_gb, why=why, processes=machine.processes(), sharded=sharded,
        gpus=hardware.gpus,
    )  # fmt: skip


def number(name: str, kind: type, text: str) -> Any:
    """Read a parameter of ``kind`` int or float, from 0 to ``LARGEST``."""
    with suppress(ValueError):
        if text.isascii() and "_" not in text and 0 <= (value := kind(text)) <= LARGEST:
            return value
    what = "whole number" if kind is int else "number"
    raise CourseError(f"{name}={text}: expected a {what} from 0 to {LARGEST:,}.")


def choose(hardware: Hardware) -> tuple[str, str]:
    """Return the profile that ``auto`` takes, and why, with the step to the next larger one.

    On a CPU it is ``tiny``: everything else would take an hour unasked.
    """
    if hardware.device != "cuda":
        return "tiny", (
            "auto: no CUDA GPU; 'small' trains here in about an hour, if you ask for it; "
            "on Colab choose Runtime > Change runtime type > T4 GPU for a Llama"
        )
    gb, card, obstacle = hardware.memory_gb, f"a GPU with {hardware.memory_gb:.0f} GB", ""
    reachable = machine.hub_reachable()
    token, gap = bool(reachable and machine.hub_token()), machine.token_gap()
    hub = "the Hugging Face Hub is out of reach"
    accept = f"no HF_TOKEN{f' ({gap})' if gap else ''}: accept its licence on the Hub first"
    for name, profile in reversed(PROFILES.items()):  # the largest first
        loads = reachable and (token or not profile.gated)
        loads = loads or machine.is_here(profile.model_id, profile.revision)
        if gb >= profile.gpu_gb and loads:
            return name, f"auto: {card}{obstacle}"
        lacks = f"{profile.gpu_gb} GB" if gb < profile.gpu_gb else accept if reachable else hub
        obstacle = obstacle or f"; '{name}' needs more: {lacks}"
    return "tiny", f"auto: {card}{obstacle}"


def compute_dtype(hardware: Hardware) -> str:
    """Choose bf16 on GPUs of capability 8.0 and CPUs where it is fast, fp16 on older GPUs."""
    if hardware.device == "cuda":
        return "bfloat16" if (hardware.capability or (0, 0)) >= (8, 0) else "float16"
    return "bfloat16" if hardware.bf16_cpu else "float32"


def attention(hardware: Hardware) -> str:
    """Choose torch's variable-length kernel from capability 8.0 and torch 2.12 on, else SDPA."""
    major, minor, *_ = importlib.metadata.version("torch").split(".")
    new = (int(major), int(minor)) >= (2, 12) and (hardware.capability or (0, 0)) >= (8, 0)
    return VARLEN if new else "sdpa"


def optimizer(hardware: Hardware, sharded: bool) -> str:
    """Choose AdamW: fused on a GPU, paged and in 8 bits on one of 20 GB or less, plain elsewhere.

    FSDP2 cuts the tensors, which the 8-bit one of bitsandbytes 0.50 refuses.
    """
    if hardware.device != "cuda" or sharded:
        return "adamw_torch"
    return "adamw_torch_fused" if hardware.memory_gb > 20 else "paged_adamw_8bit"


def micro_of(plan: Mapping[str, Any], tokens: int, checkpoint: bool) -> Micro:
    """Return a packed row of ``tokens`` under the fields of a plan, as recorded with a run."""
    compute, adapter = (
        4 if plan[f"{name}_dtype"] == "float32" else 2 for name in ("compute", "adapter")
    )
    return Micro(
        tokens, plan["lora_r"], compute, adapter, checkpoint, dropout=plan["lora_dropout"] > 0,
        cuda=plan["device"] == "cuda", varlen=plan.get("attention") == VARLEN,
        adam_bytes=1 if "8bit" in plan["optimizer"] else adapter,
    )  # fmt: skip


def sized(profile: Profile, source: str) -> Profile:
    """Return the profile for ``source``: ``tiny`` takes fewer and longer rows of MedQuAD."""
    if profile.name != "tiny" or source == "sample":
        return dataclasses.replace(profile, source=source)
    return dataclasses.replace(
        profile, source=source, rows=240, eval_rows=40, max_length=512, epochs=2
    )


def find_data(source: str, data_path: str, usual: str) -> tuple[str, str]:
    """Return source and path, checked; without a source, the path's ending or ``usual`` names it.

    A fetched MedQuAD is used where no other path is given.
    """
    data_path = str(user_path(data_path)) if data_path else ""
    ending = Path(data_path.lower().removesuffix(".gz")).suffix[1:]
    kind = {"tsv": "csv", "xlsx": "csv", "json": "jsonl", "ndjson": "jsonl"}.get(ending, ending)
    source = source or (kind if kind in SOURCES else usual)
    if source not in SOURCES:
        raise CourseError(f"unknown source {source!r}: expected one of {', '.join(SOURCES)}.")
    if data_path and source == "sample":
        raise CourseError(
            f"source 'sample' reads no file, and data_path is {Path(data_path).name!r}. Name its "
            "kind, too: csv, jsonl, parquet or xml (--source; with medquad run: -p source=...)."
        )
    fetched = machine.fetched("MedQuAD")
    if fetched and not data_path and source in ("hub", "xml"):
        return "xml", str(fetched)  # the XML names diseases, the Hub's table does not
    if (kind := SOURCES[source]) and not data_path:
        todo = "Add --data-path PATH (with medquad run: -p data_path=PATH)"
        todo += ", or run: medquad fetch medquad" if source == "xml" else ""
        raise CourseError(f"source {source!r} needs data_path: the {kind} to read. {todo}")
    return source, data_path


def find_base(profile: Profile, model: str) -> dict[str, Any]:
    """Return the plan's model_id, revision and model_path; "" is the profile's own base."""
    path = user_path(model).parent if Path(model).name == "config.json" else user_path(model)
    if model and (path / "config.json").is_file():
        return {"model_id": path.resolve().name, "revision": None, "model_path": str(path)}
    if model and (path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model)):
        raise CourseError(
            f"model {model!r}: expected OWNER/NAME on the Hub, or a folder that holds config.json."
        )
    model_id = model or profile.model_id
    revision = BASES[model_id].revision if model_id in BASES else None
    return {"model_id": model_id, "revision": revision, "model_path": ""}


def fit_step(plan: Plan) -> Fit:
    """Return the first training step that fits in memory, in the order of what is faster.

    The longest examples come first: longer ones are left out of the data. Then come the longest
    packed rows, because each micro-batch dequantises all weights once. Activation checkpointing
    comes last: it computes the forward pass a second time.
    """
    profile, shape, counts = plan.sized, plan.shape, shares(plan.sized)
    if plan.processes not in counts:
        raise CourseError(
            f"{plan.processes} processes cannot share a step of {profile.tokens_per_step:,} tokens "
            f"evenly, and its size decides what is learned: launch {', '.join(map(str, counts))}."
        )

    def need(tokens: int, checkpoint: bool) -> float:
        return sum(training_memory(shape, plan.micro(tokens, checkpoint)).values())

    share = profile.tokens_per_step // plan.processes
    limit = MAX_PACK["cpu" if plan.device == "cpu" else plan.attention]
    for length in (profile.max_length >> n for n in range(3)):  # all sizes are powers of two
        most = max(length, min(share, limit))
        packs = [most >> n for n in range(most.bit_length()) if most >> n >= length]
        for checkpoint, tokens in itertools.product((False, True), packs):
            if (memory := need(tokens, checkpoint)) <= ROOM * plan.card_gb:
                return Fit(share // tokens, length, tokens, checkpoint, memory)
    smaller = [p.name for p in PROFILES.values() if p.shape.parameters < shape.parameters]
    raise CourseError(
        f"profile {profile.name} needs about {need(length, True) / ROOM:.1f} GB even for its "
        f"shortest rows, but this machine offers {plan.card_gb:.1f} GB. Choose a smaller profile "
        f"({', '.join(smaller) or 'none is left'}) or a larger card."
    )


def shares(profile: Profile) -> list[int]:
    """Return into how many equal parts, each of one example at least, a step can be cut."""
    whole = profile.tokens_per_step
    return [n for n in range(1, whole // profile.max_length + 1) if whole % n == 0]
