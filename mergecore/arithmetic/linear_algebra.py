"""Linear algebra that per-tensor methods share: pure functions of tensors, in float64 on the CPU.

Float64, because float32's rounding is the noise floor of the inputs: deltas are some 1e-4 of the weights and formed in
float32, so whether a direction exists (rank), how far two experts are apart (angle) and a polar factor of nearly
parallel bases can only be decided well below it. On the CPU, where the engine keeps one thread: a factorisation done by
two threads differs in its last bits from one done by one.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

BLOCK = 1 << 15
"""Elements of every tensor that are widened at once: their float64 copies stay in the processor's cache."""
ROUNDING = 2.0**-23
"""Float32's spacing at 1: what forming a delta may change, relative to its Frobenius norm."""

Convolutions = Annotated[
    Literal["mean", "flatten"],
    Field(
        description="tensors of three or more dimensions: 'mean' treats them like vectors (the authors' code), "
        "'flatten' as matrices of one row per output channel"
    ),
]
Rank = Annotated[
    Literal["numerical", "full"],
    Field(
        description="'numerical' leaves out singular directions below rounding, which are arbitrary; 'full' takes all, "
        "as published: what then stands in them depends on the linear algebra library"
    ),
]
Excluded = Annotated[
    tuple[str, ...], Field(description="shell patterns over tensor names: matrices that are treated like vectors")
]
Matrix = tuple[int, int]
"""Rows (outputs) and columns (inputs)."""


def matrix_of(name: str, shape: Sequence[int], convolutions: Convolutions, excluded: Sequence[str]) -> Matrix | None:
    """The matrix that a tensor is, None for vectors, scalars, empty tensors and whatever is treated like a vector."""
    count = 1
    for size in shape:
        count *= size
    if len(shape) < 2 or count == 0 or (len(shape) > 2 and convolutions == "mean"):
        return None
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in excluded):
        return None
    return shape[0], count // shape[0]


def wide(tensor: Tensor, matrix: Matrix) -> Tensor:
    """The tensor as a float64 matrix on the CPU."""
    return tensor.to("cpu", torch.float64).reshape(matrix)


def blocks(tensors: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """The flattened tensors in float64, block by block."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), BLOCK):
        part = slice(start, start + BLOCK)
        yield part, [values[part].to(torch.float64) for values in flat]


def squared_norm(tensor: Tensor) -> float:
    """Σ v² in float64 over blocks, folded in order."""
    total = 0.0
    for _, (values,) in blocks([tensor]):
        total += float((values * values).sum())
    return total


@dataclass(frozen=True)
class Shares:
    """How much of each model, where a tensor of the result is Σ c_i x_i."""

    shares: Sequence[float] = ()


def combined(shares: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Σ c_i x_i, element by element: folded left in float64, rounded once to float32."""
    total = tensors[0].double() * shares[0]
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        total = total + tensor.double() * share
    return total.float()


def combination(coefficients: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """`combined` of whole tensors, in their shape, block by block."""
    result = torch.empty(tensors[0].numel(), dtype=torch.float32, device=tensors[0].device)
    for part, values in blocks(tensors):
        result[part] = combined(coefficients, values)
    return result.reshape(tensors[0].shape)


def row_combination(coefficients: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Row by row Σ c_i x_i along the last axis, in the tensors' shape; coefficients: (tensors, rows), float64."""
    rows = [tensor.reshape(coefficients.shape[1], -1) for tensor in tensors]
    result = torch.empty(rows[0].shape, dtype=torch.float32, device=rows[0].device)
    step = max(1, BLOCK // max(rows[0].shape[1], 1))
    for start in range(0, len(rows[0]), step):
        part = slice(start, start + step)
        total = torch.zeros(rows[0][part].shape, dtype=torch.float64, device=result.device)
        for row, shares in zip(rows, coefficients.to(result.device), strict=True):
            total = total + row[part].to(torch.float64) * shares[part, None]
        result[part] = total
    return result.reshape(tensors[0].shape)


def base_and_mean(base: Tensor, deltas: Sequence[Tensor], scale: float) -> Tensor:
    """θ_0 + scale · mean of the τ_t: what spectral methods do with everything that is not a matrix."""
    return combination([1.0] + [scale / len(deltas)] * len(deltas), [base, *deltas])


def base_and_matrix(base: Tensor, delta: Tensor, scale: float) -> Tensor:
    """θ_0 + scale · delta for a float64 matrix, in the base's shape, rounded once to float32."""
    total = wide(base, (delta.shape[0], delta.shape[1])) + delta * scale
    return total.to(torch.float32).reshape(base.shape)


def gram(tensors: Sequence[Tensor], rows: int = 1) -> Tensor:
    """Inner products of every pair of the tensors, row by row: (rows, T, T), float64, summed in a fixed order."""
    columns = tensors[0].numel() // max(rows, 1)
    views = [tensor.reshape(rows, columns) for tensor in tensors]
    total = torch.zeros(rows, len(views), len(views), dtype=torch.float64)
    step = max(1, BLOCK // max(rows, 1))
    for start in range(0, columns, step):
        stacked = torch.stack([view[:, start : start + step].to("cpu", torch.float64) for view in views], 1)
        total += stacked @ stacked.mT
    return (total + total.mT) / 2


def decomposition(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m×r), σ (r, descending) and Vᵀ (r×n) with matrix = U diag(σ) Vᵀ and r = min(m, n)."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def nearest_low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(up m×rank, down rank×n) whose product is nearest to the matrix in the Frobenius norm, ‖up_i‖ = ‖down_i‖ = √σ_i.

    From the eigenvectors of the Gram matrix of the shorter side, a tenth of a decomposition's time. The other factor is the
    matrix itself in that basis, so the product is a projection of it whatever the eigenvectors' last bits: at full rank
    nothing is lost, and a direction is missed for another only where both are below 1e-8 of the largest.
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
    """How many of the singular values to believe. size: the Frobenius norm of what the matrix was made of.

    The error of a matrix of float32 entries has a Frobenius norm of at most rounding × size, and no singular value is
    off by more than that: a bound that is relative and does not grow with the matrix.
    """
    return len(values) if rank == "full" else int((values > ROUNDING * size).sum())


def polar_factor(matrix: Tensor, rank: Rank) -> Tensor:
    """The orthonormal matrix nearest to `matrix`: U Vᵀ of its decomposition (Higham 1986).

    Where columns depend on each other, rank 'numerical' gives the partial isometry: columns that point the same way
    share one direction. 'full' completes it with directions that the library picks.
    """
    left, values, right = decomposition(matrix)
    kept = rank_of(values, float(matrix.norm()), rank)
    return left[:, :kept] @ right[:kept]
