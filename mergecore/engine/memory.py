"""The bytes that a pass will read and the memory it will take, projected before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mergecore.checkpoints.vocabulary.rows import RowTensors, gathering
from mergecore.engine.kernels.run import EAGER
from mergecore.engine.kernels.source import BINS, COPIES, stride
from mergecore.engine.pass_plan import PassPlan
from mergecore.engine.windows import window_of
from mergecore.errors import CapacityError
from mergecore.identity.content import GRID
from mergecore.plugins.block import Per
from mergecore.plugins.chain import Link
from mergecore.plugins.method import Method
from mergecore.plugins.statistic import Blocks, Counts, Scope, Statistic
from mergecore.tensors.source import TensorInfo

FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Models:
    """The models of a pass: tensors of the base and of each expert. None: an adapter, whose delta is formed in float32.

    gathered: whether rows of some tensors are read from several places.
    """

    base: Mapping[str, TensorInfo]
    experts: tuple[Mapping[str, TensorInfo] | None, ...]
    gathered: bool = False

    def bytes_of(self, elements: int) -> int:
        """Return the bytes of so many elements of every full checkpoint, in its widest dtype."""
        return elements * sum(map(_widest, self.full))

    @property
    def full(self) -> list[Mapping[str, TensorInfo]]:
        """The tensors of every full checkpoint, the base first."""
        return [tensors for tensors in (self.base, *self.experts) if tensors is not None]

    @property
    def window(self) -> int:
        """Elements of a window."""
        return window_of(self.bytes_of(1) + FLOAT * self.adapters)

    @property
    def adapters(self) -> int:
        """How many experts are adapters."""
        return sum(tensors is None for tensors in self.experts)


def block_bytes(
    models: Models, methods: Sequence[Method | Link], statistics: Sequence[Statistic], beside: bool = False
) -> int:
    """Return the bytes of one span in flight: what is read of every model, worked with, and written.

    Element-wise methods take windows, adapters the deltas of a grid block. Other methods take whole tensors in float32,
    and what they declare as `working`. beside: whether a tensor of every expert is read beside its weights.
    """
    largest = max((info.count for info in models.base.values()), default=0)
    window, block = min(models.window, largest), min(GRID, largest)
    count = len(models.experts)
    total = models.bytes_of(window) + FLOAT * window
    if models.adapters:
        total += FLOAT * block * (models.adapters + 3)
    eager = FLOAT * min(EAGER, largest) * (3 * count + 8)
    total += eager + FLOAT * window * count * beside
    total += _scanned(statistics, block, count)
    whole = [method for method in methods if method.per is not Per.ELEMENT]
    if models.gathered:
        total += gathering(largest if whole else window, max(map(_widest, models.full), default=0))
    if whole:
        working = max(method.working for method in whole)
        total += models.bytes_of(largest) + int(FLOAT * largest * (count + 2 + working))
    return total


def _scanned(statistics: Sequence[Statistic], block: int, count: int) -> int:
    """Return the bytes that statistics take beside the models: bins of counts, and blocks that they are handed.

    Bins: as many results as experts at least, and three times more while the first elements are counted both ways
    (`BoundFunction.count`). Blocks: one at a time, and not while the same statistic counts.
    """
    bins = FLOAT * (4 * COPIES * stride(1) + BINS)
    total = most_beyond = 0
    for statistic in statistics:
        seen = count if statistic.scope is Scope.POOL else 1
        counted = seen * bins if Counts in statistic.looks else 0
        handed = FLOAT * min(block, statistic.largest_block) * (2 * seen + 4) if Blocks in statistic.looks else 0
        total, most_beyond = total + counted, max(most_beyond, handed - counted)
    return total + most_beyond


def pass_models(plan: PassPlan) -> Models:
    """Return the models that a planned pass reads."""
    sources = [expert.stored if expert.complete else None for expert in plan.experts]
    return Models(
        plan.base.tensors,
        tuple(None if source is None else source.tensors for source in sources),
        any(isinstance(source, RowTensors) for source in (plan.base, *sources)),
    )


def at_once(plan: PassPlan, workers: int, memory: int | None) -> int:
    """Return how many spans may be in flight. Raises CapacityError where `memory` (bytes) is too small for one."""
    if memory is None:
        return workers
    methods = [job.method for job in plan.merges]
    needed = block_bytes(pass_models(plan), methods, [job.statistic for job in plan.statistics])
    if needed > memory:
        names = ", ".join(sorted({method.name for method in methods})) or "its scan"
        raise CapacityError(
            f"one block of {names} over {len(plan.experts)} experts takes {needed:,} bytes of memory and {memory:,} "
            f"may be used ({needed - memory:,} too few); allow more, or merge fewer experts at a time"
        )
    return blocks_in_flight(needed, workers, memory)


def blocks_in_flight(block: int, workers: int, memory: int) -> int:
    """Return how many spans of `block` bytes the workers may have in flight together: one at least."""
    return max(1, min(workers, memory // max(block, 1)))


def read_bytes(models: Models, names: Iterable[str], adapters: int = 0) -> int:
    """Return the bytes of one reading of these tensors in every full checkpoint.

    adapters: bytes of the adapters' files.
    """
    wanted = set(names)
    return adapters + sum(info.size for tensors in models.full for name, info in tensors.items() if name in wanted)


def _widest(tensors: Mapping[str, TensorInfo]) -> int:
    return max((info.itemsize for info in tensors.values()), default=0)
