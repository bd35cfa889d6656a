"""What the committed notebooks, figures and pages keep, so that they can be read anywhere."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import REPO, Markup
from nbformat.validator import iter_validate

from medquad_utils import course
from medquad_utils.machine import versions

NOTEBOOKS = REPO / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("0*_*.ipynb"))
EVERY = [*LESSONS, *sorted((NOTEBOOKS / "solutions").glob("*.ipynb"))]
MARKDOWN = [*REPO.glob("*.md"), *REPO.glob(".github/*.md"), *NOTEBOOKS.glob("*.md")]
FIGURES = sorted((NOTEBOOKS / "figures").glob("*.svg"))
PARAMETERS = "profile source data_path model rows max_steps lora_r seed out"
FURTHER = {"09_specialise": " specialty"}  # parameters that only one lesson has
SHOWN = {"text/plain", "text/html", "text/markdown", "image/png"}  # by every front end
HIDING = {"style", "script", "link", "details", "iframe", "input", "svg", "canvas", "object"}
HIDING |= {"embed", "form", "button", "video", "audio"}  # GitHub strips or folds these
CLOSING = ("Exercises", "What you learned", "Further reading")
PREDICTION = r"(?is)\*\*Predict, then run.*\nmy_guess = [\d.]+  # \S.*change me"
PREDICTION += r".*checks\.predict\(my_guess, .*You said .+?; it is .+?\. .+?\. (?:\S+ ){5}"

lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
every = pytest.mark.parametrize("path", EVERY, ids=lambda p: f"{p.parent.name}/{p.stem}")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: Any) -> str:
    return "".join(cell["source"])


def code(notebook: Any) -> list[Any]:
    return [c for c in notebook["cells"] if c["cell_type"] == "code"]


def prose(notebook: Any) -> str:
    return "\n".join(source(c) for c in notebook["cells"] if c["cell_type"] == "markdown")


def text_of(page: Path) -> str:
    return page.read_text("utf-8") if page.suffix == ".md" else prose(read(page))


def headings(text: str) -> list[tuple[int, str]]:
    """Level and title of each Markdown heading outside fenced code."""
    found = re.findall(r"(?m)^(#+) +(.+?) *$", re.sub(r"(?ms)^```.*?^```", "", text))
    return [(len(marks), title) for marks, title in found]


# Rules follow: what is wrong with a notebook. Then the tests that hold notebooks to them.
def front_ends(notebook: Any) -> list[str]:
    """What JupyterLab, VS Code, Colab or GitHub cannot open or does not show; what went wrong."""
    ids = [cell.get("id") for cell in notebook["cells"]]
    outputs = [output for cell in code(notebook) for output in cell["outputs"]]
    data = [output["data"] for output in outputs if "data" in output]
    kinds = set().union(*data)
    streams = {output.get("name", output["output_type"]) for output in outputs}
    hidden = Markup("".join("".join(d.get("text/html", "")) for d in data)).tags & HIDING
    size = len(json.dumps(notebook, indent=1, ensure_ascii=False).encode())
    checks = {
        "not nbformat 4.5": (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5),
        "an id is missing or double": None not in ids and len(set(ids)) == len(ids),
        "the kernel is not python3": notebook["metadata"]["kernelspec"]["name"] == "python3",
        "widget metadata": "widgets" not in notebook["metadata"],
        f"outputs need an extension: {kinds - SHOWN}": kinds <= SHOWN,
        "an output has no plain text": all("text/plain" in d for d in data),
        f"GitHub hides {hidden}": not hidden,
        "GitHub shows no file of this size": size < 1_000_000,
        "an error or a warning": not streams & {"error", "stderr"},
    }
    faults = [fault for fault, sound in checks.items() if not sound]
    return faults + [str(error) for error in iter_validate(notebook)]


def readable_code(notebook: Any) -> list[str]:
    """Long cells, foreign code, cells for one profile, magic beyond %pip; all cells parse."""
    found = []
    for text in map(source, code(notebook)):
        compile(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", text), "cell", "exec")
        found += re.findall("trust_remote_code|profile ==", text)
        found += re.findall(r"(?m)^\s*(?!%pip )([%!].*)$", text)
        found += [f"a cell of {n} lines"] if (n := len(text.splitlines())) > 15 else []
    return found


def alt_texts(notebook: Any) -> list[str]:
    """Pictures without a description of six words."""
    outputs = [output for cell in code(notebook) for output in cell["outputs"]]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    alts = [p["metadata"].get("image/png", {}).get("alt", "") for p in pictures]
    alts += re.findall(r"!\[([^\]]*)\]\((?!http)", prose(notebook))
    undescribed = re.findall(r"!\[\]|<img\b", prose(notebook))
    return undescribed + [f"alt text {alt!r}" for alt in alts if len(alt.split()) < 6]


def table_of_contents(notebook: Any) -> list[str]:
    """One h1, first; no level skipped; no heading twice; sections numbered in order."""
    levels, titles = zip(*headings(prose(notebook)), strict=True)
    faults = [] if levels[0] == 1 and levels.count(1) == 1 else ["h1 is not first and alone"]
    faults += ["a level is skipped" for a, b in itertools.pairwise(levels) if b > a + 1]
    faults += [f"twice: {title}" for title in set(titles) if titles.count(title) > 1]
    sections = [t for level, t in headings(prose(notebook)) if level == 2 and t not in CLOSING]
    numbered = enumerate(sections, start=1)
    return faults + [f"not section {n}: {t}" for n, t in numbered if not t.startswith(f"{n}. ")]


def is_quickstart(notebook: Any) -> bool:
    """Lesson 00 is the recipe to copy: it has one prediction and no exercises."""
    return "\n# 00 · " in source(notebook["cells"][0])


def predictions(notebook: Any) -> list[str]:
    """Two predictions or more: a question, a number to change, a score, and its reason."""
    least = 1 if is_quickstart(notebook) else 2
    asked = []
    for words, cell in itertools.pairwise(notebook["cells"]):
        if "predict" in cell["metadata"].get("tags", ()):
            printed = "".join("".join(output.get("text", ())) for output in cell["outputs"])
            asked.append(f"{source(words)}\n{source(cell)}\n{printed}")
    faults = [] if len(asked) >= least else [f"{len(asked)} predictions"]
    return faults + [a for a in asked if not re.search(PREDICTION, a)]


def words(notebook: Any) -> int:
    """Words of the Markdown cells, without code, links and tables' rules."""
    text = re.sub(r"(?s)```.*?```|`[^`]*`|\]\([^)]*\)|<[^>]+>", " ", prose(notebook))
    return len(re.findall(r"[^\W\d_][\w'’-]*", text))


