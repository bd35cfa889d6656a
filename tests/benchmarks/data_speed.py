"""How fast MedQuAD is parsed, cleaned, split and tokenised: the package beside the plain pandas way, in the same run.

Run it from the root of the checkout: ``python tests/benchmarks/data_speed.py --xml MedQuAD``. See README.md beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # the checkout, whatever is installed

from medquad_utils import chat, cleaning, data, plots  # noqa: E402
from medquad_utils.profiles import TINY_MODEL  # noqa: E402

if TYPE_CHECKING:
    import pandas

ARMS = ("ours", "plain")
STAGES = ("parse", "clean", "split", "tokenise")  # what the ratio is about
APART = ("start", "leakage")  # imports and the tokenizer; the leakage report, which only ours has
SIZES = (1_000, 2_000, 4_000, 8_000)  # and all rows, and copies of all rows
PACKAGES = ("datasets", "networkx", "numpy", "pandas", "pyarrow", "tokenizers", "transformers")
GOAL_RATIO, GOAL_SECONDS, GOAL_MIB = 3, 60, 1_500e6 / 2**20  # 1.5 GB
THREADS = "TOKENIZERS_PARALLELISM"


# ---- clock ----------------------------------------------------------------------------------------------------------


def peak_mib() -> float:
    """The most memory this process has held so far, in MiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # unlike getrusage, this does not start from what the parent process held
        return int(re.findall(r"VmHWM:\s*(\d+)", status.read_text())[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class Clock:
    """Seconds of each stage, and the peak of memory at its end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 4)
        self.peak[stage] = round(peak_mib(), 1)


def digest(values: Iterable[bytes]) -> str:
    """A short hash of a sequence of byte strings and of where each one ends."""
    made = hashlib.sha256()
    for value in values:
        made.update(len(value).to_bytes(8, "big") + value)
    return made.hexdigest()[:16]


def outcome(
    clock: Clock,
    loaded: int,
    kept: Iterable[tuple[str, str]],
    groups: Sequence[int],
    parts: Iterable[int],
    tokens: Iterable[tuple[Sequence[int], Sequence[int]]],
) -> dict[str, Any]:
    """What an arm hands back: its times and peaks, counts, and a hash of each result. ``tokens`` holds (ids, labels) by row."""
    pairs = [array("i", [len(ids), *ids, *labels]) for ids, labels in tokens]
    texts = [f"{question}\0{answer}".encode() for question, answer in kept]
    counts = {"loaded": loaded, "kept": len(texts), "groups": len(set(groups)), "tokens": sum(pair[0] for pair in pairs)}
    results = {
        "rows": digest(texts),
        "groups": digest([array("i", groups).tobytes()]),
        "parts": digest([array("i", parts).tobytes()]),
        "tokens": digest(pair.tobytes() for pair in pairs),
    }
    return {"seconds": clock.seconds, "peak_mib": clock.peak, "counts": counts, "results": results}


# ---- arm A: the package ---------------------------------------------------------------------------------------------


def ours(folder: Path) -> dict[str, Any]:
    """Parse, clean, split and tokenise with the package."""
    clock = Clock()
    with clock("start"):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    with clock("parse"):
        loaded = data.load_xml(folder)
    with clock("clean"):
        rows, _ = cleaning.clean(loaded.rows)
    with clock("split"):
        splits = data.split(rows)
    with clock("tokenise"):
        encoded = chat.encode_all(tokenizer, rows)
    with clock("leakage"):
        data.leakage_report(splits)
    where = {id(row): part for part, name in enumerate(data.PARTS) for row in getattr(splits, name)}
    kept = ((row["question"], row["answer"]) for row in rows)
    parts = [where[id(row)] for row in rows]
    return outcome(clock, len(loaded.rows), kept, data.groups(rows), parts, ((e.ids, e.labels) for e in encoded))


# ---- arm B: pandas, ElementTree and map -----------------------------------------------------------------------------
# What a name, a pattern, a threshold or a message is, both arms read from the package; how the work is done is each arm's own.


def plain_parse(folder: Path) -> pandas.DataFrame:
    """File by file into a list of records, then a table."""
    import pandas

    def texts(root: ElementTree.Element, path: str) -> list[str] | None:
        return [e.text.strip() for e in root.findall(path) if e.text and e.text.strip()] or None

    records = []
    for file in sorted(folder.rglob("*.xml")):
        try:
            root = ElementTree.parse(file).getroot()
        except ElementTree.ParseError:
            continue
        for pair in root.findall(".//QAPair"):
            question, answer = pair.find("Question"), (pair.findtext("Answer") or "").strip()
            asked = (question.text or "").strip() if question is not None else ""
            if question is None or not asked or not question.get("qtype") or not answer:
                continue
            record = {
                "qtype": question.get("qtype"),
                "question": asked,
                "answer": answer,
                "focus": (root.findtext("Focus") or "").strip() or None,
                "synonyms": texts(root, ".//Synonym"),
                "cui": texts(root, ".//CUI"),
                "semantic_type": texts(root, ".//SemanticType"),
                "source": root.get("source"),
                "url": root.get("url"),
                "document_id": root.get("id"),
            }
            records.append(record)
    return pandas.DataFrame(records)


def plain_clean(table: pandas.DataFrame) -> pandas.DataFrame:
    """The rules of ``cleaning.RULES``, one after the other, each over the whole column."""

    def drop(wrong: Any) -> None:
        nonlocal table
        table = table[~table["answer"].apply(lambda answer: bool(wrong(answer)))].copy()

    def cut(pattern: re.Pattern[str]) -> None:
        table["answer"] = table["answer"].str.replace(pattern, "", regex=True).str.strip()

    def tidy(column: pandas.Series) -> pandas.Series:
        spaces, breaks = re.compile(r"[^\S\n]+"), re.compile(r" ?\n[ \n]*")
        return column.str.replace(spaces, " ", regex=True).str.replace(breaks, "\n", regex=True).str.strip()

    def phenotypes_alone(answer: str) -> bool:
        rest = cleaning.PHENOTYPES[1].sub("", answer).strip()
        return rest != answer and (not rest or cleaning.HEADING.fullmatch(rest) is not None)

    first_heading = re.compile(rf"\A{cleaning.HEADING.pattern}", cleaning.HEADING.flags)
    drop(cleaning.LINK_LIST.match)
    drop(phenotypes_alone)
    cut(cleaning.PHENOTYPES[1])
    for _, pattern in cleaning.NAVIGATION:
        cut(pattern)
    drop(lambda answer: not answer)
    cut(cleaning.KEY_POINTS[1])
    drop(cleaning.HEADING.fullmatch)
    table["answer"] = table["answer"].apply(lambda answer: first_heading.sub("", answer))
    cut(cleaning.INSTITUTE[1])
    table["answer"] = tidy(table["answer"])
    drop(lambda answer: len(answer.split()) < 5)
    table["question"] = tidy(table["question"]).str.replace("\n", " ")
    return table.drop_duplicates(["question", "answer"]).reset_index(drop=True)


def plain_groups(table: pandas.DataFrame) -> list[int]:
    """Rows joined through a graph of rows and of what they carry; a group is a connected component."""
    import networkx

    concepts = table[["focus", "cui"]].explode("cui").groupby("cui")["focus"].nunique()
    rare = set(concepts[concepts <= data.RARE].index)
    foci = table.groupby("answer")["focus"].transform("nunique")
    graph = networkx.Graph()
    for row, common in zip(table.itertuples(), foci > data.BOILERPLATE, strict=True):
        keys = [("focus", row.focus), ("question", row.normalised)]
        keys += [("url", row.url)] if isinstance(row.url, str) and row.url else []
        keys += [("cui", cui) for cui in row.cui or () if cui in rare]
        keys += [] if common else [("answer", row.answer)]
        graph.add_edges_from((row.Index, key) for key in keys)
    group_of = {}
    for number, component in enumerate(networkx.connected_components(graph)):
        group_of.update(dict.fromkeys((node for node in component if isinstance(node, int)), number))
    return [group_of[index] for index in table.index]


def plain_split(table: pandas.DataFrame, seed: int = 0) -> pandas.DataFrame:
    """The table with the columns ``group`` (numbered as they appear) and ``part`` (0, 1 or 2)."""
    import pandas

    def focus(row: pandas.Series) -> str:
        if isinstance(row["focus"], str):
            return data.normalise(row["focus"])
        found = data.template_of(row["question"])
        return data.normalise(found[1]) if found else ""

    def part(group: pandas.Series) -> int:
        place = int(hashlib.sha256(f"{seed}:{data.SALT}:{group['name']}".encode()).hexdigest()[:16], 16) / 2**64
        train, validation, _ = data.FRACTIONS
        return 0 if group["size"] > most or place < train else 1 if place < train + validation else 2

    table = table.assign(focus=table.apply(focus, axis=1), normalised=table["question"].apply(data.normalise))
    table["group"] = pandas.factorize(pandas.Series(plain_groups(table)))[0]
    most = max(1, min(data.FRACTIONS[1:]) * len(table))
    names = table["focus"].where(table["focus"] != "", table["normalised"])
    groups = names.groupby(table["group"]).agg(["min", "size"]).rename(columns={"min": "name"})
    table["part"] = table["group"].map(groups.apply(part, axis=1))
    return table


def plain(folder: Path) -> dict[str, Any]:
    """Parse, clean, split and tokenise as most notebooks do it."""
    clock = Clock()
    with clock("start"):
        import datasets
        import networkx  # noqa: F401
        import pandas  # noqa: F401
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
        datasets.disable_progress_bars()

    def tokenise(row: dict[str, Any]) -> dict[str, list[int]]:
        messages = chat.prompt_messages(row["question"])
        answer = {"role": "assistant", "content": chat.without_tokens(row["answer"])}
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        full = tokenizer.apply_chat_template([*messages, answer])["input_ids"]
        return {"input_ids": full, "labels": [chat.IGNORED] * len(prompt) + full[len(prompt) :]}

    with clock("parse"):
        table = plain_parse(folder)
    loaded = len(table)
    with clock("clean"):
        table = plain_clean(table)
    with clock("split"):
        table = plain_split(table)
    with clock("tokenise"):
        texts = datasets.Dataset.from_pandas(table[["question", "answer"]])
        encoded = texts.map(tokenise, remove_columns=["question", "answer"])
    kept = zip(table["question"], table["answer"], strict=True)
    tokens = ((row["input_ids"], row["labels"]) for row in encoded)
    return outcome(clock, loaded, kept, table["group"].tolist(), table["part"].tolist(), tokens)


# ---- runs -----------------------------------------------------------------------------------------------------------


def parallelism() -> str:
    """The setting of the tokenizers' threads that both arms run under: what the caller has set, or their default."""
    return os.environ.get(THREADS, "true")


def run(arm: str, folder: Path) -> dict[str, Any]:
    """One arm over ``folder`` in a process of its own.

    Raises:
        RuntimeError: the process ended with an error, whose last lines are the message.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", THREADS: parallelism()}
    command = [sys.executable, str(Path(__file__).resolve()), "--xml", str(folder), "--arm", arm]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"arm {arm!r} ended with {done.returncode}: {done.stderr[-2000:]}")
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return made


def load() -> float:
    """Processes that wanted a core during the last minute."""
    return round(os.getloadavg()[0], 2)


def check(ours: dict[str, Any], plain: dict[str, Any]) -> None:
    """That both arms did the same work.

    Raises:
        ValueError: they kept other rows, or made other groups, parts or tokens: their times say nothing then.
    """
    for what in ("counts", "results"):
        if ours[what] != plain[what]:
            raise ValueError(f"the two arms differ in {what}: ours {ours[what]}, plain {plain[what]}")


def pair(folder: Path) -> dict[str, Any]:
    """Ours, then plain, and the load before and after."""
    before = load()
    made = {arm: run(arm, folder) for arm in ARMS}
    check(made["ours"], made["plain"])
    return {"load": [before, load()], **made}


def total(arm: dict[str, Any]) -> float:
    """Seconds of parse, clean, split and tokenise together."""
    return sum(float(arm["seconds"][stage]) for stage in STAGES)


def middle(values: Sequence[float]) -> list[float]:
    """Median, least and largest."""
    return [round(v, 3) for v in (statistics.median(values), min(values), max(values))]


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each stage and the total: median, least and largest of the seconds of both arms and of plain / ours, round by round."""
    lines = {}
    for stage in (*STAGES, "total"):
        spent = {arm: [total(r[arm]) if stage == "total" else r[arm]["seconds"][stage] for r in rounds] for arm in ARMS}
        ratios = [b / a for a, b in zip(spent["ours"], spent["plain"], strict=True)]
        lines[stage] = {**{arm: middle(spent[arm]) for arm in ARMS}, "ratio": middle(ratios)}
    for stage in APART:
        lines[stage] = {arm: middle([r[arm]["seconds"][stage] for r in rounds]) for arm in ARMS if stage in rounds[0][arm]["seconds"]}
    memory = {arm: middle([r[arm]["peak_mib"]["tokenise"] for r in rounds]) for arm in ARMS}
    return {"seconds": lines, "peak_mib": {**memory, "ours, leakage too": middle([r["ours"]["peak_mib"]["leakage"] for r in rounds])}}


# ---- how it grows ---------------------------------------------------------------------------------------------------


def some(folder: Path, rows: int, out: Path) -> None:
    """Copy files of ``folder``, in an order drawn once, until they hold ``rows`` answers."""
    held = 0
    for file in sorted(folder.rglob("*.xml"), key=lambda file: hashlib.sha256(file.name.encode()).digest()):
        if held >= rows:
            return
        held += sum(bool((e.text or "").strip()) for e in ElementTree.parse(file).iter("Answer"))
        (out / file.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(file, out / file.parent.name / file.name)


def copies(folder: Path, number: int, out: Path) -> None:
    """Every file ``number`` times, each with its own focus, concepts, URL, id, questions and answers, so that groups multiply too."""
    for copy in range(number):
        for file in sorted(folder.rglob("*.xml")):
            tree = ElementTree.parse(file)
            if copy:
                mark(tree.getroot(), f"({copy})")
            place = out / str(copy) / file.parent.name
            place.mkdir(parents=True, exist_ok=True)
            tree.write(place / file.name, encoding="utf-8")


def mark(root: ElementTree.Element, sign: str) -> None:
    """Put ``sign`` behind names, before a question's last blank and question mark, and behind an answer's last full stop."""
    for name in ("url", "id"):
        root.set(name, f"{root.get(name)}{sign}")
    for tag in ("Focus", "CUI", "Question", "Answer"):
        for element in root.iter(tag):
            if text := (element.text or "").strip():
                end = {"Question": text.rfind(" ?"), "Answer": text.rfind(".") + 1}.get(tag, 0)
                end = end if end > 0 else len(text)
                element.text = text[:end] + sign + text[end:]


def growth(folder: Path, number: int) -> Iterator[dict[str, Any]]:
    """``ours`` on ever more rows, then on all, then on ``number`` copies of all (left out for 0)."""

    def point(place: Path, times: int = 1) -> dict[str, Any]:
        before, made = load(), run("ours", place)
        del made["results"]
        return {"copies": times, "load": [before, load()], **made}

    for rows in SIZES:
        with tempfile.TemporaryDirectory() as place:
            some(folder, rows, Path(place))
            yield point(Path(place))
    yield point(folder)
    if number:
        with tempfile.TemporaryDirectory() as place:
            copies(folder, number, Path(place))
            yield point(Path(place), number)


# ---- what is written ------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The machine and the versions, without names."""
    import psutil

    return {
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, and the range in brackets where it shows."""
    middle, least, largest = (f"{value:,.{digits}f}" for value in values)
    return middle if least == largest else f"{middle} ({least} to {largest})"


def alt(results: dict[str, Any]) -> str:
    """What the figure shows, in words."""
    first, last = results["growth"][0], results["growth"][-1]
    times = "{:.1f} s for {:,} rows to {:.0f} s for {:,}".format(
        total(first), first["counts"]["loaded"], total(last), last["counts"]["loaded"]
    )
    memory = f"{first['peak_mib']['tokenise']:,.0f} to {last['peak_mib']['tokenise']:,.0f} MiB"
    largest = max(STAGES, key=lambda stage: last["seconds"][stage])
    return (
        f"Two log-log charts over the number of rows. Left: seconds, from {times} in all; {largest} takes most of them. "
        f"Right: peak memory, from {memory}, beside a dashed line at the goal of 1.5 GB."
    )


def goals(made: dict[str, Any]) -> str:
    """Whether the figures reach the goals, in words."""
    ratio, seconds = made["seconds"]["total"]["ratio"][0], made["seconds"]["total"]["ours"][0]
    held = made["peak_mib"]["ours, leakage too"][0]
    said = [
        (ratio >= GOAL_RATIO, f"plain / ours at least {GOAL_RATIO} ({ratio:.2f})"),
        (seconds < GOAL_SECONDS, f"under {GOAL_SECONDS} s ({seconds:.1f} s)"),
        (held < GOAL_MIB, f"under 1.5 GB, {GOAL_MIB:,.0f} MiB ({held:,.0f} MiB)"),
    ]
    return "Goals: " + "; ".join(f"{text}: {'reached' if reached else '**not reached**'}" for reached, text in said) + "."


def tables(results: dict[str, Any]) -> str:
    """The figures of the JSON as Markdown: the two arms, the growth, and the plot."""
    counts, made, host = results["counts"], results["summary"], results["machine"]
    loads = [value for r in results["rounds"] for value in r["load"]]
    versions = ", ".join(f"{name} {version}" for name, version in host["packages"].items())
    lines = [
        f"Measured on {results['date']}: {host['cpus']} CPU cores, {host['memory_gib']} GiB, {host['system']}, Python {host['python']}, "
        f"{versions}; {THREADS}={results['tokenizers_parallelism']}; load average {min(loads):.1f} to {max(loads):.1f}.",
        "",
        f"{counts['loaded']:,} rows loaded, {counts['kept']:,} kept, {counts['groups']:,} groups, {counts['tokens']:,} tokens, the same in "
        f"both arms; {len(results['rounds'])} rounds, median (least to largest).",
        "",
        goals(made),
        "",
        "| stage | ours, s | plain, s | plain / ours |",
        "|---|---|---|---|",
    ]
    for stage, line in made["seconds"].items():
        ratio = spread(line["ratio"]) if "ratio" in line else ""
        lines.append(f"| {stage} | " + " | ".join(spread(line[arm]) if arm in line else "" for arm in ARMS) + f" | {ratio} |")
    peak = made["peak_mib"]
    lines += [
        f"| peak memory, MiB | {spread(peak['ours'], 0)} | {spread(peak['plain'], 0)} | |",
        f"| with the leakage report, MiB | {spread(peak['ours, leakage too'], 0)} | | |",
    ]
    if results["growth"]:
        lines += [
            "",
            f"| rows | kept | groups | {' | '.join(f'{s}, s' for s in (*STAGES, 'leakage'))} | peak, MiB | peak with leakage, MiB | load |",
            "|---" * 11 + "|",
        ]
    for point in results["growth"]:
        counted = [f"{point['counts'][name]:,}" for name in ("loaded", "kept", "groups")]
        counted[0] += f" ({point['copies']} copies)" if point["copies"] > 1 else ""
        spent = [f"{point['seconds'][stage]:.2f}" for stage in (*STAGES, "leakage")]
        held = [f"{point['peak_mib'][stage]:,.0f}" for stage in ("tokenise", "leakage")]
        lines.append("| " + " | ".join([*counted, *spent, *held, f"{point['load'][0]:.1f}"]) + " |")
    if results["growth"]:
        lines += ["", f"![{alt(results)}](results/data_speed.png)"]
    return "\n".join(lines)


def draw(results: dict[str, Any], file: Path) -> None:
    """Seconds and peak memory over rows, both axes logarithmic."""
    fig, (left, right) = plots.figure(10, 4.0, 2)
    points = results["growth"]
    rows = [p["counts"]["loaded"] for p in points]
    series = {"in all": [total(p) for p in points], **{s: [p["seconds"][s] for p in points] for s in (*STAGES, "leakage")}}
    for number, (name, values) in enumerate(series.items()):
        colour = plots.INK if name == "in all" else plots.PALETTE[number - 1]
        style = {"linestyle": "--" if name == "leakage" else "-", "linewidth": 2.4 if name == "in all" else 1.5}
        left.plot(rows, values, marker="osD^vP"[number], color=colour, label=name, **style)
    left.set(xlabel="rows", ylabel="seconds")
    left.set_title("time")
    left.legend(fontsize=9)
    for number, (stage, name) in enumerate({"tokenise": "parse to tokenise", "leakage": "with the leakage report"}.items()):
        held = [p["peak_mib"][stage] for p in points]
        right.plot(rows, held, marker="oP"[number], linestyle=("-", "--")[number], color=plots.PALETTE[number], label=name, linewidth=2)
    right.axhline(GOAL_MIB, color=plots.VERMILION, linestyle=":", label="goal: under 1.5 GB")
    right.set(xlabel="rows", ylabel="peak memory, MiB")
    right.set_title("memory")
    right.legend(fontsize=9)
    for ax in (left, right):
        ax.set(xscale="log", yscale="log")
        ax.set_xticks(rows, [f"{n / 1000:.0f}k" for n in rows])
        ax.minorticks_off()
    left.yaxis.set_major_formatter("{x:g}")
    low, high = right.get_ylim()
    ticks = [n for n in (300, 400, 500, 750, 1000, 1500, 2000, 3000, 5000, 10_000, 20_000) if low <= n <= high]
    right.set_yticks(ticks, [f"{n:,}" for n in ticks])
    plots.show(fig, alt(results), file)


MARKS = "<!-- figures: written by data_speed.py from results/data_speed.json -->", "<!-- end of figures -->"


def between(text: str) -> str:
    """What stands between the two marks of README.md."""
    return data.between(text, MARKS)


def write_readme(results: dict[str, Any], file: Path) -> None:
    """Put ``tables`` between the marks of README.md."""
    data.write_between(file, MARKS, tables(results))


def measure(folder: Path, repeat: int, number: int | None) -> dict[str, Any]:
    """Everything that data_speed.json holds; ``number`` is how many copies the last point has, ``None`` leaves the growth out."""
    for file in folder.rglob("*.xml"):
        file.read_bytes()  # so that the first arm does not wait for the disk alone
    rounds = []
    for turn in range(repeat):
        rounds.append(pair(folder))
        spent = ", ".join(f"{arm} {total(rounds[-1][arm]):.2f} s" for arm in ARMS)
        print(f"round {turn + 1}: {spent}, load {rounds[-1]['load']}", flush=True)
    points = []
    for point in growth(folder, number) if number is not None else ():
        points.append(point)
        held = f"{point['peak_mib']['leakage']:,.0f} MiB"
        print(f"{point['counts']['loaded']:>9,} rows: {total(point):.2f} s, {held}, load {point['load']}", flush=True)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "tokenizers_parallelism": parallelism(),
        "counts": rounds[0]["ours"]["counts"],
        "summary": summary(rounds),
        "rounds": rounds,
        "growth": points,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--xml", type=Path, required=True, metavar="DIR", help="a clone of the MedQuAD XML")
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="DIR", help="where data_speed.json and .png go")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds of ours and plain (default 3)")
    parser.add_argument("--copies", type=int, default=10, metavar="N", help="copies of all rows in the last point of the growth (0: none)")
    parser.add_argument("--no-growth", action="store_true", help="measure the ratio alone")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)  # one arm, in this process
    options = parser.parse_args()
    if options.arm:
        print(json.dumps({"ours": ours, "plain": plain}[options.arm](options.xml)))
        return
    results = measure(options.xml, options.repeat, None if options.no_growth else options.copies)
    data.write_json(options.out / "data_speed.json", results)
    if results["growth"]:
        draw(results, options.out / "data_speed.png")
    if options.out == HERE / "results":
        write_readme(results, HERE / "README.md")
    print(tables(results))


if __name__ == "__main__":
    main()
