"""Runs a plain torch function on windows: as a fused loop where there is one, else operation by operation.

Both give the same bytes. The first elements of a loop are worked out both ways, and a loop that differs is never used.
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
"""Elements that are worked out both ways when a loop is first used."""
EAGER = 1 << 16
"""Elements at a time where there is no loop: base, eight experts and temporaries stay in the processor's cache."""
HALF = BINS // 2
THREADS = 256
"""Threads of a block on a CUDA device, one per element."""

Arguments = TypeVar("Arguments")


@dataclass(frozen=True)
class Window:
    """Elements from flat index `start` on, in the dtypes of the files.

    Tensors are flat, contiguous and of one length. deltas: per expert, whether its tensor is a delta, not weights.
    """

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
        """The dtypes, and which tensors are deltas: what decides the loop."""
        experts = tuple([expert.dtype for expert in self.experts])
        return None if self.base is None else self.base.dtype, experts, self.deltas

    def part(self, first: int, end: int) -> Window:
        """Return its elements first … end−1."""
        base = None if self.base is None else self.base[first:end]
        experts = tuple([expert[first:end] for expert in self.experts])
        return Window(base, experts, self.deltas, self.start + first)

    def parts(self, size: int) -> Iterator[tuple[int, int, Window]]:
        """Yield (first, end, part) of at most `size` elements, in order."""
        if 0 < self.count <= size:
            yield 0, self.count, self
            return
        for first in range(0, self.count, size):
            end = min(first + size, self.count)
            yield first, end, self.part(first, end)


