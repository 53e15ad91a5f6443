"""Checkpoints of one training run: what their average stands for, by gradients that are played back."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mergecore import merge
from mergecore.errors import SpecError
from mergecore.methods import Average, Series

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 + 0.5 * math.cos(math.pi * x),
    "sqrt": lambda x: 1.0 - x**0.5,
}


def run(steps: int) -> tuple[list[dict[str, Tensor]], np.ndarray, np.ndarray]:
    """Checkpoints of a constant learning rate of 1; the first of them, and the steps in between, float64."""
    draws = np.random.default_rng(3)
    first, gradients = draws.normal(size=7), draws.normal(size=(steps, 7))
    checkpoints = [first - gradients[:done].sum(0) for done in range(steps + 1)]
    return [{"w": torch.tensor(weights, dtype=torch.float32)} for weights in checkpoints], first, gradients


@pytest.mark.parametrize("shape", list(DECAYS))
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_it_is_training_with_a_decay(shape: str, steps: int) -> None:
    checkpoints, first, gradients = run(steps)
    decayed = first - sum(
        (DECAYS[shape](number / (steps + 1)) * gradients[number - 1] for number in range(1, steps + 1)), np.zeros(7)
    )
    method = Average.model_validate({"series": {"kind": "decay", "shape": shape}})
    torch.testing.assert_close(
        merge(method, experts=checkpoints)["w"], torch.tensor(decayed, dtype=torch.float32), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_ema_is_the_moving_average(share: float) -> None:
    checkpoints, _, _ = run(5)
    moving = checkpoints[0]["w"].double()
    for checkpoint in checkpoints[1:]:
        moving = share * checkpoint["w"].double() + (1 - share) * moving
    method = Average.model_validate({"series": {"kind": "ema", "share": share}})
    torch.testing.assert_close(merge(method, experts=checkpoints)["w"], moving.float(), rtol=1e-5, atol=1e-6)


def test_weights_by_hand() -> None:
    assert Series(kind="rising").weights(3) == (1, 2, 3)
    assert Series(kind="ema", share=0.5).weights(3) == (0.25, 0.25, 0.5)
    # Four checkpoints: the rate is read at 1/4, 1/2 and 3/4, where 1 − √x is 0.5, 1 − √½ and 1 − √¾.
    half, three_quarters = 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)
    wanted = (0.5, 0.5 - half, half - three_quarters, three_quarters)
    assert Series(kind="decay", shape="sqrt").weights(4) == pytest.approx(wanted)
    assert Series(kind="decay").weights(4) is None


@pytest.mark.parametrize("series", [{"kind": "uniform"}, {"kind": "decay"}])
def test_equal_weights_are_the_plain_average_and_share_its_key(series: dict[str, str]) -> None:
    method = Average.model_validate({"series": series})
    assert method.bound([2, 0, 1]).parameters() == Average().bound([2, 0, 1]).parameters() == Average().parameters()
    assert "series" not in Average().parameters()


def test_weights_follow_the_recipe_whoever_the_experts_are() -> None:
    """The oldest checkpoint's weight stays with it, however ids sort."""
    checkpoints, _, _ = run(2)
    method = Average.model_validate({"series": {"kind": "rising"}})
    wanted = (checkpoints[0]["w"] + 2 * checkpoints[1]["w"] + 3 * checkpoints[2]["w"]) / 6
    for ids in (["a", "b", "c"], ["c", "a", "b"]):
        torch.testing.assert_close(merge(method, experts=checkpoints, ids=ids)["w"], wanted, rtol=1e-6, atol=1e-6)


def test_weights_beside_a_series_are_refused() -> None:
    checkpoints, _, _ = run(1)
    method = Average.model_validate({"series": {"kind": "ema"}, "weights": [1, 2]})
    with pytest.raises(SpecError, match="leave one of them out"):
        merge(method, experts=checkpoints)
