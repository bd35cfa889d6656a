"""Every figure of the course: one style, one palette, an opaque background, and alt text that goes with the picture."""

from __future__ import annotations

import html
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medquad_utils.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette (jfly.uni-koeln.de/color), told apart by colour-blind eyes too; yellow is left out on white.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
)
GREY, INK, PAPER = "#8A8A8A", "#1F2328", "#FFFFFF"
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)

STYLE: dict[str, Any] = {
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#E3E3E3",
    "axes.axisbelow": True, "axes.titlelocation": "left", "axes.titlesize": 12, "axes.titleweight": "bold",
    "font.size": 10.5, "figure.dpi": 110, "legend.frameon": False, "svg.hashsalt": "medquad",
}  # fmt: skip


def figure(
    width: float = 8, height: float = 3.6, columns: int = 1, **kwargs: Any
) -> tuple[Figure, Any]:
    """A figure in the course's style, in inches, with ``columns`` axes side by side."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(STYLE)
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(1, columns, **kwargs)
    return fig, axes


def show(fig: Figure, alt: str, save: Path | None = None) -> None:
    """Display ``fig`` as a PNG with ``alt`` for readers who cannot see it; also write it to ``save`` if given.

    Outside a notebook a figure that is saved is not displayed: a terminal would print its bytes.

    Raises:
        ValueError: the alt text is too short to say what is seen.
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


def bars(
    values: Mapping[str, float], title: str, unit: str, alt: str,
    highlight: Sequence[str] = (), form: str = "{:,.0f}", log: bool = False, width: float = 8,
) -> None:  # fmt: skip
    """Horizontal bars, one a key, the first on top, each with its number; ``highlight`` names the ones in orange."""
    fig, ax = figure(width, 0.9 + 0.34 * len(values))
    names = list(values)
    colours = [ORANGE if name in highlight else BLUE for name in names]
    drawn = ax.barh(names, list(values.values()), color=colours)
    ax.bar_label(drawn, [form.format(v) for v in values.values()], padding=4)
    ax.invert_yaxis()
    ax.grid(False)
    ax.set(xlabel=unit, xscale="log" if log else "linear")
    _percent(ax.xaxis, form)
    ax.set_title(title)
    ax.margins(x=0.14)
    show(fig, alt)


def grouped_bars(
    table: Mapping[str, Mapping[str, float]],
    title: str,
    unit: str,
    alt: str,
    form: str = "{:.0%}",
    save: Path | None = None,
) -> None:
    """Upright bars in groups: ``table`` maps a series to its values by group; every series has the same groups."""
    groups = list(next(iter(table.values())))
    fig, ax = figure(8, 3.6)
    width = 0.8 / len(table)
    for number, (name, values) in enumerate(table.items()):
        places = [g + (number - (len(table) - 1) / 2) * width for g in range(len(groups))]
        drawn = ax.bar(
            places,
            [values[g] for g in groups],
            width * 0.94,
            label=name,
            color=_colour(number, len(table)),
        )
        ax.bar_label(drawn, [form.format(values[g]) for g in groups], padding=2, fontsize=9)
    wide = [
        max(map(len, group.split("\n"))) for group in groups
    ]  # in characters; about 66 fit beside the legend
    crowded = any(a + b > 2 * 66 / len(groups) for a, b in pairwise(wide))
    ax.set_xticks(
        range(len(groups)),
        groups,
        **({"rotation": 20, "ha": "right", "rotation_mode": "anchor"} if crowded else {}),
    )
    ax.set(ylabel=unit)
    _percent(ax.yaxis, form)
    ax.set_title(title)
    ax.margins(y=0.12)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    show(fig, alt, save)