@dataclass
class Fused:
    """A function and its loops: one for each form of its arguments and the dtypes of the models.

    function(models, arguments) returns float32, which is stored as dtype `out` or summed; or int32 patterns, which are
    counted. models: the experts, as `on` says, and before them the base where `with_base`. build: whether a loop that
    the library does not have is worth building; wait: whether work waits for it. slots: of a count, per result the
    number of high half-words inside which low ones are counted; 0: the high ones are counted.
    """

    function: Callable[[Sequence[Tensor], Any], Any]
    on: Literal["weights", "deltas"]
    out: Out
    library: Library | None
    build: bool = True
    wait: bool = False
    slots: int = 0
    with_base: bool = True
    problem: str = ""
    """Why it runs operation by operation; '' where it does not."""
    loops: dict[Any, Loop | None] = field(default_factory=dict)
    checked: dict[str, bool] = field(default_factory=dict)

    def bind(self, arguments: Any) -> BoundFunction:
        """Return the function with its arguments, for any number of windows."""
        leaves, form = leaves_and_form(arguments)
        return BoundFunction(
            self,
            arguments,
            form,
            tuple([leaf for leaf in leaves if isinstance(leaf, Beside)]),
            tuple([leaf for leaf in leaves if isinstance(leaf, float)]),
            (ctypes.c_int64 * max(len(leaves), 1))(*[leaf for leaf in leaves if isinstance(leaf, int)]),
        )

    def loop(self, window: Window, bound: BoundFunction) -> Loop | None:
        """Return the loop for such windows and arguments; None where the function cannot be one."""
        key = (window.kind, bound.form)
        if key not in self.loops:
            self.loops[key] = self._traced(window, bound)
        return self.loops[key]

    def _traced(self, window: Window, bound: BoundFunction) -> Loop | None:
        inputs = [] if window.base is None else [Stored(window.base.dtype)]
        inputs += [Stored(expert.dtype, delta) for expert, delta in zip(window.experts, window.deltas, strict=True)]
        inputs += [Stored(beside.dtype) for beside in bound.beside]
        unknown = [stored.dtype for stored in inputs if stored.dtype not in STORED]
        if unknown:
            self.problem = f"no loop reads {unknown[0]}"
            return None
        try:
            based = window.base is not None
            traced = trace(self.function, based + len(window.experts), bound.arguments, based and not self.with_base)
            loop = Loop(traced, tuple(inputs), based, self.on, self.out, self.slots)
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
class BoundFunction:
    """A function with its arguments.

    beside: the tensors that are read beside a window. reals, wholes: the float and int arguments, as a loop takes them.
    """

    fused: Fused
    arguments: Any
    form: Any
    beside: tuple[Beside, ...]
    reals: tuple[float, ...]
    wholes: Any
    _ready: dict[Any, tuple[Loop, Function, Any]] = field(default_factory=dict)

    def store(self, window: Window, target: Tensor) -> tuple[bool, bool]:
        """Write the function's result to `target`. Returns whether an input, and whether a result is not finite.

        Where one of them is not, the content of `target` means nothing.
        """
        ready = self._loop(window)
        if ready is None:
            return self._plainly_stored(window, target)
        loop = ready[0]
        if loop.text not in self.fused.checked and not self._right(ready, window):
            return self._plainly_stored(window, target)
        flags = self._called(ready, window, target.data_ptr())
        return bool(flags & 1), bool(flags & 2)

    def launch(self, window: Window, target: Tensor) -> Tensor:
        """Write the function's result to `target`, without waiting for the device of the window and the target.

        Returns two int32 on the device: whether an input, and whether a result is not finite.
        """
        flags = torch.zeros(2, dtype=torch.int32, device=target.device)
        loop = self.fused.loop(window, self) if target.is_cuda and self.fused.library is not None else None
        call = device_function(loop.text) if loop is not None else None
        if loop is None or call is None:
            models, _ = formed(window, self.fused.on, check=False)
            target.copy_(self._result(window, models, target.device))
            for number, values in ((0, models), (1, [target])):
                for tensor in values:
                    flags[number].logical_or_((~torch.isfinite(tensor)).any())
            return flags
        beside = materialised(self.beside, window.start, window.count, target.device)
        reals = torch.tensor([*loop.trace.literals, *self.reals, 0.0], dtype=torch.float64)
        whole = torch.tensor([window.start, window.count, *self.wholes], dtype=torch.int64)
        arrays = [*([] if window.base is None else [window.base]), *window.experts, *beside, target]
        more = [reals.to(target.device), whole.to(target.device), flags]
        blocks = (window.count + THREADS - 1) // THREADS
        call(grid=(blocks, 1, 1), block=(THREADS, 1, 1), args=[*arrays, *more])
        return flags

    def count(self, window: Window, highs: Any, bins: NDArray[np.uint32]) -> bool:
        """Add the counts to `bins` (see `empty_bins`). highs: the high half-words of every result, one after the other.

        Returns whether an input is not finite; nothing is added then.
        """
        ready = self._loop(window)
        if ready is None:
            return self._plainly_counted(window, highs, bins)
        loop = ready[0]
        wanted = (ctypes.c_int64 * max(len(highs), 1))(*highs)
        before = bins.copy() if loop.text not in self.fused.checked else None
        if self._called(ready, window, bins.ctypes.data, wanted):
            again = np.zeros_like(bins)  # rare, so it may cost: what was just added is taken away again
            self._called(ready, window, again.ctypes.data, wanted)
            bins -= again
            return True
        if before is not None:
            plain = before.copy()
            self._plainly_counted(window, highs, plain)
            if not all(map(np.array_equal, counts_of(plain, self.fused.slots), counts_of(bins, self.fused.slots))):
                self.fused.refuse(loop)
                bins[:] = before
                return self._plainly_counted(window, highs, bins)
            self.fused.checked[loop.text] = True
        return False

    def sum(self, window: Window, lanes: NDArray[np.float64]) -> bool:
        """Add the sums to `lanes`, float64, shape (results, LANES); `total_of` folds them.

        Windows start at multiples of LANES. Returns whether an input is not finite; the lanes then mean nothing.
        """
        ready = self._loop(window)
        if ready is None:
            return self._plainly_summed(window, lanes)
        loop, plain = ready[0], None if ready[0].text in self.fused.checked else lanes.copy()
        if self._called(ready, window, lanes.ctypes.data):
            return True
        if plain is not None:
            self._plainly_summed(window, plain)
            if plain.tobytes() != lanes.tobytes():
                self.fused.refuse(loop)
                lanes[:] = plain
            else:
                self.fused.checked[loop.text] = True
        return False

    def _loop(self, window: Window) -> tuple[Loop, Function, Any] | None:
        """Return the loop for such windows, its compiled function and its numbers; None where there is none as yet."""
        fused, kind = self.fused, window.kind
        if fused.library is None or fused.library.compiler is None:
            return None
        ready = self._ready.get(kind)
        if ready is None:
            loop = fused.loop(window, self)
            if loop is None:
                return None
            call = fused.library.function(loop.text, build=fused.build, wait=fused.wait)
            if call is None:
                fused.problem = fused.library.problem(loop.text)
                return None
            reals = (*loop.trace.literals, *self.reals)
            ready = self._ready[kind] = loop, call, (ctypes.c_double * max(len(reals), 1))(*reals)
        return ready if fused.checked.get(ready[0].text, True) else None

    def _called(self, ready: tuple[Loop, Function, Any], window: Window, target: int, *more: Any) -> int:
        _, call, reals = ready
        start, count = window.start, window.count
        beside = [source.read(start, start + count).contiguous() for source in self.beside]
        arrays = [*([] if window.base is None else [window.base]), *window.experts, *beside]
        pointers = (ctypes.c_void_p * len(arrays))(*[array.data_ptr() for array in arrays])
        return call(
            pointers, ctypes.c_void_p(target), reals, self.wholes, ctypes.c_int64(start), ctypes.c_int64(count), *more
        )

    def _right(self, ready: tuple[Loop, Function, Any], window: Window) -> bool:
        """Whether the loop gives the function's own bytes on the first elements that it is used on."""
        fused, loop = self.fused, ready[0]
        assert isinstance(fused.out, torch.dtype)
        few = window.part(0, min(CHECKED, window.count))
        by_loop, plain = torch.empty(few.count, dtype=fused.out), torch.empty(few.count, dtype=fused.out)
        flags = self._called(ready, few, by_loop.data_ptr())
        not_finite = self._plainly_stored(few, plain)
        same = flags != 0 or torch.equal(by_loop.view(torch.uint8), plain.view(torch.uint8))
        if same and (flags & 1 != 0, flags & 2 != 0) == not_finite:
            fused.checked[loop.text] = True
            return True
        fused.refuse(loop)
        return False

    # --- operation by operation -----------------------------------------------------------------------------------

    def _result(self, window: Window, models: Sequence[Tensor], device: torch.device) -> Any:
        """Return the function's own result for a window. models: as `formed` gives them."""
        seen = models if window.base is None or self.fused.with_base else models[1:]
        return self.fused.function(seen, materialised(self.arguments, window.start, window.count, device))

    def _plainly_stored(self, window: Window, target: Tensor) -> tuple[bool, bool]:
        input_lost = result_lost = False
        for first, end, part in window.parts(EAGER):
            models, lost = formed(part, self.fused.on)
            result = target[first:end].copy_(self._result(part, models, target.device))
            result_lost |= not bool(torch.isfinite(result).all())
            input_lost |= lost
        return input_lost, result_lost

    def _plainly_counted(self, window: Window, highs: Sequence[int], bins: NDArray[np.uint32]) -> bool:
        counts, slots = np.zeros_like(bins), self.fused.slots
        for _, _, part in window.parts(EAGER):
            models, lost = formed(part, self.fused.on)
            if lost:
                return True
            for result, pattern in enumerate(self._result(part, models, models[0].device)):
                high = pattern >> 16
                if not slots:
                    counts[result, 0, :BINS] += _counts(high + HALF)
                for slot, high_word in enumerate(highs[result * slots : (result + 1) * slots]):
                    inside = pattern[high == high_word] & (BINS - 1)
                    counts[result, 0, slot * BINS : (slot + 1) * BINS] += _counts(inside)
        bins += counts
        return False

    def _plainly_summed(self, window: Window, lanes: NDArray[np.float64]) -> bool:
        for _, _, part in window.parts(EAGER):
            models, lost = formed(part, self.fused.on)
            if lost:
                return True
            for number, values in enumerate(self._result(part, models, models[0].device)):
                wide = values.cpu().numpy().astype(np.float64)
                whole = len(wide) // LANES * LANES
                for row in wide[:whole].reshape(-1, LANES):
                    lanes[number] += row
                lanes[number, : len(wide) - whole] += wide[whole:]
        return False


