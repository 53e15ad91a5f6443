"""One piece of every model of a pool, read when first asked for, into buffers that are used again and again."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mergecore.delta import FullExpert
from mergecore.kernels.run import Chunk
from mergecore.method import Block
from mergecore.passes import PassPlan, Unit
from mergecore.snapshot import DTYPES, check_finite

KEEP_OUT = (
    "repair the checkpoint, or leave the tensor as the base has it: select: [{{names: '{name}', take: copy}}, {{}}]"
)
"""What to do about values of a model that are not finite."""

WINDOW = 1 << 18
"""Elements of every model that are at hand at once: what lies between reading and writing stays in the processor's cache."""

_buffers = threading.local()


def buffer(place: object, count: int, dtype: torch.dtype, pinned: bool = False) -> Tensor:
    """A flat tensor of `count` elements for this thread and place, its content left from before; the same memory each time.

    pinned: from which a CUDA device can copy while other work goes on.
    """
    held: dict[tuple[object, torch.dtype], Tensor] = _buffers.__dict__.setdefault("held", {})
    found = held.get((place, dtype))
    if found is None or found.numel() < count:
        found = held[place, dtype] = torch.empty(count, dtype=dtype, pin_memory=pinned)
    return found[:count]


@runtime_checkable
class ReadsAhead(Protocol):
    """A source that can have the system begin to read from the disk."""

    def expect(self, name: str, start: int, stop: int) -> None:
        """These elements will be read soon."""


def expect(plan: PassPlan, unit: Unit) -> None:
    """Have the system read ahead what the next unit is made of, while this one is worked on."""
    held = [expert.held for expert in plan.experts if isinstance(expert, FullExpert)]
    for source in (plan.base, *held):
        if isinstance(source, ReadsAhead):
            for name, start, stop in unit:
                if name in source.tensors:
                    source.expect(name, start, stop)


class Reading:
    """Elements start … stop−1 of one tensor; at any time a part of them, the `window`, is at hand."""

    def __init__(self, plan: PassPlan, name: str, start: int, stop: int) -> None:
        self.plan, self.name, self.start, self.stop = plan, name, start, stop
        self.shape = tuple(plan.base.tensors[name].shape)
        self.reuse = True
        """Whether what is read lies in this thread's buffers, where the next reading will overwrite it."""
        self._low, self._high, self._slot = start, stop, 0
        self._raw: dict[int, Tensor] = {}
        self._wide: dict[tuple[str, int], Tensor] = {}
        self._deltas: dict[int, Tensor] = {}

    def window(self, start: int, stop: int, slot: int = 0) -> None:
        """Have elements start … stop−1 at hand from now on. slot: one of several sets of buffers, for windows of which
        some are still being copied from."""
        if (start, stop, slot) != (self._low, self._high, self._slot):
            self._low, self._high, self._slot = start, stop, slot
            self._raw.clear()
            self._wide.clear()

    def raw_base(self) -> Tensor:
        """The base in its own dtype."""
        if -1 not in self._raw:
            dtype = DTYPES[self.plan.base.tensors[self.name].dtype]
            space = self._space(-1, dtype)
            self._raw[-1] = self.plan.base.read(self.name, self._low, self._high, space)
        return self._raw[-1]

    def raw_expert(self, position: int) -> Tensor:
        """What the expert's files hold, in its own dtype: weights, or of an adapter the delta in float32."""
        expert = self.plan.experts[position]
        if position not in self._raw:
            if expert.complete:
                space = self._space(position, expert.dtype(self.name))
                self._raw[position] = expert.block(self.name, self._low, self._high, space)
            else:  # formed from factors over fixed rows: for the whole piece at once
                if position not in self._deltas:
                    self._deltas[position] = expert.block(self.name, self.start, self.stop)
                whole = self._deltas[position]
                self._raw[position] = whole[self._low - self.start : self._high - self.start]
        return self._raw[position]

    def _space(self, position: int, dtype: torch.dtype) -> Tensor | None:
        if not self.reuse:
            return None
        return buffer((position, self._slot), self._high - self._low, dtype, self.plan.device.startswith("cuda"))

    def chunk(self, positions: Sequence[int], with_base: bool) -> Chunk:
        """The window as it is stored."""
        deltas = tuple(not self.plan.experts[position].complete for position in positions)
        base = self.raw_base() if with_base or any(deltas) else None
        return Chunk(base, tuple(self.raw_expert(position) for position in positions), deltas, self._low)

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
