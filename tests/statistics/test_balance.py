"""What PCB-Merging must know beforehand, against full sorts and plain sums over the whole vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergecore.checkpoints.experts import FullExpert
from mergecore.engine.executor import InProcess
from mergecore.engine.pass_plan import PassPlan, StatisticJob, plan_spans
from mergecore.engine.run_pass import run_pass
from mergecore.events import silent
from mergecore.plugins.block import Per
from mergecore.plugins.statistic import Statistic
from mergecore.recipes.in_memory import find_statistics
from mergecore.statistics.balance_cut import BalanceCut
from mergecore.statistics.balance_scores import balancing, scores
from mergecore.statistics.magnitude_quantiles import MagnitudeQuantiles
from mergecore.statistics.softmax_means import SoftmaxMeans, pairs
from mergecore.tensors.memory import MemoryTensors
from mergeloom.testing.grid import set_grid

COUNT = 12_011


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, and pieces that do not divide them."""
    set_grid(monkeypatch, 2048)
    monkeypatch.setattr("mergecore.statistics.softmax_means.PIECE", 1500)
    monkeypatch.setattr("mergecore.engine.windows.WINDOWS", (1500, 1500))


def vectors(kind: str, experts: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    deltas = torch.randn(experts, COUNT, generator=generator) * 0.1
    if kind == "bfloat16":
        deltas = deltas.to(torch.bfloat16).to(torch.float32)
    elif kind == "sparse":
        deltas = torch.where(torch.rand(experts, COUNT, generator=generator) < 0.7, 0.0, deltas)
    return deltas


def named(flat: Tensor) -> dict[str, Tensor]:
    return {"a": flat[:7000].view(70, 100), "b": flat[7000:7007], "c": flat[7007:], "empty": flat[:0].view(0, 4)}


def results_of(statistic: Statistic, rows: Tensor, workers: int = 2) -> tuple[Mapping[str, Any], Any]:
    base = MemoryTensors({name: torch.zeros_like(value) for name, value in named(rows[0]).items()})
    pool = [FullExpert(f"id{i}", f"expert {i}", MemoryTensors(named(row))) for i, row in enumerate(rows)]
    known = find_statistics(statistic, base, pool, base.tensors, {}, silent)
    job = StatisticJob("k", statistic, tuple(range(len(pool))), base.tensors, known)
    plan = PassPlan(base, tuple(pool), (), (job,), plan_spans(base.tensors, Per.ELEMENT, 4000))
    return run_pass(plan, InProcess(workers), silent).results["k"].numbers, known


@pytest.mark.parametrize("kind", ["normal", "bfloat16", "sparse"])
@pytest.mark.parametrize("tail", [0.0, 0.0001, 0.01, 0.3, 0.499])
def test_magnitude_quantiles(kind: str, tail: float) -> None:
    row = vectors(kind)[:1]
    ordered = row[0].abs().sort().values
    numbers, _ = results_of(MagnitudeQuantiles(tail=tail), row)
    low, high = int(COUNT * tail), int(COUNT * (1 - tail) - 1)
    assert numbers == {"low": float(ordered[low]), "high": float(ordered[high])}


def test_ranks_of_few_elements() -> None:
    assert MagnitudeQuantiles(tail=0).ranks(1) == (1, 1)
    assert MagnitudeQuantiles(tail=0.4).ranks(1) == (1, 1)
    assert MagnitudeQuantiles(tail=0.4).ranks(3) == (2, 2)
    assert MagnitudeQuantiles(tail=0.01).ranks(100) == (2, 99)


@pytest.mark.parametrize(("kind", "density"), [("normal", 0.2), ("bfloat16", 0.05), ("sparse", 0.4), ("sparse", 1.0)])
@pytest.mark.parametrize("form", ["es", "vision", "nlp", "paper"])
def test_cut_is_an_entry_of_the_sorted_scores(kind: str, form: str, density: float) -> None:
    rows = vectors(kind)
    statistic = BalanceCut.model_validate({"form": form, "density": density, "clip": 0.01})
    numbers, known = results_of(statistic, rows)
    ordered = torch.stack(scores(list(rows), balancing(statistic.form, len(rows), known))).sort(dim=1).values
    place = int(COUNT * (1 - density)) if density < 1 else 0
    assert numbers == {"high": ordered[:, -1].tolist(), "low": ordered[:, place].tolist()}


def test_softmax_means() -> None:
    rows = vectors("normal")
    numbers, _ = results_of(SoftmaxMeans(), rows)
    wide = rows.numpy()
    for position, (i, j) in enumerate(pairs(3)):
        product = (wide[i] * wide[j]).astype(np.float64)
        assert (numbers["low"][position], numbers["high"][position]) == (product.min(), product.max())
        share = (product - product.min()) / (product.max() - product.min())
        assert numbers["inter"][position] == pytest.approx(np.exp(share).mean(), rel=1e-6)
        if i == j:
            assert numbers["intra"][i] == pytest.approx(np.exp(3 * share - 3).mean(), rel=1e-6)


def test_empty_selection() -> None:
    empty = MemoryTensors({"e": torch.empty(0, 3)})
    pool = [FullExpert("i", "e", empty)]
    for form in ("es", "paper"):
        statistic = BalanceCut.model_validate({"form": form, "density": 0.2, "clip": 0})
        known = find_statistics(statistic, empty, pool, empty.tensors, {}, silent)
        job = StatisticJob("k", statistic, (0,), empty.tensors, known)
        plan = PassPlan(empty, tuple(pool), (), (job,), plan_spans(empty.tensors, Per.ELEMENT))
        assert run_pass(plan, InProcess(), silent).results["k"].numbers == {"low": [], "high": []}
