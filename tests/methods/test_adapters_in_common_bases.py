"""KnOTS and Core Space: the steps of the authors' code written anew on full matrices, and what must hold by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergecore import merge
from mergecore.arithmetic.low_rank import dropped_at_random
from mergecore.checkpoints.experts import AdapterExpert
from mergecore.errors import SpecError
from mergecore.methods import IsoC, LoraArithmetic, LoraCoreSpace, LoraKnots, RandomDrop, TsvM
from mergecore.plugins.adapter_method import combined_modules, ranks_made
from mergecore.tensors.source import TensorInfo
from tests.methods.test_adapter_methods import change, close, drawn, expert, result

Matrix = NDArray[np.float64]
SHAPES = {"m": (13, 11), "n": (8, 12)}
SELECTION = {f"{name}.weight": TensorInfo("F32", shape) for name, shape in SHAPES.items()}


def pool(ranks: Sequence[int] = (2, 3, 2), scalings: Sequence[float] = (0.5, 1.0, -2.0)) -> list[AdapterExpert]:
    """Adapters of two modules."""
    draw = torch.Generator().manual_seed(2)
    experts = []
    for number, (rank, scaling) in enumerate(zip(ranks, scalings, strict=True)):
        modules = {
            name: (torch.randn(rank, columns, generator=draw), torch.randn(rows, rank, generator=draw))
            for name, (rows, columns) in SHAPES.items()
        }
        experts.append(expert(f"expert {number}", scaling, **modules))
    return experts


def trim(values: Matrix, density: float) -> Matrix:
    """The authors' rule: everything that is not below the k-th smallest magnitude, k = n − ⌊density · n⌋."""
    if density >= 1:
        return values
    order = np.sort(np.abs(values))
    return values * (np.abs(values) >= order[len(values) - int(density * len(values)) - 1])


def elected_mean(rows: Matrix) -> Matrix:
    """The mean over the values of one coordinate that have the sign of their sum."""
    sign = np.sign(rows.sum(0))
    kept = rows * (np.sign(rows) == sign)
    return kept.sum(0) / np.maximum((kept != 0).sum(0), 1)


def knots(
    deltas: Mapping[str, list[Matrix]], density: float, scope: str = "global", least: float = 1e-9
) -> dict[str, Matrix]:
    """KnOTS-TIES on full matrices: the SVD of [Δ_1 … Δ_T], then TIES of the S Vᵀ_t."""
    bases, parts = {}, {}
    for name, matrices in deltas.items():
        left, values, right = np.linalg.svd(np.concatenate(matrices, 1), full_matrices=False)
        kept = values > least
        bases[name] = left[:, kept]
        parts[name] = np.split(values[kept, None] * right[kept], len(matrices), 1)
    flat = {name: np.stack([part.reshape(-1) for part in of_module]) for name, of_module in parts.items()}
    if scope == "global":
        joined = np.concatenate([flat[name] for name in flat], 1)
        trimmed = np.stack([trim(row, density) for row in joined])
        cuts = np.cumsum([flat[name].shape[1] for name in flat])[:-1]
        flat = dict(zip(flat, np.split(trimmed, cuts, 1), strict=True))
    else:
        flat = {name: np.stack([trim(row, density) for row in rows]) for name, rows in flat.items()}
    return {name: bases[name] @ elected_mean(flat[name]).reshape(parts[name][0].shape) for name in deltas}


def deltas_of(experts: Sequence[AdapterExpert]) -> dict[str, list[Matrix]]:
    return {name: [change(adapter, f"{name}.weight").numpy() for adapter in experts] for name in SHAPES}


def merged_updates(method: Any, experts: Sequence[AdapterExpert]) -> dict[str, Tensor]:
    ranks = ranks_made(method, experts, SELECTION)
    actual = {}
    for target, combined in combined_modules(method, experts, SELECTION):
        assert combined.down.shape[0] == combined.up.shape[1] == ranks[target]
        actual[target.removesuffix(".weight")] = combined.up @ combined.down
    return actual


