"""A LoRA adapter made of adapters: what PEFT loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from mergecore.checkpoints.adapters import CONFIG, STEM
from mergecore.plugins.adapter_method import ADAPTER
from mergecore.plugins.product import FinishedMerge, Product, Published
from mergecore.products.adapter_files import write_config, write_copy
from mergecore.store.results import link_or_copy
from mergecore.tensors.files import open_file
from mergecore.tensors.source import TensorInfo, stored_as

WRITTEN_IN = "F32"
"""The dtype of adapters in the store."""


class Adapter(Product):
    """An adapter. A sweep measures the base plus it; what is published is the adapter alone."""

    name: ClassVar[str] = "adapter"
    noun: ClassVar[str] = "an adapter"
    of: ClassVar[str] = "adapters"
    described: ClassVar[str] = (
        "What it makes of LoRA adapters is one that PEFT loads; a sweep measures the base with it."
    )
    ground: ClassVar[str] = "the factors of the experts' adapters"
    by_tensor: ClassVar[bool] = False
    in_memory: ClassVar[bool] = False
    tokenizer_in_recipe: ClassVar[bool] = False
    pool_vocabulary: ClassVar[bool] = False
    dtype_in_recipe: ClassVar[bool] = False
    published_input: ClassVar[str] = ADAPTER
    companions: ClassVar[bool] = False
    reads_base: ClassVar[bool] = False
    registered_as: ClassVar[str] = "adapter"

    def stored(self, tensors: Mapping[str, TensorInfo], dtype: str | None) -> Mapping[str, TensorInfo]:
        """Return the tensors of the base plus the adapter, in `dtype`, or each in its own."""
        return stored_as(tensors, dtype)

    def publish(self, contents: FinishedMerge, folder: Path, dtype: str | None) -> Published:
        """Write the factors, and a configuration that names the base. Factors are linked where the dtype stays."""
        config = json.loads((contents.folder / CONFIG).read_text())
        write_config(folder, {**config, "base_model_name_or_path": _base_of(config) or contents.base_source})
        weights = f"{STEM}.safetensors"
        factors = open_file(contents.folder / weights)
        error = contents.numbers.get("error")
        card = {} if error is None else {"error": error}
        notes = () if error is None else (f"of the sum {error:.3%} was lost by the cut to the rank",)
        if dtype in (None, WRITTEN_IN):
            link_or_copy(contents.folder / weights, folder / weights)
            size = sum(info.size for info in factors.tensors.values())
            return Published(contents.digest, size, card, notes)
        copy = write_copy(folder, factors, contents.numbers, contents.base, dtype)
        return Published(copy.digest, copy.size, card, notes)

    def card_lines(self, card: Mapping[str, Any]) -> list[str]:
        """Return what the cut to a rank has lost."""
        if "error" not in card:
            return []
        return [f"Relative error of the cut to the rank, in the Frobenius norm: {card['error']:.4%}."]


def _base_of(config: Mapping[str, Any]) -> str:
    return str(config["base_model_name_or_path"] or "")
