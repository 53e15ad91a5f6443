"""Consensus merging: the worked numbers, the ends of k and λ, and TIES as the multi-task vector."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mergecore import merge, methods
from mergecore.errors import MergeloomError

ROWS = torch.tensor([[1.0, 0.0, 0.2, -0.5], [0.1, 0.0, 0.3, 0.4], [-0.2, 0.0, -0.1, 0.3]])
RANDOM = torch.randn(5, 400, generator=torch.Generator().manual_seed(0)) * 0.1


def merged(rows: Tensor, **values: Any) -> Tensor:
    method = methods.Consensus.model_validate({"scale": 1.0, **values})
    base = {"w": torch.zeros(rows.shape[1])}
    return merge(method, base=base, experts=[{"w": row} for row in rows])["w"]


def test_worked_numbers() -> None:
    def check(expected: list[float], **values: Any) -> None:
        torch.testing.assert_close(merged(ROWS, **values), torch.tensor(expected), rtol=1e-5, atol=1e-6)

    check([0, 0, 0.4, 0.2], mask_scale=0.4)
    check([0, 0, 0, 0.2], mask_scale=1.0)
    check([0.9, 0, 0.4, 0.2], mask_scale=0.4, minimum_tasks=1)
    check([0, 0, 0, 0.2], mask_scale=0.4, minimum_tasks=3)
    check([0, 0, 0, 0.1], mask_scale=1.0, scale=0.5)
    check([0, 0, 0, 0.2], mask_scale=[1, 0.4, 1])
    check([0, 0, 0.4, 0.2], mask_scale=[0.4, 1, 1])


@pytest.mark.parametrize("multi_task", ["sum", "ties", "ties_published"])
def test_ends_of_the_minimum(multi_task: str) -> None:
    whole = merged(RANDOM, multi_task=multi_task, minimum_tasks=0)
    assert torch.equal(merged(RANDOM, multi_task=multi_task, minimum_tasks=6), torch.zeros(400))
    kept = [merged(RANDOM, multi_task=multi_task, minimum_tasks=k) != 0 for k in range(7)]
    assert all(not (more & ~fewer).any() for fewer, more in pairwise(kept))
    assert kept[1].sum() > kept[2].sum() > kept[3].sum()
    assert torch.equal(whole != 0, kept[0])


def test_without_masks_it_is_task_arithmetic_and_ties() -> None:
    base = {"w": torch.randn(400, generator=torch.Generator().manual_seed(9))}
    experts = [{"w": base["w"] + row} for row in RANDOM]

    def merged_by(method: methods.Method) -> Tensor:
        return merge(method, base=base, experts=experts)["w"]

    def consensus(**values: Any) -> Tensor:
        return merged_by(methods.Consensus.model_validate({"scale": 0.7, "minimum_tasks": 0, **values}))

    assert torch.equal(consensus(), merged_by(methods.TaskArithmetic(scale=0.7)))
    for multi_task, count in (("ties", "at_least"), ("ties_published", "published")):
        values = {"density": 0.3, "scale": 0.7, "aggregate": "sum", "count": count}
        expected = merged_by(methods.Ties.model_validate(values))
        assert torch.equal(consensus(multi_task=multi_task, density=0.3), expected)


@pytest.mark.parametrize("multi_task", ["sum", "ties"])
@pytest.mark.parametrize("scale", [0.2, 0.6, [0.2, 0.3, 0.4, 0.5, 0.6]])
def test_against_the_definition(multi_task: str, scale: float | list[float]) -> None:
    if multi_task == "sum":
        together = RANDOM.sum(0)
    else:
        kept = torch.stack([torch.where(row.abs() >= row.abs().sort().values[-80], row, 0.0) for row in RANDOM])
        together = torch.where(kept.sign() == kept.sum(0).sign(), kept, 0.0).sum(0)
    spread = torch.tensor(scale).reshape(-1, 1)
    counts = (RANDOM.abs() > spread * (together - RANDOM).abs()).sum(0)
    actual = merged(RANDOM, multi_task=multi_task, mask_scale=scale)
    torch.testing.assert_close(actual, torch.where(counts >= 2, together, 0.0))


def test_one_expert_is_given_back() -> None:
    row = torch.tensor([[0.5, 0.0, -0.1, 1e-30]])
    assert torch.equal(merged(row, minimum_tasks=1, mask_scale=0.6), row[0])
    assert torch.equal(merged(row, minimum_tasks=2), torch.zeros(4))


def test_masks_shrink_as_their_scale_grows() -> None:
    kept = [merged(RANDOM, mask_scale=scale) != 0 for scale in (0.0, 0.2, 0.4, 0.6, 2.0)]
    assert all(not (more & ~fewer).any() for fewer, more in pairwise(kept))
    assert kept[0].all()  # λ = 0: a mask is where its task vector is not 0
    assert not merged(torch.zeros(3, 8), mask_scale=0.0).any()


def test_equal_experts() -> None:
    rows = torch.tensor([[0.5, -0.25, 0.0]]).expand(3, -1)
    assert torch.equal(merged(rows, mask_scale=0.4), rows[0] * 3)
    # |τ| > λ |2τ| no longer holds at λ = ½, and strictly so.
    assert not merged(rows, mask_scale=0.5).any()


def test_bfloat16_and_odd_shapes() -> None:
    generator = torch.Generator().manual_seed(6)
    shapes = {"m": (9, 5), "s": (), "v": (3,), "empty": (0, 2)}
    base = {n: torch.randn(shape, generator=generator).to(torch.bfloat16) for n, shape in shapes.items()}
    experts = [{n: (v * 1.1).to(torch.bfloat16) for n, v in base.items()} for _ in range(3)]
    method = methods.Consensus(scale=0.5, multi_task="ties")
    actual = merge(method, base=base, experts=experts)
    assert {n: (v.shape, v.dtype) for n, v in actual.items()} == {n: (v.shape, v.dtype) for n, v in base.items()}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="leave it out"):
        methods.Consensus(scale=1, density=0.2)
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        methods.Consensus(scale=1, mask_scale=(0.2, -0.1))
    with pytest.raises(MergeloomError, match="mask_scale: 2 given for 3 experts"):
        merged(ROWS, mask_scale=[0.4, 0.4])
