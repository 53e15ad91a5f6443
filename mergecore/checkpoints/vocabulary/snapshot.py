"""A checkpoint that opens with other rows, and with other companions beside it: config, tokenizer and the like."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mergecore.checkpoints.snapshot import Snapshot
from mergecore.checkpoints.sources import Source, SourceFile
from mergecore.checkpoints.vocabulary.rows import Rows, RowTensors, opened_dtype
from mergecore.events import Report, silent
from mergecore.identity.keys import digest
from mergecore.tensors.source import TensorInfo, TensorSource


class RewrittenSource(Source):
    """A source some of whose small files read differently, or are not there."""

    def __init__(self, origin: Source, changed: Mapping[str, bytes | None]) -> None:
        """changed: content by name; None: the file is not there."""
        self.uri, self.revision = origin.uri, origin.revision
        self._origin, self._changed = origin, dict(changed)

    def _found(self) -> Mapping[str, SourceFile]:
        new = {
            name: SourceFile(len(content), hashlib.sha256(content).hexdigest())
            for name, content in self._changed.items()
            if content is not None
        }
        kept = {name: file for name, file in self._origin.files.items() if name not in self._changed}
        return {**kept, **new}

    def read(self, name: str, start: int, length: int) -> bytes:
        """A piece of a file."""
        content = self._changed.get(name)
        return self._origin.read(name, start, length) if content is None else content[start : start + length]

    def fetch(self, report: Report) -> Path:
        """The folder of the weights, in which the files are as they were; `write` writes those that changed."""
        return self._origin.fetch(report)

    def write(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Have every file but the weights in `folder`, with `config` as config.json."""
        for name, file in self.files.items():
            if is_companion(name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(self.read(name, 0, file.size))
        if "config.json" in self.files:
            (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")


def is_companion(name: str) -> bool:
    """Whether a file of a checkpoint is none of its weights and no index of them."""
    return not name.endswith((".safetensors", ".safetensors.index.json"))


@dataclass(frozen=True)
class RowSnapshot(Snapshot):
    """`origin` with the rows of `rows`; tensors: dtypes as the checkpoint has them, shapes as it opens.

    donors: the checkpoints besides it that rows come from. names: for it and each of them, tensor → what it is called there.
    """

    origin: Snapshot = field(kw_only=True)
    donors: tuple[Snapshot, ...] = field(kw_only=True, default=())
    names: tuple[Mapping[str, str], ...] = field(kw_only=True, default=())
    rows: Rows | None = field(kw_only=True, default=None, compare=False, repr=False)
    """None: as the checkpoint has them."""

    @property
    def opened(self) -> Mapping[str, TensorInfo]:
        """The tensors with the dtypes as which they open."""
        rows, models = self.rows, (self.origin, *self.donors)
        if rows is None:
            return self.tensors
        found = dict(self.tensors)
        for name, own in self.names[0].items():
            held = zip(models, self.names, rows.copies, strict=True)
            used = (model.tensors[names[name]].dtype for model, names, runs in held if len(runs.first))
            dtype = opened_dtype(self.origin.tensors[own].dtype, used, rows)
            found[name] = TensorInfo(dtype, self.tensors[name].shape)
        return found

    def open(self, folder: Path) -> TensorSource:
        """The tensors. `folder` is not looked at: companions may lie in it, the weights lie where they did."""
        origin, *donors = (one.open(one.source.fetch(silent)) for one in (self.origin, *self.donors))
        return origin if self.rows is None else RowTensors((origin, *donors), self.names, self.rows)


def with_rows(origin: Snapshot, rows: Rows, sources: Sequence[tuple[Snapshot, Mapping[str, str]]]) -> RowSnapshot:
    """sources: as `rows` counts them, the checkpoint first; each with tensor of the result → what it is called there."""
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
    identity = [origin.weights, kept.digest, [one.weights for one in donors], [dict(one) for one in names]]
    held = {**_as_snapshot(origin), "tensors": tensors, "weights": digest(["vocabulary", *identity])}
    return RowSnapshot(**held, origin=origin, donors=donors, names=names, rows=kept)


def with_companions(snapshot: Snapshot, changed: Mapping[str, bytes | None], config: Mapping[str, Any]) -> RowSnapshot:
    """The same weights beside other files. changed: content by name, None where a file is not there any more."""
    source = RewrittenSource(snapshot.source, changed)
    told = [[name, file.sha256] for name, file in sorted(source.files.items()) if is_companion(name)]
    companions = digest([told, dict(config)])
    if not isinstance(snapshot, RowSnapshot):
        weights = digest(["companions", snapshot.weights, companions])
        snapshot = RowSnapshot(**{**_as_snapshot(snapshot), "weights": weights}, origin=snapshot)
    return replace(snapshot, source=source, companions=companions, config=config)


def _as_snapshot(snapshot: Snapshot) -> dict[str, Any]:
    return {entry.name: getattr(snapshot, entry.name) for entry in fields(Snapshot)}


def as_it_lies(snapshot: Snapshot) -> Snapshot:
    """The checkpoint as its files have it."""
    return snapshot.origin if isinstance(snapshot, RowSnapshot) else snapshot


def tensors_as_opened(snapshot: Snapshot) -> Mapping[str, TensorInfo]:
    """The tensors with the dtypes as which they open."""
    return snapshot.opened if isinstance(snapshot, RowSnapshot) else snapshot.tensors


def is_gathered(snapshot: Snapshot) -> bool:
    """Whether its rows are read from several places."""
    return isinstance(snapshot, RowSnapshot) and snapshot.rows is not None
