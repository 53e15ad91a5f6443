"""Bytes a second of every element-wise method, against a copy of the same bytes: as a fused loop and operation by
operation.

    python benchmarks/kernels.py --elements 4 --repeats 3                   a quick look
    python benchmarks/kernels.py --json kernels.json                        also on a CUDA device where there is one

Base and experts are bfloat16 and lie in memory, many times as large as the processor's caches. Bytes are those of every
tensor that the method reads (the base not where it works on weights alone, Fisher information of 4 bytes beside) and
those of the result. The copy is torch's copy_ of a buffer of half as many bytes, which reads and writes as many. All go
through the elements in the engine's windows of 2^18, each thread through windows of its own. Loops are built beforehand
(build: seconds); method and copy take turns. What a method must know beforehand is worked out and not timed.

On a CUDA device base and experts are resident and a method is one launch over all of them; the copy is one of the
device's memory, and the share of it is the share of its bandwidth that can be had. Times are those of the device
(events).

  loop GB/s, share    the fused loop, and how much of the copy's bytes a second that is
  eager GB/s, share   the same function as plain torch operations, in pieces that stay in the cache
  ns                  nanoseconds an element of the fused loop
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: its profile.py is not Python's

import torch
from torch import Tensor

from benchmarks.loops import WatchedLibrary, watched_library
from benchmarks.machine import Run, Table, add_common, cores, median, number, print_company, process_run, write_json
from flows.cli.methods_page import accepts, built
from mergecore.checkpoints.experts import FullExpert
from mergecore.engine.kernels.run import BoundFunction, Fused, Window
from mergecore.engine.windows import window_of
from mergecore.events import silent
from mergecore.plugins.block import Beside, Block, Per
from mergecore.plugins.method import Method
from mergecore.recipes.in_memory import find_statistics
from mergecore.registry import METHODS, method_from
from mergecore.tensors.memory import MemoryTensors

NAME = "model.layers.0.mlp.up_proj.weight"
VALUES: dict[str, dict[str, Any]] = {
    "average": {"method": "average"},
    "task_arithmetic": {"method": "task_arithmetic", "scale": 0.3},
    "task_arithmetic, drop": {"method": "task_arithmetic", "scale": 0.3, "drop": {"rate": 0.5}},
    "ties": {"method": "ties", "density": 0.2},
    "ties, exact count": {"method": "ties", "density": 0.2, "count": "exact"},
    "ties, drop": {"method": "ties", "density": 0.2, "drop": {"rate": 0.5}},
    "consensus": {"method": "consensus", "scale": 0.3},
    "slerp": {"method": "slerp", "t": 0.5},
    "nearswap": {"method": "nearswap", "t": 0.0005},
}
"""Settings of element-wise methods; one of which nothing stands here is taken with the first of its examples."""
HEADS = {"method": 26, "experts": 7, "where": 12, "copy GB/s": 9, "loop GB/s": 9, "share": 6, "eager GB/s": 10,
         "share ": 6, "ns": 6, "build": 6}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A method over one window, with what it must know; `bytes` are those that it reads and writes."""

    name: str
    window: Window
    fused: BoundFunction
    eager: BoundFunction
    bytes: int


def settings() -> dict[str, dict[str, Any]]:
    """Return the settings of every element-wise method of this repository, by label."""
    told = {values["method"] for values in VALUES.values()}
    others = {name: {"method": name, **METHODS[name].examples().golden[0]} for name in METHODS.own if name not in told}
    wanted = {name for name in METHODS.own if built(METHODS[name]).per is Per.ELEMENT}
    return {name: values for name, values in {**VALUES, **others}.items() if values["method"] in wanted}


def method_of(name: str, values: Mapping[str, Any]) -> Method:
    """The method of these settings."""
    return method_from(values["method"], {key: value for key, value in values.items() if key != "method"}, name)


