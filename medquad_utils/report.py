"""The report of an evaluation, as one HTML page and as Markdown; every number in it is one of ``metrics.json``."""

from __future__ import annotations

import html
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medquad_utils import plots
from medquad_utils.chat import NOTICE
from medquad_utils.files import whole_file

GROUPED = (
    "rougeL",
    "tfidf_cosine",
    "facts_complete",
    "bits_per_byte",
)  # shown by group; metrics.json has them all
EMBEDDED = "This is the embedded tiny model: its answers demonstrate the method and hold no medical knowledge to rely on."

STYLE = """
:root { color-scheme: light }
body { margin: 0; background: #fff; color: #1f2328; font: 1rem/1.5 system-ui, sans-serif }
main { max-width: 60rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem } h3 { font-size: 1rem }
h1, h2, h3, p, li, td, th { overflow-wrap: anywhere }
.notice { border-left: 4px solid #d55e00; background: #fdf3ea; padding: .6rem .9rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: left; vertical-align: top; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #d8d8d8; overflow-wrap: normal }
img { max-width: 100%; height: auto }
"""


def number(value: Any) -> str:
    """A value of the metrics as the report shows it: three decimals, thousands parted, a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{round(value, 3) + 0.0:,.3f}"  # no minus before a zero
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def cell(found: Mapping[str, Any] | None) -> str:
    """``mean [low, high]``, or the mean alone where the rows are too few for an interval."""
    if not found:
        return "–"
    bounds = "" if found["low"] is None else f" [{number(found['low'])}, {number(found['high'])}]"
    return f"{number(found['mean'])}{bounds}"


def document(title: str, parts: Sequence[str], style: str = "") -> str:
    """One HTML page around ``parts`` (markup), with nothing to load: no script runs and no address is asked."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}{style}</style></head><body><main>'
    )
    return "\n".join([head, *parts, "</main></body></html>\n"])


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of escaped texts; where a screen is narrower, it scrolls by itself."""
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    name = html.escape(f"table: {', '.join(header)}")
    return f'<div class="wide" role="region" aria-label="{name}" tabindex="0"><table><tr>{head}</tr>{body}</table></div>'


class Page:
    """The report as it grows, in HTML and in Markdown at once; what is added is plain text and gets escaped."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.html: list[str] = [f"<h1>{html.escape(title)}</h1>"]
        self.markdown: list[str] = [f"# {escaped(title)}"]

    def heading(self, text: str, level: int = 2) -> None:
        """A heading."""
        self.html.append(f"<h{level}>{html.escape(text)}</h{level}>")
        self.markdown.append(f"{'#' * level} {escaped(text)}")

    def text(self, text: str, notice: bool = False) -> None:
        """A paragraph; a ``notice`` stands out."""
        self.html.append(
            f'<p class="notice">{html.escape(text)}</p>'
            if notice
            else f"<p>{html.escape(text)}</p>"
        )
        self.markdown.append(("> " if notice else "") + escaped(text))

    def items(self, texts: Sequence[str]) -> None:
        """A list."""
        self.html.append(
            "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ul>"
        )
        self.markdown.append("\n".join(f"- {escaped(text)}" for text in texts))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table (see ``html_table``)."""
        self.html.append(html_table(header, rows))
        lines = [header, ["---"] * len(header), *([escaped(text) for text in row] for row in rows)]
        self.markdown.append("\n".join("| " + " | ".join(line) + " |" for line in lines))

    def figure(self, path: Path, alt: str) -> None:
        """A PNG: inside the HTML page, beside the Markdown."""
        data = b64encode(path.read_bytes()).decode()
        self.html.append(
            f'<p><img src="data:image/png;base64,{data}" alt="{html.escape(alt)}"></p>'
        )
        self.markdown.append(f"![{escaped(alt)}]({path.parent.name}/{path.name})")

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write ``report.html`` and ``report.md``."""
        pages = {
            "report.html": document(self.title, self.html),
            "report.md": "\n\n".join(self.markdown) + "\n",
        }
        for name, text in pages.items():
            with whole_file(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return folder / "report.html", folder / "report.md"


def escaped(text: str) -> str:
    """Text as Markdown that means nothing but itself: no markup, no HTML, no table cell's end."""
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def sentence(sides: Mapping[str, Any], name: str) -> str:
    """The verdict of one score in plain words."""
    rivals = [*sides["beats"], *sides["even"], *sides["loses"]]
    if len(sides["beats"]) == len(rivals):
        return f"On {name}, the tuned model beats every arm without training that has this score: {', '.join(rivals)}."
    parts = {
        "it beats": sides["beats"],
        "no difference can be told from": sides["even"],
        "it loses to": sides["loses"],
    }
    said = "; ".join(f"{what} {', '.join(arms)}" for what, arms in parts.items() if arms)
    return f"On {name}, the tuned model does not beat every arm without training: {said}."


def write(metrics: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` (one file, pictures inside) and ``report.md`` to ``folder``; returns their paths.

    ``metrics`` is what ``evaluation.evaluate`` returned, or ``metrics.json`` read again.

    Raises:
        CourseError: the folder cannot be written.
    """
    page = Page(f"Evaluation: {metrics['recipe']['model']} before and after tuning")
    page.text(NOTICE, notice=True)
    if metrics["recipe"]["model"] == "embedded":
        page.text(EMBEDDED, notice=True)
    _verdict(page, metrics)
    _scores(page, metrics, folder / "figures")
    for name, title in {
        "by_qtype": "question type",
        "by_source": "source",
        "by_kind": "kind of answer",
    }.items():
        _groups(page, metrics, name, title, folder / "figures")
    _safety(page, metrics["safety"])
    _forgetting(page, metrics["forgetting"])
    _notes(page, metrics)
    _examples(page, metrics["examples"])
    page.heading("What the scores mean")
    rows = [
        [s["name"], s["unit"], s["better"], s["what"]] for s in metrics["about_scores"].values()
    ]
    page.table(["score", "unit", "better", "what it measures"], rows)
    page.heading("What was run")
    page.table(
        ["setting", "value"],
        [[name.replace("_", " "), number(value)] for name, value in metrics["recipe"].items()],
    )
    return page.write(folder)


def table(metrics: Mapping[str, Any]) -> str:
    """The scores that the verdict is about, a line an arm, and the verdict: what a terminal shows."""
    about, arms = metrics["about_scores"], metrics["overall"]["arms"]
    shown = [key for key in GROUPED if any(key in cells for cells in arms.values())]
    lines = plots.Table(
        [[arm, *(cell(cells.get(key)) for key in shown)] for arm, cells in arms.items()],
        ["arm", *(about[key]["name"] for key in shown)],
    )
    return "\n".join([str(lines), *_sentences(metrics)])


def _sentences(metrics: Mapping[str, Any]) -> list[str]:
    few = f"Under {number(metrics['interval']['fewest_rows'])} questions are too few for an interval, and so for a verdict."
    return [
        sentence(sides, metrics["about_scores"][sides["score"]]["name"])
        for sides in metrics["verdict"]
    ] or [few]


def _verdict(page: Page, metrics: Mapping[str, Any]) -> None:
    page.heading("In short")
    page.text(
        f"{number(metrics['questions'])} questions of {metrics['file']}, answered by each of these arms:"
    )
    page.items([f"{arm}: {what}" for arm, what in metrics["about_arms"].items()])
    page.text("What the paired differences say:")
    page.items(_sentences(metrics))
    if not metrics["held_out"]:
        page.text(
            "These questions are not held out: some share a disease or a question with the training rows (see the table of leakage). "
            "The scores measure memory as well.", notice=True,
        )  # fmt: skip
    of, resamples = (number(metrics["interval"][key]) for key in ("percent", "resamples"))
    page.text(
        f"Brackets hold {of} % bootstrap intervals ({resamples} resamples of the questions). An arm beats another where the whole interval "
        "of the paired difference lies on the better side of zero."
    )


def _scores(page: Page, metrics: Mapping[str, Any], figures: Path) -> None:
    about, overall = metrics["about_scores"], metrics["overall"]
    page.heading("Scores")
    _score_table(page, about, overall["arms"])
    page.text(
        "Bits per byte and perplexity exist for models only; they are about the first reference, not about the answer."
    )
    if metrics["bert_score"]:
        page.text(f"BERTScore is empty: {metrics['bert_score']}.")
    unit = about["rougeL"]["unit"]
    alike = [
        key for key, score in about.items() if score["unit"] == unit and score["better"] == "up"
    ]
    table = {
        arm: {about[s]["name"]: cells[s] for s in alike if s in cells}
        for arm, cells in overall["arms"].items()
    }
    _intervals(page, table, "Likeness to the reference, by arm", unit, figures / "scores.png")
    for before in (name for name in overall if name != "arms"):
        page.heading(f"Paired difference, {before}", 3)
        _score_table(page, about, overall[before])


def _score_table(page: Page, about: Mapping[str, Any], arms: Mapping[str, Any]) -> None:
    shown = [key for key in about if any(key in cells for cells in arms.values())]
    page.table(
        ["score", *arms],
        [[about[key]["name"], *(cell(cells.get(key)) for cells in arms.values())] for key in shown],
    )


def _groups(page: Page, metrics: Mapping[str, Any], name: str, title: str, figures: Path) -> None:
    groups, about = metrics[name], metrics["about_scores"]
    if len(groups) < 2:
        return
    page.heading(f"By {title}")
    page.text(
        f"Groups of under {number(metrics['interval']['fewest_rows'])} questions have no interval."
    )
    arms = list(metrics["about_arms"])
    for key in GROUPED:
        found = {
            group: {arm: parts["arms"][arm][key] for arm in arms if key in parts["arms"][arm]}
            for group, parts in groups.items()
        }
        having = [arm for arm in arms if any(arm in cells for cells in found.values())]
        if having:
            page.heading(about[key]["name"], 3)
            rows = [
                [group, number(groups[group]["n"]), *(cell(cells.get(arm)) for arm in having)]
                for group, cells in found.items()
            ]
            page.table([title, "n", *having], rows)
        if key == GROUPED[0]:
            table = {
                arm: {group: cells[arm] for group, cells in found.items() if arm in cells}
                for arm in having
            }
            _intervals(
                page,
                table,
                f"{about[key]['name']} by {title}",
                about[key]["unit"],
                figures / f"{name}.png",
            )


def _intervals(
    page: Page, table: Mapping[str, Mapping[str, Any]], title: str, unit: str, path: Path
) -> None:
    """A picture of the cells that have an interval."""
    drawn = {
        series: {
            group: (c["mean"], c["low"], c["high"])
            for group, c in cells.items()
            if c["low"] is not None
        }
        for series, cells in table.items()
    }
    drawn = {series: cells for series, cells in drawn.items() if cells}
    if not drawn:
        return
    first = next(iter(next(iter(drawn.values()))))
    values = ", ".join(
        f"{series} {number(cells[first][0])}" for series, cells in drawn.items() if first in cells
    )
    alt = f"{title}: a dot for each mean, with a whisker for its interval. At {first}: {values}. All values are in the table beside it."
    plots.intervals(drawn, title, unit, alt, save=path)
    page.figure(path, alt)


def _safety(page: Page, safety: Mapping[str, Any]) -> None:
    def share(part: Mapping[str, Any]) -> str:
        low, high = map(number, part["ci95"])
        return f"{number(part['passed'])} of {number(part['n'])}: {number(part['share'])} [{low}, {high}]"

    page.heading("Safety")
    page.text(
        f"Answers to {number(safety['prompts'])} prompts that do what is expected, as plain rules judge them; no clinician has looked."
    )
    rows = [
        [name.replace("_", " "), share(safety["base"][name]), share(safety["tuned"][name])]
        for name in safety["base"]
    ]
    page.table(["prompts", "base", "tuned"], rows)
    rule, error = safety["outer_rule"], safety["rule_error"]
    page.items([
        f"The red-flag rule outside the model catches {number(rule['caught'])} of {number(rule['n'])} urgent prompts, and raises "
        f"{number(rule['false_alarms'])} false alarms on the {number(rule['others'])} others.",
        f"The judging rules themselves err on {number(error['wrong_passes'])} unsafe and {number(error['wrong_fails'])} safe answers of "
        f"{number(error['n'])} that the authors of the course, who also wrote the rules, labelled: "
        f"{number(error['error'])} [{', '.join(map(number, error['ci95']))}].",
    ])  # fmt: skip


def _forgetting(page: Page, found: Mapping[str, Any]) -> None:
    page.heading("Forgetting")
    page.text(
        f"Perplexity of {number(found['texts'])} texts that are no questions, before and after tuning; a ratio above one: forgotten."
    )
    page.table(
        ["base", "tuned", "ratio"],
        [[cell(found["base"]), cell(found["tuned"]), cell(found["ratio"])]],
    )


def _notes(page: Page, metrics: Mapping[str, Any]) -> None:
    page.heading("Leakage")
    page.text(
        "Share of the questions whose question, disease, answer or runs of words also stand in the training rows."
    )
    page.table(
        ["shared", "share"], [[what, number(share)] for what, share in metrics["leakage"].items()]
    )
    page.heading("What was skipped, changed or looked odd")
    rows = [
        [note["what"], number(note["n"]), ", ".join(map(number, note["rows"]))]
        for note in metrics["notes"]
    ]
    if rows:
        page.table(["what", "questions", "first rows of the file"], rows)
    else:
        page.text("Nothing.")


def _examples(page: Page, examples: Sequence[Mapping[str, Any]]) -> None:
    page.heading("Examples")
    page.text(
        "The questions that the tuned model answers best, middling and worst by ROUGE-L; long texts are shortened."
    )
    for example in examples:
        page.heading(f"{example['what']} (row {number(example['row'])})", 3)
        rows = [
            ["question", example["question"]],
            ["reference", example["reference"]],
            *map(list, example["answers"].items()),
        ]
        page.table(["who", "text"], rows)
