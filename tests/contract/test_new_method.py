"""A method is added in one file and one line: the file is the class here, the line is its entry in the registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor

from mergecore import merge
from mergecore.arithmetic.trims import folded_sum
from mergecore.plugins.block import Block, Per
from mergecore.plugins.method import DeltaMethod, Method, NoArguments, WeightMethod
from mergecore.plugins.statistic import Statistics
from mergecore.registry import METHODS, method_from
from mergecore.spec.recipe import parse_recipe
from mergecore.tensors.source import TensorInfo


class Median(DeltaMethod[NoArguments]):
    """The element-wise median of the experts, pulled towards the base."""

    name: ClassVar[str] = "median"

    pull: Annotated[float, Field(ge=0, le=1, description="share of the base in the result")] = 0.0

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: NoArguments) -> Tensor:
        return base + torch.stack(list(deltas)).median(0).values * (1 - self.pull)


class LowRank(DeltaMethod[NoArguments]):
    """Per tensor: the mean delta at a given rank (singular value decomposition); other tensors get their mean."""

    name: ClassVar[str] = "low_rank"
    per: ClassVar[Per] = Per.TENSOR

    rank: Annotated[int, Field(ge=1)] = 1

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: NoArguments) -> Tensor:
        mean = torch.stack(list(deltas)).mean(0)
        if mean.ndim == 2 and min(mean.shape) > self.rank:
            left, values, right = torch.linalg.svd(mean, full_matrices=False)
            mean = left[:, : self.rank] * values[: self.rank] @ right[: self.rank]
        return base + mean


@dataclass(frozen=True)
class Factors:
    """first, others: what the first weights and the other ones are multiplied by."""

    first: float
    others: float


class Leaning(WeightMethod[Factors]):
    """The mean of the experts' weights in which the first one counts more."""

    name: ClassVar[str] = "leaning"
    ordered: ClassVar[bool] = True

    lean: float = 0.25

    def arguments(self, block: Block, statistics: Statistics) -> Factors:
        even = (1 - self.lean) / len(block.ids)
        return Factors(even + self.lean, even)

    def merge(self, weights: Sequence[Tensor], arguments: Factors) -> Tensor:
        first, *others = weights
        return folded_sum([first * arguments.first, *(other * arguments.others for other in others)])


class Halves(WeightMethod[NoArguments]):
    """Per tensor: the upper and the lower rows of the experts' mean under names of their own."""

    name: ClassVar[str] = "halves"
    per: ClassVar[Per] = Per.TENSOR

    def outputs(self, selection: Mapping[str, TensorInfo], count: int) -> Mapping[str, TensorInfo]:
        return {
            f"{name}.{half}": TensorInfo(info.dtype, (rows, *info.shape[1:]))
            for name, info in selection.items()
            for half, rows in (("upper", info.shape[0] // 2), ("lower", info.shape[0] - info.shape[0] // 2))
        }

    def merge(self, weights: Sequence[Tensor], arguments: NoArguments) -> Tensor:
        return torch.stack(list(weights)).mean(0)

    def merge_block(self, block: Block, statistics: Statistics) -> dict[str, Tensor]:
        mean = self.merge(block.models, NoArguments())
        rows = len(mean) // 2
        return {f"{block.name}.upper": mean[:rows], f"{block.name}.lower": mean[rows:]}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in (Median, LowRank, Leaning, Halves):
        monkeypatch.setitem(METHODS.own, method.name, method)


def models() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    base = {"layers.0.a": torch.randn(6, 4), "layers.0.b": torch.randn(3, 4), "layers.1.a": torch.randn(5, 4)}
    return base, [{name: value + torch.randn_like(value) for name, value in base.items()} for _ in range(3)]


def test_a_recipe_names_it() -> None:
    recipe = parse_recipe({"method": "median", "pull": 0.5, "base": "b", "experts": ["x"]}, "recipe")
    assert recipe.built() == Median(pull=0.5)
    with pytest.raises(Exception, match="did you mean 'median'"):
        method_from("meadian", {}, "recipe")


def test_element_wise() -> None:
    base, experts = models()
    actual = merge(Median(), base=base, experts=experts)
    for name in base:
        expected = torch.stack([expert[name] for expert in experts]).median(0).values
        torch.testing.assert_close(actual[name], expected)


def test_whole_tensors_at_once() -> None:
    base, experts = models()
    actual = merge(LowRank(rank=2), base=base, experts=experts)
    for name in ("layers.0.a", "layers.0.b"):
        assert torch.linalg.matrix_rank(actual[name] - base[name], tol=1e-4) == 2


def test_weights_with_arguments_and_no_base() -> None:
    _, experts = models()
    merged = merge(Leaning(lean=0.4), experts=experts)
    for name, value in merged.items():
        expected = experts[0][name] * 0.6 + experts[1][name] * 0.2 + experts[2][name] * 0.2
        torch.testing.assert_close(value, expected)


def test_outputs_of_other_names_and_shapes() -> None:
    base, experts = models()
    merged = merge(Halves(), base=base, experts=experts)
    assert {name: tuple(value.shape) for name, value in merged.items()} == {
        "layers.0.a.upper": (3, 4),
        "layers.0.a.lower": (3, 4),
        "layers.0.b.upper": (1, 4),
        "layers.0.b.lower": (2, 4),
        "layers.1.a.upper": (2, 4),
        "layers.1.a.lower": (3, 4),
    }
    first = torch.stack([expert["layers.0.b"] for expert in experts]).mean(0)
    torch.testing.assert_close(merged["layers.0.b.lower"], first[1:])


def test_forms_of_methods_are_abstract() -> None:
    for form in (Method, DeltaMethod, WeightMethod):
        with pytest.raises(TypeError, match="abstract"):
            form()
