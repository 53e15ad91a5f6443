"""A checkpoint whose tensors over the vocabulary have other rows: its own, another model's, a mean, or zero."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergecore.tensors.files import FileTensors
from mergecore.tensors.source import TensorInfo, TensorSource
from mergecore.tensors.torch_dtypes import DTYPE_NAMES, DTYPES

Index = NDArray[np.int32]
AT_ONCE = 1 << 17
"""Elements that are read at a time for the mean of all rows."""
FEW = 16
"""Runs in one piece of a pass that are read one by one; more of them are gathered."""


@dataclass(frozen=True, eq=False)
class Runs:
    """Consecutive rows of the result that are consecutive in a source as well, ascending.

    first: first row of the result. there: first row in the source. count: how many.
    """

    first: Index
    there: Index
    count: Index

    def pieces(self, width: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the runs' parts within elements start … stop−1 of the result, shape (n, 3).

        width: elements of a row. Each part is (element in the source, element counted from `start`, number of
        elements).
        """
        low = int(np.searchsorted(self.first + self.count, start // width, side="right"))
        high = int(np.searchsorted(self.first, -(-stop // width), side="left"))
        first, there = self.first[low:high].astype(np.int64), self.there[low:high].astype(np.int64)
        begin = np.maximum(first * width, start)
        end = np.minimum((first + self.count[low:high]) * width, stop)
        return np.stack([begin + (there - first) * width, begin - start, end - begin], axis=1)


def runs_of(rows: Index, there: Index) -> Runs:
    """Return the runs of single rows. rows: of the result, ascending. there: the row of the source that each of them
    is.
    """
    if not len(rows):
        none = np.zeros(0, dtype=np.int32)
        return Runs(none, none, none)
    cuts = np.flatnonzero((np.diff(rows) != 1) | (np.diff(there) != 1)) + 1
    starts = np.concatenate([[0], cuts])
    lengths = np.diff(np.concatenate([starts, [len(rows)]]))
    return Runs(rows[starts].astype(np.int32), there[starts].astype(np.int32), lengths.astype(np.int32))


@dataclass(frozen=True, eq=False)
class Rows:
    """Where each of `count` rows comes from: one source, the mean of several, the mean of all rows, or zero.

    The first source is the model itself. Rows that stand nowhere here are zero.
    """

    count: int
    copies: tuple[Runs, ...]
    shares: tuple[Runs, ...]
    shared: Index
    """Rows that several sources have a share in, ascending."""
    parts: Index
    """How many shares each of these has."""
    filled: Index
    """Rows that stand for no token: the mean of all others."""

    @property
    def digest(self) -> str:
        """A digest that is equal for equal rows of equal sources."""
        state = hashlib.sha256(str(self.count).encode())
        for runs in (*self.copies, *self.shares):
            for numbers in (runs.first, runs.there, runs.count):
                state.update(f"|{len(numbers)}|".encode() + np.ascontiguousarray(numbers, dtype="<i4").tobytes())
        for numbers in (self.shared, self.parts, self.filled):
            state.update(f"|{len(numbers)}|".encode() + np.ascontiguousarray(numbers, dtype="<i4").tobytes())
        return state.hexdigest()

    def is_identity(self, rows: int) -> bool:
        """Return whether these are the model's own `rows` rows, in their order."""
        own = self.copies[0]
        whole = len(own.first) == 1 and int(own.first[0]) == int(own.there[0]) == 0 and int(own.count[0]) == self.count
        return whole and self.count == rows


def rows_of(count: int, contributions: Sequence[Sequence[tuple[Index, Index]]], filled: Index) -> Rows:
    """Return the rows that the sources contribute.

    contributions: for each source pairs of (rows of the result, rows of the source). A row with several is their mean.
    filled: rows that are the mean of all others.
    """
    parts = np.zeros(count, dtype=np.int32)
    for pairs in contributions:
        for rows, _ in pairs:
            np.add.at(parts, rows, 1)
    copies, shares = [], []
    for pairs in contributions:
        rows = np.concatenate([np.zeros(0, dtype=np.int32), *(rows for rows, _ in pairs)])
        there = np.concatenate([np.zeros(0, dtype=np.int32), *(there for _, there in pairs)])
        order = np.argsort(rows, kind="stable")
        rows, there = rows[order], there[order]
        alone = parts[rows] == 1
        copies.append(runs_of(rows[alone], there[alone]))
        shares.append(runs_of(rows[~alone], there[~alone]))
    shared = np.flatnonzero(parts > 1).astype(np.int32)
    return Rows(count, tuple(copies), tuple(shares), shared, parts[shared], filled)


@dataclass(frozen=True)
class RowTensors:
    """The tensors of a checkpoint with other rows. names: for each source, tensor of the result → its name there.

    A tensor without a name there is the first source's, unchanged. A tensor keeps the first source's dtype where all of
    its rows are copies of that dtype; otherwise it is float32.
    """

    sources: tuple[TensorSource, ...]
    names: tuple[Mapping[str, str], ...]
    rows: Rows
    _means: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by name."""
        return {**self.sources[0].tensors, **{name: self._info(name) for name in self.names[0]}}

    @cached_property
    def _dtypes(self) -> tuple[dict[str, str], ...]:
        """For each source the dtypes of its tensors over the vocabulary, by the result's names. Kept, as some sources
        form them.
        """
        return tuple(
            {name: tensors[own].dtype for name, own in names.items()}
            for names, tensors in zip(self.names, (source.tensors for source in self.sources), strict=True)
        )

    def _info(self, name: str) -> TensorInfo:
        own = self.sources[0].tensors[self.names[0][name]]
        used = (dtypes[name] for dtypes, runs in zip(self._dtypes, self.rows.copies, strict=True) if len(runs.first))
        return TensorInfo(opened_dtype(own.dtype, used, self.rows), (self.rows.count, *own.shape[1:]))

    def read(self, name: str, start: int = 0, stop: int | None = None, space: Tensor | None = None) -> Tensor:
        """Read elements start … stop−1 of the flattened tensor, into `space` where that is passed."""
        if name not in self.names[0]:
            return self.sources[0].read(name, start, stop, space)
        info = self.tensors[name]
        stop = info.count if stop is None else stop
        out = torch.empty(stop - start, dtype=DTYPES[info.dtype]) if space is None else space
        if stop > start:
            self._read(name, info.count // self.rows.count, start, stop, out)
        return out

    def expect(self, name: str, start: int, stop: int) -> None:
        """Ask the system to begin reading a tensor whose rows are unchanged."""
        if name not in self.names[0] and isinstance(self.sources[0], FileTensors):
            self.sources[0].expect(name, start, stop)

    def _read(self, name: str, width: int, start: int, stop: int, out: Tensor) -> None:
        pieces = [runs.pieces(width, start, stop) for runs in self.rows.copies]
        for number, copied in enumerate(pieces):
            self._copy(number, name, width, start, copied, out)
        if sum(int(copied[:, 2].sum()) for copied in pieces) == stop - start:
            return
        # What is not copied is rare: rows that no single model has.
        not_copied = np.ones(stop - start, dtype=bool)
        for _, here, count in np.concatenate(pieces).tolist():
            not_copied[here : here + count] = False
        for first, last in _spans(not_copied):
            for low in range(first, last, AT_ONCE):
                high = min(low + AT_ONCE, last)
                self._fill(name, width, start + low, start + high, out[low:high])

    def _copy(self, number: int, name: str, width: int, start: int, pieces: NDArray[np.int64], out: Tensor) -> None:
        source, own = self.sources[number], self.names[number][name]
        same = self._dtypes[number][name] == DTYPE_NAMES[out.dtype]
        if same and isinstance(source, FileTensors) and len(pieces) > FEW:
            whole = (pieces[:, 0] % width == 0) & (pieces[:, 2] % width == 0)
            _gather(source, own, width, -start % width, pieces[whole], out)
            pieces = pieces[~whole]
        for there, here, count in pieces.tolist():
            space = out[here : here + count]
            values = source.read(own, there, there + count, space if same else None)
            if values.data_ptr() != space.data_ptr():  # tensors in memory give a view of themselves
                space.copy_(values)

    def _fill(self, name: str, width: int, start: int, stop: int, out: Tensor) -> None:
        """Write elements of rows that are no copies: means of several sources, the mean of all rows, or zeros."""
        first, end, rows = start // width, -(-stop // width), self.rows
        out.zero_()
        for number, runs in enumerate(rows.shares):
            for there, here, count in runs.pieces(width, start, stop).tolist():
                values = self.sources[number].read(self.names[number][name], there, there + count)
                out[here : here + count] += values.to(torch.float32)
        low, high = np.searchsorted(rows.shared, (first, end))
        if low < high:
            parts = torch.ones(end - first)
            parts[torch.from_numpy(rows.shared[low:high] - first).long()] = torch.from_numpy(
                rows.parts[low:high]
            ).float()
            out /= parts.repeat_interleave(width)[start - first * width :][: out.numel()]
        low, high = np.searchsorted(rows.filled, (first, end))
        if low < high:
            empty = torch.zeros(end - first, dtype=torch.bool)
            empty[torch.from_numpy(rows.filled[low:high] - first).long()] = True
            of_mean = self._mean(name, width).to(out.dtype).repeat(end - first)[start - first * width :][: out.numel()]
            of_rows = empty.repeat_interleave(width)[start - first * width :][: out.numel()]
            out.copy_(torch.where(of_rows, of_mean, out))

    def _mean(self, name: str, width: int) -> Tensor:
        """Return the mean of all rows that stand for a token, summed in float64 from the first row to the last."""
        if name not in self._means:
            total, count = np.zeros(width), self.rows.count - len(self.rows.filled)
            tokens = np.ones(self.rows.count, dtype=bool)
            tokens[self.rows.filled] = False
            step = max(1, AT_ONCE // width)
            for first, last in _spans(tokens):
                for row in range(first, last, step):
                    values = self.read(name, row * width, min(row + step, last) * width)
                    total += values.to(torch.float64).numpy().reshape(-1, width).sum(axis=0)
            self._means[name] = torch.from_numpy(total / max(count, 1))
        return self._means[name]


def opened_dtype(own: str, used: Iterable[str], rows: Rows) -> str:
    """Return the dtype that a tensor opens with. own: in the checkpoint. used: in the sources that rows are copied
    from.
    """
    return own if set(used) <= {own} and not len(rows.shared) else "F32"


def gathering(elements: int, width: int) -> int:
    """Return the bytes that reading `elements` elements of `width` bytes needs beside them.

    These are the gathered rows before they are put in place, and the memory for means.
    """
    return elements * (width + 1) + 4 * 4 * AT_ONCE


def _gather(source: FileTensors, name: str, width: int, lead: int, pieces: NDArray[np.int64], out: Tensor) -> None:
    """Copy pieces that are whole rows. lead: elements of `out` before its first whole row."""
    if not len(pieces):
        return
    there, here, count = (pieces // width).T  # of `here` what is left is the lead, the same for all
    within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    rows_there, rows_here = np.repeat(there, count) + within, np.repeat(here, count) + within
    last = (out.numel() - lead) // width
    rows = out[lead : lead + last * width].view(last, width)
    if len(rows_here) == last and rows_here[-1] - rows_here[0] == last - 1:
        source.gather(name, rows_there, rows)
        return
    gathered = torch.empty(len(rows_there), width, dtype=out.dtype)
    source.gather(name, rows_there, gathered)
    rows[torch.from_numpy(rows_here)] = gathered


def _spans(values: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return (first, end) of every stretch of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], values, [False]]).astype(np.int8)))
    return list(zip(edges[0::2].tolist(), edges[1::2].tolist(), strict=True))
