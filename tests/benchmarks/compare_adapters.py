"""What matters in LoRA: learning rate, layers, rank or the variant's name? Lesson 03 shows it.

    python tests/benchmarks/compare_adapters.py                  # tiny: 52 minutes on one core
    python tests/benchmarks/compare_adapters.py --profile small --steps 30  # half an hour an arm
    python tests/benchmarks/compare_adapters.py --quick          # a smoke test, writes nothing

Each arm takes the best of its learning rates by the loss on validation rows, with seed 0. Then it
runs with every seed, and is scored on test rows: bits per byte of the reference answers, and how
much it forgot of plain texts. The numbers go to medquad_utils/assets/measured/.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import common
import torch

from medquad_utils import chat, files, generation, lora, scores, training
from medquad_utils.data import prepare
from medquad_utils.files import Row
from medquad_utils.memory import ALL_LINEAR
from medquad_utils.profiles import Plan, resolve
from medquad_utils.splits import Splits

FILE = common.RESULTS / "compare_adapters.json"
METHODS = ("LoRA", "rsLoRA", "DoRA", "OLoRA", "MiSS")
RANKS = (2, 8, 16, 64)
RATES: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
LOW_RATES: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)  # of full fine-tuning
# A pretrained model takes no larger steps than the toy.
CORE_RATES: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LAYERS = {("q_proj", "v_proj"): "q and v", ATTENTION: "attention"}
ROWS_A_STEP = 8


@dataclass(frozen=True)
class Arm:
    """One way to train: PEFT's variant, its rank, the layers, and how the base is stored."""

    method: str
    rank: int = 16
    layers: tuple[str, ...] = ALL_LINEAR
    quantized: bool = True

    @property
    def name(self) -> str:
        """Name the arm: "LoRA of rank 16, q_proj v_proj"."""
        if self.method == "full":
            return "full fine-tuning"
        where = "" if self.layers == ALL_LINEAR else f", {' '.join(self.layers)}"
        base = "" if self.quantized else ", base not quantised"
        return f"{self.method} of rank {self.rank}{where}{base}"


def arms(core: bool = False) -> list[Arm]:
    """Return all arms; the core is LoRA at three ranks."""
    if core:
        return [Arm("LoRA", rank) for rank in (2, 16, 64)]
    return [
        *(Arm(method, rank) for method in METHODS for rank in RANKS),
        Arm("LoRA", layers=("q_proj", "v_proj")),
        Arm("LoRA", layers=ATTENTION),
        Arm("LoRA", quantized=False),
        Arm("full", quantized=False),
    ]


def adapted(arm: Arm, base: Any) -> Any:
    """Put the arm's adapters on ``base``; full fine-tuning trains the linear layers themselves.

    PiSSA raises TypeError on a 4-bit base, and LoftQ needs CUDA: neither is an arm.
    """
    from peft import LoraConfig, MissConfig, get_peft_model

    if arm.method == "full":
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name.endswith("proj.weight"))
        return base
    common_settings = {"r": arm.rank, "target_modules": list(arm.layers), "task_type": "CAUSAL_LM"}
    if arm.method == "MiSS":
        return get_peft_model(base, MissConfig(**common_settings))
    config = LoraConfig(
        **common_settings,
        lora_alpha=2 * arm.rank if arm.method != "rsLoRA" else 8,  # equal scales at rank 16
        use_rslora=arm.method == "rsLoRA",
        use_dora=arm.method == "DoRA",
        init_lora_weights="olora" if arm.method == "OLoRA" else True,
    )
    return get_peft_model(base, config)


def learn(model: Any, tokenizer: Any, rows: Sequence[Row]) -> None:
    """Add the gradients of the mean loss of an answer's token over ``rows``.

    One row a pass: no pads, and the logits of one row only.
    """
    examples = [chat.encode(tokenizer, row) for row in rows]
    tokens = sum(sum(label != chat.IGNORED for label in e.labels) for e in examples)
    for example in examples:
        ids, labels = (
            torch.tensor([part]).to(model.device) for part in (example.ids, example.labels)
        )
        model(input_ids=ids, labels=labels, num_items_in_batch=tokens).loss.backward()


