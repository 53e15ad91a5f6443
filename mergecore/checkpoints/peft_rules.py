"""PEFT's rules of a LoRA: which modules it gives an adapter to, and which tensors it then looks for; for a check."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from mergecore.checkpoints.blueprint import Blueprint
from mergecore.checkpoints.select import few
from mergecore.errors import MismatchError
from mergecore.tensors.source import TensorInfo

AS_EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
"""Last parts of targets that PEFT takes for a mixture's experts and router, by the mixture's way of naming them. They
are one tensor each in transformers 5: layers that are called so (of a shared expert, say) get no update of their own.
"""
MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Model types in which PEFT refuses the layers that a Mamba kernel reads by itself."""
READ_BY_MAMBA = ("out_proj", "conv1d")


def closed(blueprint: Blueprint, modules: Collection[str]) -> dict[str, str]:
    """Return {module: why} of the linear layers among these that PEFT gives no update of their own in this model."""
    from transformers import conversion_mapping

    kind = str(blueprint.model.config.model_type)
    alike: Mapping[str, str] = {"mixtral": "mixtral", **getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})}
    experts = AS_EXPERTS.get(alike.get(kind, ""), ())
    mamba = READ_BY_MAMBA if kind in MAMBA else ()
    moved = blueprint.moved(f"{module}.weight" for module in modules)
    reasons = {}
    for module in modules:
        leaf = module.rpartition(".")[2]
        if leaf in experts:
            reasons[module] = "PEFT takes them for the experts of the mixture, which are one tensor in memory"
        elif leaf in mamba:
            reasons[module] = "PEFT refuses adapters on what a Mamba kernel reads"
        elif f"{module}.weight" in moved:
            reasons[module] = "PEFT renames them once more when it loads an adapter, and misses them"
    return reasons


def targeted(config: Mapping[str, Any], module: str) -> bool:
    """Return whether an adapter's configuration targets a module: by its whole name, or the end of it after a dot.

    A configuration with one expression instead of names means the whole name.
    """
    if isinstance(config["target_modules"], str):
        return re.fullmatch(config["target_modules"], module) is not None
    return any(module == target or module.endswith(f".{target}") for target in config["target_modules"])


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """Return the rank of a module's update. A pattern matches the whole name or the end of it."""
    for pattern, rank in config["rank_pattern"].items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return int(rank)
    return int(config["r"])


def expected(config: Mapping[str, Any], blueprint: Blueprint) -> dict[str, tuple[int, ...]]:
    """Return {tensor: shape} that PEFT looks for in an adapter's file.

    Raise MismatchError where the configuration targets a module that is no linear layer, or one that PEFT gives no
    update of its own.
    """
    chosen = sorted(name for name in blueprint.modules if targeted(config, name))
    shut = closed(blueprint, chosen)
    tensors: dict[str, tuple[int, ...]] = {}
    for module in chosen:
        if module in shut:
            raise MismatchError(f"the adapter's target_modules name '{module}' of {blueprint.name}: {shut[module]}")
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
    moved = blueprint.moved(f"{stem}.weight" for stem in stems)
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