def intervals(
    table: Mapping[str, Mapping[str, tuple[float, float, float]]],
    title: str,
    unit: str,
    alt: str,
    save: Path | None = None,
    width: float = 6.4,
    zero: bool = False,
) -> None:
    """Dots with whiskers: ``table`` maps a series to (mean, low, high) by group; a series may lack a group.

    Groups stand below one another, the first on top; a series has its own colour and its own marker. ``zero`` draws a line at
    zero, for differences.
    """
    groups = list(dict.fromkeys(group for values in table.values() for group in values))
    fig, ax = figure(width, 1.3 + len(groups) * (0.16 + 0.13 * len(table)))
    step = 0.8 / len(table)
    for number, (name, values) in enumerate(table.items()):
        places = [groups.index(g) + (number - (len(table) - 1) / 2) * step for g in values]
        means, lows, highs = zip(*values.values(), strict=True)
        whiskers = [
            [max(0, m - low) for m, low in zip(means, lows, strict=True)],
            [max(0, h - m) for m, h in zip(means, highs, strict=True)],
        ]
        colour, marker = _colour(number, len(table)), "oDs^vP"[number % 6]
        ax.errorbar(
            means,
            places,
            xerr=whiskers,
            fmt=marker,
            color=colour,
            label=name,
            capsize=2.5,
            markersize=5.5,
            linewidth=1.5,
        )
    for between in range(1, len(groups)):
        ax.axhline(between - 0.5, color="#E3E3E3", linewidth=0.8)
    if zero:
        ax.axvline(0, color=INK, linestyle="--", linewidth=1)
    ax.set_yticks(range(len(groups)), [g.replace("$", "\\$") for g in groups])
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.grid(False, axis="y")
    ax.grid(True, axis="x")
    ax.locator_params(axis="x", nbins=7)
    ax.set(xlabel=unit)
    ax.set_title(title)
    fig.legend(loc="outside lower center", ncols=min(3, len(table)))
    show(fig, alt, save)


def dots(
    table: Mapping[str, Mapping[str, Sequence[float]]],
    title: str,
    unit: str,
    alt: str,
    lines: Mapping[str, float] | None = None,
) -> None:
    """Shares as dots: ``table`` maps a series to its values (one or several) by group; ``lines`` draws named limits.

    Groups stand below one another, the first on top. A later series lies over an earlier one, and its dots are larger.
    """
    from matplotlib.ticker import PercentFormatter

    groups = list(dict.fromkeys(group for values in table.values() for group in values))
    fig, ax = figure(8, 1.5 + 0.27 * len(groups))
    for number, (name, values) in enumerate(table.items()):
        points = [
            (value, groups.index(group)) for group, several in values.items() for value in several
        ]
        colour, marker = (
            (SKY, ORANGE, BLUE, GREEN, VERMILION, PURPLE)[_colour_number(number, len(table))],
            "oDs^vP"[number % 6],
        )
        ax.plot(
            *zip(*points, strict=True),
            marker,
            color=colour,
            label=name,
            markersize=4 + 3 * number,
            alpha=0.8,
        )
    for label, x in (lines or {}).items():
        ax.axvline(x, color=VERMILION, linestyle="--", linewidth=1.4, label=label)
    ax.set_yticks(range(len(groups)), groups)
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.grid(True, axis="x")
    ax.set(xlabel=unit)
    ax.set_title(title)
    fig.legend(loc="outside lower center", ncols=4)
    show(fig, alt)


def stacked_bars(
    table: Mapping[str, Mapping[str, float]],
    title: str,
    unit: str,
    alt: str,
    lines: Mapping[str, float] | None = None,
    save: Path | None = None,
) -> None:
    """Horizontal stacked bars: bar -> part -> value, the total at the end; ``lines`` draws named limits across."""
    fig, ax = figure(8, 1.5 + 0.42 * len(table))
    parts = list(dict.fromkeys(p for values in table.values() for p in values))
    left = dict.fromkeys(table, 0.0)
    for number, part in enumerate(parts):
        sizes = [table[name].get(part, 0.0) for name in table]
        ax.barh(
            list(table),
            sizes,
            left=list(left.values()),
            label=part,
            color=_colour(number, len(parts)),
            edgecolor=PAPER,
        )
        left = {name: left[name] + size for name, size in zip(table, sizes, strict=True)}
    for place, total in enumerate(left.values()):
        box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}
        ax.annotate(
            f"{total:.2f}",
            (total, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            bbox=box,
        )
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
    lines: Mapping[str, float] | None = None, bins: int = 60, top: float | None = None, y: str = "rows",
) -> None:  # fmt: skip
    """Outlined histograms on one axis, 0 to ``top``; ``lines`` draws named limits."""
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
    ax.set(xlabel=unit, ylabel=y)
    ax.set_title(title)
    if len(series) > 1:
        ax.legend(
            loc="upper left", bbox_to_anchor=(1.0, 1.0)
        )  # beside the axes: bars may stand anywhere inside
    show(fig, alt)


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    x: str,
    y: str,
    alt: str,
    save: Path | None = None,
    markers: Sequence[str] = (),
) -> None:
    """Lines through (x, y) points, one a key, each with its own dash as well as its colour; ``markers`` get dots."""
    fig, ax = figure(8, 3.6)
    dashes = ("-", "--", "-.", ":")
    for number, (name, points) in enumerate(series.items()):
        xs, ys = zip(*points, strict=True)
        ax.plot(
            xs,
            ys,
            dashes[number % 4],
            color=_colour(number, len(series)),
            label=name,
            linewidth=2,
            marker="o" if name in markers else "",
        )
    ax.set(xlabel=x, ylabel=y)
    ax.set_title(title)
    ax.legend()
    show(fig, alt, save)


