"""What is still to be done, held against a store that others write to meanwhile; and plans whose steps do not depend on
how much was planned with them. Nothing here is merged or scored: results are recorded as whoever did the work would."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from flows.session.limits import check_fit
from flows.session.session import models_at_once
from flows.session.settings import resolved
from mergecore.errors import CapacityError, EvaluationError, SpecError
from mergecore.identity.keys import Step, canonical
from mergecore.planning.cells import Cell, Plan
from mergecore.planning.merge_builder import MergeBuilder
from mergecore.planning.pool import Member
from mergecore.planning.work import MergeWork
from mergecore.plugins.adapter_method import AdapterMethod
from mergecore.registry import METHODS, method_from
from mergecore.store.store import RECORD, State, Store, write_json
from mergecore.sweeps.cost import cost
from mergecore.sweeps.remaining import Frontier, summary
from tests.small_pool import NAMES, open_pool, planned, write_pool

MEMORY = 1 << 30
"""Bytes that a pass may use."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and a task for each expert; only their digests are looked at."""
    pool_folder = write_pool(tmp_path_factory.mktemp("pool"), tensors=3, elements=16)
    (pool_folder / "tasks").mkdir()
    for name in [*NAMES, "other"]:
        arrays = {f"{split}.labels": np.zeros(4, dtype=np.int64) for split in ("train", "validation", "test")}
        np.savez(pool_folder / "tasks" / f"{name}.npz", **arrays, name=np.array(name))
    np.savez(pool_folder / "tasks" / "untouched.npz", **{"test.labels": np.zeros(4, dtype=np.int64)})
    return pool_folder


GRID = ({"method": "average"}, {"method": "ties", "density": 0.5, "scale": {"grid": [0.5, 1.0]}})


def of_two(folder: Path, *methods: Any, **changes: Any) -> Plan:
    """Average and a grid of two values over two of three experts."""
    return planned(folder, *(methods or GRID), **{"counts": [2], "evaluate__validation": {"limit": 2}, **changes})


def recorded(store: Store, step: Step, **result: Any) -> None:
    """The step done, with one file, as another process would have it."""
    with store.draft(step) as draft:
        (draft.path / "file").write_bytes(b"1234")
        store.commit(draft, "digest", result, {"seconds": 1.5})


def measured(store: Store, plan: Plan, cell: Cell, split: str, score: float) -> None:
    """All that is asked of a cell on a split is scored."""
    for task in cell.tasks_on(split):  # type: ignore[arg-type]
        recorded(store, plan.evaluation(cell, split, task), score=score)  # type: ignore[arg-type]


def asked(frontier: Frontier) -> set[str]:
    """Keys of the scores that the next round asks for."""
    return {step.key for scoring in frontier.round().scorings for _, _, step in scoring.tasks}


def merges_of(plan: Plan) -> list[Cell]:
    return [cell for cell in plan.cells if cell.kind == "merge"]


# --- other processes --------------------------------------------------------------------------------------------------


def test_what_another_process_has_finished_is_not_asked_for_again(folder: Path, tmp_path: Path) -> None:
    plan, other = of_two(folder), Store(tmp_path)
    frontier = Frontier(plan, Store(tmp_path), room=2)
    base = plan.cells[0]
    step = plan.evaluation(base, "validation", base.tasks[0])
    assert step.key in asked(frontier)
    recorded(other, step, score=0.25)
    assert (
        frontier.view.score(base, "validation", base.tasks[0]) is None
    )  # the store as it was when it was last looked at
    assert step.key not in asked(frontier)
    assert frontier.view.score(base, "validation", base.tasks[0]) == 0.25
    assert frontier.view.seconds(step) == 1.5


