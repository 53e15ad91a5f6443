"""PCB-Merging: the worked numbers, a plain float64 implementation of every form, and the edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergecore import merge, methods
from mergecore.errors import MergeloomError

FORMS = ["es", "vision", "nlp", "paper"]
ROWS = torch.tensor([[0.8, -0.2, 0.1, 0.0, 0.5, -0.4], [0.6, 0.3, -0.1, 0.2, -0.5, 0.1]])
Array = NDArray[np.float64]


def merged(rows: Tensor, split: int = 0, dtype: torch.dtype = torch.float32, **values: Any) -> Tensor:
    """PCB on rows of task vectors from a base of zeros; `split` cuts the flat vector into two tensors."""

    def model(row: Tensor) -> dict[str, Tensor]:
        row = row.to(dtype)
        return {"a": row[:split], "b": row[split:]} if split else {"a": row}

    base = model(torch.zeros(rows.shape[1]))
    actual = merge(methods.Pcb.model_validate(values), base=base, experts=[model(row) for row in rows])
    return torch.cat([actual[name] for name in sorted(actual)])


@pytest.mark.parametrize("split", [0, 1, 4])
@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("es", [0.7, 0, 0, 0, -0.5, -0.4]),
        ("vision", [0.7, 0, 0, 0, -0.5, -0.4]),
        ("nlp", [0.7, 0, 0, 0.2, 0, -0.4]),
    ],
)
def test_worked_numbers(form: str, expected: list[float], split: int) -> None:
    actual = merged(ROWS, split, density=0.5, clip=0, form=form)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def norm(values: Array) -> Array:
    low, high = values.min(-1, keepdims=True), values.max(-1, keepdims=True)
    return (values - low) / (high - low)


def reference(rows: Tensor, form: str, density: float, clip: float, scales: list[float]) -> tuple[Array, Array]:
    """(merged, how near to its cut the nearest score of each coordinate lies), written from the formulas."""
    wide = rows.double().numpy()
    count, total = wide.shape
    cut = int(total * (1 - density))
    factor = np.array(scales)[:, None]
    if form == "paper":
        inter, intra = np.zeros_like(wide), np.zeros_like(wide)
        for i in range(count):
            weight = np.exp(count * norm(wide[i] * wide[i]))
            intra[i] = weight / weight.sum()
            for j in range(count):
                weight = np.exp(norm(wide[i] * wide[j]))
                inter[i] += weight / weight.sum()
        beta = intra * inter
        low = np.sort(beta, 1)[:, cut : cut + 1]
        kept = np.where(beta >= low, beta, 0)
        result = (kept * factor * wide).sum(0) / np.maximum(kept.sum(0), 1e-300)
        return result, np.abs(beta / low - 1).min(0)
    magnitude = np.abs(wide)
    ordered = np.sort(magnitude, 1)
    ends = ordered[:, int(total * clip)][:, None], ordered[:, int(total * (1 - clip) - 1)][:, None]
    clipped = np.clip(magnitude, *ends)
    share, clipped = norm(clipped), np.sign(wide) * clipped
    signed = np.sign(wide) * share
    if form == "es":
        inter = np.stack([np.tanh(signed[i] * signed).sum(0) for i in range(count)])
    else:
        inter = np.tanh(wide * (signed if form == "vision" else wide).sum(0))
    beta = np.exp(count * share**2) * inter
    low = np.sort(beta, 1)[:, cut : cut + 1]
    weight = norm(np.maximum(beta, low))
    result = (factor * clipped * weight).sum(0) / np.maximum(weight.sum(0), 1e-12)
    return result, np.abs((beta - low) / np.abs(low)).min(0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("experts", "density", "clip"), [(1, 0.2, 0.01), (2, 0.1, 0.0), (5, 0.3, 0.05)])
def test_against_plain_float64(form: str, experts: int, density: float, clip: float) -> None:
    generator = torch.Generator().manual_seed(experts)
    rows = torch.randn(experts, 4001, generator=generator) * 0.3
    scales = [1.0 + 0.1 * number for number in range(experts)]
    clip = 0.0 if form == "paper" else clip
    actual = merged(rows, 1000, form=form, density=density, clip=clip, scale=scales)
    expected, margin = reference(rows, form, density, clip, scales)
    clear = torch.from_numpy(margin > 1e-3)  # nearer to the cut, float32 may decide otherwise
    assert float(clear.float().mean()) > 0.97
    torch.testing.assert_close(actual.double()[clear], torch.from_numpy(expected)[clear], rtol=5e-3, atol=1e-6)
    assert int((actual != 0).sum()) == pytest.approx(int((expected != 0).sum()), abs=3)


@pytest.mark.parametrize("form", FORMS)
def test_equal_experts_give_what_survives_in_full(form: str) -> None:
    row = torch.randn(1, 500, generator=torch.Generator().manual_seed(1)) * 0.3
    clip: dict[str, Any] = {} if form == "paper" else {"clip": 0}
    actual = merged(row.expand(4, -1), form=form, density=0.2, scale=0.5, **clip)
    kept = actual != 0
    # A weight of exactly 0 at the cut loses that element in the authors' forms: d − ⌊d(1−r)⌋ − 1 survive.
    assert int(kept.sum()) == (100 if form == "paper" else 99)
    torch.testing.assert_close(actual[kept], row[0][kept] * 0.5)
    assert float(row[0].abs()[~kept].max()) <= float(row[0].abs()[kept].min())


def test_scaling_all_task_vectors_scales_the_result() -> None:
    rows = torch.randn(3, 700, generator=torch.Generator().manual_seed(4)) * 0.1
    assert torch.equal(merged(rows * 0.25), merged(rows) * 0.25)


def test_one_coefficient_per_expert() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.1, 0.0], [0.0, 2.0, 0.0, 0.2]])
    actual = merged(rows, density=0.5, clip=0, scale=[1.3, 0.8])
    torch.testing.assert_close(actual[:2], torch.tensor([1.3, 1.6]))
    with pytest.raises(MergeloomError, match="scale: 3 given for 2 experts"):
        merged(rows, scale=[1, 1, 1])


@pytest.mark.parametrize("form", FORMS)
def test_degenerate_task_vectors(form: str) -> None:
    rows = torch.randn(2, 60, generator=torch.Generator().manual_seed(3)) * 0.1
    zero, constant = torch.zeros(1, 60), torch.full((1, 60), -0.5)
    assert torch.equal(merged(torch.cat([zero, zero]), form=form), zero[0])
    assert torch.equal(merged(zero, form=form), zero[0])
    torch.testing.assert_close(merged(constant, form=form), constant[0])  # all count as equal: all survive
    # A task vector of zeros stands aside: what survives of the others is not averaged with its zeros.
    actual = merged(torch.cat([rows[:1], zero]), form=form, density=0.2, **({} if form == "paper" else {"clip": 0}))
    kept = actual != 0
    assert kept.any()
    torch.testing.assert_close(actual[kept], rows[0][kept])
    assert torch.isfinite(merged(torch.cat([rows, constant, zero]), form=form)).all()


@pytest.mark.parametrize("form", FORMS)
def test_clipping_that_levels_the_largest(form: str) -> None:
    """More elements share the largest score than may survive: all of them do, where the authors' code divides 0 by 0."""
    row = torch.cat([torch.full((10,), 1.0), torch.linspace(0.01, 0.5, 90)])[None]
    actual = merged(row, form=form, density=0.05)
    assert torch.equal(actual != 0, torch.arange(100) < 10)
    torch.testing.assert_close(actual[:10], row[0, :10])


