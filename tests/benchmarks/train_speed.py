"""How fast QLoRA trains: the course's plan beside the upstream recipe and TRL's defaults.

    python tests/benchmarks/train_speed.py --levers                    # on two idle cores
    python tests/benchmarks/train_speed.py --profile small --steps 2   # the real SmolLM2

README.md says what each arm is and what the figures mean. What one setting is worth on a GPU,
on_gpu.py measures: it loads the base once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import numpy
import random_llama
import torch
from datasets import Dataset
from transformers import AutoConfig, TrainerCallback

from medquad_utils import CourseError, chat, data, files, training
from medquad_utils.cleaning import clean
from medquad_utils.estimate import flops_per_token
from medquad_utils.generation import load_base, load_tokenizer
from medquad_utils.lora import lora_b_norms, lora_config, trainable_parameters
from medquad_utils.profiles import Plan, Shape, resolve

LENGTHS = common.RESULTS / "lengths.json"
MAX_LENGTH = 512  # the upstream recipe keeps no longer rows, and every arm trains on the same rows
LIMIT = 240  # seconds of an arm, loading included; a lever gets half of it
REAL = ("tiny", "small")  # profiles whose own weights are loaded; the others get random ones
ARMS = {
    "a": "upstream: one row x 4, rank 8 on q, k, v, dropout 0.2; the rest as TRL sets it",
    "b": "TRL's defaults for QLoRA: SFTConfig left alone, our rank on all linear layers",
    "c": "ours: the course's plan",
}
Row, Work = dict[str, list[int]], Callable[[dict[str, Any]], dict[str, Any]]


def measure_lengths(folder: Path) -> dict[str, Any]:
    """Return percentiles 0, 1 .. 100 of MedQuAD's prompt and answer tokens after cleaning."""
    tokenizer, rows = load_tokenizer(plan_for("tiny")), clean(data.load_xml(folder).rows)[0]
    learned = [chat.encode(tokenizer, row).in_loss for row in rows]
    counts = {n: [row.count(n == "answer") for row in learned] for n in ("prompt", "answer")}
    cuts = {n: numpy.percentile(v, range(101), method="nearest") for n, v in counts.items()}
    return {"tokenizer": "tiny", "rows": len(rows)} | {n: cut.tolist() for n, cut in cuts.items()}


def draw_lengths(table: dict[str, Any], rows: int, most: int, seed: int) -> list[tuple[int, int]]:
    """Draw pairs (prompt, answer) of lengths from the percentiles, of at most ``most`` tokens."""
    if table["prompt"][0] + table["answer"][0] > most:
        raise CourseError(f"--max-length {most}: expected at least the shortest prompt and answer.")
    dice, drawn, cuts = random.Random(seed), [], (table["prompt"], table["answer"])
    while len(drawn) < rows:
        pair = [round(numpy.interp(100 * dice.random(), range(101), cut)) for cut in cuts]
        drawn += [(pair[0], pair[1])] if sum(pair) <= most else []
    return drawn


def rows_per_step(plan: Plan, mean: float, config: dict[str, Any]) -> int:
    """Return the rows of one optimizer step; packed rows hold ``mean`` tokens each."""
    in_batch = config.get("per_device_train_batch_size", plan.fit.pack_length / mean)
    return round(config.get("gradient_accumulation_steps", plan.fit.accumulation) * in_batch) or 1


def drawn_rows(
    plan: Plan, config: dict[str, Any], arm: str, table: dict[str, Any], steps: int
) -> tuple[list[Row], list[Row]]:
    """Return the rows of the arm's warm-up step, and those of ``steps`` of our steps for every arm.

    They are random ids with the prompt masked. ``config`` is a lever's change of the SFTConfig.
    """
    lengths = draw_lengths(table, 1000, plan.fit.max_length, plan.seed)
    mean = statistics.mean(map(sum, lengths))
    measured = steps * rows_per_step(plan, mean, {})
    before = {"a": 4, "b": 8}.get(arm) or rows_per_step(plan, mean, config)
    if measured + before > len(lengths):
        raise CourseError(f"--steps {steps} needs more than {len(lengths)} rows: choose fewer.")
    tokenizer = load_tokenizer(plan)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = [i for i in range(shape_of(plan).vocab) if i not in special]
    dice, rows = random.Random(plan.seed), []
    for prompt, answer in lengths:
        tokens = dice.choices(ids, k=prompt + answer)
        rows.append({"input_ids": tokens, "labels": [chat.IGNORED] * prompt + tokens[prompt:]})
    return rows[-measured - before : -measured], rows[-measured:]


