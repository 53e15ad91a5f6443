"""What a pass will take, known before anything runs: bytes read and written, and the memory of the blocks in flight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mergecore.checkpoints.vocabulary.rows import RowTensors, gathering
from mergecore.engine.kernels.run import EAGER
from mergecore.engine.kernels.source import BINS, COPIES, stride
from mergecore.engine.pass_plan import PassPlan, coarsest
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
    """What is read: the base's tensors, and per expert its tensors, None where it is an adapter (formed in float32).

    gathered: whether rows of some of them are read from several places.
    """

    base: Mapping[str, TensorInfo]
    experts: tuple[Mapping[str, TensorInfo] | None, ...]
    gathered: bool = False

    def bytes_of(self, elements: int) -> int:
        """The widest that so many elements of every full checkpoint are."""
        return elements * sum(map(_widest, self.full))

    @property
    def full(self) -> list[Mapping[str, TensorInfo]]:
        """Those that are checkpoints, the base first."""
        return [held for held in (self.base, *self.experts) if held is not None]

    @property
    def window(self) -> int:
        """Elements of every model that are at hand at once."""
        return window_of(self.bytes_of(1) + FLOAT * self.adapters)

    @property
    def adapters(self) -> int:
        """How many experts are adapters."""
        return sum(held is None for held in self.experts)


def block_bytes(
    models: Models, methods: Sequence[Method | Link], statistics: Sequence[Statistic], beside: bool = False
) -> int:
    """Memory of one span in flight: what is read of every model, worked with, and written.

    beside: whether a tensor of every expert is read beside its weights. Element-wise methods hold windows, adapters the deltas of a block of the grid; other methods whole tensors (or layers),
    in float32, and what they say they work with.
    """
    largest = max((info.count for info in models.base.values()), default=0)
    window, block = min(models.window, largest), min(GRID, largest)
    count = len(models.experts)
    bytes_held = models.bytes_of(window) + FLOAT * window
    if models.adapters:
        bytes_held += FLOAT * block * (models.adapters + 3)
    plain = FLOAT * min(EAGER, largest) * (3 * count + 8)
    bytes_held += plain + FLOAT * window * count * beside
    bytes_held += _scanned(statistics, block, count)
    whole = [method for method in methods if method.per is not Per.ELEMENT]
    if models.gathered:
        bytes_held += gathering(largest if whole else window, max(map(_widest, models.full), default=0))
    if whole:
        seen = largest if coarsest(whole) is Per.TENSOR else sum(info.count for info in models.base.values())
        working = max(method.working for method in whole)
        bytes_held += models.bytes_of(seen) + int(FLOAT * seen * (count + 2 + working))
    return bytes_held


def _scanned(statistics: Sequence[Statistic], block: int, count: int) -> int:
    """Return the bytes that statistics take beside the models: bins of counts, and blocks that they are handed.

    Bins: as many results as experts at least, and three times more while the first elements are counted both ways
    (`Given.count`). Blocks: one at a time, and not while the same statistic counts.
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
    """What a planned pass reads."""
    held = [expert.sources()[0] if expert.complete else None for expert in plan.experts]
    return Models(
        plan.base.tensors,
        tuple(None if source is None else source.tensors for source in held),
        any(isinstance(source, RowTensors) for source in (plan.base, *held)),
    )


def at_once(plan: PassPlan, workers: int, memory: int | None) -> int:
    """How many spans may be in flight. Raises CapacityError where `memory` does not hold one."""
    if memory is None:
        return workers
    methods = [job.method for job in plan.merges]
    needed = block_bytes(pass_models(plan), methods, [job.statistic for job in plan.statistics])
    if needed > memory:
        held = ", ".join(sorted({method.name for method in methods})) or "its scan"
        raise CapacityError(
            f"one block of {held} over {len(plan.experts)} experts takes {needed:,} bytes of memory and {memory:,} may be "
            f"used ({needed - memory:,} too few); allow more, or merge fewer experts at a time"
        )
    return blocks_in_flight(needed, workers, memory)


def blocks_in_flight(block: int, workers: int, memory: int) -> int:
    """How many blocks of so many bytes the workers may hold together: one at least."""
    return max(1, min(workers, memory // max(block, 1)))


def read_bytes(models: Models, names: Iterable[str], adapters: int = 0) -> int:
    """Bytes of one reading of these tensors in the base and every full checkpoint, and of the adapters' files once."""
    wanted = set(names)
    return adapters + sum(info.size for one in models.full for name, info in one.items() if name in wanted)


def _widest(tensors: Mapping[str, TensorInfo]) -> int:
    return max((info.itemsize for info in tensors.values()), default=0)
