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
    """The bytes of a flat tensor on the processor, not copied where it is contiguous."""
    return memoryview(values.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]


class BlockDigests:
    """XXH3 (128 bits) of each block of `GRID` elements of a tensor that is given piece by piece, in order.

    What is written is compared with itself, never with a stranger's claim: a hash that costs less than the reading does.
    """

    def __init__(self, start: int = 0) -> None:
        self._at, self._found = start, dict[int, str]()
        self._state = xxhash.xxh3_128()

    def update(self, data: memoryview, count: int) -> None:
        """The bytes of the next `count` elements."""
        done, width = 0, len(data) // max(count, 1)
        while done < count:
            size = min(GRID - self._at % GRID, count - done)
            self._state.update(data if size == count else data[done * width : (done + size) * width])
            done += size
            self._at += size
            if self._at % GRID == 0:
                self._close(self._at - GRID)

    def _close(self, start: int) -> None:
        self._found[start] = self._state.hexdigest()
        self._state = xxhash.xxh3_128()

    def finished(self) -> dict[int, str]:
        """{first element: digest}; an empty tensor has one block."""
        if self._at % GRID or not self._found:
            self._close(self._at // GRID * GRID)
        return self._found


def block_digests(values: Tensor) -> dict[int, str]:
    """The digests of all blocks of a flat tensor."""
    held = BlockDigests()
    held.update(bytes_of(values), values.numel())
    return held.finished()


def tensor_digest(block_digests: Sequence[str]) -> str:
    """Digest of a tensor from the digests of its blocks of `GRID` elements, in order."""
    return hashlib.sha256("".join(block_digests).encode()).hexdigest()


def model_digest(tensors: Mapping[str, tuple[str, Sequence[int], str]]) -> str:
    """Digest of a model from {name: (dtype, shape, tensor digest)}: the same for every sharding of the same tensors."""
    return digest([[name, dtype, list(shape), held] for name, (dtype, shape, held) in sorted(tensors.items())])
