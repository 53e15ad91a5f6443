"""Experts as views: weights θ_t and deltas τ_t = θ_t − θ_0 in float32, formed while both are read.

A full checkpoint and a LoRA adapter (Hu et al. 2022) are read alike. A delta is never written at full size.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mergecore.checkpoints.blueprint import blueprint_of, in_memory, why_unknown
from mergecore.checkpoints.layout import tied_names
from mergecore.checkpoints.patterns import matches
from mergecore.checkpoints.sources.selection import ADAPTER_CONFIG
from mergecore.checkpoints.tensor_ids import tensor_id, tensors_id
from mergecore.errors import MismatchError, SpecError
from mergecore.identity.keys import digest
from mergecore.tensors.source import TensorInfo, TensorSource

ROWS = 256
"""LoRA products are formed over fixed blocks of this many rows, so that they are the same for any span."""


NEUTRAL: dict[str, Any] = {
    "use_dora": False,
    "modules_to_save": None,
    "bias": "none",
    "lora_bias": False,
    "use_qalora": False,
    "use_bdlora": None,
    "kasa_config": None,
    "monteclora_config": None,
    "arrow_config": None,
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}
"""Settings of a PEFT adapter that make it more than W + scaling · B @ A, and the values at which they do not."""
LARGEST_ALPHA = 1e30
"""No adapter is scaled by that much."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to start LoRA factors that change the base's weights as well (PEFT's `init_lora_weights`)."""


class Expert(ABC):
    """One expert as the engine reads it."""

    id: str
    name: str
    stored: TensorSource
    """The expert's own file or files."""
    tensors_id: str
    """What random masks are drawn with (tensor_ids.py); '' where nobody asked for it."""
    complete: ClassVar[bool]
    """True: what is read are weights, and the base is not needed to know them."""

    @abstractmethod
    def identify(self, without: Collection[str] = ()) -> str:
        """Return the digest of what its tensors hold, 64 hex digits. Reads all but those of the names `without`."""

    @abstractmethod
    def identified(self, tensors_id: str) -> Self:
        """Return the expert with the id of its tensors."""

    @abstractmethod
    def carries(self, name: str) -> bool:
        """Return whether the expert's own files change this tensor of the base."""

    @abstractmethod
    def block(self, name: str, start: int, stop: int) -> Tensor:
        """Read elements start … stop−1 once: weights in their own dtype, or the delta in float32."""

    @abstractmethod
    def weights(self, values: Tensor, base: Tensor) -> Tensor:
        """Return θ_t in float32. values: from `block`. base: the same elements of the base, float32."""

    @abstractmethod
    def delta(self, values: Tensor, base: Tensor) -> Tensor:
        """Return τ_t in float32. values: from `block`. base: the same elements of the base, float32."""


@dataclass(frozen=True)
class FullExpert(Expert):
    """A full checkpoint."""

    id: str
    name: str
    stored: TensorSource
    tensors_id: str = ""
    complete: ClassVar[bool] = True

    def identify(self, without: Collection[str] = ()) -> str:
        """Return the id of the checkpoint's tensors."""
        return tensors_id(self.stored, without)

    def identified(self, tensors_id: str) -> Self:
        """Return the expert with the id of its tensors."""
        return replace(self, tensors_id=tensors_id)

    def carries(self, name: str) -> bool:
        """Return whether the checkpoint has the tensor."""
        return name in self.stored.tensors

    def block(self, name: str, start: int, stop: int) -> Tensor:
        """Read the weights in their own dtype."""
        return self.stored.read(name, start, stop)

    def weights(self, values: Tensor, base: Tensor) -> Tensor:
        """Return the weights in float32."""
        return values.to(torch.float32)

    def delta(self, values: Tensor, base: Tensor) -> Tensor:
        """Return weights minus base, both in float32."""
        return values.to(torch.float32) - base


@dataclass(frozen=True)
class Factor:
    """One low-rank update: delta = scaling · up @ down, transposed where the base keeps (in, out).

    module: what the updated module is called in memory; '' where that is its name in the base's files.
    """

    down: str
    up: str
    scaling: float
    transposed: bool
    module: str = ""