def matmul_rate() -> dict[str, Any]:
    """Return the FLOP/s of a square matrix product: bf16 on a GPU, fp32 on a CPU."""
    cuda = torch.cuda.is_available()
    size, dtype = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    left = torch.randn(size, size, dtype=dtype, device="cuda" if cuda else "cpu")
    best = min(common.seconds(lambda: left @ left) for _ in range(11))
    return {"dtype": str(dtype).removeprefix("torch."), "flops": 2 * size**3 / best}


def count(inputs: dict[str, torch.Tensor], pad: int) -> tuple[int, int, int]:
    """Count (real tokens, computed tokens, rows) of a micro-batch; a packed row starts at 0."""
    ids, real = inputs["input_ids"], inputs["input_ids"] != pad
    packed = "position_ids" in inputs
    starts = (inputs["position_ids"] == 0) & real if packed else real.any(dim=1)
    return int(real.sum()), ids.numel(), int(starts.sum())


def meter(trainer: Any, pad: int, limit: float = math.inf) -> list[dict[str, float]]:
    """Return a list that gets one record an optimizer step: seconds, and the sums of ``count``.

    Training stops with the step that ends after ``limit`` seconds.
    """
    steps: list[dict[str, float]] = []
    counted: list[tuple[int, int, int]] = []
    inner = trainer.training_step

    def training_step(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        counted.append(count(inputs, pad))
        return inner(model, inputs, *args, **kwargs)

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.first = self.last = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            common.synchronize()
            now = time.perf_counter()
            real, computed, rows = (sum(column) for column in zip(*counted, strict=True))
            sums = {"real": real, "computed": computed, "rows": rows}
            steps.append({"seconds": round(now - self.last, 4), **sums})
            counted.clear()
            self.last = now
            control.should_training_stop |= now - self.first > limit

    trainer.training_step = training_step
    trainer.add_callback(Clock())
    return steps


def plan_for(profile: str, folder: str = "", most: int = MAX_LENGTH, **more: Any) -> Plan:
    """Return the plan for real MedQuAD, rows of at most ``most`` tokens; "20m" has tiny's."""
    settings = {"source": "xml", "data_path": "MedQuAD", "out": tempfile.gettempdir()} | more
    plan = resolve(profile.replace("20m", "tiny"), model=folder, **settings)
    return plan.with_fit(max_length=min(most, plan.fit.max_length))


def shape_of(plan: Plan) -> Shape:
    """Read the shape of the plan's model."""
    return Shape.of(AutoConfig.from_pretrained(plan.model_source))


def levers(plan: Plan) -> dict[str, tuple[Plan, dict[str, Any]]]:
    """Return one change each: the plan, and fields of the ``SFTConfig``."""
    # As many real tokens a micro-batch as in the packed row: padded rows are half full.
    batch = 2 * plan.fit.pack_length // plan.fit.max_length
    padded = {
        "packing": False,
        "per_device_train_batch_size": batch,
        "max_length": plan.fit.max_length,
    }
    one = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": batch * plan.fit.accumulation,
    }
    dtypes = (
        ("adapter", "float32"), ("adapter", "bfloat16"),
        ("compute", "float32"), ("compute", "bfloat16"),
    )  # fmt: skip
    moved = dataclasses.replace
    return {
        "rows: packed (bfd_split, batch 1)": (plan, {}),
        "rows: padded": (plan, padded),
        "rows: one at a time": (plan, padded | one),
        "rows: padding-free": (plan, padded | {"padding_free": True, "max_length": None}),
        **{f"{part} dtype: {v}": (moved(plan, **{f"{part}_dtype": v}), {}) for part, v in dtypes},
        "checkpointing: full": (plan.with_fit(checkpointing=True), {}),
    }


