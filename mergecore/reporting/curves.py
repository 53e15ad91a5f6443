"""Points of curves: which cells are averaged into one value, and that value with its paired intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergecore.reporting.averages import MEASURES, CellMeans, SplitScores
from mergecore.reporting.bootstrap import Draws, Floats, percentile_interval
from mergecore.reporting.scores import CellScores, values_label

DIFFERENCES = ("_difference_to_base", "_difference_to_average")
"""What follows a measure's name where it is a difference; then '', '_low' or '_high'."""


@dataclass(frozen=True)
class Point:
    """Cells that are averaged into one value: one per subset, in the order of the subsets."""

    method: str
    label: str
    count: int
    cells: tuple[CellScores, ...]
    planned: int

    @property
    def keyed(self) -> dict[tuple[int, int], CellScores]:
        """(subset, how many of it came before) → cell: what is paired with what in a difference."""
        keyed: dict[tuple[int, int], CellScores] = {}
        for cell in self.cells:
            keyed[cell.subset, sum(subset == cell.subset for subset, _ in keyed)] = cell
        return keyed


def points(cells: Sequence[CellScores], is_measured: Callable[[CellScores], bool]) -> list[Point]:
    """The points of all curves: by method in the order of the sweep, then label, then count.

    Where a grid was chosen on validation only the chosen cells count, under one label for all counts. Cells that are
    not done or not measured are left out and show as the difference between `planned` and the number of cells.
    """
    points: list[Point] = []
    merges = [cell for cell in cells if cell.kind == "merge"]
    for method in dict.fromkeys(cell.method for cell in merges):
        labels = curve_labels([cell for cell in merges if cell.method == method])
        groups: dict[tuple[str, int], list[CellScores]] = {}
        for cell in merges:
            if cell.cell in labels:
                groups.setdefault((labels[cell.cell], cell.count), []).append(cell)
        order = list(dict.fromkeys(label for label, _ in groups))
        for label, count in sorted(groups, key=lambda group: (order.index(group[0]), group[1])):
            members = sorted(groups[label, count], key=lambda cell: (cell.subset, cell.cell))
            done = tuple(cell for cell in members if cell.status == "done" and is_measured(cell))
            if done:
                planned = len({cell.subset for cell in merges if cell.method == method and cell.count == count})
                points.append(Point(method, label, count, done, max(planned, len(done))))
    return points


def curve_labels(cells: Sequence[CellScores]) -> dict[str, str]:
    """Cell id → label of its curve, for the cells of one method that are shown."""
    chosen = [cell for cell in cells if cell.chosen]
    shown = chosen or list(cells)
    places = {(cell.count, cell.subset) for cell in chosen}
    if not chosen or len(chosen) == len(cells) or len(places) < len(chosen):
        return {cell.cell: values_label(cell.values) for cell in shown}
    names = dict.fromkeys(name for cell in cells for name in cell.values)
    varying = [name for name in names if len({json_text(cell.values.get(name)) for cell in cells}) > 1]
    fixed = {name: value for name, value in cells[0].values.items() if name not in varying}
    parts = [values_label(fixed)] if fixed else []
    label = ", ".join([*parts, *(f"{name} chosen" for name in varying)])
    return {cell.cell: label for cell in shown}


def json_text(value: Any) -> str:
    """JSON of a method's values with sorted names: equal values give equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    """Read-only mappings, tuples and numpy numbers as JSON knows them."""
    return dict(value) if isinstance(value, Mapping) else value.item() if isinstance(value, np.generic) else list(value)


class Sampled:
    """The measures of some cells under all resamples, and what is averaged from them."""

    def __init__(
        self, cells: Sequence[CellScores], scores: SplitScores, averages: Mapping[str, CellMeans], draws: Draws
    ) -> None:
        chosen = [averages[cell.cell] for cell in cells]
        self.own, self.base = scores.resampled(chosen, draws)
        self.measured = np.array([average.measured for average in chosen], dtype=bool).reshape(-1, len(MEASURES))
        self.column = {cell.cell: column for column, cell in enumerate(cells)}
        base_items = scores.items[scores.base] if scores.base is not None else {}
        self.base_measured = self.measured & np.array(
            [[all(task in base_items for task in side.weights) for side in a.sides for _ in range(2)] for a in chosen],
            dtype=bool,
        ).reshape(-1, len(MEASURES))

    def columns(self, cells: Sequence[CellScores], weights: Floats) -> dict[str, float | None]:
        """Means and differences to the base with intervals; `weights`: (1 + resamples) × cells."""
        place = [self.column[cell.cell] for cell in cells]
        own = self.own[:, :, place]
        return {
            **_described(own, weights, self.measured[place], ""),
            **_described(own - self.base[:, :, place], weights, self.base_measured[place], "_difference_to_base"),
        }

    def difference(self, point: Point, reference: Point | None, draws: Draws) -> dict[str, float | None]:
        """The paired difference to the reference on the subsets that both have."""
        other = reference.keyed if reference else {}
        pairs = [(cell, other[key]) for key, cell in point.keyed.items() if key in other]
        left = [self.column[cell.cell] for cell, _ in pairs]
        right = [self.column[cell.cell] for _, cell in pairs]
        weights = draws.subset_weights(len(pairs)) if pairs else np.zeros((1 + draws.resamples, 0))
        apart = self.own[:, :, left] - self.own[:, :, right]
        return _described(apart, weights, self.measured[left + right], "_difference_to_average")


def _described(values: Floats, weights: Floats, measured: NDArray[np.bool_], infix: str) -> dict[str, float | None]:
    """Mean, low and high of each measure, from 4 × (1 + resamples) × cells; None where a cell was not measured."""
    sampled = np.einsum("mrc,rc->rm", values, weights)
    low, high = percentile_interval(sampled)
    described: dict[str, float | None] = {}
    for number, measure in enumerate(MEASURES):
        known = len(measured) > 0 and bool(measured[:, number].all())
        for end, value in (("", sampled[0]), ("_low", low), ("_high", high)):
            described[f"{measure}{infix}{end}"] = float(value[number]) if known else None
    return described
