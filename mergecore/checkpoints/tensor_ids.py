"""Ids of experts by what their tensors hold. How these are cut into files, and what else the files say, changes no id.

An expert's usual id is the digest of its files, which is known before they are fetched. Random masks are drawn with
this one: the same expert in other shards, or with other metadata, gets the same masks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol, runtime_checkable

from mergecore.checkpoints.layout import is_buffer
from mergecore.identity.content import GRID, BlockDigests, bytes_of, model_digest, tensor_digest
from mergecore.tensors.source import TensorInfo, TensorSource


@runtime_checkable
class Formed(Protocol):
    """A source whose values are formed while they are read: its id comes from what they are formed of."""

    def identify(self, without: Collection[str] = ()) -> str:
        """Return the id: 64 hex digits. without: names that do not count."""
        ...


def tensors_id(source: TensorSource, without: Collection[str] = ()) -> str:
    """Return the digest of names, dtypes, shapes and bytes of all tensors; 64 hex digits. Reads all of them.

    without: names that do not count: tied tensors, which some versions of a library save twice and others once. Nor do
    constants count, which some versions save with the weights.
    """
    if isinstance(source, Formed):
        return source.identify(without)
    counted = {name: info for name, info in source.tensors.items() if name not in without and not is_buffer(name, info)}
    return model_digest(
        {name: (info.dtype, info.shape, tensor_id(source, name, info)) for name, info in sorted(counted.items())}
    )


def tensor_id(source: TensorSource, name: str, info: TensorInfo) -> str:
    """Return the digest of one tensor's bytes, as a merge that wrote it would record it."""
    blocks = BlockDigests()
    for start, stop in _blocks(info.count):
        blocks.update(bytes_of(source.read(name, start, stop)), stop - start)
    digests = blocks.finished()
    return tensor_digest([digests[start] for start in sorted(digests)])


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, GRID):
        yield start, min(start + GRID, count)
