"""How fast QLoRA trains: the course's plan beside the upstream recipe, TRL's defaults and Unsloth, in the same run.

Run it from the root of the checkout: ``python tests/benchmarks/train_speed.py --profile tiny --levers``. See README.md beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]  # the checkout, whatever is installed, and the scripts beside this one

import random_llama  # noqa: E402
import torch  # noqa: E402
from data_speed import load, peak_mib  # noqa: E402

from medquad_utils import chat, data, training  # noqa: E402
from medquad_utils.estimate import flops_per_token  # noqa: E402
from medquad_utils.generation import load_base, load_tokenizer  # noqa: E402
from medquad_utils.lora import lora_b_norms, lora_config, trainable_parameters  # noqa: E402
from medquad_utils.profiles import TINY_MODEL, CourseError, Hardware, Plan, Shape, detect, resolve  # noqa: E402

RESULTS = HERE / "results"
LENGTHS = RESULTS / "lengths.json"
MAX_LENGTH = 512  # tokens of a row at most: the upstream recipe keeps no longer ones, and every arm trains on the same rows
PACKAGES = ("accelerate", "bitsandbytes", "datasets", "peft", "torch", "transformers", "trl")
T4 = ("T4", (7, 5))  # what --cap-gb plays
H200 = Hardware("cuda", "H200", 141, (9, 0), gpus=1)
UNMEASURED = "not measured yet"
LEVER_LIMIT = 120  # seconds that a lever may take on a CPU
FASTER = 1.2  # from here on a lever is faster than ours by more than figures waver on a shared machine
ARMS = {
    "a": "upstream: one row x 4, rank 8 on q, k, v, dropout 0.2; the rest as TRL sets it",
    "b": "TRL's defaults for QLoRA: SFTConfig left alone, our rank on all linear layers",
    "c": "ours: the course's plan",
    "d": "Unsloth, as its notebooks set it up, our rank on all linear layers",
}


# ---- rows -----------------------------------------------------------------------------------------------------------


def measure_lengths(folder: Path) -> dict[str, Any]:
    """Percentiles 0, 1 .. 100 of MedQuAD's prompt and answer lengths in tokens, after cleaning; numbers only.

    The tokenizer is the tiny model's. Llama's own, with 40 times its vocabulary, makes fewer tokens of the same text.
    """
    from transformers import AutoTokenizer

    from medquad_utils.cleaning import clean

    rows, _ = clean(data.load_xml(folder).rows)
    encoded = chat.encode_all(AutoTokenizer.from_pretrained(TINY_MODEL), rows)
    answers = [sum(e.in_loss) for e in encoded]
    prompts = [len(e.ids) - n for e, n in zip(encoded, answers, strict=True)]

    def percentiles(values: list[int]) -> list[int]:
        ordered = sorted(values)
        return [ordered[round(q / 100 * (len(ordered) - 1))] for q in range(101)]

    return {"tokenizer": "tiny", "rows": len(encoded), "prompt": percentiles(prompts), "answer": percentiles(answers)}


def draw_lengths(table: dict[str, Any], rows: int, most: int, seed: int = 0) -> list[tuple[int, int]]:
    """``rows`` pairs (prompt, answer) of lengths from the percentiles, each drawn alone; pairs of more than ``most`` tokens are redrawn.

    Raises:
        CourseError: no pair can be short enough.
    """
    if table["prompt"][0] + table["answer"][0] > most:
        raise CourseError(f"no row of the length table fits into {most} tokens: expected at least its shortest prompt and answer.")
    dice = random.Random(seed)

    def one(percentiles: Sequence[int]) -> int:
        place = dice.random() * (len(percentiles) - 1)
        low = int(place)
        return round(percentiles[low] + (place - low) * (percentiles[low + 1] - percentiles[low]))

    drawn: list[tuple[int, int]] = []
    while len(drawn) < rows:
        pair = one(table["prompt"]), one(table["answer"])
        if sum(pair) <= most:
            drawn.append(pair)
    return drawn


def make_rows(lengths: Iterable[tuple[int, int]], ids: Sequence[int], seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of random ``ids``, which hold no special token, with the prompt masked: what the trainer takes as tokenised already."""
    dice = random.Random(seed)
    rows = []
    for prompt, answer in lengths:
        tokens = dice.choices(ids, k=prompt + answer)
        rows.append({"input_ids": tokens, "labels": [chat.IGNORED] * prompt + tokens[prompt:]})
    return rows


def rows_per_step(plan: Plan, mean: float) -> int:
    """Rows of one optimizer step of the plan; of packed ones as many as ``mean`` tokens a row give."""
    return round(plan.accumulation * (plan.pack_length / mean if plan.packing else plan.batch_size)) or 1


