"""How fast questions are answered: one by one, in batches, continuously, from 4-bit, unpacked and merged weights, in the same run.

Run it from the root of the checkout: ``python tests/benchmarks/generate_speed.py``. See README.md beside it.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]  # the checkout, whatever is installed, and the scripts beside this one

import random_llama  # noqa: E402
import torch  # noqa: E402
import train_speed  # noqa: E402
from train_speed import RESULTS, UNMEASURED, first_line, load, machine, synchronize  # noqa: E402

from medquad_utils import data, generation, merging  # noqa: E402
from medquad_utils.assets import sample  # noqa: E402
from medquad_utils.chat import end_ids, prompt_ids, prompt_messages  # noqa: E402
from medquad_utils.generation import Answer  # noqa: E402
from medquad_utils.lora import lora_config  # noqa: E402
from medquad_utils.profiles import PROFILES, CourseError, Plan, resolve  # noqa: E402
from medquad_utils.quantization import measured_memory  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages = list[dict[str, str]]
PAGE = 32  # tokens of a page of the continuous arm's cache on a CPU: no request holds more than one page that is not full
MOST_TOKENS = 64  # of an answer that may stop by itself
WEIGHTS = {
    "4-bit": "as loaded, with the adapter",
    "unpacked": "dequantised once (generation.unpacked), with the adapter",
    "merged": "dequantised and merged with the adapter",
}


@dataclass(frozen=True)
class Arm:
    """One way of answering: ``batch`` rows at a time (0 = continuously), from ``weights``, with a compiled static cache or not."""

    batch: int
    weights: str
    compiled: bool = False

    def __str__(self) -> str:
        ways = {0: "continuous batching", 1: "one by one"}
        return ways.get(self.batch, f"batches of {self.batch}") + (", static cache, compiled" if self.compiled else "")

    def cannot(self, cuda: bool) -> str:
        """Why the arm does not run on this kind of device; "" if it does."""
        if self.compiled and not cuda:
            return UNMEASURED
        return "on a CPU only: a GPU multiplies by packed weights" if self.weights == "unpacked" and cuda else ""


# The first is what every other arm's answers are compared with. transformers compiles no bitsandbytes model (5.23, is_compileable).
EQUAL = (
    *(Arm(batch, weights) for batch in (1, 8, 32, 0) for weights in ("4-bit", "unpacked")),
    *(Arm(batch, "merged") for batch in (1, 32, 0)),
    Arm(1, "merged", compiled=True),
    Arm(32, "merged", compiled=True),
)


def stopping(cuda: bool) -> tuple[Arm, ...]:
    """The arms that answer until they stop, from the weights that the course generates with."""
    return tuple(Arm(batch, "4-bit" if cuda else "unpacked") for batch in (1, 8, 32, 0))


# ---- what is asked, and of whom -------------------------------------------------------------------------------------


def questions(number: int) -> list[Messages]:
    """The first ``number`` different questions of the sample, as conversations."""
    return [prompt_messages(text) for text in list(dict.fromkeys(str(row["question"]) for row in sample.rows()))[:number]]


def plan_for(profile: str, folder: Path | None) -> Plan:
    """The plan of this machine for ``profile``, its weights in ``folder`` (``None``: the shipped tiny model)."""
    return resolve(profile if profile in PROFILES else "tiny", model_path=str(folder or ""))


def random_adapter(plan: Plan, folder: Path, seed: int = 0) -> Path:
    """Write an adapter of seeded random weights onto the plan's base; returns ``folder``."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    tuned = get_peft_model(generation.load_base(plan), lora_config(plan))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    tuned.save_pretrained(folder)
    return folder


# ---- answering ------------------------------------------------------------------------------------------------------


def answer(
    arm: Arm, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Messages], most: int, ends: list[int]
) -> list[Answer]:
    """Greedy answers of at most ``most`` tokens; ``ends`` of [-1] lets no answer stop.

    Raises:
        RuntimeError: continuous batching lost a request.
    """
    packed = patch.object(generation, "unpacked", lambda model: nullcontext()) if arm.weights == "4-bit" else nullcontext()
    with packed:
        if not arm.batch:
            with generation.unpacked(model):
                return continuously(model, tokenizer, asked, most, ends)
        more = {"cache_implementation": "static"} if arm.compiled else {}  # on a GPU, this is what makes transformers compile
        return generation.generate(model, tokenizer, asked, most, arm.batch, eos_token_id=ends, **more)


