"""Registers deployments and automations with a Prefect server, and leaves alone what people have changed there.

`prefect deploy --all` replaces the schedules of a deployment. Here a deployment that exists already gets only the
fields that come from the file: entrypoint, form, description, tags and work pool. Its schedules, parameters,
concurrency limit and paused state belong to the people who use it from then on. They are never deleted and written
again, so a crash in between loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import click
import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL
from prefect.utilities.callables import parameter_schema
from pydantic import BaseModel, ConfigDict, ValidationError

from mergecore.errors import MergeloomError, ServiceError, SpecError
from mergecore.spec.yaml_files import read_yaml


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")


class WorkPool(_Settings):
    """The work pool whose workers run a deployment, and what is handed to them."""

    name: str
    job_variables: dict[str, Any] = {}


class Limit(_Settings):
    """How many runs of a deployment go on at once, and what happens to one more."""

    limit: int
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"] = "ENQUEUE"


class Schedule(_Settings):
    """A schedule that a new deployment begins with."""

    slug: str
    cron: str
    timezone: str = "Etc/UTC"
    active: bool = True
    parameters: dict[str, Any] = {}


class DeploymentEntry(_Settings):
    """A deployment as the file has it; the keys are those of Prefect's own `prefect.yaml`."""

    name: str
    entrypoint: str
    description: str
    work_pool: WorkPool
    tags: list[str] = []
    parameters: dict[str, Any] = {}
    concurrency_limit: Limit | None = None
    schedules: list[Schedule] = []


class _File(_Settings):
    name: str
    definitions: dict[str, Any] = {}
    deployments: list[DeploymentEntry]


def read_entries(path: Path) -> list[DeploymentEntry]:
    """The deployments of a file. Raises SpecError for keys that nothing here would follow."""
    try:
        return _File.model_validate(read_yaml(path)).deployments
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise SpecError(f"{path}: {problems}") from None


def deploy(client: SyncPrefectClient, entry: DeploymentEntry) -> bool:
    """Bring a deployment to what the file says; returns whether it is new.

    A new one begins with the file's schedules, parameters and limit. One that exists keeps its own.
    """
    flow: Flow[..., Any] = load_flow_from_entrypoint(entry.entrypoint)
    fields: dict[str, Any] = {
        "entrypoint": entry.entrypoint,
        "version": flow.version,
        "description": entry.description,
        "tags": entry.tags,
        "work_pool_name": entry.work_pool.name,
        "job_variables": entry.work_pool.job_variables,
        "parameter_openapi_schema": parameter_schema(flow).model_dump(exclude_unset=True),
        "enforce_parameter_schema": True,
        # Flows are loaded, and runs start, in the folder this was called in.
        "pull_steps": [{"prefect.deployments.steps.set_working_directory": {"directory": str(Path.cwd())}}],
    }
    try:
        deployment = client.read_deployment_by_name(f"{flow.name}/{entry.name}")
    except ObjectNotFound:
        client.create_deployment(
            flow_id=client.create_flow_from_name(flow.name),
            name=entry.name,
            parameters=entry.parameters,
            schedules=[_created(schedule) for schedule in entry.schedules],
            **_limited(entry.concurrency_limit),
            **fields,
        )
        return True
    client.update_deployment(deployment.id, DeploymentUpdate(**fields))
    return False


def _limited(limit: Limit | None) -> dict[str, Any]:
    if limit is None:
        return {}
    options = ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy(limit.collision_strategy))
    return {"concurrency_limit": limit.limit, "concurrency_options": options}


def _created(schedule: Schedule) -> DeploymentScheduleCreate:
    return DeploymentScheduleCreate(
        slug=schedule.slug,
        schedule=CronSchedule(cron=schedule.cron, timezone=schedule.timezone),
        active=schedule.active,
        parameters=schedule.parameters,
    )


def automate(client: SyncPrefectClient, automation: AutomationCore) -> bool:
    """Bring the automation of this name to what the file says; returns whether it is new. One that exists keeps its
    switch.
    """
    existing = client.read_automations_by_name(automation.name)
    if not existing:
        client.create_automation(automation)
        return True
    client.update_automation(existing[0].id, automation.model_copy(update={"enabled": existing[0].enabled}))
    return False


@contextmanager
def _answered(name: str) -> Iterator[None]:
    """Inside, what goes wrong with Prefect becomes a ServiceError about the named thing."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise ServiceError(f"Prefect refused the {name}: {error.response.text[:500]}") from error
    except (ObjectAlreadyExists, ObjectNotFound) as error:  # a 409, a 404; both say more than their names
        raise ServiceError(f"Prefect refused the {name}: {str(error.http_exc)[:500]}") from error
    except httpx.HTTPError as error:
        raise ServiceError(
            f"Prefect did not answer for the {name} ({type(error).__name__}). Start it (`make serve`), or say where it "
            "is "
            "(PREFECT_API_URL; with make, SERVER=)."
        ) from error


def _register(deployments: Path, automations: Sequence[Path]) -> None:
    if not PREFECT_API_URL.value():
        raise ServiceError("No Prefect server is named: set PREFECT_API_URL, as in http://127.0.0.1:4200/api.")
    entries = read_entries(deployments)
    automatic = [AutomationCore.model_validate(read_yaml(path)) for path in automations]
    with get_client(sync_client=True) as client:
        for entry in entries:
            with _answered(name := f"deployment {entry.name}"):
                _say(name, deploy(client, entry))
        for automation in automatic:
            with _answered(name := f"automation '{automation.name}'"):
                _say(name, automate(client, automation))


def _say(name: str, new: bool) -> None:
    click.echo(f"{name}: {'created' if new else 'brought up to date; what was changed in Prefect stays'}")


@click.command()
@click.argument("deployments", type=click.Path(path_type=Path, exists=True))
@click.argument("automations", type=click.Path(path_type=Path, exists=True), nargs=-1)
def main(deployments: Path, automations: tuple[Path, ...]) -> None:
    """Register DEPLOYMENTS and AUTOMATIONS with the Prefect server at PREFECT_API_URL.

    What people have changed on its pages stays: schedules, parameters, limits, switches.
    """
    try:
        _register(deployments, automations)
    except MergeloomError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