# The same for every arm: no files, no evaluation, the rows in the order they were drawn.
HARNESS: dict[str, Any] = {
    "save_strategy": "no", "eval_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "logging_steps": 1, "num_train_epochs": 1, "train_sampling_strategy": "sequential",
    "use_cpu": not torch.cuda.is_available(),  # TRL's defaults refuse a CPU without it
}  # fmt: skip


def plain_trainer(arm: str, plan: Plan, rows: Sequence[Row]) -> Any:
    """Build arm a or b: SFTTrainer as TRL documents QLoRA, NF4 that computes in bf16."""
    from trl import SFTConfig, SFTTrainer

    adapter, config = lora_config(plan), dict(HARNESS)
    if arm == "a":  # what the public notebook is not known to set is left alone
        adapter.r, adapter.lora_alpha, adapter.lora_dropout = 8, 16, 0.2
        adapter.target_modules = {"q_proj", "k_proj", "v_proj"}
        config |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        config |= {"max_length": MAX_LENGTH, "learning_rate": 1e-4, "lr_scheduler_type": "constant"}
    return SFTTrainer(
        model=load_base(dataclasses.replace(plan, compute_dtype="bfloat16")).train(),
        args=SFTConfig(output_dir=plan.out, **config),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=load_tokenizer(plan),
        peft_config=adapter,
    )


def our_trainer(config: dict[str, Any], plan: Plan, rows: Sequence[Row], model: Any = None) -> Any:
    """Build arm c: ``training.build_trainer`` on rows that are tokens already."""
    both = data.Splits(list(rows), list(rows[:1]), [])
    model, tokenizer, config = model or load_base(plan), load_tokenizer(plan), HARNESS | config
    with patch.object(training, "to_dataset", lambda part: Dataset.from_list(list(part))):
        return training.build_trainer(plan, model, tokenizer, both, Path(plan.out), **config)


def train(trainer: Any, pad: int, limit: float = math.inf) -> dict[str, Any]:
    """Train to the end; returns the record of each step, memory, loss and idle adapters.

    The peak is what PyTorch allocated on a GPU, or the resident set of a CPU's process.
    """
    cuda, model = torch.cuda.is_available(), trainer.model
    steps = meter(trainer, pad, limit)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else common.status_gb("VmHWM")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    idle = sum(not norm for norm in lora_b_norms(model).values())
    return {
        "steps": steps, "peak_gb": round(peak, 3), "loss": [losses[0], losses[-1]],
        "trainable": trainable_parameters(model), "idle_adapters": idle,
    }  # fmt: skip


@contextmanager
def at_most(limit: float) -> Iterator[None]:
    """Stop the block after ``limit`` seconds, whatever it does."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"stopped after {limit:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def here(job: dict[str, Any]) -> dict[str, Any]:
    """Run one arm or lever in this process; what stops it is its result.

    A slow one ends with the step that it is at after two thirds of its time.
    """
    try:
        if (arm := job["arm"]) == "rate":
            return matmul_rate()
        plan = plan_for(job["profile"], job["folder"], job["max_length"])
        moved, config = levers(plan)[job["lever"]] if job["lever"] else (plan, {})
        table = json.loads(LENGTHS.read_text())
        with tempfile.TemporaryDirectory() as place, at_most(job["limit"]):
            moved = dataclasses.replace(moved, out=place)
            first, rows = drawn_rows(plan, config, arm, table, job["steps"])
            build = partial(our_trainer, config) if arm == "c" else partial(plain_trainer, arm)
            trainer = build(moved, [*first, *rows])
            made = train(trainer, load_tokenizer(plan).pad_token_id, job["limit"] * 2 / 3)
        if len(made["steps"]) < 2:
            raise TimeoutError("no step after the one that warms up")
    except Exception as error:
        return {"error": common.first_line(error)}
    return made | {"rows": len(rows), "row_tokens": sum(len(row["input_ids"]) for row in rows)}


def apart(job: dict[str, Any]) -> dict[str, Any]:
    """Run ``here`` in a process of its own, so that its peak of memory is its own."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=job["limit"] + 30)
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {job['limit'] + 30:.0f} s"}
    except (IndexError, json.JSONDecodeError):
        return {"error": f"ended with {done.returncode}"}
    return answer


