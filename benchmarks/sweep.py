"""Sixteen merges of one pool of eight in one pass, against sixteen lone merges and against mergekit.

    python benchmarks/sweep.py --size 0.1 --repeats 1                       a quick look
    python benchmarks/sweep.py --folder models --against PATH/TO/mergekit-yaml --json sweep.json

The mix, which is fixed so that numbers can be compared: averaging; task arithmetic with four factors; TIES with three
densities and two factors; DARE-TIES with five seeds. In one pass all of them are made for one reading of base and
experts; what they must know beforehand (thresholds, each found once for all cells that use it) comes first, in readings
of its own. A lone merge has its own store and finds everything itself. Both are done in this process on all cores,
after a first one pass on one thread that is not timed: it builds the fused loops and measures their CPU-seconds. That
every model has the same digest both ways is checked. mergekit runs once for each of the four methods; a sweep of
sixteen is taken to be four times that. Output is deleted after each run; at 0.25 billion parameters it takes 8 GB.

  scan merge     seconds for what must be known beforehand, and for the merges (all of it for lone ones)
  floor          one reading of base and experts and sixteen models written: 8 MB preadv and pwrite, a thread per core,
                 preallocated, no fsync
  target         floor + (sixteen digests, XXH3-128, + the fused loops that merge, in CPU-seconds) / cores
  /target        merge / target, and (scan + merge) / target, where the loops that scan are counted too
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: its profile.py is not Python's

import yaml

from benchmarks.floor import digest_seconds, floor_run
from benchmarks.inside import merge, place_of, planned, pool_in, scan
from benchmarks.loops import WatchedLibrary, watched_library
from benchmarks.machine import (
    Run,
    Table,
    add_common,
    command_run,
    cores,
    median,
    number,
    print_company,
    process_run,
    settle,
    write_json,
)
from benchmarks.models import add_models, model_folders, weights, write_models
from benchmarks.pairs import PAIRS
from mergecore.planning.pool import Pool
from mergecore.planning.work import MergeWork

EXPERTS = 8
CELLS: tuple[dict[str, Any], ...] = (
    {"method": "average"},
    *({"method": "task_arithmetic", "scale": scale} for scale in (0.2, 0.3, 0.5, 0.7)),
    *({"method": "ties", "density": density, "scale": scale} for density in (0.1, 0.2, 0.4) for scale in (1.0, 1.5)),
    *({"method": "ties", "density": 0.2, "drop": {"rate": 0.5, "seed": seed}} for seed in range(5)),
)
THEIRS = ("linear", "task_arithmetic", "ties", "dare_ties")
HEADS = {"way": 30, "wall": 8, "CPU": 8, "GB": 6, "scan": 8, "merge": 8, "others": 7}


class Stages:
    """Seconds of the stages of a run, added up."""

    def __init__(self) -> None:
        self.seconds = {"scan": 0.0, "merge": 0.0}

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """What is done inside belongs to this stage."""
        began = time.monotonic()
        yield
        self.seconds[stage] += time.monotonic() - began


def together(
    pool: Pool, plans: Sequence[MergeWork], store: Path, library: WatchedLibrary, workers: int
) -> tuple[Run, list[str]]:
    """All cells in one pass."""
    stages = Stages()
    settle()
    with process_run() as run:
        place = place_of(pool, store, library, workers)
        with stages.of("scan"):
            scan(place, plans)
        with stages.of("merge"):
            digests = merge(place, plans)
    shutil.rmtree(store)
    return {**run, **stages.seconds}, digests


def alone(pool: Pool, plans: Sequence[MergeWork], store: Path, library: WatchedLibrary) -> tuple[Run, list[str]]:
    """Each cell by itself; deleting it is part of it, for whoever makes them one by one has no room for all."""
    digests, stages = [], Stages()
    settle()
    with process_run() as run:
        for plan in plans:
            place = place_of(pool, store, library, cores())
            with stages.of("scan"):
                scan(place, [plan])
            with stages.of("merge"):
                digests += merge(place, [plan])
            shutil.rmtree(store)
    return {**run, **stages.seconds}, digests


def theirs(against: Path, folder: Path, work: Path) -> Run:
    """Four times what mergekit takes for one cell of each method."""
    recipe, out, runs = work / "theirs.yaml", work / "theirs", []
    for name in THEIRS:
        recipe.write_text(yaml.safe_dump(PAIRS[name].theirs.recipe(folder, EXPERTS)))
        runs.append(command_run([against, recipe, out, "--no-copy-tokenizer"], {"HF_HUB_OFFLINE": "1"}))
        shutil.rmtree(out)
    most = {figure: max(run[figure] for run in runs) for figure in runs[0]}
    share = len(CELLS) / len(THEIRS)
    return {**most, **{figure: share * sum(run[figure] for run in runs) for figure in ("wall", "cpu")}}


def floor(folder: Path, work: Path, written: int) -> Run:
    """One reading and sixteen models written, and the CPU-seconds of sixteen digests."""
    outputs = [work / f"floor-{number}" for number in range(len(CELLS))]
    run = floor_run([[weights(path) for path in model_folders(folder, EXPERTS)]], outputs, written)
    run["digest"] = len(CELLS) * digest_seconds(outputs[0])
    for path in outputs:
        path.unlink()
    return run


def measured(folder: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything in turn; medians, single runs, and what follows."""
    pool = pool_in(folder, EXPERTS)
    plans = planned(pool, CELLS)
    library, store = watched_library(work / "loops"), work / "store"
    _, expected = together(pool, plans, store, library, 1)
    watch = library.watch
    loops = {"built": len(watch.built), "build": sum(watch.built)}
    loops |= {"counting": watch.seconds["count"], "storing": watch.seconds["store"]}
    runs: dict[str, list[Run]] = {}
    for _ in range(options.repeats):
        for name, way in (
            ("one pass", lambda: together(pool, plans, store, library, cores())),
            ("sixteen lone merges", lambda: alone(pool, plans, store, library)),
        ):
            run, digests = way()
            if digests != expected:
                raise SystemExit(f"{name}: a model differs from the one that the first pass made on one thread")
            runs.setdefault(name, []).append(run)
        runs.setdefault("floor", []).append(floor(folder, work, plans[0].size))
        if options.against:
            runs.setdefault("mergekit, 4 runs times 4", []).append(theirs(options.against, folder, work))
    medians = {name: median(values) for name, values in runs.items()}
    storing = medians["floor"]["wall"] + (medians["floor"]["digest"] + loops["storing"]) / cores()
    whole = storing + loops["counting"] / cores()
    mine = medians["one pass"]
    over = {"merge": mine["merge"] / storing, "scan and merge": (mine["scan"] + mine["merge"]) / whole}
    return {
        "loops": loops,
        "medians": medians,
        "target": {"merge": storing, "scan and merge": whole},
        "over": over,
        "runs": runs,
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser, 0.25)
    parser.add_argument("--against", type=Path, help="mergekit-yaml of an environment of its own; none: without it")
    add_common(parser, 3)
    options = parser.parse_args()
    if options.against and not options.against.is_file():
        parser.error(f"--against: there is no program {options.against}; give the path of mergekit-yaml")
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        work = Path(temporary).absolute()
        folder = options.folder.absolute() if options.folder else work / "models"
        write_models(folder, options.size, EXPERTS)
        results = measured(folder, work, options)
    write_json(options.json, [results], size=options.size, cells=CELLS)
    table, mine = Table(HEADS), results["medians"]["one pass"]["wall"]
    for name, run in results["medians"].items():
        table.row(
            name, number(run["wall"]), number(run["cpu"]), number(run["memory"] / 1e9), number(run.get("scan")),
            number(run.get("merge")), number(run["others"]),
        )  # fmt: skip
    for name, run in results["medians"].items():
        if name not in ("one pass", "floor"):
            print(f"{name}: {run['wall'] / mine:.1f} times as long as one pass")
    for name, target in results["target"].items():
        print(f"{name}: target {target:.2f} s, {results['over'][name]:.2f} of it")
    print(
        f"{results['loops']['built']} loops built in {results['loops']['build']:.1f} s; every digest the same both ways"
    )
    print_company([run for runs_of in results["runs"].values() for run in runs_of])


if __name__ == "__main__":
    main()