def trained(plan: Plan, arm: Arm, rate: float, seed: int, rows: Splits, steps: int) -> Any:
    """Train ``arm`` with AdamW and a cosine schedule; returns the model in eval mode."""
    torch.manual_seed(seed)
    dice, tokenizer = random.Random(seed), generation.load_tokenizer(plan)
    model = adapted(arm, generation.load_base(plan, quantized=arm.quantized)).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        learn(model, tokenizer, dice.sample(rows.train, ROWS_A_STEP))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def held_out(plan: Plan, model: Any, rows: Sequence[Row]) -> float:
    """Return the bits per byte of the reference answers of ``rows``."""
    turns = [chat.prompt_messages(row["question"]) for row in rows]
    tokenizer = generation.load_tokenizer(plan)
    return bits(scores.answer_loss(model, tokenizer, turns, [row["answer"] for row in rows]))


def bits(losses: scores.Losses) -> float:
    """Return bits per byte; a loss that is not finite, after too high a rate, is infinite."""
    value = float(losses.nats.sum() / math.log(2) / losses.bytes.sum())
    return value if math.isfinite(value) else math.inf


def plain(plan: Plan, model: Any, texts: int | None) -> float:
    """Return the bits per byte of the first ``texts`` that forgetting is measured on."""
    some = scores.plain_texts(plan)[:texts]
    return bits(scores.text_loss(model, generation.load_tokenizer(plan), some))


