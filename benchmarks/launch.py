"""Runs one command and writes what it took as JSON: launch.py RESULT OUTPUT COMMAND...

A process of its own, and a small one: the peak memory that the system reports of a child is never below its parent's.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path


def anonymous(pid: int) -> int:
    """Bytes of a process that are nobody's file: what cannot be read again from the disk."""
    try:
        with Path(f"/proc/{pid}/status").open(encoding="ascii") as file:
            return next((int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon")), 0)
    except OSError:
        return 0


def main(result: str, output: str, *command: str) -> None:
    """Run, look at its memory fifty times a second, wait."""
    most, ended = 0, threading.Event()
    began = time.monotonic()
    with Path(output).open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)

        def look() -> None:
            nonlocal most
            while not ended.wait(0.02):
                most = max(most, anonymous(process.pid))

        looking = threading.Thread(target=look)
        looking.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
        ended.set()
        looking.join()
    settings = {
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "memory": usage.ru_maxrss * 1024.0,
        "anonymous": most,
    }
    with Path(result).open("w", encoding="ascii") as file:
        json.dump({**settings, "code": os.waitstatus_to_exitcode(status)}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
