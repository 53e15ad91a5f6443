"""Exact magnitude thresholds from two scans, against torch.kthvalue and torch.argsort of the same task vector.

    python benchmarks/profile.py --size 0.02                                a quick look
    python benchmarks/profile.py --size 1.1 --densities 0.2 --json profile.json

One task vector, bfloat16 minus bfloat16 in float32. The scans (the profile, and the low half-words in one of its bins)
read base and expert as they are stored and form the difference as they go; the profile then serves every density, and a
sweep keeps it. torch is given the magnitudes ready-made in float32; one argsort serves every density as well, kthvalue
is called for each. The fused loops are built beforehand. All three must agree to the last bit at every density, and so
must the counts above the threshold and at it: that is checked, and the program ends where they do not.

torch's two need memory for the whole vector and more (an index of 8 bytes for each element): 1.1 billion parameters
take about 30 GB. The scans take a few MB whatever the size.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: this file is not Python's profile

import torch
from torch import Tensor

from benchmarks.loops import WatchedLibrary, watched_library
from benchmarks.machine import (
    Run,
    Table,
    add_common,
    cores,
    median,
    number,
    print_company,
    process_run,
    write_json,
)
from mergecore.checkpoints.experts import FullExpert
from mergecore.engine.executor import InProcess
from mergecore.engine.pass_plan import PassPlan, StatisticJob, plan_spans
from mergecore.engine.run_pass import run_pass
from mergecore.events import silent
from mergecore.plugins.block import Per
from mergecore.plugins.statistic import Found, Result, Statistic, Statistics
from mergecore.statistics.profile import Profile
from mergecore.statistics.radix import value_of
from mergecore.statistics.threshold import Threshold
from mergecore.tensors.memory import MemoryTensors

PIECE = 1 << 24
"""Elements that are made at a time."""
TENSORS = 16
"""Tensors that the model is cut into."""
HEADS = {"way": 40, "wall": 8, "CPU": 8, "GB": 7, "times": 7, "others": 7}
Answer = tuple[float, int, int]
"""Threshold, how many magnitudes are above it, how many are it."""


@dataclass(frozen=True)
class Vector:
    """A base and an expert in bfloat16, flat; the model is made of `TENSORS` pieces of each."""

    base: Tensor
    expert: Tensor

    @property
    def count(self) -> int:
        """Elements."""
        return self.base.numel()

    def magnitudes(self) -> Tensor:
        """|τ| in float32."""
        values = torch.empty(self.count)
        for start in range(0, self.count, PIECE):
            piece = slice(start, start + PIECE)
            values[piece] = (self.expert[piece].float() - self.base[piece].float()).abs()
        return values

    def rank(self, density: float) -> int:
        """How many are to be kept."""
        return floor(Fraction(str(density)) * self.count)


def vector_of(count: int) -> Vector:
    """Normal weights of scale 0.02, changes of scale 0.0005: in bfloat16 many changes are equal."""
    generator = torch.Generator().manual_seed(0)
    vector = Vector(torch.empty(count, dtype=torch.bfloat16), torch.empty(count, dtype=torch.bfloat16))
    for start in range(0, count, PIECE):
        here = min(PIECE, count - start)
        base = torch.randn(here, generator=generator).mul_(0.02)
        vector.base[start : start + here] = base
        vector.expert[start : start + here] = base + torch.randn(here, generator=generator).mul_(0.0005)
    return vector


def scanned(vector: Vector, densities: Sequence[float], library: WatchedLibrary, workers: int) -> list[Answer]:
    """By the profile and, for all densities at once, the second scan."""
    names = [f"t{number:02}" for number in range(TENSORS)]
    base = MemoryTensors(dict(zip(names, vector.base.tensor_split(TENSORS), strict=True)))
    expert = FullExpert(
        "expert", "expert", MemoryTensors(dict(zip(names, vector.expert.tensor_split(TENSORS), strict=True)))
    )

    def passed(statistics: Sequence[Statistic], known: Statistics) -> list[Result]:
        jobs = [StatisticJob(f"{n}", statistic, (0,), base.tensors, known) for n, statistic in enumerate(statistics)]
        spans = plan_spans(base.tensors, Per.ELEMENT)
        plan = PassPlan(base, (expert,), (), tuple(jobs), spans, library=library)
        results = run_pass(plan, InProcess(workers), silent).results
        return [results[job.key] for job in jobs]

    (profile,) = passed([Profile()], {})
    known = {"profile": [Found(MemoryTensors(profile.tensors), profile.numbers)]}
    results = passed([Threshold(density=density) for density in densities], known)
    groups = [result.numbers["groups"][0] for result in results]
    return [(value_of(group["bits"]), group["above"], group["equal"]) for group in groups]


def by_kthvalue(magnitudes: Tensor, ranks: Sequence[int]) -> list[float]:
    """The threshold of each rank."""
    return [float(magnitudes.kthvalue(magnitudes.numel() - rank + 1).values) for rank in ranks]


def by_argsort(magnitudes: Tensor, ranks: Sequence[int]) -> list[float]:
    """The same by sorting once."""
    order = torch.argsort(magnitudes, descending=True)
    return [float(magnitudes[order[rank - 1]]) for rank in ranks]


def check(
    vector: Vector, magnitudes: Tensor, densities: Sequence[float], answers: list[Answer], *others: list[float]
) -> None:
    """End the program where the ways differ, or where a count is wrong."""
    for place, (density, (value, above, equal)) in enumerate(zip(densities, answers, strict=True)):
        rank = vector.rank(density)
        counted = (int((magnitudes > value).sum()), int((magnitudes == value).sum()))
        if (
            any(other[place] != value for other in others)
            or (above, equal) != counted
            or not above < rank <= above + equal
        ):
            raise SystemExit(
                f"density {density}: the scans say {value!r} with {above} above and {equal} at it; torch says "
                f"{[other[place] for other in others]} and counts {counted}"
            )


def measured(vector: Vector, options: argparse.Namespace, library: WatchedLibrary) -> dict[str, list[Run]]:
    """Every way in turn, each checked against the others."""
    ranks, magnitudes = [vector.rank(density) for density in options.densities], vector.magnitudes()
    scanned(vector, options.densities, library, 1)  # builds the loops
    ways: dict[str, Callable[[], Any]] = {
        f"two scans, {workers} thread{'s' * (workers > 1)}": lambda workers=workers: scanned(
            vector, options.densities, library, workers
        )
        for workers in dict.fromkeys((1, cores()))
    }
    ways["torch.kthvalue"] = lambda: by_kthvalue(magnitudes, ranks)
    ways["torch.argsort"] = lambda: by_argsort(magnitudes, ranks)
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        runs_by_way = {}
        for name, way in ways.items():
            torch.set_num_threads(cores())  # a pass sets it to one in this process
            with process_run() as run:
                runs_by_way[name] = way()
            runs[name].append(run)
        for name in ways:
            if name.startswith("two scans"):
                check(
                    vector,
                    magnitudes,
                    options.densities,
                    runs_by_way[name],
                    runs_by_way["torch.kthvalue"],
                    runs_by_way["torch.argsort"],
                )
    return runs


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=0.1, help="billions of elements (%(default)s)")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2], help="shares that are kept (0.2)")
    add_common(parser, 3)
    options = parser.parse_args()
    if not all(0 < density < 1 for density in options.densities):
        parser.error("--densities are shares: above 0 and below 1, where everything is kept without a look")
    vector = vector_of(int(options.size * 1e9))
    with tempfile.TemporaryDirectory() as temporary:
        library = watched_library(Path(temporary))
        runs = measured(vector, options, library)
    rows = [{"way": name, "median": median(runs_of), "runs": runs_of} for name, runs_of in runs.items()]
    write_json(options.json, rows, elements=vector.count, densities=options.densities, built=library.watch.built)
    table, best = Table(HEADS), min(row["median"]["wall"] for row in rows if row["way"].startswith("two scans"))
    for row in rows:
        run = row["median"]
        table.row(
            row["way"], number(run["wall"]), number(run["cpu"]), number(run["memory"] / 1e9),
            number(run["wall"] / best, 1),
            number(run["others"]),
        )  # fmt: skip
    print(
        f"{vector.count:,} elements, densities {options.densities}: equal to the last bit, counts above and at it too"
    )
    print_company([run for runs_of in runs.values() for run in runs_of])


if __name__ == "__main__":
    main()
