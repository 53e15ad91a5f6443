"""A method that merges matrices by linear algebra, and takes the mean of everything else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from mergecore.arithmetic.linear_algebra import (
    Matrix,
    base_and_matrix,
    base_and_mean,
    by_matrix,
    keyed,
    matrix_of,
    stacks_among,
)
from mergecore.plugins.block import Block, Per
from mergecore.plugins.method import DeltaMethod
from mergecore.plugins.statistic import Statistics
from mergecore.tensors.source import TensorInfo


@dataclass(frozen=True)
class MatrixArguments:
    """matrix: rows and columns of the matrix that the tensor is, or each of a stack; None: treated like a vector."""

    matrix: Matrix | None


class MatrixMethod(DeltaMethod[MatrixArguments], ABC):
    """θ_0 + factor · X, with an X for each matrix; X of a vector is the mean task vector.

    A stack of matrices in one tensor (the fused experts of a mixture) has an X for each of them.
    """

    per: ClassVar[Per] = Per.TENSOR

    if TYPE_CHECKING:  # declared by every method, at the place among its fields where it stands on pages
        scale: float
        convolutions: Any
        excluded: Any
        stacks: Any

    @property
    def factor(self) -> float:
        """The factor of X, and of the mean task vector where a tensor is not a matrix."""
        return self.scale

    @property
    def idempotent(self) -> bool:
        return False

    def parameters(self) -> dict[str, Any]:
        """Return the fields as plain JSON. Without stacks in the model there is no key for them."""
        return keyed(super().parameters())

    def fitted(self, tensors: Mapping[str, TensorInfo]) -> Self:
        """Return the method with the patterns under which the base has stacks of matrices."""
        fitted = super().fitted(tensors)
        return fitted.model_copy(update={"stacks": stacks_among(tensors, self.stacks)})  # type: ignore[return-value]

    def arguments(self, block: Block, statistics: Statistics) -> MatrixArguments:
        return MatrixArguments(matrix_of(block.name, block.shape, self.convolutions, self.excluded, self.stacks))

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: MatrixArguments) -> Tensor:
        """Return θ_0 + factor · X, or θ_0 + factor · mean(τ_t)."""
        matrix = arguments.matrix
        if matrix is None or not self.takes(matrix, len(deltas)):
            return self.of_vector(base, deltas)
        return by_matrix(base, deltas, matrix, lambda part, parts: self._of_matrix(part, parts, matrix))

    def _of_matrix(self, base: Tensor, deltas: Sequence[Tensor], matrix: Matrix) -> Tensor:
        return base_and_matrix(base, self.change(deltas, matrix), self.factor)

    def takes(self, matrix: Matrix, count: int) -> bool:
        """Return whether `change` takes matrices of this size from so many experts."""
        return True

    def of_vector(self, base: Tensor, deltas: Sequence[Tensor]) -> Tensor:
        """Return the merged weights of a tensor that is not a matrix, float32."""
        return base_and_mean(base, deltas, self.factor)

    @abstractmethod
    def change(self, deltas: Sequence[Tensor], matrix: Matrix) -> Tensor:
        """Return X, float64 on the CPU, from the τ_t of one matrix of that many rows and columns (see `wide`)."""
