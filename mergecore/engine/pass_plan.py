"""What a pass is, as data: the models that are read, what is to be made of them, and the pieces in which it is done.

A pass is scheduling, never identity: each job's bytes are those of its lone run, for any company, chunk, span, order
and number of workers. What a worker needs is in the pickled `PassPlan`; a span is a list of blocks of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mergecore.checkpoints.architectures import layer_of
from mergecore.checkpoints.experts import Expert
from mergecore.identity.content import GRID
from mergecore.native.library import Library
from mergecore.plugins.block import Per
from mergecore.plugins.chain import Link
from mergecore.plugins.method import Method
from mergecore.plugins.statistic import Result, Statistic, Statistics
from mergecore.tensors.sinks import Sink
from mergecore.tensors.source import TensorInfo, TensorSource

SPAN_BYTES = 64 << 20
"""Bytes of the base that one span covers, about: large enough that scheduling it costs nothing beside reading it."""

BLOCKS = 4
"""Blocks of the grid that are worked out with one set of arguments, where nothing must be seen at once."""


@dataclass(frozen=True)
class MergeJob:
    """One model to be made: `outputs` are its tensors, of which `merged` are the method's and the rest are copied."""

    key: str
    method: Method | Link
    experts: tuple[int, ...]
    merged: frozenset[str]
    outputs: Mapping[str, TensorInfo]
    statistics: Statistics
    sink: Sink
    journal: Path | None = None


@dataclass(frozen=True)
class StatisticJob:
    """One statistic to be found, over the tensors of `selection`."""

    key: str
    statistic: Statistic
    experts: tuple[int, ...]
    selection: Mapping[str, TensorInfo]
    statistics: Statistics


Piece = tuple[str, int, int]
"""Tensor, first element, end: whole blocks of the grid."""
Unit = tuple[Piece, ...]
"""What the most demanding method of the pass must see at once."""
Span = tuple[Unit, ...]


@dataclass(frozen=True)
class PassPlan:
    """Everything a worker needs to do any span of the pass. Picklable."""

    base: TensorSource
    experts: tuple[Expert, ...]
    merges: tuple[MergeJob, ...]
    statistics: tuple[StatisticJob, ...]
    spans: tuple[Span, ...]
    device: str = "cpu"
    library: Library | None = None
    """Where fused loops are kept; None: everything runs operation by operation."""

    memory: int | None = None
    """Bytes that the blocks in flight may take, on all workers together; None: whatever they take."""

    base_id: str = ""
    """Digest of the base's weights: with the experts' ids it says whose windows stay on a device; '': none stay."""

    @cached_property
    def elements(self) -> int:
        """Of the base, in all spans."""
        return sum(stop - start for span in self.spans for unit in span for _, start, stop in unit)


@dataclass
class SpanOutcome:
    """What a span gives back: digests of the blocks it wrote, per merge, and the states of the statistics."""

    digests: dict[str, dict[str, dict[int, str]]] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)


@dataclass
class PassOutcome:
    """What a pass completed: per merge {tensor: digest} and the model's digest, per statistic its result."""

    tensors: dict[str, dict[str, str]] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)


def plan_spans(tensors: Mapping[str, TensorInfo], per: Per, size: int = SPAN_BYTES) -> tuple[Span, ...]:
    """Units of what `per` must see at once, in name order, gathered into spans of about `size` bytes of the base."""
    spans: list[Span] = []
    units: list[Unit] = []
    filled = 0
    for unit in _units(tensors, per):
        units.append(unit)
        filled += sum((stop - start) * tensors[name].itemsize for name, start, stop in unit)
        if filled >= size:
            spans.append(tuple(units))
            units, filled = [], 0
    if units:
        spans.append(tuple(units))
    return tuple(spans)


def _units(tensors: Mapping[str, TensorInfo], per: Per) -> Iterator[Unit]:
    names = sorted(tensors)
    if per is Per.ELEMENT:
        for name in names:
            count = tensors[name].count
            for start in range(0, max(count, 1), BLOCKS * GRID):
                yield ((name, start, min(start + BLOCKS * GRID, count)),)
        return
    groups: dict[str, list[Piece]] = {}
    for name in names:
        layer = layer_of(name)
        key = "" if per is Per.MODEL else str(layer) if per is Per.LAYER and layer is not None else name
        groups.setdefault(key, []).append((name, 0, tensors[name].count))
    for pieces in groups.values():
        yield tuple(pieces)


def coarsest(methods: Sequence[Method | Link]) -> Per:
    """What the most demanding of the methods must see at once."""
    order = list(Per)
    return max((method.per for method in methods), key=order.index, default=Per.ELEMENT)


@dataclass(frozen=True)
class Round:
    """One reading of the pass: the plan, the states from which every span's statistics start (pickled: each span has its
    own, and unpickling is the fastest copy), and of a reading that a statistic has asked for which tensors are read, whole
    or only those parts (first elements and ends, in order). Merges are done in the first reading."""

    plan: PassPlan
    states: Mapping[str, bytes]
    only: Mapping[str, tuple[tuple[int, int], ...] | None] | None = None
    fused: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """What this process has worked out about the jobs' functions; never sent."""

    def wanted(self, unit: Unit) -> Unit:
        """What of a unit this reading reads."""
        if self.only is None:
            return unit
        pieces: list[Piece] = []
        for name, start, stop in unit:
            parts = self.only.get(name, ())
            if parts is None:
                pieces.append((name, start, stop))
            for first, end in parts or ():
                if first < stop and start < end:
                    pieces.append((name, max(first, start), min(end, stop)))
        return tuple(pieces)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "fused": {}}
