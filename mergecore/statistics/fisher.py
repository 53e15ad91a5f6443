"""Diagonal Fisher information of an expert: Matena & Raffel 2022, "Merging Models with Fisher-Weighted Averaging"."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mergecore.arithmetic.linear_algebra import squared_norm
from mergecore.errors import CapacityError, MismatchError, NonFiniteError, SpecError
from mergecore.events import Event, Report
from mergecore.identity.draws import random_key, random_words
from mergecore.plugins.model_statistic import Calibration, Inputs, Models, ModelStatistic, Out, Progress, Use
from mergecore.plugins.statistic import Result, Scope, Statistics
from mergecore.tensors.source import TensorInfo

_MOST_CLASSES = 4096
"""An exact expectation takes a backward pass for every class and position: for a vocabulary this would take days."""


class DiagonalFisher(ModelStatistic):
    """F_j = mean over positions of E_{y ~ p(y|x)} [(∂ log p(y|x) / ∂θ_j)²]: squared gradients, never averaged ones.

    estimator: 'sampled' draws one label per position from the model; 'exact' sums over all classes, weighted with p;
    'empirical' takes the true labels (which is not the Fisher information, and is called so by name only).
    samples: how many training items are looked at (fewer where the data hold fewer). seed: of items and drawn labels.
    batch: 'item' squares the gradient of one item, summed over its positions; 'batch' that of `batch_size` items, one
    backward pass for all. Both leave cross terms between positions that are zero in expectation when labels are drawn
    independently from the model (E[∂ log p] = 0) and only then: unbiased for 'sampled', noisier the larger the group;
    'batch' is refused for the others, and for them every position is squared alone.

    Sums are kept in float32: N ≤ some thousand terms of one sign lose at most N·2⁻²⁴ of their value, far below the
    sampling noise, and float64 would cost another 8 bytes a parameter. Norms are summed in float64.
    """

    name: ClassVar[str] = "fisher"
    scope: ClassVar[Scope] = Scope.EXPERT
    gradients: ClassVar[bool] = True
    own_tasks: ClassVar[bool] = False

    estimator: Annotated[
        Literal["sampled", "exact", "empirical"],
        Field(
            description=(
                "which labels are used: 'sampled', drawn from the model; 'exact', all classes, weighted "
                "by the model; 'empirical', the true labels"
            )
        ),
    ] = "sampled"
    samples: Annotated[int, Field(ge=1, description="number of training items")] = 64
    seed: Annotated[int, Field(ge=0, description="seed of the items and of the drawn labels")] = 0
    batch: Annotated[
        Literal["item", "batch"],
        Field(
            description=("what a squared gradient is taken of: 'item', one item; 'batch', `batch_size` items together")
        ),
    ] = "item"
    batch_size: Annotated[int, Field(ge=1, description="number of items in a backward pass, for batch 'batch'")] = 8

    @model_validator(mode="after")
    def _unbiased(self) -> DiagonalFisher:
        if self.batch == "batch" and self.estimator != "sampled":
            raise ValueError(
                "batch: 'batch' is unbiased for labels drawn from the model alone, not for estimator "
                f"'{self.estimator}'; use batch: item"
            )
        return self

    def taken(self, tensors: Mapping[str, Tensor], selection: Mapping[str, TensorInfo]) -> Result:
        """Return F as it was worked out elsewhere, with its norms."""
        missing = sorted(set(selection) - set(tensors))
        if missing:
            raise SpecError(f"statistics: nothing given for tensor '{missing[0]}' and {len(missing) - 1} more")
        norms = {name: squared_norm(tensors[name]) for name in selection}
        return Result(tensors=tensors, numbers={"squared_norm": norms})

    @property
    def use(self) -> Use:
        """The places that it looks at are those of the right answer, so labels count as used."""
        return Use("training", self.samples, "used", self.seed)

    def outputs(
        self, selection: Mapping[str, TensorInfo], count: int, config: Mapping[str, Any]
    ) -> Mapping[str, TensorInfo]:
        """Return F of every tensor, float32, in its shape."""
        return {name: TensorInfo("F32", info.shape) for name, info in selection.items()}

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
        """Write F of the expert; the numbers are those of `estimate`."""
        shell = models.shell()
        shell.swap(models.experts[0])
        result = self.estimate(shell.module, inputs[0].answered, selection, report)
        for name, values in result.tensors.items():
            out.write(name, values)
        return result.numbers

    def estimate(
        self, model: nn.Module, data: Calibration, selection: Mapping[str, TensorInfo], report: Report
    ) -> Result:
        """Return F, float32, for every tensor of the selection, in its shape. Buffers have no gradient and get zeros.

        numbers: items, positions, squared_norm {name: Σ F², float64}, without_gradient [names]. Raises MismatchError
        for a tensor that the model lacks, NonFiniteError naming the tensor, CapacityError for too many classes.
        """
        parameters = _selected_parameters(model, selection)
        sums = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        count, positions = min(self.samples, len(data)), 0
        size = self.batch_size if self.batch == "batch" else 1
        with differentiated(model, parameters.values()):
            for start in range(0, count, size):
                items = range(start, min(start + size, count))
                logits = data.logits(model, items)
                positions += sum(len(rows) for rows in logits)
                for weight, objective in self._objectives(logits, data, items):
                    self._add(sums, parameters, weight, objective)
                report(Event("Fisher information", items.stop, count, "items"))
        tensors = {name: sums[name].div_(max(positions, 1)).cpu() for name in parameters}
        return self._result(tensors, selection, count, positions)

    def _objectives(
        self, logits: Sequence[Tensor], data: Calibration, items: Sequence[int]
    ) -> Iterator[tuple[float, Tensor]]:
        """Yield (weight, scalar): weight times the squared gradient of the scalar is added to the sum."""
        scores = [rows.log_softmax(-1) for rows in logits]
        if self.estimator == "sampled":
            drawn = (self._drawn(rows.detach(), item) for rows, item in zip(scores, items, strict=True))
            yield 1.0, torch.stack([_at(rows, labels) for rows, labels in zip(scores, drawn, strict=True)]).sum()
        elif self.estimator == "empirical":
            for rows, labels in zip(scores, data.labels(items), strict=True):
                for position, label in enumerate(labels.tolist()):
                    yield 1.0, rows[position, label]
        else:
            for rows in scores:
                if rows.shape[-1] > _MOST_CLASSES:
                    raise CapacityError(
                        f"the exact Fisher over {rows.shape[-1]} classes takes as many backward passes for every "
                        "position; use estimator: sampled"
                    )
                for position, chances in enumerate(rows.detach().exp().tolist()):
                    for label, chance in enumerate(chances):
                        yield chance, rows[position, label]

    def _drawn(self, scores: Tensor, item: int) -> Tensor:
        """Return one label per position, shape (positions,), drawn from p = exp(scores) by (seed, item, position)."""
        words = random_words(random_key(self.seed, "fisher", f"item {item}"), 0, len(scores), scores.device)
        uniform = (words.double() + 2**31 + 0.5) / 2**32
        cumulated = scores.double().exp().cumsum(-1)
        classes = torch.searchsorted(cumulated, (uniform * cumulated[:, -1])[:, None])
        return classes[:, 0].clamp(max=scores.shape[-1] - 1)

    def _add(self, sums: dict[str, Tensor], parameters: Mapping[str, Tensor], weight: float, objective: Tensor) -> None:
        gradients = torch.autograd.grad(
            objective, list(parameters.values()), retain_graph=self.estimator != "sampled", allow_unused=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                sums[name].addcmul_(gradient, gradient, value=weight)

    def _result(
        self, tensors: dict[str, Tensor], selection: Mapping[str, TensorInfo], count: int, positions: int
    ) -> Result:
        for name, value in tensors.items():
            if not torch.isfinite(value).all():
                raise NonFiniteError(
                    f"the Fisher information of tensor '{name}' is not finite; check the expert's weights"
                )
        missing = [name for name in selection if name not in tensors]
        zeros = {name: torch.zeros(selection[name].shape) for name in missing}
        every = tensors | zeros
        norms = {name: float(value.double().square().sum()) for name, value in every.items()}
        numbers = {"items": count, "positions": positions, "squared_norm": norms, "without_gradient": missing}
        return Result(tensors={name: every[name] for name in selection}, numbers=numbers)


def _at(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the sum over positions of the label's log-probability."""
    return scores.gather(-1, labels.to(scores.device)[:, None]).sum()


def _selected_parameters(model: nn.Module, selection: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """Return the selected parameters of the model, without buffers. Raises MismatchError for what the model lacks."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    known = set(parameters) | {name for name, _ in model.named_buffers()}
    for name, info in selection.items():
        if name not in known:
            raise MismatchError(
                f"the Fisher information of tensor '{name}' is asked for, which {type(model).__name__} lacks"
            )
        if name in parameters and tuple(parameters[name].shape) != info.shape:
            raise MismatchError(
                f"tensor '{name}' is {info.shape} in the selection, {tuple(parameters[name].shape)} here"
            )
    return {name: parameters[name] for name in selection if name in parameters}


@contextmanager
def differentiated(model: nn.Module, wanted: Iterable[Tensor]) -> Iterator[None]:
    """Require gradients for the wanted parameters only; afterwards as before."""
    chosen = {id(tensor) for tensor in wanted}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
