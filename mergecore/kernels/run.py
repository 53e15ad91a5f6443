"""A plain torch function on chunks of elements: as a fused loop where there is one, else operation by operation.

Both give the same bytes. The first chunk that a loop is used on is worked out both ways; a loop that differs is not used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergecore.kernels.library import Function, Library
from mergecore.kernels.source import BINS, STORED, Loop, Stored
from mergecore.kernels.trace import NotTraceableError, form, leaves, mapped, trace
from mergecore.method import Beside, Index

CHECKED = 1 << 12
"""Elements of the first chunk that are worked out both ways."""
EAGER = 1 << 16
"""Elements at once where there is no loop: base, eight experts and temporaries stay in the processor's cache."""
HALF = BINS // 2


@dataclass(frozen=True)
class Chunk:
    """Elements start … start+count−1 of a tensor, as they are stored: base (or None), experts, and which of those hold
    deltas. All flat, contiguous and of one length."""

    base: Tensor | None
    experts: tuple[Tensor, ...]
    deltas: tuple[bool, ...]
    start: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return self.experts[0].numel() if self.experts else 0 if self.base is None else self.base.numel()

    def part(self, first: int, end: int) -> Chunk:
        """Its elements first … end−1."""
        base = None if self.base is None else self.base[first:end]
        return Chunk(base, tuple(one[first:end] for one in self.experts), self.deltas, self.start + first)

    def parts(self, size: int) -> Iterator[tuple[int, int, Chunk]]:
        """(first, end, part) of at most `size` elements, in order."""
        for first in range(0, self.count, size):
            end = min(first + size, self.count)
            yield first, end, self.part(first, end)


@dataclass
class Fused:
    """One function and the loops it has become, by the form of its arguments and the dtypes it meets.

    function(base, experts, **arguments) → float32, stored in `out`; where out is None function(experts, **arguments) →
    int32 patterns, which are counted. build: whether a loop that is not at hand is worth building.
    """

    function: Callable[..., Tensor]
    on: Literal["weights", "deltas"]
    out: torch.dtype | None
    library: Library | None
    build: bool = True
    wait: bool = False
    windows: int = 0
    problem: str = ""
    """Why it runs operation by operation, where it does."""
    _loops: dict[Any, Loop | None] = field(default_factory=dict)
    _checked: dict[str, bool] = field(default_factory=dict)

    def stored(self, chunk: Chunk, arguments: Mapping[str, Any], target: Tensor) -> tuple[bool, bool]:
        """Write the function's result to `target`. Returns whether an input, and whether a result is not finite; where
        one is the target's content means nothing."""
        loop, call = self._loop(chunk, arguments)
        if call is not None and loop is not None:
            if loop.text not in self._checked:
                self._check(loop, call, chunk, arguments)
            if self._checked[loop.text]:
                flags = _called(call, loop, chunk, arguments, ctypes.c_void_p(target.data_ptr()))
                return bool(flags & 1), bool(flags & 2)
        return self._eager_stored(chunk, arguments, target)

    def counted(
        self, chunk: Chunk, arguments: Mapping[str, Any], windows: Sequence[int], bins: NDArray[np.uint32]
    ) -> bool:
        """Add to `bins` ((windows or 1) × 2^16): of patterns p the high half-word p >> 16 (+ 2^15), or where `windows`
        names high half-words the low ones inside each. Returns whether an input is not finite; nothing is added then."""
        loop, call = self._loop(chunk, arguments)
        if call is not None and loop is not None:
            before = bins.copy() if loop.text not in self._checked else None
            slots = _slots(windows)
            flags = _called(
                call, loop, chunk, arguments, ctypes.c_void_p(bins.ctypes.data),
                ctypes.c_void_p(slots.ctypes.data), ctypes.c_int64(windows[0] if windows else 0),
            )  # fmt: skip
            if flags:  # rare, so it may cost: what was just added is taken away again
                again = np.zeros_like(bins)
                _called(
                    call, loop, chunk, arguments, ctypes.c_void_p(again.ctypes.data),
                    ctypes.c_void_p(slots.ctypes.data), ctypes.c_int64(windows[0] if windows else 0),
                )  # fmt: skip
                bins -= again
                return True
            if before is None:
                return False
            wanted = before.copy()
            self._eager_counted(chunk, arguments, windows, wanted)
            self._checked[loop.text] = bool((wanted == bins).all())
            if self._checked[loop.text]:
                return False
            self._refuse(loop)
            bins[:] = before
        return self._eager_counted(chunk, arguments, windows, bins)

    def _loop(self, chunk: Chunk, arguments: Mapping[str, Any]) -> tuple[Loop | None, Function | None]:
        if self.library is None or self.library.compiler is None:
            return None, None
        beside = [one.dtype for one in leaves(arguments) if isinstance(one, Beside)]
        kinds = tuple(zip((one.dtype for one in chunk.experts), chunk.deltas, strict=True))
        key = (
            chunk.base.dtype if chunk.base is not None else None,
            kinds,
            tuple(beside),
            form(arguments),
            self.windows,
        )
        if key not in self._loops:
            self._loops[key] = self._traced(chunk, arguments, beside)
        loop = self._loops[key]
        if loop is None:
            return None, None
        found = self.library.function(loop.text, build=self.build, wait=self.wait)
        if found is None:
            self.problem = self.library.problem(loop.text)
        return loop, found

    def _traced(self, chunk: Chunk, arguments: Mapping[str, Any], beside: Sequence[torch.dtype]) -> Loop | None:
        held = [] if chunk.base is None else [Stored(chunk.base.dtype)]
        held += [Stored(one.dtype, delta) for one, delta in zip(chunk.experts, chunk.deltas, strict=True)]
        held += [Stored(dtype) for dtype in beside]
        if any(one.dtype not in STORED for one in held):
            self.problem = f"no loop reads {next(one.dtype for one in held if one.dtype not in STORED)}"
            return None
        try:
            found = trace(
                self.function, chunk.base is not None, len(chunk.experts), arguments, on_base=self.out is not None
            )
            loop = Loop(found, tuple(held), chunk.base is not None, self.on, self.out, self.windows)
            _ = loop.text
            return loop
        except (NotTraceableError, KeyError) as error:
            self.problem = str(error)
            return None

    def _check(self, loop: Loop, call: Function, chunk: Chunk, arguments: Mapping[str, Any]) -> None:
        """Compare the loop with the function itself on the first elements that it is used on."""
        assert self.out is not None
        few = chunk.part(0, min(CHECKED, chunk.count))
        found, wanted = torch.empty(few.count, dtype=self.out), torch.empty(few.count, dtype=self.out)
        flags = _called(call, loop, few, arguments, ctypes.c_void_p(found.data_ptr()))
        troubles = self._eager_stored(few, arguments, wanted)
        same = flags != 0 or torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
        self._checked[loop.text] = same and (flags & 1 != 0, flags & 2 != 0) == troubles
        if not self._checked[loop.text]:
            self._refuse(loop)

    def _refuse(self, loop: Loop) -> None:
        assert self.library is not None
        self.problem = "its loop gave other bytes than the function itself"
        self.library.refuse(loop.text, self.problem)

    # --- operation by operation -----------------------------------------------------------------------------------

    def _eager_stored(self, chunk: Chunk, arguments: Mapping[str, Any], target: Tensor) -> tuple[bool, bool]:
        read = made = False
        for first, end, part in chunk.parts(EAGER):
            base, experts, lost = formed(part, self.on)
            held = materialised(arguments, part.start, part.count, target.device)
            made |= not bool(torch.isfinite(target[first:end].copy_(self.function(base, experts, **held))).all())
            read |= lost
        return read, made

    def _eager_counted(
        self, chunk: Chunk, arguments: Mapping[str, Any], windows: Sequence[int], bins: NDArray[np.uint32]
    ) -> bool:
        found = np.zeros_like(bins)
        for _, _, part in chunk.parts(EAGER):
            _, experts, lost = formed(part, self.on)
            if lost:
                return True
            pattern = self.function(experts, **materialised(arguments, part.start, part.count, experts[0].device))
            high = pattern >> 16
            if not self.windows:
                found += _counts(high + HALF)
            for slot, window in enumerate(windows):
                found[slot * BINS : (slot + 1) * BINS] += _counts(pattern[high == window] & (BINS - 1))
        bins += found
        return False


