"""Which models and links of chains may be dropped: nothing can ask for their bytes any more."""

from __future__ import annotations

from collections.abc import Sequence

from mergecore.planning.cells import Cell
from mergecore.planning.work import Work
from mergecore.plugins.evaluator import Split
from mergecore.store.store import State
from mergecore.sweeps.choice import Choice
from mergecore.sweeps.registration_record import read_registration


def droppable_works(cells: Sequence[Cell], choice: Choice, settled: bool) -> list[Work]:
    """Return models in the store that are measured, and beaten or not to be kept; and links that chains have passed.

    settled: the winner is registered, so that only it, and no runner-up by another average, is the registered one.
    """
    spec, view = choice.plan.spec, choice.view
    if spec.output.keep == "all":
        return []
    merges = [(cell, cell.merge) for cell in cells if cell.merge is not None]
    present = [(cell, merge) for cell, merge in merges if view.state(cell.model) is State.PRESENT]
    record = read_registration(view.store, spec.name, {cell.id for cell in cells})
    registered = str(record["cell"]) if record else ""
    best = _best(cells, choice) if present else set[str]()
    needed: set[str] = set()
    for cell, _ in present:
        if not view.trouble(cell) and _still_needed(cell, choice, registered, settled, best):
            needed.add(cell.model.key)
    return [*(merge for cell, merge in present if cell.model.key not in needed), *_passed_links(cells, choice)]


def _passed_links(cells: Sequence[Cell], choice: Choice) -> list[Work]:
    """Return links at hand whose chain has gone on. The last link of a chain stays: later experts join there."""
    view = choice.view
    passed: dict[str, Work] = {}
    asked: set[str] = set()
    for cell in cells:
        if cell.merge is None:
            continue
        links = [work for work in cell.merge.needed if work.goes_on]
        for work in links:
            if view.done(work.step):
                passed.update((before.step.key, before) for before in work.passed_on)
        if not links or view.trouble(cell) or not choice.is_wanted(cell):
            continue
        if view.state(cell.model) is not State.PRESENT:
            asked.update(work.step.key for works in cell.merge.inputs.values() for work in works)
            for missing in cell.merge.missing_inputs(view.at_hand):
                asked.update(work.step.key for work in missing.passed_on)
    return [work for key, work in passed.items() if key not in asked and view.at_hand(work)]


def _best(cells: Sequence[Cell], choice: Choice) -> set[str]:
    """Return the ids of the cells that would be kept if no more scores came: the best of all, or of each method."""
    split: Split = choice.plan.splits[0]
    best: dict[str, tuple[float, str]] = {}
    for cell in cells:
        if cell.kind != "merge" or choice.view.trouble(cell):
            continue
        if not choice.chosen(cell) or not choice.view.measured(cell, "test"):
            continue
        among = cell.method if choice.plan.spec.output.keep == "best" else ""
        rank = (-round(choice.selection_score(cell, split), 12), cell.id)
        best[among] = min(best.get(among, rank), rank)
    return {cell for _, cell in best.values()}


def _still_needed(cell: Cell, choice: Choice, registered: str, settled: bool, best: set[str]) -> bool:
    if choice.is_wanted(cell):
        return True
    chosen = choice.chosen(cell)
    if chosen is None:  # its group is still being measured: only the best so far can become the winner
        return choice.leads(cell)
    output = choice.plan.spec.output
    if not chosen or cell.kind != "merge" or output.keep == "none":
        return False
    if output.keep == "registered":
        if output.register_ is None:
            return False
        if cell.merge is not None and cell.merge.published.step != cell.model:
            return False  # what is published in its place is what is registered, and stays
        if registered and (settled or cell.id == registered):
            return cell.id == registered
    return cell.id in best
