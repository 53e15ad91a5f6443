"""How the scores of a cell become its four measures: held-in and held-out, raw and normalised, with what stood in the
way.

Source: Yadav et al. 2024, "What Matters for Model Merging at Scale?": a ratio per task, the mean of the ratios within
a category, then the mean over categories. Neither a flat mean over tasks nor a ratio of means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergecore.errors import EvaluationError
from mergecore.reporting.bootstrap import Draws, Floats
from mergecore.reporting.scales import higher_is_better, shown
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

    def __init__(self, sweep: Sweep, split: str) -> None:
        self.suite = sweep.suite
        self.cells = {cell.cell: cell for cell in sweep.cells}
        self.items = {cell.cell: cell.items.get(split, {}) for cell in sweep.cells}
        self.chance, self.scales = sweep.chance, sweep.scales
        self.split = split
        self.base = next((cell.cell for cell in sweep.cells if cell.kind == "base"), None)
        self.experts = {cell.name: cell.cell for cell in sweep.cells if cell.kind == "expert"}
        self._check_items()
        self._means = {
            (cell, task): float(self._shown(task, np.mean(scores))) if np.isfinite(scores).all() else float("nan")
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

    def _shown(self, task: str, means: Any) -> Any:
        with np.errstate(over="ignore"):  # the perplexity of a broken model is infinite, and said to be
            return shown(self.scales.get(task, "mean"), means)

    def _higher(self, task: str) -> bool:
        return higher_is_better(self.scales.get(task, "mean"))

    def mean(self, cell: str, task: str) -> float | None:
        """The score of a cell on a task as it is shown: the mean over the items, a perplexity …

        NaN where an item is not finite, None where it was not measured.
        """
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
        sign = 1 if self._higher(task) else -1
        return self.experts[max(means, key=lambda expert: sign * means[expert])], ""

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
            elif task not in self.chance and not self._higher(task) and self._means.get((cell.cell, task), 1.0) <= 0:
                unknown.append(f"{task}: this cell scores 0 where lower is better, by which nothing can be divided")
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
        chance = self.chance.get(task)
        if chance is None:
            return f"{task}: '{name}' scores {mean:.3g}, which cannot be divided by" if mean <= 0 else ""
        above = mean - chance if self._higher(task) else chance - mean
        return "" if above > 0 else f"{task}: '{name}' scores {mean:.3g}, not better than chance ({chance:.3g})"

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
                rows = slice(2 * number, 2 * number + 2)
                self._add(own[rows], means, sides, task, numerators, order)
                self._add(base[rows], means, sides, task, np.full_like(numerators, base_column), order)
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
        """Scores of a task as they are shown, (1 + resamples) × (all cells + one that is always NaN).

        NaN where absent.
        """
        means = np.full((1 + draws.resamples, len(order) + 1), np.nan)
        present = [cell for cell in cells if task in self.items[cell]]
        if present:
            scores = np.stack([np.asarray(self.items[cell][task], dtype=np.float64) for cell in present], axis=1)
            scores[:, ~np.isfinite(scores).all(axis=0)] = np.nan
            means[:, [order[cell] for cell in present]] = draws.task_means(task, scores)
        return np.asarray(self._shown(task, means))

    def _add(
        self,
        total: Floats,
        means: Floats,
        sides: Sequence[Side],
        task: str,
        numerators: NDArray[np.intp],
        order: Mapping[str, int],
    ) -> None:
        """Add one task's share to the raw and the normalised mean (2 × (1 + resamples) × cells) of every cell, in
        place.
        """
        raw = [column for column, side in enumerate(sides) if task in side.weights]
        total[0][:, raw] += means[:, numerators[raw]] * np.array([sides[column].weights[task] for column in raw])
        divided = [column for column, side in enumerate(sides) if task in side.ratios]
        reference = means[:, [order[sides[column].denominators[task]] for column in divided]]
        ratio = self._ratio(task, means[:, numerators[divided]], reference)
        total[1][:, divided] += ratio * np.array([sides[column].ratios[task] for column in divided])

    def _ratio(self, task: str, own: Floats, reference: Floats) -> Floats:
        """Return how good scores are against those of the reference, 1 where they are equal, more where they are
        better.

        The level of chance is subtracted from both. Without one, a ratio is turned over where lower is better. NaN
        where the reference is no better than chance, or nothing can be divided by.
        """
        if task in self.chance:
            sign = 1.0 if self._higher(task) else -1.0
            above, below = sign * (own - self.chance[task]), sign * (reference - self.chance[task])
        else:
            above, below = (own, reference) if self._higher(task) else (reference, own)
        return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