def test_models_and_statistics_of_another_process_are_seen(folder: Path, tmp_path: Path) -> None:
    plan, other = of_two(folder), Store(tmp_path)
    frontier = Frontier(plan, Store(tmp_path), room=8)
    ties = next(cell for cell in merges_of(plan) if cell.method == "ties")
    assert ties.merge is not None
    first = frontier.round()
    # Thresholds wait for the profiles, the models of TIES for the thresholds.
    assert {plan.step.plugin for plan in first.statistics} == {"profile"}
    assert [merge.step.plugin for merge in first.merges] == ["average"]
    for statistic in first.statistics:
        recorded(other, statistic.step)
    second = frontier.round()
    assert {plan.step.plugin for plan in second.statistics} == {"threshold"}
    for statistic in second.statistics:
        recorded(other, statistic.step)
    assert len(frontier.round().merges) == 3
    recorded(other, ties.model)
    third = frontier.round()
    assert ties.model.key not in {merge.step.key for merge in third.merges}
    assert ties.id in {scoring.cell.id for scoring in third.scorings}
    other.remove(ties.model)
    assert ties.model.key in {merge.step.key for merge in frontier.round().merges}
    needed = list(ties.merge.needed)
    profile, threshold = needed[0], next(work for work in needed if needed[0] in work.inputs.get("profile", ()))
    other.remove(profile.step)
    assert not frontier.round().statistics, "what it was needed for is there"
    other.remove(threshold.step)
    assert [plan.step.key for plan in frontier.round().statistics] == [profile.step.key]


def test_failures_of_another_process_are_seen_and_forgiven(folder: Path, tmp_path: Path) -> None:
    plan, other = of_two(folder), Store(tmp_path)
    frontier = Frontier(plan, Store(tmp_path), room=8)
    ties = [cell for cell in merges_of(plan) if cell.method == "ties"]
    assert ties[0].merge is not None and ties[1].merge is not None
    threshold = ties[0].merge.inputs["threshold"][0].step
    inside = ties[0].merge.inputs["threshold"][0].inputs["profile"][0].step
    for step, whom in ((threshold, ties), (inside, ties), (ties[1].model, ties[1:])):
        other.fail(step, "why")
        assert summary(frontier)["failed"] == len(whom)
        assert [cell.id for cell in plan.cells if frontier.view.trouble(cell) == "why"] == [cell.id for cell in whom]
        other.forgive()
        assert summary(frontier)["failed"] == 0
    score = plan.evaluation(plan.cells[0], "test", plan.cells[0].tasks[0])
    other.fail(score, "no memory")
    assert not {scoring.cell.id for scoring in frontier.round().scorings} & {plan.cells[0].id}
    assert frontier.view.trouble(plan.cells[0]) == "no memory"


def test_values_are_chosen_anew_where_a_rival_fails(folder: Path, tmp_path: Path) -> None:
    plan, store = of_two(folder), Store(tmp_path)
    frontier = Frontier(plan, store, room=8)
    low, high = (cell for cell in merges_of(plan) if cell.method == "ties")
    assert frontier.choice.chosen(low) is None
    measured(store, plan, low, "validation", 0.5)
    measured(store, plan, high, "validation", 0.75)
    frontier.refresh()
    assert (frontier.choice.chosen(low), frontier.choice.chosen(high)) == (False, True)
    assert plan.evaluation(low, "test", low.tasks[0]) not in [step for _, _, step in frontier.choice.wanted(low)]
    store.fail(plan.evaluation(high, "test", high.tasks[0]), "why")
    frontier.refresh()
    assert frontier.choice.chosen(low) is True  # no rival is left
    assert {split for split, _, _ in frontier.choice.wanted(low)} == {"test"}