@dataclass(frozen=True)
class AdapterExpert(Expert):
    """A LoRA adapter on the base. Its delta is zero wherever it has no factors."""

    id: str
    name: str
    stored: TensorSource
    factors: Mapping[str, Factor]
    shapes: Mapping[str, tuple[int, ...]]
    tensors_id: str = ""
    complete: ClassVar[bool] = False

    def identify(self, without: Collection[str] = ()) -> str:
        """Return the id of the factors and their scalings, by the tensors that they change."""
        factors = {
            target: [*map(self._described, (factor.down, factor.up)), factor.scaling, factor.transposed]
            for target, factor in self.factors.items()
        }
        return digest(["adapter", factors])

    def identified(self, tensors_id: str) -> Self:
        """Return the expert with the id of its factors."""
        return replace(self, tensors_id=tensors_id)

    def carries(self, name: str) -> bool:
        """Return whether the adapter has factors for the tensor."""
        return name in self.factors

    def block(self, name: str, start: int, stop: int) -> Tensor:
        """Return the delta in float32. It is formed over fixed groups of `ROWS` rows."""
        if name not in self.factors:
            return torch.zeros(stop - start)
        factor, (rows, columns) = self.factors[name], self.shapes[name]
        down, up = self._matrix(factor.down), self._matrix(factor.up)
        left, right = (down.T, up.T) if factor.transposed else (up, down)
        first = start // columns // ROWS * ROWS
        last = min(rows, math.ceil(stop / columns))
        products = [(left[row : row + ROWS] @ right).reshape(-1) for row in range(first, last, ROWS)]
        joined = torch.cat(products) if len(products) > 1 else products[0]
        return joined[start - first * columns : stop - first * columns] * factor.scaling

    def weights(self, values: Tensor, base: Tensor) -> Tensor:
        """Return base plus delta in float32."""
        return base + values

    def delta(self, values: Tensor, base: Tensor) -> Tensor:
        """Return the delta."""
        return values

    def _described(self, name: str) -> list[Any]:
        info = self.stored.tensors[name]
        return [info.dtype, list(info.shape), tensor_id(self.stored, name, info)]

    def _matrix(self, name: str) -> Tensor:
        return self.stored.read(name).to(torch.float32).reshape(self.stored.tensors[name].shape)


def adapter_factors(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    base: Mapping[str, TensorInfo],
    where: str,
    base_config: Mapping[str, Any],
) -> dict[str, Factor]:
    """Return {base tensor: factor} of a PEFT LoRA adapter. rsLoRA scaling, rank and alpha patterns are as PEFT has
    them.

    An adapter names modules as they are in memory, where the base's files may name tensors otherwise. base_config: the
    base's config.json, from which transformers knows both.
    Raises MismatchError, naming the adapter and the tensor, for what is not a plain LoRA update (DoRA, biases,
    modules_to_save, convolutions) and for factors that do not fit the base.
    """
    _refuse(config, where)
    alphas = _Alphas.of(config, where)
    modules = _modules(tensors, where)
    targets = _targets([f"{module}.weight" for module in modules.values()], base, where, base_config)
    factors: dict[str, Factor] = {}
    for name, module in modules.items():
        (target, memory), up = targets[f"{module}.weight"], name.replace("lora_A", "lora_B")
        if up not in tensors:
            raise MismatchError(f"{where}: '{name}' has no '{up}' beside it; the file is incomplete")
        if target in factors:
            raise MismatchError(
                f"{where}: '{factors[target].down}' and '{name}' both change '{target}' of the base; leave one out"
            )
        transposed = bool(config.get("fan_in_fan_out"))
        _check_shapes(Factor(name, up, 1.0, transposed), tensors, base[target], target, where)
        called = "" if memory == target else memory.removesuffix(".weight")
        factors[target] = Factor(name, up, alphas.scaling(module, tensors[name].shape[0]), transposed, called)
    return factors


def _modules(tensors: Mapping[str, TensorInfo], where: str) -> dict[str, str]:
    """Return {lora_A tensor: its module} of an adapter's file."""
    modules = {}
    for name in sorted(tensors):
        stem = re.sub(r"\.default(?=\.|$)", "", name).removeprefix("base_model.model.")
        if stem.endswith(".lora_B.weight"):
            continue
        if not stem.endswith(".lora_A.weight"):
            raise MismatchError(
                f"{where}: '{name}' is not part of a plain LoRA update (lora_A and lora_B of linear layers); fold the "
                "adapter into its base with PEFT's merge_and_unload and give the full checkpoint"
            )
        modules[name] = stem.removesuffix(".lora_A.weight")
    return modules


