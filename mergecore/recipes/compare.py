"""Compares two checkpoints: tensor after tensor, read block by block, and the files beside the weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from mergecore.checkpoints.architectures import layer_of
from mergecore.checkpoints.differences import SmallFiles, small_files
from mergecore.checkpoints.naming import under_base_names
from mergecore.checkpoints.snapshot import Snapshot, read_snapshot
from mergecore.engine.executor import Executor
from mergecore.errors import MismatchError
from mergecore.events import Event, Report
from mergecore.identity.content import GRID
from mergecore.spec.sources import Resolver, SourceSpec
from mergecore.tensors.source import TensorInfo, TensorSource


@dataclass(frozen=True)
class Sums:
    """Sums over the elements of one or several tensors a (of the first model) and b (of the second), in float64.

    elements, changed: how many there are, and how many are not equal. first, second: Σ a², Σ b². across: Σ a·b.
    apart: Σ (b − a)². largest: the largest |b − a|. not_finite: elements where a or b is no finite number; they count
    as changed where they are not both the same, and in no sum.
    """

    elements: int = 0
    changed: int = 0
    first: float = 0.0
    second: float = 0.0
    across: float = 0.0
    apart: float = 0.0
    largest: float = 0.0
    not_finite: int = 0

    def __add__(self, other: Sums) -> Sums:
        added = {name: getattr(self, name) + getattr(other, name) for name in self.__dict__}
        return Sums(**(added | {"largest": max(self.largest, other.largest)}))

    @property
    def norms(self) -> tuple[float, float]:
        """The Frobenius norms of both."""
        return sqrt(self.first), sqrt(self.second)

    @property
    def distance(self) -> float:
        """The Frobenius norm of b − a."""
        return sqrt(self.apart)

    @property
    def relative(self) -> float | None:
        """The distance by the norm of the first; None where that is zero and they differ."""
        return sqrt(self.apart / self.first) if self.first else None if self.apart else 0.0

    @property
    def cosine(self) -> float | None:
        """The cosine of the angle between both as vectors; None where one of them is zero."""
        if not self.first or not self.second:
            return None
        if not self.apart:
            return 1.0
        return max(-1.0, min(1.0, self.across / (sqrt(self.first) * sqrt(self.second))))


@dataclass(frozen=True)
class TensorDifference:
    """A tensor of both models, under the first one's name. sums: None where the shapes differ."""

    name: str
    first: TensorInfo
    second: TensorInfo
    sums: Sums | None

    @property
    def group(self) -> str:
        """The layer it belongs to, as text; 'no layer' for embeddings, heads and final norms."""
        layer = layer_of(self.name)
        return "no layer" if layer is None else f"layer {layer}"


