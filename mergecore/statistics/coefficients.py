"""Coefficients of task vectors that make the merged model sure of its answers (AdaMerging, Yang et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import log
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mergecore.arithmetic.trims import agreeing, elected_sign, folded_sum
from mergecore.errors import NonFiniteError, SpecError
from mergecore.events import Event, Report
from mergecore.plugins.any_statistic import AnyStatistic
from mergecore.plugins.block import Block
from mergecore.plugins.model_statistic import (
    Inputs,
    Kept,
    Models,
    ModelStatistic,
    Out,
    Progress,
    Seen,
    Shell,
    TaskInputs,
    Use,
)
from mergecore.plugins.statistic import Result, Scope, Statistics
from mergecore.plugins.table import Groups, Table
from mergecore.statistics.fisher import differentiated
from mergecore.statistics.sign_majority import SignMajority, majority_sign
from mergecore.statistics.threshold import Threshold, Trims, trimmed_deltas, trims
from mergecore.tensors.source import TensorInfo

TABLE = "coefficients"
"""The tensor of the result: (groups, experts), float64."""
PIECE = 1 << 22
"""Elements of a tensor that are read at a time."""
UNSURE = 0.4
"""Share of ln C. Where the mean entropy at the start is above it, learning sharpens mistakes."""


@dataclass(frozen=True)
class Selected:
    """How a block of task vectors is trimmed and which sign wins where the trimmed values cancel (AdaMerging++)."""

    trims: Trims
    zero: float


def selected(deltas: Sequence[Tensor], how: Selected | None) -> list[Tensor]:
    """Return the entries of each task vector that TIES would average, without the mean; None: all of them."""
    if how is None:
        return list(deltas)
    cut = trimmed_deltas(deltas, how.trims)
    return agreeing(cut, elected_sign(cut, how.zero))


def composed(base: Tensor, deltas: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return θ_0 + Σ_t λ_t τ_t, summed in the experts' order."""
    return base + folded_sum([delta * factor for delta, factor in zip(deltas, coefficients, strict=True)])


