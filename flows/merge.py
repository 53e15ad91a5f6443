"""One merge as a Prefect flow: a recipe becomes a model's folder, its spans spread over a Dask cluster."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed
from pydantic import Field

from flows.budget import readable
from flows.cancelling import cancelling
from flows.cluster import dask_client
from flows.pages import logged, run_name, slug
from flows.session import loops, resolver
from flows.startup import digest_cache
from mergecore.recipes import read_recipe
from mergecore.single import Made
from mergecore.spec import Recipe, as_yaml
from tasks.merge import Order, merge_recipe
from tasks.spread import OnDask, Stopped


@flow(
    name="merge",
    flow_run_name=run_name,
    description="Make one model from a recipe.",
    persist_result=False,
)
def merge(
    recipe: str, out: str, workers: Annotated[int, Field(ge=1)] | None = None, durable: bool = False
) -> State[Any]:
    """Make one model from a recipe. Returns the folder it is in.

    Prefect shows what follows beside the fields of its form.

    Args:
        recipe: Path of the recipe file, seen from the project's folder.
        out: The new folder to write; it is there whole or not at all.
        workers: Worker processes; none given: one a core.
        durable: Have every file on the disk (fsync) before the folder appears.
    """
    stop, report = threading.Event(), logged()
    parsed, folder = read_recipe(Path(recipe), resolver(digest_cache(), report)), Path(out).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside,
        cancelling(stop),
        dask_client(Path(beside), workers=workers) as client,
    ):
        executor = OnDask(client, Path(beside) / "passes", stop)
        order = Order(parsed, folder, resolver(digest_cache(), report), executor, report, durable, loops())
        try:
            made = merge_recipe(parsed.method, order)
        except Stopped as error:
            return Cancelled(message=str(error))
    create_markdown_artifact(_page(made, parsed), key=f"model-{slug(folder.name)}", description=f"Model in {out}")
    state: State[Any] = Completed(message=f"{made.folder}, {readable(made.size)}", data=str(made.folder))
    return state


def _page(made: Made, recipe: Recipe) -> str:
    """Where the model is and what it is made of, in Markdown."""
    held = as_yaml(recipe.model_dump(mode="json", exclude_defaults=True))
    facts = [f"`{made.folder}`, {readable(made.size)}", f"Digest `{made.digest}`"]
    notes = [f"- {warning}" for warning in made.warnings]
    return "\n\n".join([f"# {recipe.method}", *facts, *notes, f"```yaml\n{held}```"])