@pytest.mark.parametrize("by", [None, "held_in", "held_out"])
def test_validation_items_are_scored_where_they_decide(folder: Path, tmp_path: Path, by: str | None) -> None:
    """Of the side that chooses values and the model to register, for every cell; the other side is for test items."""
    register = None if by is None else {"name": "best", "by": by}
    frontier = Frontier(of_two(folder, output__register=register), Store(tmp_path), room=8)
    for cell in frontier.plan.cells:
        wanted = {
            split: {identity.task for own_split, identity, _ in frontier.choice.wanted(cell) if own_split == split}
            for split in ("validation", "test")
        }
        side = {"other"} if by == "held_out" else set(NAMES)
        assert wanted["validation"] == set(cell.tasks) & side
        assert wanted["test"] == (set() if cell.method == "ties" else set(cell.tasks))
    low, high = (cell for cell in merges_of(frontier.plan) if cell.method == "ties")
    for cell, scores in ((low, (0.9, 0.1)), (high, (0.1, 0.9))):
        for task in cell.tasks_on("validation"):
            recorded(frontier.store, frontier.plan.evaluation(cell, "validation", task), score=scores[task == "other"])
    frontier.refresh()
    assert [cell for cell in (low, high) if frontier.choice.chosen(cell)] == [high if by == "held_out" else low]


def test_a_task_that_decides_nothing_needs_no_validation_items(folder: Path) -> None:
    held_out = {"other": ["untouched"]}
    plan = of_two(folder, evaluate__held_out=held_out)
    assert "untouched" in plan.tasks["test"] and set(plan.tasks["validation"]) == set(NAMES)
    with pytest.raises(EvaluationError, match=r"'untouched'.*validation"):
        of_two(folder, evaluate__held_out=held_out, output__register={"name": "best", "by": "held_out"})


def test_a_model_may_go_as_soon_as_another_process_has_scored_it(folder: Path, tmp_path: Path) -> None:
    plan, other = of_two(folder), Store(tmp_path)
    frontier = Frontier(plan, Store(tmp_path), room=8)
    average = next(cell for cell in merges_of(plan) if cell.method == "average")
    recorded(other, average.model)
    assert frontier.droppable() == []
    for split in ("validation", "test"):
        measured(other, plan, average, split, 0.5)
    assert [merge.step.key for merge in frontier.droppable()] == [average.model.key]
    frontier.store.drop(average.model)
    assert frontier.droppable() == []
    assert frontier.store.state(average.model) is State.DROPPED
    assert average.model.key not in {merge.step.key for merge in frontier.round().merges}


def test_the_cost_is_of_what_is_missing_now(folder: Path, tmp_path: Path) -> None:
    plan, other = of_two(folder), Store(tmp_path)
    frontier = Frontier(plan, Store(tmp_path), room=8)
    before = cost(frontier, 1, MEMORY)
    # Three merges; a profile for each of two experts, and a threshold; base, experts and merges on validation items,
    # and test items for what has no rival.
    singles = [cell for cell in plan.cells if cell.method != "ties"]
    grid = [cell for cell in plan.cells if cell.method == "ties"]
    assert (before.merges, before.statistics) == (3, 4)
    on_test = sum(len(cell.tasks) for cell in singles)
    held_in = sum(task != "other" for cell in (*singles, *grid) for task in cell.tasks)
    assert before.evaluations == on_test + held_in
    recorded(other, grid[0].model)
    recorded(other, plan.evaluation(grid[0], "validation", grid[0].tasks[0]), score=0.5)
    after = cost(frontier, 1, MEMORY)
    assert (after.merges, after.evaluations) == (2, before.evaluations - 1)


def test_disk_is_for_models_and_the_chains_that_they_are_read_off(folder: Path, tmp_path: Path) -> None:
    """A model of three vectors of 16 numbers takes 192 bytes; a link of its chain, in float32, 48 more."""

    def tried(disk: int) -> tuple[int, list[int]]:
        methods, run = ({"method": "average"}, {"method": "opcm"}), {"disk": f"{disk}B"}
        plan, store = of_two(folder, *methods, counts=[3], run=run), Store(tmp_path)
        settings = resolved(plan.spec.run, store)
        frontier = Frontier(plan, store, room=models_at_once(plan, settings.disk.value))
        projected = cost(frontier, 1, settings.memory.value)
        check_fit(settings, store, projected)
        return frontier.room, [planned.disk for planned in projected.passes]

    links = [240, 2 * 240, 2 * 240]  # of three experts; the one before lies beside the one that is written
    assert tried(10_000) == (24, [*links, 240 + 2 * 192])
    assert tried(500) == (1, [*links, 240 + 192, 240 + 192]), "the end of the chain leaves room for one model"
    with pytest.raises(
        CapacityError,
        match=r"one pass \(scan: 1 .*\) takes 480 B in .* 450 B may be used \(run.disk of the spec\), 30 B too few",
    ):
        tried(450)


