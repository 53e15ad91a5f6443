"""What every method of this repository promises (mergeloom/testing), and what merging in memory refuses."""

from __future__ import annotations

import pytest
import torch

from mergecore import merge
from mergecore.errors import MergeloomError, NonFiniteError
from mergecore.methods import Della, RandomDrop, Ties
from mergecore.registry import METHODS
from mergeloom.testing.method_contract import *  # noqa: F403 — every test of the contract
from mergeloom.testing.method_contract import models
from mergeloom.testing.variants import same


def test_overflow_of_the_result_names_the_method() -> None:
    base = {"w": torch.tensor([1.0, 2.0])}
    with pytest.raises(NonFiniteError, match="task_arithmetic"):
        merge(METHODS["task_arithmetic"].model_validate({"scale": 1e38}), base=base, experts=[{"w": base["w"] * 1e4}])


def test_shapes_that_do_not_fit_are_refused() -> None:
    base, experts = models()
    experts[0]["v"] = torch.zeros(12)
    with pytest.raises(MergeloomError, match=r"'v' has shape \[12\], in the base \[11\]"):
        merge(METHODS["average"](), base=base, experts=experts)
    del experts[0]["v"]
    with pytest.raises(MergeloomError, match="lacks 'v'"):
        merge(METHODS["average"](), base=base, experts=experts)


def test_a_drop_by_files_demands_ids() -> None:
    base, experts = models()
    for method in (Ties(drop=RandomDrop(rate=0.5, ids="files")), Della(ids="files")):
        with pytest.raises(MergeloomError, match="ids"):
            merge(method, base=base, experts=experts)


def test_without_ids_masks_are_drawn_by_the_tensors() -> None:
    """So an expert keeps its masks in any position; with ids, they are the ids' masks."""
    base, experts = models()
    for method in (Ties(drop=RandomDrop(rate=0.5), count="exact"), Della()):
        first = merge(method, base=base, experts=experts[:2])
        assert same(first, merge(method, base=base, experts=[experts[1], experts[0]]))
        assert not same(first, merge(method, base=base, experts=experts[:2], ids=["a", "b"]))


def test_dtype_of_the_result() -> None:
    base, experts = models()
    result = merge(Ties(), base=base, experts=experts, dtype=torch.bfloat16)
    wide = merge(Ties(), base=base, experts=experts)
    assert all(torch.equal(result[n], wide[n].to(torch.bfloat16)) for n in base if n != "count")
    assert result["count"].dtype == torch.int64
