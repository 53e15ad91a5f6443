"""MagMax against numbers worked out by hand and against the rule in NumPy."""

from __future__ import annotations

import numpy as np
import torch

from mergecore import merge
from mergecore.methods import Magmax

BASE = {"w": torch.tensor([1.0, 2.0, -1.0, 0.5])}


def expert(*change: float) -> dict[str, torch.Tensor]:
    return {"w": BASE["w"] + torch.tensor(change)}


def test_by_hand() -> None:
    """Largest: −0.75, 0.5 (the later of two), 0.25, 0; half of each is added."""
    experts = [expert(0.25, -0.5, 0.25, 0.0), expert(-0.75, 0.5, 0.125, 0.0)]
    assert merge(Magmax(), base=BASE, experts=experts)["w"].tolist() == [0.625, 2.25, -0.875, 0.5]
    assert merge(Magmax(scale=1.0), base=BASE, experts=experts)["w"].tolist() == [0.25, 2.5, -0.75, 0.5]


def test_of_equal_changes_the_later_one_holds() -> None:
    experts = [expert(0.5, 0.0, 0.0, 0.0), expert(-0.5, 0.0, 0.0, 0.0)]
    method = Magmax(scale=1.0)
    assert merge(method, base=BASE, experts=experts)["w"][0] == 0.5
    assert merge(method, base=BASE, experts=experts[::-1])["w"][0] == 1.5
    assert merge(method, base=BASE, experts=experts, ids=["b", "a"])["w"][0] == 0.5  # the recipe's order, not the ids'


def test_it_is_the_argmax_of_the_magnitudes() -> None:
    draws = np.random.default_rng(0)
    base, changes = draws.normal(size=(5, 6)).astype(np.float32), draws.normal(size=(4, 5, 6)).astype(np.float32)
    experts = [{"w": torch.from_numpy(base + change)} for change in changes]
    deltas = np.stack([model["w"].numpy() - base for model in experts])
    chosen = np.take_along_axis(deltas, np.abs(deltas).argmax(0)[None], 0)[0]
    merged = merge(Magmax(scale=0.5), base={"w": torch.from_numpy(base)}, experts=experts)["w"]
    assert np.array_equal(merged.numpy(), base + chosen * np.float32(0.5))
