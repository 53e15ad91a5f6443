"""Writes the model of one task, from a product of masks, as a directory that `transformers` loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from mergecore.events import Event, Report
from mergecore.formats.weights import WeightsWriter, grid_blocks
from mergecore.formats.whole_directory import whole_directory
from mergecore.products.masks import OWN, ProductRecord, open_product
from mergecore.tensors.dtypes import CONFIG_DTYPE, MERGED
from mergecore.tensors.finite import check_finite
from mergecore.tensors.masked import MaskedModel
from mergecore.tensors.source import stored_as


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
    """Write the model of one task as a directory that `transformers` loads. Return its content digest.

    dtype: safetensors' name, for floating-point tensors; None: as the product says. Raise SourceError, SpecError (no
    such
    task) and StoreError (`out` exists).
    """
    product = open_product(folder)
    model = product.load(task)
    model = MaskedModel(product.tensors, model.row, stored_as(model.tensors, dtype))
    with whole_directory(out, durable) as draft:
        digest = _write(model, draft, shard_size, report)
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.is_file() and name not in {*OWN, *product.record.files}:
                (draft / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, draft / name)
        _set_dtype(draft / "config.json", {info.dtype for info in model.tensors.values() if info.dtype in MERGED})
        (draft / "README.md").write_text(_card(product.record, task, digest))
    return digest


def _write(model: MaskedModel, folder: Path, shard_size: int, report: Report) -> str:
    writer = WeightsWriter(folder, model.tensors, shard_size)
    for done, name in enumerate(sorted(model.tensors)):
        report(Event("unpacking", done, len(model.tensors), "tensors"))
        writer.write(name, _finite(model, name))
    return writer.digest


def _finite(model: MaskedModel, name: str) -> Iterator[Tensor]:
    for values in grid_blocks(model, name):
        if values.is_floating_point():
            check_finite(values, name, "the unpacked model", "unpack it in a wider dtype")
        yield values


def _set_dtype(path: Path, dtypes: set[str]) -> None:
    if path.exists() and len(dtypes) == 1 and dtypes <= set(CONFIG_DTYPE):
        config = json.loads(path.read_text())
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = CONFIG_DTYPE[dtypes.pop()]
        path.write_text(json.dumps(config, indent=2) + "\n")


def _card(record: ProductRecord, task: str, digest: str) -> str:
    entry = record.tasks[record.row(task)]
    return (
        f"# {task}, unpacked from a product of masks\n\nMade with Mergeloom from a product of {len(record.tasks)} "
        f"tasks by "
        f"{record.method}; its masks keep {entry.kept:.2%} of the shared vector.\n\nExpert `{entry.id}`, this model "
        f"`{digest}`.\n"
    )
