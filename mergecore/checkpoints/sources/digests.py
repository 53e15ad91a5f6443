"""A cache of file digests, so that a file is hashed once. It imports little: hashing begins before torch is there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mergecore.errors import SourceError
from mergecore.events import Event, Report, silent
from mergecore.native.library import Function, Library
from mergecore.native.sha256_lanes import LANES, Lane, advance, function_in

CHUNK = 1 << 18
"""Bytes of a file that are read and hashed at a time."""
SMALL = 1 << 20
"""Bytes below which a file is not worth a lane."""
Stamp = tuple[str, int, int, int, int]
"""What a file is recognised by: real path, inode, size in bytes, mtime and ctime in nanoseconds.

Tools that copy keep the mtime, and anybody may set it; the ctime changes with every write and no call sets it.
"""


@dataclass(frozen=True)
class _Job:
    """A file to be hashed, once for all who ask for it."""

    path: Path
    stamp: Stamp
    report: Report
    digest: Future[str] = field(default_factory=Future)


class DigestCache:
    """SHA-256 of files, remembered by stamp (see above) in a file of JSON lines. path None: in memory only.

    Files wait in a queue. A thread that waits for a file hashes queued files for a quarter of a second, two files at
    a time where `library` can (sha256_lanes.py), and then takes the files with most left.

    Several processes may use one cache file: each entry is appended in one write under a lock, lines that cannot be
    read (their writer was killed) are ignored, and entries of others are read at the next miss.
    """

    def __init__(self, path: Path | None = None, library: Library | None = None) -> None:
        self._path = path
        self._library = library
        self._known: dict[Stamp, str] = {}
        self._under_way: dict[Stamp, _Job] = {}
        self._queue: deque[_Job] = deque()
        self._open: list[tuple[_Job, Lane]] = []
        self._read_up_to = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[DigestCache], tuple[Path | None, Library | None]]:
        """Send the path, not the digests."""
        return DigestCache, (self._path, self._library)

    def sha256(self, path: Path, report: Report = silent) -> str:
        """Return the hex digest of a file, from memory where the file is unchanged. `report` hears of files that are
        read.

        Raises SourceError where the file cannot be read, or is written to at the same time.
        """
        known = self.known(path)
        if known is not None:
            return known
        digest = self.begin(path, report)
        self.work()
        return digest.result()

    def begin(self, path: Path, report: Report = silent) -> Future[str]:
        """Put a file into the queue. Raises SourceError where there is none."""
        key = stamp(path)
        with self._lock:
            job = self._under_way.get(key)
            if job is None:
                job = _Job(path, key, report)
                if key in self._known:
                    job.digest.set_result(self._known[key])
                else:
                    self._under_way[key] = job
                    self._queue.append(job)
        return job.digest

    def work(self, chunk: int = CHUNK) -> None:
        """Hash what is in the queue, until nobody is needed for the rest. chunk: bytes at a time where `hashlib` does
        it.
        """
        while True:
            while (job := self._next()) is not None:
                job.report(Event(f"hash {job.path.name}", 0, job.stamp[2], "bytes"))
                function = function_in(self._library) if job.stamp[2] >= SMALL else None
                if function is None:
                    self._settle(job, partial(file_sha256, job.path, chunk))
                elif (lane := self._lane(job, function)) is not None:
                    with self._lock:
                        self._open.append((job, lane))
            with self._lock:
                self._open.sort(key=lambda entry: entry[1].left)
                taken, self._open = self._open[-LANES:], self._open[:-LANES]
            if not taken:
                return
            advance([lane for _, lane in taken])
            for job, lane in taken:
                if lane.ended:
                    self._settle(job, lane.hexdigest)
            with self._lock:
                self._open += [entry for entry in taken if not entry[1].ended]

    def _next(self) -> _Job | None:
        """Return the next job, where this thread has fewer files than it can take.

        The last of an odd number of files joins two others. Then three files end together, or a later thread takes
        one.
        """
        with self._lock:
            room = len(self._open) < LANES or (len(self._open) == LANES and len(self._queue) == 1)
            return self._queue.popleft() if room and self._queue else None

    def _lane(self, job: _Job, function: Function) -> Lane | None:
        """Return the job's lane. Where its file cannot be opened, end the job with the error and return None."""
        try:
            return Lane(job.path, function)
        except OSError as error:
            self._end(job, SourceError(f"{job.path} cannot be read: {error.strerror}"))
            return None

    def _settle(self, job: _Job, work_out: Callable[[], str]) -> None:
        """Remember a job's digest and give it to who waits; or give them the error."""
        try:
            digest = work_out()
            if stamp(job.path) != job.stamp:
                raise SourceError(
                    f"{job.path} changed while it was being hashed; wait until it is written, then start again"
                )
        except OSError as error:
            self._end(job, SourceError(f"{job.path} cannot be read: {error.strerror}"))
        except SourceError as error:
            self._end(job, error)
        else:
            job.report(Event(f"hash {job.path.name}", job.stamp[2], job.stamp[2], "bytes"))
            self._remember(job.stamp, digest)
            self._end(job, digest)

    def _end(self, job: _Job, result: str | SourceError) -> None:
        with self._lock:
            del self._under_way[job.stamp]
        if isinstance(result, str):
            job.digest.set_result(result)
        else:
            job.digest.set_exception(result)

    def known(self, path: Path) -> str | None:
        """Return the digest of an unchanged file; None where the file would have to be read."""
        key = stamp(path)
        with self._lock:
            if key not in self._known:
                self._catch_up()
            return self._known.get(key)

    def remember(self, path: Path, digest: str) -> None:
        """Remember a digest that is known from elsewhere."""
        self._remember(stamp(path), digest)

    def _remember(self, key: Stamp, digest: str) -> None:
        with self._lock:
            self._known[key] = digest
            if self._path is None:
                return
            # A cache that cannot be written (read-only, disk full) costs hashing again, nothing else.
            with contextlib.suppress(OSError):
                _append(self._path, json.dumps([*key, digest]).encode())

    def _catch_up(self) -> None:
        """Read what this process or another has appended, up to the last whole line."""
        if self._path is None or not self._path.exists():
            return
        with self._path.open("rb") as file:
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
    """Append a line in one write, under a lock. The leading break keeps it whole where the last writer was killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b"\n" + entry + b"\n")


def _entry(line: bytes) -> tuple[Stamp, str] | None:
    try:
        path, inode, size, mtime, ctime, digest = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return None
    numbers = all(isinstance(number, int) for number in (inode, size, mtime, ctime))
    if not numbers or not isinstance(path, str) or not isinstance(digest, str) or len(digest) != 64:
        return None
    return (path, inode, size, mtime, ctime), digest


def stamp(path: Path) -> Stamp:
    """Return what a file is recognised by. Raises SourceError where there is no file."""
    real = os.path.realpath(path)
    try:
        status = Path(real).stat()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    return (real, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def file_sha256(path: Path, chunk: int = CHUNK) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    state = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(chunk))
        while size := file.readinto(buffer):
            state.update(buffer[:size])
    return state.hexdigest()
