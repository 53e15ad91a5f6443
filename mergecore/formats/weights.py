"""The weights of a model as files, written tensor after tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from mergecore.identity.content import GRID, BlockDigests, bytes_of, model_digest, tensor_digest
from mergecore.tensors.sinks import ShardSink, plan_shards
from mergecore.tensors.source import TensorInfo, TensorSource


class WeightsWriter:
    """The weights of a model in `folder`, tensor after tensor."""

    def __init__(self, folder: Path, infos: Mapping[str, TensorInfo], shard_size: int) -> None:
        self._infos = infos
        self._sink = ShardSink(folder, dict(infos), plan_shards(infos, shard_size))
        self._sink.prepare()
        self._digests: dict[str, str] = {}

    def write(self, name: str, parts: Iterable[Tensor]) -> None:
        """Write a tensor whose flat parts come in order."""
        digests, start = BlockDigests(), 0
        for values in parts:
            data = bytes_of(values)
            digests.update(data, values.numel())
            self._sink.write(name, start, data)
            start += values.numel()
        blocks = digests.finished()
        self._digests[name] = tensor_digest([blocks[at] for at in sorted(blocks)])

    @property
    def digest(self) -> str:
        """The digest of all tensors."""
        return model_digest({name: (info.dtype, info.shape, self._digests[name]) for name, info in self._infos.items()})

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(info.size for info in self._infos.values())


def grid_blocks(source: TensorSource, name: str) -> Iterator[Tensor]:
    """Yield a tensor's elements in order, flat, a grid block at a time. An empty tensor has one empty block."""
    count = source.tensors[name].count
    for start in range(0, max(count, 1), GRID):
        yield source.read(name, start, min(start + GRID, count))
