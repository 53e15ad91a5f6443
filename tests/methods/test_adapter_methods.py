"""Adapters made of adapters: the specs' worked numbers, what every such method promises, and PEFT's word on the result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mergecore import merge
from mergecore.checkpoints.adapters import adapter_config, low_rank, own_factor
from mergecore.checkpoints.experts import AdapterExpert, Factor
from mergecore.errors import MismatchError, SpecError
from mergecore.events import silent
from mergecore.methods import LoraArithmetic, LoraLego
from mergecore.planning.pool import resolve_pool
from mergecore.plugins.adapter_method import AdapterMethod, combined_modules, ranks_made
from mergecore.plugins.method import Method
from mergecore.recipes.merge_recipe import run_for
from mergecore.registry import METHODS
from mergecore.spec.sources import BaseSpec, ExpertSpec
from mergecore.store.store import RECORD, State
from mergecore.sweeps.complete import Winner
from mergecore.tensors.files import open_files
from mergecore.tensors.memory import MemoryTensors
from mergecore.tensors.source import TensorInfo
from tests import tiny_lm
from tests.checkpoints.test_adapters import ATTENTION, FEED_FORWARD, KINDS, adapted, fresh, weights
from tests.digits_sweep import opened
from tests.recipe_files import command, find, merge_into
from tests.small_pool import merge_plan, place_in

VALUES: dict[str, list[dict[str, Any]]] = {
    "lora_arithmetic": [{}, {"aggregate": "mean"}, {"rank": 64}, {"rank": 4, "aggregate": "mean", "weights": [1]}],
    "lora_ties": [{"density": 1}],
    "lora_knots": [{"density": 1}, {"density": 1, "side": "inputs"}, {"density": 1, "rank": 4, "scope": "module"}],
    "lora_core_space": [{}, {"merge": "mean"}, {"merge": "ties", "density": 1}, {"rank": 4}],
    "lora_lego": [
        {"gauge": gauge, "reweight": reweight, "output": output}
        for gauge in ("as_given", "canonical")
        for reweight in ("l2", "max", "none")
        for output in ("rank", "none")
    ],
}
"""Values that give a single adapter back; a method of which nothing stands here is tried with its defaults."""
MAKING = {name: METHODS[name] for name in METHODS.own if issubclass(METHODS[name], AdapterMethod)}
VARIANTS = [(name, values) for name in MAKING for values in VALUES.get(name, [{}])]


def expert(
    name: str, scaling: float = 1.0, transposed: bool = False, **modules: tuple[Tensor, Tensor]
) -> AdapterExpert:
    """An adapter in memory: module → (down, up)."""
    tensors, factors, shapes = {}, {}, {}
    for module, (down, up) in modules.items():
        tensors |= {f"{module}.down": down, f"{module}.up": up}
        factors[f"{module}.weight"] = Factor(f"{module}.down", f"{module}.up", scaling, transposed)
        shape = (up.shape[0], down.shape[1])
        shapes[f"{module}.weight"] = shape[::-1] if transposed else shape
    return AdapterExpert(name, name, MemoryTensors(tensors), factors, shapes)


def drawn(name: str, rank: int, seed: int, scaling: float = 1.0, rows: int = 9, columns: int = 7) -> AdapterExpert:
    draw = torch.Generator().manual_seed(seed)
    return expert(
        name, scaling, m=(torch.randn(rank, columns, generator=draw), torch.randn(rows, rank, generator=draw))
    )


def change(adapter: AdapterExpert, target: str = "m.weight") -> Tensor:
    tensors = low_rank(adapter, target)
    assert tensors is not None
    return tensors.scaling * tensors.up @ tensors.down


def result(method: Method, experts: Sequence[AdapterExpert], target: str = "m.weight") -> Tensor:
    """ΔW of what is made."""
    assert isinstance(method, AdapterMethod)
    shapes = {name: TensorInfo("F32", shape) for adapter in experts for name, shape in adapter.shapes.items()}
    actual = dict(combined_modules(method, experts, shapes))[target]
    assert actual.down.shape[0] == actual.up.shape[1] == ranks_made(method, experts, shapes)[target]
    return actual.up @ actual.down


def close(actual: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


# --- one adapter is that adapter --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "values"), VARIANTS, ids=str)
def test_one_adapter_is_that_adapter(name: str, values: dict[str, Any]) -> None:
    for seed, scaling in ((0, 1.0), (1, 2.0), (2, 0.37), (3, -1.5)):
        adapter = drawn("one", 4, seed, scaling)
        close(result(MAKING[name].model_validate(values), [adapter]), change(adapter))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MAKING)
def test_one_adapter_as_peft_folds_it(name: str, kind: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """rsLoRA, rank and alpha patterns, GPT-2's turned weights, a head: through files and PEFT, for what is made of one."""
    family, values = KINDS[kind]
    base = bases(family)
    adapter, folded = adapted(family, base, tmp_path, **values)
    usual = VALUES.get(name, [{}])[0]
    merge_into({"method": name, **usual, "base": base, "experts": [adapter]}, tmp_path / "out")
    actual, wanted = loaded(family, base, tmp_path / "out"), weights(folded)
    before = weights(base)
    for tensor in before:
        torch.testing.assert_close(actual[tensor], wanted[tensor], rtol=1e-5, atol=1e-6)
    touched = {tensor for tensor in before if not torch.equal(before[tensor], wanted[tensor])}
    assert touched == {tensor for tensor in before if not torch.equal(before[tensor], actual[tensor])}


