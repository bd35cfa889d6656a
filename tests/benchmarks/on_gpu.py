"""What a quarter of an hour on one GPU can settle about the course's plan, the most telling first.

    python tests/benchmarks/on_gpu.py --profile llama-8b --budget 540 --out results
    python tests/benchmarks/on_gpu.py --profile tiny --budget 120      # a dry run on a CPU

One process, no network, weights drawn at random. One JSON line a check goes to ``on_gpu.jsonl``; a
check that fails is a line with "error", one that the budget has no time for a line with "skipped".
The plan's own speed goes to ``train_speed_<device>.json`` as well: copied to the package's
``assets/measured``, it replaces the estimate.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import common
import generate_speed
import random_llama
import torch
import train_speed

from medquad_utils import attention, data, generation, lora, training
from medquad_utils.estimate import flops_per_token
from medquad_utils.machine import Hardware, free_memory
from medquad_utils.profiles import VARLEN, Plan, resolve
from medquad_utils.quantization import nf4_config

CUDA = torch.cuda.is_available()
DEVICE, STEPS = ("cuda", 6) if CUDA else ("cpu", 2)
Result = dict[str, Any]
LENGTHS = json.loads(train_speed.LENGTHS.read_text())


def milliseconds(work: Callable[[], Any], times: int = 5) -> float:
    """Return the time of one call, the best of some; the first warms up."""
    return round(1000 * min(common.seconds(work) for _ in range(times + 1)), 3)


def gigabytes(reset: bool = False) -> float:
    """Return the peak of allocated GPU memory since the last reset, in GB; 0 on a CPU."""
    if reset and CUDA:
        torch.cuda.reset_peak_memory_stats()
    return round(torch.cuda.max_memory_allocated() / 1e9, 3) if CUDA else 0.0


class Session:
    """The model, loaded once, and the checks: each is a method that returns what it found."""

    def __init__(self, profile: str, place: Path) -> None:
        self.profile, self.place = profile, place
        self.folder, self.base, self.rate = "", None, 0.0
        self.run: Result = {}  # the plan's own training, as train_speed records it

    def plan(self, hardware: Hardware | None = None) -> Plan:
        """Return the course's plan for this machine, or for another one."""
        other = {"hardware": hardware} if hardware else {}
        return train_speed.plan_for(self.profile, self.folder, 1024, out=str(self.place), **other)

    def versions(self) -> Result:
        """Machine, packages, and the rate of a square matrix product."""
        found = train_speed.matmul_rate()
        self.rate = found["flops"]
        return common.record() | found

    def nf4(self) -> Result:
        """bitsandbytes on this device: codes as on a CPU; error and time of products by rows."""
        import bitsandbytes
        from bitsandbytes import functional

        outputs, inputs = (14336, 4096) if CUDA else (640, 256)
        weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) * 0.02
        pack = partial(functional.quantize_4bit, quant_type="nf4", compress_statistics=True)
        (codes, _), (packed, state) = pack(weight.bfloat16()), pack(weight.bfloat16().to(DEVICE))
        unpack = partial(functional.dequantize_4bit, packed, state)
        made: Result = {
            "codes_equal_cpu": torch.equal(codes.flatten(), packed.cpu().flatten()),
            "unpack_ms": milliseconds(unpack),
        }
        for rows in (1, 8, 32, 128, 1024, 4096) if CUDA else (1, 32):
            x = torch.randn(rows, inputs, device=DEVICE, dtype=torch.bfloat16)
            product = partial(bitsandbytes.matmul_4bit, x, packed, state)
            exact = x.float() @ unpack().float().T
            error = float((product().float() - exact).abs().max() / exact.abs().max())
            made[f"{rows} rows"] = {"error": round(error, 5), "ms": milliseconds(product)}
        return made

    def attention(self) -> Result:
        """One packed row, forward and backward: masked SDPA, and torch's kernel."""
        size, heads, shared, width = (4096, 32, 8, 128) if CUDA else (256, 8, 4, 32)
        parts = 13 if CUDA else 3
        starts = torch.linspace(0, size, parts + 1, device=DEVICE).int()
        document = torch.repeat_interleave(torch.arange(parts, device=DEVICE), starts.diff().long())
        place = torch.arange(size, device=DEVICE)
        mask = (document[:, None] == document) & (place[:, None] >= place)
        dtype = torch.bfloat16 if CUDA else torch.float32
        q, k, v = (
            torch.randn(1, n, size, width, device=DEVICE, dtype=dtype, requires_grad=True)
            for n in (heads, shared, shared)
        )
        module = torch.nn.Module()
        module.num_key_value_groups, module.is_causal = heads // shared, True  # type: ignore
        longest = int(starts.diff().max())
        attend = partial(attention.attend, module, q, k, v, scaling=width**-0.5)
        ways = {
            "masked": partial(attend, mask[None, None]),
            "varlen": partial(attend, None, cu_seq_lens_q=starts, max_length_q=longest),
        }
        outputs = {name: way()[0] for name, way in ways.items()}

        def both(way: Callable[[], Any]) -> None:
            output = way()[0]
            torch.autograd.grad(output, (q, k, v), torch.ones_like(output))

        made: Result = {name: milliseconds(partial(both, way)) for name, way in ways.items()}
        gap = (outputs["masked"] - outputs["varlen"]).abs().max()
        return made | {"largest_difference": gap.item()}

    def loss(self) -> Result:
        """TRL's chunked loss, on a GPU a Triton kernel, against fp64, and its time."""
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        rows, width, vocab = (512, 4096, 128256) if CUDA else (64, 64, 3072)
        dtype = torch.bfloat16 if CUDA else torch.float32
        x = torch.randn(rows, width, device=DEVICE, dtype=dtype, requires_grad=True)
        head = torch.randn(vocab, width, device=DEVICE, dtype=dtype) * 0.02
        targets = torch.randint(0, vocab, (rows,), device=DEVICE)

        def logprobs() -> torch.Tensor:
            return ChunkedLogProbFunction.apply(x, head, None, targets, 1.0, 32768)[0]

        exact = (x.double() @ head.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return {
            "largest_difference": float((logprobs() - exact).abs().max()),
            "ms": milliseconds(lambda: torch.autograd.grad(logprobs().sum(), x), 3),
        }

    def weights(self) -> Result:
        """Write random weights of the profile's shape; tiny has its own."""
        if self.profile != "tiny":
            shape = random_llama.SHAPES[self.profile]
            self.folder = str(random_llama.write(shape, self.place / self.profile))
        return {}

    def load(self) -> Result:
        """Load in 4 bits: the peak, and what stays."""
        gigabytes(reset=True)
        self.base = generation.load_base(self.plan())
        held = torch.cuda.memory_allocated() / 1e9 if CUDA else 0.0
        return {"peak_gb": gigabytes(), "held_gb": round(held, 3)}

    def train(self, plan: Plan | None = None, **changes: Any) -> Result:
        """Train some steps of the plan, with ``changes`` of it, after one that warms up."""
        names = ("pack_length", "accumulation", "checkpointing")
        sizes = {name: changes.pop(name) for name in names if name in changes}
        ours = plan or self.plan()
        # The same rows for every run: those of the plan of this machine.
        first, rows = train_speed.drawn_rows(self.plan(), {}, "c", LENGTHS, STEPS)
        moved = dataclasses.replace(ours, **changes).with_fit(**sizes)
        base: Any = self.base or generation.load_base(moved)
        base.set_attn_implementation(moved.attention)
        trainer = train_speed.our_trainer({}, moved, [*first, *rows], base.train())
        try:
            made = train_speed.train(trainer, generation.load_tokenizer(moved).pad_token_id, 60)
            micro = moved.micro(moved.fit.pack_length, moved.fit.checkpointing)
            made |= {"rows": len(rows), "row_tokens": sum(len(r["input_ids"]) for r in rows)}
            made["figures"] = train_speed.figures(made, moved.shape, self.rate)
            made["adapters"] = lora.dtype_census(trainer.model)["trained"]
            reserved = torch.cuda.max_memory_reserved() / 1e9 if CUDA else 0.0
            return made | {"micro": dataclasses.asdict(micro), "reserved_gb": round(reserved, 3)}
        finally:
            self.base = trainer.model.unload()
            del trainer
            free_memory()

    def own_plan(self) -> Result:
        """Train by the plan as it is, and keep the run in train_speed's form."""
        plan, made = self.plan(), self.train()
        shape = train_speed.shape_of(plan)
        self.run = common.record() | {
            "steps": STEPS, "max_length": plan.fit.max_length, "shape": dataclasses.asdict(shape),
            "flops_per_token": flops_per_token(shape), "ratios": {}, "levers": [],
            "rate": {"dtype": "bfloat16" if CUDA else "float32", "flops": self.rate},
            "plan": plan.as_dict(fit=True) | {"out": ""}, "arms": {"c": made},
            "ours": [made["figures"]["tokens_per_s"]],
        }  # fmt: skip
        return made | {
            "predicted_gb": round(plan.fit.memory_gb, 3),
            "plan": plan.table()["one step"],
        }

    def t4(self) -> Result:
        """The T4's plan under the memory of a T4."""
        total = torch.cuda.get_device_properties(0).total_memory if CUDA else 1
        card = Hardware(DEVICE, "Tesla T4", 15.0, (7, 5), gpus=1)
        plan, self.base = self.plan(card), None
        free_memory()
        try:
            if CUDA:
                torch.cuda.set_per_process_memory_fraction(15e9 / total)
            return self.train(plan) | {"compute_dtype": plan.compute_dtype}
        finally:
            self.base = None  # it computes in fp16
            if CUDA:
                torch.cuda.set_per_process_memory_fraction(1.0)

    def resume(self) -> Result:
        """tiny: six steps, and the same six resumed at the third: dtype and difference."""
        plan = resolve("tiny", out=str(self.place), rows=60).with_fit(pack_length=256)
        plan = dataclasses.replace(plan.with_fit(accumulation=1), eval_rows=4)
        tokenizer = generation.load_tokenizer(plan)
        rows = training.select(plan, tokenizer, data.prepare(plan))
        few = dataclasses.replace(rows, train=rows.train[:40])
        folder = self.place / "resume"
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1,
                    "eval_strategy": "no", "save_total_limit": 9}  # fmt: skip
        curves, kinds = [], []
        for checkpoint in (None, folder / "checkpoint-3"):
            model = generation.load_base(plan)
            trainer = training.build_trainer(plan, model, tokenizer, few, folder, **settings)
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            curves.append([loss for _, loss in training.curve(trainer, "loss")])
            kinds.append(list(lora.dtype_census(trainer.model)["trained"]))
        gap = max(abs(a - b) for a, b in zip(*curves, strict=True))
        return {"whole": kinds[0], "resumed": kinds[1], "largest_difference": gap}

    def generate(self) -> Result:
        """Greedy answers under an adapter: tokens/s, equal twice, equal by the card's code."""
        from transformers import AutoModelForCausalLM

        self.base, plan, most = None, self.plan(), 64 if CUDA else 8
        folder = generate_speed.random_adapter(plan, self.place / "adapter")
        tokenizer = generation.load_tokenizer(plan)
        model = generation.load_tuned(plan, folder)
        asked, made = generate_speed.questions(32), Result()

        def say(answering: Any, count: int, batch: int) -> list[str]:
            ends = {"eos_token_id": [-1]}  # no answer stops
            answers = generation.generate(answering, tokenizer, asked[:count], most, batch, **ends)
            return [answer.text for answer in answers]

        for batch in (1, 8, 32):
            count = min(32, 4 * batch)
            seconds = common.seconds(partial(say, model, count, batch))
            made[f"tokens_per_s at {batch}"] = round(most * count / seconds, 1)
        first = say(model, 4, 1)
        made["equal_twice"] = first == say(model, 4, 1)
        del model
        free_memory()
        card = AutoModelForCausalLM.from_pretrained(
            plan.model_source, quantization_config=nf4_config(plan),
            dtype=getattr(torch, plan.compute_dtype), device_map={"": 0 if CUDA else "cpu"},
        ).eval()  # fmt: skip
        card.load_adapter(str(folder))
        return made | {"card_equal_of_4": sum(map(str.__eq__, first, say(card, 4, 1)))}


