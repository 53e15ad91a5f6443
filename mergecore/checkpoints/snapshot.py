"""A checkpoint as an immutable mapping from name to tensor, read in pieces; from files, a source or a dict in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergecore.checkpoints.sources import Source
from mergecore.errors import SourceError
from mergecore.identity.keys import digest
from mergecore.tensors.dtypes import DTYPES
from mergecore.tensors.files import FileTensors, Location, parse_header
from mergecore.tensors.source import TensorInfo, TensorSource


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint pinned by the digests of its files: headers are known, weights are read when they are needed.

    kind: 'full' or 'adapter'. weights: digest over the weight files (for an adapter with its configuration: alpha and
    rank are numbers too). companions: digest over config, tokenizer, chat template and the like.
    """

    source: Source
    kind: str
    tensors: Mapping[str, TensorInfo]
    locations: Mapping[str, Location]
    weights: str
    companions: str
    config: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(info.count * DTYPES[info.dtype].itemsize for info in self.tensors.values())

    def open(self, folder: Path) -> TensorSource:
        """The tensors as read from `folder`, where `source.fetch` has put the files."""
        return FileTensors(str(folder), dict(self.tensors), dict(self.locations))


def read_snapshot(source: Source) -> Snapshot:
    """The snapshot of a source: reads safetensors headers and small files only, never weights.

    Raises SourceError for files that are no safetensors, truncated or of a dtype nobody knows, naming the file.
    """
    weights = sorted(name for name in source.files if name.endswith(".safetensors"))
    kind = "adapter" if "adapter_config.json" in source.files else "full"
    tensors: dict[str, TensorInfo] = {}
    locations: dict[str, Location] = {}
    for name in weights:
        for tensor, (info, offset) in read_header(source, name).items():
            if tensor in tensors:
                raise SourceError(f"{source.uri}: tensor '{tensor}' stands in {locations[tensor][0]} and in {name}")
            tensors[tensor], locations[tensor] = info, (name, offset)
    counted = weights + (["adapter_config.json"] if kind == "adapter" else [])
    rest = sorted(name for name in source.files if name not in counted and not name.endswith(".index.json"))
    config_name = "adapter_config.json" if kind == "adapter" else "config.json"
    return Snapshot(
        source,
        kind,
        tensors,
        locations,
        weights=digest([[name, source.files[name].sha256] for name in counted]),
        companions=digest([[name, source.files[name].sha256] for name in rest]),
        config=read_json(source, config_name) if config_name in source.files else {},
    )


def read_json(source: Source, name: str) -> dict[str, Any]:
    """A JSON file of a source. Raises SourceError where it is none."""
    try:
        held = json.loads(source.read(name, 0, source.files[name].size))
    except ValueError as error:
        raise SourceError(f"{source.uri}/{name} is not JSON: {error}") from error
    if not isinstance(held, dict):
        raise SourceError(f"{source.uri}/{name} holds {type(held).__name__}, not an object")
    return held


def read_header(source: Source, name: str) -> dict[str, tuple[TensorInfo, int]]:
    """{tensor: (info, offset in the file)} of a safetensors file, checked against the file's size."""
    return parse_header(
        lambda start, length: source.read(name, start, length), source.files[name].size, f"{source.uri}/{name}"
    )
