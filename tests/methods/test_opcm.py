"""OPCM: the specs' worked numbers, the eager form written independently in numpy, and what its projections promise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergecore import merge
from mergecore.errors import SpecError
from mergecore.methods import Opcm
from mergecore.registry import method_from
from mergecore.statistics.projected_sum import closed, projected

Array = NDArray[np.float64]
WORKED: dict[tuple[float, str], tuple[list[list[float]], list[float]]] = {
    (0.5, "block"): (
        [[2.1688197, 1.4458798, -0.7229399], [0, 1.4458798, 2.1688197], [1.4458798, -1.4458798, 0.7229399]],
        [0.72294, 1.44588],
    ),
    (0.5, "strict"): (
        [[2.4549373, 0, 0], [0, 1.6366248, 2.4549373], [0, -1.6366248, 0.8183124]],
        [0.818312, 1.636625],
    ),
    (0.9, "block"): (
        [[2.2830453, 0, -0.7610151], [0, 1.5220302, 2.2830453], [1.5220302, -1.5220302, 0.7610151]],
        [0.761015, 1.52203],
    ),
    (0.9, "strict"): (
        [[3.1859473, 0, 0], [0, 2.1239649, 0], [0, 0, 1.0619824]],
        [1.061982, 2.123965],
    ),
}
"""specs E8: (share, projection) → the merged matrix and bias of two task vectors."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_deltas(deltas: Sequence[dict[str, Tensor]], **values: Any) -> dict[str, Tensor]:
    """The merged task vector of deltas on a base of zeros."""
    base = {name: torch.zeros_like(value) for name, value in deltas[0].items()}
    ids = [f"{number:02}" for number in range(len(deltas))]
    return merge(method_from("opcm", values, "test"), base=base, experts=deltas, ids=ids)


@pytest.mark.parametrize(("share", "projection"), WORKED)
def test_worked_numbers(share: float, projection: str) -> None:
    first = {"w.weight": torch.diag(torch.tensor([3.0, 2, 1])), "w.bias": torch.tensor([1.0, 0])}
    second = {
        "w.weight": torch.tensor([[1.0, 2, -1], [0, 1, 3], [2, -2, 1]]),
        "w.bias": torch.tensor([0.0, 2]),
    }
    actual = of_deltas([first, second], share=share, projection=projection)
    matrix, bias = WORKED[share, projection]
    torch.testing.assert_close(actual["w.weight"], torch.tensor(matrix), rtol=0, atol=2e-6)
    torch.testing.assert_close(actual["w.bias"], torch.tensor(bias), rtol=0, atol=2e-6)
    norm = sum(float((value.double() ** 2).sum()) for value in actual.values()) ** 0.5
    assert norm == pytest.approx(4.629074, abs=1e-5)


