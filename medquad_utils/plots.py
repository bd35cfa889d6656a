"""Every figure of the course: one style and palette, an opaque background, and alt text."""

from __future__ import annotations

import html
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy
from IPython import display, get_ipython
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter

from medquad_utils.atomic import whole_file

# The palette of Okabe and Ito (jfly.uni-koeln.de/color), which colour-blind readers can tell apart.
# Its yellow is left out, because it vanishes on white.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY, INK, PAPER = "#CC79A7", "#56B4E9", "#8A8A8A", "#1F2328", "#FFFFFF"
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
MARKERS, DASHES = "oDs^vP", ("-", "--", "-.", ":")

Groups = Mapping[str, Mapping[str, float]]  # series -> group -> value
Spans = Mapping[str, Mapping[str, Sequence[float]]]  # series -> group -> mean, low and high

STYLE: dict[str, Any] = {
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#E3E3E3", "axes.axisbelow": True,
    "axes.titlelocation": "left", "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "figure.titlesize": 12, "figure.titleweight": "bold", "font.size": 10.5, "figure.dpi": 110,
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a token is a dollar sign
}  # fmt: skip


def _figure(width: float = 8, height: float = 3.9, columns: int = 1, **kwargs: Any) -> Any:
    """Return a figure in the course's style, in inches, and its ``columns`` axes side by side."""
    matplotlib.rcParams.update(STYLE)
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(1, columns, **kwargs)


def _show(fig: Figure, title: str, values: Any, save: Path | None = None) -> None:
    """Display ``fig`` as a PNG, and write it to ``save`` if given; the alt text says ``values``.

    Outside a notebook a saved figure is not displayed: a terminal would print its bytes.
    """
    fig.suptitle(title, x=0.02, ha="left", wrap=True)
    fig.savefig(png := BytesIO(), format="png", metadata={"Software": "medquad-qlora"})
    if save:
        with whole_file(save) as temporary:
            temporary.write_bytes(png.getvalue())
    if not save or get_ipython():
        alt = described(title, values)
        bundle = {"image/png": b64encode(png.getvalue()).decode(), "text/plain": f"Figure: {alt}"}
        display.display(bundle, raw=True, metadata={"image/png": {"alt": alt}})


def described(what: str, values: Any) -> str:
    """Write an alt text from the numbers of a figure: "Loss. train: 2.7 to 2.1; test: 2.4"."""
    return f"{what.rstrip('.')}. {_said(values)}."


def _said(values: Any) -> str:
    """Say texts, numbers, lists of (value, low, high), arrays, and mappings of these, in words."""
    if isinstance(values, Mapping):
        nested = any(isinstance(value, Mapping) for value in values.values())
        parts = [f"{' '.join(k.split())} {_said(v)}" for k, v in values.items()]
        return ("; " if nested else ", ").join(parts)
    if isinstance(values, str):
        return values
    if isinstance(values, tuple | list) and len(values) == 3:
        form = "{} (no interval)" if values[1] is None else "{} [{}, {}]"
        return form.format(*(None if v is None else _digits(v) for v in values))
    several = numpy.asarray(values, dtype=float)
    if several.size == 1:
        return _digits(several.item())
    return f"({several.size} values from {_digits(several.min())} to {_digits(several.max())})"


