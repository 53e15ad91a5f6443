"""NearSwap, RAM, Arcee fusion, NuSLERP and Multi-SLERP: numbers that mergekit 0.1.5 gives, where ours are more exact
than its, and what the formulas promise."""

from __future__ import annotations

from math import acos, sin
from typing import Any

import pytest
import torch
from torch import Tensor

from mergecore import merge, methods
from mergecore.errors import SpecError
from mergecore.plugins.method import Method
from mergecore.registry import method_from

BASE = torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]])
EXPERTS = [
    torch.tensor([[1.2, -2.0, 0.1], [0.25, 3.5, -1.0]]),
    torch.tensor([[1.0, -1.7, 0.4], [0.25, 2.0, -1.3]]),
    torch.tensor([[0.7, -2.0, 0.3], [1.25, 3.0, -1.0]]),
]


def merged(method: Method, count: int, base: Tensor = BASE, experts: list[Tensor] = EXPERTS) -> Tensor:
    return merge(method, base={"w": base}, experts=[{"w": expert} for expert in experts[:count]])["w"]


def close(actual: Tensor, wanted: list[list[float]]) -> bool:
    return torch.allclose(actual, torch.tensor(wanted), rtol=1e-5, atol=2e-6)


def random_models(shape: tuple[int, ...] = (40, 30), count: int = 3, size: float = 0.01) -> tuple[Tensor, list[Tensor]]:
    draw = torch.Generator().manual_seed(5)
    base = torch.randn(shape, generator=draw)
    return base, [base + size * torch.randn(shape, generator=draw) for _ in range(count)]


@pytest.mark.parametrize(
    ("name", "values", "count", "wanted"),
    [
        ("nearswap", {"t": 0.25}, 1, [[1.2, -2, 0.25], [0.25, 3.25, -1]]),
        ("ram", {}, 3, [[0.95, -1.7, 0.2666667], [1.25, 2.75, -1.3]]),
        (
            "ram",
            {"boost": {"rate": 0.5, "most": 3, "scope": "tensor"}},
            3,
            [[0.95, -1.55, 0.2666667], [2.25, 2.75, -1.45]],
        ),
        ("arcee_fusion", {}, 1, [[1.2, -2, 0.1], [0.25, 3, -1]]),
        (
            "multislerp",
            {"weights": [3, 1, 2]},
            3,
            [[1.02002, -1.9895602, 0.2356896], [0.5955837, 3.1004491, -1.0925857]],
        ),
        (
            "multislerp",
            {"weights": [3, 1, 2], "of": "deltas"},
            3,
            [[1.0881978, -1.9264981, -0.1031790], [0.7528536, 3.3526282, -1.0735019]],
        ),
        ("nuslerp", {}, 2, [[1.1587645, -1.9397165, 0.1767673], [0.2519624, 3.1475611, -1.0838318]]),
        ("nuslerp", {"along": "rows"}, 2, [[1.1526027, -1.9293702, 0.1755245], [0.2521154, 3.1493201, -1.0845206]]),
        ("nuslerp", {"along": "columns"}, 2, [[1.150164, -1.9310591, 0.1758375], [0.2500367, 3.13429, -1.0791862]]),
        ("nuslerp", {"of": "deltas"}, 2, [[1.2553989, -1.7942382, -0.0793848], [0.25, 2.9526241, -1.2057618]]),
        (
            "nuslerp",
            {"of": "deltas", "along": "rows"},
            2,
            [[1.1711749, -1.9013127, 0.1247547], [0.25, 2.1928146, -1.6825383]],
        ),
    ],
)
def test_mergekits_numbers(name: str, values: dict[str, Any], count: int, wanted: list[list[float]]) -> None:
    handed = {"weights": [3, 1], **values} if name == "nuslerp" else values
    assert close(merged(method_from(name, handed, "test"), count), wanted)


# --- nearswap -------------------------------------------------------------------------------------------------------


def test_nearswap_stays_within_t_and_takes_what_is_near_as_it_is() -> None:
    base, experts = random_models()
    assert torch.equal(merged(methods.Nearswap(t=0), 1, base, experts), base)
    assert torch.equal(merged(methods.Nearswap(t=9), 1, base, experts), experts[0])
    actual = merged(methods.Nearswap(t=0.005), 1, base, experts)
    near = (experts[0] - base).abs() < 0.0049
    assert 0.2 < float(near.float().mean()) < 0.8
    assert torch.equal(actual[near], experts[0][near])
    assert float((actual - base).abs().max()) < 0.005001
    assert bool(((actual - base) * (experts[0] - base) >= 0).all())


