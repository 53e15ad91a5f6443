"""The start of a command: the caches of this user, and work that is done while torch is imported. Imports little."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergecore.checkpoints.sources.digests import DigestCache
from mergecore.native.library import Library, library_in

LARGE = 32 << 20
"""Bytes hashed at a time while modules are imported: between two reads a thread waits for the interpreter."""


def cache_folder() -> Path:
    """Return the folder of this user's caches: XDG_CACHE_HOME/mergeloom."""
    home = os.environ.get("XDG_CACHE_HOME", f"{os.path.expanduser('~')}/.cache")  # noqa: PTH111 — without a home too
    return Path(home) / "mergeloom"


def loops() -> Library:
    """Return the library of this user's fused loops."""
    return library_in(cache_folder() / "loops")


def digest_cache() -> DigestCache:
    """Return the cache of the digests of local files."""
    return DigestCache(cache_folder() / "digests.jsonl", loops())


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Switch the cyclic garbage collector off inside the block.

    For work that makes a million objects and leaves no garbage: the collector would take a third of its time.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Switch the cyclic garbage collector off inside the block, and exclude from it what was imported there.

    Importing torch makes a million objects that stay until the process ends. The collector would need 0.3 s for them
    during the import and 0.8 s at the end.
    """
    with without_collector():
        try:
            yield
        finally:
            gc.freeze()
            atexit.register(gc.freeze)


def hash_ahead(recipe: Path, digests: DigestCache) -> None:
    """Begin to hash the weights of local checkpoints that a recipe names, in the background.

    Importing torch keeps one core busy for two seconds. Errors in the recipe or the files are reported later on.
    """
    with contextlib.suppress(Exception):
        for file in _weights(recipe):
            if digests.known(file) is None:
                digests.begin(file)
    for _ in range(max(len(os.sched_getaffinity(0)) - 1, 1)):
        threading.Thread(target=digests.work, args=(LARGE,), daemon=True).start()


def _weights(recipe: Path) -> Iterator[Path]:
    """Yield the files of weights in every folder that a text in the recipe names."""
    from mergecore.spec.yaml_files import read_documents

    for document in read_documents(recipe):
        for text in _texts(document):
            folder = Path(text).expanduser()
            if folder.is_dir():
                yield from sorted(folder.glob("*.safetensors"))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
