"""A plain torch function on chunks of elements: as a fused loop where there is one, else operation by operation.

Both give the same bytes. The first chunk that a loop is used on is worked out both ways; a loop that differs is not used.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergecore.engine.kernels.device import device_function
from mergecore.engine.kernels.source import BINS, COPIES, LANES, STORED, Loop, Out, Stored, stride
from mergecore.engine.kernels.trace import NotTraceableError, leaves_and_form, mapped, trace
from mergecore.native.library import Function, Library
from mergecore.plugins.block import Beside, Index

CHECKED = 1 << 12
"""Elements of the first chunk that are worked out both ways."""
EAGER = 1 << 16
"""Elements at once where there is no loop: base, eight experts and temporaries stay in the processor's cache."""
HALF = BINS // 2
THREADS = 256
"""Threads of a block on a CUDA device, one per element."""

Arguments = TypeVar("Arguments")


@dataclass(frozen=True)
class Chunk:
    """Elements from flat index `start` on, as they are stored: base (or None), experts, and which of those hold deltas.
    All flat, contiguous and of one length."""

    base: Tensor | None
    experts: tuple[Tensor, ...]
    deltas: tuple[bool, ...]
    start: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return self.experts[0].numel() if self.experts else 0 if self.base is None else self.base.numel()

    @property
    def kind(self) -> Any:
        """What of it decides the loop."""
        return None if self.base is None else self.base.dtype, tuple(one.dtype for one in self.experts), self.deltas

    def part(self, first: int, end: int) -> Chunk:
        """Its elements first … end−1."""
        base = None if self.base is None else self.base[first:end]
        return Chunk(base, tuple(one[first:end] for one in self.experts), self.deltas, self.start + first)

    def parts(self, size: int) -> Iterator[tuple[int, int, Chunk]]:
        """(first, end, part) of at most `size` elements, in order."""
        if 0 < self.count <= size:
            yield 0, self.count, self
            return
        for first in range(0, self.count, size):
            end = min(first + size, self.count)
            yield first, end, self.part(first, end)


@dataclass
class Fused:
    """One function and the loops it has become, by the form of its arguments and the dtypes it meets.

    function(models, arguments) → float32, stored in `out` or summed; or int32 patterns, which are counted: of each their
    high half-words, or the low ones inside `windows` high ones. models: the experts, as `on` says, and before them the base
    where `with_base`. build: whether a loop that is not at hand is worth building; wait: whether work waits for it.
    """

    function: Callable[[Sequence[Tensor], Any], Any]
    on: Literal["weights", "deltas"]
    out: Out
    library: Library | None
    build: bool = True
    wait: bool = False
    windows: int = 0
    with_base: bool = True
    problem: str = ""
    """Why it runs operation by operation, where it does."""
    loops: dict[Any, Loop | None] = field(default_factory=dict)
    checked: dict[str, bool] = field(default_factory=dict)

    def given(self, arguments: Any) -> Given:
        """Return the function with these arguments, for as many chunks as they hold for."""
        leaves, form = leaves_and_form(arguments)
        return Given(
            self,
            arguments,
            form,
            tuple([leaf for leaf in leaves if isinstance(leaf, Beside)]),
            tuple([leaf for leaf in leaves if isinstance(leaf, float)]),
            (ctypes.c_int64 * max(len(leaves), 1))(*[leaf for leaf in leaves if isinstance(leaf, int)]),
        )

    def loop(self, chunk: Chunk, given: Given) -> Loop | None:
        """The loop for such chunks and arguments; None where the function is none."""
        key = (chunk.kind, given.form)
        if key not in self.loops:
            self.loops[key] = self._traced(chunk, given)
        return self.loops[key]

    def _traced(self, chunk: Chunk, given: Given) -> Loop | None:
        held = [] if chunk.base is None else [Stored(chunk.base.dtype)]
        held += [Stored(one.dtype, delta) for one, delta in zip(chunk.experts, chunk.deltas, strict=True)]
        held += [Stored(one.dtype) for one in given.beside]
        if any(one.dtype not in STORED for one in held):
            self.problem = f"no loop reads {next(one.dtype for one in held if one.dtype not in STORED)}"
            return None
        try:
            based = chunk.base is not None
            found = trace(self.function, based + len(chunk.experts), given.arguments, based and not self.with_base)
            loop = Loop(found, tuple(held), based, self.on, self.out, self.windows)
            _ = loop.text
            return loop
        except (NotTraceableError, KeyError) as error:
            self.problem = str(error)
            return None

    def refuse(self, loop: Loop) -> None:
        """Never use this loop again."""
        assert self.library is not None
        self.checked[loop.text] = False
        self.problem = "its loop gave other bytes than the function itself"
        self.library.refuse(loop.text, self.problem)


