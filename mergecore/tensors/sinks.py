"""Where merged tensors go: sharded safetensors files written by position, or a mapping in memory."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mergecore.errors import CapacityError
from mergecore.identity.content import bytes_of
from mergecore.tensors.files import OpenFiles
from mergecore.tensors.source import TensorInfo
from mergecore.tensors.torch_dtypes import DTYPES

STEM = "model"
"""How the names of a model's files begin."""
INDEX = f"{STEM}.safetensors.index.json"


class Sink(ABC):
    """Takes windows of tensors in any order. A window may come again, with the same bytes."""

    @abstractmethod
    def prepare(self) -> None:
        """Make room. Called once, before the first write; what is there already stays."""

    @abstractmethod
    def write(self, name: str, start: int, data: memoryview) -> None:
        """Write elements from flat index `start` on. data: bytes in the tensor's own dtype."""


@dataclass
class MemorySink(Sink):
    """Tensors written into memory."""

    tensors: Mapping[str, TensorInfo]
    values: dict[str, Tensor] = field(default_factory=dict)

    def prepare(self) -> None:
        """Allocate every tensor."""
        for name, info in self.tensors.items():
            self.values[name] = torch.empty(info.shape, dtype=DTYPES[info.dtype])

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Copy the elements to their position."""
        target = self.values[name].view(-1)
        at = start * target.element_size()
        bytes_of(target)[at : at + len(data)] = data


@dataclass(frozen=True)
class Shard:
    """One file: its name, its header as bytes, its whole size, and where each of its tensors begins."""

    name: str
    header: bytes
    size: int
    offsets: Mapping[str, int]


@dataclass
class ShardSink(Sink):
    """Safetensors files in `folder`, laid out beforehand, so that any process can write its windows by position."""

    folder: Path
    tensors: Mapping[str, TensorInfo]
    shards: Sequence[Shard]
    handles: OpenFiles = field(default_factory=lambda: OpenFiles(os.O_WRONLY), compare=False, repr=False)

    def complete(self) -> bool:
        """Return whether all files are there at their full size."""
        paths = [(self.folder / shard.name, shard.size) for shard in self.shards]
        return all(path.exists() and path.stat().st_size == size for path, size in paths)

    def prepare(self) -> None:
        """Create the files at their full size with their headers. Raises CapacityError where the disk is too small."""
        for shard in self.shards:
            path = self.folder / shard.name
            if path.exists() and path.stat().st_size == shard.size:
                continue
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
                try:
                    # The size comes last: who finds a file of that size may rely on its header.
                    os.pwrite(handle, shard.header, 0)
                    os.posix_fallocate(handle, 0, shard.size)
                finally:
                    os.close(handle)
            except OSError as error:
                raise no_room(path, shard.size, error) from error
        if len(self.shards) > 1:
            (self.folder / INDEX).write_text(index_text(self.shards, self.tensors))

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Write the elements at their position in the file. Raises CapacityError where the disk is full."""
        path, offset, width = self._places[name]
        position = offset + start * width
        try:
            handle, done, size = self.handles.of(path), 0, len(data)
            while done < size:
                done += os.pwrite(handle, data[done:] if done else data, position + done)
        except OSError as error:
            raise no_room(Path(path), len(data), error) from error

    @cached_property
    def _places(self) -> dict[str, tuple[str, int, int]]:
        """For each tensor: its file, its first byte there, and the bytes of an element."""
        return {
            name: (str(self.folder / shard.name), at, self.tensors[name].itemsize)
            for shard in self.shards
            for name, at in shard.offsets.items()
        }


def no_room(path: Path, size: int, error: OSError) -> CapacityError:
    """Return the error for a file that could not be written."""
    return CapacityError(f"cannot write {size:,} bytes to {path}: {error.strerror}; free disk space and run again")


def plan_shards(tensors: Mapping[str, TensorInfo], shard_size: int, stem: str = STEM) -> list[Shard]:
    """Distribute tensors, sorted by name, over files of at most `shard_size` bytes. A larger tensor has a file of its
    own.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name in sorted(tensors):
        size = tensors[name].size
        if groups[-1] and filled + size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    count = len(groups)
    names = (
        [f"{stem}.safetensors"]
        if count == 1
        else [f"{stem}-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    )
    return [_shard(name, group, tensors) for name, group in zip(names, groups, strict=True)]


def _shard(file: str, names: Sequence[str], tensors: Mapping[str, TensorInfo]) -> Shard:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    relative: dict[str, int] = {}
    position = 0
    # Widest elements first, so that every tensor is aligned to its own element size, as safetensors writers do.
    for name in sorted(names, key=lambda name: (-tensors[name].itemsize, name)):
        info = tensors[name]
        relative[name] = position
        end = position + info.size
        entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"))
    text += " " * (-len(text.encode()) % 8)
    header = len(text.encode()).to_bytes(8, "little") + text.encode()
    return Shard(file, header, len(header) + position, {name: len(header) + at for name, at in relative.items()})


def index_text(shards: Sequence[Shard], tensors: Mapping[str, TensorInfo]) -> str:
    """Return the index file that names each tensor's shard."""
    shard_of = {name: shard.name for shard in shards for name in shard.offsets}
    total = sum(info.size for info in tensors.values())
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}, indent=2) + "\n"
    )
