"""The numbers of every method, held against those of golden.json: a change must be meant, and says so by a version."""

from __future__ import annotations

import pytest

from mergecore.methods import Ties
from mergecore.registry import METHODS
from tests.golden import golden

AGAIN = "then run `python -m tests.golden.golden`"


@pytest.mark.parametrize("label", golden.variants())
def test_numbers_are_the_golden_ones(label: str) -> None:
    method = golden.variants()[label]
    known = golden.stored()
    assert label in known, f"no golden numbers for {label}: look at them, {AGAIN}"
    assert golden.agree(golden.golden_of(method), known[label]), (
        f"{method.name} gives other numbers than golden: bump its version, {AGAIN}"
    )


def test_adapters_are_folded_as_ever() -> None:
    assert golden.digest_of(golden.adapter()) == golden.stored()["adapter"], (
        f"adapters give other deltas than golden: bump ENGINE in plan.py, {AGAIN}"
    )


def test_the_file_holds_what_is_tried_and_stays_small() -> None:
    assert set(golden.stored()) == {"adapter", *golden.variants()}, f"entries of what is gone, {AGAIN}"
    assert {label.split()[0] for label in golden.variants()} == set(METHODS.own)
    assert golden.STORED.stat().st_size < 350 * len(golden.variants())


def test_a_change_of_the_numbers_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite itself: one rounding more in one method is enough."""
    label = next(label for label in golden.variants() if label.startswith("ties"))
    joined = Ties._joined
    monkeypatch.setattr(Ties, "_joined", lambda self, agreeing, sign: joined(self, agreeing, sign) * (1 + 2**-23))
    with pytest.raises(AssertionError, match="ties gives other numbers than golden: bump its version"):
        test_numbers_are_the_golden_ones(label)