# ---- what a step costs ----------------------------------------------------------------------------------------------


def matmul_rate() -> dict[str, Any]:
    """FLOP/s of a square matrix product, the best of ten: bf16 on a GPU, fp32 on a CPU."""
    cuda = torch.cuda.is_available()
    size, dtype = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    left = torch.randn(size, size, dtype=dtype, device="cuda" if cuda else "cpu")
    spent = []
    for _ in range(11):
        synchronize()
        start = time.perf_counter()
        left @ left
        synchronize()
        spent.append(time.perf_counter() - start)
    return {"dtype": str(dtype).removeprefix("torch."), "flops": 2 * size**3 / min(spent[1:])}


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory_gb(peak: bool = True) -> float:
    """GB (1e9 bytes): on a GPU what PyTorch has allocated at most, on a CPU the peak of the resident set, libraries included."""
    if torch.cuda.is_available():
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 1e9
    import psutil

    return peak_mib() * 2**20 / 1e9 if peak else psutil.Process().memory_info().rss / 1e9


def count(inputs: dict[str, torch.Tensor], pad: int) -> tuple[int, int, int]:
    """Of one micro-batch, (real tokens, computed tokens, rows): pads are computed and not real, a packed row starts at position 0."""
    ids = inputs["input_ids"]
    real = ids != pad
    starts = (inputs["position_ids"] == 0) & real if "position_ids" in inputs else real.any(dim=1)
    return int(real.sum()), ids.numel(), int(starts.sum())


def meter(trainer: Any, pad: int) -> list[dict[str, float]]:
    """A list that fills with one record an optimizer step as ``trainer`` trains: seconds, and the sums of ``count``."""
    from transformers import TrainerCallback

    steps: list[dict[str, float]] = []
    counted: list[tuple[int, int, int]] = []
    inner = trainer.training_step

    def training_step(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        counted.append(count(inputs, pad))
        return inner(model, inputs, *args, **kwargs)

    class Clock(TrainerCallback):
        last = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronize()
            now = time.perf_counter()
            real, computed, rows = (sum(column) for column in zip(*counted, strict=True))
            steps.append({"seconds": round(now - self.last, 4), "real": real, "computed": computed, "rows": rows})
            counted.clear()
            self.last = now

    trainer.training_step = training_step
    trainer.add_callback(Clock())
    return steps


# ---- levers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lever:
    """One change of one thing against ours, and why it is kept or dropped."""

    group: str
    setting: str
    why: str
    ours: Callable[[Plan], bool]  # whether a plan has this setting
    plan: Callable[[Plan], dict[str, Any]] = lambda plan: {}
    config: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[], None] = lambda: None
    model: Callable[[Any], None] = lambda model: None


