"""Tensors in memory, read like a file's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from mergecore.errors import SourceError
from mergecore.tensors.source import TensorInfo
from mergecore.tensors.torch_dtypes import DTYPE_NAMES


@dataclass(frozen=True)
class MemoryTensors:
    """Tensors in memory with the reading interface of files."""

    values: Mapping[str, Tensor]

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of each. Raises SourceError for a dtype that no safetensors file can hold."""
        for name, value in self.values.items():
            if value.dtype not in DTYPE_NAMES:
                raise SourceError(
                    f"tensor '{name}' has dtype {value.dtype}, which no safetensors file can hold; convert it"
                )
        return {name: TensorInfo(DTYPE_NAMES[value.dtype], tuple(value.shape)) for name, value in self.values.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None, space: Tensor | None = None) -> Tensor:
        """Return a view of the flattened tensor, which must not be written to. `space` is not used."""
        return self.values[name].detach().reshape(-1)[start:stop]
