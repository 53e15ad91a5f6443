"""What specs and the registry reach in a store, and what nothing asks for any more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from mergecore.errors import StoreError
from mergecore.execution.tensor_ids import tensors_step
from mergecore.identity.keys import KINDS, Step
from mergecore.planning.pool import snapshot_step
from mergecore.store.store import State, Store
from mergecore.store.survey import Inode, OnDisk, Stored, files_in, freed
from mergecore.sweeps.registration import registration_step
from mergecore.sweeps.remaining import Frontier


def steps_of(frontier: Frontier) -> Iterator[Step]:
    """Yield every step that a spec can ask for, done or not. Some come several times."""
    frontier.refresh()
    plan = frontier.plan
    for snapshot in (plan.pool.base, *(member.snapshot for member in plan.pool.members)):
        yield snapshot_step(snapshot)
        yield snapshot_step(snapshot.as_stored)
    for member in plan.pool.members:
        yield tensors_step(member.id, plan.pool)
    for cell in plan.cells:
        yield from frontier.view.steps(cell, plan.splits)
        if cell.merge is not None:
            yield cell.merge.published.step
            yield registration_step(frontier, cell)


def recorded_sweeps(store: Store) -> tuple[str, ...]:
    """Return the names of the sweeps that have written tables or a registration into the store."""
    return tuple(sorted(path.name for path in (store.root / "sweeps").glob("*") if path.is_dir()))


def registered_folders(store: Store) -> Mapping[str, str]:
    """Return {folder in `registration/`: sweep} of the models that sweeps have registered now."""
    folders = {}
    for sweep in recorded_sweeps(store):
        try:
            record = json.loads((store.root / "sweeps" / sweep / "registration.json").read_text())
            folders[str(record["uri"]).rstrip("/").rpartition("/")[2]] = sweep
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return folders


class Why(StrEnum):
    """Why something may go."""

    UNREACHED = "no spec asks for it"
    BROKEN = "broken: it is made again"
    FORMER = "registered before, and no sweep's model now"
    LEFT = "left by a process that is gone"
    FORGOTTEN = "of a sweep that is to be forgotten"


@dataclass(frozen=True)
class Rubbish:
    """A file or folder that may go. path: from the root of the store."""

    path: str
    why: Why
    files: Mapping[Inode, tuple[OnDisk, ...]]

    @property
    def kind(self) -> str:
        """The folder of the store that it lies in."""
        return self.path.partition("/")[0]

    @property
    def size(self) -> int:
        """Bytes that are free once it alone is deleted."""
        return freed([self.files])


@dataclass(frozen=True)
class Kept:
    """What must stay. keys: of the steps that specs reach; None: no spec was named, so all stay.

    former: whether models that were registered before, and are no longer, may go. forgotten: names of sweeps that go.
    """

    keys: Collection[str] | None = None
    former: bool = False
    forgotten: Collection[str] = ()


def rubbish(store: Store, results: Iterable[Stored], kept: Kept) -> list[Rubbish]:
    """Return what nothing asks for any more. Nothing is written."""
    registered = {folder for folder, sweep in registered_folders(store).items() if sweep not in kept.forgotten}
    pieces = [
        Rubbish(result.path, why, result.files)
        for result in results
        if (why := _why(result, kept, registered)) is not None
    ]
    other = [(path, Why.LEFT) for path in store.leftovers()]
    other += [(store.root / "sweeps" / name, Why.FORGOTTEN) for name in sorted(kept.forgotten)]
    if kept.keys is not None:
        failures = sorted((store.root / "failures").glob("*.json"))
        other += [(path, Why.UNREACHED) for path in failures if path.stem not in kept.keys]
    pieces += [Rubbish(str(path.relative_to(store.root)), why, files_in(path)) for path, why in other]
    return pieces


def _why(result: Stored, kept: Kept, registered: Collection[str]) -> Why | None:
    """Return why a result may go; None where it stays."""
    if result.state is State.BROKEN:
        return Why.BROKEN
    if result.kind == "registration":
        return Why.FORMER if kept.former and result.name not in registered else None
    return Why.UNREACHED if kept.keys is not None and result.key not in kept.keys else None


def delete(store: Store, pieces: Iterable[Rubbish]) -> None:
    """Delete these, and what processes that are gone have left.

    Raises StoreError, before anything is deleted, where a process works in the store.
    """
    if count := store.at_work():
        raise StoreError(
            f"a process works in {store.root} ({count} locks are in use): nothing was deleted; wait for it or stop it"
        )
    for piece in pieces:
        path = store.root / piece.path
        if piece.why is Why.LEFT:
            continue  # `clean` looks once more whether it is in use
        if piece.kind in KINDS:
            store.remove_folder(piece.kind, path.name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    store.clean()