def _padded(plan: Plan) -> dict[str, Any]:
    """About as many real tokens a micro-batch as the plan's packed row: padded rows are half full."""
    return {"pack_length": 0, "batch_size": 2 * plan.pack_length // plan.max_length}


def _alone(plan: Plan) -> dict[str, Any]:
    """The padded step one row at a time."""
    return {"pack_length": 0, "batch_size": 1, "accumulation": plan.accumulation * 2 * plan.pack_length // plan.max_length}


def _kernels(model: Any) -> None:
    model.set_use_kernels(True)


def _compile() -> None:
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = "inductor"  # what TrainingArguments(torch_compile=True) sets


def _tf32() -> None:
    from trl import SFTConfig

    SFTConfig(output_dir=tempfile.gettempdir(), tf32=True, bf16=False)  # sets the flag, or says why it cannot


def _checkpointing(**kwargs: Any) -> dict[str, Any]:
    return {"activation_checkpointing": True, "gradient_checkpointing": True, "activation_checkpointing_kwargs": kwargs or None}


def _of(name: str, value: Any) -> dict[str, Any]:
    """A field of the plan as a lever: who has it, and how to set it."""
    return {"ours": lambda plan: getattr(plan, name) == value, "plan": lambda plan: {name: value}}


LEVERS = (
    Lever("rows", "packed (bfd_split, batch 1)", "no pads; one long row a micro-batch spreads the cost of dequantising over real tokens",
          lambda p: p.packing),
    Lever("rows", "padded", "pads cost what real tokens cost", lambda p: not p.packing, _padded),
    Lever("rows", "one at a time", "no pads, but each row pays for dequantising all weights", lambda p: False, _alone),
    Lever("rows", "padding-free", "no pads, but rows of any length: memory that no plan can promise, a new shape each step",
          lambda p: False, _padded, {"padding_free": True, "max_length": None}),
    Lever("attention", "sdpa", "runs everywhere, keeps packed rows apart, needs nothing installed", **_of("attention", "sdpa")),
    Lever("attention", "eager", "holds every score: memory grows with the square of the row", **_of("attention", "eager")),
    Lever("attention", "flex_attention", "skips what lies between packed rows; needs a compiler", **_of("attention", "flex_attention")),
    Lever("attention", "FlashAttention-2 (kernels)", "needs a GPU from Ampere on and the Hub; the notebooks must run without either",
          **_of("attention", "kernels-community/flash-attn2")),
    Lever("kernels", "use_kernels", "needs the Hub at run time", lambda p: False, model=_kernels),
    Lever("checkpointing", "off", "kept where the memory allows: no second forward pass", lambda p: not p.checkpointing,
          config={"activation_checkpointing": False, "gradient_checkpointing": False}),
    Lever("checkpointing", "every 2nd layer", "between the two; the plan shortens the packed row first", lambda p: False,
          config=_checkpointing(every_n_layers=2)),
    Lever("checkpointing", "full", "44 instead of 30 GF a token at 8 B: only where nothing else fits", lambda p: p.checkpointing,
          config=_checkpointing()),
    Lever("checkpointing", "full, offloaded", "copies over the bus; saves nothing on a CPU", lambda p: False,
          config=_checkpointing(offload=True)),
    Lever("compile", "torch.compile", "compiles for minutes, again for new shapes; 4-bit layers break the graph",
          lambda p: False, prepare=_compile),
    Lever("optimizer", "adamw_torch", "nothing to gain on a CPU: adapters are small", **_of("optimizer", "adamw_torch")),
    Lever("optimizer", "adamw_torch_fused", "the optimizer's share of a step is too small to see", **_of("optimizer", "adamw_torch_fused")),
    Lever("optimizer", "adamw_8bit", "a quarter of the moments' memory; paged does it too and survives a spike",
          **_of("optimizer", "adamw_8bit")),
    Lever("optimizer", "paged_adamw_8bit", "moments leave a full card instead of ending the run; on a CPU there are no pages to move",
          **_of("optimizer", "paged_adamw_8bit")),
    Lever("dataloader", "2 workers", "rows are tokens already: there is nothing to prepare in the background", lambda p: False,
          config={"dataloader_num_workers": 2}),
    Lever("TF32", "on", "changes fp32 products alone; a GPU that has it computes in bf16", lambda p: False, prepare=_tf32),
    Lever("adapter dtype", "float32", "where the compute is not bf16: what SFTTrainer makes of it is cast back",
          **_of("adapter_dtype", "float32")),
    Lever("adapter dtype", "bfloat16", "half the memory beside bf16 compute; without bf16 units it crawls",
          **_of("adapter_dtype", "bfloat16")),
    Lever("compute dtype", "bfloat16", "from Ampere on; without bf16 units it crawls", **_of("compute_dtype", "bfloat16")),
)  # fmt: skip


# ---- arms -----------------------------------------------------------------------------------------------------------


def plan_for(profile: str, folder: Path | None = None, hardware: Hardware | None = None, most: int = MAX_LENGTH) -> Plan:
    """The course's plan for real MedQuAD, with rows of at most ``most`` tokens: what a reader's run is made of; "20m" has tiny's sizes.

    Raises:
        CourseError: no setting fits in memory.
    """
    plan = resolve("tiny" if profile == "20m" else profile, hardware=hardware, source="xml", data_path="MedQuAD",
                   model_path=str(folder or ""), out=tempfile.gettempdir())  # fmt: skip
    return dataclasses.replace(plan, max_length=min(most, plan.max_length))


# The same for every arm: no file, no evaluation, the rows in the order they were drawn. Without use_cpu, TRL's defaults refuse a CPU.
HARNESS: dict[str, Any] = {"save_strategy": "no", "eval_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
                           "num_train_epochs": 1, "train_sampling_strategy": "sequential",
                           "use_cpu": not torch.cuda.is_available()}  # fmt: skip


def upstream_settings(plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of SFTConfig and of LoraConfig in the public notebook; what it is not known to set is left alone."""
    config = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_length": MAX_LENGTH, "learning_rate": 1e-4,
              "lr_scheduler_type": "constant"}  # fmt: skip
    return config, {"r": 8, "lora_alpha": 16, "lora_dropout": 0.2, "target_modules": ["q_proj", "k_proj", "v_proj"]}


def default_settings(plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """SFTConfig left alone, and the plan's own adapter."""
    adapter = lora_config(plan)
    return {}, {name: getattr(adapter, name) for name in ("r", "lora_alpha", "lora_dropout", "target_modules")}


def plain_trainer(plan: Plan, rows: Sequence[dict[str, Any]], settings: tuple[dict[str, Any], dict[str, Any]]) -> Any:
    """SFTTrainer as TRL documents QLoRA: NF4 that computes in bf16, adapters left as the trainer makes them."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    config, adapter = settings
    plan = dataclasses.replace(plan, compute_dtype="bfloat16")
    return SFTTrainer(
        model=load_base(plan).train(), args=SFTConfig(output_dir=plan.out, **{**HARNESS, **config}),
        train_dataset=Dataset.from_list(list(rows)), processing_class=load_tokenizer(plan),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **adapter),
    )  # fmt: skip


def our_trainer(plan: Plan, rows: Sequence[dict[str, Any]], lever: Lever | None = None) -> Any:
    """``training.build_trainer`` on rows that are tokens already, with at most one lever moved."""
    from unittest.mock import patch

    from datasets import Dataset

    changes, model = dict(HARNESS), load_base(plan)
    if lever:
        changes |= lever.config
        lever.model(model.train())
    splits = data.Splits(list(rows), list(rows[:1]), [], {}, [])
    with patch.object(training, "to_dataset", lambda part: Dataset.from_list(list(part))):  # the rows have no text to make messages of
        return training.build_trainer(plan, model, load_tokenizer(plan), splits, Path(plan.out), **changes)


def unsloth_trainer(plan: Plan, rows: Sequence[dict[str, Any]]) -> Any:
    """Unsloth's own loader, adapters and checkpointing, with the batch and optimizer of its notebooks. Never run where this was written.

    Raises:
        CourseError: Unsloth is not installed.
    """
    if importlib.util.find_spec("unsloth") is None:
        raise CourseError("unsloth is not installed: pip install unsloth, on a machine with a GPU")
    from unsloth import FastLanguageModel  # isort: skip  # it patches trl, so it comes first

    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, _ = FastLanguageModel.from_pretrained(plan.model_source, max_seq_length=plan.max_length, load_in_4bit=True, dtype=None)
    model = FastLanguageModel.get_peft_model(
        model, r=plan.lora_r, lora_alpha=plan.lora_alpha, lora_dropout=0, target_modules=list(lora_config(plan).target_modules),
        use_gradient_checkpointing="unsloth", random_state=plan.seed,
    )  # fmt: skip
    config = SFTConfig(output_dir=plan.out, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_length=plan.max_length,
                       optim="adamw_8bit", learning_rate=plan.learning_rate, **HARNESS)  # fmt: skip
    return SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(list(rows)), processing_class=load_tokenizer(plan))


def build(arm: str, plan: Plan, rows: Sequence[dict[str, Any]], lever: Lever | None = None) -> Any:
    """The trainer of one arm."""
    if arm == "c":
        return our_trainer(plan, rows, lever)
    if arm == "d":
        return unsloth_trainer(plan, rows)
    return plain_trainer(plan, rows, upstream_settings(plan) if arm == "a" else default_settings(plan))


def step_rows(arm: str, plan: Plan, mean: float) -> int:
    """Rows of one optimizer step of an arm."""
    return {"a": 4, "b": 8, "d": 8}.get(arm) or rows_per_step(plan, mean)


Row = dict[str, list[int]]


def drawn_rows(plan: Plan, moved: Plan, arm: str, table: dict[str, Any], steps: int) -> tuple[list[Row], list[Row]]:
    """What the arm's first step takes to warm up, and the rows of ``steps`` of our steps, which are the same for every arm.

    ``moved`` is the plan with a lever's change, ``plan`` the one without.

    Raises:
        CourseError: more rows than there are lengths.
    """
    lengths = draw_lengths(table, 1000, plan.max_length, plan.seed)
    mean = statistics.mean(map(sum, lengths))
    measured, before = steps * rows_per_step(plan, mean), step_rows(arm, moved, mean)
    if measured + before > len(lengths):
        raise CourseError(f"{steps} steps need {measured + before} rows: expected at most {len(lengths)}. Lower --steps.")
    tokenizer = load_tokenizer(plan)
    known = _shape(plan).vocab
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    rows = make_rows(lengths, [i for i in range(known) if i not in special], plan.seed)[-(measured + before) :]
    return rows[:before], rows[before:]


def _shape(plan: Plan) -> Shape:
    from transformers import AutoConfig

    return Shape.of(AutoConfig.from_pretrained(plan.model_source))


def train(trainer: Any, pad: int) -> dict[str, Any]:
    """Train ``trainer`` to its end: the record of each step, memory, loss, and whether every adapter moved."""
    steps = meter(trainer, pad)
    loaded = memory_gb(peak=False)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    args = trainer.args
    skipped = (args.activation_checkpointing_kwargs or {}).get("every_n_layers", 1)
    layers = trainer.model.config.num_hidden_layers
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": steps, "loaded_gb": round(loaded, 3), "peak_gb": round(memory_gb(), 3),
        "recomputed": -(-layers // skipped) / layers if args.activation_checkpointing else 0.0,
        "batch": [args.per_device_train_batch_size, args.gradient_accumulation_steps], "optimizer": str(args.optim).split(".")[-1].lower(),
        "adapter_dtype": str(next(p for p in trainer.model.parameters() if p.requires_grad).dtype).removeprefix("torch."),
        "trainable": trainable_parameters(trainer.model),
        "idle_adapters": sum(not norm for norm in lora_b_norms(trainer.model).values()),
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
    }  # fmt: skip


def one(job: dict[str, Any]) -> dict[str, Any]:
    """One arm or lever, in this process."""
    if job["arm"] == "rate":
        return matmul_rate()
    hardware = None
    if cap := job["cap_gb"]:
        hardware = capped(cap)
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 1e9 / torch.cuda.get_device_properties(0).total_memory))
    plan = plan_for(job["profile"], Path(job["folder"]) if job["folder"] else None, hardware, job["max_length"])
    lever = LEVERS[job["lever"]] if job["lever"] is not None else None
    moved = dataclasses.replace(plan, out=job["out"], **(lever.plan(plan) if lever else {}))
    if lever:
        lever.prepare()
    table = json.loads(Path(job["lengths"]).read_text())
    first, rows = drawn_rows(plan, moved, job["arm"], table, job["steps"])
    trainer = build(job["arm"], moved, [*first, *rows], lever)
    made = train(trainer, load_tokenizer(plan).pad_token_id)
    return made | {"rows": len(rows), "row_tokens": sum(len(row["input_ids"]) for row in rows)}


def capped(cap_gb: float) -> Hardware:
    """A T4 of ``cap_gb``, played by the GPU of this machine.

    Raises:
        CourseError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise CourseError("--cap-gb plays a T4 on a larger card: expected a CUDA GPU. Leave it out on a CPU.")
    return Hardware("cuda", T4[0], cap_gb, T4[1], gpus=1)


def first_line(error: BaseException | str) -> str:
    """The first line of an error, without paths."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"(?:/[\w.+-]+){2,}", "(path)", text).replace("|", "/")[:200]


def spawn(job: dict[str, Any], limit: float) -> dict[str, Any]:
    """``one`` in a process of its own; what could not run gives its ``error`` instead."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "job.json"
        file.write_text(json.dumps(job | {"out": place}))
        try:
            done = subprocess.run([sys.executable, __file__, "--job", str(file)], capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {limit:.0f} s"}
    try:
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):  # killed, or ended by the runtime below Python
        return {"error": first_line(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"ended with {done.returncode}")}
    return answer


# ---- a run ----------------------------------------------------------------------------------------------------------


def figures(made: dict[str, Any], shape: Shape, rate: float) -> dict[str, Any]:
    """Rates of one arm from its steps after the first, which warms up; MFU against ``rate``, in FLOP/s.

    Packing sorts rows by length, so that the steps after the first hold other rows than a padded arm's. Samples a second and
    seconds a row are therefore tokens over the mean of the rows that all arms share; for a padded arm that is what was timed.
    """
    if "error" in made:
        return {}
    steps = made["steps"][1:]
    seconds, real, computed, rows = (sum(step[name] for step in steps) for name in ("seconds", "real", "computed", "rows"))
    mean = made["row_tokens"] / made["rows"]
    executed = flops_per_token(shape, made["recomputed"])
    return {
        "measured_steps": len(steps), "rows": rows,
        "tokens_per_s": round(real / seconds, 2), "rows_per_s": round(real / seconds / mean, 4),
        "seconds_per_step": round(seconds / len(steps), 4), "seconds_per_row": round(seconds / real * mean, 5),
        "pads": round(1 - real / computed, 4),
        "mfu_4n": round(real * flops_per_token(shape) / seconds / rate, 5), "mfu_executed": round(computed * executed / seconds / rate, 5),
    }  # fmt: skip


def ratios(arms: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ours over the other arms in real tokens a second, and their seconds a row over ours: against ours just before and after them."""
    made = {}
    for arm in "abd":
        other = arms.get(arm, {})
        if ours := other.get("against"):
            mean = other["row_tokens"] / other["rows"]
            made[f"tokens_per_s c/{arm}"] = round(ours / other["figures"]["tokens_per_s"], 2)
            made[f"seconds_per_row {arm}/c"] = round(other["figures"]["seconds_per_row"] * ours / mean, 2)
    return made


def median_run(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run of the middle speed (of an even number the slower of the two), or the first if none ran."""
    ran = sorted((run for run in runs if run["figures"]), key=lambda run: float(run["figures"]["tokens_per_s"]))
    return ran[(len(ran) - 1) // 2] if ran else runs[0]


def measure(options: argparse.Namespace, lengths: Path) -> dict[str, Any]:
    """Everything that the JSON holds of one profile."""
    profile, cap_gb, most = options.profile, options.cap_gb, min(options.max_length, MAX_LENGTH)
    hardware = capped(cap_gb) if cap_gb else detect()
    cuda = hardware.device == "cuda"
    steps, limit = options.steps or (10 if cuda else 8), options.limit or (1800 if cuda else 240)
    with tempfile.TemporaryDirectory() as place:
        folder = None if profile == "tiny" else random_llama.write(random_llama.SHAPES[profile], Path(place) / profile)
        plan = plan_for(profile, folder, hardware, most)
        job: dict[str, Any] = {"profile": profile, "folder": str(folder or ""), "steps": steps, "cap_gb": cap_gb, "lengths": str(lengths),
                               "lever": None, "max_length": most}  # fmt: skip
        shape, before = _shape(plan), load()
        rate = spawn(job | {"arm": "rate"}, limit)

        def run(arm: str, lever: int | None = None) -> dict[str, Any]:
            made = spawn(job | {"arm": arm, "lever": lever}, limit if lever is None or cuda else min(limit, LEVER_LIMIT))
            made["figures"] = figures(made, shape, rate["flops"])
            said = f"{made['figures']['tokens_per_s']:,.1f} tokens/s, {made['peak_gb']:.2f} GB" if made["figures"] else made["error"]
            print(f"{profile} {arm if lever is None else LEVERS[lever].group + ': ' + LEVERS[lever].setting}: {said}", flush=True)
            return made

        ours = [run("c")] if "c" in options.arms else []

        def beside(arm: str, lever: int | None = None) -> dict[str, Any]:
            """Run it, then ours once more: a shared machine drifts, and only neighbours compare."""
            made = run(arm, lever)
            if ours and made["figures"]:
                ours.append(run("c"))
                if near := [one["figures"]["tokens_per_s"] for one in ours[-2:] if one["figures"]]:
                    made["against"] = round(statistics.mean(near), 2)
            return made

        measured = {arm: beside(arm) for arm in options.arms.split(",") if arm != "c"}
        moved: list[dict[str, Any]] = []
        for number, lever in enumerate(LEVERS if options.levers else ()):
            entry: dict[str, Any] = {"group": lever.group, "setting": lever.setting}
            moved.append(entry | ({"ours": True} if lever.ours(plan) else beside("c", number)))
        if ours:
            measured["c"] = median_run(ours)
    return {
        "date": datetime.now(UTC).date().isoformat(), "machine": machine(), "load": [before, load()],
        "steps": steps, "cap_gb": cap_gb, "max_length": most,
        "shape": dataclasses.asdict(shape), "flops_per_token": flops_per_token(shape), "rate": rate,
        "plan": plan.as_dict() | {"out": ""}, "arms": dict(sorted(measured.items())), "ratios": ratios(measured), "levers": moved,
        "ours": [one["figures"].get("tokens_per_s", 0) for one in ours],
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """The device, the machine and the versions, without names of people or hosts."""
    import psutil

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name(0) if cuda else "CPU",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(), "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(), "cuda": torch.version.cuda or "",
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }  # fmt: skip


# ---- what is written ------------------------------------------------------------------------------------------------

MARKS = "<!-- figures: written by train_speed.py from results/train_speed_*.json -->", "<!-- end of the training figures -->"


def goals(devices: dict[str, dict[str, Any]]) -> str:
    """The issue's goals as a Markdown list, each with its figure or "not measured yet"; ``devices`` is what ``read_results`` gives."""
    cpu = devices.get("cpu", {})
    gpu = next((runs for name, runs in devices.items() if "h200" in name), {})
    full, capped_run = gpu.get("llama-8b", {}), next((run for run in gpu.values() if run["cap_gb"]), {})
    arms, large, tiny = full.get("arms", {}), full.get("ratios", {}), cpu.get("tiny", {}).get("ratios", {})

    def peak(arm: str) -> float | None:
        return arms[arm].get("peak_gb") if arm in arms else None

    def at_least(text: str, value: float | None, least: float, form: str = "{:.2f}") -> str:
        if value is None:
            return f"- {text}: {UNMEASURED}"
        return f"- {text}: {form.format(value)}, {'reached' if value >= least else '**not reached**'}"

    both = peak("b"), peak("c")
    spare = both[0] / both[1] if both[0] and both[1] else None
    trained = capped_run.get("arms", {}).get("c", {}).get("figures")
    return "\n".join((
        at_least("CPU, tiny: seconds a row, TRL's defaults over ours, at least 15", tiny.get("seconds_per_row b/c"), 15),
        at_least("H200, 8 B: ours over upstream in real tokens/s, at least 3", large.get("tokens_per_s c/a"), 3),
        at_least("H200, 8 B: ours over TRL's defaults in real tokens/s, at least 1.5", large.get("tokens_per_s c/b"), 1.5),
        at_least("H200, 8 B: ours over Unsloth in real tokens/s, at least 1", large.get("tokens_per_s c/d"), 1),
        at_least("H200, 8 B: MFU at 4N, at least 50 %", arms.get("c", {}).get("figures", {}).get("mfu_4n"), 0.5, "{:.1%}"),
        at_least("H200, 8 B: memory of TRL's defaults over ours, at least 1", spare, 1),
        f"- H200 capped at 15 GB, 8 B: the T4's plan trains: {'reached' if trained else '**not reached**' if capped_run else UNMEASURED}",
    ))  # fmt: skip


def arm_table(run: dict[str, Any]) -> list[str]:
    """One profile's arms as Markdown lines."""
    lines = ["| arm | real tokens/s | samples/s | s a step | rows a step | pads | peak, GB | MFU at 4N | MFU executed |", "|---" * 9 + "|"]
    for arm, made in run["arms"].items():
        if not (found := made["figures"]):
            lines.append(f"| {arm}, {ARMS[arm]} | {made['error']} |" + " |" * 7)
            continue
        lines.append(
            f"| {arm}, {ARMS[arm]} | {found['tokens_per_s']:,.0f} | {found['rows_per_s']:.2f} | {found['seconds_per_step']:.2f} | "
            f"{found['rows'] / found['measured_steps']:.0f} | {found['pads']:.0%} | {made['peak_gb']:.2f} | {found['mfu_4n']:.1%} | "
            f"{found['mfu_executed']:.1%} |"
        )
    return lines


def verdict(run: dict[str, Any], entry: dict[str, Any]) -> tuple[str, str]:
    """A lever's figure: tokens/s over ours (or why there is none), and the difference of the peak memory in GB."""
    ours = run["arms"]["c"]
    if entry.get("ours"):
        return "1 (ours)", "0"
    if not entry["figures"]:
        return entry["error"], ""
    return f"{entry['figures']['tokens_per_s'] / entry['against']:.2f}", f"{entry['peak_gb'] - ours['peak_gb']:+.2f}"


def lever_table(devices: dict[str, dict[str, Any]]) -> list[str]:
    """Every lever: its figures on a CPU and on a GPU, whether the plans of a CPU, an H200 and a T4 keep it, and why."""
    moved = [(name, run) for name, runs in devices.items() for run in runs.values() if run["levers"]]
    measured = {kind: next((run for name, run in moved if (name == "cpu") == (kind == "cpu")), None) for kind in ("cpu", "gpu")}
    cards = [Hardware("cpu", "CPU", 24, cores=2), H200, Hardware("cuda", T4[0], 15, T4[1], gpus=1)]
    plans = [plan_for(profile, hardware=card) for profile, card in zip(("tiny", "llama-8b", "llama-8b"), cards, strict=True)]
    lines = ["| lever | CPU: tokens/s over ours | CPU: memory, GB | CPU | GPU: tokens/s over ours | H200 | T4 | why |", "|---" * 8 + "|"]
    for number, lever in enumerate(LEVERS):
        cpu = verdict(measured["cpu"], measured["cpu"]["levers"][number]) if measured["cpu"] else (UNMEASURED, "")
        gpu = verdict(measured["gpu"], measured["gpu"]["levers"][number])[0] if measured["gpu"] else UNMEASURED
        kept = ["keep" if lever.ours(plan) else "drop" for plan in plans]
        if measured["cpu"] and kept[0] == "drop" and cpu[1] and float(cpu[0]) > FASTER:
            kept[0] = "open: faster than ours"
        lines.append(f"| {lever.group}: {lever.setting} | {cpu[0]} | {cpu[1]} | {kept[0]} | {gpu} | {kept[1]} | {kept[2]} | {lever.why} |")
    return lines


def tables(devices: dict[str, dict[str, Any]]) -> str:
    """The figures of all JSON files as Markdown."""
    lines = ["Goals of the issue:", "", goals(devices)]
    for runs in devices.values():
        for name, run in runs.items():
            host, table = run["machine"], run["rate"]
            versions = ", ".join(f"{package} {version}" for package, version in host["packages"].items())
            lines += [
                "",
                f"**{name}** on {host['device']}: {run['date']}, {host['cpus']} CPU cores, {host['threads']} threads, "
                f"{host['memory_gib']} GiB, {host['system']}, Python {host['python']}, {versions}; "
                f"load average {run['load'][0]} before, {run['load'][1]} after. {run['flops_per_token'] / 1e9:.3g} GF a token at 4N; "
                f"matrix products in {table['dtype']}: {table['flops'] / 1e9:,.0f} GFLOP/s.",
                "",
                *arm_table(run),
            ]
            if run["ratios"]:
                lines += ["", "; ".join(f"{what}: {value:.2f}" for what, value in run["ratios"].items()) + "."]
            if len(run["ours"]) > 1:
                low, high = min(run["ours"]), max(run["ours"])
                lines += [
                    "",
                    f"Ours ran {len(run['ours'])} times, before and after each of the others: {low:,.0f} to {high:,.0f} tokens/s.",
                ]
    return "\n".join([*lines, "", *lever_table(devices)])


def read_results(folder: Path, script: str = "train_speed") -> dict[str, dict[str, Any]]:
    """Device -> profile -> run, of every JSON file of a ``script`` in ``folder``."""
    files = sorted(folder.glob(f"{script}_*.json"))
    return {file.stem.removeprefix(f"{script}_"): json.loads(file.read_text(encoding="utf-8")) for file in files}


def between(text: str) -> str:
    """What stands between the two marks of README.md."""
    return data.between(text, MARKS)


def write_readme(devices: dict[str, dict[str, Any]], file: Path) -> None:
    """Put ``tables`` between the marks of README.md."""
    data.write_between(file, MARKS, tables(devices))


def save(run: dict[str, Any], profile: str, folder: Path, script: str = "train_speed") -> Path:
    """Put the run into its device's JSON file, beside the runs of other profiles there; returns the file."""
    device = re.sub(r"\W+", "_", run["machine"]["device"].lower())
    file = folder / f"{script}_{device}.json"
    runs = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    name = profile + (f", {run['cap_gb']:g} GB" if run.get("cap_gb") else "")
    data.write_json(file, runs | {name: run})
    return file


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=sorted(random_llama.SHAPES), default="tiny")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="measured steps of ours (default 10 on a GPU, 8 on a CPU)")
    parser.add_argument("--xml", type=Path, metavar="DIR", help="make lengths.json anew from a clone of the MedQuAD XML")
    parser.add_argument("--max-length", type=int, default=MAX_LENGTH, metavar="N", help="tokens of a row at most (default 512)")
    parser.add_argument("--arms", default="a,b,c,d", help="which arms, with commas between (default all)")
    parser.add_argument("--levers", action="store_true", help="move one lever at a time against ours, too")
    parser.add_argument("--cap-gb", type=float, default=0, metavar="GB", help="play a T4 with this much memory (CUDA only)")
    parser.add_argument("--limit", type=float, default=0, metavar="S", help="seconds an arm may take (default 1800 on a GPU, 240 on a CPU)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the JSON goes")
    parser.add_argument("--readme", action="store_true", help="measure nothing, write README.md from the JSON")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # one arm, in this process
    options = parser.parse_args()
    if options.job:
        try:
            answer = one(json.loads(options.job.read_text()))
        except Exception as error:  # whatever stops an arm is its result
            answer = {"error": first_line(error)}
        print("\n" + json.dumps(answer), flush=True)
        return 0
    try:
        if not options.readme:
            print("written:", run_profile(options).name)
    except CourseError as error:
        print(f"train_speed: {error}", file=sys.stderr)
        return 1
    if options.out == RESULTS:
        write_readme(read_results(RESULTS), HERE / "README.md")
    return 0


def run_profile(options: argparse.Namespace) -> Path:
    """Measure what the command line asked for; returns the JSON file.

    Raises:
        CourseError: an unknown arm, levers without ours, or what a plan refuses.
    """
    arms = options.arms.split(",")
    if unknown := set(arms) - set(ARMS):
        raise CourseError(f"unknown arm {', '.join(sorted(unknown))}: expected some of {','.join(ARMS)}.")
    if options.levers and "c" not in arms:
        raise CourseError("levers are moved against ours: expected c among --arms.")
    lengths = LENGTHS
    if options.xml:
        lengths = options.out / "lengths.json"
        data.write_json(lengths, measure_lengths(options.xml))
    return save(measure(options, lengths), options.profile, options.out)


if __name__ == "__main__":
    sys.exit(main())
