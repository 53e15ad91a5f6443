"""A dense model: what `transformers` loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from mergecore.plugins.product import FinishedMerge, Product, Published
from mergecore.store.results import link_or_copy
from mergecore.tensors.source import TensorInfo, stored_as


class DenseModel(Product):
    """One model, in the base's names and shapes."""

    name: ClassVar[str] = "model"
    noun: ClassVar[str] = "a model"
    as_lora: ClassVar[bool] = True

    def stored(self, tensors: Mapping[str, TensorInfo], dtype: str | None) -> Mapping[str, TensorInfo]:
        """Return the tensors in `dtype`, or each in its own."""
        return stored_as(tensors, dtype)

    def publish(self, contents: FinishedMerge, folder: Path, dtype: str | None) -> Published:
        """Link the weights. They are in the dtype that was asked for already."""
        for name in contents.files:
            link_or_copy(contents.folder / name, folder / name)
        return Published(contents.digest, contents.size, {})
