"""Run lessons on ``tiny`` and put what came out into the checkout: a maintainer's tool.

``python tests/stamp.py [02,04]`` runs these lessons (all of them without a number). It writes the
outputs into the committed notebooks, the times into TEACHING.md, lesson 04's adapter into
``tests/adapter``, and what reference runs measured into README.md. ``pages`` instead of numbers
writes the pages alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medquad_utils import CourseError, course, estimate, plots, reference
from medquad_utils.atomic import whole_file, whole_folder
from medquad_utils.files import MEASURED, read_json, write_json
from medquad_utils.machine import default_out, versions
from medquad_utils.profiles import PROFILES

ADAPTER = Path(__file__).parent / "adapter"
COSTS, DIAL, FINDING, TIMINGS, VERIFIED = (
    (f"<!-- {mark} -->", f"<!-- /{mark} -->")
    for mark in ("costs", "dial", "finding", "timings", "verified")
)
PICTURE = "reference.png"  # in notebooks/figures


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def keep_adapter(run: Path, target: Path = ADAPTER) -> None:
    """Copy what lesson 04 trained and measured to ``target``, with a manifest of hashes.

    Folders of this machine are taken out: tests find the base by the plan.
    """
    config = read_json(run / "adapter" / "adapter_config.json")
    plan = read_json(run / "adapter" / "plan.json")
    train = read_json(run / "metrics" / "train.json")
    config["base_model_name_or_path"] = None
    plan["out"] = train["plan"]["out"] = "runs"
    with whole_folder(target) as fresh:
        fresh.mkdir()
        weights = "adapter_model.safetensors"
        shutil.copyfile(run / "adapter" / weights, fresh / weights)
        for name, record in (("adapter_config", config), ("plan", plan), ("train", train)):
            write_json(fresh / f"{name}.json", record)
        write_json(fresh / "manifest.json", {p.name: digest(p) for p in sorted(fresh.iterdir())})


def between(text: str, marks: tuple[str, str]) -> str:
    """Return the text between two marks, without the white space around it."""
    return _parts(text, marks)[1].strip()


def write_between(path: Path, marks: tuple[str, str], text: str) -> None:
    """Replace the text between two marks of a file."""
    head, _, tail = _parts(path.read_text(encoding="utf-8"), marks)
    with whole_file(path) as temporary:
        temporary.write_text(f"{head}{marks[0]}\n{text}\n{marks[1]}{tail}", encoding="utf-8")


def _parts(text: str, marks: tuple[str, str]) -> tuple[str, str, str]:
    head, first, rest = text.partition(marks[0])
    middle, second, tail = rest.partition(marks[1])
    if not (first and second):
        raise CourseError(f"the text holds no {' ... '.join(marks)}: put them around the table.")
    return head, middle, tail


def scrub(cell: dict[str, Any]) -> dict[str, Any]:
    """Copy ``cell`` without widgets, progress bars, warnings and timings."""
    fresh = {k: v for k, v in cell.items() if k != "metadata"} | {"metadata": {}}
    if tags := [t for t in cell["metadata"].get("tags", ()) if not t.startswith("injected")]:
        fresh["metadata"]["tags"] = tags
    if cell["cell_type"] == "code":
        fresh["execution_count"] = None
        widget = "application/vnd.jupyter.widget-view+json"
        printed = [o for o in cell["outputs"] if o.get("name") != "stderr"]
        kept = _joined([o for o in printed if widget not in o.get("data", {})])
        fresh["outputs"] = [o | {k: None for k in ("execution_count",) if k in o} for o in kept]
    return fresh


def _joined(outputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join neighbouring printed pieces: a page shows each piece on a line of its own."""
    joined: list[dict[str, Any]] = []
    for output in outputs:
        if joined and output["output_type"] == joined[-1]["output_type"] == "stream":
            joined[-1] = {**joined[-1], "text": "".join([*joined[-1]["text"], *output["text"]])}
        else:
            joined.append(output)
    return joined


def numbered(cells: Sequence[dict[str, Any]]) -> None:
    """Count the code cells in order, in place: nbval takes a cell without a count as not run."""
    for count, cell in enumerate((c for c in cells if c["cell_type"] == "code"), start=1):
        cell["execution_count"] = count
        for output in cell["outputs"]:
            if "execution_count" in output:
                output["execution_count"] = count


def need(result: course.Result) -> str:
    """The line of a lesson's head that says what it takes, from a measurement."""
    minutes, tens = f"{result.seconds / 60:.0f} min", f"{10 * round(result.seconds / 10 + 0.5)} s"
    took = minutes if result.seconds >= 90 else tens
    memory = f"{result.peak_gb:.1f} GB of RAM; VRAM at 8 B: not measured yet."
    return f"**You need** (measured on `tiny`, two CPU cores) about {took} and {memory}"


