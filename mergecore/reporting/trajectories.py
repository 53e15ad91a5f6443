"""The ways of a sweep's searches for a person to read: a table of all trials, sections of the report, and a small
plot.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]

from mergecore.reporting.scores import Trajectory, Trial

MOST_ROWS = 40
"""Trials of one search that the report lists; of more it lists those that were kept or failed."""
MOST_PANELS = 12


def search_table(searches: Sequence[Trajectory]) -> pa.Table:
    """One row per trial: search, method, by, count, subset, state, round, cell, what, score, kept, best, reason,
    result.
    """
    rows = [
        {
            "search": way.name, "method": way.method, "by": way.by, "count": way.count, "subset": way.subset,
            "state": way.state, "round": trial.round, "cell": trial.cell, "what": trial.what, "score": trial.score,
            "kept": trial.kept, "best": trial.best, "reason": trial.reason,
            "result": bool(way.result) and trial.cell == way.result,
        }
        for way in searches
        for trial in way.trials
    ]  # fmt: skip
    text, whole, real, yes = pa.string(), pa.int64(), pa.float64(), pa.bool_()
    schema = pa.schema([
        ("search", text), ("method", text), ("by", text), ("count", whole), ("subset", whole), ("state", text),
        ("round", whole), ("cell", text), ("what", text), ("score", real), ("kept", yes), ("best", real),
        ("reason", text), ("result", yes),
    ])  # fmt: skip
    return pa.Table.from_pylist(rows, schema=schema)


def outcome(way: Trajectory) -> str:
    """How a search stands, in one sentence."""
    measured = sum(trial.score is not None for trial in way.trials)
    winner = next((trial for trial in reversed(way.trials) if way.result and trial.cell == way.result), None)
    if way.state == "open":
        return f"{way.name} ({way.by}) goes on: {measured} of at most {way.most} models are measured."
    said = f" It ended early: {way.reason}." if way.reason else ""
    if winner is None:
        return f"{way.name} ({way.by}) found nothing.{said}"
    return f"{way.name} ({way.by}) found {winner.what} ({winner.score:.4f}), {len(way.trials)} models tried.{said}"


def search_rows(way: Trajectory, most: int = MOST_ROWS) -> tuple[list[str], list[list[str]], int]:
    """Head and rows of one search's table, and how many trials are left out of it."""
    shown = list(way.trials)
    if len(shown) > most:
        shown = [trial for trial in shown if trial.kept or trial.reason or trial.cell == way.result][:most]
    head = ["round", "what", "score", "kept", "best so far"]
    return head, [_row(trial, way.result) for trial in shown], len(way.trials) - len(shown)


def _row(trial: Trial, result: str) -> list[str]:
    score = trial.reason or ("asked for" if trial.score is None else f"{trial.score:.4f}")
    kept = "result" if result and trial.cell == result else "yes" if trial.kept else ""
    return [str(trial.round), trial.what, score, kept, "" if trial.best is None else f"{trial.best:.4f}"]


def draw_searches(searches: Sequence[Trajectory], path: Path) -> Path | None:
    """A panel per search, for the first dozen: every trial's score in the order asked, and the best so far as a line.

    Returns the PNG, written whole or not at all; None where nothing has been measured.
    """
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from mergecore.reporting.figure import SETTINGS

    shown = [way for way in searches if any(trial.score is not None for trial in way.trials)][:MOST_PANELS]
    if not shown:
        return None
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    with matplotlib.style.context(["default", SETTINGS]):
        figure = Figure(figsize=(1.2 + 3.4 * columns, 0.4 + 2.6 * lines), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for panel, way in zip(panels, shown, strict=False):
            _panel(panel, way)
        for panel in panels[len(shown) :]:
            panel.remove()
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".figure-", dir=path.parent) as draft:
            figure.savefig(Path(draft) / path.name, dpi=150, metadata={"Software": None})
            (Path(draft) / path.name).replace(path)
    return path


def _panel(panel: Any, way: Trajectory) -> None:
    known = [(place, trial) for place, trial in enumerate(way.trials, start=1) if trial.score is not None]
    kept = [(place, trial) for place, trial in known if trial.kept]
    best = [(place, trial.best) for place, trial in known if trial.best is not None]
    panel.step(*zip(*best, strict=True), where="post", color="#0072B2", linewidth=1.4, label="best so far")
    for style, label, points in (
        ({"color": "#56B4E9", "markersize": 4}, "a model tried", known),
        ({"color": "#D55E00", "markersize": 5}, "kept: the best when its round was over", kept),
    ):
        panel.plot([place for place, _ in points], [trial.score for _, trial in points], "o", label=label, **style)
    panel.set_title(f"{way.name} ({way.by})", fontsize=9)
    panel.set_xlabel("models tried", fontsize=8)
    panel.set_ylabel("score on validation items", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