def loaded(family: str, base: Path, adapter: Path) -> dict[str, Tensor]:
    """The base with the adapter folded in by PEFT."""
    model = fresh(family)
    model.load_state_dict(load_file(base / "model.safetensors"), strict=False)
    folded = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return {name: value.detach() for name, value in folded.state_dict().items()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("bases")

    def base(family: str) -> Path:
        if not (folder / family).exists():
            fresh(family).save_pretrained(folder / family)
        return folder / family

    return base


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_the_sum_is_exact_and_ranks_add_up() -> None:
    experts = [drawn("a", 2, 0, 0.5), drawn("b", 3, 1, 2.0), drawn("c", 1, 2)]
    deltas = [change(adapter) for adapter in experts]
    method = LoraArithmetic(weights=(1, -2, 0.5), scale=0.7)
    close(result(method, experts), 0.7 * (deltas[0] - 2 * deltas[1] + 0.5 * deltas[2]))
    assert method.rank_made("m", [2, 3, 1], (9, 7)) == 6
    mean = LoraArithmetic(weights=(1, 2, 1), aggregate="mean")
    close(result(mean, experts), (deltas[0] + 2 * deltas[1] + deltas[2]) / 4)
    forgetting = LoraArithmetic(weights=(1, -2, -1), aggregate="mean")
    close(result(forgetting, experts), (deltas[0] - 2 * deltas[1] - deltas[2]) / 4)
    close(result(LoraArithmetic(weights=(-3,), aggregate="mean"), experts[:1]), -deltas[0])


@pytest.mark.parametrize("rank", [1, 2, 4, 6, 7, 50])
def test_the_cut_is_the_nearest_adapter_and_its_error_is_said(rank: int) -> None:
    experts = [drawn("a", 3, 0), drawn("b", 4, 1, 2.0)]
    whole = change(experts[0]) + change(experts[1])
    method = LoraArithmetic(rank=rank)
    shapes = {"m.weight": TensorInfo("F32", (9, 7))}
    ((target, combined),) = combined_modules(method, experts, shapes)
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    close(combined.up @ combined.down, left[:, :rank] * values[:rank] @ right[:rank])
    wanted = float(values[rank:].norm() / values.norm())
    assert method.total({target: combined.numbers})["error"] == pytest.approx(wanted, abs=1e-9)
    close(combined.up.norm(dim=0), combined.down.norm(dim=1))


def test_a_module_that_some_do_not_have() -> None:
    """Its ranks are those of the others; a mean divides by all."""
    draw = torch.Generator().manual_seed(0)
    pair = (torch.randn(2, 5, generator=draw), torch.randn(4, 2, generator=draw))
    experts = [drawn("a", 2, 0), expert("b", 2.0, m=(torch.ones(1, 7), torch.ones(9, 1)), n=pair)]
    close(result(LoraArithmetic(aggregate="mean"), experts, "n.weight"), change(experts[1], "n.weight") / 2)
    close(result(LoraLego(), experts, "n.weight"), change(experts[1], "n.weight"))
    close(result(LoraArithmetic(), experts), change(experts[0]) + change(experts[1]))


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SpecError, match="weights: 2 given for 3 experts"):
        LoraArithmetic(weights=(1, 2)).validate_count(3)
    with pytest.raises(SpecError, match="all are 0"):
        LoraArithmetic(weights=(0, 0), aggregate="mean").validate_count(2)
    LoraArithmetic(weights=(1, -1)).validate_count(2)


