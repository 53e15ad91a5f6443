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


KEEP_OUT = (
    "repair the checkpoint, or leave the tensor as the base has it: select: [{{names: '{name}', take: copy}}, {{}}]"
)
"""What to do about values of a model that are not finite."""
TAME = "its experts are finite, its result is not: choose a smaller scale or a wider dtype"
"""What to do about values of a result that are not finite."""
