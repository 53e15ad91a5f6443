"""A merge as a Prefect flow: a recipe becomes the folder of a model, its spans spread over a Dask cluster."""

from __future__ import annotations

import tempfile
import threading
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed
from pydantic import Field

from flows.cancelling import cancelling
from flows.pages import logged, run_name, slug
from flows.session.limits import readable
from flows.session.session import resolver
from flows.session.settings import worker_setting
from flows.session.startup import digest_cache, loops
from mergecore.recipes.merge_file import make_file
from mergecore.recipes.merge_recipe import Origin, WrittenModel
from mergecore.spec.recipe import Recipe
from mergecore.spec.yaml_files import as_yaml
from tasks.cluster.executor import OnDask, Stopped
from tasks.cluster.workers import dask_client
from tasks.merge import Order, merge_recipe


@flow(
    name="merge",
    flow_run_name=run_name,
    description="Make one model from a recipe, or those that mergekit's form of several documents asks for.",
    persist_result=False,
)
def merge(
    recipe: str,
    out: str,
    workers: Annotated[int, Field(ge=1)] | None = None,
    durable: bool = False,
    intermediates: str | None = None,
) -> State[Any]:
    """Make one model from a recipe. Return the folders of the models that stay.

    Prefect shows what follows beside the fields of its form.

    Args:
        recipe: Path of the recipe file, seen from the project's folder.
        out: The new folder to write; it is there whole or not at all.
        workers: Worker processes; none chosen: one a core.
        durable: Have every file on the disk (fsync) before the folder appears.
        intermediates: Folder for the named results of a recipe of several documents; none chosen: they are removed.
    """
    stop, report, folder = threading.Event(), logged(), Path(out).absolute()
    recipes: dict[Path, Recipe] = {}
    home = Path(recipe).absolute().parent
    with ExitStack() as stack:
        stack.enter_context(cancelling(stop))

        @cache
        def executor() -> OnDask:
            """Start the cluster, once the first recipe has been read without an error."""
            folder.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent))
            )
            client = stack.enter_context(dask_client(beside, None, worker_setting(workers).value, home=home))
            return OnDask(client, beside / "passes", stop)

        def make(parsed: Recipe, out: Path, origin: Origin | None) -> WrittenModel:
            recipes[out], find = parsed, resolver(digest_cache(), report)
            return merge_recipe(parsed.method, Order(parsed, out, find, executor(), report, durable, loops(), origin))

        try:
            kept = Path(intermediates).absolute() if intermediates else None
            models = make_file(Path(recipe), folder, resolver(digest_cache(), report), make, kept)
        except Stopped as error:
            return Cancelled(message=str(error))
    for model in models:
        key = f"model-{slug(model.folder.name)}"
        page = _page(model, recipes[model.folder])
        create_markdown_artifact(page, key=key, description=f"Model in {model.folder}")
    message = "; ".join(f"{model.folder}, {readable(model.size)}" for model in models)
    state: State[Any] = Completed(message=message, data=[str(model.folder) for model in models])
    return state


def _page(model: WrittenModel, recipe: Recipe) -> str:
    """Return a page in Markdown: where the model is and how it was made."""
    recipe_text = as_yaml(recipe.model_dump(mode="json", exclude_defaults=True))
    facts = [f"`{model.folder}`, {readable(model.size)}", f"Digest `{model.digest}`"]
    notes = [f"- {warning}" for warning in model.warnings]
    return "\n\n".join([f"# {recipe.method}", *facts, *notes, f"```yaml\n{recipe_text}```"])
