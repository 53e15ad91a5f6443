"""Windows of the models of a pool: read when first asked for, into buffers that are used again and again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mergecore.engine.kernels.run import Window
from mergecore.engine.pass_plan import BlockGroup, PassPlan
from mergecore.identity.content import GRID, bytes_of
from mergecore.plugins.block import Block
from mergecore.tensors.finite import DROP, KEEP_OUT, check_finite
from mergecore.tensors.source import TensorSource
from mergecore.tensors.torch_dtypes import DTYPES

Filler = Callable[[memoryview, int], None]
"""filler(memory, first): fills memory with the bytes of a tensor, from byte `first` on."""
AT_HAND = 5 << 19
"""Bytes of a window of all models together: between reading and writing it stays in the processor's cache."""
WINDOWS = 1 << 14, 1 << 19
"""The fewest and the most elements of a window."""

_spaces = threading.local()


class Space:
    """Memory that is used again and again: `values`, a flat tensor, and its `bytes`."""

    __slots__ = ("bytes", "count", "values")

    def __init__(self, values: Tensor) -> None:
        self.values, self.count = values, values.numel()
        self.bytes = bytes_of(values)


def space(use: object, count: int, dtype: torch.dtype, pinned: bool = False) -> Space:
    """Return `count` elements for this thread and use: the same memory each time, its content is what it was.

    pinned: a CUDA device can copy from it while other work goes on. The last view is kept, for most windows have one
    size: between two windows the interpreter's data leave the processor's cache, and then every step costs.
    """
    spaces: dict[tuple[object, torch.dtype], list[Space]] = _spaces.__dict__.setdefault("spaces", {})
    largest_and_last = spaces.get((use, dtype))
    if largest_and_last is None or largest_and_last[0].count < count:
        whole = Space(torch.empty(count, dtype=dtype, pin_memory=pinned))
        largest_and_last = spaces[use, dtype] = [whole, whole]
    if largest_and_last[1].count != count:
        largest_and_last[1] = Space(largest_and_last[0].values[:count])
    return largest_and_last[1]


@runtime_checkable
class ReadsAhead(Protocol):
    """A source that can tell the system what will be read."""

    def expect(self, name: str, start: int, stop: int) -> None:
        """Have the system read these elements from the disk meanwhile."""


@runtime_checkable
class Fills(Protocol):
    """A source that can read into memory of the caller."""

    def filler(self, name: str) -> Filler:
        """Return what reads this tensor."""


