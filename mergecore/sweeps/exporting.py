"""Takes a cell's model away: its whole directory, from the store or made anew, with the bytes that the sweep made."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from mergecore.errors import MergeloomError, SpecError, StoreError, close_to
from mergecore.execution.fetch import fetch
from mergecore.execution.place import Place, snapshots_of
from mergecore.formats.whole_directory import whole_directory
from mergecore.planning.cells import Cell
from mergecore.reporting.scores import Sweep
from mergecore.reporting.summary import TEST, VALIDATION
from mergecore.store.check import Verdict, check
from mergecore.store.store import RECORD, State
from mergecore.store.survey import stored
from mergecore.sweeps.complete import make
from mergecore.sweeps.measured import collect
from mergecore.sweeps.publication import card_scores, publish
from mergecore.sweeps.registration import registration_step
from mergecore.sweeps.remaining import Frontier

ALIAS = "@"
"""What a cell begins with that is named by the alias under which it is registered."""


@dataclass(frozen=True)
class Exported:
    """A directory that was written. origin: 'registered', 'store' or 'made anew'. size: bytes of all its files."""

    folder: Path
    cell: Cell
    origin: str
    digest: str
    size: int


def cell_named(frontier: Frontier, name: str) -> Cell:
    """Return the cell of a name, an id, or (`@champion`) the alias under which the sweep has registered it.

    Raises SpecError where there is none, where it is refused, and where it is a checkpoint as it stands.
    """
    sweep, cells = collect(frontier), frontier.plan.cells
    wanted = _registered_as(sweep, name) if name.startswith(ALIAS) else name
    cell = next((cell for cell in cells if wanted in (cell.id, cell.name)), None)
    if cell is None:
        close = close_to(name, (cell.name for cell in cells if cell.kind == "merge"), 0.5)
        hint = f"did you mean '{close}'? " if close else ""
        raise SpecError(
            f"sweep '{sweep.name}' has no cell '{name}'; {hint}`mergeloom plan SPEC --cells` lists them, by name and id"
        )
    if cell.refused:
        raise SpecError(f"the cell '{cell.name}' cannot be made: {cell.refused}")
    if cell.kind != "merge" or cell.merge is None:
        source = frontier.plan.companions(cell).source.uri
        raise SpecError(f"the cell '{cell.name}' is no merge but a checkpoint as it stands; take it from {source}")
    return cell


def _registered_as(sweep: Sweep, alias: str) -> str:
    record = sweep.registered
    if record is None or alias not in (f"{ALIAS}{record['alias']}", f"{ALIAS}{record['name']}"):
        registered = f"'{ALIAS}{record['alias'] or record['name']}'" if record else "nothing"
        raise SpecError(f"the sweep '{sweep.name}' has registered {registered}, and nothing as '{alias}'")
    return str(record["cell"])


def export(place: Place, frontier: Frontier, cell: Cell, out: Path, *, durable: bool = False) -> Exported:
    """Write the whole directory of a cell's model to the new folder `out`: weights, small files and the card.

    The registered model is copied as it was registered. Of another cell the model is taken from the store, or made
    anew where it was dropped or never made; what was made for this alone is dropped again. The store is checked against
    its digests before anything is copied. Nothing in `out` is linked to the store. durable: fsync before `out` appears.

    Raises StoreError where `out` exists or the stored model is damaged, and MergeloomError where it cannot be made.
    """
    if os.path.lexists(out):  # said before anything is made
        raise StoreError(f"{out} exists already; choose another name or remove it")
    assert cell.merge is not None
    store, registration, published = place.store, registration_step(frontier, cell), cell.merge.published.step
    sweep = collect(frontier)
    is_registered = (sweep.registered or {}).get("cell") == cell.id and store.state(registration) is State.PRESENT
    if is_registered:
        _check(place, registration.kind, registration.name)
        with whole_directory(out, durable) as draft:
            _copy(store.folder(registration), draft)
        record = store.record(registration)
        return Exported(out, cell, "registered", record.digest if record else "", _size(out))
    at_hand = store.state(published) is State.PRESENT
    for snapshot in [frontier.plan.pool.base] if at_hand else snapshots_of(frontier.plan.pool):
        fetch(place, snapshot)
    done = make(place, frontier, cell.merge.published)
    if done.failures:
        raise MergeloomError(f"the model of '{cell.name}' could not be made: {next(iter(done.failures.values()))}")
    _check(place, published.kind, published.name)
    with whole_directory(out, durable) as draft:
        contents = publish(place, frontier, cell, draft, card_scores(sweep, cell.id, _split(sweep, cell)))
        if not at_hand and published in {work.step for work in frontier.droppable(settled=True)}:
            store.drop(published)
        _unlink(draft)
    return Exported(out, cell, "store" if at_hand else "made anew", contents.digest, _size(out))


def _split(sweep: Sweep, cell: Cell) -> str:
    """Return the split whose scores the card tells: the one by which the cell is chosen or not."""
    scored = next(scored for scored in sweep.cells if scored.cell == cell.id)
    return VALIDATION if scored.items.get(VALIDATION) else TEST


def _check(place: Place, kind: str, name: str) -> None:
    """Raise StoreError where a stored result is not what was written."""
    checked = check(place.store, stored(place.store, kind, name))
    if checked.verdict is Verdict.DAMAGED:
        raise StoreError(checked.trouble)


def _copy(source: Path, target: Path) -> None:
    """Copy a result's files without its record."""
    for path in sorted(path for path in source.rglob("*") if path.is_file() and path != source / RECORD):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _unlink(folder: Path) -> None:
    """Give every file that shares its bytes with the store bytes of its own: who writes to one must not spoil both."""
    for path in [path for path in folder.rglob("*") if path.is_file() and path.stat().st_nlink > 1]:
        copy = path.with_name(f"{path.name}.copy")
        shutil.copyfile(path, copy)
        copy.replace(path)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
