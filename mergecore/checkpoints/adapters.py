"""LoRA adapters (Hu et al. 2022) as PEFT writes them: factors, file layout, configuration.

An adapter is `adapter_model.safetensors` with lora_A (rank × in) and lora_B (out × rank) for every module, and
`adapter_config.json`. An adapter that Mergeloom writes has lora_alpha equal to its rank everywhere, so that PEFT's own
factor is 1. Its factors contain the scaling of the adapters it was made of.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mergecore.checkpoints.experts import AdapterExpert, Factor
from mergecore.errors import MismatchError, masked
from mergecore.tensors.source import TensorInfo

CONFIG = "adapter_config.json"
STEM = "adapter_model"
"""The weights' file, without its ending."""
EMPTY: Mapping[str, str] = MappingProxyType({})
"""Every module is called as its tensor in the base's files."""


@dataclass(frozen=True)
class LowRank:
    """One adapter's update of one module, float64: scaling · up @ down, down (rank × in), up (out × rank).

    owner: the id of the adapter that random masks are drawn with.
    """

    down: Tensor
    up: Tensor
    scaling: float
    owner: str = ""

    @property
    def rank(self) -> int:
        """Number of rank-one parts."""
        return self.down.shape[0]


# --- making one ---------------------------------------------------------------------------------------------------


def module_of(target: str) -> str:
    """Return the module whose weight is the base tensor `target`."""
    return target.removesuffix(".weight")


def own_factor(target: str, transposed: bool, modules: Mapping[str, str] = EMPTY) -> Factor:
    """Return where the factors of a base tensor stand in an adapter that Mergeloom writes.

    modules: {base tensor: its module as PEFT names it}, where that is not the tensor's own name.
    """
    stem = f"base_model.model.{modules.get(target, module_of(target))}"
    return Factor(f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", 1.0, transposed)


def is_transposed(experts: Sequence[AdapterExpert]) -> bool:
    """Return whether the base keeps its weights as (in, out).

    Raises MismatchError where the adapters do not agree.
    """
    named = {factor.transposed: expert.name for expert in experts for factor in expert.factors.values()}
    if len(named) > 1:
        raise MismatchError(
            f"'{named[True]}' has fan_in_fan_out=true and '{named[False]}' has not: no adapter can say both; train or "
            "save them with one setting"
        )
    return next(iter(named), False)


def low_rank(expert: AdapterExpert, target: str) -> LowRank | None:
    """Return the expert's update of a base tensor; None where it has none."""
    factor = expert.factors.get(target)
    if factor is None:
        return None
    down, up = (
        expert.stored.read(name).to(torch.float64).reshape(expert.stored.tensors[name].shape)
        for name in (factor.down, factor.up)
    )
    return LowRank(down, up, factor.scaling, expert.tensors_id or expert.id)


def outputs(
    ranks: Mapping[str, int],
    selection: Mapping[str, TensorInfo],
    transposed: bool,
    dtype: str = "F32",
    modules: Mapping[str, str] = EMPTY,
) -> dict[str, TensorInfo]:
    """Return names, dtypes and shapes of an adapter's file. ranks: by base tensor. modules: as in `own_factor`."""
    infos = {}
    for target, rank in ranks.items():
        factor, (rows, columns) = own_factor(target, transposed, modules), selection[target].shape
        inner, outer = (rows, columns) if transposed else (columns, rows)
        infos[factor.down] = TensorInfo(dtype, (rank, inner))
        infos[factor.up] = TensorInfo(dtype, (outer, rank))
    return infos


def padded(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Append rank-one parts of zero up to `rank`: the shapes of a file are known before its numbers are."""
    missing = rank - down.shape[0]
    if missing <= 0:
        return down, up
    return torch.cat([down, down.new_zeros(missing, down.shape[1])]), torch.cat(
        [up, up.new_zeros(up.shape[0], missing)], 1
    )


def relative_error(modules: Mapping[str, Mapping[str, float]]) -> float:
    """Return √(Σ lost / Σ whole) over modules, of squared Frobenius norms; 0 where there is nothing."""
    whole = sum(numbers["whole"] for numbers in modules.values())
    return sqrt(sum(numbers["lost"] for numbers in modules.values()) / whole) if whole else 0.0


# --- its configuration --------------------------------------------------------------------------------------------


def agreed(configs: Sequence[Mapping[str, Any]], key: str) -> Any:
    """Return what all configurations say under a key; None where they differ."""
    values = [config.get(key) for config in configs]
    return values[0] if all(value == values[0] for value in values) else None


def _ends(module: str) -> list[str]:
    """Return what a module's name ends in after each of its dots."""
    parts = module.split(".")
    return [".".join(parts[first:]) for first in range(1, len(parts))]


def _public(value: Any) -> Any:
    """Return a value without the credentials that a text may hold: PEFT records whatever address was loaded."""
    return masked(value) if isinstance(value, str) else value


def adapter_config(
    ranks: Mapping[str, int],
    base: Mapping[str, TensorInfo],
    configs: Sequence[Mapping[str, Any]],
    transposed: bool,
    modules: Mapping[str, str] = EMPTY,
    known: Collection[str] | None = None,
) -> dict[str, Any]:
    """Return the `adapter_config.json` of an adapter.

    ranks: by base tensor. configs: of the adapters it was made of. modules: as `own_factor` has them. known: names of
    all modules of the base in memory; None: the base's tensors tell. Modules are named by their last part where no
    other module shares it, as people write it; otherwise by their full names.
    """
    named = {modules.get(target, module_of(target)): rank for target, rank in ranks.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    other = {re.escape(module): rank for module, rank in sorted(named.items()) if rank != usual}
    if known is None:
        known = [module_of(name) for name, info in base.items() if len(info.shape) > 1]
    others = {module.rpartition(".")[2] for module in known if module not in named}
    short = {leaf for module in named if (leaf := module.rpartition(".")[2]) not in others}
    long = {module for module in named if module.rpartition(".")[2] in others}
    # PEFT takes a name for the end of longer ones too. Only an expression means whole names.
    ends = {module for name in known if name not in named for module in _ends(name)}
    targets: Any = "|".join(map(re.escape, sorted(named))) if long & ends else sorted(short | long)
    return {
        "peft_type": "LORA",
        "task_type": agreed(configs, "task_type"),
        "base_model_name_or_path": _public(agreed(configs, "base_model_name_or_path")),
        "revision": None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": other,
        "alpha_pattern": dict(other),
        "target_modules": targets,
        "fan_in_fan_out": transposed,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "modules_to_save": None,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
    }
