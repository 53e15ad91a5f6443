"""Single merges side by side: Mergeloom's command, the floor of the same bytes read and written, and mergekit's
command.

    python benchmarks/merge.py --size 0.1 --repeats 1                       a quick look
    python benchmarks/merge.py --size 1.1 --folder models --against PATH/TO/mergekit-yaml --json merge.json
    python benchmarks/merge.py --methods ties --experts 8 --cold            one method, also from the disk

Makes Llama-shaped bfloat16 checkpoints of its own (benchmarks/models.py) and runs whole commands on them in turn: each
of ours, its floor, theirs, and again. Every run of ours starts with an empty store and nothing remembered, so it hashes
the files first; only the fused loops of the methods are kept: they are built once per machine, in an untimed merge in
this process whose loops are timed (build: seconds for all of them, one after another), and one run of the command is
discarded as warm-up. Output is deleted after each run, everything that waits to be written is written before the next.

The first table, medians, seconds:
  wall CPU GB    the whole command; GB is its peak of resident memory, of which anonymous in the JSON
  start          from the start of the process until the recipe is read: Python, torch
  hash           checkpoints found, hashed for the first time, checked against each other
  scan merge     what the method must know beforehand, and the merge: from the first byte read to the last one written
  finish         companions, card, rename
  floor          reading what the passes read (base and experts once for each scan, and once for the merge; the base not
                 where a method works on weights alone) and writing the model: 8 MB preadv and pwrite, a thread per
                 core, preallocated, no fsync
  /floor         (scan + merge) / floor
  target         floor + (one XXH3-128 digest of the output + the method's fused loops, in CPU-seconds) / cores
  /target        (scan + merge) / target; '-' for methods that see whole tensors, which are not fused
The second: theirs, and how many times as long it takes: wall, wall without our hashing (which is remembered after the
first time, and which mergekit does not do), CPU-seconds. Rows marked * are further readings of the same method of ours,
held against the same run of theirs.
The third, with --cold: the page cache is dropped before each run. Ours then remembers the digests, for hashing would
bring the files into the cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: its profile.py is not Python's

import yaml

from benchmarks.floor import digest_seconds, floor_run
from benchmarks.inside import Known, known_of
from benchmarks.loops import WatchedLibrary, watched_library
from benchmarks.machine import (
    ROOT,
    Run,
    Table,
    add_common,
    can_forget,
    command_run,
    cores,
    forget_files,
    median,
    number,
    print_company,
    write_json,
)
from benchmarks.models import add_models, write_models
from benchmarks.pairs import PAIRS, Pair, Theirs, ours_recipe
from mergecore.native.sha256_lanes import SOURCE as HASHING

STAGES = ("start", "checkpoints", "scan", "merge", "finish")
OURS = {"method": 26, "experts": 7, "wall": 7, "CPU": 7, "GB": 5, "start": 6, "hash": 6, "scan": 6, "merge": 6,
        "finish": 6, "build": 6, "floor": 6, "/floor": 6, "target": 6, "/target": 7}  # fmt: skip
THEIRS = {"against mergekit": 26, "experts": 7, "wall": 8, "CPU": 8, "GB": 6, "times": 7, "no hash": 8, "CPU times": 10}
COLD = {"from the disk": 26, "experts": 7, "wall": 8, "scan": 7, "merge": 7, "floor": 7, "/floor": 7, "/target": 8,
        "theirs": 8, "times": 7}  # fmt: skip
Runs = dict[str, list[Run]]


@dataclass(frozen=True)
class Bench:
    """Where things are: the models, a folder to work in, loops, and mergekit's program."""

    folder: Path
    work: Path
    library: WatchedLibrary
    against: Path | None
    repeats: int
    cold: bool
    same_only: bool

    @property
    def cache(self) -> Path:
        """What stands for the user's cache: nothing but fused loops at the start of a run."""
        return self.work / "cache"

    def ours(self, values: Mapping[str, Any], experts: int, *, remembered: bool = False) -> Run:
        """One run of our command, its stages among the figures. remembered: digests of an earlier run are kept."""
        if not remembered:
            (self.cache / "mergeloom" / "digests.jsonl").unlink(missing_ok=True)
        recipe, out, timings = (self.work / name for name in ("ours.yaml", "ours", "timings.json"))
        recipe.write_text(yaml.safe_dump(ours_recipe(values, self.folder, experts)))
        settings = {"XDG_CACHE_HOME": str(self.cache), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "flows.cli.main", "merge", recipe, out, "--timings", timings]
        run = command_run(command, settings)
        shutil.rmtree(out)
        return {**run, **json.loads(timings.read_text())}

    def theirs(self, recipe_of: Theirs, experts: int) -> Run:
        """One run of mergekit's command."""
        assert self.against is not None
        recipe, out = self.work / "theirs.yaml", self.work / "theirs"
        recipe.write_text(yaml.safe_dump(recipe_of.recipe(self.folder, experts)))
        run = command_run([self.against, recipe, out, "--no-copy-tokenizer"], {"HF_HUB_OFFLINE": "1"})
        shutil.rmtree(out)
        return run

    def floor(self, known: Known) -> Run:
        """The same bytes read and written plainly, and the CPU-seconds of one digest of what was written."""
        out = self.work / "floor"
        run = floor_run(known.readings, [out], known.written)
        run["digest"] = digest_seconds(out)
        out.unlink()
        return run


