"""The cache that lets a file be hashed only once. Imports little: hashing begins before torch is there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
from pathlib import Path

from mergecore.errors import SourceError
from mergecore.events import Event, Report, silent

CHUNK = 1 << 18
"""Bytes of a file that are read and hashed at a time."""
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
        self._under_way: dict[Stamp, threading.Lock] = {}
        self._read_up_to = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[DigestCache], tuple[Path | None]]:
        """Travels to another process as its path."""
        return DigestCache, (self._path,)

    def sha256(self, path: Path, report: Report = silent, chunk: int = CHUNK) -> str:
        """Hex digest of a file, from memory where it is unchanged; `report` hears of files that have to be read, so many
        bytes at a time.

        Raises SourceError where the file cannot be read or is written to at the same time.
        """
        known = self.known(path)
        if known is not None:
            return known
        before = stamp(path)
        with self._lock:
            alone = self._under_way.setdefault(before, threading.Lock())
        with alone:  # who asks for what another thread is hashing waits for it
            return self.known(path) or self._hashed(path, before, report, chunk)

    def _hashed(self, path: Path, before: Stamp, report: Report, chunk: int) -> str:
        report(Event(f"hash {path.name}", 0, before[2], "bytes"))
        try:
            digest = file_sha256(path, chunk)
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


def file_sha256(path: Path, chunk: int = CHUNK) -> str:
    """SHA-256 (hex) of a file's bytes."""
    state = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(chunk))
        while size := file.readinto(buffer):
            state.update(buffer[:size])
    return state.hexdigest()
