"""What orchestration costs: planning many cells, finding a finished sweep done, and what each cell costs beyond its
work.

    python benchmarks/orchestration.py                        all three; about a quarter of an hour on two cores
    python benchmarks/orchestration.py plan                   planning about 10,000 cells, by stage and as a command
    python benchmarks/orchestration.py resume --cells 200     a finished sweep of about 200 cells found done
    python benchmarks/orchestration.py cell                   a cell with Prefect, Dask and MLflow, and alone

Checkpoints, tasks and models are tiny and made anew, so that nearly nothing but orchestration is measured; those that
are planned have as many tensors as a 7B model. A sweep that is to be found finished is run first, in one process. Wall
time is what a person waits; CPU-seconds are those of the command with all processes it started, and say more on a
machine that is not idle. Every row is one reading; --json writes them with what else the machine was doing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: its profile.py is not Python's

import yaml

from benchmarks import tiny_world
from flows.cli.texts import plan_text
from flows.session.session import open_session, session_of
from mergecore.spec.sweep import parse_spec
from mergecore.spec.yaml_files import read_yaml
from mergecore.sweeps.cost import cost

ROOT = Path(__file__).resolve().parent.parent
LLAMA_7B_TENSORS = 290
SMALL_LAYERS = 6
VALUES = 71
"""Combinations of values in `tiny_world.every_method`."""
SEVERAL = {"plan": 10_000, "resume": 1000, "cell": 200}
"""Cells of each part unless --cells says otherwise."""
Found = TypeVar("Found")


class Rows:
    """What was measured, printed as it comes."""

    def __init__(self) -> None:
        self.measured: list[dict[str, Any]] = []

    def add(self, part: str, what: str, wall: float, cpu: float, cells: int) -> None:
        """One reading."""
        self.measured.append({"part": part, "what": what, "wall": wall, "cpu": cpu, "cells": cells})
        print(f"{part:8s} {what:58s} {cells:6d} {wall:10.3f} {cpu:10.3f}", flush=True)

    def timed(self, part: str, what: str, cells: int, work: Callable[[], Found]) -> Found:
        """The result of some work in this process."""
        began, used = time.perf_counter(), time.process_time()
        result = work()
        self.add(part, what, time.perf_counter() - began, time.process_time() - used, cells)
        return result

    def command(self, part: str, what: str, cells: int, command: list[str]) -> tuple[float, float]:
        """Wall and CPU-seconds of a whole command, everything it started included; raises where it fails."""
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        began = time.perf_counter()
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                output.seek(0)
                raise SystemExit(f"{' '.join(command)} failed:\n{output.read().decode()[-3000:]}")
        wall, cpu = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
        self.add(part, what, wall, cpu, cells)
        return wall, cpu


def mergeloom(*words: str | Path) -> list[str]:
    """The command line of this checkout."""
    return [sys.executable, "-m", "flows.cli.main", *map(str, words)]


@contextmanager
def world(layers: int) -> Iterator[Path]:
    """A folder with checkpoints and tasks, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="mergeloom-orchestration-") as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # digests of files that will be gone are nobody's
        tiny_world.write_world(Path(folder), layers)
        yield Path(folder)


