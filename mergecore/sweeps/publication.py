"""The directory of a cell's model: the product's files, what goes with them, and the card."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path

from mergecore.execution.place import Place
from mergecore.formats.card import model_card
from mergecore.formats.companions import write_companions
from mergecore.formats.finished import finished_merge
from mergecore.planning.cells import Cell
from mergecore.plugins.product import FinishedMerge
from mergecore.reporting.scores import Sweep
from mergecore.reporting.summary import cell_table
from mergecore.sweeps.lineage import lineage
from mergecore.sweeps.remaining import Frontier
from mergecore.tensors.dtypes import CONFIG_DTYPE


def publish(place: Place, frontier: Frontier, cell: Cell, folder: Path, scores: Mapping[str, float]) -> FinishedMerge:
    """Write everything that others need to load a cell's model into `folder`. Weights are linked where they can be.

    The base's folder must have been fetched. Raises StoreError where the product's bytes are not in the store.
    """
    plan, merge = frontier.plan, cell.merge
    assert merge is not None
    base, contents = plan.pool.base, finished_merge(place.store, plan.pool, merge)
    origin = lineage(plan, cell, contents.numbers)
    published = merge.product.publish(contents, folder, None)
    if merge.product.companions:
        dtypes = sorted({info.dtype for info in merge.outputs.values()} & set(CONFIG_DTYPE))
        write_companions(folder, base, place.folders[base.weights], dtypes)
    lines = merge.product.card_lines(published.card)
    card = model_card(origin["recipe"], {**origin, **published.card}, scores, lines, plan.pool.warnings)
    (folder / "README.md").write_text(card)
    return contents


def card_scores(sweep: Sweep, cell: str, split: str) -> dict[str, float]:
    """Return the scores of a cell (id) that its card tells, by name: those on one split that are numbers."""
    row = next(row for row in cell_table(sweep, split).to_pylist() if row["cell"] == cell)
    return {name: float(value) for name, value in row.items() if isinstance(value, float) and isfinite(value)}
