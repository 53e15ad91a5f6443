"""One piece of every model of a pool, read when first asked for, into buffers that are used again and again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mergecore.checkpoints.experts import FullExpert
from mergecore.engine.kernels.run import Chunk
from mergecore.engine.pass_plan import PassPlan, Unit
from mergecore.identity.content import GRID, bytes_of
from mergecore.plugins.block import Block
from mergecore.tensors.finite import KEEP_OUT, check_finite
from mergecore.tensors.source import TensorSource
from mergecore.tensors.torch_dtypes import DTYPES

Filler = Callable[[memoryview, int], None]
"""Fills memory with a tensor's bytes, from this byte of it on."""
AT_HAND = 5 << 19
"""Bytes of all models that are at hand at once: what lies between reading and writing stays in the processor's cache."""
WINDOWS = 1 << 14, 1 << 19
"""The fewest and the most elements of a window."""

_spaces = threading.local()


class Space:
    """Memory that is used again and again: as a flat tensor, and as its bytes."""

    __slots__ = ("bytes", "count", "values")

    def __init__(self, values: Tensor) -> None:
        self.values, self.count = values, values.numel()
        self.bytes = bytes_of(values)


def space(place: object, count: int, dtype: torch.dtype, pinned: bool = False) -> Space:
    """`count` elements for this thread and place, their content left from before; the same memory each time.

    pinned: from which a CUDA device can copy while other work goes on. What is asked for over and over, whole windows, is
    found made: between two windows the interpreter's own data have left the processor's cache, and every step costs.
    """
    held: dict[tuple[object, torch.dtype], list[Space]] = _spaces.__dict__.setdefault("held", {})
    found = held.get((place, dtype))
    if found is None or found[0].count < count:
        whole = Space(torch.empty(count, dtype=dtype, pin_memory=pinned))
        found = held[place, dtype] = [whole, whole]
    if found[1].count != count:
        found[1] = Space(found[0].values[:count])
    return found[1]


@runtime_checkable
class ReadsAhead(Protocol):
    """A source that can have the system begin to read from the disk."""

    def expect(self, name: str, start: int, stop: int) -> None:
        """These elements will be read soon."""


@runtime_checkable
class Fills(Protocol):
    """A source that can read into given memory."""

    def filler(self, name: str) -> Filler:
        """What reads this tensor."""


