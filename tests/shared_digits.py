"""The digits tier for all tests that need it: a small network and its experts, trained once and kept in pytest's cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.digits import DigitsTier


@pytest.fixture(scope="module")
def tier(pytestconfig: pytest.Config) -> DigitsTier:
    """Base, experts and tasks of the tier. Tests leave them as they are."""
    import torch

    from tests.digits import digits_tier

    assert pytestconfig.cache is not None
    torch.set_num_threads(1)
    return digits_tier(Path(pytestconfig.cache.mkdir("digits")))
