"""Inner products of models: against matrix products in float64, for weights, changes and the base beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergecore.arithmetic.linear_algebra import combined
from mergecore.checkpoints.experts import FullExpert
from mergecore.engine.executor import InProcess
from mergecore.engine.pass_plan import PassPlan, StatisticJob, plan_spans
from mergecore.engine.run_pass import run_pass
from mergecore.errors import NonFiniteError
from mergecore.events import silent
from mergecore.native.library import Function, Library, library_in
from mergecore.plugins.block import Per
from mergecore.statistics.products import Products, gram_of
from mergecore.tensors.memory import MemoryTensors
from mergeloom.testing.grid import set_grid

SHAPES = {"matrix": (300, 7), "vector": (33,), "scalar": (), "none": (0, 4)}


class Waiting(Library):
    """Builds every loop before it is used."""

    def function(self, text: str, *, build: bool, wait: bool = False) -> Function | None:
        return super().function(text, build=True, wait=True)


def models(count: int, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return [
        {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in SHAPES.items()} for _ in range(count)
    ]


def results_of(
    statistic: Products,
    tensors_by_model: list[dict[str, torch.Tensor]],
    library: Library | None = None,
    workers: int = 1,
) -> dict[str, torch.Tensor]:
    base, *experts = tensors_by_model
    pool = tuple(FullExpert(f"{n}", f"expert {n}", MemoryTensors(item)) for n, item in enumerate(experts))
    job = StatisticJob("k", statistic, tuple(range(len(pool))), MemoryTensors(base).tensors, {})
    spans = plan_spans(MemoryTensors(base).tensors, Per.ELEMENT, 4000)
    result = run_pass(
        PassPlan(MemoryTensors(base), pool, (), (job,), spans, library=library), InProcess(workers), silent
    )
    count = len(pool) + (statistic.of == "base and weights")
    return {name: gram_of(name, count, {"products": [result.results["k"]]}) for name in SHAPES}  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of", ["weights", "deltas", "base and weights"])
def test_products_are_those_of_matrices(
    of: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_grid(monkeypatch, 1024)
    tensors_by_model = models(4, dtype)
    statistic = Products(of=of)
    plain = results_of(statistic, tensors_by_model)
    for name in SHAPES:
        base, *experts = (item[name].float() for item in tensors_by_model)
        vectors = [item - base for item in experts] if of == "deltas" else experts
        vectors = [base, *vectors] if of == "base and weights" else vectors
        stacked = torch.stack([item.reshape(-1).double() for item in vectors])
        torch.testing.assert_close(plain[name], stacked @ stacked.mT, rtol=1e-13, atol=1e-13)
    library = Waiting(tmp_path, library_in(tmp_path).compiler)
    fused = results_of(statistic, tensors_by_model, library, workers=2)
    assert library.compiler is None or list(tmp_path.glob("*.so"))
    assert all(torch.equal(fused[name], plain[name]) for name in SHAPES)


def test_parallel_models_have_a_cosine_of_one_to_the_last_bits() -> None:
    """Products and sums in float64: at float32 the angle would be off by a thousandth."""
    tensors_by_model = models(2, torch.float32)
    tensors_by_model.append({name: value * 1.3 for name, value in tensors_by_model[1].items()})
    for name, products in results_of(Products(), tensors_by_model).items():
        if tensors_by_model[1][name].numel():
            cosine = products[0, 1] / (products[0, 0] * products[1, 1]).sqrt()
            assert abs(1 - float(cosine)) < 1e-13, name


def test_what_is_not_finite_is_said() -> None:
    tensors_by_model = models(3, torch.float32)
    tensors_by_model[2]["vector"][5] = float("nan")
    with pytest.raises(NonFiniteError, match=r"expert 1.*vector|vector.*expert 1"):
        results_of(Products(), tensors_by_model)
    tensors_by_model = models(3, torch.float32)
    tensors_by_model[0]["vector"][5] = float("inf")
    with pytest.raises(NonFiniteError, match="the base"):
        results_of(Products(of="base and weights"), tensors_by_model)
    assert results_of(Products(), tensors_by_model)["vector"].isfinite().all()  # the base is not looked at


def test_a_combination_is_folded_in_float64_and_rounded_once() -> None:
    tensors = [torch.randn(1000, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    shares = (0.1, -2.0, 3.0, 1e-3)
    expected = sum(share * item.double() for share, item in zip(shares, tensors, strict=True))
    assert torch.equal(combined(shares, tensors), expected.float())  # type: ignore[union-attr]
