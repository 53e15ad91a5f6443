"""Safetensors files, opened once and read at any offset."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergecore.errors import SourceError
from mergecore.identity.content import bytes_of
from mergecore.tensors.header import parse_header
from mergecore.tensors.source import TensorInfo
from mergecore.tensors.torch_dtypes import DTYPES

Location = tuple[str, int]
"""File and offset of a tensor's first byte."""


class OpenFiles:
    """Files that a process opens once. They are closed with this object; sent to another process, it opens its own."""

    def __init__(self, flags: int) -> None:
        self._flags, self._handles, self._mapped = flags, dict[str, int](), dict[tuple[str, int], NDArray[np.uint8]]()

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenFiles, (self._flags,)

    def __del__(self) -> None:
        for handle in self._handles.values():
            os.close(handle)

    def of(self, path: str) -> int:
        """Return the handle of a file. Raises OSError."""
        handle = self._handles.get(path)
        if handle is None:
            handle = os.open(path, self._flags)
            # Two threads may open at once; the second handle is kept nowhere else, so it is closed here.
            if (kept := self._handles.setdefault(path, handle)) != handle:
                os.close(handle)
                handle = kept
        return handle

    def mapped(self, path: str, start: int, size: int) -> NDArray[np.uint8]:
        """Map bytes of a file into memory, once and with all pages: pages that are mapped one by one take longer than a
        read.

        Raises OSError.
        """
        pages_of_file = self._mapped.get((path, start))
        if pages_of_file is None:
            before = start % mmap.ALLOCATIONGRANULARITY
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            pages = mmap.mmap(self.of(path), before + size, flags, mmap.PROT_READ, offset=start - before)
            pages_of_file = self._mapped.setdefault((path, start), np.frombuffer(pages, np.uint8, size, before))
        return pages_of_file


@dataclass(frozen=True)
class FileTensors:
    """Tensors in safetensors files, read by position. Picklable: a worker opens the files itself."""

    folder: str
    tensors: Mapping[str, TensorInfo]
    locations: Mapping[str, Location]
    handles: OpenFiles = field(default_factory=lambda: OpenFiles(os.O_RDONLY), compare=False, repr=False)

    def read(self, name: str, start: int = 0, stop: int | None = None, space: Tensor | None = None) -> Tensor:
        """Read elements start … stop−1 of the flattened tensor, in its own dtype, into `space` where that is passed.

        Raises SourceError where the file ends before the tensor does: it shrank after its header was read.
        """
        info = self.tensors[name]
        dtype = DTYPES[info.dtype]
        stop = info.count if stop is None else stop
        out = torch.empty(stop - start, dtype=dtype) if space is None else space
        self.filler(name)(bytes_of(out), start * dtype.itemsize)
        return out

    def filler(self, name: str) -> Callable[[memoryview, int], None]:
        """Return a function that fills memory with the tensor's bytes from a byte offset on. It raises SourceError as
        `read`.
        """
        file, offset = self.locations[name]
        handle, folder = self._handle(file), self.folder

        def fill(wanted: memoryview, at: int) -> None:
            done, size = 0, len(wanted)
            while done < size:
                here = os.preadv(handle, [wanted[done:] if done else wanted], offset + at + done)
                if here == 0:
                    raise SourceError(f"{folder}/{file} ends inside tensor '{name}': fetch or write the file again")
                done += here

        return fill

    def gather(self, name: str, rows: NDArray[np.int64], out: Tensor) -> None:
        """Read rows of a tensor in any order into `out`, by one gather over the mapped file.

        rows: (n,) int64. out: (n, width), of the tensor's dtype. Raises SourceError where the file ends before the
        tensor.
        """
        info, (file, offset) = self.tensors[name], self.locations[name]
        handle, size = self._handle(file), info.count * out.element_size()
        if os.fstat(handle).st_size < offset + size:
            raise SourceError(f"{self.folder}/{file} ends inside tensor '{name}': fetch or write the file again")
        content = self.handles.mapped(f"{self.folder}/{file}", offset, size)
        np.take(content.reshape(info.shape[0], -1), rows, axis=0, out=out.view(torch.uint8).numpy(), mode="clip")

    def expect(self, name: str, start: int, stop: int) -> None:
        """Ask the system to begin reading these elements from the disk."""
        file, offset = self.locations[name]
        size = self.tensors[name].itemsize
        os.posix_fadvise(self._handle(file), offset + start * size, (stop - start) * size, os.POSIX_FADV_WILLNEED)

    def _handle(self, file: str) -> int:
        try:
            return self.handles.of(f"{self.folder}/{file}")
        except OSError as error:
            raise SourceError(f"cannot open {self.folder}/{file}: {error.strerror}") from error


def open_file(path: Path) -> FileTensors:
    """Open the tensors of one safetensors file."""
    return open_files(path.parent, [path.name])


def open_files(folder: Path, names: Sequence[str]) -> FileTensors:
    """Open the tensors of several safetensors files in one folder. Raises SourceError where one cannot be read."""
    tensors: dict[str, TensorInfo] = {}
    locations: dict[str, Location] = {}
    for name in names:
        with (folder / name).open("rb") as file:

            def piece(start: int, length: int, file: BinaryIO = file) -> bytes:
                file.seek(start)
                return file.read(length)

            for tensor, (info, offset) in parse_header(
                piece, (folder / name).stat().st_size, str(folder / name)
            ).items():
                tensors[tensor], locations[tensor] = info, (name, offset)
    return FileTensors(str(folder), tensors, locations)
