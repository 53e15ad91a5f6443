"""A library of fused loops that is watched: every loop is built before it is asked for a second time, and timed."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergecore.native.library import Function, Library, library_in


@dataclass
class Watch:
    """What was seen: seconds each built loop took to build, and CPU-seconds and elements of loops that count (or add
    up) and store.
    """

    built: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"count": 0.0, "store": 0.0})
    elements: dict[str, int] = field(default_factory=lambda: {"count": 0, "store": 0})
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, seconds: float, elements: int) -> None:
        """One call."""
        with self.lock:
            self.seconds[kind] += seconds
            self.elements[kind] += elements

    def cleared(self) -> None:
        """Begin anew."""
        self.built.clear()
        self.seconds.update(count=0.0, store=0.0)
        self.elements.update(count=0, store=0)


@dataclass(frozen=True)
class WatchedLibrary(Library):
    """Builds every loop at once, whatever the size of the pass, and times its calls in the thread that makes them."""

    watch: Watch = field(default_factory=Watch, compare=False)

    def function(self, text: str, *, build: bool, wait: bool = False) -> Function | None:
        """The loop, built where it is not at hand."""
        if self.compiler is None:
            return None
        missing = not (self.folder / f"{self.name_of(text)}.so").exists()
        began = time.perf_counter()
        function_built = super().function(text, build=True, wait=True)
        if missing:
            self.watch.built.append(time.perf_counter() - began)
        kind = "store" if "void* target" in text else "count"
        return None if function_built is None else _timed(function_built, self.watch, kind)


def watched_library(folder: Path) -> WatchedLibrary:
    """A library in this folder with the compiler of this machine, and an empty watch."""
    return WatchedLibrary(folder, library_in(folder).compiler)


def _timed(function: Function, watch: Watch, kind: str) -> Function:
    def called(*arguments: Any) -> int:
        began = time.thread_time()
        result = function(*arguments)
        watch.add(kind, time.thread_time() - began, arguments[5].value)
        return result

    return called
