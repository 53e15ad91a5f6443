"""The store: a folder per step. A step is done where `record.json` says so; this is the only truth about what is done.

<root>/merge/ties-3f2a91c07be4/   model-00001-of-00002.safetensors … record.json
<root>/drafts/<key>/              work under way; renamed into place when its record has been written
<root>/locks/<key>                flock: saves double work, gone with its process

A process that is killed leaves at most a draft, a grave or a small temporary file. The next process that works on the
step takes over what is whole, and `Store.clean` removes the rest.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from mergecore.errors import CapacityError, MergeloomError, StoreError, masked
from mergecore.identity.keys import Step

RECORD = "record.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where there is no more room for a file."""
KEY = re.compile(r"[0-9a-f]{64}")
TEMPORARY = ("*/*/.record.json.*", "failures/.*.json.*", "sweeps/*/.*.json.*")
"""Where `write_json` is used outside of drafts."""


Stamp = tuple[int, int, int]
"""Inode, mtime in nanoseconds and size of a file."""


class State(StrEnum):
    """The state of a step."""

    PRESENT = "present"
    """Record and files are there, sizes check."""
    DROPPED = "dropped"
    """It was done and its bytes were dropped: as good as done unless someone needs the bytes."""
    BROKEN = "broken"
    """A record that cannot be read, or files that are missing or have another size: it is made again."""
    MISSING = "missing"
    """Never done."""


@dataclass(frozen=True)
class Record:
    """The record of a done step.

    digest: of its content. result: small results as JSON. files: sizes in bytes, by name.
    provenance: how it was made; record.json calls it `made`.
    """

    key: str
    step: Mapping[str, Any]
    digest: str
    result: Mapping[str, Any]
    files: Mapping[str, int]
    provenance: Mapping[str, Any]
    dropped: bool = False

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        """Return the record that `as_json` wrote. Raises TypeError or KeyError for anything else."""
        fields = dict(values)
        return cls(provenance=fields.pop("made"), **fields)

    def as_json(self) -> dict[str, Any]:
        """Return the content of record.json."""
        values = dict(self.__dict__)
        values["made"] = values.pop("provenance")
        return values


@dataclass(frozen=True)
class Draft:
    """A folder to work in. Nobody else sees it until `Store.commit` renames it into place."""

    step: Step
    path: Path


