"""TALL masks and EMR-Merging: the worked numbers of the bits, the shared vector and the factors, and what masks promise."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergecore import merge
from mergecore.errors import MergeloomError
from mergecore.registry import method_from
from mergecore.tensors.masked import MaskedModel, packed, unpacked
from mergecore.tensors.memory import MemoryTensors

ROWS = torch.tensor([[1.0, 0.0, 0.2, -0.5], [0.1, 0.0, 0.3, 0.4], [-0.2, 0.0, -0.1, 0.3]])
PAIR = torch.tensor([[0.5, -0.2, 0.1], [0.3, 0.4, -0.1]])
RANDOM = torch.randn(4, 21, 10, generator=torch.Generator().manual_seed(0)) * 0.1


def product(name: str, rows: Tensor, base: Tensor | None = None, **values: Any) -> dict[str, Tensor]:
    start = torch.zeros_like(rows[0]) if base is None else base
    return merge(method_from(name, values, "test"), base={"w": start}, experts=[{"w": start + row} for row in rows])


def bits(actual: dict[str, Tensor]) -> list[list[int]]:
    count = actual["w"].numel()
    return [unpacked(row)[:count].int().tolist() for row in actual["mask/w"]]


def models(actual: dict[str, Tensor]) -> list[Tensor]:
    """Every task's model, read whole."""
    source = MemoryTensors(actual)
    values = {"w": source.tensors["w"]}
    rows = range(len(actual["mask/w"]))
    return [MaskedModel(source, row, values).read("w").view(actual["w"].shape) for row in rows]


# --- bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 1001])
def test_bits_survive_and_are_packed_as_numpy_packs_them(count: int) -> None:
    mask = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.4
    actual = packed(mask)
    assert actual.tolist() == np.packbits(mask.numpy()).tolist() and len(actual) == -(-count // 8)
    assert torch.equal(unpacked(actual)[:count], mask) and not unpacked(actual)[count:].any()


def test_the_worked_bytes() -> None:
    assert packed(torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 1, 1], dtype=torch.bool)).tolist() == [177, 192]


# --- TALL masks -----------------------------------------------------------------------------------------------------


