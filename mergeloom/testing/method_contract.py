"""What every method promises: a method is tried with every set of values that its `examples()` names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergecore.engine.kernels.run as kernels
import mergecore.engine.pass_plan as passes
import mergecore.engine.windows as reading
import mergecore.recipes.in_memory as merging
from mergecore import merge
from mergecore.engine import loops
from mergecore.engine.executor import InProcess
from mergecore.engine.kernels.run import Fused
from mergecore.errors import NonFiniteError, SpecError
from mergecore.native.library import library_in
from mergecore.plugins.block import Per
from mergecore.plugins.method import Method
from mergeloom.testing.grid import set_grid
from mergeloom.testing.variants import IDS, Model, accepted, asked_for, data_statistics, methods_of, same, variants


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Try every method that was asked for with every set of values it names."""
    if "method" in metafunc.fixturenames:
        equal = metafunc.function is test_equal_experts_give_the_expert
        tried = [variant for kind in methods_of(asked_for(metafunc.config)) for variant in variants(kind, usual=equal)]
        if equal:
            tried = [variant for variant in tried if variant.values[0].idempotent]
        metafunc.parametrize("method", tried)


def models(dtype: torch.dtype = torch.float32) -> tuple[Model, list[Model]]:
    """A base and three experts: a matrix, a convolution, a vector, a scalar, an empty tensor and an integer buffer."""
    generator = torch.Generator().manual_seed(1)

    def drawn(scale: float) -> Model:
        shapes: dict[str, tuple[int, ...]] = {
            "layers.0.m": (37, 19), "layers.1.conv": (3, 4, 3, 3), "v": (11,), "s": (), "empty": (0, 4),
        }  # fmt: skip
        model = {name: (torch.randn(shape, generator=generator) * scale).to(dtype) for name, shape in shapes.items()}
        return {**model, "count": torch.arange(5)}

    base = drawn(1.0)
    experts = []
    for _ in range(3):
        change = drawn(0.1)
        experts.append({n: (base[n] + change[n]).to(dtype) if base[n].is_floating_point() else base[n] for n in base})
    return base, experts


def merged(
    method: Method,
    base: Mapping[str, Tensor],
    experts: list[dict[str, Tensor]],
    ids: list[str] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    experts = experts[: accepted(method, len(experts))]
    statistics = data_statistics(method, experts)
    return merge(method, base=base, experts=experts, ids=(ids or IDS)[: len(experts)], statistics=statistics, **options)


def test_parameters_survive_json(method: Method) -> None:
    assert type(method).model_validate(json.loads(json.dumps(method.parameters()))) == method


def test_unknown_parameters_are_refused(method: Method) -> None:
    with pytest.raises(ValueError, match="extra"):
        type(method).model_validate({**method.parameters(), "no_such_parameter": 1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_dtypes_and_inputs_are_kept(method: Method, dtype: torch.dtype) -> None:
    base, experts = models(dtype)
    before = [{n: t.clone() for n, t in model.items()} for model in (base, *experts)]
    result = merged(method, base, experts)
    written = {n: (t.shape, t.dtype) for n, t in result.items() if method.product == "model" or n in base}
    assert written == {n: (t.shape, t.dtype) for n, t in base.items()}
    assert all(same(old, new) for old, new in zip(before, (base, *experts), strict=True))
    assert torch.equal(result["count"], base["count"])


def test_same_bytes_twice_for_any_chunk_and_order(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = models()
    first = merged(method, base, experts)
    assert same(first, merged(method, base, experts))
    for chunk in (7, 64):
        monkeypatch.setattr(kernels, "EAGER", chunk)
        monkeypatch.setattr(reading, "WINDOWS", (3 * chunk, 3 * chunk))
        assert same(first, merged(method, base, experts))
    turned = {name: base[name] for name in reversed(base)}
    assert same(first, merged(method, turned, experts))
    if method.ordered:
        assert same(first, merged(method, base, experts, ["z", "y", "x"]))
        return
    order = [position for position in (2, 0, 1) if position < accepted(method)]
    assert same(first, merged(method.bound(order), base, [experts[p] for p in order], [IDS[p] for p in order]))


def test_element_by_element_means_a_loop(method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an element-wise method of ours does of elements can be one loop. Others may be slower."""
    library, fusings = library_in(tmp_path), list[Fused]()
    if library.compiler is None:
        pytest.skip("no C++ compiler")

    class Kept(Fused):
        def __init__(self, *values: Any, **named: Any) -> None:
            super().__init__(*values, **named)
            fusings.append(self)

    monkeypatch.setattr(loops, "Fused", Kept)
    merged(method, *models(), library=library)
    merging_loops = [fused for fused in fusings if fused.out not in ("counts", "sums")]
    assert bool(merging_loops) == (method.per is Per.ELEMENT)
    problems = [fused.problem for fused in fusings if fused.problem]
    if problems and not type(method).__module__.startswith("mergecore."):
        pytest.skip(f"works, but in single torch operations, which is slower: {problems[0]}")
    assert not problems
    assert all(loop is not None for fused in fusings for loop in fused.loops.values())


def test_spans_and_workers_do_not_matter(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes, for one span a unit, in another order, on two threads."""
    base, experts = models()
    first = merged(method, base, experts)
    monkeypatch.setattr(merging, "plan_spans", lambda tensors, per: passes.plan_spans(tensors, per, size=1)[::-1])
    assert same(first, merged(method, base, experts))
    monkeypatch.setattr(merging, "InProcess", lambda workers=2: InProcess(workers))
    assert same(first, merged(method, base, experts))


def test_blocks_of_the_grid_do_not_matter(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Element-wise results do not depend on the grid; only float64 sums do, and they only through l1 rescaling."""
    base, experts = models()
    first = merged(method, base, experts)
    set_grid(monkeypatch, 64)
    monkeypatch.setattr("mergecore.arithmetic.linear_algebra.BLOCK", 64)
    second = merged(method, base, experts)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=1e-7)


def test_equal_experts_give_the_expert(method: Method) -> None:
    base, experts = models(torch.bfloat16)
    result = merged(method, base, [experts[0]] * 3)
    assert same(result, {name: experts[0][name] for name in base})


def test_a_single_expert(method: Method) -> None:
    base, experts = models()
    single = method.bound([0])
    if not accepted(single, 1):
        with pytest.raises(SpecError, match=method.name):
            merge(single, base=base, experts=experts[:1])
        return
    result = merged(single, base, experts[:1], ["a"])
    assert all(torch.isfinite(value).all() for value in result.values() if value.is_floating_point())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused_by_name(method: Method, bad: float) -> None:
    base, experts = models()
    last = accepted(method) - 1
    experts[last]["layers.1.conv"] = experts[last]["layers.1.conv"].clone()
    experts[last]["layers.1.conv"].view(-1)[3] = bad
    if data_statistics(method, experts):  # what it knows of the expert does not fit one that is not finite
        statistics = data_statistics(method, models()[1])
        with pytest.raises(NonFiniteError, match="conv"):
            merge(method, base=base, experts=experts, statistics=statistics)
        return
    with pytest.raises(NonFiniteError, match=rf"expert '{last}'.*conv"):
        merged(method, base, experts)