def budget(notebook: Any) -> list[str]:
    """What a learner cannot read in 45 minutes: too many cells, words, lines, or too wide ones."""
    own = [source(cell) for cell in code(notebook)[1:]]  # all but the install cell
    lines = [line for text in own for line in text.splitlines() if line.strip()]
    counts = {"cells": (len(notebook["cells"]), 50), "words": (words(notebook), 1600)}
    counts |= {"lines of code": (len(lines), 180)}
    faults = [f"{n} {what}: at most {most}" for what, (n, most) in counts.items() if n > most]
    return faults + [f"{len(line)} columns: {line}" for line in lines if len(line) > 100]


Rule = Callable[[Any], list[str]]


@every
@pytest.mark.parametrize("rule", [front_ends, readable_code, alt_texts])
def test_a_notebook_can_be_opened_and_read_everywhere(path: Path, rule: Rule) -> None:
    assert rule(read(path)) == []


@lesson
@pytest.mark.parametrize("rule", [table_of_contents, predictions, budget])
def test_a_lesson_has_numbered_sections_predictions_and_a_budget(path: Path, rule: Rule) -> None:
    assert rule(read(path)) == []


BAD = {"output_type": "stream", "name": "stderr", "data": {"text/html": "<details>"}}


@pytest.mark.parametrize(
    ("rule", "fault", "place", "change"),
    [
        (front_ends, "an id is missing", 1, {"id": None}),
        (front_ends, "GitHub hides", 1, {"outputs": [BAD]}),
        (front_ends, "a warning", 1, {"outputs": [BAD]}),
        (readable_code, "16 lines", 1, {"source": "x = 1\n" * 16}),
        (alt_texts, "A figure", 0, {"source": "![A figure](figures/a.svg)"}),
        (table_of_contents, "not section 1: B", 0, {"source": "# A\n## B"}),
        (predictions, "import sys", 1, {"metadata": {"tags": ["predict"]}}),
        (budget, "lines of code: at most 180", 2, {"source": "x = 1\n" * 181}),
        (budget, "101 columns", 2, {"source": "x" * 101}),
    ],
)
def test_a_rule_notices_damage(rule: Rule, fault: str, place: int, change: dict[str, Any]) -> None:
    notebook = read(LESSONS[0])
    notebook["cells"][place].update(change)
    assert fault in "\n".join(rule(notebook))


