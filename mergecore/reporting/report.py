"""The report of a sweep for a person to read, and its tables as files."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
import pyarrow.csv  # type: ignore[import-untyped,unused-ignore]
import pyarrow.parquet  # type: ignore[import-untyped,unused-ignore]

from mergecore.reporting.averages import MEASURES
from mergecore.reporting.curves import json_text
from mergecore.reporting.summary import REFERENCE, VALIDATION, Summary
from mergecore.reporting.trajectories import outcome, search_rows, search_table


def _number(value: float | None) -> str:
    return "–" if value is None else "not comparable" if math.isnan(value) else f"{value:.3f}"


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    text = _number(value)
    return text if None in (value, low, high) or math.isnan(low) else f"{text} [{low:.3f}, {high:.3f}]"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    safe = [[" ".join(text.split()).replace("|", "\\|") for text in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in safe]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])


def _filled(head: Sequence[str], rows: Sequence[Sequence[str]], labels: int = 2) -> str:
    """Return a table without the columns in which nothing was measured; '' where none is left besides the labels."""
    kept = [*range(labels), *(column for column in range(labels, len(head)) if any(row[column] != "–" for row in rows))]
    if len(kept) == labels:
        return ""
    return _grid([head[column] for column in kept], [[row[column] for column in kept] for row in rows])


def _side(curve: Sequence[Mapping[str, Any]], name: str, split: str) -> str:
    """Held-in or held-out; of validation items only those that decide something are scored."""
    if split == VALIDATION and all(row[name] is None for row in curve):
        return "Nothing is decided by these tasks, so their validation items are not scored; see the test items."
    return _by_count(curve, name) if any(row[name] is not None for row in curve) else ""


def _by_count(curve: Sequence[Mapping[str, Any]], name: str) -> str:
    counts = sorted({row["count"] for row in curve})
    lines = dict.fromkeys((row["method"], row["label"]) for row in curve)
    at = {(row["method"], row["label"], row["count"]): row for row in curve}
    rows = []
    for method, label in lines:
        points = [at.get((method, label, count)) for count in counts]
        rows.append([f"{method} {label}".strip(), *("" if row is None else _point_text(row, name) for row in points)])
    return _grid(["method", *(f"{count} experts" for count in counts)], rows)


def _point_text(row: Mapping[str, Any], name: str) -> str:
    short = (
        "" if row["subsets"] == row["subsets_planned"] else f" ({row['subsets']} of {row['subsets_planned']} subsets)"
    )
    return _with_interval(row, name) + short


def markdown(summary: Summary) -> str:
    """The report as Markdown: both measures by method and count, baselines, differences, what failed, and how."""
    curve, baselines, cells = (table.to_pylist() for table in (summary.curve, summary.baselines, summary.cells))
    parts = [f"# {summary.name}: scores on {summary.split} items"]
    if summary.winner:
        names = {row["cell"]: row["name"] for row in cells}
        side = summary.select_by.replace("_", "-")
        parts.append(f"Best merge by {side} score on {summary.winner[1]} items: **{names[summary.winner[0]]}**.")
    for side, against in (("held_in", "the merge's own experts"), ("held_out", "the base")):
        text = _side(curve, f"{side}_normalised", summary.split) if curve else "No merge has been measured yet."
        parts += [f"## {side.replace('_', '-').capitalize()}, relative to {against}", text] if text else []
    parts += ["## Baselines", _baseline_grid(baselines) if baselines else "No baseline has been measured yet."]
    if curve and (differences := _difference_grid(curve)):
        parts += ["## Differences at the same count", differences]
    parts += _searches(summary)
    parts += _kept(summary)
    parts += _troubles(summary, cells)
    return "\n\n".join([*parts, "## How to read this", _explanation(summary)]) + "\n"


def _baseline_grid(baselines: Sequence[Mapping[str, Any]]) -> str:
    rows = [[row["kind"], row["name"], *(_with_interval(row, measure) for measure in MEASURES)] for row in baselines]
    return _filled(["", "name", *(measure.replace("_", " ") for measure in MEASURES)], rows)


def _difference_grid(curve: Sequence[Mapping[str, Any]]) -> str:
    """Paired differences; the one to the base held-out is left out, since it is the normalised score minus 1."""
    names = [f"{side}_normalised_difference_to_average" for side in ("held_in", "held_out")]
    names.append("held_in_normalised_difference_to_base")
    rows = [
        [f"{row['method']} {row['label']}".strip(), str(row["count"]), *(_with_interval(row, name) for name in names)]
        for row in curve
    ]
    head = [f"held-in − {REFERENCE}", f"held-out − {REFERENCE}", "held-in − base on the same tasks"]
    return _filled(["method", "experts", *head], rows)


def _searches(summary: Summary) -> list[str]:
    """A section on searches: how each stands, and its way."""
    parts = ["## Searches, on validation items"] if summary.searches else []
    for way in summary.searches:
        head, rows, left_out = search_rows(way)
        rest = f" Of {len(way.trials)} trials those are shown that were kept or failed." if left_out else ""
        parts += [outcome(way) + rest, _grid(head, rows)]
    return parts


def _kept(summary: Summary) -> list[str]:
    """A section on where the models are that are kept."""
    if not summary.kept:
        return []
    rows = [[name, f"`{folder}`", text] for name, folder, text in summary.kept]
    return [
        "## Models that are kept",
        _grid(["cell", "folder in the store", "what it is"], rows),
        "`mergeloom export SPEC CELL OUT` writes a whole folder that `transformers` loads, of these and of every other "
        "cell of a merge.",
    ]


def _troubles(summary: Summary, cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sections on cells without a result and on scores that nothing could be divided by."""
    parts = []
    if summary.failed:
        rows = [[failure.name, failure.status, failure.reason] for failure in summary.failed]
        parts += ["## Cells without a result", _grid(["cell", "status", "reason"], rows)]
        files = dict.fromkeys(failure.file for failure in summary.failed if failure.file)
        parts += ["Tracebacks:", "\n".join(f"- `{file}`" for file in files)] if files else []
    pending = sum(row["status"] == "pending" for row in cells)
    if pending:
        parts.append(f"{pending} of {len(cells)} cells are pending.")
    reasons = sorted({text for row in cells for text in row["unreliable"]})
    if reasons:
        parts += ["## Kept out of the normalised scores", "\n".join(f"- {reason}" for reason in reasons)]
    return parts


