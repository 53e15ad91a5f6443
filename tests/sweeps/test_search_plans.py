"""Searches in a plan: what a spec may say, which cells they ask for by the scores on record, and what stays of them.

Nothing is merged or scored here but where it says so: results are recorded as whoever did the work would."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

from flows.cli.main import main
from mergecore.engine.pass_plan import PassPlan
from mergecore.errors import SpecError
from mergecore.execution import passes as run
from mergecore.execution.outcome import Done
from mergecore.planning.cells import Cell
from mergecore.reporting.report import markdown
from mergecore.reporting.summary import summarise
from mergecore.store.store import Store
from mergecore.sweeps.remaining import Frontier, summary
from tests.digits import DigitsTier
from tests.digits_sweep import EXPERTS as EXPERTS_OF_THE_TIER
from tests.digits_sweep import digits_spec, opened, records
from tests.small_pool import NAMES, planned, write_pool

SOUP = {"method": "average", "label": "soup", "search": {"by": "greedy"}}
PCB = {
    "method": "pcb",
    "search": {
        "by": "nevergrad",
        "over": [{"parameter": "scale", "low": 0.8, "high": 1.3, "per": "expert"}],
        "budget": 7,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and a task for each expert; tasks 'leaky' and 'partly' have test items among their validation
    items.
    """
    pool_folder = write_pool(tmp_path_factory.mktemp("pool"), tensors=3, elements=16)
    (pool_folder / "tasks").mkdir()
    for name in [*NAMES, "other", "leaky", "partly"]:
        arrays: dict[str, Any] = {}
        for number, split in enumerate(("train", "validation", "test")):
            first = {"leaky": 0, "partly": 2 * number}.get(name, 4 * number)
            arrays |= {f"{split}.inputs": np.arange(first, first + 4, dtype=np.float32)[:, None]}
            arrays |= {f"{split}.labels": np.zeros(4, dtype=np.int64)}
        np.savez(pool_folder / "tasks" / f"{name}.npz", **arrays)
    return pool_folder


def cells_of(frontier: Frontier, label: str) -> list[Cell]:
    return [cell for cell in frontier.plan.cells if cell.method == label]


def merged(cell: Cell) -> tuple[str, ...]:
    return cell.experts if cell.merged is None else cell.merged


def work(frontier: Frontier, formula: Callable[[Cell], float], rounds: int = 1000) -> int:
    """Rounds of the frontier, everything that they ask for recorded as done; returns how many there were."""
    store, number = frontier.store, 0
    while number < rounds and (round := frontier.round()):
        number += 1
        for step in [*(work.step for work in (*round.statistics, *round.merges))]:
            with store.draft(step) as draft:
                (draft.path / "file").write_bytes(b"1234")
                store.commit(draft, "digest", {}, {})
        for scoring in round.scorings:
            for _, _, step in scoring.tasks:
                with store.draft(step) as draft:
                    store.commit(draft, "digest", {"score": formula(scoring.cell)}, {})
        for plan in frontier.droppable():
            store.drop(plan.step)
    return number


def pairs_are_best(cell: Cell) -> float:
    """0 joins 1; 2 spoils everything. Baselines and other methods 0.5."""
    letters = {name[-1] for name in merged(cell)}
    return {"0": 0.4, "1": 0.5, "2": 0.3, "01": 0.6, "012": 0.55}.get("".join(sorted(letters)), 0.2)


# --- what a spec may say ----------------------------------------------------------------------------------------------