def _digits(value: float, most: int = 3) -> str:
    """Write ``most`` digits, or all of a large number: "1,024", never "1.02e+03"."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{most}g}"


# One meaning, one colour through the course: by the beginning of a series' name.
ROLES = {"base": BLUE, "before": BLUE, "tuned": ORANGE, "after": ORANGE, "nearest": GREEN,
         "look-up": GREEN, "grounded": VERMILION, "another disease": PURPLE,
         "by row": GREY, "by disease": INK, "validation": PURPLE,
         "learning rate": VERMILION, "layers": SKY, "rank": PURPLE, "name": INK,
         "your run": INK, "smollm2": PURPLE, "llama": PURPLE, "meta-llama": PURPLE}  # fmt: skip


def _colours(names: Sequence[str]) -> list[str]:
    """Give each series the colour of its role, and the others those that are left."""
    found = [next((ROLES[r] for r in ROLES if name.lower().startswith(r)), "") for name in names]
    taken = [colour if colour not in found[:n] else "" for n, colour in enumerate(found)]
    free = cycle(colour for colour in PALETTE if colour not in taken)
    return [colour or next(free) for colour in taken]


def tint(colour: str, share: float = 0.62) -> str:
    """Mix ``colour`` with the paper, "#RRGGBB"; black text stays readable on the usual share."""
    mixed: str = to_hex(1 - share * (1 - numpy.array(to_rgb(colour))))
    return mixed.upper()


def shade(value: float, most: float) -> str:
    """Return a value's colour, "#RRGGBB": blue above 0, orange below, darkest at ``most``."""
    share = 0.62 * min(1.0, abs(value) / most) if most else 0.0
    return tint(BLUE if value > 0 else VERMILION, share)


