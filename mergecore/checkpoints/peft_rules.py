"""PEFT's rules of a LoRA: which modules it gives an adapter to, and which tensors it then looks for; for a check."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mergecore.checkpoints.blueprint import Blueprint
from mergecore.checkpoints.select import few
from mergecore.errors import MismatchError
from mergecore.tensors.source import TensorInfo


def targeted(config: Mapping[str, Any], module: str) -> bool:
    """Return whether an adapter's configuration targets a module: by its whole name, or the end of it after a dot."""
    return any(module == target or module.endswith(f".{target}") for target in config["target_modules"])


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """Return the rank of a module's update. A pattern matches the whole name or the end of it."""
    for pattern, rank in config["rank_pattern"].items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return int(rank)
    return int(config["r"])


def expected(config: Mapping[str, Any], blueprint: Blueprint) -> dict[str, tuple[int, ...]]:
    """Return {tensor: shape} that PEFT looks for in an adapter's file.

    Raise MismatchError where the configuration targets a module that is no linear layer.
    """
    tensors: dict[str, tuple[int, ...]] = {}
    for module in sorted(name for name in blueprint.modules if targeted(config, name)):
        if module not in blueprint.linear:
            raise MismatchError(
                f"the adapter's target_modules name '{module}' of {blueprint.name}, which is no linear layer"
            )
        rows, columns = blueprint.shapes[f"{module}.weight"]
        inner, outer = (rows, columns) if blueprint.linear[module] else (columns, rows)
        rank, stem = rank_of(config, module), f"base_model.model.{module}"
        tensors[f"{stem}.lora_A.weight"] = (rank, inner)
        tensors[f"{stem}.lora_B.weight"] = (outer, rank)
    return tensors


def check_loads(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], blueprint: Blueprint, where: str) -> None:
    """Raise MismatchError where PEFT would not give every module of the file its update, or change others as well."""
    wanted = expected(config, blueprint)
    lacking, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    stems = [name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors]
    moved = {old: new for old, new in blueprint.in_memory(f"{stem}.weight" for stem in stems).items() if old != new}
    if lacking or unknown or moved:
        told = [f"lacks {few(lacking)}"] * bool(lacking) + [f"has {few(unknown)} for no module"] * bool(unknown)
        told += [f"has '{name}', which is loaded as '{moved[name]}'" for name in list(moved)[:1]]
        raise MismatchError(
            f"{where}: PEFT could not load this adapter on {blueprint.name}: it {', and '.join(told)}; take fewer "
            "layers with --modules, or leave out the last parts of names that several modules share"
        )
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise MismatchError(
                f"{where}: PEFT expects '{name}' to have shape {list(shape)}; it has {list(tensors[name].shape)}"
            )
