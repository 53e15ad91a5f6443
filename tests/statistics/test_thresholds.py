"""Thresholds by radix selection against a full sort, to the last element."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from torch import Tensor

import mergecore.engine.run_pass
from mergecore.arithmetic.trims import trimmed
from mergecore.checkpoints.experts import FullExpert
from mergecore.engine.executor import InProcess
from mergecore.engine.pass_plan import PassPlan, StatisticJob, plan_spans
from mergecore.engine.run_pass import run_pass
from mergecore.events import silent
from mergecore.plugins.block import Per
from mergecore.plugins.statistic import Found, Result
from mergecore.recipes.in_memory import find_statistics
from mergecore.statistics.profile import Profile, fine_counts
from mergecore.statistics.threshold import Threshold, threshold_of
from mergecore.tensors.memory import MemoryTensors
from mergeloom.testing.grid import set_grid


def result_of(statistic: Threshold, delta: dict[str, Tensor], workers: int = 1) -> Result:
    base = MemoryTensors({name: torch.zeros_like(value) for name, value in delta.items()})
    pool = [FullExpert("id", "expert", MemoryTensors(delta))]
    selection = base.tensors
    known = find_statistics(statistic, base, pool, selection, {}, silent)
    job = StatisticJob("k", statistic, (0,), selection, known)
    plan = PassPlan(base, tuple(pool), (), (job,), plan_spans(selection, Per.ELEMENT, 4000))
    return run_pass(plan, InProcess(workers), silent).results["k"]


def deltas(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    flat = torch.randn(30_011, generator=generator)
    if kind == "bfloat16":  # many exact ties
        flat = (flat.to(torch.bfloat16) * 0.01).to(torch.float32)
    elif kind == "few bits":  # as between two checkpoints in bfloat16: all low half-words are 0
        flat = (flat * 0.01).to(torch.bfloat16).to(torch.float32)
    elif kind == "mixed":
        flat = torch.where(flat.abs() < 0.7, flat, flat.to(torch.bfloat16).to(torch.float32))
    elif kind == "sparse":
        flat = torch.where(torch.rand(30_011, generator=generator) < 0.9, 0.0, flat)
    elif kind == "constant":
        flat = torch.full((30_011,), -0.25)
    elif kind == "denormal":
        flat = flat * 1e-40
    return {"a": flat[:10_000].view(100, 100), "b": flat[10_000:10_007], "c": flat[10_007:]}


@pytest.mark.parametrize("kind", ["normal", "bfloat16", "few bits", "mixed", "sparse", "constant", "denormal"])
@pytest.mark.parametrize("density", [0.0, 0.0001, 0.01, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("ranked", ["global", "tensor"])
def test_equals_a_full_sort(kind: str, density: float, ranked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_grid(monkeypatch, 1024)
    monkeypatch.setattr("mergecore.statistics.threshold.WINDOW", 256)
    delta = deltas(kind)
    for count in ("at_least", "exact"):
        statistic = Threshold.model_validate({"density": density, "ranked": ranked, "count": count})
        result = result_of(statistic, delta, workers=2)
        kept_in_all = 0
        groups = [sorted(delta)] if ranked == "global" else [[name] for name in sorted(delta)]
        for names in groups:
            flat = torch.cat([delta[name].reshape(-1) for name in names])
            rank = floor(Fraction(str(density)) * flat.numel())
            order = torch.argsort(flat.abs(), descending=True, stable=True)
            expected = torch.zeros_like(flat, dtype=torch.bool)
            if rank and count == "exact":
                expected[order[:rank]] = True
            elif rank:
                expected = flat.abs() >= flat.abs()[order[rank - 1]]
            kept_in_all += int(expected.sum())
            parts = []
            for name in names:
                least, last = threshold_of(Found(MemoryTensors(result.tensors), result.numbers), name)
                values = delta[name].reshape(-1)
                parts.append(trimmed(values, least, last, torch.arange(values.numel())))
            assert torch.equal(torch.cat(parts), torch.where(expected, flat, 0.0))
        assert result.numbers["kept"] == kept_in_all


def test_profile_counts_every_magnitude_once() -> None:
    delta = deltas("normal")
    base = MemoryTensors({name: torch.zeros_like(value) for name, value in delta.items()})
    job = StatisticJob("k", Profile(), (0,), base.tensors, {})
    plan = PassPlan(
        base, (FullExpert("id", "e", MemoryTensors(delta)),), (), (job,), plan_spans(base.tensors, Per.ELEMENT)
    )
    result = run_pass(plan, InProcess(), silent).results["k"]
    counts = fine_counts(Found(MemoryTensors(result.tensors), result.numbers), base.tensors)
    for name, value in delta.items():
        pattern = value.numpy().reshape(-1).view(np.uint32) % 2**31
        bins, expected = np.unique((pattern >> 16) * 2 + (pattern % 2**16 > 0), return_counts=True)
        assert np.array_equal(counts[name][0], bins) and np.array_equal(counts[name][1], expected)


@pytest.mark.parametrize(
    ("kind", "density", "count", "read"),
    [
        ("few bits", 0.2, "at_least", 1),  # the profile tells the value
        ("normal", 0.2, "at_least", 2),
        ("few bits", 0.2, "exact", 3),  # counted by block, then one block looked into
        ("normal", 1.0, "at_least", 0),  # everything is kept
    ],
)
def test_reads_no_more_than_it_must(
    kind: str, density: float, count: str, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[int] = []
    original = mergecore.engine.run_pass._read
    monkeypatch.setattr("mergecore.engine.run_pass._read", lambda *arguments: began.append(0) or original(*arguments))
    result_of(Threshold.model_validate({"density": density, "count": count}), deltas(kind))
    assert len(began) == read
