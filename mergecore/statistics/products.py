"""Inner products of all pairs of models, tensor by tensor: what angles and lengths come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergecore.plugins.block import Block
from mergecore.plugins.statistic import Result, Scope, Statistics, Sums
from mergecore.statistics.block_sums import BlockSums, State, folded
from mergecore.tensors.source import TensorInfo


class Products(BlockSums):
    """products[tensor] = (x_i · x_j) of every pair, float64 products and sums over the fixed grid."""

    name: ClassVar[str] = "products"
    scope: ClassVar[Scope] = Scope.POOL

    of: Annotated[
        Literal["weights", "deltas", "base and weights"],
        Field(description="the experts' weights, their changes of the base, or the base's weights before the experts'"),
    ] = "weights"

    @property
    def on(self) -> Literal["weights", "deltas"]:
        """What the vectors are made of."""
        return "deltas" if self.of == "deltas" else "weights"

    def look(self, state: Any, block: Block, statistics: Statistics) -> Sums:
        """Add up a product for every pair, that of a vector with itself included."""
        with_base = self.of == "base and weights"
        count = len(block.ids) + with_base
        return Sums(_multiplied, {}, count * (count + 1) // 2, with_base)

    def finish(self, state: State, selection: Mapping[str, TensorInfo], statistics: Statistics) -> Result:
        """Return the numbers {'products': {tensor: the upper triangle, row by row}}."""
        return Result({}, {"products": folded(state)})


def _multiplied(experts: Sequence[Tensor]) -> list[Tensor]:
    wide = [values.double() for values in experts]
    return [left * right for number, left in enumerate(wide) for right in wide[number:]]


def gram_of(tensor: str, count: int, statistics: Statistics) -> Tensor:
    """Return a tensor's inner products in all pairs of models, float64, (count, count); 0 where it has no elements."""
    triangle = statistics["products"][0].numbers["products"].get(tensor, [0.0] * (count * (count + 1) // 2))
    gram = torch.zeros(count, count, dtype=torch.float64)
    rows, columns = torch.triu_indices(count, count)
    gram[rows, columns] = gram[columns, rows] = torch.tensor(triangle, dtype=torch.float64)
    return gram