# --- tombstones -------------------------------------------------------------------------------------------------------


def test_a_tombstone_is_known_until_something_else_takes_its_place(tmp_path: Path) -> None:
    step = Step("merge", "average", 1, {}, {"experts": ["a"]})
    store, other = Store(tmp_path), Store(tmp_path)
    recorded(other, step, score=1.0)
    assert store.state(step) is State.PRESENT
    other.drop(step)
    for _ in range(3):
        assert store.state(step) is State.DROPPED
        assert store.is_done(step) and not store.is_done(step, bytes_needed=True)
    recorded(other, step, score=1.0)
    assert store.state(step) is State.PRESENT
    other.drop(step)
    assert store.state(step) is State.DROPPED
    record = store.folder(step) / RECORD
    write_json(record, {**json.loads(record.read_text()), "dropped": False})  # its file is gone
    assert store.state(step) is State.BROKEN
    other.remove(step)
    assert store.state(step) is State.MISSING
    assert store.names("merge") == frozenset()


def test_names_are_what_lies_there(tmp_path: Path) -> None:
    store = Store(tmp_path / "none yet")
    assert store.names("evaluation") == frozenset()
    steps = [Step("evaluation", "classification", 1, {"task": str(number)}) for number in range(5)]
    for step in steps:
        recorded(store, step, score=0.0)
    assert store.names("evaluation") == {step.name for step in steps}
    assert store.state_and_record(steps[0])[0] is State.PRESENT
    record = store.state_and_record(steps[0])[1]
    assert record is not None and record.key == steps[0].key


# --- the same steps, whatever was planned with them -------------------------------------------------------------------


WIDTHS = {"BF16": 2, "F32": 4, "U8": 1}


def no_data(member: Member, statistic: object) -> dict[str, Any]:
    return {"tasks": [member.name], "training": "0" * 64, "companions": "1" * 64}


def steps_of(merge: MergeWork) -> list[dict[str, Any]]:
    """The merge and everything it must know, as plain values."""
    return [merge.step.as_json(), *(work.step.as_json() for work in merge.needed)]


def test_a_merge_planned_among_thousands_has_the_steps_it_has_alone(folder: Path) -> None:
    pool = open_pool(folder)
    shared = MergeBuilder(pool, (), "bfloat16", no_data)
    trims = {"ties": [{}, {"density": 0.5}, {"density": 0.5, "drop": {"rate": 0.5, "seed": 1}}]}
    experts = list(pool.experts.values())
    for name, kind in METHODS.items():
        if issubclass(kind, AdapterMethod):
            continue  # the pool is one of full checkpoints
        for values in trims.get(name, kind.examples().golden[:1]):
            method = method_from(name, values, "test")
            for members in (experts[:2], experts[1:], experts[::-1]):
                try:
                    method.validate_count(len(members))
                    method.fitted(pool.base.tensors)
                except SpecError:
                    continue  # the pool has other experts, or other layers, than it asks for
                among = shared.build(method, members)
                alone = MergeBuilder(pool, (), "bfloat16", no_data).build(method, members)
                assert steps_of(among) == steps_of(alone)
                assert [work.selection for work in among.needed] == [work.selection for work in alone.needed]
                assert [work.experts for work in among.needed] == [work.experts for work in alone.needed]
                assert among.size == sum(WIDTHS[info.dtype] * info.count for info in among.outputs.values())
                assert method.product == "masks" or {info.dtype for info in among.outputs.values()} == {"BF16"}
                assert len({work.step.key for work in among.needed}) == len(among.needed)