def heat(matrices: Mapping[str, Any], title: str, alt: str, numbers: bool = True) -> None:
    """Small matrices side by side, blue below zero and orange above, with their numbers written in."""
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("course", [tint(BLUE), PAPER, tint(ORANGE)])
    widths = [max(1.0, len(m[0])) for m in matrices.values()]
    fig, axes = figure(
        min(10, 1.2 + 0.62 * sum(widths)), 3.2, len(matrices), width_ratios=widths, squeeze=False
    )
    most = max(abs(float(v)) for m in matrices.values() for row in m for v in row) or 1.0
    for ax, (name, matrix) in zip(axes[0], matrices.items(), strict=True):
        ax.imshow(matrix, cmap=shades, vmin=-most, vmax=most)
        ax.set(xticks=[], yticks=[])
        ax.set_title(name, fontsize=10.5)
        ax.grid(False)
        for i, row in enumerate(matrix):
            for j, value in enumerate(row) if numbers else ():
                ax.text(
                    j,
                    i,
                    f"{round(float(value), 1) + 0.0:.1f}",
                    ha="center",
                    va="center",
                    fontsize=8.5,
                )
    fig.suptitle(title, fontweight="bold", x=0.02, ha="left")
    show(fig, alt)


def score_map(
    table: Mapping[str, Mapping[str, float]],
    title: str,
    alt: str,
    form: str = "{:.2f}",
    width: float = 8,
) -> None:
    """A table of scores from 0 to 1 as coloured cells with their numbers: ``table`` maps a line to its values by column."""
    from matplotlib.colors import LinearSegmentedColormap

    columns = list(next(iter(table.values())))
    values = [[row[column] for column in columns] for row in table.values()]
    fig, ax = figure(width, 1.25 + 0.36 * len(table))
    ax.imshow(
        values,
        cmap=LinearSegmentedColormap.from_list("course", [PAPER, tint(BLUE)]),
        vmin=0,
        vmax=1,
        aspect="auto",
    )
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            ax.text(j, i, form.format(value), ha="center", va="center")
    ax.set_xticks(range(len(columns)), [c.replace("$", "\\$").replace(" ", "\n") for c in columns])
    ax.set_yticks(range(len(table)), [name.replace("$", "\\$") for name in table])
    ax.tick_params(length=0)
    ax.grid(False)
    fig.suptitle(title, fontweight="bold", x=0.02, ha="left")
    show(fig, alt)


def staircase(levels: Sequence[float], title: str, alt: str) -> None:
    """Left: the levels of a 4-bit code under the normal curve. Right: what each value between -1 and 1 is rounded to."""
    import numpy

    fig, (left, right) = figure(9, 3.6, 2)
    values = numpy.array(levels)
    x = numpy.linspace(-1, 1, 2001)
    left.fill_between(
        x,
        numpy.exp(-((x * 2.6) ** 2) / 2),
        color=SKY,
        alpha=0.35,
        label="where normal weights fall",
    )
    left.vlines(values, 0, 1, color=BLUE, linewidth=1.6, label="levels")
    left.set(
        xlabel="weight / largest weight of its block",
        ylabel="share of weights (no scale)",
        yticks=[],
        ylim=(0, 1.25),
    )
    left.set_title("levels crowd where weights crowd")
    left.legend(loc="upper left", ncols=2, fontsize=9)
    rounded = values[numpy.abs(x[:, None] - values).argmin(axis=1)]
    right.plot(x, x, color=GREY, linewidth=1, label="exact")
    right.step(x, rounded, color=ORANGE, linewidth=2, label="rounded", where="mid")
    right.set(xlabel="weight / largest, before", ylabel="after")
    right.set_title("rounding is a staircase")
    right.legend()
    for ax in (left, right):
        ax.set_xticks([-1, -0.5, 0, 0.5, 1])
    fig.suptitle(title, fontweight="bold", x=0.02, ha="left")
    show(fig, alt)


