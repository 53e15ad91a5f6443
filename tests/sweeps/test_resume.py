"""A sweep killed with SIGKILL at many moments goes on: nothing finished is done again, and the result is the same
bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import mergecore.execution.evaluations
import mergecore.sweeps.complete
from mergecore.checkpoints.sources.hub import HubSource
from mergecore.events import Event
from mergecore.execution.outcome import Done
from mergecore.execution.place import Place
from mergecore.execution.scoring import Bench, ScoreTask
from mergecore.planning.cells import Scoring
from mergecore.store.store import Store
from tests.digits import DigitsTier
from tests.digits_sweep import EXPERTS, contents, digits_spec, leftovers, opened, stamps
from tests.hub_server import running_hub
from tests.processes import Started, kill_at, killed_here, ran, was_killed

METHODS = [
    {"method": "average"},
    {"method": "ties", "density": 0.3, "scale": {"grid": [0.5, 1.0]}},
    {"method": "fisher", "fisher": {"samples": 16}},
]


def spec(tier: DigitsTier, store: Path) -> dict[str, Any]:
    """Every kind of step: streamed statistics, one on data, merges in several files, two splits, a registration."""
    names = EXPERTS[:2]
    return digits_spec(
        tier, store, methods=METHODS, counts=[2], evaluate__limit=30, evaluate__validation={"limit": 20},
        experts=[{"name": name, "source": str(tier.experts[name]), "tasks": [name]} for name in names],
        evaluate__held_in={name: [name] for name in names}, evaluate__recalibration_tasks=list(names),
    )  # fmt: skip


def sweep(tier: DigitsTier, store: Path, place: str = "", call: int = 0, after: bool = False) -> list[str]:
    """The whole sweep, in spans so small that a merge has several; killed at a moment. Gives the steps done."""
    import mergecore.engine.pass_plan
    import mergecore.engine.span

    mergecore.engine.pass_plan.plan_spans.__defaults__ = (20_000,)
    if place:
        kill_at(place, call, after)
    done = opened(spec(tier, store), room=2).run()
    assert not done.failures
    return done.steps


@pytest.fixture(scope="module")
def undisturbed(tier: DigitsTier, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the store holds after a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert len(ran(sweep, tier, folder)) == len(set(stamps(Store(folder))))
    assert not leftovers(Store(folder))
    return contents(Store(folder))


MOMENTS = [
    ("mergecore.checkpoints.sources.local:LocalSource.fetch", 3, False),  # the third checkpoint
    ("mergecore.execution.passes:commit_result", 2, False),  # the second of the statistics that one reading gave
    ("mergecore.statistics.profile:Profile.counted", 7, False),  # in the middle of a scan
    ("mergecore.statistics.fisher:DiagonalFisher.compute", 2, False),
    ("mergecore.engine.span:write_journal", 9, False),  # in the middle of a merge
    ("mergecore.tensors.sinks:ShardSink.write", 40, False),
    ("mergecore.execution.passes:_commit", 2, False),
    ("mergecore.evaluators.classification:_ClassifierResident.score", 5, False),
    ("pyarrow.parquet:write_table", 15, True),
    ("os:rename", 20, False),
    ("os:rename", 30, True),
    ("os:replace", 25, False),
    ("mergecore.store.store:Store.drop", 2, True),
    ("mergecore.sweeps.complete:register", 1, False),
    ("os:link", 2, True),
    ("mergecore.sweeps.registration:write_json", 1, False),  # published, and not yet on record
    ("mergecore.store.store:Store.clean", 1, False),
]


@pytest.mark.parametrize(("place", "call", "after"), MOMENTS, ids=lambda value: str(value).rpartition(":")[2])
def test_killed_and_started_again(
    tier: DigitsTier, tmp_path: Path, undisturbed: dict[str, str], place: str, call: int, after: bool
) -> None:
    store = Store(tmp_path)
    was_killed(sweep, tier, tmp_path, place, call, after)
    finished, before = stamps(store), contents(store)
    assert finished.keys() <= {name for name in undisturbed if "/" in name}
    half = {name for name in before if name not in undisturbed and not name.startswith("merge/")}
    assert not half, "nothing that is not finished can be seen"
    ran(sweep, tier, tmp_path)
    assert contents(store) == undisturbed
    kept = stamps(store)
    again = [name for name, stamp in finished.items() if kept[name] != stamp and not name.startswith("merge/")]
    assert not again, "what was finished is not done again"
    assert not leftovers(store)


def test_killed_again_and_again(tier: DigitsTier, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """Every run gets a little further and is killed where it writes; the last one is left alone."""
    store, done = Store(tmp_path), 0
    for number in range(40):
        try:
            was_killed(sweep, tier, tmp_path, "os:rename" if number % 2 else "os:replace", 8)
        except AssertionError:
            break
        assert len(stamps(store)) >= done
        done = len(stamps(store))
    assert number > 3
    ran(sweep, tier, tmp_path)
    assert contents(store) == undisturbed and not leftovers(store)


def test_merges_are_not_begun_anew(tier: DigitsTier, tmp_path: Path) -> None:
    """Of the spans that a killed run had journalled, for a finished model or a begun one, none is done again."""
    was_killed(sweep, tier, tmp_path, "mergecore.engine.span:write_journal", 9, True)
    begun = list((tmp_path / "drafts").glob("*/journal-*/*.json"))
    assert 0 < len(begun) < 9
    everything = ran(spans_written, tier, tmp_path / "fresh")
    assert ran(spans_written, tier, tmp_path) == everything - 9


def spans_written(tier: DigitsTier, store: Path) -> int:
    """How many spans of merges a run journals."""
    import mergecore.engine.pass_plan
    import mergecore.engine.span

    written, original = [], mergecore.engine.span.write_journal
    mergecore.engine.span.write_journal = lambda *arguments: (written.append(1), original(*arguments))[1]  # type: ignore[func-returns-value]
    sweep(tier, store)
    return len(written)


def test_two_runs_of_one_sweep_at_once(tier: DigitsTier, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """Someone starts it twice: nothing breaks, no step is done by both."""
    both = [Started(sweep, tier, tmp_path) for _ in range(2)]
    steps = [name for outcome in both for name in outcome.result()]
    evaluations = [name for name in steps if name.startswith("classification")]
    assert len(evaluations) == len(set(evaluations))
    assert contents(Store(tmp_path)) == undisturbed
    shutil.rmtree(tmp_path / "locks", ignore_errors=True)
    assert not leftovers(Store(tmp_path))


@pytest.mark.parametrize("moment", ["before it is opened", "before it is read"])
def test_models_that_another_run_drops(
    tier: DigitsTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Models are gone once, as where another run has measured and dropped them: no failure, and they are made again."""
    gone: list[str] = []
    if moment == "before it is opened":
        original = mergecore.sweeps.complete.run_scorings

        def scored(place: Place, scorings: Sequence[Scoring]) -> Done:
            for scoring in scorings if not gone else ():
                if scoring.cell.merge is not None:
                    place.store.drop(scoring.cell.model)
                    gone.append(scoring.cell.name)
            return original(place, scorings)

        monkeypatch.setattr(mergecore.sweeps.complete, "run_scorings", scored)
    else:
        score = mergecore.execution.evaluations.score_model

        def score_late(bench: Bench, task: ScoreTask) -> Done:
            if task.model is not None and not gone:
                Store(bench.store).drop(task.model)
                gone.append(task.model.name)
            return score(bench, task)

        monkeypatch.setattr(mergecore.execution.evaluations, "score_model", score_late)
    swept = opened(spec(tier, tmp_path), room=2)
    done = swept.run()
    assert gone and not done.failures and swept.store.failures() == {}
    assert not swept.frontier.round()


