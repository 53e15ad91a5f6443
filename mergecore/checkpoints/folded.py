"""A checkpoint with a LoRA adapter folded into it, as one model: base plus change in float32, formed while it is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mergecore.checkpoints.experts import AdapterExpert, Expert, Factor, adapter_factors
from mergecore.checkpoints.layout import tied_names
from mergecore.checkpoints.snapshot import Snapshot
from mergecore.errors import SpecError
from mergecore.events import silent
from mergecore.identity.keys import digest
from mergecore.tensors.source import TensorInfo, TensorSource


@dataclass(frozen=True)
class FoldedTensors:
    """The tensors of the checkpoint; those that the adapter changes are float32."""

    ground: TensorSource
    adapter: AdapterExpert

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by name."""
        changed = {name: TensorInfo("F32", self.ground.tensors[name].shape) for name in self.adapter.factors}
        return {**self.ground.tensors, **changed}

    def read(self, name: str, start: int = 0, stop: int | None = None, space: Tensor | None = None) -> Tensor:
        """Elements start … stop−1 of the flattened tensor."""
        if not self.adapter.carries(name):
            return self.ground.read(name, start, stop, space)
        stop = self.ground.tensors[name].count if stop is None else stop
        folded = self.ground.read(name, start, stop).to(torch.float32) + self.adapter.block(name, start, stop)
        return folded if space is None else space.copy_(folded)


@dataclass(frozen=True)
class FoldedSnapshot(Snapshot):
    """A checkpoint with an adapter folded in. tensors: dtypes and shapes as the checkpoint has them."""

    adapter: Snapshot = field(kw_only=True)
    factors: Mapping[str, Factor] = field(kw_only=True)

    def open(self, folder: Path) -> TensorSource:
        """The tensors, the checkpoint's as read from `folder`."""
        held = self.adapter.open(self.adapter.source.fetch(silent))
        shapes = {name: self.tensors[name].shape for name in self.factors}
        return FoldedTensors(super().open(folder), AdapterExpert(self.weights, "", held, dict(self.factors), shapes))


def folded(ground: Snapshot, adapter: Snapshot, where: str) -> FoldedSnapshot:
    """`ground` with `adapter` folded in. Raises SpecError and MismatchError where they are not what they should be."""
    if ground.kind != "full" or adapter.kind != "adapter":
        raise SpecError(
            f"{where}: {adapter.source.uri} on {ground.source.uri}: give a LoRA adapter on a full checkpoint"
        )
    tied = tied_names(ground.tensors, ground.config)
    factors = adapter_factors(adapter.tensors, adapter.config, ground.tensors, where, tied)
    held = {entry.name: getattr(ground, entry.name) for entry in dataclasses.fields(Snapshot)}
    held["weights"] = digest(["folded", ground.weights, adapter.weights])
    return FoldedSnapshot(**held, adapter=adapter, factors=factors)


@dataclass(frozen=True)
class Folded:
    """An expert as a model: its weights in float32, an adapter folded into the base."""

    base: TensorSource
    expert: Expert

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The base's tensors."""
        return self.base.tensors

    def read(self, name: str, start: int = 0, stop: int | None = None, space: Tensor | None = None) -> Tensor:
        """Elements of θ_t, integers as they are; what the expert does not carry is the base's."""
        stop = self.base.tensors[name].count if stop is None else stop
        held = self.base.read(name, start, stop)
        if not self.expert.carries(name):
            return held
        own = self.expert.block(name, start, stop)
        # Counters of a BatchNorm and the like are integers, in the model too.
        return self.expert.weights(own, held.to(torch.float32)) if own.is_floating_point() else own
