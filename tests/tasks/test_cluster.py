"""A local Dask cluster has one thread and one slot per process; a cluster that runs elsewhere needs slots."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from flows.services import servers as services
from mergecore.engine.executor import InProcess
from mergecore.errors import ServiceError
from mergecore.events import silent
from mergecore.recipes.merge_recipe import merge_recipe
from mergecore.spec.recipe import parse_recipe
from tasks.cluster.executor import OnDask
from tasks.cluster.workers import SLOT, connected, dask_client, local_cluster
from tests.digits import DigitsTier
from tests.digits_sweep import contents, opened
from tests.recipe_files import find, plain
from tests.sweeps.test_sweep_parts import paired
from tests.sweeps.test_tokenizers_sweep import sweep_in
from tests.vocabularies import words, write_model


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Client]]:
    """Two workers that each see one (imagined) CUDA device."""
    folder = tmp_path_factory.mktemp("cluster")
    with local_cluster(folder, 2, devices=["3", "5"]) as client:
        yield folder, client


def test_workers_have_one_thread_one_slot_and_their_own_device(cluster: tuple[Path, Client]) -> None:
    folder, client = cluster
    workers = client.scheduler_info(n_workers=-1)["workers"]
    assert [worker["nthreads"] for worker in workers.values()] == [1, 1]
    assert all(worker["resources"] == {SLOT: 1} for worker in workers.values())
    devices = client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
    assert sorted(devices.values()) == ["3", "5"]
    assert set(client.run(os.getenv, "OMP_NUM_THREADS").values()) == {"1"}
    assert client.submit(sum, [1, 2], resources={SLOT: 1}).result(timeout=30) == 3
    assert (folder / "dask" / "worker-0.log").exists()


def test_a_sweep_in_parts_on_workers_is_that_of_one_process(
    cluster: tuple[Path, Client], tier: DigitsTier, tmp_path: Path
) -> None:
    """Rules that copy, that merge with other values and with another method: merged and scored on the cluster."""
    _, client = cluster
    alone, spread = (opened(paired(tier, tmp_path / name)) for name in ("alone", "spread"))
    assert not alone.run().failures
    spread.place = replace(spread.place, executor=OnDask(client, spread.store.root, threading.Event()))
    assert not spread.run().failures
    assert contents(spread.store) == contents(alone.store)


def test_a_recipe_over_vocabularies_on_workers_is_that_of_one_process(
    cluster: tuple[Path, Client], tmp_path: Path
) -> None:
    """Rows from other places, from other models, and means of several: read on the cluster as here."""
    _, client = cluster
    texts = [f"word{number}" for number in range(40)]
    base = write_model(tmp_path / "base", words(texts))
    others = {"back": texts[::-1], "half": texts[::2], "more": [*texts[::3], "new"], "most": ["new", *texts[5:]]}
    experts = [
        write_model(tmp_path / name, words(vocabulary), seed=seed, base=base).folder
        for seed, (name, vocabulary) in enumerate(others.items(), start=1)
    ]
    rules = {"source": "union", "missing": "mean", "pad_to_multiple_of": 64}
    recipe = parse_recipe(
        plain({"method": "ties", "density": 0.5, "base": base.folder, "experts": experts, "tokenizer": rules}), "recipe"
    )
    executors = {"alone": InProcess(), "spread": OnDask(client, tmp_path / "passes")}
    models = {name: merge_recipe(recipe, tmp_path / name, find, run, silent) for name, run in executors.items()}
    assert models["alone"].digest == models["spread"].digest
    alone, spread = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()} for name in models
    )
    assert alone == spread and "tokenizer.json" in alone


def test_a_sweep_over_vocabularies_on_workers_is_that_of_one_process(
    cluster: tuple[Path, Client], tmp_path: Path
) -> None:
    """Merged, scored with the tokenizer of the union, and registered."""
    _, client = cluster
    spec = sweep_in(tmp_path)
    alone, spread = (
        opened({**spec, "output": {**spec["output"], "store": str(tmp_path / name)}}) for name in ("alone", "spread")
    )
    assert not alone.run().failures
    spread.place = replace(spread.place, executor=OnDask(client, spread.store.root))
    assert not spread.run().failures
    assert contents(spread.store) == contents(alone.store)


def test_a_running_cluster_is_joined_by_its_address(cluster: tuple[Path, Client], tmp_path: Path) -> None:
    _, client = cluster
    assert client.scheduler is not None
    with dask_client(tmp_path, client.scheduler.address, workers=1) as other:
        assert len(other.scheduler_info(n_workers=-1)["workers"]) == 2


def test_workers_import_the_modules_beside_a_spec(cluster: tuple[Path, Client], tmp_path: Path) -> None:
    _, client = cluster
    assert client.scheduler is not None
    (tmp_path / "beside_the_spec.py").write_text("value = 7\n")
    with dask_client(tmp_path, client.scheduler.address, workers=1, home=tmp_path) as other:
        values = other.run(lambda: vars(importlib.import_module("beside_the_spec"))["value"])
    assert list(values.values()) == [7, 7]


def test_an_address_where_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.cluster.workers.CONNECT_SECONDS", 1.0)
    with pytest.raises(ServiceError, match="No Dask scheduler"), connected(f"tcp://127.0.0.1:{services.free_port()}"):
        pass


def test_a_cluster_without_slots_is_refused_instead_of_waited_for() -> None:
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=None) as bare,  # type: ignore[no-untyped-call]
        pytest.raises(ServiceError, match="--resources"),
        connected(bare.scheduler_address),
    ):
        pass
