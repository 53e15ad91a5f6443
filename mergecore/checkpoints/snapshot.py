"""A checkpoint as it was resolved: its digests, its headers, and how its tensors are opened."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from mergecore.checkpoints.architectures import Layers, at_layers
from mergecore.checkpoints.leftovers import check_whole
from mergecore.checkpoints.sources import Source, decides
from mergecore.checkpoints.sources.selection import ADAPTER_CONFIG, INDEX_ENDING, read_object, weight_map
from mergecore.errors import SourceError
from mergecore.identity.keys import digest
from mergecore.tensors.files import FileTensors, Location
from mergecore.tensors.header import parse_header
from mergecore.tensors.source import TensorInfo, TensorSource

LARGEST_JSON = 1 << 28
"""Bytes of a JSON file beside the weights at most."""


class Contents(ABC):
    """How the tensors of a snapshot are opened: from its files, with an adapter folded in, or with other rows."""

    @property
    def stored(self) -> Snapshot | None:
        """The snapshot of the files, where this one is a view of it with another vocabulary; None where it is not."""
        return None

    @property
    def adapter_source(self) -> Source | None:
        """The source of the adapter that is folded in; None where none is."""
        return None

    @property
    def gathers_rows(self) -> bool:
        """Whether rows of one tensor are read from several positions of the files."""
        return False

    @property
    def stored_at(self) -> Mapping[str, Location]:
        """Where the files of the source have the tensors that they hold as they are opened."""
        return {}

    @abstractmethod
    def open(self, folder: Path, tensors: Mapping[str, TensorInfo]) -> TensorSource:
        """Open the tensors. folder: where `source.fetch` has put the files. tensors: those of the snapshot."""

    @abstractmethod
    def opened(self, tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
        """Return the tensors with the dtypes that `open` gives them. tensors: those of the snapshot."""

    @abstractmethod
    def with_layers(self, layers: Layers) -> Contents:
        """Return the same contents under the names that `at_layers` gives."""

    @abstractmethod
    def renamed(self, names: Mapping[str, str]) -> Contents:
        """Return the same contents under other names. names: {new: old}; a tensor may have several new names."""


@final
@dataclass(frozen=True)
class FileContents(Contents):
    """The tensors as the files hold them."""

    locations: Mapping[str, Location]

    @property
    def stored_at(self) -> Mapping[str, Location]:
        """The locations."""
        return self.locations

    def open(self, folder: Path, tensors: Mapping[str, TensorInfo]) -> TensorSource:
        """Open the files in `folder`."""
        return FileTensors(str(folder), dict(tensors), dict(self.locations))

    def opened(self, tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
        """Return the tensors unchanged."""
        return tensors

    def with_layers(self, layers: Layers) -> FileContents:
        """Rename the locations."""
        return FileContents(at_layers(self.locations, layers))

    def renamed(self, names: Mapping[str, str]) -> FileContents:
        """Rename the locations."""
        return FileContents({new: self.locations[old] for new, old in names.items()})


@final
@dataclass(frozen=True)
class Snapshot:
    """A checkpoint pinned by the digests of its files. Headers are known; weights are read when they are needed.

    kind: 'full' or 'adapter'.
    tensors: dtypes as the files have them; shapes as the tensors open.
    weights: digest over the weight files. An adapter's includes its configuration: alpha and rank are numbers too.
    companions: digest over config, tokenizer, chat template and the like; licences and texts do not count.
    contents: how the tensors are had.
    """

    source: Source
    kind: str
    tensors: Mapping[str, TensorInfo]
    weights: str
    companions: str
    config: Mapping[str, Any]
    contents: Contents

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(info.size for info in self.tensors.values())

    @property
    def as_stored(self) -> Snapshot:
        """The checkpoint as its files have it: with its own vocabulary and its own companions."""
        return self.contents.stored or self

    @property
    def adapter_source(self) -> Source | None:
        """The source of the adapter that is folded in; None where none is."""
        return self.contents.adapter_source

    @property
    def opened_tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors with the dtypes that `open` gives them."""
        return self.contents.opened(self.tensors)

    def open(self, folder: Path) -> TensorSource:
        """Open the tensors. folder: where `source.fetch` has put the files."""
        return self.contents.open(folder, self.tensors)


def read_snapshot(source: Source) -> Snapshot:
    """Return the snapshot of a source. Reads safetensors headers and small files only, never weights.

    Raises SourceError for files that are no safetensors, truncated or of a dtype nobody knows, naming the file, and for
    what is no whole checkpoint (see leftovers.py).
    """
    weights = sorted(name for name in source.files if name.endswith(".safetensors"))
    kind = "adapter" if ADAPTER_CONFIG in source.files else "full"
    tensors: dict[str, TensorInfo] = {}
    locations: dict[str, Location] = {}
    for name in weights:
        for tensor, (info, offset) in read_header(source, name).items():
            if tensor in tensors:
                raise SourceError(
                    f"{source.uri}: tensor '{tensor}' stands in {locations[tensor][0]} and in {name}; keep one of the "
                    "two files in the folder, or the index that says which is read"
                )
            tensors[tensor], locations[tensor] = info, (name, offset)
    _check_index(source, locations)
    counted = weights + ([ADAPTER_CONFIG] if kind == "adapter" else [])
    rest = sorted(name for name in source.files if name not in counted and decides(name))
    config_name = ADAPTER_CONFIG if kind == "adapter" else "config.json"
    config = read_json(source, config_name) if config_name in source.files else {}
    check_whole(tensors, {tensor: file for tensor, (file, _) in locations.items()}, config, source.uri)
    return Snapshot(
        source,
        kind,
        tensors,
        contents=FileContents(locations),
        weights=digest([[name, source.files[name].sha256] for name in counted]),
        companions=digest([[name, source.files[name].sha256] for name in rest]),
        config=config,
    )


def _check_index(source: Source, locations: Mapping[str, Location]) -> None:
    """Raise SourceError where an index names tensors that its file does not hold."""
    index = next((name for name in source.files if name.endswith(INDEX_ENDING)), None)
    if index is None:
        return
    where = f"{source.uri}/{index}"
    named = weight_map(source.read(index, 0, source.files[index].size), where)
    astray = [tensor for tensor, file in named.items() if locations.get(tensor, ("", 0))[0] != file]
    if astray:
        file, there = named[astray[0]], locations.get(astray[0])
        stands = f"that one is in {there[0]}" if there else "no file that it names holds it"
        raise SourceError(
            f"{where} names {len(astray)} tensors that the shards do not hold, the first being '{astray[0]}' in "
            f"{file}: {stands}. Index and shards are not of one version of the model; fetch them again"
        )


def read_json(source: Source, name: str) -> dict[str, Any]:
    """Return the object in a JSON file of a source. Raises SourceError where the file holds something else."""
    size = source.files[name].size
    if size > LARGEST_JSON:
        raise SourceError(
            f"{source.uri}/{name} has {size:,} bytes; a JSON file of a checkpoint has {LARGEST_JSON:,} at most"
        )
    return read_object(source.read(name, 0, size), f"{source.uri}/{name}")


def read_header(source: Source, name: str) -> dict[str, tuple[TensorInfo, int]]:
    """Return {tensor: (info, offset in the file)} of a safetensors file, checked against the file's size."""
    return parse_header(
        lambda start, length: source.read(name, start, length), source.files[name].size, f"{source.uri}/{name}"
    )
