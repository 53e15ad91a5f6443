"""What every method promises, from the registry: a new method is tested by being listed there."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergecore.engine.kernels.run as kernels
import mergecore.engine.loops as loops
import mergecore.engine.pass_plan as passes
import mergecore.engine.windows as reading
import mergecore.recipes.in_memory as merging
from mergecore import merge
from mergecore.engine.kernels.run import Fused
from mergecore.errors import MergeloomError, NonFiniteError, SpecError
from mergecore.methods import Della, RandomDrop, Ties
from mergecore.native.library import library_in
from mergecore.plugins.adapter_method import AdapterMethod
from mergecore.plugins.block import Per
from mergecore.plugins.method import Method
from mergecore.plugins.statistic import DataStatistic
from mergecore.registry import METHODS
from tests.grids import set_grid

DROP = {"kind": "random", "rate": 0.4, "rescale": "l1", "seed": 3}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("average", {}),
    ("average", {"weights": [3, 1, 2]}),
    ("average", {"weights": [3, -1, 2], "drop": {**DROP, "rate": [0.4, 0.1, 0.6]}}),
    ("average", {"drop": DROP}),
    ("task_arithmetic", {"scale": 0.7}),
    ("task_arithmetic", {"scale": 0.7, "weights": [1, -0.3, 1.6], "drop": {**DROP, "rate": [0.4, 0.1, 0.6]}}),
    ("task_arithmetic", {"scale": 0.7, "weights": [1, 0.3, 1.6], "aggregate": "mean"}),
    ("task_arithmetic", {"scale": -0.3, "drop": {**DROP, "rescale": "inverse"}}),
    *(
        ("ties", {"density": 0.3, "scale": 0.8, "scope": scope, "aggregate": aggregate, "count": count})
        for scope, aggregate, count in itertools.product(
            ("global", "tensor"), ("mean", "sum", "max"), ("at_least", "exact", "published")
        )
    ),
    ("ties", {"density": [0.2, 0.5, 0.7], "weights": [1, -0.5, 2], "least": 1, "scope": "tensor", "count": "exact"}),
    ("ties", {"density": [0.2, 0.5, 0.7], "weights": [1, 0.5, 2], "drop": {**DROP, "rate": [0.4, 0.1, 0.6]}}),
    ("ties", {"density": 0.5, "drop": DROP, "count": "exact", "zero_sign": "majority"}),
    ("ties", {"density": 0.5, "elect": "normmass", "count": "published"}),
    ("ties", {"density": 0.5, "elect": "normfrac", "drop": DROP}),
    ("fisher", {}),
    ("fisher", {"weights": [1, 0, 2], "normalize": False, "floor": 1e-3}),
    ("slerp", {"t": 0.3}),
    ("slerp", {"t": 0.6, "start": "base", "colinear": 1}),
    ("karcher", {}),
    ("karcher", {"iterations": 50, "tolerance": 1e-8}),
    *(
        ("model_stock", {"angle": angle, "group": group})
        for angle, group in itertools.product(("mean_cosine", "mean_angle"), ("tensor", "filter"))
    ),
    ("model_stock", {"negative": "extrapolate"}),
    ("sce", {}),
    ("sce", {"density": 0.3}),
    *(
        (name, {"scale": 0.8, "rank": rank, "convolutions": convolutions})
        for name, rank, convolutions in itertools.product(
            ("iso_c", "iso_cts", "tsv_m"), ("numerical", "full"), ("mean", "flatten")
        )
    ),
    ("iso_cts", {"common": 0.3, "excluded": ["*.m"]}),
    ("tsv_m", {"crowded": "zero"}),
    ("wudi", {"steps": 20}),
    ("wudi", {"steps": 20, "learning_rate": 1e-3, "convolutions": "flatten", "others": "mean", "transposed": ["*.m"]}),
    ("wudi", {"variant": "closed", "convolutions": "flatten"}),
    ("wudi", {"variant": "closed", "ridge": 0.1, "others": "mean", "excluded": ["*conv"]}),
    ("breadcrumbs", {"scale": 0.4}),
    ("breadcrumbs", {"scale": -0.5, "density": 0.5, "outliers": 0.25, "scope": "row"}),
    (
        "breadcrumbs",
        {
            "scale": 1,
            "density": [0.5, 0.9, 0.2],
            "outliers": [0.1, 0.2, 0],
            "crowded": "fewer",
            "weights": [1, -2, 3],
            "elect": "mass",
            "aggregate": "mean",
            "rescale": "l1",
        },
    ),
    ("della", {"density": 0.5, "window": 0.2, "scale": 0.9}),
    ("della", {"density": [0.5, 0.7, 1], "window": [0.2, 0.1, 0], "weights": [1, -2, 3]}),
    ("della", {"rescale": "l1", "elect": "none", "aggregate": "sum", "seed": 7}),
    ("della", {"rescale": "none", "elect": "none", "density": 1.0, "window": 0}),
    *(("pcb", {"form": form, "density": 0.3, "scale": 1.2}) for form in ("es", "vision", "nlp", "paper")),
    ("pcb", {"scale": [1.3, 0.8, 1], "clip": 0.2}),
    ("consensus", {"scale": 0.5}),
    ("consensus", {"scale": 0.5, "mask_scale": [0.2, 0.6, 0.4], "multi_task": "ties", "density": 0.4}),
    ("consensus", {"scale": 1.0, "multi_task": "ties_published", "minimum_tasks": 1}),
    ("opcm", {}),
    ("opcm", {"share": 1.0, "projection": "strict", "order": [2, 0, 1], "excluded": ["*.m"]}),
    ("layer_swap", {"bottom": 1, "top": 0, "bottom_transition": 0, "top_transition": 0}),
    ("layer_swap", {"bottom": 0, "top": 0, "top_transition": 0, "share": 0.3, "outer": "second", "head": "average"}),
    ("nearswap", {"t": 0.05}),
    ("ram", {}),
    ("ram", {"epsilon": 0.05, "boost": {"rate": 0.5, "most": 3, "scope": "global"}}),
    ("ram", {"epsilon": 0.1, "boost": {"rate": 0.5, "most": 3, "scope": "tensor"}}),
    ("arcee_fusion", {}),
    ("arcee_fusion", {"fence": 0, "smoothing": 0}),
    *(
        ("nuslerp", {"weights": [3, 1], "of": of, "along": along})
        for of, along in itertools.product(("weights", "deltas"), ("tensor", "rows", "columns"))
    ),
    ("multislerp", {}),
    ("tall_masks", {}),
    (
        "tall_masks",
        {"mask_scale": [0.2, 0.6, 0.4], "multi_task": "ties_published", "density": 0.4, "vector": "bfloat16"},
    ),
    ("emr", {}),
    ("emr", {"rescale": "tensors", "zero_sign": "negative", "vector": "float16"}),
    ("multislerp", {"weights": [3, 1, -2], "divide": "none", "of": "deltas"}),
]
IDS = ["c", "a", "b"]
inprocess = merging.InProcess


def test_every_method_is_covered() -> None:
    """Methods that make adapters of adapters have a contract of their own: tests/methods/test_adapter_methods.py."""
    assert {name for name, _ in VARIANTS} == {n for n, kind in METHODS.items() if not issubclass(kind, AdapterMethod)}


@pytest.fixture(params=VARIANTS, ids=lambda variant: f"{variant[0]}-{json.dumps(variant[1], separators=(',', ':'))}")
def method(request: pytest.FixtureRequest) -> Method:
    name, values = request.param
    return METHODS[name].model_validate(values)


def models(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A base and three experts: two layers (a matrix, a convolution), a vector, a scalar, an empty tensor and an integer buffer."""
    generator = torch.Generator().manual_seed(1)

    def made(scale: float) -> dict[str, Tensor]:
        shapes: dict[str, tuple[int, ...]] = {
            "layers.0.m": (37, 19), "layers.1.conv": (3, 4, 3, 3), "v": (11,), "s": (), "empty": (0, 4),
        }  # fmt: skip
        held = {name: (torch.randn(shape, generator=generator) * scale).to(dtype) for name, shape in shapes.items()}
        return {**held, "count": torch.arange(5)}

    base = made(1.0)
    experts = []
    for _ in range(3):
        change = made(0.1)
        experts.append({n: (base[n] + change[n]).to(dtype) if base[n].is_floating_point() else base[n] for n in base})
    return base, experts


