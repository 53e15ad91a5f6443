"""Registered merges in MLflow's model registry. A version names the weights in the store; they are not copied."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from mergecore.reporting.scores import CellScores, Sweep, values_label

DIGEST = "weights.digest"


@dataclass(frozen=True)
class Registration:
    """What a sweep's registration record says. chosen_on: 'validation' or 'test', whose scores chose this cell."""

    cell: str
    name: str
    alias: str
    uri: str
    digest: str
    chosen_on: str

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Registration:
        """Return what the store's record says. Raises KeyError where cell, name, uri or digest is missing."""
        return cls(
            cell=str(record["cell"]),
            name=str(record["name"]),
            alias=str(record.get("alias") or ""),
            uri=str(record["uri"]),
            digest=str(record["digest"]),
            chosen_on=str(record.get("chosen_on") or ""),
        )


def register(client: MlflowClient, sweep: Sweep, run_id: str) -> ModelVersion | None:
    """Return the version of the sweep's registered cell and let the alias point to it.

    A version of the same digest and run is used again, else one is created. A version whose run was deleted (by a
    rebuild) is not used: its page would lead nowhere. run_id: of the registered cell. Returns None where the sweep has
    registered nothing.
    """
    if sweep.registered is None:
        return None
    registration = Registration.read(sweep.registered)
    cell = next(cell for cell in sweep.cells if cell.cell == registration.cell)
    run = client.get_run(run_id)
    version = _version_of(client, registration, run) or _new_version(client, sweep, cell, registration, run)
    if registration.alias:
        aliases = client.get_registered_model(registration.name).aliases
        if str(aliases.get(registration.alias)) != str(version.version):
            client.set_registered_model_alias(registration.name, registration.alias, str(version.version))
    return version


def _version_of(client: MlflowClient, registration: Registration, run: Run) -> ModelVersion | None:
    name = registration.name.replace("'", "\\'")
    versions = client.search_model_versions(f"name='{name}'")
    same = [v for v in versions if v.tags.get(DIGEST) == registration.digest and v.run_id == run.info.run_id]
    return max(same, key=lambda version: int(version.version), default=None)


def _new_version(
    client: MlflowClient, sweep: Sweep, cell: CellScores, registration: Registration, run: Run
) -> ModelVersion:
    tags = {
        "method": cell.method,
        "n_experts": str(cell.count),
        "sweep": sweep.name,
        "cell.id": cell.cell,
        "weights.uri": registration.uri,
        DIGEST: registration.digest,
    }
    _ensure_registered_model(client, registration.name)
    model = _external_model(client, cell, run, tags)
    version = client.create_model_version(
        registration.name,
        source=f"models:/{model.model_id}",
        run_id=run.info.run_id,
        model_id=model.model_id,
        tags=tags,
        description=_description(sweep, cell, registration),
        await_creation_for=0,  # nothing is copied, so there is nothing to wait for
    )
    listed = json.dumps([{"name": version.name, "version": str(version.version)}])
    client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": listed})  # the link from the model's page
    return version


def _ensure_registered_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name, description="Merges registered by Mergeloom. Weights stay where they are.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _external_model(client: MlflowClient, cell: CellScores, run: Run, tags: Mapping[str, str]) -> LoggedModel:
    """Create the logged model that MLflow needs for a version. Its only file says that the weights are elsewhere.

    `mlflow.create_external_model` does the same, but only for the tracking server of the whole process.
    """
    model = client.create_logged_model(
        experiment_id=run.info.experiment_id,
        name="".join(letter if letter not in "/:.%\"'" else "_" for letter in cell.name),
        source_run_id=run.info.run_id,
        tags={**tags, "mlflow.model.isExternal": "true"},
        params=dict(run.data.params),
        model_type="merge",
    )
    with tempfile.TemporaryDirectory() as folder:
        Model(
            artifact_path=model.artifact_location, model_uuid=model.model_id, model_id=model.model_id,
            run_id=run.info.run_id, metadata={"mlflow.model.isExternal": True},
        ).save(str(Path(folder) / "MLmodel"))  # fmt: skip
        client.log_model_artifacts(model.model_id, folder)
    now = int(time.time() * 1000)
    # Metrics of a model are also appended to its run, so they must be the run's own values.
    metrics = [
        Metric(name, value, now, 0, model_id=model.model_id, run_id=run.info.run_id)
        for name, value in run.data.metrics.items()
        if name.startswith(("held_in/", "held_out/"))
    ]
    client.log_batch(run.info.run_id, metrics=metrics)
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=0)])
    return client.finalize_logged_model(model.model_id, "READY")


def _description(sweep: Sweep, cell: CellScores, registration: Registration) -> str:
    chosen = f", chosen on {registration.chosen_on} items by {sweep.select_by}" if registration.chosen_on else ""
    return (
        f"{cell.method}, {cell.count} experts: {', '.join(cell.experts)}.\n\n"
        f"Values: {values_label(cell.values) or 'defaults'}. From sweep {sweep.name}{chosen}.\n\n"
        f"Weights: `{registration.uri}`\n\nDigest: `{registration.digest}`"
    )
