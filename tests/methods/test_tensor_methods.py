"""Per-tensor methods against worked numbers, second implementations in NumPy and what must hold of any input."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import polar
from torch import Tensor

from mergecore import merge, methods
from mergecore.arithmetic.linear_algebra import combination, gram, matrix_of, polar_factor, rank_of
from mergecore.errors import SpecError
from mergecore.plugins.method import Method
from mergecore.registry import METHODS

Array = NDArray[np.float64]


def random_tensors(*shape: int, count: int = 3, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for _ in range(count)]


def of_deltas(method: Method, deltas: Sequence[Any], name: str = "w") -> Tensor:
    """The merged task vector of experts that have these, from a base of zeros."""
    tensors = [torch.as_tensor(delta, dtype=torch.float32) for delta in deltas]
    base = {name: torch.zeros_like(tensors[0])}
    return merge(method, base=base, experts=[{name: tensor} for tensor in tensors])[name]


def of_weights(method: Method, weights: Sequence[Any]) -> Tensor:
    return merge(method, experts=[{"w": torch.as_tensor(weight, dtype=torch.float32)} for weight in weights])["w"]


def close(actual: Tensor, expected: Any, tolerance: float = 2e-6) -> None:
    wanted = torch.as_tensor(np.asarray(expected), dtype=torch.float32)
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


def arrays(tensors: Sequence[Tensor]) -> list[Array]:
    return [tensor.double().numpy() for tensor in tensors]


# The shared linear algebra


def test_combination_is_the_sum_in_float64() -> None:
    tensors = random_tensors(3, 7, count=4)
    expected = sum(c * t.double() for c, t in zip((0.1, -2.0, 3.0, 1e-3), tensors, strict=True))
    assert torch.equal(combination((0.1, -2.0, 3.0, 1e-3), tensors), expected.float())


@pytest.mark.parametrize("rows", [1, 6])
def test_gram_does_not_depend_on_blocks_much(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = random_tensors(6, 50)
    stacked = torch.stack([tensor.double().reshape(rows, -1) for tensor in tensors], 1)
    for grid in (1 << 20, 64):
        monkeypatch.setattr("mergecore.arithmetic.linear_algebra.BLOCK", grid)
        torch.testing.assert_close(gram(tensors, rows), stacked @ stacked.mT, rtol=1e-12, atol=1e-12)


def test_polar_factor_is_scipys() -> None:
    matrix = random_tensors(9, 5, count=1)[0].double()
    expected, _ = polar(matrix.numpy())
    for rank in ("numerical", "full"):
        torch.testing.assert_close(polar_factor(matrix, rank), torch.from_numpy(expected), rtol=1e-10, atol=1e-10)


def test_polar_factor_of_dependent_columns_is_a_partial_isometry() -> None:
    column = torch.tensor([[3.0], [4.0]], dtype=torch.float64) / 5
    actual = polar_factor(torch.cat([column, column], 1), "numerical")
    torch.testing.assert_close(actual, torch.cat([column, column], 1) / 2**0.5)


@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e12])
def test_rank_is_relative(factor: float) -> None:
    values = torch.tensor([1.0, 1e-3, 1e-9], dtype=torch.float64) * factor
    assert rank_of(values, float(values.norm()), "numerical") == 2
    assert rank_of(values, float(values.norm()), "full") == 3


def test_what_is_a_matrix() -> None:
    assert matrix_of("w", (3, 4), "mean", ()) == (3, 4)
    assert matrix_of("w", (3, 4, 2, 2), "mean", ()) is None
    assert matrix_of("w", (3, 4, 2, 2), "flatten", ()) == (3, 16)
    assert matrix_of("w", (3, 4), "mean", ("*w*",)) is None
    assert [matrix_of("w", shape, "flatten", ()) for shape in ((), (3,), (0, 4), (4, 0), (2, 0, 3))] == [None] * 5


# SLERP


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_goes_along_the_arc(t: float) -> None:
    first, second = np.array([2.0, 0.0]), np.array([0.0, 4.0])
    angle = np.pi / 2
    expected = (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)
    close(of_weights(methods.Slerp(t=t), [first, second]), expected)


def test_slerp_keeps_the_norm_and_divides_the_angle() -> None:
    first, second = (tensor / tensor.norm() for tensor in random_tensors(40, count=2))
    actual = of_weights(methods.Slerp(t=0.3), [first, second])
    assert float(actual.norm()) == pytest.approx(1, abs=1e-6)
    assert float(torch.dot(actual, first).acos()) == pytest.approx(
        0.3 * float(torch.dot(first, second).acos()), abs=1e-5
    )


def test_slerp_from_the_base_is_slerp_from_an_expert() -> None:
    first, second = random_tensors(5, 4, count=2)
    actual = merge(methods.Slerp(t=0.3, start="base"), base={"w": first}, experts=[{"w": second}])["w"]
    assert torch.equal(actual, of_weights(methods.Slerp(t=0.3), [first, second]))


def test_slerp_is_straight_where_directions_nearly_agree_oppose_or_are_none() -> None:
    first = random_tensors(30, count=1)[0]
    turned = first.roll(1)
    near = first + 0.01 * turned
    for second in (near, -first, torch.zeros_like(first), 2 * first):
        for colinear in (0.9995, 1.0):
            if second is near and colinear == 1:
                continue
            actual = of_weights(methods.Slerp(t=0.3, colinear=colinear), [first, second])
            torch.testing.assert_close(actual, 0.7 * first + 0.3 * second)


def test_slerp_takes_exactly_two_models() -> None:
    with pytest.raises(SpecError, match="two experts, 3 experts are given"):
        of_weights(methods.Slerp(t=0.5), random_tensors(4))
    with pytest.raises(SpecError, match="base and one expert, 2"):
        of_deltas(methods.Slerp(t=0.5, start="base"), random_tensors(4, count=2))


# Karcher mean


def test_karcher_worked_number() -> None:
    close(of_weights(methods.Karcher(), [[2.0, 0.0], [0.0, 4.0]]), [2.12132, 2.12132], 5e-6)


def test_karcher_of_two_is_the_middle_of_the_arc() -> None:
    first, second = (tensor / tensor.norm() for tensor in random_tensors(40, count=2))
    torch.testing.assert_close(
        of_weights(methods.Karcher(), [first, second]), of_weights(methods.Slerp(t=0.5), [first, second])
    )


def test_karcher_is_where_descent_on_the_sphere_ends() -> None:
    """The sum of squared arc lengths, minimised over a normalised free vector with numerical gradients."""
    tensors = random_tensors(6, count=4, seed=3)
    tensors = [tensor + 1.5 for tensor in tensors]
    units = [a / np.linalg.norm(a) for a in arrays(tensors)]

    def cost(vector: Array) -> float:
        unit = vector / np.linalg.norm(vector)
        return float(sum(np.arccos(np.clip(unit @ other, -1, 1)) ** 2 for other in units))

    at = units[0] + 0.1
    for _ in range(400):
        steps = np.eye(6) * 1e-6
        slope = np.array([(cost(at + step) - cost(at - step)) / 2e-6 for step in steps])
        at = at - 0.1 * slope
        at /= np.linalg.norm(at)
    actual = of_weights(methods.Karcher(iterations=100, tolerance=1e-8), tensors).double().numpy()
    np.testing.assert_allclose(actual / np.linalg.norm(actual), at, atol=1e-5)
    assert np.linalg.norm(actual) == pytest.approx(np.mean([np.linalg.norm(a) for a in arrays(tensors)]), rel=1e-5)


def test_karcher_does_not_depend_on_size_or_order() -> None:
    tensors = random_tensors(30, count=4)
    actual = of_weights(methods.Karcher(), tensors)
    torch.testing.assert_close(of_weights(methods.Karcher(), tensors[::-1]), actual)
    # Norms far below the published absolute guard of 1e-5.
    torch.testing.assert_close(of_weights(methods.Karcher(), [t * 2**-40 for t in tensors]), actual * 2**-40)


def test_karcher_of_zeros_opposites_and_one() -> None:
    (vector,) = random_tensors(5, count=1)
    zeros = torch.zeros(5)
    assert torch.equal(of_weights(methods.Karcher(), [vector]), vector)
    assert torch.equal(of_weights(methods.Karcher(), [zeros, zeros]), zeros)
    torch.testing.assert_close(of_weights(methods.Karcher(), [vector, zeros]), vector / 2)
    torch.testing.assert_close(of_weights(methods.Karcher(), [vector, -vector]), vector)


# Model Stock


def test_model_stock_worked_number() -> None:
    close(of_deltas(methods.ModelStock(), [[1.0, 0.0], [0.6, 0.8]]), [0.6, 0.3])


@pytest.mark.parametrize("factor", [1e-8, 1e-3, 1.0])
def test_model_stock_does_not_depend_on_the_length_of_task_vectors(factor: float) -> None:
    deltas = [[1.0 * factor, 0.0], [0.6 * factor, 0.8 * factor]]
    torch.testing.assert_close(of_deltas(methods.ModelStock(), deltas) / factor, torch.tensor([0.6, 0.3]))


@pytest.mark.parametrize(
    ("angle", "group"), list(itertools.product(("mean_cosine", "mean_angle"), ("tensor", "filter")))
)
def test_model_stock_of_three_by_the_formula(angle: str, group: str) -> None:
    deltas = [delta + 1 for delta in random_tensors(4, 5)]
    rows = [a.reshape(1, -1) if group == "tensor" else a for a in arrays(deltas)]
    expected = []
    for row in range(rows[0].shape[0]):
        vectors = [a[row] for a in rows]
        cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in itertools.combinations(vectors, 2)]
        cosine = np.mean(cosines) if angle == "mean_cosine" else np.cos(np.mean(np.arccos(cosines)))
        expected.append(3 * cosine / (1 + 2 * cosine) * np.mean(vectors, 0))
    actual = of_deltas(methods.ModelStock.model_validate({"angle": angle, "group": group}), deltas)
    close(actual, np.array(expected).reshape(4, 5))


def test_model_stock_right_angles_obtuse_angles_and_zeros() -> None:
    for negative in ("clamp", "extrapolate"):
        stock = methods.ModelStock.model_validate({"negative": negative})
        close(of_deltas(stock, [[1.0, 0.0], [0.0, 1.0]]), [0, 0])
        close(of_deltas(stock, [[1.0, 0.0], [0.0, 0.0]]), [0, 0])
        close(of_deltas(stock, [[1.0, 2.0], [-1.0, -2.0]]), [0, 0])
    obtuse = [[1.0, 0.0], [-0.6, 0.8]]
    close(of_deltas(methods.ModelStock(), obtuse), [0, 0])
    close(of_deltas(methods.ModelStock(negative="extrapolate"), obtuse), [-3 * 0.2, -3 * 0.4])


@pytest.mark.parametrize("group", ["tensor", "filter"])
def test_model_stock_beyond_the_pole_is_the_base(group: str) -> None:
    """Four experts whose mean angle is above 109.5°: 1 + 3 cos Ω is below 0, and the formula would change its sign."""
    deltas = [[1.0, 0.0], [1.0, 0.0], [-1.0, 0.1], [-1.0, -0.3]]
    vectors = [np.array(delta) for delta in deltas]
    pairs = itertools.combinations(vectors, 2)
    cosines = np.array([x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in pairs])
    assert 1 + 3 * np.cos(np.arccos(cosines).mean()) < -0.3 and np.linalg.norm(np.mean(vectors, 0)) > 0.04
    for negative in ("clamp", "extrapolate"):
        values = {"angle": "mean_angle", "group": group, "negative": negative}
        close(of_deltas(methods.ModelStock.model_validate(values), deltas), [0, 0])
    cosine = cosines.mean()  # the mean of cosines is never beyond it
    expected = 4 * cosine / (1 + 3 * cosine) * np.mean(vectors, 0)
    actual = of_deltas(methods.ModelStock.model_validate({"group": group, "negative": "extrapolate"}), deltas)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float32), rtol=1e-3, atol=1e-5)


def test_model_stock_refuses_one_expert() -> None:
    with pytest.raises(SpecError, match="at least two"):
        of_deltas(methods.ModelStock(), [[1.0]])


# SCE


def test_sce_worked_number() -> None:
    close(of_deltas(methods.Sce(density=0.67), [[0.5, 0.1, -0.2], [0.3, 0.1, 0.4]]), [0, 0, 0.4])


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("factor", [1e-6, 1.0])
def test_sce_by_the_formula(density: float, factor: float) -> None:
    deltas = random_tensors(8, 5, scale=factor)
    stacked = np.stack([a.reshape(-1) for a in arrays(deltas)])
    order = np.argsort(-stacked.var(0), kind="stable")[: int(density * 40)]
    kept = np.zeros_like(stacked)
    kept[:, order] = stacked[:, order]
    weights = (kept**2).sum(1)
    sign = np.where(kept.sum(0) >= 0, 1, -1)
    effective = weights[:, None] / weights.sum() * (np.sign(kept) == sign)
    divisor = effective.sum(0)
    expected = (kept * effective).sum(0) / np.where(divisor == 0, 1, divisor)
    actual = of_deltas(methods.Sce(density=density), deltas)
    close(actual / factor, expected.reshape(8, 5) / factor)


def test_sce_breaks_ties_by_position_and_keeps_all_where_nothing_varies() -> None:
    first, second = [0.5, 0.5, 0.5, 0.25], [0.25, 0.25, 0.25, 0.25]
    actual = of_deltas(methods.Sce(density=0.67), [first, second])
    assert (actual != 0).tolist() == [True, True, False, False]
    close(of_deltas(methods.Sce(density=0.1), [first]), first)
    close(of_deltas(methods.Sce(density=0.1), [first] * 3), first)
    close(of_deltas(methods.Sce(density=0.0), [first, second]), [0.0] * 4)
    close(of_deltas(methods.Sce(), [[0.0, 0.0]] * 2), [0.0, 0.0])


def test_sce_equal_values_have_no_variance() -> None:
    """A mean formed in float32 would leave rounding behind, and it would be selected."""
    same = torch.full((50,), 0.1)
    deltas = [torch.cat([same, torch.tensor([value])]) for value in (1e-7, 2e-7, 4e-7)]
    actual = of_deltas(methods.Sce(density=0.99), deltas)
    assert not actual.any()  # one coordinate differs, and 99 % of one is none


# Spectral methods

SPECTRAL = ["iso_c", "iso_cts", "tsv_m"]


def iso_c(deltas: list[Array]) -> Array:
    left, values, right = np.linalg.svd(sum(deltas), full_matrices=False)
    return values.mean() * left @ right


def iso_cts(deltas: list[Array], fraction: float = 0.8) -> Array:
    size, tasks = min(deltas[0].shape), len(deltas)
    own = round((size - int(size * fraction)) / tasks)
    common = size - own * tasks
    left, values, right = np.linalg.svd(sum(deltas), full_matrices=False)
    shared = left[:, :common]
    pieces = [np.linalg.svd(d - shared @ shared.T @ d, full_matrices=False) for d in deltas]
    outer = np.hstack([*(u[:, :own] for u, _, _ in pieces), shared])
    inner = np.vstack([*(v[:own] for _, _, v in pieces), right[:common]])
    strength = np.concatenate([*(s[:own] for _, s, _ in pieces), values[:common]])
    return strength.mean() * polar(outer)[0] @ polar(inner)[0]


def tsv_m(deltas: list[Array]) -> Array:
    kept = min(deltas[0].shape) // len(deltas)
    pieces = [np.linalg.svd(d, full_matrices=False) for d in deltas]
    outer = np.hstack([u[:, :kept] for u, _, _ in pieces])
    inner = np.vstack([v[:kept] for _, _, v in pieces])
    return polar(outer)[0] @ np.diag(np.concatenate([s[:kept] for _, s, _ in pieces])) @ polar(inner)[0]


@pytest.mark.parametrize("shape", [(12, 12), (20, 10), (9, 31)])
@pytest.mark.parametrize("rank", ["numerical", "full"])
@pytest.mark.parametrize("name", SPECTRAL)
def test_spectral_methods_by_the_formula(name: str, rank: str, shape: tuple[int, int]) -> None:
    deltas = random_tensors(*shape, scale=1e-3)
    expected = {"iso_c": iso_c, "iso_cts": iso_cts, "tsv_m": tsv_m}[name](arrays(deltas))
    actual = of_deltas(METHODS[name].model_validate({"rank": rank, "scale": 1000}), deltas)
    close(actual, 1000 * expected, 1e-5)


def test_iso_c_worked_number() -> None:
    close(of_deltas(methods.IsoC(), [[[2, 0], [0, 0]], [[0, 0], [0, 1]]]), [[1.5, 0], [0, 1.5]])


def test_iso_c_of_a_deficient_sum() -> None:
    """Null directions get nothing by default; as published they get the mean strength in directions of the library."""
    outer, inner = random_tensors(12, 3, count=1)[0], random_tensors(3, 9, count=1, seed=1)[0]
    low = outer @ inner
    actual = of_deltas(methods.IsoC(), [low, low])
    values = torch.linalg.svdvals(actual.double())
    expected = torch.linalg.svdvals(2 * low.double()).mean()
    torch.testing.assert_close(values[:3], expected.expand(3), rtol=1e-5, atol=1e-6)
    assert float(values[3:].max()) < 1e-6
    full = torch.linalg.svdvals(of_deltas(methods.IsoC(rank="full"), [low, low]).double())
    torch.testing.assert_close(full, expected.expand(9), rtol=1e-5, atol=1e-6)


def test_iso_cts_with_one_task_or_only_common_directions_is_iso_c() -> None:
    deltas = random_tensors(10, 8)
    for rank in ("numerical", "full"):
        same = methods.IsoC.model_validate({"rank": rank})
        method_of_rank = methods.IsoCts.model_validate({"rank": rank})
        close(of_deltas(method_of_rank, deltas[:1]), of_deltas(same, deltas[:1]), 1e-5)
        common = methods.IsoCts.model_validate({"rank": rank, "common": 1})
        close(of_deltas(common, deltas), of_deltas(same, deltas), 1e-5)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.8, 1.0])
def test_iso_cts_deals_all_directions(share: float) -> None:
    method = methods.IsoCts(common=share)
    for directions, tasks in itertools.product(range(1, 26), range(1, 20, 2)):
        common, own = method.dealt(directions, tasks)
        assert common + own * tasks == directions
        assert common >= 0
        assert own >= 0
    assert methods.IsoCts().dealt(768, 8) == (616, 19)  # 0.2 · 768 = 154 directions: 19 for each of 8 tasks


def test_tsv_m_worked_number() -> None:
    """One triplet each, both with the same left vector: the published second row is the library's choice of sign."""
    deltas = [[[2, 0], [0, 0.2]], [[0.6, 0.8], [0, 0]]]
    close(of_deltas(methods.TsvM(), deltas), [[1.565248, 0.223607], [0, 0]])
    full = of_deltas(methods.TsvM(rank="full"), deltas)
    close(full[0], [1.565248, 0.223607])
    close(full[1].abs(), [1.118034, 1.118034])