def models(count: int, experts: int) -> list[Tensor]:
    """Base and experts, flat, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(count, generator=generator).mul_(0.02)
    changed = (base + torch.randn(count, generator=generator).mul_(0.0005) for _ in range(experts))
    return [base.to(torch.bfloat16), *(tensor.to(torch.bfloat16) for tensor in changed)]


def case_of(
    name: str,
    values: Mapping[str, Any],
    tensors: Sequence[Tensor],
    library: WatchedLibrary,
    device: str = "cpu",
    times: int = 1,
) -> Case:
    """The method with what it must know beforehand, found here, over these models so many times one after the other,
    which then lie on the device."""
    base, *experts = tensors
    method = method_of(name, values)
    source = MemoryTensors({NAME: base})
    pool = [
        FullExpert(f"{number}", f"{number}", MemoryTensors({NAME: tensor})) for number, tensor in enumerate(experts)
    ]
    known = find_statistics(
        method,
        source,
        pool,
        source.tensors,
        given_data(method, base.numel() * times, len(experts), device),
        silent,
        library,
    )
    ids = tuple(expert.id for expert in pool)
    arguments = method.arguments(Block(NAME, tuple(base.shape), 0, base.numel(), None, (), ids), known)
    base, *experts = [tensor.to(device).repeat(times) if times > 1 else tensor.to(device) for tensor in tensors]
    window = Window(base if method.needs_base else None, tuple(experts), (False,) * len(experts), 0)
    ways = [
        Fused(method.merge_models, method.on, torch.bfloat16, kept, wait=True, with_base=method.needs_base).bind(
            arguments
        )  # type: ignore[arg-type]
        for kept in (library, None)
    ]
    beside = sum(Beside.dtype.itemsize for _ in ways[0].beside)
    width = sum(tensor.element_size() for tensor in (*window.experts, *([] if window.base is None else [window.base])))
    return Case(name, window, *ways, window.count * (width + beside + torch.bfloat16.itemsize))


def given_data(method: Method, count: int, experts: int, device: str) -> dict[str, list[dict[str, Tensor]]]:
    """For what takes data some positive numbers, another array for each expert, where the models will be."""
    needed = [name for name, statistic in method.statistics().items() if statistic.takes_data]
    generator = torch.Generator().manual_seed(1)
    return {
        name: [{NAME: torch.rand(count, generator=generator).to(device)} for _ in range(experts)] for name in needed
    }


def seconds_of(work: Callable[[int, int], Any], count: int, window: int, threads: int) -> float:
    """Wall time of work(first, end) over all windows, each thread taking every so manieth."""
    torch.set_num_threads(1)
    windows = [(first, min(first + window, count)) for first in range(0, count, window)]

    def share(number: int) -> None:
        torch.set_num_threads(1)  # of this thread
        with torch.inference_mode():
            for first, end in windows[number::threads]:
                work(first, end)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(time.sleep, [0.01] * threads))
        began = time.perf_counter()
        list(pool.map(share, range(threads)))
        return time.perf_counter() - began


def on_processor(case: Case, threads: int, repeats: int) -> dict[str, list[Run]]:
    """Copy, loop and eager in turn."""
    count, size = case.window.count, case.bytes // 2
    target, source, copied = (torch.ones(n, dtype=kind) for n, kind in
                              ((count, torch.bfloat16), (size, torch.uint8), (size, torch.uint8)))  # fmt: skip
    per, window = size / count, window_of(case.bytes // count)

    def copy(first: int, end: int) -> None:
        part = slice(int(first * per), int(end * per))
        copied[part].copy_(source[part])

    def timed(loop: BoundFunction) -> Callable[[int, int], Any]:
        return lambda first, end: loop.store(case.window.part(first, end), target[first:end])

    ways = {"copy": copy, "loop": timed(case.fused), "eager": timed(case.eager)}
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for name in ("copy", "loop"):  # first touch, first check
        seconds_of(ways[name], count, window, threads)
    if problem := case.fused.fused.problem:
        print(f"note: {case.name} runs without a loop: {problem}", file=sys.stderr)
    for _ in range(repeats):
        for name, way in ways.items():
            with process_run() as run:
                seconds = seconds_of(way, count, window, threads)
            runs[name].append({**run, "seconds": seconds})
    return runs


def on_device(case: Case, repeats: int) -> dict[str, list[Run]]:
    """The same on the current CUDA device, where the window lies: one launch over everything."""
    device = case.window.experts[0].device
    source = torch.ones(case.bytes // 2, dtype=torch.uint8, device=device)
    target, copied = torch.empty(case.window.count, dtype=torch.bfloat16, device=device), torch.empty_like(source)
    ways: dict[str, Callable[[], Any]] = {
        "copy": lambda: copied.copy_(source),
        "loop": lambda: case.fused.launch(case.window, target),
        "eager": lambda: case.eager.launch(case.window, target),
    }
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    with torch.inference_mode():
        for round in range(repeats + 2):  # two of them to warm up
            for name, way in ways.items():
                began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                with process_run() as run:
                    began.record()
                    way()
                    ended.record()
                    ended.synchronize()
                if round > 1:
                    runs[name].append({**run, "seconds": began.elapsed_time(ended) / 1e3})
    return runs


def row_of(case: Case, where: str, built: Sequence[float], runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Bytes a second of each, and shares of the copy's."""
    seconds = {name: median(values)["seconds"] for name, values in runs.items()}
    speed = {name: case.bytes / taken for name, taken in seconds.items()}
    share = {name: speed[name] / speed["copy"] for name in ("loop", "eager")}
    each = seconds["loop"] / case.window.count * 1e9
    return {
        "method": case.name, "experts": len(case.window.experts), "where": where, "bytes": case.bytes, "speed": speed,
        "share": share, "nanoseconds": each, "fused": not case.fused.fused.problem, "build": sum(built), "runs": runs,
    }  # fmt: skip


