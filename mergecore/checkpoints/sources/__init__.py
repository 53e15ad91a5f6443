"""Where checkpoints come from: a local directory or a hub. What a source must offer is written here."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mergecore.events import Report


@dataclass(frozen=True)
class SourceFile:
    """A file of a checkpoint: its size in bytes and, where it is known without a download, its SHA-256 (hex)."""

    size: int
    sha256: str | None


class Source(ABC):
    """One checkpoint, resolved: its files do not change any more."""

    uri: str
    """How a person names it: the path, or hub-id@commit."""
    rewritten: ClassVar[bool] = False
    """Whether the companions in the folder of `fetch` are not those of `files`; `write_companions` writes these then."""
    revision: str | None
    """The commit it was resolved to, None for a local directory."""
    _files: Mapping[str, SourceFile] | None = None

    @property
    def files(self) -> Mapping[str, SourceFile]:
        """Every file that matters (weights, index, config, tokenizer, chat template, adapter config), by name; looked for
        at the first call."""
        # Not a cached_property: until Python 3.12 that has one lock for all sources, which could not be hashed side by side.
        if self._files is None:
            self._files = self._found()
        return self._files

    @abstractmethod
    def _found(self) -> Mapping[str, SourceFile]:
        """What `files` gives."""

    @abstractmethod
    def read(self, name: str, start: int, length: int) -> bytes:
        """A piece of a file; for a hub by range request, so that headers are had without the weights.

        Raises SourceError where the file is shorter.
        """

    @abstractmethod
    def fetch(self, report: Report) -> Path:
        """A local directory that holds all files, downloading (resumable, checked against sha256) what is missing."""

    def write_companions(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Write every file but the weights into `folder`, with `config` as config.json."""
        for name, file in self.files.items():
            if is_companion(name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(self.read(name, 0, file.size))
        if "config.json" in self.files:
            (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")


def is_companion(name: str) -> bool:
    """Whether a file of a checkpoint is none of its weights and no index of them."""
    return not name.endswith((".safetensors", ".safetensors.index.json"))