def test_tsv_m_of_orthogonal_tasks_is_their_sum() -> None:
    deltas = [torch.zeros(6, 4), torch.zeros(6, 4)]
    deltas[0][0, 0], deltas[0][1, 1], deltas[1][2, 2], deltas[1][3, 3] = 3.0, 2.0, 1.0, 0.5
    close(of_deltas(methods.TsvM(), deltas), deltas[0] + deltas[1])


def test_tsv_m_of_equal_experts_is_their_best_low_rank_form() -> None:
    (delta,) = random_tensors(8, 6, count=1)
    left, values, right = np.linalg.svd(arrays([delta])[0], full_matrices=False)
    close(of_deltas(methods.TsvM(), [delta] * 3), left[:, :2] * values[:2] @ right[:2], 1e-5)
    close(of_deltas(methods.TsvM(), [delta]), delta, 1e-5)


def test_tsv_m_with_more_tasks_than_directions() -> None:
    deltas = random_tensors(2, 5, count=3)
    close(of_deltas(methods.TsvM(scale=0.5), deltas), sum(deltas) / 6)
    close(of_deltas(methods.TsvM(crowded="zero"), deltas), torch.zeros(2, 5))


@pytest.mark.parametrize("name", SPECTRAL)
def test_spectral_methods_turn_with_their_inputs(name: str) -> None:
    """Orthogonal changes of basis on both sides commute with them."""
    deltas = random_tensors(9, 7)
    outer = torch.linalg.qr(random_tensors(9, 9, count=1, seed=5)[0])[0]
    inner = torch.linalg.qr(random_tensors(7, 7, count=1, seed=6)[0])[0]
    method = METHODS[name]()
    actual = of_deltas(method, [outer @ delta @ inner for delta in deltas])
    torch.testing.assert_close(actual, outer @ of_deltas(method, deltas) @ inner, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SPECTRAL)