def print_row(table: Table, row: Mapping[str, Any]) -> None:
    """A line of the table."""
    speed, share = row["speed"], row["share"]
    table.row(
        row["method"], str(row["experts"]), row["where"],
        number(speed["copy"] / 1e9, 1), number(speed["loop"] / 1e9, 1),
        number(share["loop"]), number(speed["eager"] / 1e9, 2), number(share["eager"]), number(row["nanoseconds"]),
        number(row["build"], 1),
    )  # fmt: skip


def rows_of(library: WatchedLibrary, tensors: list[Tensor], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every method over these models, with each number of threads, and on a device."""
    rows = []
    for name in options.methods:
        if not accepts(method_of(name, settings()[name]), len(tensors) - 1):  # one that joins two, say
            continue
        library.watch.cleared()
        case = case_of(name, settings()[name], tensors, library)
        for threads in dict.fromkeys((1, cores())):
            runs = on_processor(case, threads, options.repeats)
            rows.append(row_of(case, f"{threads} thread{'s' * (threads > 1)}", library.watch.built, runs))
            print_row(options.table, rows[-1])
        if torch.cuda.is_available():
            times = max(1, options.device_elements // options.elements)
            moved = case_of(name, settings()[name], tensors, library, "cuda", times)
            rows.append(row_of(moved, torch.cuda.get_device_name()[:12], [], on_device(moved, options.repeats)))
            print_row(options.table, rows[-1])
    return rows


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(settings())
    parser.add_argument("--elements", type=int, default=16, help="millions of elements of every model (%(default)s)")
    parser.add_argument(
        "--device-elements",
        type=int,
        default=128,
        help="the same on a CUDA device, of which copies lie there (%(default)s)",
    )
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 2, 8], help="how many are merged (1, 2 and 8)")
    parser.add_argument("--methods", nargs="+", choices=known, default=known, metavar="METHOD", help="; ".join(known))
    add_common(parser, 5)
    options, rows = parser.parse_args(), []
    options.table = Table(HEADS)
    with tempfile.TemporaryDirectory() as temporary:
        library = watched_library(Path(temporary))
        for experts in options.experts:
            tensors = models(options.elements * 1_000_000, experts)
            rows += rows_of(library, tensors, options)
            write_json(options.json, rows, elements=options.elements * 1_000_000)
    print_company([run for row in rows for runs in row["runs"].values() for run in runs])


if __name__ == "__main__":
    main()