def test_the_ten_lessons_are_listed_with_outcome_ranges_and_linked() -> None:
    listed = tomllib.loads((REPO / "tests" / "notebooks.toml").read_text(encoding="utf-8"))
    assert [p.stem for p in LESSONS] == sorted(listed)
    assert [p.stem[:2] for p in LESSONS] == [f"{number:02d}" for number in range(10)]
    assert all(ranges for files in listed.values() for ranges in files.values())
    for page in (REPO / "README.md", REPO / "Colab.md"):
        assert [p.name for p in LESSONS if f"notebooks/{p.name}" not in text_of(page)] == []


@lesson
def test_a_lesson_opens_with_badge_goals_need_and_parameters(path: Path) -> None:
    notebook = read(path)
    first = source(notebook["cells"][0])
    assert f"/github/medquad-qlora/medquad-qlora/blob/main/notebooks/{path.name}" in first
    assert re.search(rf"(?m)^# {path.stem[:2]} · [A-Z]\w+ ", first), "number and title"
    assert "**You will do**" in first and "**You will learn**" in first
    assert re.search(r"\*\*You need\*\* .*\d+ (s|min)\b.*\d GB", first), "measured time and memory"
    tags = [cell["metadata"].get("tags") for cell in code(notebook)[:2]]
    assert tags == [["install"], ["parameters"]]
    assert " ".join(course.parameters_of(path)) == PARAMETERS + FURTHER.get(path.stem, "")
    assert course.parameters_of(path)["profile"] == '"auto"'


@lesson
def test_all_lessons_install_set_parameters_and_plan_alike(path: Path) -> None:
    install, parameters, plan = (source(cell) for cell in code(read(path))[:3])
    first = [source(cell) for cell in code(read(LESSONS[0]))[:3]]
    assert install == first[0] and "google.colab" in install and "-U" not in install
    assert parameters.startswith(first[1])
    assert plan == first[2] and "profiles.resolve(" in plan


@lesson
def test_a_lesson_closes_with_summary_checks_and_metrics(path: Path) -> None:
    titles = [title for _, title in headings(prose(read(path)))]
    assert titles[-2:] == ["What you learned", "Further reading"]
    sources = "\n".join(map(source, code(read(path))))
    assert f'"{path.stem.split("_")[1]}.json"' in sources and '"headline"' in sources
    assert sources.count("assert ") >= 5


def test_the_quickstart_is_ten_cells_with_every_line_in_sight() -> None:
    notebook = read(LESSONS[0])
    assert is_quickstart(notebook) and len(notebook["cells"]) <= 30
    recipe = [source(cell) for cell in code(notebook)[3:]]  # after install, parameters and plan
    assert len(recipe) == 10
    calls = {"BitsAndBytesConfig", "AutoModelForCausalLM.from_pretrained", "LoraConfig"}
    calls |= {"SFTConfig", "SFTTrainer", "model.generate"}
    assert {call for call in calls if f"{call}(" not in "\n".join(recipe)} == set()


@lesson
def test_outputs_come_from_this_source_in_the_tested_versions(path: Path) -> None:
    cells, stamp = code(read(path)), read(path)["metadata"][course.STAMP]
    todo = "outputs are of another source: run python tests/stamp.py"
    assert stamp["source"] == course.source_hash(read(path)["cells"]), todo
    assert stamp["profile"] == "tiny"
    for name, version in (versions() | {"python": stamp["versions"]["python"]}).items():
        assert stamp["versions"][name].split("+")[0] == version.split("+")[0], name
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "not one run from top to bottom"
    assert sum(bool(cell["outputs"]) for cell in cells) > len(cells) / 2, "without outputs"


