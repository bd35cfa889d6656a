"""Write the report of an evaluation, as Markdown and as one HTML page, from ``metrics.json``."""

from __future__ import annotations

import html
import re
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import mistune
import pandas
from markupsafe import Markup

from medquad_utils import plots
from medquad_utils.atomic import whole_file
from medquad_utils.chat import NOTICE

GROUPED = ("rougeL", "tfidf_cosine", "facts_complete", "bits_per_byte")  # shown by group
NOT_MEASURED = "not measured"
GROUP_TITLES = {"by_qtype": "question type", "by_source": "source", "by_kind": "kind of answer"}
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("medquad_utils", "assets"), undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, autoescape=True, keep_trailing_newline=True,
)  # fmt: skip


def number(value: Any) -> str:
    """Format a value: three decimals, or two digits under 0.001; thousands separated."""
    if value is None:
        return "–"
    if isinstance(value, float):
        small = 0 < abs(value) < 0.001
        return f"{value:.2g}" if small else f"{value + 0.0:,.3f}"  # + 0.0 turns -0.0 into 0.0
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def cell(values: Mapping[str, Any] | None, missing: str = NOT_MEASURED) -> str:
    """Format ``mean [low, high]``, the mean alone without an interval, or ``missing``."""
    if not values:
        return missing
    mean, low, high = (number(values[key]) for key in ("mean", "low", "high"))
    return mean if values["low"] is None else f"{mean} [{low}, {high}]"


def why_missing(score: str, arm: str, scored: bool = True) -> str:
    """Return "n/a" for a score that cannot exist, else "not measured"."""
    # A text that was looked up has no likelihood, and only some sources list facts.
    likelihood = score in ("bits_per_byte", "perplexity") and arm in ("nearest", "another disease")
    return "n/a" if likelihood or (score == "facts_complete" and scored) else NOT_MEASURED


def counted(n: int, diseases: int | None) -> str:
    """Format "98 questions about 13 diseases"."""
    about = f" about {diseases:,} disease{'s' * (diseases != 1)}" if diseases else ""
    return f"{n:,} question{'s' * (n != 1)}{about}"


def escaped(text: str) -> str:
    """Escape text for Markdown: no markup, no HTML, no end of a table's cell."""
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def sentence(sides: Mapping[str, Any], name: str) -> str:
    """State the verdict of one score, and on how many questions about how many diseases."""
    # Records of earlier versions lack the number of questions.
    size = f" ({counted(sides['n'], sides['diseases'])})" if sides.get("n") else ""
    about = f"On {name}{size}, the tuned model"
    if not (sides["even"] or sides["loses"]):
        beaten = ", ".join(sides["beats"])
        return f"{about} beats every arm without training that has this score: {beaten}."
    parts = {"it beats": "beats", "no difference can be told from": "even", "it loses to": "loses"}
    text = "; ".join(f"{what} {', '.join(sides[k])}" for what, k in parts.items() if sides[k])
    return f"{about} does not beat every arm without training: {text}."


def sentences(metrics: Mapping[str, Any]) -> list[str]:
    """State the verdicts of all scores, or that the questions are too few."""
    few, about = metrics["interval"]["fewest_rows"], metrics["about_scores"]
    verdicts = [sentence(sides, about[sides["score"]]["name"]) for sides in metrics["verdict"]]
    too_few = f"Questions about fewer than {few} diseases are too few for an interval"
    return verdicts or [f"{too_few}, and so for a verdict."]


def table(metrics: Mapping[str, Any]) -> str:
    """Format the main scores, a line for each arm, and the verdicts, for a terminal."""
    arms, columns = metrics["overall"]["arms"], {}
    for key in GROUPED:
        shown = {arm: cell(cells.get(key), why_missing(key, arm)) for arm, cells in arms.items()}
        columns[metrics["about_scores"][key]["name"]] = shown
    return "\n".join([pandas.DataFrame(columns).to_string(), *sentences(metrics)])


def write(metrics: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` (one file, pictures inside) and ``report.md`` from the metrics."""
    page, path = folder / "report.html", folder / "report.md"
    # Every value that the template shows is escaped, except the output of macros.
    markdown = TEMPLATES.overlay(
        finalize=lambda v: v if isinstance(v, Markup) else Markup(escaped(number(v)))
    )
    markdown.filters |= {"number": number, "cell": cell, "short": plots.short}
    markdown.globals |= {"why_missing": why_missing, "counted": counted}
    text = markdown.get_template("report.md.jinja").render(
        m=metrics, notice=NOTICE, sentences=sentences(metrics),
        grouped=GROUPED, group_titles=GROUP_TITLES, figures=_figures(metrics, folder),
    )  # fmt: skip
    text = re.sub(r"\n{3,}", "\n\n", text)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    body = Markup(mistune.create_markdown(renderer=_Page(folder), plugins=["table"])(text))
    title = f"Evaluation: {metrics['recipe']['model']} before and after tuning"
    return write_page(page, "base.html.jinja", {"title": title, "body": body}), path


def write_page(path: Path, template: str, values: Mapping[str, Any]) -> Path:
    """Write an HTML page without scripts or links to load; all but ``Markup`` is escaped."""
    with whole_file(path) as temporary:
        text = TEMPLATES.get_template(template).render(values)
        temporary.write_text(text, encoding="utf-8")
    return path


class _Page(mistune.HTMLRenderer):
    """Markdown to HTML: text escaped, pictures embedded, wide tables that scroll on their own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(escape=True)
        self.folder = folder

    def text(self, text: str) -> str:
        return html.escape(html.unescape(text))  # mistune does not read "&lt;" as "<"

    def image(self, text: str, url: str, title: str | None = None) -> str:
        data = b64encode((self.folder / url).read_bytes()).decode()
        return f'<img src="data:image/png;base64,{data}" alt="{html.escape(html.unescape(text))}">'

    def table(self, text: str) -> str:
        header = ", ".join(re.findall(r"<th[^>]*>(.*?)</th>", text))
        region = f'<div class="wide" role="region" aria-label="table: {header}" tabindex="0">'
        return f"{region}<table>{text}</table></div>\n"

    def table_cell(self, text: str, align: str | None = None, head: bool = False) -> str:
        return f'<th scope="col">{text}</th>\n' if head else f"<td>{text}</td>\n"


def _figures(metrics: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Draw likeness by arm and ROUGE-L by group; name -> alternative text."""
    about, arms = metrics["about_scores"], metrics["overall"]["arms"]
    alike = {k: s["name"] for k, s in about.items() if (s["unit"], s["better"]) == ("0 to 1", "up")}
    likeness = {a: {alike[k]: c for k, c in row.items() if k in alike} for a, row in arms.items()}
    tables = {"scores": ("Likeness to the reference, by arm", likeness)}
    for name, title in GROUP_TITLES.items():
        groups = metrics[name].items()
        by_group = {arm: {g: part["arms"][arm]["rougeL"] for g, part in groups} for arm in arms}
        if len(groups) > 1:
            tables[name] = (f"ROUGE-L by {title}", by_group)
    alts = {}
    for name, (title, cells) in tables.items():
        spans = {
            arm: {group: (c["mean"], c["low"], c["high"]) for group, c in row.items()}
            for arm, row in cells.items()
        }
        plots.intervals(spans, title, "0 to 1", save=folder / "figures" / f"{name}.png")
        first = next(iter(cells["base"]))
        means = [
            f"{arm} {number(row[first]['mean'])}" for arm, row in cells.items() if first in row
        ]
        said = f"{title}. At {first}: {', '.join(means)}."
        alts[name] = f"{said} All values are in the table beside it."
    return alts
