"""C++ loops as shared libraries: built by the machine's own compiler, kept in a folder, loaded when they are needed.

A library is named by its source, the compiler and its flags, torch's version and the processor: by everything that
could change a byte or make it unusable. Building takes about a second, in a process of its own. Until then callers
work without the loop. This module imports little, because hashing (sha256_lanes.py) begins before torch is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math",
)  # fmt: skip
"""No flag that would let the compiler change a result: no fused multiply-add, no reordering, signed zeros kept."""
COMPILERS = ("c++", "g++", "clang++")
BUILD_SECONDS = 300.0

Function = Callable[..., int]

_loaded: dict[str, Function | str] = {}
"""Per library in this process its function, or why there is none."""
_building: dict[str, threading.Thread] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Library:
    """The folder of built loops. compiler: a program; None where there is none."""

    folder: Path
    compiler: str | None

    def __reduce__(self) -> tuple[Any, ...]:
        """On another machine, look for that machine's compiler."""
        return library_in, (self.folder,)

    def function(self, text: str, *, build: bool, wait: bool = False) -> Function | None:
        """Return the loop of this source, or None where it is not built.

        build: begin to build it then. wait: wait until it is built. A source that cannot be built is not tried again in
        this process; `problem` tells why.
        """
        if self.compiler is None:
            return None
        name = self.name_of(text)
        loaded = _loaded.get(name)
        if loaded is None:
            loaded = self._load(name)
        if loaded is None and build:
            self._begin(name, text)
            if wait:
                _building[name].join()
                loaded = self._load(name)
        return None if isinstance(loaded, str) else loaded

    def problem(self, text: str) -> str:
        """Return why this source could not be built; '' where no problem is known."""
        loaded = _loaded.get(self.name_of(text)) if self.compiler else "there is no C++ compiler here"
        return loaded if isinstance(loaded, str) else ""

    def refuse(self, text: str, reason: str) -> None:
        """Never use this loop in this process."""
        _loaded[self.name_of(text)] = reason

    def name_of(self, text: str) -> str:
        """Return the library's name."""
        assert self.compiler is not None
        return _name_of(text, self.compiler)

    def _load(self, name: str) -> Function | str | None:
        path = self.folder / f"{name}.so"
        with _lock:
            if name not in _loaded and path.exists():
                try:
                    _loaded[name] = ctypes.CDLL(str(path)).run
                except (OSError, AttributeError) as error:  # a library cut short, say: it is built anew
                    with contextlib.suppress(OSError):
                        path.unlink()
                    del error
            return _loaded.get(name)

    def _begin(self, name: str, text: str) -> None:
        with _lock:
            if name not in _building:
                _building[name] = threading.Thread(target=self._build, args=(name, text), daemon=True)
                _building[name].start()

    def _build(self, name: str, text: str) -> None:
        assert self.compiler is not None
        draft = self.folder / f".{name}.{uuid.uuid4().hex[:8]}.cpp"
        library = draft.with_suffix(".so")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            draft.write_text(text)
            command = [self.compiler, *FLAGS, str(draft), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
            if done.returncode == 0:
                library.replace(self.folder / f"{name}.so")
            else:
                _loaded[name] = f"{self.compiler} could not build it: {done.stderr.strip()[:400]}"
        except (OSError, subprocess.SubprocessError) as error:
            _loaded[name] = f"it could not be built: {error}"
        finally:
            for path in (draft, library):
                path.unlink(missing_ok=True)


def library_in(folder: Path) -> Library:
    """Return the library in this folder, with the compiler of this machine."""
    return Library(folder, next((path for name in COMPILERS if (path := shutil.which(name))), None))


@functools.lru_cache(4096)
def _name_of(text: str, compiler: str) -> str:
    return hashlib.sha256(f"{text}\0{_surroundings(compiler)}".encode()).hexdigest()[:40]


@functools.cache
def _surroundings(compiler: str) -> str:
    """Return everything beside the source that decides which bytes a library has."""
    status = Path(compiler).resolve().stat()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        processor = platform.processor()
    facts = [
        compiler,
        str(status.st_size),
        str(status.st_mtime_ns),
        *FLAGS,
        importlib.metadata.version("torch"),
        platform.machine(),
        processor,
    ]
    return "\0".join(facts)
