"""What a plug-in sees at once: a block of every model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor

from mergecore.tensors.source import TensorSource


@dataclass(frozen=True)
class Index:
    """Among a method's arguments: the flat index of each element of the block, int64."""


@dataclass(frozen=True)
class Beside:
    """Among a method's arguments: one float32 per element, read beside the block from tensor `name` of `source`."""

    source: TensorSource
    name: str
    dtype: ClassVar[torch.dtype] = torch.float32

    def read(self, start: int, stop: int) -> Tensor:
        """Elements start … stop−1 of the flattened tensor."""
        return self.source.read(self.name, start, stop).to(torch.float32)


class Per(StrEnum):
    """How much a method sees at once."""

    ELEMENT = "element"
    """Any flat chunk: the engine picks the chunk, the numbers do not depend on it."""
    TENSOR = "tensor"
    """One whole tensor, in its shape."""
    LAYER = "layer"
    """All tensors of one layer."""
    MODEL = "model"
    """Everything at once."""


@dataclass(frozen=True)
class Block:
    """A piece of every model: elements start … stop−1 of the flattened tensor `name`, or the whole tensor.

    base and experts are float32; for `Per.ELEMENT` of shape (stop−start,), else of the tensor's shape. `experts` holds
    what the method asked for with `on`: weights θ_t, or deltas τ_t = θ_t − θ_0. ids are the experts' ids, in the same
    order. members: for LAYER and MODEL the blocks of the single tensors, else empty. Where only the place is known (see
    `Method.arguments`) base is None and experts is empty.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    base: Tensor | None
    experts: tuple[Tensor, ...]
    ids: tuple[str, ...]
    members: tuple[Block, ...] = ()
