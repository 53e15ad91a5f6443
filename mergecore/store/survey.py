"""What lies in a store: every result with its state and its bytes on the disk, and what lies beside the results."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mergecore.identity.keys import KINDS, Step
from mergecore.store.store import Record, State, Store

Inode = tuple[int, int]
"""Device and inode: a file under one or several names."""


@dataclass(frozen=True)
class OnDisk:
    """A file. size: bytes. links: how many names it has. A registered model shares its files with the merge."""

    size: int
    links: int


@dataclass(frozen=True)
class Stored:
    """A folder of results. record: None where it cannot be read. files: those on the disk, by inode."""

    kind: str
    name: str
    state: State
    record: Record | None
    files: Mapping[Inode, tuple[OnDisk, ...]]

    @property
    def key(self) -> str:
        """The key of its step; '' where the record cannot be read."""
        return "" if self.record is None else self.record.key

    @property
    def step(self) -> Step | None:
        """Its step; None where the record cannot be read."""
        return None if self.record is None else Step(**self.record.step)

    @property
    def path(self) -> str:
        """Its folder, from the root of the store."""
        return f"{self.kind}/{self.name}"


def results(store: Store) -> Iterator[Stored]:
    """Yield every folder of results, by kind and name."""
    for kind in KINDS:
        for name in sorted(store.names(kind)):
            if (store.root / kind / name).is_dir():
                yield stored(store, kind, name)


def stored(store: Store, kind: str, name: str) -> Stored:
    """Return one folder of results."""
    record, state = store.record_in(kind, name), State.BROKEN
    try:
        if record is not None and Step(**record.step).name == name:
            state, _ = store.state_and_record(Step(**record.step))
    except TypeError:
        record = None
    return Stored(kind, name, state, record, files_in(store.root / kind / name))


def files_in(folder: Path) -> dict[Inode, tuple[OnDisk, ...]]:
    """Return the files in a folder and below, by inode: one entry for each name that the inode has there."""
    files: dict[Inode, tuple[OnDisk, ...]] = {}
    paths = [folder] if folder.is_file() else (Path(at, name) for at, _, names in os.walk(folder) for name in names)
    for path in paths:
        try:
            status = path.lstat()
        except OSError:  # a process has removed it meanwhile
            continue
        inode = status.st_dev, status.st_ino
        files[inode] = (*files.get(inode, ()), OnDisk(status.st_size, status.st_nlink))
    return files


def taken(parts: Iterable[Mapping[Inode, tuple[OnDisk, ...]]]) -> int:
    """Return the bytes that these files take together. A file with several names is counted once."""
    return sum({inode: names[0].size for files in parts for inode, names in files.items()}.values())


def freed(parts: Iterable[Mapping[Inode, tuple[OnDisk, ...]]]) -> int:
    """Return the bytes that are free once these files are deleted. A file that has another name elsewhere stays."""
    names: dict[Inode, list[OnDisk]] = {}
    for files in parts:
        for inode, here in files.items():
            names.setdefault(inode, []).extend(here)
    return sum(here[0].size for here in names.values() if len(here) >= here[0].links)


def beside(store: Store) -> dict[str, int]:
    """Return the bytes of every other entry of the store (databases, reports, drafts), by name."""
    try:
        names = sorted(set(os.listdir(store.root)) - set(KINDS))  # noqa: PTH208 — names are wanted
    except OSError:
        return {}
    return {name: taken([files_in(store.root / name)]) for name in names}