def test_spectral_methods_without_changes_and_with_a_task_that_changes_nothing(name: str) -> None:
    (delta,) = random_tensors(8, 6, count=1)
    zeros = torch.zeros(8, 6)
    assert not of_deltas(METHODS[name](), [zeros, zeros]).any()
    assert not of_deltas(METHODS[name](), [delta, -delta]).any() or name != "iso_c"
    left, values, right = np.linalg.svd(arrays([delta])[0], full_matrices=False)
    kept = {"iso_c": 6, "iso_cts": 5, "tsv_m": 3}[name]  # of iso_cts' six directions one is the empty task's
    strength = values[:kept] if name == "tsv_m" else values[:kept].sum() / 6
    close(of_deltas(METHODS[name](), [delta, zeros]), left[:, :kept] * strength @ right[:kept], 1e-5)


@pytest.mark.parametrize("name", SPECTRAL)
def test_what_is_no_matrix_gets_the_mean(name: str) -> None:
    convolutions, vectors = random_tensors(6, 2, 3, 3), random_tensors(7)
    close(of_deltas(METHODS[name].model_validate({"scale": 0.5}), vectors), sum(vectors) / 6)
    close(of_deltas(METHODS[name](), convolutions), sum(convolutions) / 3)
    flat = of_deltas(METHODS[name](), [delta.reshape(6, 18) for delta in convolutions])
    assert torch.equal(
        of_deltas(METHODS[name].model_validate({"convolutions": "flatten"}), convolutions), flat.reshape(6, 2, 3, 3)
    )
    matrices = random_tensors(5, 4)
    close(of_deltas(METHODS[name](), matrices, "visual.text_projection"), sum(matrices) / 3)


