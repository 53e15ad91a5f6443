"""Chains of cached links: what an arrival costs, what is kept, what is shared, and what a kill leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecore import merge
from mergecore.engine.executor import InProcess
from mergecore.engine.pass_plan import PassPlan
from mergecore.events import silent
from mergecore.execution import passes as run
from mergecore.methods import Opcm
from mergecore.planning.merge_builder import MergeBuilder
from mergecore.planning.pool import resolve_pool
from mergecore.planning.work import MergeWork
from mergecore.recipes.merge_recipe import run_for
from mergecore.spec.sources import BaseSpec, ExpertSpec
from mergecore.store.store import State
from mergecore.sweeps.complete import run_round
from mergecore.tensors.files import open_files
from tests.checkpoints.test_adapters import adapted, fresh
from tests.digits import DigitsTier
from tests.digits_sweep import digits_spec, opened
from tests.recipe_files import find, merge_into
from tests.small_pool import merge_plan, open_pool, place_in, write_pool


def links(plan: MergeWork) -> list[Any]:
    return [work for group in plan.inputs["sum"] for work in group.with_inputs()]


def spec(tier: DigitsTier, store: Path, experts: Sequence[str], counts: list[int], **changes: Any) -> dict[str, Any]:
    values = digits_spec(tier, store, methods=[{"method": "opcm"}], counts=counts, evaluate__limit=20,
                       evaluate__validation=None, output__register=None, **changes)  # fmt: skip
    values["experts"] = [{"name": name, "source": str(tier.experts[name]), "tasks": []} for name in experts]
    values["evaluate"]["held_in"] = {}
    values["evaluate"]["held_out"] = {"upright": ["upright"]}
    return values


def test_one_more_expert_costs_one_link(tier: DigitsTier, tmp_path: Path) -> None:
    """Seven experts, next week an eighth: one link, one model, and what the new models score."""
    names = list(tier.experts)
    seven = opened(spec(tier, tmp_path / "store", names[:7], [7]))
    done = seven.run()
    assert not done.failures
    cell = seven.cell("opcm n7 s0")
    assert cell.merge is not None
    assert sum(step.startswith("projected_sum") for step in done.steps) == 7
    states = [seven.store.state(work.step) for work in links(cell.merge)]
    assert states == [State.DROPPED] * 6 + [State.PRESENT], "of a chain only the end is kept"
    eight = opened(spec(tier, tmp_path / "store", names, [8]))
    later = eight.run()
    assert sorted(step.partition("-")[0] for step in later.steps if "-" in step and not step.startswith("full")) == [
        "average", "classification", "classification", "classification", "opcm", "projected_sum",
    ]  # fmt: skip
    fresh = opened(spec(tier, tmp_path / "other", names, [8]))
    fresh.run()
    first, other = (
        eight.store.record(eight.cell("opcm n8 s0").model),
        fresh.store.record(fresh.cell("opcm n8 s0").model),
    )
    assert first is not None and other is not None and first.digest == other.digest


def test_orders_are_steps_of_their_own_and_share_their_beginnings(tier: DigitsTier, tmp_path: Path) -> None:
    experts = ["quarter", "mirror", "rows"]
    chained = spec(tier, tmp_path / "store", experts, [3])
    orders = ["recipe", [0, 1, 2], [0, 2, 1], [2, 1, 0], {"seed": 1}]
    chained["methods"] = [{"method": "opcm", "order": {"grid": orders}}]
    swept = opened(chained)
    merges = {cell.model.key: cell.merge for cell in swept.plan.cells if cell.merge and cell.method == "opcm"}
    ids = [tuple(merge.experts) for merge in merges.values() if merge]
    assert len(set(ids)) == len(ids), "one order, one step, however it is said"
    chains = [[work.step.key for work in links(merge)] for merge in merges.values() if merge]
    assert chains[0][0] == chains[1][0] and chains[0][1] != chains[1][1]
    done = swept.run()
    assert not done.failures
    wanted = len({key for chain in chains for key in chain})
    assert sum(step.startswith("projected_sum") for step in done.steps) == wanted
    digests = {record.digest for key in merges if (record := swept.store.record(merges[key].step))}  # type: ignore[union-attr]
    assert len(digests) == len(merges)


def test_links_wait_for_models_and_are_made_again_for_them(tier: DigitsTier, tmp_path: Path) -> None:
    """A chain that goes on past a model's last link: it stays until that model is made, whatever the room on the disk,
    and where the model is asked for later the chain is made anew. No link is done twice in a sweep."""
    experts = ["quarter", "mirror", "rows", "inverted"]
    chained = spec(tier, tmp_path / "store", experts, [2, 3, 4])
    others = [{"method": "task_arithmetic", "label": f"other{n}", "scale": n / 10} for n in range(1, 5)]
    chained["methods"] = [*others, {"method": "opcm"}]  # they take the room while the chain is long
    for seed in range(100):
        chained["subsets"] = {"per_count": 1, "seed": seed}
        swept = opened(chained, room=1)
        merges = [swept.cell(f"opcm n{count} s0").merge for count in (2, 3, 4)]
        ids = [merge.experts for merge in merges if merge]
        if ids[2][:3] == ids[1] and ids[1][:2] == ids[0]:
            break
    done = swept.run()
    assert not done.failures
    chained = [step for step in done.steps if step.startswith("projected_sum")]
    assert len(chained) == len(set(chained)) == 4
    first = merges[0]
    assert first is not None and swept.store.state(first.step) is State.DROPPED
    assert [swept.store.state(work.step) for work in links(first)] == [State.DROPPED] * 2
    before = swept.store.record(first.step)
    again = []
    while round := swept.frontier.making([first]):
        again += run_round(swept.place, round).steps
    assert len(again) == 3 and again[-1] == first.step.name
    after = swept.store.record(first.step)
    assert before is not None and after is not None and before.digest == after.digest


def test_a_link_knows_nothing_of_those_to_come(tmp_path: Path) -> None:
    """Adapters of other targets: what comes later adds tensors to the model, and none to the links there are."""
    fresh("llama").save_pretrained(tmp_path / "base")
    few, _ = adapted("llama", tmp_path / "base", tmp_path / "few", target_modules=["q_proj"], r=2)
    more, _ = adapted("llama", tmp_path / "base", tmp_path / "more", seed=2, target_modules=["q_proj", "up_proj"], r=2)
    pool = resolve_pool(
        BaseSpec(source=str(tmp_path / "base")),
        [ExpertSpec(source=str(path), name=name) for name, path in (("few", few), ("more", more))],
        None, find, silent,
    )  # fmt: skip
    builder = MergeBuilder(pool, (), None, None)
    alone, both = (builder.build(Opcm(), list(pool.experts.values())[:count]) for count in (1, 2))
    assert links(alone)[0].step.key == links(both)[0].step.key
    assert len(links(both)[0].selection) == 2 and len(links(both)[1].selection) == 4
    place = place_in(tmp_path / "store", pool)
    assert not run_for(place, both).failures
    change = {}
    for name, path in (("few", few), ("more", more)):
        merge_into({"method": "average", "base": tmp_path / "base", "experts": [path]}, tmp_path / f"dense-{name}")
        change[name] = load_file(tmp_path / f"dense-{name}/model.safetensors")
    base = load_file(tmp_path / "base/model.safetensors")
    deltas = [{n: change[name][n] - base[n] for n in both.layout.merged} for name in ("few", "more")]
    wanted = merge(
        Opcm(), base={n: base[n] for n in deltas[0]}, experts=[{n: base[n] + d[n] for n in d} for d in deltas]
    )
    record = place.store.record(both.step)
    assert record is not None
    files = [name for name in record.files if name.endswith(".safetensors")]
    tensors = open_files(place.store.folder(both.step), files)
    for name, value in wanted.items():
        torch.testing.assert_close(tensors.read(name).view(value.shape), value, rtol=1e-5, atol=1e-6)


def test_an_expert_that_select_leaves_out_still_counts(tmp_path: Path) -> None:
    """Its delta over what is selected is zero, so the mean norm is half of the other's."""
    fresh("llama").save_pretrained(tmp_path / "base")
    ones = [adapted("llama", tmp_path / "base", tmp_path / target, target_modules=[target], r=2)[0]
            for target in ("q_proj", "v_proj")]  # fmt: skip
    experts = [{"source": path, "name": f"e{number}"} for number, path in enumerate(ones)]
    recipe = {"method": "opcm", "base": tmp_path / "base", "experts": experts, "select": [{"names": "*v_proj*"}]}
    merge_into(recipe, tmp_path / "out")
    merge_into({**recipe, "experts": experts[1:]}, tmp_path / "alone")
    base, both, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out", "alone"))
    for name in base:
        torch.testing.assert_close(both[name] - base[name], (alone[name] - base[name]) / 2, rtol=1e-4, atol=1e-7)


