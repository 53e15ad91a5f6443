"""Results in the store: statistics are written and read, models are read."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergecore.errors import MergeloomError
from mergecore.identity.content import GRID, BlockDigests, block_digests, bytes_of, model_digest, tensor_digest
from mergecore.identity.keys import Step
from mergecore.plugins.statistic import Found, Result
from mergecore.store.store import Draft, Store
from mergecore.store.verified import verified, write_digests
from mergecore.tensors.files import open_file, open_files
from mergecore.tensors.memory import MemoryTensors
from mergecore.tensors.sinks import ShardSink, plan_shards
from mergecore.tensors.source import TensorInfo, TensorSource
from mergecore.tensors.torch_dtypes import DTYPE_NAMES

TENSORS = "tensors.safetensors"
ITEMS = "items.parquet"


def commit_result(store: Store, draft: Draft, result: Result, provenance: Mapping[str, Any]) -> None:
    """Write a statistic's tensors and numbers and record them under their digest."""
    tensors = result.tensors
    if tensors:
        infos = {name: TensorInfo(DTYPE_NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()}
        # Not safetensors' own writer: that one leaves files that only their owner may read.
        sink = ShardSink(draft.path, infos, plan_shards(infos, sys.maxsize, Path(TENSORS).stem))
        sink.prepare()
        for name, value in tensors.items():
            sink.write(name, 0, bytes_of(value.reshape(-1)))
    blocks = {name: list(block_digests(value.reshape(-1)).values()) for name, value in tensors.items()}
    if blocks:
        write_digests(draft.path, blocks)
    digests = {
        name: (DTYPE_NAMES[value.dtype], tuple(value.shape), tensor_digest(blocks[name]))
        for name, value in tensors.items()
    }
    store.commit(draft, model_digest(digests), result.numbers, provenance)


def result_sink(folder: Path, tensors: Mapping[str, TensorInfo]) -> ShardSink:
    """Return where the tensors of a statistic are written while they are worked out."""
    return ShardSink(folder, tensors, plan_shards(tensors, sys.maxsize, Path(TENSORS).stem) if tensors else ())


def commit_written(
    store: Store, draft: Draft, sink: ShardSink, numbers: Mapping[str, Any], provenance: Mapping[str, Any]
) -> None:
    """Record a statistic whose tensors lie in its draft, under the digest that `commit_result` gives them."""
    written: TensorSource = open_file(draft.path / TENSORS) if sink.shards else MemoryTensors({})
    digests = {name: (info.dtype, info.shape, _read_digest(written, name)) for name, info in sink.tensors.items()}
    store.commit(draft, model_digest(digests), numbers, provenance)


def _read_digest(source: TensorSource, name: str) -> str:
    """Return the digest of a tensor, read grid block by grid block."""
    count, state = source.tensors[name].count, BlockDigests()
    for start in range(0, count, GRID):
        values = source.read(name, start, min(start + GRID, count))
        state.update(bytes_of(values), values.numel())
    return tensor_digest(list(state.finished().values()))


def read_statistic(store: Store, step: Step) -> Found:
    """Return one statistic's result. Its tensors are read, and checked, when they are asked for.

    Raises MergeloomError where the statistic has not been worked out.
    """
    record = store.record(step)
    if record is None:
        raise MergeloomError(f"statistic {step.name} is asked for before it was worked out")
    file = next((name for name in record.files if name.endswith(".safetensors")), None)
    if file is None:
        return Found(MemoryTensors({}), record.result)
    return Found(verified(open_file(store.folder(step) / file), record.files), record.result)


def open_model(store: Store, step: Step) -> TensorSource:
    """Open the tensors of a model in the store. They are checked while they are read."""
    record = store.record(step)
    names = [] if record is None else [name for name in record.files if name.endswith(".safetensors")]
    tensors = open_files(store.folder(step), names)
    return tensors if record is None else verified(tensors, record.files)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; copy it where the two folders are not on one disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
