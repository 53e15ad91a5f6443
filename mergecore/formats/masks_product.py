"""A product of masks as a directory: what lies in it, and the model of one task made from it.

    product.json     format, method and values, tasks in the masks' order, the model's tensors, bytes
    masks*.safetensors   the tensors that mergecore/tensors/masked.py names
    config.json, tokenizer …   of the base, as they go with every task's model
    README.md, mergeloom.yaml  card and recipe

The weights are not called model*.safetensors: a loader that knows nothing of masks would take the base for the product.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergecore.errors import SourceError, SpecError, nearest
from mergecore.events import Event, Report
from mergecore.formats.whole_directory import whole_directory
from mergecore.identity.content import GRID, BlockDigests, bytes_of, model_digest, tensor_digest
from mergecore.planning.plans import MergePlan
from mergecore.planning.pool import Pool
from mergecore.tensors.dtypes import CONFIG_DTYPE, MERGED
from mergecore.tensors.files import FileTensors, open_files
from mergecore.tensors.finite import check_finite
from mergecore.tensors.masked import MASK, MaskedModel
from mergecore.tensors.sinks import INDEX, ShardSink, plan_shards
from mergecore.tensors.source import TensorInfo, TensorSource

PRODUCT = "product.json"
OWN = {PRODUCT, "README.md", "mergeloom.yaml"}
"""Files that speak of the product and not of a task's model."""


class Record(BaseModel):
    """A part of product.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Task(Record):
    """One task: a row of every mask."""

    name: Annotated[str, Field(description="the expert's name in the recipe")]
    id: Annotated[str, Field(description="digest of the expert's weights")]
    kept: Annotated[float, Field(ge=0, le=1, description="share of the merged elements that its masks keep")]


class Size(Record):
    """What was saved: bytes of all tensors, without the files' headers."""

    product: Annotated[int, Field(ge=0, description="of the product")]
    models: Annotated[int, Field(ge=0, description="of the tasks' models, one beside the other")]

    @property
    def text(self) -> str:
        """Both, and what that is worth."""
        return f"{self.product:,} bytes where the tasks' models take {self.models:,} ({self.product / self.models:.1%})"


class Product(Record):
    """product.json."""

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
        """The row of a task. Raises SpecError with the nearest name for one that is not there."""
        names = [one.name for one in self.tasks]
        if task not in names:
            raise SpecError(f"the product holds no task '{task}'; {nearest(task, names)}")
        return names.index(task)


@dataclass(frozen=True)
class OpenProduct:
    """A product whose tensors can be read: from its directory, or from the store."""

    record: Product
    tensors: TensorSource

    def load(self, task: str) -> MaskedModel:
        """The model of one task, as tensors that are formed while they are read."""
        held = {name: TensorInfo(dtype, shape) for name, (dtype, shape) in self.record.tensors.items()}
        return MaskedModel(self.tensors, self.record.row(task), held)


def open_product(folder: Path) -> OpenProduct:
    """The product in a directory. Raises SourceError where there is none, or where a file of it is missing."""
    try:
        record = Product.model_validate_json((folder / PRODUCT).read_text())
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


def model_tensors(plan: MergePlan) -> dict[str, TensorInfo]:
    """The tensors of a task's model: the base's, floating-point ones in the dtype that was asked for."""
    dtype = plan.step.parameters["dtype"]
    plain = {**plan.layout.merged, **plan.layout.copied}
    return {name: info.stored_as(dtype) if dtype else info for name, info in sorted(plain.items())}


def task_model(plan: MergePlan, tensors: TensorSource, expert: str) -> MaskedModel:
    """The model of one expert's task, from a product that lies in the store."""
    return MaskedModel(tensors, plan.experts.index(expert), model_tensors(plan))


def published_name(plan: MergePlan, file: str) -> str | None:
    """What a file of the store is called in the published directory; None where it has no place there."""
    if plan.method.makes != "masks":
        return file
    return None if file == INDEX else file.replace("model", "masks", 1)


