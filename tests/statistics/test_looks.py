"""How statistics look at blocks: what a class declares is what it does, and what its memory is projected from."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from mergecore.checkpoints.experts import FullExpert
from mergecore.engine.executor import InProcess
from mergecore.engine.memory import Models, block_bytes
from mergecore.engine.pass_plan import PassPlan, StatisticJob, plan_spans
from mergecore.engine.run_pass import run_pass
from mergecore.events import silent
from mergecore.plugins.block import Block, Per
from mergecore.plugins.statistic import Blocks, Counts, Scope, Statistic, Statistics, Sums
from mergecore.registry import STATISTICS
from mergecore.statistics.fisher import DiagonalFisher
from mergecore.statistics.products import Products
from mergecore.statistics.profile import Profile
from mergecore.statistics.softmax_means import SoftmaxMeans
from mergecore.statistics.threshold import Threshold
from mergecore.tensors.memory import MemoryTensors
from mergecore.tensors.source import TensorInfo

ANSWERS = {Counts: "counted", Sums: "summed", Blocks: "add"}
STREAMED = [kind for kind in STATISTICS.values() if issubclass(kind, Statistic)]


@pytest.mark.parametrize("kind", STREAMED, ids=lambda kind: kind.name)
def test_every_look_that_is_declared_has_its_answer(kind: type[Statistic]) -> None:
    assert kind.looks
    for look, answer in ANSWERS.items():
        assert (look in kind.looks) == (getattr(kind, answer) is not getattr(Statistic, answer)), answer


class Undeclared(SoftmaxMeans):
    """Adds up, and does not say so."""

    name: ClassVar[str] = "undeclared"
    scope: ClassVar[Scope] = Scope.POOL

    def look(self, state: Any, block: Block, statistics: Statistics) -> Any:
        return Sums(lambda experts: [experts[0]], {})


def test_a_look_that_is_not_declared_is_an_error_that_says_what_to_do() -> None:
    base = MemoryTensors({"w": torch.zeros(8)})
    pool = (FullExpert("id", "expert", MemoryTensors({"w": torch.ones(8)})),)
    job = StatisticJob("k", Undeclared(), (0,), base.tensors, {})
    plan = PassPlan(base, pool, (), (job,), plan_spans(base.tensors, Per.ELEMENT))
    with pytest.raises(TypeError, match=r"returned Sums for tensor 'w': add Sums to Undeclared.looks"):
        run_pass(plan, InProcess(), silent)


def test_memory_of_statistics_side_by_side() -> None:
    """Bins of all that count, and one block; a threshold that looks into a small block hides no other statistic."""
    tensors = {"w": TensorInfo("BF16", (4096, 4096))}

    def needed(*statistics: Statistic) -> int:
        return block_bytes(Models(tensors, (tensors,) * 8), [], statistics)

    nothing, threshold, profile = needed(), Threshold(density=0.2), Profile()
    bins = needed(profile) - nothing
    block = needed(SoftmaxMeans()) - nothing
    assert needed(Products()) == nothing < needed(profile) == needed(threshold)
    assert needed(threshold, SoftmaxMeans()) == needed(profile, SoftmaxMeans()) == nothing + bins + block
    assert needed(threshold, threshold, profile) == nothing + 3 * bins
    assert needed(SoftmaxMeans(), SoftmaxMeans()) == nothing + block  # one after the other


def test_a_threshold_reports_the_density_that_it_kept() -> None:
    assert Threshold(density=0.2).reported({"density": 0.25, "kept": 1}) == {"kept_density": 0.25}
    assert Profile().reported({"tensors": []}) == {}


def test_a_fisher_that_is_handed_in_has_the_norms_of_one_worked_out_here() -> None:
    selection = {"w": TensorInfo("F32", (2,))}
    result = DiagonalFisher().taken({"w": torch.tensor([3.0, 4.0])}, selection)
    assert result.numbers == {"squared_norm": {"w": 25.0}}