# --- LEGO -------------------------------------------------------------------------------------------------------------


def test_worked_numbers() -> None:
    """specs 5(g): one unit each, B = [2, 0] both, s = 1, k = 1."""
    up = torch.tensor([[2.0], [0.0]])
    experts = [expert("a", m=(torch.tensor([[1.0, 0]]), up)), expert("b", m=(torch.tensor([[0.8, 0.6]]), up))]
    actual = result(LoraLego(rank=1), experts)
    close(actual, torch.tensor([[1.83673, 0.61224], [0, 0]], dtype=torch.float64), 1e-5)
    shapes = {"m.weight": TensorInfo("F32", (2, 2))}
    combined = dict(combined_modules(LoraLego(rank=1), experts, shapes))["m.weight"]
    close(combined.down, torch.tensor([[0.90914, 0.30305]], dtype=torch.float64), 1e-5)
    close(combined.up, torch.tensor([[2.02031], [0]], dtype=torch.float64), 1e-5)
    for reweight in ("max", "none"):  # the largest magnitude of both, and of the centroid, is 2
        actual = result(LoraLego.model_validate({"rank": 1, "reweight": reweight}), experts)
        close(actual, torch.tensor([[1.8, 0.6], [0, 0]], dtype=torch.float64), 1e-6)
    doubled = [expert("a", m=(torch.tensor([[1.0, 0]]), up)), expert("b", m=(torch.tensor([[4.0, 3]]), up))]
    actual = result(LoraLego(rank=1, reweight="max", output="none"), doubled)
    ratio = (2 + 4) / 2 / 2.5  # magnitudes 2 and 4, of the centroid [2.5, 1.5, 2, 0] 2.5
    close(actual, torch.tensor([[5.0, 3.0], [0, 0]], dtype=torch.float64) * ratio**2, 1e-6)


def test_all_units_kept_is_the_sum_and_with_the_paper_s_factor_the_sum_over_the_root() -> None:
    experts = [drawn("a", 3, 0, 0.5), drawn("b", 3, 1, 2.0), drawn("c", 3, 2)]
    whole = sum(change(adapter) for adapter in experts)
    assert isinstance(whole, Tensor)
    close(result(LoraLego(rank=9, output="none"), experts), whole)
    close(result(LoraLego(rank=9), experts), whole / 3**0.5)


def copies(flipped: bool = False, scaled: bool = False) -> list[AdapterExpert]:
    """One adapter four times, its units in other orders; with other signs; with other balances of the two factors."""
    draw = torch.Generator().manual_seed(5)
    down, up = torch.randn(4, 7, generator=draw), torch.randn(9, 4, generator=draw)
    actual = []
    for number in range(4):
        order = torch.randperm(4, generator=draw)
        signs = torch.where(torch.rand(4, generator=draw) < 0.5, -1.0, 1.0) if flipped else torch.ones(4)
        ratio = 2 ** torch.randint(-2, 3, (4,), generator=draw).float() if scaled else torch.ones(4)
        factor = (signs * ratio)[:, None]
        actual.append(expert(f"{number}", 1.5, m=(down[order] * factor, up[:, order] / factor.T)))
    return actual


@pytest.mark.parametrize("gauge", ["as_given", "canonical"])
def test_shuffled_copies_are_the_adapter(gauge: Any) -> None:
    experts = copies()
    close(result(LoraLego(gauge=gauge), experts), change(experts[0]))
    mean = torch.stack([change(adapter) for adapter in experts]).mean(0)
    close(mean, change(experts[0]))


