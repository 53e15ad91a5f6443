"""A store that an older Mergeloom filled: today's code finds all of it and reads the same numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mergecore.evaluators.lm_eval as lm_eval
from mergecore.checkpoints.snapshot import Snapshot
from mergecore.methods import Average, Emr, LayerSwap, LoraArithmetic, Opcm, Ties
from mergecore.planning.pool import Pool, snapshot_step
from mergecore.statistics.fisher import DiagonalFisher
from mergecore.statistics.threshold import Threshold
from mergecore.store.store import Store
from mergecore.sweeps.complete import finished
from tests.digits_sweep import opened, records, stamps
from tests.store import written_before

EXACT = ("average", "task_arithmetic", "ties", "pcb", "consensus", "ram", "tall_masks", "emr")
"""Methods that give the same bytes on every machine."""
SWEEPS = ("models", "adapters", "words")


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the older version read from its store, which lies unpacked in the current folder."""
    folder = tmp_path_factory.mktemp("before")
    written_before.unpack(folder)
    results: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(lm_eval, "lm_eval_version", lambda: results["lm_eval"])
        yield results


@pytest.mark.parametrize("name", SWEEPS)
def test_everything_is_found_done(scores: dict[str, Any], name: str) -> None:
    swept = written_before.sweep(name)
    before = stamps(swept.store)
    missing = swept.frontier.round()
    assert not missing, missing
    assert finished(swept.frontier) is not None
    assert not swept.run().steps and stamps(swept.store) == before


@pytest.mark.parametrize("name", SWEEPS)
def test_the_report_says_the_same(scores: dict[str, Any], name: str) -> None:
    assert json.loads(json.dumps(written_before.scores_of(written_before.sweep(name)))) == scores["sweeps"][name]


def test_snapshots_have_their_keys(scores: dict[str, Any]) -> None:
    """Full checkpoints and adapters, one folded into its base, and those that open with the vocabulary of a union."""
    store, kept = Store("store"), set[str]()
    for name in SWEEPS:
        for snapshot in _snapshots(written_before.sweep(name).plan.pool):
            record = store.record(snapshot_step(snapshot))
            assert record is not None and record.digest == snapshot.weights, snapshot.source.uri
            kept.add(record.digest)
    assert len(kept) == 11


def _snapshots(pool: Pool) -> list[Snapshot]:
    snapshots = [pool.base, *(member.snapshot for member in pool.members)]
    return [*snapshots, *(snapshot.as_stored for snapshot in snapshots)]


def test_recipes_make_the_same_bytes_and_write_no_other_key(scores: dict[str, Any], tmp_path: Path) -> None:
    """Their statistics are found; their models were dropped, are made again, and have the same digests."""
    store = Store("store")
    before = records(store)
    digests = {name: written_before.merge(name, tmp_path / name) for name in written_before.recipes()}
    assert digests == scores["recipes"]
    assert records(store) == before


def test_models_and_statistics_made_anew_are_the_same(scores: dict[str, Any]) -> None:
    """The sweep in an empty store: every record of a statistic or a model is the older version's."""
    spec = written_before.specs()["models"]
    methods = [entry for entry in spec["methods"] if entry["method"] in EXACT]
    anew = opened({**spec, "methods": methods, "output": {**spec["output"], "store": "anew", "keep": "none"}})
    assert not anew.run().failures
    before, after = (
        {
            name: {key: value for key, value in record.items() if key != "dropped"}
            for name, record in records(store).items()
            if name.partition("/")[0] in ("merge", "statistic")
        }
        for store in (Store("store"), anew.store)
    )
    assert len(after) > 50
    for name, record in after.items():
        assert record == before[name]


# --- the test sees what it should -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plugin", "name"),
    [
        (Average, "models"), (Ties, "words"), (Emr, "models"), (Opcm, "models"), (LoraArithmetic, "adapters"),
        (LayerSwap, "words"), (DiagonalFisher, "models"), (Threshold, "words"),
    ],
)  # fmt: skip
def test_another_key_is_seen(scores: dict[str, Any], monkeypatch: pytest.MonkeyPatch, plugin: Any, name: str) -> None:
    """With another version of one plug-in its steps are missing."""
    monkeypatch.setattr(plugin, "version", plugin.version + 1)
    assert written_before.sweep(name).frontier.round()
