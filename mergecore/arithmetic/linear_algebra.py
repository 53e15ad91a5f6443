"""Linear algebra that per-tensor methods share: pure functions of tensors, in float64 on the CPU.

Why float64: deltas are about 1e-4 of the weights and are formed in float32, so their float32 rounding is noise.
Ranks, angles and polar factors of nearly parallel bases need arithmetic far more exact than that. Why the CPU:
the engine uses one thread there, and a factorisation by two threads differs in its last bits from one by one thread.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergecore.checkpoints.architectures import STACKED
from mergecore.tensors.source import TensorInfo

BLOCK = 1 << 15
"""Elements of every tensor that are widened at a time: their float64 copies stay in the processor's cache."""
ROUNDING = 2.0**-23
"""Float32's spacing at 1: the error of a delta, relative to its Frobenius norm."""

Convolutions = Annotated[
    Literal["mean", "flatten"],
    Field(
        description="tensors of three or more dimensions that are no stacks: 'mean' treats them like vectors (the "
        "authors' code), 'flatten' as matrices of one row per output channel"
    ),
]
Rank = Annotated[
    Literal["numerical", "full"],
    Field(
        description=(
            "'numerical' leaves out singular directions below rounding error, because they are "
            "arbitrary; 'full' takes all directions, as published, and their content then depends on "
            "the linear algebra library"
        )
    ),
]
Excluded = Annotated[
    tuple[str, ...], Field(description=("shell patterns over tensor names: these matrices are treated like vectors"))
]
Stacks = Annotated[
    tuple[str, ...] | None,
    Field(
        description="shell patterns over names: tensors of three dimensions that are stacks of matrices, each merged "
        "by itself, as the fused experts of a mixture; none: by the names that such experts have"
    ),
]
Matrix = tuple[int, int]
"""Rows (outputs) and columns (inputs)."""


