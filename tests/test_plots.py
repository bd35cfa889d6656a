"""Figures: alt text, an opaque background, nothing cut off, colours that colour-blind eyes tell apart; tables and cards."""

from __future__ import annotations

import inspect
import itertools
import math
from base64 import b64decode
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import pytest
from conftest import Markup
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medquad_utils import plots
from medquad_utils.quantization import nf4_levels

ALT = "Bars: the first is twice as long as the second one."
LEVELS = nf4_levels().tolist()
Shown = list[tuple[dict[str, str], dict[str, Any]]]

AWKWARD = ["<|begin_of_text|>", "\n\n", " ", "$", "_x^2$", "Sjögren", "<b>", "{}", "\\alpha"] * 9

# One call of every drawing function; names and tokens as awkward as real ones.
DRAWN: dict[str, Callable[[], None]] = {
    "bars": lambda: plots.bars({"one & only": 3, "$x$ < y": 1e9, "zero": 0.5}, "t", "rows", ALT, highlight=["zero"], log=True),
    "grouped_bars": lambda: plots.grouped_bars({str(s): {"a": s / 9, "b": 0.5} for s in range(6)}, "t", "u", ALT),
    "intervals": lambda: plots.intervals(
        {f"arm {s}": {"a $x$": (0.5, 0.4, 0.7 + s / 9), **({"b & c": (0.1, 0.1, 0.1)} if s else {})} for s in range(6)}, "t", "u", ALT
    ),
    "dots": lambda: plots.dots({"a": {"x & y": [0.1, 0.2], "$z$": [0.0]}, "b": {"x & y": [0.9]}}, "t", "share", ALT, lines={"10 %": 0.1}),
    "stacked_bars": lambda: plots.stacked_bars({"fp32": {"a": 3, "b": 1}, "NF4": {"a": 0.5}}, "t", "GB", ALT, lines={"T4": 2.0}),
    "histogram": lambda: plots.histogram({"a": [1, 2, 2, 3], "b": [2.5, 9]}, "t", "words", ALT, lines={"cut": 3}),
    "curves": lambda: plots.curves({str(n): [(1, n), (2, n + 1)] for n in range(6)}, "t", "step", "loss", ALT, markers=["1"]),
    "heat": lambda: plots.heat({"B": [[0.0], [1.0]], "A": [[1.0, -2.0]], "BA": [[0.0, 0.0], [1.0, -2.0]]}, "t", ALT),
    "score_map": lambda: plots.score_map(
        {"a right $x$ answer": {"ROUGE-1": 1.0, "all $": 0.0}, "b & c": {"ROUGE-1": 0.5, "all $": 0.6}}, "t", ALT
    ),
    "staircase": lambda: plots.staircase(LEVELS, "t", ALT),
    "rounding": lambda: plots.rounding([0.1 * n for n in range(40)], [0.5 * (n // 5) for n in range(40)], "t", ALT),
    "word_heat": lambda: plots.word_heat(
        {"ablation": [(token, n / 9 - 4) for n, token in enumerate(AWKWARD)], "$x$": [("one", 0.0)], "none": []}, "t", ALT
    ),
    "attention": lambda: plots.attention(
        AWKWARD[:9], [[1 / (row + 1) if column <= row else 0.0 for column in range(9)] for row in range(9)], "t", ALT
    ),
    "token_strip": lambda: plots.token_strip(AWKWARD, [n % 2 == 0 for n in range(len(AWKWARD))], "t", ALT),
    "distribution": lambda: plots.distribution(
        {"T = 1": {" a": 0.7, "$": 0.2, "\n": 0.1}, "T = 2": {"b": 1.0}}, "t", ALT, cut={"T = 1": 1}
    ),
    "split_tiles": lambda: plots.split_tiles({"by row": {"train": [("a", "g"), ("b", "h")], "test": [("c", "g")]}}, "t", ALT),
}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """What is handed to the notebook: (data, metadata) of each display."""
    out: Shown = []

    def display(data: dict[str, str], *, raw: bool, metadata: dict[str, Any]) -> None:
        assert raw
        out.append((data, metadata))

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr("IPython.core.interactiveshell.InteractiveShell.initialized", lambda: True)
    return out


def test_outside_a_notebook_a_saved_figure_is_written_and_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plots.intervals({"a": {"g": (0.5, 0.4, 0.6)}}, "t", "u", ALT, save=tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").format == "PNG"
    assert capsys.readouterr().out == ""


def test_every_drawing_function_is_drawn_here() -> None:
    drawing = {
        name for name, f in inspect.getmembers(plots, inspect.isfunction)
        if f.__module__ == plots.__name__ and name != "show" and "alt" in inspect.signature(f).parameters
    }  # fmt: skip
    assert drawing == set(DRAWN)


@pytest.mark.filterwarnings("error::UserWarning")  # a glyph that is missing, axes that collapse
@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_has_alt_text_is_opaque_and_loses_nothing_at_its_edge(name: str, shown: Shown) -> None:
    DRAWN[name]()
    DRAWN[name]()
    (data, metadata), again = shown
    assert metadata == {"image/png": {"alt": ALT}}
    assert data["text/plain"] == f"Figure: {ALT}"
    assert again[0] == data, "the same figure gives the same bytes"
    picture = Image.open(BytesIO(b64decode(data["image/png"])))
    pixels = numpy.asarray(picture.convert("RGBA"))
    assert picture.format == "PNG"
    assert int(pixels[..., 3].min()) == 255, "a transparent background vanishes on a dark page"
    edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    assert all((edge == 255).all() for edge in edges), "something is cut off at the edge"
    assert len(numpy.unique(pixels.reshape(-1, 4), axis=0)) > 20, "the figure is empty"
    assert 300 < picture.width <= 1200


@given(words=st.lists(st.text("abc.,", min_size=1, max_size=9), max_size=12))
def test_alt_text_of_under_six_words_is_refused(words: list[str]) -> None:
    shown: list[Any] = []
    fig, ax = plots.figure(2, 1)
    ax.plot([0, 1])
    alt = "  ".join(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("IPython.display.display", lambda *args, **kwargs: shown.append(kwargs["metadata"]["image/png"]["alt"]))
        if len(words) < 6:
            with pytest.raises(ValueError, match="alt text must say what is seen"):
                plots.show(fig, alt)
            assert shown == []
        else:
            plots.show(fig, alt)
            assert shown == [alt]


def test_a_figure_is_saved_as_it_is_shown(tmp_path: Path, shown: Shown) -> None:
    for name, draw in {"curves": plots.curves, "bars": plots.grouped_bars}.items():
        path = tmp_path / "figures" / f"{name}.png"
        if draw is plots.curves:
            plots.curves({"a": [(0, 1), (1, 0)]}, "t", "x", "y", ALT, save=path)
        else:
            plots.grouped_bars({"a": {"g": 1.0}}, "t", "u", ALT, save=path)
        assert path.read_bytes() == b64decode(shown[-1][0]["image/png"])


# ---- colours --------------------------------------------------------------------------------------------------------

# Machado, Oliveira and Fernandes (2009), "A physiologically-based model for simulation of color vision deficiency",
# severity 1.0; to be applied to linear RGB.
EYES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
}
XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]  # sRGB, D65


def linear(colour: str) -> numpy.ndarray:
    value = numpy.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return numpy.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(colour: str, eye: str) -> numpy.ndarray:
    """CIELAB of ``colour`` as ``eye`` sees it."""
    seen = numpy.clip(numpy.array(EYES[eye]) @ linear(colour), 0, 1)
    xyz = numpy.array(XYZ) @ seen / [0.95047, 1.0, 1.08883]
    f = numpy.where(xyz > (6 / 29) ** 3, numpy.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return numpy.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(a: str, b: str, eye: str) -> float:
    return math.dist(lab(a, eye), lab(b, eye))


def test_distances_are_right_where_they_are_known() -> None:
    assert distance("#FFFFFF", "#000000", "all cones") == pytest.approx(100, abs=0.01)
    assert distance("#FF0000", "#00FF00", "all cones") == pytest.approx(170.6, abs=0.2)
    for eye, matrix in EYES.items():
        assert numpy.sum(matrix, axis=1) == pytest.approx([1, 1, 1], abs=1e-5), f"{eye} sees grey as grey"


@pytest.mark.parametrize("eye", EYES)
def test_the_palette_is_told_apart_by_every_eye(eye: str) -> None:
    pairs = {(a, b): distance(a, b, eye) for a, b in itertools.combinations(plots.PALETTE, 2)}
    assert min(pairs.values()) > 15, "about seven times what can just be told apart"
    assert distance(plots.BLUE, plots.ORANGE, eye) > 60, "the two that carry most figures"
    assert min(distance(colour, plots.PAPER, eye) for colour in plots.PALETTE) > 35


def contrast(a: str, b: str) -> float:
    low, high = sorted(float(numpy.array(XYZ[1]) @ linear(colour)) for colour in (a, b))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", DRAWN)
def test_text_stands_out_and_axes_say_what_they_measure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.colors import to_hex
    from matplotlib.text import Text

    drawn: list[Any] = []
    monkeypatch.setattr(plots, "show", lambda fig, alt, save=None: drawn.append(fig))
    DRAWN[name]()
    fig = drawn[0]
    fig.canvas.draw()
    for text in fig.findobj(Text):
        if text.get_text().strip():
            assert contrast(to_hex(text.get_color()), plots.PAPER) >= 4.5, f"{text.get_text()!r} is too pale"
    for ax in fig.axes:
        for axis in (ax.xaxis, ax.yaxis):
            ticks = [label.get_text() for label in axis.get_ticklabels() if label.get_text()]
            numbers = ticks and all(map(_is_number, ticks))
            assert not (ax.axison and numbers) or axis.get_label_text(), f"{name}: an axis of numbers without a label"


def _is_number(text: str) -> bool:
    return not any(c.isalpha() for c in text.replace("mathdefault", ""))


@pytest.mark.parametrize("colour", [plots.BLUE, plots.ORANGE])
def test_ink_is_read_on_the_darkest_cell(colour: str) -> None:
    assert contrast(plots.tint(colour), plots.INK) >= 4.5 > contrast(plots.VERMILION, plots.PAPER)


def test_more_series_than_colours_are_refused_in_words() -> None:
    seven = {str(n): [(0.0, 1.0), (1.0, n)] for n in range(7)}
    with pytest.raises(ValueError, match="7 series in one figure, and 6 colours"):
        plots.curves(seven, "t", "x", "y", ALT)
    with pytest.raises(ValueError, match="7 series in one figure, and 6 colours"):
        plots.grouped_bars({name: {"g": 1.0} for name in seven}, "t", "u", ALT)


def test_text_is_dark_enough_on_paper() -> None:
    ink, paper = (float(numpy.array(XYZ[1]) @ linear(colour)) for colour in (plots.INK, plots.PAPER))
    assert (paper + 0.05) / (ink + 0.05) > 7, "WCAG 2.2, contrast (enhanced)"


# ---- tables and cards -----------------------------------------------------------------------------------------------


markup = st.text(st.sampled_from("<>&\"'/ab =é#;"), min_size=1, max_size=15)


@given(st.lists(st.lists(markup, min_size=2, max_size=2), min_size=1, max_size=3), st.lists(markup, min_size=2, max_size=2))
def test_a_table_shows_any_text_as_text(rows: list[list[str]], header: list[str]) -> None:
    table = plots.Table(rows, header)
    read = Markup(table._repr_html_())
    assert read.tags == {"table", "tr", "th", "td"}
    assert read.text == "".join("".join(line) for line in [header, *rows])
    assert len(repr(table).splitlines()) == len(rows) + 1


@given(markup, markup)
def test_a_card_shows_any_text_as_text(key: str, value: str) -> None:
    cards = plots.Cards([{key: value, "nothing": None, "empty": ""}])
    read = Markup(cards._repr_html_())
    assert read.tags == {"blockquote", "b"}, "a card is still one where GitHub drops the style"
    assert read.text == f"{key}: {value}" == repr(cards)


def test_cells_say_yes_no_and_numbers_plainly() -> None:
    table = plots.Table([["a", 12345.678, 7, True], ["bb", 0.00012345, 8, False]])
    assert repr(table).splitlines() == ["a   1.235e+04  7  ✓", "bb  0.0001234  8  ✗"]


def test_a_long_text_on_a_card_is_cut_at_a_word() -> None:
    card = plots.Cards([{"answer": "word " * 100}], most=22)
    assert repr(card) == "answer: word word word word ..."


def test_a_change_is_shown_from_where_two_texts_part() -> None:
    assert plots.change("Rest  it.\n\nTop", "Rest it.") == {"before": "Rest␣␣it.⏎⏎Top", "after": "Rest it."}
    assert plots.change("Links: - A", "") == {"before": "Links: - A", "after": "(dropped)"}
    shown = plots.change("a" * 100 + " good. NIH: x", "a" * 100 + " good.", around=6)
    assert shown == {"before": "... good. NIH: x", "after": "... good."}
    assert len(plots.change("word " * 100, "other", most=40)["before"]) < 50


# ---- heat maps ------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=2, max_size=2), st.sampled_from([1, -1]))
def test_a_shade_is_darker_in_grey_the_larger_the_value_and_black_text_stays_readable(shares: list[float], sign: int) -> None:
    low, high = sorted(shares)

    def luminance(share: float) -> float:
        return float(numpy.array(XYZ[1]) @ linear(plots.shade(sign * 4 * share, 4)))

    assert luminance(high) <= luminance(low) + 0.005
    ink = float(numpy.array(XYZ[1]) @ linear(plots.INK))
    assert (luminance(high) + 0.05) / (ink + 0.05) > 4.5, "WCAG 2.2, contrast (minimum)"
    assert plots.shade(0, 4) == plots.shade(0, 0) == plots.PAPER


@pytest.mark.parametrize("eye", EYES)
def test_the_two_signs_are_told_apart_by_every_eye(eye: str) -> None:
    assert distance(plots.shade(1, 1), plots.shade(-1, 1), eye) > 25