def test_an_arrival_reads_one_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the chain: a pass over a link opens the newest expert, the model's pass none."""
    pool = open_pool(write_pool(tmp_path / "pool"))
    place = place_in(tmp_path / "store", pool)
    seen: list[tuple[int, tuple[int, ...]]] = []
    real = run.run_pass

    def watched(plan: PassPlan, *rest: Any) -> Any:
        seen.append((len(plan.experts), plan.merges[0].experts))
        return real(plan, *rest)

    monkeypatch.setattr(run, "run_pass", watched)
    assert not run_for(place, merge_plan(pool, "opcm")).failures
    assert seen == [(1, (0,)), (1, (0,)), (1, (0,)), (3, ())]


def test_in_memory_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = matrices(tmp_path)
    recipe = {"method": "opcm", "base": folder / "base", "experts": [folder / f"expert-{n}" for n in range(3)]}
    merge_into(recipe, tmp_path / "out")
    models = [load_file(folder / name / "model.safetensors") for name in ("base", "expert-0", "expert-1", "expert-2")]
    wanted = merge(Opcm(), base=models[0], experts=models[1:])
    merged = load_file(tmp_path / "out/model.safetensors")
    assert merged.keys() == wanted.keys() and all(torch.equal(merged[name], wanted[name]) for name in wanted)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "mergeloom.yaml", "model.safetensors",
    ]  # fmt: skip