def plan(rows: Rows, cells: int) -> None:
    """From the parsed spec to the plan, to the first round and to the text; then the command."""
    with world(LLAMA_7B_TENSORS // 2) as folder:
        subsets = max(1, round(cells / VALUES / 3.24))  # of 7 × this many draws so many are distinct at 10,000 cells
        path = tiny_world.write_spec(
            folder, "planned", tiny_world.every_method(), list(range(2, 9)), subsets, {"limit": tiny_world.ITEMS}
        )
        spec = parse_spec(read_yaml(path), path.name)
        began, used = time.perf_counter(), time.process_time()
        session = session_of(spec)
        count = len(session.plan.cells)
        rows.add("plan", "parsed spec to plan", time.perf_counter() - began, time.process_time() - used, count)
        rows.timed("plan", "plan to first round", count, session.frontier.round)
        rows.timed(
            "plan",
            "what it costs, and the text",
            count,
            lambda: plan_text(session, cost(session.frontier, 2, session.settings.memory.value), False),
        )
        stages = [row for row in rows.measured if row["part"] == "plan"]
        rows.add("plan", "these three", *(sum(row[kind] for row in stages) for kind in ("wall", "cpu")), count)
        rows.command("plan", "mergeloom plan, whole command with imports", count, mergeloom("plan", path))


def resume(rows: Rows, cells: int) -> None:
    """A sweep done in one process, shown in MLflow, and then started again when nothing is left to do."""
    with world(SMALL_LAYERS) as folder:
        subsets = max(1, round(cells / VALUES / 2.8))  # of 3 × 5 draws 14 are distinct
        path = tiny_world.write_spec(
            folder, "finished", tiny_world.every_method(), [2, 4, 6], subsets, {"limit": tiny_world.ITEMS}
        )
        alone = mergeloom("sweep", path, "--in-process", "--workers", "1", "--no-track")
        count = len(open_session(path).plan.cells)
        rows.command("resume", "mergeloom sweep --in-process, everything to do", count, alone)
        rows.command(
            "resume", "mergeloom sweep --no-track, everything done", count, mergeloom("sweep", path, "--no-track")
        )
        rows.command("resume", "mergeloom track, first time", count, mergeloom("track", path))
        # The first one notes that the sweep has been shown as it is.
        rows.command("resume", "mergeloom sweep, everything done and shown", count, mergeloom("sweep", path))


def cell(rows: Rows, cells: int) -> None:
    """The same cells alone and with the services, few and many: the difference is what a cell costs."""
    with world(SMALL_LAYERS) as folder:
        few = max(1, cells // 5)
        ways = {
            "in one process": ("--in-process", "--no-track"),
            "in one process, shown in MLflow": ("--in-process",),
            "Prefect and Dask": ("--no-track",),
            "Prefect, Dask and MLflow": (),
        }
        for number, (name, options) in enumerate(ways.items()):
            seconds = []
            for count in (few, cells):
                path = tiny_world.write_spec(folder, f"w{number}-{count}", tiny_world.scales(count), [2], 1, None)
                seconds.append(
                    rows.command("cell", f"{name}", count, mergeloom("sweep", path, "--workers", "1", *options))
                )
            (wall, cpu), (walls, cpus) = seconds
            rows.add(
                "cell", f"{name}: each further cell", (walls - wall) / (cells - few), (cpus - cpu) / (cells - few), 1
            )
        processes(rows, folder)


def processes(rows: Rows, folder: Path) -> None:
    """A cell as a shell loop does it: one process that merges, one that scores."""
    recipe = {"method": "task_arithmetic", "scale": 0.3, "base": str(folder / "base"),
              "experts": [str(folder / f"expert-{number}") for number in (1, 2)]}  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    tasks = ["task-1", "task-2", *tiny_world.held_out()]
    scoring = [sys.executable, "-m", "benchmarks.tiny_world", str(folder / "out"), str(folder / "tasks")]
    merging = mergeloom("merge", folder / "recipe.yaml", folder / "out", "--workers", "1")
    for _ in range(2):  # the first fills the caches
        shutil.rmtree(folder / "out", ignore_errors=True)
        merged = rows.command("cell", "a process of its own: merge", 1, merging)
        scored = rows.command("cell", "a process of its own: score", 1, [*scoring, *tasks])
    rows.add("cell", "two processes: each cell", merged[0] + scored[0], merged[1] + scored[1], 1)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="plan, resume, cell; none given: all of them")
    parser.add_argument("--cells", type=int, help=f"about so many cells; default: {SEVERAL}")
    parser.add_argument("--json", type=Path, help="write the readings to this file")
    options = parser.parse_args()
    parts: dict[str, Callable[[Rows, int], None]] = {"plan": plan, "resume": resume, "cell": cell}
    if strange := [part for part in options.parts if part not in parts]:
        parser.error(f"there is no part '{strange[0]}'; known: {', '.join(parts)}")
    rows, before = Rows(), os.getloadavg()
    print(f"{'':8s} {'':58s} {'cells':>6s} {'wall s':>10s} {'CPU s':>10s}")
    for part in options.parts or parts:
        parts[part](rows, options.cells or SEVERAL[part])
    print(f"load of the machine before and after: {before[0]:.1f}, {os.getloadavg()[0]:.1f}; {os.cpu_count()} cores")
    if options.json:
        load = {"before": before, "after": os.getloadavg()}
        options.json.write_text(
            json.dumps({"load": load, "cores": os.cpu_count(), "rows": rows.measured}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