def window_of(width: int) -> int:
    """Elements of every model that are at hand at once, a power of two; width: bytes of one element of all of them."""
    return min(max(1 << (AT_HAND // max(width, 1)).bit_length() - 1, WINDOWS[0]), WINDOWS[1])


class Readers:
    """The models of a pool as one thread reads them: who reads a tensor, looked up once for all of its pieces."""

    def __init__(self, plan: PassPlan, window: int) -> None:
        self.plan, self.window = plan, window
        self.pinned = plan.device.startswith("cuda")
        self.complete = tuple(expert.complete for expert in plan.experts)
        held = [expert.held for expert in plan.experts if isinstance(expert, FullExpert)]
        self._ahead = [source for source in (plan.base, *held) if isinstance(source, ReadsAhead)]
        self._lanes: dict[int, tuple[torch.dtype, Filler | None]] = {}
        self._name = ""

    def expect(self, unit: Unit) -> None:
        """Have the system read ahead what the next unit is made of, while this one is worked on."""
        for name, start, stop in unit:
            for source in self._ahead:
                if name in source.tensors:
                    source.expect(name, start, stop)

    def source(self, position: int) -> TensorSource:
        """The base (−1) or the checkpoint of an expert."""
        return self.plan.base if position < 0 else self.plan.experts[position].sources()[0]

    def lane(self, position: int, name: str) -> tuple[torch.dtype, Filler | None]:
        """Of the base (−1) or of an expert's checkpoint the dtype of a tensor, and what reads it into given memory."""
        if name != self._name:
            self._lanes.clear()
            self._name = name
        found = self._lanes.get(position)
        if found is None:
            source = self.source(position)
            filler = source.filler(name) if isinstance(source, Fills) else None
            found = self._lanes[position] = DTYPES[source.tensors[name].dtype], filler
        return found


class Reading:
    """Elements start … stop−1 of one tensor; at any time a part of them, the `window`, is at hand."""

    def __init__(self, readers: Readers, name: str, start: int, stop: int) -> None:
        self.readers, self.name, self.start, self.stop = readers, name, start, stop
        self.plan = readers.plan
        self.shape = tuple(self.plan.base.tensors[name].shape)
        self.reuse = True
        """Whether what is read lies in this thread's memory, where the next reading will overwrite it."""
        self._low, self._high, self._slot = start, stop, 0
        self._raw: dict[int, Tensor] = {}
        self._wide: dict[tuple[str, int], Tensor] = {}
        self._deltas: dict[int, tuple[int, Tensor]] = {}

    def window(self, start: int, stop: int, slot: int = 0) -> None:
        """Have elements start … stop−1 at hand from now on. slot: one of several sets of buffers, for windows of which
        some are still being copied from."""
        if (start, stop, slot) != (self._low, self._high, self._slot):
            self._low, self._high, self._slot = start, stop, slot
            self._raw.clear()
            self._wide.clear()

    def windows(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of all windows, one after another at hand."""
        for start in range(self.start, self.stop, self.readers.window):
            stop = min(start + self.readers.window, self.stop)
            self.window(start, stop)
            yield start, stop

    def raw_base(self) -> Tensor:
        """The base in its own dtype."""
        return self._raw[-1] if -1 in self._raw else self._read(-1)

    def raw_expert(self, position: int) -> Tensor:
        """What the expert's files hold, in its own dtype: weights, or of an adapter the delta in float32."""
        if position in self._raw:
            return self._raw[position]
        return self._read(position) if self.readers.complete[position] else self._formed(position)

    def _read(self, position: int) -> Tensor:
        low, high = self._low, self._high
        dtype, filler = self.readers.lane(position, self.name)
        held = space((position, self._slot), high - low, dtype, self.readers.pinned) if self.reuse else None
        if held is not None and filler is not None:
            filler(held.bytes, low * dtype.itemsize)
            values = held.values
        else:
            source = self.readers.source(position)
            values = source.read(self.name, low, high, None if held is None else held.values)
        self._raw[position] = values
        return values

    def _formed(self, position: int) -> Tensor:
        """A window of an adapter's delta, which is formed from its factors for a block of the grid at once."""
        first = self._low // GRID * GRID
        found = self._deltas.get(position)
        if found is None or found[0] > self._low or found[0] + found[1].numel() < self._high:
            stop = max(min(first + GRID, self.stop), self._high)
            found = self._deltas[position] = first, self.plan.experts[position].block(self.name, first, stop)
        self._raw[position] = found[1][self._low - found[0] : self._high - found[0]]
        return self._raw[position]

    def chunk(self, positions: Sequence[int], with_base: bool) -> Chunk:
        """The window as it is stored."""
        complete = self.readers.complete
        deltas = tuple([not complete[position] for position in positions])
        base = self.raw_base() if with_base or True in deltas else None
        return Chunk(base, tuple([self.raw_expert(position) for position in positions]), deltas, self._low)

    # --- in float32, for what is not fused ------------------------------------------------------------------------

    def base(self) -> Tensor:
        """The base in float32, checked to be finite."""
        if ("base", -1) not in self._wide:
            wide = self.raw_base().to(self.plan.device).to(torch.float32)
            self._wide["base", -1] = self._checked(wide, "the base")
        return self._wide["base", -1]

    def expert(self, on: str, position: int) -> Tensor:
        """An expert's weights or delta in float32, checked to be finite."""
        if (on, position) not in self._wide:
            expert, held = self.plan.experts[position], self.raw_expert(position).to(self.plan.device)
            if on == "weights":
                wide = held.to(torch.float32) if expert.complete else expert.weights(held, self.base())
            else:
                wide = expert.delta(held, self.base())
            # Some forms are the buffer itself (a float32 checkpoint), which the next window overwrites; so be it.
            self._wide[on, position] = self._checked(wide, f"expert '{expert.name}'")
        return self._wide[on, position]

    def _checked(self, values: Tensor, owner: str) -> Tensor:
        check_finite(values, self.name, owner, KEEP_OUT.format(name=self.name))
        return values

    def block(self, on: str, with_base: bool, positions: Sequence[int], flat: bool) -> Block:
        """What a kernel sees of the window. Raises NonFiniteError naming tensor and model."""
        base = self.base() if with_base else None
        experts = tuple(self.expert(on, position) for position in positions)
        if not flat:
            base = None if base is None else base.view(self.shape)
            experts = tuple(values.view(self.shape) for values in experts)
        return Block(self.name, self.shape, self._low, self._high, base, experts, self._ids(positions))

    def place(self, positions: Sequence[int]) -> Block:
        """The window without its values."""
        return Block(self.name, self.shape, self._low, self._high, None, (), self._ids(positions))

    def _ids(self, positions: Sequence[int]) -> tuple[str, ...]:
        return tuple(self.plan.experts[position].id for position in positions)


def cut(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Consecutive (start, stop) of at most `size` elements."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)