def rounding(
    before: Sequence[float], after: Sequence[float], title: str, alt: str, most: int = 32
) -> None:
    """The first ``most`` numbers before and after rounding, joined; with more than that, the errors of all as a histogram too."""
    import numpy

    old, new = numpy.asarray(before, dtype=float), numpy.asarray(after, dtype=float)
    many = len(old) > most
    fig, axes = figure(
        9 if many else 8,
        3.6,
        2 if many else 1,
        squeeze=False,
        width_ratios=(3, 2) if many else None,
    )
    left, x = axes[0][0], numpy.arange(min(most, len(old)))
    left.vlines(x, old[:most], new[:most], color=GREY, linewidth=1.2)
    left.plot(x, old[:most], "o", color=BLUE, markersize=6, label="exact")
    left.plot(x, new[:most], "D", color=ORANGE, markersize=5, label="rounded")
    left.axhline(0, color=GREY, linewidth=0.8)
    left.set(xlabel="place in the row", ylabel="value")
    left.margins(y=0.18)
    left.legend(loc="upper right", ncols=2, fontsize=9)
    if many:
        right = axes[0][1]
        right.hist(new - old, 61, histtype="stepfilled", color=SKY, edgecolor=BLUE)
        right.set(xlabel="rounded minus exact", ylabel="weights (count)")
        right.set_title(f"errors of all {len(old):,}", fontsize=10.5)
        right.locator_params(axis="x", nbins=5)
    fig.suptitle(title, fontweight="bold", x=0.02, ha="left")
    show(fig, alt)


def _percent(axis: Any, form: str) -> None:
    """An axis under labels that are percentages counts in per cent too."""
    from matplotlib.ticker import PercentFormatter

    if form.endswith("%}"):
        axis.set_major_formatter(PercentFormatter(1))


def _colour_number(number: int, of: int) -> int:
    if of > len(PALETTE):
        raise ValueError(
            f"{of} series in one figure, and {len(PALETTE)} colours that are told apart: draw two figures, or fewer series."
        )
    return number


def _colour(number: int, of: int) -> str:
    """The colour of series ``number`` out of ``of``.

    Raises:
        ValueError: more series than colours.
    """
    return PALETTE[_colour_number(number, of)]


def tint(colour: str, share: float = 0.62) -> str:
    """``colour`` over paper, "#RRGGBB"; at the usual share ink on it stays readable."""
    mixed = (round(255 + share * (int(colour[i : i + 2], 16) - 255)) for i in (1, 3, 5))
    return "#" + "".join(f"{part:02X}" for part in mixed)


def shade(value: float, most: float) -> str:
    """The colour of a value in a heat map, "#RRGGBB": blue above zero, orange below, the darker the larger; white at zero.

    ``most`` is the largest magnitude in the map. In grey the lightness still falls with the magnitude; the sign has to be
    printed. At its darkest it leaves black text readable.
    """
    share = 0.62 * min(1.0, abs(value) / most) if most else 0.0
    return tint(BLUE if value > 0 else VERMILION, share)


def word_heat(
    lines: Mapping[str, Sequence[tuple[str, float]]],
    title: str,
    alt: str,
    per_line: int = 96,
    save: Path | None = None,
) -> None:
    """Words in boxes shaded by their values, with the number under each; ``lines`` maps a name to its (word, value) pairs.

    Each name has a scale of its own, from 0 to its largest magnitude. ``per_line`` is in characters; long lines wrap.
    """
    rows: list[tuple[str, list[tuple[float, str, str, str]]]] = []
    widest = 76.0  # the legend's width
    for name, pairs in lines.items():
        most = max((abs(value) for _, value in pairs), default=0.0)
        rows.append((name, []))
        at = 0.6
        for word, value in pairs:
            text, number = (
                _short(word, 24).replace("\n", " ").replace("$", "\\$"),
                f"{round(value, 2) + 0.0:+.2f}",
            )
            wide = max(len(text), len(number)) + 1.9
            if at + wide > per_line and rows[-1][1]:
                rows.append(("", []))
                at = 0.6
            rows[-1][1].append((at + wide / 2 - 0.5, text, number, shade(value, most)))
            at += wide
            widest = max(widest, at)
    fig, ax = figure(0.0815 * widest, 0.95 + 0.78 * len(rows))
    ax.set(xlim=(0, widest), ylim=(len(rows) - 0.25, -1.1))
    ax.axis("off")
    for place, (name, boxes) in enumerate(rows):
        ax.text(
            0.2,
            place - 0.42,
            name.replace("$", "\\$"),
            fontsize=9.5,
            fontweight="bold",
            va="center",
        )
        for at, text, number, colour in boxes:
            box = {"boxstyle": "round,pad=0.25", "facecolor": colour, "edgecolor": GREY}
            ax.text(
                at,
                place - 0.05,
                text,
                family="monospace",
                fontsize=9.5,
                ha="center",
                va="center",
                bbox=box,
            )
            ax.text(at, place + 0.27, number, fontsize=8.5, ha="center", va="center")
    ax.set_title(title)
    ax.text(
        0.2,
        -0.9,
        "blue, plus: for the answer; orange, minus: against it; the darker, the more",
        fontsize=9.5,
        va="center",
    )
    show(fig, alt, save)


