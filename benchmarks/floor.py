"""What no merge can be faster than: the same bytes read and written with plain large calls, and one digest of the
output.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import xxhash

from benchmarks.machine import Run, cores, process_run, settle

CALL = 8 << 20
"""Bytes of one read or write."""
WINDOW = 512 << 10
"""Bytes that are hashed at a time: as many as a window of the engine has in bfloat16."""

_space = threading.local()


def floor_run(readings: Sequence[Sequence[Path]], outputs: Sequence[Path], written: int) -> Run:
    """The time to read each group of files whole, one group after the other, and with the last to write as many bytes
    to each output. Positioned calls of 8 MB from one thread a core; outputs are new and preallocated; no fsync."""
    with ExitStack() as stack:
        paths = {path for group in readings for path in group}
        handles = {path: stack.enter_context(_opened(path, os.O_RDONLY)) for path in paths}
        pool = stack.enter_context(ThreadPoolExecutor(cores(), initializer=_make_space))
        list(pool.map(time.sleep, [0.05] * cores()))  # every thread is there, its buffer touched
        settle()
        with process_run() as run:
            targets = [stack.enter_context(_opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)) for path in outputs]
            for target in targets:
                os.posix_fallocate(target, 0, written)
            for number, group in enumerate(readings):
                sizes = {handles[path]: path.stat().st_size for path in group}
                ends = targets if number == len(readings) - 1 else []
                offsets = range(0, max([*sizes.values(), written if ends else 0]), CALL)
                for _ in pool.map(lambda at, sizes=sizes, ends=ends: _moved(sizes, ends, written, at), offsets):
                    pass
    return run


def _make_space() -> None:
    _space.buffer = memoryview(bytearray(CALL))


def _moved(sizes: dict[int, int], targets: Sequence[int], written: int, at: int) -> None:
    """Read and write the bytes from `at` on of every file."""
    for handle, size in sizes.items():
        wanted = min(CALL, size - at)
        done = 0
        while done < wanted:
            done += os.preadv(handle, [_space.buffer[done:wanted]], at + done)
    for handle in targets:
        wanted = min(CALL, written - at)
        done = 0
        while done < wanted:
            done += os.pwrite(handle, _space.buffer[done:wanted], at + done)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    handle = os.open(path, flags, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def digest_seconds(path: Path) -> float:
    """CPU-seconds of one XXH3-128 over a file's bytes, window by window as the engine hashes them; reading not
    counted.
    """
    buffer, used, state = memoryview(bytearray(WINDOW)), 0.0, xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            began = time.thread_time()
            state.update(buffer[:size])
            used += time.thread_time() - began
    return used