def describe(plan: MergePlan, pool: Pool, folder: Path) -> str:
    """Write product.json beside the files of a product; returns what it is worth in bytes, as a phrase."""
    tensors = open_files(folder, sorted(path.name for path in folder.glob("masks*.safetensors")))
    names = {member.id: member.name for member in pool.members}
    kept = _kept(tensors)
    size = sum(info.size for info in model_tensors(plan).values())
    record = Product(
        method=plan.method.name,
        values=plan.method.parameters(),
        tasks=tuple(Task(name=names[one], id=one, kept=kept[row]) for row, one in enumerate(plan.experts)),
        tensors={name: (info.dtype, info.shape) for name, info in model_tensors(plan).items()},
        files=tuple(sorted({file for file, _ in tensors.locations.values()})),
        bytes=Size(product=plan.size, models=size * len(plan.experts)),
    )
    (folder / PRODUCT).write_text(json.dumps(record.model_dump(mode="json"), indent=1) + "\n")
    return record.bytes.text


def _kept(tensors: FileTensors) -> list[float]:
    """Per row the share of bits that are set."""
    masks = [name for name in tensors.tensors if name.startswith(MASK)]
    rows = tensors.tensors[masks[0]].shape[0]
    total = sum(tensors.tensors[name.removeprefix(MASK)].count for name in masks)
    held = np.zeros(rows, dtype=np.int64)
    for name in masks:
        for row in range(rows):
            width = tensors.tensors[name].shape[1]
            for start in range(row * width, (row + 1) * width, GRID):
                bits = tensors.read(name, start, min(start + GRID, (row + 1) * width)).numpy()
                held[row] += int(np.bitwise_count(bits).sum(dtype=np.int64))
    return [int(one) / max(total, 1) for one in held]


def unpack(
    folder: Path,
    task: str,
    out: Path,
    shard_size: int,
    report: Report,
    *,
    dtype: str | None = None,
    durable: bool = False,
) -> str:
    """Write the model of one task as a directory that `transformers` loads; returns its content digest.

    dtype: safetensors' name, for floating-point tensors; none: as the product says. Raises SourceError, SpecError (no
    such task) and StoreError (`out` exists).
    """
    product = open_product(folder)
    model = product.load(task)
    tensors = {name: info.stored_as(dtype) if dtype else info for name, info in model.tensors.items()}
    model = MaskedModel(product.tensors, model.row, tensors)
    with whole_directory(out, durable) as draft:
        digest = _write(model, draft, shard_size, report)
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name not in {*OWN, *product.record.files}:
                shutil.copyfile(path, draft / path.name)
        _set_dtype(draft / "config.json", {info.dtype for info in tensors.values() if info.dtype in MERGED})
        (draft / "README.md").write_text(_card(product.record, task, digest))
    return digest


def _write(model: MaskedModel, folder: Path, shard_size: int, report: Report) -> str:
    sink = ShardSink(folder, model.tensors, plan_shards(model.tensors, shard_size))
    sink.prepare()
    held: dict[str, tuple[str, tuple[int, ...], str]] = {}
    for done, (name, info) in enumerate(sorted(model.tensors.items())):
        report(Event("unpacking", done, len(model.tensors), "tensors"))
        digests = BlockDigests()
        for start in range(0, max(info.count, 1), GRID):
            values = model.read(name, start, min(start + GRID, info.count))
            if values.is_floating_point():
                check_finite(values, name, "the unpacked model", "unpack it in a wider dtype")
            data = bytes_of(values)
            digests.update(data, values.numel())
            sink.write(name, start, data)
        blocks = digests.finished()
        held[name] = (info.dtype, info.shape, tensor_digest([blocks[at] for at in sorted(blocks)]))
    return model_digest(held)


def _set_dtype(path: Path, dtypes: set[str]) -> None:
    if path.exists() and len(dtypes) == 1 and dtypes <= set(CONFIG_DTYPE):
        config = json.loads(path.read_text())
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = CONFIG_DTYPE[dtypes.pop()]
        path.write_text(json.dumps(config, indent=2) + "\n")


def _card(record: Product, task: str, digest: str) -> str:
    held = record.tasks[record.row(task)]
    return (
        f"# {task}, unpacked from a product of masks\n\nMade with Mergeloom from a product of {len(record.tasks)} tasks by "
        f"{record.method}; its masks keep {held.kept:.2%} of the shared vector.\n\nExpert `{held.id}`, this model "
        f"`{digest}`.\n"
    )
