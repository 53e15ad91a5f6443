"""`lora_linear` and `lora_ties` against PEFT's own `add_weighted_adapter`, and numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from mergecore import merge
from mergecore.arithmetic.low_rank import largest
from mergecore.checkpoints.experts import AdapterExpert, Factor
from mergecore.errors import SpecError
from mergecore.identity.draws import drop_limit, random_key, random_words
from mergecore.methods import LoraArithmetic, LoraLinear, LoraTies, RandomDrop, TaskArithmetic
from mergecore.plugins.adapter_method import AdapterMethod, combined_modules, ranks_made
from mergecore.tensors.memory import MemoryTensors
from mergecore.tensors.source import TensorInfo
from tests.methods.test_adapter_methods import change, close, drawn, expert, result

SHAPES = {"first": (12, 9), "second": (7, 12)}
RANK = 4
SELECTION = {f"{module}.weight": TensorInfo("F32", shape) for module, shape in SHAPES.items()}
NAMES = ("x", "y", "z")


def with_adapters(names: Sequence[str] = NAMES) -> PeftModel:
    """Two linear layers with trained adapters of one rank and several scalings, of which the last has one module."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleDict({name: torch.nn.Linear(columns, rows) for name, (rows, columns) in SHAPES.items()})
    layers.config = {}  # PEFT asks every model for one
    model: PeftModel | None = None
    for number, name in enumerate(names):
        targets = list(SHAPES)[: 1 if name == "z" else 2]
        config = LoraConfig(r=RANK, lora_alpha=3 + 5 * number, use_rslora=number == 1, target_modules=targets)
        if model is None:
            model = get_peft_model(layers, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = torch.randn(value.shape)
    return model


def layers_of(model: PeftModel) -> dict[str, LoraLayer]:
    return {
        name.rpartition(".")[2]: layer
        for name, layer in model.base_model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def experts_of(model: PeftModel, names: Sequence[str] = NAMES) -> list[AdapterExpert]:
    experts = []
    for name in names:
        tensors: dict[str, Tensor] = {}
        factors = {}
        for module, layer in layers_of(model).items():
            if name in layer.lora_A:
                tensors[f"{module}.A"] = layer.lora_A[name].weight.detach().clone()
                tensors[f"{module}.B"] = layer.lora_B[name].weight.detach().clone()
                factors[f"{module}.weight"] = Factor(f"{module}.A", f"{module}.B", layer.scaling[name], False)
        shapes = {target: SHAPES[target.removesuffix(".weight")] for target in factors}
        experts.append(AdapterExpert(name, name, MemoryTensors(tensors), factors, shapes))
    return experts


def compare(model: PeftModel, method: AdapterMethod, factors: bool) -> None:
    """What the method makes is the adapter 'joined' of the model: its factors, or its update."""
    for target, combined in combined_modules(method, experts_of(model), SELECTION):
        layer = layers_of(model)[target.removesuffix(".weight")]
        assert layer.scaling["joined"] == 1
        if factors:
            close(combined.down, layer.lora_A["joined"].weight.detach().double(), 1e-6)
            close(combined.up, layer.lora_B["joined"].weight.detach().double(), 1e-6)
        close(combined.up @ combined.down, layer.get_delta_weight("joined").detach().double(), 2e-5)


WEIGHTS = [(1.0, 1.0, 1.0), (0.5, -1.25, 2.0)]
DENSITIES = [0.2, 0.5, 0.73, 1.0]


@pytest.mark.parametrize("of", ["factors", "update"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=["equal", "signed"])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_magnitude_prune_and_ties_are_peft_s(of: Any, weights: tuple[float, ...], density: float) -> None:
    suffix, kept = ("", {}) if of == "factors" else ("_svd", {"svd_rank": 3})
    rank = kept.get("svd_rank")
    cases: list[tuple[str, AdapterMethod, dict[str, Any]]] = [
        ("magnitude_prune", LoraLinear(weights=weights, density=density, of=of, rank=rank), {}),
        ("ties", LoraTies(weights=weights, density=density, of=of, rank=rank), {}),
        (
            "ties",
            LoraTies(weights=weights, density=density, of=of, rank=rank, majority="frequency"),
            {"majority_sign_method": "frequency"},
        ),
    ]
    for kind, method, values in cases:
        model = with_adapters()
        model.add_weighted_adapter(
            list(NAMES), list(weights), "joined", combination_type=kind + suffix, density=density, **values, **kept
        )
        compare(model, method, of == "factors")


@pytest.mark.parametrize("weights", WEIGHTS, ids=["equal", "signed"])
def test_linear_svd_and_cat_are_peft_s(weights: tuple[float, ...]) -> None:
    cases: list[tuple[str, AdapterMethod]] = [
        ("linear", LoraLinear(weights=weights)),
        ("svd", LoraLinear(weights=weights, of="update")),
        ("cat", LoraArithmetic(weights=weights)),
    ]
    for kind, method in cases:
        model = with_adapters()
        model.add_weighted_adapter(list(NAMES), list(weights), "joined", combination_type=kind)
        if kind == "cat":  # there the rank is all experts' also where one of them lacks the module
            for target, combined in combined_modules(method, experts_of(model), SELECTION):
                wanted = layers_of(model)[target.removesuffix(".weight")].get_delta_weight("joined").detach().double()
                close(combined.up @ combined.down, wanted, 2e-5)
        else:
            compare(model, method, kind == "linear")


@pytest.mark.parametrize("scaling", [1.0, -1.5])
def test_one_update_of_the_rank_is_that_update(scaling: float) -> None:
    """Updates are rounded to float32, as deltas are."""
    adapter = drawn("one", 4, 0, scaling)
    for method in (LoraLinear(of="update"), LoraTies(density=1, of="update")):
        close(result(method, [adapter]), change(adapter), 1e-6)


def masks(of: str, rate: float, seed: int) -> Iterator[Tensor]:
    """Mergeloom's masks, in the order in which PEFT draws its own."""
    for module, (rows, columns) in SHAPES.items():
        present = NAMES if module == "first" else NAMES[:2]
        parts = (
            [(f"{module}.lora_A.weight", (RANK, columns)), (f"{module}.lora_B.weight", (rows, RANK))]
            if of == "factors"
            else [(f"{module}.weight", (rows, columns))]
        )
        for name, shape in parts:
            for owner in present:
                words = random_words(random_key(seed, owner, name), 0, shape[0] * shape[1])
                yield (words >= drop_limit(rate)).reshape(shape).float()


@pytest.mark.parametrize("of", ["factors", "update"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=["equal", "signed"])
def test_dare_is_peft_s_under_the_same_masks(of: Any, weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    suffix, kept = ("", {}) if of == "factors" else ("_svd", {"svd_rank": 3})
    drop, rank = RandomDrop(rate=0.4, seed=7), kept.get("svd_rank")
    cases: list[tuple[str, AdapterMethod]] = [
        ("dare_linear", LoraLinear(weights=weights, drop=drop, of=of, rank=rank)),
        ("dare_ties", LoraTies(weights=weights, density=1, drop=drop, of=of, rank=rank)),
    ]
    for kind, method in cases:
        drawing = masks(of, 0.4, 7)
        monkeypatch.setattr(torch, "bernoulli", lambda probabilities, drawing=drawing: next(drawing))
        model = with_adapters()
        model.add_weighted_adapter(
            list(NAMES), list(weights), "joined", combination_type=kind + suffix, density=0.6, **kept
        )
        monkeypatch.undo()
        assert next(drawing, None) is None
        compare(model, method, of == "factors")


def test_a_drop_of_updates_has_the_masks_of_a_merge_of_models() -> None:
    """`of: update` at full rank is `task_arithmetic` with the same drop on the folded adapters."""
    experts = [drawn(name, 3, seed, 0.5 + seed) for seed, name in enumerate(NAMES)]
    drop = RandomDrop(rate=(0.2, 0.5, 0.7), seed=4, rescale="l1")
    actual = result(LoraLinear(of="update", rank=7, drop=drop), experts)
    base = {"m.weight": torch.zeros(9, 7)}
    models = [{"m.weight": change(adapter).float()} for adapter in experts]
    wanted = merge(TaskArithmetic(scale=1.0, drop=drop), base=base, experts=models, ids=list(NAMES))["m.weight"]
    close(actual, wanted.double(), 1e-5)


def test_worked_numbers() -> None:
    """Rank one, so that each factor is a row of four numbers; density one half keeps two of them."""
    ones = torch.ones(1, 1)
    first = expert("a", m=(torch.tensor([[4.0, -3, 2, 1]]), ones))
    second = expert("b", 4.0, m=(torch.tensor([[1.0, 5, -6, 2]]), ones))
    # Trimmed [4, −3, 0, 0] and [0, 5, −6, 0]; their sums' signs + + − +. Roots of w·s: 1 and 2, for both factors.
    actual = dict(combined_modules(LoraTies(density=0.5), [first, second], {"m.weight": TensorInfo("F32", (1, 4))}))
    # B has one element, of which half is none: density 0.5 prunes it, as in PEFT. So B is tested with a taller one.
    close(actual["m.weight"].down, torch.tensor([[4.0, 10, -12, 0]], dtype=torch.float64))
    assert not actual["m.weight"].up.any()
    tall = torch.tensor([[3.0], [1.0]])
    experts = [
        expert("a", m=(torch.tensor([[4.0, -3, 2, 1]]), tall)),
        expert("b", 4.0, m=(torch.tensor([[1.0, 5, -6, 2]]), tall)),
    ]
    close(
        result(LoraTies(density=0.5), experts),
        torch.tensor([[(3 + 6) / 2], [0]], dtype=torch.float64)
        @ torch.tensor([[4.0, 10, -12, 0]], dtype=torch.float64),
    )
    close(
        result(LoraLinear(density=0.5), experts),
        torch.tensor([[3 + 6], [0]], dtype=torch.float64) @ torch.tensor([[4.0, 7, -12, 0]], dtype=torch.float64),
    )
    # Of updates: [12, −9, 6, 3; 4, −3, 2, 1] keeps 12, −9, 6 and 4; [12, 60, −72, 24; 4, 20, −24, 8] 60, −72, 24, −24.
    update = np.array([[12.0, 60, -72, 24], [4, 0, -24, 0]])
    close(result(LoraTies(density=0.5, of="update", rank=2), experts), torch.from_numpy(update))


def test_ties_count_where_signs_cancel_and_who_agrees() -> None:
    """The sum decides by mass, the frequency by heads; exact cancellation is positive; weights do not vote."""
    ones = torch.ones(1, 1)
    rows = ([[1.0, -2, 3]], [[1.0, -2, -3]], [[-5.0, 1, 0]])
    experts = [expert(str(n), m=(torch.tensor(row), ones)) for n, row in enumerate(rows)]
    close(result(LoraTies(density=1), experts), torch.tensor([[-5.0, -2, 3]], dtype=torch.float64))
    close(result(LoraTies(density=1, majority="frequency"), experts), torch.tensor([[1.0, -2, 3]], dtype=torch.float64))
    weighted = LoraTies(density=1, weights=(9, 1, 1), of="update", rank=1)
    close(result(weighted, experts), torch.tensor([[-5.0, -10, 27]], dtype=torch.float64))


@pytest.mark.parametrize("density", [0.0, 0.1, 0.34, 0.5, 0.99, 1.0])
def test_the_largest_magnitudes_and_of_equal_ones_the_first(density: float) -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(-3, 4, (7, 9), generator=draw).float()
    order = np.argsort(-np.abs(values.reshape(-1).numpy()), kind="stable")[: int(density * 63)]
    wanted = torch.zeros(63)
    wanted[order] = values.reshape(-1)[order]
    assert torch.equal(largest(values, density), wanted.reshape(7, 9))


def test_what_does_not_fit_is_refused() -> None:
    experts = [drawn("a", 2, 0), drawn("b", 3, 1)]
    for kind in (LoraLinear, LoraTies):
        with pytest.raises(SpecError, match=r"ranks 2, 3 for 'm'.*of: update"):
            ranks_made(kind(), experts, {"m.weight": TensorInfo("F32", (9, 7))})
        with pytest.raises(SpecError, match="keeps the experts' rank"):
            kind(rank=2).validate_count(2)
        with pytest.raises(SpecError, match="weights: 2 given for 3 experts"):
            kind(weights=(1, 2)).validate_count(3)
        with pytest.raises(SpecError, match=r"drop\.rate: 2 given for 3"):
            kind(drop=RandomDrop(rate=(0.1, 0.2))).validate_count(3)
        assert result(kind(of="update"), experts).shape == (9, 7)


def test_values_per_expert_move_with_them() -> None:
    experts = [drawn(name, 3, seed) for seed, name in enumerate(NAMES)]
    values: dict[str, Any] = {
        "weights": (1, -2, 0.5),
        "density": (0.3, 0.6, 0.9),
        "drop": RandomDrop(rate=(0.1, 0.2, 0.3)),
    }
    for kind in (LoraLinear, LoraTies):
        method, order = kind(**values), [2, 0, 1]
        close(result(method, experts), result(method.bound(order), [experts[place] for place in order]))
