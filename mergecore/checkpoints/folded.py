"""An expert as a whole model: a full checkpoint over its base, or a LoRA adapter folded into a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from mergecore.checkpoints.architectures import Layers, at_layers
from mergecore.checkpoints.experts import AdapterExpert, Expert, Factor, adapter_factors
from mergecore.checkpoints.snapshot import Contents, Snapshot
from mergecore.checkpoints.sources import Source
from mergecore.checkpoints.tensor_ids import tensors_id
from mergecore.errors import SpecError
from mergecore.events import silent
from mergecore.identity.keys import digest
from mergecore.tensors.files import Location
from mergecore.tensors.source import TensorInfo, TensorSource
from mergecore.tensors.torch_dtypes import DTYPES


@final
@dataclass(frozen=True)
class FoldedTensors:
    """The weights of an expert under the names of its base, formed while they are read.

    What the expert carries is float32; integers and all other tensors keep their dtype.
    """

    base: TensorSource
    expert: Expert

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the base, by name."""
        return {name: _formed(info) if self.expert.carries(name) else info for name, info in self.base.tensors.items()}

    def identify(self, without: Collection[str] = ()) -> str:
        """Return the id of base and adapter together: sums of products differ in their last bits between machines."""
        return digest(["folded", tensors_id(self.base, without), self.expert.identify(without)])

    def read(self, name: str, start: int = 0, stop: int | None = None, space: Tensor | None = None) -> Tensor:
        """Read elements start … stop−1 of the flattened tensor. What the expert does not carry is the base's."""
        if not self.expert.carries(name):
            return self.base.read(name, start, stop, space)
        stop = self.base.tensors[name].count if stop is None else stop
        values = self.expert.block(name, start, stop)
        # Counters of a BatchNorm and the like are integers, in the model too.
        if values.is_floating_point():
            values = self.expert.weights(values, self.base.read(name, start, stop).to(torch.float32))
        return values if space is None else space.copy_(values)


@final
@dataclass(frozen=True)
class FoldedContents(Contents):
    """The tensors of a checkpoint with an adapter folded in. factors: of the adapter, by tensor of the checkpoint."""

    base: Contents
    adapter: Snapshot
    factors: Mapping[str, Factor]

    @property
    def adapter_source(self) -> Source:
        """The adapter's source."""
        return self.adapter.source

    @property
    def stored_at(self) -> Mapping[str, Location]:
        """The checkpoint's locations, without those of tensors that the adapter changes."""
        return {name: location for name, location in self.base.stored_at.items() if name not in self.factors}

    def open(self, folder: Path, tensors: Mapping[str, TensorInfo]) -> TensorSource:
        """Open the checkpoint in `folder`, and the adapter where its own source has it."""
        factors = self.adapter.open(self.adapter.source.fetch(silent))
        shapes = {name: (tensors[name].shape[0], tensors[name].shape[1]) for name in self.factors}
        expert = AdapterExpert(self.adapter.weights, self.adapter.source.uri, factors, dict(self.factors), shapes)
        return FoldedTensors(self.base.open(folder, tensors), expert)

    def opened(self, tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
        """Return the tensors; those that the adapter changes are float32."""
        return {name: _formed(info) if name in self.factors else info for name, info in tensors.items()}

    def with_layers(self, layers: Layers) -> FoldedContents:
        """Rename the checkpoint's tensors and the adapter's factors alike."""
        return FoldedContents(self.base.with_layers(layers), self.adapter, at_layers(self.factors, layers))

    def renamed(self, names: Mapping[str, str]) -> FoldedContents:
        """Rename the checkpoint's tensors and the adapter's factors alike."""
        factors = {new: self.factors[old] for new, old in names.items() if old in self.factors}
        return FoldedContents(self.base.renamed(names), self.adapter, factors)


def _formed(info: TensorInfo) -> TensorInfo:
    """Return the info of a sum that is formed in float32; integers keep their dtype."""
    return TensorInfo("F32", info.shape) if DTYPES[info.dtype].is_floating_point else info


def folded(base: Snapshot, adapter: Snapshot, where: str) -> Snapshot:
    """Return `base` with `adapter` folded in.

    Raises SpecError where they are not a full checkpoint and an adapter, MismatchError where they do not fit.
    """
    if base.kind != "full" or adapter.kind != "adapter":
        raise SpecError(f"{where}: {adapter.source.uri} on {base.source.uri}: give a LoRA adapter on a full checkpoint")
    factors = adapter_factors(adapter.tensors, adapter.config, base.tensors, where, base.config)
    return dataclasses.replace(
        base,
        weights=digest(["folded", base.weights, adapter.weights]),
        contents=FoldedContents(base.contents, adapter, factors),
    )
