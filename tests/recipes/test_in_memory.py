"""What `mergecore.merge` refuses before it begins."""

from __future__ import annotations

import pytest
import torch

from mergecore import merge, methods
from mergecore.errors import SpecError

BASE = {"w": torch.zeros(4)}
EXPERTS = [{"w": torch.ones(4)}, {"w": torch.full((4,), 2.0)}]


def test_results_that_a_method_works_out_itself_are_refused() -> None:
    with pytest.raises(SpecError, match="'ties' takes no 'threshold'"):
        merge(methods.Ties(density=0.5), base=BASE, experts=EXPERTS, statistics={"threshold": EXPERTS})


def test_each_expert_has_its_own_result() -> None:
    with pytest.raises(SpecError, match="'fisher' has 1 result\\(s\\) for 2 experts"):
        merge(methods.Fisher(), experts=EXPERTS, statistics={"fisher": EXPERTS[:1]})
