"""The figure of a sweep: held-in and held-out scores against the number of experts, one line per method."""

from __future__ import annotations

import math
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from mergecore.reporting.summary import Summary

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, told apart by colour-blind readers; yellow is left out, it is lost on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BASELINES = (
    ("base", "base", {"color": "#555555", "linestyle": (0, (1, 1.5))}),
    ("multitask", "multitask", {"color": "#555555", "linestyle": (0, (6, 2))}),
    ("mean expert", "mean expert", {"color": "#555555", "linestyle": (0, (6, 2, 1, 2))}),
)
LONGEST_LABEL = 110
"""Characters of a legend entry that fit the width of the figure."""
SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "mergeloom",  # otherwise every file has other identifiers
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a method's value may hold a dollar sign
}

Row = Mapping[str, Any]


def draw(summary: Summary, path: Path | str) -> tuple[Path, Path]:
    """Draw the summary beside `path`: a PNG of 150 dots per inch and an SVG, whole or not at all; returns both paths.

    Equal summaries give equal bytes with one version of matplotlib. Raises OSError where the folder cannot be written.
    """
    path = Path(path)
    stem = path.with_suffix("") if path.suffix.lower() in (".png", ".svg") else path
    png, svg = (stem.with_name(f"{stem.name}{suffix}") for suffix in (".png", ".svg"))
    stem.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.style.context(["default", SETTINGS]):  # whatever the caller has set
        figure = sweep_figure(summary)
        with tempfile.TemporaryDirectory(prefix=".figure-", dir=stem.parent) as draft:
            for target, metadata in ((png, {"Software": None}), (svg, {"Date": None, "Creator": None})):
                figure.savefig(Path(draft) / target.name, dpi=150, metadata=metadata)
                (Path(draft) / target.name).replace(target)
    return png, svg


def sweep_figure(summary: Summary) -> Figure:
    """The figure itself: two panels, a legend below them and a caption below that. Nothing is written."""
    lines = method_lines(summary)
    baselines = {row["kind"]: row for row in summary.baselines.to_pylist()}
    entries = _legend_entries(lines, baselines)
    columns = 1 if max((len(label) for _, label in entries), default=0) > 60 else 2
    caption = textwrap.wrap(_caption(summary, lines), 168)
    below = 0.25 + 0.19 * math.ceil(len(entries) / columns) + 0.17 * len(caption)  # inches
    height = 3.7 + below
    figure = Figure(figsize=(9.6, height))
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{summary.name}: scores on {summary.split} items", x=0.01, y=1 - 0.08 / height, ha="left", va="top"
    )
    panels = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.075, right=0.985, wspace=0.2, top=1 - 0.62 / height, bottom=(below + 0.45) / height)
    counts = sorted({row["count"] for _, rows in lines for row in rows})
    _panel(panels[0], "held_in_normalised", lines, baselines, counts)
    panels[0].set(title="Held-in tasks", ylabel="score ÷ score of the best own expert")
    _panel(panels[1], "held_out_normalised", lines, baselines, counts)
    panels[1].set(title="Held-out tasks", ylabel="score ÷ score of the base")
    text_height = 0.17 * len(caption)
    if entries:
        handles, labels = zip(*entries, strict=True)
        figure.legend(
            handles, labels, ncols=columns, loc="lower left", bbox_to_anchor=(0.07, (0.1 + text_height) / height),
            frameon=False, borderaxespad=0, handlelength=3.2, labelspacing=0.35, fontsize=8.5,
        )  # fmt: skip
    figure.text(0.01, 0.06 / height, "\n".join(caption), fontsize=7.5, color="#444444", va="bottom", linespacing=1.25)
    return figure


def method_lines(summary: Summary) -> list[tuple[str, list[Row]]]:
    """One line per method: its legend text and its rows of `Summary.curve` by count.

    Where several values were listed rather than chosen on validation, the one drawn is at the most counts and, among
    those, has the highest mean; the legend says so.
    """
    measure = f"{summary.select_by}_normalised"
    methods: dict[str, dict[str, list[Row]]] = {}
    for row in summary.curve.to_pylist():
        methods.setdefault(row["method"], {}).setdefault(row["label"], []).append(row)
    lines = []
    for method, labels in methods.items():
        ranked = {label: _rank([row[measure] for row in rows]) for label, rows in labels.items()}
        label = max(ranked, key=lambda name: ranked[name])
        text = f"{method} ({label})" if label else method
        text = textwrap.shorten(text, LONGEST_LABEL, placeholder=" …")  # the table has the whole
        text += f" – best of {len(labels)} listed" if len(labels) > 1 else ""
        lines.append((text, sorted(labels[label], key=lambda row: int(row["count"]))))
    return lines


