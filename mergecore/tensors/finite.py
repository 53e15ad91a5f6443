"""Checks that values are finite, and errors that name the tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from mergecore.errors import NonFiniteError


def check_finite(values: Tensor, name: str, owner: str, remedy: str) -> None:
    """Raise NonFiniteError where `values` (any floating dtype) hold a NaN or an infinity, naming tensor and owner."""
    if values.numel() == 0:
        return
    low, high = torch.aminmax(values)  # both carry a NaN on
    if not (torch.isfinite(low) and torch.isfinite(high)):
        position = int((~torch.isfinite(values.reshape(-1))).nonzero()[0])
        raise NonFiniteError(f"{owner}: tensor '{name}' holds {values.reshape(-1)[position].item()}; {remedy}")


def check_copied(values: Tensor, name: str, remedy: str) -> None:
    """Raise NonFiniteError where a tensor that is copied (any dtype) is not finite. Integers always are."""
    if values.is_floating_point():
        wide = values.float() if values.itemsize == 1 else values  # torch finds no extremes of float8
        check_finite(wide, name, "a tensor that is copied", remedy)


KEEP_OUT = (
    "repair the checkpoint, or leave the tensor as the base has it: select: [{{names: '{name}', take: copy}}, {{}}]"
)
"""What to do about values of a model that are not finite."""
DROP = "repair the checkpoint, or leave the tensor out of the result: select: [{{names: '{name}', take: drop}}, {{}}]"
"""What to do about values of a copied tensor that are not finite in its own checkpoint."""
NARROW = "it is finite in its checkpoint and too large for the dtype of the result: choose a wider dtype"
"""What to do about values that a dtype cannot hold."""
TAME = "its experts are finite, its result is not: choose a smaller scale or a wider dtype"
"""What to do about values of a result that are not finite."""
