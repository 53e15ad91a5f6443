"""A sweep in one process: its scores are those of a direct computation, it keeps what it says, and it grows cheaply."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergecore.engine.executor import InProcess
from mergecore.errors import ServiceError
from mergecore.evaluators.classification import Classification
from mergecore.execution.outcome import Done
from mergecore.execution.scoring import ScoreTask
from mergecore.reporting.report import markdown
from mergecore.reporting.summary import summarise
from mergecore.store.results import ITEMS
from mergecore.store.store import State
from mergecore.sweeps.registration import registration_step
from tests.digits import CONFIG, FACTORY, DigitsTier, digits_cnn
from tests.digits_sweep import EXPERTS, METHODS, Swept, contents, digits_spec, leftovers, opened, records, stamps


@pytest.fixture(scope="module")
def swept(tier: DigitsTier, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """A finished sweep. Tests read it and leave it as it is."""
    swept = opened(digits_spec(tier, tmp_path_factory.mktemp("store")))
    assert not swept.run().failures
    return swept


def small(tier: DigitsTier, store: Path, **changes: Any) -> dict[str, Any]:
    """A spec of one count, no validation items and few test items, for what does not depend on them."""
    return digits_spec(tier, store, **{"counts": [2], "evaluate__validation": None, "evaluate__limit": 20, **changes})


def present(swept: Swept) -> set[str]:
    """Names of the cells whose merged model lies in the store."""
    merges = [cell for cell in swept.plan.cells if cell.merge is not None]
    return {cell.name for cell in merges if swept.store.state(cell.model) is State.PRESENT}


def worked(swept: Swept) -> list[str]:
    """The kinds of the steps that a run does, sorted. That a model is dropped is no work."""
    before, written = stamps(swept.store), records(swept.store)
    done = swept.run()
    dropped = {
        name
        for name, record in records(swept.store).items()
        if record["dropped"] > written.get(name, record)["dropped"]
    }
    changed = [name for name, stamp in stamps(swept.store).items() if before.get(name) != stamp and name not in dropped]
    assert sorted(name.partition("/")[2] for name in changed) == sorted(done.steps), "it says what it did"
    return sorted(name.partition("/")[0] for name in changed)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_a_direct_computation(tier: DigitsTier, swept: Swept) -> None:
    """Average of two experts, by hand: means of weights, BatchNorm recalibrated, accuracy. torch and numpy only."""
    cell = swept.cell("average n2 s0")
    experts = [load_file(tier.experts[name] / "model.safetensors") for name in cell.experts]
    base = load_file(tier.base / "model.safetensors")
    weights: dict[str, Tensor] = {
        name: (experts[0][name] + experts[1][name]) / 2 if base[name].is_floating_point() else base[name]
        for name in base
    }
    model = digits_cnn(CONFIG)
    model.load_state_dict(weights)
    # The drawn items are taken from the evaluator; that they are what they should be has a test of its own.
    evaluator = Classification.model_validate({"model": FACTORY, **_settings(swept)})
    drawn = evaluator.open(tier.base, tier.tasks).calibration(EXPERTS, 64, 0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        model.train()
        model(drawn.inputs)  # type: ignore[attr-defined]
        model.eval()
        for split, limit in (("validation", 40), ("test", 80)):
            for task in cell.tasks_on(split):  # type: ignore[arg-type]
                with np.load(tier.tasks / f"{task}.npz") as data:
                    inputs, labels = torch.from_numpy(data[f"{split}.inputs"][:limit]), data[f"{split}.labels"][:limit]
                right = (model(inputs).argmax(-1).numpy() == labels).astype(float)
                step = swept.plan.evaluation(cell, split, task)  # type: ignore[arg-type]
                table = parquet.read_table(swept.store.folder(step) / ITEMS)
                assert np.mean(table["score"].to_numpy() == right) >= 0.98, "a mean in another order may turn one item"
                record = swept.store.record(step)
                assert record is not None and abs(record.result["score"] - right.mean()) <= 0.025
                assert record.result["items"] == limit and record.result["metric"] == "acc"


def _settings(swept: Swept) -> dict[str, Any]:
    kept = ("batch_size", "limit", "recalibration_tasks", "recalibration_items")
    return {name: value for name, value in swept.spec.evaluate.settings.items() if name in kept}


def test_merged_weights_are_the_average(tier: DigitsTier, tmp_path: Path) -> None:
    swept = opened(small(tier, tmp_path, output__keep="all", methods=[{"method": "average"}]))
    swept.run()
    cell = swept.cell("average n2 s0")
    tensors: dict[str, Tensor] = {}
    for path in swept.store.folder(cell.model).glob("*.safetensors"):
        tensors |= load_file(path)
    experts = [load_file(tier.experts[name] / "model.safetensors") for name in cell.experts]
    base = load_file(tier.base / "model.safetensors")
    assert tensors.keys() == base.keys()
    for name, value in tensors.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (experts[0][name] + experts[1][name]) / 2, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(value, base[name])


def test_validation_chooses_and_test_items_are_opened_for_winners_only(swept: Swept) -> None:
    by_group: dict[Any, list[Any]] = {}
    for cell in swept.scores().cells:
        if cell.kind == "merge":
            by_group.setdefault((cell.method, cell.count), []).append(cell)
    assert {len(cells) for cells in by_group.values()} == {1, 2}
    for cells in by_group.values():
        means = [np.mean([np.mean(cell.items["validation"][name]) for name in cell.experts]) for cell in cells]
        winner = cells[int(np.argmax(means))]
        assert [cell.chosen for cell in cells] == [cell is winner for cell in cells]
        for cell in cells:
            plan_cell = swept.cell(cell.name)
            states = {swept.store.state(swept.plan.evaluation(plan_cell, "test", task)) for task in plan_cell.tasks}
            assert states == {State.PRESENT if cell is winner else State.MISSING}
            assert ("test" in cell.items) is (cell is winner)


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["registered", "best", "all", "none"])
def test_exactly_the_models_stay_that_the_spec_names(tier: DigitsTier, tmp_path: Path, keep: str) -> None:
    swept = opened(digits_spec(tier, tmp_path, output__keep=keep, counts=[3]))
    swept.run()
    merges = {cell.name: cell for cell in swept.scores().cells if cell.kind == "merge"}
    registered = next(cell.name for cell in merges.values() if cell.cell == (swept.registered() or {})["cell"])
    best = {cell.name for cell in merges.values() if cell.chosen}  # one count: the chosen one of each method
    expected = {"registered": {registered}, "best": best, "all": set(merges), "none": set[str]()}[keep]
    assert present(swept) == expected and len(best) == 3
    for name in set(merges) - expected:
        folder = swept.store.folder(swept.cell(name).model)
        assert swept.store.state(swept.cell(name).model) is State.DROPPED and len(list(folder.iterdir())) == 1
    published = Path((swept.registered() or {})["uri"].removeprefix("file://"))
    assert load_file(published / "model-00001-of-00003.safetensors"), (
        "a registered model's bytes stay, whatever is kept"
    )
    assert {"config.json", "README.md"} <= {path.name for path in published.iterdir()}
    assert not leftovers(swept.store)


def test_nothing_stays_where_nothing_is_registered(tier: DigitsTier, tmp_path: Path) -> None:
    swept = opened(small(tier, tmp_path, output__register=None))
    swept.run()
    assert not present(swept) and swept.registered() is None and not leftovers(swept.store)


def test_the_disk_holds_no_more_models_than_there_is_room_for(tier: DigitsTier, tmp_path: Path) -> None:
    swept, most = opened(digits_spec(tier, tmp_path), room=2), [0]

    def heard(done: Done) -> None:
        most[0] = max(most[0], len(present(swept)))

    swept.run(heard)
    # Two under way, and for each of the two open groups and over all the best one so far.
    assert most[0] <= 2 + 3


# --- again and more ---------------------------------------------------------------------------------------------------


def test_a_finished_sweep_does_nothing_and_is_quick(tier: DigitsTier, swept: Swept) -> None:
    before = contents(swept.store), stamps(swept.store)
    began = time.monotonic()
    again = opened(digits_spec(tier, swept.store.root))
    assert again.run().steps == [] and not again.frontier.round()
    assert time.monotonic() - began < 5
    assert (contents(again.store), stamps(again.store)) == before
    assert not leftovers(again.store)


def test_extending_the_spec_does_only_what_is_new(tier: DigitsTier, tmp_path: Path) -> None:
    plain: dict[str, Any] = {"methods": [{"method": "average"}], "output__register": None, "evaluate__held_out": {}}
    first = opened(small(tier, tmp_path, **plain))
    # Base on four tasks, each of four experts on one, one merge on two.
    assert worked(first) == ["evaluation"] * 10 + ["merge"] + ["snapshot"] * 5
    assert worked(opened(small(tier, tmp_path, **plain))) == []

    methods = [{"method": "average"}, {"method": "task_arithmetic", "scale": 0.5}]
    assert worked(opened(small(tier, tmp_path, **{**plain, "methods": methods}))) == ["evaluation"] * 2 + ["merge"]
    # TIES on the same two experts: their profiles and thresholds, a merge, its scores.
    methods.append({"method": "ties", "density": 0.3})
    steps = worked(opened(small(tier, tmp_path, **{**plain, "methods": methods})))
    assert steps == ["evaluation"] * 2 + ["merge"] + ["statistic"] * steps.count("statistic")
    assert steps.count("statistic") in (2, 4)
    # The same statistics serve another coefficient.
    methods.append({"method": "ties", "density": 0.3, "scale": 0.5, "label": "ties half"})
    assert worked(opened(small(tier, tmp_path, **{**plain, "methods": methods}))) == ["evaluation"] * 2 + ["merge"]

    more = {**plain, "counts": [2, 3]}
    assert worked(opened(small(tier, tmp_path, **more))) == ["evaluation"] * 3 + ["merge"]
    # A new task is scored on every model: the dropped ones are made again, the same bytes.
    digests = {name: record["digest"] for name, record in records(first.store).items() if name.startswith("merge/")}
    steps = worked(opened(small(tier, tmp_path, **{**more, "evaluate__held_out": {"upright": ["upright"]}})))
    assert steps == ["evaluation"] * 7 + ["merge"] * 2
    after = {name: record["digest"] for name, record in records(first.store).items() if name.startswith("merge/")}
    assert after == digests


def test_equal_subsets_are_one_cell(tier: DigitsTier, tmp_path: Path) -> None:
    swept = opened(small(tier, tmp_path, counts=[2, 4], subsets={"per_count": 5, "seed": 0}))
    pairs = [frozenset(cell.experts) for cell in swept.plan.cells if cell.kind == "merge" and cell.count == 2]
    names = {cell.method for cell in swept.plan.cells if cell.kind == "merge"}
    fours = [cell for cell in swept.plan.cells if cell.count == 4]
    variants = len(fours)
    assert {cell.subset for cell in fours} == {0} and len(names) == 3, "all four experts: always the same cell"
    assert all(pairs.count(pair) == variants for pair in set(pairs)) and 1 < len(set(pairs)) <= 5
    assert len({cell.id for cell in swept.plan.cells}) == len(swept.plan.cells)


def test_a_method_may_have_its_own_numbers_of_experts(tier: DigitsTier, tmp_path: Path) -> None:
    methods = [
        {"method": "average", "counts": [2]},  # what others are compared with is everywhere all the same
        {"method": "slerp", "t": 0.5, "counts": [2]},
        {"method": "nearswap", "t": 0.1, "counts": [1]},
        {"method": "sce", "density": {"grid": [0.5, 1.0]}},
        {"method": "sce", "density": 0.5, "counts": [4]},  # the same values once more: with these numbers as well
    ]
    plan = opened(small(tier, tmp_path, methods=methods, counts=[2, 3])).plan
    planned = [(cell.method, cell.values.get("density"), cell.count) for cell in plan.cells if cell.kind == "merge"]
    assert sorted(planned, key=str) == sorted(
        [
            *(("average", None, count) for count in (2, 3)),
            ("slerp", None, 2),
            ("nearswap", None, 1),
            *(("sce", 0.5, count) for count in (2, 3, 4)),
            *(("sce", 1.0, count) for count in (2, 3)),
        ],
        key=str,
    )
    assert not any(cell.refused for cell in plan.cells)


def test_a_dropped_champion_is_made_again(tier: DigitsTier, tmp_path: Path) -> None:
    swept = opened(small(tier, tmp_path))
    swept.run()
    champion, before = swept.registered(), contents(swept.store)
    assert champion is not None
    cell = next(cell for cell in swept.plan.cells if cell.id == champion["cell"])
    swept.store.drop(cell.model)
    assert worked(opened(small(tier, tmp_path))) == [], "what is registered has bytes of its own"
    swept.store.remove(registration_step(swept.frontier, cell))
    assert worked(opened(small(tier, tmp_path))) == ["merge", "registration"]
    assert swept.registered() == champion and contents(swept.store) == before


def test_what_was_damaged_is_made_again_and_the_same(tier: DigitsTier, tmp_path: Path) -> None:
    spec = small(tier, tmp_path, output__keep="all")
    swept = opened(spec)
    swept.run()
    before, champion = contents(swept.store), (swept.registered() or {})["cell"]
    cell = next(cell for cell in swept.plan.cells if cell.kind == "merge" and cell.id != champion)
    score = swept.store.folder(swept.plan.evaluation(cell, "test", cell.tasks[0]))
    os.truncate(score / ITEMS, 10)
    assert worked(opened(spec)) == ["evaluation"]
    os.truncate(next(swept.store.folder(cell.model).glob("*.safetensors")), 10)
    assert worked(opened(spec)) == [], "nothing asks for the model's bytes"
    (score / ITEMS).unlink()
    assert worked(opened(spec)) == ["evaluation", "merge"]
    best = next(cell for cell in swept.plan.cells if cell.id == champion)
    os.truncate(next(swept.store.folder(best.model).glob("*.safetensors")), 10)  # one file under two names
    assert worked(opened(spec)) == ["merge", "registration"]
    assert contents(swept.store) == before


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken_tier(tier: DigitsTier, tmp_path_factory: pytest.TempPathFactory) -> DigitsTier:
    """The tier with a NaN in one tensor of the expert 'mirror'."""
    folder = tmp_path_factory.mktemp("broken") / "mirror"
    folder.mkdir()
    tensors = load_file(tier.experts["mirror"] / "model.safetensors")
    tensors["3.weight"].view(-1)[5] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((tier.experts["mirror"] / "config.json").read_bytes())
    return DigitsTier(tier.base, {**tier.experts, "mirror": folder}, tier.tasks)


def test_refused_and_failing_cells_do_not_stop_the_others(broken_tier: DigitsTier, tmp_path: Path) -> None:
    methods = [*METHODS, {"method": "average", "weights": [1, 2, 3], "label": "weighted"}]
    spec = small(broken_tier, tmp_path, counts=[1, 2, 3], subsets={"per_count": 3, "seed": 0}, methods=methods)
    swept = opened(spec)
    done = swept.run()
    assert done.failures
    cells = swept.scores().cells
    for cell in cells:
        if cell.kind == "merge" and cell.method == "weighted" and cell.count != 3:
            assert cell.status == "refused" and f"3 given for {cell.count} experts" in cell.reason
        elif "mirror" in cell.experts:
            assert cell.status == "failed" and "3.weight" in cell.reason, cell.name
            lines = json.loads(Path(cell.failure).read_text())["traceback"]
            assert lines[0].startswith("Traceback") and "3.weight" in lines[-1]
            assert "mirror" in cell.reason or cell.kind == "expert"
        else:
            assert cell.status == "done", (cell.name, cell.reason)
    assert {cell.status for cell in cells if cell.kind == "merge"} == {"refused", "failed", "done"}
    assert swept.registered() is not None and not leftovers(swept.store)
    assert present(swept) == {
        swept.cell(cell.name).name for cell in cells if cell.cell == (swept.registered() or {})["cell"]
    }

    again = opened(spec)
    assert worked(again) == [], "a failure is not tried again by itself"
    assert swept.store.forgive() == len(set(done.failures)) == len(opened(spec).run().failures), "unless it is forgiven"


def test_a_programming_error_ends_the_sweep_and_finished_work_is_kept(
    tier: DigitsTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergecore.methods import Ties

    def wrong(*_: Any, **__: Any) -> Tensor:
        raise TypeError("unsupported operand")

    with monkeypatch.context() as patched:
        patched.setattr(Ties, "merge", wrong)
        swept = opened(small(tier, tmp_path))
        with pytest.raises(TypeError, match="unsupported operand"):
            swept.run()
    assert not swept.store.failures(), "it is no property of the cell"
    again = opened(small(tier, tmp_path))
    done = {step for step in again.run().steps if step.startswith("statistic")}
    assert not done, "what was finished before is found"
    assert {cell.status for cell in again.scores().cells} == {"done"}


def test_what_failed_is_done_once_it_can_be(tier: DigitsTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that raises what no plug-in should: recorded with its kind, the rest goes on; forgiven, it is made."""
    spec = small(tier, tmp_path / "store")
    reference = opened(small(tier, tmp_path / "reference"))
    reference.run()
    from mergecore.methods import Ties

    def wrong(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("sizes do not match")

    monkeypatch.setattr(Ties, "merge", wrong)
    swept = opened(spec)
    assert list(swept.run().failures.values()) == ["RuntimeError: sizes do not match"]
    assert "def wrong" not in (report := markdown(summarise(swept.scores(), "test"))) and "failures/" in report
    status = {cell.name: (cell.status, cell.reason) for cell in swept.scores().cells if cell.kind == "merge"}
    assert status.pop("ties(density=0.3, scale=1) n2 s0") == ("failed", "RuntimeError: sizes do not match")
    assert set(status.values()) == {("done", "")} and not leftovers(swept.store)
    monkeypatch.undo()
    assert worked(opened(spec)) == []
    swept.store.forgive()
    assert "merge" in worked(opened(spec))
    assert contents(reference.store).items() <= contents(swept.store).items(), "and what was registered meanwhile stays"


def test_an_evaluation_that_fails_is_named(tier: DigitsTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergecore.evaluators import classification

    original = classification._ClassifierResident.score

    def wrong(self: Any, task: Any, report: Any) -> Any:
        if task.task == "upright":
            raise torch.OutOfMemoryError("no memory left")
        return original(self, task, report)

    monkeypatch.setattr(classification._ClassifierResident, "score", wrong)
    swept = opened(small(tier, tmp_path))
    failures = swept.run().failures
    assert set(failures.values()) == {"OutOfMemoryError: no memory left"}
    cells = swept.scores().cells
    assert {cell.status for cell in cells} == {"failed"}
    assert all(set(cell.items["test"]) == set(cell.experts) for cell in cells if cell.kind == "merge"), (
        "the rest is there"
    )


class Deadly(InProcess):
    """An executor whose workers die, again and again, at one model."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model, self.deaths = model, 0

    def each(
        self, function: Any, shared: Any, items: Sequence[Any], at_once: int | None = None
    ) -> Iterator[tuple[int, Any]]:
        for position, item in enumerate(items):
            if isinstance(item, ScoreTask) and self.model in str(item.weights):
                self.deaths += 1
                raise ServiceError("workers died at the same piece of work")
            yield position, function(shared, item)


def test_a_model_at_which_workers_die_does_not_stop_the_others(tier: DigitsTier, tmp_path: Path) -> None:
    swept = opened(small(tier, tmp_path))
    victim = swept.cell("average n2 s0")
    swept.place = replace(swept.place, executor=Deadly(victim.model.name))
    assert set(swept.run().failures.values()) == {"workers died at the same piece of work"}
    status = {cell.name: cell.status for cell in swept.scores().cells}
    assert status.pop(victim.name) == "failed" and set(status.values()) == {"done"}