def test_worked_masks() -> None:
    actual = product("tall_masks", ROWS, mask_scale=0.4)
    torch.testing.assert_close(actual["shared/w"], torch.tensor([0.9, 0.0, 0.4, 0.2]))
    assert bits(actual) == [[1, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert actual["mask/w"].tolist() == [[176], [48], [16]]
    assert bits(product("tall_masks", ROWS, mask_scale=1.0)) == [[1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]
    mixed = product("tall_masks", ROWS, mask_scale=[1.0, 0.4, 1.0])
    assert bits(mixed) == [[1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert torch.allclose(models(actual)[0], torch.tensor([0.9, 0.0, 0.4, 0.2]))
    assert torch.allclose(models(actual)[2], torch.tensor([0.0, 0.0, 0.0, 0.2]))


def test_one_expert_comes_back_bit_by_bit() -> None:
    base = torch.randn(21, 10, generator=torch.Generator().manual_seed(1)).bfloat16()
    expert = (base + RANDOM[0]).bfloat16()
    expert[3] = base[3]
    actual = merge(method_from("tall_masks", {}, "test"), base={"w": base}, experts=[{"w": expert}])
    assert torch.equal(models(actual)[0], expert)
    assert bits(actual) == [(expert != base).int().flatten().tolist()], "what is frozen is in no mask"


def test_masks_get_sparser_with_their_scale_and_their_count_is_what_consensus_counts() -> None:
    values = [torch.tensor(bits(product("tall_masks", RANDOM, mask_scale=scale))) for scale in (0, 0.2, 0.6, 1.5, 1e9)]
    for denser, sparser in pairwise(values):
        assert bool((denser >= sparser).all()) and denser.sum() > sparser.sum()
    consensus = method_from("consensus", {"scale": 1.0, "minimum_tasks": 2, "mask_scale": 0.6}, "test")
    merged = merge(consensus, base={"w": torch.zeros(21, 10)}, experts=[{"w": row} for row in RANDOM])["w"]
    wanted = torch.where(values[2].sum(0).view(21, 10) >= 2, RANDOM.sum(0), torch.zeros(()))
    torch.testing.assert_close(merged, wanted)


def test_the_shared_vector_is_that_of_ties() -> None:
    actual = product("tall_masks", RANDOM, multi_task="ties", density=0.3)
    ties = method_from("ties", {"density": 0.3, "aggregate": "sum"}, "test")
    wanted = merge(ties, base={"w": torch.zeros(21, 10)}, experts=[{"w": row} for row in RANDOM])["w"]
    assert torch.equal(actual["shared/w"], wanted)


def test_a_vector_in_bfloat16_is_rounded_and_masks_are_those_of_the_exact_one() -> None:
    exact, rounded = product("tall_masks", RANDOM), product("tall_masks", RANDOM, vector="bfloat16")
    assert torch.equal(rounded["shared/w"], exact["shared/w"].bfloat16())
    assert torch.equal(rounded["mask/w"], exact["mask/w"])


# --- EMR ------------------------------------------------------------------------------------------------------------


def test_worked_numbers_of_the_authors_code() -> None:
    actual = product("emr", PAIR, zero_sign="negative")
    torch.testing.assert_close(actual["shared/w"], torch.tensor([0.5, 0.4, -0.1]))
    assert bits(actual) == [[1, 0, 0], [1, 1, 1]]
    torch.testing.assert_close(actual["scale/w"], torch.tensor([1.6, 0.8]))
    torch.testing.assert_close(models(actual)[0], torch.tensor([0.8, 0, 0]))
    torch.testing.assert_close(models(actual)[1], torch.tensor([0.4, 0.32, -0.08]))


def test_what_cancels_exactly_is_shared_by_nobody_in_the_paper() -> None:
    actual = product("emr", PAIR)
    torch.testing.assert_close(actual["shared/w"], torch.tensor([0.5, 0.4, 0.0]))
    assert bits(actual) == [[1, 0, 0], [1, 1, 0]]
    torch.testing.assert_close(actual["scale/w"], torch.tensor([0.8 / 0.5, 0.8 / 0.9]))


def test_factors_weigh_elements_or_tensors_alike() -> None:
    """Tensor b has 4 elements to a's 1: Σ|τ| of the first is 1 + 4·2, of its share 1 + 4·3; means are 1 + 2 and 1 + 3."""
    base = {"a": torch.zeros(1), "b": torch.zeros(4)}
    experts = [{"a": torch.ones(1), "b": torch.full((4,), value)} for value in (2.0, 3.0)]
    for values, wanted in (({}, 9 / 13), ({"rescale": "tensors"}, 3 / 4)):
        actual = merge(method_from("emr", values, "test"), base=base, experts=experts)
        for name in base:
            assert actual[f"scale/{name}"].tolist() == pytest.approx([wanted, 1.0])


def test_every_task_changes_as_much_as_its_expert_did() -> None:
    actual = product("emr", RANDOM)
    for model, row in zip(models(actual), RANDOM, strict=True):
        assert float(model.abs().sum()) == pytest.approx(float(row.abs().sum()), rel=1e-5)
        assert bool((model * row >= 0).all()), "no task is pushed against its own sign"


def test_equal_and_lone_experts_come_back() -> None:
    torch.testing.assert_close(models(product("emr", RANDOM[:1]))[0], RANDOM[0])
    for model in models(product("emr", torch.stack([RANDOM[0]] * 3))):
        torch.testing.assert_close(model, RANDOM[0])
    still = product("emr", torch.zeros(2, 5))
    assert still["scale/w"].tolist() == [1, 1] and not any(model.any() for model in models(still))


# --- reading --------------------------------------------------------------------------------------------------------


def test_a_model_is_read_in_any_pieces() -> None:
    actual = product("emr", RANDOM, base=RANDOM[1] * 3)
    source = MemoryTensors(actual)
    model = MaskedModel(source, 2, {"w": source.tensors["w"]})
    whole = model.read("w")
    for start, stop in ((0, 0), (0, 1), (3, 4), (7, 9), (8, 16), (5, 210), (209, 210), (210, 210)):
        assert torch.equal(model.read("w", start, stop), whole[start:stop]), (start, stop)


def test_one_mask_scale_per_expert_is_asked_for() -> None:
    with pytest.raises(MergeloomError, match="mask_scale: 2 given for 4 experts"):
        product("tall_masks", RANDOM, mask_scale=[0.4, 0.4])
    with pytest.raises(MergeloomError, match="density is what 'ties' keeps"):
        product("tall_masks", RANDOM, density=0.4)