OVER = [{"parameter": "scale", "values": [0.3]}]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"method": "pcb", "search": {**PCB["search"], "budget": 0}}, r"search \(nevergrad\).budget: .*greater than or equal to 1"),  # type: ignore[dict-item]
        ({"method": "average", "search": {"by": "greedily"}}, r"methods\[0\].search.by: .*did you mean 'greedy'"),
        ({"method": "average", "search": {}}, r"search.by: must be given, as in by: greedy"),
        ({"method": "average", "search": "greedy"}, r"as in search: {by: greedy}"),
        ({"method": "average", "search": {"by": "greedy", "acept": "above"}}, "did you mean 'accept'"),
        ({"method": "task_arithmetic", "search": {"by": "grid", "over": [{"parameter": "scal", "values": [1]}]}}, "'scal' is no parameter of task_arithmetic; did you mean 'scale'"),
        ({"method": "task_arithmetic", "scale": 0.5, "search": {"by": "grid", "over": OVER}}, "'scale' has the value 0.5 and is searched as well"),
        ({"method": "task_arithmetic", "scale": {"grid": [0.5]}, "search": {"by": "greedy"}}, "a grid and a search do not stand in one entry"),
        ({"method": "ties", "scale": 1.0, "search": {"by": "grid", "over": [{"parameter": "density", "values": [0.2, 1.5]}]}}, "density: .*less than or equal to 1"),
        ({"method": "average", "search": {"by": "nevergrad", "over": [{"parameter": "drop.rate", "low": 0.1, "high": 1.5}]}}, "drop.*rate"),
        ({"method": "task_arithmetic", "search": {"by": "nevergrad", "over": [{"parameter": "scale", "low": 2, "high": 1}]}}, "low 2 must be below high 1"),
        ({"method": "task_arithmetic", "search": {"by": "grid", "over": OVER * 2}}, "'scale' stands there twice"),
        ({**SOUP, "search": {"by": "greedy", "tasks": ["expert-7"]}}, "'expert-7' is no task of this spec; did you mean"),
        ({"method": "average", "label": "average", "search": {"by": "greedy"}}, "another entry is called 'average' too"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_said_with_its_place(folder: Path, entry: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        planned(folder, entry)


def test_a_search_asks_for_validation_items(folder: Path) -> None:
    with pytest.raises(
        SpecError, match=r"methods\[0\]: a search decides by validation items.*validation: {limit: 100}"
    ):
        planned(folder, SOUP, evaluate__validation=None)


def test_validation_items_must_not_be_the_test_items(folder: Path) -> None:
    register = {"name": "best", "by": "held_out"}

    def noted(task: str, *methods: Any, **changes: Any) -> tuple[str, ...]:
        return planned(folder, *methods, evaluate__held_out={"other": [task]}, **changes).notes

    with pytest.raises(SpecError, match="task 'leaky': its validation items are its test items"):
        noted("leaky", SOUP, output__register=register)
    assert noted("leaky", output__register=register) == (), "without a search nothing is refused"
    assert noted("leaky", SOUP) == (), "where it decides nothing its validation items are not looked at"
    said = ("task 'partly': 2 of 4 validation items are test items too",)
    assert noted("partly", SOUP, output__register=register) == said
    assert noted("partly", {**SOUP, "search": {"by": "greedy", "tasks": ["partly"]}}) == said
    assert planned(folder, SOUP).notes == ()


def test_a_count_that_cannot_be_searched_is_a_refused_cell_and_stops_nothing(folder: Path, tmp_path: Path) -> None:
    frontier = Frontier(planned(folder, SOUP, counts=[1, 3]), Store(tmp_path), room=8)
    work(frontier, pairs_are_best)
    refused = [cell for cell in frontier.plan.cells if cell.refused]
    assert [cell.name for cell in refused] == ["soup n1 s0"] and "nothing to choose" in refused[0].refused
    assert [way.state for way in frontier.trajectories()] == ["done"]


# --- cells ------------------------------------------------------------------------------------------------------------


def test_a_soup_asks_for_experts_then_for_one_more_at_a_time(folder: Path, tmp_path: Path) -> None:
    frontier = Frontier(planned(folder, SOUP), Store(tmp_path), room=8)
    assert [merged(cell) for cell in cells_of(frontier, "soup")] == [(name,) for name in NAMES]
    work(frontier, pairs_are_best)
    cells = cells_of(frontier, "soup")
    assert [merged(cell) for cell in cells[3:]] == [(NAMES[0], NAMES[1]), tuple(NAMES)]
    assert all(cell.experts == tuple(NAMES) for cell in cells), "all are measured on the tasks of all"
    chosen = [cell for cell in cells if frontier.choice.chosen(cell)]
    assert [merged(cell) for cell in chosen] == [(NAMES[0], NAMES[1])]
    for cell in cells:
        assert frontier.view.measured(cell, "validation") and cell.tasks_on("validation") == tuple(NAMES)
        opened = cell in chosen or cell.merged is None  # all three are the average, which has a cell of its own
        assert frontier.view.measured(cell, "test") is opened, "test items are opened for the result only"
    (way,) = frontier.trajectories()
    assert [(trial.round, trial.score, trial.kept, trial.best) for trial in way.trials] == [
        (1, 0.4, False, 0.4), (1, 0.5, True, 0.5), (1, 0.3, False, 0.5), (2, 0.6, True, 0.6), (3, 0.55, False, 0.6),
    ]  # fmt: skip
    assert (way.state, way.result, way.most) == ("done", chosen[0].id, 5)


def test_the_whole_soup_and_the_average_are_one_model_and_two_cells(folder: Path, tmp_path: Path) -> None:
    frontier, measured = Frontier(planned(folder, SOUP), Store(tmp_path), room=8), list[str]()

    def heard(cell: Cell) -> float:
        measured.append(cell.id)
        return {1: 0.3, 2: 0.4, 3: 0.5}.get(len(merged(cell)), 0.2)

    work(frontier, heard)
    average, whole = cells_of(frontier, "average")[0], cells_of(frontier, "soup")[-1]
    assert whole.model == average.model and whole.id != average.id and frontier.choice.chosen(whole)
    assert measured.count(average.id) and not measured.count(whole.id), "it was measured when it was asked for"
    assert len({cell.id for cell in frontier.plan.cells}) == len(frontier.plan.cells)


def test_a_finished_search_replans_to_nothing_and_a_killed_one_to_where_it_was(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("nevergrad")

    def scores(cell: Cell) -> float:
        return int(hashlib.sha256(cell.model.key.encode()).hexdigest()[:4], 16) / 2**16

    whole = Frontier(planned(folder, SOUP, PCB), Store(tmp_path / "whole"), room=8)
    work(whole, scores)
    assert not Frontier(planned(folder, SOUP, PCB), Store(tmp_path / "whole"), room=8).round()
    rounds = 0
    while work(Frontier(planned(folder, SOUP, PCB), Store(tmp_path / "killed"), room=8), scores, rounds=1):
        rounds += 1  # a new process for every round
    killed = Frontier(planned(folder, SOUP, PCB), Store(tmp_path / "killed"), room=8)
    assert killed.trajectories() == whole.trajectories() and rounds > 7
    assert len(killed.trajectories()[1].trials) == 7 and killed.trajectories()[1].state == "done"


def test_a_candidate_that_fails_is_left_out_and_named(folder: Path, tmp_path: Path) -> None:
    frontier = Frontier(planned(folder, SOUP), Store(tmp_path), room=8)
    lost = cells_of(frontier, "soup")[1]
    frontier.store.fail(lost.model, "disk full")
    work(frontier, pairs_are_best)
    (way,) = frontier.trajectories()
    assert [trial.reason for trial in way.trials][:3] == ["", "disk full", ""] and way.state == "done"
    assert summary(frontier)["failed"] == 1
    chosen = [cell for cell in cells_of(frontier, "soup") if frontier.choice.chosen(cell)]
    assert [merged(cell) for cell in chosen] == [(NAMES[0],)]
    frontier.store.forgive()
    work(frontier, pairs_are_best)
    chosen = [cell for cell in cells_of(frontier, "soup") if frontier.choice.chosen(cell)]
    assert [merged(cell) for cell in chosen] == [(NAMES[0], NAMES[1])], "forgiven, the search is played again"


def test_the_rules_of_an_entry_hold_for_everything_it_asks_for(folder: Path, tmp_path: Path) -> None:
    rules = [{"names": "layer.0"}, {"take": "copy"}]
    frontier = Frontier(planned(folder, {**SOUP, "select": rules}), Store(tmp_path), room=8)
    work(frontier, pairs_are_best)
    for cell in cells_of(frontier, "soup"):
        assert cell.merge is not None and set(cell.merge.layout.merged) == {"layer.0"}
    with pytest.raises(SpecError, match="nor a grid in rules that it takes from the spec"):
        planned(folder, SOUP, select=[{"names": {"grid": ["layer.0", "layer.1"]}}, {"take": "copy"}])


def test_what_fails_on_test_items_changes_nothing_that_was_decided(folder: Path, tmp_path: Path) -> None:
    frontier = Frontier(planned(folder, SOUP), Store(tmp_path), room=8)
    work(frontier, pairs_are_best)
    (result,) = [cell for cell in cells_of(frontier, "soup") if frontier.choice.chosen(cell)]
    step = frontier.plan.evaluation(result, "test", NAMES[0])
    frontier.store.remove(step)
    frontier.store.fail(step, "out of memory")
    anew = Frontier(planned(folder, SOUP), Store(tmp_path), room=8)
    assert anew.view.trouble(result) == "out of memory" and anew.trajectories()[0].result == result.id


def test_experts_whose_tasks_are_not_known_cannot_be_searched_over(folder: Path, tmp_path: Path) -> None:
    experts = [{"name": name, "source": str(folder / name)} for name in NAMES]
    plan = planned(folder, SOUP, experts=experts)
    (refused,) = [cell.refused for cell in plan.cells if cell.method == "soup"]
    assert refused.startswith("none of the tasks that decide is measured")
    assert not plan.searches


def test_only_the_best_so_far_keeps_its_model(folder: Path, tmp_path: Path) -> None:
    frontier = Frontier(planned(folder, SOUP), Store(tmp_path), room=8)
    while frontier.trajectories()[0].trials[-1].round < 3:
        work(frontier, pairs_are_best, rounds=1)
    store = frontier.store
    kept = {merged(cell) for cell in cells_of(frontier, "soup") if (store.folder(cell.model) / "file").exists()}
    assert kept == {(NAMES[0], NAMES[1])}


def test_named_tasks_decide(folder: Path, tmp_path: Path) -> None:
    """By the first expert's task alone nobody may join it."""
    entry = {**SOUP, "search": {"by": "greedy", "tasks": [NAMES[0]], "accept": "above"}}
    frontier = Frontier(planned(folder, entry), Store(tmp_path), room=8)
    store = frontier.store

    while round := frontier.round():
        for merge in round.merges:
            with store.draft(merge.step) as draft:
                store.commit(draft, "digest", {}, {})
        for scoring in round.scorings:
            for _, identity, step in scoring.tasks:
                share = 1 / len(merged(scoring.cell)) if identity.task in merged(scoring.cell) else 0.0
                with store.draft(step) as draft:
                    store.commit(draft, "digest", {"score": share}, {})
    chosen = [cell for cell in cells_of(frontier, "soup") if frontier.choice.chosen(cell)]
    assert [merged(cell) for cell in chosen] == [(NAMES[0],)]


# --- with real models -------------------------------------------------------------------------------------------------


def test_a_soup_of_real_experts_is_the_average_of_those_that_joined(tier: DigitsTier, tmp_path: Path) -> None:
    spec = digits_spec(tier, tmp_path, counts=[3], methods=[SOUP], output__keep="best", evaluate__limit=20)
    swept = opened(spec)

    class Killed(Exception):
        pass

    def killed(done: Done) -> None:
        if any(trial.round > 2 for way in swept.frontier.trajectories() for trial in way.trials):
            raise Killed

    with pytest.raises(Killed):
        swept.run(killed)
    before, swept = set(records(swept.store)), opened(spec)
    done = swept.run()
    assert not done.failures and not before & {step.replace("evaluation/", "") for step in done.steps}
    assert opened(spec).run().steps == []
    sweep = swept.scores()
    (way,) = sweep.searches
    result = next(cell for cell in swept.plan.cells if cell.id == way.result)
    assert way.state == "done" and all(trial.score is not None for trial in way.trials)
    names = [way.trials[place].what for place in range(3)]
    alone = sorted(
        range(3), key=lambda place: (-(way.trials[place].score or 0), swept.place.pool.experts[names[place]].id)
    )
    expected, best = [names[alone[0]]], way.trials[alone[0]].score
    for place, trial in zip(alone[1:], way.trials[3:], strict=True):
        assert set(trial.what.split(" + ")) == {*expected, names[place]}
        if (trial.score or 0) >= (best or 0):
            expected, best = [*expected, names[place]], trial.score
    assert set(merged(result)) == set(expected)
    tensors: dict[str, Tensor] = {}
    for path in swept.store.folder(result.model).glob("*.safetensors"):
        tensors |= load_file(path)
    experts = [load_file(tier.experts[name] / "model.safetensors") for name in sorted(expected)]
    base = load_file(tier.base / "model.safetensors")
    for name, value in tensors.items():
        if base[name].is_floating_point():
            torch.testing.assert_close(
                value, torch.stack([expert[name] for expert in experts]).mean(0), rtol=1e-6, atol=1e-7
            )
    lineage = next(cell.lineage for cell in sweep.cells if cell.cell == result.id)
    assert [expert["name"] for expert in lineage["recipe"]["experts"]] == [
        name for name in result.experts if name in expected
    ]
    text = markdown(summarise(sweep, "test"))
    assert "## Searches, on validation items" in text and f"| {way.trials[-1].round} | {way.trials[-1].what} |" in text


def test_every_mask_scale_is_made_in_one_pass_and_each_expert_gets_its_own(
    tier: DigitsTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [0.2, 0.4, 0.6]
    search = {"by": "grid", "over": [{"parameter": "mask_scale", "values": values}], "choose": "for_each"}
    spec = digits_spec(
        tier,
        tmp_path,
        counts=[2],
        methods=[{"method": "tall_masks", "label": "tall", "search": search}],
        evaluate__limit=20,
    )
    passes: list[int] = []
    original = run.run_pass

    def counted(plan: PassPlan, *rest: Any) -> Any:
        passes.append(sum(job.method.name == "tall_masks" for job in plan.merges))
        return original(plan, *rest)

    monkeypatch.setattr(run, "run_pass", counted)
    swept = opened(spec, room=8)
    assert not swept.run().failures
    (way,) = swept.scores().searches
    measured = way.trials[: len(values)]
    assert passes[0] == len(values), "all λ in one reading of the experts"
    cells = {cell.id: cell for cell in swept.plan.cells}
    experts = swept.plan.searches[0].ground.experts
    result = cells[way.result].values["mask_scale"]
    each = result if isinstance(result, list) else [result] * len(experts)
    for expert, value in zip(experts, each, strict=True):
        alone = next(trial for trial in measured if trial.what == f"mask_scale={value:g}")
        scores = {trial.what: swept.frontier.view.score(cells[trial.cell], "validation", expert) for trial in measured}
        assert scores[alone.what] == max(score or 0.0 for score in scores.values()), "no other λ is better for it"
        own = swept.frontier.view.score(cells[way.result], "validation", expert)
        assert own == scores[alone.what], "a task's model has its own λ alone"


def test_the_plan_shows_the_first_round_and_how_many_models_there_may_be(tier: DigitsTier, tmp_path: Path) -> None:
    tall = {"by": "grid", "over": [{"parameter": "mask_scale", "values": [0.2, 0.4]}], "choose": "for_each"}
    methods = [SOUP, {"method": "tall_masks", "search": tall}]
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(digits_spec(tier, tmp_path / "store", counts=[3], methods=methods)))
    shown = CliRunner().invoke(main, ["plan", str(path)])
    assert shown.exit_code == 0, shown.output
    names = [
        name
        for name in EXPERTS_OF_THE_TIER
        if f"search soup n3 s0 (greedy): round 1 asks for 3 models ({name}" in shown.output
    ]
    assert len(names) == 1 and "0 tried so far, at most 5 in all" in shown.output
    assert "tall_masks+grid n3 s0 (grid): round 1 asks for 2 models (mask_scale=0.2, mask_scale=0.4)" in shown.output
    assert "merge: 6 models of 3 experts" in shown.output, "average, three experts alone and two products in one pass"
