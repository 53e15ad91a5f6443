"""A store that an older Mergeloom filled: today's code finds all of it and reads the same numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mergecore.evaluators.lm_eval as lm_eval
from mergecore.checkpoints.snapshot import Snapshot
from mergecore.methods import Average, Emr, LayerSwap, LoraArithmetic, Opcm, Ties
from mergecore.planning.pool import Pool, snapshot_step
from mergecore.plugins import own_code
from mergecore.statistics.fisher import DiagonalFisher
from mergecore.statistics.threshold import Threshold
from mergecore.store.store import Store
from mergecore.store.verified import DIGESTS
from mergecore.sweeps.complete import finished
from tests.digits_sweep import opened, records, stamps
from tests.store import written_before

EXACT = ("average", "task_arithmetic", "ties", "pcb", "consensus", "ram", "tall_masks", "emr")
"""Methods that give the same bytes on every machine."""
DROPPED = {"statistic/threshold", "statistic/dropped_norms"}
"""Statistics of what a random drop leaves."""
SWEEPS = ("models", "adapters", "words")
RAISED = {
    "average n4",
    "weighted n4",
    "parts n4",
    *(f"{drop} n{n}" for drop in ("dare", "l1", "della") for n in (2, 4)),
}
"""Cells whose numbers changed since, each named in CHANGELOG.md: they are done again, and nothing else is.

Averages of more than two experts, and weighted ones, are formed in float64. Random masks are drawn by tensors.
"""


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the older version read from its store, which lies unpacked in the current folder."""
    folder = tmp_path_factory.mktemp("before")
    written_before.unpack(folder)
    results: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(lm_eval, "lm_eval_version", lambda: results["lm_eval"])
        # The code of a user's own factory is in the keys of scores now (CHANGELOG.md): here it stands for one of ours.
        patch.setattr(own_code, "_digests", lambda *_: {})
        yield results


def is_raised(cell: str) -> bool:
    """Whether a cell, called 'label(values) n2 s0 0', is one whose numbers changed since."""
    return " ".join(re.sub(r"\(.*\)", "", cell).split()[:-2]) in RAISED


@pytest.mark.parametrize("name", SWEEPS)
def test_everything_is_found_done(scores: dict[str, Any], name: str) -> None:
    swept = written_before.sweep(name)
    before = stamps(swept.store)
    pending = {cell for cell, told in written_before.scores_of(swept).items() if told["status"] == "pending"}
    assert pending == {cell for cell in scores["sweeps"][name] if is_raised(cell)}
    assert not swept.run().failures
    assert before.items() <= stamps(swept.store).items(), "nothing that was there is done again"
    again = written_before.sweep(name)
    assert not again.frontier.round() and finished(again.frontier) is not None
    assert not again.run().steps


@pytest.mark.parametrize("name", SWEEPS)
def test_the_report_says_the_same(scores: dict[str, Any], name: str) -> None:
    told = json.loads(json.dumps(written_before.scores_of(written_before.sweep(name))))
    assert told.keys() == scores["sweeps"][name].keys()
    assert {cell: told[cell] for cell in told if not is_raised(cell)} == {
        cell: before for cell, before in scores["sweeps"][name].items() if not is_raised(cell)
    }


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


def test_recipes_make_the_same_bytes_and_write_no_other_key_but_an_averages(
    scores: dict[str, Any], tmp_path: Path
) -> None:
    """Their statistics are found; their models were dropped, are made again, and have the same digests."""
    store = Store("store")
    before = _without_block_digests(records(store))
    digests = {name: written_before.merge(name, tmp_path / name) for name in written_before.recipes()}
    assert digests == scores["recipes"]
    added = _without_block_digests(records(store))
    assert all(added.pop(name) == record for name, record in before.items())
    assert [name.partition("-")[0] for name in added] == ["merge/average"], "one with weights"


def _without_block_digests(records: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The records as older versions wrote them: without the file of digests that bytes are checked with."""
    for record in records.values():
        record["files"].pop(DIGESTS, None)
    return records


def test_models_and_statistics_made_anew_are_the_same(scores: dict[str, Any]) -> None:
    """The sweep in an empty store: every record of a statistic or a model is the older version's."""
    spec = written_before.specs()["models"]
    methods = [entry for entry in spec["methods"] if entry["method"] in EXACT]
    anew = opened({**spec, "methods": methods, "output": {**spec["output"], "store": "anew", "keep": "none"}})
    assert not anew.run().failures
    before, after = (
        {
            name: {key: value for key, value in record.items() if key != "dropped"}
            for name, record in _without_block_digests(records(store)).items()
            if name.partition("/")[0] in ("merge", "statistic")
        }
        for store in (Store("store"), anew.store)
    )
    known = after.keys() & before.keys()
    assert len(known) > 50
    for name in known:
        assert after[name] == before[name]
    raised = {name.partition("-")[0] for name in after.keys() - known}
    assert raised <= {f"merge/{method}" for method in ("average", "ties", "task_arithmetic")} | DROPPED


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