def continuously(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Messages], most: int, ends: list[int]
) -> list[Answer]:
    """The same by ``generate_batch``. On a CPU its cache is as large as the requests need: by itself it takes 60 % of the RAM."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    prompts = [prompt_ids(tokenizer, messages) for messages in asked]
    settings = GenerationConfig(max_new_tokens=most, do_sample=False, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    pages = sum(math.ceil((len(prompt) + most) / PAGE) for prompt in prompts)
    sizes = {} if model.device.type == "cuda" else {"page_size": PAGE, "num_blocks": pages, "max_batch_tokens": 512}
    config = ContinuousBatchingConfig(allow_block_sharing=False, **sizes)
    made = list(model.generate_batch(prompts, settings, config, warmup=model.device.type == "cuda").values())
    if len(made) != len(prompts) or any(one.error for one in made):
        raise RuntimeError(f"continuous batching answered {len(made)} of {len(prompts)} requests")
    return [generation._read(tokenizer, one.generated_tokens, ends) for one in made]


# ---- figures --------------------------------------------------------------------------------------------------------


def bandwidth() -> float:
    """Bytes/s that a copy of a large tensor reads and writes, the best of eight."""
    cuda = torch.cuda.is_available()
    source = torch.ones((1 << 29) if cuda else (1 << 26), device="cuda" if cuda else "cpu")  # 2 GiB, 256 MiB
    target = torch.empty_like(source)
    spent = []
    for _ in range(8):
        synchronize()
        start = time.perf_counter()
        target.copy_(source)
        synchronize()
        spent.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(spent)


def bytes_per_step(model: torch.nn.Module, weights: str) -> int:
    """Bytes of weights that one forward pass reads: all but an embedding that is no head, of which it reads a row a token."""
    from bitsandbytes.nn import Linear4bit

    read = measured_memory(model)
    if weights == "unpacked":
        packed = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
        read |= {"4-bit codes": sum(m.in_features * m.out_features * m.compute_dtype.itemsize for m in packed), "4-bit scales": 0}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    return sum(read.values()) - (0 if embedding.weight is head.weight else embedding.weight.nbytes)


def figures(seconds: float, answers: Sequence[Answer], first: Sequence[Answer], limit: float) -> dict[str, Any]:
    """Of one arm: tokens/s, its share of ``limit`` tokens/s, and how many answers are those of the first arm."""
    tokens = sum(answer.tokens for answer in answers)
    return {
        "seconds": round(seconds, 3),
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 1),
        "stopped": sum(answer.stopped for answer in answers),
        "same": sum(one == other for one, other in zip(answers, first, strict=True)),
        "limit": round(limit, 1),
        "share": round(tokens / seconds / limit, 4),
    }


class Bench:
    """The arms of one profile on one machine: what they answered, and the least seconds that each took."""

    def __init__(self, plan: Plan, adapter: Path, asked: Sequence[Messages], rounds: int):
        self.plan, self.adapter, self.asked, self.rounds = plan, adapter, asked, rounds
        self.tokenizer = generation.load_tokenizer(plan)
        self.rate = bandwidth()

    def run(self, arms: Sequence[Arm], most: int, ends: list[int]) -> list[dict[str, Any]]:
        """Every arm's figures; the arms take turns, so that a busy minute of the machine does not fall on one of them.

        Raises:
            CourseError: the first arm cannot run.
        """
        cuda = self.plan.device == "cuda"
        answers: dict[Arm, list[Answer]] = {}
        spent: dict[Arm, float] = {}
        failed = {arm: arm.cannot(cuda) for arm in arms if arm.cannot(cuda)}
        size: dict[Arm, int] = {}
        for merged in (False, True):
            chosen = [arm for arm in arms if (arm.weights == "merged") == merged and arm not in failed]
            if not chosen:
                continue
            model = merging.merge(self.plan, "dequantised" if merged else "adapter", self.adapter)
            answer(chosen[0], model, self.tokenizer, self.asked[:1], 2, ends)  # a first pass sets things up that stay
            for arm in chosen * self.rounds:
                if arm in failed:
                    continue
                try:
                    synchronize()
                    start = time.perf_counter()
                    answers[arm] = answer(arm, model, self.tokenizer, self.asked, most, ends)
                    synchronize()
                    spent[arm] = min(spent.get(arm, math.inf), time.perf_counter() - start)
                    size[arm] = bytes_per_step(model, arm.weights)
                except Exception as error:  # whatever stops an arm is its result
                    failed[arm] = first_line(error)
            del model
            gc.collect()
            torch.cuda.empty_cache()
        if arms[0] in failed:
            raise CourseError(f"{arms[0]}, {arms[0].weights}: {failed[arms[0]]}. Without it no other arm's answers can be judged.")
        first = answers[arms[0]]
        return [self.entry(arm, failed.get(arm, ""), spent, answers, first, size) for arm in arms]

    def entry(
        self, arm: Arm, error: str, spent: dict[Arm, float], answers: dict[Arm, list[Answer]], first: list[Answer], size: dict[Arm, int]
    ) -> dict[str, Any]:
        """One arm for the JSON: its figures, or why there are none."""
        made: dict[str, Any] = {"arm": str(arm), "weights": arm.weights}
        if error:
            return made | {"error": error}
        rows = min(arm.batch or len(self.asked), len(self.asked))
        return made | {"bytes": size[arm]} | figures(spent[arm], answers[arm], first, self.rate / size[arm] * rows)


def measure(profile: str, number: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Everything that the JSON holds of one profile."""
    before = load()
    with tempfile.TemporaryDirectory() as place:
        folder = None if profile == "tiny" else random_llama.write(random_llama.SHAPES[profile], Path(place) / profile)
        plan = plan_for(profile, folder)
        bench = Bench(plan, random_adapter(plan, Path(place) / "adapter"), questions(number), rounds)
        equal = bench.run(EQUAL, tokens, [-1])
        ends = [*end_ids(bench.tokenizer), *bench.tokenizer.encode(".", add_special_tokens=False)]
        stopped = bench.run(stopping(plan.device == "cuda"), MOST_TOKENS, ends) if profile == "tiny" else []
    return {
        "date": datetime.now(UTC).date().isoformat(), "machine": machine(), "load": [before, load()], "compute_dtype": plan.compute_dtype,
        "questions": number, "new_tokens": tokens, "rounds": rounds, "bandwidth_gb_s": round(bench.rate / 1e9, 1),
        "equal": equal, "stopping": stopped,
    }  # fmt: skip