# --- KnOTS ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("scope", ["global", "module"])
@pytest.mark.parametrize("side", ["outputs", "inputs"])
def test_knots_on_full_matrices(density: float, scope: Any, side: Any) -> None:
    experts = pool()
    deltas = deltas_of(experts)
    if side == "inputs":
        deltas = {name: [matrix.T for matrix in matrices] for name, matrices in deltas.items()}
    wanted = knots(deltas, density, scope)
    actual = merged_updates(LoraKnots(density=density, scope=scope, side=side, scale=0.6), experts)
    for name, matrix in actual.items():
        turned = wanted[name].T if side == "inputs" else wanted[name]
        close(matrix, 0.6 * torch.from_numpy(turned))


def test_the_authors_cut_of_singular_values() -> None:
    """Weak directions are left out before anything is counted, with their absolute threshold."""
    experts = pool(scalings=(0.5, 1e-2, 1.0))
    wanted = knots(deltas_of(experts), 0.3, least=0.05)
    close(merged_updates(LoraKnots(density=0.3, least=0.05), experts)["m"], torch.from_numpy(wanted["m"]))
    whole = knots(deltas_of(experts), 0.3)
    assert not np.allclose(whole["m"], wanted["m"])


def test_without_election_the_common_basis_changes_nothing() -> None:
    """U S Σ V_t is the sum of the updates: what KnOTS is comes from trims and elections in the basis."""
    experts = pool()
    actual = merged_updates(LoraKnots(density=1, elect="none", aggregate="sum"), experts)
    for name, matrix in merged_updates(LoraArithmetic(), experts).items():
        close(actual[name], matrix)
    cut = merged_updates(LoraKnots(density=1, elect="none", aggregate="sum", rank=3), experts)
    for name, matrix in merged_updates(LoraArithmetic(rank=3), experts).items():
        close(cut[name], matrix)


@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_equal_and_opposite_adapters(scaling: float) -> None:
    """Equal updates are themselves, whatever their factors; opposite ones cancel and leave nothing."""
    adapter = drawn("a", 3, 0, scaling)
    again = expert(
        "b", scaling / 4, m=(adapter.stored.read("m.down").view(3, 7) * 2, adapter.stored.read("m.up").view(9, 3) * 2)
    )
    close(result(LoraKnots(density=1), [adapter, again]), change(adapter))
    opposite = expert(
        "b", -scaling, m=(adapter.stored.read("m.down").view(3, 7), adapter.stored.read("m.up").view(9, 3))
    )
    assert float(result(LoraKnots(density=1, elect="none"), [adapter, opposite]).abs().max()) < 1e-12


def test_knots_where_some_have_nothing() -> None:
    untrained = expert("b", m=(torch.randn(3, 7), torch.zeros(9, 3)))
    adapter = drawn("a", 3, 0)
    close(result(LoraKnots(density=1), [adapter, untrained]), change(adapter))
    for method in (LoraKnots(), LoraKnots(rank=2), LoraKnots(scope="module"), LoraCoreSpace(), LoraCoreSpace(rank=2)):
        assert not result(method, [untrained, untrained]).any()
    lacking = expert("b", n=(torch.ones(1, 5), torch.ones(4, 1)))
    for method in (LoraKnots(density=1), LoraCoreSpace(), LoraCoreSpace(merge="ties", density=1)):
        close(result(method, [adapter, lacking]), change(adapter))
    with_tie = result(LoraKnots(density=(1, 0.3)), [adapter, lacking])
    close(with_tie, change(adapter))


# --- Core Space -------------------------------------------------------------------------------------------------------


