"""What is kept of a step under way, so that it goes on where it was killed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergecore.errors import NonFiniteError, PluginError
from mergecore.identity.content import bytes_of
from mergecore.plugins.model_statistic import Kept
from mergecore.tensors.finite import check_finite
from mergecore.tensors.sinks import ShardSink
from mergecore.tensors.source import TensorInfo
from mergecore.tensors.torch_dtypes import DTYPE_NAMES

EVERY = 20.0
"""Seconds between two states that are kept."""
PROGRESS = "progress.safetensors"
"""One file, so that a state is replaced at once; it is never part of the result."""

Spans = dict[str, list[tuple[int, int]]]
"""Per tensor the first and last + 1 element of what is written, ascending, not overlapping."""


@dataclass
class WrittenTensors:
    """The outputs of a step, written into its draft, and which elements of them have been."""

    sink: ShardSink
    step: str
    spans: Spans = field(default_factory=dict)

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Write elements from flat index `start` on. Raises PluginError for what was not announced, NonFiniteError."""
        info = self._announced(name)
        flat = values.detach().reshape(-1).cpu()
        if DTYPE_NAMES[flat.dtype] != info.dtype or start + flat.numel() > info.count:
            raise PluginError(
                f"{self.step} writes {flat.numel()} elements of {flat.dtype} from {start} on into '{name}', which it "
                f"announced as {info.dtype} {list(info.shape)}"
            )
        if flat.is_floating_point():
            check_finite(flat, name, self.step, "look at the inputs and the weights")
        self.sink.write(name, start, bytes_of(flat))
        self.spans[name] = _joined([*self.spans.get(name, []), (start, start + flat.numel())])

    def check_whole(self) -> None:
        """Raise PluginError where an output was not written to its end."""
        for name, info in self.sink.tensors.items():
            if info.count and self.spans.get(name) != [(0, info.count)]:
                raise PluginError(f"{self.step} announced the tensor '{name}' and did not write all of it")

    def _announced(self, name: str) -> TensorInfo:
        if name not in self.sink.tensors:
            raise PluginError(f"{self.step} writes the tensor '{name}', which it did not announce in `outputs`")
        return self.sink.tensors[name]


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


class DraftProgress:
    """States kept in the draft of a step, by the clock. What was written before a state belongs to it."""

    def __init__(self, folder: Path, out: WrittenTensors, every: float | None = None) -> None:
        self._path, self._out = folder / PROGRESS, out
        self._every = EVERY if every is None else every
        self._since = time.monotonic()
        self._last = self._read()

    @property
    def last(self) -> Kept | None:
        """What was kept last; None at the beginning."""
        return self._last

    def keep(self, state: Callable[[], Kept]) -> None:
        """Keep a state where `EVERY` seconds have passed since the last one. Raises NonFiniteError."""
        if time.monotonic() - self._since < self._every:
            return
        kept = state()
        for name, values in kept.tensors.items():
            if values.is_floating_point() and not values.isfinite().all():
                raise NonFiniteError(f"{self._out.step}, step {kept.step}: '{name}' is not finite any more")
        spans: Mapping[str, list[tuple[int, int]]] = self._out.spans
        told = json.dumps({"step": kept.step, "numbers": dict(kept.numbers), "written": spans})
        draft = self._path.with_name(f".{PROGRESS}")
        save_file(
            {name: values.detach().cpu().contiguous().clone() for name, values in kept.tensors.items()},
            draft,
            {"kept": told},
        )
        draft.replace(self._path)
        self._last, self._since = kept, time.monotonic()

    def forget(self) -> None:
        """Remove what was kept: the step is done, or begins anew."""
        for path in (self._path, self._path.with_name(f".{PROGRESS}")):
            path.unlink(missing_ok=True)

    def _read(self) -> Kept | None:
        """Return what an earlier process kept; None where nothing can be read, or not all outputs are there."""
        try:
            with safe_open(self._path, framework="pt") as file:
                told = json.loads(file.metadata()["kept"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — no mapping
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
        if not self._out.sink.complete():
            return None
        self._out.spans = {name: [(start, stop) for start, stop in spans] for name, spans in told["written"].items()}
        return Kept(told["step"], tensors, told["numbers"])
