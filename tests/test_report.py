"""The report: every number is one of the metrics, nothing of a question gets through as markup, and it reads on a narrow screen."""

from __future__ import annotations

import copy
import html.parser
import json
import re
from base64 import b64decode
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from conftest import NASTY
from PIL import Image

from medquad_utils import evaluation, report
from medquad_utils.chat import NOTICE

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


@pytest.fixture(scope="module")
def metrics(evaluated: Path) -> dict[str, Any]:
    """As they are read back from the file, which is what a report of an older run is made from."""
    found: dict[str, Any] = json.loads((evaluated / "metrics.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def pages(metrics: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(HTML, Markdown)"""
    page, text = report.write(metrics, tmp_path_factory.mktemp("report"))
    assert (page.name, text.name) == ("report.html", "report.md")
    return page.read_text(encoding="utf-8"), text.read_text(encoding="utf-8")


class Parsed(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags[-1][0] != "style":
            self.text.append(data)


def leaves(value: Any) -> Iterator[Any]:
    """Every key, number and text of the metrics."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def known_numbers(metrics: dict[str, Any]) -> set[str]:
    texts = [leaf if isinstance(leaf, str) else report.number(leaf) for leaf in leaves(metrics)]
    return {found for text in texts for found in NUMBER.findall(text)}


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_every_number_of_the_report_is_one_of_the_metrics(metrics: dict[str, Any], pages: tuple[str, str]) -> None:
    known = known_numbers(metrics)
    for text in (pages[1], " ".join(Parsed(pages[0]).text)):
        found = NUMBER.findall(text)
        assert len(found) > 300
        assert [number for number in found if number not in known] == []


@pytest.mark.parametrize(
    "path",
    ["overall/arms/tuned/rougeL/mean", "overall/arms/nearest/chrf/low", "overall/versus base/tuned/bleu/high",
     "by_qtype/symptoms/arms/base/rougeL/mean", "by_source/course sample/arms/grounded/bits_per_byte/low",
     "by_kind/prose/arms/tuned/tfidf_cosine/high", "safety/tuned/dosing/share", "safety/outer_rule/caught", "safety/rule_error/error",
     "forgetting/ratio/mean", "leakage/8-gram", "questions", "recipe/training_rows"],
)  # fmt: skip
def test_a_changed_metric_changes_the_report(metrics: dict[str, Any], tmp_path: Path, path: str) -> None:
    changed = copy.deepcopy(metrics)
    *parents, last = path.split("/")
    place = changed
    for key in parents:
        place = place[key]
    place[last] = 987_654_321 if isinstance(place[last], int) else 0.98765
    text = report.write(changed, tmp_path)[1].read_text()
    assert ("987,654,321" if isinstance(place[last], int) else "0.988") in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.12345, "0.123"),
        (-0.0004, "0.000"),
        (-0.5, "-0.500"),
        (1234.5, "1,234.500"),
        (1000, "1,000"),
        (None, "–"),
        ("a", "a"),
        (True, "True"),
    ],
)
def test_a_number_has_three_decimals_and_parted_thousands(value: Any, shown: str) -> None:
    assert report.number(value) == shown


def test_a_cell_shows_its_interval_if_it_has_one() -> None:
    assert report.cell({"mean": 0.5, "low": 0.25, "high": 0.75, "n": 9}) == "0.500 [0.250, 0.750]"
    assert report.cell({"mean": 0.5, "low": None, "high": None, "n": 2}) == "0.500"
    assert report.cell(None) == "–"


# ---- words ----------------------------------------------------------------------------------------------------------


def test_the_verdict_is_said_in_plain_words() -> None:
    every = list(evaluation.WITHOUT_TRAINING)
    assert report.sentence({"beats": every, "even": [], "loses": []}, "chrF") == (
        "On chrF, the tuned model beats every arm without training that has this score: base, nearest, another disease."
    )
    assert report.sentence({"beats": ["base"], "even": ["nearest"], "loses": ["another disease"]}, "chrF") == (
        "On chrF, the tuned model does not beat every arm without training: it beats base; no difference can be told from nearest; "
        "it loses to another disease."
    )


def test_the_notice_stands_on_top_and_the_verdict_before_the_scores(metrics: dict[str, Any], pages: tuple[str, str]) -> None:
    for text in pages:
        assert 0 < text.index(NOTICE.split(".")[0]) < text.index("In short") < text.index("the tuned model") < text.index("Scores")
    sides = metrics["verdict"][0]
    assert report.sentence(sides, metrics["about_scores"][sides["score"]]["name"]) in pages[1]
    assert report.EMBEDDED in pages[1]


def test_the_report_says_what_was_skipped_and_what_is_empty(metrics: dict[str, Any], pages: tuple[str, str]) -> None:
    text = " ".join(Parsed(pages[0]).text)
    assert metrics["bert_score"] in text
    for note in metrics["notes"]:
        assert note["what"] in text


def test_questions_that_are_not_held_out_are_called_so(metrics: dict[str, Any], tmp_path: Path, pages: tuple[str, str]) -> None:
    assert "not held out" not in pages[1]
    leaked = report.write(metrics | {"held_out": False}, tmp_path)[1].read_text()
    assert leaked.index("These questions are not held out") < leaked.index("## Scores")


def test_few_questions_in_one_group_make_a_report_without_verdict_and_pictures(metrics: dict[str, Any], tmp_path: Path) -> None:
    few = copy.deepcopy(metrics)
    for cells in few["overall"].values():
        for scores in cells.values():
            for cell in scores.values():
                cell["low"] = cell["high"] = None
    one = {"symptoms": few["by_qtype"]["symptoms"]}
    few |= {"verdict": [], "by_qtype": one, "by_source": one, "by_kind": one, "notes": []}
    page, text = (path.read_text() for path in report.write(few, tmp_path))
    assert "Under 5 questions are too few for an interval, and so for a verdict." in text
    assert "<img" not in page
    assert "Nothing." in text
    assert "By question type" not in text


def test_the_table_of_the_terminal_has_every_arm_and_the_verdict(metrics: dict[str, Any]) -> None:
    lines = report.table(metrics).splitlines()
    assert [line.split("  ")[0] for line in lines[:6]] == ["arm", *metrics["about_arms"]]
    assert len(lines) == 6 + len(metrics["verdict"])


# ---- safety of the page itself --------------------------------------------------------------------------------------


def test_nothing_of_a_question_gets_through_as_markup(pages: tuple[str, str]) -> None:
    page, text = pages
    parsed = Parsed(page)
    assert " ".join(NASTY.split()) in " ".join(" ".join(parsed.text).split()), "it is shown, as text"
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "h1",
        "h2",
        "h3",
        "p",
        "ul",
        "li",
        "div",
        "table",
        "tr",
        "th",
        "td",
        "img",
    }
    assert {tag for tag, _ in parsed.tags} == allowed
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert all(a["src"].startswith("data:image/png;base64,") for tag, a in parsed.tags if tag == "img" and a["src"])
    assert "default-src 'none'" in page
    assert not re.search(r"<[a-z/!]", text), "no HTML in the Markdown"
    assert not re.search(r"(?<!\\)\]\((?!figures/)", text), "no link but to the figures"


@pytest.mark.parametrize("text", ["a | b", "[x](y)", "`code`", "*a* _b_", "<b>", "# no heading\n\n# none", "~~x~~ $y$", "\\"])
def test_markdown_means_nothing_but_itself(text: str) -> None:
    """The oracle: what a reader of CommonMark sees is the text without the backslashes before punctuation."""
    import html as html_module

    escaped = report.escaped(text)
    assert not re.search(r"(?<!\\)(?:\\\\)*[|\[\]`*_~$#]", escaped)
    assert "<" not in escaped and "\n" not in escaped
    assert html_module.unescape(re.sub(r"\\([\\`*_\[\]|#~$])", r"\1", escaped)) == " ".join(text.split())


# ---- looks ----------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_fits_narrow_screens(pages: tuple[str, str]) -> None:
    parsed = Parsed(pages[0])
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in parsed.tags
    assert not [tag for tag, attributes in parsed.tags if tag in ("link", "script") or "href" in attributes]
    for place, (tag, _) in enumerate(parsed.tags):
        if tag == "table":
            assert parsed.tags[place - 1][0] == "div" and parsed.tags[place - 1][1]["class"] == "wide", "a wide table scrolls by itself"
    assert dict(parsed.tags)["html"] == {"lang": "en"}


def test_pictures_have_alt_text_with_numbers_and_an_opaque_background(metrics: dict[str, Any], pages: tuple[str, str]) -> None:
    images = [attributes for tag, attributes in Parsed(pages[0]).tags if tag == "img"]
    assert len(images) >= 3
    for image in images:
        alt, source = image["alt"] or "", image["src"] or ""
        assert set(NUMBER.findall(alt)) <= known_numbers(metrics) and len(NUMBER.findall(alt)) >= 5
        picture = Image.open(BytesIO(b64decode(source.split(",")[1])))
        assert picture.convert("RGBA").getextrema()[3] == (255, 255)
        assert picture.width <= 800


def test_the_markdown_points_at_figures_that_are_there(metrics: dict[str, Any], tmp_path: Path) -> None:
    text = report.write(metrics, tmp_path)[1].read_text()
    linked = re.findall(r"\]\((figures/\w+\.png)\)", text)
    assert len(linked) >= 3
    assert all((tmp_path / name).is_file() for name in linked)