def _counts(numbers: Tensor) -> NDArray[np.uint32]:
    return torch.bincount(numbers, minlength=BINS).cpu().numpy().astype(np.uint32)


def formed(chunk: Chunk, on: str) -> tuple[Tensor | None, list[Tensor], bool]:
    """Base and experts in float32, the experts' weights or deltas, and whether one of the values is not finite."""
    base = None if chunk.base is None else chunk.base.to(torch.float32)
    experts = []
    for stored, delta in zip(chunk.experts, chunk.deltas, strict=True):
        wide = stored.to(torch.float32)
        if on == "deltas" and not delta:
            assert base is not None
            wide = wide - base
        elif on == "weights" and delta:
            assert base is not None
            wide = base + wide
        experts.append(wide)
    held = [one for one in (base, *experts) if one is not None]
    return base, experts, any(not bool(torch.isfinite(one).all()) for one in held)


def materialised(arguments: Mapping[str, Any], start: int, count: int, device: torch.device | str) -> dict[str, Any]:
    """The arguments with tensors where they name what lies beside a block or its flat index."""

    def made(leaf: Any) -> Any:
        if isinstance(leaf, Index):
            return torch.arange(start, start + count, device=device)
        if isinstance(leaf, Beside):
            return leaf.read(start, start + count).to(device, torch.float32)
        return leaf

    found: dict[str, Any] = mapped(arguments, made)
    return found


def _called(
    call: Function, loop: Loop, chunk: Chunk, arguments: Mapping[str, Any], target: ctypes.c_void_p, *more: Any
) -> int:
    held = leaves(arguments)
    beside = [one.read(chunk.start, chunk.start + chunk.count).contiguous() for one in held if isinstance(one, Beside)]
    arrays = [*([chunk.base] if chunk.base is not None else []), *chunk.experts, *beside]
    reals = [*loop.trace.literals, *(one for one in held if isinstance(one, float))]
    wholes = [one for one in held if isinstance(one, int)]
    return call(
        (ctypes.c_void_p * len(arrays))(*[one.data_ptr() for one in arrays]), target,
        (ctypes.c_double * max(len(reals), 1))(*reals), (ctypes.c_int64 * max(len(wholes), 1))(*wholes),
        ctypes.c_int64(chunk.start), ctypes.c_int64(chunk.count), *more,
    )  # fmt: skip


def _slots(windows: Sequence[int]) -> NDArray[np.int8]:
    """Per high half-word (+ 2^15) the number of its window, −1 where it has none."""
    slots = np.full(BINS, -1, dtype=np.int8)
    for slot, window in enumerate(windows):
        slots[window + HALF] = slot
    return slots
