"""A pass as data: the models that are read, the jobs that are done on them, and the spans in which this happens.

A pass decides when work is done, never what comes out: a job gives the same bytes alone and beside others, for any
windows, spans, order and number of workers. A worker needs the pickled `PassPlan` and the number of a span.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

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
"""Bytes of the base in one span, about. Scheduling so much costs nothing beside reading it."""

BLOCKS = 4
"""Grid blocks that element-wise methods get with one set of arguments."""


@dataclass(frozen=True)
class MergeJob:
    """One model: the method writes the `merged` ones of its `outputs`, the others are copied from the base.

    experts: their positions in `PassPlan.experts`. journal: folder that notes which spans are done.
    """

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
    """One statistic over the tensors of `selection`. experts: their positions in `PassPlan.experts`."""

    key: str
    statistic: Statistic
    experts: tuple[int, ...]
    selection: Mapping[str, TensorInfo]
    statistics: Statistics


GridBlocks = tuple[str, int, int]
"""Consecutive grid blocks of a tensor: its name, first element, end."""
BlockGroup = tuple[GridBlocks, ...]
"""What the most demanding method of the pass must see at once."""
Span = tuple[BlockGroup, ...]
"""What one worker reads, in order."""


@dataclass(frozen=True)
class PassPlan:
    """Everything that a worker needs for any span of the pass. Picklable."""

    base: TensorSource
    experts: tuple[Expert, ...]
    merges: tuple[MergeJob, ...]
    statistics: tuple[StatisticJob, ...]
    spans: tuple[Span, ...]
    device: str = "cpu"
    library: Library | None = None
    """Where fused loops are kept. None: everything runs operation by operation."""

    memory: int | None = None
    """Bytes that the spans in flight may take together, on all workers. None: no limit."""

    base_id: str = ""
    """Digest of the base's weights: windows of the base stay on a device under this name. '': none stay."""

    @cached_property
    def elements(self) -> int:
        """Elements of the base in all spans."""
        return sum(stop - start for span in self.spans for group in span for _, start, stop in group)


@dataclass
class SpanOutcome:
    """What a span returns. digests: per merge, tensor and first element of a grid block. states: per statistic."""

    digests: dict[str, dict[str, dict[int, str]]] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)


@dataclass
class PassOutcome:
    """What a pass completed. models: per merge the model's digest.

    blocks: per merge and tensor the digests of its grid blocks, in order. tensors: likewise one of the whole tensor.
    """

    blocks: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    tensors: dict[str, dict[str, str]] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)


def plan_spans(tensors: Mapping[str, TensorInfo], per: Per, size: int = SPAN_BYTES) -> tuple[Span, ...]:
    """Return spans of about `size` bytes of the base, in order of names. per: what must be seen at once."""
    spans: list[Span] = []
    groups: list[BlockGroup] = []
    filled = 0
    for group in _groups(tensors, per):
        groups.append(group)
        filled += sum((stop - start) * tensors[name].itemsize for name, start, stop in group)
        if filled >= size:
            spans.append(tuple(groups))
            groups, filled = [], 0
    if groups:
        spans.append(tuple(groups))
    return tuple(spans)


def _groups(tensors: Mapping[str, TensorInfo], per: Per) -> Iterator[BlockGroup]:
    names = sorted(tensors)
    if per is Per.ELEMENT:
        for name in names:
            count = tensors[name].count
            for start in range(0, max(count, 1), BLOCKS * GRID):
                yield ((name, start, min(start + BLOCKS * GRID, count)),)
        return
    for name in names:
        yield ((name, 0, tensors[name].count),)


def coarsest(methods: Sequence[Method | Link]) -> Per:
    """Return what the most demanding of the methods must see at once."""
    return Per.TENSOR if any(method.per is Per.TENSOR for method in methods) else Per.ELEMENT


@dataclass(frozen=True)
class PassReading:
    """One reading of the models in a pass. Merges are done in the first one; statistics may ask for more.

    states: pickled, for every span starts from its own copy, and unpickling is the fastest way to copy. only: which
    tensors are read, each whole (None) or in parts (first element, end), in order; None: everything is read.
    """

    plan: PassPlan
    states: Mapping[str, bytes]
    only: Mapping[str, tuple[tuple[int, int], ...] | None] | None = None
    fused: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """Fused loops that this process has found for the jobs; never sent to another one."""

    def wanted(self, group: BlockGroup) -> BlockGroup:
        """Return what of a group this reading reads."""
        if self.only is None:
            return group
        wanted: list[GridBlocks] = []
        for name, start, stop in group:
            parts = self.only.get(name, ())
            if parts is None:
                wanted.append((name, start, stop))
            for first, end in parts or ():
                if first < stop and start < end:
                    wanted.append((name, max(first, start), min(end, stop)))
        return tuple(wanted)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "fused": {}}
