"""A factor that goes by layer: from the first layer's to the last layer's in even steps (LiNeS, Wang et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Discriminator, Field, Tag

from mergecore.checkpoints.architectures import LAYER, depths
from mergecore.errors import SpecError
from mergecore.identity.numbers import Numbers
from mergecore.plugins.per_expert import ONE
from mergecore.plugins.per_tensor import PerTensor


class Stack(Numbers):
    """Numbered layers of a model, first to last."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    stem: Annotated[str, Field(description="what stands before the number in the tensors' names")]
    layers: Annotated[int, Field(ge=1, description="how many layers there are")]


def stacks_of(tensors: Iterable[str]) -> tuple[Stack, ...]:
    """Return the stacks of a model by the names of its tensors, in the order of their stems."""
    return tuple(Stack(stem=stem, layers=layers) for stem, layers in sorted(depths(tensors).items()))


class ByLayer(PerTensor):
    """One number per layer: λ_ℓ = first + (last − first) · ℓ / (L − 1) for layer ℓ of L, counted from 0.

    Each stack of a model (an encoder and a decoder, a vision tower) is counted by itself. The only layer of a stack of
    one counts as the last. Source: Wang et al. 2024, LiNeS, arXiv:2410.17146, with first = α and
    last = α + β; so do the authors' code and, for tensors that belong to no layer, `others` left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    first: Annotated[float, Field(description="LiNeS: α, the factor in the first layer")]
    last: Annotated[float, Field(description="α + β, the factor in the last layer; those between go evenly")]
    others: Annotated[
        float | None,
        Field(description="of what is in no layer: embeddings, final norm, head; none: as the first layer (authors)"),
    ] = None
    stacks: Annotated[
        tuple[Stack, ...], Field(repr=False, description="how many layers there are; none: as the base's tensors say")
    ] = ()

    def fitted(self, tensors: Iterable[str], where: str) -> ByLayer:
        """Return it with the stacks of a model. Raises SpecError where it has no layers, or others than are given."""
        stacks = stacks_of(tensors)
        if not stacks:
            raise SpecError(
                f"{where}: goes by layer, and the base has no numbered layers; names like 'model.layers.0.…' are what "
                "it goes by; give one number"
            )
        if self.stacks not in ((), stacks):
            told = ", ".join(f"'{stack.stem}' with {stack.layers}" for stack in stacks)
            raise SpecError(f"{where}.stacks: not what the base has, {told}; leave it out")
        return self.model_copy(update={"stacks": stacks})

    def at(self, name: str) -> float:
        """Return the factor of a tensor."""
        number = LAYER.search(name)
        if number is None:
            return self.first if self.others is None else self.others
        layer, stem = int(number[1]), name[: number.start(1)]
        # Of a stack whose depth nobody has told (a benchmark of one tensor) every layer is the last.
        depth = next((stack.layers for stack in self.stacks if stack.stem == stem), 1)
        share = layer / (depth - 1) if depth > 1 else 1.0
        return (1 - share) * self.first + share * self.last


def _goes_by_layer(value: Any) -> bool:
    return isinstance(value, ByLayer) or (isinstance(value, Mapping) and set(value) != {"grid"})


if TYPE_CHECKING:
    Scale = float  # a method never sees anything else: `Method.of_tensor` puts the tensor's number in its place
else:
    Scale = Annotated[
        Annotated[float, ONE] | Annotated[ByLayer, Tag("(layers)")],
        Discriminator(lambda value: "(layers)" if _goes_by_layer(value) else "(one)"),
    ]