# WUDI


def loss(actual: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    actual = actual.double()
    return sum(((actual - d.double()) @ d.double().mT).square().sum() / d.double().square().sum() for d in deltas)


WORKED = [torch.tensor([[2.0, 0.0], [0.0, 0.2]]), torch.tensor([[0.6, 0.8], [0.0, 0.0]])]
CLOSED = methods.Wudi(variant="closed")


def test_wudi_worked_number() -> None:
    actual = of_deltas(CLOSED, WORKED)
    close(actual, [[1.998164, -0.244835], [-0.001469, 0.004132]])
    assert float(loss(actual, WORKED)) == pytest.approx(0.000994, abs=1e-6)
    assert float(loss(WORKED[0] + WORKED[1], WORKED)) == pytest.approx(1.828372, abs=1e-6)
    assert float(loss((WORKED[0] + WORKED[1]) / 2, WORKED)) == pytest.approx(0.503232, abs=1e-6)


@pytest.mark.parametrize("shape", [(7, 5), (4, 20)])
def test_wudi_closed_form_has_no_gradient(shape: tuple[int, int]) -> None:
    """Also where the inputs outnumber the task vectors' rows, so that the curvature is deficient."""
    deltas = random_tensors(*shape)
    actual = of_deltas(CLOSED, deltas).double().requires_grad_()
    (slope,) = torch.autograd.grad(loss(actual, deltas), actual)
    assert float(slope.abs().max()) < 1e-5
    total = sum(deltas).double().requires_grad_()
    (before,) = torch.autograd.grad(loss(total, deltas), total)
    assert float(before.abs().max()) > 0.1


def test_wudi_closed_form_moves_only_where_task_vectors_are() -> None:
    """Of all minima it is the one nearest to the sum: inputs that no task vector reacts to stay unanswered."""
    deltas = random_tensors(3, 20, count=2)
    moved = (of_deltas(CLOSED, deltas) - sum(deltas)).double()
    stacked = torch.cat([delta.double() for delta in deltas])
    beyond = moved - moved @ torch.linalg.pinv(stacked) @ stacked
    assert float(beyond.abs().max()) < 1e-5


def test_wudi_closed_form_is_regmean_with_the_task_vectors_as_inputs() -> None:
    deltas = arrays(random_tensors(7, 5))
    grams = [d.T @ d / (d**2).sum() for d in deltas]
    expected = np.linalg.solve(sum(grams), sum(g @ d.T for g, d in zip(grams, deltas, strict=True))).T
    close(of_deltas(CLOSED, deltas), expected, 1e-5)


def test_wudi_closed_form_of_low_rank_experts() -> None:
    """Rounding of a rank-2 update (an adapter folded in) must not become a direction of its own."""
    pairs = zip(random_tensors(12, 2), random_tensors(2, 16, seed=1), strict=True)
    deltas = [outer @ inner for outer, inner in pairs]
    actual = of_deltas(CLOSED, deltas)
    assert float(actual.abs().max()) < 4 * max(float(delta.abs().max()) for delta in deltas)
    assert float(loss(actual, deltas)) < 1e-3 * float(loss(sum(deltas), deltas))


def test_wudi_ridge_goes_from_the_minimum_to_the_sum() -> None:
    deltas = random_tensors(7, 5)
    losses = [
        float(loss(of_deltas(methods.Wudi(variant="closed", ridge=r), deltas), deltas)) for r in (0, 0.01, 0.1, 1, 10)
    ]
    assert losses == sorted(losses)
    close(of_deltas(methods.Wudi(variant="closed", ridge=1e9), deltas), sum(deltas), 1e-5)


def test_wudi_of_one_expert_or_equal_ones_is_the_expert() -> None:
    (delta,) = random_tensors(7, 5, count=1)
    close(of_deltas(CLOSED, [delta]), delta, 1e-5)
    close(of_deltas(CLOSED, [delta] * 3), delta, 1e-5)
    close(of_deltas(methods.Wudi(), [delta]), delta, 1e-5)


def test_wudi_iterative_is_adam_on_the_loss() -> None:
    deltas = random_tensors(7, 5, scale=0.01)
    actual = sum(deltas).double().requires_grad_()
    optimiser = torch.optim.Adam([actual], lr=1e-5)
    for _ in range(300):
        optimiser.zero_grad()
        loss(actual, deltas).backward()
        optimiser.step()
    merged = of_deltas(methods.Wudi(), deltas)
    torch.testing.assert_close(merged, actual.detach().float(), rtol=1e-6, atol=1e-9)
    assert float((merged - sum(deltas)).abs().max()) < 3.1e-3


def test_wudi_iterative_goes_down_towards_the_closed_form() -> None:
    deltas = random_tensors(7, 5)
    losses = [
        float(loss(of_deltas(methods.Wudi(steps=steps, learning_rate=0.01), deltas), deltas))
        for steps in (0, 5, 50, 500, 3000)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(float(loss(sum(deltas), deltas)), rel=1e-5)
    assert losses[-1] == pytest.approx(float(loss(of_deltas(CLOSED, deltas), deltas)), rel=1e-3)


@pytest.mark.parametrize("variant", ["closed", "iterative"])
def test_wudi_zeros(variant: str) -> None:
    method = methods.Wudi.model_validate({"variant": variant})
    deltas, zeros = random_tensors(7, 5), torch.zeros(7, 5)
    assert not of_deltas(method, [zeros, zeros]).any()
    torch.testing.assert_close(of_deltas(method, [*deltas, zeros]), of_deltas(method, deltas))


def test_wudi_leaves_what_is_not_linear() -> None:
    vectors, matrices, kernels = random_tensors(5), random_tensors(7, 5), random_tensors(4, 2, 3, 3)
    mean = methods.Wudi(others="mean", scale=0.5)
    for name, deltas in (("norm", vectors), ("embed_tokens.weight", matrices), ("conv", kernels)):
        assert not of_deltas(methods.Wudi(), deltas, name).any()
        close(of_deltas(mean, deltas, name), sum(deltas) / 6)
    flat = of_deltas(methods.Wudi(), [kernel.reshape(4, 18) for kernel in kernels])
    assert torch.equal(of_deltas(methods.Wudi(convolutions="flatten"), kernels), flat.reshape(4, 2, 3, 3))


def test_wudi_of_weights_kept_as_inputs_by_outputs() -> None:
    deltas = random_tensors(7, 5)
    turned = of_deltas(methods.Wudi(variant="closed", transposed=("w",)), [delta.T for delta in deltas])
    torch.testing.assert_close(turned.T, of_deltas(CLOSED, deltas))


# All of them

ALL = [methods.Karcher(), methods.ModelStock(), methods.Sce(density=0.5), methods.Slerp(t=0.4), CLOSED, methods.Wudi()]
ALL += [METHODS[name]() for name in SPECTRAL]


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
@pytest.mark.parametrize("shape", [(), (1,), (6,), (0,), (0, 4), (4, 0), (1, 6), (6, 1), (4, 3, 2, 2), (4, 0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape(method: Method, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, *experts = (tensor.to(dtype) for tensor in random_tensors(*shape, count=3))
    for pool in (experts, [base, experts[0]], [base, base]):
        actual = merge(method, base={"w": base}, experts=[{"w": expert} for expert in pool])["w"]
        assert actual.shape == base.shape
        assert actual.dtype == dtype
        assert bool(torch.isfinite(actual).all())
    assert torch.equal(actual, base)


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_bfloat16_is_rounded_once_from_the_float32_result(method: Method) -> None:
    base, *experts = (tensor.to(torch.bfloat16) for tensor in random_tensors(9, 6, count=3))
    actual = merge(method, base={"w": base}, experts=[{"w": expert} for expert in experts])["w"]
    wide = merge(method, base={"w": base.float()}, experts=[{"w": expert.float()} for expert in experts])["w"]
    assert torch.equal(actual, wide.to(torch.bfloat16))
