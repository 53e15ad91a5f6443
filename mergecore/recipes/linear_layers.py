"""The linear layers of a model that an adapter is extracted for: which they are, and what PEFT calls them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergecore.checkpoints.adapters import module_of
from mergecore.checkpoints.architectures import EMBEDDINGS, TRANSPOSED
from mergecore.checkpoints.blueprint import Blueprint, blueprint_of, in_memory, why_unknown
from mergecore.checkpoints.peft_rules import check_loads, closed
from mergecore.checkpoints.select import few
from mergecore.checkpoints.snapshot import Snapshot
from mergecore.errors import SpecError, nearest
from mergecore.tensors.source import TensorInfo


@dataclass(frozen=True)
class Layers:
    """The linear layers that an adapter is extracted for.

    weights: by name in the base's files. modules: {weight: its module in memory, as PEFT names it}. transposed: whether
    the model keeps them as (in, out). blueprint: None where transformers does not know the model; then names are those
    of the files.
    """

    weights: Mapping[str, TensorInfo]
    modules: Mapping[str, str]
    transposed: bool
    blueprint: Blueprint | None
    warnings: tuple[str, ...]

    @property
    def known(self) -> frozenset[str] | None:
        """All modules of the model; None where they are not known."""
        return None if self.blueprint is None else self.blueprint.modules

    def check(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], where: str) -> None:
        """Raise MismatchError where PEFT would not load an adapter on exactly these layers."""
        if self.blueprint is not None:
            check_loads(config, tensors, self.blueprint, where)


def linear_layers(changed: Mapping[str, TensorInfo], base: Snapshot, modules: Sequence[str]) -> Layers:
    """Return the linear layers among these tensors.

    Raise SpecError where one of `modules` names no layer.
    """
    blueprint, warnings = blueprint_of(base.config), tuple[str, ...]()
    if blueprint is None:
        kind = str(base.config.get("model_type", ""))
        named, transposed = _linear_by_name(changed, kind), kind in TRANSPOSED
        warnings = (
            "modules are called as in the base's files, and whether PEFT finds them could not be checked: "
            f"{why_unknown(base.config)}",
        )
    else:
        named, transposed = _linear_in_memory(changed, base, blueprint)
        shut = closed(blueprint, list(named.values()))
        named = {name: module for name, module in named.items() if module not in shut}
        warnings = tuple(f"{few(_with(shut, why))} are left out: {why}" for why in sorted(set(shut.values())))
    for wanted in modules:
        if not any(_is_named(module, wanted) or _is_named(module_of(name), wanted) for name, module in named.items()):
            leaves = {module.rpartition(".")[2] for module in named.values()}
            raise SpecError(f"modules: '{wanted}' is no linear layer that the expert has; {nearest(wanted, leaves)}")
    taken = {
        name: module
        for name, module in named.items()
        if not modules or any(_is_named(module, wanted) or _is_named(module_of(name), wanted) for wanted in modules)
    }
    if not taken:
        raise SpecError(
            "the expert has no linear layer (a weight of two dimensions that is no embedding): no adapter fits"
        )
    return Layers({name: changed[name] for name in taken}, taken, transposed, blueprint, warnings)


def _with(shut: Mapping[str, str], why: str) -> list[str]:
    return sorted(module for module, reason in shut.items() if reason == why)


def _linear_by_name(changed: Mapping[str, TensorInfo], model_type: str) -> dict[str, str]:
    """Return {weight: module} of what is a linear layer by its name and shape."""
    patterns = TRANSPOSED.get(model_type, ("*.weight",))
    return {
        name: module_of(name)
        for name, info in changed.items()
        if len(info.shape) == 2 and info.count and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in EMBEDDINGS)
    }  # fmt: skip


def _linear_in_memory(
    changed: Mapping[str, TensorInfo], base: Snapshot, blueprint: Blueprint
) -> tuple[dict[str, str], bool]:
    """Return {weight: module} of the linear layers of the model, and whether they are kept as (in, out).

    An adapter knows one way of the two: of a model that has both kinds the (in, out) layers are taken.
    """
    memory = in_memory(base.config, base.tensors)
    named = {
        name: module_of(memory[name])
        for name, info in changed.items()
        if module_of(memory[name]) in blueprint.linear
        and blueprint.shapes.get(memory[name]) == info.shape
        and info.count
    }
    transposed = any(blueprint.linear[module] for module in named.values())
    return {name: module for name, module in named.items() if blueprint.linear[module] == transposed}, transposed


def _is_named(module: str, wanted: str) -> bool:
    return module == wanted or module.endswith(f".{wanted}") or fnmatch.fnmatchcase(module, wanted)
