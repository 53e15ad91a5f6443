"""Carries out a recipe file: one model, or several of which later ones are made of earlier ones."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mergecore.engine.executor import Executor
from mergecore.errors import SpecError, StoreError
from mergecore.events import Report
from mergecore.native.library import Library
from mergecore.plugins.own_code import put_on_path
from mergecore.recipes.make_recipe import make_recipe
from mergecore.recipes.merge_recipe import MERGEKIT, Origin, WrittenModel
from mergecore.spec.mergekit.document import is_mergekit
from mergecore.spec.recipe import Recipe
from mergecore.spec.recipe_documents import RecipeDocument, Translator, read_orders
from mergecore.spec.sources import Resolver

Maker = Callable[[Recipe, Path, Origin | None], WrittenModel]
"""Makes the model of one recipe in the folder given; the recipe was read from the origin."""


def merge_file(
    path: Path,
    out: Path,
    resolve: Resolver,
    executor: Executor,
    report: Report,
    *,
    durable: bool = False,
    intermediates: Path | None = None,
    library: Library | None = None,
    memory: int | None = None,
    store: Path | None = None,
) -> list[WrittenModel]:
    """Make what a recipe file asks for, in this process or on the executor's workers (see `make_file`)."""

    def make(recipe: Recipe, folder: Path, origin: Origin | None) -> WrittenModel:
        return make_recipe(
            recipe, folder, resolve, executor, report, durable=durable, library=library, memory=memory, store=store,
            origin=origin,
        )  # fmt: skip

    return make_file(path, out, resolve, make, intermediates)


def make_file(
    path: Path, out: Path, resolve: Resolver, make: Maker, intermediates: Path | None = None
) -> list[WrittenModel]:
    """Make what a recipe file asks for, in our form or in mergekit's.

    Of several documents the one without a name becomes `out`; where all have names, each becomes a folder in `out`.
    intermediates: the folder that keeps results which others are made of; None: they are removed. Raise a
    MergeloomError.
    """
    orders = read_orders(path)
    put_on_path(path.absolute().parent)
    translator, text = Translator(resolve), path.read_text(encoding="utf-8")
    with contextlib.ExitStack() as stack:
        folders = _folders(orders, out, intermediates, stack)
        passing = intermediates is None and len(orders) > 1 and not all(order.name for order in orders)
        named = [order.name for order in orders if order.name and passing]
        called = {str(folders[name]): f"{name} of {MERGEKIT}" for name in named}
        for name in orders_there(orders, folders):
            raise StoreError(
                f"{folders[name]} exists already, perhaps from a run that was interrupted: remove it, or name another "
                "folder with --intermediates"
            )
        models = []
        for order in orders:
            recipe, notes = translator.recipe(order, folders)
            origin = Origin(text, called) if is_mergekit(order.document) else None
            model = make(recipe, folders[order.name], origin)
            models.append(dataclasses.replace(model, warnings=(*notes, *model.warnings)))
    return [model for model in models if model.folder.exists()]


def orders_there(orders: Sequence[RecipeDocument], folders: Mapping[str, Path]) -> list[str]:
    """Return the names of those results of several whose folders exist; nothing is made where there is one."""
    return [order.name for order in orders if len(orders) > 1 and order.name and os.path.lexists(folders[order.name])]


def _folders(
    orders: Sequence[RecipeDocument], out: Path, intermediates: Path | None, stack: contextlib.ExitStack
) -> dict[str, Path]:
    """Return the folder of each result. Raise SpecError where nobody would use a result."""
    if len(orders) == 1:
        return {orders[0].name: out}
    needed = {name for order in orders for name in order.needs}
    if intermediates is None and all(order.name for order in orders):
        intermediates = out
    for order in orders:
        if intermediates is None and order.name and order.name not in needed:
            raise SpecError(
                f"{order.where}: no other document is made of '{order.name}'; give --intermediates FOLDER to keep it "
                f"there"
            )
    if intermediates is None:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        intermediates = Path(folder)
    intermediates.mkdir(parents=True, exist_ok=True)
    return {order.name: intermediates / order.name if order.name else out for order in orders}