def _rank(values: Sequence[float | None]) -> tuple[int, float]:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return len(known), sum(known) / len(known) if known else 0.0


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],
        "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3],
        "linewidth": 1.6,
        "markersize": 5,
    }


def _panel(
    panel: Axes,
    measure: str,
    lines: Sequence[tuple[str, Sequence[Row]]],
    baselines: Mapping[str, Row],
    counts: list[int],
) -> None:
    """Draw one measure; counts stand at equal distances, so that 2, 4, 8 and 64 experts can all be read."""
    drawn = False
    apart = min(0.09, 0.6 / max(1, len(lines)))
    for number, (_, rows) in enumerate(lines):
        shift = (number - (len(lines) - 1) / 2) * apart
        known = [row for row in rows if _finite(row[measure])]
        drawn = drawn or bool(known)
        places = [counts.index(row["count"]) + shift for row in known]
        means = [row[measure] for row in known]
        panel.plot(places, means, zorder=3, **_style(number))
        bars = [(x, row) for x, row in zip(places, known, strict=True) if _finite(row[f"{measure}_low"])]
        low, high = ([row[f"{measure}_{end}"] for _, row in bars] for end in ("low", "high"))
        panel.vlines([x for x, _ in bars], low, high, color=_style(number)["color"], linewidth=1.3, alpha=0.75)
    for kind, _, style in BASELINES:
        if _shown(kind, measure, baselines):
            panel.axhline(baselines[kind][measure], linewidth=1.2, zorder=1, **style)
            drawn = True
    for place in range(0, len(counts), 2):  # which count the points moved sideways belong to
        panel.axvspan(place - 0.5, place + 0.5, color="#f4f4f4", linewidth=0, zorder=0)
    panel.set_xlabel("number of experts merged")
    panel.xaxis.set_major_locator(FixedLocator(list(range(len(counts)))))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticklabels([str(count) for count in counts])
    panel.set_xlim(-0.5, max(len(counts), 1) - 0.5)
    panel.margins(y=0.08)
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    if not drawn:
        panel.set_yticks([])
        panel.text(
            0.5, 0.5, "nothing measured that can be compared", transform=panel.transAxes, ha="center", color="#777777"
        )


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _shown(kind: str, measure: str, baselines: Mapping[str, Row]) -> bool:
    """Held-in, the base would squeeze the lines; it is in the table."""
    return kind in baselines and _finite(baselines[kind][measure]) and not (kind == "base" and "held_in" in measure)


def _legend_entries(
    lines: Sequence[tuple[str, Sequence[Row]]], baselines: Mapping[str, Row]
) -> list[tuple[Line2D, str]]:
    entries = [(Line2D([], [], **_style(number)), text) for number, (text, _) in enumerate(lines)]
    for kind, text, style in BASELINES:
        if any(_shown(kind, measure, baselines) for measure in ("held_in_normalised", "held_out_normalised")):
            place = " (held-out: 1)" if kind == "base" else " (held-in: 1)" if kind == "mean expert" else ""
            entries.append((Line2D([], [], linewidth=1.2, **style), text + place))
    return entries


def _caption(summary: Summary, lines: Sequence[tuple[str, Sequence[Row]]]) -> str:
    subsets = sorted({row["subsets"] for _, rows in lines for row in rows})
    several = bool(subsets) and subsets[-1] > 1
    how = f"over {subsets[0]} to {subsets[-1]} subsets of experts" if several and subsets[0] < subsets[-1] else ""
    how = how or (f"over {subsets[-1]} subsets of experts" if several else "of one subset of experts")
    return (
        "Ratios per task, averaged within each category, then over categories"
        + (f", then {how}. " if several else f", {how}. ")
        + f"Bars: 95 % intervals of a paired bootstrap over {'subsets and ' if several else ''}items "
        f"({summary.resamples} resamples)."
        + (" Points are moved sideways so that bars do not cover each other." if len(lines) > 1 else "")
    )
