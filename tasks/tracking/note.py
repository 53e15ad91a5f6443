"""The note in Markdown on a sweep's MLflow pages: the best cells, failures, and links."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mergecore.reporting.scores import Sweep
from mergecore.reporting.summary import Summary
from mergecore.reporting.trajectories import outcome
from tasks.tracking import views

LONGEST = 7500  # characters; MLflow cuts tags at 8000
MOST_ROWS = 24


def sweep_note(sweep: Sweep, summary: Summary, experiment_id: str, links: Mapping[str, str]) -> str:
    """Return the note on the parent run and on the experiment, at most LONGEST characters. links: title → address."""
    counted: dict[str, int] = {}
    for cell in sweep.cells:
        counted[cell.status] = counted.get(cell.status, 0) + 1
    state = ", ".join(f"{number} {status}" for status, number in counted.items())
    pages = [f"[{title}]({views.page(experiment_id, key)})" for key, title in views.TITLES.items()]
    pages += [f"[{title}]({address})" for title, address in links.items()]
    parts = [f"Sweep **{sweep.name}**: {len(sweep.cells)} models ({state}).", _best(sweep, summary), " · ".join(pages)]
    if len(summary.curve):
        parts += ["Held-in / held-out, normalised, mean over subsets of experts:", _table(summary)]
    if sweep.searches:
        parts += [
            "Searches, on validation items:",
            "\n".join(f"- {outcome(search)}" for search in sweep.searches[:MOST_ROWS]),
        ]
    if summary.failed:
        rows = [f"- **{failure.name}** {failure.status}: {failure.reason}" for failure in summary.failed[:MOST_ROWS]]
        parts += ["Without a result:", "\n".join(rows)]
    return "\n\n".join(part for part in parts if part)[:LONGEST]


def _best(sweep: Sweep, summary: Summary) -> str:
    if summary.winner is None:
        return ""
    cell = next(cell for cell in sweep.cells if cell.cell == summary.winner[0])
    side = sweep.select_by.replace("_", "-")
    return f"Best {side} on {summary.winner[1]} items: **{cell.name}**."


def _table(summary: Summary) -> str:
    points = summary.curve.to_pylist()
    counts = sorted({row["count"] for row in points})
    lines = list(dict.fromkeys((row["method"], row["label"]) for row in points))
    at = {(row["method"], row["label"], row["count"]): row for row in points}
    head = ["method", *(f"{count} experts" for count in counts)]
    rows = []
    for method, label in lines[:MOST_ROWS]:
        points_of_line = [at.get((method, label, count)) for count in counts]
        rows.append([f"{method} {label}".strip(), *("–" if row is None else _pair(row) for row in points_of_line)])
    if len(lines) > MOST_ROWS:
        rows.append([f"… and {len(lines) - MOST_ROWS} more", *("" for _ in counts)])
    return "\n".join([_row(head), "|" + " --- |" * len(head), *map(_row, rows)])


def _row(cells: Sequence[str]) -> str:
    # MLflow's pages draw tables without a gap between columns: no-break spaces make one.
    return "| " + " | ".join(f"\u00a0{cell}\u00a0".replace("|", "\\|") for cell in cells) + " |"


def _pair(row: Mapping[str, float | None]) -> str:
    values = [row[f"{side}_normalised"] for side in ("held_in", "held_out")]
    return " / ".join("–" if value is None or math.isnan(value) else f"{value:.3f}" for value in values)
