"""Signs and means of weighted experts, against formulas in float64 of their own, and what they promise for any input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mergecore import merge, methods
from mergecore.arithmetic.trims import RandomDrop
from mergecore.arithmetic.weights import whole_weights
from mergecore.native.library import library_in
from mergecore.plugins.method import Method
from mergecore.registry import method_from

Array = NDArray[np.float64]
WHOLE: dict[str, dict[str, Any]] = {
    "ties": {"density": 1, "zero_sign": "positive"},
    "della": {"density": 1, "window": 0, "rescale": "none"},
    "breadcrumbs": {"scale": 1, "density": 1, "outliers": 0, "elect": "mass"},
}
"""Values with which these methods trim nothing: sign election and mean alone are left."""
WEIGHTS = [
    [-1.0], [-0.1], [1.0, -0.999], [-1.0, 0.5], [1.0, -1.0], [0.1, 0.2, -0.3], [0.7, 0.7, 0.7], [3.0, -1e-6, 0.0],
    [0.2, -0.5, 1.1], [-2.0, -3.0, -0.5], [1.0, 0.0, 2.0],
]  # fmt: skip


def drawn(count: int, size: int = 4000) -> list[torch.Tensor]:
    """Changes of eighths, so that many are equal, many are 0 and many cancel; the first ones are equal in all."""
    generator = torch.Generator().manual_seed(count)
    changes = [torch.randint(-8, 9, (size,), generator=generator) / 8 for _ in range(count)]
    for change in changes[1:]:
        change[:100] = changes[0][:100]
    return changes


def merged(method: Method, experts: list[torch.Tensor], **more: Any) -> torch.Tensor:
    """The merge on a base of zeros: the experts are their own changes."""
    ids = [f"{number}" for number in range(len(experts))]
    base = {"w": torch.zeros_like(experts[0])}
    return merge(method, base=base, experts=[{"w": expert} for expert in experts], ids=ids, **more)["w"]


def exact_sign(changes: Array, weights: list[float]) -> Array:
    """Of the weights as they are written: thousandths of eighths are whole numbers. 0 counts as +."""
    thousand = 10**6
    counts = sum(round(weight * thousand) * (change * 8).astype(np.int64) for weight, change in zip(weights, changes))
    return np.where(np.asarray(counts) < 0, -1.0, 1.0)


def elected_mean(changes: Array, weights: list[float]) -> Array:
    """Σ |w| |τ| / Σ |w| over the experts whose w τ has the elected sign, with that sign."""
    sign = exact_sign(changes, weights)
    heavy = np.array(weights)[:, None]
    agrees = heavy * changes * sign > 0
    below = np.where(agrees, np.abs(heavy), 0.0).sum(0)
    above = np.where(agrees, np.abs(heavy * changes), 0.0).sum(0)
    return np.asarray(sign * above / np.where(below == 0, 1.0, below))


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_weighted_mean_of_the_elected_sign(name: str, weights: list[float]) -> None:
    changes = drawn(len(weights))
    method = method_from(name, {**WHOLE[name], "weights": weights, "aggregate": "mean"}, "test")
    actual = merged(method, changes).double().numpy()
    exact = np.stack([change.double().numpy() for change in changes])
    np.testing.assert_allclose(actual, elected_mean(exact, weights), rtol=2**-23, atol=0)
    largest = np.where(np.array(weights)[:, None] != 0, np.abs(exact), 0.0).max(0)
    assert (np.abs(actual) <= largest).all(), "a mean is never more than the largest change"
    assert (actual * exact_sign(exact, weights) >= 0).all(), "the elected sign holds"


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("name", ["task_arithmetic", "della", "breadcrumbs"])
def test_mean_of_all_changes(name: str, weights: list[float]) -> None:
    """Without an election: Σ w τ / Σ |w|, which forgets what has a negative weight and is never more than the largest."""
    changes = drawn(len(weights))
    plain = {"task_arithmetic": {"scale": 1}, "della": {**WHOLE["della"], "elect": "none"}}
    values = plain.get(name, {**WHOLE["breadcrumbs"], "elect": "none"})
    method = method_from(name, {**values, "weights": weights, "aggregate": "mean"}, "test")
    exact, heavy = np.stack([change.double().numpy() for change in changes]), np.array(weights)
    actual = merged(method, changes).double().numpy()
    np.testing.assert_allclose(actual, heavy @ exact / np.abs(heavy).sum(), rtol=0, atol=4 * 2**-24)
    assert (np.abs(actual) <= np.abs(exact).max(0) * (1 + 2**-22)).all()


def test_one_expert_to_forget() -> None:
    """The weight of a single expert says only which way: −1, −0.1 and −7 all take the whole change away."""
    change = drawn(1)
    for weight in (-1.0, -0.1, -7.0):
        for name, values in {**WHOLE, "task_arithmetic": {"scale": 1}}.items():
            method = method_from(name, {**values, "weights": [weight], "aggregate": "mean"}, "test")
            np.testing.assert_allclose(merged(method, change).numpy(), -change[0].numpy(), rtol=2**-23)


def test_weights_that_cancel_as_written_cancel() -> None:
    """0.1 + 0.2 − 0.3 is 5e-17 in binary fractions, and 7e-9 in float32: it must elect nothing but what ties elect."""
    weights, changes = (0.1, 0.2, -0.3), [torch.tensor([1.0, -1.0, 0.7, -3.0])] * 3
    for zero, wanted in (("drop", [0.0] * 4), ("positive", [1.0, 1.0, 0.7, 3.0])):
        method = methods.Ties(density=1, weights=weights, zero_sign=zero)
        torch.testing.assert_close(merged(method, changes), torch.tensor(wanted))


def test_whole_weights_have_the_ratio_of_the_weights() -> None:
    assert whole_weights([0.1, 0.2, -0.3]) == [1, 2, -3]
    assert whole_weights([0.25, -1.5, 0.0]) == [1, -6, 0]
    assert whole_weights([1e-3, 1.0]) == [1, 1000]
    assert whole_weights([0.0, 0.0]) == [0, 0]
    assert whole_weights([1 / 3, 1e300]) == [1 / 3, 1e300], "those would not be exact"


@pytest.mark.parametrize("aggregate", ["mean", "signed_mean", "sum", "max"])
@pytest.mark.parametrize("weights", [[0.1, 0.2, -0.3], [0.5, -0.25, 1.5]], ids=str)
def test_a_fused_loop_gives_the_same_bytes(aggregate: Any, weights: list[float], tmp_path: Any) -> None:
    """Float64 in the middle of a loop included."""
    library = library_in(tmp_path)
    if library.compiler is None:
        pytest.skip("no C++ compiler")
    method = methods.Ties(density=0.5, weights=tuple(weights), aggregate=aggregate)
    experts = [change + 0.001 * torch.randn(4000, generator=torch.Generator().manual_seed(9)) for change in drawn(3)]
    assert torch.equal(merged(method, experts), merged(method, experts, library=library))


# --- averages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("uneven", [False, True])
def test_equal_float32_experts_come_back_byte_for_byte(count: int, uneven: bool) -> None:
    generator = torch.Generator().manual_seed(count)
    expert = torch.randn(5000, generator=generator) * torch.exp(20 * torch.randn(5000, generator=generator))
    weights = tuple((torch.rand(count, generator=generator) + 0.01).tolist()) if uneven else None
    result = merge(methods.Average(weights=weights), experts=[{"w": expert}] * count)["w"]
    assert torch.equal(result.view(torch.int32), expert.view(torch.int32))


@pytest.mark.parametrize("weights", [None, [0.1, 0.2, 0.4, 1.3, 7.0], [2.0, -1.0, 0.5, 0.1, 3.0]], ids=str)
def test_an_average_is_rounded_once(weights: list[float] | None) -> None:
    experts = [torch.randn(5000, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    exact, heavy = np.stack([expert.double().numpy() for expert in experts]), np.array(weights or [1.0] * 5)
    wanted = ((heavy @ exact) / heavy.sum()).astype(np.float32)
    actual = merged(methods.Average(weights=tuple(weights) if weights else None), experts).numpy()
    assert (actual != wanted).mean() < 1e-3, "but where float64 itself is undecided"
    np.testing.assert_allclose(actual, wanted, rtol=2**-23)
    if weights is None:
        assert (actual <= exact.max(0)).all() and (actual >= exact.min(0)).all()


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_a_drop_of_nothing_is_no_drop(aggregate: Any, rescale: Any) -> None:
    base = {"w": torch.randn(3000, generator=torch.Generator().manual_seed(7))}
    experts = [{"w": base["w"] + change} for change in drawn(3, 3000)]
    weights = (0.5, 0.3, -0.4)
    plain = merge(methods.Average(weights=weights, aggregate=aggregate), base=base, experts=experts)["w"]
    for rate in (0.0, (0.0, 0.0, 0.0)):
        method = methods.Average(weights=weights, aggregate=aggregate, drop=RandomDrop(rate=rate, rescale=rescale))
        assert torch.equal(merge(method, base=base, experts=experts, ids=["a", "b", "c"])["w"], plain)


def test_a_sum_with_a_drop_holds_as_much_of_the_base() -> None:
    """Σ w (θ_0 + dropped τ): elements that every expert drops are Σ w θ_0, the others have their change beside it."""
    base, experts = (
        {"w": torch.full((4000,), 10.0)},
        [{"w": torch.full((4000,), 12.0)}, {"w": torch.full((4000,), 14.0)}],
    )
    method = methods.Average(weights=(0.5, 0.25), aggregate="sum", drop=RandomDrop(rate=0.5, rescale="none"))
    values = merge(method, base=base, experts=experts, ids=["a", "b"])["w"]
    assert sorted(set(values.tolist())) == [7.5, 8.5, 9.5]
    for value, share in ((7.5, 0.25), (9.5, 0.25)):
        assert abs(float((values == value).float().mean()) - share) < 0.05


# --- nothing added ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("task_arithmetic", {"scale": 0}), ("task_arithmetic", {"scale": 1, "weights": [0, 0]}), ("ties", {"scale": 0}),
        ("ties", {"weights": [0, 0]}), ("della", {"scale": 0}), ("breadcrumbs", {"scale": 0}), ("pcb", {"scale": 0}),
        ("pcb", {"scale": [0, 0]}), ("consensus", {"scale": 0}), ("iso_c", {"scale": 0}), ("iso_cts", {"scale": 0}),
        ("tsv_m", {"scale": 0}), ("wudi", {"scale": 0, "variant": "closed"}),
    ],
)  # fmt: skip
def test_a_scale_of_0_gives_the_base_bit_for_bit(name: str, values: dict[str, Any]) -> None:
    """Minus zeros included: −0 + 0 would be +0."""
    base = {"m.weight": torch.tensor([[-0.0, 1.0], [-2.0, 0.0]]), "v": torch.tensor([-0.0, 0.0, 3.0])}
    experts = [{name: value + seed for name, value in base.items()} for seed in (1, 2)]
    method = method_from(name, values, "test")
    result = merge(method, base=base, experts=experts, ids=["a", "b"])
    for tensor, value in base.items():
        assert torch.equal(result[tensor].view(torch.int32), value.view(torch.int32)), tensor
    others = {key: value for key, value in values.items() if key not in ("scale", "weights")}
    usual = type(method).model_validate({**others, "scale": 0.5})
    assert method.revision(2) > usual.revision(2) == method.version, "what is stored of other values stays"