def test_a_recipe_with_a_store_goes_on_next_week(tmp_path: Path) -> None:
    """Two experts, then a third: the chain's third link is all that is worked out, and the bytes are those of one
    go.
    """
    folder, store = matrices(tmp_path), tmp_path / "store"
    experts = [folder / f"expert-{number}" for number in range(3)]
    recipe = {"method": "opcm", "base": folder / "base"}
    merge_into({**recipe, "experts": experts[:2]}, tmp_path / "two", store=store)
    before = {path.parent.name for path in store.glob("statistic/*/record.json")}
    kept = {path.parent.name for path in store.glob("statistic/*/tensors.safetensors")}
    assert len(before) == 2 and len(kept) == 1 and not list(store.glob("merge/*/*.safetensors"))
    second = json.loads((store / "statistic" / kept.pop() / "record.json").read_text())
    three = merge_into({**recipe, "experts": experts}, tmp_path / "three", store=store)
    assert len(list(store.glob("statistic/*/record.json"))) == 3
    assert len(list(store.glob("statistic/*/tensors.safetensors"))) == 1
    now = json.loads((store / "statistic" / f"projected_sum-{second['key'][:12]}" / "record.json").read_text())
    assert now == {**second, "dropped": True}, "the second link was taken as it was, then let go"
    assert three.digest == merge_into({**recipe, "experts": experts}, tmp_path / "at-once").digest
    assert merge_into({**recipe, "experts": experts}, tmp_path / "again", store=store).digest == three.digest
    assert not (tmp_path / "three.tmp").exists()


def matrices(folder: Path) -> Path:
    """A pool whose tensors are matrices."""
    pool = write_pool(folder / "pool", tensors=2)
    for path in pool.glob("*/model.safetensors"):
        matrices = {f"{name}.weight": value.reshape(40, 25) for name, value in load_file(path).items()}
        save_file(matrices, path, metadata={"format": "pt"})
    return pool


def test_a_killed_link_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What spans have journalled is not done again, and the bytes are those of a run that nothing stopped."""
    monkeypatch.setattr("mergecore.engine.pass_plan.plan_spans.__defaults__", (1,))
    pool = open_pool(matrices(tmp_path))
    plan = merge_plan(pool, "opcm")
    whole = place_in(tmp_path / "whole", pool)
    assert not run_for(whole, plan).failures

    class Killed(BaseException):
        """Like SIGKILL: nobody handles it."""

    class Stopping(InProcess):
        def each(self, function: Any, shared: Any, items: Any, at_once: int | None = None) -> Any:
            for position, outcome in super().each(function, shared, items, at_once):
                yield position, outcome
                raise Killed

    place = place_in(tmp_path / "store", pool, executor=Stopping())
    with pytest.raises(Killed):
        run_for(place, plan)
    first = links(plan)[0].step
    assert list((tmp_path / "store/drafts" / first.key).glob("journal-*/*.json")), "one span is done"
    assert not run_for(place_in(tmp_path / "store", pool), plan).failures
    for step in (plan.step, links(plan)[-1].step):
        first, other = whole.store.record(step), place.store.record(step)
        assert first is not None and other is not None and first.digest == other.digest


def test_a_link_says_what_it_has_come_to(tmp_path: Path) -> None:
    pool = open_pool(matrices(tmp_path))
    place, plan = place_in(tmp_path / "store", pool), merge_plan(pool, "opcm")
    assert not run_for(place, plan).failures
    last = place.store.record(links(plan)[-1].step)
    assert last is not None
    models = [load_file(tmp_path / f"pool/{name}/model.safetensors") for name in ("base", "expert-0", "expert-1", "expert-2")]  # fmt: skip
    norms = [sum(float((model[n] - models[0][n]).double().norm() ** 2) for n in model) ** 0.5 for model in models[1:]]
    assert last.result["count"] == 3 and last.result["norm_sum"] == pytest.approx(sum(norms))
    assert last.result["lambda"] == pytest.approx(last.result["norm"] / (sum(norms) / 3))
    assert 1 < last.result["lambda"] < 3, "about √3 for vectors at right angles"
    tensors = open_files(place.store.folder(plan.step), ["model.safetensors"])
    change = sum(float((tensors.read(n).double() - models[0][n].reshape(-1).double()).norm() ** 2) for n in models[0])
    assert change**0.5 == pytest.approx(sum(norms) / 3, rel=1e-5)