def test_what_others_need_comes_before_them(folder: Path) -> None:
    pool = open_pool(folder)
    method = method_from("ties", {"drop": {"rate": 0.5, "rescale": "l1", "seed": 1}, "count": "published"}, "test")
    merge = MergeBuilder(pool, (), None, no_data).build(method, list(pool.experts.values()))
    keys = [needed.step.key for needed in merge.needed]
    inner = [inside.step.key for needed in merge.needed for group in needed.inputs.values() for inside in group]
    assert inner and set(inner) <= set(keys)
    for needed in merge.needed:
        for group in needed.inputs.values():
            for inside in group:
                assert keys.index(inside.step.key) < keys.index(needed.step.key)


def test_equal_values_that_are_written_differently_keep_their_own_keys(folder: Path) -> None:
    pool = open_pool(folder)
    builder = MergeBuilder(pool, (), None, no_data)
    members = list(pool.experts.values())
    plans = [builder.build(method_from("ties", {"density": density}, "test"), members) for density in (0.0, -0.0)]
    first, second = (plan.inputs["threshold"][0].step.parameters["values"]["density"] for plan in plans)
    assert math.copysign(1, first) != math.copysign(1, second)
    assert plans[0].inputs["threshold"][0].step.key != plans[1].inputs["threshold"][0].step.key


def test_subsets_that_are_drawn_twice_are_planned_once(folder: Path) -> None:
    plan = of_two(folder, subsets={"per_count": 40, "seed": 0}, counts=[2, 3])
    sets = [(cell.count, frozenset(cell.experts)) for cell in merges_of(plan) if cell.method == "average"]
    assert len(set(sets)) == len(sets) == 3 + 1  # every pair of three, and all three
    assert len({cell.id for cell in plan.cells}) == len(plan.cells)
    assert {cell.subset for cell in merges_of(plan) if cell.count == 3} == {0}


def nested(draw: random.Random, depth: int) -> Any:
    """Some plain value."""
    kinds = ["text", "number", "whole", "flag", "none"] + ["list", "mapping"] * 2 * (depth > 0)
    kind = draw.choice(kinds)
    if kind == "text":
        return "".join(draw.choice('aé"\\\n\u2028θ\x00 ') for _ in range(draw.randrange(6)))
    if kind == "number":
        return draw.choice([0.0, -0.0, 1e300, 5e-324, 0.1, draw.uniform(-1, 1)])
    if kind == "whole":
        return draw.randrange(-(10**20), 10**20)
    if kind == "list":
        items = [nested(draw, depth - 1) for _ in range(draw.randrange(4))]
        return draw.choice([list, tuple])(items)
    if kind == "mapping":
        return {nested_name(draw): nested(draw, depth - 1) for _ in range(draw.randrange(4))}
    return draw.random() < 0.5 if kind == "flag" else None


def nested_name(draw: random.Random) -> str:
    return "".join(draw.choice('abθé_"') for _ in range(3))


def read_only(value: Any) -> Any:
    """The same value out of mappings that JSON's own encoder does not know."""
    if isinstance(value, dict):
        return MappingProxyType({key: read_only(item) for key, item in value.items()})
    return [read_only(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("seed", range(50))
def test_one_text_whichever_way_it_is_written(seed: int) -> None:
    """Plain values take a short way; it must come to the text of the long one."""
    value = {"one": nested(random.Random(seed), 5), "two": [nested(random.Random(-seed), 3)]}
    text = canonical(value)
    assert text == canonical(read_only(value))
    assert json.loads(text) == json.loads(json.dumps(value))
    step = Step("merge", "ties", 1, value, {"base": "b"})
    assert step.key == hashlib.sha256(canonical(step.as_json())).hexdigest()
    assert step.name == f"ties-{step.key[:12]}"
