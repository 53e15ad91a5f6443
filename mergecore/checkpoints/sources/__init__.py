"""Where checkpoints come from, a local directory or a hub: the interface of a source."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mergecore.checkpoints.sources.side_files import is_document
from mergecore.events import Report


@dataclass(frozen=True)
class SourceFile:
    """A file of a checkpoint. size: bytes. sha256: hex digest; None where it is not known without a download."""

    size: int
    sha256: str | None


class Source(ABC):
    """One resolved checkpoint: its files do not change any more."""

    uri: str
    """How a person names it: the path, or hub-id@commit."""
    rewritten: ClassVar[bool] = False
    """Whether the companions in the folder of `fetch` differ from `files`; then `write_companions` writes them."""
    revision: str | None
    """The commit it was resolved to, None for a local directory."""
    _files: Mapping[str, SourceFile] | None = None
    _left_out: tuple[str, ...] = ()

    @property
    def files(self) -> Mapping[str, SourceFile]:
        """Every file that matters (weights, index, config, tokenizer and other small files), by name.

        The files are listed at the first call.
        """
        # Not a cached_property: before Python 3.12 that has one lock for all sources. They are hashed in parallel.
        if self._files is None:
            self._files = self._list_files()
        return self._files

    @property
    def left_out(self) -> tuple[str, ...]:
        """The names of the files beside these that do not go with a merge."""
        return self._left_out if self.files else ()

    @abstractmethod
    def _list_files(self) -> Mapping[str, SourceFile]:
        """List the files for `files`."""

    @abstractmethod
    def read(self, name: str, start: int, length: int) -> bytes:
        """Read `length` bytes of a file from byte `start` on. A hub is asked for this range only, not for the weights.

        Raises SourceError where the file is shorter.
        """

    def at_hand(self, name: str) -> bool:
        """Return whether a file can be read without a download."""
        return True

    @abstractmethod
    def fetch(self, report: Report) -> Path:
        """Return a local directory that holds all files. Missing files are downloaded and checked against their
        SHA-256.

        A download that was interrupted continues.
        """

    def write_companions(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Write every file but the weights into `folder`, with `config` as config.json."""
        for name, file in self.files.items():
            if is_companion(name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(self.read(name, 0, file.size))
        if "config.json" in self.files:
            (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")


def is_companion(name: str) -> bool:
    """Return whether a file is neither weights nor an index of weights."""
    return not name.endswith((".safetensors", ".safetensors.index.json"))


def decides(name: str) -> bool:
    """Return whether a companion can change what a model computes or says. Licences, texts and pictures cannot."""
    return is_companion(name) and not name.endswith(".index.json") and not is_document(name)
