"""What a run takes and what else the machine was doing meanwhile; the table and the file that every benchmark ends
in.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DROP = Path("/proc/sys/vm/drop_caches")
Run = dict[str, float]
"""wall, cpu: seconds. memory: peak resident bytes (of an in-process run those above its beginning), anonymous: those of
them that are nobody's file. others: cores that the rest of the machine kept busy. load_before, load_after: of a
minute.
"""


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def command_run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Run:
    """What a whole command takes, by the clock of a small process of its own. Ends the benchmark where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        result, output = Path(folder) / "result.json", Path(folder) / "output"
        words = [str(word) for word in command]
        launcher = [sys.executable, "-I", str(ROOT / "benchmarks" / "launch.py"), str(result), str(output)]
        settle()
        with _company() as company:
            # Compiled modules are kept, as they are wherever nothing forbids it: pip has compiled those of what is
            # installed.
            kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
            subprocess.run([*launcher, *words], env={**kept, **(environment or {})}, check=True)
            told = json.loads(result.read_text())
            company["cpu"] = told["cpu"]
        if told.pop("code"):
            raise SystemExit(f"{' '.join(words)} failed:\n{output.read_text()[-3000:]}")
    return {**company, **told}


@contextmanager
def process_run() -> Iterator[Run]:
    """What is done inside takes, in this process: filled at the end. peak memory counts from what is resident before.
    Not to be used inside itself: the peak is forgotten at the beginning."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    resident, used = _status("VmRSS"), time.process_time()
    with _company() as company:
        began = time.monotonic()
        yield company
        company["wall"] = time.monotonic() - began
        company["cpu"] = time.process_time() - used
        company["memory"] = max(0.0, _status("VmHWM") - resident)


@contextmanager
def _company() -> Iterator[Run]:
    """Load, and the cores that others kept busy; who fills it gives their own 'cpu'."""
    run: Run = {"load_before": os.getloadavg()[0]}
    busy, began = _busy(), time.monotonic()
    yield run
    wall = time.monotonic() - began
    run["load_after"] = os.getloadavg()[0]
    run["others"] = max(0.0, (_busy() - busy - run.get("cpu", 0.0)) / wall)


def _busy() -> float:
    """CPU-seconds that the machine has worked since it was started."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, interrupts, soft, *_ = (int(field) for field in fields)
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def _status(field: str) -> float:
    """One size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0.0)


def settle() -> None:
    """Have what an earlier run has left to be written on the disk: it is not the next one's."""
    os.sync()


def can_forget() -> bool:
    """Whether the page cache can be dropped here."""
    return os.access(DROP, os.W_OK)


def forget_files() -> None:
    """Have the next reading come from the disk."""
    settle()
    DROP.write_text("3")


def median(runs: Sequence[Mapping[str, float]]) -> Run:
    """The median of each figure."""
    return {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}


def surroundings() -> dict[str, Any]:
    """What the numbers were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"cores": cores(), "processor": processor, "memory": memory, "load": os.getloadavg(), "argv": sys.argv}


class Table:
    """Columns of text, printed row by row. heads: {heading: width}; the first column is flush left."""

    def __init__(self, heads: Mapping[str, int]) -> None:
        self.widths = list(heads.values())
        self.row(*heads)

    def row(self, *cells: str) -> None:
        """One line."""
        first, *rest = zip(cells, self.widths, strict=True)
        print(" ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]), flush=True)


def number(value: float | None, digits: int = 2) -> str:
    """A figure in a table, '-' where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def add_common(parser: argparse.ArgumentParser, repeats: int) -> None:
    """Options that every benchmark has."""
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="timed runs of each; medians are shown (%(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write medians, single runs and the machine to this file")


def write_json(path: Path | None, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Write what was measured; called after every row, so that what is measured is kept whatever comes."""
    if path is not None:
        path.write_text(json.dumps({"machine": surroundings(), **more, "rows": rows}, indent=1) + "\n")


def print_company(runs: Sequence[Mapping[str, float]]) -> None:
    """The last line of every table: what else the machine was doing."""
    others = [run["others"] for run in runs]
    loads = [run[when] for run in runs for when in ("load_before", "load_after")]
    print(
        f"{cores()} cores; meanwhile others kept {statistics.median(others):.2f} cores busy (at most {max(others):.2f} "
        f"during a run), load {min(loads):.1f} to {max(loads):.1f}"
    )
