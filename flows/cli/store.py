"""`mergeloom store`: what a store holds, what of it nothing asks for any more, and whether it is what was written."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flows.cli.endings import errors
from mergecore.errors import SpecError

if TYPE_CHECKING:
    from flows.session.session import Session
    from mergecore.events import Report
    from mergecore.store.store import Store
    from mergecore.store.survey import Stored
    from mergecore.sweeps.reach import Rubbish

DEFAULT_STORE = Path(".mergeloom")
SPECS = click.argument("specs", nargs=-1, metavar="[SPEC]...", type=click.Path(path_type=Path))
STORE = click.option(
    "--store", "root", type=click.Path(path_type=Path), help="the folder; default: that of SPEC, else .mergeloom"
)
EACH = click.option("--each", is_flag=True, help="a line for each result")


@click.group()
def store() -> None:
    """Look at a store, free what nothing asks for, and check what it holds.

    A store is the folder that keeps the results of sweeps (`output.store`, `.mergeloom` by default). Whatever is
    deleted in it and still asked for is made again.
    """


@store.command()
@SPECS
@STORE
@EACH
def ls(specs: tuple[Path, ...], root: Path | None, each: bool) -> None:
    """Show what the store holds and how many bytes it takes.

    With SPECs, also what none of them and no registered model needs. A file under two names (a registered model is
    linked to its merge) is counted once in the total.
    """
    with errors():
        from mergecore.store.survey import results
        from mergecore.sweeps.reach import Kept, rubbish

        place, reached, _ = _opened(specs, root)
        stored = list(results(place))
        spare = {piece.path for piece in rubbish(place, stored, Kept(reached))} if reached is not None else None
        click.echo(_each(stored, spare) if each else _by_kind(place, stored, spare))


@store.command()
@SPECS
@STORE
@EACH
@click.option("--yes", is_flag=True, help="delete; without it nothing is written")
@click.option(
    "--forget", "forgotten", multiple=True, metavar="NAME", help="a sweep in the store that has no spec any more"
)
@click.option("--former", is_flag=True, help="also models that were registered before another took their place")
def gc(
    specs: tuple[Path, ...], root: Path | None, each: bool, yes: bool, forgotten: tuple[str, ...], former: bool
) -> None:
    """Show what nothing asks for any more; with --yes delete it.

    Name every SPEC that still counts. What none of them reaches may go: statistics, models, scores, failures. Without a
    SPEC only broken results and what killed processes left (drafts, locks) may go. Registered models always stay, but
    with --former only the present ones do. A sweep of the store that is none of the SPECs must be named by --forget
    before --yes deletes its results. `mergeloom merge --store` leaves statistics that no spec reaches: they go too.
    """
    with errors():
        from flows.session.limits import readable
        from mergecore.store.survey import freed, results
        from mergecore.sweeps.reach import Kept, delete, recorded_sweeps, rubbish

        place, reached, names = _opened(specs, root)
        recorded = recorded_sweeps(place)
        for name in forgotten:
            if name not in recorded or name in names:
                known = ", ".join(sorted(set(recorded) - set(names))) or "none"
                raise SpecError(f"--forget {name}: the store has no such sweep without a SPEC here; there are: {known}")
        orphans = sorted(set(recorded) - set(names) - set(forgotten)) if reached is not None else []
        kept = Kept(reached, former=former, forgotten=forgotten)
        pieces = rubbish(place, results(place), kept)
        for name in orphans:
            click.echo(f"note: sweep '{name}' is none of these specs, so its results count as asked for by nobody")
        if not pieces:
            click.echo(f"{place.root}: nothing to delete")
            return
        click.echo(_rubbish_text(pieces, each))
        size = readable(freed(piece.files for piece in pieces))
        if not yes:
            click.echo(f"{size} would be free; nothing was deleted (--yes deletes)")
            return
        if orphans:
            raise SpecError(
                f"nothing was deleted: name the spec of {_quoted(orphans)} as well, or give up the results with "
                + " ".join(f"--forget {name}" for name in orphans)
            )
        delete(place, pieces)
        click.echo(f"{size} freed")


@store.command()
@STORE
def verify(root: Path | None) -> None:
    """Read every result and compare it with the digest in its record. Nothing is written.

    Damage is told by folder and tensor; the exit code is then 1. Delete such a folder, or run `mergeloom store gc
    --yes` where its record or the size of a file is wrong: it is made again when something asks for it.
    """
    with errors():
        from flows.cli.terminal import progress
        from flows.session.limits import readable
        from mergecore.events import Event
        from mergecore.store.check import Verdict, check
        from mergecore.store.survey import results, taken

        place, _, _ = _opened((), root)
        stored = list(results(place))
        verdicts, troubles = Counter[Verdict](), []
        with progress() as report:
            for number, result in enumerate(stored, start=1):
                checked = check(place, result)
                verdicts[checked.verdict] += 1
                troubles += [checked.trouble] if checked.trouble else []
                report(Event(f"check {result.kind}", number, len(stored), "results"))
        for trouble in troubles:
            click.echo(trouble)
        counts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in Verdict if verdicts[verdict])
        read = readable(taken(result.files for result in stored))
        click.echo(f"{place.root}: {len(stored)} results, {read}: {counts or 'it is empty'}")
        if troubles:
            sys.exit(1)


def _opened(specs: Sequence[Path], root: Path | None) -> tuple[Store, frozenset[str] | None, tuple[str, ...]]:
    """Return the store, the keys of the steps that the specs reach (None without specs), and the specs' names.

    Raises SpecError where the specs have several stores, and StoreError where there is none.
    """
    from flows.cli.terminal import progress
    from mergecore.errors import StoreError
    from mergecore.store.store import Store
    from mergecore.sweeps.reach import steps_of

    reached: frozenset[str] | None = None
    names: tuple[str, ...] = ()
    if not specs:
        place = Store(root or DEFAULT_STORE)
    else:
        with progress() as report:
            sessions = [_session(spec, report) for spec in specs]
        roots = {session.store.root for session in sessions} | ({root.absolute()} if root else set())
        if len(roots) > 1:
            raise SpecError(
                f"the specs and --store name several stores ({_quoted(sorted(map(str, roots)))}); one a call"
            )
        place, names = sessions[0].store, tuple(session.spec.name for session in sessions)
        reached = frozenset(step.key for session in sessions for step in steps_of(session.frontier))
    if not place.root.is_dir():
        raise StoreError(f"{place.root} is no store: there is no such folder; name one with --store")
    return place, reached, names


def _session(spec: Path, report: Report) -> Session:
    from flows.session.session import open_session

    return open_session(spec, report)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _by_kind(place: Store, stored: Sequence[Stored], spare: set[str] | None) -> str:
    """Return a table with a line for each kind of result, and one for each other entry of the store."""
    from flows.cli.terminal import table
    from flows.session.limits import readable
    from mergecore.identity.keys import KINDS
    from mergecore.store.store import State
    from mergecore.store.survey import beside, files_in, freed, taken

    states = (State.PRESENT, State.DROPPED, State.BROKEN)
    head = ["what", "results", *states, "size"] + (["not asked for"] if spare is not None else [])
    rows = []
    for kind in KINDS:
        here = [result for result in stored if result.kind == kind]
        counts = Counter(result.state for result in here)
        row = [kind, str(len(here)), *(str(counts[state]) for state in states)]
        row.append(readable(taken(result.files for result in here)))
        if spare is not None:
            row.append(readable(freed(result.files for result in here if result.path in spare)))
        if here:
            rows.append(row)
    blank = [""] * (len(states) + 1)
    rest = [""] if spare is not None else []
    rows += [[name, *blank, readable(size), *rest] for name, size in beside(place).items()]
    rows.append(["total", *blank, readable(taken([files_in(place.root)])), *rest])
    return f"{place.root}\n\n{table(head, rows)}"


def _each(stored: Sequence[Stored], spare: set[str] | None) -> str:
    """Return a table with a line for each result, the largest first."""
    from flows.cli.terminal import table
    from flows.session.limits import readable
    from mergecore.store.survey import taken

    sizes = {result.path: taken([result.files]) for result in stored}
    head = ["result", "state", "size"] + (["asked for"] if spare is not None else [])
    rows = [
        [result.path, str(result.state), readable(sizes[result.path])]
        + ([] if spare is None else ["no" if result.path in spare else "yes"])
        for result in sorted(stored, key=lambda result: (-sizes[result.path], result.path))
    ]
    return table(head, rows)


def _rubbish_text(pieces: Sequence[Rubbish], each: bool) -> str:
    """Return what may go as a table: by kind and reason, or each piece."""
    from flows.cli.terminal import table
    from flows.session.limits import readable
    from mergecore.store.survey import taken

    if each:
        return table(["what", "why", "size"], [[p.path, str(p.why), readable(taken([p.files]))] for p in pieces])
    groups: dict[tuple[str, str], list[Rubbish]] = {}
    for piece in pieces:
        groups.setdefault((piece.kind, str(piece.why)), []).append(piece)
    rows = [
        [kind, str(len(group)), why, readable(taken(piece.files for piece in group))]
        for (kind, why), group in groups.items()
    ]
    return table(["what", "count", "why", "size"], rows)