def test_nearswap_below_mergekits_floor() -> None:
    """mergekit divides by at least 1e-6 and would go a tenth of the way."""
    actual = merged(methods.Nearswap(t=1e-7), 1, torch.tensor([0.0]), [torch.tensor([1e-7])])
    assert actual.tolist() == torch.tensor([1e-7]).tolist()


def test_nearswap_takes_one_expert() -> None:
    with pytest.raises(SpecError, match="one expert, 2 experts are given"):
        merged(methods.Nearswap(t=1), 2)


# --- RAM ------------------------------------------------------------------------------------------------------------


def test_ram_takes_what_is_apart_whole_and_what_is_shared_in_the_mean() -> None:
    base = torch.zeros(6)
    apart = [torch.tensor([1.0, 2, 0, 0, 0, 0]), torch.tensor([0.0, 0, 3, 4, 0, 0]), torch.tensor([0.0, 0, 0, 0, 5, 0])]
    assert merged(methods.Ram(), 3, base, apart).tolist() == [1, 2, 3, 4, 5, 0]
    same = [torch.full((6,), value) for value in (1.0, 2.0, 6.0)]
    assert merged(methods.Ram(), 3, base, same).tolist() == [3.0] * 6
    at_epsilon = [torch.tensor([0.5, 0.75]), torch.tensor([1.0, 0.5])]
    assert merged(methods.Ram(epsilon=0.5), 2, torch.zeros(2), at_epsilon).tolist() == [1.0, 0.75]


def test_ram_plus_counts_over_the_whole_model_or_per_tensor() -> None:
    """Expert 0 shares 2 of its 4 changes in `a` and none of its 4 in `b`: 2/2 there, 2/6 in all."""
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    first = {"a": torch.ones(4), "b": torch.ones(4)}
    second = {"a": torch.tensor([1.0, 1, 0, 0]), "b": torch.zeros(4)}

    def actual(scope: str, most: float) -> dict[str, list[float]]:
        method = method_from("ram", {"boost": {"rate": 0.3, "most": most, "scope": scope}}, "test")
        return {name: value.tolist() for name, value in merge(method, base=base, experts=[first, second]).items()}

    assert actual("tensor", 9) == {"a": [1, 1, *[pytest.approx(1.3)] * 2], "b": [1] * 4}
    assert actual("global", 9) == {"a": [1, 1, *[pytest.approx(1.1)] * 2], "b": [pytest.approx(1.1)] * 4}
    assert actual("tensor", 0.5) == {"a": [1, 1, *[pytest.approx(1.15)] * 2], "b": [1] * 4}


# --- Arcee fusion ---------------------------------------------------------------------------------------------------


