"""A dense model: what `transformers` loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from mergecore.plugins.product import FinishedMerge, Product, Published
from mergecore.store.results import link_or_copy
from mergecore.tensors.sinks import INDEX, STEM
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
        """Link the weights. They are in the dtype that was asked for already. Their names begin as the base's do."""
        names = {name: contents.stem + name.removeprefix(STEM) for name in contents.files if name.startswith(STEM)}
        for name in contents.files:
            if name == INDEX and contents.stem != STEM:
                index = json.loads((contents.folder / name).read_text())
                index["weight_map"] = {tensor: names[file] for tensor, file in index["weight_map"].items()}
                (folder / names[name]).write_text(json.dumps(index, indent=2) + "\n")
            else:
                link_or_copy(contents.folder / name, folder / names.get(name, name))
        return Published(contents.digest, contents.size, {})
