"""Commands run in pseudo-terminals, as a person runs them: standard output and standard error each have one of their
own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
CONTROL = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>78])")
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"
CTRL_C = "\x03"
OWNER = "import fcntl, os, sys, termios; fcntl.ioctl(2, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
"""Makes the terminal of standard error the one whose Ctrl-C reaches the command and its children."""


@dataclass
class Ran:
    """A command that runs or has run: its process id, its exit code, and what it has sent to its two terminals."""

    pid: int
    code: int | None = None
    output: str = ""
    errors: str = ""

    @property
    def lines(self) -> list[str]:
        """Whatever stood in a line of standard error, without control sequences, echoed keys and blanks at the end."""
        text = CONTROL.sub("", self.errors).replace("^C", "")
        return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]

    @property
    def cursor_is_visible(self) -> bool:
        """Whether the cursor was shown again after it was last hidden."""
        return self.errors.rfind(SHOW_CURSOR) >= self.errors.rfind(HIDE_CURSOR)


@dataclass(frozen=True)
class Terminal:
    """What a command is run in."""

    folder: Path
    columns: int = 80
    term: str = "xterm-256color"
    variables: dict[str, str] = field(default_factory=dict)

    def run(
        self, *arguments: str, keys: str = "", when: Callable[[Ran], bool] = lambda ran: True, seconds: float = 900
    ) -> Ran:
        """Run Python with these arguments; type `keys` once `when` is true. Fails where it does not end in time."""
        (output, its_output), (errors, its_errors) = self._opened(), self._opened()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", OWNER, sys.executable, *arguments],
            stdin=its_errors, stdout=its_output, stderr=its_errors, cwd=self.folder, env=self._environment(),
            start_new_session=True,
        )  # fmt: skip
        os.close(its_output)
        os.close(its_errors)
        ran, said, deadline = Ran(process.pid), {output: b"", errors: b""}, time.monotonic() + seconds
        try:
            while process.poll() is None:
                _take(said)
                ran.output, ran.errors = said[output].decode(errors="replace"), said[errors].decode(errors="replace")
                assert time.monotonic() < deadline, f"not ended after {seconds:.0f} s: {ran}"
                if keys and when(ran):
                    os.write(errors, keys.encode())
                    keys = ""
            while _take(said):  # what it had written before it ended
                pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
            os.close(output)
            os.close(errors)
        return Ran(process.pid, process.returncode, said[output].decode(), said[errors].decode())

    def mergeloom(self, *arguments: str) -> Ran:
        """Run a command of the command line to its end."""
        return self.run("-m", "flows.cli.main", *arguments)

    def _opened(self) -> tuple[int, int]:
        ours, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 30, self.columns, 0, 0))
        return ours, its

    def _environment(self) -> dict[str, str]:
        left_out = ("PREFECT_", "MLFLOW_", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_", "DO_NOT_TRACK")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        ours = {"TERM": self.term, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        ours |= {"XDG_CACHE_HOME": str(self.folder / "cache"), "PREFECT_HOME": str(self.folder / "prefect-home")}
        return {**kept, **ours, **self.variables}


def _take(said: dict[int, bytes]) -> bool:
    """Add what comes within a moment; whether anything came."""
    came = False
    for handle in select.select(list(said), [], [], 0.05)[0]:
        with contextlib.suppress(OSError):  # nobody has the terminal open any more
            data = os.read(handle, 1 << 16)
            said[handle] += data
            came = came or bool(data)
    return came
