"""A directory that is there whole or not at all. It is written as NAME.tmp, and renamed at the end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mergecore.errors import StoreError

WORK = ".work"
"""Folder in a draft for what is worked out on the way; it marks the draft as ours."""


@contextlib.contextmanager
def whole_directory(out: Path, durable: bool) -> Iterator[Path]:
    """Yield the folder `out`.tmp, with a folder WORK in it. At the end WORK is removed and the rest becomes `out`.

    durable: fsync before the rename. Raise StoreError where `out` exists or cannot be written. Then nothing is left.
    """
    if os.path.lexists(out):
        raise StoreError(f"{out} exists already; choose another name or remove it")
    with _draft(out) as draft:
        yield draft
        shutil.rmtree(draft / WORK)
        if durable:
            _sync(draft)
        draft.rename(out)
    if durable:
        _sync_entry(out.absolute().parent)


@contextlib.contextmanager
def _draft(out: Path) -> Iterator[Path]:
    """Yield `out`.tmp, new and ours alone. It is removed after an error. What a killed merge left there is removed
    first.
    """
    draft = out.with_name(out.name + ".tmp")
    try:
        if os.path.lexists(draft):
            _remove_leftover(draft)
        (draft / WORK).mkdir(parents=True)
        handle = os.open(draft, os.O_RDONLY)
    except OSError as error:
        raise StoreError(f"cannot write {out}: {error}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield draft
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise StoreError(f"cannot write {out}: {error}") from error
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def _remove_leftover(draft: Path) -> None:
    """Raise StoreError where `draft` is the user's own, or belongs to a merge that still runs."""
    if draft.is_symlink() or not (draft / WORK).is_dir():
        raise StoreError(f"{draft}, where the model would be written first, is something else; move it away")
    handle = os.open(draft, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(draft)
    except BlockingIOError:
        raise StoreError(f"{draft} is being written by another merge; wait for it or choose another name") from None
    finally:
        os.close(handle)


def _sync(folder: Path) -> None:
    """Write every file and the folder itself to the disk."""
    for path in [*sorted(folder.rglob("*")), folder]:
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    """Write one file, or the names in one folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
