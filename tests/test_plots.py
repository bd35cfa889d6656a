"""Figures: alt text, an opaque background, nothing cut off. Tables and cards: any text is text."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy
import pytest
from conftest import Markup
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medquad_utils import plots
from medquad_utils.quantization import nf4_levels

AWKWARD = ["<|begin_of_text|>", "\n\n", " ", "$", "_x^2$", "Sjögren", "<b>", "{}", "\\alpha"]
TITLES = {"title": "Loss falls.", "unit": "u", "x": "x", "y": "y"}

# The data of one call of every drawing function; names and tokens as awkward as real ones.
DRAWN: dict[str, dict[str, Any]] = {
    "bars": {"values": {"one & only": 0.3, "$x$ < y": 0.7}, "highlight": ["$x$ < y"]},
    "grouped_bars": {"table": {str(s): {"a": s / 9, "b": 0.5} for s in range(6)}},
    "intervals": {"table": {f"arm {s}": {"a $x$": (0.5, 0.4, 0.7 + s / 9)} for s in range(6)}},
    "trade_off": {
        "points": {"<b>": {"in": [0.1, -0.1, 0.2], "out": [0.3, None, None]}},
        "single": {"<b>": [[0.1, -0.2], [-0.1, -0.4]]},
    },
    "dots": {"table": {"a": {"x & y": [0.1], "$z$": [0.0]}}},
    "stacked_bars": {"table": {"fp32": {"a": 3, "b": 1}, "NF4": {"a": 0.5}}, "lines": {"T4": 2.0}},
    "histogram": {"series": {"a": [1, 2, 2, 3], "b": [2.5, 9]}, "lines": {"cut": 3}},
    "curves": {"series": {str(n): [(1, n), (2, n + 1)] for n in range(6)}, "points": ["2"]},
    "confusion": {"tables": {"$x$": [[3, 1], [0, 9]]}, "rows": "ab", "columns": ["no", "$y$"]},
    "staircase": {"levels": nf4_levels().tolist()},
    "rounding": {"before": [n / 9 for n in range(9)], "after": [0] * 9, "ruler": [0, 1]},
    "word_heat": {"lines": {"$x$": [(word, n - 4) for n, word in enumerate(AWKWARD)], "none": []}},
    "distribution": {"series": {"T": {" a": 0.7, "$": 0.2, "\n": 0.1}}, "cut": {"T": 1}},
    "split_tiles": {"splits": {"by row": {"train": [("a", "g"), ("b", "h")], "test": []}}},
}


def draw(name: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[bytes, str]:
    """Draw a figure as in a notebook; returns the PNG and its alt text."""
    display, function = Mock(), getattr(plots, name)
    monkeypatch.setattr(plots.display, "display", display)
    monkeypatch.setattr(plots, "get_ipython", lambda: True)
    titles = {k: v for k, v in TITLES.items() if k in inspect.signature(function).parameters}
    function(**{**titles, **DRAWN[name], **changes})
    ((data,), options) = display.call_args
    return b64decode(data["image/png"]), options["metadata"]["image/png"]["alt"]


def test_every_drawing_function_is_drawn_here() -> None:
    public = {name: value for name, value in vars(plots).items() if name[0] != "_"}
    drawing = {n for n, f in public.items() if "title" in getattr(f, "__annotations__", {})}
    assert drawing == set(DRAWN)


@pytest.mark.filterwarnings("error::UserWarning")  # a missing glyph, axes that collapse
@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_has_alt_text_is_opaque_and_is_not_cut_off(name: str, monkeypatch: Any) -> None:
    png, alt = draw(name, monkeypatch)
    pixels = numpy.asarray(Image.open(BytesIO(png)).convert("RGBA"))
    assert alt.startswith("Loss falls. ") and len(alt.split()) >= 6 and alt.endswith(".")
    assert png[1:4] == b"PNG"
    assert int(pixels[..., 3].min()) == 255, "a transparent background vanishes on a dark page"
    edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    assert all((edge == 255).all() for edge in edges), "something is cut off at the edge"
    assert len(numpy.unique(pixels.view("uint32"))) > 20, "the figure is empty"
    assert 300 < pixels.shape[1] <= 1200


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", DRAWN)
def test_a_long_title_takes_more_lines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    png, _ = draw(name, monkeypatch, title="A title of many words, more than one line holds " * 2)
    pixels = numpy.asarray(Image.open(BytesIO(png)).convert("RGB"))
    edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    assert all((edge == 255).all() for edge in edges), "the title is cut off"


@pytest.mark.parametrize("names", ["ab", [f"a long type of question {n}" for n in range(8)]])
def test_names_of_groups_are_turned_before_they_touch(names: Any, monkeypatch: Any) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_show", lambda fig, *args: figures.append(fig))
    plots.grouped_bars({"base": dict.fromkeys(names, 0.012)}, "t", "u")
    figures[0].canvas.draw()
    (axes,) = figures[0].axes
    turned = {label.get_rotation() for label in axes.get_xticklabels()}
    assert turned == {20.0 if len(names) > 2 else 0.0}
    ticks = [label.get_text() for label in axes.get_yticklabels()]
    assert len(set(ticks)) == len(ticks), "a percent tick stands twice"


def test_large_numbers_and_repeated_words_are_told_whole(monkeypatch: Any) -> None:
    _, alt = draw("histogram", monkeypatch, series={"a": [-2, -1, 1, 2]}, lines={"limit": 1024})
    assert "from -2 to 2" in alt and "limit 1,024" in alt
    _, alt = draw("word_heat", monkeypatch, lines={"q": [("is", 0.5), ("gout", 1), ("is", -0.75)]})
    assert "q is +0.50, gout +1.00, is -0.75" in alt
    assert plots.short("哮" * 400) == "哮" * 300 + " ..."
    assert str(plots.Table([(12345.6, 0.12345)])) == "12,346  0.1235"


def test_negative_values_are_drawn(monkeypatch: Any) -> None:
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.hist", lambda ax, v, edges, **_: drawn.append(edges))
    draw("histogram", monkeypatch, series={"a": [-2, -1, 1, 2, 3]}, lines={}, bins=5)
    assert (drawn[0][0], drawn[0][-1], len(drawn[0])) == (-2, 3, 6)


def test_a_saved_figure_is_the_one_shown_and_outside_a_notebook_not_displayed(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    plots.bars(**DRAWN["bars"], title="Two bars of some length", unit="u")
    assert "image/png" in capsys.readouterr().out
    file = tmp_path / "figures" / "a.png"
    plots.intervals(**DRAWN["intervals"], title="t", unit="u", save=file)
    assert capsys.readouterr().out == ""
    assert draw("intervals", monkeypatch, title="t")[0] == file.read_bytes()


def test_no_figure_needs_the_backend_of_another_environment() -> None:
    code = (
        "from medquad_utils import plots\n"
        "plots.grouped_bars({'a': {'x': 0.1}}, 't', 'u')\n"
        "plots.stacked_bars({'a': {'x': 0.1}}, 't', 'u')\n"
    )
    env = os.environ | {"MPLBACKEND": "module://ipykernel_that_is_elsewhere"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)


pair = st.lists(st.text("<>&\"'/ab =é#;", min_size=1, max_size=15), min_size=2, max_size=2)


@given(st.lists(pair, min_size=1, max_size=3), pair)
def test_tables_and_cards_show_any_text_as_text(rows: list[list[str]], header: list[str]) -> None:
    table = Markup(plots.Table(rows, header)._repr_html_())
    assert table.tags == {"table", "tr", "th", "td"}
    assert table.text == "".join("".join(line) for line in [header, *rows])
    card = Markup(plots.Cards([{header[0]: header[1], "nothing": None}])._repr_html_())
    assert card.tags == {"blockquote", "b"} and card.text == f"{header[0]}: {header[1]}"


def test_an_alt_text_says_intervals_and_a_series_keeps_its_colour() -> None:
    table = {"base": {"ROUGE-L": (0.124, 0.1, 0.15)}, "tuned": {"ROUGE-L": (0.3, 0.25, 0.35)}}
    said = "What training changed. base ROUGE-L 0.124 [0.1, 0.15]; tuned ROUGE-L 0.3 [0.25, 0.35]."
    assert plots.described("What training changed", table) == said
    first, second = plots._colours(["nearest", "tuned", "base"]), plots._colours(["x", "tuned"])
    assert first == [plots.GREEN, plots.ORANGE, plots.BLUE]
    assert second[1] == plots.ORANGE and len(set(second)) == 2