def _finish(
    ax: Any, title: str, values: Any, x: str = "", y: str = "", lines: Mapping[str, float] = {},
    save: Path | None = None
) -> None:  # fmt: skip
    """Label the axes, list named series and ``lines`` (limits), and show the figure."""
    ax.set(xlabel=x, ylabel=y)
    for name, place in lines.items():
        ax.axvline(place, color=VERMILION, linestyle="--", linewidth=1.4)
        look = {"ha": "center", "va": "bottom", "fontsize": 9}
        ax.text(place, 1.01, name, transform=ax.get_xaxis_transform(), **look)
    if names := ax.get_legend_handles_labels()[1]:
        # About 90 characters fit. The name of a reference run takes a line of its own.
        columns = max(1, min(3, 90 // max(map(len, names))))
        ax.figure.legend(loc="outside lower center", ncols=columns)
    _show(ax.figure, title, {**values, **lines}, save)


def bars(
    values: Mapping[str, float], title: str, unit: str, highlight: Sequence[str] = (),
    form: str = "{:,.0f}"
) -> None:  # fmt: skip
    """Draw horizontal bars with numbers, the first on top; ``highlight`` names the orange ones."""
    _, ax = _figure(8, 0.9 + 0.34 * len(values))
    colours = [ORANGE if name in highlight else BLUE for name in values]
    ax.bar_label(ax.barh(list(values), list(values.values()), color=colours), fmt=form, padding=4)
    ax.invert_yaxis()
    ax.grid(False)
    if form.endswith("%}"):
        ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.margins(x=0.14)
    _finish(ax, title, values, x=unit)


def grouped_bars(table: Groups, title: str, unit: str) -> None:
    """Draw shares as upright bars: series -> group -> share; all series have the same groups."""
    # Not by pandas: it would import pyplot, which fails with another environment's MPLBACKEND.
    groups, width = list(next(iter(table.values()))), 0.8 / len(table)
    _, ax = _figure()
    for number, (name, colour) in enumerate(zip(table, _colours(list(table)), strict=True)):
        places = numpy.arange(len(groups)) + (number - (len(table) - 1) / 2) * width
        heights = [table[name][group] for group in groups]
        drawn = ax.bar(places, heights, width * 0.94, label=name, color=colour)
        ax.bar_label(drawn, fmt="{:.0%}", padding=2, fontsize=9)
    # About 80 characters fit. Longer names are turned, or they would touch.
    crowded = sum(max(map(len, group.split("\n"))) for group in groups) > 80
    turned = {"rotation": 20, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    ax.set_xticks(range(len(groups)), groups, **turned)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.margins(y=0.12)
    _finish(ax, title, table, y=unit)


def _whiskers(spans: Sequence[Sequence[float]]) -> Any:
    """Split (value, low, high) into values and lengths; a rounded end may lie beyond the value."""
    values, lows, highs = numpy.array(spans, dtype=float).T
    return values, numpy.maximum(0, [values - lows, highs - values])


def _dots(table: Spans, width: float) -> Any:
    """Draw series -> group -> (value, low, high), one group below the other."""
    groups = list(dict.fromkeys(group for row in table.values() for group in row))
    own = {group: [name for name in table if group in table[name]] for group in groups}
    most = max(map(len, own.values()))  # series in one group
    _, ax = _figure(width, 1.3 + len(groups) * (0.16 + 0.13 * most))
    for number, (name, colour) in enumerate(zip(table, _colours(list(table)), strict=True)):
        places = [
            groups.index(g) + (own[g].index(name) - (len(own[g]) - 1) / 2) * 0.8 / most
            for g in table[name]
        ]
        values, whiskers = _whiskers([*table[name].values()])
        look = {"color": colour, "markersize": 5.5, "fmt": MARKERS[number], "label": name}
        if whiskers.any():
            look |= {"xerr": whiskers, "capsize": 2.5}
        ax.errorbar(values, places, **look)
    for between in range(1, len(groups)):
        ax.axhline(between - 0.5, color="#E3E3E3", linewidth=0.8)
    ax.set_yticks(range(len(groups)), groups)
    ax.set_ylim(len(groups) - 0.4, -0.6)  # the first group is on top
    ax.grid(False, axis="y")
    ax.grid(True, axis="x")
    ax.locator_params(axis="x", nbins=7)
    return ax


def intervals(
    table: Spans, title: str, unit: str, save: Path | None = None, width: float = 6.4,
    zero: bool = False, log: bool = False
) -> None:  # fmt: skip
    """Draw dots with whiskers: series -> group -> (mean, low, high); a series may lack a group.

    Low and high are ``None`` where there is no interval. ``zero`` draws a line at zero. ``log``
    makes equal ratios equally long where the means differ more than five times.
    """
    ax = _dots(table, width)
    if zero:
        ax.axvline(0, color=INK, linestyle="--", linewidth=1)
    means = [span[0] for groups in table.values() for span in groups.values()]
    if log and max(means) > 5 * min(means):
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
    _finish(ax, title, table, x=unit, save=save)


def trade_off(
    points: Spans, title: str, unit: str, single: Mapping[str, Sequence[Sequence[float]]] = {}
) -> None:
    """Draw one dot a series in a plane, with whiskers both ways and lines at zero.

    ``points``: series -> x's name, then y's name -> (mean, low, high), as in ``intervals``.
    ``single``: series -> (x, y) of the runs behind the mean, as small dots.
    """
    _, ax = _figure(8, 4.6)
    for number, (name, colour) in enumerate(zip(points, _colours(list(points)), strict=True)):
        (x, x_ends), (y, y_ends) = (_whiskers([span]) for span in points[name].values())
        look = {"fmt": MARKERS[number], "markersize": 8, "capsize": 2.5, "label": name}
        ax.errorbar(x, y, xerr=x_ends, yerr=y_ends, color=colour, **look)
        for run in single.get(name, ()):
            ax.plot(*run, MARKERS[number], color=colour, markersize=3.5, alpha=0.6)
    ax.axhline(0, color=INK, linestyle="--", linewidth=1)
    ax.axvline(0, color=INK, linestyle="--", linewidth=1)
    ax.margins(0.08)
    ax.grid(True, axis="both")
    x_name, y_name = next(iter(points.values()))
    small = {"small dots": f"{sum(map(len, single.values()))} single runs"} if single else {}
    _finish(ax, title, {**points, **small}, f"{x_name}: {unit}", f"{y_name}: {unit}")


def dots(table: Spans, title: str, unit: str) -> None:
    """Draw shares as dots: series -> group -> a list of one share."""
    points = {s: {group: 3 * [*share] for group, share in row.items()} for s, row in table.items()}
    ax = _dots(points, 8)  # without whiskers
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    _finish(ax, title, table, unit)


def stacked_bars(
    table: Groups, title: str, unit: str, lines: Mapping[str, float] = {}, save: Path | None = None
) -> None:
    """Draw horizontal stacked bars with totals: bar -> part -> value; ``lines`` draws limits."""
    _, ax = _figure(8, 1.5 + 0.42 * len(table))
    parts = list(dict.fromkeys(part for values in table.values() for part in values))
    left = numpy.zeros(len(table))
    for part, colour in zip(parts, _colours(parts), strict=True):
        sizes = [values.get(part, 0.0) for values in table.values()]
        look = {"color": colour, "edgecolor": PAPER}
        drawn = ax.barh(list(table), sizes, left=left, label=part, **look)
        left += sizes
    box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}  # over the lines
    ax.bar_label(drawn, [f"{total:.2f}" for total in left], padding=5, bbox=box)
    ax.invert_yaxis()
    ax.grid(False)
    ax.margins(x=0.12)
    _finish(ax, title, table, unit, lines=lines, save=save)


def histogram(
    series: Mapping[str, Sequence[float]], title: str, unit: str, lines: Mapping[str, float] = {},
    bins: int = 60, top: float | None = None, y: str = "rows"
) -> None:  # fmt: skip
    """Draw outlined histograms from 0, or less, to ``top``; ``lines`` draws named limits."""
    _, ax = _figure(8, 3.4)
    arrays = {name: numpy.asarray(values, dtype=float) for name, values in series.items()}
    together = numpy.concatenate([*arrays.values()])
    edges = numpy.linspace(min(0, together.min()), top or together.max(), bins + 1)
    for (name, values), colour in zip(arrays.items(), _colours(list(arrays)), strict=True):
        look = {"facecolor": (colour, 0.35), "edgecolor": colour, "linewidth": 1.6}
        ax.hist(values, edges, histtype="stepfilled", label=name, **look)
    if beyond := (together > edges[-1]).sum():
        look = {"transform": ax.transAxes, "ha": "right", "va": "bottom", "fontsize": 9}
        ax.text(0.995, 0.04, f"{beyond:,} beyond {edges[-1]:,.0f} →", **look)
    _finish(ax, title, arrays, unit, y, lines)


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]], title: str, x: str, y: str,
    markers: Sequence[str] = (), points: Sequence[str] = ()
) -> None:  # fmt: skip
    """Draw lines through (x, y) points, each with its own dash and colour; ``markers`` get dots.

    ``points`` are drawn as dots alone: too few values for a line that says what lies between them.
    """
    _, ax = _figure()
    colours, ends = _colours(list(series)), {}
    for number, (name, values) in enumerate(series.items()):
        look = {"color": colours[number], "marker": "o" if name in (*markers, *points) else ""}
        dash = "none" if name in points else DASHES[number % 4]
        ax.plot(*zip(*values, strict=True), linestyle=dash, label=name, linewidth=2, **look)
        said = "from {1} at {0} to {3} at {2}"
        ends[name] = said.format(*map(_digits, (*values[0], *values[-1])))
    ax.xaxis.get_major_locator().set_params(integer=True)  # no step 2.5
    _finish(ax, title, ends, x, y)