def test_many_experts_do_not_overflow() -> None:
    """exp(T n²) is beyond float32 for T > 88."""
    rows = torch.randn(100, 300, generator=torch.Generator().manual_seed(5))
    actual = merged(rows, form="vision")
    assert torch.isfinite(actual).all() and (actual != 0).any()


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_and_odd_shapes(form: str) -> None:
    generator = torch.Generator().manual_seed(6)
    shapes = {"m": (9, 5), "s": (), "v": (3,), "empty": (0, 2)}
    base = {n: torch.randn(shape, generator=generator).to(torch.bfloat16) for n, shape in shapes.items()}
    experts = [
        {n: (v.float() + torch.randn(v.shape, generator=generator) * 0.1).to(torch.bfloat16) for n, v in base.items()}
        for _ in range(3)
    ]
    method = methods.Pcb.model_validate({"form": form, "density": 0.4})
    actual = merge(method, base=base, experts=experts, dtype=torch.float32)
    assert {n: v.shape for n, v in actual.items()} == {n: v.shape for n, v in base.items()}
    wide = [{n: v.float() for n, v in model.items()} for model in (base, *experts)]
    expected = merge(method, base=wide[0], experts=wide[1:])
    assert all(torch.equal(actual[n], expected[n]) for n in base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_scores_equal_at_the_cut_share_one_fate(form: str, dtype: torch.dtype) -> None:
    """Of one expert the score grows with |τ|. At density 0.5 the cut is the fifth of ten: four equal ones lie on it."""
    row = torch.tensor([4.0, -3.0, 2.0, -2.0, 2.0, 2.0, 1.0, -1.0, 1.0, 0.5])
    survives = row.abs() >= (2 if form == "paper" else 3)
    expected = torch.where(survives, row, 0.0).to(dtype)
    clip = {} if form == "paper" else {"clip": 0}
    torch.testing.assert_close(merged(row[None], dtype=dtype, form=form, density=0.5, **clip), expected)


def test_the_paper_does_not_clip() -> None:
    with pytest.raises(ValueError, match="does not clip"):
        methods.Pcb(form="paper", clip=0.01)
