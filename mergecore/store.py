"""The store: a directory per step, done where `record.json` says so; the only truth about what has been done.

<root>/merge/ties-3f2a91c07be4/   model-00001-of-00002.safetensors … record.json
<root>/drafts/<key>/              work under way; renamed into place when its record has been written
<root>/locks/<key>                flock: saves double work, gone with its process
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from mergecore.errors import MergeloomError, StoreError
from mergecore.identity import Step

RECORD = "record.json"


class State(StrEnum):
    """What the store knows of a step."""

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
    """What a done step left: digest of its content, small results as JSON, sizes of its files, how it was made."""

    key: str
    step: Mapping[str, Any]
    digest: str
    result: Mapping[str, Any]
    files: Mapping[str, int]
    made: Mapping[str, Any]
    dropped: bool = False


@dataclass(frozen=True)
class Draft:
    """A directory to work in. Nobody else sees it until `Store.commit` renames it into place."""

    step: Step
    path: Path


class Store:
    """A POSIX folder shared by all workers. Every method may be called from any process."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()

    def folder(self, step: Step) -> Path:
        """Where the step's files lie once it is done."""
        return self.root / step.kind / step.name

    def record(self, step: Step) -> Record | None:
        """The step's record, or None where there is none that can be read."""
        try:
            held = json.loads((self.folder(step) / RECORD).read_text())
            record = Record(**held)
        except (OSError, ValueError, TypeError):
            return None
        return record if record.key == step.key else None

    def state(self, step: Step) -> State:
        """PRESENT, DROPPED, BROKEN or MISSING, from the record and the sizes of the files it names."""
        record = self.record(step)
        if record is None:
            return State.BROKEN if self.folder(step).exists() else State.MISSING
        if record.dropped:
            return State.DROPPED
        folder = self.folder(step)
        for name, size in record.files.items():
            try:
                if os.stat(folder / name).st_size != size:
                    return State.BROKEN
            except OSError:
                return State.BROKEN
        return State.PRESENT

    def is_done(self, step: Step, bytes_needed: bool = False) -> bool:
        """Whether the step need not be done again; with `bytes_needed` a dropped result does not count."""
        state = self.state(step)
        return state is State.PRESENT or (state is State.DROPPED and not bytes_needed)

    @contextmanager
    def draft(self, step: Step, resume: bool = False) -> Iterator[Draft]:
        """A locked directory for the work of one step; what a killed process left in it is removed, or with `resume` kept.

        On an error the draft is removed (with `resume` kept, unless the error is ours to report): nothing half-written
        is ever seen. The caller commits before leaving.
        """
        with self.lock(step.key):
            path = self.root / "drafts" / step.key
            if path.exists() and not resume:
                shutil.rmtree(path)
            path.mkdir(parents=True, exist_ok=True)
            try:
                yield Draft(step, path)
            except BaseException as error:
                if not resume or isinstance(error, MergeloomError):
                    shutil.rmtree(path, ignore_errors=True)
                raise

    def commit(self, draft: Draft, digest: str, result: Mapping[str, Any], made: Mapping[str, Any]) -> Record:
        """Write the record last and rename the draft into place. Atomic: before it nothing is done, after it all is."""
        step, folder = draft.step, self.folder(draft.step)
        earlier = self.record(step)
        if earlier is not None and earlier.digest != digest:
            made = {**made, "differs_from": earlier.digest}
        files = {
            str(path.relative_to(draft.path)): path.stat().st_size
            for path in sorted(draft.path.rglob("*"))
            if path.is_file() and path.name != RECORD
        }
        record = Record(step.key, step.as_json(), digest, dict(result), files, dict(made))
        write_json(draft.path / RECORD, record.__dict__)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            self._discard(folder)
        os.rename(draft.path, folder)
        return record

    def drop(self, step: Step) -> None:
        """Free the bytes of a done step, keeping its record as a tombstone. Nothing happens where it is not PRESENT."""
        if self.state(step) is not State.PRESENT:
            return
        record = self.record(step)
        assert record is not None
        folder = self.folder(step)
        write_json(folder / RECORD, {**record.__dict__, "dropped": True})
        for name in record.files:
            (folder / name).unlink(missing_ok=True)

    def remove(self, step: Step) -> None:
        """Forget the step altogether (`--retry-failed`, a broken result)."""
        folder = self.folder(step)
        if folder.exists():
            self._discard(folder)

    def fail(self, step: Step, reason: str) -> None:
        """Record that a step was tried and why it failed; it is not tried again until `forgive`."""
        path = self.root / "failures" / f"{step.key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"step": step.as_json(), "reason": reason})

    def failures(self) -> dict[str, str]:
        """{key: reason} of every step that failed."""
        found = {}
        for path in (self.root / "failures").glob("*.json"):
            try:
                found[path.stem] = str(json.loads(path.read_text())["reason"])
            except (OSError, ValueError, KeyError):
                continue
        return found

    def forgive(self) -> int:
        """Forget every failure, so that the steps are tried again; returns how many."""
        held = list((self.root / "failures").glob("*.json"))
        for path in held:
            path.unlink(missing_ok=True)
        return len(held)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the exclusive lock `name` across processes; waits for who has it. Gone with its process, even a killed one."""
        folder = self.root / "locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise StoreError(
                f"the store {self.root} cannot be written: {error}; choose another with `output.store`"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def clean(self) -> int:
        """Remove drafts that no living process holds; returns how many. What spans had finished in them is lost."""
        removed = 0
        for path in (self.root / "drafts").glob("*"):
            handle = os.open(self.root / "locks" / path.name, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
                removed += 1
            except BlockingIOError:
                continue
            finally:
                os.close(handle)
        return removed

    def _discard(self, folder: Path) -> None:
        grave = self.root / "drafts" / f"old-{folder.name}-{os.getpid()}"
        grave.parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder, grave)
        shutil.rmtree(grave)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON so that a reader sees either the old file or the whole new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    os.replace(draft, path)