def core_matrices(experts: Sequence[AdapterExpert], name: str) -> tuple[Matrix, list[Matrix], Matrix]:
    """U_B, the Uᵀ Δ_t V, and Vᵀ_A, from the factors as they stand."""
    rows, columns = SHAPES[name]
    up = [adapter.stored.read(f"{name}.up").view(rows, -1).double().numpy() for adapter in experts]
    down = [adapter.stored.read(f"{name}.down").view(-1, columns).double().numpy() for adapter in experts]
    outer = np.linalg.svd(np.concatenate(up, 1), full_matrices=False)[0]
    inner = np.linalg.svd(np.concatenate(down), full_matrices=False)[2]
    return outer, [outer.T @ delta @ inner.T for delta in deltas_of(experts)[name]], inner


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_in_core_space(density: float) -> None:
    experts = pool()
    actual = merged_updates(LoraCoreSpace(merge="ties", density=density, scale=0.3), experts)
    for name, matrix in actual.items():
        outer, cores, inner = core_matrices(experts, name)
        merged = elected_mean(np.stack([trim(core.reshape(-1), density) for core in cores])).reshape(cores[0].shape)
        close(matrix, 0.3 * torch.from_numpy(outer @ merged @ inner))


def test_sums_means_and_drops_in_core_space() -> None:
    experts = pool()
    for values in ({}, {"rank": 3}):
        for merged, aggregate in (("sum", "sum"), ("mean", "mean")):
            actual = merged_updates(LoraCoreSpace.model_validate({"merge": merged, "scale": 0.7, **values}), experts)
            wanted = merged_updates(
                LoraArithmetic.model_validate({"aggregate": aggregate, "scale": 0.7, **values}), experts
            )
            for name, matrix in wanted.items():
                close(actual[name], matrix)
    drop = RandomDrop(rate=0.5, seed=3)
    actual = merged_updates(LoraCoreSpace(merge="sum", drop=drop), experts)
    outer, cores, inner = core_matrices(experts, "m")
    left = [
        dropped_at_random(torch.from_numpy(core), drop, place, experts[place].id, "m.weight")
        for place, core in enumerate(cores)
    ]
    assert any(bool((core == 0).any()) for core in left)
    norms = [float(matrix.norm()) for matrix in (actual["m"], torch.stack(left).sum(0))]
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)
    close(actual["m"], torch.from_numpy(outer) @ torch.stack(left).sum(0) @ torch.from_numpy(inner))


def test_tsv_and_iso_in_core_space_are_those_of_the_models() -> None:
    """Both are made of singular vectors, which a pair of orthonormal bases does not change. Iso's mean is over fewer."""
    draw = torch.Generator().manual_seed(4)
    rows, columns, rank = 9, 12, 3
    experts = [
        expert(f"{n}", 1.5, m=(torch.randn(rank, columns, generator=draw), torch.randn(rows, rank, generator=draw)))
        for n in range(3)
    ]
    base = {"m.weight": torch.zeros(rows, columns)}
    models = [{"m.weight": change(adapter).float()} for adapter in experts]
    wanted = merge(TsvM(scale=0.8), base=base, experts=models)["m.weight"].double()
    close(result(LoraCoreSpace(scale=0.8), experts), wanted, 1e-4)
    wanted = merge(IsoC(), base=base, experts=models)["m.weight"].double()  # nine singular values here as well
    close(result(LoraCoreSpace(merge="sum", isotropic=True), experts), wanted, 1e-4)


def test_more_experts_than_rows_have_the_mean() -> None:
    experts = [expert(f"{n}", m=(torch.full((1, 3), 1.0 + n), torch.ones(2, 1))) for n in range(3)]
    close(result(LoraCoreSpace(), experts), torch.full((2, 3), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("kind", [LoraKnots, LoraCoreSpace])
def test_values_per_expert(kind: Any) -> None:
    with pytest.raises(SpecError, match="density: 2 given for 3 experts"):
        kind(density=(0.1, 0.2)).validate_count(3)
    values = {"merge": "ties"} if kind is LoraCoreSpace else {}
    method = kind(density=(0.3, 0.6, 0.9), drop=RandomDrop(rate=(0.1, 0.2, 0.3)), **values)
    experts, order = [drawn(name, 2, seed) for seed, name in enumerate("abc")], [2, 0, 1]
    close(result(method, experts), result(method.bound(order), [experts[place] for place in order]))
    assert method.bound(order).density == (0.9, 0.3, 0.6)
