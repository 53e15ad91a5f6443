"""A checkpoint that opens with other rows, and with other companions beside it (config, tokenizer and the like)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, final

from mergecore.checkpoints.architectures import Layers, at_layers
from mergecore.checkpoints.snapshot import Contents, Snapshot
from mergecore.checkpoints.sources import Source, SourceFile, decides
from mergecore.checkpoints.vocabulary.rows import Rows, RowTensors, opened_dtype
from mergecore.events import Report, silent
from mergecore.identity.keys import digest
from mergecore.tensors.files import Location
from mergecore.tensors.source import TensorInfo, TensorSource


@final
class RewrittenSource(Source):
    """A source of which some small files have other content, or are removed."""

    rewritten: ClassVar[bool] = True

    def __init__(self, origin: Source, changed: Mapping[str, bytes | None]) -> None:
        """changed: content by name; None: the file is not there."""
        self.uri, self.revision = origin.uri, origin.revision
        self._origin, self._changed = origin, dict(changed)

    def _list_files(self) -> Mapping[str, SourceFile]:
        new = {
            name: SourceFile(len(content), hashlib.sha256(content).hexdigest())
            for name, content in self._changed.items()
            if content is not None
        }
        kept = {name: file for name, file in self._origin.files.items() if name not in self._changed}
        self._left_out = self._origin.left_out
        return {**kept, **new}

    def read(self, name: str, start: int, length: int) -> bytes:
        """Read a part of a file."""
        content = self._changed.get(name)
        return self._origin.read(name, start, length) if content is None else content[start : start + length]

    def at_hand(self, name: str) -> bool:
        """Return whether a file can be read without a download."""
        return name in self._changed or self._origin.at_hand(name)

    def fetch(self, report: Report) -> Path:
        """Return the folder of the weights. Its companions are the origin's."""
        return self._origin.fetch(report)


@final
@dataclass(frozen=True)
class RowContents(Contents):
    """The tensors of `origin`, with other rows in the tensors over the vocabulary.

    donors: the other checkpoints that rows come from.
    names: for the origin and each donor, tensor of the result → its name there.
    """

    origin: Snapshot
    donors: tuple[Snapshot, ...] = ()
    names: tuple[Mapping[str, str], ...] = ()
    rows: Rows | None = field(default=None, compare=False, repr=False)
    """None: as the checkpoint has them."""

    @property
    def stored(self) -> Snapshot:
        """The checkpoint with its own vocabulary."""
        return self.origin

    @property
    def stored_at(self) -> Mapping[str, Location]:
        """The checkpoint's locations, without those of tensors that have other rows here."""
        changed = self.names[0] if self.names else {}
        return {name: place for name, place in self.origin.contents.stored_at.items() if name not in changed}

    @property
    def adapter_source(self) -> Source | None:
        """The source of the adapter that is folded into the checkpoint."""
        return self.origin.adapter_source

    @property
    def gathers_rows(self) -> bool:
        """Whether the rows are others than the checkpoint's."""
        return self.rows is not None

    def opened(self, tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
        """Return the tensors; those whose rows are mixed from several dtypes, or are means, are float32."""
        rows, models = self.rows, [model.opened_tensors for model in (self.origin, *self.donors)]
        opened = dict(self.origin.contents.opened(tensors))
        if rows is None:
            return opened
        for name, own in self.names[0].items():
            copied = zip(models, self.names, rows.copies, strict=True)
            dtypes = (model[names[name]].dtype for model, names, runs in copied if len(runs.first))
            opened[name] = TensorInfo(opened_dtype(models[0][own].dtype, dtypes, rows), tensors[name].shape)
        return opened

    def open(self, folder: Path, tensors: Mapping[str, TensorInfo]) -> TensorSource:
        """Open the checkpoint and its donors where their own sources have them; `folder` may hold companions only."""
        origin, *donors = (model.open(model.source.fetch(silent)) for model in (self.origin, *self.donors))
        return origin if self.rows is None else RowTensors((origin, *donors), self.names, self.rows)

    def with_layers(self, layers: Layers) -> RowContents:
        """Rename the checkpoint's tensors; those over the vocabulary belong to no layer."""
        tensors, contents = at_layers(self.origin.tensors, layers), self.origin.contents.with_layers(layers)
        return replace(self, origin=replace(self.origin, tensors=tensors, contents=contents))

    def renamed(self, names: Mapping[str, str]) -> RowContents:
        """Rename the checkpoint's tensors. The donors keep their own names."""
        tensors = {new: self.origin.tensors[old] for new, old in names.items()}
        origin = replace(self.origin, tensors=tensors, contents=self.origin.contents.renamed(names))
        own = {new: new for new, old in names.items() if self.names and old in self.names[0]}
        donors = ({new: called[old] for new, old in names.items() if old in called} for called in self.names[1:])
        return replace(self, origin=origin, names=(own, *donors) if self.names else ())


def with_rows(origin: Snapshot, rows: Rows, sources: Sequence[tuple[Snapshot, Mapping[str, str]]]) -> Snapshot:
    """Return `origin` with other rows.

    sources: in the order in which `rows` counts them, the checkpoint first; each with tensor of the result → what it
    is called there.
    """
    used = [0] + [n for n in range(1, len(sources)) if len(rows.copies[n].first) or len(rows.shares[n].first)]
    kept = replace(
        rows,
        copies=tuple(rows.copies[number] for number in used),
        shares=tuple(rows.shares[number] for number in used),
    )
    donors = tuple(sources[number][0] for number in used[1:])
    names = tuple(sources[number][1] for number in used)
    tensors = {
        name: TensorInfo(info.dtype, (rows.count, *info.shape[1:])) if name in names[0] else info
        for name, info in origin.tensors.items()
    }
    identity = [origin.weights, kept.digest, [donor.weights for donor in donors], [dict(called) for called in names]]
    return replace(
        origin,
        tensors=tensors,
        weights=digest(["vocabulary", *identity]),
        contents=RowContents(origin, donors, names, kept),
    )


def with_companions(snapshot: Snapshot, changed: Mapping[str, bytes | None], config: Mapping[str, Any]) -> Snapshot:
    """Return the same weights beside other files. changed: content by name; None where a file is no longer there."""
    source = RewrittenSource(snapshot.source, changed)
    files = [[name, file.sha256] for name, file in sorted(source.files.items()) if decides(name)]
    companions = digest([files, dict(config)])
    if snapshot.as_stored is snapshot:
        weights = digest(["companions", snapshot.weights, companions])
        snapshot = replace(snapshot, weights=weights, contents=RowContents(snapshot))
    return replace(snapshot, source=source, companions=companions, config=config)
