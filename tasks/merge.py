"""Merges: many models in one pass over their pool, or one model from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task
from prefect.client.schemas.objects import State

from mergecore.engine.executor import Executor
from mergecore.events import Report
from mergecore.execution.lanes import run_works
from mergecore.native.library import Library
from mergecore.recipes.make_recipe import make_recipe
from mergecore.recipes.merge_recipe import Origin, WrittenModel
from mergecore.spec.recipe import Recipe
from mergecore.spec.sources import Resolver
from mergecore.store.store import State as StoreState
from tasks.work import OPTIONS, TaskInput, cached, ended


@task(name="merge", task_run_name="merge {name}", **OPTIONS)
def merge(name: str, work: TaskInput) -> State[Any]:
    """Make the models of `work.items`, plans of merges, in one pass."""
    missing = [plan for plan in work.items if work.place.store.state(plan.step) is not StoreState.PRESENT]
    return ended(run_works(work.place, missing)) if missing else cached(len(work.items), "model")


class Order:
    """A recipe, the new folder `out` for its model, and how the work is done. A plain class, as `TaskInput` is."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        resolve: Resolver,
        executor: Executor,
        report: Report,
        durable: bool,
        library: Library,
        origin: Origin | None,
    ) -> None:
        self.recipe, self.out, self.resolve, self.origin = recipe, out, resolve, origin
        self.executor, self.report, self.durable, self.library = executor, report, durable, library


@task(name="merge", task_run_name="merge {name}", **OPTIONS)
def merge_recipe(name: str, order: Order) -> WrittenModel:
    """Make the model of a recipe. Raises a MergeloomError where that cannot be done; nothing is left then."""
    return make_recipe(
        order.recipe,
        order.out,
        order.resolve,
        order.executor,
        order.report,
        durable=order.durable,
        library=order.library,
        origin=order.origin,
    )