def test_the_gauge_does_not_matter_in_canonical_form() -> None:
    """Copies with other signs and balances: 'canonical' gives the adapter, clustering them as given does not."""
    for flipped, scaled in ((True, False), (False, True), (True, True)):
        experts = copies(flipped, scaled)
        wanted = change(experts[0])
        close(result(LoraLego(gauge="canonical"), experts), wanted)
        as_given = result(LoraLego(), experts)
        assert float((as_given - wanted).norm() / wanted.norm()) > 0.05


def test_noisy_copies_at_right_angles_to_the_pool_keep_their_signs() -> None:
    """One strong unit is the pool's leading direction; of the others, at right angles to it, that says nothing."""
    draw = torch.Generator().manual_seed(1)
    down = torch.linalg.qr(torch.randn(12, 12, generator=draw))[0][:6]
    up = torch.linalg.qr(torch.randn(10, 10, generator=draw))[0][:, :6]
    strength = torch.tensor([30.0, 1, 1, 1, 1, 1])
    experts = []
    for number in range(5):
        signs = torch.where(torch.rand(6, generator=draw) < 0.5, -1.0, 1.0)[:, None]
        noise = 0.02 * torch.randn(6, 12, generator=draw)
        experts.append(expert(f"{number}", m=((down + noise) * signs * strength[:, None], up * signs.T)))
    wanted = (up[:, 1:] @ down[1:]).double()
    weak = up[:, 1:].double() @ up[:, 1:].double().T

    def error(gauge: Any) -> float:
        actual = weak @ result(LoraLego(gauge=gauge), experts)
        return float((actual - wanted).norm() / wanted.norm())

    assert error("canonical") < 0.05
    assert error("as_given") > 0.3


def test_untrained_modules_and_few_units() -> None:
    """B = 0 as adapters start: those units do not bend the others. None left, and fewer distinct than clusters: zeros."""
    untrained = expert("b", m=(torch.randn(3, 7), torch.zeros(9, 3)))
    adapter = drawn("a", 3, 0)
    close(result(LoraLego(), [adapter, untrained]), change(adapter))
    assert not result(LoraLego(), [untrained]).any()
    assert not result(LoraLego(gauge="canonical"), [untrained]).any()
    twice = expert("c", m=(torch.ones(3, 7), torch.ones(9, 3)))
    actual = result(LoraLego(rank=2), [twice])  # three equal units, two clusters asked for: one centroid, and a zero
    close(actual, torch.ones(9, 7, dtype=torch.float64) * (3 / 2) ** 0.5)


def test_more_clusters_than_units_is_refused_by_name() -> None:
    with pytest.raises(SpecError, match=r"rank 7 is more than the 6 units.*'m'"):
        result(LoraLego(rank=7), [drawn("a", 3, 0), drawn("b", 3, 1)])


def test_clusters_depend_on_seed_and_module_alone() -> None:
    experts = [drawn("a", 6, 0), drawn("b", 6, 1), drawn("c", 6, 2)]
    first = result(LoraLego(rank=5), experts)
    assert torch.equal(first, result(LoraLego(rank=5), experts))
    seeds = {float(result(LoraLego(rank=5, restarts=1, seed=seed), experts)[0, 0]) for seed in range(8)}
    assert len(seeds) > 1


# --- files ------------------------------------------------------------------------------------------------------------


def two(base: Path, folder: Path) -> list[Path]:
    """Two adapters of other ranks, scalings and targets."""
    first, _ = adapted("llama", base, folder / "one", seed=1, **KINDS["rslora"][1])
    second, _ = adapted("llama", base, folder / "two", seed=2, target_modules=["q_proj", *FEED_FORWARD], r=4,
                        lora_alpha=6, rank_pattern={"down_proj": 2})  # fmt: skip
    return [first, second]


def test_what_is_made_is_an_adapter_that_peft_loads(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("llama")
    experts = experts_named(two(base, tmp_path))
    recipe = {"base": base, "experts": experts}
    merge_into({"method": "task_arithmetic", "scale": 1.0, **recipe}, tmp_path / "dense")
    actual = merge_into({"method": "lora_arithmetic", **recipe}, tmp_path / "out")
    wanted = weights(tmp_path / "dense")
    for name, value in loaded("llama", base, tmp_path / "out").items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == sorted([*ATTENTION, *FEED_FORWARD])
    assert config["base_model_name_or_path"] and config["task_type"] == "CAUSAL_LM"
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (7, 32)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "mergeloom.yaml",
    ]  # fmt: skip
    assert merge_into({"method": "lora_arithmetic", **recipe}, tmp_path / "again").digest == actual.digest
    # And it is an expert like any other.
    merge_into({"method": "average", "base": base, "experts": [tmp_path / "out"]}, tmp_path / "folded")
    for name, value in weights(tmp_path / "folded").items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