def test_arcee_fusion_takes_outliers_of_the_exact_quartiles() -> None:
    base, experts = random_models()
    method = methods.ArceeFusion(smoothing=0)
    wide, changed = base.double(), experts[0].double()
    divergence = (changed.softmax(-1) * (changed.log_softmax(-1) - wide.log_softmax(-1))).sum(-1, keepdim=True)
    scores = (changed - wide).abs() * divergence
    ranked = sorted(scores.flatten().tolist())
    last = len(ranked) - 1
    fence = ranked[last // 2] + 1.5 * (ranked[3 * last // 4] - ranked[last // 4])
    actual = merged(method, 1, base, experts)
    assert torch.equal(actual, torch.where(scores >= fence, experts[0], base))
    assert 0.01 < float((actual != base).float().mean()) < 0.2


def test_arcee_fusion_sees_changes_that_are_noise_in_float32() -> None:
    """The divergence of changes of 1e-4 is some 1e-9; what a softmax in float32 is off by adds up to more."""
    base, _ = random_models((4, 64), 0)
    base[2] = base[1]
    experts = [base.clone()]
    experts[0][1] += 1e-4 * torch.sin(torch.arange(64.0))
    experts[0][2] += 1e-3 * torch.sin(torch.arange(64.0))
    scores = methods.ArceeFusion(smoothing=0).importance(base, experts[0]).view(4, 64).sum(1)
    assert scores[0] == scores[3] == 0
    assert scores[2] / scores[1] == pytest.approx(1000, rel=0.03)  # a change ten times larger: 10 × 10²


def test_arcee_fusion_without_changes_and_with_a_fence_of_zero() -> None:
    base, experts = random_models()
    assert torch.equal(merged(methods.ArceeFusion(), 1, base, [base]), base)
    half = merged(methods.ArceeFusion(fence=0), 1, base, experts)
    assert float((half == experts[0]).float().mean()) == pytest.approx(0.5, abs=0.01)


# --- NuSLERP --------------------------------------------------------------------------------------------------------


def arc(t: float, first: Tensor, second: Tensor) -> Tensor:
    """Shoemake's formula on two float64 vectors."""
    angle = acos(float(first @ second / first.norm() / second.norm()))
    return (sin((1 - t) * angle) * first + sin(t * angle) * second) / sin(angle)


@pytest.mark.parametrize("along", ["rows", "columns"])
def test_nuslerp_of_single_vectors(along: str) -> None:
    base, experts = random_models((7, 5), 2, 0.5)
    actual = merged(
        method_from("nuslerp", {"weights": [1, 3], "along": along, "of": "deltas"}, "test"), 2, base, experts
    )
    turned = [x.double() if along == "rows" else x.double().T for x in (base, *experts, actual)]
    for row, first, two, joined in zip(*turned, strict=True):
        torch.testing.assert_close(joined, row + arc(0.75, first - row, two - row), rtol=1e-6, atol=1e-6)


def test_nuslerp_columns_run_along_the_first_axis_of_a_convolution() -> None:
    base, experts = random_models((4, 3, 2), 2, 0.5)
    actual = merged(methods.Nuslerp(along="columns"), 2, base, experts)
    wanted = arc(0.5, *(expert[:, 1, 1].double() for expert in experts))
    torch.testing.assert_close(actual[:, 1, 1].double(), wanted, rtol=1e-6, atol=1e-6)


def test_nuslerp_takes_the_straight_line_where_there_is_no_arc() -> None:
    """A vector of no length counts as a right angle in mergekit: sin(¾ · 90°) = .92 of the other one instead of ¾."""
    method = methods.Nuslerp(weights=(3, 1))
    first, none = torch.tensor([3.0, 4.0]), torch.zeros(2)
    assert merged(method, 2, first, [first, none]).tolist() == pytest.approx([2.25, 3])
    assert merged(method, 2, first, [first, -first]).tolist() == pytest.approx([1.5, 2])
    assert merged(method, 2, first, [first, 2 * first]).tolist() == pytest.approx([3.75, 5])


def test_nuslerp_is_slerp_and_only_the_ratio_of_weights_counts() -> None:
    base, experts = random_models(count=2, size=1)
    actual = merged(methods.Nuslerp(weights=(0.7, 0.3)), 2, base, experts)
    assert torch.equal(actual, merged(methods.Nuslerp(weights=(7, 3)), 2, base, experts))
    torch.testing.assert_close(actual, merged(methods.Slerp(t=0.3, colinear=1), 2, base, experts))
    with pytest.raises(SpecError, match="add up to 0"):
        method_from("nuslerp", {"weights": [1, -1]}, "test")


# --- Multi-SLERP ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divide", ["sum", "none"])
def test_multislerp_is_the_procedure_through_the_tangent_space(divide: str) -> None:
    """The published steps in float64, tangents and all."""
    base, experts = random_models(count=4, size=0.5)
    handed = torch.tensor([1.0, 2.0, 0.5, -0.25], dtype=torch.float64)
    weights = handed / handed.sum() if divide == "sum" else handed
    deltas = torch.stack([(expert.double() - base.double()).flatten() for expert in experts])
    units = deltas / deltas.norm(dim=1, keepdim=True)
    mean = weights @ units
    mean = mean / mean.norm()
    tangent = weights @ (units - (units @ mean)[:, None] * mean)
    assert float(tangent.norm()) < 1e-12, "the step that is left out"
    wanted = (mean * tangent.norm().cos() + tangent) * (weights @ deltas.norm(dim=1))
    method = methods.Multislerp(weights=tuple(handed.tolist()), divide=divide, of="deltas")  # type: ignore[arg-type]
    actual = merged(method, 4, base, experts)
    torch.testing.assert_close(actual, (base.double() + wanted.view(base.shape)).float(), rtol=1e-6, atol=1e-6)


def test_multislerp_of_equal_weights_is_the_first_guess_of_karcher() -> None:
    base, experts = random_models(size=1)
    actual = merged(methods.Multislerp(), 3, base, experts)
    torch.testing.assert_close(actual, merged(methods.Karcher(iterations=0), 3, base, experts), rtol=1e-6, atol=1e-6)


def test_multislerp_of_directions_that_cancel_is_the_straight_line() -> None:
    first = torch.tensor([3.0, 4.0])
    assert merged(methods.Multislerp(), 2, first, [first, -3 * first]).tolist() == pytest.approx([-3, -4])
    assert merged(methods.Multislerp(), 2, first, [first * 0, first * 0]).tolist() == [0, 0]
    assert merged(methods.Multislerp(weights=(5,), divide="none"), 1, first, [first]).tolist() == [3, 4]


def test_multislerp_refuses_weights_that_do_not_fit() -> None:
    with pytest.raises(SpecError, match="2 given for 3 experts"):
        merged(methods.Multislerp(weights=(1, 2)), 3)
    with pytest.raises(SpecError, match="add up to 0"):
        merged(methods.Multislerp(weights=(1, -1)), 2)