def checks(session: Session) -> list[tuple[str, float, Callable[[], Result]]]:
    """Return name, seconds that it needs on a GPU, and the work of each check, in order."""
    train, short = session.train, 2048 if CUDA else 256
    half = {"pack_length": short, "accumulation": 8192 // short if CUDA else 4}
    return [
        ("versions", 10, session.versions), ("nf4", 20, session.nf4),
        ("attention", 20, session.attention), ("loss", 20, session.loss),
        ("weights", 90, session.weights), ("load", 60, session.load),
        ("plan", 40, session.own_plan),
        ("attention: sdpa", 40, partial(train, attention="sdpa")),
        (f"attention: {VARLEN}", 30, partial(train, attention=VARLEN)),
        ("resume", 40, session.resume),
        (f"rows: {short}", 30, partial(train, **half)),
        ("dropout: 0.05", 30, partial(train, lora_dropout=0.05)),
        ("optimizer: paged_adamw_8bit", 30, partial(train, optimizer="paged_adamw_8bit")),
        ("checkpointing: full", 40, partial(train, checkpointing=True)),
        ("T4's plan", 90, session.t4), ("generate", 90, session.generate),
    ]  # fmt: skip


def measure(session: Session, budget: float, only: Sequence[str], out: Path) -> list[Result]:
    """Run the checks that the budget has time for; returns and writes their lines."""
    began, lines = time.perf_counter(), list[Result]()
    with (out / "on_gpu.jsonl").open("w", encoding="utf-8") as file:
        for name, needs, work in checks(session):
            if only and name not in only:
                continue
            started = time.perf_counter()
            left = budget - (started - began)
            try:
                late = left < needs * (1 if CUDA else 0.1)
                with redirect_stdout(sys.stderr):  # where the trainer prints its losses
                    made = {"skipped": f"{left:.0f} s left"} if late else work()
            except Exception as error:  # what stops a check is its result
                made = {"error": f"{type(error).__name__}: {common.first_line(error)}"}
                free_memory()
            seconds = round(time.perf_counter() - started, 1)
            lines.append({"check": name, "seconds": seconds} | made)
            print(json.dumps(lines[-1]), flush=True)
            file.write(json.dumps(lines[-1]) + "\n")
            file.flush()
            if ": " in name and session.run:
                lever = dict(zip(("group", "setting"), name.split(": "), strict=True))
                session.run["levers"].append(lever | made | {"against": session.run["ours"][0]})
    if session.run:
        common.save("train_speed", session.profile, session.run, out)
    return lines


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Run the command line; returns the lines."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--profile", choices=sorted({*random_llama.SHAPES} - {"20m"}), default="llama-8b")
    add("--budget", type=float, default=540, metavar="S", help="begin no check that needs longer")
    add("--only", nargs="*", default=[], metavar="CHECK", help="only these")
    add("--out", type=Path, default=Path(), metavar="DIR", help="where the results go")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    played = nullcontext() if CUDA else common.varlen_on_cpu()
    with tempfile.TemporaryDirectory() as place, played:
        session = Session(options.profile, Path(place))
        return measure(session, options.budget, options.only, options.out)


if __name__ == "__main__":
    main()
