"""The drawn figures: opaque, readable, in the course's colours, without overlaps, and with the numbers that the code has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import chromium
from playwright.sync_api import Browser
from transformers import AutoTokenizer

from medquad_utils import course, plots, quantization
from medquad_utils.profiles import TINY_MODEL

REPO = Path(__file__).parent.parent
FIGURES = sorted((REPO / "notebooks" / "figures").glob("*.svg"))
TINTS = {"#F1F1F1", "#CFE4F3", "#FBD8A0", "#E3E3E3"}  # pale greys, blue and orange behind text
COLOURS = {*plots.PALETTE, plots.GREY, plots.INK, plots.PAPER, *TINTS, "none"}
SVG = "{http://www.w3.org/2000/svg}"

figure = pytest.mark.parametrize("path", FIGURES, ids=lambda p: p.stem)


def faults(text: str) -> list[str]:
    """What is wrong with a drawn figure; an empty list if nothing is."""
    root = ElementTree.fromstring(text)
    found = []
    for part in ("title", "desc"):
        if not (root.findtext(f"{SVG}{part}") or "").strip():
            found.append(f"no {part}")
    box = [float(v) for v in root.get("viewBox", "0 0 0 0").split()]
    background = next(iter(root.iter(f"{SVG}rect")), ElementTree.Element("none"))
    covers = [float(background.get(k, 0)) for k in ("x", "y", "width", "height")] == box
    if not covers or background.get("fill") != plots.PAPER or background.get("opacity"):
        found.append("no opaque background")
    for node in root.iter():
        name = node.tag.removeprefix(SVG)
        if name in ("script", "image", "foreignObject", "style", "use", "a"):
            found.append(f"<{name}>")
        found += [f"colour {node.get(k)}" for k in ("fill", "stroke") if node.get(k, "none") not in COLOURS]
        found += [f"{k} leads out" for k, v in node.attrib.items() if k.endswith("href") or re.search(r"url\((?!#)", v)]
        if name == "text" and float(node.get("font-size", 0)) < 12:
            found.append(f"small text: {node.text}")
    return found


@figure
def test_a_figure_is_opaque_readable_and_in_the_courses_colours(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []
    assert path.stat().st_size < 40_000


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (r"<title.*?</title>", "", "no title"),
        (r"<desc.*?</desc>", "<desc> </desc>", "no desc"),
        (r'(<rect [^>]*fill=)"#FFFFFF"', r'\1"none"', "no opaque background"),
        (r'stroke="#0072B2"', 'stroke="#0000FF"', "colour #0000FF"),
        (r'font-size="12"', 'font-size="11"', "small text"),
        (r"</svg>", "<script/></svg>", "<script>"),
    ],
)
def test_each_fault_is_found(old: str, new: str, fault: str) -> None:
    text = re.sub(old, new, FIGURES[1].read_text(encoding="utf-8"), count=1)
    assert any(fault in said for said in faults(text)), faults(text)


def test_the_five_ideas_are_drawn_and_each_figure_is_shown_with_words_for_who_cannot_see_it() -> None:
    assert [path.stem for path in FIGURES] == ["adapters", "blocks", "flow", "mask", "packing"]
    sources = [(REPO / "README.md").read_text(encoding="utf-8")]
    for lesson in course.lessons():
        cells = json.loads(lesson.read_text(encoding="utf-8"))["cells"]
        sources += ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    for path in FIGURES:
        shown = [alt for text in sources for alt in re.findall(rf"!\[([^\]]+)\]\((?:notebooks/)?figures/{path.name}\)", text)]
        assert shown, f"{path.name} is shown nowhere"
        assert all(len(alt.split()) >= 20 for alt in shown)


# ---- as a browser draws them ----------------------------------------------------------------------------------------

BOXES = """() => [...document.querySelectorAll('svg text')].map(t => {
  const b = t.getBBox(); return {said: t.textContent, x: b.x, y: b.y, w: b.width, h: b.height}; })"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@figure
def test_no_text_leaves_the_figure_or_runs_into_another(path: Path, browser: Browser) -> None:
    text = path.read_text(encoding="utf-8")
    width, height = (float(v) for v in ElementTree.fromstring(text).get("viewBox", "").split()[2:])
    page = browser.new_page()
    page.set_content(text)
    boxes = page.evaluate(BOXES)
    page.close()
    assert len(boxes) > 10
    for b in boxes:
        assert b["x"] >= 0 and b["y"] >= 0 and b["x"] + b["w"] <= width and b["y"] + b["h"] <= height, b["said"]
    for n, a in enumerate(boxes):
        for b in boxes[n + 1 :]:
            across = min(a["x"] + a["w"], b["x"] + b["w"]) - max(a["x"], b["x"])
            down = min(a["y"] + a["h"], b["y"] + b["h"]) - max(a["y"], b["y"])
            assert across <= 1 or down <= 4, f"{a['said']!r} runs into {b['said']!r}"  # lines of one text may touch by their leading


# ---- the numbers in them --------------------------------------------------------------------------------------------


def words(stem: str) -> list[str]:
    (path,) = [p for p in FIGURES if p.stem == stem]
    return [node.text or "" for node in ElementTree.fromstring(path.read_text(encoding="utf-8")).iter(f"{SVG}text")]


def test_the_block_is_quantised_as_the_course_does_it() -> None:
    signed = [w for w in words("blocks") if re.fullmatch(r"[+-]\d\.\d{3}", w)]
    weights, back = [float(v) for v in signed[:8]], [float(v) for v in signed[8:]]
    levels = quantization.nf4_levels()
    scale = max(map(abs, weights))
    codes = [int((levels - w / scale).abs().argmin()) for w in weights]
    said = words("blocks")
    start = said.index("kept") + 1
    assert [int(v) for v in said[start : start + 8]] == codes
    assert back == [round(float(levels[c]) * scale, 3) + 0.0 for c in codes]
    assert f"the largest in size, {scale:.3f}, is the block's scale: divide by it" in said
    assert any(f"= {4 + 8 / 64 + 32 / (64 * 256):.3f} bits a weight" in w for w in said)


def test_the_levels_stand_where_they_are() -> None:
    (path,) = [p for p in FIGURES if p.stem == "blocks"]
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    marks = [node.get("points", "").split()[0].split(",") for node in root.iter(f"{SVG}polyline") if node.get("stroke-width") == "2.5"]
    at = [float(x) for x, _ in marks]
    assert at == sorted(at) and len(at) == 16
    places = [2 * (x - at[0]) / (at[-1] - at[0]) - 1 for x in at]
    assert places == pytest.approx(quantization.nf4_levels().tolist(), abs=2e-3)


def test_the_masks_tokens_are_the_models() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    special = {word for word in words("mask") if word.startswith("<|")}
    assert special == {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
    assert all(tokenizer.convert_tokens_to_ids(token) != tokenizer.unk_token_id for token in special)
    chat = [{"role": who, "content": who[0]} for who in ("system", "user", "assistant")]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert re.findall(r"<\|\w+\|>", text) == [w for w in words("mask") if w.startswith("<|")][: text.count("<|")]
    assert words("mask").count("-100") == 17


def test_packing_counts_its_own_places() -> None:
    said = words("packing")
    rows = {letter: said.count(letter) // 2 for letter in "abcd"}
    padding = 4 * max(rows.values()) - sum(rows.values())
    assert f"{padding} of {4 * max(rows.values())} places are padding:" in said
    positions = [int(w) for w in said if w.isdigit()]
    assert positions == [n for length in rows.values() for n in range(length)]
