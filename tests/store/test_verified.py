"""Stored results are what was written: their bytes are compared with digests while they are read."""

from __future__ import annotations

import json
import pickle
import threading
from pathlib import Path

import pytest
import torch

from mergecore.errors import StoreError
from mergecore.execution.passes import run_written
from mergecore.identity.keys import Step
from mergecore.plugins.statistic import Result
from mergecore.store.results import commit_result, open_model, read_statistic
from mergecore.store.store import State, Store
from mergecore.store.verified import DIGESTS, VerifiedTensors
from mergecore.tensors.files import FileTensors
from mergeloom.testing.grid import set_grid
from tests.small_pool import merge_plan, open_pool, place_in, write_pool

STEP = Step("statistic", "sums", 1)
VALUES = {"long": torch.arange(1000.0), "short": torch.tensor([1, 2, 3]), "none": torch.zeros(0, 4)}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with one statistic, whose longest tensor has eight grid blocks."""
    set_grid(monkeypatch, 128)
    store = Store(tmp_path / "store")
    with store.draft(STEP) as draft:
        commit_result(store, draft, Result(VALUES, {}), {})
    return store


def spoil(store: Store, step: Step, element: int) -> None:
    """Another byte where the tensor 'long' (or the first one of a model) has an element; size and times stay."""
    tensors = open_model(store, step)
    assert isinstance(tensors, VerifiedTensors)
    name = "long" if "long" in tensors.tensors else min(tensors.tensors)
    file, offset = tensors.stored.locations[name]
    path = store.folder(step) / file
    content = bytearray(path.read_bytes())
    content[offset + 4 * element] ^= 1
    path.write_bytes(content)


def test_what_was_written_is_read(store: Store) -> None:
    tensors = read_statistic(store, STEP).tensors
    assert isinstance(tensors, VerifiedTensors)
    for name, value in VALUES.items():
        assert torch.equal(tensors.read(name), value.reshape(-1))
    assert torch.equal(tensors.read("long", 130, 700), VALUES["long"][130:700])


@pytest.mark.parametrize("element", [0, 127, 128, 777, 999])
@pytest.mark.parametrize("window", [1, 50, 64, 128, 500, 1000])
def test_a_changed_byte_is_seen_in_any_windows(store: Store, element: int, window: int) -> None:
    spoil(store, STEP, element)
    assert store.state(STEP) is State.PRESENT
    tensors = read_statistic(store, STEP).tensors
    first = element // 128 * 128
    with pytest.raises(
        StoreError, match=rf"'long' is not what was written there \(elements {first} to .*delete this fold"
    ):
        for start in range(0, 1000, window):
            tensors.read("long", start, min(start + window, 1000))
    assert torch.equal(tensors.read("short"), VALUES["short"])


def test_blocks_that_are_read_in_part_are_not_judged(store: Store) -> None:
    spoil(store, STEP, 300)
    tensors = read_statistic(store, STEP).tensors
    tensors.read("long", 0, 200)  # the first block, and a part of the second
    tensors.read("long", 290, 310)  # neither its start nor its end
    tensors.read("long", 384, 1000)
    with pytest.raises(StoreError, match=r"elements 256 to 383"):
        tensors.read("long", 256, 384)


def test_threads_and_processes_read_side_by_side(store: Store) -> None:
    tensors = read_statistic(store, STEP).tensors
    tensors.read("long", 0, 100)
    copy = pickle.loads(pickle.dumps(tensors))
    failed: list[BaseException] = []

    def all_of_it(step: int) -> None:
        try:
            for start in range(0, 1000, step):
                copy.read("long", start, min(start + step, 1000))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=all_of_it, args=(step,)) for step in (7, 30, 128)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert torch.equal(tensors.read("long", 100, 1000), VALUES["long"][100:])


def test_a_store_without_digests_is_read_as_it_lies(store: Store) -> None:
    folder = store.folder(STEP)
    record = json.loads((folder / "record.json").read_text())
    del record["files"][DIGESTS]
    (folder / "record.json").write_text(json.dumps(record))
    (folder / DIGESTS).unlink()
    tensors = read_statistic(store, STEP).tensors
    assert isinstance(tensors, FileTensors)
    assert torch.equal(tensors.read("long"), VALUES["long"])


@pytest.mark.parametrize("text", ["{", "[]", '{"long": 3}', '{"other": []}', "[" * 100_000])
def test_digests_that_are_none(store: Store, text: str) -> None:
    (store.folder(STEP) / DIGESTS).write_text(text)
    with pytest.raises(StoreError, match=rf"{DIGESTS} .*delete this folder"):
        read_statistic(store, STEP)


def test_merged_models_are_checked_when_they_are_read_again(tmp_path: Path) -> None:
    pool = open_pool(write_pool(tmp_path / "pool"))
    place, work = place_in(tmp_path / "store", pool), merge_plan(pool)
    assert not run_written(place, [work]).failures
    model = open_model(place.store, work.step)
    values = {name: model.read(name) for name in model.tensors}
    assert len(values) == 8
    spoil(place.store, work.step, 500)
    model = open_model(place.store, work.step)
    with pytest.raises(StoreError, match=r"merge/average-.*: tensor 'layer\.0' is not what was written there"):
        model.read("layer.0")