def measure(
    plan: Plan, arm: Arm, rows: Splits, steps: int, seeds: int, rates: Sequence[float],
    texts: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Choose the arm's rate on validation rows, then score every seed on test rows."""
    before = plain(plan, generation.load_base(plan, quantized=arm.quantized), texts)
    validation: dict[float, float] = {}
    tested: list[float] = []
    forgot: list[float] = []
    started, best, kept = time.time(), rates[0], None
    for rate in rates:
        model = trained(plan, arm, rate, 0, rows, steps)
        validation[rate] = held_out(plan, model, rows.validation)
        if kept is None or validation[rate] < validation[best]:
            best, kept = rate, (held_out(plan, model, rows.test), plain(plan, model, texts))
        parameters = lora.trainable_parameters(model)
    for seed in range(seeds):
        if seed:
            model = trained(plan, arm, best, seed, rows, steps)
            kept = held_out(plan, model, rows.test), plain(plan, model, texts)
        assert kept
        tested.append(kept[0])
        forgot.append(kept[1] - before)
    return {
        **dataclasses.asdict(arm), "name": arm.name, "parameters": parameters, "rate": best,
        "validation": {f"{rate:g}": value for rate, value in validation.items()},
        "bits_per_byte": tested, "forgetting": forgot, "seconds": round(time.time() - started, 1),
    }  # fmt: skip


def span(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean, the smallest and the largest of some seeds."""
    return sum(values) / len(values), min(values), max(values)


def figure(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Sort the arms by what they change: factor -> value -> span of bits per byte on test rows.

    Rates were tried with one seed, on validation rows: a point each.
    """
    by_name = {result["name"]: result for result in results}
    if not (usual := by_name.get("LoRA of rank 16")):
        return {}
    tried, known = usual["validation"].items(), span(usual["bits_per_byte"])
    table: dict[str, dict[str, tuple[float, float, float]]] = {
        "learning rate": {f"rate {r}": span([v]) for r, v in tried if math.isfinite(v)},
        "layers": {"all linear": known}, "rank": {}, "name": {"LoRA": known},
        "base and method": {"QLoRA": known},
    }  # fmt: skip
    for result in results:
        usual_layers = tuple(result["layers"]) == ALL_LINEAR
        value = span(result["bits_per_byte"])
        if result["method"] == "LoRA" and result["quantized"] and usual_layers:
            table["rank"][f"rank {result['rank']}"] = value
        elif not usual_layers:
            table["layers"][LAYERS[tuple(result["layers"])]] = value
        elif not result["quantized"]:
            table["base and method"][result["name"].replace(" of rank 16", "")] = value
        elif result["rank"] == usual["rank"]:
            table["name"][result["method"]] = value
    return {factor: values for factor, values in table.items() if len(values) > 1}


def finding(profile: str, spans: dict[str, dict[str, tuple[float, float, float]]]) -> str:
    """Name the choice whose worst setting is furthest from its best one, by their ratio."""
    means = {choice: [span[0] for span in of.values()] for choice, of in spans.items()}
    worse = {choice: max(values) / min(values) for choice, values in means.items()}
    return f"{profile}: the {max(worse, key=lambda choice: worse[choice])} matters most"


def page(found: dict[str, Any]) -> str:
    """Return every profile's arms as Markdown."""
    lines: list[str] = []
    for profile in ("tiny", "small"):
        if not (run := found.get(profile)):
            continue
        rows = []
        for arm in run["arms"]:
            scores_, forgot = (span(arm[name]) for name in ("bits_per_byte", "forgetting"))
            spans = ["{:.3f} [{:.3f}, {:.3f}]".format(*values) for values in (scores_, forgot)]
            tried = ", ".join(f"{rate}: {loss:.3f}" for rate, loss in arm["validation"].items())
            rows.append([arm["name"], f"{arm['parameters']:,}", tried, f"{arm['rate']:g}", *spans])
        head = "arm|parameters|validation by rate|best rate|bits per byte|forgot"
        minutes = sum(arm["seconds"] for arm in run["arms"]) / 60
        lines += [f"{common.about(profile, run)} {run['steps']} steps in {run['dtype']}, "
                  f"{run['seeds']} seeds, {minutes:.0f} minutes.",
                  "", *common.table(head, rows), ""]  # fmt: skip
    return "\n".join(lines).strip()


def write(profile: str, run: dict[str, Any]) -> None:
    """Put a profile's run and its figure into the JSON file, and all runs into README.md."""
    before = files.read_json(FILE) if FILE.is_file() else {}
    found = before | {profile: run, f"{profile} figure": (spans := figure(run["arms"]))}
    found |= {f"{profile} finding": finding(profile, spans)} if spans else {}
    files.write_json(FILE, found)
    common.write_readme("compare_adapters", page(found))


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure all arms of a profile, and write them down after each one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--source", default="", help="xml, csv ... (default: the profile's own)")
    parser.add_argument("--data-path", default="", help="the folder or file of that source")
    parser.add_argument("--out", default="", help="where the data go")
    parser.add_argument("--quick", action="store_true", help="two arms, three steps, no file")
    asked = parser.parse_args(arguments)
    core = asked.profile != "tiny"
    plan = resolve(asked.profile, source=asked.source, data_path=asked.data_path, out=asked.out)
    if not core:  # 32 bits: the arms must differ in what they are called for and in nothing else
        plan = dataclasses.replace(plan, compute_dtype="float32")
    rows = training.select(plan, generation.load_tokenizer(plan), prepare(plan))
    todo, steps, seeds = arms(core), asked.steps, asked.seeds
    texts = 4 if asked.quick else None
    if asked.quick:
        todo, steps, seeds = [Arm("LoRA"), Arm("MiSS", 2)], 3, 2
        rows = dataclasses.replace(rows, validation=rows.validation[:4], test=rows.test[:4])
    results = []
    for arm in todo:
        usual = CORE_RATES if core else RATES
        rates = (LOW_RATES if arm.method == "full" else usual)[: 2 if asked.quick else None]
        results.append(measure(plan, arm, rows, steps, seeds, rates, texts))
        mean, low, high = span(results[-1]["bits_per_byte"])
        print(f"{arm.name:36} rate {results[-1]['rate']:g}: {mean:.3f} [{low:.3f}, {high:.3f}]")
        if not asked.quick:
            run = common.record() | {"steps": steps, "seeds": seeds, "dtype": plan.compute_dtype}
            write(asked.profile, run | {"arms": results})
    return results


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
