"""A checkpoint in a local directory, and the cache that lets its files be hashed only once."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import json
import os
import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from mergecore.errors import SourceError, nearest
from mergecore.identity import file_sha256
from mergecore.method import Event, Report, silent
from mergecore.sources import Source, SourceFile
from mergecore.sources.selection import files_that_matter

Stamp = tuple[str, int, int, int]
"""What a file is recognised by: real path, inode, size in bytes, mtime in nanoseconds."""


class DigestCache:
    """SHA-256 of files, remembered by (path, inode, size, mtime_ns) in a file of JSON lines; None: in memory only.

    Safe with several processes: each entry is appended in one write under a lock, lines that cannot be read (a writer
    was killed) are ignored, and what others have written is seen at the next miss.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[Stamp, str] = {}
        self._read_up_to = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[DigestCache], tuple[Path | None]]:
        """Travels to another process as its path."""
        return DigestCache, (self._path,)

    def sha256(self, path: Path, report: Report = silent) -> str:
        """Hex digest of a file, from memory where it is unchanged; `report` hears of files that have to be read.

        Raises SourceError where the file cannot be read or is written to at the same time.
        """
        known = self.known(path)
        if known is not None:
            return known
        before = stamp(path)
        report(Event(f"hash {path.name}", 0, before[2], "bytes"))
        try:
            digest = file_sha256(path)
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}") from error
        if stamp(path) != before:
            raise SourceError(f"{path} changed while it was being hashed; wait until it is written, then start again")
        report(Event(f"hash {path.name}", before[2], before[2], "bytes"))
        self._remember(before, digest)
        return digest

    def known(self, path: Path) -> str | None:
        """The digest of an unchanged file, None where it would have to be read."""
        held = stamp(path)
        with self._lock:
            if held not in self._known:
                self._catch_up()
            return self._known.get(held)

    def remember(self, path: Path, digest: str) -> None:
        """Note a digest that is known from elsewhere."""
        self._remember(stamp(path), digest)

    def _remember(self, held: Stamp, digest: str) -> None:
        with self._lock:
            self._known[held] = digest
            if self._path is None:
                return
            # A cache that cannot be written (read-only, disk full) costs hashing again, nothing else.
            with contextlib.suppress(OSError):
                _append(self._path, json.dumps([*held, digest]).encode())

    def _catch_up(self) -> None:
        """Read what has been appended, by this process or another, up to the last whole line."""
        if self._path is None or not self._path.exists():
            return
        with open(self._path, "rb") as file:
            if os.fstat(file.fileno()).st_size < self._read_up_to:
                self._read_up_to = 0
            file.seek(self._read_up_to)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read_up_to += len(whole)
        for line in whole.splitlines():
            entry = _entry(line)
            if entry is not None:
                self._known[entry[0]] = entry[1]


def _append(path: Path, entry: bytes) -> None:
    """Add a line in one write, under a lock; the leading break keeps it whole where the last writer was killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b"\n" + entry + b"\n")


def _entry(line: bytes) -> tuple[Stamp, str] | None:
    try:
        path, inode, size, mtime, digest = json.loads(line)
    except (ValueError, TypeError):
        return None
    numbers = all(isinstance(number, int) for number in (inode, size, mtime))
    if not numbers or not isinstance(path, str) or not isinstance(digest, str) or len(digest) != 64:
        return None
    return (path, inode, size, mtime), digest


def stamp(path: Path) -> Stamp:
    """What a file is recognised by. Raises SourceError where there is none."""
    real = os.path.realpath(path)
    try:
        held = os.stat(real)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    return (real, held.st_ino, held.st_size, held.st_mtime_ns)


class LocalSource(Source):
    """A directory that holds a checkpoint: one file, shards with their index, or a PEFT adapter.

    What is missing is said at once; the files are hashed when `files` is first asked for. Raises SourceError.
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
            names = files_that_matter(names_below(self._path), lambda name: (self._path / name).read_bytes(), self.uri)
        except OSError as error:
            raise SourceError(f"'{path}' cannot be read: {error.strerror}") from error
        self._stamps = {name: stamp(self._path / name) for name in names}

    def __getstate__(self) -> dict[str, Any]:
        """Without `report`, which stays in the process that gave it."""
        return {**self.__dict__, "_report": silent}

    def __repr__(self) -> str:
        return f"LocalSource({self.uri!r})"

    @cached_property
    def files(self) -> Mapping[str, SourceFile]:
        """Every file that matters, hashed at the first call (files that the cache knows are not read)."""
        return {
            name: SourceFile(held[2], self._digests.sha256(self._path / name, self._report))
            for name, held in self._stamps.items()
        }

    def read(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes of a file from byte `start` on. Raises SourceError where the file is shorter or not there."""
        if name not in self._stamps:
            raise SourceError(f"'{self.uri}' has no file '{name}'; {nearest(name, self._stamps)}")
        return piece(self._path / name, start, length)

    def fetch(self, report: Report) -> Path:
        """The directory itself. Raises SourceError where a file has changed since it was looked at."""
        for name, held in self._stamps.items():
            if stamp(self._path / name) != held:
                raise SourceError(f"{self._path / name} has changed since this run began; start again")
        return self._path


def piece(path: Path, start: int, length: int) -> bytes:
    """`length` bytes of a file from byte `start` on. Raises SourceError where the file is shorter."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            held = file.read(length)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    if len(held) != length:
        raise SourceError(f"{path} has {path.stat().st_size:,} bytes, {start + length:,} are needed: it is truncated")
    return held


def names_below(folder: Path) -> list[str]:
    """The files of a folder and of the folders in it, as 'file' or 'folder/file', sorted."""
    names = []
    for path in folder.iterdir():
        if path.is_file():
            names.append(path.name)
        elif path.is_dir() and not path.name.startswith("."):
            names.extend(f"{path.name}/{inner.name}" for inner in path.iterdir() if inner.is_file())
    return sorted(names)


def nearest_folder(path: Path) -> str:
    """Half a sentence that offers the existing folder closest to a path that does not exist."""
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
