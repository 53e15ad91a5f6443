"""Bit masks over one shared vector: how they are packed and named, and how one task's model is read from them.

A product of masks holds, for every tensor of the model, the base's tensor under its own name, and for every merged one

    shared/NAME   the vector that all tasks share, in the tensor's shape
    mask/NAME     U8 (T, ⌈n/8⌉): a row per task, a bit per element in flat order, the first element in the highest bit
    scale/NAME    F32 (T,): a factor per task; where there is none it is 1

and the model of task t is θ_0 + scale_t · (mask_t ⊙ shared), formed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergecore.tensors.source import TensorInfo, TensorSource
from mergecore.tensors.torch_dtypes import DTYPES

SHARED, MASK, SCALE = "shared/", "mask/", "scale/"
PLACES = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)


def width(count: int) -> int:
    """Return the number of bytes that hold `count` bits."""
    return -(-count // 8)


def packed(mask: Tensor) -> Tensor:
    """Pack a bool tensor in flat order into uint8; the bits behind the last element are 0."""
    flat = mask.reshape(-1).to("cpu", torch.uint8)
    padded = torch.zeros(width(flat.numel()) * 8, dtype=torch.uint8)
    padded[: flat.numel()] = flat
    return (padded.view(-1, 8) * PLACES).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor) -> Tensor:
    """Unpack each byte into eight bools, flat."""
    return ((bits[:, None] & PLACES) != 0).reshape(-1)


def mask_outputs(selection: Mapping[str, TensorInfo], tasks: int, vector: str, scaled: bool) -> dict[str, TensorInfo]:
    """Return the tensors that a product holds for the merged ones. vector: dtype of the shared vector (safetensors'
    name).
    """
    infos: dict[str, TensorInfo] = {}
    for name, info in selection.items():
        infos[name] = info
        infos[SHARED + name] = TensorInfo(vector, info.shape)
        infos[MASK + name] = TensorInfo("U8", (tasks, width(info.count)))
        if scaled:
            infos[SCALE + name] = TensorInfo("F32", (tasks,))
    return infos


def mask_block(
    name: str, base: Tensor, shared: Tensor, masks: Sequence[Tensor], scales: Sequence[float] | None
) -> dict[str, Tensor]:
    """Return the tensors that a product holds for one merged tensor. scales: a factor per task; None where all
    are 1.
    """
    tensors = {name: base, SHARED + name: shared, MASK + name: torch.stack([packed(mask) for mask in masks])}
    if scales is not None:
        tensors[SCALE + name] = torch.tensor(scales, dtype=torch.float32)
    return tensors


@dataclass(frozen=True)
class MaskedModel:
    """The model of one task, read from a product. row: the task's row in the masks. tensors: names and dtypes of the
    model.
    """

    product: TensorSource
    row: int
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, start: int = 0, stop: int | None = None, space: Tensor | None = None) -> Tensor:
        """Read elements start … stop−1 of the flattened tensor, in the dtype that `tensors` gives it."""
        stop = self.tensors[name].count if stop is None else stop
        values = self.product.read(name, start, stop)
        if MASK + name not in self.product.tensors:
            return values.to(DTYPES[self.tensors[name].dtype]) if values.is_floating_point() else values
        row = self.row * width(self.tensors[name].count)
        bits = self.product.read(MASK + name, row + start // 8, row + width(stop))
        chosen = unpacked(bits)[start % 8 : start % 8 + stop - start]
        change = torch.where(chosen, self.product.read(SHARED + name, start, stop).to(torch.float32), 0.0)
        if SCALE + name in self.product.tensors:
            change = change * self.product.read(SCALE + name, self.row, self.row + 1)
        return (values.to(torch.float32) + change).to(DTYPES[self.tensors[name].dtype])
