"""The edges that every method must stand: nothing changed, equal experts, odd shapes, other dtypes and layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from mergecore import merge
from mergecore.plugins.method import Method
from mergecore.tensors.masked import MaskedModel
from mergecore.tensors.memory import MemoryTensors
from mergeloom.testing.variants import IDS, Model, accepted, asked_for, data_statistics, methods_of, same, variants

AT_MOST = 3
"""Sets of values of a method that are tried here: all of them would take minutes and meet the same edges."""
SHAPES: dict[str, tuple[int, ...]] = {
    "layers.0.matrix": (6, 5), "layers.1.matrix": (6, 5), "conv": (3, 2, 3, 3), "vector": (9,), "scalar": (),
    "row": (1, 7), "column": (7, 1), "single": (1,), "empty": (0, 3),
}  # fmt: skip


def chosen(kind: type[Method]) -> list[Any]:
    """Return of a method's variants the first, the last, and one between, as parameters for pytest."""
    tried = variants(kind, usual=True)
    return [tried[place] for place in sorted({round(n * (len(tried) - 1) / (AT_MOST - 1)) for n in range(AT_MOST)})]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Try every method that was asked for with some of the sets of values it names."""
    if "method" in metafunc.fixturenames:
        metafunc.parametrize(
            "method", [variant for kind in methods_of(asked_for(metafunc.config)) for variant in chosen(kind)]
        )


def drawn(seed: int, scale: float, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Model:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) * scale for name, shape in shapes.items()}


def models(
    dtype: torch.dtype = torch.bfloat16, shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> tuple[Model, list[Model]]:
    base = {name: value.to(dtype) for name, value in drawn(0, 1.0, shapes).items()}
    changes = [drawn(seed, 0.1, shapes) for seed in (1, 2, 3)]
    return base, [{name: (base[name] + change[name]).to(dtype) for name in base} for change in changes]


def merged(method: Method, base: Model, experts: Sequence[Model]) -> Model:
    count = min(accepted(method), len(experts))
    statistics = data_statistics(method, experts[:count])
    return merge(method, base=base, experts=experts[:count], ids=IDS[:count], statistics=statistics)


def outcomes(method: Method, result: Model, base: Model) -> list[Model]:
    """The merged model, or every task's where the product is masks; nothing of other products."""
    if method.product != "masks":
        return [result] if method.product == "model" else []
    source = MemoryTensors(result)
    infos = {name: source.tensors[name] for name in base}
    rows = range(next(value.shape[0] for name, value in result.items() if name.startswith("mask/")))
    return [{name: MaskedModel(source, row, infos).read(name).view(base[name].shape) for name in base} for row in rows]


def finite(model: Model) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in model.values() if value.is_floating_point())


# --- task vectors that are equal, or nothing ------------------------------------------------------------------------


def test_experts_that_changed_nothing_give_the_base(method: Method) -> None:
    base, _ = models()
    for result in outcomes(method, merged(method, base, [base] * 3), base):
        assert same(result, base)


def test_identical_experts(method: Method) -> None:
    base, experts = models()
    for result in outcomes(method, merged(method, base, [experts[0]] * 3), base):
        assert finite(result)


def test_frozen_tensors_stay(method: Method) -> None:
    """A whole tensor, and a row of another, that no expert changes."""
    base, experts = models()
    for expert in experts:
        expert["layers.0.matrix"] = base["layers.0.matrix"]
        expert["vector"] = base["vector"]
        expert["layers.1.matrix"] = torch.cat([base["layers.1.matrix"][:1], expert["layers.1.matrix"][1:]])
    for result in outcomes(method, merged(method, base, experts), base):
        assert torch.equal(result["layers.0.matrix"], base["layers.0.matrix"])
        assert torch.equal(result["vector"], base["vector"])
        assert finite(result)


def test_one_expert_that_changed_nothing_among_others(method: Method) -> None:
    base, experts = models()
    for result in outcomes(method, merged(method, base, [base, *experts[1:]]), base):
        assert finite(result)


# --- tensors of other kinds -----------------------------------------------------------------------------------------


def test_integers_and_bools_are_the_bases(method: Method) -> None:
    base, experts = models(torch.float32)
    plain = merged(method, base, experts)
    buffers = {
        "steps": torch.tensor(7), "ids": torch.arange(6, dtype=torch.int32), "mask": torch.tensor([True, False]),
        "bytes": torch.tensor([1, 255], dtype=torch.uint8), "small": torch.tensor([-3], dtype=torch.int8),
    }  # fmt: skip
    others = {name: value + 1 if value.dtype != torch.bool else ~value for name, value in buffers.items()}
    result = merged(method, {**base, **buffers}, [{**expert, **others} for expert in experts])
    assert same({name: result[name] for name in buffers}, buffers)
    assert same({name: result[name] for name in plain}, plain), "they take no part in any count"


def test_dtypes_may_be_mixed_and_those_of_the_base_are_kept(method: Method) -> None:
    base, experts = models(torch.bfloat16)
    kinds = {"layers.0.matrix": torch.float32, "conv": torch.float16, "scalar": torch.float64}
    mixed = {name: value.to(kinds.get(name, value.dtype)) for name, value in base.items()}
    result = merged(method, mixed, experts)
    assert {name: result[name].dtype for name in base} == {name: value.dtype for name, value in mixed.items()}
    widened = [{name: value.float() for name, value in expert.items()} for expert in experts]
    assert same(result, merged(method, mixed, widened)), "what an expert is kept in decides no number"
    assert all(finite(outcome) for outcome in outcomes(method, result, mixed))


def test_a_model_without_matrices(method: Method) -> None:
    base, experts = models(torch.float32, {"scalar": (), "single": (1,), "layers.0.vector": (5,)})
    result = merged(method, base, experts)
    assert {name: result[name].shape for name in base} == {name: value.shape for name, value in base.items()}
    assert all(finite(outcome) for outcome in outcomes(method, result, base))


def test_convolutions_in_any_layout_of_memory(method: Method) -> None:
    base, experts = models(
        torch.float32, {"conv": (4, 3, 2, 2), "layers.0.depthwise": (4, 1, 3, 3), "temporal": (2, 3, 5)}
    )
    turned = [
        {name: value.transpose(0, -1).contiguous().transpose(0, -1) for name, value in model.items()}
        for model in (base, *experts)
    ]
    assert not turned[0]["conv"].is_contiguous()
    result = merged(method, base, experts)
    assert same(result, merged(method, turned[0], turned[1:]))
    assert all(finite(outcome) for outcome in outcomes(method, result, base))
