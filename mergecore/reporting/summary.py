"""What a sweep says, as tables: one row per cell, one per point of a curve, one per baseline, with paired intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]

from mergecore.errors import EvaluationError
from mergecore.reporting.averages import MEASURES, CellMeans, SplitScores
from mergecore.reporting.bootstrap import Draws
from mergecore.reporting.curves import DIFFERENCES, Point, Sampled, json_text, points
from mergecore.reporting.scores import CellScores, Sweep, Trajectory

REFERENCE = "average"
"""The method every other one is compared with, at the same count and on the same subsets."""
VALIDATION, TEST = "validation", "test"
DRAWS = Draws(resamples=2000, seed=0)


@dataclass(frozen=True)
class Failure:
    """A cell without a result: `status` is 'failed' or 'refused'. file: the record with the traceback, '' where none
    is.
    """

    cell: str
    name: str
    status: str
    reason: str
    file: str = ""


@dataclass(frozen=True)
class Summary:
    """The tables of a sweep on one split. A null was not measured; a NaN was, and means nothing: see `unreliable`.

    cells: cell, kind, name, method, values (JSON), count, subset, experts, status, reason, chosen, model, digest,
    the four MEASURES, unreliable (reasons), score/<task> (the mean over items, or what the task shows in its place).
    curve: method, label, values (JSON list of those in use), count, subsets, subsets_planned, cells; for each measure
    <measure>, <measure>_low, <measure>_high and the same three after <measure>_difference_to_average and
    <measure>_difference_to_base (the base on the same tasks, divided by the same experts).
    baselines: kind, name, cells; columns as in `curve`, without a difference to average. The kind 'mean expert' is the
    mean over the experts.
    winner: cell and split of `best`, or None where nothing can win yet. searches: the way of each, on validation items.
    kept: name, folder in the store and a word on each model that is kept.
    """

    name: str
    split: str
    select_by: str
    cells: pa.Table
    curve: pa.Table
    baselines: pa.Table
    failed: tuple[Failure, ...]
    winner: tuple[str, str] | None
    resamples: int
    searches: tuple[Trajectory, ...] = ()
    kept: tuple[tuple[str, str, str], ...] = ()


def summarise(sweep: Sweep, split: str, *, draws: Draws = DRAWS) -> Summary:
    """The tables of a sweep on one split ('validation' or 'test').

    Intervals are 95 % percentile intervals.
    Raises EvaluationError where two cells were measured on different numbers of items.
    """
    scores = SplitScores(sweep, split)
    averages = {cell.cell: scores.average(cell) for cell in sweep.cells}
    try:
        winner = best(sweep)
    except EvaluationError:
        winner = None
    return Summary(
        name=sweep.name,
        split=split,
        select_by=sweep.select_by,
        cells=_cell_rows(sweep, scores, averages),
        curve=_curve_table(sweep, scores, averages, draws),
        baselines=_baseline_table(sweep, scores, averages, draws),
        failed=tuple(
            Failure(cell.cell, cell.name, cell.status, cell.reason, cell.failure)
            for cell in sweep.cells
            if cell.status in ("failed", "refused")
        ),
        winner=winner,
        resamples=draws.resamples,
        searches=sweep.searches,
        kept=tuple(sweep.kept),
    )


class Summaries:
    """The summaries of one sweep: the one of a split is worked out when it is first asked for, and kept.

    Its intervals come from a bootstrap that takes seconds, so whoever reports on a sweep gets this object handed on.
    """

    def __init__(self, sweep: Sweep, *, draws: Draws = DRAWS) -> None:
        self.sweep, self._draws = sweep, draws
        self._by_split: dict[str, Summary] = {}

    def on(self, split: str) -> Summary:
        """Return the summary on one split ('validation' or 'test'). Raises EvaluationError as `summarise` does."""
        if split not in self._by_split:
            self._by_split[split] = summarise(self.sweep, split, draws=self._draws)
        return self._by_split[split]

    def cells(self, split: str) -> pa.Table:
        """Return the table `Summary.cells` of one split; without the others it needs no bootstrap."""
        known = self._by_split.get(split)
        return known.cells if known else cell_table(self.sweep, split)


def cell_table(sweep: Sweep, split: str) -> pa.Table:
    """Return the table `Summary.cells` of a sweep on one split: one row per cell, without intervals.

    Raises EvaluationError where two cells were measured on different numbers of items.
    """
    scores = SplitScores(sweep, split)
    return _cell_rows(sweep, scores, {cell.cell: scores.average(cell) for cell in sweep.cells})


def best(sweep: Sweep) -> tuple[str, str]:
    """The merge to register and the split that chose it: the highest normalised score, equal ones by cell id.

    Only merges that are done and whose values were chosen compete, on validation scores where any of them has some,
    else on test scores.
    Raises EvaluationError where none has a score that can be compared.
    """
    measure = f"{sweep.select_by}_normalised"
    if measure not in MEASURES:
        raise EvaluationError(f"cells cannot be chosen by '{sweep.select_by}'; known: held_in, held_out")
    merges = [cell for cell in sweep.cells if cell.kind == "merge" and cell.status == "done" and cell.chosen]
    split = VALIDATION if any(cell.items.get(VALIDATION) for cell in merges) else TEST
    scores = SplitScores(sweep, split)
    averages = [scores.average(cell) for cell in merges]
    means = scores.resampled(averages, Draws(resamples=0))[0][MEASURES.index(measure), 0]
    # Rounded, so that the order in which tasks were added up does not decide between equals.
    ranked = sorted(
        (-round(float(mean), 12), cell.cell) for mean, cell in zip(means, merges, strict=True) if np.isfinite(mean)
    )
    if ranked:
        return ranked[0][1], split
    reasons = sorted({text for average in averages for text in average.unreliable})
    raise EvaluationError(
        f"no merge of sweep '{sweep.name}' has a {measure} score on {split} items, so none can be chosen"
        + (": " + "; ".join(reasons) if reasons else "; evaluate at least one first")
    )


def _cell_rows(sweep: Sweep, scores: SplitScores, averages: Mapping[str, CellMeans]) -> pa.Table:
    cells = sweep.cells
    columns: dict[str, pa.Array] = {
        field: pa.array([getattr(cell, field) for cell in cells], kind)
        for field, kind in (
            ("cell", pa.string()),
            ("kind", pa.string()),
            ("name", pa.string()),
            ("method", pa.string()),
        )
    }
    columns["values"] = pa.array([json_text(cell.values) for cell in cells], pa.string())
    for field, kind in (
        *(("count", pa.int64()), ("subset", pa.int64()), ("experts", pa.list_(pa.string()))),
        *(("status", pa.string()), ("reason", pa.string()), ("chosen", pa.bool_())),
        *(("model", pa.string()), ("digest", pa.string())),
    ):
        columns[field] = pa.array([getattr(cell, field) for cell in cells], kind)
    means = scores.resampled([averages[cell.cell] for cell in cells], Draws(resamples=0))[0][:, 0]
    measured = [averages[cell.cell].measured for cell in cells]
    for number, measure in enumerate(MEASURES):
        values = [float(means[number, row]) if measured[row][number] else None for row in range(len(cells))]
        columns[measure] = pa.array(values, pa.float64(), from_pandas=False)
    columns["unreliable"] = pa.array([list(averages[cell.cell].unreliable) for cell in cells], pa.list_(pa.string()))
    for task in sweep.suite.tasks:
        columns[f"score/{task}"] = pa.array(
            [scores.mean(cell.cell, task) for cell in cells], pa.float64(), from_pandas=False
        )
    return pa.table(columns)


def _curve_table(sweep: Sweep, scores: SplitScores, averages: Mapping[str, CellMeans], draws: Draws) -> pa.Table:
    curve = points(sweep.cells, lambda cell: any(averages[cell.cell].measured))
    cells = list({cell.cell: cell for point in curve for cell in point.cells}.values())
    sampled = Sampled(cells, scores, averages, draws)
    reference: dict[int, Point] = {}
    for point in curve:
        if point.method == REFERENCE:
            reference.setdefault(point.count, point)
    rows = [
        {
            "method": point.method,
            "label": point.label,
            "values": json_text(
                [json.loads(text) for text in dict.fromkeys(json_text(cell.values) for cell in point.cells)]
            ),
            "count": point.count,
            "subsets": len(point.cells),
            "subsets_planned": point.planned,
            "cells": [cell.cell for cell in point.cells],
            **sampled.columns(point.cells, draws.subset_weights(len(point.cells))),
            **sampled.difference(point, reference.get(point.count), draws),
        }
        for point in curve
    ]
    text, whole = pa.string(), pa.int64()
    head = [("method", text), ("label", text), ("values", text), ("count", whole), ("subsets", whole)]
    head += [("subsets_planned", whole), ("cells", pa.list_(text))]
    return _table(rows, head, ("", *DIFFERENCES))


def _baseline_table(sweep: Sweep, scores: SplitScores, averages: Mapping[str, CellMeans], draws: Draws) -> pa.Table:
    cells = [c for c in sweep.cells if c.kind != "merge" and c.status == "done" and any(averages[c.cell].measured)]
    sampled = Sampled(cells, scores, averages, draws)
    groups: list[tuple[str, str, list[CellScores]]] = [(cell.kind, cell.name, [cell]) for cell in cells]
    experts = [cell for cell in cells if cell.kind == "expert"]
    if experts:
        groups.append(("mean expert", f"mean of {len(experts)} experts", experts))
    rows = []
    for kind, name, members in groups:
        # The pool of experts is what it is: only the items are resampled.
        even = np.full((1 + draws.resamples, len(members)), 1.0 / len(members))
        rows.append({"kind": kind, "name": name, "cells": [c.cell for c in members], **sampled.columns(members, even)})
    head = [("kind", pa.string()), ("name", pa.string()), ("cells", pa.list_(pa.string()))]
    return _table(rows, head, ("", DIFFERENCES[0]))


def _table(rows: Sequence[Mapping[str, Any]], head: Sequence[tuple[str, Any]], infixes: Sequence[str]) -> pa.Table:
    names = [f"{m}{infix}{end}" for m in MEASURES for infix in infixes for end in ("", "_low", "_high")]
    schema = pa.schema([*head, *((name, pa.float64()) for name in names)])
    return pa.table(
        {field.name: pa.array([row[field.name] for row in rows], field.type, from_pandas=False) for field in schema},
        schema=schema,
    )