def warmed_up(bench: Bench, values: Mapping[str, Any], experts: int) -> Known:
    """A merge in this process, and the command until it finds all its loops built (once, unless something is amiss)."""
    store = bench.work / "store"
    known = known_of(bench.folder, values, experts, bench.library, store)
    shutil.rmtree(store)
    for _ in range(3):
        before = len(list(bench.library.folder.glob("*.so")))
        bench.ours(values, experts)
        if len(list(bench.library.folder.glob("*.so"))) == before:
            return known
        print("note: the command built loops that the merge in this process did not", file=sys.stderr)
    return known


def rows_of(bench: Bench, name: str, pair: Pair, experts: int) -> list[dict[str, Any]]:
    """The rows of one pair: ours and their floors, and theirs, in turn."""
    readings = dict(list(pair.ours.items())[: 1 if bench.same_only else None])
    known = {reading: warmed_up(bench, values, experts) for reading, values in readings.items()}
    ours: dict[str, Runs] = {name_of: {} for name_of in readings}
    theirs: Runs = {}
    ways = ("warm", "cold") if bench.cold else ("warm",)
    for _ in range(bench.repeats):
        for way in ways:
            forget = forget_files if way == "cold" else lambda: None
            for reading, values in readings.items():
                forget()
                run = bench.ours(values, experts, remembered=way == "cold")
                ours[reading].setdefault(f"{way} ours", []).append(run)
                forget()
                ours[reading].setdefault(f"{way} floor", []).append(bench.floor(known[reading]))
            if bench.against:
                forget()
                theirs.setdefault(f"{way} theirs", []).append(bench.theirs(pair.theirs, experts))
    first = next(iter(readings))
    return [
        row_of(reading, name, reading != first, experts, known[reading], {**ours[reading], **theirs}, ways)
        for reading in readings
    ]


def row_of(
    method: str, pair: str, beside: bool, experts: int, known: Known, runs: Runs, ways: Sequence[str]
) -> dict[str, Any]:
    """Medians and what follows from them, for each way ('warm', 'cold')."""
    loops = {"built": known.built, "build": known.build, "counting": known.counting, "storing": known.storing}
    bytes_moved = {"planned_read": known.planned_read, "written": known.written, "passes": len(known.readings)}
    row = {"method": method, "pair": pair, "beside": beside, "experts": experts, "loops": loops, "bytes": bytes_moved}
    for way in ways:
        ours, floor = median(runs[f"{way} ours"]), median(runs[f"{way} floor"])
        moved = ours["scan"] + ours["merge"]
        digested = floor["wall"] + floor["digest"] / cores()
        storing = digested + known.storing / cores()
        target = storing + known.counting / cores()
        measured: dict[str, Any] = {"ours": ours, "floor": floor, "over_floor": moved / floor["wall"]}
        if known.fused:
            measured |= {"target": target, "over_target": moved / target}
            measured["over_target_without_counting"] = moved / storing
        if f"{way} theirs" in runs:
            theirs = median(runs[f"{way} theirs"])
            measured |= {
                "theirs": theirs,
                "times": theirs["wall"] / ours["wall"],
                "cpu_times": theirs["cpu"] / ours["cpu"],
            }
            measured["times_without_hashing"] = theirs["wall"] / (ours["wall"] - ours["checkpoints"])
        row[way] = measured
    return {**row, "runs": runs}


