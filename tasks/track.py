"""The sweep shown in MLflow, as a Prefect task. `tasks/tracking` does the writing and knows nothing of Prefect."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prefect import get_run_logger, task
from prefect.client.schemas.objects import State
from prefect.states import Completed

from mergecore.errors import ServiceError
from tasks.work import OPTIONS

if TYPE_CHECKING:
    from tasks.tracking.project import TrackResult


class Projection:
    """How the sweep is projected; the pages that came out of it, and what is to be told of it."""

    def __init__(self, project: Callable[[], TrackResult]) -> None:
        self.project = project
        self.pages: dict[str, str] = {}
        self.remarks: list[str] = []


@task(name="track", task_run_name="track {name}", **OPTIONS)
def track(name: str, projection: Projection) -> State[Any]:
    """Show the sweep in MLflow. Where MLflow is away the task completes and says so."""
    try:
        result = projection.project()
    except ServiceError as error:
        projection.remarks.append(f"not shown in MLflow: {error}")
        get_run_logger().warning("not shown in MLflow: %s", error)
        return Completed(name="Without MLflow", message=str(error), data=None)
    projection.pages.update(result.urls)
    projection.remarks.extend(result.remarks)
    if result.unregistered:
        get_run_logger().warning("%s", result.remarks[-1])
        return Completed(name="Not registered", message=result.remarks[-1], data=None)
    return Completed(message=f"{result.written} runs written, {result.unchanged} unchanged", data=None)