@dataclass
class Given:
    """A function with its arguments."""

    fused: Fused
    arguments: Any
    form: Any
    beside: tuple[Beside, ...]
    reals: tuple[float, ...]
    wholes: Any
    _ready: dict[Any, tuple[Loop, Function, Any]] = field(default_factory=dict)

    def store(self, chunk: Chunk, target: Tensor) -> tuple[bool, bool]:
        """Write the function's result to `target`. Returns whether an input, and whether a result is not finite; where
        one is the target's content means nothing."""
        ready = self._loop(chunk)
        if ready is None:
            return self._plainly_stored(chunk, target)
        loop = ready[0]
        if loop.text not in self.fused.checked and not self._right(ready, chunk):
            return self._plainly_stored(chunk, target)
        flags = self._called(ready, chunk, target.data_ptr())
        return bool(flags & 1), bool(flags & 2)

    def launch(self, chunk: Chunk, target: Tensor) -> Tensor:
        """Write the function's result to `target`, on whose device the chunk is. Returns two int32 there: whether an input,
        and whether a result is not finite. Nothing here waits for the device."""
        flags = torch.zeros(2, dtype=torch.int32, device=target.device)
        loop = self.fused.loop(chunk, self) if target.is_cuda and self.fused.library is not None else None
        call = device_function(loop.text) if loop is not None else None
        if loop is None or call is None:
            models, _ = formed(chunk, self.fused.on, check=False)
            target.copy_(self._result(chunk, models, target.device))
            for number, values in ((0, models), (1, [target])):
                for tensor in values:
                    flags[number].logical_or_((~torch.isfinite(tensor)).any())
            return flags
        held = materialised(self.beside, chunk.start, chunk.count, target.device)
        reals = torch.tensor([*loop.trace.literals, *self.reals, 0.0], dtype=torch.float64)
        whole = torch.tensor([chunk.start, chunk.count, *self.wholes], dtype=torch.int64)
        arrays = [*([] if chunk.base is None else [chunk.base]), *chunk.experts, *held, target]
        more = [reals.to(target.device), whole.to(target.device), flags]
        blocks = (chunk.count + THREADS - 1) // THREADS
        call(grid=(blocks, 1, 1), block=(THREADS, 1, 1), args=[*arrays, *more])
        return flags

    def count(self, chunk: Chunk, windows: Any, bins: NDArray[np.uint32]) -> bool:
        """Add to `bins` (made by `empty_bins`). windows: per result its high half-words, one after the other. Returns
        whether an input is not finite; nothing is added then."""
        ready = self._loop(chunk)
        if ready is None:
            return self._plainly_counted(chunk, windows, bins)
        loop = ready[0]
        wanted = (ctypes.c_int64 * max(len(windows), 1))(*windows)
        before = bins.copy() if loop.text not in self.fused.checked else None
        if self._called(ready, chunk, bins.ctypes.data, wanted):
            again = np.zeros_like(bins)  # rare, so it may cost: what was just added is taken away again
            self._called(ready, chunk, again.ctypes.data, wanted)
            bins -= again
            return True
        if before is not None:
            plain = before.copy()
            self._plainly_counted(chunk, windows, plain)
            if not all(map(np.array_equal, *(counts_of(one, self.fused.windows) for one in (plain, bins)))):
                self.fused.refuse(loop)
                bins[:] = before
                return self._plainly_counted(chunk, windows, bins)
            self.fused.checked[loop.text] = True
        return False

    def sum(self, chunk: Chunk, lanes: NDArray[np.float64]) -> bool:
        """Add to `lanes` (float64, (results, LANES)), whose chunks start at multiples of LANES; `total_of` folds them. Returns
        whether an input is not finite; the lanes then mean nothing."""
        ready = self._loop(chunk)
        if ready is None:
            return self._plainly_summed(chunk, lanes)
        loop, plain = ready[0], None if ready[0].text in self.fused.checked else lanes.copy()
        if self._called(ready, chunk, lanes.ctypes.data):
            return True
        if plain is not None:
            self._plainly_summed(chunk, plain)
            if plain.tobytes() != lanes.tobytes():
                self.fused.refuse(loop)
                lanes[:] = plain
            else:
                self.fused.checked[loop.text] = True
        return False

    def _loop(self, chunk: Chunk) -> tuple[Loop, Function, Any] | None:
        """The loop for such chunks, the function it has become, and its numbers; None where there is none as yet."""
        fused, kind = self.fused, chunk.kind
        if fused.library is None or fused.library.compiler is None:
            return None
        ready = self._ready.get(kind)
        if ready is None:
            loop = fused.loop(chunk, self)
            if loop is None:
                return None
            call = fused.library.function(loop.text, build=fused.build, wait=fused.wait)
            if call is None:
                fused.problem = fused.library.problem(loop.text)
                return None
            reals = (*loop.trace.literals, *self.reals)
            ready = self._ready[kind] = loop, call, (ctypes.c_double * max(len(reals), 1))(*reals)
        return ready if fused.checked.get(ready[0].text, True) else None

    def _called(self, ready: tuple[Loop, Function, Any], chunk: Chunk, target: int, *more: Any) -> int:
        _, call, reals = ready
        beside = [one.read(chunk.start, chunk.start + chunk.count).contiguous() for one in self.beside]
        arrays = [*([] if chunk.base is None else [chunk.base]), *chunk.experts, *beside]
        pointers = (ctypes.c_void_p * len(arrays))(*[one.data_ptr() for one in arrays])
        return call(
            pointers, ctypes.c_void_p(target), reals, self.wholes, ctypes.c_int64(chunk.start), ctypes.c_int64(chunk.count),
            *more,
        )  # fmt: skip

    def _right(self, ready: tuple[Loop, Function, Any], chunk: Chunk) -> bool:
        """Whether the loop gives the function's own bytes on the first elements that it is used on."""
        fused, loop = self.fused, ready[0]
        assert isinstance(fused.out, torch.dtype)
        few = chunk.part(0, min(CHECKED, chunk.count))
        found, wanted = torch.empty(few.count, dtype=fused.out), torch.empty(few.count, dtype=fused.out)
        flags = self._called(ready, few, found.data_ptr())
        troubles = self._plainly_stored(few, wanted)
        same = flags != 0 or torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
        if same and (flags & 1 != 0, flags & 2 != 0) == troubles:
            fused.checked[loop.text] = True
            return True
        fused.refuse(loop)
        return False

    # --- operation by operation -----------------------------------------------------------------------------------

    def _result(self, chunk: Chunk, models: Sequence[Tensor], device: torch.device) -> Any:
        """Return the function's own result for a chunk. models: as `formed` gives them."""
        seen = models if chunk.base is None or self.fused.with_base else models[1:]
        return self.fused.function(seen, materialised(self.arguments, chunk.start, chunk.count, device))

    def _plainly_stored(self, chunk: Chunk, target: Tensor) -> tuple[bool, bool]:
        read = made = False
        for first, end, part in chunk.parts(EAGER):
            models, lost = formed(part, self.fused.on)
            found = target[first:end].copy_(self._result(part, models, target.device))
            made |= not bool(torch.isfinite(found).all())
            read |= lost
        return read, made

    def _plainly_counted(self, chunk: Chunk, windows: Sequence[int], bins: NDArray[np.uint32]) -> bool:
        found, per = np.zeros_like(bins), self.fused.windows
        for _, _, part in chunk.parts(EAGER):
            models, lost = formed(part, self.fused.on)
            if lost:
                return True
            for result, pattern in enumerate(self._result(part, models, models[0].device)):
                high = pattern >> 16
                if not per:
                    found[result, 0, :BINS] += _counts(high + HALF)
                for slot, window in enumerate(windows[result * per : (result + 1) * per]):
                    inside = pattern[high == window] & (BINS - 1)
                    found[result, 0, slot * BINS : (slot + 1) * BINS] += _counts(inside)
        bins += found
        return False

    def _plainly_summed(self, chunk: Chunk, lanes: NDArray[np.float64]) -> bool:
        for _, _, part in chunk.parts(EAGER):
            models, lost = formed(part, self.fused.on)
            if lost:
                return True
            for number, values in enumerate(self._result(part, models, models[0].device)):
                wide = values.cpu().numpy().astype(np.float64)
                whole = len(wide) // LANES * LANES
                for one in wide[:whole].reshape(-1, LANES):
                    lanes[number] += one
                lanes[number, : len(wide) - whole] += wide[whole:]
        return False


