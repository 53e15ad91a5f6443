"""How the scores of a cell become its four measures: held-in and held-out, raw and normalised, with what stood in the
way.

Source: Yadav et al. 2024, "What Matters for Model Merging at Scale?": a ratio per task, the mean of the ratios within
a category, then the mean over categories. Neither a flat mean over tasks nor a ratio of means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergecore.errors import EvaluationError
from mergecore.reporting.bootstrap import Draws, Floats
from mergecore.reporting.scores import CellScores, Sweep

MEASURES = ("held_in_raw", "held_in_normalised", "held_out_raw", "held_out_normalised")


@dataclass(frozen=True)
class Side:
    """What one cell is averaged over on one side, held-in or held-out.

    weights: task → share of the raw mean. ratios: task → share of the normalised mean, where its denominator can be
    trusted. denominators: task → the cell it is divided by. missing: tasks not measured here. unknown: why there is
    no normalised mean at all. unreliable: tasks kept out of the normalised mean, and why.
    """

    weights: Mapping[str, float]
    ratios: Mapping[str, float]
    denominators: Mapping[str, str]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    unreliable: tuple[str, ...]

    @property
    def measured(self) -> bool:
        """Whether there is at least one task and each one has scores."""
        return bool(self.weights) and not self.missing


@dataclass(frozen=True)
class CellMeans:
    """How one cell is averaged on one split."""

    cell: str
    held_in: Side
    held_out: Side

    @property
    def sides(self) -> tuple[Side, Side]:
        """Held-in, held-out: the order of MEASURES."""
        return self.held_in, self.held_out

    @property
    def measured(self) -> tuple[bool, ...]:
        """For each of MEASURES, whether its tasks have been measured (a normalised one may still be NaN)."""
        return tuple(side.measured for side in self.sides for _ in range(2))

    @property
    def unreliable(self) -> tuple[str, ...]:
        """Every reason why a task, or a normalised mean, is NaN."""
        return tuple(text for side in self.sides if side.measured for text in (*side.unknown, *side.unreliable))


def category_weights(categories: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """Task → its share of the mean over categories of the means over tasks; categories without a task do not count."""
    filled = {category: tuple(tasks) for category, tasks in categories.items()}
    filled = {category: tasks for category, tasks in filled.items() if tasks}
    weights: dict[str, float] = {}
    for tasks in filled.values():
        for task in tasks:
            weights[task] = weights.get(task, 0.0) + 1.0 / (len(filled) * len(tasks))
    return weights


class SplitScores:
    """The items of a sweep on one split, and how each of its cells is averaged.

    chance: task → the score of guessing; a denominator below it (or not above 0) is not divided by.
    Raises EvaluationError where two cells have different numbers of items for a task.
    """

    def __init__(self, sweep: Sweep, split: str, chance: Mapping[str, float]) -> None:
        self.suite = sweep.suite
        self.cells = {cell.cell: cell for cell in sweep.cells}
        self.items = {cell.cell: cell.items.get(split, {}) for cell in sweep.cells}
        self.chance = chance
        self.split = split
        self.base = next((cell.cell for cell in sweep.cells if cell.kind == "base"), None)
        self.experts = {cell.name: cell.cell for cell in sweep.cells if cell.kind == "expert"}
        self._check_items()
        self._means = {
            (cell, task): float(np.mean(scores)) if np.isfinite(scores).all() else float("nan")
            for cell, tasks in self.items.items()
            for task, scores in tasks.items()
        }

    def _check_items(self) -> None:
        seen: dict[str, tuple[int, str]] = {}
        for cell, tasks in self.items.items():
            for task, scores in tasks.items():
                size, other = seen.setdefault(task, (len(scores), cell))
                if len(scores) != size or size == 0:
                    raise EvaluationError(
                        f"task '{task}' ({self.split}): cell {cell} has {len(scores)} items, cell {other} has {size}; "
                        "cells can only be compared on the same items, evaluate them again with one limit"
                    )

    def mean(self, cell: str, task: str) -> float | None:
        """Mean over the items of a task, NaN where an item is not finite, None where it was not measured."""
        return self._means.get((cell, task))

    def average(self, cell: CellScores) -> CellMeans:
        """How the cell is averaged: its own experts' tasks held-in, all tasks held-out."""
        pooled = cell.kind in ("base", "multitask")
        own = tuple(self.experts) if pooled else cell.experts or (cell.name,)
        trained = {task for expert in own for task in self.suite.trained_for.get(expert, ())}
        held_in = {
            category: tuple(task for task in tasks if pooled or task in trained)
            for category, tasks in self.suite.held_in.items()
        }
        rivals = {
            task: tuple(expert for expert in own if task in self.suite.trained_for.get(expert, ()))
            for tasks in held_in.values()
            for task in tasks
        }
        best = {task: self._best_expert(experts, task) for task, experts in rivals.items() if experts}
        base = {task: self._base(task) for tasks in self.suite.held_out.values() for task in tasks}
        return CellMeans(cell.cell, self._side(cell, held_in, best), self._side(cell, self.suite.held_out, base))

    def _best_expert(self, experts: Sequence[str], task: str) -> tuple[str | None, str]:
        """The cell of the expert that is best on all items of the task, or None and why it is not known."""
        means: dict[str, float] = {}
        for expert in experts:
            mean = self.mean(self.experts[expert], task) if expert in self.experts else None
            if mean is None:  # the best of the others would be another denominator tomorrow
                return None, f"{task}: expert '{expert}' has no {self.split} scores to divide by"
            means[expert] = mean
        return self.experts[max(means, key=lambda expert: means[expert])], ""

    def _base(self, task: str) -> tuple[str | None, str]:
        if self.base is None or self.mean(self.base, task) is None:
            return None, f"{task}: the base has no {self.split} scores to divide by"
        return self.base, ""

    def _side(
        self,
        cell: CellScores,
        categories: Mapping[str, Iterable[str]],
        divisors: Mapping[str, tuple[str | None, str]],
    ) -> Side:
        weights = category_weights(categories)
        missing = tuple(task for task in weights if task not in self.items[cell.cell])
        unknown: list[str] = []
        unreliable: dict[str, str] = {}
        denominators: dict[str, str] = {}
        for task in weights:
            if task not in divisors:
                unreliable[task] = f"{task}: no expert was trained for it, so there is nothing to divide by"
                continue
            divisor, reason = divisors[task]
            if divisor is None:
                unknown.append(reason)
                continue
            denominators[task] = divisor
            if complaint := self._complaint(divisor, task):
                unreliable[task] = complaint
            elif np.isnan(self._means.get((cell.cell, task), 0.0)):
                unknown.append(f"{task}: the scores of this cell are not all finite")
        trusted = {
            category: tuple(task for task in tasks if task not in unreliable) for category, tasks in categories.items()
        }
        ratios = {} if unknown else category_weights(trusted)
        return Side(weights, ratios, denominators, missing, tuple(unknown), tuple(unreliable.values()))

    def _complaint(self, divisor: str, task: str) -> str:
        """Why the score of cell `divisor` on the task must not be divided by, or '' where it may."""
        mean, name = self.mean(divisor, task), self.cells[divisor].name
        if mean is None or not np.isfinite(mean):
            return f"{task}: the scores of '{name}' to divide by are not all finite"
        if mean <= 0:
            return f"{task}: '{name}' scores {mean:.3g}, which cannot be divided by"
        if mean < self.chance.get(task, 0.0):
            return f"{task}: '{name}' scores {mean:.3g}, below chance ({self.chance[task]:.3g})"
        return ""

    def resampled(self, averages: Sequence[CellMeans], draws: Draws) -> tuple[Floats, Floats]:
        """The MEASURES of each cell, 4 × (1 + resamples) × cells, and those of the base on the same tasks.

        The second array divides the base by the denominators of each cell: what the base has to be compared with.
        NaN where a task is missing or no denominator can be trusted.
        """
        shape = (len(MEASURES), 1 + draws.resamples, len(averages))
        own, base = np.zeros(shape), np.zeros(shape)
        order = {cell: column for column, cell in enumerate(self.items)}
        absent = len(order)
        numerators = np.array([order[average.cell] for average in averages], dtype=np.intp)
        base_column = absent if self.base is None else order[self.base]
        needed = self._needed(averages)
        for task in dict.fromkeys(task for average in averages for side in average.sides for task in side.weights):
            means = self._task_means(task, [cell for cell in order if cell in needed], order, draws)
            for number in range(2):
                sides = [average.sides[number] for average in averages]
                _add(own[2 * number : 2 * number + 2], means, sides, task, numerators, order)
                _add(
                    base[2 * number : 2 * number + 2], means, sides, task, np.full_like(numerators, base_column), order
                )
        for column, average in enumerate(averages):
            for number, side in enumerate(average.sides):
                for measure, shares in enumerate((side.weights, side.ratios)):
                    if not shares:
                        own[2 * number + measure, :, column] = base[2 * number + measure, :, column] = np.nan
        return own, base

    def _needed(self, averages: Sequence[CellMeans]) -> set[str]:
        needed = {average.cell for average in averages} | ({self.base} if self.base is not None else set())
        return needed.union(*(side.denominators.values() for average in averages for side in average.sides))

    def _task_means(self, task: str, cells: Sequence[str], order: Mapping[str, int], draws: Draws) -> Floats:
        """Means over the items of a task, (1 + resamples) × (all cells + one that is always NaN); NaN where absent."""
        means = np.full((1 + draws.resamples, len(order) + 1), np.nan)
        present = [cell for cell in cells if task in self.items[cell]]
        if present:
            scores = np.stack([np.asarray(self.items[cell][task], dtype=np.float64) for cell in present], axis=1)
            scores[:, ~np.isfinite(scores).all(axis=0)] = np.nan
            means[:, [order[cell] for cell in present]] = draws.task_means(task, scores)
        return means


def _add(
    total: Floats,
    means: Floats,
    sides: Sequence[Side],
    task: str,
    numerators: NDArray[np.intp],
    order: Mapping[str, int],
) -> None:
    """Add one task's share to the raw and the normalised mean (2 × (1 + resamples) × cells) of every cell, in place."""
    raw = [column for column, side in enumerate(sides) if task in side.weights]
    total[0][:, raw] += means[:, numerators[raw]] * np.array([sides[column].weights[task] for column in raw])
    divided = [column for column, side in enumerate(sides) if task in side.ratios]
    below = means[:, [order[sides[column].denominators[task]] for column in divided]]
    above = means[:, numerators[divided]]
    ratio = np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
    total[1][:, divided] += ratio * np.array([sides[column].ratios[task] for column in divided])