def window_of(width: int) -> int:
    """Return the elements of a window, a power of two. width: bytes of one element of all models together."""
    return min(max(1 << (AT_HAND // max(width, 1)).bit_length() - 1, WINDOWS[0]), WINDOWS[1])


class Readers:
    """The models of a pool as one thread reads them: what reads a tensor is looked up once for all of its windows."""

    def __init__(self, plan: PassPlan, window: int) -> None:
        self.plan, self.window = plan, window
        self.pinned = plan.device.startswith("cuda")
        self.complete = tuple(expert.complete for expert in plan.experts)
        sources = [expert.stored for expert in plan.experts if expert.complete]
        self._ahead = [source for source in (plan.base, *sources) if isinstance(source, ReadsAhead)]
        self._lanes: dict[int, tuple[torch.dtype, Filler | None]] = {}
        self._name = ""

    def expect(self, group: BlockGroup) -> None:
        """Have the system read the next group of grid blocks while this one is worked on."""
        for name, start, stop in group:
            for source in self._ahead:
                if name in source.tensors:
                    source.expect(name, start, stop)

    def source(self, position: int) -> TensorSource:
        """Return the base (−1) or the checkpoint of an expert."""
        return self.plan.base if position < 0 else self.plan.experts[position].stored

    def lane(self, position: int, name: str) -> tuple[torch.dtype, Filler | None]:
        """Return the dtype of a tensor in the base (−1) or an expert's checkpoint, and its filler where it has one."""
        if name != self._name:
            self._lanes.clear()
            self._name = name
        lane = self._lanes.get(position)
        if lane is None:
            source = self.source(position)
            filler = source.filler(name) if isinstance(source, Fills) else None
            lane = self._lanes[position] = DTYPES[source.tensors[name].dtype], filler
        return lane


class Reading:
    """Elements start … stop−1 of one tensor in all models; at any time a window of them is in memory."""

    def __init__(self, readers: Readers, name: str, start: int, stop: int) -> None:
        self.readers, self.name, self.start, self.stop = readers, name, start, stop
        self.plan = readers.plan
        self.info = self.plan.base.tensors[name]
        self.shape = tuple(self.info.shape)
        self._low, self._high, self._slot = start, stop, 0
        self._raw: dict[int, Tensor] = {}
        self._wide: dict[tuple[str, int], Tensor] = {}
        self._deltas: dict[int, tuple[int, Tensor]] = {}

    def window(self, start: int, stop: int, slot: int = 0) -> None:
        """Make elements start … stop−1 the window.

        slot: which set of buffers to use, where others are still copied from.
        """
        if (start, stop, slot) != (self._low, self._high, self._slot):
            self._low, self._high, self._slot = start, stop, slot
            self._raw.clear()
            self._wide.clear()

    def windows(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of every window, after it has become the window."""
        for start, stop in cut(self.start, self.stop, self.readers.window):
            self.window(start, stop)
            yield start, stop

    def raw_base(self) -> Tensor:
        """Return the window of the base in its own dtype."""
        return self._raw[-1] if -1 in self._raw else self._read(-1)

    def raw_expert(self, position: int) -> Tensor:
        """Return the window of an expert: its weights in their own dtype, or an adapter's delta in float32."""
        if position in self._raw:
            return self._raw[position]
        return self._read(position) if self.readers.complete[position] else self._formed(position)

    def _read(self, position: int) -> Tensor:
        low, high = self._low, self._high
        dtype, filler = self.readers.lane(position, self.name)
        memory = space((position, self._slot), high - low, dtype, self.readers.pinned)
        if filler is not None:
            filler(memory.bytes, low * dtype.itemsize)
            values = memory.values
        else:
            values = self.readers.source(position).read(self.name, low, high, memory.values)
        self._raw[position] = values
        return values

    def _formed(self, position: int) -> Tensor:
        """Return the window of an adapter's delta, which is formed from the factors for a whole grid block."""
        first = self._low // GRID * GRID
        start, delta = self._deltas.get(position, (first, None))
        if delta is None or start > self._low or start + delta.numel() < self._high:
            stop = max(min(first + GRID, self.stop), self._high)
            start, delta = self._deltas[position] = first, self.plan.experts[position].block(self.name, first, stop)
        self._raw[position] = delta[self._low - start : self._high - start]
        return self._raw[position]

    def stored(self, positions: Sequence[int], with_base: bool) -> Window:
        """Return the window as it is stored, for a fused loop. with_base: whether the base must be there."""
        complete = self.readers.complete
        deltas = tuple([not complete[position] for position in positions])
        base = self.raw_base() if with_base or True in deltas else None
        return Window(base, tuple([self.raw_expert(position) for position in positions]), deltas, self._low)

    # --- in float32, for what is not fused ------------------------------------------------------------------------

    def base(self) -> Tensor:
        """Return the window of the base in float32. Raises NonFiniteError."""
        if ("base", -1) not in self._wide:
            wide = self.raw_base().to(self.plan.device).to(torch.float32)
            self._wide["base", -1] = self._checked(wide, "the base", DROP)
        return self._wide["base", -1]

    def expert(self, on: str, position: int) -> Tensor:
        """Return the window of an expert in float32. on: 'weights' or 'deltas'. Raises NonFiniteError."""
        if (on, position) not in self._wide:
            expert, stored = self.plan.experts[position], self.raw_expert(position).to(self.plan.device)
            if on == "weights":
                wide = stored.to(torch.float32) if expert.complete else expert.weights(stored, self.base())
            else:
                wide = expert.delta(stored, self.base())
            # Weights of a float32 checkpoint are the buffer itself, which the next window overwrites.
            self._wide[on, position] = self._checked(wide, f"expert '{expert.name}'", KEEP_OUT)
        return self._wide[on, position]

    def _checked(self, values: Tensor, owner: str, remedy: str) -> Tensor:
        check_finite(values, self.name, owner, remedy.format(name=self.name))
        return values

    def block(self, on: str, with_base: bool, positions: Sequence[int], flat: bool) -> Block:
        """Return the window as a plug-in sees it, in float32. Raises NonFiniteError naming tensor and model.

        on: 'weights' or 'deltas'. flat: whether tensors have one dimension, or their own shape.
        """
        base = self.base() if with_base else None
        experts = tuple(self.expert(on, position) for position in positions)
        if not flat:
            base = None if base is None else base.view(self.shape)
            experts = tuple(values.view(self.shape) for values in experts)
        return Block(self.name, self.shape, self._low, self._high, base, experts, *self._ids(positions))

    def without_values(self, positions: Sequence[int]) -> Block:
        """Return the window without its values."""
        return Block(self.name, self.shape, self._low, self._high, None, (), *self._ids(positions))

    def _ids(self, positions: Sequence[int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        experts = [self.plan.experts[position] for position in positions]
        return tuple(expert.id for expert in experts), tuple(expert.tensors_id or expert.id for expert in experts)


def cut(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Consecutive (start, stop) of at most `size` elements."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)