# ---- what is written ------------------------------------------------------------------------------------------------

MARKS = "<!-- figures: written by generate_speed.py from results/generate_speed_*.json -->", "<!-- end of the generation figures -->"


def table(entries: Sequence[dict[str, Any]], number: int) -> list[str]:
    """The arms of one measurement as Markdown lines; an arm whose answers are not all the same says how many are."""
    slowest = entries[0]["tokens_per_s"]
    lines = ["| arm | weights | tokens/s | over the first | same answers | MB read a step | limit, tokens/s | share |", "|---" * 8 + "|"]
    for made in entries:
        if "error" in made:
            lines.append(f"| {made['arm']} | {made['weights']} | {made['error']} |" + " |" * 5)
            continue
        lines.append(
            f"| {made['arm']} | {made['weights']} | {made['tokens_per_s']:,.0f} | {made['tokens_per_s'] / slowest:.1f} | "
            f"{made['same']} of {number} | {made['bytes'] / 1e6:,.1f} | {made['limit']:,.0f} | {made['share']:.1%} |"
        )
    return lines


def found(entries: Sequence[dict[str, Any]], arm: Arm) -> dict[str, Any] | None:
    """The entry of ``arm``, if it has figures."""
    return next((e for e in entries if (e["arm"], e["weights"]) == (str(arm), arm.weights) and "error" not in e), None)


