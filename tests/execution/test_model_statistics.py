"""Statistics on models: of one expert or of all, with inputs, statistics of their own, and progress that survives kills."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergecore.checkpoints.sources.resolve import resolve
from mergecore.engine.executor import InProcess
from mergecore.errors import EvaluationError, PluginError, SpecError
from mergecore.events import silent
from mergecore.execution import progress
from mergecore.execution.place import Place
from mergecore.execution.progress import DraftProgress, WrittenTensors
from mergecore.formats.card import model_card
from mergecore.methods.fisher import Fisher
from mergecore.planning.cells import Cell
from mergecore.planning.data import Apart, uses
from mergecore.planning.work import Lane, MergeWork, Work
from mergecore.plugins.model_statistic import ModelStatistic, Out
from mergecore.recipes.merge_recipe import merge_recipe, run_for
from mergecore.spec.recipe import parse_recipe
from mergecore.statistics.fisher import DiagonalFisher
from mergecore.store.results import read_statistic
from mergecore.store.store import Store
from mergecore.sweeps.measured import marked
from tests.execution.learned_pool import FACTORY, NAMES, Entropies, Moved, Walk, merge_of, write_pool


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    return write_pool(tmp_path / "pool")


def known(merge: MergeWork) -> Work:
    return merge.inputs["known"][0]


def done(place: Place, merge: MergeWork) -> dict[str, Any]:
    outcome = run_for(place, merge)
    assert not outcome.failures, outcome.failures
    record = place.store.record(known(merge).step)
    assert record is not None
    return {"digest": record.digest, **record.result}


def weights_of(pool: Path, name: str) -> dict[str, Tensor]:
    return load_file(pool / name / "model.safetensors")


def test_scope_pool_sees_all_experts_and_their_inputs(pool: Path) -> None:
    place, merge = merge_of(pool, Moved(statistic=Entropies()))
    numbers = done(place, merge)
    work = known(merge)
    order = [next(name for name in NAMES if place.pool.experts[name].id == expert) for expert in work.experts]
    assert work.lane is Lane.MODELS and len(order) == 2 and set(numbers["norms"]) != {None}
    for row, expert in enumerate(order):
        weights = weights_of(pool, expert)
        for column, task in enumerate(order):
            with np.load(pool / "tasks" / f"{task}.npz") as arrays:
                inputs = torch.from_numpy(arrays["train.inputs"])
            assert len(numbers["documents"][column]) == 6
            mean = (inputs @ weights["weight"].T + weights["bias"]).softmax(-1)
            every = -(mean * mean.log()).sum(-1)
            assert float(every.min()) <= numbers["entropies"][row][column] <= float(every.max())
    base = weights_of(pool, "base")
    summed = sum(weights_of(pool, name)["weight"] - base["weight"] for name in NAMES)
    tensors = read_statistic(place.store, work.step).tensors
    torch.testing.assert_close(tensors.read("weight").view(3, 4), summed, atol=1e-6, rtol=0)


def test_what_is_looked_at_is_in_the_key_and_said(pool: Path) -> None:
    kinds = [Entropies(), Entropies(inputs="test"), Entropies(items=4), Entropies(labels="used")]
    keys = {known(merge_of(pool, Moved(statistic=kind))[1]).step.key for kind in kinds}
    assert len(keys) == 4
    _, merge = merge_of(pool, Moved(statistic=kinds[1]))
    assert [str(use) for use in uses(merge)] == ["6 test items an expert, no labels"]
    with np.load(pool / "tasks" / "first.npz") as arrays:
        changed = dict(arrays)
    changed["train.inputs"] = changed["train.inputs"] + 1
    np.savez(pool / "tasks" / "first.npz", **changed)
    assert known(merge_of(pool, Moved(statistic=kinds[0]))[1]).step.key not in keys


def failure(place: Place, merge: MergeWork) -> str:
    outcome = run_for(place, merge)
    assert not list((place.store.root / "drafts").glob("*")), "nothing is left"
    return next(iter(outcome.failures.values()))


def test_bad_input_is_refused_in_words(pool: Path) -> None:
    assert "labels: none" in failure(*merge_of(pool, Moved(statistic=Entropies(ask="labels"))))
    with pytest.raises(SpecError, match=r"expert 'first' names none; write `tasks: \[\.\.\]`"):
        merge_of(pool, Moved(statistic=Entropies()), first=())
    with pytest.raises(EvaluationError, match="there is no task 'thrid'"):
        merge_of(pool, Moved(statistic=Entropies()), first=("thrid",))
    with np.load(pool / "tasks" / "second.npz") as arrays:
        empty = {name: values[:0] if name.startswith("train") else values for name, values in arrays.items()}
    np.savez(pool / "tasks" / "second.npz", **empty)
    assert "'second' has no train items" in failure(*merge_of(pool, Moved(statistic=Entropies())))


class Unwritten(Walk):
    """Announces more than it writes."""

    name = "test_unwritten"

    def compute(
        self, models: Any, inputs: Any, selection: Any, statistics: Any, out: Out, *rest: Any
    ) -> dict[str, Any]:
        out.write("end/weight", torch.full((3, 4), self.steps and torch.nan if self.steps == 1 else 0.0))
        return {}


def test_outputs_are_whole_and_finite(pool: Path) -> None:
    with pytest.raises(PluginError, match="did not write all of it"):
        run_for(*merge_of(pool, Moved(statistic=Unwritten())))
    assert "'end/weight' holds nan" in failure(*merge_of(pool, Moved(statistic=Unwritten(steps=1))))


def test_fisher_has_the_key_and_bytes_that_it_had(pool: Path) -> None:
    """One work an expert; numbers as `estimate` gives them on the items that hold the answers."""
    place, merge = merge_of(pool, Moved(statistic=DiagonalFisher(samples=5)))
    assert [len(work.experts) for work in merge.inputs["known"]] == [1, 1]
    assert sorted(known(merge).step.inputs) == ["base", "data", "experts", "tensors"]
    assert sorted(known(merge).step.inputs["data"]) == ["companions", "tasks", "training"]
    numbers = done(place, merge)
    assert place.evaluator is not None
    name = next(name for name in NAMES if place.pool.experts[name].id == known(merge).experts[0])
    shell = place.evaluator.open(pool / "base", pool / "tasks")
    shell.model.load_state_dict(weights_of(pool, name))
    data = shell.calibration([name], 5, 0)
    expected = DiagonalFisher(samples=5).estimate(shell.model, data, known(merge).selection, place.report)
    tensors = read_statistic(place.store, known(merge).step).tensors
    for tensor, values in expected.tensors.items():
        assert torch.equal(tensors.read(tensor), values.reshape(-1))
    assert numbers["items"] == 5


# --- what is learned on, and what is scored -------------------------------------------------------------------------


def test_training_items_that_are_scored_are_refused(pool: Path) -> None:
    with np.load(pool / "tasks" / "second.npz") as arrays:
        leaking = dict(arrays)
    place, merge = merge_of(pool, Moved(statistic=Entropies(items=20)))
    assert place.evaluator is not None
    folder, evaluator = pool / "tasks", place.evaluator
    Apart(evaluator, folder, evaluator.resolve(NAMES, "test", folder)).check(merge, NAMES)
    leaking["test.inputs"][3], leaking["test.labels"][3] = leaking["train.inputs"][7], leaking["train.labels"][7]
    np.savez(folder / "second.npz", **leaking)
    apart = Apart(evaluator, folder, evaluator.resolve(NAMES, "test", folder))
    with pytest.raises(SpecError, match=r"1 of the training items of second .* test items of task 'second'"):
        apart.check(merge, NAMES)
    apart.check(merge, ["first"])
    _, on_test = merge_of(pool, Moved(statistic=Entropies(inputs="test")))
    apart.check(on_test, NAMES)  # shown as transductive instead


def test_rows_that_saw_test_items_say_so(pool: Path) -> None:
    for inputs, label in (("training", "moved"), ("test", "moved *transductive*")):
        _, merge = merge_of(pool, Moved(statistic=Entropies(inputs=inputs)))  # type: ignore[arg-type]
        cell = Cell(id="", kind="merge", name="moved", model=merge.step, merge=merge)
        assert marked("moved", cell) == label
    assert marked("base", Cell(id="", kind="base", name="base", model=merge.step)) == "base"
    origin = {"base": {"source": "b", "weights": "0"}, "experts": [], "looked_at": [str(use) for use in uses(merge)]}
    card = model_card({"method": "moved"}, origin)
    assert "6 test items an expert, no labels." in card and "*transductive*" in card


# --- progress -------------------------------------------------------------------------------------------------------


def killed_at(moment: int, pool: Path, statistic: ModelStatistic) -> bool:
    """Do the statistic in a process of its own that kills itself at the `moment`-th event. Return whether it did."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    try:
        events = iter(range(1, 10**6))

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def called(*arguments: Any, **named: Any) -> Any:
                if next(events) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **named)

            return called

        progress.EVERY = 0.0
        WrittenTensors.write = counted(WrittenTensors.write)  # type: ignore[method-assign]
        DraftProgress.keep = counted(DraftProgress.keep)  # type: ignore[method-assign]
        DraftProgress.forget = counted(DraftProgress.forget)  # type: ignore[method-assign]
        progress.save_file = counted(progress.save_file)
        Path.replace = counted(Path.replace)  # type: ignore[method-assign]
        Path.rename = counted(Path.rename)  # type: ignore[method-assign]
        Store.commit = counted(Store.commit)  # type: ignore[method-assign]
        place, merge = merge_of(pool, Moved(statistic=statistic))
        run_for(place, merge)
    finally:
        os._exit(0)


