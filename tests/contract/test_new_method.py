"""A method is added in one file and one line: the file is the class here, the line is its entry in the registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor

from mergecore import merge
from mergecore.plugins.block import Block, Per
from mergecore.plugins.method import Method
from mergecore.plugins.statistic import Statistics
from mergecore.registry import METHODS, method_from
from mergecore.spec.recipe import parse_recipe
from mergecore.tensors.source import TensorInfo


class Median(Method):
    """The element-wise median of the experts, pulled towards the base."""

    name: ClassVar[str] = "median"

    pull: Annotated[float, Field(ge=0, le=1, description="share of the base in the result")] = 0.0

    @property
    def on(self) -> str:
        """Deltas."""
        return "deltas"

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], **arguments: Any) -> Tensor:
        """Base plus the median delta."""
        assert base is not None
        return base + torch.stack(list(experts)).median(0).values * (1 - self.pull)


class LowRank(Method):
    """Per tensor: the mean delta at a given rank (singular value decomposition); other tensors get their mean."""

    name: ClassVar[str] = "low_rank"
    per: ClassVar[Per] = Per.TENSOR

    rank: Annotated[int, Field(ge=1)] = 1

    @property
    def on(self) -> str:
        """Deltas."""
        return "deltas"

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], **arguments: Any) -> Tensor:
        """Base plus the truncated mean delta."""
        assert base is not None
        mean = torch.stack(list(experts)).mean(0)
        if mean.ndim == 2 and min(mean.shape) > self.rank:
            left, values, right = torch.linalg.svd(mean, full_matrices=False)
            mean = left[:, : self.rank] * values[: self.rank] @ right[: self.rank]
        return base + mean


class Joined(Method):
    """Per layer: two matrices of a layer become one of other name and shape, as a method that changes widths does."""

    name: ClassVar[str] = "joined"
    per: ClassVar[Per] = Per.LAYER

    @property
    def on(self) -> str:
        """Weights."""
        return "weights"

    def outputs(self, selection: Mapping[str, TensorInfo], count: int) -> Mapping[str, TensorInfo]:
        """One stacked matrix a layer."""
        found: dict[str, TensorInfo] = {}
        for name, info in selection.items():
            joined = name.rpartition(".")[0] + ".joined"
            rows = info.shape[0] + (found[joined].shape[0] if joined in found else 0)
            found[joined] = TensorInfo(info.dtype, (rows, info.shape[1]))
        return found

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], **arguments: Any) -> Tensor:
        """Not used: the whole layer is needed."""
        raise NotImplementedError

    def merge_block(self, block: Block, statistics: Statistics) -> dict[str, Tensor]:
        """The experts' mean, the layer's matrices under each other."""
        parts = [torch.stack(list(member.experts)).mean(0) for member in block.members]
        return {block.members[0].name.rpartition(".")[0] + ".joined": torch.cat(parts)}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in (Median, LowRank, Joined):
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
    found = merge(Median(), base=base, experts=experts)
    for name in base:
        expected = torch.stack([expert[name] for expert in experts]).median(0).values
        torch.testing.assert_close(found[name], expected)


def test_whole_tensors_at_once() -> None:
    base, experts = models()
    found = merge(LowRank(rank=2), base=base, experts=experts)
    for name in ("layers.0.a", "layers.0.b"):
        assert torch.linalg.matrix_rank(found[name] - base[name], tol=1e-4) == 2


def test_whole_layers_with_other_names_and_shapes() -> None:
    base, experts = models()
    found = merge(Joined(), base=base, experts=experts)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "layers.0.joined": (9, 4),
        "layers.1.joined": (5, 4),
    }
    first = torch.stack([expert["layers.0.a"] for expert in experts]).mean(0)
    torch.testing.assert_close(found["layers.0.joined"][:6], first)