def test_the_command_says_the_error_of_a_cut(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("llama")
    experts = experts_named(two(base, tmp_path))
    recipe = {"method": "lora_arithmetic", "rank": 2, "base": base, "experts": experts, "dtype": "bfloat16"}
    said = command(tmp_path, recipe)
    assert said.exit_code == 0 and "was lost by the cut" in said.output
    assert "Relative error of the cut" in (tmp_path / "out/README.md").read_text()
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert {value.shape[0] for name, value in tensors.items() if "lora_A" in name} == {2}


def test_select_leaves_modules_out(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("llama")
    recipe = {
        "method": "lora_lego",
        "base": base,
        "experts": two(base, tmp_path)[:1],
        "select": [{"names": "*q_proj*"}],
    }
    merge_into(recipe, tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]
    recipe["select"] = [{"names": "*q_proj*", "layers": [1, 1]}]
    merge_into(recipe, tmp_path / "one-layer")
    config = json.loads((tmp_path / "one-layer/adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    before, after = weights(base), loaded("llama", base, tmp_path / "one-layer")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "model.layers.1.self_attn.q_proj.weight"
    }


def test_full_checkpoints_are_refused_by_name(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("llama")
    adapter, folded = adapted("llama", base, tmp_path, **KINDS["plain"][1])
    for name in MAKING:
        experts = [{"source": adapter, "name": "a"}, {"source": folded, "name": "whole"}]
        with pytest.raises(SpecError, match=r"'whole' is a full checkpoint.*extract-lora"):
            merge_into({"method": name, "base": base, "experts": experts}, tmp_path / "out")
        with pytest.raises(SpecError, match="makes an adapter of adapters"):
            merge(MAKING[name](), base={"m": torch.ones(2, 2)}, experts=[{"m": torch.ones(2, 2)}])
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


def test_two_ways_of_keeping_weights_are_refused() -> None:
    experts = [drawn("a", 2, 0), expert("b", transposed=True, m=(torch.ones(1, 9), torch.ones(7, 1)))]
    from mergecore.checkpoints.adapters import is_transposed

    with pytest.raises(MismatchError, match="'b' has fan_in_fan_out=true and 'a' has not"):
        is_transposed(experts)


def test_patterns_for_modules_of_another_rank() -> None:
    """PEFT reads each rank back: the usual one, and those of the modules named."""
    base = {f"layers.{n}.{leaf}.weight": TensorInfo("F32", (4, 4)) for n in (1, 11) for leaf in ("q", "k")}
    config = adapter_config(
        {"layers.1.q.weight": 3, "layers.11.q.weight": 2, "layers.1.k.weight": 2}, base, [{}], False
    )
    assert config["r"] == 2 and config["lora_alpha"] == 2 and config["task_type"] is None
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"layers\.1\.q": 3}
    assert config["target_modules"] == ["layers.1.k", "q"]
    assert own_factor("layers.1.q.weight", False).down == "base_model.model.layers.1.q.lora_A.weight"


def test_in_a_sweep_the_model_is_the_base_plus_the_adapter(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """The steps of a cell: the adapter, cached; and a dense model, the one that PEFT makes of the written adapter."""
    base, experts = bases("llama"), two(bases("llama"), tmp_path)
    pool = resolve_pool(
        BaseSpec(source=str(base)),
        [ExpertSpec(source=str(path), name=f"e{number}") for number, path in enumerate(experts)],
        None, find, silent,
    )  # fmt: skip
    place = place_in(tmp_path / "store", pool)
    drop = {"kind": "random", "rate": 0.3, "seed": 1}
    for name, values in (
        ("lora_lego", {"gauge": "canonical"}),
        ("lora_arithmetic", {"rank": 3, "weights": [1, 2]}),
        ("lora_ties", {"of": "update", "density": 1, "drop": drop}),
        ("lora_knots", {"density": 0.4, "drop": drop}),
        ("lora_core_space", {"merge": "ties", "density": 0.5, "rank": 2}),
    ):
        plan = merge_plan(pool, name, **values)
        done = run_for(place, plan)
        assert not done.failures and len(done.steps) == 2
        assert [adapter.step.kind for adapter in plan.inputs["adapter"]] == ["adapter"]
        folder = place.store.folder(plan.inputs["adapter"][0].step)
        merge_into({"method": name, **values, "base": base, "experts": experts_named(experts)}, tmp_path / name)
        assert (folder / "adapter_model.safetensors").read_bytes() == (
            tmp_path / name / "adapter_model.safetensors"
        ).read_bytes()
        record = place.store.record(plan.step)
        assert record is not None
        actual = open_files(
            place.store.folder(plan.step), [file for file in record.files if file.endswith(".safetensors")]
        )
        for tensor, wanted in loaded("llama", base, tmp_path / name).items():
            torch.testing.assert_close(actual.read(tensor).view(wanted.shape), wanted, rtol=1e-5, atol=1e-6)
        place.store.drop(plan.step)
        assert run_for(place, plan).steps == [plan.step.name], "the adapter is there still"


def experts_named(experts: Sequence[Path]) -> list[dict[str, Any]]:
    return [{"source": path, "name": f"e{number}"} for number, path in enumerate(experts)]


# --- registered ---------------------------------------------------------------------------------------------------------


def test_a_sweep_registers_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter that the recipe on the card makes, as PEFT loads it; the dense model, once measured, is let go."""
    import mergecore.sweeps.complete

    base = tiny_lm.write_base(tmp_path / "base")
    experts = [tiny_lm.write_adapter(base, tmp_path / f"e{seed}", seed) for seed in (1, 2)]
    spec = {
        "name": "adapters", "base": {"source": str(base), "known_as": "tiny"}, "counts": [2],
        "experts": [{"name": adapter.name, "source": str(adapter), "tasks": ["tiny_choice"]} for adapter in experts],
        "methods": [{"method": "lora_arithmetic", "rank": 2, "aggregate": "mean"}],
        "evaluate": {
            "path": str(tiny_lm.write_tasks(tmp_path / "tasks", items=4)), "held_in": {"choice": ["tiny_choice"]},
            "limit": 2, "batch_size": 4, "dtype": "float32",
        },
        "output": {"store": str(tmp_path / "store"), "dtype": "bfloat16", "register": {"name": "r"}},
    }  # fmt: skip
    swept = opened(spec)
    cell = next(adapter for adapter in swept.plan.cells if adapter.method == "lora_arithmetic")
    monkeypatch.setattr(mergecore.sweeps.complete, "winner", lambda frontier, sweep: Winner(cell.id, "test"))
    assert not swept.run().failures
    record = swept.registered()
    assert record is not None and record["cell"] == cell.id
    folder = Path(record["uri"].removeprefix("file://"))
    assert sorted(path.name for path in folder.iterdir() if path.name != RECORD) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    card = (folder / "README.md").read_text()
    assert "Relative error of the cut to the rank" in card and "| held_in_raw |" in card
    recipe = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    again = merge_into(recipe, tmp_path / "again")
    assert again.digest == record["digest"]
    weights_file = "adapter_model.safetensors"
    assert (folder / weights_file).read_bytes() == (tmp_path / "again" / weights_file).read_bytes()
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    model = AutoModelForCausalLM.from_pretrained(base)
    assert PeftModel.from_pretrained(model, str(folder)).peft_config["default"].r == 2  # type: ignore[arg-type]
    assert swept.store.state(cell.model) is State.DROPPED
    assert swept.run().steps == [], "and nothing is missing"

    swept.store.drop(cell.merge.published.step)  # type: ignore[union-attr]
    for path in folder.parent.glob("*"):
        shutil.rmtree(path)
    lost = opened(spec)
    done = lost.run()
    assert not done.failures and any(step.startswith("lora_arithmetic") for step in done.steps), "made again"
    assert lost.registered()["digest"] == record["digest"]  # type: ignore[index]
