"""Where work is done: the store, the executor, the folders of the checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mergecore.checkpoints.snapshot import Snapshot
from mergecore.engine.executor import Executor
from mergecore.errors import EvaluationError
from mergecore.events import Report
from mergecore.execution.scoring import Bench
from mergecore.native.library import Library
from mergecore.planning.pool import Pool
from mergecore.planning.work import Work
from mergecore.plugins.evaluator import Evaluator
from mergecore.plugins.own_code import OwnCode
from mergecore.store.store import Store


@dataclass(frozen=True)
class Place:
    """Where work is done: the store, the executor, where progress is reported, and the folders of the checkpoints."""

    pool: Pool
    store: Store
    executor: Executor
    report: Report
    shard_size: int
    evaluator: Evaluator | None = None
    tasks: Path | None = None
    """Folder of task files."""
    folders: dict[str, Path] = field(default_factory=dict)
    """Weights digest → local folder, filled by `fetch`."""
    code: OwnCode = field(default_factory=OwnCode)
    """The user's own, that the evaluator runs."""
    device: str = "cpu"
    library: Library | None = None
    """Where fused loops are kept."""
    memory: int | None = None
    """Bytes that the blocks of a pass may take; None: whatever they take."""

    @property
    def bench(self) -> Bench:
        """What all tasks that run models share."""
        if self.evaluator is None:
            raise EvaluationError("nothing here says how models are evaluated; run this from a spec with `evaluate:`")
        return Bench(self.store.root, self.evaluator, self.tasks, self.device, self.code)


def drop_models(place: Place, works: Sequence[Work]) -> None:
    """Free the bytes of works that nothing can ask for any more."""
    for work in works:
        place.store.drop(work.step)


def snapshots_of(pool: Pool) -> list[Snapshot]:
    """Return every checkpoint of the pool, the base first."""
    return [pool.base, *(member.snapshot for member in pool.members)]