def attention(tokens: Sequence[str], weights: Any, title: str, alt: str) -> None:
    """The weights of one attention head, shape (tokens, tokens), 0 to 1: a row reads, a column is read; darker for more."""
    from matplotlib.colors import LinearSegmentedColormap

    size = 1.9 + 0.3 * len(tokens)
    fig, ax = figure(size + 0.9, size)
    drawn = ax.imshow(
        weights, cmap=LinearSegmentedColormap.from_list("course", [PAPER, BLUE, INK]), vmin=0
    )
    names = [token.strip().replace("$", "\\$") or "\u2423" for token in tokens]
    ax.set_xticks(range(len(names)), names, rotation=90, family="monospace", fontsize=9)
    ax.set_yticks(range(len(names)), names, family="monospace", fontsize=9)
    ax.tick_params(length=0)
    ax.grid(False)
    ax.set(xlabel="is read", ylabel="reads")
    fig.colorbar(drawn, ax=ax, shrink=0.8, label="weight")
    fig.suptitle(title, fontweight="bold", x=0.02, ha="left")
    show(fig, alt)


def token_strip(
    tokens: Sequence[str], in_loss: Sequence[bool], title: str, alt: str, per_line: int = 100
) -> None:
    """Every token in a box: orange if it is in the loss, grey if it is only read. ``per_line`` is in characters."""
    lines: list[list[tuple[str, bool]]] = [[]]
    used, gap = 0.0, 1.7  # in characters
    for token, learned in zip(tokens, in_loss, strict=True):
        text = token.strip(" ").replace("\n", "\\n").replace("$", "\\$") or "(space)"
        if used + len(text) + gap > per_line:
            lines.append([])
            used = 0.0
        lines[-1].append((text, learned))
        used += len(text) + gap
    fig, ax = figure(
        0.0815 * per_line, 0.75 + 0.32 * len(lines)
    )  # as wide as per_line characters of this size
    ax.set(xlim=(0, per_line), ylim=(len(lines) - 0.3, -1.5))
    ax.axis("off")
    for row, line in enumerate(lines):
        at = 0.6
        for text, learned in line:
            box = {
                "boxstyle": "round,pad=0.25",
                "facecolor": "#FBD8A0" if learned else "#E8E8E8",
                "edgecolor": ORANGE if learned else GREY,
            }
            ax.text(at, row, text, family="monospace", fontsize=9.5, va="center", bbox=box)
            at += len(text) + gap
    ax.set_title(title)
    ax.text(0.2, -1.05, "orange: learned", fontsize=9.5, color=INK, va="center")
    ax.text(18, -1.05, "grey: only read", fontsize=9.5, color=INK, va="center")
    show(fig, alt)


def distribution(
    series: Mapping[str, Mapping[str, float]],
    title: str,
    alt: str,
    cut: Mapping[str, int] | None = None,
) -> None:
    """Next-token probabilities side by side: panel -> token -> probability; ``cut`` says how many tokens of a panel survive."""
    fig, axes = figure(3.1 * len(series), 3.6, len(series), squeeze=False, sharex=True)
    for ax, (name, values) in zip(axes[0], series.items(), strict=True):
        keep = (cut or {}).get(name, len(values))
        colours = [BLUE if place < keep else "#C9C9C9" for place in range(len(values))]
        tokens = [token.replace("$", "\\$") for token in values]
        ax.barh(range(len(values)), list(values.values()), color=colours)
        ax.set_yticks(range(len(values)), tokens, family="monospace")
        ax.invert_yaxis()
        ax.grid(False)
        ax.set(xlabel="probability")
        ax.set_title(name, fontsize=10.5)
    fig.suptitle(title, fontweight="bold", x=0.02, ha="left")
    show(fig, alt)