def _explanation(summary: Summary) -> str:
    return (
        "A task's score is the mean over its items, or what its metric makes of that (a perplexity). Held-in tasks are "
        "those that the merged experts were trained for; each is divided by the score of the best of these experts "
        "(for the base and the multitask model: of all experts). Each held-out task is divided by the score of the "
        "base. Where lower is better, the ratio is turned over; where the spec gives a level of chance, it is "
        "subtracted from both first. The ratios are averaged within each category, then over categories, then over "
        "subsets of experts. Where a grid of values was searched, only the values chosen on validation items are "
        "shown. "
        f"Brackets: 95 % percentile intervals of a paired bootstrap ({summary.resamples} resamples) over subsets of "
        "experts, where there are several, and over items within each task; every method, baseline and denominator "
        "sees the same resamples. Two or three subsets say little about other subsets: with so few the intervals are "
        "too narrow. Tasks are fixed: nothing here speaks of other tasks."
    )


def write_tables(summary: Summary, folder: Path | str) -> tuple[Path, ...]:
    """Write cells, curve, baselines and searches (where there are any) as Parquet and CSV, and report.md; each file
    appears whole or not at all.

    Lists become JSON in the CSV files. Returns the paths written. Raises OSError where the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as draft:
        tables = {"cells": summary.cells, "curve": summary.curve, "baselines": summary.baselines}
        if summary.searches:
            tables["searches"] = search_table(summary.searches)
        for name, table in tables.items():
            pyarrow.parquet.write_table(table, Path(draft) / f"{name}.parquet")
            pyarrow.csv.write_csv(_flat(table), Path(draft) / f"{name}.csv")
        (Path(draft) / "report.md").write_text(markdown(summary), encoding="utf-8")
        for path in sorted(Path(draft).iterdir()):
            path.replace(folder / path.name)
            written.append(folder / path.name)
    return tuple(written)


def _flat(table: pa.Table) -> pa.Table:
    """The table with lists as JSON text: CSV has no lists."""
    for number, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            texts = pa.array([json_text(value) for value in table[field.name].to_pylist()], pa.string())
            table = table.set_column(number, field.name, texts)
    return table
