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
from mergecore.planning.plans import MergePlan, StatisticPlan
from mergecore.planning.pool import Pool
from mergecore.plugins.evaluator import Evaluator
from mergecore.store.store import Store


@dataclass(frozen=True)
class Place:
    """Where work is done: the store, who runs spans and scores, where progress goes, and where checkpoints lie."""

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
    device: str = "cpu"
    library: Library | None = None
    """Where fused loops are kept."""
    memory: int | None = None
    """Bytes that the blocks of a pass may take; None: whatever they take."""

    @property
    def bench(self) -> Bench:
        """What scoring and statistics on data share."""
        if self.evaluator is None:
            raise EvaluationError("nothing here says how models are evaluated; run this from a spec with `evaluate:`")
        return Bench(self.store.root, self.evaluator, self.tasks, self.device)


def drop_models(place: Place, plans: Sequence[MergePlan | StatisticPlan]) -> None:
    """Free the bytes of models, and of links of chains, that nothing can ask for any more."""
    for plan in plans:
        place.store.drop(plan.step)


def snapshots_of(pool: Pool) -> list[Snapshot]:
    """Every checkpoint of the pool, the base first."""
    return [pool.base, *(member.snapshot for member in pool.members)]