def download(endpoint: str, cache: Path, fatal: int) -> None:
    """Fetch a checkpoint from a hub, killed when so many bytes have come."""
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE, constants.HF_HUB_OFFLINE = 1 << 14, False

    def heard(event: Event) -> None:
        if event.activity.startswith("download") and event.done >= fatal:
            killed_here()

    HubSource("owner/toy", None, cache, None, endpoint).fetch(heard)


def test_killed_during_a_download(tmp_path: Path) -> None:
    """What had come is kept, the rest is fetched, and the file is the hub's."""
    content = save({"w": torch.arange(250_000, dtype=torch.float32)})
    with running_hub() as hub:
        hub.push("owner/toy", {"config.json": b'{"model_type": "toy"}', "model.safetensors": content})
        was_killed(download, hub.endpoint, tmp_path, 500_000)
        assert not list(tmp_path.glob("*/snapshots/*/model.safetensors")) and list(tmp_path.glob("*/blobs/*incomplete"))
        before = hub.served["model.safetensors"]
        ran(download, hub.endpoint, tmp_path, 10**9)
        assert hub.served["model.safetensors"] - before < len(content) - 300_000
    (path,) = tmp_path.glob("*/snapshots/*/model.safetensors")
    assert path.read_bytes() == content and not list(tmp_path.glob("*/blobs/*incomplete"))
