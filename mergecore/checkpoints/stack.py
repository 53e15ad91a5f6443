"""A model with other layers: each layer of the result is a numbered layer of the inputs.

Such models are known as frankenmerges and self-merges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator

from mergecore.checkpoints.architectures import at_layers, depths
from mergecore.checkpoints.layer_settings import Settings, settings_of, stacked_config
from mergecore.checkpoints.snapshot import Snapshot
from mergecore.errors import MismatchError
from mergecore.identity.keys import digest
from mergecore.identity.numbers import Numbers

BASE = "base"
"""What the base is called beside the experts' names."""

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
    """Return the checkpoint's tensors as if its layers were those of the stack. Its digest changes, its files do not.

    Raises MismatchError where it has no such layers, or more than one stack of them.
    """
    if not rules:
        return snapshot
    where = f"{model} ({snapshot.source.uri})"
    runs = [(rule.of(model), rule.count) for rule in rules]
    old = _depth(snapshot.tensors, where)
    for run, _ in runs:
        if run is not None and run[1] >= old:
            raise MismatchError(f"stack: {where} has layers 0 to {old - 1}; {list(run)} asks for more")
    layers = _sources(runs)
    settings = settings_of(snapshot.config)
    if settings is None and snapshot.config.get("model_type"):
        raise MismatchError(f"stack: config.json of {where} says no number of layers, as in num_hidden_layers; add it")
    if settings is not None and settings.depth != old:
        raise MismatchError(
            f"stack: {where} has layers 0 to {old - 1}, and its config.json says {settings.count} {settings.depth} "
            "(layers behind that, which predict further tokens, cannot be stacked): remove the others, or correct it"
        )
    return dataclasses.replace(
        snapshot,
        tensors=at_layers(snapshot.tensors, layers),
        contents=snapshot.contents.with_layers(layers),
        weights=digest(["stack", snapshot.weights, layers]),
    )


def stacked(models: Mapping[str, Snapshot], rules: Sequence[StackRule]) -> dict[str, Snapshot]:
    """Return the checkpoints with the layers of the stack, and with configurations that say the same of each layer.

    models: as their files have them, by name, the base first. A layer in which a model has no part is what the first
    that has one says. Raises MismatchError where a model has no such layers, or its configuration cannot say it.
    """
    if not rules:
        return dict(models)
    settings = {name: settings_of(snapshot.config) for name, snapshot in models.items()}
    layers = {name: layers_of(rules, name) for name in models}
    return {
        name: dataclasses.replace(
            restacked(snapshot, rules, name),
            config=stacked_config(
                snapshot.config, list(_owners(name, settings, layers)), f"{name} ({snapshot.source.uri})"
            ),
        )
        for name, snapshot in models.items()
    }


def _owners(
    name: str, settings: Mapping[str, Settings | None], layers: Mapping[str, Sequence[int | None]]
) -> Iterator[tuple[Settings, int]]:
    """Yield for each layer of the result whose it is by its configuration: the model's own where it has a part."""
    for number in range(len(layers[name])):
        owners = ((settings[owner], layers[owner][number]) for owner in (name, *settings))
        told = [(of, layer) for of, layer in owners if of is not None and layer is not None]
        own = settings[name]
        if told:
            yield told[0]
        elif own is not None:  # nobody says it who is known here
            yield own, 0


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
