"""Every figure of the course: one style and palette, an opaque background, and alt text."""

from __future__ import annotations

import html
import re
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medquad_utils.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The palette of Okabe and Ito (jfly.uni-koeln.de/color), which colour-blind readers can tell apart.
# Its yellow is left out, because it vanishes on white.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY, INK, PAPER = "#CC79A7", "#56B4E9", "#8A8A8A", "#1F2328", "#FFFFFF"
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
MARKERS, DASHES = "oDs^vP", ("-", "--", "-.", ":")
INCHES = 0.0815  # width of a character in the boxes

Groups = Mapping[str, Mapping[str, float]]  # series -> group -> value
Lines = Mapping[str, float] | None  # named limits, by their name

STYLE: dict[str, Any] = {
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#E3E3E3", "axes.axisbelow": True,
    "axes.titlelocation": "left", "axes.titlesize": 12, "axes.titleweight": "bold",
    "font.size": 10.5, "figure.dpi": 110, "legend.frameon": False, "svg.hashsalt": "medquad",
}  # fmt: skip


def figure(
    width: float = 8, height: float = 3.6, columns: int = 1, **kwargs: Any
) -> tuple[Figure, Any]:
    """Create a figure in the course's style, in inches, with ``columns`` axes side by side."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(STYLE)
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.subplots(1, columns, **kwargs)


def show(fig: Figure, alt: str, save: Path | None = None) -> None:
    """Display ``fig`` as a PNG with its alt text, and write it to ``save`` if given.

    Outside a notebook a saved figure is not displayed: a terminal would print its bytes.
    """
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.display import display

    if len(alt.split()) < 6:
        raise ValueError(f"alt text must say what is seen, in a sentence: {alt!r}")
    buffer = BytesIO()
    fig.savefig(buffer, format="png", metadata={"Software": None})
    if save:
        with whole_file(save) as temporary:
            temporary.write_bytes(buffer.getvalue())
        if not InteractiveShell.initialized():
            return
    bundle = {"image/png": b64encode(buffer.getvalue()).decode(), "text/plain": f"Figure: {alt}"}
    display(bundle, raw=True, metadata={"image/png": {"alt": alt}})


def _colour(number: int, of: int) -> str:
    if of > len(PALETTE):
        raise ValueError(
            f"{of} series in one figure, and {len(PALETTE)} colours that readers can tell apart: "
            "draw two figures, or fewer series."
        )
    return PALETTE[number]


def tint(colour: str, share: float = 0.62) -> str:
    """Mix ``colour`` with the paper, "#RRGGBB"; black text stays readable on the usual share."""
    mixed = (round(255 + share * (int(colour[i : i + 2], 16) - 255)) for i in (1, 3, 5))
    return "#" + "".join(f"{part:02X}" for part in mixed)


def shade(value: float, most: float) -> str:
    """Return a value's colour, "#RRGGBB": blue above 0, orange below, darker for larger ones.

    ``most`` is the largest magnitude in the figure. In grey the sign is lost, so print it as well.
    """
    share = 0.62 * min(1.0, abs(value) / most) if most else 0.0
    return tint(BLUE if value > 0 else VERMILION, share)


def _plain(text: str) -> str:
    """Escape the dollar signs, which matplotlib reads as mathematics."""
    return text.replace("$", "\\$")


def _percent(axis: Any, form: str = "{:.0%}") -> None:
    from matplotlib.ticker import PercentFormatter

    if form.endswith("%}"):
        axis.set_major_formatter(PercentFormatter(1))


def _heading(fig: Figure, text: str) -> None:
    """A title above all axes of a figure."""
    fig.suptitle(text, fontweight="bold", x=0.02, ha="left")


def bars(
    values: Mapping[str, float], title: str, unit: str, alt: str, highlight: Sequence[str] = (),
    form: str = "{:,.0f}", log: bool = False
) -> None:  # fmt: skip
    """Draw horizontal bars with numbers, the first on top; ``highlight`` names the orange ones."""
    fig, ax = figure(8, 0.9 + 0.34 * len(values))
    colours = [ORANGE if name in highlight else BLUE for name in values]
    drawn = ax.barh(list(values), list(values.values()), color=colours)
    ax.bar_label(drawn, [form.format(v) for v in values.values()], padding=4)
    ax.invert_yaxis()
    ax.grid(False)
    ax.set(xlabel=unit, xscale="log" if log else "linear", title=title)
    _percent(ax.xaxis, form)
    ax.margins(x=0.14)
    show(fig, alt)


def grouped_bars(
    table: Groups, title: str, unit: str, alt: str, form: str = "{:.0%}", save: Path | None = None
) -> None:
    """Draw upright bars in groups: series -> group -> value; all series have the same groups."""
    groups, width = list(next(iter(table.values()))), 0.8 / len(table)
    fig, ax = figure()
    for number, (name, values) in enumerate(table.items()):
        places = [g + (number - (len(table) - 1) / 2) * width for g in range(len(groups))]
        heights, colour = [values[g] for g in groups], _colour(number, len(table))
        drawn = ax.bar(places, heights, width * 0.94, label=name, color=colour)
        ax.bar_label(drawn, [form.format(v) for v in heights], padding=2, fontsize=9)
    # About 66 characters fit beside the legend. If neighbours would touch, all names are turned.
    wide = [max(map(len, group.split("\n"))) for group in groups]
    crowded = any(a + b > 2 * 66 / len(groups) for a, b in pairwise(wide))
    turned = {"rotation": 20, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    ax.set_xticks(range(len(groups)), groups, **turned)
    ax.set(ylabel=unit, title=title)
    _percent(ax.yaxis, form)
    ax.margins(y=0.12)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    show(fig, alt, save)


def _row_axes(ax: Any, groups: Sequence[str]) -> None:
    """Put ``groups`` below one another, the first on top."""
    ax.set_yticks(range(len(groups)), [_plain(group) for group in groups])
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.grid(True, axis="x")


def intervals(
    table: Mapping[str, Mapping[str, tuple[float, float, float]]], title: str, unit: str, alt: str,
    save: Path | None = None, width: float = 6.4, zero: bool = False
) -> None:  # fmt: skip
    """Draw dots with whiskers: series -> group -> (mean, low, high); a series may lack a group.

    ``zero`` draws a line at zero, for differences.
    """
    groups = list(dict.fromkeys(group for values in table.values() for group in values))
    fig, ax = figure(width, 1.3 + len(groups) * (0.16 + 0.13 * len(table)))
    for number, (name, values) in enumerate(table.items()):
        offset = (number - (len(table) - 1) / 2) * 0.8 / len(table)
        means, lows, highs = zip(*values.values(), strict=True)
        below = [max(0, m - low) for m, low in zip(means, lows, strict=True)]
        above = [max(0, high - m) for m, high in zip(means, highs, strict=True)]
        ax.errorbar(
            means, [groups.index(g) + offset for g in values], xerr=[below, above], label=name,
            fmt=MARKERS[number % 6], color=_colour(number, len(table)),
            capsize=2.5, markersize=5.5, linewidth=1.5,
        )  # fmt: skip
    for between in range(1, len(groups)):
        ax.axhline(between - 0.5, color="#E3E3E3", linewidth=0.8)
    if zero:
        ax.axvline(0, color=INK, linestyle="--", linewidth=1)
    _row_axes(ax, groups)
    ax.grid(False, axis="y")
    ax.locator_params(axis="x", nbins=7)
    ax.set(xlabel=unit, title=title)
    fig.legend(loc="outside lower center", ncols=min(3, len(table)))
    show(fig, alt, save)


def dots(
    table: Mapping[str, Mapping[str, Sequence[float]]], title: str, unit: str, alt: str,
    lines: Lines = None
) -> None:  # fmt: skip
    """Draw shares as dots: series -> group -> values; ``lines`` draws named limits.

    A later series lies over an earlier one, with larger dots.
    """
    groups = list(dict.fromkeys(group for values in table.values() for group in values))
    fig, ax = figure(8, 1.5 + 0.27 * len(groups))
    for number, (name, values) in enumerate(table.items()):
        points = [(v, groups.index(group)) for group, several in values.items() for v in several]
        look = {"color": _colour(number, len(table)), "markersize": 4 + 3 * number, "alpha": 0.8}
        ax.plot(*zip(*points, strict=True), MARKERS[number % 6], label=name, **look)
    for label, x in (lines or {}).items():
        ax.axvline(x, color=VERMILION, linestyle="--", linewidth=1.4, label=label)
    _row_axes(ax, groups)
    _percent(ax.xaxis)
    ax.set(xlabel=unit, title=title)
    fig.legend(loc="outside lower center", ncols=4)
    show(fig, alt)


def stacked_bars(
    table: Groups, title: str, unit: str, alt: str, lines: Lines = None, save: Path | None = None
) -> None:
    """Draw horizontal stacked bars with totals: bar -> part -> value; ``lines`` draws limits."""
    fig, ax = figure(8, 1.5 + 0.42 * len(table))
    parts = list(dict.fromkeys(p for values in table.values() for p in values))
    left = [0.0] * len(table)
    for number, part in enumerate(parts):
        sizes, look = [values.get(part, 0.0) for values in table.values()], {"edgecolor": PAPER}
        ax.barh(
            list(table), sizes, left=left, label=part, color=_colour(number, len(parts)), **look
        )
        left = [at + size for at, size in zip(left, sizes, strict=True)]
    box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}
    for place, total in enumerate(left):
        offset = {"xytext": (5, 0), "textcoords": "offset points"}
        ax.annotate(f"{total:.2f}", (total, place), va="center", bbox=box, **offset)
    for label, x in (lines or {}).items():
        ax.axvline(x, color=INK, linestyle="--", linewidth=1)
        ax.text(x, -0.62, label, ha="center", va="bottom", fontsize=9)
    ax.invert_yaxis()
    ax.grid(False)
    ax.set(xlabel=unit)
    ax.set_title(title, pad=20 if lines else 6)
    ax.margins(x=0.12)
    fig.legend(loc="outside lower center", ncols=min(4, len(parts)))
    show(fig, alt, save)


def histogram(
    series: Mapping[str, Sequence[float]], title: str, unit: str, alt: str,
    lines: Lines = None, bins: int = 60, top: float | None = None,
    y: str = "rows"
) -> None:  # fmt: skip
    """Draw outlined histograms on one axis, 0 to ``top``; ``lines`` draws named limits."""
    import numpy

    fig, ax = figure(8, 3.4)
    edges = numpy.linspace(0, top or max(max(v) for v in series.values()), bins)
    for number, (name, values) in enumerate(series.items()):
        colour = _colour(number, len(series))
        ax.hist(values, edges, histtype="stepfilled", alpha=0.35, color=colour)
        ax.hist(values, edges, histtype="step", color=colour, linewidth=1.6, label=name)
    ax.margins(y=0.16 if lines else 0.05)  # room for the labels
    for label, x in (lines or {}).items():
        ax.axvline(x, color=VERMILION, linestyle="--", linewidth=1.4)
        ax.text(x, ax.get_ylim()[1] * 0.97, f" {label}", color=INK, va="top")
    ax.set(xlabel=unit, ylabel=y, title=title)
    if len(series) > 1:  # outside the axes, where no bar can be
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    show(fig, alt)


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]], title: str, x: str, y: str, alt: str,
    save: Path | None = None, markers: Sequence[str] = ()
) -> None:  # fmt: skip
    """Draw lines through (x, y) points, each with its own dash and colour; ``markers`` get dots."""
    fig, ax = figure()
    for number, (name, points) in enumerate(series.items()):
        look = {"color": _colour(number, len(series)), "marker": "o" if name in markers else ""}
        pairs = zip(*points, strict=True)
        ax.plot(*pairs, DASHES[number % 4], label=name, linewidth=2, **look)
    ax.set(xlabel=x, ylabel=y, title=title)
    ax.legend()
    show(fig, alt, save)


def distribution(
    series: Groups, title: str, alt: str, cut: Mapping[str, int] | None = None
) -> None:
    """Draw next-token probabilities: panel -> token -> value; ``cut``: tokens a panel keeps."""
    fig, axes = figure(3.1 * len(series), 3.6, len(series), squeeze=False, sharex=True)
    for ax, (name, values) in zip(axes[0], series.items(), strict=True):
        keep = (cut or {}).get(name, len(values))
        colours = [BLUE if place < keep else "#C9C9C9" for place in range(len(values))]
        ax.barh(range(len(values)), list(values.values()), color=colours)
        ax.set_yticks(range(len(values)), list(map(_plain, values)), family="monospace")
        ax.invert_yaxis()
        ax.grid(False)
        ax.set(xlabel="probability")
        ax.set_title(name, fontsize=10.5)
    _heading(fig, title)
    show(fig, alt)


def _heatmap(
    ax: Any, values: Any, colours: Sequence[str], low: float, high: float | None = None,
    numbers: Callable[[float], str] | None = None, **kwargs: Any
) -> Any:  # fmt: skip
    import numpy
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("course", colours)
    ax.grid(False)
    ax.tick_params(length=0)
    if numbers:
        for (i, j), value in numpy.ndenumerate(values):
            ax.text(j, i, numbers(value), ha="center", va="center", fontsize=9)
    return ax.imshow(values, cmap=shades, vmin=low, vmax=high, **kwargs)


def heat(matrices: Mapping[str, Any], title: str, alt: str) -> None:
    """Draw small matrices side by side, blue below zero and orange above, with their numbers."""
    widths = [max(1.0, len(m[0])) for m in matrices.values()]
    width = min(10, 1.2 + 0.62 * sum(widths))
    fig, axes = figure(width, 3.2, len(matrices), width_ratios=widths, squeeze=False)
    most = max(abs(float(v)) for m in matrices.values() for row in m for v in row) or 1.0
    colours = (tint(BLUE), PAPER, tint(ORANGE))
    for ax, (name, matrix) in zip(axes[0], matrices.items(), strict=True):
        # Adding 0.0 turns -0.0 into 0.0.
        _heatmap(ax, matrix, colours, -most, most, lambda value: f"{round(value, 1) + 0.0:.1f}")
        ax.set(xticks=[], yticks=[])
        ax.set_title(name, fontsize=10.5)
    _heading(fig, title)
    show(fig, alt)


def score_map(table: Groups, title: str, alt: str) -> None:
    """Draw scores from 0 to 1 as coloured cells with their numbers: line -> column -> value."""
    columns = list(next(iter(table.values())))
    values = [[row[column] for column in columns] for row in table.values()]
    fig, ax = figure(8, 1.25 + 0.36 * len(table))
    _heatmap(ax, values, (PAPER, tint(BLUE)), 0, 1, "{:.2f}".format, aspect="auto")
    ax.set_xticks(range(len(columns)), [_plain(c).replace(" ", "\n") for c in columns])
    ax.set_yticks(range(len(table)), list(map(_plain, table)))
    _heading(fig, title)
    show(fig, alt)


def attention(tokens: Sequence[str], weights: Any, title: str, alt: str) -> None:
    """Draw one attention head, shape (tokens, tokens), 0 to 1: a row reads, a column is read."""
    size = 1.9 + 0.3 * len(tokens)
    fig, ax = figure(size + 0.9, size)
    drawn = _heatmap(ax, weights, (PAPER, BLUE, INK), 0)
    names = [_plain(token.strip()) or "\u2423" for token in tokens]
    ax.set_xticks(range(len(names)), names, rotation=90, family="monospace", fontsize=9)
    ax.set_yticks(range(len(names)), names, family="monospace", fontsize=9)
    ax.set(xlabel="is read", ylabel="reads")
    fig.colorbar(drawn, ax=ax, shrink=0.8, label="weight")
    _heading(fig, title)
    show(fig, alt)


def staircase(levels: Sequence[float], title: str, alt: str) -> None:
    """Draw the levels of a 4-bit code under the normal curve, and what values are rounded to."""
    import numpy

    fig, (left, right) = figure(9, 3.6, 2)
    values, x = numpy.array(levels), numpy.linspace(-1, 1, 2001)
    normal = numpy.exp(-((x * 2.6) ** 2) / 2)
    left.fill_between(x, normal, color=SKY, alpha=0.35, label="where normal weights fall")
    left.vlines(values, 0, 1, color=BLUE, linewidth=1.6, label="levels")
    left.set(xlabel="weight / largest weight of its block", ylabel="share of weights (no scale)")
    left.set(yticks=[], ylim=(0, 1.25), title="levels crowd where weights crowd")
    left.legend(loc="upper left", ncols=2, fontsize=9)
    rounded = values[numpy.abs(x[:, None] - values).argmin(axis=1)]
    right.plot(x, x, color=GREY, linewidth=1, label="exact")
    right.step(x, rounded, color=ORANGE, linewidth=2, label="rounded", where="mid")
    right.set(xlabel="weight / largest, before", ylabel="after", title="rounding is a staircase")
    right.legend()
    for ax in (left, right):
        ax.set_xticks([-1, -0.5, 0, 0.5, 1])
    _heading(fig, title)
    show(fig, alt)


def rounding(
    before: Sequence[float], after: Sequence[float], title: str, alt: str, most: int = 32
) -> None:
    """Draw the first ``most`` numbers before and after rounding; of more, also a histogram."""
    import numpy

    old, new = numpy.asarray(before, dtype=float), numpy.asarray(after, dtype=float)
    ratios = (3, 2) if len(old) > most else (1,)
    fig, axes = figure(7 + len(ratios), 3.6, len(ratios), squeeze=False, width_ratios=ratios)
    left, x = axes[0][0], numpy.arange(min(most, len(old)))
    left.vlines(x, old[:most], new[:most], color=GREY, linewidth=1.2)
    left.plot(x, old[:most], "o", color=BLUE, markersize=6, label="exact")
    left.plot(x, new[:most], "D", color=ORANGE, markersize=5, label="rounded")
    left.axhline(0, color=GREY, linewidth=0.8)
    left.set(xlabel="place in the row", ylabel="value")
    left.margins(y=0.18)
    left.legend(loc="upper right", ncols=2, fontsize=9)
    for right in axes[0][1:]:
        right.hist(new - old, 61, histtype="stepfilled", color=SKY, edgecolor=BLUE)
        right.set(xlabel="rounded minus exact", ylabel="weights (count)")
        right.set_title(f"errors of all {len(old):,}", fontsize=10.5)
        right.locator_params(axis="x", nbins=5)
    _heading(fig, title)
    show(fig, alt)


def _lay_out(widths: Sequence[int], per_line: float) -> list[tuple[int, float, float]]:
    """(line, centre, right end) of boxes of these widths, in characters; long lines wrap."""
    places: list[tuple[int, float, float]] = []
    line, at = 0, 0.6
    for width in widths:
        if at > 0.6 and at + width + 1.8 > per_line:
            line, at = line + 1, 0.6
        places.append((line, at + width / 2 + 0.4, at + width + 1.8))
        at += width + 1.8
    return places


def _box(ax: Any, x: float, y: float, text: str, face: str, edge: str) -> None:
    box = {"boxstyle": "round,pad=0.25", "facecolor": face, "edgecolor": edge}
    ax.text(x, y, text, bbox=box, family="monospace", fontsize=9.5, ha="center", va="center")


def word_heat(
    lines: Mapping[str, Sequence[tuple[str, float]]], title: str, alt: str, save: Path | None = None
) -> None:
    """Draw words in boxes shaded by their values, with numbers: line -> (word, value) pairs.

    Each line has its own scale, from 0 to its largest magnitude.
    """
    boxes, names, height, widest = [], [], 0, 76.0  # the legend needs 76 characters
    for name, pairs in lines.items():
        most = max((abs(value) for _, value in pairs), default=0.0)
        texts = [_plain(_short(word, 24).replace("\n", " ")) for word, _ in pairs]
        numbers = [f"{round(value, 2) + 0.0:+.2f}" for _, value in pairs]
        wide = [max(len(t), len(n)) for t, n in zip(texts, numbers, strict=True)]
        places = _lay_out(wide, 96)
        for place, text, number, (_, value) in zip(places, texts, numbers, pairs, strict=True):
            boxes.append((place[1], height + place[0], text, number, shade(value, most)))
        names.append((height, _plain(name)))
        height += 1 + max((line for line, _, _ in places), default=0)
        widest = max([widest, *(right for _, _, right in places)])
    fig, ax = figure(INCHES * widest, 0.95 + 0.78 * height)
    ax.set(xlim=(0, widest), ylim=(height - 0.25, -1.1), title=title)
    ax.axis("off")
    for y, name in names:
        ax.text(0.2, y - 0.42, name, fontsize=9.5, fontweight="bold", va="center")
    for x, y, text, number, colour in boxes:
        _box(ax, x, y - 0.05, text, colour, GREY)
        ax.text(x, y + 0.27, number, fontsize=8.5, ha="center", va="center")
    legend = "blue, plus: for the answer; orange, minus: against it; the darker, the more"
    ax.text(0.2, -0.9, legend, fontsize=9.5, va="center")
    show(fig, alt, save)


def token_strip(
    tokens: Sequence[str], in_loss: Sequence[bool], title: str, alt: str, per_line: int = 100
) -> None:
    """Draw every token in a box: orange in the loss, grey if only read.

    ``per_line`` is in characters.
    """
    texts = [_plain(token.strip(" ").replace("\n", "\\n")) or "(space)" for token in tokens]
    places = _lay_out(list(map(len, texts)), per_line)
    height = 1 + max((line for line, _, _ in places), default=0)
    fig, ax = figure(INCHES * per_line, 0.75 + 0.32 * height)
    ax.set(xlim=(0, per_line), ylim=(height - 0.3, -1.5), title=title)
    ax.axis("off")
    for (line, x, _), text, learned in zip(places, texts, in_loss, strict=True):
        face, edge = ("#FBD8A0", ORANGE) if learned else ("#E8E8E8", GREY)
        _box(ax, x, line, text, face, edge)
    ax.text(0.2, -1.05, "orange: learned", fontsize=9.5, va="center")
    ax.text(18, -1.05, "grey: only read", fontsize=9.5, va="center")
    show(fig, alt)


def split_tiles(
    splits: Mapping[str, Mapping[str, Sequence[tuple[str, str]]]], title: str, alt: str
) -> None:
    """Draw rows as tiles: split -> part -> (label, group); a group keeps its colour."""
    rows = [row for parts in splits.values() for several in parts.values() for row in several]
    groups = list(dict.fromkeys(group for _, group in rows))
    most = max(sum(max(1, len(rows)) + 0.6 for rows in parts.values()) for parts in splits.values())
    fig, ax = figure(min(10, 1.6 + 1.15 * most), 0.7 + 1.05 * len(splits))
    ax.set(xlim=(-1.0, most), ylim=(len(splits) - 0.25, -0.55), title=title)
    ax.axis("off")
    for line, (name, parts) in enumerate(splits.items()):
        ax.text(-0.1, line + 0.2, name, ha="right", va="center", fontweight="bold")
        at = 0.1
        for part, tiles in parts.items():
            ax.text(at, line - 0.2, part, fontsize=9, va="center")
            for label, group in tiles:
                colour = PALETTE[groups.index(group) % len(PALETTE)]
                look = {"color": f"{colour}55", "edgecolor": colour, "linewidth": 1.6}
                ax.barh(line + 0.2, 0.94, 0.4, left=at, **look)
                ax.text(at + 0.47, line + 0.2, label, ha="center", va="center", fontsize=9)
                at += 1
            at += 0.6
    show(fig, alt)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " ..."


class Cards:
    """Rows as cards: HTML in a notebook, plain text elsewhere."""

    def __init__(self, cards: Sequence[Mapping[str, Any]], most: int = 320) -> None:
        filled = [{k: v for k, v in card.items() if v not in (None, "", [])} for card in cards]
        self.cards = [{k: _short(str(v), most) for k, v in card.items()} for card in filled]

    def __repr__(self) -> str:
        return "\n\n".join("\n".join(f"{k}: {v}" for k, v in card.items()) for card in self.cards)

    def _repr_html_(self) -> str:
        # GitHub drops the style, and then the blockquote's own bar and margins separate the cards.
        style = f"border:1px solid {GREY};border-radius:6px;padding:8px 12px;margin:8px 0"
        start = f'<blockquote style="{style};background:{PAPER};color:{INK}">'
        escaped = [[map(html.escape, pair) for pair in card.items()] for card in self.cards]
        cards = ("<br>".join(f"<b>{k}</b>: {v}" for k, v in card) for card in escaped)
        return "".join(f"{start}{card}</blockquote>" for card in cards)


def change(before: str, after: str, around: int = 60, most: int = 220) -> dict[str, str]:
    """Return a card of two texts, cut to where they differ; spaces (␣␣) and breaks (⏎) show."""
    shared = next((n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), None)
    same = min(len(before), len(after)) if shared is None else shared
    start = max(0, same - around)
    if start:  # go on to the beginning of a word, if there is one
        start = max(start, before.find(" ", start, same) + 1)

    def visible(text: str) -> str:
        spaced = re.sub(r"[^\S\n]{2,}", "␣␣", text[start:]).replace("\n", "⏎")
        return ("... " if start else "") + _short(spaced, most)

    return {"before": visible(before), "after": visible(after) if after else "(dropped)"}


class Table:
    """Rows as a table: HTML in a notebook, plain text elsewhere; booleans are ticks and crosses."""

    def __init__(self, rows: Sequence[Sequence[Any]], header: Sequence[str] = ()) -> None:
        self.rows, self.header = [[_cell(v) for v in row] for row in rows], list(header)

    def __repr__(self) -> str:
        lines = [self.header, *self.rows] if self.header else self.rows
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ([v.ljust(w) for v, w in zip(line, widths, strict=True)] for line in lines)
        return "\n".join("  ".join(line).rstrip() for line in padded)

    def _repr_html_(self) -> str:
        def line(values: Sequence[str], tag: str) -> str:
            cells = (f'<{tag} style="text-align:left">{html.escape(v)}</{tag}>' for v in values)
            return f"<tr>{''.join(cells)}</tr>"

        head = line(self.header, "th") if self.header else ""
        return f"<table>{head}{''.join(line(row, 'td') for row in self.rows)}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "✓" if value else "✗"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