def verdict(run: dict[str, Any]) -> str:
    """What the figures say about what the course does, in words."""
    said = []
    for batch in (1, 8, 32):
        one, other = (found(run["equal"], Arm(batch, weights)) for weights in ("4-bit", "unpacked"))
        if one and other:
            said.append(
                f"{Arm(batch, '')} {other['tokens_per_s'] / one['tokens_per_s']:.2f} times ({other['same']} of {run['questions']} same)"
            )
    lines = [f"Unpacked over 4-bit: {', '.join(said)}."] if said else []
    weights = "unpacked" if said else "4-bit"
    pairs = {"equal work": run["equal"], "answers that stop": run["stopping"]}
    ratios = [
        f"{what} {one['tokens_per_s'] / other['tokens_per_s']:.2f} times"
        for what, entries in pairs.items()
        if (one := found(entries, Arm(32, weights))) and (other := found(entries, Arm(0, weights)))
    ]
    if ratios:
        lines.append(f"Batches of 32 over continuous batching, both {weights}: {', '.join(ratios)}.")
    return " ".join(lines)


def spread(entries: Sequence[dict[str, Any]]) -> str:
    """How long the answers of the first arm are."""
    return f"{entries[0]['tokens']:,} tokens in all, {entries[0]['stopped']} answers stopped"


def about(name: str, run: dict[str, Any]) -> str:
    """Where, when and with what a run was measured."""
    host = run["machine"]
    versions = ", ".join(f"{package} {host['packages'][package]}" for package in ("bitsandbytes", "peft", "torch", "transformers"))
    return (
        f"**{name}** on {host['device']}: {run['date']}, {host['cpus']} CPU cores, {host['threads']} threads, {host['memory_gib']} GiB, "
        f"{host['system']}, Python {host['python']}, {versions}; load average {run['load'][0]} before, {run['load'][1]} after. "
        f"{run['compute_dtype']} compute; a copy moves {run['bandwidth_gb_s']:,.1f} GB/s. "
        f"{run['questions']} questions, {run['new_tokens']} tokens each, the best of {run['rounds']} rounds."
    )


def tables(devices: dict[str, dict[str, Any]]) -> str:
    """The figures of all JSON files as Markdown."""
    lines: list[str] = []
    for runs in devices.values():
        for name, run in runs.items():
            lines += [about(name, run), "", *table(run["equal"], run["questions"]), ""]
            if run["stopping"]:
                lines += [
                    f"The same questions, each answer until it stops ({spread(run['stopping'])}):",
                    "",
                    *table(run["stopping"], run["questions"]),
                    "",
                ]
            lines += [verdict(run), ""]
    if all(name == "cpu" for name in devices):
        lines += [f"On a GPU, `--profile llama-1b` and `--profile llama-8b`: {UNMEASURED}."]
    return "\n".join(lines).strip()


read_results = partial(train_speed.read_results, script="generate_speed")
save = partial(train_speed.save, script="generate_speed")


def between(text: str) -> str:
    """What stands between the two marks of README.md."""
    return data.between(text, MARKS)


def write_readme(devices: dict[str, dict[str, Any]], file: Path) -> None:
    """Put ``tables`` between the marks of README.md."""
    data.write_between(file, MARKS, tables(devices))


def main() -> int:
    """The command line."""
    from transformers.utils import logging

    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", nargs="+", choices=sorted(random_llama.SHAPES), default=["tiny", "20m"])
    parser.add_argument("--questions", type=int, default=32, metavar="N", help="how many are asked (default 32)")
    parser.add_argument(
        "--tokens", type=int, default=128 if cuda else 24, metavar="N", help="of an answer (default 128 on a GPU, 24 on a CPU)"
    )
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="of all arms; the best counts (default 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the JSON goes")
    parser.add_argument("--readme", action="store_true", help="measure nothing, write README.md from the JSON")
    options = parser.parse_args()
    logging.set_verbosity_error()  # transformers warns of an end id of -1, which is meant
    try:
        for profile in () if options.readme else options.profile:
            print("written:", save(measure(profile, options.questions, options.tokens, options.rounds), profile, options.out).name)
    except CourseError as error:
        print(f"generate_speed: {error}", file=sys.stderr)
        return 1
    if options.out == RESULTS:
        write_readme(read_results(RESULTS), HERE / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
