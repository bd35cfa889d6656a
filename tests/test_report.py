"""The report: its numbers are those of the metrics, and no text becomes markup."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import NASTY, Markup

from medquad_utils import report
from medquad_utils.chat import NOTICE

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


@pytest.fixture(scope="module")
def pages(metrics: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The report as HTML and as Markdown."""
    named = metrics | {"file": NASTY}
    return [path.read_text() for path in report.write(named, tmp_path_factory.mktemp("report"))]


def leaves(value: Any) -> list[str]:
    """Every key, number and text of the metrics, as the report shows them."""
    if isinstance(value, dict):
        return leaves([*value, *value.values()])
    if isinstance(value, list):
        return [leaf for inner in value for leaf in leaves(inner)]
    return [value if isinstance(value, str) else report.number(value)]


def test_every_number_of_the_report_is_one_of_the_metrics(metrics: Any, pages: list[str]) -> None:
    known = {number for leaf in leaves(metrics) for number in NUMBER.findall(leaf)}
    alts = re.findall(r'<img src="data:image/png;[^"]*" alt="([^"]*)"', pages[0])
    assert len(alts) >= 3 and all(len(NUMBER.findall(alt)) >= 5 for alt in alts)
    page = Markup(re.sub(r"(?s)<style>.*?</style>|(?=<)", " ", pages[0])).text
    for text in (pages[1], page + " ".join(alts)):
        assert len(found := NUMBER.findall(text)) > 300 and set(found) <= known


def test_a_changed_metric_changes_the_report(metrics: Any, tmp_path: Path) -> None:
    changed = copy.deepcopy(metrics)
    del changed["overall"]["arms"]["tuned"]["rouge1"]  # the first column has no interval there
    changed["overall"]["versus base"]["tuned"]["bleu"]["high"] = 91234.5
    changed["by_source"]["course sample"]["arms"]["grounded"]["bits_per_byte"]["low"] = 92345.5
    changed["safety"]["tuned"]["dosing"]["share"] = 93456.5
    changed["forgetting"]["ratio"]["mean"] = 94567.5
    text = report.write(changed | {"held_out": False, "verdict": []}, tmp_path)[1].read_text()
    assert all(f"9{n}.500" in text for n in ("1,234", "2,345", "3,456", "4,567"))
    assert text.index("These questions are not held out") < text.index("## Scores")
    assert "Questions about fewer than 5 diseases are too few for an interval" in text


def test_the_notice_and_the_verdict_stand_before_the_scores(metrics: Any, pages: list[str]) -> None:
    sides = {"beats": ["base"], "even": [], "loses": ["nearest"]}
    assert report.sentence(sides, "chrF").endswith("it beats base; it loses to nearest.")
    first = metrics["verdict"][0]
    verdict = report.sentence(first, metrics["about_scores"][first["score"]]["name"])
    for text in pages:
        parts = NOTICE.split(".")[0], "This is the embedded tiny model", "In short", verdict[:20]
        scores = re.search("(?:## |>)Scores", text)
        places = [*map(text.index, parts), scores and scores.start()]
        assert places == sorted(places)


def test_numbers_keep_digits_and_questions_diseases(metrics: Any, pages: list[str]) -> None:
    shown = [report.number(value) for value in (2e-4, -0.00031, -0.0, 0.0012, 1234.5, 7000, None)]
    assert shown == ["0.0002", "-0.00031", "0.000", "0.001", "1,234.500", "7,000", "–"]
    assert report.counted(1, 1) == "1 question about 1 disease"
    assert report.counted(1234, None) == "1,234 questions"
    said, first = report.counted(metrics["questions"], metrics["diseases"]), metrics["verdict"][0]
    assert said.startswith("10 questions about ") and f"\n{said}, of " in pages[1]
    assert f"({report.counted(first['n'], first['diseases'])}), the tuned" in pages[1]
    assert "| question type | questions | diseases |" in pages[1]


def test_scores_that_cannot_exist_are_told_from_those_not_measured(pages: list[str]) -> None:
    lines = [line.split(" | ") for line in pages[1].splitlines()]
    rows = {cells[0]: [c.removesuffix(" |") for c in cells[1:]] for cells in reversed(lines)}
    arms = rows["| score"]
    for name in ("| bits per byte", "| perplexity"):
        missing = [arm for arm, cell in zip(arms, rows[name], strict=True) if cell == "n/a"]
        assert missing == ["nearest", "another disease"]
    assert report.why_missing("facts_complete", "tuned") == "n/a", "this source lists no facts"
    assert report.why_missing("facts_complete", "tuned", scored=False) == "not measured"
    assert report.cell(None) == report.why_missing("chrf", "nearest") == "not measured"
    assert report.cell({"mean": 0.5, "low": None, "high": None}) == "0.500"


def test_nothing_of_a_question_gets_through_as_markup(pages: list[str]) -> None:
    page, text = Markup(pages[0]), pages[1]
    assert " ".join(NASTY.split()) in " ".join(page.text.split()), "it is shown, as text"
    allowed = "html head meta title style body main h1 h2 h3 p blockquote ul li div img "
    allowed += "table thead tbody tr th td"
    assert page.tags == set(allowed.split()) and "default-src 'none'" in pages[0]
    assert not re.search(r"<[a-z/!]", text), "no HTML in the Markdown"
    assert not re.search(r"(?<!\\)\]\((?!figures/)", text), "no link but to the figures"