def print_ours(table: Table, row: Mapping[str, Any]) -> None:
    """A line of the first table."""
    warm = row["warm"]
    ours, floor = warm["ours"], warm["floor"]
    table.row(
        mark(row), str(row["experts"]), number(ours["wall"]), number(ours["cpu"]), number(ours["memory"] / 1e9),
        *[number(ours[stage]) for stage in STAGES], number(row["loops"]["build"], 1), number(floor["wall"]),
        number(warm["over_floor"]), number(warm.get("target")), number(warm.get("over_target")),
    )  # fmt: skip


def print_theirs(rows: Sequence[Mapping[str, Any]]) -> None:
    """The second table."""
    table = Table(THEIRS)
    for row in rows:
        theirs, warm = row["warm"]["theirs"], row["warm"]
        table.row(
            mark(row), str(row["experts"]), number(theirs["wall"]), number(theirs["cpu"]),
            number(theirs["memory"] / 1e9),
            number(warm["times"], 1), number(warm["times_without_hashing"], 1), number(warm["cpu_times"], 1),
        )  # fmt: skip


def print_cold(rows: Sequence[Mapping[str, Any]]) -> None:
    """The third table."""
    table = Table(COLD)
    for row in rows:
        cold = row["cold"]
        ours, floor, theirs = cold["ours"], cold["floor"], cold.get("theirs", {})
        table.row(
            mark(row), str(row["experts"]), number(ours["wall"]), number(ours["scan"]), number(ours["merge"]),
            number(floor["wall"]), number(cold["over_floor"]), number(cold.get("over_target")),
            number(theirs.get("wall")), number(cold.get("times"), 1),
        )  # fmt: skip


def mark(row: Mapping[str, Any]) -> str:
    """A row's name, marked where it is a further reading."""
    return f"{row['method']}{' *' if row['beside'] else ''}"


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name, pair in PAIRS.items() if pair.known]
    add_models(parser, 0.1)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 8], help="how many are merged (2 and 8)")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=known,
        default=known,
        metavar="METHOD",
        help=f"mergekit's names: {', '.join(known)}",
    )
    parser.add_argument(
        "--against", type=Path, help="mergekit-yaml of an environment of its own; none: the floor alone"
    )
    parser.add_argument(
        "--cold", action="store_true", help="also with the page cache dropped before each run (as root)"
    )
    parser.add_argument(
        "--same-only",
        action="store_true",
        help="of each method only what means the same as mergekit's, no row marked *",
    )
    add_common(parser, 3)
    options = parser.parse_args()
    if options.cold and not can_forget():
        parser.error("--cold must write /proc/sys/vm/drop_caches, which is not allowed here: run it as root")
    if options.against and not options.against.is_file():
        parser.error(f"--against: there is no program {options.against}; give the path of mergekit-yaml")
    return options


def main() -> None:
    """Run and print."""
    options, rows = parsed(), []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        work = Path(temporary)
        folder = options.folder or work / "models"
        write_models(folder, options.size, max(options.experts))
        library = watched_library(work / "cache" / "mergeloom" / "loops")
        library.function(HASHING, build=True, wait=True)
        against = options.against and options.against.absolute()
        bench = Bench(
            folder.absolute(), work.absolute(), library, against, options.repeats, options.cold, options.same_only
        )
        torch_alone = command_run([sys.executable, "-c", "import torch"])
        table = Table(OURS)
        for experts in options.experts:
            for name in options.methods:
                if experts not in PAIRS[name].counts:
                    continue
                for row in rows_of(bench, name, PAIRS[name], experts):
                    rows.append(row)
                    print_ours(table, row)
                write_json(options.json, rows, size=options.size, torch_alone=torch_alone)
    if options.against:
        print_theirs(rows)
    if options.cold:
        print_cold(rows)
    print(f"importing torch alone: {torch_alone['wall']:.2f} s, {torch_alone['memory'] / 1e9:.2f} GB")
    print_company([run for row in rows for runs in row["runs"].values() for run in runs])


if __name__ == "__main__":
    main()