def stamp(executed: Path, notebook: Path, profile: str, result: course.Result) -> None:
    """Take the scrubbed outputs of ``executed`` into ``notebook``, and record what made them."""
    done = read_json(executed)
    given = "injected-parameters"
    cells = [scrub(c) for c in done["cells"] if given not in c["metadata"].get("tags", ())]
    numbered(cells)
    head = "".join(cells[0]["source"])
    cells[0]["source"] = re.sub(r"\*\*You need\*\*.*$", need(result), head, flags=re.MULTILINE)
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    language = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python",
                "pygments_lexer": "ipython3"}  # fmt: skip
    made = {"profile": profile, "source": course.source_hash(cells), "versions": versions()}
    metadata = {"kernelspec": kernel, "language_info": language, course.STAMP: made}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    text = json.dumps(whole, indent=1, ensure_ascii=False)
    with whole_file(notebook) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def timings_table(timings: Mapping[str, Mapping[str, Any]]) -> str:
    """The measured times and memory of the lessons as a Markdown table."""
    lines = ["| lesson | min:s | peak RAM |", "|---|---|---|"]
    for n, t in sorted(timings.items()):
        lines.append(f"| {n} | {course.clock(t['seconds'])} | {t['peak_gb']:.1f} GB |")
    total = course.clock(sum(t["seconds"] for t in timings.values()))
    return "\n".join([*lines, f"| all | {total} | |"])


def cost_table(folder: Path = MEASURED) -> str:
    """README's table: the 8 B model on every GPU, estimated, and every run that was measured."""
    head = "| model | on | one micro-batch | peak memory | tokens/s | minutes an epoch | from |"
    lines, runs = [head, "|---|---|---|---|---|---|---|"], estimate.read_runs(folder)
    gpus = [name for name, card in estimate.CARDS.items() if card.capability]
    bills = [estimate.estimate("llama-8b", name, runs=runs) for name in gpus]
    lines += [
        f"| `llama-8b` | {e.card.name} | {e.micro_words} | "
        f"{e.run.peak_gb if e.run else e.memory_gb:.1f} GB | {e.tokens_per_second:,.0f} | "
        f"{e.minutes:,.0f} | {e.basis} |"
        for e in bills
    ]
    shown = [e.run for e in bills]
    for run in (r for r in runs if r.profile in PROFILES and not any(r is s for s in shown)):
        sizes = estimate.TRAINING_PART.items()
        tokens = next(tokens for most, (_, tokens) in sizes if most >= run.longest)
        lines.append(
            f"| `{run.profile}` | {run.device} | 1 x {run.micro.length:,} tokens | "
            f"{run.peak_gb:.1f} GB | {run.tokens_per_second:,.0f} | "
            f"{tokens / run.tokens_per_second / 60:,.0f} | measured, {run.date} |"
        )
    return "\n".join(lines)


def span(values: Sequence[float], form: str = "{:.2f}") -> str:
    """A mean with its 95 % interval: 0.12 [0.10, 0.14]."""
    mean, low, high = (form.format(value) for value in values)
    return f"{mean} [{low}, {high}]"


def read_run(profile: str) -> dict[str, Any] | None:
    """The committed reference run of a profile: reference.json, and its metrics by name."""
    folder = reference.FOLDER / profile
    if not (folder / "metrics" / "ask.json").is_file():
        return None
    metrics = {path.stem: read_json(path) for path in (folder / "metrics").glob("*.json")}
    return {**read_json(folder / "reference.json"), "metrics": metrics}


LOOK_UP = "nearest training answer"  # lesson 05's baseline


def dial_table() -> str:
    """README's table: what each position of the dial gave, or that nobody has measured it."""
    head = "profile | training rows | lessons | peak RAM | ROUGE-L, base | look-up | tuned |"
    lines = [f"| {head} measured on |", "|---|" + "---|" * 7]
    for name in PROFILES:
        if not (run := read_run(name)):
            lines.append(f"| `{name}` | not measured |" + " |" * 6)
            continue
        arms = run["metrics"]["ask"]["arms"]
        scores = " | ".join(span(arms[arm]["ROUGE-L"]) for arm in ("base", LOOK_UP, "tuned"))
        took = f"{len(run['seconds'])} in {sum(run['seconds'].values()) / 60:,.0f} min"
        rows, where = run["metrics"]["train"]["rows"], ",".join(run["hardware"].split(",")[:2])
        lines.append(
            f"| `{name}` | {rows:,} | {took} | {run['peak_gb']:.1f} GB | {scores} "
            f"| {where}, {run['date']} |"
        )
    return "\n".join(lines)


