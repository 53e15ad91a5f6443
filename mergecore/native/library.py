"""Loops as shared libraries: built by the machine's own C++ compiler, kept in a folder, loaded in no time.

A library is named by its source, the compiler and its flags, torch's version and the processor: whatever could change a
byte or make it unusable. Building takes about a second, in a process of its own; until it is done work goes on eagerly.
Imports little: hashing (sources/lanes.py), which is such a loop too, begins before torch is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
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
    "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
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
    """Where built loops are kept. folder: a cache of the user's; compiler: a program, None where there is none."""

    folder: Path
    compiler: str | None

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another machine it looks for the compiler there."""
        return library_in, (self.folder,)

    def function(self, text: str, *, build: bool, wait: bool = False) -> Function | None:
        """The loop of this source where it is at hand, else None; `build`: begin to build it then; `wait`: until it is.

        A source that cannot be built is never tried again in this process; `problem` says why.
        """
        if self.compiler is None:
            return None
        name = self.name_of(text)
        found = _loaded.get(name)
        if found is None:
            found = self._load(name)
        if found is None and build:
            self._begin(name, text)
            if wait:
                _building[name].join()
                found = self._load(name)
        return None if isinstance(found, str) else found

    def problem(self, text: str) -> str:
        """Why this source could not be built, '' where nothing is known against it."""
        found = _loaded.get(self.name_of(text)) if self.compiler else "there is no C++ compiler here"
        return found if isinstance(found, str) else ""

    def refuse(self, text: str, reason: str) -> None:
        """Never use this loop in this process."""
        _loaded[self.name_of(text)] = reason

    def name_of(self, text: str) -> str:
        """What the library is called."""
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
        made = draft.with_suffix(".so")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            draft.write_text(text)
            command = [self.compiler, *FLAGS, str(draft), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
            if done.returncode == 0:
                os.replace(made, self.folder / f"{name}.so")
            else:
                _loaded[name] = f"{self.compiler} could not build it: {done.stderr.strip()[:400]}"
        except (OSError, subprocess.SubprocessError) as error:
            _loaded[name] = f"it could not be built: {error}"
        finally:
            for path in (draft, made):
                path.unlink(missing_ok=True)


def library_in(folder: Path) -> Library:
    """The library in this folder with the compiler of this machine."""
    return Library(folder, next((found for name in COMPILERS if (found := shutil.which(name))), None))


@functools.lru_cache(4096)
def _name_of(text: str, compiler: str) -> str:
    return hashlib.sha256(f"{text}\0{_surroundings(compiler)}".encode()).hexdigest()[:40]


@functools.cache
def _surroundings(compiler: str) -> str:
    """Everything beside the source that decides what a library is."""
    held = Path(compiler).resolve().stat()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        processor = platform.processor()
    told = [
        compiler,
        str(held.st_size),
        str(held.st_mtime_ns),
        *FLAGS,
        importlib.metadata.version("torch"),
        platform.machine(),
        processor,
    ]
    return "\0".join(told)
