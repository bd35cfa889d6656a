"""How fast questions are answered: one by one, in batches and continuously, in the same run.

    python tests/benchmarks/generate_speed.py     # four minutes on two idle cores

README.md says what each arm is and what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import random_llama
import torch
from peft import get_peft_model
from transformers import ContinuousBatchingConfig, GenerationConfig

from medquad_utils import data, generation, merging
from medquad_utils.chat import end_ids, prompt_ids, prompt_messages
from medquad_utils.generation import Answer
from medquad_utils.lora import lora_config
from medquad_utils.profiles import PROFILES, Plan, resolve

PAGE = 32  # tokens of a page of the continuous arm's cache on a CPU
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Arm:
    """One way of answering: ``batch`` rows at a time (0 = continuously), from ``weights``."""

    batch: int
    weights: str

    def __str__(self) -> str:
        names = {0: "continuous batching", 1: "one by one"}
        return names.get(self.batch, f"batches of {self.batch}")


def arms(cuda: bool) -> tuple[list[Arm], list[Arm]]:
    """Return the arms of equal work, the reference first, and those that answer until they stop."""
    unmerged = ("4-bit",) if cuda else ("4-bit", "unpacked")  # a GPU multiplies by packed weights
    equal = [Arm(batch, weights) for batch in (1, 8, 32, 0) for weights in unmerged]
    merged = [Arm(batch, "merged") for batch in (1, 32, 0)]
    return equal + merged, [Arm(batch, unmerged[-1]) for batch in (1, 8, 32, 0)]


def questions(number: int) -> list[Messages]:
    """Return the first different questions of the sample, as conversations."""
    texts = dict.fromkeys(str(row["question"]) for row in data.load_xml(data.SAMPLE).rows)
    return [prompt_messages(text) for text in list(texts)[:number]]


def random_adapter(plan: Plan, folder: Path) -> Path:
    """Write an adapter of seeded random weights for the plan's base; returns ``folder``."""
    torch.manual_seed(0)
    config = lora_config(plan)
    config.init_lora_weights = False  # neither A nor B is zero
    get_peft_model(generation.load_base(plan), config).save_pretrained(folder)
    return folder


def answer(
    arm: Arm, model: Any, tokenizer: Any, asked: Sequence[Messages], most: int, ends: list[int]
) -> list[Answer]:
    """Answer greedily with at most ``most`` tokens; ``ends`` of [-1] lets no answer stop."""
    keep_packed = patch.object(generation, "unpacked", lambda model: nullcontext())
    with keep_packed if arm.weights == "4-bit" else nullcontext():
        if arm.batch:
            size, settings = arm.batch, {"eos_token_id": ends}
            return generation.generate(model, tokenizer, asked, most, size, **settings)
        with generation.unpacked(model):
            return continuously(model, tokenizer, asked, most, ends)


def continuously(
    model: Any, tokenizer: Any, asked: Sequence[Messages], most: int, ends: list[int]
) -> list[Answer]:
    """Answer by transformers' ``generate_batch``.

    On a CPU the cache is as large as the requests need; the default takes 60 % of the RAM.
    """
    prompts = [prompt_ids(tokenizer, messages) for messages in asked]
    cuda, pad = model.device.type == "cuda", tokenizer.pad_token_id
    greedy = {"do_sample": False, "eos_token_id": ends, "pad_token_id": pad}
    pages = sum(math.ceil((len(prompt) + most) / PAGE) for prompt in prompts)
    sizes = {"page_size": PAGE, "num_blocks": pages, "max_batch_tokens": 512}
    config = ContinuousBatchingConfig(allow_block_sharing=False, **({} if cuda else sizes))
    settings = GenerationConfig(max_new_tokens=most, **greedy)
    made = list(model.generate_batch(prompts, settings, config, warmup=cuda).values())
    if len(made) != len(prompts) or any(one.error for one in made):
        raise RuntimeError(f"continuous batching answered {len(made)} of {len(prompts)} requests")
    return [generation._read(tokenizer, one.generated_tokens, ends) for one in made]