def newest_run() -> dict[str, Any] | None:
    """The reference run on real data of the largest profile."""
    folder = reference.folder_with("metrics/ask.json")
    return read_run(folder.name) if folder else None


def finding() -> str:
    """README's first picture and what it says."""
    if not (run := newest_run()):
        return "No reference run is in this checkout: `make real` makes one."
    arms, outcome = run["metrics"]["ask"]["arms"], run["metrics"]["outcome"]
    (_, before), *_, (_, after) = run["metrics"]["train"]["validation_curve"]
    low, high = outcome["rouge_l_gain_ci95"]
    side = "beats" if low > 0 else "loses to" if high < 0 else "cannot be told apart from"
    rouge = {arm: span(cells["ROUGE-L"]) for arm, cells in arms.items()}
    shown = "; ".join(f"{arm} {said}" for arm, said in rouge.items())
    stops = [f"{outcome[f'stop_rate_{arm}']:.0%}" for arm in ("base", "tuned")]
    return "\n".join([
        f"![Dots with 95 % intervals for {len(arms)} ways to answer. ROUGE-L: {shown}.]"
        f"(notebooks/figures/{PICTURE})",
        "",
        f"*A real run: {reference.label(run)}. {outcome['rows']} questions about",
        f"{outcome['diseases']} diseases that are not in the training set. The look-up returns the",
        "answer to the most similar training question: it needs no training.*",
        "",
        f"Training on {run['metrics']['train']['rows']:,} rows took the validation loss from",
        f"{before:.2f} to {after:.2f} nats a token. Answers that end by themselves went from",
        f"{stops[0]} to {stops[1]}. By ROUGE-L the tuned model {side} its base:",
        f"{rouge['tuned']} against {rouge['base']}. The look-up gets {rouge[LOOK_UP]}.",
    ])  # fmt: skip


def draw_finding(picture: Path) -> None:
    """Draw README's first picture from the newest reference run on real data."""
    if not (run := newest_run()):
        return
    arms = run["metrics"]["ask"]["arms"]
    table = {arm: {s: tuple(c) for s, c in cells.items()} for arm, cells in arms.items()}
    rouge = {arm: f"{cells['ROUGE-L'][0]:.2f}" for arm, cells in arms.items()}
    title = f"ROUGE-L after training: {rouge['tuned']}; before: {rouge['base']}; "
    title += f"a look-up without a model: {rouge[LOOK_UP]}"
    plots.intervals(table, title, "0 to 1; dots with 95 % intervals", save=picture, width=8)


def verified(having: Mapping[str, str]) -> str:
    """The line of README with the date and the versions of the last full run."""
    said = ", ".join(f"{name} {version.partition('+')[0]}" for name, version in having.items())
    return f"Last verified {time.strftime('%Y-%m-%d')}, all lessons on `tiny` in one run: {said}."


def write_pages() -> None:
    """Write what was measured into README.md, TEACHING.md and COSTS.md, and README's picture."""
    home = course.notebooks_folder()
    timings = timings_table(read_json(home / "timings.json"))
    write_between(home / "TEACHING.md", TIMINGS, timings)
    write_between(home / "COSTS.md", COSTS, cost_table())
    readme = home.parent / "README.md"
    write_between(readme, DIAL, dial_table())
    write_between(readme, FINDING, finding())
    draw_finding(home / "figures" / PICTURE)


def main(only: Sequence[str]) -> None:
    """Run the lessons, then stamp notebooks, timings, pages, the adapter and tiny's reference run.

    ``pages`` instead of numbers writes the pages alone.
    """
    home = course.notebooks_folder()
    if list(only) == ["pages"]:
        return write_pages()
    keep = None if only else reference.FOLDER / "tiny"
    results = course.run({"profile": "tiny"}, only, keep)
    folder = Path(default_out()) / "tiny"
    for notebook, result in zip(course.lessons(only), results, strict=True):
        stamp(folder / "notebooks" / notebook.name, notebook, "tiny", result)
        if notebook.name.startswith("04"):
            keep_adapter(folder)
    record = home / "timings.json"
    timings = read_json(record) if record.is_file() else {}
    for result in results:
        took = {"seconds": round(result.seconds), "peak_gb": round(result.peak_gb, 1)}
        timings[result.lesson[:2]] = took
    write_json(record, timings)
    write_pages()
    if not only:
        write_between(home.parent / "README.md", VERIFIED, verified(versions()))


if __name__ == "__main__":
    try:
        main(sys.argv[1].split(",") if len(sys.argv) > 1 else [])
    except CourseError as error:
        sys.exit(f"stamp: {error}")