def total_of(lanes: NDArray[np.float64]) -> Any:
    """Return the sums over the last dimension, halves added to halves, as nested lists."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0].tolist()


def empty_bins(results: int, slots: int) -> NDArray[np.uint32]:
    """Return what `BoundFunction.count` counts into; `counts_of` reads it."""
    return np.zeros((results, COPIES, stride(slots)), dtype=np.uint32)


def counts_of(bins: NDArray[np.uint32], slots: int) -> list[NDArray[np.uint32]]:
    """Return 2^16 counts for each result and slot, in order."""
    whole: NDArray[np.uint32] = functools.reduce(np.add, (bins[:, copy] for copy in range(COPIES)))
    return [row[slot * BINS : (slot + 1) * BINS] for row in whole for slot in range(max(slots, 1))]


def _counts(numbers: Tensor) -> NDArray[np.uint32]:
    return torch.bincount(numbers, minlength=BINS).cpu().numpy().astype(np.uint32)


def formed(window: Window, on: str, check: bool = True) -> tuple[list[Tensor], bool]:
    """Return the base, where there is one, and the experts in float32; and with `check` whether one is not finite.

    on: whether the experts' 'weights' or 'deltas' are returned.
    """
    base = None if window.base is None else window.base.to(torch.float32)
    models = [] if base is None else [base]
    for stored, delta in zip(window.experts, window.deltas, strict=True):
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
    """Return the arguments with tensors instead of `Index` and `Beside`, for elements from `start` on."""

    def tensor_or_number(leaf: Any) -> Any:
        if isinstance(leaf, Index):
            return torch.arange(start, start + count, device=device)
        if isinstance(leaf, Beside):
            return leaf.read(start, start + count).to(device, torch.float32)
        return leaf

    filled: Arguments = mapped(arguments, tensor_or_number)
    return filled
