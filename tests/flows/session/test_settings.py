"""Settings are resolved in one order: chosen for this run, spec, environment, default. They say where they are from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.cli.texts import settings_text
from flows.services.servers import SERVING
from flows.session.limits import check_fit
from flows.session.machine import cores
from flows.session.settings import Options, resolved
from mergecore.errors import CapacityError, StoreError
from mergecore.spec.sweep import Run
from mergecore.store.store import Store
from mergecore.sweeps.cost import Cost, PassCost


@pytest.fixture(autouse=True)
def no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def costs(memory: int, disk: int) -> Cost:
    one_pass = PassCost("scan: 1 statistic", 0, 0, memory, 1, disk, 0.0)
    return Cost(1, 0, 0, 1, 0, (one_pass,), memory, 0.0, False)


def test_workers_are_chosen_for_the_run_or_in_the_spec_or_one_a_core(tmp_path: Path) -> None:
    store = Store(tmp_path)
    chosen = resolved(Run(workers=3), store, Options(workers=5))
    assert (chosen.workers.value, chosen.workers.origin) == (5, "chosen for this run")
    assert chosen.chosen_workers == 5
    spec = resolved(Run(workers=3), store)
    assert (spec.workers.value, spec.workers.origin) == (3, "run.workers of the spec")
    assert spec.chosen_workers is None, "so that a run started again follows the spec"
    default = resolved(Run(), store)
    assert (default.workers.value, default.workers.origin) == (cores(), "default: one a core")


def test_addresses_come_from_the_spec_then_the_environment_then_a_server_of_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    started = resolved(Run(), store)
    assert started.prefect.value is None and started.mlflow.value is None and not started.pages_last
    monkeypatch.setenv("PREFECT_API_URL", "http://environment/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    environment = resolved(Run(), store)
    assert (environment.prefect.value, environment.prefect.origin) == ("http://environment/api", "PREFECT_API_URL")
    assert (environment.mlflow.value, environment.mlflow.origin) == ("http://environment", "MLFLOW_TRACKING_URI")
    run = Run(prefect="http://spec/api", mlflow="http://spec")
    spec = resolved(run, store)
    assert (spec.prefect.value, spec.mlflow.value) == ("http://spec/api", "http://spec") and spec.pages_last
    assert resolved(run, store, Options(mlflow="http://chosen")).mlflow.value == "http://chosen"


def test_a_serve_that_has_ended_is_no_address(tmp_path: Path) -> None:
    addresses = {"prefect": "http://127.0.0.1:9/api", "mlflow": "http://127.0.0.1:9"}
    (tmp_path / SERVING).write_text(json.dumps(addresses))
    assert resolved(Run(), Store(tmp_path)).prefect.value is None


def test_a_scheduler_is_an_address(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert resolved(Run(), store).scheduler is None
    assert resolved(Run(dask="tcp://dask:8786"), store).scheduler == "tcp://dask:8786"


def test_a_plan_that_does_not_fit_says_which_limit_and_where_it_is_from(tmp_path: Path) -> None:
    store = Store(tmp_path)
    settings = resolved(Run(memory="1MB", disk="2MB"), store, Options(workers=2))
    check_fit(settings, store, costs(memory=1_000_000, disk=2_000_000))
    with pytest.raises(
        CapacityError, match=r"2 workers \(chosen .*1.0 MB \(run.memory of the spec\), 500.0 kB too few"
    ):
        check_fit(settings, store, costs(memory=1_500_000, disk=0))
    with pytest.raises(CapacityError, match=r"2.0 MB may be used \(run.disk of the spec\), 1.0 MB too few"):
        check_fit(settings, store, costs(memory=0, disk=3_000_000))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(StoreError, match="cannot be written"):
        check_fit(settings, Store(file / "store"), costs(0, 0))


def test_a_plan_names_its_limits_and_their_origins(tmp_path: Path) -> None:
    text = settings_text(resolved(Run(memory="1MB", workers=2), Store(tmp_path)))
    assert text.startswith("limits: 2 workers (run.workers of the spec), 1.0 MB of memory (run.memory of the spec), ")
    assert text.endswith(" of disk (default: half of what is free)")
