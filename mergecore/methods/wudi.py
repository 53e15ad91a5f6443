"""WUDI-Merging: the task vector that disturbs each task's own directions least (Cheng et al. 2025)."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.linear_algebra import (
    Convolutions,
    Excluded,
    Matrix,
    Stacks,
    base_and_matrix,
    base_and_mean,
    by_matrix,
    keyed,
    matrix_of,
    stacks_among,
    wide,
)
from mergecore.arithmetic.trims import folded_sum
from mergecore.checkpoints.architectures import HEADS
from mergecore.plugins.block import Block, Per
from mergecore.plugins.by_layer import Scale
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import DeltaMethod, Method
from mergecore.plugins.statistic import Statistics
from mergecore.tensors.source import TensorInfo

EMBEDDINGS = ("*embed*", "*wte.*", "*wpe.*", "*shared.weight", "*relative_attention_bias*")
"""With the heads, what the authors leave out: their argument holds for the linear maps of attention and MLP."""


@dataclass(frozen=True)
class WudiArguments:
    """matrix: rows and columns of the matrix that the tensor is, or each of a stack; None: it is no linear weight.
    transposed: its rows are inputs."""

    matrix: Matrix | None
    transposed: bool


class Wudi(DeltaMethod[WudiArguments]):
    """Find the task vector X that disturbs the tasks least: it minimises Σ ‖(X − τ_t) τ_tᵀ‖² / ‖τ_t‖².

    The search starts from Σ τ_t. Every linear weight is solved by itself.
    """

    name: ClassVar[str] = "wudi"
    paper: ClassVar[str] = (
        "Cheng et al. 2025, Whoever started the interference should end it: guiding data-free model "
        "merging via task vectors, arXiv:2503.08099"
    )
    published: ClassVar[tuple[str, ...]] = (
        "the authors' code",
        "`others: mean, steps: 400` fusion_bench's",
    )
    per: ClassVar[Per] = Per.TENSOR

    variant: Annotated[
        Literal["iterative", "closed"],
        Field(
            description=(
                "how the minimum is found: 'iterative', by Adam with few steps (the paper); 'closed', the "
                "minimum nearest to the sum, solved directly"
            )
        ),
    ] = "iterative"
    scale: Annotated[Scale, Field(description="factor of X; the authors use 1")] = 1.0
    steps: Annotated[int, Field(ge=0, description="number of steps of Adam; for 'iterative' only")] = 300
    learning_rate: Annotated[
        float,
        Field(
            gt=0,
            description=(
                "learning rate of Adam, about how far an entry moves in a step; the authors use 1e-5, for RoBERTa 2e-5"
            ),
        ),
    ] = 1e-5
    ridge: Annotated[
        float, Field(ge=0, description=("pull towards the sum, relative to the mean curvature; for 'closed' only"))
    ] = 0.0
    others: Annotated[
        Literal["base", "mean"],
        Field(
            description=(
                "what tensors get that are not linear weights: 'base', no change (the authors); 'mean', "
                "the mean task vector"
            )
        ),
    ] = "base"
    convolutions: Convolutions = "mean"
    excluded: Excluded = (*EMBEDDINGS, *HEADS)
    stacks: Stacks = None
    transposed: Annotated[
        tuple[str, ...],
        Field(description="shell patterns: weights kept as inputs × outputs, as GPT-2's Conv1D and GPT-OSS's experts"),
    ] = ()

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[{"steps": 20}, {"variant": "closed"}],
            others=[
                {
                    "steps": 20,
                    "learning_rate": 0.001,
                    "convolutions": "flatten",
                    "others": "mean",
                    "transposed": ["*.m"],
                },
                {"variant": "closed", "convolutions": "flatten"},
                {"variant": "closed", "ridge": 0.1, "others": "mean", "excluded": ["*conv"]},
            ],
        )

    def revision(self, count: int) -> int:
        return self.version + (self.scale == 0)

    @property
    def idempotent(self) -> bool:
        return False

    def parameters(self) -> dict[str, Any]:
        """Return the fields as plain JSON. Without stacks in the model there is no key for them."""
        return keyed(super().parameters())

    def fitted(self, tensors: Mapping[str, TensorInfo]) -> Method[WudiArguments]:
        """Return the method with the patterns under which the base has stacks of matrices."""
        return super().fitted(tensors).model_copy(update={"stacks": stacks_among(tensors, self.stacks)})

    def arguments(self, block: Block, statistics: Statistics) -> WudiArguments:
        return WudiArguments(
            matrix_of(block.name, block.shape, self.convolutions, self.excluded, self.stacks),
            any(fnmatch.fnmatchcase(block.name, pattern) for pattern in self.transposed),
        )

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: WudiArguments) -> Tensor:
        """Return θ_0 + scale · X."""
        if arguments.matrix is None:
            return base if self.others == "base" else base_and_mean(base, deltas, self.scale)
        matrix = arguments.matrix

        def merged(part: Tensor, parts: Sequence[Tensor]) -> Tensor:
            matrices = [wide(delta, matrix) for delta in parts]
            if not arguments.transposed:
                return base_and_matrix(part, self._minimum(matrices), self.scale)
            return base_and_matrix(part, self._minimum([values.mT for values in matrices]).mT, self.scale)

        return by_matrix(base, deltas, matrix, merged)

    def _minimum(self, deltas: Sequence[Tensor]) -> Tensor:
        """Return X (outputs × inputs) from the task vectors. The gradient of the loss is 2 (X D − N)."""
        start = folded_sum(deltas)
        # A task vector of zeros disturbs nothing and is disturbed by nothing; the authors' code divides 0 by 0 there.
        present = [delta for delta in deltas if bool(delta.any())]
        if not present:
            return start
        scaled = [delta / delta.norm() for delta in present]
        curvature = folded_sum([unit.mT @ unit for unit in scaled])
        target = folded_sum([delta @ (unit.mT @ unit) for delta, unit in zip(present, scaled, strict=True)])
        if self.variant == "closed":
            return self._closed(start, curvature, target)
        return self._iterated(start, curvature, target)

    def _closed(self, start: Tensor, curvature: Tensor, target: Tensor) -> Tensor:
        """Return Σ τ + (N − Σ τ D)(D + ρ I)⁻¹. Directions that no task vector has keep the sum's value, which is 0
        there."""
        values: Tensor
        vectors: Tensor
        values, vectors = torch.linalg.eigh(curvature)
        size, width = float(curvature.diagonal().sum()), len(values)
        # An eigenvalue is the square of a strength: below rounding squared, or below eigh's own error, it is noise.
        kept = values > max(2.0**-46, width * 2.0**-52) * size
        ridge = self.ridge * size / width
        inverse: Tensor = torch.where(kept, 1.0 / torch.where(kept, values + ridge, 1.0), 0.0)
        residual: Tensor = target - start @ curvature
        return start + (residual @ vectors * inverse) @ vectors.mT

    def _iterated(self, start: Tensor, curvature: Tensor, target: Tensor) -> Tensor:
        """Return X after Adam with its usual constants (Kingma and Ba 2015, Algorithm 1)."""
        x, mean, square = start, torch.zeros_like(start), torch.zeros_like(start)
        for step in range(1, self.steps + 1):
            gradient = 2 * (x @ curvature - target)
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient * gradient
            size = square.sqrt() / sqrt(1 - 0.999**step) + 1e-8
            x = x - self.learning_rate / (1 - 0.9**step) * mean / size
        return x