def matrix_of(
    name: str,
    shape: Sequence[int],
    convolutions: Convolutions,
    excluded: Sequence[str],
    stacks: Sequence[str] | None = None,
) -> Matrix | None:
    """Return the matrix that a tensor is, or that each of a stack is.

    None for vectors, scalars, empty tensors, and what counts as a vector.
    """
    count = math.prod(shape)
    if len(shape) < 2 or count == 0 or _named(name, excluded):
        return None
    if len(shape) == 3 and _named(name, STACKED if stacks is None else stacks):
        return shape[1], shape[2]
    return None if len(shape) > 2 and convolutions == "mean" else (shape[0], count // shape[0])


def stacks_among(tensors: Mapping[str, TensorInfo], stacks: Sequence[str] | None) -> tuple[str, ...]:
    """Return the patterns (None: those of known names) under which a model has a stack of matrices."""
    threefold = [name for name, info in tensors.items() if len(info.shape) == 3]
    patterns = STACKED if stacks is None else stacks
    return tuple(pattern for pattern in patterns if any(fnmatch.fnmatchcase(name, pattern) for name in threefold))


def keyed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a plug-in, without `stacks` where it has none: keys then stay what they were."""
    return {key: value for key, value in parameters.items() if key != "stacks" or value}


def _named(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def by_matrix(
    base: Tensor, deltas: Sequence[Tensor], matrix: Matrix, merged: Callable[[Tensor, Sequence[Tensor]], Tensor]
) -> Tensor:
    """Return what `merged` makes of each matrix of a stack, in the base's shape. A matrix is a stack of one."""
    stacks = [tensor.reshape(-1, *matrix) for tensor in (base, *deltas)]
    parts = [merged(stacks[0][number], [stack[number] for stack in stacks[1:]]) for number in range(len(stacks[0]))]
    return torch.stack(parts).reshape(base.shape)


def wide(tensor: Tensor, matrix: Matrix) -> Tensor:
    """Return the tensor as a float64 matrix on the CPU."""
    return tensor.to("cpu", torch.float64).reshape(matrix)


def blocks(tensors: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield the flattened tensors in float64, BLOCK elements at a time."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), BLOCK):
        part = slice(start, start + BLOCK)
        yield part, [values[part].to(torch.float64) for values in flat]


def squared_norm(tensor: Tensor) -> float:
    """Return Σ v² in float64 over blocks, folded in order."""
    total = 0.0
    for _, (values,) in blocks([tensor]):
        total += float((values * values).sum())
    return total


@dataclass(frozen=True)
class Shares:
    """How much of each model, where a tensor of the result is Σ c_i x_i."""

    shares: Sequence[float] = ()


def combined(shares: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Return Σ c_i x_i, element by element: folded left in float64, rounded once to float32."""
    total = tensors[0].double() * shares[0]
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        total = total + tensor.double() * share
    return total.float()


def combination(coefficients: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Return `combined` of whole tensors, in their shape."""
    result = torch.empty(tensors[0].numel(), dtype=torch.float32, device=tensors[0].device)
    for part, values in blocks(tensors):
        result[part] = combined(coefficients, values)
    return result.reshape(tensors[0].shape)


def row_combination(coefficients: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return Σ c_i x_i row by row, in the tensors' shape. coefficients: float64, (tensors, rows)."""
    rows = [tensor.reshape(coefficients.shape[1], -1) for tensor in tensors]
    result = torch.empty(rows[0].shape, dtype=torch.float32, device=rows[0].device)
    step = max(1, BLOCK // max(rows[0].shape[1], 1))
    for start in range(0, len(rows[0]), step):
        part = slice(start, start + step)
        total = torch.zeros(rows[0][part].shape, dtype=torch.float64, device=result.device)
        for of_tensor, shares in zip(rows, coefficients.to(result.device), strict=True):
            total = total + of_tensor[part].to(torch.float64) * shares[part, None]
        result[part] = total
    return result.reshape(tensors[0].shape)


def base_and_mean(base: Tensor, deltas: Sequence[Tensor], scale: float) -> Tensor:
    """Return θ_0 + scale · mean of the τ_t: what spectral methods do with everything that is not a matrix.

    A scale of 0 gives the base bit for bit, here and in `base_and_matrix`: −0 + 0 would be +0.
    """
    if scale == 0:
        return base
    return combination([1.0] + [scale / len(deltas)] * len(deltas), [base, *deltas])


def base_and_matrix(base: Tensor, delta: Tensor, scale: float) -> Tensor:
    """Return θ_0 + scale · delta for a float64 matrix, in the base's shape, rounded once to float32."""
    if scale == 0:
        return base
    total = wide(base, (delta.shape[0], delta.shape[1])) + delta * scale
    return total.to(torch.float32).reshape(base.shape)


def gram(tensors: Sequence[Tensor], rows: int = 1) -> Tensor:
    """Return the inner products of all pairs of tensors, row by row: float64, (rows, T, T), summed in a fixed order."""
    columns = tensors[0].numel() // max(rows, 1)
    views = [tensor.reshape(rows, columns) for tensor in tensors]
    total = torch.zeros(rows, len(views), len(views), dtype=torch.float64)
    step = max(1, BLOCK // max(rows, 1))
    for start in range(0, columns, step):
        stacked = torch.stack([view[:, start : start + step].to("cpu", torch.float64) for view in views], 1)
        total += stacked @ stacked.mT
    return (total + total.mT) / 2


def decomposition(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m×r), σ (r, descending) and Vᵀ (r×n) with matrix = U diag(σ) Vᵀ and r = min(m, n)."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def nearest_low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return up (m×rank) and down (rank×n), the product nearest to the matrix (Frobenius), ‖up_i‖ = ‖down_i‖ = √σ_i.

    The eigenvectors of the shorter side's Gram matrix take a tenth of a decomposition's time. The other factor is the
    matrix itself in their basis, so the product is a projection of it whatever their last bits are: at full rank
    nothing is lost, and one direction is taken for another only where both are below 1e-8 of the largest.
    """
    if matrix.shape[0] > matrix.shape[1]:
        down, up = nearest_low_rank(matrix.mT, rank)
        return up.mT, down.mT
    vectors = torch.linalg.eigh(matrix @ matrix.mT)[1].flip(1)[:, :rank]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * torch.sign(largest)  # either sign is right: the same on every machine
    inner = vectors.mT @ matrix
    root = inner.norm(dim=1).sqrt()
    return vectors * root, inner / torch.where(root > 0, root, torch.ones_like(root))[:, None]


def rank_of(values: Tensor, size: float, rank: Rank) -> int:
    """Return how many singular values to believe. size: the Frobenius norm of what the matrix was made of.

    The error of a matrix of float32 entries has a Frobenius norm of at most rounding × size, and no singular value is
    wrong by more. The bound is relative and does not grow with the matrix.
    """
    return len(values) if rank == "full" else int((values > ROUNDING * size).sum())


def polar_factor(matrix: Tensor, rank: Rank) -> Tensor:
    """Return the orthonormal matrix nearest to `matrix`: U Vᵀ of its decomposition (Higham 1986).

    Where columns depend on each other, rank 'numerical' returns the partial isometry: columns that point the same way
    share a direction. 'full' completes it with directions that the library picks.
    """
    left, values, right = decomposition(matrix)
    kept = rank_of(values, float(matrix.norm()), rank)
    return left[:, :kept] @ right[:kept]
