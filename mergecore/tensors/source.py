"""Named tensors that can be read in parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

from torch import Tensor

from mergecore.tensors.dtypes import ELEMENT_TYPES, MERGED


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's dtype (safetensors' name: F32, BF16, F16, I64 …) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of all elements."""
        return self.count * self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ELEMENT_TYPES[self.dtype].itemsize

    def stored_as(self, dtype: str) -> TensorInfo:
        """Return the tensor written in another dtype (safetensors' name). What is not merged keeps its own."""
        return TensorInfo(dtype, self.shape) if self.dtype in MERGED else self


def stored_as(tensors: Mapping[str, TensorInfo], dtype: str | None) -> dict[str, TensorInfo]:
    """Return the tensors written in `dtype` (safetensors' name), or each in its own where it is None."""
    return {name: info.stored_as(dtype) if dtype else info for name, info in tensors.items()}


class TensorSource(Protocol):
    """Named tensors that can be read by element: a checkpoint on disk, a statistic's result, a dict in memory."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by name."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None, space: Tensor | None = None) -> Tensor:
        """Read elements start … stop−1 of the flattened tensor, in its own dtype. The result must not be written to.

        space: memory of that size and dtype, which may be used for the result.
        """
        ...