def test_the_whole_course_is_read_in_a_day() -> None:
    assert sum(words(read(path)) for path in LESSONS) <= 16_000


@pytest.mark.parametrize("path", FIGURES, ids=lambda p: p.stem)
def test_a_figure_is_titled_opaque_and_described(path: Path) -> None:
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    svg = "{http://www.w3.org/2000/svg}"
    assert all((root.findtext(f"{svg}{part}") or "").strip() for part in ("title", "desc"))
    background = next(root.iter(f"{svg}rect"))
    box = " ".join(background.get(side, "0") for side in ("x", "y", "width", "height"))
    assert (box, background.get("fill")) == (root.get("viewBox"), "#FFFFFF"), "for dark pages"
    pages = "\n".join(text_of(page) for page in [REPO / "README.md", *LESSONS])
    shown = re.findall(rf"!\[([^\]]+)\]\((?:notebooks/)?figures/{path.name}\)", pages)
    assert shown and all(len(alt.split()) >= 20 for alt in shown), "for who cannot see it"


def test_every_picture_of_a_markdown_page_has_an_alt_text() -> None:
    alts = [alt for page in MARKDOWN for alt in re.findall(r"!\[([^\]]*)\]", text_of(page))]
    assert alts and all(len(alt.split()) >= 6 for alt in alts)


OWNER = r"(?:github|google|githubusercontent)\.com/(?:github/)?([\w-]+)/medquad-qlora\b"
LINK = r"(?:\[0\d, ([^\]]+))?\]\((?![a-z]+:)([^)\s#]*)#?([^)\s]*)\)"  # [04, section](file)


def test_every_link_into_the_repository_leads_somewhere() -> None:
    broken = []
    for page in [*MARKDOWN, *EVERY]:
        assert set(re.findall(OWNER, text_of(page))) <= {"medquad-qlora"}, page.name
        text = re.sub(r"https://[^\s)]*/medquad-qlora/(?:blob/)?main", str(REPO), text_of(page))
        for section, file, anchor in re.findall(LINK, text):
            there = page.parent / file if file else page
            titles = [t for _, t in headings(text_of(there))] if section or anchor else []
            titles += [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
            if not there.exists() or (section or anchor) not in ["", "the opening", *titles]:
                broken.append((page.name, section, file, anchor))
    assert broken == []


def test_the_teachers_plan_names_sections_that_are_there() -> None:
    form = r'(?:[Ll]esson |\| )(\d\d)(?:,| \|)((?:;?\s+"[^"]+")+)'
    named = re.findall(form, text_of(NOTEBOOKS / "TEACHING.md"))
    assert len(named) > 10
    for number, quoted in named:
        (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
        titles = {re.sub(r"^\d+\. ", "", title) for _, title in headings(text_of(path))}
        assert set(re.findall(r'"([^"]+)"', quoted)) <= titles, number


def test_the_errors_page_quotes_what_the_package_says() -> None:
    ours = text_of(NOTEBOOKS / "ERRORS.md").split("\n## ")[1]
    messages = re.findall(r"(?m)^### `(.+)`\n\n\*\*Why\*\*.*\n\*\*Way out\*\*", ours)
    assert len(messages) == ours.count("\n### ") >= 10
    modules = [path.read_text("utf-8") for path in (REPO / "medquad_utils").rglob("*.py")]
    said = re.sub(r"""["']\s*\n\s*f?["']""", "", "\n".join(modules))  # strings over two lines
    pieces = [piece.strip() for message in messages for piece in message.split("...")]
    assert [piece for piece in pieces if piece not in said] == []


def test_the_readme_is_short() -> None:
    """Apart from what tests/stamp.py writes into it."""
    text = re.sub(r"(?s)<!-- (\w+) -->.*?<!-- /\1 -->", "", text_of(REPO / "README.md"))
    text = re.sub(r"(?s)```.*?```|\(https?://[^)]*\)", "", text)
    assert len(re.findall(r"[A-Za-z][\w'-]*", text)) <= 900
