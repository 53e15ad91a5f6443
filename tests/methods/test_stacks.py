"""Fused experts of a mixture: a tensor of three dimensions is merged as a stack of matrices, by every matrix method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mergecore import merge
from mergecore.plugins.examples import Values
from mergecore.registry import METHODS, STATISTICS
from mergecore.tensors.memory import MemoryTensors

EXPERTS = 3
STACK = "model.layers.0.mlp.experts.gate_up_proj"
MATRIX_METHODS: dict[str, list[Values]] = {
    "iso_c": [{}, {"rank": "full"}], "iso_cts": [{"common": 0.5}], "tsv_m": [{}, {"crowded": "zero"}],
    "wudi": [{"steps": 5}, {"variant": "closed"}, {"steps": 5, "transposed": ["*experts*"]}],
    "star": [{}, {"share": 0.8}], "subspace_boosting": [{"scale": 0.5, "share": 0.3}], "cart": [{"share": 0.3}],
    "opcm": [{}, {"projection": "strict"}],
}  # fmt: skip
TRIED = [(name, values) for name, sets in MATRIX_METHODS.items() for values in sets]


def stack(seed: int, around: Tensor | None = None) -> Tensor:
    drawn = torch.randn(EXPERTS, 6, 4, generator=torch.Generator().manual_seed(seed))
    return drawn if around is None else around + drawn / 8


def apart(tensor: Tensor) -> dict[str, Tensor]:
    """The same experts as matrices of their own, as most files have them."""
    return {f"model.layers.0.mlp.experts.{number}.w": tensor[number].clone() for number in range(EXPERTS)}


@pytest.mark.parametrize(("name", "values"), TRIED)
def test_a_stack_is_merged_matrix_by_matrix(name: str, values: Values) -> None:
    method = METHODS[name].model_validate(values)
    base = stack(0)
    experts = [stack(seed, base) for seed in (1, 2)]
    fused = merge(method, base={STACK: base}, experts=[{STACK: expert} for expert in experts])[STACK]
    separate = merge(method, base=apart(base), experts=list(map(apart, experts)))
    wanted = torch.stack([separate[matrix] for matrix in sorted(separate)])
    if name == "opcm":  # its factor is of the whole model, whose squares are added up in another order
        torch.testing.assert_close(fused, wanted, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(fused, wanted)


@pytest.mark.parametrize(("name", "values"), TRIED)
def test_the_key_knows_of_stacks_only_where_there_are_some(name: str, values: Values) -> None:
    """So results of models without stacks are found again, and no others are taken for those of models with stacks."""
    method = METHODS[name].model_validate(values)

    def fitted(shape: tuple[int, ...]) -> dict[str, Any]:
        bound = method.bound([0]).fitted(MemoryTensors({STACK: torch.zeros(shape)}).tensors)
        return {"method": bound.parameters(), **{k: s.parameters() for k, s in bound.statistics().items()}}

    plain, stacked = fitted((6, 4)), fitted((3, 6, 4))
    assert "stacks" not in str(plain) and str(stacked).count(
        "'stacks': ['*experts*', '*gate_up_proj', '*up_proj']"
    ) == len(stacked)
    assert "stacks" not in method.parameters()


def test_what_has_three_dimensions_and_is_no_stack_is_treated_like_a_vector() -> None:
    base, name = torch.zeros(3, 6, 4), "model.encoder.conv1.weight"
    experts = [stack(1), stack(2)]
    models = [{name: expert} for expert in experts]
    torch.testing.assert_close(merge(METHODS["iso_c"](), base={name: base}, experts=models)[name], sum(experts) / 2)
    off = METHODS["iso_c"].model_validate({"stacks": []})
    models = [{STACK: expert} for expert in experts]
    torch.testing.assert_close(merge(off, base={STACK: base}, experts=models)[STACK], sum(experts) / 2)
    named = METHODS["iso_c"].model_validate({"stacks": ["*conv1*"]})
    ours = merge(named, base={name: base}, experts=[{name: expert} for expert in experts])[name]
    assert torch.equal(ours, merge(METHODS["iso_c"](), base={STACK: base}, experts=models)[STACK])


def test_every_method_that_knows_stacks_is_tried() -> None:
    have = {name for name in METHODS.own if "stacks" in METHODS[name].model_fields and name != "layer_swap"}
    assert have == set(MATRIX_METHODS)
    assert "stacks" in STATISTICS["projected_sum"].model_fields
