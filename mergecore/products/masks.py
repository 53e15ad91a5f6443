"""A product of masks: what lies in its directory, and the model of one task that is read from it.

    product.json     format, method and values, tasks in the masks' order, the model's tensors, bytes
    masks*.safetensors   the tensors that mergecore/tensors/masked.py names
    config.json, tokenizer …   of the base, as they go with every task's model
    README.md, mergeloom.yaml  card and recipe

The weights are not called model*.safetensors: a loader that knows nothing of masks would take the base for the product.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergecore.errors import SourceError, SpecError, nearest
from mergecore.identity.content import GRID
from mergecore.plugins.product import FinishedMerge, Product, Published
from mergecore.store.results import link_or_copy
from mergecore.tensors.files import FileTensors, open_files
from mergecore.tensors.masked import MASK, MaskedModel
from mergecore.tensors.sinks import INDEX
from mergecore.tensors.source import TensorInfo, TensorSource

PRODUCT = "product.json"
OWN = {PRODUCT, "README.md", "mergeloom.yaml"}
"""Files that speak of the product and not of a task's model."""


class ProductPart(BaseModel):
    """A part of product.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Task(ProductPart):
    """One task: a row of every mask."""

    name: Annotated[str, Field(description="the expert's name in the recipe")]
    id: Annotated[str, Field(description="digest of the expert's weights")]
    kept: Annotated[float, Field(ge=0, le=1, description="share of the merged elements that its masks keep")]


class Size(ProductPart):
    """Bytes of all tensors, without the files' headers."""

    product: Annotated[int, Field(ge=0, description="of the product")]
    models: Annotated[int, Field(ge=0, description="of the tasks' models, one beside the other")]

    @property
    def text(self) -> str:
        """Both sizes and their ratio, as a phrase."""
        return f"{self.product:,} bytes where the tasks' models take {self.models:,} ({self.product / self.models:.1%})"


class ProductRecord(ProductPart):
    """The content of product.json."""

    format: Literal["mergeloom masks"] = "mergeloom masks"
    version: Literal[1] = 1
    method: Annotated[str, Field(description="name of the method")]
    values: Annotated[Mapping[str, Any], Field(description="its values")]
    tasks: Annotated[tuple[Task, ...], Field(description="in the order of the masks' rows")]
    tensors: Annotated[
        Mapping[str, tuple[str, tuple[int, ...]]], Field(description="dtype and shape of the tensors of a task's model")
    ]
    files: Annotated[tuple[str, ...], Field(description="the files that hold the product's tensors")]
    bytes: Size

    def row(self, task: str) -> int:
        """Return the row of a task. Raise SpecError with the nearest name where the task is not there."""
        names = [known.name for known in self.tasks]
        if task not in names:
            raise SpecError(f"the product holds no task '{task}'; {nearest(task, names)}")
        return names.index(task)


@dataclass(frozen=True)
class OpenProduct:
    """A product whose tensors can be read, from its directory."""

    record: ProductRecord
    tensors: TensorSource

    def load(self, task: str) -> MaskedModel:
        """Return the model of one task. Its tensors are formed while they are read."""
        infos = {name: TensorInfo(dtype, shape) for name, (dtype, shape) in self.record.tensors.items()}
        return MaskedModel(self.tensors, self.record.row(task), infos)


def open_product(folder: Path) -> OpenProduct:
    """Return the product in a directory. Raise SourceError where there is none, or one of its files is missing."""
    try:
        record = ProductRecord.model_validate_json((folder / PRODUCT).read_text())
    except FileNotFoundError:
        raise SourceError(
            f"{folder} holds no {PRODUCT}: it is not what `mergeloom merge` makes by tall_masks or emr"
        ) from None
    except (OSError, ValidationError) as error:
        raise SourceError(f"{folder / PRODUCT} cannot be read: {error}") from error
    missing = [name for name in record.files if not (folder / name).exists()]
    if missing:
        raise SourceError(f"{folder} lacks {missing[0]}, which holds tensors of the product; fetch or make it again")
    return OpenProduct(record, open_files(folder, record.files))


class Masks(Product):
    """A shared vector and a bit per task and weight: `mergeloom unpack` makes the model of a task from it."""

    name: ClassVar[str] = "masks"
    noun: ClassVar[str] = "a product of masks"
    described: ClassVar[str] = "What it makes is a product from which `mergeloom unpack` makes the model of a task."
    by_tensor: ClassVar[bool] = False
    pool_vocabulary: ClassVar[bool] = False

    def loads(self, tasks: Mapping[str, Sequence[str]]) -> Mapping[str, str]:
        """Return the expert of each task. A product has no model for tasks that no expert saw."""
        experts: dict[str, str] = {}
        for expert, own in tasks.items():
            for task in own:
                experts.setdefault(task, expert)
        if not experts:
            raise SpecError(
                "a product of masks is measured on its experts' own tasks, and the spec names none for them"
            )
        return experts

    def load(self, contents: FinishedMerge, tensors: TensorSource, expert: str) -> MaskedModel:
        """Return the model of one expert's task."""
        return MaskedModel(tensors, list(contents.experts).index(expert), dict(contents.model))

    def publish(self, contents: FinishedMerge, folder: Path, dtype: str | None) -> Published:
        """Link the masks under names that no loader takes for a model's, and write product.json beside them."""
        files = [name for name in contents.files if name != INDEX]
        for name in files:
            link_or_copy(contents.folder / name, folder / name.replace("model", "masks", 1))
        size = _described(contents, folder)
        return Published(contents.digest, contents.size, {"saved": size.text})

    def card_lines(self, card: Mapping[str, Any]) -> list[str]:
        """Return what the product is, and what it saves."""
        return [
            "This is no model but a product of masks: `mergeloom unpack` makes the model of one task from it.",
            f"It takes {card['saved']}.",
        ]


def _described(contents: FinishedMerge, folder: Path) -> Size:
    """Write product.json beside the files of a product; return its size."""
    tensors = open_files(folder, sorted(path.name for path in folder.glob("masks*.safetensors")))
    kept = _kept(tensors)
    one_model = sum(info.size for info in contents.model.values())
    tasks = zip(contents.experts.items(), kept, strict=True)
    record = ProductRecord(
        method=contents.method,
        values=contents.values,
        tasks=tuple(Task(name=name, id=expert, kept=share) for (expert, name), share in tasks),
        tensors={name: (info.dtype, info.shape) for name, info in contents.model.items()},
        files=tuple(sorted({file for file, _ in tensors.locations.values()})),
        bytes=Size(product=contents.size, models=one_model * len(contents.experts)),
    )
    (folder / PRODUCT).write_text(json.dumps(record.model_dump(mode="json"), indent=1) + "\n")
    return record.bytes


def _kept(tensors: FileTensors) -> list[float]:
    """Return the share of bits that are set, for each row of the masks."""
    masks = [name for name in tensors.tensors if name.startswith(MASK)]
    rows = tensors.tensors[masks[0]].shape[0]
    total = sum(tensors.tensors[name.removeprefix(MASK)].count for name in masks)
    kept = np.zeros(rows, dtype=np.int64)
    for name in masks:
        for row in range(rows):
            width = tensors.tensors[name].shape[1]
            for start in range(row * width, (row + 1) * width, GRID):
                bits = tensors.read(name, start, min(start + GRID, (row + 1) * width)).numpy()
                kept[row] += int(np.bitwise_count(bits).sum(dtype=np.int64))
    return [int(bits) / max(total, 1) for bits in kept]