def figures(made: dict[str, Any], shape: Shape, rate: float) -> dict[str, Any]:
    """Return an arm's rates from its steps after the first, which warms up; MFU against ``rate``.

    Packing sorts rows by length, so that these steps hold other rows than a padded arm's. A row
    therefore counts as the mean of the rows that all arms share.
    """
    if "error" in made:
        return {}
    steps = made["steps"][1:]
    names = ("seconds", "real", "computed", "rows")
    spent, real, computed, rows = (sum(step[name] for step in steps) for name in names)
    mean = made["row_tokens"] / made["rows"]
    return {
        "measured_steps": len(steps), "rows": rows, "pads": round(1 - real / computed, 4),
        "tokens_per_s": round(real / spent, 2), "rows_per_s": round(real / spent / mean, 4),
        "seconds_per_step": round(spent / len(steps), 4),
        "mfu_4n": round(real * flops_per_token(shape) / spent / rate, 5),
    }  # fmt: skip


def ratios(arms: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Compare each arm with the runs of ours just before and after it."""
    ran = {arm: made for arm, made in arms.items() if "against" in made}
    speeds = {arm: made["figures"]["tokens_per_s"] for arm, made in ran.items()}
    return {f"tokens_per_s c/{a}": round(ran[a]["against"] / speeds[a], 2) for a in ran}


class Session:
    """Runs of one profile; each stands between two of ours, because a shared machine drifts."""

    def __init__(self, job: dict[str, Any], shape: Shape, work: Work, budget: float) -> None:
        self.job, self.shape, self.work = job, shape, work
        self.end = time.monotonic() + budget
        self.rate = work(job | {"arm": "rate", "limit": LIMIT})
        self.ours = [self.run("c")]

    def run(self, arm: str, lever: str = "") -> dict[str, Any]:
        """Run one arm or lever and add its figures."""
        limit = LIMIT / 2 if lever else LIMIT
        made = self.work(self.job | {"arm": arm, "lever": lever, "limit": limit})
        if arm == "c" and not lever and "error" in made:
            raise CourseError(f"ours does not run: {made['error']}")
        made["figures"] = figures(made, self.shape, self.rate["flops"])
        print(lever or arm, made["figures"].get("tokens_per_s", made.get("error")), flush=True)
        return made

    def beside(self, arm: str, lever: str = "") -> dict[str, Any]:
        """Run it, then ours once more, and note the mean of ours before and after."""
        if time.monotonic() > self.end:
            return {"error": "no time was left"}
        made = self.run(arm, lever)
        if made["figures"]:
            self.ours.append(self.run("c"))
            near = [run["figures"]["tokens_per_s"] for run in self.ours[-2:]]
            made["against"] = round(statistics.mean(near), 2)
        return made


def measure(options: argparse.Namespace, work: Work) -> dict[str, Any]:
    """Measure everything that the JSON holds of one profile."""
    profile, steps, most = options.profile, options.steps, min(options.max_length, MAX_LENGTH)
    with tempfile.TemporaryDirectory() as place:
        shape = random_llama.SHAPES[profile]
        folder = "" if profile in REAL else str(random_llama.write(shape, Path(place) / profile))
        plan = plan_for(profile, folder, most=most)
        job = {"profile": profile, "folder": folder, "steps": steps, "max_length": most}
        session = Session(job, shape_of(plan), work, options.budget)
        measured, moved = {arm: session.beside(arm) for arm in options.arms}, []
        for name, (other, config) in levers(plan).items() if options.levers else ():
            ours = not config and other.as_dict(fit=True) == plan.as_dict(fit=True)
            made = {"ours": True} if ours else session.beside("c", name)
            moved.append(dict(zip(("group", "setting"), name.split(": "), strict=True)) | made)
    by_speed = sorted(session.ours, key=lambda run: run["figures"]["tokens_per_s"])
    measured["c"] = by_speed[(len(by_speed) - 1) // 2]
    return common.record() | {
        "steps": steps, "max_length": most, "shape": dataclasses.asdict(session.shape),
        "flops_per_token": flops_per_token(session.shape), "rate": session.rate,
        "plan": plan.as_dict(fit=True) | {"out": ""}, "arms": measured, "ratios": ratios(measured),
        "levers": moved, "ours": [run["figures"]["tokens_per_s"] for run in session.ours],
    }  # fmt: skip


def arm_table(run: dict[str, Any]) -> list[str]:
    """Return one profile's arms as the lines of a Markdown table."""
    head, rows = "arm|real tokens/s|samples/s|s a step|rows a step|pads|peak, GB|MFU at 4N", []
    form = "{tokens_per_s:,.0f}|{rows_per_s:.2f}|{seconds_per_step:.2f}|{a_step:.0f}|{pads:.0%}"
    for arm, name in ARMS.items():
        made = run["arms"].get(arm, {"error": "not run"})
        cells = [made.get("error", "")]
        if found := made.get("figures"):
            a_step = found["rows"] / found["measured_steps"]
            cells = form.format(**found, a_step=a_step).split("|")
            cells += [f"{made['peak_gb']:.2f}", f"{found['mfu_4n']:.1%}"]
        rows.append([f"{arm}, {name}", *cells])
    return common.table(head, rows)


def lever_table(run: dict[str, Any]) -> list[str]:
    """Return the levers of a run as the lines of a Markdown table."""
    rows = []
    for entry in run["levers"]:
        row = ["1 (ours)", "0"] if entry.get("ours") else [entry.get("error", "")]
        if found := entry.get("figures"):
            more = entry["peak_gb"] - run["arms"]["c"]["peak_gb"]
            row = [f"{found['tokens_per_s'] / entry['against']:.2f}", f"{more:+.2f}"]
        rows.append([f"{entry['group']}: {entry['setting']}", *row])
    return common.table("lever|tokens/s over ours|memory, GB", rows)


def page(devices: dict[str, dict[str, Any]]) -> str:
    """Return the figures of all JSON files as Markdown."""
    lines: list[str] = []
    for profile, run in ((name, run) for runs in devices.values() for name, run in runs.items()):
        rate, ours = run["rate"], run["ours"]
        cost = f"{run['flops_per_token'] / 1e9:.3g} GF a token at 4N"
        product = f"matrix products in {rate['dtype']}: {rate['flops'] / 1e9:,.0f} GFLOP/s"
        span = f"{len(ours)} times, at {min(ours):,.0f} to {max(ours):,.0f} tokens/s"
        lines += [f"{common.about(profile, run)} {cost}; {product}.", "", *arm_table(run), ""]
        lines += ["; ".join(f"{k}: {ratio:.2f}" for k, ratio in ratios(run["arms"]).items()) + "."]
        lines += [f"Ours ran {span}.", "", *(lever_table(run) if run["levers"] else ()), ""]
    return "\n".join(lines).strip()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; returns the run."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--profile", choices=sorted(random_llama.SHAPES), default="tiny")
    add("--steps", type=int, default=8, metavar="N", help="measured steps of ours")
    add("--max-length", type=int, default=MAX_LENGTH, metavar="N", help="tokens of a row at most")
    add("--arms", nargs="*", choices=("a", "b"), default=["a", "b"], help="the arms beside ours")
    add("--levers", action="store_true", help="also move one setting at a time")
    add("--budget", type=float, default=math.inf, metavar="S", help="begin no arm after that")
    add("--lengths", type=Path, metavar="DIR", help="make lengths.json anew from the MedQuAD XML")
    add("--smoke", action="store_true", help="ours and TRL's, some steps; writes nothing")
    add("--job", type=json.loads, help=argparse.SUPPRESS)  # one arm, in this process
    options = parser.parse_args(arguments)
    if options.job:
        return here(options.job)
    if options.smoke:
        few = ["--arms", "b", "--steps", "1", "--max-length", "64"]
        return measure(parser.parse_args(few), here)
    if options.lengths:
        files.write_json(LENGTHS, measure_lengths(options.lengths))
    # A GPU's peak is reset for each arm. A CPU's is that of the process, so an arm gets its own.
    run = measure(options, here if torch.cuda.is_available() else apart)
    common.save("train_speed", options.profile, run)
    common.write_readme("train_speed", page(common.read_results("train_speed")))
    return run


if __name__ == "__main__":
    print("\n" + json.dumps(main()), flush=True)