def split_tiles(
    splits: Mapping[str, Mapping[str, Sequence[tuple[str, str]]]], title: str, alt: str
) -> None:
    """Rows as tiles in the parts they were put in: split -> part -> (label, group); a group keeps its colour."""
    groups = list(
        dict.fromkeys(
            group for parts in splits.values() for rows in parts.values() for _, group in rows
        )
    )
    most = max(sum(max(1, len(rows)) + 0.6 for rows in parts.values()) for parts in splits.values())
    fig, ax = figure(min(10, 1.6 + 1.15 * most), 0.7 + 1.05 * len(splits))
    ax.set(xlim=(-1.0, most), ylim=(len(splits) - 0.25, -0.55))
    ax.axis("off")
    for line, (name, parts) in enumerate(splits.items()):
        ax.text(-0.1, line + 0.2, name, ha="right", va="center", fontweight="bold")
        at = 0.1
        for part, rows in parts.items():
            ax.text(at, line - 0.2, part, fontsize=9, va="center")
            for label, group in rows:
                ax.add_patch(
                    _rectangle(
                        (at, line), 0.94, 0.4, color=PALETTE[groups.index(group) % len(PALETTE)]
                    )
                )
                ax.text(at + 0.47, line + 0.2, label, ha="center", va="center", fontsize=9)
                at += 1
            at += 0.6
    ax.set_title(title)
    show(fig, alt)


def _rectangle(xy: tuple[float, float], width: float, height: float, color: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(xy, width, height, facecolor=f"{color}55", edgecolor=color, linewidth=1.6)


class Cards:
    """Rows as cards for a notebook: HTML where it can be shown, plain text elsewhere."""

    def __init__(self, cards: Sequence[Mapping[str, Any]], most: int = 320) -> None:
        self.cards = [
            {k: _short(str(v), most) for k, v in card.items() if v not in (None, "", [])}
            for card in cards
        ]

    def __repr__(self) -> str:
        return "\n\n".join("\n".join(f"{k}: {v}" for k, v in card.items()) for card in self.cards)

    def _repr_html_(self) -> str:
        style = f"border:1px solid {GREY};border-radius:6px;padding:8px 12px;margin:8px 0;background:{PAPER};color:{INK}"
        return "".join(  # GitHub drops the style: there, and only there, a blockquote's own bar and margins set the cards apart
            f'<blockquote style="{style}">'
            + "<br>".join(f"<b>{html.escape(k)}</b>: {html.escape(v)}" for k, v in card.items())
            + "</blockquote>"
            for card in self.cards
        )


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " ..."


def change(before: str, after: str, around: int = 60, most: int = 220) -> dict[str, str]:
    """Two texts from a little before the place where they part, as a card; line breaks (⏎) and runs of spaces (␣␣) are made visible."""
    same = next(
        (n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
        min(len(before), len(after)),
    )
    start = max(0, same - around)
    start = (
        max(start, before.find(" ", start, same) + 1) if start else 0
    )  # the beginning of a word, where there is one

    def visible(text: str) -> str:
        spaced = re.sub(r"[^\S\n]{2,}", "␣␣", text[start:]).replace("\n", "⏎")
        return ("... " if start else "") + _short(spaced, most)

    return {"before": visible(before), "after": visible(after) if after else "(dropped)"}


class Table:
    """Rows of values as a table for a notebook; a last boolean column can be shown as a tick or a cross."""

    def __init__(self, rows: Sequence[Sequence[Any]], header: Sequence[str] = ()) -> None:
        self.rows = [[_cell(v) for v in row] for row in rows]
        self.header = list(header)

    def __repr__(self) -> str:
        lines = ([self.header] if self.header else []) + self.rows
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join(
            "  ".join(v.ljust(w) for v, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    def _repr_html_(self) -> str:
        head = "".join(f'<th style="text-align:left">{html.escape(h)}</th>' for h in self.header)
        body = "".join(
            "<tr>"
            + "".join(f'<td style="text-align:left">{html.escape(v)}</td>' for v in row)
            + "</tr>"
            for row in self.rows
        )
        return f"<table>{f'<tr>{head}</tr>' if head else ''}{body}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "✓" if value else "✗"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