def run(
    plan: Plan, adapter: Path, asked: list[Messages], chosen: Sequence[Arm], most: int,
    ends: list[int], rounds: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time the arms in turns, so that a busy minute of the machine does not fall on one of them.

    The best round counts. The first arm's answers are what the others are compared with.
    """
    tokenizer, answers = generation.load_tokenizer(plan), dict[Arm, list[Answer]]()
    entries: dict[Arm, dict[str, Any]] = {}
    for route in ("adapter", "dequantised"):
        mine = [arm for arm in chosen if (arm.weights == "merged") == (route == "dequantised")]
        if not mine:
            continue
        model = merging.merge(plan, route, adapter)
        answer(mine[0], model, tokenizer, asked[:1], 2, ends)  # sets up what stays

        def work(arm: Arm, model: Any = model) -> None:
            answers[arm] = answer(arm, model, tokenizer, asked, most, ends)

        for arm in mine * rounds:
            try:
                spent = common.seconds(partial(work, arm))
            except Exception as error:  # whatever stops an arm is its result
                entries[arm] = {"error": common.first_line(error)}
                continue
            entries[arm] = {"seconds": min(spent, entries.get(arm, {}).get("seconds", spent))}
    for arm in (arm for arm in chosen if "error" not in entries[arm]):
        entries[arm] |= figures(entries[arm]["seconds"], answers[arm], answers[chosen[0]])
    return [{"arm": str(arm), "weights": arm.weights} | entries[arm] for arm in chosen]


def figures(seconds: float, given: list[Answer], first: list[Answer]) -> dict[str, Any]:
    """Return an arm's tokens/s, and how many of its answers are those of the first arm."""
    tokens = sum(one.tokens for one in given)
    return {
        "seconds": round(seconds, 3), "tokens": tokens, "tokens_per_s": round(tokens / seconds, 1),
        "stopped": sum(one.stopped for one in given),
        "same": sum(one == other for one, other in zip(given, first, strict=True)),
    }  # fmt: skip


def measure(profile: str, number: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Measure everything that the JSON holds of one profile."""
    source = ""
    with tempfile.TemporaryDirectory() as place:
        if profile != "tiny":
            source = str(random_llama.write(random_llama.SHAPES[profile], Path(place) / profile))
        plan = resolve(profile if profile in PROFILES else "tiny", model=source)
        adapter = random_adapter(plan, Path(place) / "adapter")
        equal, until_stop = arms(plan.device == "cuda")
        tokenizer = generation.load_tokenizer(plan)
        # A random adapter ends few answers, so a full stop ends one, too.
        ends = [*end_ids(tokenizer), *tokenizer.encode(".", add_special_tokens=False)]
        timed = partial(run, plan, adapter, questions(number), rounds=rounds)
        equally = timed(equal, tokens, [-1])
        stopping = timed(until_stop, 64, ends) if profile == "tiny" else []
    return common.record() | {
        "compute_dtype": plan.compute_dtype, "questions": number, "new_tokens": tokens,
        "rounds": rounds, "equal": equally, "stopping": stopping,
    }  # fmt: skip


def arm_table(entries: Sequence[dict[str, Any]], number: int) -> list[str]:
    """Return the arms of one measurement as the lines of a Markdown table."""
    slowest, rows = entries[0]["tokens_per_s"], []
    for made in (entry for entry in entries if entry.get("error") != "not measured yet"):
        cells = [made.get("error", "")]
        if rate := made.get("tokens_per_s"):
            cells = [f"{rate:,.0f}", f"{rate / slowest:.1f}", f"{made['same']} of {number}"]
        rows.append([made["arm"], made["weights"], *cells])
    return common.table("arm|weights|tokens/s|over the first|same answers", rows)


def page(devices: dict[str, dict[str, Any]]) -> str:
    """Return the figures of all JSON files as Markdown."""
    lines: list[str] = []
    for profile, run in ((name, run) for runs in devices.values() for name, run in runs.items()):
        number, stopping = run["questions"], run["stopping"]
        work = f"{number} questions, {run['new_tokens']} tokens each, the best of {run['rounds']}"
        lines += [f"{common.about(profile, run)} {run['compute_dtype']} compute."]
        lines += [f"{work} rounds.", "", *arm_table(run["equal"], number), ""]
        if stopping:
            tokens, stopped = stopping[0]["tokens"], stopping[0]["stopped"]
            lines += [f"Each answer until it stops ({tokens:,} tokens, {stopped} stopped):", ""]
            lines += [*arm_table(stopping, number), ""]
    return "\n".join(lines).strip()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; returns the last run."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    shapes = sorted(random_llama.SHAPES)
    parser.add_argument("--profile", nargs="+", choices=shapes, default=["tiny", "20m"])
    parser.add_argument("--smoke", action="store_true", help="four questions; writes nothing")
    options = parser.parse_args(arguments)
    if options.smoke:
        return measure("tiny", 4, 4, 1)
    for profile in options.profile:
        run = measure(profile, 32, 128 if torch.cuda.is_available() else 24, 2)
        common.save("generate_speed", profile, run)
    common.write_readme("generate_speed", page(common.read_results("generate_speed")))
    return run


if __name__ == "__main__":
    from transformers.utils import logging

    logging.set_verbosity_error()  # transformers warns of the end id -1, which is meant
    print(json.dumps(main()))
