"""How a command starts: where this user's things are remembered, and what is done while torch is imported. Imports little."""

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
"""Bytes hashed at a time while modules are imported: between two pieces a thread waits for the interpreter."""


def cache_folder() -> Path:
    """Where things are remembered: XDG_CACHE_HOME/mergeloom."""
    home = os.environ.get("XDG_CACHE_HOME", os.path.join(os.path.expanduser("~"), ".cache"))
    return Path(home) / "mergeloom"


def loops() -> Library:
    """Where this user's fused loops are kept."""
    return library_in(cache_folder() / "loops")


def digest_cache() -> DigestCache:
    """Digests of local files, where there is no store that remembers them."""
    return DigestCache(cache_folder() / "digests.jsonl", loops())


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """For work that leaves no garbage, but a million new objects: a cyclic collector that looks through them again and again
    would take a third of its time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import without the cyclic garbage collector, and leave what was imported alone ever after.

    torch and its like are a million objects that stay until the process ends; looking through them takes 0.3 s while they
    are imported, and 0.8 s at the end.
    """
    with without_collector():
        try:
            yield
        finally:
            gc.freeze()
            atexit.register(gc.freeze)


def hash_ahead(recipe: Path, digests: DigestCache) -> None:
    """Begin to hash the weights of local checkpoints that a recipe names, in the background: importing torch keeps one core
    busy for two seconds. What is wrong with the recipe or the files is found, and said, later on."""
    with contextlib.suppress(Exception):
        for file in _weights(recipe):
            if digests.known(file) is None:
                digests.begin(file)
    for _ in range(max(len(os.sched_getaffinity(0)) - 1, 1)):
        threading.Thread(target=digests.work, args=(LARGE,), daemon=True).start()


def _weights(recipe: Path) -> Iterator[Path]:
    """The files of weights in the folders that any text of the recipe names."""
    import yaml

    for document in yaml.safe_load_all(recipe.read_text()):
        for text in _texts(document):
            folder = Path(text).expanduser()
            if folder.is_dir():
                yield from sorted(folder.glob("*.safetensors"))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)
