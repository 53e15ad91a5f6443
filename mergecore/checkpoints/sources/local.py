"""A checkpoint in a local directory."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergecore.checkpoints.sources import Source, SourceFile
from mergecore.checkpoints.sources.digests import DigestCache, stamp
from mergecore.checkpoints.sources.selection import files_that_matter, left_out
from mergecore.errors import SourceError, nearest
from mergecore.events import Report, silent


class LocalSource(Source):
    """A directory that holds a checkpoint: one file, shards with their index, or a PEFT adapter.

    Raises SourceError at once for what is missing. The files are hashed when `files` is first asked for.
    """

    revision = None

    def __init__(self, path: Path | str, digests: DigestCache | None = None, report: Report = silent) -> None:
        self.uri = str(path)
        self._path = Path(path).expanduser()
        self._digests = digests if digests is not None else DigestCache(None)
        self._report = report
        if not self._path.exists():
            raise SourceError(f"'{path}' does not exist; {nearest_folder(self._path)}")
        if not self._path.is_dir():
            raise SourceError(f"'{path}' is a file; give the folder that holds the checkpoint: '{self._path.parent}'")
        try:
            sizes = sizes_below(self._path)
            names = files_that_matter(sizes, lambda name: (self._path / name).read_bytes(), self.uri)
        except OSError as error:
            raise SourceError(f"'{path}' cannot be read: {error.strerror}") from error
        self._stamps = {name: stamp(self._path / name) for name in names}
        self._left_out = left_out(sizes, names)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out `report`, which stays in its process."""
        return {**self.__dict__, "_report": silent}

    def __repr__(self) -> str:
        return f"LocalSource({self.uri!r})"

    def _list_files(self) -> Mapping[str, SourceFile]:
        """List every file that matters, hashed. Files that the cache knows are not read."""
        return {
            name: SourceFile(kept[2], self._digests.sha256(self._path / name, self._report))
            for name, kept in self._stamps.items()
        }

    def read(self, name: str, start: int, length: int) -> bytes:
        """Read `length` bytes of a file from byte `start` on. Raises SourceError where the file is shorter or
        missing.
        """
        if name not in self._stamps:
            raise SourceError(f"'{self.uri}' has no file '{name}'; {nearest(name, self._stamps)}")
        return piece(self._path / name, start, length)

    def fetch(self, report: Report) -> Path:
        """Return the directory itself. Raises SourceError where a file has changed since this source was created."""
        for name, kept in self._stamps.items():
            if stamp(self._path / name) != kept:
                raise SourceError(f"{self._path / name} has changed since this run began; start again")
        return self._path


def piece(path: Path, start: int, length: int) -> bytes:
    """Read `length` bytes of a file from byte `start` on. Raises SourceError where the file is shorter."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(length)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) != length:
        raise SourceError(f"{path} has {path.stat().st_size:,} bytes, {start + length:,} are needed: it is truncated")
    return content


def sizes_below(folder: Path) -> dict[str, int]:
    """Return the bytes of each file of a folder and of the folders in it, as 'file' or 'folder/file', sorted."""
    paths = []
    for path in folder.iterdir():
        if path.is_file():
            paths.append(path)
        elif path.is_dir() and not path.name.startswith("."):
            paths.extend(inner for inner in path.iterdir() if inner.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(paths)}


def nearest_folder(path: Path) -> str:
    """Return half a sentence that offers the existing folder closest to a path that does not exist."""
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    folders = sorted(entry.name for entry in missing.parent.iterdir() if entry.is_dir())
    close = difflib.get_close_matches(missing.name, folders, n=1, cutoff=0.6)
    if close:
        whole = missing.parent / close[0] / path.relative_to(missing)
        return f"did you mean '{whole if whole.is_dir() else missing.parent / close[0]}'?"
    where = "the current folder" if missing.parent == Path() else f"'{missing.parent}'"
    return f"the nearest existing folder is {where}"
