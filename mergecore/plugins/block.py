"""What a plug-in sees at once: a block of every model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from mergecore.tensors.source import TensorSource


@dataclass(frozen=True)
class Index:
    """Stands for the flat index of each element, int64."""


@dataclass(frozen=True)
class Beside:
    """Stands for one float32 per element, read from tensor `name` of `source`."""

    source: TensorSource
    name: str
    dtype: ClassVar[torch.dtype] = torch.float32

    def read(self, start: int, stop: int) -> Tensor:
        """Return elements start … stop−1 of the flattened tensor."""
        return self.source.read(self.name, start, stop).to(torch.float32)


def flat_index() -> Tensor:
    """Return a stand-in for the flat index of each element, int64, to be put among a method's arguments.

    The engine replaces it by a tensor for each window before `merge` sees it.
    """
    return cast(Tensor, Index())


def read_beside(source: TensorSource, name: str) -> Tensor:
    """Return a stand-in for one float32 per element, to be put among a method's arguments.

    The engine replaces it by the window's elements of tensor `name` of `source` before `merge` sees it.
    """
    return cast(Tensor, Beside(source, name))


class Per(StrEnum):
    """How much a method sees at once."""

    ELEMENT = "element"
    """A flat window. The engine chooses the window; the numbers do not depend on it."""
    TENSOR = "tensor"
    """One whole tensor, in its shape."""


@dataclass(frozen=True)
class Block:
    """Elements start … stop−1 of the flattened tensor `name`, of every model.

    base and experts are float32: of shape (stop − start,) for `Per.ELEMENT`, else of the tensor's shape. `experts` are
    weights θ_t or deltas τ_t = θ_t − θ_0, as the plug-in asks for with `on`. ids are the experts' ids, in the same
    order. base is None where the plug-in does not need it. A block without values has neither base nor experts.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    base: Tensor | None
    experts: tuple[Tensor, ...]
    ids: tuple[str, ...]
    tensor_ids: tuple[str, ...] = ()
    """The experts' ids by what their tensors hold; () where they have no others than `ids`."""

    def ids_by(self, kind: Literal["tensors", "files"]) -> tuple[str, ...]:
        """Return the ids that random numbers are drawn with."""
        return self.ids if kind == "files" else self.tensor_ids or self.ids

    @property
    def models(self) -> tuple[Tensor, ...]:
        """The base, where it is there, and the experts."""
        return self.experts if self.base is None else (self.base, *self.experts)
