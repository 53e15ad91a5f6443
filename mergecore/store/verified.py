"""Tensors of a stored result, compared while they are read with the digests under which they were written.

`digests.json` lies beside the tensors: for each of them the XXH3 of its grid blocks, in order. A result of an older
version has no such file and is read as it lies. What is read costs a hash, which is faster than the memory; nothing is
read for the check alone. So a block is checked where all of it is read, in order.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from torch import Tensor

from mergecore.errors import StoreError
from mergecore.identity.content import GRID, BlockDigests, bytes_of
from mergecore.tensors.files import FileTensors
from mergecore.tensors.source import TensorInfo, TensorSource

DIGESTS = "digests.json"
REMEDY = "delete this folder and run the same again (a sweep with --retry-failed): the step is then done anew"


def write_digests(folder: Path, blocks: Mapping[str, Sequence[str]]) -> None:
    """Write the digests of the grid blocks of every tensor beside the files of a result."""
    (folder / DIGESTS).write_text(json.dumps({name: list(digests) for name, digests in sorted(blocks.items())}) + "\n")


def verified(tensors: FileTensors, files: Mapping[str, int]) -> TensorSource:
    """Return the tensors of a result with their check. files: those that its record names.

    Raises StoreError where the digests cannot be read.
    """
    if DIGESTS not in files:
        return tensors
    path = Path(tensors.folder) / DIGESTS
    try:
        blocks = json.loads(path.read_text())
        lists = all(isinstance(digests, list) for digests in blocks.values())
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path} cannot be read ({error}); {REMEDY}") from error
    if not lists or set(blocks) != set(tensors.tensors):
        raise StoreError(f"{path} is not about the tensors beside it; {REMEDY}")
    return VerifiedTensors(tensors, blocks)


@final
@dataclass(frozen=True)
class VerifiedTensors:
    """Tensors in files. blocks: for each the digests of its grid blocks. Picklable; any thread may read."""

    stored: FileTensors
    blocks: Mapping[str, Sequence[str]]
    _under_way: dict[tuple[int, str], BlockDigests] = field(default_factory=dict, compare=False, repr=False)
    """By thread and tensor: what was read of a block up to now."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what threads of this process are reading."""
        return {**self.__dict__, "_under_way": {}}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by name."""
        return self.stored.tensors

    def read(self, name: str, start: int = 0, stop: int | None = None, space: Tensor | None = None) -> Tensor:
        """Read elements start … stop−1 of the flattened tensor. Raises StoreError where they are not as written."""
        count = self.tensors[name].count
        values = self.stored.read(name, start, stop, space)
        self._check(name, start, count if stop is None else stop, values, count)
        return values

    def _check(self, name: str, start: int, stop: int, values: Tensor, count: int) -> None:
        place = (threading.get_ident(), name)
        state = self._under_way.pop(place, None)
        if state is None or state.at != start:
            if start % GRID or start == stop:
                return
            state = BlockDigests(start)
        state.update(bytes_of(values), stop - start)
        for first, digest in state.taken(stop == count).items():
            if self.blocks[name][first // GRID : first // GRID + 1] != [digest]:
                raise StoreError(
                    f"{self.stored.folder}: tensor '{name}' is not what was written there (elements {first:,} to "
                    f"{min(first + GRID, count) - 1:,}): the disk has lost it, or something else wrote to it; {REMEDY}"
                )
        if stop < count:
            self._under_way[place] = state
