"""The small process that stands between us and a service: when we end, however we end, the service's group ends too.

Run as a script with nothing but the standard library (`python -I -S supervise.py PARENT GRACE COMMAND…`), so that it
starts in some 30 ms. It leads a process group of its own, in which the service and everything that forks from it live:
Ctrl-C in a terminal does not reach them, and one `killpg` reaches them all (Prefect and MLflow fork workers that
outlive a signal sent to the first process only).
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

POLL_SECONDS = 0.25


def die_with_supervisor() -> None:
    """Ask Linux to kill the service should even the supervisor be killed; elsewhere there is no such call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # 1 is PR_SET_PDEATHSIG


def supervise(parent: int, grace: float, command: Sequence[str]) -> None:
    """Run `command` until it ends by itself, a SIGTERM or SIGINT comes, or the process `parent` is gone.

    grace: seconds between SIGTERM and SIGKILL. The parent's id is polled: PR_SET_PDEATHSIG would fire when the *thread*
    that started us ends, and services are started from short-lived threads.
    """
    asked: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        asked.append(number)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    service = subprocess.Popen(command, preexec_fn=die_with_supervisor)  # noqa: PLW1509 — one thread
    while service.poll() is None and not asked and os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.killpg(0, signal.SIGTERM)  # our own handler only notes it
    with contextlib.suppress(subprocess.TimeoutExpired):
        service.wait(grace)
    os.killpg(0, signal.SIGKILL)  # what forked from the service may be left even where the service itself went; us too


if __name__ == "__main__":
    supervise(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