def full_projection(before: Array, delta: Array, share: float, projection: str) -> Array:
    """P(τ) as the specs define it, with the full bases."""
    left, values, right = np.linalg.svd(before, full_matrices=True)
    leading = int((np.cumsum(values) / values.sum() <= share).sum()) if share < 1 else len(values)
    core = left.T @ delta @ right.T
    np.fill_diagonal(core, 0)
    core[:leading, :leading] = 0
    if projection == "strict":
        core[:leading], core[:, :leading] = 0, 0
    return left @ core @ right


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (7, 1)])
@pytest.mark.parametrize("projection", ["block", "strict"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_the_thin_decomposition_is_enough(shape: tuple[int, int], projection: Any, share: float) -> None:
    before, delta = random(*shape), random(*shape, seed=1)
    actual = projected(delta, before, share, projection)
    wanted = full_projection(before.numpy(), delta.numpy(), share, projection)
    assert np.abs(actual.numpy() - wanted).max() < 1e-10
    assert abs(float((actual * before).sum())) < 1e-10, "orthogonal to what is there"
    scaled = projected(delta, before * 7, share, projection)
    torch.testing.assert_close(scaled, actual, rtol=1e-12, atol=1e-12)


def test_turning_both_sides_turns_the_projection() -> None:
    before, delta = random(6, 4), random(6, 4, seed=1)
    left, right = torch.linalg.qr(random(6, 6, seed=2))[0], torch.linalg.qr(random(4, 4, seed=3))[0]
    turned = projected(left @ delta @ right, left @ before @ right, 0.5, "block")
    torch.testing.assert_close(turned, left @ projected(delta, before, 0.5, "block") @ right)


@pytest.mark.parametrize("projection", ["block", "strict"])
def test_directions_that_are_not_there_take_nothing(projection: Any) -> None:
    """Nothing merged yet: all is free. Rank one: outside of its vectors the diagonal is not touched."""
    delta = random(4, 3)
    assert torch.equal(projected(delta, torch.zeros(4, 3, dtype=torch.float64), 0.5, projection), delta)
    before = torch.zeros(4, 3, dtype=torch.float64)
    before[0, 0] = 2.0
    wanted = delta.clone()
    wanted[0, 0] = 0
    torch.testing.assert_close(projected(delta, before, 0.5, projection), wanted)


def test_how_many_directions_are_closed() -> None:
    values = torch.tensor([3.0, 2, 1], dtype=torch.float64)
    assert [closed(values, share) for share in (0, 0.49, 0.5, 0.84, 0.99, 1)] == [0, 0, 1, 2, 2, 3]
    assert closed(torch.zeros(0), 0.5) == 0


def eager(deltas: Sequence[Array], share: float, projection: str) -> Array:
    """The algorithm as the paper states it, normalising at every arrival (specs §8a)."""
    merged, strength, norms = deltas[0].copy(), 1.0, [np.linalg.norm(deltas[0])]
    for delta in deltas[1:]:
        norms.append(np.linalg.norm(delta))
        total = strength * merged + full_projection(merged, delta, share, projection)
        strength = float(np.linalg.norm(total) / np.mean(norms))
        merged = total / strength
    return merged


@pytest.mark.parametrize("projection", ["block", "strict"])
def test_lazy_is_eager(projection: str) -> None:
    deltas = [random(9, 6, seed=seed) * (1 + seed) for seed in range(5)]
    actual = of_deltas([{"m": delta.float()} for delta in deltas], share=0.4, projection=projection)["m"]
    wanted = eager([delta.float().double().numpy() for delta in deltas], 0.4, projection)
    np.testing.assert_allclose(actual.numpy(), wanted, rtol=0, atol=1e-5)
    assert float(actual.norm()) == pytest.approx(np.mean([float(delta.norm()) for delta in deltas]), rel=1e-6)


def test_an_expert_twice_adds_nothing_to_its_matrices() -> None:
    delta = {"m": random(8, 5).float(), "v": random(7).float()}
    actual = of_deltas([delta, delta], share=1.0)
    # S = (τ_m, 2 τ_v), scaled to the norm of τ.
    before, after = (sum(float(d[n].norm() ** 2) * k**2 for n, k in (("m", 1), ("v", f))) for d, f in ((delta, 1), (delta, 2)))  # fmt: skip
    factor = (before / after) ** 0.5
    torch.testing.assert_close(actual["m"], delta["m"] * factor)
    torch.testing.assert_close(actual["v"], delta["v"] * 2 * factor)


def test_one_expert_is_that_expert() -> None:
    base = {"m": random(8, 5).float(), "v": random(7, seed=3).float()}
    expert = {name: value * 1.5 for name, value in base.items()}
    actual = merge(Opcm(), base=base, experts=[expert])
    assert all(torch.equal(actual[name], base[name] + (expert[name] - base[name])) for name in base)


def test_only_linear_layers_are_projected() -> None:
    """Embeddings, convolutions, vectors and scalars are added as they are; GPT-NeoX's embed_out is a linear layer."""
    names = {
        "model.embed_tokens.weight": (6, 4),
        "transformer.wpe.weight": (6, 4),
        "shared.weight": (6, 4),
        "conv.weight": (3, 2, 2, 2),
        "norm.weight": (5,),
        "scale": (),
    }
    linear = {"embed_out.weight": (6, 4), "mlp.shared_expert.up_proj.weight": (6, 4)}
    deltas = [
        {name: random(*shape, seed=10 * seed + n).float() for n, (name, shape) in enumerate((names | linear).items())}
        for seed in range(2)
    ]
    actual = of_deltas(deltas)
    ratio = actual["scale"] / (deltas[0]["scale"] + deltas[1]["scale"])
    for name in names:
        torch.testing.assert_close(actual[name], (deltas[0][name] + deltas[1][name]) * ratio, rtol=1e-5, atol=1e-6)
    for name in linear:
        free = actual[name] / ratio - deltas[0][name]
        assert abs(float((free.double() * deltas[0][name].double()).sum())) < 1e-4
    excluded = of_deltas(deltas, excluded=["*embed_out*"])
    ratio = excluded["scale"] / (deltas[0]["scale"] + deltas[1]["scale"])
    name = "embed_out.weight"
    torch.testing.assert_close(excluded[name], (deltas[0][name] + deltas[1][name]) * ratio, rtol=1e-5, atol=1e-6)


def test_zero_task_vectors_and_frozen_tensors() -> None:
    zeros = {"m": torch.zeros(4, 3), "v": torch.zeros(3)}
    assert all(not value.any() for value in of_deltas([zeros, zeros]).values())
    delta = {"m": random(4, 3).float(), "v": torch.zeros(3)}
    actual = of_deltas([zeros, delta])
    # The mean of the norms counts the expert that changed nothing: half of the other's norm is left.
    torch.testing.assert_close(actual["m"], delta["m"] / 2)
    assert not actual["v"].any()


def test_order() -> None:
    """It matters, a list of positions is the same list of experts, and a seed gives one order for any listing."""
    deltas = [{"m": random(6, 5, seed=seed).float()} for seed in range(4)]
    plain = of_deltas(deltas)["m"]
    turned = of_deltas([deltas[2], deltas[0], deltas[3], deltas[1]])["m"]
    assert not torch.allclose(plain, turned, rtol=1e-3)
    assert torch.equal(of_deltas(deltas, order=[2, 0, 3, 1])["m"], turned)
    base = {"m": torch.zeros(6, 5)}
    ids = ["a", "b", "c", "d"]
    actual = set()
    for seed in range(6):
        method = method_from("opcm", {"order": {"seed": seed}}, "test")
        merged = merge(method, base=base, experts=deltas, ids=ids)["m"]
        assert torch.equal(merged, merge(method, base=base, experts=deltas[::-1], ids=ids[::-1])["m"])
        actual.add(float(merged[0, 0]))
    assert len(actual) > 1
    with pytest.raises(SpecError, match="ids"):
        merge(method, base=base, experts=deltas)


def test_an_order_that_is_none_is_refused() -> None:
    for order in ([0, 0, 1], [0, 1], [1, 2, 3]):
        with pytest.raises(SpecError, match="is no order of 3 experts"):
            of_deltas([{"m": random(2, 2).float()}] * 3, order=order)