class Coefficients(ModelStatistic):
    """λ of every group of tensors and expert, by Adam on the entropy of the merged model's answers.

    A step runs the merged model on a batch of every task, goes backwards once a batch, and takes for every tensor the
    inner products of its gradient with the task vectors: ∂L/∂λ_t = ⟨∂L/∂θ, τ_t⟩. Inputs need no labels. The published
    code minimises on test inputs; the default here is training inputs. BatchNorm layers use the batch's statistics.
    """

    name: ClassVar[str] = "coefficients"
    scope: ClassVar[Scope] = Scope.POOL
    gradients: ClassVar[bool] = True
    cost: ClassVar[str] = "which runs the merged model forwards and backwards, a batch of each task in every step"

    groups: Annotated[Groups, Field(description="which tensors share coefficients")] = Groups()
    start: Annotated[float, Field(allow_inf_nan=False, description="λ at the start")] = 0.3
    steps: Annotated[int, Field(ge=0, description="number of steps of Adam; the authors take 500")] = 500
    learning_rate: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="of Adam: about how far a λ moves in a step")
    ] = 1e-3
    batch: Annotated[
        int, Field(ge=1, description="inputs of each task in a step; the authors' code adds up two batches of 16")
    ] = 32
    clamp: Annotated[bool, Field(description="keep every λ between 0 and 1, as the authors' code does")] = True
    entropy: Annotated[
        Literal["plain", "ln_classes"],
        Field(description="'plain', as published: tasks of many classes count more; 'ln_classes', divided by ln C"),
    ] = "plain"
    density: Annotated[
        float | None,
        Field(
            gt=0, le=1, description="AdaMerging++: share of each task vector that TIES' trim keeps (0.2); none: plain"
        ),
    ] = None
    inputs: Seen = "training"
    items: Annotated[int, Field(ge=1, description="number of items of each expert's tasks")] = 256
    labels: Annotated[Literal["none"], Field(description="right answers are never looked at")] = "none"
    seed: Annotated[int, Field(ge=0, description="seed by which items and batches are drawn")] = 0

    @property
    def use(self) -> Use:
        return Use(self.inputs, self.items, self.labels, self.seed)

    def statistics(self) -> Mapping[str, AnyStatistic]:
        """Return what `how` needs to know."""
        if self.density is None:
            return {}
        majority = SignMajority(threshold=self._threshold(self.density))
        return {**majority.statistics(), "majority": majority}

    def _threshold(self, density: float) -> Threshold:
        return Threshold(density=density, count="published")

    def how(self, block: Block, statistics: Statistics) -> Selected | None:
        """Return how the task vectors of a block are trimmed."""
        if self.density is None:
            return None
        return Selected(trims(self._threshold(self.density), block, statistics), majority_sign(statistics))

    def outputs(
        self, selection: Mapping[str, TensorInfo], count: int, config: Mapping[str, Any]
    ) -> Mapping[str, TensorInfo]:
        """Return the table: a row for each group, a column for each expert."""
        return {TABLE: TensorInfo("F64", (len(self.groups.rows(selection)), count))}

    def memory(self, selection: Mapping[str, TensorInfo], count: int) -> int:
        """Return the bytes of the merged model, its gradient, and every task vector. With less, these are streamed."""
        largest = max((info.count for info in selection.values()), default=0)
        whole = count * sum(info.count for info in selection.values())
        return super().memory(selection, count) + 4 * (whole + largest + (count + 3) * min(largest, PIECE))

    def compute(
        self,
        models: Models,
        inputs: Sequence[Inputs],
        selection: Mapping[str, TensorInfo],
        statistics: Statistics,
        out: Out,
        progress: Progress,
        report: Report,
    ) -> Mapping[str, Any]:
        """Write the table. numbers: `table` as a recipe takes it, `losses` per step, `at_start` H / ln C per task."""
        tasks = [task for own in inputs for task in own.tasks]
        _check(tasks)
        merged = Merged(self, models, selection, statistics)
        shape = (len(merged.groups), len(models.experts))
        zero = {name: torch.zeros(shape, dtype=torch.float64) for name in ("mean", "square")}
        last = progress.last or Kept(
            0, {"raw": torch.full(shape, self.start, dtype=torch.float64), **zero}, {"losses": [], "at_start": {}}
        )
        state, losses, at_start = dict(last.tensors), list(last.numbers["losses"]), dict(last.numbers["at_start"])
        with merged.learning():
            for step in range(last.step, self.steps):
                merged.put(self._values(state["raw"]))
                entropies = [self._backward(task, merged.module, step) for task in tasks]
                losses.append(sum(value for value, _ in entropies))
                if step == 0:
                    at_start = {task.task: sure for task, (_, sure) in zip(tasks, entropies, strict=True)}
                state = self._stepped(state, merged.gradient(), step + 1)
                progress.keep(partial(Kept, step + 1, state, {"losses": losses, "at_start": at_start}))
                report(Event(f"learn coefficients, loss {losses[-1]:.4f}", step + 1, self.steps, "steps"))
        values = self._values(state["raw"])
        out.write(TABLE, values)
        return {**self._numbers(values, selection), "losses": losses, "at_start": at_start}

    def _values(self, raw: Tensor) -> Tensor:
        """Return λ of the numbers that Adam changes."""
        return raw.clamp(0, 1) if self.clamp else raw

    def _stepped(self, state: Mapping[str, Tensor], gradient: Tensor, step: int) -> dict[str, Tensor]:
        """Return the state after a step of Adam with its usual constants (Kingma and Ba 2015, Algorithm 1)."""
        raw = state["raw"]
        if self.clamp:
            gradient = torch.where((raw >= 0) & (raw <= 1), gradient, 0.0)
        mean = 0.9 * state["mean"] + 0.1 * gradient
        square = 0.999 * state["square"] + 0.001 * gradient * gradient
        size = (square / (1 - 0.999**step)).sqrt() + 1e-8
        return {"raw": raw - self.learning_rate * (mean / (1 - 0.9**step)) / size, "mean": mean, "square": square}

    def _backward(self, task: TaskInputs, module: nn.Module, step: int) -> tuple[float, float]:
        """Add the gradient of a task's loss. Return the loss, and its mean entropy as a share of ln C."""
        logits = task.logits(module, task.batch(step, self.batch, self.seed))
        entropy, most = mean_entropy(logits), log(task.classes or logits.shape[-1])
        if not bool(entropy.isfinite()):
            raise NonFiniteError(
                f"task '{task.task}', step {step + 1}: the entropy of the merged model's answers is {entropy.item()}; "
                "look at the inputs and the experts, or take a smaller learning_rate or `clamp: true`"
            )
        loss = entropy / most if self.entropy == "ln_classes" else entropy
        torch.autograd.backward(loss)
        return loss.item(), entropy.item() / most

    def _numbers(self, values: Tensor, selection: Mapping[str, TensorInfo]) -> dict[str, Any]:
        rows = {group: tuple(row) for group, row in zip(self.groups.rows(selection), values.tolist(), strict=True)}
        return {"table": Table(groups=self.groups, rows=rows).model_dump(mode="json", exclude_defaults=True)}

    def noted(self, numbers: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the table, the first and last loss, and a warning of tasks of which the start was unsure."""
        losses, unsure = numbers["losses"], {t: s for t, s in numbers["at_start"].items() if s > UNSURE}
        loss = {"loss": {"first": losses[0], "last": losses[-1], "steps": len(losses)}} if losses else {}
        if not unsure:
            return {"coefficients": numbers["table"], **loss}
        told = ", ".join(f"{task} {share:.2f}" for task, share in unsure.items())
        warning = (
            f"at the start of learning the merged model was unsure of its answers: mean entropy as a share of ln C, "
            f"{told}, is above {UNSURE}. From there learning may sharpen mistakes; compare the model with "
            "task_arithmetic"
        )
        return {"coefficients": numbers["table"], **loss, "warnings": [warning]}

    def taken(self, tensors: Mapping[str, Tensor], selection: Mapping[str, TensorInfo]) -> Result:
        """Return a table that was learned elsewhere, (groups, experts)."""
        result = super().taken(tensors, selection)
        groups, values = self.groups.rows(selection), result.tensors[TABLE].to(torch.float64)
        if values.ndim != 2 or len(values) != len(groups):
            raise SpecError(
                f"statistics: '{TABLE}' has shape {list(values.shape)}; give a row for each of {len(groups)} groups"
            )
        return Result({TABLE: values}, self._numbers(values, selection))


def mean_entropy(logits: Tensor) -> Tensor:
    """Return the mean over items of H = −Σ p log p, in nats. An answer with logit −∞ is none."""
    scores = logits.log_softmax(-1)
    chances = scores.exp()
    return -(chances * scores.masked_fill(scores == -torch.inf, 0.0)).sum(-1).mean()


def _check(tasks: Sequence[TaskInputs]) -> None:
    """Raise SpecError where a task cannot be learned from."""
    for task in tasks:
        if task.classes is not None and task.classes < 2:
            raise SpecError(
                f"task '{task.task}' has {task.classes} class: its entropy is 0 for any model; leave it out"
            )


class Merged:
    """The merged model in its shell: takes coefficients, and gives the gradient with respect to them."""

    def __init__(
        self, statistic: Coefficients, models: Models, selection: Mapping[str, TensorInfo], statistics: Statistics
    ) -> None:
        self.groups = statistic.groups.rows(selection)
        self._models, self._selection = models, selection
        self._row = {name: self.groups.index(statistic.groups.of(name)) for name in selection}
        self._how = {
            name: statistic.how(
                Block(name, info.shape, 0, info.count, None, (), ("",) * len(models.experts)), statistics
            )
            for name, info in selection.items()
        }
        wanted = statistic.memory(selection, len(models.experts))
        fits = models.memory is None or models.memory >= wanted
        self._known: dict[tuple[str, int], list[Tensor]] | None = {} if fits else None
        shell: Shell = models.shell()
        shell.swap(models.base)
        self.module, self._slots = shell.module, shell.slots(selection)
        state = shell.module.state_dict(keep_vars=True)
        self._parameters = {slot.parameter: state[slot.parameter] for slot in self._slots.values()}

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Require gradients where experts differ; let BatchNorm use its batch. Afterwards all is as before."""
        norms = [module for module in self.module.modules() if isinstance(module, _BatchNorm)]
        before = [norm.track_running_stats for norm in norms]
        for norm in norms:
            norm.train()
            norm.track_running_stats = False
        try:
            wanted = [value for value in self._parameters.values() if isinstance(value, nn.Parameter)]
            with differentiated(self.module, wanted):
                yield
        finally:
            for norm, tracked in zip(norms, before, strict=True):
                norm.track_running_stats = tracked
                norm.eval()
            self.module.zero_grad(set_to_none=True)

    def put(self, values: Tensor) -> None:
        """Put θ_0 + Σ λ_t τ_t in, and forget the gradient. values: (groups, experts)."""
        self.module.zero_grad(set_to_none=True)
        for name, info in self._selection.items():
            row = values[self._row[name]].tolist()
            merged = torch.empty(info.count)
            for start, stop in _pieces(info.count):
                base = self._models.base.read(name, start, stop).to(torch.float32)
                merged[start:stop] = composed(base, self._deltas(name, start, stop), row)
            slot = self._slots[name]
            slot.of(self._parameters[slot.parameter].data).copy_(merged.view(info.shape))

    def gradient(self) -> Tensor:
        """Return ⟨∂L/∂θ, τ_t⟩ of every group, (groups, experts), in float64."""
        total = torch.zeros(len(self.groups), len(self._models.experts), dtype=torch.float64)
        for name, info in self._selection.items():
            slot = self._slots[name]
            of_parameter = self._parameters[slot.parameter].grad
            if of_parameter is None:
                continue
            flat = slot.of(of_parameter).reshape(-1)
            for start, stop in _pieces(info.count):
                piece = flat[start:stop].double()
                for expert, delta in enumerate(self._deltas(name, start, stop)):
                    total[self._row[name], expert] += torch.dot(piece, delta.double())
        return total

    def _deltas(self, name: str, start: int, stop: int) -> list[Tensor]:
        """Return a piece of every task vector, trimmed where that is asked for."""
        if self._known is not None and (name, start) in self._known:
            return self._known[name, start]
        every = range(len(self._models.experts))
        deltas = selected([self._models.delta(expert, name, start, stop) for expert in every], self._how[name])
        if self._known is not None:
            self._known[name, start] = deltas
        return deltas


def _pieces(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, PIECE):
        yield start, min(start + PIECE, count)
