"""A product: a model with a note of how many tensors it has; and a method that makes it."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from mergecore.plugins.method import Method
from mergecore.plugins.product import Contents, Product, Published


class Noted(Product):
    """A model and a note beside it."""

    name: ClassVar[str] = "noted"
    noun: ClassVar[str] = "a noted model"

    def publish(self, contents: Contents, folder: Path, dtype: str | None) -> Published:
        for name in contents.files:
            os.link(contents.folder / name, folder / name)
        (folder / "note.json").write_text(json.dumps({"tensors": len(contents.model)}))
        return Published(contents.digest, contents.size, {"tensors": len(contents.model)}, ("a note was written",))

    def card_lines(self, card: Mapping[str, Any]) -> list[str]:
        return [f"It has {card['tensors']} tensors."]


class NotedSum(Method):
    """The base and all changes, with a note."""

    name: ClassVar[str] = "noted_sum"
    version: ClassVar[int] = 1
    product: ClassVar[str] = "noted"
    idempotent: ClassVar[bool] = False

    @property
    def on(self) -> str:
        return "deltas"

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], **arguments: Any) -> Tensor:
        assert base is not None
        total = experts[0]
        for expert in experts[1:]:
            total = total + expert
        return base + total