@pytest.fixture
def undisturbed(tmp_path: Path) -> Iterator[dict[str, Any]]:
    yield done(*merge_of(write_pool(tmp_path / "undisturbed"), Moved(statistic=Walk())))


def test_killed_at_any_moment_it_goes_on_and_comes_to_the_same(pool: Path, undisturbed: dict[str, Any]) -> None:
    """Ten moments: between steps, while a state is written, after half of the outputs, before and in the commit."""
    for moment in (1, 4, 9, 15, 22, 27, 31, 38, 42, 45):
        own = shutil.copytree(pool, pool.with_name(f"killed-{moment}"))
        assert killed_at(moment, own, Walk())
        assert done(*merge_of(own, Moved(statistic=Walk()))) == undisturbed


def test_killed_again_and_again_it_comes_to_an_end(pool: Path, undisturbed: dict[str, Any]) -> None:
    kills = [killed_at(7, pool, Walk()) for _ in range(6)]
    assert sum(kills) >= 3
    assert done(*merge_of(pool, Moved(statistic=Walk()))) == undisturbed


def test_it_goes_on_from_the_last_kept_step(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    assert killed_at(25, pool, Walk())
    original = Walk.compute

    def compute(self: Walk, *arguments: Any) -> Any:
        started.append(arguments[5].last.step)
        return original(self, *arguments)

    monkeypatch.setattr(Walk, "compute", compute)
    done(*merge_of(pool, Moved(statistic=Walk())))
    assert started and 0 < started[0] < Walk().steps


def test_progress_that_cannot_be_read_is_begun_anew(pool: Path, undisturbed: dict[str, Any]) -> None:
    assert killed_at(25, pool, Walk())
    draft = next((pool / "store" / "drafts").glob("*/progress.safetensors"))
    draft.write_bytes(draft.read_bytes()[:40])
    assert done(*merge_of(pool, Moved(statistic=Walk()))) == undisturbed


# --- one merge from a recipe ----------------------------------------------------------------------------------------


def recipe_of(pool: Path, **changes: Any) -> dict[str, Any]:
    return {
        "method": "fisher",
        "fisher": {"samples": 5},
        "base": str(pool / "base"),
        "experts": [{"source": str(pool / name), "name": name, "tasks": [name]} for name in NAMES],
        "data": {"evaluator": "classification", "model": FACTORY, "path": str(pool / "tasks")},
        **changes,
    }


def merged(pool: Path, out: Path, **changes: Any) -> dict[str, Tensor]:
    recipe = parse_recipe(recipe_of(pool, **changes), "recipe")
    merge_recipe(recipe, out, lambda source: resolve(source.source), InProcess(), silent)
    return load_file(out / "model.safetensors")


def test_a_recipe_with_data_makes_a_learned_merge(pool: Path, tmp_path: Path) -> None:
    """The model is that of the Fisher information which the works of a sweep find; the card says what was seen."""
    place, merge = merge_of(pool, Fisher(fisher=DiagonalFisher(samples=5)))
    assert not run_for(place, merge).failures
    expected = load_file(place.store.folder(merge.step) / "model.safetensors")
    actual = merged(pool, tmp_path / "out")
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Items that the merge was made with: 5 training items an expert, labels used." in card
    assert "transductive" not in card and "evaluator: classification" in card


def test_a_recipe_without_data_says_what_to_write(pool: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="write `data:` with the keys of a sweep's `evaluate:`"):
        merged(pool, tmp_path / "out", data=None)
    with pytest.raises(SpecError, match=r"recipe\.data"):
        merged(pool, tmp_path / "out", data={"evaluator": "classification"})
    with pytest.raises(EvaluationError, match="there is no task"):
        merged(pool, tmp_path / "out", experts=[{"source": str(pool / n), "name": n, "tasks": ["no"]} for n in NAMES])
    assert not list(tmp_path.glob("out*"))
