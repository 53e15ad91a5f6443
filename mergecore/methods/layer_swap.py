"""Layer swapping: the first and last layers of one expert around the middle ones of another (Bandarkar et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mergecore.arithmetic.trims import folded_sum
from mergecore.arithmetic.weights import weighted
from mergecore.checkpoints.architectures import LAYER, outside
from mergecore.errors import SpecError
from mergecore.plugins.block import Block
from mergecore.plugins.by_layer import Stack, stacks_of
from mergecore.plugins.examples import Examples
from mergecore.plugins.method import WeightMethod
from mergecore.plugins.per_expert import experts_given
from mergecore.plugins.statistic import Statistics
from mergecore.tensors.source import TensorInfo

Taken = Literal["outer", "middle", "average"]
SHARES: dict[Taken, float] = {"outer": 1.0, "middle": 0.0, "average": 0.5}
"""How much of the outer expert."""


@dataclass(frozen=True)
class LayerSwapArguments:
    """only: the expert whose weights these are. shares: where there is none, how much of each of the two."""

    only: Literal["first", "second"] | None
    shares: tuple[float, float] | None


class LayerSwap(WeightMethod[LayerSwapArguments]):
    """Take the first and last layers from one expert (the language), and the layers between from the other (the skill).

    Transition layers lie between the two zones: each tensor there is a weighted mean of both experts. Layers move
    whole, with their norms. A model with several stacks, such as an encoder and a decoder, has all zones in each stack.
    Buffers and integers come from the base. A tensor from one expert alone has that expert's bytes, if its dtype is the
    result's.
    """

    name: ClassVar[str] = "layer_swap"
    paper: ClassVar[str] = (
        "Bandarkar et al. 2024, Layer swapping for zero-shot cross-lingual transfer in large language models, "
        "arXiv:2410.01335"
    )
    ordered: ClassVar[bool] = True

    bottom: Annotated[
        int, Field(ge=0, description=("b, how many layers next to the embeddings come from the outer expert"))
    ] = 5
    top: Annotated[int, Field(ge=0, description="u, how many last layers come from the outer expert")] = 2
    bottom_transition: Annotated[
        int, Field(ge=0, description="t_b, how many transition layers follow the bottom layers")
    ] = 1
    top_transition: Annotated[
        int, Field(ge=0, description="t_u, how many transition layers stand before the top layers")
    ] = 1
    share: Annotated[float, Field(ge=0, le=1, description="weight of the outer expert in a transition layer")] = 0.5
    outer: Annotated[
        Literal["first", "second"],
        Field(description=("which of the two experts gives the bottom and the top layers")),
    ] = "first"
    embeddings: Annotated[
        Taken, Field(description=("which expert gives the embeddings; 'average' takes the mean of both"))
    ] = "outer"
    norm: Annotated[
        Taken, Field(description=("which expert gives the final norm; 'average' takes the mean of both"))
    ] = "outer"
    head: Annotated[
        Taken,
        Field(
            description=(
                "which expert gives the head, and everything else that belongs to no layer; 'average' "
                "takes the mean of both"
            )
        ),
    ] = "outer"
    stacks: Annotated[
        tuple[Stack, ...], Field(description="how many layers the model has; none: as the base's tensors are named")
    ] = ()

    @classmethod
    def examples(cls) -> Examples:
        return Examples(
            golden=[
                {"bottom": 0, "top": 0, "bottom_transition": 0, "outer": "second", "head": "average"},
                {"bottom": 1, "top": 0, "bottom_transition": 0, "norm": "middle", "share": 0.25},
            ],
            others=[
                {"bottom": 1, "top": 0, "bottom_transition": 0, "top_transition": 0},
                {"bottom": 0, "top": 0, "top_transition": 0, "share": 0.3, "outer": "second", "head": "average"},
            ],
        )

    def validate_count(self, count: int) -> None:
        if count != 2:
            raise SpecError(f"layer_swap puts layers of two experts together, {experts_given(count)}")

    def fitted(self, tensors: Mapping[str, TensorInfo]) -> LayerSwap:
        """Return the method with the stacks of the base. Raises SpecError where a zone does not find its layers."""
        stacks = stacks_of(tensors)
        if not stacks:
            raise SpecError(
                "layer_swap: the base has no numbered layers; names like 'model.layers.0.…' are what it goes by"
            )
        if self.stacks not in ((), stacks):
            told = ", ".join(f"'{stack.stem}' with {stack.layers}" for stack in stacks)
            raise SpecError(f"layer_swap.stacks: not what the base has, {told}; leave it out")
        needed = self.bottom + self.bottom_transition + self.top_transition + self.top
        for stack in stacks:
            if needed > stack.layers:
                raise SpecError(
                    f"layer_swap: bottom {self.bottom}, top {self.top} and transitions of {self.bottom_transition} and "
                    f"{self.top_transition} are {needed} layers, '{stack.stem}' has {stack.layers}; make them narrower"
                )
        return self.model_copy(update={"stacks": stacks})

    def arguments(self, block: Block, statistics: Statistics) -> LayerSwapArguments:
        outer = self.outer_share(block.name)
        shares = (outer, 1 - outer) if self.outer == "first" else (1 - outer, outer)
        if shares[0] == 1:
            return LayerSwapArguments("first", None)
        return LayerSwapArguments("second", None) if shares[1] == 1 else LayerSwapArguments(None, shares)

    def outer_share(self, name: str) -> float:
        """Return how much of the outer expert a tensor has: 1 in the bottom and top zones, 0 in the middle."""
        number = LAYER.search(name)
        if number is None:
            return SHARES[getattr(self, outside(name))]
        layer, stem = int(number[1]), name[: number.start(1)]
        depth = next((stack.layers for stack in self.stacks if stack.stem == stem), None)
        # Of a stack whose depth nobody has told (a benchmark of one tensor) no layer is near the top.
        above = self.top + self.top_transition if depth is None else depth - 1 - layer
        if layer < self.bottom or above < self.top:
            return 1.0
        between = layer < self.bottom + self.bottom_transition or above < self.top + self.top_transition
        return self.share if between else 0.0

    def merge(self, weights: Sequence[Tensor], arguments: LayerSwapArguments) -> Tensor:
        """Return one expert's weights as they are, or w_1 θ_1 + w_2 θ_2."""
        if arguments.only is not None:
            return weights[0 if arguments.only == "first" else 1]
        return folded_sum(weighted(weights, arguments.shares))