def merged(
    method: Method,
    base: Mapping[str, Tensor],
    experts: list[dict[str, Tensor]],
    ids: list[str] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    needs_data = any(isinstance(statistic, DataStatistic) for statistic in method.statistics().values())
    experts = experts[: accepted(method, len(experts))]
    ids = (ids or IDS)[: len(experts)]
    given = {"fisher": [{n: (e[n].float() * 3).sin() ** 2 for n in e} for e in experts]} if needs_data else None
    return merge(method, base=base, experts=experts, ids=ids, statistics=given, **options)


def accepted(method: Method, at_most: int = 3) -> int:
    """The largest number of experts that the method takes, 0 where it takes none of them."""
    for count in range(at_most, 0, -1):
        with contextlib.suppress(SpecError):
            method.validate_count(count)
            return count
    return 0


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_parameters_survive_json(method: Method) -> None:
    assert type(method).model_validate(json.loads(json.dumps(method.parameters()))) == method


def test_unknown_parameters_are_refused(method: Method) -> None:
    with pytest.raises(ValueError, match="extra"):
        type(method).model_validate({**method.parameters(), "no_such_parameter": 1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_dtypes_and_inputs_are_kept(method: Method, dtype: torch.dtype) -> None:
    base, experts = models(dtype)
    before = [{n: t.clone() for n, t in held.items()} for held in (base, *experts)]
    found = merged(method, base, experts)
    written = {n: (t.shape, t.dtype) for n, t in found.items() if method.product == "model" or n in base}
    assert written == {n: (t.shape, t.dtype) for n, t in base.items()}
    assert all(same(old, new) for old, new in zip(before, (base, *experts), strict=True))
    assert torch.equal(found["count"], base["count"])


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
    """Whatever an element-wise method does of elements can be one loop (whose bytes tests/kernels compares)."""
    library, made = library_in(tmp_path), list[Fused]()
    if library.compiler is None:
        pytest.skip("no C++ compiler")

    class Kept(Fused):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            made.append(self)

    monkeypatch.setattr(loops, "Fused", Kept)
    merged(method, *models(), library=library)
    merging_loops = [fused for fused in made if fused.out not in ("counts", "sums")]
    assert bool(merging_loops) == (method.per is Per.ELEMENT)
    assert not [fused.problem for fused in made if fused.problem]
    assert all(loop is not None for fused in made for loop in fused.loops.values())


def test_spans_and_workers_do_not_matter(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes, for one span a unit, in another order, on two threads."""
    base, experts = models()
    first = merged(method, base, experts)
    monkeypatch.setattr(merging, "plan_spans", lambda tensors, per: passes.plan_spans(tensors, per, size=1)[::-1])
    assert same(first, merged(method, base, experts))
    monkeypatch.setattr(merging, "InProcess", lambda workers=2: inprocess(workers))
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


DECLARED = [
    method
    for method in (METHODS[name].model_validate(values) for name, values in VARIANTS)
    if method.idempotent
    and getattr(method, "drop", None) is None
    and getattr(method, "start", "expert") == "expert"
    and getattr(method, "divide", "sum") == "sum"
]


@pytest.mark.parametrize("method", DECLARED, ids=lambda method: method.name)
def test_equal_experts_give_the_expert(method: Method) -> None:
    base, experts = models(torch.bfloat16)
    found = merged(method, base, [experts[0]] * 3)
    assert same(found, {name: experts[0][name] for name in base})


def test_a_single_expert(method: Method) -> None:
    base, experts = models()
    one = method.bound([0])
    if not accepted(one, 1):
        with pytest.raises(SpecError, match=method.name):
            merge(one, base=base, experts=experts[:1])
        return
    found = merged(one, base, experts[:1], ["a"])
    assert all(torch.isfinite(value).all() for value in found.values() if value.is_floating_point())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused_by_name(method: Method, bad: float) -> None:
    base, experts = models()
    last = accepted(method) - 1
    experts[last]["layers.1.conv"] = experts[last]["layers.1.conv"].clone()
    experts[last]["layers.1.conv"].view(-1)[3] = bad
    if getattr(method, "name", "") == "fisher":
        fishers = [{n: torch.ones_like(e[n], dtype=torch.float32) for n in e} for e in experts]
        with pytest.raises(NonFiniteError, match="conv"):
            merge(method, base=base, experts=experts, statistics={"fisher": fishers})
        return
    with pytest.raises(NonFiniteError, match=rf"expert '{last}'.*conv"):
        merged(method, base, experts)


def test_overflow_of_the_result_names_the_method() -> None:
    base = {"w": torch.tensor([1.0, 2.0])}
    with pytest.raises(NonFiniteError, match="task_arithmetic"):
        merge(METHODS["task_arithmetic"].model_validate({"scale": 1e38}), base=base, experts=[{"w": base["w"] * 1e4}])


def test_shapes_that_do_not_fit_are_refused() -> None:
    base, experts = models()
    experts[0]["v"] = torch.zeros(12)
    with pytest.raises(MergeloomError, match=r"'v' has shape \[12\], in the base \[11\]"):
        merge(METHODS["average"](), base=base, experts=experts)
    del experts[0]["v"]
    with pytest.raises(MergeloomError, match="lacks 'v'"):
        merge(METHODS["average"](), base=base, experts=experts)


def test_a_drop_demands_ids() -> None:
    base, experts = models()
    for method in (Ties(drop=RandomDrop(rate=0.5)), Della()):
        with pytest.raises(MergeloomError, match="ids"):
            merge(method, base=base, experts=experts)


def test_dtype_of_the_result() -> None:
    base, experts = models()
    found = merge(Ties(), base=base, experts=experts, dtype=torch.bfloat16)
    wide = merge(Ties(), base=base, experts=experts)
    assert all(torch.equal(found[n], wide[n].to(torch.bfloat16)) for n in base if n != "count")
    assert found["count"].dtype == torch.int64
