"""Completes a sweep in this process: rounds of work until nothing is missing.

The Prefect flow does the same rounds as tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mergecore.errors import EvaluationError
from mergecore.execution.evaluations import run_scorings
from mergecore.execution.fetch import fetch
from mergecore.execution.lanes import run_works
from mergecore.execution.outcome import Done
from mergecore.execution.place import Place, drop_models, snapshots_of
from mergecore.planning.work import Work
from mergecore.reporting.scores import Sweep
from mergecore.reporting.summary import best
from mergecore.store.store import State
from mergecore.sweeps.measured import collect
from mergecore.sweeps.publication import card_scores
from mergecore.sweeps.registration import register, registration_step
from mergecore.sweeps.remaining import Frontier, Round


@dataclass(frozen=True)
class Winner:
    """The cell to register. chosen_on: the split whose scores chose it."""

    cell: str
    chosen_on: str


def complete(place: Place, frontier: Frontier, after: Callable[[Done], None]) -> Done:
    """Do everything that is missing, round by round. `after` is called with the outcome of each round."""
    done = Done()
    for snapshot in snapshots_of(place.pool):
        done = done.note(fetch(place, snapshot))
    drop_models(place, frontier.droppable())
    while round := frontier.round():
        outcome = run_round(place, round)
        drop_models(place, frontier.droppable())
        after(outcome)
        done = done.note(outcome)
    done = done.note(register_best(place, frontier))
    settle(frontier)
    return done


def settle(frontier: Frontier) -> None:
    """Drop models that nothing asks for any more, and remove what killed runs left. Nothing may be missing."""
    for merge in frontier.droppable(settled=True):
        frontier.store.drop(merge.step)
    for cell in frontier.plan.cells:
        if cell.merge is not None and frontier.store.state(cell.model) is State.DROPPED:
            frontier.store.drop(cell.model)
    frontier.store.clean()


def run_round(place: Place, round: Round) -> Done:
    """Do one round, its parts one after another."""
    done = Done()
    for works in (round.statistics, round.merges):
        done = done.note(run_works(place, works))
    if round.scorings:
        done = done.note(run_scorings(place, round.scorings))
    return done


def winner(frontier: Frontier, sweep: Sweep) -> Winner | None:
    """Return the cell to register; None where the spec registers nothing or nothing can win."""
    if frontier.plan.spec.output.register_ is None:
        return None
    try:
        return Winner(*best(sweep))
    except EvaluationError:
        return None


def to_register(frontier: Frontier, sweep: Sweep) -> Winner | None:
    """Return the winner where it is not registered yet, else None."""
    best_cell = winner(frontier, sweep)
    if best_cell is None:
        return None
    cell = next(cell for cell in frontier.plan.cells if cell.id == best_cell.cell)
    registered = sweep.registered or {}
    published = frontier.store.is_done(registration_step(frontier, cell), bytes_needed=True)
    settings = frontier.plan.spec.output.register_
    assert settings is not None
    same = (registered.get("cell"), registered.get("name"), registered.get("alias"), registered.get("chosen_on"))
    return None if published and same == (cell.id, settings.name, settings.alias, best_cell.chosen_on) else best_cell


def make(place: Place, frontier: Frontier, work: Work) -> Done:
    """Make a work's bytes where they are not at hand, and before it what it must know. End at the first failure."""
    done = Done()
    at_hand = frontier.store.is_done(work.step, bytes_needed=True)
    while not done.failures and (round := frontier.making([] if at_hand else [work])):
        done = done.note(run_round(place, round))
    return done


def register_best(place: Place, frontier: Frontier) -> Done:
    """Register the winner. What is published of it is made again where it was dropped."""
    sweep = collect(frontier)
    best_cell = to_register(frontier, sweep)
    if best_cell is None:
        return Done()
    cell = next(cell for cell in frontier.plan.cells if cell.id == best_cell.cell)
    assert cell.merge is not None
    done = make(place, frontier, cell.merge.published)
    if done.failures:
        return done
    scores = card_scores(sweep, cell.id, best_cell.chosen_on)
    done = done.note(register(place, frontier, cell, best_cell.chosen_on, scores))
    drop_models(place, frontier.droppable())
    return done


def finished(frontier: Frontier) -> Sweep | None:
    """Return the sweep as the store holds it; None where anything is still to be done."""
    if frontier.round():
        return None
    sweep = collect(frontier)
    return sweep if to_register(frontier, sweep) is None else None
