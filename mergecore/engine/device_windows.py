"""Windows on a device: while the device works on one, the next one is read and copied there.

Inputs go through pinned memory on a stream of their own. Windows that fit stay on the device, for the next cell of the
same pool. On a processor ('cpu:0') the same steps run without streams; so they are tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mergecore.engine.kernels.run import BoundFunction, Window
from mergecore.errors import CapacityError

SPARE = 1 << 30
"""Bytes of a device that stay free of kept windows."""
SMALLEST = 1 << 14
"""Elements of the smallest window that is tried."""


@dataclass
class Launched:
    """A result under way. values: on the host, filled once `ready`; flags: whether an input, a result is not finite."""

    values: Tensor
    flags: Tensor
    event: Any

    def ready(self) -> tuple[Tensor, bool, bool]:
        """Wait, then return (values, whether an input is not finite, whether a result is not finite)."""
        if self.event is not None:
            self.event.synchronize()
        input_lost, result_lost = (bool(flag) for flag in self.flags.tolist())
        return self.values, input_lost, result_lost


@dataclass
class Stage:
    """What one thread does on one device. kept: windows that stay there, by model, tensor and first element."""

    device: torch.device
    kept: dict[Any, Tensor] = field(default_factory=dict)
    room: int = 0
    """Bytes that count as free, on a device that cannot be asked."""

    def __post_init__(self) -> None:
        cuda = self.device.type == "cuda"
        self._copying: Any = torch.cuda.Stream(self.device) if cuda else None  # type: ignore[no-untyped-call]
        self._working: Any = torch.cuda.Stream(self.device) if cuda else None  # type: ignore[no-untyped-call]

    def window(self, key: Any, count: int, read: Callable[[], Tensor]) -> Tensor:
        """Return a window on the device: the one kept under `key` (None: none is), or a copy of what `read` returns."""
        kept = self.kept.get(key) if key is not None else None
        if kept is not None and kept.numel() == count:
            return kept
        values = read()
        if self._copying is None:
            moved = values.to(self.device, copy=True)
        else:
            with torch.cuda.stream(self._copying):
                moved = values.to(self.device, non_blocking=True)
            self._working.wait_stream(self._copying)
            moved.record_stream(self._working)
        if key is not None and self._room() > 4 * moved.nbytes + SPARE:
            self.kept[key] = moved
        return moved

    def _room(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else self.room

    def launch(self, function: BoundFunction, window: Window, dtype: torch.dtype, host: Tensor) -> Launched:
        """Start the function on a window that is on the device. The result goes to `host`, which is pinned."""
        if self._working is None:
            target = torch.empty(window.count, dtype=dtype, device=self.device)
            flags = function.launch(window, target)
            return Launched(host.copy_(target), flags, None)
        with torch.cuda.stream(self._working):
            target = torch.empty(window.count, dtype=dtype, device=self.device)
            flags = function.launch(window, target).to("cpu", non_blocking=True)
            host.copy_(target, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._working)
        return Launched(host, flags, event)

    def release(self) -> None:
        """Free the kept windows."""
        self.kept.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def in_smaller_windows(work: Callable[[int], None], size: int, stage: Stage) -> None:
    """Call work(size); where the device's memory is too small, again without kept windows, then with half the size.

    Raises CapacityError where the smallest window does not fit.
    """
    while True:
        try:
            return work(size)
        except torch.OutOfMemoryError as error:
            kept = bool(stage.kept)
            stage.release()
            if kept:
                continue
            if size <= SMALLEST:
                raise CapacityError(
                    f"{stage.device} has too little free memory for a window of {size:,} elements of every model "
                    f"({str(error).splitlines()[0]}); free memory there, or merge fewer experts at a time"
                ) from error
            size //= 2
