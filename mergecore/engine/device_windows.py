"""Windows of a pool on their way to a device and back: while one is worked on, the next is read and copied there.

Inputs go through pinned memory on a stream of their own; what fits stays on the device and is found there by the next
cell of the same pool. On a processor ('cpu:0') the same steps run without streams, which is how they are tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mergecore.engine.kernels.run import Chunk, Given
from mergecore.errors import CapacityError

SPARE = 1 << 30
"""Bytes of a device that stay free of models kept there."""
SMALLEST = 1 << 14
"""Elements below which a window is not made smaller."""


@dataclass
class Launched:
    """A result under way: its place on the host (filled once `ready`), and whether an input, or a result is not finite."""

    values: Tensor
    flags: Tensor
    event: Any

    def ready(self) -> tuple[Tensor, bool, bool]:
        """Waits; (values, inputs not finite, results not finite)."""
        if self.event is not None:
            self.event.synchronize()
        read, made = (bool(flag) for flag in self.flags.tolist())
        return self.values, read, made


@dataclass
class Stage:
    """One thread's way to one device. kept: models' windows that stay there, by model, tensor and first element."""

    device: torch.device
    kept: dict[Any, Tensor] = field(default_factory=dict)
    room: int = 0
    """What counts as free where the device does not say."""

    def __post_init__(self) -> None:
        cuda = self.device.type == "cuda"
        self._copying: Any = torch.cuda.Stream(self.device) if cuda else None  # type: ignore[no-untyped-call]
        self._working: Any = torch.cuda.Stream(self.device) if cuda else None  # type: ignore[no-untyped-call]

    def held(self, key: Any, count: int, read: Callable[[], Tensor]) -> Tensor:
        """A window on the device: as it was kept under its key (None: never kept), else copied from what `read` gives."""
        found = self.kept.get(key) if key is not None else None
        if found is not None and found.numel() == count:
            return found
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

    def launch(self, given: Given, chunk: Chunk, dtype: torch.dtype, host: Tensor) -> Launched:
        """Begin to work out the function on a chunk that is on the device; `host` (pinned) will hold the result."""
        if self._working is None:
            target = torch.empty(chunk.count, dtype=dtype, device=self.device)
            flags = given.launch(chunk, target)
            return Launched(host.copy_(target), flags, None)
        with torch.cuda.stream(self._working):
            target = torch.empty(chunk.count, dtype=dtype, device=self.device)
            flags = given.launch(chunk, target).to("cpu", non_blocking=True)
            host.copy_(target, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._working)
        return Launched(host, flags, event)

    def release(self) -> None:
        """Give back what is kept."""
        self.kept.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def in_smaller_windows(work: Callable[[int], None], size: int, stage: Stage) -> None:
    """work(size), where the device's memory does not suffice once more without what is kept, then in smaller windows.

    Raises CapacityError where the smallest window does not fit.
    """
    while True:
        try:
            return work(size)
        except torch.OutOfMemoryError as error:
            if stage.kept:
                stage.release()
                continue
            stage.release()
            if size <= SMALLEST:
                raise CapacityError(
                    f"{stage.device} has too little free memory for a window of {size:,} elements of every model "
                    f"({str(error).splitlines()[0]}); free memory there, or merge fewer experts at a time"
                ) from error
            size //= 2
