"""The settings of one command: workers, memory, disk, device and addresses, each resolved once.

What the caller chose for this run comes first, then the spec, then the environment, then the default. The defaults
stand here and nowhere else.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from flows.services.servers import Addresses, serving
from flows.session.machine import available_memory, cores, cuda_device_count, free_disk
from mergecore.spec.sizes import size_in_bytes
from mergecore.spec.sweep import Run
from mergecore.store.store import Store

Value = TypeVar("Value")
Value_co = TypeVar("Value_co", covariant=True)

CHOSEN = "chosen for this run"
STARTED = "default: a server is started for the time of the work"
MLFLOW_OF_SPEC = "run.mlflow of the spec"
MLFLOW_OF_ENVIRONMENT = "MLFLOW_TRACKING_URI"


@dataclass(frozen=True)
class Setting(Generic[Value_co]):
    """A value and where it comes from, as a phrase that stands in brackets: `run.memory of the spec`."""

    value: Value_co
    origin: str


@dataclass(frozen=True)
class Options:
    """What the caller chose for this run: options of a command, fields of a form. None: nothing.

    workers: threads or worker processes. mlflow: a tracking URI.
    """

    workers: int | None = None
    mlflow: str | None = None


@dataclass(frozen=True)
class Settings:
    """Everything that was resolved for one session. Nothing here can change a number.

    workers: threads or processes that share the work. memory: bytes that a pass may use. disk: bytes that models under
    way may use. device: where models are scored, 'cpu' or 'cuda'. cluster: 'local', 'gpu' or the address of a Dask
    scheduler. prefect, mlflow: addresses; None: a server is started for the time of the work.
    """

    workers: Setting[int]
    memory: Setting[int]
    disk: Setting[int]
    device: Setting[str]
    cluster: Setting[str]
    prefect: Setting[str | None]
    mlflow: Setting[str | None]

    @property
    def chosen_workers(self) -> int | None:
        """The number of workers where the caller chose it for this run, else None."""
        return self.workers.value if self.workers.origin == CHOSEN else None

    @property
    def scheduler(self) -> str | None:
        """The address of a Dask cluster that runs already, or None."""
        return None if self.cluster.value in ("local", "gpu") else self.cluster.value

    @property
    def pages_last(self) -> bool:
        """Whether MLflow is there for longer than the work, so that links to its pages hold."""
        return self.mlflow.origin != STARTED

    @property
    def is_mlflow_own(self) -> bool:
        """Whether MLflow's database is the one in the store, which `mergeloom serve` shows."""
        return self.mlflow.origin not in (CHOSEN, MLFLOW_OF_SPEC, MLFLOW_OF_ENVIRONMENT)

    @property
    def registry(self) -> str | None:
        """The address of MLflow's registry where the environment names one; None: MLflow's address says it all."""
        return os.environ.get("MLFLOW_REGISTRY_URI") if self.mlflow.origin == MLFLOW_OF_ENVIRONMENT else None

    def at(self, addresses: Addresses) -> Settings:
        """Return the same settings with the addresses of servers that were started."""
        return replace(
            self,
            prefect=Setting(addresses.prefect, self.prefect.origin),
            mlflow=Setting(addresses.mlflow, self.mlflow.origin),
        )


def resolved(run: Run, store: Store, options: Options = Options()) -> Settings:
    """Return the settings of a sweep. run: what its spec says."""
    started: Setting[str | None] = Setting(None, STARTED)
    served, serve = serving(store.root), f"`mergeloom serve` over {store.root}"
    prefect = _first(
        started,
        (run.prefect, "run.prefect of the spec"),
        (os.environ.get("PREFECT_API_URL"), "PREFECT_API_URL"),
        (served.prefect if served else None, serve),
    )
    mlflow = _first(
        started,
        (options.mlflow, CHOSEN),
        (run.mlflow, MLFLOW_OF_SPEC),
        (os.environ.get("MLFLOW_TRACKING_URI"), MLFLOW_OF_ENVIRONMENT),
        (served.mlflow if served else None, serve),
    )
    on_gpu = run.dask == "gpu" and cuda_device_count() > 0
    return Settings(
        workers=_workers(options.workers, run, on_gpu),
        memory=memory_setting(run.memory, "run.memory of the spec"),
        disk=_disk(run, store),
        device=Setting("cuda", "run.dask of the spec") if on_gpu else Setting("cpu", "default"),
        cluster=Setting(run.dask, "run.dask of the spec" if "dask" in run.model_fields_set else "default"),
        prefect=prefect,
        mlflow=mlflow,
    )


def worker_setting(chosen: int | None, spec: int | None = None) -> Setting[int]:
    """Return how many threads or processes share the work."""
    default = Setting(cores(), "default: one a core")
    return _first(default, (chosen, CHOSEN), (spec, "run.workers of the spec"))


def memory_setting(size: str | None, origin: str = CHOSEN) -> Setting[int]:
    """Return the bytes that a pass may use. size: as people write it, '8GB'; None: the default. Raises SpecError."""
    if size:
        return Setting(size_in_bytes(size), origin)
    return Setting(available_memory() // 2, "default: half of what is free")


def _workers(chosen: int | None, run: Run, on_gpu: bool) -> Setting[int]:
    if on_gpu:
        return Setting(cuda_device_count(), "one a CUDA device")
    return worker_setting(chosen, run.workers)


def _disk(run: Run, store: Store) -> Setting[int]:
    if run.disk:
        return Setting(size_in_bytes(run.disk), "run.disk of the spec")
    return Setting(free_disk(store.root) // 2, "default: half of what is free")


def _first(default: Setting[Value], *candidates: tuple[Value | None, str]) -> Setting[Value]:
    """Return the first candidate that has a value, else the default."""
    return next((Setting(value, origin) for value, origin in candidates if value), default)
