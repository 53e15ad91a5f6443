"""A model with other layers: each layer of the result is a numbered layer of the inputs.

Such models are known as frankenmerges and self-merges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator

from mergecore.checkpoints.architectures import at_layers, depths
from mergecore.checkpoints.snapshot import Snapshot
from mergecore.errors import MismatchError
from mergecore.identity.keys import digest
from mergecore.identity.numbers import Numbers

BASE = "base"
"""What the base is called beside the experts' names."""
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""What config.json calls the number of layers."""
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Lists in config.json with one entry per layer."""

LayerRange = Annotated[tuple[int, int], Field(description="first and last layer (counted from 0), both included")]


class StackRule(Numbers):
    """The next layers of the result, and which layers of the inputs they are."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    layers: Annotated[
        LayerRange | Mapping[str, LayerRange],
        Field(description="of every model, or by name where they are not the same ('base' is the base)"),
    ]

    @field_validator("layers")
    @classmethod
    def _range_forward(cls, layers: LayerRange | Mapping[str, LayerRange]) -> LayerRange | Mapping[str, LayerRange]:
        ranges = list(layers.values()) if isinstance(layers, Mapping) else [layers]
        if not ranges:
            raise ValueError("names no model; give [first, last]")
        for first, last in ranges:
            if not 0 <= first <= last:
                raise ValueError(f"[{first}, {last}] is no run of layers; give the first and the last, from 0")
        if len({last - first for first, last in ranges}) > 1:
            raise ValueError("the models have different numbers of layers here; all must have as many")
        return layers

    @property
    def count(self) -> int:
        """The number of layers of the result."""
        first, last = next(iter(self.layers.values())) if isinstance(self.layers, Mapping) else self.layers
        return last - first + 1

    def of(self, model: str) -> tuple[int, int] | None:
        """Return the layers that are taken from a model; None where it has no part."""
        return self.layers.get(model) if isinstance(self.layers, Mapping) else self.layers


def restacked(snapshot: Snapshot, rules: Sequence[StackRule], model: str) -> Snapshot:
    """Return the checkpoint as if its layers were those of the stack. Its digest changes, its files do not.

    Raises MismatchError where it has no such layers, or more than one stack of them.
    """
    if not rules:
        return snapshot
    where = f"{model} ({snapshot.source.uri})"
    runs = [(rule.of(model), rule.count) for rule in rules]
    name = next((key for key in COUNTS if isinstance(snapshot.config.get(key), int)), None)
    old = _depth(snapshot.tensors, where)
    for run, _ in runs:
        if run is not None and run[1] >= old:
            raise MismatchError(f"stack: {where} has layers 0 to {old - 1}; {list(run)} asks for more")
    layers = _sources(runs)
    config = dict(snapshot.config)
    if name is not None:
        config[name] = len(layers)
    for key in PER_LAYER:
        if isinstance(config.get(key), list) and len(config[key]) == old:
            config[key] = [config[key][0 if layer is None else layer] for layer in layers]
    return dataclasses.replace(
        snapshot,
        tensors=at_layers(snapshot.tensors, layers),
        contents=snapshot.contents.with_layers(layers),
        weights=digest(["stack", snapshot.weights, layers]),
        config=config,
    )


def layers_of(rules: Sequence[StackRule], model: str) -> list[int | None]:
    """Return for each layer of the result the layer of the model; None where the model has no part in it."""
    return _sources([(rule.of(model), rule.count) for rule in rules])


def _sources(runs: Sequence[tuple[tuple[int, int] | None, int]]) -> list[int | None]:
    return [None if run is None else run[0] + number for run, count in runs for number in range(count)]


def _depth(tensors: Mapping[str, Any], where: str) -> int:
    stems = depths(tensors)
    if len(stems) != 1:
        piles = ", ".join(f"'{stem}'" for stem in sorted(stems)) or "none"
        raise MismatchError(f"stack: {where} must have one pile of numbered layers; it has {piles}")
    return next(iter(stems.values()))
