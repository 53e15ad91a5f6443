"""Methods that make an adapter of adapters, and the directory that PEFT loads one from.

An adapter here is LoRA (Hu et al. 2022) as PEFT writes it: `adapter_model.safetensors` with lora_A (rank × in) and lora_B
(out × rank) for every module, and `adapter_config.json`. What is made has lora_alpha equal to its rank everywhere, so that
PEFT's own factor is 1: the scaling of the adapters it was made of is in its factors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mergecore.checkpoints.adapters import LowRank, low_rank, made_factor, module_of
from mergecore.checkpoints.experts import AdapterExpert
from mergecore.plugins.block import Block, Per
from mergecore.plugins.method import Method
from mergecore.plugins.statistic import Statistics
from mergecore.tensors.source import TensorInfo

ADAPTER = "adapter"
"""The name under which a method's dense model is handed the adapter."""


@dataclass(frozen=True)
class Combined:
    """What a method makes of one module: up @ down, and numbers to be recorded (norms squared, so that they add up)."""

    down: Tensor
    up: Tensor
    numbers: Mapping[str, float]


class AdapterMethod(Method, ABC):
    """A method whose experts are adapters and whose result is one: module by module, from their factors.

    A recipe writes the adapter. Where a model is asked for (a sweep measures models) it is the base plus that adapter.
    """

    makes = "adapter"
    per: ClassVar[Per] = Per.TENSOR
    idempotent: ClassVar[bool] = False

    @property
    def on(self) -> str:
        """The state: the adapter, once it is made, holds all of the experts that counts."""
        return "state"

    @property
    def needs_base(self) -> bool:
        """The adapter does not; its dense model is on it."""
        return True

    @abstractmethod
    def rank_made(self, module: str, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """The rank of a module's update in what is made. ranks: of the adapters that have it; shape: (out, in)."""

    @abstractmethod
    def combined(self, module: str, updates: Sequence[LowRank | None]) -> Combined:
        """One module of the adapter that is made, float64, of the rank announced; None: the adapter does not have it."""

    def total(self, modules: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """What all modules' numbers say together."""
        return {}

    def arguments(self, block: Block, statistics: Statistics) -> dict[str, Any]:
        """The adapter's delta of the tensor."""
        found = statistics[ADAPTER][0]
        factor = made_factor(block.name, found.numbers["fan_in_fan_out"])
        shapes = {block.name: (block.shape[0], block.shape[1])}
        view = AdapterExpert("", self.name, found.tensors, {block.name: factor}, shapes)
        return {"delta": view.block(block.name, block.start, block.stop).view(block.shape)}

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], **arguments: Any) -> Tensor:
        """θ_0 plus the adapter."""
        assert base is not None
        delta: Tensor = arguments["delta"]
        return base + delta.to(base.device)


def ranks_made(
    method: AdapterMethod, experts: Sequence[AdapterExpert], selection: Mapping[str, TensorInfo]
) -> dict[str, int]:
    """{base tensor: rank} of the adapter that the method makes of these. Raises SpecError where a value does not fit."""
    found = {}
    for target, info in selection.items():
        held = [(expert.held.tensors, expert.factors[target]) for expert in experts if target in expert.factors]
        shape = (info.shape[1], info.shape[0]) if held[0][1].transposed else (info.shape[0], info.shape[1])
        found[target] = method.rank_made(module_of(target), [held[f.down].shape[0] for held, f in held], shape)
    return found


def made(
    method: AdapterMethod, experts: Sequence[AdapterExpert], selection: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, Combined]]:
    """(base tensor, what is made of it) for every selected tensor, one at a time."""
    for target in sorted(selection):
        yield target, method.combined(module_of(target), [low_rank(expert, target) for expert in experts])