class Store:
    """A POSIX folder shared by all workers. Every method may be called from any process."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()
        self._tombs: dict[str, Stamp] = {}

    def folder(self, step: Step) -> Path:
        """Return the folder of the step's files once it is done."""
        return self.root / step.kind / step.name

    def record(self, step: Step) -> Record | None:
        """Return the step's record; None where there is none that can be read."""
        record = self.record_in(step.kind, step.name)
        return record if record is not None and record.key == step.key else None

    def record_in(self, kind: str, name: str) -> Record | None:
        """Return the record in a folder of results, whatever step it is of; None where there is none that can be
        read.
        """
        try:
            with open(f"{self.root}/{kind}/{name}/{RECORD}", "rb") as file:  # noqa: PTH123 — as below
                return Record.from_json(json.loads(file.read()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def names(self, kind: str) -> frozenset[str]:
        """Return the names of the folders (`Step.name`) of all steps of a kind. A step without one is MISSING."""
        try:
            return frozenset(os.listdir(self.root / kind))  # noqa: PTH208 — a hundred thousand names as they are
        except OSError:
            return frozenset()

    def state(self, step: Step) -> State:
        """Return PRESENT, DROPPED, BROKEN or MISSING, from the record and the sizes of the files it names.

        A tombstone is remembered by its inode and time: a sweep asks for thousands of them after every round.
        """
        tomb = _stamp(f"{self.root}/{step.kind}/{step.name}/{RECORD}")
        if tomb is not None and self._tombs.get(step.key) == tomb:
            return State.DROPPED
        state, _ = self.state_and_record(step)
        if state is State.DROPPED and tomb is not None:
            self._tombs[step.key] = tomb
        return state

    def state_and_record(self, step: Step) -> tuple[State, Record | None]:
        """Return the state of a step, and its record where there is one, in one reading."""
        record = self.record(step)
        if record is None:
            return State.BROKEN if self.folder(step).exists() else State.MISSING, None
        if record.dropped:
            return State.DROPPED, record
        folder = f"{self.root}/{step.kind}/{step.name}"
        for name, size in record.files.items():
            try:
                if os.stat(f"{folder}/{name}").st_size != size:  # noqa: PTH116 — asked for every file after every round
                    return State.BROKEN, record
            except OSError:
                return State.BROKEN, record
        return State.PRESENT, record

    def is_done(self, step: Step, bytes_needed: bool = False) -> bool:
        """Return whether the step need not be done again. bytes_needed: a dropped result does not count."""
        state = self.state(step)
        return state is State.PRESENT or (state is State.DROPPED and not bytes_needed)

    @contextmanager
    def draft(self, step: Step, resume: bool = False) -> Iterator[Draft]:
        """Give a locked folder for the work of one step.

        resume: keep what a killed process left in it; otherwise that is removed. Where that process had finished and
        only not yet renamed the folder, the step is PRESENT inside: look before you work. A draft that is not committed
        is removed. With `resume` it stays when an error interrupts the work, unless the error is a MergeloomError.
        Raises CapacityError where the disk is full.
        """
        with self.lock(step.key):
            path, kept = self.root / "drafts" / step.key, False
            try:
                if (path / RECORD).exists() and self.state(step) is not State.PRESENT:
                    self._move_into_place(path, self.folder(step))
                if path.exists() and not resume:
                    shutil.rmtree(path)
                path.mkdir(parents=True, exist_ok=True)
                for stray in path.glob(f".{RECORD}.*"):  # killed while the record was being written
                    stray.unlink()
                yield Draft(step, path)
            except BaseException as error:
                full = isinstance(error, OSError) and error.errno in FULL
                kept = resume and not full and not isinstance(error, MergeloomError)
                if full:
                    raise CapacityError(
                        f"no room in {self.root} for {step.name} ({error}); free disk space and run again"
                    ) from error
                raise
            finally:
                if not kept:
                    shutil.rmtree(path, ignore_errors=True)

    def commit(self, draft: Draft, digest: str, result: Mapping[str, Any], provenance: Mapping[str, Any]) -> Record:
        """Write the record last and rename the draft into place. This is atomic: before it nothing is done, after it
        all is.
        """
        step, folder = draft.step, self.folder(draft.step)
        earlier = self.record(step)
        if earlier is not None and earlier.digest != digest:
            provenance = {**provenance, "differs_from": earlier.digest}
        files = {
            str(path.relative_to(draft.path)): path.stat().st_size
            for path in sorted(draft.path.rglob("*"))
            if path.is_file() and path.name != RECORD
        }
        record = Record(step.key, step.as_json(), digest, dict(result), files, dict(provenance))
        write_json(draft.path / RECORD, record.as_json())
        self._move_into_place(draft.path, folder)
        return record

    def drop(self, step: Step) -> None:
        """Free the bytes of a done step and keep its record as a tombstone. Also free what a killed `drop` has left.

        Nothing happens where the step is neither PRESENT nor DROPPED. Whoever makes it again waits until this is done.
        """
        with self.lock(step.key):
            state, record = self.state(step), self.record(step)
            if record is None or state not in (State.PRESENT, State.DROPPED):
                return
            folder = self.folder(step)
            if state is State.PRESENT:
                write_json(folder / RECORD, {**record.as_json(), "dropped": True})
            for name in record.files:
                (folder / name).unlink(missing_ok=True)

    def remove(self, step: Step) -> None:
        """Forget the step altogether, its record included."""
        self.remove_folder(step.kind, step.name)

    def remove_folder(self, kind: str, name: str) -> None:
        """Remove a folder of results, whether or not its record can be read."""
        folder = self.root / kind / name
        if folder.exists():
            self._discard(folder)

    def failure_path(self, key: str) -> Path:
        """Return where the failure of the step of this key is recorded."""
        return self.root / "failures" / f"{key}.json"

    def fail(self, step: Step, reason: str, traceback: str = "") -> None:
        """Record that a step was tried, why it failed and where. It is not tried again until `forgive`."""
        path = self.failure_path(step.key)
        record = {"step": step.as_json(), "reason": masked(reason)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                write_json(path, {**record, "traceback": masked(traceback).splitlines()})
            except OSError:
                write_json(path, record)  # a full disk may still have room for the reason alone
        except OSError as error:
            raise StoreError(f"{step.name} failed ({reason}), and {path} cannot be written: {error}") from error

    def failures(self) -> dict[str, str]:
        """Return {key: reason} of every step that failed."""
        reasons = {}
        for path in (self.root / "failures").glob("*.json"):
            try:
                reasons[path.stem] = str(json.loads(path.read_text())["reason"])
            except (OSError, ValueError, KeyError):
                continue
        return reasons

    def forgive(self) -> int:
        """Forget every failure, so that the steps are tried again. Return how many there were."""
        paths = list((self.root / "failures").glob("*.json"))
        for path in paths:
            path.unlink(missing_ok=True)
        return len(paths)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the exclusive lock `name` across processes; wait for its holder. A killed process loses it."""
        path = self.root / "locks" / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = _locked(path)
            assert handle is not None
        except OSError as error:
            raise StoreError(
                f"the store {self.root} cannot be written: {error}; choose another with `output.store`"
            ) from error
        try:
            yield
        finally:
            os.close(handle)

    def at_work(self) -> int:
        """Return how many locks living processes hold. Nothing is written."""
        return sum(not _is_free(path) for path in (self.root / "locks").glob("*"))

    def leftovers(self) -> list[Path]:
        """Return what `clean` would remove, as far as no living process holds it: drafts and temporary files."""
        drafts = [
            path for path in sorted((self.root / "drafts").glob("*")) if _is_free(self.root / "locks" / path.name)
        ]
        temporary = [path for pattern in TEMPORARY for path in sorted(self.root.glob(pattern)) if _is_free(path)]
        return drafts + temporary

    def clean(self) -> int:
        """Remove what killed processes have left: drafts that no living process holds, locks of steps, temporary files.

        Return how many drafts there were. Spans that were finished in them are lost, so this is for the end of a sweep.
        """
        drafts = {path.name for path in (self.root / "drafts").glob("*")}
        if drafts:
            (self.root / "locks").mkdir(exist_ok=True)
        for name in drafts | {path.name for path in (self.root / "locks").glob("*") if KEY.fullmatch(path.name)}:
            lock = self.root / "locks" / name
            if (handle := _locked(lock, wait=False)) is None:
                drafts.discard(name)
                continue
            try:
                _remove(self.root / "drafts" / name)
                lock.unlink(missing_ok=True)
            finally:
                os.close(handle)
        for pattern in TEMPORARY:
            for path in self.root.glob(pattern):
                _remove_unheld(path)
        return len(drafts)

    def _move_into_place(self, draft: Path, folder: Path) -> None:
        """Rename a draft that holds its record to the step's folder. An older folder moves out of the way first."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            self._discard(folder)
        draft.rename(folder)

    def _discard(self, folder: Path) -> None:
        grave = self.root / "drafts" / f"old-{folder.name}-{uuid.uuid4().hex[:12]}"
        grave.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)


def _stamp(path: str) -> Stamp | None:
    """Return inode, mtime and size of a file, by which it is recognised; None where there is no file.

    A record is replaced, never written to.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 — asked for every step after every round
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON so that a reader sees either the old file or the whole new one."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        handle = _locked(draft)  # what nobody holds was left by a killed process: `Store.clean` removes it
        assert handle is not None
        with open(handle, "w") as file:  # noqa: PTH123 — an open handle, no path
            file.write(json.dumps(value, indent=1, sort_keys=True) + "\n")
            file.flush()
            draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _locked(path: Path, wait: bool = True) -> int | None:
    """Return a handle that holds the lock on `path`; None where another process has it and `wait` is false."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.fstat(handle).st_nlink:  # else `clean` has removed the file that we were waiting for
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_free(lock: Path) -> bool:
    """Return whether no living process holds a lock; also where its file is not there."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_unheld(path: Path) -> None:
    """Remove a temporary file unless a living process is writing it."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except OSError:
        return