def total_of(lanes: NDArray[np.float64]) -> Any:
    """Per result, in as many dimensions as there are before the last, the sum of its lanes, halves onto halves: as lists."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0].tolist()


def empty_bins(results: int, windows: int) -> NDArray[np.uint32]:
    """What `Given.count` counts into; `counts_of` reads it."""
    return np.zeros((results, COPIES, stride(windows)), dtype=np.uint32)


def counts_of(bins: NDArray[np.uint32], windows: int) -> list[NDArray[np.uint32]]:
    """Per result, and in it per window (or of the high half-words), the 2^16 counts."""
    whole: NDArray[np.uint32] = functools.reduce(np.add, (bins[:, copy] for copy in range(COPIES)))
    return [row[slot * BINS : (slot + 1) * BINS] for row in whole for slot in range(max(windows, 1))]


def _counts(numbers: Tensor) -> NDArray[np.uint32]:
    return torch.bincount(numbers, minlength=BINS).cpu().numpy().astype(np.uint32)


def formed(chunk: Chunk, on: str, check: bool = True) -> tuple[list[Tensor], bool]:
    """Base (where there is one) and experts in float32, the experts' weights or deltas, and (asked to check) whether one is
    not finite."""
    base = None if chunk.base is None else chunk.base.to(torch.float32)
    models = [] if base is None else [base]
    for stored, delta in zip(chunk.experts, chunk.deltas, strict=True):
        wide = stored.to(torch.float32)
        if on == "deltas" and not delta:
            assert base is not None
            wide = wide - base
        elif on == "weights" and delta:
            assert base is not None
            wide = base + wide
        models.append(wide)
    return models, check and any(not bool(torch.isfinite(model).all()) for model in models)


def materialised(arguments: Arguments, start: int, count: int, device: torch.device | str) -> Arguments:
    """Return the arguments with tensors where they name what lies beside a block or its flat index."""

    def made(leaf: Any) -> Any:
        if isinstance(leaf, Index):
            return torch.arange(start, start + count, device=device)
        if isinstance(leaf, Beside):
            return leaf.read(start, start + count).to(device, torch.float32)
        return leaf

    filled: Arguments = mapped(arguments, made)
    return filled
