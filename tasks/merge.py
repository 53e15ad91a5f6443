"""Merges: many models completed in one pass over their pool, or one from a recipe; spans spread over the workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task
from prefect.client.schemas.objects import State

from mergecore.engine.executor import Executor
from mergecore.events import Report
from mergecore.execution.passes import run_merges
from mergecore.native.library import Library
from mergecore.recipes import merge_recipe as single
from mergecore.spec.recipe import Recipe
from mergecore.spec.sources import Resolver
from mergecore.store.store import State as StoreState
from tasks.work import OPTIONS, Work, cached, ended


@task(name="merge", task_run_name="merge {name}", **OPTIONS)
def merge(name: str, work: Work) -> State[Any]:
    """`work.items`: plans of merges."""
    missing = [plan for plan in work.items if work.place.store.state(plan.step) is not StoreState.PRESENT]
    return ended(run_merges(work.place, missing)) if missing else cached(len(work.items), "model")


class Order:
    """A recipe, the folder its model shall be in, and how it is made. A plain class, as `Work` is."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        resolve: Resolver,
        executor: Executor,
        report: Report,
        durable: bool,
        library: Library,
        origin: single.Origin | None,
    ) -> None:
        self.recipe, self.out, self.resolve, self.origin = recipe, out, resolve, origin
        self.executor, self.report, self.durable, self.library = executor, report, durable, library


@task(name="merge", task_run_name="merge {name}", **OPTIONS)
def merge_recipe(name: str, order: Order) -> single.Made:
    """Raises a MergeloomError for what cannot be made; nothing is left then."""
    return single.merge_recipe(
        order.recipe,
        order.out,
        order.resolve,
        order.executor,
        order.report,
        durable=order.durable,
        library=order.library,
        origin=order.origin,
    )