def distribution(series: Groups, title: str, cut: Mapping[str, int]) -> None:
    """Draw next-token probabilities: panel -> token -> value; ``cut``: tokens a panel keeps."""
    fig, axes = _figure(3.1 * len(series), 3.6, len(series), squeeze=False, sharex=True)
    for ax, (name, values) in zip(axes[0], series.items(), strict=True):
        colours = [BLUE if place < cut[name] else "#C9C9C9" for place in range(len(values))]
        ax.barh(range(len(values)), list(values.values()), color=colours)
        ax.set_yticks(range(len(values)), list(values), family="monospace")
        ax.invert_yaxis()
        ax.grid(False)
        ax.set(xlabel="probability", title=name)
    _show(fig, title, series)


def confusion(
    tables: Mapping[str, Any], title: str, rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Draw counts by ``rows`` (the truth) and ``columns``, darker for a larger share of a row."""
    fig, axes = _figure(1.4 + 3.3 * len(tables), 2.6, len(tables), squeeze=False)
    shades = LinearSegmentedColormap.from_list("course", (PAPER, tint(BLUE)))
    named: dict[str, dict[str, float]] = {name: {} for name in tables}
    for ax, (name, table) in zip(axes[0], tables.items(), strict=True):
        counts = numpy.asarray(table, dtype=float)
        shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
        ax.imshow(shares, cmap=shades, vmin=0, vmax=1, aspect="auto")
        ax.grid(False)
        ax.tick_params(length=0)
        ax.set(title=name)
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(rows)), rows)
        for (i, j), count in numpy.ndenumerate(counts):
            ax.text(j, i, f"{count:,.0f}", ha="center", va="center", fontsize=12)
            named[name][f"{rows[i]}, {columns[j]}"] = count
    _show(fig, title, named)


def staircase(levels: Sequence[float], title: str) -> None:
    """Draw the levels of a 4-bit code under the normal curve, and what values are rounded to."""
    fig, (left, right) = _figure(9, 3.6, 2)
    values, x = numpy.array(levels), numpy.linspace(-1, 1, 2001)
    normal = numpy.exp(-((x * 2.6) ** 2) / 2)
    left.fill_between(x, normal, color=SKY, alpha=0.35, label="where normal weights fall")
    left.vlines(values, 0, 1, color=BLUE, linewidth=1.6, label="levels")
    left.set(xlabel="weight / largest weight of its block", ylabel="share of weights (no scale)")
    left.set(yticks=[], ylim=(0, 1.25), xticks=[-1, 0, 1])
    left.set_title("Levels are dense where weights are")
    left.legend(loc="upper left", ncols=2, fontsize=9)
    rounded = values[numpy.abs(x[:, None] - values).argmin(axis=1)]
    right.plot(x, x, color=GREY, linewidth=1, label="exact")
    right.step(x, rounded, color=ORANGE, linewidth=2, label="rounded", where="mid")
    right.set(xlabel="weight / largest, before", ylabel="after")
    right.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1], title="Each weight moves to a level")
    right.legend()
    _show(fig, title, {"levels": values})


def rounding(
    before: Sequence[float], after: Sequence[float], title: str, ruler: Sequence[float]
) -> None:
    """Draw numbers before and after rounding; ``ruler`` draws a line at each allowed value."""
    old, new = numpy.asarray(before, dtype=float), numpy.asarray(after, dtype=float)
    _, ax = _figure()
    x = numpy.arange(len(old))
    ax.grid(False)
    ax.margins(x=0)
    allowed = numpy.asarray(ruler, dtype=float)
    ax.hlines(allowed, -0.5, len(old) - 0.5, color=GREY, linewidth=0.8, label="values of the ruler")
    ax.vlines(x, old, new, color=INK, linewidth=1.6)
    ax.plot(x, old, "o", color=BLUE, markersize=6, label="exact")
    ax.plot(x, new, "D", color=ORANGE, markersize=5, label="rounded")
    _finish(ax, title, {"exact": old, "rounded": new}, "place in the row", "value")


Box = tuple[str, str, str]  # text, colour, colour of its frame
WIDTH = 80  # of a line of boxes, in characters


def _boxes(lines: Mapping[str, Sequence[Box]], title: str, legend: str, values: Any) -> None:
    """Draw each line as boxes under its name."""
    fig, ax = _figure(0.0815 * WIDTH)  # inches of a character
    row = 0
    for name, boxes in lines.items():
        ax.text(0.2, row - 0.44, name, fontsize=9.5, fontweight="bold", va="center")
        at = 0.6
        for text, face, edge in boxes:
            size = max(map(len, text.split("\n"))) + 1.8
            if at > 0.6 and at + size > WIDTH:
                row, at = row + 1, 0.6
            box = {"boxstyle": "round,pad=0.25", "facecolor": face, "edgecolor": edge}
            look = {"family": "monospace", "fontsize": 9.5, "ha": "center", "va": "center"}
            ax.text(at + size / 2 - 0.5, row, text, bbox=box, **look)
            at += size
        row += 1
    fig.set_figheight(0.9 + 0.7 * row)
    ax.set(xlim=(0, WIDTH), ylim=(row - 0.5, -0.7))
    ax.axis("off")
    fig.supxlabel(legend, fontsize=9.5, x=0.01, ha="left")
    _show(fig, title, values)


def word_heat(lines: Mapping[str, Sequence[tuple[str, float]]], title: str) -> None:
    """Draw words in boxes shaded by their values, with numbers: line -> (word, value) pairs."""
    boxes: dict[str, list[Box]] = {}
    said = []
    for name, pairs in lines.items():
        most = max((abs(value) for _, value in pairs), default=0.0)  # each line has its own scale
        told = [(short(word.replace("\n", " "), 24), f"{value:+z.2f}") for word, value in pairs]
        colours = [shade(value, most) for _, value in pairs]
        boxes[name] = [("\n".join(pair), c, GREY) for pair, c in zip(told, colours, strict=True)]
        said.append(f"{name} {', '.join(map(' '.join, told))}")
    legend = "blue, plus: for the answer; orange, minus: against it; the darker, the more"
    _boxes(boxes, title, legend, "; ".join(said))


def split_tiles(splits: Mapping[str, Mapping[str, Sequence[tuple[str, str]]]], title: str) -> None:
    """Draw rows as tiles: split -> part -> (label, group); a group keeps its colour."""
    lines = {f"{s}, {part}": rows for s, parts in splits.items() for part, rows in parts.items()}
    groups = dict.fromkeys(group for rows in lines.values() for _, group in rows)
    frames = {group: (tint(c, 0.33), c) for group, c in zip(groups, cycle(PALETTE))}
    tiles = {n: [(label, *frames[g]) for label, g in rows] for n, rows in lines.items()}
    counts = {line: f"{len(rows)} rows" for line, rows in lines.items()}
    _boxes(tiles, title, "one colour for each group", counts)


def short(text: str, most: int = 300) -> str:
    """Cut a text of any script at a space, or else at ``most`` characters."""
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " ..."


class Cards:
    """Rows as cards: HTML in a notebook, plain text elsewhere; empty fields are left out."""

    def __init__(self, cards: Sequence[Mapping[str, Any]]) -> None:
        shown = [[pair for pair in c.items() if pair[1] not in (None, "", [])] for c in cards]
        self.cards = [{k: short(str(v), 320) for k, v in card} for card in shown]

    def __repr__(self) -> str:
        return "\n\n".join("\n".join(f"{k}: {v}" for k, v in card.items()) for card in self.cards)

    def _repr_html_(self) -> str:
        # GitHub drops the style, and then the blockquote's own bar and margins separate the cards.
        style = f"border:1px solid {GREY};border-radius:6px;padding:8px 12px;margin:8px 0"
        start = f'<blockquote style="{style};background:{PAPER};color:{INK}">'
        escaped = [[map(html.escape, pair) for pair in card.items()] for card in self.cards]
        cards = ("<br>".join(f"<b>{k}</b>: {v}" for k, v in card) for card in escaped)
        return "".join(f"{start}{card}</blockquote>" for card in cards)


def change(before: str, after: str) -> dict[str, str]:
    """Return a card of two texts, cut to where they differ; spaces (␣␣) and breaks (⏎) show."""
    pairs = enumerate(zip(before, after, strict=False))
    same = next((n for n, (a, b) in pairs if a != b), min(len(before), len(after)))
    start = max(0, same - 60)
    if start:  # go on to the beginning of a word, if there is one
        start = max(start, before.find(" ", start, same) + 1)

    def visible(text: str) -> str:
        spaced = re.sub(r"[^\S\n]{2,}", "␣␣", text[start:]).replace("\n", "⏎")
        return ("... " if start else "") + short(spaced, 220)

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
        text = "<table>"
        for tag, line in [("th", self.header), *(("td", row) for row in self.rows)]:
            cells = (f'<{tag} style="text-align:left">{html.escape(v)}</{tag}>' for v in line)
            text += f"<tr>{''.join(cells)}</tr>" if line else ""
        return f"{text}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "✓" if value else "✗"
    return _digits(value, 4) if isinstance(value, float) else str(value)
