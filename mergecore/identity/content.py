"""Digests of what is written: grid blocks, tensors, models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
import xxhash
from torch import Tensor

from mergecore.identity.keys import digest

GRID = 1 << 20
"""Elements of one block: reductions, digests and spans all follow this fixed grid, whatever the chunk size."""


def bytes_of(values: Tensor) -> memoryview:
    """Return the bytes of a flat tensor in main memory; they are not copied where the tensor is contiguous."""
    return memoryview(values.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]


class BlockDigests:
    """XXH3 (128 bits) of each grid block (`GRID` elements) of a tensor whose elements come in order.

    XXH3 costs less than the reading. It is enough here: results are compared with our own, never with a stranger's
    claim.
    """

    def __init__(self, start: int = 0) -> None:
        self._at, self._digests = start, dict[int, str]()
        self._state = xxhash.xxh3_128()

    def update(self, data: memoryview, count: int) -> None:
        """Add the bytes of the next `count` elements."""
        done, width = 0, len(data) // max(count, 1)
        while done < count:
            size = min(GRID - self._at % GRID, count - done)
            self._state.update(data if size == count else data[done * width : (done + size) * width])
            done += size
            self._at += size
            if self._at % GRID == 0:
                self._close(self._at - GRID)

    def _close(self, start: int) -> None:
        self._digests[start] = self._state.hexdigest()
        self._state = xxhash.xxh3_128()

    @property
    def at(self) -> int:
        """The element that comes next."""
        return self._at

    def taken(self, last: bool) -> dict[int, str]:
        """Return the digests of the blocks that are whole, and forget them. last: the tensor ends here."""
        if last and self._at % GRID:
            self._close(self._at // GRID * GRID)
        whole, self._digests = self._digests, {}
        return whole

    def finished(self) -> dict[int, str]:
        """Return {first element: digest} of all blocks. An empty tensor has one block."""
        if self._at % GRID or not self._digests:
            self._close(self._at // GRID * GRID)
        return self._digests


def block_digests(values: Tensor) -> dict[int, str]:
    """Return {first element: digest} of all grid blocks of a flat tensor."""
    state = BlockDigests()
    state.update(bytes_of(values), values.numel())
    return state.finished()


def tensor_digest(block_digests: Sequence[str]) -> str:
    """Return the digest of a tensor from the digests of its grid blocks, in order."""
    return hashlib.sha256("".join(block_digests).encode()).hexdigest()


def model_digest(tensors: Mapping[str, tuple[str, Sequence[int], str]]) -> str:
    """Return the digest of a model from {name: (dtype, shape, tensor digest)}. Sharding does not change it."""
    return digest([[name, dtype, list(shape), tensor] for name, (dtype, shape, tensor) in sorted(tensors.items())])