def _targets(
    wanted: Sequence[str], base: Mapping[str, TensorInfo], where: str, config: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
    """Return {weight that an adapter changes, as it names it: (tensor in the base's files, name in memory)}.

    Raises MismatchError for a weight that the base ties to another, and for one that it has not.
    """
    tied = tied_names(base, config)
    direct = all(name in base or name in tied for name in wanted)
    memory = {} if direct else in_memory(config, wanted)
    stored = {} if direct else {new: name for name, new in in_memory(config, base).items()}
    targets = {}
    for name in wanted:
        target = name if direct else stored.get(memory[name], name)
        owner = tied.get(target) or tied.get(memory.get(name, name))
        if owner is not None:
            raise MismatchError(
                f"{where} changes '{name}', which the base ties to '{owner}': as one tensor they "
                "would both change; train the adapter without this target, or fold it into an untied copy of the base"
            )
        if target not in base:
            raise MismatchError(f"{where}: its target '{target}' is not in the base; {_absent(target, config)}")
        targets[name] = target, memory.get(name, name)
    return targets


def _absent(target: str, config: Mapping[str, Any]) -> str:
    """Say why a weight that an adapter changes is not in the base's files, and what to do."""
    blueprint = blueprint_of(config)
    if blueprint is None:
        return f"is this the adapter's base? ({why_unknown(config)})"
    if target in blueprint.shapes:
        return (
            "transformers makes it of other tensors of the files while it loads them; fold the adapter into its base "
            "with PEFT's merge_and_unload and give the full checkpoint"
        )
    return f"is this the adapter's base? {blueprint.name} has no such tensor"


def _refuse(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise MismatchError(
            f"{where} is a {kind} adapter; LoRA adapters can be merged, fold others into their base first"
        )
    for field, empty in NEUTRAL.items():
        if config.get(field, empty) not in (empty, [], {}, None):
            raise MismatchError(
                f"{where} uses {field}={config[field]!r}, which is more than a low-rank update; fold it into its base "
                "with PEFT's merge_and_unload and give the full checkpoint"
            )

    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise MismatchError(
            f"{where} was started with init_lora_weights={start!r}, which takes a part out of the base's weights: its "
            "factors are no update of the base as it is; save it with PEFT's path_initial_model_for_weight_conversion, "
            "or fold it with merge_and_unload and give the full checkpoint"
        )


@dataclass(frozen=True)
class _Alphas:
    """What the factors of an adapter are scaled by, as its configuration says it."""

    alpha: float
    patterns: Mapping[str, float]
    rank_stabilised: bool
    where: str

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> _Alphas:
        """Return what a configuration says. Raises MismatchError where it says something else than numbers."""
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, Mapping):
            raise MismatchError(f"{where}: alpha_pattern in its {ADAPTER_CONFIG} must map modules to numbers")
        return cls(
            _number(config.get("lora_alpha", 8), "lora_alpha", where),
            {
                str(pattern): _number(value, f"alpha_pattern of '{pattern}'", where)
                for pattern, value in patterns.items()
            },
            bool(config.get("use_rslora")),
            where,
        )

    def scaling(self, module: str, rank: int) -> float:
        """Return alpha/rank, or alpha/√rank for rsLoRA. A pattern matches the module's whole name or its end, as in
        PEFT.
        """
        try:
            of_module = (value for pattern, value in self.patterns.items() if matches(rf"(.*\.)?({pattern})$", module))
            alpha = next(of_module, self.alpha)
        except SpecError as error:
            raise MismatchError(f"{self.where}: alpha_pattern in its {ADAPTER_CONFIG}: {error}") from None
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def _number(value: Any, key: str, where: str) -> float:
    """Return a finite number of a configuration."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST_ALPHA:
        return float(value)
    raise MismatchError(f"{where}: {key} in its {ADAPTER_CONFIG} must be a number (given: {value!r:.60})")


def _check_shapes(factor: Factor, tensors: Mapping[str, TensorInfo], target: TensorInfo, name: str, where: str) -> None:
    down, up = tensors[factor.down].shape, tensors[factor.up].shape
    if len(down) == len(up) == 2 and 0 in (*down, *up):
        raise MismatchError(
            f"{where}: '{factor.down}' {list(down)} and '{factor.up}' {list(up)} are empty, an update of rank 0; save "
            "the adapter again with its weights gathered"
        )
    if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
        raise MismatchError(
            f"{where}: '{factor.down}' {list(down)} and '{factor.up}' {list(up)} make no matrix product"
        )
    shape = (down[1], up[0]) if factor.transposed else (up[0], down[1])
    if tuple(target.shape) != shape:
        raise MismatchError(
            f"{where}: its update of '{name}' has shape {list(shape)}, the base has {list(target.shape)}; "
            "it was trained on another base"
        )