@dataclass(frozen=True)
class Comparison:
    """What differs between two models. only_first, only_second: tensors of one of them. notes: to be said aloud."""

    first: Snapshot
    second: Snapshot
    tensors: tuple[TensorDifference, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    files: SmallFiles
    notes: tuple[str, ...]

    @property
    def total(self) -> Sums:
        """The sums over all tensors of one name and shape."""
        return total(tensor.sums for tensor in self.tensors if tensor.sums is not None)

    @property
    def groups(self) -> dict[str, Sums]:
        """The sums of each layer, in order, and of what belongs to none."""
        names = dict.fromkeys(tensor.group for tensor in sorted(self.tensors, key=lambda tensor: _order(tensor.name)))
        return {
            name: total(tensor.sums for tensor in self.tensors if tensor.sums is not None and tensor.group == name)
            for name in names
        }


def _order(name: str) -> tuple[bool, int]:
    layer = layer_of(name)
    return layer is None, layer or 0


def total(parts: Iterable[Sums]) -> Sums:
    """Return the sums over all parts."""
    together = Sums()
    for part in parts:
        together += part
    return together


def compare(first: SourceSpec, second: SourceSpec, resolve: Resolver, executor: Executor, report: Report) -> Comparison:
    """Compare two checkpoints, or two adapters. Nothing is written.

    Each worker has a block of 2^20 elements of both in memory. Tensors of one architecture that files name differently
    are compared with each other. Raises MismatchError for a checkpoint and an adapter, SourceError for what cannot be
    read.
    """
    ours, theirs = (read_snapshot(resolve(spec)) for spec in (first, second))
    if ours.kind != theirs.kind:
        adapter, model = (ours, theirs) if ours.kind == "adapter" else (theirs, ours)
        raise MismatchError(
            f"{adapter.source.uri} is an adapter and {model.source.uri} a whole checkpoint: compare two of one kind "
            "(`mergeloom merge` with `method: average` writes a base with its adapter as a checkpoint)"
        )
    called, notes = _under_one_naming(ours, theirs)
    sides = [model.open(model.source.fetch(report)) for model in (ours, called)]
    shared = [name for name, info in ours.tensors.items() if name in called.tensors and _alike(info, called, name)]
    sums: dict[str, Sums] = {}
    for position, result in executor.each(tensor_sums, (sides[0], sides[1]), shared):
        sums[shared[position]] = result
        report(Event(f"compare: {shared[position]}", len(sums), len(shared), "tensors"))
    both = sorted(ours.tensors.keys() & called.tensors.keys())
    return Comparison(
        ours,
        theirs,
        tuple(TensorDifference(name, ours.tensors[name], called.tensors[name], sums.get(name)) for name in both),
        tuple(sorted(ours.tensors.keys() - called.tensors.keys())),
        tuple(sorted(called.tensors.keys() - ours.tensors.keys())),
        small_files(ours, theirs),
        notes,
    )


def _alike(info: TensorInfo, other: Snapshot, name: str) -> bool:
    return info.shape == other.tensors[name].shape


def _under_one_naming(first: Snapshot, second: Snapshot) -> tuple[Snapshot, tuple[str, ...]]:
    """Return the second model under the first one's names, and what is to be said of that."""
    if first.kind == "adapter" or first.config.get("model_type") != second.config.get("model_type"):
        return second, ()
    try:
        called, _ = under_base_names(first, second, second.source.uri)
    except MismatchError as error:
        return second, (f"tensors are compared by the names in the files: {error}",)
    renamed = len(called.tensors.keys() - second.tensors.keys())
    note = f"{renamed} tensors of {second.source.uri} have other names there; they stand here under those of the first"
    return replace(called, config=second.config), (note,) if renamed else ()


def tensor_sums(sides: tuple[TensorSource, TensorSource], name: str) -> Sums:
    """Return the sums of one tensor of both, over grid blocks, in order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums over two threads differ from sums over one in the last bits
    try:
        count = sides[0].tensors[name].count
        reads = ((start, min(start + GRID, count)) for start in range(0, count, GRID))
        return total(block_sums(*(side.read(name, start, stop) for side in sides)) for start, stop in reads)
    finally:
        torch.set_num_threads(threads)


def block_sums(first: Tensor, second: Tensor) -> Sums:
    """Return the sums of two flat tensors of one length, of any dtypes."""
    a, b = first.to(torch.float64), second.to(torch.float64)
    # Large integers are not all float64 numbers; values of one kind of integer are compared as they are.
    exact = first.dtype == second.dtype and not first.dtype.is_floating_point
    unequal = first != second if exact else a != b
    finite = torch.isfinite(a) & torch.isfinite(b)
    odd = int(finite.numel() - finite.sum())
    if odd:
        unequal &= ~(torch.isnan(a) & torch.isnan(b))
        zero = torch.zeros((), dtype=torch.float64)
        a, b = torch.where(finite, a, zero), torch.where(finite, b, zero)
    apart = b - a
    return Sums(
        elements=first.numel(),
        changed=int(unequal.sum()),
        first=float((a * a).sum()),
        second=float((b * b).sum()),
        across=float((a * b).sum()),
        apart=float((apart * apart).sum()),
        largest=float(apart.abs().max()) if apart.numel() else 0.0,
        not_finite=odd,
    )
