"""A product: a model with a note of how many tensors it has; and a method that makes it."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from mergecore.plugins.method import DeltaMethod, NoArguments
from mergecore.plugins.product import FinishedMerge, Product, Published


class Noted(Product):
    """A model and a note beside it."""

    name: ClassVar[str] = "noted"
    noun: ClassVar[str] = "a noted model"

    def publish(self, contents: FinishedMerge, folder: Path, dtype: str | None) -> Published:
        for name in contents.files:
            os.link(contents.folder / name, folder / name)
        (folder / "note.json").write_text(json.dumps({"tensors": len(contents.model)}))
        return Published(contents.digest, contents.size, {"tensors": len(contents.model)}, ("a note was written",))

    def card_lines(self, card: Mapping[str, Any]) -> list[str]:
        return [f"It has {card['tensors']} tensors."]


class NotedSum(DeltaMethod[NoArguments]):
    """The base and all changes, with a note."""

    name: ClassVar[str] = "noted_sum"
    version: ClassVar[int] = 1
    product: ClassVar[str] = "noted"

    @property
    def idempotent(self) -> bool:
        return False

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: NoArguments) -> Tensor:
        total = deltas[0]
        for delta in deltas[1:]:
            total = total + delta
        return base + total
