"""exp and tanh of float32 tensors from + − × ÷ alone: the same bits on every device and with every torch version.

A library's exp and tanh may differ in their last bit from one processor to the next. Where one machine finds a
threshold and another compares with it, that bit decides what is kept. tanh is Lambert's continued fraction cut off at
x⁶, exp a Taylor polynomial after Cody and Waite's reduction; the tests have measured bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634
LN2_HIGH = 0.693359375
LN2_LOW = -2.12194440e-4
"""ln 2 in two parts; the first has so few bits that its product with an exponent is exact."""
LARGEST = 88.0
SMALLEST = -87.0


def exponential(values: Tensor) -> Tensor:
    """Return e^x, relative error below 2^-21. Arguments beyond −87 … 88, where float32 ends, count as those."""
    bounded = values.clamp(SMALLEST, LARGEST)
    exponent = torch.round(bounded * LOG2_E)
    rest = bounded - exponent * LN2_HIGH - exponent * LN2_LOW
    total = rest * (1 / 5040)
    for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0):
        total = (total + coefficient) * rest
    power = ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)
    return (total + 1.0) * power


def small_tanh(values: Tensor) -> Tensor:
    """Return tanh x for |x| ≤ 1.25, relative error below 2^-21."""
    square = values * values
    above = (((square + 378.0) * square + 17325.0) * square + 135135.0) * values
    below = ((square * 28.0 + 3150.0) * square + 62370.0) * square + 135135.0
    return above / below


def tanh(values: Tensor) -> Tensor:
    """Return tanh x, relative error below 2^-20: that of x/8, then three times tanh 2y = 2 tanh y / (1 + tanh² y)."""
    result = small_tanh((values * 0.125).clamp(-1.25, 1.25))
    for _ in range(3):
        result = (result + result) / (result * result + 1.0)
    return result
