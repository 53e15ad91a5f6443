"""Writes the model of one task, from a product of masks, as a directory that `transformers` loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from mergecore.events import Event, Report
from mergecore.formats.whole_directory import whole_directory
from mergecore.identity.content import GRID, BlockDigests, bytes_of, model_digest, tensor_digest
from mergecore.products.masks import OWN, ProductRecord, open_product
from mergecore.tensors.dtypes import CONFIG_DTYPE, MERGED
from mergecore.tensors.finite import check_finite
from mergecore.tensors.masked import MaskedModel
from mergecore.tensors.sinks import ShardSink, plan_shards
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
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name not in {*OWN, *product.record.files}:
                shutil.copyfile(path, draft / path.name)
        _set_dtype(draft / "config.json", {info.dtype for info in model.tensors.values() if info.dtype in MERGED})
        (draft / "README.md").write_text(_card(product.record, task, digest))
    return digest


def _write(model: MaskedModel, folder: Path, shard_size: int, report: Report) -> str:
    sink = ShardSink(folder, model.tensors, plan_shards(model.tensors, shard_size))
    sink.prepare()
    digested: dict[str, tuple[str, tuple[int, ...], str]] = {}
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
        digested[name] = (info.dtype, info.shape, tensor_digest([blocks[at] for at in sorted(blocks)]))
    return model_digest(digested)


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
