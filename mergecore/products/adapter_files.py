"""An adapter as files. Its weights are written module by module, its configuration beside them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mergecore.checkpoints.adapters import CONFIG, EMPTY, STEM, is_transposed, outputs, own_factor
from mergecore.checkpoints.experts import AdapterExpert
from mergecore.identity.content import block_digests, bytes_of, model_digest, tensor_digest
from mergecore.plugins.adapter_method import AdapterMethod, combined_modules, ranks_made
from mergecore.tensors.finite import TAME, check_finite
from mergecore.tensors.sinks import ShardSink, plan_shards
from mergecore.tensors.source import TensorInfo, TensorSource
from mergecore.tensors.torch_dtypes import DTYPES


class AdapterFile:
    """The weights of an adapter in `folder`. The file is laid out first; modules may be written in any order."""

    def __init__(
        self,
        folder: Path,
        ranks: Mapping[str, int],
        selection: Mapping[str, TensorInfo],
        transposed: bool,
        dtype: str = "F32",
        modules: Mapping[str, str] = EMPTY,
    ) -> None:
        self.transposed, self.modules = transposed, modules
        self.infos = outputs(ranks, selection, transposed, dtype, modules)
        self._sink = ShardSink(folder, self.infos, plan_shards(self.infos, sys.maxsize, STEM))
        self._sink.prepare()
        self._digests: dict[str, str] = {}

    def write(self, target: str, down: Tensor, up: Tensor, owner: str) -> tuple[Tensor, Tensor]:
        """Write one module's factors, rounded to the file's dtype. Return them as they are written. owner: whose they
        are.

        Raise NonFiniteError where values are not finite.
        """
        factor, written = own_factor(target, self.transposed, self.modules), []
        for name, wide in ((factor.down, down), (factor.up, up)):
            info = self.infos[name]
            values = wide.reshape(info.shape).to(DTYPES[info.dtype]).contiguous()
            check_finite(values, name, owner, TAME)
            self._sink.write(name, 0, bytes_of(values.reshape(-1)))
            self._digests[name] = tensor_digest(list(block_digests(values.reshape(-1)).values()))
            written.append(values)
        return written[0], written[1]

    @property
    def digest(self) -> str:
        """The digest of all tensors. Every module must have been written."""
        return model_digest({name: (info.dtype, info.shape, self._digests[name]) for name, info in self.infos.items()})

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(info.size for info in self.infos.values())


def write_made(
    folder: Path, method: AdapterMethod, experts: Sequence[AdapterExpert], selection: Mapping[str, TensorInfo]
) -> tuple[str, dict[str, Any]]:
    """Write the adapter that a method makes. Return the digest of its tensors, and what is recorded."""
    transposed, ranks = is_transposed(experts), ranks_made(method, experts, selection)
    named = [(target, factor.module) for expert in experts for target, factor in expert.factors.items()]
    names = {target: module for target, module in named if module and target in selection}
    file = AdapterFile(folder, ranks, selection, transposed, modules=names)
    numbers = dict[str, Mapping[str, float]]()
    for target, combined in combined_modules(method, experts, selection):
        file.write(target, combined.down, combined.up, f"method '{method.name}'")
        numbers[target] = combined.numbers
    record = {"fan_in_fan_out": transposed, "modules": numbers, "ranks": ranks, **method.total(numbers)}
    record |= {"names": names} if names else {}
    return file.digest, record


def write_copy(
    folder: Path, factors: TensorSource, record: Mapping[str, Any], selection: Mapping[str, TensorInfo], dtype: str
) -> AdapterFile:
    """Write an adapter with its weights in another dtype. factors: its tensors. record: what was recorded when it was
    made.
    """
    names = record.get("names", EMPTY)
    file = AdapterFile(folder, record["ranks"], selection, record["fan_in_fan_out"], dtype, names)
    for target in record["ranks"]:
        factor = own_factor(target, file.transposed, names)
        file.write(target, factors.read(factor.down), factors.read(factor.up), "the adapter")
    return file


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
